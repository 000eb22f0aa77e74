"""What the parts of the recipe contribute, and how its numbers were chosen.

    python tests/recipe.py ablation DATA_DIR     without each ingredient in turn (an hour)
    python tests/recipe.py selection DATA_DIR    other numbers, on held-out images (ten minutes)

DATA_DIR holds all of MNIST. `ablation` prints training and test losses after 10 epochs of MNIST and
100 of the sample, as means and standard deviations over three seeds. `selection` trains for 10
epochs on 50,000 of the training images and measures the loss on the other 10,000.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mnist_autoencoder as script  # noqa: E402

SEEDS = (0, 1, 2)
scheduled_learning_rate = script.scheduled_learning_rate  # which some variants replace


def constant_rate(step, total_steps, peak):
    return peak


def warm_up_rate(step, total_steps, peak):
    """The script's, except that it rises from 0 in 1,000 steps or a fifth of a shorter run."""
    rise = min(1, (step + 1) / min(1000, total_steps / 5))
    return min(peak * rise, scheduled_learning_rate(step, total_steps, peak))


def heavy_ball_step(p, v, g, learning_rate, momentum, max_norm, weight_decay):
    """SGD with classical instead of Nesterov momentum."""
    g *= min(1, max_norm / np.linalg.norm(g))
    g += weight_decay * p
    v *= momentum
    v += g
    p -= learning_rate * v


def relu(z):
    return np.maximum(z, 0)


def relu_derivative(a):
    return (a > 0).astype(a.dtype)


def sigmoid(z):
    return (np.tanh(z / 2) + 1) / 2


def sigmoid_derivative(a):
    return a * (1 - a)


def with_relu(layer):
    if layer.activation is script.elu:
        return layer._replace(activation=relu, derivative=relu_derivative)
    return layer


RELU_LAYERS = tuple(with_relu(layer) for layer in script.LAYERS)
SIGMOID = {"activation": sigmoid, "derivative": sigmoid_derivative}
SIGMOID_LAYERS = (*script.LAYERS[:-1], script.LAYERS[-1]._replace(**SIGMOID))


def do_not_centre(model):
    model.mean_image = np.zeros_like(model.mean_image)


def random_output_weights(model):
    weights, _ = model.split(model.parameters)
    rng = np.random.default_rng(1)
    weights[-1][:] = rng.normal(0, (2 / 512) ** 0.5, weights[-1].shape)


def zero_output_biases(model):
    _, biases = model.split(model.parameters)
    biases[-1][:] = 0


def logit_output_biases(model):
    """With a sigmoid, the mean image is the first output if the biases are its logit."""
    _, biases = model.split(model.parameters)
    mean = np.clip(model.mean_image, 0.002, 0.998)
    biases[-1][:] = np.log(mean / (1 - mean))


def nothing(model):
    pass


@dataclass
class Variant:
    """What differs from the script's recipe."""

    settings: dict = field(default_factory=dict)
    layers: tuple = script.LAYERS
    change: Callable = nothing  # of the model at the start
    functions: dict = field(default_factory=lambda: {"sgd_step": script.sgd_step})  # of the script


VARIANTS = {
    "nothing": Variant(),
    "clipped output (sigmoid)": Variant(layers=SIGMOID_LAYERS, change=logit_output_biases),
    "ELU (ReLU)": Variant(layers=RELU_LAYERS),
    "centred input": Variant(change=do_not_centre),
    "output weights at 0 (He's)": Variant(change=random_output_weights),
    "output biases at the mean image (0)": Variant(change=zero_output_biases),
    "Nesterov momentum (classical)": Variant(functions={"sgd_step": heavy_ball_step}),
    "momentum 0.98 (0.9)": Variant({"momentum": 0.9}),
    "decline of the rate": Variant(functions={"scheduled_learning_rate": constant_rate}),
    "gradient clipping": Variant({"max_gradient_norm": np.inf}),
    "weight decay": Variant({"weight_decay": 0.0}),
    "nothing, but with a warm-up": Variant(functions={"scheduled_learning_rate": warm_up_rate}),
}
SELECTION = (
    {},
    *({"learning_rate": rate} for rate in (4.0, 6.0, 10.0, 12.0)),
    *({"momentum": 0.97, "learning_rate": rate} for rate in (8.0, 12.0)),
    *({"momentum": 0.99, "learning_rate": rate} for rate in (4.0, 8.0)),
    *({"max_gradient_norm": norm} for norm in (0.0025, 0.01)),
    *({"weight_decay": decay} for decay in (0.003, 0.012)),
)


def final_losses(variant, dataset, epochs, seed=0):
    """The training and test loss after the last epoch."""
    settings = replace(script.Settings(epochs=epochs, seed=seed), **variant.settings)
    model = script.Autoencoder(dataset.images.mean(axis=0) / 255, seed, variant.layers)
    variant.change(model)
    velocity = np.zeros_like(model.parameters)
    with mock.patch.multiple(script, **variant.functions):
        for epoch in range(1, epochs + 1):
            loss = script.train_epoch(model, velocity, dataset.images, epoch, settings)
    pixels = script.to_pixels(dataset.test_images)
    return loss, script.mean_squared_error(model.forward(pixels)[-1], pixels)


def ablation(mnist):
    sample = script.load_data("sample", ROOT)
    print("| without | MNIST, training | test | sample, training | test |\n|---|---|---|---|---|")
    for name, variant in VARIANTS.items():
        cells = []
        for dataset, epochs in ((mnist, 10), (sample, 100)):
            losses = [final_losses(variant, dataset, epochs, seed) for seed in SEEDS]
            means = np.mean(losses, axis=0)
            deviations = np.std(losses, axis=0, ddof=1)
            for mean, deviation in zip(means, deviations, strict=True):
                cells.append(f"{mean:.6f} ± {deviation:.6f}")
        print("|", name, "|", " | ".join(cells), "|", flush=True)


def selection(mnist):
    order = np.random.default_rng(0).permutation(len(mnist.images))
    held_out = mnist.images[order[:10_000]]
    dataset = replace(mnist, images=mnist.images[order[10_000:]], test_images=held_out)
    print("| changed | training loss | loss on held-out images |\n|---|---|---|")
    for settings in SELECTION:
        loss, held_out_loss = final_losses(Variant(settings), dataset, 10)
        print(f"| {settings or 'nothing'} | {loss:.6f} | {held_out_loss:.6f} |", flush=True)


if __name__ == "__main__":
    _, what, data_dir = sys.argv
    job = {"ablation": ablation, "selection": selection}[what]
    with np.errstate(all="ignore"):
        job(script.load_data("mnist", Path(data_dir)))
    print(script.describe_machine(script.number_of_threads()))
