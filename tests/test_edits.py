"""What a learner changes in LAYERS, Settings and the data: everything else must follow."""

import importlib.util
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, SCRIPT, call, fails, read_log, script, write_idx
from sklearn.decomposition import PCA

CODE = "256, 128, linear", "Layer(128, 256"
INNER = "    Layer(256, 128, linear, linear_derivative),  # the output is the latent code\n"
INNER += "    Layer(128, 256, elu, elu_derivative),\n"
OUTER = "    Layer(784, 512, elu, elu_derivative),\n    Layer(512, 256, elu, elu_derivative),\n"
OUTPUT = "Layer(512, 784, clip, clip_derivative)"
RELU = (
    "def relu(z):\n    return np.maximum(z, 0)\n\n\ndef relu_derivative(a):\n    return a > 0\n\n\n"
)
SIGMOID = "def sigmoid(z):\n    return 1 / (1 + np.exp(-z))\n\n\n"
SIGMOID += "def sigmoid_derivative(a):\n    return a * (1 - a)\n\n\n"
SIZES = "784-512-256-128-256-512-784"
ACTIVATIONS = "elu elu linear elu elu clip"


def code_of(size):
    return [(CODE[0], f"256, {size}, linear"), (CODE[1], f"Layer({size}, 256")]


# Name: the edits of the source; the network; its activations; the size of the code.
EDITS = {
    "a code of 32": (code_of(32), SIZES.replace("128", "32"), ACTIVATIONS, 32),
    "a code of 2": (code_of(2), SIZES.replace("128", "2"), ACTIVATIONS, 2),
    "a code of 1": (code_of(1), SIZES.replace("128", "1"), ACTIVATIONS, 1),
    "other widths": (
        [("784, 512", "784, 300"), ("Layer(512, 256", "Layer(300, 256")],
        SIZES.replace("784-512", "784-300"),
        ACTIVATIONS,
        128,
    ),
    "four layers": ([(INNER, "")], "784-512-256-512-784", "elu elu elu clip", 256),
    "eight layers": (
        [
            (CODE[0], "256, 128, elu, elu_derivative),\n    Layer(128, 16, linear"),
            (CODE[1], "Layer(16, 128, elu, elu_derivative),\n    Layer(128, 256"),
        ],
        "784-512-256-128-16-128-256-512-784",
        "elu elu elu linear elu elu elu clip",
        16,
    ),
    "five layers": (
        [(OUTER, "    Layer(784, 256, elu, elu_derivative),\n")],
        "784-256-128-256-512-784",
        "elu linear elu elu clip",
        128,
    ),
    "ReLU": (
        [(", elu, elu_derivative)", ", relu, relu_derivative)"), ("Layer = ", f"{RELU}Layer = ")],
        SIZES,
        ACTIVATIONS.replace("elu", "relu"),
        128,
    ),
    "sigmoid output": (
        [
            (OUTPUT, "Layer(512, 784, sigmoid, sigmoid_derivative)"),
            ("Layer = ", f"{SIGMOID}Layer = "),
        ],
        SIZES,
        ACTIVATIONS.replace("clip", "sigmoid"),
        128,
    ),
}


def edited(tmp_path, edits):
    """The script with edits of its source, as a module that records the figures it draws."""
    source = SCRIPT.read_text()
    for old, new in edits:
        assert old in source
        source = source.replace(old, new)
    path = tmp_path / "edited.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("edited", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.figures = []
    for name in ("plot_losses", "plot_latent_space", "plot_reconstructions"):
        setattr(module, name, recording(getattr(module, name), module.figures))
    return module


def recording(function, figures):
    def record(*arguments):
        figures.append(function(*arguments))
        return figures[-1]

    return record


def titles(module):
    losses, latent, reconstructions = module.figures
    texts = (losses.axes[0].get_title(), latent.axes[0].get_title())
    return SimpleNamespace(
        losses=texts[0], latent=texts[1], reconstructions=reconstructions.get_suptitle()
    )


@pytest.mark.parametrize("name", EDITS)
def test_everything_follows_from_layers(tmp_path, sample, sample_run, name):
    edits, network, activations, code_size = EDITS[name]
    module = edited(tmp_path, edits)
    flags = ("--data-dir", ROOT / "data" / "sample", "--output-dir", tmp_path)
    result = call(*flags, "--epochs", 2, main=module.main)
    assert result.status == 0, result.err
    log = read_log(tmp_path)
    assert log.startswith(f"# network: {network}, {activations}\n# data: a sample of MNIST, 4000")
    pca = PCA(code_size, svd_solver="full").fit(sample.images / 255)
    outputs = pca.inverse_transform(pca.transform(sample.test_images / 255))
    logged = re.search(rf"PCA with {code_size} components: (\S+)", log)[1]
    loss = np.mean((outputs - sample.test_images / 255) ** 2)
    assert float(logged) == pytest.approx(loss, abs=2e-6)
    title = titles(module)
    assert f" of {code_size} principal components" in title.latent
    assert f"codes of {code_size} number" in title.reconstructions
    run = module.load_run(tmp_path / "model.npz")
    assert run.losses[-1][0] < run.losses[0][0]  # It learns.
    codes = run.model.encode(sample.test_images)
    assert codes.shape == (1000, code_size)
    assert run.model.decode(codes).shape == (1000, 784)

    # Neither script continues the other's run, and each says why.
    directory = sample_run.directory
    fails(call(*flags, "--epochs", 2, "--resume"), 2, f"{network}, {activations}", ACTIVATIONS)
    flags = (*flags[:3], directory, "--epochs", 5, "--resume")
    fails(call(*flags, main=module.main), 2, f"{network}, {activations}", SIZES)
    with pytest.raises(script.InputError, match=network):
        script.load_run(tmp_path / "model.npz")


CONSTANTS = [("momentum", "0.98", "0.9"), ("max_gradient_norm", "0.0025", "1e9")]
CONSTANTS += [("weight_decay", "0.006", "0.0"), ("decay_start", "0.25", "0.75"), ("seed", "0", "3")]


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize(("name", "old", "new"), CONSTANTS)
def test_changed_constant_is_used_logged_and_not_resumed(small, tmp_path, name, old, new):
    arguments, whole = small
    kind = "int" if name == "seed" else "float"
    module = edited(tmp_path, [(f"{name}: {kind} = {old}", f"{name}: {kind} = {new}")])
    module.draw_plots = lambda *_: None
    value = module.Settings.__dataclass_fields__[name].default
    result = call(*arguments, "--output-dir", tmp_path / "out", main=module.main)
    assert result.status == 0 and f"# {name}: {value}\n" in result.out
    other = script.load_run(whole / "model.npz").model.parameters
    assert (script.load_run(tmp_path / "out" / "model.npz").model.parameters != other).any()
    resumed = call(*arguments, "--output-dir", whole, "--resume", main=module.main)
    fails(resumed, 2, f"{name}: {value}", f"{name}: {old}")


ROWS = [("Layer(256, 128, linear", "Layer(256, 64, linear", "64 outputs", "128 inputs")]
ROWS += [("Layer(512, 784, clip", "Layer(512, 700, clip", "700 outputs", "784 inputs")]


@pytest.mark.parametrize(("old", "new", "outputs", "inputs"), ROWS)
def test_row_that_does_not_fit_is_one_clear_error(small, tmp_path, old, new, outputs, inputs):
    module = edited(tmp_path, [(old, new)])
    result = call(*small[0], "--output-dir", tmp_path / "out", main=module.main)
    fails(result, 2, outputs, inputs, "LAYERS")
    assert not (tmp_path / "out").exists()


def test_images_of_another_size_need_other_layers(tmp_path):
    write_idx(tmp_path / "wide", shape=(20, 30))
    flags = ("--data-dir", tmp_path / "wide", "--epochs", 2, "--output-dir", tmp_path / "out")
    fails(call(*flags), 2, "20, 30", "784")
    module = edited(tmp_path, [("Layer(784,", "Layer(600,"), ("512, 784,", "512, 600,")])
    assert call(*flags, main=module.main).status == 0
    assert "# network: 600-512-256-128-256-512-600," in read_log(tmp_path / "out")
    assert "wide" in titles(module).losses
    cells = module.figures[2].axes
    assert {cell.images[0].get_array().shape for cell in cells} == {(20, 30)}


def test_overfitted_small_data_set_is_not_divergence(tmp_path):
    """Random images, whose test loss ends above that of the mean image."""
    rng = np.random.default_rng(0)
    raw = write_idx(tmp_path, train=60, test=60)
    for part in ("train", "t10k"):
        path = raw / f"{part}-images-idx3-ubyte"
        path.write_bytes(path.read_bytes()[:16] + rng.bytes(60 * 784))
    flags = ("--data-dir", tmp_path, "--epochs", 60, "--output-dir", tmp_path / "out")
    result = call(*flags)
    assert result.status == 0, result.err
    mean_image_loss = float(re.search(r"mean image: (\S+)", result.out)[1])
    assert script.load_run(tmp_path / "out" / "model.npz").losses[-1][1] > mean_image_loss
    assert "more than half" in result.err
