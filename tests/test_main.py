"""The program as the user starts it: the log, the plots and the command line."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from conftest import EPOCH, call, fails, read_log, result_of, script, snapshot, start, write_idx
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sklearn.decomposition import PCA

ROOT = Path(script.__file__).parent


def epochs(directory):
    """The training and test loss of every epoch in a log."""
    found = EPOCH.findall(read_log(directory))
    return [(float(loss), float(test_loss)) for _, loss, test_loss in found]


# The log. ----------------------------------------------------------------------------------------
def test_log_has_a_header_and_one_line_per_epoch(sample_run):
    lines = read_log(sample_run.directory).splitlines()
    assert sample_run.out.splitlines() == lines
    header = "\n".join(lines[:-5])
    assert all(line.startswith("# ") for line in lines[:-5])
    for field in fields(script.Settings):
        assert f"{field.name} {5 if field.name == 'epochs' else field.default}" in header
    for fact in (f"Python {sys.version.split()[0]}", f"NumPy {np.__version__}", "sha256"):
        assert fact in header
    assert [EPOCH.fullmatch(line)[1] for line in lines[-5:]] == ["1", "2", "3", "4", "5"]


def test_losses_of_the_log_are_those_of_model_mean_image_and_scikit_learns_pca(sample_run, sample):
    log = read_log(sample_run.directory)
    model = script.load_run(sample_run.directory / "model.npz").model
    images, test_images = sample.images / 255, sample.test_images / 255
    pca = PCA(128, svd_solver="full").fit(images)
    for pattern, outputs in (
        (r"mean image: (\S+),", images.mean(axis=0)),
        (r"128 components: (\S+)", pca.inverse_transform(pca.transform(test_images))),
        (r"Epoch 5, .* Test Loss: (\S+),", model.reconstruct(sample.test_images).astype(float)),
    ):
        loss = np.mean((outputs - test_images) ** 2)
        assert float(re.search(pattern, log)[1]) == pytest.approx(loss, abs=2e-6)


def test_training_loss_is_the_mean_over_the_epochs_images(tmp_path, sample):
    """With a learning rate that changes nothing, it is the loss of the mean image."""
    flags = ("--dataset", "sample", "--epochs", 1, "--lr", 1e-6, "--batch-size", 300)
    result = call(*flags, "--output-dir", tmp_path)
    loss = np.mean((sample.images / 255 - sample.images.mean(axis=0) / 255) ** 2)
    assert epochs(tmp_path)[0][0] == pytest.approx(loss, rel=1e-4)
    assert result.status == 0 and len(result.lines) == 1  # nothing was learned, which is told
    assert "more than half the loss of the mean image" in result.err


# The plots. --------------------------------------------------------------------------------------
def test_plots_are_whole_images_and_nothing_else_is_left(sample_run):
    found = {path.relative_to(sample_run.directory) for path in sample_run.directory.rglob("*.*")}
    plots = [Path("plots") / name for name in script.PLOTS]
    assert found == {Path("model.npz"), Path("training_log.txt"), *plots}
    for plot in plots:
        pixels = image.imread(sample_run.directory / plot)
        assert pixels.shape[1] >= 1000 and pixels.shape[0] >= 500
        assert len(np.unique(pixels[::3, ::3])) > 50


def some_baselines():
    pca = PCA(3).fit(np.random.default_rng(1).random((50, 784)))
    return script.Baselines(mean_image_loss=0.07, pca=pca, pca_loss=0.0123)


@pytest.mark.parametrize(
    "losses", [[[0.04, 0.01], [0.005, 0.004]], [[0.0021, 0.0022]], [[0.067, 0.0669]] * 2]
)
def test_loss_curve_shows_every_epoch_and_pca_and_labels_the_last_losses(losses):
    figure = script.plot_losses(losses, some_baselines(), "the data")
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    epochs = list(range(1, len(losses) + 1))
    curves = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines[:2]]
    assert curves == [(epochs, [row[0] for row in losses]), (epochs, [row[1] for row in losses])]
    assert set(axes.lines[2].get_ydata()) == {0.0123} and len(axes.lines) == 3
    assert [text.get_text() for text in axes.texts] == [f"{loss:.5f}" for loss in losses[-1]]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not boxes[0].overlaps(boxes[1])
    low, high = axes.get_ylim()
    assert [y for y in axes.get_yticks() if low <= y <= high]
    assert all(x == int(x) for x in axes.get_xticks())
    assert "the data" in axes.get_title() and "0.0700" in axes.get_title()
    assert "PCA, test: 0.01230" in [text.get_text() for text in figure.legends[0].texts]


def test_latent_space_shows_all_codes_projected_in_their_digits_colour():
    codes = np.random.default_rng(0).standard_normal((60, 128)) * np.arange(128, 0, -1)
    labels = np.arange(60, dtype=np.uint8) // 6
    (axes,) = script.plot_latent_space(codes, labels, "the data").axes
    pca = PCA(2, svd_solver="full")
    points = pca.fit_transform(codes)
    (scatter,) = axes.collections
    shown, colors = np.asarray(scatter.get_offsets()), scatter.get_facecolors()
    order = [np.argmin(np.linalg.norm(points - point, axis=1)) for point in shown]
    assert sorted(order) == list(range(60))
    np.testing.assert_allclose(shown, points[order], rtol=1e-6)
    assert np.count_nonzero(np.diff(labels[order])) > 30  # no digit is drawn on top of the others
    pairs = {(digit, tuple(color)) for digit, color in zip(labels[order], colors, strict=True)}
    assert len(pairs) == len({color for _, color in pairs}) == 10
    first, second = pca.explained_variance_ratio_
    assert f"{first:.1%}" in axes.get_xlabel() and f"{second:.1%}" in axes.get_ylabel()
    assert "the data" in axes.get_title() and f"{first + second:.0%}" in axes.get_title()
    assert axes.get_aspect() == 1


@pytest.mark.parametrize("spread", [0, 1e-3, 1, 100])
def test_labels_of_digits_never_cover_each_other(spread):
    rng = np.random.default_rng(0)
    labels = np.arange(1000, dtype=np.uint8) % 10
    codes = rng.standard_normal((1000, 128)) + spread * rng.standard_normal((10, 128))[labels]
    figure = script.plot_latent_space(codes, labels, "the data")
    FigureCanvasAgg(figure).draw()
    texts = figure.axes[0].texts
    assert [text.get_text() for text in texts] == list("0123456789")
    boxes = [text.get_bbox_patch().get_window_extent() for text in texts]
    assert not any(boxes[i].overlaps(boxes[j]) for i in range(10) for j in range(i))


def test_reconstructions_show_one_image_per_digit_its_outputs_and_errors(sample):
    rng = np.random.default_rng(0)
    baselines = some_baselines()
    outputs = rng.random(sample.test_images.shape)
    figure = script.plot_reconstructions(sample, outputs, baselines.pca)
    cells = np.array(figure.axes).reshape(5, 10)
    images = sample.test_images / 255
    for digit, column in enumerate(cells.T):
        shown = [np.ravel(cell.images[0].get_array()) for cell in column]
        (row,) = np.flatnonzero(np.isclose(images, shown[0]).all(axis=1))
        assert row == np.flatnonzero(sample.test_labels == digit)[0]
        pca_output = baselines.pca.inverse_transform(baselines.pca.transform(images[[row]]))[0]
        for output, place in ((outputs[row], 1), (pca_output, 3)):
            np.testing.assert_allclose(shown[place], output, atol=1e-5)
            np.testing.assert_allclose(shown[place + 1], output - images[row], atol=1e-5)
            mse = float(column[place + 1].get_xlabel().split()[-1])
            assert mse == pytest.approx(np.mean((output - images[row]) ** 2), abs=1e-4)
        limits = [cell.images[0].get_clim() for cell in column]
        assert limits == [(0, 1), (0, 1), (-0.5, 0.5), (0, 1), (-0.5, 0.5)]
    rows = [cell.get_ylabel() for cell in cells[:, 0]]
    assert rows == ["original", "autoencoder", "error", "PCA", "error"]


# Training. ---------------------------------------------------------------------------------------
@pytest.mark.usefixtures("no_plots")
def test_same_seed_same_run_and_another_seed_another(small, tmp_path):
    arguments, whole = small
    for seed in (0, 1):
        assert call(*arguments, "--seed", seed, "--output-dir", tmp_path / f"{seed}").status == 0
    assert result_of(tmp_path / "0") == result_of(whole)
    assert result_of(tmp_path / "1")[3] != result_of(whole)[3]


@pytest.mark.usefixtures("no_plots")
def test_every_step_gets_its_images_its_learning_rate_and_its_weight_decay(tmp_path, monkeypatch):
    batches, rates, backward, sgd_step = [], [], script.Autoencoder.backward, script.sgd_step

    def record_images(model, activations, images):
        batches.append(images)
        return backward(model, activations, images)

    def record_rates(*vectors, learning_rate, weight_decay, **rest):
        assert weight_decay == 0.006 / 50
        rates.append(learning_rate)
        sgd_step(*vectors, learning_rate=learning_rate, weight_decay=weight_decay, **rest)

    monkeypatch.setattr(script.Autoencoder, "backward", record_images)
    monkeypatch.setattr(script, "sgd_step", record_rates)
    write_idx(tmp_path, 50, 20)
    places = ("--data-dir", tmp_path, "--output-dir", tmp_path)
    for batch_size, *flags in ((16, "--lr", 0.1), (16, "--seed", 1), (100_000,)):
        assert call(*places, "--epochs", 3, "--batch-size", batch_size, *flags).status == 0
    # A mini-batch cannot be larger than the training set.
    assert [len(batch) for batch in batches] == [16, 16, 16, 2] * 6 + [50] * 3
    images = script.load_data("mnist", tmp_path).images
    np.testing.assert_allclose(script.to_pixels(images), images / 255, rtol=1e-6)
    images = script.to_pixels(images)
    shuffled = np.concatenate(batches).reshape(9, 50, 784)
    for epoch in shuffled:
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, images))
    assert len({images.tobytes(), *(epoch.tobytes() for epoch in shuffled[:6])}) == 7
    expected = []
    for count, peak in ((12, 0.1), (12, script.default_learning_rate(16)), (3, 8 * 50 / 128)):
        expected += [script.scheduled_learning_rate(step, count, peak) for step in range(count)]
    assert rates == expected


SAFE = [("--batch-size", 1, 1), ("--batch-size", 8, 3), ("--batch-size", 32, 5)]
SAFE += [("--batch-size", 512, 5), ("--batch-size", 1024, 20), ("--lr", 16, 5)]
SAFE += [("--momentum", 0.99, 10), ("--momentum", 0, 10)]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(("flag", "value", "count"), SAFE)
def test_learning_is_safe_over_the_range_of_every_flag(tmp_path, flag, value, count):
    arguments = ("--dataset", "sample", "--epochs", count, "--output-dir", tmp_path)
    assert call(*arguments, flag, value).status == 0
    assert epochs(tmp_path)[-1][1] < 0.02


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("weight", [1e3, np.inf, np.nan])
def test_divergence_keeps_the_last_good_epoch(small, tmp_path, monkeypatch, weight):
    arguments, whole = [*small[0], "--output-dir", tmp_path], small[1]
    train_epoch = script.train_epoch

    def diverge_in_epoch_3(model, velocity, images, epoch, settings):
        if epoch == 3:
            model.parameters[:] = weight
        return train_epoch(model, velocity, images, epoch, settings)

    with monkeypatch.context() as patch:
        patch.setattr(script, "train_epoch", diverge_in_epoch_3)
        fails(call(*arguments), 1, "epoch 3", "--lr below 1")
    assert epochs(tmp_path) == epochs(whole)[:2]
    assert call(*arguments, "--resume").status == 0
    assert result_of(tmp_path) == result_of(whole)


@pytest.mark.parametrize(("rate", "count"), [(1000, 2), (64, 5)])
def test_ending_worse_than_the_mean_image_is_an_error(tmp_path, rate, count):
    flags = ("--dataset", "sample", "--epochs", count, "--output-dir", tmp_path)
    fails(call(*flags, "--lr", rate), 1, f"--lr below {rate}")
    assert not any((tmp_path / "plots").iterdir())


# The command line. -------------------------------------------------------------------------------
BAD_FLAGS = {
    "--epochs": ["0", "-3", "2.5", "1e2", "ten", "", "9" * 5000],
    "--batch-size": ["0", "1.5", "-128", "inf"],
    "--lr": ["nan", "0", "-1", "inf", "1e300", "fast"],
    "--momentum": ["1", "0.999", "-0.1", "nan"],
    "--seed": ["-1", "1.0", "4294967296"],
    "--dataset": ["cifar", "MNIST"],
}
USAGE_ERRORS = [(flag, value) for flag, values in BAD_FLAGS.items() for value in values]
USAGE_ERRORS += [("--epoch", "5"), ("--frobnicate",), ("--lr",), ("stray",)]


@pytest.mark.parametrize("arguments", USAGE_ERRORS)
def test_bad_arguments_are_refused_before_anything_is_done(tmp_path, monkeypatch, arguments):
    monkeypatch.setattr(script, "load_data", None)
    result = call("--output-dir", tmp_path / "out", *arguments)
    assert (result.status, result.out, len(result.lines)) == (2, "", 2)
    assert result.lines[0].startswith("usage: ") and "error: " in result.lines[1]
    assert arguments[0] in result.lines[1] and arguments[-1] in result.lines[1]
    assert not list(tmp_path.iterdir())


def test_help_names_every_flag_its_default_and_every_file():
    text = " ".join(call("--help").out.split())
    for flag in BAD_FLAGS:
        assert re.search(rf" {flag} (?:(?! --).)*\(default: ", text), flag
    assert "default: 8 at batch size 128, scaled with the batch size" in text
    for name in ("training_log.txt", "model.npz", *script.PLOTS):
        assert name in text
    assert script.choose_settings(script.parse_arguments([]), 60_000) == script.Settings()


# Processes. --------------------------------------------------------------------------------------
def test_as_the_user_starts_it(small, tmp_path):
    """With ~ in the paths, which a shell passes on after "=", and plots in a style of their own."""
    _, whole = small
    write_idx(tmp_path / "data")
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: black\ntext.usetex: True\n")
    home = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "MATPLOTLIBRC": str(tmp_path)}
    flags = ("--data-dir=~/data", "--output-dir=~/out", "--batch-size", 16, "--epochs", 4)
    process = start(*flags, env={**os.environ, **home}, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "") and not (tmp_path / "~").exists()
    assert out == read_log(tmp_path / "out") and "\r" not in out
    assert result_of(tmp_path / "out") == result_of(whole)
    assert snapshot(tmp_path / "out" / "plots") == snapshot(whole / "plots")


def test_terminal_shows_a_bar_below_the_log_lines(small, tmp_path):
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, bytes([24, 0, 100, 0, 0, 0, 0, 0]))  # 24 x 100
    process = start(*small[0], "--output-dir", tmp_path, stdout=terminal, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # when the terminal is closed
        while process.poll() is None:
            shown += os.read(reader, 4096)
    os.close(reader)
    assert process.wait(60) == 0
    lines = [part.strip() for part in re.split(r"[\r\n]+", shown.decode())]
    assert set(read_log(tmp_path).splitlines()[-4:]) <= set(lines)
    assert any("4/4" in line for line in lines)


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe that is closed differs there")
def test_closed_pipe_ends_without_a_traceback(small, tmp_path):
    process = start(*small[0], "--output-dir", tmp_path)
    process.stdout.close()
    err = process.stderr.read()
    process.wait(60)
    assert "Traceback" not in err and "Exception ignored" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell that can close a stream")
def test_closed_streams_do_not_keep_it_from_training(small, tmp_path):
    command = ["sh", "-c", 'exec "$0" "$@" >&- 2>&-', sys.executable, script.__file__, *small[0]]
    command += ["--output-dir", tmp_path]
    assert subprocess.run(list(map(str, command)), timeout=120).returncode == 0
    assert result_of(tmp_path) == result_of(small[1])


IMPORTS = [("KeyboardInterrupt", 130, "interrupted\n")]
IMPORTS += [("ImportError('no\\ntqdm')", 1, "error: no tqdm; install the packages with: pip ")]


@pytest.mark.parametrize(("error", "status", "text"), IMPORTS)
def test_ctrl_c_and_missing_packages_in_the_imports_are_one_line(tmp_path, error, status, text):
    (tmp_path / "tqdm.py").write_text(f"raise {error}")
    process = start(env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (status, "", 1)
    assert err.startswith(text)


def test_main_leaves_the_calling_process_as_it_was(small, tmp_path):
    def state():
        threads = [pool["num_threads"] for pool in script.threadpool_info()]
        return socket.getdefaulttimeout(), np.geterr(), threads, signal.getsignal(signal.SIGINT)

    socket.setdefaulttimeout(7)
    try:
        before = state()
        call("--dataset", "mnist", "--data-dir", tmp_path, "--output-dir", tmp_path)  # downloads
        call(*small[0], "--output-dir", tmp_path)
        assert state() == before
    finally:
        socket.setdefaulttimeout(None)


# The repository. ---------------------------------------------------------------------------------
def test_requirements_are_those_of_the_inline_metadata_and_what_the_script_imports():
    required = (ROOT / "requirements.txt").read_text().split()
    source = Path(script.__file__).read_text()
    assert re.findall(r'"([a-z]\S+)"', source.partition('"""')[0]) == required
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", source, re.MULTILINE))
    names = {line.split(">=")[0].replace("scikit-learn", "sklearn") for line in required}
    assert imported - set(sys.stdlib_module_names) == names


def test_commands_and_python_of_the_readme_run(sample_run, tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    shutil.copy(sample_run.directory / "model.npz", tmp_path)
    monkeypatch.chdir(tmp_path)
    for flags in re.findall(r"^python mnist_autoencoder.py (.+)", readme, re.MULTILINE):
        assert call(*flags.split(), "--dataset", "sample").status == 0
    assert (tmp_path / "trial" / "plots" / "loss_curve.png").exists()
    (python,), names = re.findall(r"```python\n(.*?)```", readme, re.DOTALL), {}
    exec(python, names)
    assert names["codes"].shape == (5, 128) and names["outputs"].shape == (5, 784)


def test_committed_log_is_of_the_default_run_on_all_of_mnist():
    command = ["git", "-C", str(ROOT), "show", "HEAD:./training_log.txt"]  # runs replace the file
    try:
        log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and the history of this folder")
    for field in fields(script.Settings):
        assert f"{field.name} {field.default}" in log
    assert "# MNIST, 60000 training and 10000 test images" in log
    losses = [(float(loss), float(test_loss)) for _, loss, test_loss in EPOCH.findall(log)]
    assert len(losses) == script.Settings.epochs
    assert losses[-1][0] <= 0.00071 and losses[-1][1] <= 0.00086


def test_ten_epochs_on_all_of_mnist(mnist_dir, tmp_path):
    result = call("--data-dir", mnist_dir, "--epochs", 10, "--output-dir", tmp_path)
    assert result.status == 0, result.err
    losses = epochs(tmp_path)
    assert losses[0][1] <= 0.0040 and losses[1][0] <= 0.0040
    assert losses[-1][0] <= 0.00113 and losses[-1][1] <= 0.00116
