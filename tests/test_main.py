"""The main job as the user starts it: the log, the plots, the command line."""

import os
import re
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import EPOCH, ROOT, SCRIPT, call, result_of, script, start, write_idx
from matplotlib import image
from matplotlib.figure import Figure
from sklearn.decomposition import PCA


def epochs(directory):
    """Training and test loss of every epoch in a log."""
    found = EPOCH.findall((directory / "training_log.txt").read_text())
    return [(float(loss), float(test_loss)) for _, loss, test_loss in found]


def test_log_has_a_header_and_one_line_per_epoch(sample_run):
    lines = (sample_run.directory / "training_log.txt").read_text().splitlines()
    header = "\n".join(lines[:-5])
    assert all(line.startswith("# ") for line in lines[:-5])
    for fact in ("epochs 5", "batch_size 128", "lr 15.0", "momentum 0.98", "seed 0", "sha256"):
        assert fact in header
    for fact in (f"Python {sys.version.split()[0]}", f"NumPy {np.__version__}", "threads"):
        assert fact in header
    assert [EPOCH.fullmatch(line)[1] for line in lines[-5:]] == ["1", "2", "3", "4", "5"]


def test_test_loss_of_the_log_is_that_of_the_saved_model(sample_run, sample):
    model = script.Autoencoder.load(sample_run.directory / "model.npz")
    outputs = model.reconstruct(sample[2]).astype(float)
    loss = np.mean((outputs - sample[2] / 255) ** 2)
    assert epochs(sample_run.directory)[-1][1] == pytest.approx(loss, rel=1e-3)


def test_training_loss_is_the_mean_over_the_epochs_images(tmp_path, sample):
    """With a learning rate that changes nothing it must be the loss of the mean image."""
    arguments = ("--dataset", "sample", "--epochs", 1, "--lr", 1e-6, "--batch-size", 300)
    assert call(*arguments, "--output-dir", tmp_path).status == 0
    images = sample[1] / 255
    loss = np.mean((images - images.mean(axis=0).clip(0.002, 0.998)) ** 2)
    assert epochs(tmp_path)[0][0] == pytest.approx(loss, rel=1e-4)


def test_log_compares_with_the_mean_image_and_scikit_learns_pca(sample_run, sample):
    images, test_images = sample[1] / 255, sample[2] / 255
    pca = PCA(128, svd_solver="full").fit(images)
    outputs = pca.inverse_transform(pca.transform(test_images))
    log = (sample_run.directory / "training_log.txt").read_text()
    for name, answer in (("mean image", images.mean(axis=0)), ("128 components", outputs)):
        logged = float(re.search(rf"{name}: (0\.\d{{6}})", log)[1])
        assert logged == pytest.approx(np.mean((answer - test_images) ** 2), abs=2e-6)


def test_plots_are_whole_images_and_nothing_else_is_left(sample_run):
    found = {path.name for path in sample_run.directory.rglob("*")}
    plots = {"loss_curve.png", "latent_space.png", "reconstructions.png"}
    assert found == {"model.npz", "training_log.txt", "plots", *plots}
    for name in plots:
        pixels = image.imread(sample_run.directory / "plots" / name)
        assert pixels.shape[1] >= 1000 and pixels.shape[0] >= 500
        assert len(np.unique(pixels[::3, ::3])) > 50


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, of which none is written out."""
    found = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: found.append(figure))
    return found


def test_loss_curve_shows_history_and_references_on_a_logarithmic_axis(figures, tmp_path):
    history = [[0.04, 0.01, 3.0], [0.005, 0.004, 3.1]]
    script.plot_losses(tmp_path / "x.png", "the data", history, {"one": 0.07, "two": 0.0123})
    (axes,) = figures[0].axes
    curves = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines[:2]]
    assert curves == [([1, 2], [0.04, 0.005]), ([1, 2], [0.01, 0.004])]
    assert [set(line.get_ydata()) for line in axes.lines[2:]] == [{0.07}, {0.0123}, {0.004}]
    texts = [text.get_text() for text in axes.texts]
    assert [text.split(": ")[1] for text in texts] == ["0.0700", "0.0123", "0.0040"]
    assert texts[0].startswith("one") and texts[1].startswith("two") and "original" in texts[2]
    assert axes.get_yscale() == "log" and "the data" in axes.get_title()


def test_latent_space_shows_each_digits_codes_projected(figures, tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((60, 128)) * np.arange(128, 0, -1)
    labels = np.arange(60, dtype=np.uint8) % 10
    script.plot_latent_space(tmp_path / "x.png", "the data", codes, labels)
    pca = PCA(2, svd_solver="full")
    points = pca.fit_transform(codes)
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.texts] == list("0123456789")
    for digit, scatter in enumerate(axes.collections):
        shown = np.asarray(scatter.get_offsets())
        np.testing.assert_allclose(shown, points[labels == digit], rtol=1e-6)
    for label, share in zip(
        (axes.get_xlabel(), axes.get_ylabel()), pca.explained_variance_ratio_, strict=True
    ):
        assert f"{share:.1%}" in label


def test_reconstructions_show_one_image_per_digit_its_output_and_the_error(figures, tmp_path):
    rng = np.random.default_rng(0)
    images, outputs = rng.random((2, 20, 784))
    labels = np.arange(20)[::-1] % 10
    script.plot_reconstructions(tmp_path / "x.png", "the data", images, outputs, labels)
    cells = np.array(figures[0].axes).reshape(3, 10)
    for digit, column in enumerate(cells.T):
        original, output, error = (np.ravel(cell.images[0].get_array()) for cell in column)
        (row,) = np.flatnonzero((images == original).all(axis=1))
        assert labels[row] == digit and (output == outputs[row]).all()
        np.testing.assert_allclose(error, 3 * np.abs(output - original))
        mse = float(column[2].get_xlabel().split()[-1])
        assert mse == pytest.approx(np.mean((output - original) ** 2), abs=1e-4)
        assert {cell.images[0].get_clim() for cell in column} == {(0, 1)}
    rows = [cell.get_ylabel().split()[0] for cell in cells[:, 0]]
    assert rows == ["original", "reconstruction", "error"]


def test_same_seed_same_run_and_another_seed_another(small, tmp_path):
    arguments, whole = small
    for seed in (0, 1):
        assert call(*arguments, "--seed", seed, "--output-dir", tmp_path / f"{seed}").status == 0
    assert result_of(tmp_path / "0") == result_of(whole)
    assert result_of(tmp_path / "1")["parameters"] != result_of(whole)["parameters"]


@pytest.fixture
def steps(monkeypatch):
    """The (images, learning rate, decay) of every step that is taken."""
    taken, sgd_step = [], script.sgd_step

    def recording(run, images, lr, decay):
        taken.append((images, lr, decay))
        return sgd_step(run, images, lr, decay)

    monkeypatch.setattr(script, "sgd_step", recording)
    return taken


def test_every_epoch_uses_every_image_once_and_in_another_order(tmp_path, steps):
    write_idx(tmp_path, 50, 20)
    for seed in (0, 1):
        arguments = ("--epochs", 3, "--batch-size", 16, "--seed", seed, "--lr", 0.1)
        assert call(*arguments, "--data-dir", tmp_path, "--output-dir", tmp_path).status == 0
    assert [len(batch) for batch, _, _ in steps] == [16, 16, 16, 2] * 6
    seen = [np.concatenate([step[0] for step in steps[i : i + 4]]) for i in range(0, 24, 4)]
    images = script.scaled(script.load_data("mnist", tmp_path)[1])
    for epoch in seen:
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, images))
    assert len({images.tobytes(), *(epoch.tobytes() for epoch in seen)}) == 7


def test_learning_rate_follows_the_schedule_and_decay_the_number_of_images(tmp_path, steps):
    write_idx(tmp_path, 50, 20)
    arguments = ("--data-dir", tmp_path, "--output-dir", tmp_path, "--epochs", 3)
    assert call(*arguments, "--batch-size", 16, "--lr", 0.1).status == 0
    assert [lr for _, lr, _ in steps] == [script.learning_rate(n, 12, 0.1) for n in range(12)]
    assert {decay for _, _, decay in steps} == {0.006 / 50}
    steps.clear()
    assert call(*arguments, "--batch-size", 16).status == 0
    peak = script.peak_learning_rate(16)
    assert [lr for _, lr, _ in steps] == [script.learning_rate(n, 12, peak) for n in range(12)]
    steps.clear()  # a mini-batch can't be larger than the training set
    assert call(*arguments, "--batch-size", 100_000).status == 0
    assert max(lr for _, lr, _ in steps) <= script.peak_learning_rate(50)


@pytest.mark.parametrize(
    ("flags", "count"),
    [(("--batch-size", 1), 2), (("--batch-size", 8), 3), (("--batch-size", 32), 5)]
    + [(("--batch-size", 512), 5), (("--batch-size", 1024), 20)]
    + [(("--lr", 30), 5), (("--momentum", 0.99), 10), (("--momentum", 0), 10)],
)
def test_learning_is_safe_over_the_range_of_every_flag(tmp_path, flags, count):
    arguments = ("--dataset", "sample", "--epochs", count, "--output-dir", tmp_path)
    assert call(*arguments, *flags).status == 0
    assert epochs(tmp_path)[-1][1] < 0.025


@pytest.mark.parametrize("weight", [1e3, np.inf, np.nan])
def test_dead_network_stops_with_one_line_and_keeps_the_last_good_epoch(
    small, tmp_path, monkeypatch, weight
):
    arguments, whole = small
    sgd_step, calls = script.sgd_step, []

    def step_that_kills(run, *rest):
        calls.append(1)
        if len(calls) == 10:  # in the third epoch
            run.model.parameters[:] = weight
        return sgd_step(run, *rest)

    monkeypatch.setattr(script, "sgd_step", step_that_kills)
    result = call(*arguments, "--output-dir", tmp_path)
    assert result.status == 1 and len(result.lines) == 1
    assert "epoch 3" in result.err and "--lr below 1.875" in result.err
    assert epochs(tmp_path) == epochs(whole)[:2]
    assert not list((tmp_path / "plots").iterdir())
    monkeypatch.undo()
    assert call(*arguments, "--output-dir", tmp_path, "--resume").status == 0
    assert result_of(tmp_path) == result_of(whole)


def test_absurd_learning_rate_is_noticed_and_a_slow_one_goes_on(tmp_path):
    arguments = ("--dataset", "sample", "--epochs", 2, "--output-dir", tmp_path)
    result = call(*arguments, "--lr", 1000)
    assert result.status == 1 and len(result.lines) == 1 and "--lr below 1000" in result.err
    assert call(*arguments, "--lr", 0.001).status == 0


BAD_FLAGS = {
    "--epochs": ["0", "-3", "2.5", "1e2", "ten", "", "9" * 5000],
    "--batch-size": ["0", "1.5", "-128", "inf"],
    "--lr": ["nan", "0", "-1", "inf", "1e300", "fast"],
    "--momentum": ["1", "0.999", "-0.1", "nan"],
    "--seed": ["-1", "1.0", "4294967296"],
    "--dataset": ["cifar", "MNIST"],
}


@pytest.mark.parametrize(("flag", "value"), [(f, v) for f, vs in BAD_FLAGS.items() for v in vs])
def test_bad_value_is_refused_before_anything_is_read_or_written(
    tmp_path, monkeypatch, flag, value
):
    monkeypatch.setattr(script, "load_data", None)
    result = call("--output-dir", tmp_path / "out", flag, value)
    assert (result.status, result.out, len(result.lines)) == (2, "", 1)
    assert flag in result.err and repr(value) in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--epoch", "5"], ["--frobnicate"], ["--lr"], ["stray"]])
def test_unknown_or_incomplete_arguments_are_refused_in_one_line(arguments):
    result = call(*arguments)
    assert (result.status, result.out, len(result.lines)) == (2, "", 1)
    assert arguments[0] in result.err


def test_as_the_user_starts_it(small, tmp_path):
    arguments, whole = small
    process = start(*arguments, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out == (tmp_path / "training_log.txt").read_text() and "\r" not in out
    assert result_of(tmp_path) == result_of(whole)


def test_terminal_shows_a_bar_below_the_log_lines(small, tmp_path):
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    process = start(*small[0], "--output-dir", tmp_path, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            shown += os.read(reader, 4096)
        except OSError:  # the terminal was closed
            break
    os.close(reader)
    assert process.wait(10) == 0
    lines = [part.strip() for part in re.split(r"[\r\n]+", shown.decode())]
    assert set((tmp_path / "training_log.txt").read_text().splitlines()[-4:]) <= set(lines)
    assert any("4/4" in line for line in lines)


def test_closed_pipe_ends_without_a_traceback(small, tmp_path):
    process = start(*small[0], "--output-dir", tmp_path)
    process.stdout.close()
    err = process.stderr.read()
    process.wait(60)
    assert "Traceback" not in err and "Exception ignored" not in err


def test_inline_metadata_requires_what_requirements_txt_does():
    listed = re.findall(r'"([a-z]\S+)"', SCRIPT.read_text().partition('"""')[0])
    assert listed == (ROOT / "requirements.txt").read_text().split() != []


def test_committed_log_is_of_the_default_run_on_all_of_mnist():
    command = ["git", "-C", str(ROOT), "show", "HEAD:./training_log.txt"]  # runs replace the file
    try:
        log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and the history of this folder")
    defaults = script.parse_arguments([])
    rate = script.peak_learning_rate(defaults.batch_size)
    for name in ("epochs", "batch_size", "momentum", "seed"):
        assert f" {name} {getattr(defaults, name)}, " in log
    assert f" lr {rate}, " in log and "data MNIST, 60000 training and 10000 test images" in log
    losses = [(float(loss), float(test_loss)) for _, loss, test_loss in EPOCH.findall(log)]
    assert len(losses) == defaults.epochs
    assert losses[-1][0] <= 0.00080 and losses[-1][1] <= 0.00099


def test_ten_epochs_on_all_of_mnist(mnist_dir, tmp_path):
    result = call("--data-dir", mnist_dir, "--epochs", 10, "--output-dir", tmp_path)
    assert result.status == 0, result.err
    losses = epochs(tmp_path)
    assert losses[1][0] <= 0.0040
    assert losses[-1][0] <= 0.00126 and losses[-1][1] <= 0.00132
