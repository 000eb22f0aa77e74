"""The main job as the user starts it: the log, the plots, the command line."""

import ast
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
from conftest import ROOT, SCRIPT, call, figures, same, script, weights, write_idx
from matplotlib import image
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

EPOCH = re.compile(r"Epoch (\d+), Loss: (\d\.\d{6}), Test Loss: (\d\.\d{6}), Time: \d+\.\ds")


def test_log_has_a_header_one_line_per_epoch_and_the_pca(sample_run):
    lines = (sample_run.directory / "training_log.txt").read_text().splitlines()
    header = [line for line in lines[:-1] if line.startswith("#")]
    assert lines == header + lines[len(header) : -1] + lines[-1:]
    for fact in (f"Python {sys.version.split()[0]}", f"NumPy {np.__version__}", "threads"):
        assert fact in "\n".join(header)
    for fact in ("epochs 3", "lr 20", "seed 0", "data: sample, 4000 training and 1000 test"):
        assert fact in "\n".join(header)
    epochs = [EPOCH.fullmatch(line) for line in lines[len(header) : -1]]
    assert [match[1] for match in epochs] == ["1", "2", "3"]
    losses = [float(match[2]) for match in epochs]
    assert losses == sorted(losses, reverse=True) and losses[2] < losses[0] / 2


def test_test_loss_of_the_log_is_that_of_the_saved_model(sample_run):
    model = script.Autoencoder.load(sample_run.directory / "model.npz")
    images = script.load_data("sample", ROOT).test_images
    loss = np.mean((model.reconstruct(images).astype(float) - images / 255) ** 2)
    logged = (sample_run.directory / "training_log.txt").read_text()
    assert float(EPOCH.findall(logged)[2][2]) == pytest.approx(loss, rel=1e-4)


def test_training_loss_is_the_mean_over_the_epochs_images(tmp_path):
    """With a learning rate that changes nothing it must be the initial network's loss."""
    arguments = ("--dataset", "sample", "--epochs", 1, "--lr", 1e-6, "--batch-size", 300)
    assert call(*arguments, "--seed", 3, "--output-dir", tmp_path).status == 0
    images = script.load_data("sample", ROOT).train_images
    outputs = script.Autoencoder(3).reconstruct(images)
    loss = np.mean((outputs.astype(float) - images / 255) ** 2)
    logged = EPOCH.findall((tmp_path / "training_log.txt").read_text())[0][1]
    assert float(logged) == pytest.approx(loss, rel=1e-4)


def test_pca_line_is_scikit_learns_and_says_who_is_better(sample_run):
    data = script.load_data("sample", ROOT)
    pca = PCA(128, svd_solver="full").fit(data.train_images / 255)
    test_images = data.test_images / 255
    outputs = pca.inverse_transform(pca.transform(test_images))
    pca_loss = np.mean((outputs - test_images) ** 2)
    *_, epoch, last = (sample_run.directory / "training_log.txt").read_text().splitlines()
    logged = re.fullmatch(
        r"# PCA with 128 components: Test Loss (\d\.\d{6}); the autoencoder's is (\S+) times (\w+)",
        last,
    )
    assert float(logged[1]) == pytest.approx(pca_loss, abs=1e-6)
    ratio = float(EPOCH.fullmatch(epoch)[3]) / pca_loss
    assert logged[3] == ("higher" if ratio > 1 else "lower")
    assert float(logged[2]) == pytest.approx(max(ratio, 1 / ratio), abs=0.01)


def test_output_tells_the_log_and_where_things_are(sample_run):
    log = sample_run.directory / "training_log.txt"
    assert log.read_text() in sample_run.out
    for name in ("training_log.txt", "plots", "model.npz"):
        assert str(sample_run.directory / name) in sample_run.out


def test_plots_are_images_that_show_something(sample_run):
    plots = sorted((sample_run.directory / "plots").iterdir())
    assert [p.name for p in plots] == [
        "latent_space.png",
        "loss_curve.png",
        "reconstructions.png",
    ]
    for plot in plots:
        pixels = image.imread(plot)
        assert pixels.shape[1] >= 1000 and pixels.shape[0] >= 500
        assert len(np.unique(pixels[::3, ::3])) > 50


@pytest.fixture
def drawn(sample_run, monkeypatch, tmp_path):
    """The figures of the three plots, drawn again from what the sample run has saved."""
    found = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: found.append(figure))
    run = script.Run.load(sample_run.directory / "checkpoint.npz")
    data = script.load_data("sample", ROOT)
    script.plot_losses(tmp_path / "1.png", run.history, 128, 0.0123, "sample")
    codes = run.model.encode(data.test_images)
    script.plot_latent_space(tmp_path / "2.png", codes, data.test_labels, "sample")
    script.plot_reconstructions(tmp_path / "3.png", run.model, data, "sample")
    return found, run, data


def test_loss_curve_shows_the_history_on_a_logarithmic_axis(drawn):
    (figure, _, _), run, _ = drawn
    (axes,) = figure.axes
    train, test, pca = axes.lines
    np.testing.assert_array_equal(train.get_ydata(), [row[0] for row in run.history])
    np.testing.assert_array_equal(test.get_ydata(), [row[1] for row in run.history])
    np.testing.assert_array_equal(train.get_xdata(), [1, 2, 3])
    assert set(pca.get_ydata()) == {0.0123}
    assert axes.get_yscale() == "log"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label.split()[0] for label in labels] == ["training", "test", "PCA"]


def test_latent_space_shows_each_digits_codes_projected(drawn):
    (_, figure, _), run, data = drawn
    (axes,) = figure.axes
    pca = PCA(2, svd_solver="full")
    points = pca.fit_transform(run.model.encode(data.test_images))
    for digit, scatter in enumerate(axes.collections):
        assert scatter.get_label() == str(digit)
        np.testing.assert_allclose(
            np.asarray(scatter.get_offsets()),
            points[data.test_labels == digit],
            rtol=1e-4,
            atol=1e-4,
        )
    assert len(axes.collections) == 10
    for label, share in zip(
        (axes.get_xlabel(), axes.get_ylabel()), pca.explained_variance_ratio_, strict=True
    ):
        assert f"{share:.1%}" in label


def test_reconstructions_show_one_image_per_digit_its_output_and_the_error(drawn):
    (_, _, figure), run, data = drawn
    shown = [axes.images[0] for axes in figure.axes[:30]]
    pixels = np.array([np.asarray(each.get_array()) for each in shown]).reshape(3, 10, 784)
    for digit, (original, output, error) in enumerate(pixels.transpose(1, 0, 2)):
        rows = np.flatnonzero(data.test_labels == digit)
        assert any(np.allclose(original, data.test_images[row] / 255) for row in rows)
        np.testing.assert_allclose(output, run.model.reconstruct(original[None])[0], atol=1e-5)
        np.testing.assert_allclose(error, np.abs(output - original), atol=1e-6)
        stated = figure.axes[20 + digit].get_xlabel()
        assert float(stated) == pytest.approx(np.mean(error**2), abs=1e-5)
    assert len({each.get_clim() for each in shown[20:]}) == 1
    assert all(each.get_clim() == (0, 1) for each in shown[:20])


def test_same_seed_same_run_and_another_seed_another(sample_run, tmp_path):
    runs = {}
    for name, seed in (("again", 0), ("other", 1)):
        arguments = ("--dataset", "sample", "--epochs", 3, "--seed", seed)
        assert call(*arguments, "--output-dir", tmp_path / name).status == 0
        log = tmp_path / name / "training_log.txt"
        runs[name] = (figures(log), weights(tmp_path / name / "model.npz"))
    first = figures(sample_run.directory / "training_log.txt")
    assert runs["again"][0] == first and runs["other"][0] != first
    model = weights(sample_run.directory / "model.npz")
    assert same(runs["again"][1], model) and not same(runs["other"][1], model)


@pytest.fixture
def steps(monkeypatch):
    """The (model, velocity, images, lr, momentum) of every step that is taken."""
    taken = []
    sgd_step = script.sgd_step

    def recording(*arguments):
        taken.append(arguments)
        return sgd_step(*arguments)

    monkeypatch.setattr(script, "sgd_step", recording)
    return taken


def test_every_epoch_uses_every_image_once_and_in_another_order(tmp_path, steps):
    write_idx(tmp_path, 50, 20)
    arguments = ("--data-dir", tmp_path, "--output-dir", tmp_path / "out", "--lr", 0.1)
    for seed in (0, 1):
        assert call(*arguments, "--epochs", 3, "--batch-size", 16, "--seed", seed).status == 0
    seen = [images for _, _, images, _, _ in steps]
    assert [len(batch) for batch in seen] == [16, 16, 16, 2] * 6
    epochs = [np.concatenate(seen[start : start + 4]) for start in range(0, 24, 4)]
    images = script.load_data("mnist", tmp_path).train_images
    for epoch in epochs:
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, images))
    orders = [images.tobytes(), *(epoch.tobytes() for epoch in epochs)]
    assert len(set(orders)) == 7


def test_learning_rate_follows_the_schedule_over_the_whole_run(tmp_path, steps):
    write_idx(tmp_path, 50, 20)
    arguments = ("--data-dir", tmp_path, "--output-dir", tmp_path / "out", "--lr", 0.1)
    assert call(*arguments, "--epochs", 3, "--batch-size", 16, "--momentum", 0.5).status == 0
    rates = [step[3:] for step in steps]
    assert rates == [(script.learning_rate(step, 12, 0.1), 0.5) for step in range(12)]


def test_divergence_stops_with_one_line_and_keeps_the_log(tmp_path, monkeypatch):
    write_idx(tmp_path, 50, 20)
    sgd_step = script.sgd_step
    calls = []

    def step_that_diverges(model, velocity, batch, lr, momentum):
        calls.append(1)
        if len(calls) == 6:  # in the second step of the second epoch
            model.weights[0][:] = np.inf
        return sgd_step(model, velocity, batch, lr, momentum)

    monkeypatch.setattr(script, "sgd_step", step_that_diverges)
    arguments = ("--data-dir", tmp_path, "--output-dir", tmp_path / "out", "--batch-size", 16)
    result = call(*arguments, "--epochs", 3, "--lr", 0.1)
    assert result.status == 1 and len(result.lines) == 1
    for part in ("epoch 2", "step 2", "--lr", "0.1", "--momentum"):
        assert part in result.err
    assert len(figures(tmp_path / "out" / "training_log.txt")) == 1


BAD_FLAGS = [
    ("--epochs", "0"),
    ("--epochs", "-3"),
    ("--epochs", "2.5"),
    ("--epochs", "1e2"),
    ("--epochs", "ten"),
    ("--epochs", ""),
    ("--epochs", "9" * 5000),
    ("--batch-size", "0"),
    ("--batch-size", "1.5"),
    ("--batch-size", "-128"),
    ("--batch-size", "inf"),
    ("--lr", "nan"),
    ("--lr", "0"),
    ("--lr", "-1"),
    ("--lr", "inf"),
    ("--lr", "1e300"),
    ("--lr", "fast"),
    ("--momentum", "1"),
    ("--momentum", "-0.1"),
    ("--momentum", "nan"),
    ("--seed", "-1"),
    ("--seed", "1.0"),
    ("--seed", "4294967296"),
    ("--blas-threads", "0"),
    ("--dataset", "cifar"),
    ("--dataset", "MNIST"),
]


@pytest.mark.parametrize(("flag", "value"), BAD_FLAGS)
def test_bad_value_is_refused_before_anything_is_read_or_written(
    tmp_path, monkeypatch, flag, value
):
    monkeypatch.setattr(script, "load_data", None)
    result = call("--output-dir", tmp_path / "out", flag, value)
    assert (result.status, result.out, len(result.lines)) == (2, "", 1)
    assert flag in result.err and repr(value) in result.err and " is not " in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["--epoch", "5"], ["--frobnicate"], ["--lr"], ["stray"], ["--resume", "--overwrite"]],
)
def test_unknown_or_incomplete_arguments_are_refused_in_one_line(arguments):
    result = call(*arguments)
    assert (result.status, result.out, len(result.lines)) == (2, "", 1)
    assert arguments[0] in result.err


def start(*arguments, **options):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_as_the_user_starts_it(sample_run, tmp_path):
    result = start("--dataset", "sample", "--epochs", 3, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    expected = ["checkpoint.npz", "model.npz", "plots", "training_log.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    log = tmp_path / "training_log.txt"
    assert figures(log) == figures(sample_run.directory / "training_log.txt")
    assert "\r" not in result.stdout and log.read_text() in result.stdout


def test_help_names_every_flag_and_default_and_loads_nothing_heavy():
    result = start("--help")
    assert result.returncode == 0
    for name, value in vars(script.Settings()).items():
        assert f"--{name.replace('_', '-')} " in result.stdout
        assert f"{value})" in " ".join(result.stdout.split())
    command = [sys.executable, "-c", "import mnist_autoencoder, sys; print(*sys.modules)"]
    loaded = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    assert "numpy" in loaded.split()
    assert not {"torch", "torchvision", "matplotlib", "sklearn", "scipy"} & set(loaded.split())


def test_terminal_shows_a_bar_below_the_log_lines(tmp_path):
    write_idx(tmp_path)
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    places = ("--data-dir", tmp_path, "--output-dir", tmp_path / "out")
    command = [sys.executable, SCRIPT, *places]
    process = subprocess.Popen([*command, "--epochs", "2", "--lr", "0.1"], stdout=terminal)
    os.close(terminal)
    shown = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            shown += os.read(reader, 4096)
        except OSError:  # the terminal was closed
            break
    os.close(reader)
    assert process.wait(10) == 0
    lines = [part.strip() for part in re.split(r"[\r\n]+", shown.decode())]
    for line in (tmp_path / "out" / "training_log.txt").read_text().splitlines():
        assert line in lines
    bars = [line for line in lines if "2/2" in line and "test loss" in line]
    assert bars


def test_closed_pipe_ends_without_a_traceback(tmp_path):
    write_idx(tmp_path)
    command = f"'{sys.executable}' '{SCRIPT}' --data-dir . --output-dir out --epochs 2 | true"
    result = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr


def requirements(path):
    lines = path.read_text().splitlines()
    return {line for line in lines if line and not line.startswith(("#", "-r"))}


def test_inline_metadata_requires_what_requirements_txt_does():
    block = re.search(r"^# /// script\n((?:# .*\n)+)# ///$", SCRIPT.read_text(), re.MULTILINE)[1]
    content = "".join(line[2:] for line in block.splitlines(keepends=True))
    listed = ast.literal_eval(content.partition("dependencies = ")[2])
    assert set(listed) == requirements(ROOT / "requirements.txt")


def test_committed_log_is_of_the_scripts_default_run():
    log = ROOT / "training_log.txt"
    defaults = vars(script.Settings(dataset="mnist"))
    names = [name for name in defaults if not name.endswith("_dir")]
    text = log.read_text()
    assert f"# settings: {', '.join(f'{name} {defaults[name]}' for name in names)}\n" in text
    assert "# data: mnist, 60000 training and 10000 test images" in text
    assert len(figures(log)) == defaults["epochs"]
    assert "-".join(map(str, script.LAYER_SIZES)) in text.splitlines()[0]


def test_ten_epochs_on_all_of_mnist_reach_0_0030(mnist_dir, tmp_path):
    result = call("--data-dir", mnist_dir, "--epochs", 10, "--output-dir", tmp_path)
    assert result.status == 0, result.err
    _, loss, test_loss = EPOCH.findall((tmp_path / "training_log.txt").read_text())[-1]
    assert float(loss) <= 0.0030 and float(test_loss) <= 0.0030
