"""What changes to the script do to its losses, and the pictures of other code sizes.

    python tests/recipe.py variants      train with one change at a time (half an hour)
    python tests/recipe.py code-sizes    draw code_sizes.png and code_of_2.png (half an hour)

Both need MNIST in `data`, or where --data-dir says. Their two processes have one thread each.
"""

import argparse
import importlib.util
import inspect
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mnist_autoencoder as script  # noqa: E402

SOURCE = Path(script.__file__).read_text(encoding="utf-8")


# Edits of the script. ----------------------------------------------------------------------------
def edited_script(edits):
    """The script as a module, with each old text replaced by the new text."""
    source = SOURCE
    for old, new in edits:
        assert old in source, old
        source = source.replace(old, new)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "edited_script.py")
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("edited_script", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    module.SAMPLE_DIR = script.SAMPLE_DIR
    return module


def relu(z):
    return np.maximum(z, 0), z > 0


def sigmoid(z):
    a = 0.5 + 0.5 * np.tanh(z / 2)
    return a, a * (1 - a)


def absolute_error(outputs, images):
    error = outputs - images
    return np.abs(error), np.sign(error)


def define(function):
    """The edit that adds a function to the script."""
    return "Layer = namedtuple", f"{inspect.getsource(function)}\n\nLayer = namedtuple"


def setting(name, value):
    """The edit of one of the Settings."""
    (line,) = [line for line in SOURCE.splitlines() if line.startswith(f"    {name}: ")]
    return line, f"{line.partition('=')[0]}= {value}"


def code_of(size):
    """The edits that change the size of the latent code."""
    return [("Layer(256, 128,", f"Layer(256, {size},"), ("Layer(128,", f"Layer({size},")]


BIASES = "biases[-1][:] = self.mean_image"
LOGITS = "p = np.clip(self.mean_image, 0.002, 0.998)\n        biases[-1][:] = np.log(p / (1 - p))"
VARIANTS = {  # name: [(old text, new text), ...]
    "(none)": [],
    "a code of 32 numbers": code_of(32),
    "a code of 2 numbers": code_of(2),
    "ReLU instead of ELU": [define(relu), (", elu)", ", relu)")],
    "sigmoid instead of clamp": [define(sigmoid), (", clamp)", ", sigmoid)"), (BIASES, LOGITS)],
    "input not centred": [("(x - model.mean_image)", "(x)"), ("(x - self.mean_image,", "(x,")],
    "output weights as in other layers": [("for w in weights[:-1]", "for w in weights")],
    "output biases at 0": [(BIASES, "")],
    "batches of 32 images": [setting("batch_size", 32)],
    "constant learning rate": [(" * min(1, remaining / settings.decay_fraction)", "")],
    "momentum 0.9": [setting("momentum", 0.9)],
    "classical instead of Nesterov momentum": [
        ("velocity[part] += g", "velocity[part] += g / settings.momentum"),  # v = momentum v + g
        ("(g + velocity[part])", "velocity[part]"),
    ],
    "no gradient clipping": [setting("max_gradient_norm", 'float("inf")')],
    "no weight decay": [setting("weight_decay", 0.0)],
}


# Training. ---------------------------------------------------------------------------------------
def train(module, dataset, epochs, seed=0):
    """Train a network by an edited script; return it, its training loss and its test loss."""
    settings = module.Settings(epochs=epochs, seed=seed)
    model = module.Autoencoder(dataset.images.mean(axis=0) / 255, seed)
    velocity = np.zeros_like(model.parameters)
    with np.errstate(all="ignore"):
        for epoch in range(1, epochs + 1):
            loss = module.train_epoch(model, velocity, dataset.images, epoch, settings)
        test_loss = module.mean_loss(lambda x: model.decode(model.encode(x)), dataset.test_images)
    return model, loss, test_loss


def in_two_processes(function, *columns):
    """The results of function for the rows of these columns, with one BLAS thread each."""
    options = {"mp_context": get_context("spawn"), "initializer": threadpool_limits}
    with ProcessPoolExecutor(2, **options, initargs=(1, "blas")) as pool:
        yield from pool.map(function, *columns)


def mean_and_deviation(losses):
    """The text for the losses of several seeds."""
    if len(losses) == 1:
        return f"{losses[0]:.6f}"
    return f"{np.mean(losses):.6f} ± {np.std(losses, ddof=1):.6f}"


# Variants. ---------------------------------------------------------------------------------------
def variant_losses(name, seeds, dataset, epochs):
    """The training losses and test losses of a variant, and PCA's test loss."""
    module = edited_script(VARIANTS[name])
    losses = [train(module, dataset, epochs, seed)[1:] for seed in range(seeds)]
    _, pca_loss = module.fit_pca(dataset)
    training, test = np.transpose(losses)
    return training, test, pca_loss


def variants(dataset, arguments):
    print("change | training loss | test loss | PCA with a code of this size, test")
    print("---|---|---|---", flush=True)
    options = (repeat(arguments.seeds), repeat(dataset), repeat(arguments.epochs))
    results = in_two_processes(variant_losses, VARIANTS, *options)
    for name, (training, test, pca_loss) in zip(VARIANTS, results, strict=True):
        cells = [name, mean_and_deviation(training), mean_and_deviation(test), f"{pca_loss:.6f}"]
        print(" | ".join(cells), flush=True)


# Code sizes. -------------------------------------------------------------------------------------
def network_of(size, dataset, epochs):
    """The parameters of a network with codes of this size, trained as by default."""
    return train(edited_script(code_of(size)), dataset, epochs)[0].parameters


def code_sizes(dataset, arguments):
    sizes = [2, 8, 32, 128]
    networks = in_two_processes(network_of, sizes, repeat(dataset), repeat(arguments.epochs))
    x = script.to_pixels(dataset.test_images)
    rows = [("original", x, "")]
    for size, parameters in zip(sizes, networks, strict=True):
        # With only two numbers, most codes lie in the middle of a star: show that.
        module = edited_script([*code_of(size), ("[1, 99]", "[10, 90]")])
        model = module.Autoencoder(dataset.images.mean(axis=0) / 255)
        model.parameters = parameters
        if size == 2:
            module.plot_latent_space(model, dataset).savefig(ROOT / "plots" / "code_of_2.png")
        pca, _ = module.fit_pca(dataset)
        for name, outputs in (
            (f"autoencoder, {size} numbers", model.decode(model.encode(x))),
            (f"PCA, {size} numbers", pca.inverse_transform(pca.transform(x))),
        ):
            rows.append((name, outputs, f"MSE {np.mean(np.square(outputs - x)):.4f}"))
    _, chosen = np.unique(dataset.test_labels, return_index=True)
    draw(rows, chosen, dataset.image_shape)


def draw(rows, chosen, image_shape):
    """Save code_sizes.png: the chosen images of every row, with a gap above each pair."""
    heights = [1] + 4 * [0.25, 1, 1]
    figure = Figure(figsize=(6, 6.2), dpi=200)
    cells = figure.subplots(len(heights), gridspec_kw={"height_ratios": heights, "hspace": 0.04})
    cells[0].set_title("Ten test digits, restored from codes of 2 to 128 numbers")
    for gap in cells[1::3]:
        gap.set_axis_off()
    for axes, (name, images, text) in zip(np.delete(cells, range(1, 13, 3)), rows, strict=True):
        axes.imshow(np.hstack(images[chosen].reshape(-1, *image_shape)), "gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.text(1.01, 0.5, text, transform=axes.transAxes, va="center")
    cells[-1].set_xlabel("MSE: mean squared error of all 10,000 test images")
    figure.savefig(ROOT / "plots" / "code_sizes.png", bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    jobs = {"variants": variants, "code-sizes": code_sizes}
    parser.add_argument("what", choices=jobs)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="holds MNIST")
    parser.add_argument("--epochs", type=int, help="default: 10 for variants, 100 for code-sizes")
    parser.add_argument("--seeds", type=int, default=2, help="of variants (default: 2)")
    arguments = parser.parse_args()
    arguments.epochs = arguments.epochs or (10 if arguments.what == "variants" else 100)
    jobs[arguments.what](script.load_data("MNIST", arguments.data_dir), arguments)


if __name__ == "__main__":
    main()
