# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "numpy>=1.26", "torchvision>=0.17", "matplotlib>=3.8", "scikit-learn>=1.5", "tqdm>=4.66"]
# ///
"""A deep autoencoder for MNIST, from scratch in NumPy.

`python mnist_autoencoder.py` trains a 784-512-256-128-256-512-784 network to press each 28x28
digit into a code of 128 numbers and to draw the digit again from its code. After 100 epochs its
mean squared error is 0.0008 on the training and 0.0010 on the test images; PCA, the best linear
code of that size, has 0.0042.
"""

import argparse
import hashlib
import io
import json
import math
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from threadpoolctl import threadpool_info, threadpool_limits  # installed by scikit-learn
from tqdm import tqdm

# ---------------------------------------------------------------------------------------- network

LAYER_SIZES = (784, 512, 256, 128, 256, 512, 784)
CODE = 3  # the code's place among them

# Each activation function, a = f(z), and its slope, f'(z), in terms of a: a is all that is kept.
# elu(z) = max(z, exp(min(z, 0)) - 1), Clevert et al. 2016, arxiv.org/abs/1511.07289, where NumPy's
# clip takes less time than its minimum.
ELU = (lambda z: np.maximum(z, np.exp(z.clip(-80, 0)) - 1), lambda a: a.clip(-1, 0) + 1)
LINEAR = (lambda z: z, np.ones_like)
# sigmoid(z) = 1 / (1 + exp(-z)), in a form that can't overflow.
SIGMOID = (lambda z: (np.tanh(z / 2) + 1) / 2, lambda a: a * (1 - a))
FUNCTIONS, SLOPES = zip(ELU, ELU, LINEAR, ELU, ELU, SIGMOID, strict=True)


def scaled(images: np.ndarray) -> np.ndarray:
    """uint8 images as float32 pixels in [0, 1]."""
    return np.multiply(images, 1 / 255, dtype=np.float32)


class Autoencoder:
    """The network, its forward and its backward pass.

    The n images of a mini-batch are the rows of a matrix x, shape (n, 784), pixels in [0, 1]. From
    a_0 = x - mean image, layer l = 0 ... 5 computes

        z_(l+1) = a_l W_l + b_l
        a_(l+1) = f_l(z_(l+1))
        loss    = sum of (a_6 - x)^2 / (784 n)

    with f_l = elu, except that the code is linear, f_2(z) = z, and the output f_5 = sigmoid.

    Weights start normal with variance 2 / inputs (He et al. 2015, arxiv.org/abs/1502.01852), biases
    at zero; but W_5 starts at zero and b_5 at the logit of the mean image, so that the untrained
    network draws the mean image, whatever it sees.

    Args:
        mean_image: of the training images, shape (784,), pixels in [0, 1].
        seed: of the initial weights.
        layer_sizes: of a_0 ... a_6.
        dtype: float32, or float64 to check the gradients.

    Attributes:
        parameters: all that is trained, in one vector; weights, biases: its parts, the W_l, shape
            (inputs, outputs), and the b_l, shape (outputs,).
        gradient: what `backward` has found; weight_gradients, bias_gradients: its parts.
    """

    def __init__(self, mean_image, seed=0, layer_sizes=LAYER_SIZES, dtype=np.float32):
        self.mean_image = np.asarray(mean_image, dtype)
        count = sum((inputs + 1) * outputs for inputs, outputs in pairwise(layer_sizes))
        self.parameters, self.gradient = np.zeros((2, count), dtype)
        self.weights, self.biases = self._by_layer(self.parameters, layer_sizes)
        self.weight_gradients, self.bias_gradients = self._by_layer(self.gradient, layer_sizes)
        rng = np.random.default_rng(seed)
        for weights in self.weights[:-1]:
            weights[:] = rng.normal(0, math.sqrt(2 / len(weights)), weights.shape)
        mean = self.mean_image.clip(0.002, 0.998)
        self.biases[-1][:] = np.log(mean / (1 - mean))

    def _by_layer(self, vector: np.ndarray, layer_sizes: tuple) -> tuple[tuple, tuple]:
        """The parts of `vector` that are each layer's weights and biases, as views of it."""
        layers = []
        for inputs, outputs in pairwise(layer_sizes):
            weights, biases, vector = np.split(vector, [inputs * outputs, (inputs + 1) * outputs])
            layers.append((weights.reshape(inputs, outputs), biases))
        return tuple(zip(*layers, strict=True))

    def forward(self, images: np.ndarray) -> list[np.ndarray]:
        """The activations a_0 ... a_6, shapes (n, size), of images (n, 784) in [0, 1]."""
        activations = [images - self.mean_image]
        for f, weights, biases in zip(FUNCTIONS, self.weights, self.biases, strict=True):
            activations.append(f(activations[-1] @ weights + biases))
        return activations

    def backward(self, activations: list[np.ndarray], images: np.ndarray) -> np.ndarray:
        """dloss/dparameters, in self.gradient, from what `forward` returned for the same images.

        By the chain rule, for l = 5 ... 0, with d_l for dloss/dz_l and * the elementwise product:

            d_6        = 2 (a_6 - x) / (784 n) * f_5'(z_6)
            dloss/dW_l = a_l^T d_(l+1)
            dloss/db_l = sum of the rows of d_(l+1)
            d_l        = d_(l+1) W_l^T * f_(l-1)'(z_l)
        """
        d = 2 / images.size * (activations[-1] - images) * SLOPES[-1](activations[-1])
        for layer in reversed(range(len(self.weights))):
            np.matmul(activations[layer].T, d, out=self.weight_gradients[layer])
            np.sum(d, axis=0, out=self.bias_gradients[layer])
            if layer > 0:
                d = d @ self.weights[layer].T * SLOPES[layer - 1](activations[layer])
        return self.gradient

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Codes (n, 128) of images (n, 784) or (n, 28, 28), uint8 or in [0, 1], or a ValueError."""
        x = scaled(images) if images.dtype == np.uint8 else images
        if x.shape[1:] not in ((784,), (28, 28)) or not ((x >= 0) & (x <= 1)).all():
            raise ValueError(f"no images of 784 pixels in [0, 1]: {images.dtype} {images.shape}")
        return self.forward(x.reshape(-1, 784))[CODE]

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The images (n, 784), pixels in [0, 1], of codes (n, 128)."""
        a = codes
        for layer in range(CODE, len(self.weights)):
            a = FUNCTIONS[layer](a @ self.weights[layer] + self.biases[layer])
        return a

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """The images (n, 784) that are left after the code; see `encode`."""
        return self.decode(self.encode(images))

    @classmethod
    def load(cls, path: str | Path) -> "Autoencoder":
        """The network in a run's model.npz; a bad file raises what NumPy makes of it."""
        with np.load(path, allow_pickle=False) as file:
            model = cls(file["mean_image"])
            model.parameters[:] = file["parameters"]
        return model


# --------------------------------------------------------------------------------------- training

CLIP_NORM = 0.005  # longest gradient; few are as long, but they could kill the network
WEIGHT_DECAY = 0.006  # divided by the number of images: the more, the less a prior counts
DEAD = 1.2  # times the loss of the mean image, with which training began


class Run(NamedTuple):
    """A run after len(history) epochs: all that its model.npz holds."""

    settings: dict  # flags and data, on which the result depends
    model: Autoencoder
    velocity: np.ndarray  # shape of model.parameters
    history: list[list[float]]  # training loss, test loss and seconds of each epoch


def peak_learning_rate(batch_size: int) -> float:
    """15 at 128 images; below in proportion (Goyal et al. 2017, arxiv.org/abs/1706.02677), above by
    the square root. So large because the mean over 784 pixels makes small gradients.
    """
    return 15 * min(batch_size / 128, math.sqrt(batch_size / 128))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Up to the peak in 1000 steps, or a fifth of all, then straight down to 0 at the end."""
    warmup = min(1000, steps / 5)
    return peak * min(1, (step + 1) / warmup, (steps - step) / (steps - warmup))


def mean_square(errors: np.ndarray) -> float:
    """The loss, from the difference of outputs and images."""
    return float(np.mean(np.square(errors)))


def sgd_step(run: Run, images: np.ndarray, lr: float, decay: float) -> float:
    """One step of SGD on a mini-batch (n, 784) in [0, 1]; returns its loss before the step.

        g          <- dloss/dparameters, if longer shortened to CLIP_NORM, + decay * parameters
        v          <- momentum * (v + g)
        parameters <- parameters - lr * (g + v)

    This is Nesterov's momentum (Sutskever et al. 2013, proceedings.mlr.press/v28/sutskever13.html)
    with weight decay, as in torch.optim.SGD, whose momentum_buffer times momentum is v.
    """
    activations = run.model.forward(images)
    gradient = run.model.backward(activations, images)
    factor = CLIP_NORM / max(float(np.linalg.norm(gradient)), CLIP_NORM)
    vectors = (run.model.parameters, run.velocity, gradient)
    # In 12 pieces, which stay in the processor's cache from one line to the next.
    for parameters, v, g in zip(*(np.array_split(vector, 12) for vector in vectors), strict=True):
        g *= factor
        g += decay * parameters
        v += g
        v *= run.settings["momentum"]
        parameters -= lr * (g + v)
    return mean_square(activations[-1] - images)


def train(run: Run, images: np.ndarray, test_images: np.ndarray, start_loss: float) -> Iterator:
    """Train to the last epoch on images (n, 784), uint8; yields after each, with `run` up to date.

    Raises a FloatingPointError if an epoch ends with a test loss above DEAD times `start_loss`.
    """
    settings, n, done, x_test = run.settings, len(images), len(run.history), scaled(test_images)
    starts = range(0, n, settings["batch_size"])  # the last mini-batch may be smaller
    epochs, steps = settings["epochs"], settings["epochs"] * len(starts)
    for epoch in tqdm(range(done, epochs), initial=done, total=epochs, unit="epoch", disable=None):
        begin, total = time.perf_counter(), 0.0
        # A generator of its own for each epoch: no generator's state has to be kept to resume.
        order = np.random.default_rng((settings["seed"], epoch + 1)).permutation(n)
        for step, start in enumerate(starts, epoch * len(starts)):
            batch = scaled(images[order[start : start + settings["batch_size"]]])
            lr = learning_rate(step, steps, settings["lr"])
            total += len(batch) * sgd_step(run, batch, lr, WEIGHT_DECAY / n)
        test_loss = mean_square(run.model.forward(x_test)[-1] - x_test)
        if not test_loss <= DEAD * start_loss:  # also true of NaN
            fault = f"the network died in epoch {epoch + 1}, with a test loss of {test_loss:.4f}"
            raise FloatingPointError(f"{fault}: choose an --lr below {settings['lr']:g}")
        run.history.append([total / n, test_loss, time.perf_counter() - begin])
        yield


# ---------------------------------------------------------------------------------- state and log
class InputError(ValueError):
    """What the user gave can't be used; on the command line one line and exit status 2."""


def write_whole(path: Path, write: Callable) -> None:
    """Let write(file) write beside `path`, then move it there: `path` is old or new, but whole."""
    content, partial = io.BytesIO(), path.with_name(f".{path.name}.partial")
    write(content)
    partial.write_bytes(content.getvalue())
    os.replace(partial, path)


def save_run(run: Run, output: Path, log: str) -> None:
    """Replace model.npz and training_log.txt in `output` by those of the run as it is now."""
    arrays = {"settings": json.dumps(run.settings), "mean_image": run.model.mean_image}
    arrays |= {"parameters": run.model.parameters, "velocity": run.velocity, "history": run.history}
    write_whole(output / "model.npz", lambda file: np.savez(file, **arrays))
    write_whole(output / "training_log.txt", lambda file: file.write(log.encode()))


def load_run(path: Path, settings: dict) -> Run:
    """The run that `save_run` wrote; an InputError unless it is whole and has these settings."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if damaged := file.zip.testzip():
                raise ValueError(f"{damaged} is damaged")
            stored, history = json.loads(str(file["settings"])), file["history"].tolist()
            run = Run(stored, Autoencoder.load(path), file["velocity"], history)
    except Exception as error:  # of a dozen types
        raise InputError(f"{path} can't be resumed ({error}): leave --resume out") from error
    if run.settings != settings:
        raise InputError(f"{path} is of another run: {run.settings}, this command's has {settings}")
    return run


def log_text(run: Run, baselines: dict[str, float], threads: int) -> str:
    """The log: what its figures depend on, losses to compare them with, and a line per epoch."""
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, where platform.processor() is empty
    _, _, rest = (cpuinfo.read_text() if cpuinfo.exists() else "").partition("model name\t: ")
    processor = rest.partition("\n")[0] or platform.processor()
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    lines = [
        f"# {'-'.join(map(str, LAYER_SIZES))} autoencoder, mini-batch SGD in NumPy",
        f"# {', '.join(f'{name} {value}' for name, value in run.settings.items())}",
        f"# Python {platform.python_version()}, NumPy {np.__version__}, {blas['name']} "
        f"{blas['version']}, {threads} threads, {processor}",
        f"# Test Loss of {', of '.join(f'{name}: {loss:.6f}' for name, loss in baselines.items())}",
    ]
    for epoch, (loss, test, time_) in enumerate(run.history, 1):
        lines.append(f"Epoch {epoch}, Loss: {loss:.6f}, Test Loss: {test:.6f}, Time: {time_:.1f}s")
    return "".join(f"{line}\n" for line in lines)


# ------------------------------------------------------------------------------------------- data
def load_data(dataset: str, data_dir: Path) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """MNIST in data_dir/MNIST/raw, of which torchvision downloads what is missing, or the sample.

    `dataset` is "mnist", "sample" or "auto": the sample if no file is there and the download fails.
    Returns what the data are, with a checksum; training and test images (n, 784) and the labels
    (n,) of the latter, all uint8. Raises an InputError if a file is damaged or can't be had.
    """
    from torchvision import datasets  # here, since PyTorch takes seconds to import

    name, root = "MNIST", data_dir
    if dataset == "sample":
        name, root = "sample of MNIST", Path(__file__).resolve().parent / "data" / "sample"
    raw, files = root / "MNIST" / "raw", datasets.MNIST.resources
    missing = [file for file in files if not (raw / file[0].removesuffix(".gz")).is_file()]
    loader = type("MNIST", (datasets.MNIST,), {"resources": missing})  # what is there stays so
    try:
        parts = [loader(str(root), train, download=dataset != "sample") for train in (True, False)]
        images = [part.data.numpy().reshape(len(part.data), -1) for part in parts]
        labels = [part.targets.numpy().astype(np.uint8) for part in parts]
        for x, y in zip(images, labels, strict=True):
            if x.shape != (len(y), 784) or len(y) < 2 or y.max() > 9:
                raise ValueError(f"images {x.shape} with {len(y)} labels up to {y.max(initial=0)}")
    except Exception as error:  # of a dozen types
        problem = " ".join(f"{raw} can't be used: {type(error).__name__}: {error}".split())
        if dataset != "auto" or len(missing) < len(files):
            raise InputError(f"{problem}; delete it, or choose another --data-dir") from error
        print(f"warning: {problem}; training on a sample of 5,000 digits instead", file=sys.stderr)
        return load_data("sample", data_dir)
    checksum = hashlib.sha256(b"".join(images + labels)).hexdigest()[:16]
    counts = f"{len(images[0])} training and {len(images[1])} test images"
    return f"{name}, {counts}, sha256 {checksum}", *images, labels[1]


# ------------------------------------------------------------------------------------------ plots
def baseline_losses(images: np.ndarray, test_images: np.ndarray) -> dict[str, float]:
    """Test losses of the mean image and of the best linear code of the same size, PCA's."""
    from sklearn.decomposition import PCA

    x, size = scaled(test_images), min(LAYER_SIZES[CODE], len(images))
    pca = PCA(size, svd_solver="covariance_eigh").fit(scaled(images))
    pca_loss = mean_square(pca.inverse_transform(pca.transform(x)) - x)
    return {"the mean image": mean_square(pca.mean_ - x), f"PCA with {size} components": pca_loss}


def plot_losses(path: Path, data: str, history: list, baselines: dict[str, float]) -> None:
    """Training and test loss by epoch, beside the losses to compare them with."""
    figure = Figure((8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    train_losses, test_losses, _ = zip(*history, strict=True)
    epochs, marker = range(1, len(history) + 1), "o" if len(history) < 20 else ""
    axes.semilogy(epochs, train_losses, color="#0072b2", marker=marker, label="training")
    axes.semilogy(epochs, test_losses, "--", color="#d55e00", marker=marker, label="test")
    lines = [(f"{name}, test", loss, "bottom") for name, loss in baselines.items()]
    # What the project from which this one descends reports.
    lines.append(("the original project on MNIST, training, epoch 100", 0.0040, "top"))
    for name, loss, side in lines:
        axes.axhline(loss, color="black", linestyle=":", linewidth=1)
        place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": side}
        axes.text(0.99, loss, f"{name}: {loss:.4f}", fontsize="small", **place)
    axes.set(title=f"Loss by epoch, {data}", xlabel="epoch", xlim=(0, len(history) + 1))
    axes.set_ylabel("mean squared error per pixel")
    axes.set_yticks([0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    write_whole(path, figure.savefig)


def plot_latent_space(path: Path, data: str, codes: np.ndarray, labels: np.ndarray) -> None:
    """The codes (n, 128) of the test images in the plane of their first two components."""
    from sklearn.decomposition import PCA

    pca = PCA(2, svd_solver="full")
    points = pca.fit_transform(codes)
    figure = Figure((8, 7), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"Codes of the test images, {data}")
    for axis, share in zip((axes.xaxis, axes.yaxis), pca.explained_variance_ratio_, strict=True):
        axis.set_label_text(f"principal component with {share:.1%} of the variance")
    for digit in np.unique(labels):
        cluster, colour = points[labels == digit], f"C{digit}"
        axes.scatter(*cluster.T, s=4, alpha=0.4, color=colour)
        # Ten colours are too many for a colour-blind reader: the digits stand there, too.
        axes.text(*np.median(cluster, axis=0), digit, bbox={"facecolor": "w", "edgecolor": colour})
    write_whole(path, figure.savefig)


def plot_reconstructions(path: Path, data: str, images, outputs, labels: np.ndarray) -> None:
    """A test image (of n, 784) of every digit, its reconstruction and the error of each pixel."""
    digits, chosen = np.unique(labels, return_index=True)
    figure = Figure((10, 4), dpi=150, layout="constrained")
    figure.suptitle(f"Test images before and after the code, {data}")
    axes = figure.subplots(3, len(digits), squeeze=False)
    for column, original, output in zip(axes.T, images[chosen], outputs[chosen], strict=True):
        error = np.abs(output - original)
        for cell, pixels in zip(column, (original, output, 3 * error), strict=True):
            cell.imshow(pixels.reshape(28, 28), cmap="gray", vmin=0, vmax=1)
            cell.set(xticks=[], yticks=[])
        cell.set_xlabel(f"MSE {mean_square(error):.4f}")
    for cell, label in zip(axes[:, 0], ("original", "reconstruction", "error x 3"), strict=True):
        cell.set_ylabel(label)
    write_whole(path, figure.savefig)


# ----------------------------------------------------------------------------------- command line
def number(kind: type, low: float, high: float) -> Callable:
    """A reader of numbers from low to high for argparse."""

    def read(text: str) -> float:
        if not low <= (value := kind(text)) <= high:
            raise ValueError
        return value

    read.__name__ = f"{kind.__name__} ({low} to {high})"  # as argparse's message names it
    return read


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags; a wrong one ends the program with one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    for flag, kind, default, meaning in (
        ("--epochs", number(int, 1, 100_000), 100, "passes over the training set"),
        ("--batch-size", number(int, 1, 100_000), 128, "images per mini-batch"),
        ("--lr", number(float, 1e-6, 1000), None, "peak learning rate, 15 at 128 images"),
        ("--momentum", number(float, 0, 0.99), 0.98, "part of the velocity that lasts"),
        ("--seed", number(int, 0, 2**32 - 1), 0, "of the initial weights and the shuffling"),
        ("--dataset", str, "auto", "auto: mnist if it can be had, else the sample"),
        ("--data-dir", Path, Path("data"), "holds, or receives, MNIST/raw"),
        ("--output-dir", Path, Path("."), "receives the log, the plots and the model"),
    ):
        choices = ("auto", "mnist", "sample") if kind is str else None
        text = f"{meaning} (default: {'by batch size' if default is None else default})"
        parser.add_argument(flag, type=kind, default=default, choices=choices, help=text)
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    return parser.parse_args(argv)


def execute(arguments: argparse.Namespace) -> None:
    """Train, or go on training, with a whole model.npz and log after each epoch; then draw."""
    output = arguments.output_dir
    socket.setdefaulttimeout(30)  # seconds that a server of MNIST may stay silent
    identity, images, test_images, labels = load_data(arguments.dataset, arguments.data_dir)
    arguments.batch_size = min(arguments.batch_size, len(images))
    arguments.lr = arguments.lr or peak_learning_rate(arguments.batch_size)
    names = ("epochs", "batch_size", "lr", "momentum", "seed")
    settings = {name: getattr(arguments, name) for name in names} | {"data": identity}
    model = Autoencoder(images.mean(axis=0) / 255, arguments.seed)
    run = Run(settings, model, np.zeros_like(model.parameters), [])
    if arguments.resume:
        run = load_run(output / "model.npz", settings)
    (output / "plots").mkdir(parents=True, exist_ok=True)
    # A product with 128 images is too small to gain from more than 8 threads.
    threads = min([8, *(pool["num_threads"] for pool in threadpool_info())])
    with threadpool_limits(threads, "blas"), np.errstate(all="ignore"):  # train looks at the loss
        baselines = baseline_losses(images, test_images)
        log = log_text(run, baselines, threads)
        print(log, end="", flush=True)
        for _ in train(run, images, test_images, baselines["the mean image"]):
            log = log_text(run, baselines, threads)
            save_run(run, output, log)
            with tqdm.external_write_mode():
                print(log.splitlines()[-1], flush=True)
        save_run(run, output, log)  # for a finished run that is resumed without its log
    plots, data = output / "plots", identity.partition(",")[0]
    outputs, codes = run.model.reconstruct(test_images), run.model.encode(test_images)
    plot_losses(plots / "loss_curve.png", data, run.history, baselines)
    plot_latent_space(plots / "latent_space.png", data, codes, labels)
    plot_reconstructions(plots / "reconstructions.png", data, scaled(test_images), outputs, labels)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 (disk, divergence), 2 (bad input) or 130 (Ctrl-C)."""
    arguments = parse_arguments(argv)
    try:
        execute(arguments)
        return 0
    except KeyboardInterrupt:
        status, message = 130, "stopped; to go on from the last whole epoch, add --resume"
    except InputError as error:
        status, message = 2, f"error: {error}"
    except (OSError, FloatingPointError) as error:
        status, message = 1, f"error: {error}; any files in {arguments.output_dir} are whole"
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
