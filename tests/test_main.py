"""The program as the user starts it: the log, the plots and the command line."""

import inspect
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import recipe
from conftest import EPOCH, NAMES, SAMPLE, call, fails, read_log, result_of, script, snapshot, start
from matplotlib import image
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

SCRIPT = Path(script.__file__)
README = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
MNIST_DIR = Path(os.environ.get("MNIST_DIR", SCRIPT.parent / "data")).resolve()


def test_a_run_writes_a_log_with_a_header_a_model_and_three_plots():
    result = call("--dataset", "sample", "--epochs", 5)
    lines = read_log().splitlines()
    assert (result.status, result.err) == (0, "") and result.out.startswith(read_log())
    *_, files, losses, sample = result.out.splitlines()
    assert files == f"training_log.txt, plots and model.npz are in {Path.cwd()}"
    last, pca = EPOCH.findall(read_log())[-1][2], re.search(r"PCA with .*: .*", read_log())[0]
    assert losses == f"test loss: {last}; {pca}"
    assert sample == "this was a sample of MNIST; its losses are not those of all of MNIST"
    assert len({*lines}) == len(lines)  # No line is there twice.
    for field in fields(script.Settings):
        assert f"# {field.name}: {5 if field.name == 'epochs' else field.default}" in lines
    libraries = f"Python {platform.python_version()}, NumPy {np.__version__}"
    assert f"\n# From epoch 1 on: {libraries}" in read_log()
    assert all(line.startswith("# ") for line in lines[:-5])
    assert [EPOCH.fullmatch(line)[1] for line in lines[-5:]] == ["1", "2", "3", "4", "5"]
    plots = [f"plots/{name}" for name in script.PLOTS]
    assert snapshot().keys() == {"model.npz", "training_log.txt", *plots}
    for plot in plots:
        pixels = image.imread(plot)
        assert min(pixels.shape[:2]) >= 500 and len(np.unique(pixels[::3, ::3])) > 50


@pytest.mark.parametrize("start", [0.5, 1.0])
@pytest.mark.parametrize("losses", [[[0.04, 0.01], [0.005, 0.004]], [[0.0021, 0.0022]]])
def test_loss_curve_shows_every_epoch_and_pca_and_names_the_last_losses(losses, start):
    baselines = script.Baselines(mean_image_loss=0.07, pca_loss=0.0123, pca=None, pca_name="PCA")
    figure = script.plot_losses(losses, baselines, "the data", script.Settings(decay_start=start))
    (axes,) = figure.axes
    training, test, pca, *falls = [np.array(line.get_data()) for line in axes.lines]
    numbers = range(1, len(losses) + 1)
    np.testing.assert_array_equal([*training, test[1]], [numbers, *np.transpose(losses)])
    assert set(pca[1]) == {0.0123}
    assert [set(fall[0]) for fall in falls] == [{len(losses) / 2}] * (start < 1)
    last = [f"training (epoch mean): {losses[-1][0]:.5f}", f"test: {losses[-1][1]:.5f}"]
    legend = [text.get_text() for text in axes.get_legend().texts]
    begin = [f"learning rate falls from epoch {len(losses) / 2:g} on"] * len(falls)
    assert legend == [*last, "PCA, test: 0.01230", *begin]
    assert all(x == int(x) for x in axes.get_xticks())
    assert axes.get_title() == "Loss on the data"


def test_loss_curve_of_100_epochs_has_a_tick_at_the_last():
    baselines = script.Baselines(0.07, 0.0042, None, "PCA")
    figure = script.plot_losses([[0.001, 0.002]] * 100, baselines, "x", script.Settings())
    low, high = figure.axes[0].get_xlim()
    assert [x for x in figure.axes[0].get_xticks() if low < x < high] == [0, 20, 40, 60, 80, 100]


@pytest.mark.parametrize("size", [128, 2, 1])
def test_latent_space_shows_all_codes_in_a_plane_and_what_its_points_decode_to(monkeypatch, size):
    rng = np.random.default_rng(0)
    codes = rng.standard_normal((60, size)) * np.arange(size, 0, -1) + 5
    decoder = rng.random((size, 784))
    model = SimpleNamespace(encode=lambda images: codes, decode=lambda codes: codes @ decoder)
    labels = np.arange(60, dtype=np.uint8) // 6
    dataset = script.Dataset("the data", "", codes, labels, codes, labels, (28, 28))
    monkeypatch.setattr(script, "CODE_SIZE", size)
    figure = script.plot_latent_space(model, dataset)
    left, right = figure.axes
    points, names = np.pad(codes, [(0, 0), (0, 1)])[:, :2], (figure._supxlabel, left.yaxis.label)
    if size > 2:
        pca = PCA(2, svd_solver="full")
        points = pca.fit_transform(codes)
        for name, share in zip(names, pca.explained_variance_ratio_, strict=True):
            assert f"principal component ({share:.1%} of the variance)" in name.get_text()
    (scatter,) = left.collections
    order = [np.argmin(np.linalg.norm(points - p, axis=1)) for p in scatter.get_offsets().data]
    np.testing.assert_allclose(scatter.get_offsets(), points[order], rtol=1e-6)
    assert sorted(order) == list(range(60))
    assert np.count_nonzero(np.diff(labels[order])) > 30  # no digit is drawn on top of the others
    figure.draw_without_rendering()
    colors = [tuple(color) for color in scatter.get_facecolors()]
    assert len({*zip(labels[order], colors, strict=True)}) == len({*colors}) == 10  # one each
    assert [text.get_text() for text in figure.legends[0].texts] == [*"0123456789"]
    (picture,) = right.images
    low_x, high_x, low_y, high_y = picture.get_extent()
    assert left.get_xlim() == right.get_xlim() == (low_x, high_x) and left.get_aspect() == 1
    assert (points >= [low_x - 1e-9, low_y - 1e-9]).all()
    assert (points <= [high_x + 1e-9, high_y + 1e-9]).all()
    cell = (high_x - low_x) / 15
    for row, column in ((0, 0), (0, 14), (7, 3)):
        point = [low_x + (column + 0.5) * cell, high_y - (row + 0.5) * cell]
        code = pca.inverse_transform([point]) if size > 2 else [point[:size]]
        shown = picture.get_array()[28 * row : 28 * (row + 1), 28 * column : 28 * (column + 1)]
        np.testing.assert_allclose(np.ravel(shown), np.ravel(code @ decoder), rtol=1e-6)


def test_reconstructions_show_one_image_per_digit_its_outputs_and_errors():
    outputs = np.random.default_rng(0).random(SAMPLE.test_images.shape)
    places = {image.tobytes(): place for place, image in enumerate(SAMPLE.test_images)}
    model = script.Autoencoder(SAMPLE.test_images[0])
    model.encode = lambda images: [places[image.tobytes()] for image in images]
    model.decode = lambda codes: outputs[codes]
    pca = PCA(3).fit(SAMPLE.images / 255)
    cells = np.reshape(script.plot_reconstructions(model, SAMPLE, pca).axes, (5, 10))
    rows = [cell.get_ylabel() for cell in cells[:, 0]]
    assert rows == ["original", "autoencoder", "error", "PCA", "PCA's error"]
    for digit, column in enumerate(cells.T):
        row = np.flatnonzero(SAMPLE.test_labels == digit)[0]
        x, a = SAMPLE.test_images[row] / 255, outputs[row]
        b = pca.inverse_transform(pca.transform([x]))[0]
        shown = [np.ravel(cell.images[0].get_array()) for cell in column]
        np.testing.assert_allclose(shown, [x, a, a - x, b, b - x], atol=1e-5)
        limits = [cell.images[0].get_clim() for cell in column]
        assert limits == [(0, 1), (0, 1), (-0.5, 0.5), (0, 1), (-0.5, 0.5)]
        for cell, output in ((column[2], a), (column[4], b)):
            assert cell.get_xlabel() == f"MSE {np.mean((output - x) ** 2):.4f}"


def test_same_flags_same_run_and_other_flags_another(small, no_plots):
    arguments, whole = small
    assert call(*arguments).status == 0
    assert result_of() == result_of(whole)
    told = ("'# epochs: 4' instead of '# epochs: 5'", "learning rate", "another --output-dir")
    fails(call(*arguments, "--epochs", 5, "--resume"), 2, *told)
    for name, value in (("seed", 1), ("momentum", 0.5)):
        assert f"# {name}: {value}\n" in call(*arguments, f"--{name}", value).out
        parameters = script.load_run("model.npz").model.parameters
        assert (parameters != script.load_run(whole / "model.npz").model.parameters).any()
    assert "# batch_size: 50\n" in call(*arguments, "--batch-size", 99).out  # all images


def test_every_step_gets_its_images_its_learning_rate_and_its_weight_decay(monkeypatch):
    images = np.random.default_rng(0).integers(256, size=(50, 784), dtype=np.uint8)
    steps, batches, orders = [], [], set()
    forward = script.Autoencoder.forward
    monkeypatch.setattr(
        script.Autoencoder, "forward", lambda model, x: batches.append(x) or forward(model, x)
    )
    monkeypatch.setattr(script, "sgd_step", lambda p, velocity, *rest: steps.append(rest[1:3]))
    model = script.Autoencoder(images[0] / 255)
    for seed, epoch in ((0, 1), (0, 3), (1, 3)):
        settings = script.Settings(epochs=3, batch_size=16, learning_rate=0.1, seed=seed)
        steps.clear()
        batches.clear()
        loss = script.train_epoch(model, None, images, epoch, settings)
        assert loss == pytest.approx(np.mean((images[0] / 255 - images / 255) ** 2), rel=1e-5)
        rates, decays = zip(*steps, strict=True)
        assert [len(batch) for batch in batches] == [16, 16, 16, 2]
        rows = [bytes(row) for row in np.concatenate(batches)]
        assert sorted(rows) == sorted(map(bytes, (images / 255).astype(np.float32)))
        orders.add(tuple(rows))
        numbers = range(4 * (epoch - 1), 4 * epoch)
        assert [*rates] == [script.scheduled_learning_rate(n, 12, settings) for n in numbers]
        assert {*decays} == {settings.weight_decay / 50}
    assert len(orders) == 3


SAFE = ["--momentum 0", "--momentum 0.99", f"--lr {2 * script.Settings.learning_rate}"]
SAFE += ["--batch-size 2 --epochs 1", "--batch-size 32", "--batch-size 100000 --epochs 15"]


@pytest.mark.parametrize("flags", SAFE)
def test_training_learns_with_flags_far_from_their_defaults(no_plots, flags):
    assert call("--dataset", "sample", "--epochs", 3, *flags.split()).status == 0
    assert script.load_run("model.npz").losses[-1][1] < 0.03


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("steps", "wrong"), [(range(8, 12), 1e3), ([11], 1e38)])  # in epoch 3
def test_divergence_keeps_the_last_good_epoch(small, monkeypatch, steps, wrong):
    schedule = script.scheduled_learning_rate

    def diverging(step, *others):
        return wrong if step in steps else schedule(step, *others)

    monkeypatch.setattr(script, "scheduled_learning_rate", diverging)
    rate = script.default_learning_rate(16)
    fails(call(*small[0]), 1, "epoch 3", f"--lr below {rate:g}")
    assert script.load_run("model.npz").losses == result_of(small[1])[1][:2]
    assert len(EPOCH.findall(read_log())) == 2 and snapshot("plots") == {}


@pytest.mark.parametrize(("rate", "count"), [(1000, 1), (500, 5)])
def test_too_high_a_learning_rate_is_an_error_that_names_the_default(rate, count):
    told = f"--lr below {rate} (default: {script.Settings.learning_rate:g})"
    fails(call("--dataset", "sample", "--epochs", count, "--lr", rate), 1, told)


@pytest.mark.parametrize(("bar", "lines"), [(0.061, 0), (0.059, 1)])
def test_learning_next_to_nothing_is_warned_of(small, monkeypatch, capsys, bar, lines):
    Path("plots").mkdir()
    monkeypatch.setattr(script, "plot_latent_space", lambda *_: Figure())
    run, dataset = script.load_run(small[1] / "model.npz"), script.load_data("auto", small[0][1])
    baselines = script.compute_baselines(dataset)._replace(mean_image_loss=bar / 0.9)
    run.losses[-1][1] = 0.06
    script.finish(run, dataset, baselines, script.Settings(), Path())
    err = capsys.readouterr().err
    assert err.count("\n") == lines == err.count(f"(default: {script.Settings.learning_rate:g})")


USAGE_ERRORS = """--epochs 0; --epochs 2.5; --batch-size -128; --lr nan; --lr 0; --lr 1e300; --lr;
--momentum 1; --seed -1; --seed 4294967296; --dataset cifar; --epoch 5; stray"""


def test_bad_arguments_are_refused_before_anything_is_done(monkeypatch):
    monkeypatch.setattr(script, "load_data", None)
    for arguments in map(str.split, USAGE_ERRORS.split(";")):
        result = call(*arguments)
        assert (result.status, result.out, len(result.lines)) == (2, "", 2), arguments
        assert result.lines[0].startswith("usage: ") and "error: " in result.lines[1]
        assert arguments[0] in result.lines[1] and arguments[-1] in result.lines[1]
    assert call("--help").out.count("(default") == 8
    monkeypatch.setattr(script.Settings, "epochs", 0)
    assert "argument --epochs: " in call().err


def test_as_the_user_starts_it(small):
    """With Matplotlib's settings of somebody else, and a notebook's backend, which is missing."""
    arguments, whole = small
    Path("matplotlibrc").write_text("axes.facecolor: black\ntext.usetex: True\n")
    settings = {"MATPLOTLIBRC": ".", "MPLBACKEND": "of_another_environment"}
    process = start(*arguments, "--output-dir", "out", env={**os.environ, **settings})
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out.startswith(read_log("out")) and "\r" not in out
    assert result_of("out") == result_of(whole)
    assert snapshot("out/plots") == snapshot(whole / "plots")


def test_closed_stderr_is_no_reason_for_a_traceback(small, monkeypatch, no_plots):
    monkeypatch.setattr(sys, "stderr", None)
    assert script.main([str(argument) for argument in small[0]]) == 0


INSTALLATIONS = [
    (sys.version_info, "OSError('no\\ndirectory')", "a package cannot be imported: no directory"),
    (sys.version_info, "ModuleNotFoundError('No tqdm')", "No tqdm; install the packages with: pip"),
    ((3, 9, 18), "OSError", "Python 3.10 or later is needed"),
]


@pytest.mark.parametrize(("version", "error", "told"), INSTALLATIONS)
def test_unusable_package_or_python_is_told_in_one_line(monkeypatch, version, error, told):
    monkeypatch.setattr(sys, "version_info", version)
    Path("tqdm.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "tqdm")
    with pytest.raises(SystemExit, match=f"^error: {told}.*$"):
        runpy.run_path(SCRIPT)


@pytest.mark.skipif(sys.platform == "darwin", reason="threadpoolctl does not know Accelerate")
@pytest.mark.parametrize(("cpus", "limit"), [(1, None), (64, 1)])  # 1 as by OPENBLAS_NUM_THREADS
def test_threads_of_every_blas_are_limited(small, monkeypatch, no_plots, cpus, limit):
    seen = []
    monkeypatch.setattr(script, "train", lambda *_: seen.extend(script.threadpool_info()))
    monkeypatch.setattr(script.joblib, "cpu_count", lambda: cpus)
    with script.threadpool_limits(limit, "blas"):
        assert call(*small[0]).status == 0
    assert {pool["num_threads"] for pool in seen if pool["user_api"] == "blas"} == {1}
    pool = {"user_api": "blas", "internal_api": "mkl", "version": "1.2", "num_threads": 3}
    monkeypatch.setattr(script, "threadpool_info", lambda: [pool])  # without architecture
    assert script.describe_libraries().endswith(f"NumPy {np.__version__}, mkl 1.2  x 3")


def test_requirements_are_those_of_the_inline_metadata():
    required = SCRIPT.with_name("requirements.txt").read_text().split()
    assert re.findall(r'"([a-z]\S+)"', SCRIPT.read_text().partition('"""')[0]) == required


def test_commands_and_python_of_the_readme_run(capsys):
    commands = re.findall(r"^(?:uv run|python) mnist_autoencoder.py (.+)", README, re.MULTILINE)
    assert set(commands) == {"--epochs 1 --output-dir trial"}
    assert call(*commands[0].split(), "--dataset", "sample").status == 0
    shutil.copy("trial/model.npz", ".")
    (python,) = re.findall(r"```python\n(# Use.*?)```", README, re.DOTALL)
    names = {}
    exec(python, names)
    assert names["codes"].shape == (1000, 128) and names["outputs"].shape == (1000, 784)
    assert float(re.search(r"0\.\d+", capsys.readouterr().out)[0]) > 0.7


def test_readme_shows_the_lines_of_backward_and_every_exercise():
    (shown,) = re.findall(r"```python\n(da = .*?)```", README, re.DOTALL)
    indented = shown.replace("\n", "\n" + 8 * " ").strip()
    assert indented in inspect.getsource(script.Autoencoder.backward)
    measured = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    for name in recipe.EXERCISES:
        (row,) = re.findall(rf"^{re.escape(name)} \|.*", README, re.MULTILINE)
        assert row in measured


def test_committed_log_is_of_the_default_run_on_all_of_mnist_and_quoted_faithfully():
    if not SCRIPT.with_name(".git").exists():
        pytest.skip("needs the history of this folder, because runs replace its log")
    command = ["git", "-C", SCRIPT.parent, "show", "HEAD:./training_log.txt"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (data,) = re.findall(r"# data: (MNIST, 60000 training and 10000 test images, .*)", log)
    assert log.startswith(script.log_header(data, script.Settings()))
    losses = [(float(loss), float(test_loss)) for _, loss, test_loss in EPOCH.findall(log)]
    assert len(losses) == script.Settings.epochs
    assert losses[-1][0] <= 0.00068 and losses[-1][1] <= 0.00082
    output = re.search(r"It prints.*?```\n(.*?)```", README, re.DOTALL)[1]
    quoted = re.findall(r"^(?:#|Epoch) .*: .*$", output, re.MULTILINE)
    assert len(quoted) >= 3 and set(quoted) <= set(log.splitlines())
    assert f"| {losses[-1][0]:.6f} / {losses[-1][1]:.6f}\n" in README
    for loss in losses[-1]:
        assert f" {loss:.5f} " in " ".join(script.__doc__.split())
    assert f" {losses[-1][1]:.5f}" in README.split("##")[0]


def test_all_of_mnist():
    if not all((MNIST_DIR / "MNIST" / "raw" / name).is_file() for name in NAMES):
        pytest.skip("needs all of MNIST in data, or in the folder that MNIST_DIR names")
    images = {image.tobytes() for image in script.load_data("mnist", MNIST_DIR).images}
    assert all(image.tobytes() in images for image in [*SAMPLE.images, *SAMPLE.test_images])
    result = call("--data-dir", MNIST_DIR, "--epochs", 3)
    assert result.status == 0 and "# data: MNIST, 60000 training and 10000" in result.out
    assert script.load_run("model.npz").losses[-1][1] <= 0.0017
