"""What readers see and change: plots, edits of the tables, README, and the recorded run."""

import inspect
import os
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import recipe
from conftest import EPOCH, assert_error, call, read_log, script, write_data
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

SCRIPT = Path(script.__file__)
README = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
MEASUREMENTS = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
MNIST_DIR = Path(os.environ.get("MNIST_DIR", SCRIPT.parent / "data")).resolve()


# Plots. ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("epochs", [1, 2, 100])
def test_loss_curve_shows_every_epoch_and_pca_and_names_the_last_losses(epochs):
    losses = np.linspace([0.02, 0.01], [0.002, 0.003], epochs)
    (axes,) = script.plot_losses(losses, 0.0123, "the data").axes
    training, test, pca = axes.lines
    np.testing.assert_array_equal(training.get_xdata(), range(1, epochs + 1))
    np.testing.assert_array_equal(training.get_ydata(), losses[:, 0])
    np.testing.assert_array_equal(test.get_ydata(), losses[:, 1])
    assert set(pca.get_ydata()) == {0.0123}
    names = [text.get_text() for text in axes.get_legend().texts]
    assert names[0] == f"training (epoch mean): {losses[-1, 0]:.5f}"
    assert names[1] == f"test: {losses[-1, 1]:.5f}"
    assert names[2] == "PCA, test: 0.01230"
    assert axes.get_title() == "Loss on the data"
    assert axes.get_ylabel() == "mean squared error"
    assert all(tick == round(tick) for tick in axes.get_xticks())


def linear_model(images, size):
    """A model that encodes images by PCA and decodes them linearly."""
    pca = PCA(size).fit(images)

    def reconstruct(images):
        return pca.inverse_transform(pca.transform(images))

    return SimpleNamespace(
        encode=pca.transform, decode=pca.inverse_transform, reconstruct=reconstruct
    )


@pytest.mark.parametrize("size", [128, 2, 1])
def test_latent_space_shows_the_codes_in_their_principal_components(sample, size):
    model = linear_model(sample.test_images, size)
    codes = model.encode(sample.test_images)
    left, right = script.plot_latent_space(model, sample).axes
    expected = np.zeros((1000, 2))
    expected[:, : min(2, size)] = PCA(min(2, size), svd_solver="full").fit_transform(codes)
    points = left.collections[0].get_offsets().data
    np.testing.assert_allclose(points, expected, atol=1e-6)
    x0, x1, y0, y1 = right.images[0].get_extent()
    assert (left.get_xlim(), left.get_ylim()) == ((x0, x1), (y0, y1))
    assert np.mean((points > [x0, y0]) & (points < [x1, y1])) > 0.97


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 14), (7, 3)])
def test_latent_space_shows_what_the_points_of_the_plane_decode_to(sample, row, column):
    model = linear_model(sample.test_images, 9)
    _, right = script.plot_latent_space(model, sample).axes
    x0, x1, y0, y1 = right.images[0].get_extent()
    point = [x0 + (column + 0.5) / 15 * (x1 - x0), y1 - (row + 0.5) / 15 * (y1 - y0)]
    pca = PCA(2, svd_solver="full").fit(model.encode(sample.test_images))
    (expected,) = model.decode(pca.inverse_transform([point]))
    picture = right.images[0].get_array()
    shown = picture[28 * row : 28 * (row + 1), 28 * column : 28 * (column + 1)]
    np.testing.assert_allclose(shown.ravel(), expected, atol=1e-6)


def test_latent_space_gives_every_digit_its_color(sample):
    figure = script.plot_latent_space(linear_model(sample.test_images, 2), sample)
    dots, *samples = figure.axes[0].collections
    legend = [tuple(dot.get_facecolor()[0]) for dot in samples]
    shown = [tuple(color) for color in dots.get_facecolors()]
    assert [text.get_text() for text in figure.legends[0].texts] == list("0123456789")
    assert len(set(legend)) == 10
    assert shown == [legend[digit] for digit in sample.test_labels]


def test_reconstructions_show_one_image_per_digit_its_outputs_and_errors(sample):
    model = linear_model(sample.test_images / 255, 5)
    pca = PCA(3).fit(sample.images / 255)
    figure = script.plot_reconstructions(model, sample, pca)
    assert figure.get_suptitle().endswith("from codes of 128 numbers (PCA: 3)")
    axes = figure.axes
    assert [row.get_ylabel() for row in axes[:2]] == ["original", "autoencoder"]
    assert axes[2].get_ylabel() == "output -\noriginal"
    for digit in range(10):
        x = sample.test_images[sample.test_labels == digit][:1] / 255
        a = model.decode(model.encode(x))
        b = pca.inverse_transform(pca.transform(x))
        for row, expected in zip(axes, (x, a, a - x, b, b - x), strict=True):
            shown = row.images[0].get_array()[:, 28 * digit : 28 * (digit + 1)]
            np.testing.assert_allclose(shown.ravel(), expected[0], atol=1e-5)
        for row, output in ((axes[1], a), (axes[3], b)):
            label = row.get_xticklabels()[digit].get_text()
            assert label == f"{np.mean((output - x) ** 2):.4f}"


# Edits of the tables. ----------------------------------------------------------------------------
DEEPER = [
    ("Layer(256, 128, linear),", "Layer(256, 128, elu),\n    Layer(128, 16, linear),"),
    ("DECODER = (", "DECODER = (\n    Layer(16, 128, elu),"),
]
SHALLOWER = [
    ("    Layer(512, 256, elu),\n    Layer(256, 128,", "    Layer(512, 128,"),
    ("    Layer(128, 256, elu),\n    Layer(256, 512,", "    Layer(128, 512,"),
]
EDITS = {  # the size of the code, and the edits
    "a small code": (32, recipe.code_of(32)),
    "one number": (1, recipe.code_of(1)),
    "a code wider than other layers": (300, recipe.code_of(300)),
    "ReLU": (128, recipe.VARIANTS["ReLU instead of ELU"]),
    "sigmoid": (128, [recipe.define(recipe.sigmoid), (", clamp)", ", sigmoid)")]),
    "a layer more": (16, DEEPER),
    "a layer fewer": (128, SHALLOWER),
    "another loss": (
        128,
        [recipe.define(recipe.absolute_error), ("= squared_error", "= absolute_error")],
    ),
}


@pytest.mark.parametrize(("size", "edits"), EDITS.values(), ids=EDITS)
def test_everything_follows_from_the_tables(monkeypatch, size, edits):
    write_data("mine", train=400)
    flags = ("--data-dir", "mine", "--epochs", 2, "--batch-size", 16)
    module = recipe.edited_script(edits)
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    assert call(*flags, main=module.main).status == 0
    run = module.load_run("model.npz")
    assert run.losses[-1][0] < run.losses[0][0]  # It learns.
    codes = run.model.encode(np.zeros((9, 784)))
    assert codes.shape == (9, size)
    assert run.model.decode(codes).shape == (9, 784)
    assert f"PCA with {size} components" in read_log()
    assert f"codes of {size} numbers (PCA: {size})" in figures[2].get_suptitle()
    # Neither script continues the other's run.
    assert_error(call(*flags, "--resume"), "must be as in its log")


def test_another_loss_is_one_edit():
    edits = EDITS["another loss"][1]
    module = recipe.edited_script(edits)
    outputs = np.random.default_rng(0).random((5, 784), np.float32)
    images = np.random.default_rng(1).integers(256, size=(5, 784), dtype=np.uint8)
    mean_loss = module.mean_loss(lambda x: outputs, images)
    assert mean_loss == pytest.approx(np.mean(abs(outputs - images / 255)), rel=1e-5)
    assert module.NETWORK.endswith("\n# loss: absolute_error")
    (axes,) = module.plot_losses([[1, 2]], 3, "the data").axes
    assert axes.get_ylabel() == "mean absolute error"
    renamed = [(old, new.replace("absolute", "mean_absolute")) for old, new in edits]
    assert recipe.edited_script(renamed).LOSS_NAME == "mean absolute error"


def test_a_loss_that_is_not_per_pixel_is_an_error():
    absolute = "np.abs(error)"
    for new in (f"np.mean({absolute})", f"{absolute}.sum(1)", f"{absolute}.sum(1, keepdims=True)"):
        edits = [(a, b.replace(absolute, new)) for a, b in EDITS["another loss"][1]]
        module = recipe.edited_script(edits)
        with pytest.raises(ValueError, match="cannot reshape"):
            module.mean_loss(lambda x: x, np.zeros((5, 784), np.uint8))


def cross_entropy(outputs, images):
    losses = -images * np.log(outputs) - (1 - images) * np.log(1 - outputs)
    return losses, (outputs - images) / (outputs * (1 - outputs))


def test_cross_entropy_is_compared_with_pcas_only_if_it_is_clipped(monkeypatch):
    edits = [
        recipe.define(recipe.sigmoid),
        recipe.define(cross_entropy),
        (", clamp)", ", sigmoid)"),
        ("= squared_error", "= cross_entropy"),
    ]
    module = recipe.edited_script(edits)
    flags = ("--dataset", "sample", "--epochs", 2)
    told = "LOSS is nan for PCA: clip the outputs in LOSS to [1e-6, 1 - 1e-6]"
    assert_error(call(*flags, main=module.main), told)
    assert not Path("model.npz").exists()
    clip = "outputs = np.clip(outputs, 1e-6, 1 - 1e-6)"
    module = recipe.edited_script([*edits, ("    losses = -", f"    {clip}\n    losses = -")])
    monkeypatch.setattr(module, "finish", lambda *_: None)  # It would draw the plots.
    assert call(*flags, main=module.main).status == 0
    losses = module.load_run("model.npz").losses
    assert losses[-1][1] < losses[0][1]


def test_other_sizes_of_images_need_other_layers_only():
    write_data("$_$", shape=(20, 30))  # LaTeX's maths would be an error.
    assert_error(call("--data-dir", "$_$"), "784 pixels to 255")
    module = recipe.edited_script(
        [("Layer(784,", "Layer(600,"), ("Layer(512, 784", "Layer(512, 600")]
    )
    result = call("--data-dir", "$_$", "--epochs", 9, main=module.main)
    assert (result.status, result.err) == (0, "")


# README and the recorded run. --------------------------------------------------------------------
def test_flags_in_the_readme_are_the_scripts():
    flags = re.findall(r"`(?:python mnist_autoencoder.py )?(--[a-z-]+ [^`]+)`", README)
    assert len(flags) >= 5
    for text in flags:
        script.parse_arguments(text.split())


def test_python_of_the_readme_prints_what_it_shows(monkeypatch, sample, capsys, no_plots):
    assert call("--dataset", "sample", "--epochs", 1, "--output-dir", "trial").status == 0
    monkeypatch.setattr(script, "load_data", lambda: sample)
    (python,) = re.findall(r"```python\n(import numpy.*?)```", README, re.DOTALL)
    capsys.readouterr()
    exec(python, {})
    (shown,) = re.findall(r"```\n(noisy.*?)```", README, re.DOTALL)
    number = re.compile(r"0\.\d+")
    assert number.sub("", capsys.readouterr().out) == number.sub("", shown)


def test_the_readme_quotes_backward_as_it_is():
    (shown,) = re.findall(r"```python\n(for k in reversed.*?)```", README, re.DOTALL)
    assert shown.replace("\n", "\n" + 8 * " ").strip() in inspect.getsource(script.Autoencoder)


def test_the_readme_repeats_the_measurements():
    rows = re.findall(r"^.+ \| 0\.\d+.*$", README, re.MULTILINE)
    assert len(rows) >= 8
    for row in rows:
        for loss in re.findall(r"0\.00\d{4}", row):
            assert loss in MEASUREMENTS + RECORD


def test_requirements_are_those_of_the_script():
    required = SCRIPT.with_name("requirements.txt").read_text().split()
    header = SCRIPT.read_text().partition('"""')[0]
    assert re.findall(r'"([a-z]\S+)"', header) == required


def recorded_log():
    """The committed log, because runs replace the file."""
    command = ["git", "-C", SCRIPT.parent, "show", "HEAD:./training_log.txt"]
    return subprocess.run(command, capture_output=True, text=True).stdout


RECORD = recorded_log()


@pytest.mark.skipif(not RECORD, reason="needs the git history of this directory")
def test_the_recorded_run_is_of_the_script_on_all_of_mnist():
    assert RECORD.startswith(
        script.NETWORK + "\n# data: 60000 training and 10000 test images, sha256 "
    )
    assert f"sha256 {script.MNIST_CHECKSUM}\n" in RECORD
    for name, value in asdict(script.Settings()).items():
        assert f"# {name}: {value}\n" in RECORD
    assert len(EPOCH.findall(RECORD)) == script.Settings.epochs


@pytest.mark.skipif(not RECORD, reason="needs the git history of this directory")
def test_the_recorded_run_is_quoted_faithfully():
    _, loss, test_loss = EPOCH.findall(RECORD)[-1]
    docstring = " ".join(script.__doc__.split())
    assert f"{float(loss):.5f} on the training images" in docstring
    assert f"{float(test_loss):.5f} on the test images" in docstring
    output = re.search(r"```\n(# encoder.*?)```", README, re.DOTALL)[1]
    quoted = re.findall(r"^(?:#|Epoch) .*: .*$", output, re.MULTILINE)
    assert len(quoted) >= 3
    assert set(quoted) <= set(RECORD.splitlines())


def test_one_epoch_on_all_of_mnist(no_plots):
    files = MNIST_DIR / "MNIST" / "raw"
    if not (files / "train-images-idx3-ubyte").is_file():
        pytest.skip("needs all of MNIST in data, or in the directory that MNIST_DIR names")
    result = call("--data-dir", MNIST_DIR, "--epochs", 1)
    assert result.status == 0
    assert "# From epoch 1: MNIST, " in result.out
    assert script.load_run("model.npz").losses[-1][1] < 0.003
