"""What a learner changes in LAYERS, Settings and the data: everything else must follow."""

import re
from pathlib import Path

import numpy as np
import pytest
import recipe
from conftest import SAMPLE, call, fails, read_log, script, write_idx
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

NETWORK = "784-512-256-128-256-512-784, elu elu linear elu elu clip"
ROWS = re.findall(r"^    Layer\(.*\n", Path(script.__file__).read_text(), re.MULTILINE)
DEEPER = (
    ("256, 128, linear", "256, 128, elu),\n    Layer(128, 16, linear"),
    ("Layer(128, 256", "Layer(16, 128, elu),\n    Layer(128, 256"),
)
SIGMOID = recipe.define(recipe.sigmoid)
EDITS = {
    "784-512-256-32-256-512-784, elu elu linear elu elu clip": recipe.code_of(32),
    "784-512-256-1-256-512-784, elu elu linear elu elu clip": recipe.code_of(1),
    NETWORK.replace("elu", "relu"): recipe.EXERCISES["ReLU instead of ELU"],
    NETWORK.replace("clip", "sigmoid"): [SIGMOID, (", clip)", ", sigmoid)")],
    "784-512-256-512-784, elu elu elu clip": [("".join(ROWS[2:4]), "")],
    "784-512-256-128-16-128-256-512-784, elu elu elu linear elu elu elu clip": DEEPER,
}


def edited(monkeypatch, edits):
    """The script with edits of its source, as a module that keeps its figures instead of saving."""
    module = recipe.edited_script(edits)
    module.figures = []
    keep = lambda figure, path: path.touch() or module.figures.append(figure)  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", keep)
    return module


@pytest.mark.parametrize("network", EDITS)
def test_everything_follows_from_layers(monkeypatch, small, network):
    module = edited(monkeypatch, EDITS[network])
    flags = ("--data-dir", recipe.ROOT / "data" / "sample", "--epochs", 2)
    assert call(*flags, main=module.main).status == 0
    assert read_log().startswith(f"# network: {network}\n# data: a sample of MNIST, 4000")

    code_size = min(map(int, re.findall(r"\d+", network)))
    run = module.load_run("model.npz")
    assert run.losses[-1][0] < run.losses[0][0]  # It learns.
    codes = run.model.encode(SAMPLE.test_images)
    decoded = run.model.decode(codes)
    assert (codes.shape, decoded.shape) == ((1000, code_size), (1000, 784))
    images, test_images = SAMPLE.images / 255, SAMPLE.test_images / 255
    pca = PCA(code_size, svd_solver="full").fit(images)
    for pattern, outputs in (
        (r"mean image: (\S+)", images.mean(axis=0)),
        (rf"PCA with {code_size} comp.*: (\S+)", pca.inverse_transform(pca.transform(test_images))),
        (r"Epoch 2, .* Test Loss: (\S+),", decoded),
    ):
        loss = np.mean((outputs - test_images) ** 2)
        assert float(re.search(pattern, read_log())[1]) == pytest.approx(loss, abs=2e-6)
    _, latent_space, reconstructions = module.figures
    what = "principal component" if code_size > 2 else "number of the code"
    assert f"first {what}" in latent_space.get_supxlabel()
    assert f"codes of {code_size} number" in reconstructions.get_suptitle()

    # Neither script continues the other's run, and each says why.
    fails(call(*flags, "--resume"), 2, network, NETWORK)
    other = call(*flags, "--output-dir", small[1], "--resume", main=module.main)
    fails(other, 2, network, NETWORK)
    with pytest.raises(script.InputError, match=network):
        script.load_run("model.npz")


CONSTANTS = {"momentum": 0.9, "max_gradient_norm": 9.0, "weight_decay": 0.0, "decay_start": 0.75}


@pytest.mark.parametrize(("name", "new"), CONSTANTS.items())
def test_changed_constant_is_used_logged_and_not_resumed(small, monkeypatch, name, new):
    old = getattr(script.Settings, name)
    module = edited(monkeypatch, [(f"{name}: float = {old}", f"{name}: float = {new}")])
    assert f"# {name}: {new}\n" in call(*small[0], main=module.main).out
    other = script.load_run(small[1] / "model.npz").model.parameters
    assert (script.load_run("model.npz").model.parameters != other).any()
    fails(call(*small[0], "--resume"), 2, f"'# {name}: {new}'", f"'# {name}: {old}'")


@pytest.mark.parametrize("row", range(6))
def test_row_that_does_not_fit_is_one_clear_error(row):
    size = 99 if row < 3 else 999  # less or more than the inputs of the next row
    wrong = re.sub(r", \d+, ", f", {size}, ", ROWS[row])
    with pytest.raises(SystemExit, match=rf"error: LAYERS in .* outputs \[.*\b{size}\b.*inputs \["):
        recipe.edited_script([(ROWS[row], wrong)])


def test_network_without_a_hidden_layer_is_one_clear_error():
    with pytest.raises(SystemExit, match="error: LAYERS in .* hidden layer"):
        recipe.edited_script([("".join(ROWS), "    Layer(784, 784, clip),\n")])


def test_other_data_have_their_own_name_and_size_and_are_not_resumed(monkeypatch):
    write_idx("$_$", shape=(20, 30))  # LaTeX's maths would be an error
    flags = ("--data-dir", "$_$", "--epochs", 2)
    fails(call(*flags), 2, "20, 30", "784")
    module = edited(monkeypatch, [("Layer(784,", "Layer(600,"), ("512, 784,", "512, 600,")])
    assert call(*flags, main=module.main).status == 0
    assert "# network: 600-512-256-128-256-512-600," in read_log()
    for figure in module.figures:
        figure.draw_without_rendering()
    assert "$_$" in module.figures[0].axes[0].get_title()
    assert {cell.images[0].get_array().shape for cell in module.figures[2].axes} == {(20, 30)}
    write_idx("$_$", shape=(20, 30), seed=1)
    fails(call(*flags, "--resume", main=module.main), 2, "# data: $_$, 50 training", "instead of")


def test_overfitted_small_data_set_is_not_divergence(no_plots):
    """Random images, whose test loss ends above that of the mean image."""
    raw = write_idx("noise", train=60, test=60)
    for seed, path in enumerate(sorted(raw.glob("*-images-*"))):
        path.write_bytes(path.read_bytes()[:16] + np.random.default_rng(seed).bytes(60 * 784))
    result = call("--data-dir", "noise", "--epochs", 120)
    assert result.status == 0
    mean_image_loss = float(re.search(r"mean image: (\S+)", result.out)[1])
    assert script.load_run("model.npz").losses[-1][1] > mean_image_loss
