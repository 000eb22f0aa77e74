"""The program as the user starts it: log, plots, flags, and edits of LAYERS and Settings."""

import inspect
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import recipe
from conftest import EPOCH, SAMPLE, call, fails, read_log, result_of, script, snapshot, start
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
    last, pca = EPOCH.findall(read_log())[-1][2], re.search(r"PCA with .*: .*", read_log())[0]
    files = f"training_log.txt, plots and model.npz are in {Path.cwd()}"
    sample = "this was a sample of MNIST; losses on all of MNIST are different"
    assert result.out.splitlines()[-3:] == [files, f"test loss: {last}; {pca}", sample]
    assert len({*lines}) == len(lines)  # No line is there twice.
    for field in fields(script.Settings):
        assert f"# {field.name}: {5 if field.name == 'epochs' else field.default}" in lines
    assert lines[-6].startswith(f"# From epoch 1 on: Python {platform.python_version()}, NumPy ")
    assert [EPOCH.fullmatch(line)[1] for line in lines[-5:]] == ["1", "2", "3", "4", "5"]
    plots = [f"plots/{name}" for name in script.PLOTS]
    assert snapshot().keys() == {"model.npz", "training_log.txt", *plots}
    assert all(len(np.unique(image.imread(plot)[::3, ::3])) > 50 for plot in plots)


CURVES = [([[0.04, 0.01], [0.005, 0.004]], [1, 2]), ([[0.0021, 0.0022]], [1])]
CURVES += [([[0.001, 0.002]] * 100, [0, 20, 40, 60, 80, 100])]


@pytest.mark.parametrize("start", [0.5, 1.0])
@pytest.mark.parametrize(("losses", "ticks"), CURVES)
def test_loss_curve_shows_every_epoch_and_pca_and_names_the_last_losses(losses, ticks, start):
    baselines = script.Baselines(mean_image_loss=0.07, pca_loss=0.0123, pca=None, pca_name="PCA")
    figure = script.plot_losses(losses, baselines, "the data", script.Settings(decay_start=start))
    (axes,) = figure.axes
    training, test, pca, *falls = [np.array(line.get_data()) for line in axes.lines]
    np.testing.assert_array_equal([training[0], test[0]], [range(1, len(losses) + 1)] * 2)
    np.testing.assert_array_equal([training[1], test[1]], np.transpose(losses))
    assert set(pca[1]) == {0.0123}
    assert [set(fall[0]) for fall in falls] == [{len(losses) / 2}] * (start < 1)
    legend = [f"training (epoch mean): {losses[-1][0]:.5f}", f"test: {losses[-1][1]:.5f}"]
    legend += ["PCA, test: 0.01230"]
    legend += [f"learning rate falls after epoch {len(losses) / 2:g}"] * len(falls)
    assert [text.get_text() for text in axes.get_legend().texts] == legend
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low < tick < high] == ticks
    assert axes.get_title() == "Loss on the data"


@pytest.mark.parametrize("size", [128, 2, 1])
def test_latent_space_shows_all_codes_in_a_plane_and_what_its_points_decode_to(monkeypatch, size):
    codes = np.random.default_rng(0).standard_normal((60, size)) * np.arange(size, 0, -1) + 5
    decoder = np.random.default_rng(1).random((size, 784))
    model = SimpleNamespace(encode=lambda images: codes, decode=lambda codes: codes @ decoder)
    labels = np.arange(60, dtype=np.uint8) // 6
    monkeypatch.setattr(script, "CODE_SIZE", size)
    dataset = script.Dataset("the data", "", codes, labels, codes, labels, (28, 28))
    figure = script.plot_latent_space(model, dataset)
    left, right = figure.axes
    figure.draw_without_rendering()
    points, pca = np.pad(codes, [(0, 0), (0, 1)])[:, :2], PCA(2, svd_solver="full")
    if size > 2:
        points = pca.fit_transform(codes)
        first, second = [f"{share:.1%} of the var" for share in pca.explained_variance_ratio_]
        assert first in figure.get_supxlabel() and second in left.get_ylabel()
    offsets = left.collections[0].get_offsets().data
    order = [np.argmin(np.linalg.norm(points - offset, axis=1)) for offset in offsets]
    np.testing.assert_allclose(offsets, points[order], rtol=1e-6)
    assert sorted(order) == list(range(60))
    assert np.count_nonzero(np.diff(labels[order])) > 30  # no digit is drawn on top of the others
    colors = [tuple(color) for color in left.collections[0].get_facecolors()]
    assert len({*zip(labels[order], colors, strict=True)}) == len({*colors}) == 10  # one each
    x0, x1, y0, y1 = right.images[0].get_extent()
    assert left.get_xlim() == right.get_xlim() == (x0, x1)
    assert np.abs(points - [(x0 + x1) / 2, (y0 + y1) / 2]).max() <= (x1 - x0) / 2 + 1e-9
    for row, column in ((0, 0), (0, 14), (7, 3)):
        point = [x0 + (column + 0.5) / 15 * (x1 - x0), y1 - (row + 0.5) / 15 * (y1 - y0)]
        code = pca.inverse_transform([point]) if size > 2 else [point[:size]]
        pixels = right.images[0].get_array()[28 * row : 28 * row + 28, 28 * column :][:, :28]
        np.testing.assert_allclose(np.ravel(pixels), np.ravel(code @ decoder), rtol=1e-6)


def test_reconstructions_show_one_image_per_digit_its_outputs_and_errors():
    model = SimpleNamespace(encode=lambda images: images / 255, decode=lambda codes: codes[:, ::-1])
    pca = PCA(3).fit(SAMPLE.images / 255)
    cells = np.reshape(script.plot_reconstructions(model, SAMPLE, pca).axes, (5, 10))
    rows = [cell.get_ylabel() for cell in cells[:, 0]]
    assert rows == ["original", "autoencoder", "error", "PCA", "PCA's error"]
    for digit, column in enumerate(cells.T):
        row = np.flatnonzero(SAMPLE.test_labels == digit)[0]
        x, a = SAMPLE.test_images[row] / 255, SAMPLE.test_images[row][::-1] / 255
        b = pca.inverse_transform(pca.transform([x]))[0]
        shown = [np.ravel(cell.images[0].get_array()) for cell in column]
        np.testing.assert_allclose(shown, [x, a, a - x, b, b - x], atol=1e-5)
        assert [c.images[0].get_clim() for c in column] == [(0, 1), *[(0, 1), (-0.5, 0.5)] * 2]
        for cell, output in ((column[2], a), (column[4], b)):
            assert cell.get_xlabel() == f"MSE {np.mean((output - x) ** 2):.4f}"


def test_same_flags_same_run_and_other_flags_another(small, no_plots):
    arguments, whole = small
    assert call(*arguments).status == 0
    assert result_of() == result_of(whole)
    told = ("'# epochs: 4' instead of '# epochs: 5'", "learning rate", "start anew in another")
    fails(call(*arguments, "--epochs", 5, "--resume"), 2, *told)
    for name, value in (("seed", 1), ("momentum", 0.5)):
        assert f"# {name}: {value}\n" in call(*arguments, f"--{name}", value).out
        assert result_of()[2] != result_of(whole)[2]  # the parameters
    assert "# batch_size: 50\n" in call(*arguments, "--batch-size", 99).out  # all images


def test_every_step_gets_its_images_its_learning_rate_and_its_weight_decay(monkeypatch):
    images = np.random.default_rng(0).integers(256, size=(50, 784), dtype=np.uint8)
    model, steps, batches, orders = script.Autoencoder(images[0] / 255), [], [], set()
    forward = model.forward
    model.forward = lambda x: batches.append(x) or forward(x)
    monkeypatch.setattr(script, "sgd_step", lambda p, velocity, g, *rest: steps.append(rest[:2]))
    for seed, epoch in ((0, 1), (0, 3), (1, 3)):
        settings = script.Settings(epochs=3, batch_size=16, learning_rate=0.1, seed=seed)
        steps[:], batches[:] = [], []
        loss = script.train_epoch(model, None, images, epoch, settings)
        assert loss == pytest.approx(np.mean((images[0] / 255 - images / 255) ** 2), rel=1e-5)
        numbers = range(4 * (epoch - 1), 4 * epoch)
        rates = [script.scheduled_learning_rate(number, 12, settings) for number in numbers]
        assert steps == [(rate, settings.weight_decay / 50) for rate in rates]
        assert [len(batch) for batch in batches] == [16, 16, 16, 2]
        rows = [bytes(row) for row in np.concatenate(batches)]
        assert sorted(rows) == sorted(map(bytes, (images / 255).astype(np.float32)))
        orders.add(tuple(rows))
    assert len(orders) == 3


LEARNS = ["--momentum 0", "--momentum 0.99", f"--lr {2 * script.Settings.learning_rate}"]
LEARNS += ["--batch-size 2 --epochs 1", "--batch-size 32", "--batch-size 100000 --epochs 15"]


@pytest.mark.parametrize("flags", [*LEARNS, "--lr 1000 --epochs 1", "--lr 500 --epochs 5"])
def test_flags_far_from_their_defaults_learn_or_are_an_error(flags, no_plots):
    result = call("--dataset", "sample", "--epochs", 3, *flags.split())
    if flags in LEARNS:
        assert script.load_run("model.npz").losses[-1][1] < 0.03
    else:
        default = f"{script.Settings.learning_rate:g}"
        fails(result, 1, "training diverged", f"; try --lr {default} (default: {default})")


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize(("steps", "wrong"), [(range(8, 12), 1e3), ([11], 1e38)])  # in epoch 3
def test_divergence_keeps_the_last_good_epoch(small, monkeypatch, steps, wrong):
    schedule, default = script.scheduled_learning_rate, script.default_learning_rate(16)
    diverging = lambda step, *rest: wrong if step in steps else schedule(step, *rest)  # noqa: E731
    monkeypatch.setattr(script, "scheduled_learning_rate", diverging)
    fails(call(*small[0]), 1, "epoch 3", f"try --lr {default / 2:g} (default: {default:g})")
    assert script.load_run("model.npz").losses == result_of(small[1])[1][:2]
    assert len(EPOCH.findall(read_log())) == 2 and snapshot("plots") == {}


@pytest.mark.parametrize(("part", "lines"), [(0.89, 0), (0.91, 1)])  # of the mean image's loss
def test_learning_next_to_nothing_is_warned_of(small, monkeypatch, capsys, part, lines):
    monkeypatch.setattr(script, "write_atomically", lambda *_: None)
    run, dataset = script.load_run(small[1] / "model.npz"), script.load_data("auto", small[0][1])
    baselines = script.compute_baselines(dataset)
    run.losses[-1][1] = part * baselines.mean_image_loss
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


NETWORK = "784-512-256-128-256-512-784, elu elu linear elu elu clip"
ROWS = re.findall(r"^    Layer\(.*\n", Path(script.__file__).read_text(), re.MULTILINE)
DEEPER = [("128, linear),", "128, elu),\n    Layer(128, 16, linear),")]
DEEPER += [("    Layer(128, 256", "    Layer(16, 128, elu),\n    Layer(128, 256")]
EDITS = {
    "784-512-256-32-256-512-784, elu elu linear elu elu clip": recipe.code_of(32),
    "784-512-256-1-256-512-784, elu elu linear elu elu clip": recipe.code_of(1),
    NETWORK.replace("elu", "relu"): recipe.EXERCISES["ReLU instead of ELU"],
    NETWORK.replace("clip", "sigmoid"): [recipe.define(recipe.sigmoid), (", clip)", ", sigmoid)")],
    "784-512-256-512-784, elu elu elu clip": [("".join(ROWS[2:4]), "")],
    "784-512-256-128-16-128-256-512-784, elu elu elu linear elu elu elu clip": DEEPER,
}


def edited(monkeypatch, edits):
    """The script with edits of its source, as a module that keeps its figures instead of saving."""
    module = recipe.edited_script(edits)
    module.figures, module.SAMPLE_DIR = [], script.SAMPLE_DIR
    keep = lambda figure, path: path.touch() or module.figures.append(figure)  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", keep)
    return module


@pytest.mark.parametrize("network", EDITS)
def test_everything_follows_from_layers(monkeypatch, small, network):
    module = edited(monkeypatch, EDITS[network])
    flags = ("--data-dir", script.SAMPLE_DIR, "--epochs", 2)
    assert call(*flags, main=module.main).status == 0
    assert read_log().startswith(f"# network: {network}\n# data: a sample of MNIST, 4000")
    size = min(map(int, re.findall(r"\d+", network)))
    run = module.load_run("model.npz")
    assert run.losses[-1][0] < run.losses[0][0]  # It learns.
    codes = run.model.encode(SAMPLE.test_images)
    decoded = run.model.decode(codes)
    assert (codes.shape, decoded.shape) == ((1000, size), (1000, 784))
    images, test_images = SAMPLE.images / 255, SAMPLE.test_images / 255
    pca = PCA(size, svd_solver="full").fit(images)
    for pattern, outputs in (
        (r"mean image: (\S+)", images.mean(axis=0)),
        (rf"PCA with {size} comp.*: (\S+)", pca.inverse_transform(pca.transform(test_images))),
        (r"Epoch 2, .* Test Loss: (\S+),", decoded),
    ):
        loss = np.mean((outputs - test_images) ** 2)
        assert float(re.search(pattern, read_log())[1]) == pytest.approx(loss, abs=2e-6)
    what = "first principal component" if size > 2 else "first number of the code"
    assert what in module.figures[1].get_supxlabel()
    assert f"codes of {size} number" in module.figures[2].get_suptitle()
    # Neither script continues the other's run, and each says why.
    fails(call(*flags, "--resume"), 2, network, NETWORK)
    fails(call(*flags, "--output-dir", small[1], "--resume", main=module.main), 2, network, NETWORK)


UNFIT = [[("".join(ROWS), "    Layer(784, 784, clip),\n")], recipe.code_of(0), recipe.code_of(-3)]
UNFIT += [[(row, re.sub(r", \d+, ", ", 300, ", row))] for row in ROWS]


@pytest.mark.parametrize("edits", UNFIT)
def test_rows_that_do_not_fit_or_leave_no_code_are_one_clear_error(edits):
    fails(call(main=lambda _: recipe.edited_script(edits)), 2, "LAYERS", "hidden", "inputs [784")


def test_other_data_have_their_own_name_and_size_and_are_not_resumed(monkeypatch):
    conftest.write_idx("$_$", shape=(20, 30))  # LaTeX's maths would be an error
    flags = ("--data-dir", "$_$", "--epochs", 2)
    fails(call(*flags), 2, "20, 30", "784", "LAYERS")
    module = edited(monkeypatch, [("Layer(784,", "Layer(600,"), ("512, 784,", "512, 600,")])
    fails(call("--dataset", "sample", main=module.main), 2, "28, 28", "600", "or LAYERS")
    assert call(*flags, main=module.main).status == 0
    for figure in module.figures:
        figure.draw_without_rendering()
    assert "$_$" in module.figures[0].axes[0].get_title()
    assert {cell.images[0].get_array().shape for cell in module.figures[2].axes} == {(20, 30)}
    conftest.write_idx("$_$", shape=(20, 30), seed=1)
    fails(call(*flags, "--resume", main=module.main), 2, "# data: $_$, 50 training", "instead of")


def test_commands_and_python_of_the_readme_run(capsys):
    commands = re.findall(r"^(?:uv run|python) mnist_autoencoder.py (.+)", README, re.MULTILINE)
    assert set(commands) == {"--epochs 1 --output-dir trial"}
    assert call(*commands[0].split(), "--dataset", "sample").status == 0
    shutil.copy("trial/model.npz", ".")
    (python,) = re.findall(r"```python\n(# Use.*?)```", README, re.DOTALL)
    names = {}
    exec(python, names)
    noisy, cleaned = re.findall(r"0\.\d+", capsys.readouterr().out)
    assert names["codes"].shape == (1000, 128) and float(cleaned) < float(noisy)
    assert f"\nnoisy: mean squared error {noisy}\n" in README


def test_readme_and_requirements_repeat_the_script_and_the_measurements():
    (shown,) = re.findall(r"```python\n(da = .*?)```", README, re.DOTALL)
    indented = shown.replace("\n", "\n" + 8 * " ").strip()
    assert indented in inspect.getsource(script.Autoencoder.backward)
    required = SCRIPT.with_name("requirements.txt").read_text().split()
    assert re.findall(r'"([a-z]\S+)"', SCRIPT.read_text().partition('"""')[0]) == required
    measured = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    for name in recipe.EXERCISES:
        (row,) = re.findall(rf"^{re.escape(name)} \|.*", README, re.MULTILINE)
        assert row in measured


def test_committed_log_is_of_the_default_run_on_all_of_mnist_and_quoted_faithfully():
    if not SCRIPT.with_name(".git").exists():
        pytest.skip("needs the history of this folder, because runs replace its log")
    command = ["git", "-C", SCRIPT.parent, "show", "HEAD:./training_log.txt"]
    log = subprocess.check_output(command, text=True)
    (data,) = re.findall(r"# data: (MNIST, 60000 training and 10000 test images, .*)", log)
    facts = {"network": script.NETWORK, "data": data, **asdict(script.Settings())}
    assert log.startswith("".join(f"# {name}: {value}\n" for name, value in facts.items()))
    number, loss, test_loss = EPOCH.findall(log)[-1]
    assert int(number) == script.Settings.epochs
    assert float(loss) <= 0.00067 and float(test_loss) <= 0.0008
    output = re.search(r"It prints.*?```\n(.*?)```", README, re.DOTALL)[1]
    quoted = re.findall(r"^(?:#|Epoch) .*: .*$", output, re.MULTILINE)
    assert len(quoted) >= 3 and set(quoted) <= set(log.splitlines())
    assert f"| {loss} / {test_loss}\n" in README
    shown = [f"{float(number):.5f} on the" for number in (loss, test_loss)]
    assert all(text in " ".join(script.__doc__.split()) for text in shown)


def test_all_of_mnist():
    if not all((MNIST_DIR / "MNIST" / "raw" / name).is_file() for name in script.FILES.split(", ")):
        pytest.skip("needs all of MNIST in data, or in the folder that MNIST_DIR names")
    images = {image.tobytes() for image in script.load_data("mnist", MNIST_DIR).images}
    assert all(image.tobytes() in images for image in [*SAMPLE.images, *SAMPLE.test_images])
    result = call("--data-dir", MNIST_DIR, "--epochs", 3)
    assert result.status == 0 and "# data: MNIST, 60000 training and 10000" in result.out
    assert script.load_run("model.npz").losses[-1][1] <= 0.0017
