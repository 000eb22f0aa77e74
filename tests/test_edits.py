"""What a learner changes in LAYERS, Settings and the data: everything else must follow."""

import re

import numpy as np
import pytest
import recipe
from conftest import ROOT, call, fails, read_log, script, write_idx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INNER = "    Layer(256, 128, linear, linear_derivative),  # the output is the latent code\n"
INNER += "    Layer(128, 256, elu, elu_derivative),\n"
DEEPER = (
    ("256, 128, linear", "256, 128, elu, elu_derivative),\n    Layer(128, 16, linear"),
    ("Layer(128, 256", "Layer(16, 128, elu, elu_derivative),\n    Layer(128, 256"),
)
CLIP_TO_SIGMOID = ("784, clip, clip_derivative)", "784, sigmoid, sigmoid_derivative)")
SIGMOID = (CLIP_TO_SIGMOID, recipe.define(recipe.sigmoid, recipe.sigmoid_derivative))
SIZES = "784-512-256-128-256-512-784"
DEEP = "784-512-256-128-16-128-256-512-784"
NAMES = "elu elu linear elu elu clip"
EDITS = [  # the edits; the network; its activations; the size of the code
    (recipe.EXERCISES["a code of 32 numbers"], SIZES.replace("128", "32"), NAMES, 32),
    (recipe.code_of(1), SIZES.replace("128", "1"), NAMES, 1),
    (recipe.EXERCISES["ReLU instead of ELU"], SIZES, NAMES.replace("elu", "relu"), 128),
    (SIGMOID, SIZES, NAMES.replace("clip", "sigmoid"), 128),
    (((INNER, ""),), "784-512-256-512-784", "elu elu elu clip", 256),
    (DEEPER, DEEP, "elu elu elu linear elu elu elu clip", 16),
]


def edited(monkeypatch, edits):
    """The script with edits of its source, as a module that keeps its figures instead of saving."""
    module = recipe.edited_script(edits)
    module.figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: module.figures.append(figure))
    return module


@pytest.mark.parametrize(("edits", "network", "names", "code_size"), EDITS)
def test_everything_follows_from_layers(
    tmp_path, monkeypatch, sample, sample_run, edits, network, names, code_size
):
    module = edited(monkeypatch, edits)
    flags = ("--data-dir", ROOT / "data" / "sample", "--output-dir", tmp_path, "--epochs", 2)
    result = call(*flags, main=module.main)
    assert result.status == 0, result.err
    start = f"# network: {network}, {names}\n# data: a sample of MNIST, 4000"
    assert read_log(tmp_path).startswith(start)

    mean = sample.images.mean(axis=0)
    centred, centred_test = (sample.images - mean) / 255, (sample.test_images - mean) / 255
    best = np.linalg.eigh(centred.T @ centred)[1][:, -code_size:]
    loss = np.mean((centred_test @ best @ best.T - centred_test) ** 2)
    logged = re.search(rf"PCA with {code_size} components: (\S+)", read_log(tmp_path))[1]
    assert float(logged) == pytest.approx(loss, abs=2e-6)

    _, latent_space, reconstructions = module.figures
    assert f" of {code_size} principal components" in latent_space.axes[0].get_title()
    assert f"codes of {code_size} number" in reconstructions.get_suptitle()
    run = module.load_run(tmp_path / "model.npz")
    assert run.losses[-1][0] < run.losses[0][0]  # It learns.
    codes = run.model.encode(sample.test_images)
    assert (codes.shape, run.model.decode(codes).shape) == ((1000, code_size), (1000, 784))

    # Neither script continues the other's run, and each says why.
    fails(call(*flags, "--resume"), 2, f"{network}, {names}", NAMES)
    others = (*flags[:3], sample_run.directory, "--epochs", 5, "--resume")
    fails(call(*others, main=module.main), 2, f"{network}, {names}", SIZES)
    with pytest.raises(script.InputError, match=network):
        script.load_run(tmp_path / "model.npz")


CONSTANTS = [("momentum", "0.98", "0.9"), ("max_gradient_norm", "0.0025", "1000.0")]
CONSTANTS += [("weight_decay", "0.006", "0.0"), ("decay_start", "0.25", "0.75"), ("seed", "0", "3")]


@pytest.mark.parametrize(("name", "old", "new"), CONSTANTS)
def test_changed_constant_is_used_logged_and_not_resumed(
    small, tmp_path, monkeypatch, name, old, new
):
    kind = "int" if name == "seed" else "float"
    module = edited(monkeypatch, [(f"{name}: {kind} = {old}", f"{name}: {kind} = {new}")])
    arguments = [*small[0], "--output-dir", tmp_path]
    assert f"# {name}: {new}\n" in call(*arguments, main=module.main).out
    other = script.load_run(small[1] / "model.npz").model.parameters
    assert (script.load_run(tmp_path / "model.npz").model.parameters != other).any()
    fails(call(*arguments, "--resume"), 2, f"'# {name}: {new}'", f"'# {name}: {old}'")


def test_other_data_are_not_resumed(small, tmp_path):
    write_idx(tmp_path, seed=1)
    flags = ("--data-dir", tmp_path, "--output-dir", small[1], "--resume")
    fails(call(*small[0], *flags), 2, "# data: data, 50 training", f"# data: {tmp_path.name}, 50")


@pytest.mark.parametrize("row", range(6))
def test_row_that_does_not_fit_is_one_clear_error(small, tmp_path, row):
    module = recipe.edited_script(())
    layers = list(module.LAYERS)
    layers[row] = layers[row]._replace(outputs=99)
    module.Autoencoder.__init__.__defaults__ = (0, layers, np.float32)
    result = call(*small[0], "--output-dir", tmp_path / "out", main=module.main)
    fails(result, 2, "99 outputs", f"{layers[(row + 1) % 6].inputs} inputs", "LAYERS")
    assert not (tmp_path / "out").exists()


def test_images_of_another_size_need_other_layers(tmp_path, monkeypatch):
    write_idx(tmp_path / "$_$", shape=(20, 30))  # LaTeX's maths would be an error
    flags = ("--data-dir", tmp_path / "$_$", "--epochs", 2, "--output-dir", tmp_path / "out")
    fails(call(*flags), 2, "20, 30", "784")
    module = edited(monkeypatch, [("Layer(784,", "Layer(600,"), ("512, 784,", "512, 600,")])
    assert call(*flags, main=module.main).status == 0
    assert "# network: 600-512-256-128-256-512-600," in read_log(tmp_path / "out")
    for figure in module.figures:
        FigureCanvasAgg(figure).draw()
    assert "$_$" in module.figures[0].axes[0].get_title()
    assert {cell.images[0].get_array().shape for cell in module.figures[2].axes} == {(20, 30)}


def test_overfitted_small_data_set_is_not_divergence(tmp_path, no_plots):
    """Random images, whose test loss ends above that of the mean image."""
    raw = write_idx(tmp_path, train=60, test=60)
    for seed, path in enumerate(raw.glob("*-images-*")):
        noise = np.random.default_rng(seed).bytes(60 * 784)
        path.write_bytes(path.read_bytes()[:16] + noise)
    result = call("--data-dir", tmp_path, "--epochs", 60, "--output-dir", tmp_path / "out")
    assert result.status == 0, result.err
    mean_image_loss = float(re.search(r"mean image: (\S+)", result.out)[1])
    assert script.load_run(tmp_path / "out" / "model.npz").losses[-1][1] > mean_image_loss
    assert "more than half" in result.err
