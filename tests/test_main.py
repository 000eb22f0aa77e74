"""The program as the user starts it: the log, the plots and the command line."""

import contextlib
import inspect
import io
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
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
    assert all(line.startswith("# ") for line in lines[:-5])
    for field in fields(script.Settings):
        assert f"# {field.name}: {5 if field.name == 'epochs' else field.default}" in lines
    machine = [line for line in lines if line.startswith("# From epoch 1 on: ")]
    for fact in (f"Python {sys.version.split()[0]}", f"NumPy {np.__version__}"):
        assert len(machine) == 1 and fact in machine[0]
    assert [EPOCH.fullmatch(line)[1] for line in lines[-5:]] == ["1", "2", "3", "4", "5"]


def test_losses_of_the_log_are_those_of_model_mean_image_and_scikit_learns_pca(sample_run, sample):
    log = read_log(sample_run.directory)
    model = script.load_run(sample_run.directory / "model.npz").model
    images, test_images = sample.images / 255, sample.test_images / 255
    pca = PCA(128, svd_solver="full").fit(images)
    for pattern, outputs in (
        (r"mean image: (\S+)", images.mean(axis=0)),
        (r"128 components: (\S+)", pca.inverse_transform(pca.transform(test_images))),
        (
            r"Epoch 5, .* Test Loss: (\S+),",
            model.decode(model.encode(sample.test_images)).astype(float),
        ),
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
    assert "more than half" in result.err


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
def test_loss_curve_shows_every_epoch_and_pca_and_names_the_last_losses(losses):
    settings = script.Settings(decay_start=0.5)
    figure = script.plot_losses(losses, some_baselines(), "the data", settings)
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    epochs = list(range(1, len(losses) + 1))
    curves = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines[:2]]
    assert curves == [(epochs, [row[0] for row in losses]), (epochs, [row[1] for row in losses])]
    assert set(axes.lines[2].get_ydata()) == {0.0123}
    assert set(axes.lines[3].get_xdata()) == {len(losses) / 2} and len(axes.lines) == 4
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend[0].startswith("training") and legend[0].endswith(f" {losses[-1][0]:.5f}")
    assert legend[1:3] == [f"test: {losses[-1][1]:.5f}", "PCA, test: 0.01230"]
    low, high = axes.get_ylim()
    assert [y for y in axes.get_yticks() if low <= y <= high]
    assert all(x == int(x) for x in axes.get_xticks())
    assert "the data" in axes.get_title() and "0.0700" in axes.get_title()


def test_latent_space_shows_all_codes_projected_in_their_digits_colour():
    codes = np.random.default_rng(0).standard_normal((60, 128)) * np.arange(128, 0, -1)
    labels = np.arange(60, dtype=np.uint8) // 6
    dataset = script.Dataset("the data", "", codes, codes, labels, (28, 28))
    (axes,) = script.plot_latent_space(codes, dataset).axes
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
    assert rows == ["original", "autoencoder", "error", "PCA", "PCA's error"]


# Training. ---------------------------------------------------------------------------------------
@pytest.mark.usefixtures("no_plots")
def test_same_seed_same_run_and_another_seed_another(small, tmp_path):
    arguments, whole = small
    for seed in (0, 1):
        assert call(*arguments, "--seed", seed, "--output-dir", tmp_path / f"{seed}").status == 0
    assert result_of(tmp_path / "0") == result_of(whole)
    assert result_of(tmp_path / "1")[2] != result_of(whole)[2]


@pytest.mark.usefixtures("no_plots")
def test_every_step_gets_its_images_its_learning_rate_and_its_weight_decay(tmp_path, monkeypatch):
    batches, rates, backward, sgd_step = [], [], script.Autoencoder.backward, script.sgd_step

    def record_images(model, activations, images):
        batches.append(images)
        return backward(model, activations, images)

    def record_rates(parameters, velocity, gradient, learning_rate, weight_decay, settings):
        assert weight_decay == script.Settings.weight_decay / 50
        rates.append(learning_rate)
        sgd_step(parameters, velocity, gradient, learning_rate, weight_decay, settings)

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
    default = script.default_learning_rate
    for count, peak in ((12, 0.1), (12, default(16)), (3, default(50))):
        settings = script.Settings(learning_rate=peak)
        expected += [script.scheduled_learning_rate(i, count, settings) for i in range(count)]
    assert rates == expected


SAFE = [("--batch-size", 1, 1), ("--batch-size", 32, 5)]
SAFE += [("--batch-size", 512, 10), ("--batch-size", 2048, 20)]
SAFE += [("--lr", 2 * script.Settings.learning_rate, 5)]
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
        fails(call(*arguments), 1, "epoch 3", "--lr below 1.75")
    assert epochs(tmp_path) == epochs(whole)[:2]
    assert call(*arguments, "--resume").status == 0
    assert result_of(tmp_path) == result_of(whole)


@pytest.mark.parametrize(("rate", "count"), [(1000, 2), (1000, 1), (500, 5)])
def test_ending_worse_than_the_mean_image_is_an_error(tmp_path, rate, count):
    flags = ("--dataset", "sample", "--epochs", count, "--output-dir", tmp_path)
    fails(call(*flags, "--lr", rate), 1, f"--lr below {rate}")
    assert not any((tmp_path / "plots").iterdir())


# The command line. -------------------------------------------------------------------------------
USAGE_ERRORS = [("--epochs", "0"), ("--epochs", "2.5"), ("--epochs", "ten"), ("--epochs", "")]
USAGE_ERRORS += [("--batch-size", "-128"), ("--lr", "nan"), ("--lr", "0"), ("--lr", "1e300")]
USAGE_ERRORS += [("--momentum", "1"), ("--seed", "-1"), ("--seed", "4294967296")]
USAGE_ERRORS += [("--dataset", "cifar"), ("--epoch", "5"), ("--lr",), ("stray",)]


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
    for flag in ("--epochs", "--batch-size", "--lr", "--momentum", "--seed", "--data-dir"):
        assert re.search(rf" {flag} (?:(?! --).)*\(default: ", text), flag
    defaults = script.Settings
    assert f"{defaults.learning_rate:g} at batch size {defaults.batch_size}, scaled" in text
    for name in ("training_log.txt", "model.npz", "plots/"):
        assert name in text


# Processes. --------------------------------------------------------------------------------------
def test_as_the_user_starts_it(small, tmp_path):
    """With Matplotlib's settings of somebody else, and a notebook's backend, which is missing."""
    _, whole = small
    write_idx(tmp_path / "data")
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: black\ntext.usetex: True\n")
    settings = {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "module://of_another_environment"}
    flags = ("--data-dir", "data", "--output-dir", "out", "--batch-size", 16, "--epochs", 4)
    process = start(*flags, env={**os.environ, **settings}, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
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


IMPORTS = [("ImportError('no\\ntqdm')", "error: a package cannot be imported: no tqdm")]
IMPORTS += [("OSError('Read-only file system')", "error: a package cannot be imported: Read-only")]
IMPORTS += [("ModuleNotFoundError('No tqdm')", "error: No tqdm; install the packages with: pip ")]


@pytest.mark.parametrize(("error", "text"), IMPORTS)
def test_package_that_cannot_be_imported_is_one_line(tmp_path, error, text):
    (tmp_path / "tqdm.py").write_text(f"raise {error}")
    process = start(env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(text)


def test_old_python_is_named_before_anything_else(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match=r"error: Python 3\.10 or later"):
        runpy.run_path(script.__file__)


def test_numpy_without_a_known_blas_and_limit_of_threads(small, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "compute_baselines", recording(script.compute_baselines, seen))
    monkeypatch.setattr(script.joblib, "cpu_count", lambda: 1)
    assert call(*small[0], "--output-dir", tmp_path).status == 0
    assert seen and set(seen) == {1}
    monkeypatch.setattr(script, "threadpool_info", lambda: [])
    python = sys.version.split()[0]
    assert script.describe_machine() == f"Python {python}, NumPy {np.__version__}"


def recording(function, seen):
    """`function`, which also notes the number of threads of every BLAS library: SciPy's, too."""

    def record(*arguments):
        pools = script.threadpool_info()
        seen.extend(pool["num_threads"] for pool in pools if pool["user_api"] == "blas")
        return function(*arguments)

    return record


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
    commands = re.findall(r"^(?:uv run|python) mnist_autoencoder.py (.+)", readme, re.MULTILINE)
    assert commands
    for flags in commands:
        assert call(*flags.split(), "--dataset", "sample").status == 0
    assert (tmp_path / "trial" / "plots" / "loss_curve.png").exists()
    (python,) = re.findall(r"```python\n(# Use.*?)```", readme, re.DOTALL)
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(python, names)
    assert names["codes"].shape == (1000, 128) and names["outputs"].shape == (1000, 784)
    assert float(re.search(r"0\.\d+", out.getvalue())[0]) > 0.7


def test_backward_in_the_readme_is_that_of_the_script():
    readme = (ROOT / "README.md").read_text()
    (shown,) = re.findall(r"```python\n(da = .*?)```", readme, re.DOTALL)
    source = inspect.getsource(script.Autoencoder.backward)
    assert len(shown.splitlines()) >= 6
    assert textwrap.indent(shown, 8 * " ") in source


def committed(name):
    command = ["git", "-C", str(ROOT), "show", f"HEAD:./{name}"]  # runs replace the files
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and the history of this folder")


def test_committed_log_is_of_the_default_run_on_all_of_mnist_and_quoted_faithfully():
    log = committed("training_log.txt")
    for field in fields(script.Settings):
        assert f"# {field.name}: {field.default}\n" in log
    assert log.startswith(f"# network: {script.NETWORK}\n# data: MNIST, 60000 training and 10000")
    losses = [(float(loss), float(test_loss)) for _, loss, test_loss in EPOCH.findall(log)]
    assert len(losses) == script.Settings.epochs
    assert losses[-1][0] <= 0.00068 and losses[-1][1] <= 0.00082
    readme = (ROOT / "README.md").read_text()
    quoted = re.findall(r"^(?:#|Epoch) .*: .*$", readme.split("```")[5], re.MULTILINE)
    assert len(quoted) >= 3 and set(quoted) <= set(log.splitlines())
    final = [f"{loss:.6f}" for loss in losses[-1]]
    assert f"| {' / '.join(final)} |" in readme
    for loss in losses[-1]:
        assert f" {loss:.5f} " in " ".join(script.__doc__.split())
    assert f" {losses[-1][1]:.5f}" in readme.split("##")[0]


def test_ten_epochs_on_all_of_mnist(mnist_dir, tmp_path):
    result = call("--data-dir", mnist_dir, "--epochs", 10, "--output-dir", tmp_path)
    assert result.status == 0, result.err
    losses = epochs(tmp_path)
    assert losses[0][1] <= 0.0060 and losses[2][0] <= 0.0040
    assert losses[-1][0] <= 0.00115 and losses[-1][1] <= 0.00118
