"""What the ingredients of the recipe contribute, and how its numbers were chosen.

    python tests/recipe.py ablation      the recipe without each ingredient in turn (up to hours)
    python tests/recipe.py selection     other settings, measured on held-out images (up to hours)
    python tests/recipe.py exercises     the edits that the README proposes (up to an hour)
    python tests/recipe.py code-sizes    draw plots/code_sizes.png (some minutes)
    python tests/recipe.py code-bytes    the test loss with codes of 8 bits per number (seconds)
    python tests/recipe.py neighbours    digits recognised by the nearest code (a minute)

All of them need MNIST, in `data` or where --data-dir says. The last three take the network of the
default run from model.npz beside the script, or from where --model says.
"""

import argparse
import contextlib
import importlib.util
import inspect
import multiprocessing
import platform
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from unittest import mock

import joblib
import numpy as np
from matplotlib.figure import Figure
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_info, threadpool_limits

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mnist_autoencoder as script  # noqa: E402

MNIST_EPOCHS = 10  # of `ablation` and `exercises`
SAMPLE_EPOCHS = 100


# Shared with benchmark.py. -----------------------------------------------------------------------
@contextlib.contextmanager
def script_conditions():
    """Compute with as many BLAS threads as the script, and without warnings of overflow."""
    threads = min(8, joblib.cpu_count(), *(pool["num_threads"] for pool in threadpool_info()))
    with threadpool_limits(threads, "blas"), np.errstate(all="ignore"):
        yield


def print_row(*cells):
    print(" | ".join(cells).rstrip(), flush=True)


def print_head(*cells):
    print_row(*cells)
    print("|".join(["---"] * len(cells)), flush=True)


def print_machine(*packages):
    """Print the line below a table: the machine, and the versions of these packages."""
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, where platform.processor() is often empty
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    processor = text.partition("model name\t: ")[2].partition("\n")[0] or platform.processor()
    versions = [f"{package} {version(package)}" for package in packages]
    print("\n" + ", ".join([script.describe_libraries(), processor, *versions]), flush=True)


def load_mnist(parser, data_dir):
    """All of MNIST. Without it, the program ends with a message."""
    try:
        return script.load_data("mnist", data_dir)
    except script.InputError as error:  # whose advice, the sample, is no use here
        problem = script.explain(error.__cause__ or error)
        parser.error(f"name MNIST's directory with --data-dir: {problem}")


def final_losses(model, dataset, settings, module=script):
    """Train a new model; return its training loss and test loss after the last epoch."""
    velocity = np.zeros_like(model.parameters)
    with np.errstate(all="ignore"):
        for epoch in range(1, settings.epochs + 1):
            loss = module.train_epoch(model, velocity, dataset.images, epoch, settings)
        return loss, module.reconstruction_loss(model, dataset.test_images)


# Ablation. ---------------------------------------------------------------------------------------
scheduled_learning_rate = script.scheduled_learning_rate  # which some variants replace


def constant_rate(step, total_steps, settings):
    return settings.learning_rate


def warm_up_rate(step, total_steps, settings):
    """The script's, but rising from 0 in the first 1,000 steps or the first fifth of the run."""
    rise = min(1, (step + 1) / min(1000, total_steps / 5))
    return min(settings.learning_rate * rise, scheduled_learning_rate(step, total_steps, settings))


def classical_step(parameters, velocity, gradient, learning_rate, decay, settings):
    """SGD with classical instead of Nesterov momentum."""
    gradient *= min(1, settings.max_gradient_norm / np.linalg.norm(gradient))
    gradient += decay * parameters
    velocity *= settings.momentum
    velocity += gradient
    parameters -= learning_rate * velocity


def relu(z):
    return np.maximum(z, 0), z > 0


def sigmoid(z):
    a = (np.tanh(z / 2) + 1) / 2
    return a, a * (1 - a)


RELU_LAYERS = tuple(
    layer._replace(activation=relu) if layer.activation is script.elu else layer
    for layer in script.LAYERS
)
SIGMOID_LAYERS = (*script.LAYERS[:-1], script.LAYERS[-1]._replace(activation=sigmoid))


def do_not_centre(model):
    model.mean_image = np.zeros_like(model.mean_image)


def random_output_weights(model):
    weights, _ = model.split(model.parameters)
    rng = np.random.default_rng(1)
    weights[-1][:] = rng.normal(0, (2 / model.layers[-1].inputs) ** 0.5, weights[-1].shape)


def zero_output_biases(model):
    _, biases = model.split(model.parameters)
    biases[-1][:] = 0


def logit_output_biases(model):
    """With a sigmoid, the first output is the mean image if the biases are its logit."""
    _, biases = model.split(model.parameters)
    mean = np.clip(model.mean_image, 0.002, 0.998)
    biases[-1][:] = np.log(mean / (1 - mean))


@dataclass
class Variant:
    """What differs from the script's recipe."""

    settings: dict = field(default_factory=dict)
    layers: tuple = script.LAYERS
    change: Callable | None = None  # of the model before training
    sgd_step: Callable = script.sgd_step
    scheduled_learning_rate: Callable = script.scheduled_learning_rate


VARIANTS = {
    "(the whole recipe)": Variant(),
    "clipped output (sigmoid)": Variant(layers=SIGMOID_LAYERS, change=logit_output_biases),
    "ELU (ReLU)": Variant(layers=RELU_LAYERS),
    "centred input": Variant(change=do_not_centre),
    "output weights at 0 (He et al.)": Variant(change=random_output_weights),
    "output biases at the mean image (0)": Variant(change=zero_output_biases),
    "Nesterov momentum (classical)": Variant(sgd_step=classical_step),
    f"momentum {script.Settings.momentum:g} (0.9)": Variant({"momentum": 0.9}),
    "learning-rate decay": Variant(scheduled_learning_rate=constant_rate),
    "gradient clipping": Variant({"max_gradient_norm": np.inf}),
    "weight decay": Variant({"weight_decay": 0.0}),
    "(with a warm-up)": Variant(scheduled_learning_rate=warm_up_rate),
}


def variant_losses(name, dataset, epochs, seed):
    variant = VARIANTS[name]
    settings = script.Settings(epochs=epochs, seed=seed, **variant.settings)
    model = script.Autoencoder(dataset.images.mean(axis=0) / 255, seed, variant.layers)
    if variant.change:
        variant.change(model)
    rate = variant.scheduled_learning_rate
    with mock.patch.multiple(script, sgd_step=variant.sgd_step, scheduled_learning_rate=rate):
        return final_losses(model, dataset, settings)


def in_two_processes(function, *columns):
    """The results of function for the rows of these columns, computed with one thread each."""
    spawn = {"mp_context": multiprocessing.get_context("spawn")}
    one_thread = {"initializer": threadpool_limits, "initargs": (1, "blas")}
    with ProcessPoolExecutor(2, **spawn, **one_thread) as pool:
        yield from pool.map(function, *columns)


def ablation(mnist, arguments):
    sample = script.load_data("sample", None)
    runs = []
    for name in VARIANTS:
        for data, epochs in ((mnist, MNIST_EPOCHS), (sample, SAMPLE_EPOCHS)):
            runs += [(name, data, epochs, seed) for seed in range(arguments.seeds)]
    results = in_two_processes(variant_losses, *zip(*runs, strict=True))
    parts = ("MNIST, training", "MNIST, test", "sample, training", "sample, test")
    print_head("without", *parts)
    for name in VARIANTS:
        cells = []
        for _ in range(2):
            millionths = 1e6 * np.array(list(islice(results, arguments.seeds)))
            means = millionths.mean(axis=0)
            deviations = millionths.std(axis=0, ddof=1)
            cells += [f"{m:,.0f} ± {d:,.0f}" for m, d in zip(means, deviations, strict=True)]
        print_row(name, *cells)
    with threadpool_limits(1, "blas"):
        print_machine()


# Selection. --------------------------------------------------------------------------------------
SELECTION = (  # batch size, learning rate, decay start, momentum, max gradient norm, weight decay
    (256, 44, 0.35, 0.985, 0.0025, 0.006),
    (256, 28, 0.5, 0.985, 0.005, 0.006),
    (256, 48, 0.5, 0.985, 0.0025, 0.006),
    (256, 40, 0.35, 0.985, 0.0025, 0.006),
    (256, 28, 0.25, 0.985, 0.005, 0.006),
    (256, 40, 0.35, 0.985, 0.0025, 0.008),
    (256, 40, 0.5, 0.985, 0.0025, 0.006),
    (384, 36, 0.5, 0.985, 0.0025, 0.006),
    (256, 40, 0.25, 0.985, 0.0025, 0.006),
    (256, 36, 0.5, 0.985, 0.0025, 0.006),
    (256, 40, 0.5, 0.98, 0.0025, 0.006),
    (256, 40, 0.35, 0.9825, 0.0025, 0.006),
    (256, 28, 0.5, 0.985, 0.0025, 0.006),
    (256, 40, 0.35, 0.98, 0.0025, 0.006),
    (256, 48, 0.5, 0.98, 0.0025, 0.006),
    (256, 36, 0.25, 0.985, 0.0025, 0.006),
    (256, 32, 0.35, 0.985, 0.0025, 0.006),
    (256, 40, 0.5, 0.985, 0.0015, 0.006),
    (384, 36, 0.25, 0.985, 0.0025, 0.006),
    (256, 28, 0.25, 0.985, 0.0025, 0.006),
    (384, 48, 0.5, 0.98, 0.0025, 0.006),
    (256, 28, 0.5, 0.98, 0.0025, 0.006),
    (256, 28, 0.25, 0.98, 0.0025, 0.006),
    (256, 40, 0.5, 0.985, 0.005, 0.006),
)


def held_out_losses(settings, dataset):
    model = script.Autoencoder(dataset.images.mean(axis=0) / 255, settings.seed)
    return final_losses(model, dataset, settings)


def selection(mnist, arguments):
    order = np.random.default_rng(0).permutation(len(mnist.images))
    held_out = mnist.images[order[:10_000]]
    dataset = replace(mnist, images=mnist.images[order[10_000:]], test_images=held_out)
    rows = [script.Settings(arguments.epochs, *numbers) for numbers in SELECTION]
    columns = [name for name in asdict(rows[0]) if name not in ("epochs", "seed")]
    titles = [name.replace("_", " ") for name in columns]
    print_head(*titles, "training loss", "held-out loss")
    results = in_two_processes(held_out_losses, rows, [dataset] * len(rows))
    for settings, losses in zip(rows, results, strict=True):
        numbers = [f"{getattr(settings, name):g}" for name in columns]
        print_row(*numbers, *(f"{loss:.6f}" for loss in losses))
    with threadpool_limits(1, "blas"):
        print_machine()


# Exercises. --------------------------------------------------------------------------------------
def define(*functions):
    """The edit that adds these functions to the script."""
    sources = "\n\n".join(inspect.getsource(function) for function in functions)
    return "Layer = namedtuple", f"{sources}\n\nLayer = namedtuple"


def code_of(size):
    return ("Layer(256, 128,", f"Layer(256, {size},"), ("Layer(128,", f"Layer({size},")


NORM = "max_gradient_norm: float = "
MOMENTUM = "momentum: float = "
EXERCISES = {  # name: ((old text, new text), ...)
    "(none)": (),
    "a code of 32 numbers": code_of(32),
    "a code of 2 numbers": code_of(2),
    "ReLU instead of ELU": (
        define(relu),
        (", elu)", ", relu)"),
    ),
    "no gradient clipping": (
        (f"{NORM}{script.Settings.max_gradient_norm}", f'{NORM}float("inf")'),
    ),
    "output biases at 0": (("biases[-1][:] = self.mean_image", ""),),
    "momentum 0.9": ((f"{MOMENTUM}{script.Settings.momentum}", f"{MOMENTUM}0.9"),),
    "a mini-batch of 32 images": (),
}
BATCH_SIZES = {"a mini-batch of 32 images": 32}  # by --batch-size instead of an edit


def edited_script(edits):
    """The script as a module, with each old text replaced by the new text."""
    source = Path(script.__file__).read_text(encoding="utf-8")
    for old, new in edits:
        assert old in source, old
        source = source.replace(old, new)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "edited_script.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("edited_script", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def exercise_losses(name, dataset):
    module = edited_script(EXERCISES[name])
    batch_size = BATCH_SIZES.get(name, module.Settings.batch_size)
    rate = module.default_learning_rate(batch_size)
    settings = module.Settings(MNIST_EPOCHS, batch_size, rate)
    model = module.Autoencoder(dataset.images.mean(axis=0) / 255, settings.seed)
    losses = final_losses(model, dataset, settings, module)
    return (*losses, module.compute_baselines(dataset).pca_loss)


def exercises(mnist, _):
    print_head("edit", "training loss", "test loss", "PCA with a code of this size, test")
    results = in_two_processes(exercise_losses, EXERCISES, [mnist] * len(EXERCISES))
    for name, losses in zip(EXERCISES, results, strict=True):
        cells = [f"{loss:.6f}" for loss in losses]
        if name != "(none)" and "code" not in name:
            cells[2] = ""  # the code has the same size
        print_row(name, *cells)
    with threadpool_limits(1, "blas"):
        print_machine("scikit-learn")


# Code sizes. -------------------------------------------------------------------------------------
def decoded_images(size, dataset, chosen, model_path):
    """The chosen images of the test set, decoded by networks and by PCA from codes of a size."""
    module = edited_script(code_of(size))
    if size == script.CODE_SIZE:
        model = script.load_run(model_path).model
    else:
        settings = module.Settings(epochs=MNIST_EPOCHS)
        model = module.Autoencoder(dataset.images.mean(axis=0) / 255, settings.seed)
        final_losses(model, dataset, settings, module)
    pca = module.compute_baselines(dataset).pca
    pixels = module.to_pixels(dataset.test_images)
    rows = []
    for outputs in (
        model.decode(model.encode(pixels)),
        pca.inverse_transform(pca.transform(pixels)),
    ):
        rows.append((outputs[chosen], np.mean(np.square(outputs - pixels))))
    return rows


def code_sizes(mnist, arguments):
    _, chosen = np.unique(mnist.test_labels, return_index=True)
    rows = {"original": (script.to_pixels(mnist.test_images[chosen]), None)}
    for size in (script.CODE_SIZE, 32, 8, 2):
        network, pca = decoded_images(size, mnist, chosen, arguments.model)
        rows[f"autoencoder, {size} numbers"] = network
        rows[f"PCA, {size} numbers"] = pca
    figure = Figure(figsize=(6, 5.6), dpi=200)
    axes = figure.subplots(len(rows), 1, gridspec_kw={"hspace": 0.08})
    axes[0].set_title("Test digits, restored from codes of 128, 32, 8 and 2 numbers")
    for axis, (name, (images, loss)) in zip(axes, rows.items(), strict=True):
        axis.imshow(np.hstack(images.reshape(-1, *mnist.image_shape)), "gray", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        if loss is not None:
            axis.text(1.01, 0.5, f"MSE {loss:.4f}", transform=axis.transAxes, va="center")
    figure.savefig(ROOT / "plots" / "code_sizes.png", bbox_inches="tight")


# Bytes of a code. --------------------------------------------------------------------------------
def code_bytes(mnist, arguments):
    """Round every number of a code to one of 256 values in its range over the training images."""
    model = script.load_run(arguments.model).model
    codes = model.encode(mnist.images)
    low = codes.min(axis=0)
    step = (codes.max(axis=0) - low) / 255
    codes = model.encode(mnist.test_images)
    rounded = np.clip(np.rint((codes - low) / step), 0, 255).astype(np.uint8)
    pixels = script.to_pixels(mnist.test_images)
    print_head("a code", "bytes", "test loss")
    for name, stored, decoded in (
        ("float32", codes, codes),
        ("rounded to 8 bits per number", rounded, rounded * step + low),
    ):
        loss = np.mean(np.square(model.decode(decoded) - pixels))
        print_row(name, f"{stored[0].nbytes}", f"{loss:.6f}")
    print_machine()


# Neighbours. -------------------------------------------------------------------------------------
def neighbours(mnist, arguments):
    """How many test digits have the label of the nearest training image, in several spaces."""
    model = script.load_run(arguments.model).model
    pca = script.compute_baselines(mnist).pca
    print_head("nearest neighbour by", "correct")
    for name, transform in (
        ("pixels", script.to_pixels),
        (f"PCA with {script.CODE_SIZE} components", lambda x: pca.transform(script.to_pixels(x))),
        (f"codes of {script.CODE_SIZE} numbers", model.encode),
    ):
        classifier = KNeighborsClassifier(1, algorithm="brute")
        classifier.fit(transform(mnist.images), mnist.labels)
        accuracy = classifier.score(transform(mnist.test_images), mnist.test_labels)
        print_row(name, f"{accuracy:.1%}")
    print_machine("scikit-learn")


def main():
    functions = (ablation, selection, exercises, code_sizes, code_bytes, neighbours)
    jobs = {job.__name__.replace("_", "-"): job for job in functions}
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=jobs)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="holds MNIST")
    parser.add_argument("--epochs", type=int, default=100, help="of `selection` (default: 100)")
    parser.add_argument("--seeds", type=int, default=3, help="of `ablation` (default: 3)")
    text = "a finished default run (default: model.npz beside the script)"
    parser.add_argument("--model", type=Path, default=ROOT / "model.npz", help=text)
    arguments = parser.parse_args()
    mnist = load_mnist(parser, arguments.data_dir)
    try:
        with script_conditions():
            jobs[arguments.what](mnist, arguments)
    except script.InputError as error:  # a missing model, for example
        parser.error(str(error))


if __name__ == "__main__":
    main()
