"""The program as the user starts it: the log, the plots and the command line."""

import contextlib
import inspect
import io
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import recipe
from conftest import EPOCH, NAMES, call, fails, read_log, result_of, script, snapshot, start
from matplotlib import image
from sklearn.decomposition import PCA

SCRIPT = Path(script.__file__)
README = SCRIPT.with_name("README.md").read_text(encoding="utf-8")


def epochs(directory):
    """The training and test loss of every epoch in a log."""
    return [(float(a), float(b)) for _, a, b in EPOCH.findall(read_log(directory))]


# The log. ----------------------------------------------------------------------------------------
def test_a_run_writes_a_log_with_a_header_a_model_and_three_plots(sample_run):
    lines = read_log(sample_run.directory).splitlines()
    assert sample_run.out.splitlines() == lines
    for field in fields(script.Settings):
        assert f"# {field.name}: {5 if field.name == 'epochs' else field.default}" in lines
    (machine,) = [line for line in lines if line.startswith("# From epoch 1 on: ")]
    assert f"Python {sys.version.split()[0]}, " in machine and np.__version__ in machine
    assert all(line.startswith("# ") for line in lines[:-5])
    assert [EPOCH.fullmatch(line)[1] for line in lines[-5:]] == ["1", "2", "3", "4", "5"]
    plots = [f"plots/{name}" for name in script.PLOTS]
    assert snapshot(sample_run.directory).keys() == {"model.npz", "training_log.txt", *plots}
    for plot in plots:
        pixels = image.imread(sample_run.directory / plot)
        assert min(pixels.shape[:2]) >= 500 and len(np.unique(pixels[::3, ::3])) > 50


def test_losses_of_the_log_are_those_of_model_mean_image_and_scikit_learns_pca(sample_run, sample):
    log = read_log(sample_run.directory)
    model = script.load_run(sample_run.directory / "model.npz").model
    images, test_images = sample.images / 255, sample.test_images / 255
    pca = PCA(128, svd_solver="full").fit(images)
    decoded = model.decode(model.encode(sample.test_images)).astype(float)
    for pattern, outputs in (
        (r"mean image: (\S+)", images.mean(axis=0)),
        (r"128 components: (\S+)", pca.inverse_transform(pca.transform(test_images))),
        (r"Epoch 5, .* Test Loss: (\S+),", decoded),
    ):
        loss = np.mean((outputs - test_images) ** 2)
        assert float(re.search(pattern, log)[1]) == pytest.approx(loss, abs=2e-6)


def test_training_loss_is_the_mean_over_the_epochs_images(tmp_path, sample, no_plots):
    """With a learning rate that changes nothing, it is the loss of the mean image."""
    flags = ("--dataset", "sample", "--epochs", 1, "--lr", 1e-6, "--batch-size", 300)
    result = call(*flags, "--output-dir", tmp_path)
    loss = np.mean((sample.images / 255 - sample.images.mean(axis=0) / 255) ** 2)
    assert epochs(tmp_path)[0][0] == pytest.approx(loss, rel=1e-4)
    assert result.status == 0 and len(result.lines) == 1  # nothing was learned, which is told
    assert "more than half" in result.err


# The plots. --------------------------------------------------------------------------------------
PCA_OF_3 = PCA(3).fit(np.random.default_rng(1).random((50, 784)))


@pytest.mark.parametrize("losses", [[[0.04, 0.01], [0.005, 0.004]], [[0.0021, 0.0022]]])
def test_loss_curve_shows_every_epoch_and_pca_and_names_the_last_losses(losses):
    baselines = script.Baselines(mean_image_loss=0.07, pca=None, pca_loss=0.0123)
    figure = script.plot_losses(losses, baselines, "the data", script.Settings(decay_start=0.5))
    (axes,) = figure.axes
    training, test, pca, decay = [np.array(line.get_data()) for line in axes.lines]
    numbers = range(1, len(losses) + 1)
    np.testing.assert_array_equal([*training, test[1]], [numbers, *np.transpose(losses)])
    assert set(pca[1]) == {0.0123} and set(decay[0]) == {len(losses) / 2}
    legend = [text.get_text() for text in figure.legends[0].texts]
    assert legend[0].startswith("training") and legend[0].endswith(f" {losses[-1][0]:.5f}")
    assert legend[1:3] == [f"test: {losses[-1][1]:.5f}", "PCA, test: 0.01230"]
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
    order = [np.argmin(np.linalg.norm(points - p, axis=1)) for p in scatter.get_offsets().data]
    np.testing.assert_allclose(scatter.get_offsets(), points[order], rtol=1e-6)
    assert sorted(order) == list(range(60))
    assert np.count_nonzero(np.diff(labels[order])) > 30  # no digit is drawn on top of the others
    colors = [tuple(color) for color in scatter.get_facecolors()]
    assert len({*zip(labels[order], colors, strict=True)}) == len({*colors}) == 10
    first, second = pca.explained_variance_ratio_
    assert f"{first:.1%}" in axes.get_xlabel() and f"{second:.1%}" in axes.get_ylabel()
    assert "the data" in axes.get_title() and axes.get_aspect() == 1


def test_reconstructions_show_one_image_per_digit_its_outputs_and_errors(sample):
    outputs = np.random.default_rng(0).random(sample.test_images.shape)
    figure = script.plot_reconstructions(sample, outputs, PCA_OF_3)
    cells = np.array(figure.axes).reshape(5, 10)
    rows = [cell.get_ylabel() for cell in cells[:, 0]]
    assert ", ".join(rows) == "original, autoencoder, error, PCA, PCA's error"
    for digit, column in enumerate(cells.T):
        row = np.flatnonzero(sample.test_labels == digit)[0]
        x, a = sample.test_images[row] / 255, outputs[row]
        b = PCA_OF_3.inverse_transform(PCA_OF_3.transform([x]))[0]
        shown = [np.ravel(cell.images[0].get_array()) for cell in column]
        np.testing.assert_allclose(shown, [x, a, a - x, b, b - x], atol=1e-5)
        limits = [cell.images[0].get_clim() for cell in column]
        assert limits == [(0, 1), (0, 1), (-0.5, 0.5), (0, 1), (-0.5, 0.5)]
        assert column[2].get_xlabel() == f"MSE {np.mean((a - x) ** 2):.4f}"
        assert column[4].get_xlabel() == f"MSE {np.mean((b - x) ** 2):.4f}"


# Training. ---------------------------------------------------------------------------------------
def test_same_seed_same_run_and_another_seed_another(small, tmp_path, no_plots):
    arguments, whole = small
    for seed in (0, 1):
        assert call(*arguments, "--seed", seed, "--output-dir", tmp_path / f"{seed}").status == 0
    assert result_of(tmp_path / "0") == result_of(whole)
    assert result_of(tmp_path / "1")[2] != result_of(whole)[2]
    # A mini-batch is never larger than the training set.
    assert "# batch_size: 50\n" in call(*arguments[:2], "--output-dir", tmp_path, "--epochs", 1).out


def test_every_step_gets_its_images_its_learning_rate_and_its_weight_decay(monkeypatch):
    images = np.random.default_rng(0).integers(256, size=(50, 784), dtype=np.uint8)
    batches, rates, orders = [], [], set()
    monkeypatch.setattr(script.Autoencoder, "backward", lambda *_: batches.append(_[2]))
    monkeypatch.setattr(script, "sgd_step", lambda *_: rates.append(_[3:5]))
    for seed, epoch in ((0, 1), (0, 3), (1, 3)):
        settings = script.Settings(epochs=3, batch_size=16, learning_rate=0.1, seed=seed)
        batches.clear()
        rates.clear()
        script.train_epoch(script.Autoencoder(images[0] / 255), None, images, epoch, settings)
        assert [len(batch) for batch in batches] == [16, 16, 16, 2]
        rows = [bytes(row) for row in np.concatenate(batches)]
        assert sorted(rows) == sorted(map(bytes, (images / 255).astype(np.float32)))
        orders.add(tuple(rows))
        rate, first = script.scheduled_learning_rate, 4 * (epoch - 1)
        decay = settings.weight_decay / 50
        assert rates == [(rate(first + i, 12, settings), decay) for i in range(4)]
    assert len(orders) == 3


def settings_for(epochs, batch_size):
    return script.Settings(epochs, batch_size, script.default_learning_rate(batch_size))


SAFE = [(1600, settings_for(1, 1)), (4000, settings_for(3, 32)), (4000, settings_for(10, 2048))]
SAFE += [(4000, script.Settings(5, momentum=momentum)) for momentum in (0.0, 0.99)]
SAFE += [(4000, script.Settings(3, learning_rate=2 * script.Settings.learning_rate))]


@pytest.mark.parametrize(("count", "settings"), SAFE)
def test_learning_is_safe_over_the_range_of_every_flag(sample, count, settings):
    dataset = replace(sample, images=sample.images[:count])
    model = script.Autoencoder(sample.images.mean(axis=0) / 255)
    assert recipe.final_losses(model, dataset, settings)[1] < 0.03


@pytest.mark.parametrize("weight", [1e3, np.nan])
def test_divergence_keeps_the_last_good_epoch(small, tmp_path, monkeypatch, weight):
    train_epoch = script.train_epoch

    def diverge_in_epoch_3(model, velocity, images, epoch, settings):
        if epoch == 3:
            model.parameters[:] = weight
        return train_epoch(model, velocity, images, epoch, settings)

    monkeypatch.setattr(script, "train_epoch", diverge_in_epoch_3)
    fails(call(*small[0], "--output-dir", tmp_path), 1, "epoch 3", "--lr below 1.75")
    assert script.load_run(tmp_path / "model.npz").losses == result_of(small[1])[1][:2]
    assert len(epochs(tmp_path)) == 2 and not any((tmp_path / "plots").iterdir())


@pytest.mark.parametrize(("rate", "count"), [(1000, 1), (500, 5)])
def test_too_high_a_learning_rate_is_an_error(tmp_path, rate, count):
    flags = ("--dataset", "sample", "--epochs", count, "--output-dir", tmp_path)
    fails(call(*flags, "--lr", rate), 1, f"--lr below {rate}")


# The command line. -------------------------------------------------------------------------------
USAGE_ERRORS = """--epochs 0; --epochs 2.5; --batch-size -128; --lr nan; --lr 0; --lr 1e300; --lr;
--momentum 1; --seed -1; --seed 4294967296; --dataset cifar; --epoch 5; stray"""


def test_bad_arguments_are_refused_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "load_data", None)
    for arguments in map(str.split, USAGE_ERRORS.split(";")):
        result = call("--output-dir", tmp_path / "out", *arguments)
        assert (result.status, result.out, len(result.lines)) == (2, "", 2), arguments
        assert result.lines[0].startswith("usage: ") and "error: " in result.lines[1]
        assert arguments[0] in result.lines[1] and arguments[-1] in result.lines[1]
    assert not list(tmp_path.iterdir())


def test_help_names_every_flag_its_default_and_every_file():
    text = " ".join(call("--help").out.split())
    for flag in ("--epochs", "--batch-size", "--lr", "--momentum", "--seed", "--data-dir"):
        assert re.search(rf" {flag} (?:(?! --).)*\(default: ", text), flag
    defaults = script.Settings
    assert f"{defaults.learning_rate:g} at batch size {defaults.batch_size}, scaled" in text
    assert all(name in text for name in ("training_log.txt", "model.npz", "plots/"))


# Processes. --------------------------------------------------------------------------------------
def test_as_the_user_starts_it(small, tmp_path):
    """With Matplotlib's settings of somebody else, and a notebook's backend, which is missing."""
    _, whole = small
    shutil.copytree(small[0][1], tmp_path / "data")
    (tmp_path / "matplotlibrc").write_text("axes.facecolor: black\ntext.usetex: True\n")
    settings = {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "of_another_environment"}
    flags = ("--data-dir", "data", "--output-dir", "out", "--batch-size", 16, "--epochs", 4)
    process = start(*flags, env={**os.environ, **settings}, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out == read_log(tmp_path / "out") and "\r" not in out
    assert result_of(tmp_path / "out") == result_of(whole)
    assert snapshot(tmp_path / "out" / "plots") == snapshot(whole / "plots")


def test_closed_streams_are_no_reason_for_a_traceback(small, tmp_path, monkeypatch, no_plots):
    process = start(*small[0], "--output-dir", tmp_path / "pipe")
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait(60)
    monkeypatch.setattr(sys, "stderr", None)
    assert script.main([str(x) for x in (*small[0], "--output-dir", tmp_path)]) == 0
    sys.stderr.close()


IMPORTS = {
    "ImportError('no\\ntqdm')": "error: a package cannot be imported: no tqdm",
    "OSError('Read-only file system')": "error: a package cannot be imported: Read-only",
    "ModuleNotFoundError('No tqdm')": "error: No tqdm; install the packages with: pip install",
}


@pytest.mark.parametrize("error", IMPORTS)
def test_package_that_cannot_be_imported_is_one_line(tmp_path, monkeypatch, error):
    (tmp_path / "tqdm.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tqdm")
    with pytest.raises(SystemExit, match=f"^{IMPORTS[error]}.*$"):
        runpy.run_path(SCRIPT)


def test_old_python_is_named_before_anything_else(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match=r"error: Python 3\.10 or later"):
        runpy.run_path(SCRIPT)


def test_threads_of_every_blas_are_limited_and_a_numpy_without_blas_runs(
    small, tmp_path, monkeypatch, no_plots
):
    train, seen = script.train, []

    def record(*arguments):
        seen.extend(p["num_threads"] for p in script.threadpool_info() if p["user_api"] == "blas")
        train(*arguments)

    monkeypatch.setattr(script, "train", record)
    monkeypatch.setattr(script.joblib, "cpu_count", lambda: 1)
    assert call(*small[0], "--output-dir", tmp_path).status == 0
    assert seen and set(seen) == {1}
    monkeypatch.setattr(script, "threadpool_info", lambda: [])
    assert script.describe_libraries().endswith(f"NumPy {np.__version__}")


# The repository. ---------------------------------------------------------------------------------
def test_requirements_are_those_of_the_inline_metadata_and_what_the_script_imports():
    required = SCRIPT.with_name("requirements.txt").read_text().split()
    source = SCRIPT.read_text()
    assert re.findall(r'"([a-z]\S+)"', source.partition('"""')[0]) == required
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", source, re.MULTILINE))
    names = {line.split(">=")[0].replace("scikit-learn", "sklearn") for line in required}
    assert imported - set(sys.stdlib_module_names) == names


def test_commands_and_python_of_the_readme_run(sample_run, tmp_path, monkeypatch):
    shutil.copy(sample_run.directory / "model.npz", tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^(?:uv run|python) mnist_autoencoder.py (.+)", README, re.MULTILINE)
    assert set(commands) == {"--epochs 1 --output-dir trial"}
    assert call(*commands[0].split(), "--dataset", "sample").status == 0
    assert (tmp_path / "trial" / "plots" / "loss_curve.png").exists()
    (python,) = re.findall(r"```python\n(# Use.*?)```", README, re.DOTALL)
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(python, names)
    assert names["codes"].shape == (1000, 128) and names["outputs"].shape == (1000, 784)
    assert float(re.search(r"0\.\d+", out.getvalue())[0]) > 0.7


def test_readme_shows_the_lines_of_backward_and_every_exercise_and_where_to_read():
    (shown,) = re.findall(r"```python\n(da = .*?)```", README, re.DOTALL)
    assert len(shown.splitlines()) >= 6
    assert textwrap.indent(shown, 8 * " ") in inspect.getsource(script.Autoencoder.backward)
    assert f"script of {SCRIPT.read_text().count(chr(10))} lines" in README
    first = inspect.getsourcelines(script.Settings)[1]
    lines, start_of_last = inspect.getsourcelines(script.train_epoch)
    assert f"lines {first} to {start_of_last + len(lines) - 1};" in README
    measured = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    for name in recipe.EXERCISES:
        (row,) = re.findall(rf"^{re.escape(name)} \|.*", README, re.MULTILINE)
        assert row in measured


def test_committed_log_is_of_the_default_run_on_all_of_mnist_and_quoted_faithfully():
    try:  # git's log, because runs replace the file
        command = ["git", "-C", SCRIPT.parent, "show", "HEAD:./training_log.txt"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and the history of this folder")
    for field in fields(script.Settings):
        assert f"# {field.name}: {field.default}\n" in log
    assert log.startswith(f"# network: {script.NETWORK}\n# data: MNIST, 60000 training and 10000")
    losses = [(float(loss), float(test_loss)) for _, loss, test_loss in EPOCH.findall(log)]
    assert len(losses) == script.Settings.epochs
    assert losses[-1][0] <= 0.00068 and losses[-1][1] <= 0.00082
    quoted = re.findall(r"^(?:#|Epoch) .*: .*$", README.split("```")[5], re.MULTILINE)
    assert len(quoted) >= 3 and set(quoted) <= set(log.splitlines())
    assert f"| {losses[-1][0]:.6f} / {losses[-1][1]:.6f}\n" in README
    for loss in losses[-1]:
        assert f" {loss:.5f} " in " ".join(script.__doc__.split())
    assert f" {losses[-1][1]:.5f}" in README.split("##")[0]


def test_all_of_mnist(tmp_path, sample):
    directory = Path(os.environ.get("MNIST_DIR", SCRIPT.parent / "data"))
    if not all((directory / "MNIST" / "raw" / name).is_file() for name in NAMES):
        pytest.skip("needs all of MNIST in data, or in the folder that MNIST_DIR names")
    images = {image.tobytes() for image in script.load_data("mnist", directory).images}
    assert all(image.tobytes() in images for image in [*sample.images, *sample.test_images])
    result = call("--data-dir", directory, "--epochs", 3, "--output-dir", tmp_path)
    assert result.status == 0 and "# data: MNIST, 60000 training and 10000" in result.out
    assert epochs(tmp_path)[-1][1] <= 0.0017
