# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "numpy>=2.2", "torchvision>=0.29", "matplotlib>=3.10", "scikit-learn>=1.7", "tqdm>=4.70",
# ]
# ///
"""A deep autoencoder for MNIST, from scratch in NumPy.

    python mnist_autoencoder.py

trains a 784-512-256-128-256-512-784 network to press each 28x28 digit into a code of 128 numbers
and to draw the digit again from its code: after 100 epochs with a mean squared error of 0.0010 on
the training and 0.0012 on the test images, where PCA, the best linear code of that size, has
0.0042. Forward pass, backpropagation and mini-batch SGD are written out below, the mathematics in
the docstrings of Autoencoder and its method backward; torchvision only reads the images,
scikit-learn computes the PCA, matplotlib draws.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits  # installed by scikit-learn
from tqdm import tqdm

# ---------------------------------------------------------------------------------- configuration

LAYER_SIZES = (784, 512, 256, 128, 256, 512, 784)
WARMUP_STEPS = 1000  # with 200, some seeds end at black images and stay there
SAMPLE_DIR = Path(__file__).resolve().parent / "data" / "sample"
EXTRA_MIRROR = "https://storage.googleapis.com/cvdf-datasets/mnist/"
DOWNLOAD_TIMEOUT = 30  # seconds that a server may stay silent
DISK_NEEDED = 32_000_000  # bytes: an old and a new checkpoint, the model, the plots


class InputError(ValueError):
    """What the user gave can't be used; on the command line one line and exit status 2."""


def setting(default: Any, meaning: str, *allowed: Any) -> Any:
    """A field of Settings; allowed are the bounds of a number or the choices of a text."""
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed})


@dataclass(frozen=True)
class Settings:
    """All that a run depends on; every field is also a flag of the command line."""

    epochs: int = setting(100, "passes over the training set", 1, 100_000)
    batch_size: int = setting(128, "images per mini-batch", 1, 100_000)
    # So large because the loss is a mean over 784 pixels, and its gradients are as small.
    lr: float = setting(20.0, "peak learning rate", 1e-6, 1000)
    momentum: float = setting(0.9, "part of the velocity that lasts; 0 is plain SGD", 0, 0.9999)
    seed: int = setting(0, "of the initial weights and the shuffling", 0, 2**32 - 1)
    # A product with 128 images is too small to gain from being shared among more.
    blas_threads: int = setting(8, "most threads in a matrix product", 1, 1024)
    dataset: str = setting("auto", "auto is mnist if it can be had", "auto", "mnist", "sample")
    data_dir: Path = setting(Path("data"), "holds, or receives, MNIST/raw")
    output_dir: Path = setting(Path("."), "receives the log, the plots and the model")


def parse_setting(option: Field, text: str) -> Any:
    """The value that `text` gives to a field of Settings, or an ArgumentTypeError."""
    kind, allowed = type(option.default), option.metadata["allowed"]
    try:
        value = kind(text)
        if not allowed or (value in allowed if kind is str else allowed[0] <= value <= allowed[1]):
            return value
    except ValueError:
        pass
    number = "a whole number" if kind is int else "a number"
    choices = " or ".join(allowed) if kind is str else f"{number} from {allowed[0]} to {allowed[1]}"
    raise argparse.ArgumentTypeError(f"{text!r} is not {choices}")


# ------------------------------------------------------------------------------------------- data


class Data(NamedTuple):
    """Images (n, 784) and labels (n,), all uint8 as in MNIST's files."""

    name: str  # "mnist" or "sample"
    identity: str  # name, counts and checksum, by which a resumed run knows its data again
    train_images: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def missing_files(raw: Path) -> list[str]:
    """Which of MNIST's four files are not in `raw`; an InputError if one of the others is damaged.

    torchvision is content if a file exists; a part of one, as an interrupted extraction leaves
    it, would end in a traceback there. The format is IDX, see yann.lecun.com/exdb/mnist.
    """
    missing = []
    for part in ("train", "t10k"):
        counts = []
        for kind, shape in (("images-idx3", [28, 28]), ("labels-idx1", [])):
            path = raw / f"{part}-{kind}-ubyte"
            if not path.is_file():
                missing.append(path.name)
                continue
            header = np.fromfile(path, ">i4", count=2 + len(shape)).tolist()
            count, rest = divmod(path.stat().st_size - 8 - 4 * len(shape), math.prod(shape))
            if rest or header != [2049 + len(shape), count, *shape]:
                raise InputError(f"{path} is damaged or not MNIST's: delete it to download it anew")
            counts.append(count)
        if len(set(counts)) > 1 or min(counts, default=2) < 2:
            raise InputError(
                f"{raw} has {' and '.join(map(str, counts))} {part} images and labels, but needs "
                "equal numbers of at least 2: delete the files to download them anew"
            )
    return missing


def download(root: Path, missing: list[str]) -> str:
    """Let torchvision fetch the missing files; returns why that failed, or nothing."""
    from torchvision import datasets

    fault, timeout = "", socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    for mirror in (*datasets.MNIST.mirrors, EXTRA_MIRROR):

        class MNIST(datasets.MNIST):  # the name, too, matters: torchvision's folder has it
            mirrors = [mirror]
            resources = [file for file in datasets.MNIST.resources if file[0][:-3] in missing]

        try:
            MNIST(root, download=True)
            fault = ""
            break
        except Exception as error:  # of half a dozen types, from OSError to zlib.error
            fault = " ".join(str(error).split())
    socket.setdefaulttimeout(timeout)
    return fault


def load_data(dataset: str, data_dir: Path) -> Data:
    """Read MNIST through torchvision, after a download if need be, or the sample.

    Raises an InputError if a file is damaged or, with dataset "mnist", can't be had.
    """
    raw, fault = data_dir / "MNIST" / "raw", ""
    if dataset != "sample" and (missing := missing_files(raw)):
        fault = download(data_dir, missing)
    if fault:
        problem = f"{raw} lacks {' '.join(missing)}, and the download failed: {fault}"
        advice = "put MNIST's files there or give their place with --data-dir"
        if dataset == "mnist":
            raise InputError(f"{problem}; {advice}")
        print(
            f"warning: {problem}; using the sample of 5,000 digits, the losses on which can't be "
            f"compared with those on all of MNIST. To use all of it, {advice}.",
            file=sys.stderr,
        )
    name, root = ("sample", SAMPLE_DIR) if fault or dataset == "sample" else ("mnist", data_dir)
    raw = root / "MNIST" / "raw"
    if missing := missing_files(raw):
        raise InputError(f"{raw} lacks {' '.join(missing)}: put it there")
    from torchvision import datasets

    train, test = (datasets.MNIST(root, train) for train in (True, False))
    # uint8 as in the files, a quarter of float32's memory; a mini-batch is scaled when used.
    images = [part.data.numpy().reshape(-1, LAYER_SIZES[0]) for part in (train, test)]
    labels = test.targets.numpy().astype(np.uint8)
    if labels.max() > 9:
        raise InputError(f"{raw}: the label {labels.max()} is no digit")
    digest = hashlib.sha256(b"".join([*images, labels])).hexdigest()[:16]
    counts = f"{len(train)} training and {len(test)} test images"
    return Data(name, f"{name}, {counts}, sha256 {digest}", *images, labels)


# ------------------------------------------------------------------------------------------ files


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` once it is complete, else never."""
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = path.with_name(f".{path.name}.partial")
    try:
        with incomplete.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or a power cut might keep the new name and lose the data
        os.replace(incomplete, path)
    except BaseException:
        incomplete.unlink(missing_ok=True)
        raise


@contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turn whatever a bad file makes its readers raise (a dozen types) into an InputError."""
    try:
        yield
    except Exception as error:
        fault = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{path} can't be used: {fault}") from error


def fill_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Fill the arrays with those of the same names in an .npz file.

    Raises an InputError unless shapes, dtypes and sizes are the same and all floats are finite.
    """
    with path.open("rb") as file, blaming(path), np.load(file, allow_pickle=False) as archive:
        for name, array in arrays.items():
            # Before reading it, since a small file may declare, and unpack to, gigabytes.
            size = archive.zip.getinfo(f"{name}.npy").file_size
            if size > array.nbytes + 1024:
                raise ValueError(f"{name} has {size} bytes")
            stored = archive[name]
            if (stored.shape, stored.dtype) != (array.shape, array.dtype):
                raise ValueError(f"{name} is {stored.dtype} {stored.shape}, not {array.shape}")
            if stored.dtype.kind == "f" and not np.isfinite(stored).all():
                raise ValueError(f"{name} has values that are not finite")
            array[...] = stored


# ------------------------------------------------------------------------------------------ model


class Autoencoder:
    """The network, its forward and its backward pass.

    The n images of a mini-batch are the columns of a matrix x, shape (784, n). [a; 1] is a with a
    row of ones below it, so that the last column of a weight matrix W_l holds the biases of its
    layer. Forward pass, from a_0 = x, for l = 0 ... 5:

        z_(l+1) = W_l [a_l; 1]
        a_(l+1) = f_(l+1)(z_(l+1))
        loss    = sum of (a_6 - x)^2 / (784 n)

    with f_l = elu(z) = max(z, exp(min(z, 0)) - 1) (Clevert et al. 2016, arxiv.org/abs/1511.07289),
    but f_3(z) = z, the code being linear, and f_6(z) = 1 / (1 + exp(-z)), the sigmoid.

    Args:
        seed: of the initial weights, normal with variance 2 / inputs (He et al. 2015,
            arxiv.org/abs/1502.01852). The biases start at zero.
        layer_sizes: from the pixels by way of the code, in the middle, to the pixels.
        dtype: of everything; float64 serves to check the gradients.

    Attributes:
        parameters: all that is trained, in one vector; weights: its parts, the matrices W_l for
            l = 0 ... 5, shape (outputs, inputs + 1).
        gradient: dloss/dparameters after `backward`; weight_gradients: its parts, dloss/dW_l.
        activations: [a_l; 1] for l = 0 ... 6, shape (size + 1, n), of the last n images. With
            images as columns, the matrix products of BLAS are faster than with rows.
        slopes: f_l'(z_l) for l = 0 ... 6, shape (size, n).
    """

    def __init__(self, seed: int = 0, layer_sizes: tuple = LAYER_SIZES, dtype: Any = np.float32):
        rng = np.random.default_rng(seed)
        self.layer_sizes, self.dtype = layer_sizes, np.dtype(dtype)
        self.code_layer = len(layer_sizes) // 2
        self.parameters, self.weights = self._vector_and_parts()
        self.gradient, self.weight_gradients = self._vector_and_parts()
        for weights, inputs in zip(self.weights, layer_sizes, strict=False):
            weights[:, :-1] = rng.normal(0, math.sqrt(2 / inputs), (len(weights), inputs))
        self._make_room(0)

    def _vector_and_parts(self) -> tuple[np.ndarray, list[np.ndarray]]:
        shapes = [(outputs, inputs + 1) for inputs, outputs in pairwise(self.layer_sizes)]
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        vector = np.zeros(ends[-1], self.dtype)
        parts = np.split(vector, ends[:-1])
        return vector, [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _make_room(self, n: int) -> None:
        self.activations = [np.ones((size + 1, n), self.dtype) for size in self.layer_sizes]
        self.slopes = [np.ones((size, n), self.dtype) for size in self.layer_sizes]

    def _propagate(self, inputs: np.ndarray, first: int, last: int) -> np.ndarray:
        """From the rows of `inputs`, as the columns of a_first, compute a_last.

        uint8 inputs are scaled from 0 ... 255 to 0 ... 1. The result, shape (n, size of a_last),
        is a view of memory that the next call overwrites.
        """
        if self.activations[0].shape[1] != len(inputs):
            self._make_room(len(inputs))
        scale = self.dtype.type(1 / 255 if inputs.dtype == np.uint8 else 1)
        np.multiply(inputs.T, scale, out=self.activations[first][:-1])
        for layer in range(first + 1, last + 1):
            z, slope = self.activations[layer][:-1], self.slopes[layer]  # z becomes a in place
            np.matmul(self.weights[layer - 1], self.activations[layer - 1], out=z)
            if layer == len(self.weights):
                with np.errstate(over="ignore"):  # 1 / (1 + inf) = 0 is right
                    np.divide(1, 1 + np.exp(-z), out=z)
                np.multiply(z, 1 - z, out=slope)
            elif layer != self.code_layer:
                np.exp(np.clip(z, -80, 0), out=slope)  # in less time than with np.minimum(z, 0)
                np.maximum(z, slope - 1, out=z)
        return self.activations[last][:-1].T

    def forward(self, images: np.ndarray) -> float:
        """The loss of a mini-batch (n, 784), uint8 or floats in [0, 1]."""
        self._propagate(images, 0, len(self.weights))
        self._error = self.activations[-1][:-1] - self.activations[0][:-1]
        return float(np.vdot(self._error, self._error)) / self._error.size

    def backward(self, scale: float = 1.0) -> np.ndarray:
        """scale * dloss/dparameters, after `forward`, in memory that the next call overwrites.

        By the chain rule, with d_l for dloss/dz_l, V_l for W_l without its last column, * for the
        elementwise product and elu'(z) = exp(min(z, 0)), f_3'(z) = 1, f_6'(z) = a_6 * (1 - a_6):

            d_6        = 2 (a_6 - x) / (784 n) * f_6'(z_6)
            dloss/dW_l = d_(l+1) [a_l; 1]^T
            d_l        = V_l^T d_(l+1) * f_l'(z_l)

        SGD gives its learning rate as `scale`, since to scale d_6 is to scale all that follows.
        """
        delta = self._error * self.slopes[-1]
        delta *= self.dtype.type(2 * scale / delta.size)
        for layer in reversed(range(len(self.weights))):
            np.matmul(delta, self.activations[layer].T, out=self.weight_gradients[layer])
            if layer > 0:
                delta = self.weights[layer][:, :-1].T @ delta
                delta *= self.slopes[layer]
        return self.gradient

    def _in_batches(self, inputs: np.ndarray, first: int, last: int) -> np.ndarray:
        starts = range(0, max(len(inputs), 1), 500)
        parts = (self._propagate(inputs[start : start + 500], first, last) for start in starts)
        return np.concatenate([part.copy() for part in parts])

    def encode(self, images: np.ndarray) -> np.ndarray:
        """The codes (n, 128) of images (n, 784) or (n, 28, 28).

        Raises:
            ValueError: other shapes, or neither uint8 (0 ... 255) nor floats in [0, 1].
        """
        images = np.asarray(images)
        if images.shape[1:] not in ((784,), (28, 28)):
            raise ValueError(f"images must be (n, 784) or (n, 28, 28), not {images.shape}")
        floating = np.issubdtype(images.dtype, np.floating)
        if images.dtype != np.uint8 and not (floating and ((images >= 0) & (images <= 1)).all()):
            raise ValueError(f"images must be uint8 or floats in [0, 1]; these are {images.dtype}")
        return self._in_batches(images.reshape(-1, 784), 0, self.code_layer)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The images (n, 784), between 0 and 1, of codes (n, 128).

        Raises:
            ValueError: other shapes, or codes that are not finite floats.
        """
        codes, size = np.asarray(codes), self.layer_sizes[self.code_layer]
        if codes.shape[1:] != (size,):
            raise ValueError(f"codes must be (n, {size}), not {codes.shape}")
        if not np.issubdtype(codes.dtype, np.floating) or not np.isfinite(codes).all():
            raise ValueError(f"codes must be finite floats; these are {codes.dtype}")
        return self._in_batches(codes, self.code_layer, len(self.weights))

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """decode(encode(images)): the images (n, 784) that are left after the code."""
        return self.decode(self.encode(images))

    def save(self, path: str | Path) -> None:
        """Write the parameters to an .npz file, whole or not at all."""
        with whole_file(Path(path)) as file:
            np.savez(file, parameters=self.parameters)

    @classmethod
    def load(cls, path: str | Path) -> "Autoencoder":
        """The network that `save` wrote; a ValueError if the file is anything else."""
        model = cls()
        fill_arrays(Path(path), {"parameters": model.parameters})
        return model


# --------------------------------------------------------------------------------------- training


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Half a cosine from `peak` down to 0 after all `steps`, times a linear warm-up.

    The cosine is that of Loshchilov and Hutter 2017, arxiv.org/abs/1608.03983.
    """
    warmup = min(1, (step + 1) / WARMUP_STEPS)
    return warmup * peak * (1 + math.cos(math.pi * step / steps)) / 2


def sgd_step(
    model: Autoencoder, velocity: np.ndarray, images: np.ndarray, lr: float, momentum: float
) -> float:
    """One step of SGD with momentum on a mini-batch; returns its loss before the step.

    v <- momentum v - lr dloss/dparameters, parameters <- parameters + v, v being zero at first
    (Sutskever et al. 2013, proceedings.mlr.press/v28/sutskever13.html).
    """
    loss = model.forward(images)
    velocity *= momentum
    velocity -= model.backward(scale=lr)
    model.parameters += velocity
    return loss


def mean_loss(model: Autoencoder, images: np.ndarray) -> float:
    """The loss over all images, computed 500 at a time."""
    batches = (images[start : start + 500] for start in range(0, len(images), 500))
    return sum(model.forward(batch) * len(batch) for batch in batches) / len(images)


class Run:
    """A run after len(history) epochs: what a checkpoint keeps.

    It keeps no state of a random generator: each epoch shuffles with a generator of its own, made
    from the seed and the epoch's number.

    Attributes:
        history: of every epoch the training loss, the test loss and the seconds.
    """

    def __init__(self, settings: Settings, data_identity: str):
        self.settings, self.data_identity = settings, data_identity
        self.model = Autoencoder(settings.seed)
        self.velocity = np.zeros_like(self.model.parameters)
        self.history: list[list[float]] = []

    def _arrays(self, history: np.ndarray) -> dict[str, np.ndarray]:
        parameters = self.model.parameters
        return {"history": history, "parameters": parameters, "velocity": self.velocity}

    def save(self, path: Path) -> None:
        """Replace the checkpoint by one of now."""
        texts = {name: str(value) for name, value in vars(self.settings).items()}
        about = json.dumps([texts, self.data_identity, len(self.history)]).encode()
        history = np.array(self.history, float).reshape(-1, 3)
        with whole_file(path) as file:
            np.savez(file, about=np.array(about, "S32768"), **self._arrays(history))

    @classmethod
    def load(cls, path: Path) -> "Run":
        """The run that `save` wrote; an InputError if the file is anything else."""
        about = np.zeros((), "S32768")
        fill_arrays(path, {"about": about})
        with blaming(path):
            texts, data_identity, epochs_done = json.loads(about.item())
            settings = Settings(*(parse_setting(o, texts[o.name]) for o in fields(Settings)))
            if epochs_done not in range(settings.epochs + 1):
                raise ValueError(f"{epochs_done} epochs done of {settings.epochs}")
            history = np.zeros((int(epochs_done), 3))
            run = cls(settings, str(data_identity))
        fill_arrays(path, run._arrays(history))
        run.history = history.tolist()
        return run


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """The numbers of the SIGINT (Ctrl-C) and SIGTERM that arrive; the second leaves at once."""
    noted = []

    def note(number: int, frame: Any) -> None:
        noted.append(number)
        if len(noted) > 1:
            raise SystemExit(128 + number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def epoch_line(epoch: int, loss: float, test_loss: float, seconds: float) -> str:
    """What the log says of an epoch."""
    return f"Epoch {epoch}, Loss: {loss:.6f}, Test Loss: {test_loss:.6f}, Time: {seconds:.1f}s"


def append_line(log: Path, line: str) -> None:
    """Add a line to the log and print it, above the progress bar if there is one."""
    size = log.stat().st_size
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError:
        os.truncate(log, size)  # rather no line than half of one
        raise
    tqdm.write(line)


def train(run: Run, data: Data, log: Path, checkpoint: Path) -> int:
    """Train to the last epoch, with a log line and a checkpoint after each.

    Returns 0, or the number of the signal that ended the training after its mini-batch.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    settings, n = run.settings, len(data.train_images)
    starts = range(0, n, settings.batch_size)  # the last mini-batch may be smaller
    steps = settings.epochs * len(starts)
    epochs = range(len(run.history) + 1, settings.epochs + 1)
    done = {"initial": len(run.history), "total": settings.epochs}
    bar = tqdm(epochs, **done, unit="epoch", file=sys.stdout, disable=None)  # None: not in a pipe
    with noted_signals() as signals:
        for epoch in bar:
            begin, total = time.perf_counter(), 0.0
            order = np.random.default_rng((settings.seed, epoch)).permutation(n)
            for step, start in enumerate(starts):
                batch = data.train_images[order[start : start + settings.batch_size]]
                lr = learning_rate((epoch - 1) * len(starts) + step, steps, settings.lr)
                loss = sgd_step(run.model, run.velocity, batch, lr, settings.momentum)
                total += loss * len(batch)
                if signals:
                    return signals[0]
                if not math.isfinite(loss):
                    break
            test_loss = mean_loss(run.model, data.test_images)
            if not math.isfinite(total + test_loss):
                raise FloatingPointError(
                    f"the loss is no longer finite in epoch {epoch}, step {step + 1}: start over "
                    f"with --overwrite and an --lr below {settings.lr} or a --momentum below "
                    f"{settings.momentum}"
                )
            run.history.append([total / n, test_loss, time.perf_counter() - begin])
            run.save(checkpoint)
            append_line(log, epoch_line(epoch, *run.history[-1]))
            bar.set_postfix_str(f"loss {total / n:.6f}, test loss {test_loss:.6f}")
    return 0


# ------------------------------------------------------------------------------------------ plots


def scaled(images: np.ndarray) -> np.ndarray:
    """uint8 images as float32 in [0, 1]."""
    return np.multiply(images, 1 / 255, dtype=np.float32)


def pca_baseline(data: Data) -> tuple[int, float]:
    """Size and test loss of the best linear code: scikit-learn's PCA of the training images."""
    from sklearn.decomposition import PCA

    size = min(LAYER_SIZES[3], len(data.train_images))
    pca = PCA(size, svd_solver="covariance_eigh").fit(scaled(data.train_images))
    test_images = scaled(data.test_images)
    error = pca.inverse_transform(pca.transform(test_images)) - test_images
    return size, float(np.mean(np.square(error)))


@contextmanager
def drawing(path: Path, width: float, height: float, title: str) -> Iterator[Any]:
    """A figure, sizes in inches, that is written to a PNG file at the end; needs no display."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=150, layout="constrained")
    figure.suptitle(title)
    yield figure
    with whole_file(path) as file:
        figure.savefig(file)


def plot_losses(path: Path, history: list, pca_size: int, pca_loss: float, data: str) -> None:
    """Training and test loss by epoch, with the loss of PCA as a reference."""
    from matplotlib.ticker import LogLocator

    train_losses, test_losses, _ = zip(*history, strict=True)
    epochs, style = range(1, len(history) + 1), {"marker": "o" if len(history) < 20 else ""}
    with drawing(path, 8, 4.5, f"Reconstruction loss by epoch ({data})") as figure:
        axes = figure.subplots()
        axes.semilogy(epochs, train_losses, color="#0072b2", label="training", **style)
        axes.semilogy(epochs, test_losses, "--", color="#d55e00", label="test", **style)
        reference = f"PCA with {pca_size} components, test"
        axes.axhline(pca_loss, color="black", linestyle=":", label=reference)
        axes.set(xlabel="epoch", ylabel="mean squared error per pixel")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
        axes.legend()


def plot_latent_space(path: Path, codes: np.ndarray, labels: np.ndarray, data: str) -> None:
    """The codes (n, 128) of the test images in the plane of their first two components."""
    from sklearn.decomposition import PCA

    pca = PCA(2, svd_solver="full")
    points = pca.fit_transform(codes)
    title = f"Codes of the test images, PCA from 128 to 2 dimensions ({data})"
    with drawing(path, 8, 7, title) as figure:
        axes = figure.subplots()
        first, second = pca.explained_variance_ratio_
        axes.set_xlabel(f"component 1 ({first:.1%} of variance)")
        axes.set_ylabel(f"component 2 ({second:.1%} of variance)")
        for digit in np.unique(labels):
            cluster = points[labels == digit]
            axes.scatter(*cluster.T, s=4, alpha=0.4, color=f"C{digit}", label=str(digit))
            # Ten colours are too many for a colour-blind reader: the digits stand there, too.
            box = {"boxstyle": "circle,pad=0.1", "facecolor": "white", "edgecolor": f"C{digit}"}
            axes.text(*np.median(cluster, axis=0), digit, ha="center", va="center", bbox=box)
        for handle in axes.legend(title="digit", markerscale=4).legend_handles:
            handle.set_alpha(1)


def plot_reconstructions(path: Path, model: Autoencoder, data: Data, name: str) -> None:
    """For every digit a test image, its reconstruction and the error of each pixel."""
    digits, chosen = np.unique(data.test_labels, return_index=True)
    originals = scaled(data.test_images[chosen])
    outputs = model.reconstruct(data.test_images[chosen])
    errors = np.abs(outputs - originals)
    title = f"Test images and what is left of them after the code ({name})"
    with drawing(path, 10, 4, title) as figure:
        axes = figure.subplots(3, len(digits), squeeze=False)
        for row, label, images, colours, top in (
            (0, "original", originals, "gray", 1),
            (1, "reconstruction", outputs, "gray", 1),
            (2, "absolute error", errors, "magma", errors.max()),
        ):
            axes[row, 0].set_ylabel(label)
            for cell, image in zip(axes[row], images, strict=True):
                cell.set(xticks=[], yticks=[])
                shown = cell.imshow(image.reshape(28, 28), cmap=colours, vmin=0, vmax=top)
        figure.colorbar(shown, ax=axes[2], aspect=8)
        for column, digit in enumerate(digits):
            axes[0, column].set_title(str(digit))
            axes[2, column].set_xlabel(f"{np.mean(np.square(errors[column])):.5f}")
        figure.supxlabel("mean squared error per pixel")


# ------------------------------------------------------------------------------------------- main


def parse_arguments(argv: list[str] | None) -> tuple[dict[str, Any], bool, bool]:
    """The settings that are given, and whether to resume or to overwrite an earlier run."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    for option in fields(Settings):
        parser.add_argument(
            "--" + option.name.replace("_", "-"),
            type=partial(parse_setting, option),
            metavar={int: "N", float: "X", str: "NAME"}.get(type(option.default), "DIR"),
            help=f"{option.metadata['meaning']} (default: {option.default})",
        )
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", action="store_true", help="continue an interrupted run")
    earlier.add_argument("--overwrite", action="store_true", help="give an unfinished run up")
    given = vars(parser.parse_args(argv))
    return given, given.pop("resume", False), given.pop("overwrite", False)


def open_run(given: dict[str, Any], resume: bool, overwrite: bool) -> tuple[Run, Data]:
    """A new run or that of the checkpoint, with its data; an InputError if that can't be."""
    settings, earlier = Settings(**given), None
    checkpoint = settings.output_dir / "checkpoint.npz"
    if checkpoint.exists() and not overwrite:
        try:
            earlier = Run.load(checkpoint)
        except InputError as error:
            raise InputError(f"{error} (--overwrite starts a new run)") from error
    if resume:
        if not earlier:
            raise InputError(f"there is no {checkpoint} to resume: leave --resume out")
        for name, value in given.items():
            stored = getattr(earlier.settings, name)
            if name not in ("data_dir", "output_dir") and value not in (stored, "auto"):
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {value} contradicts the {stored} of {checkpoint}")
        data_dir = given.get("data_dir", earlier.settings.data_dir)
        settings = replace(earlier.settings, data_dir=data_dir, output_dir=settings.output_dir)
    elif earlier and len(earlier.history) < earlier.settings.epochs:
        raise InputError(
            f"{checkpoint} holds an unfinished run ({len(earlier.history)} of "
            f"{earlier.settings.epochs} epochs): --resume continues it, --overwrite starts over"
        )
    data = load_data(settings.dataset, settings.data_dir)
    settings = replace(settings, dataset=data.name, data_dir=settings.data_dir.resolve())
    run = earlier if resume else Run(settings, data.identity)
    if run.data_identity != data.identity:
        raise InputError(
            f"the data are {data.identity}, but those of {checkpoint} {run.data_identity}"
        )
    run.settings = settings
    return run, data


def log_header(run: Run, threads: int) -> list[str]:
    """The comment lines above the epochs: what the figures depend on."""
    values = {k: v for k, v in vars(run.settings).items() if k not in ("data_dir", "output_dir")}
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return [
        f"# {'-'.join(map(str, LAYER_SIZES))} autoencoder, mini-batch SGD with momentum in NumPy",
        f"# settings: {', '.join(f'{k} {v}' for k, v in values.items())}",
        f"# data: {run.data_identity}",
        f"# Python {platform.python_version()}, NumPy {np.__version__}, {blas['name']} "
        f"{blas['version']} with {threads} threads",
    ]


def finish(run: Run, data: Data, log: Path) -> None:
    """Compare with PCA, draw the plots, save the model and say where all of it is."""
    pca_size, pca_loss = pca_baseline(data)
    ratio = run.history[-1][1] / pca_loss
    if len(run.history) == run.settings.epochs:
        verdict = f"{1 / ratio:.2f} times lower" if ratio < 1 else f"{ratio:.2f} times higher"
        found = f"PCA with {pca_size} components: Test Loss {pca_loss:.6f}"
        append_line(log, f"# {found}; the autoencoder's is {verdict}")
    title = {"mnist": "MNIST", "sample": "a sample of 5,000 MNIST digits"}[data.name]
    plots, model = log.with_name("plots"), log.with_name("model.npz")
    plot_losses(plots / "loss_curve.png", run.history, pca_size, pca_loss, title)
    codes = run.model.encode(data.test_images)
    plot_latent_space(plots / "latent_space.png", codes, data.test_labels, title)
    plot_reconstructions(plots / "reconstructions.png", run.model, data, title)
    run.model.save(model)
    print(f"log: {log}\nplots: {plots}\nmodel: {model}")


def execute(run: Run, data: Data) -> int:
    """Train, or go on training, and finish; returns the exit status."""
    output = run.settings.output_dir
    log, checkpoint = output / "training_log.txt", output / "checkpoint.npz"
    output.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(output).free < DISK_NEEDED:
        raise OSError(f"{output} has less than {DISK_NEEDED // 10**6} MB of free space")
    threads = min([run.settings.blas_threads, *(pool["num_threads"] for pool in threadpool_info())])
    lines = log_header(run, threads)
    lines += [epoch_line(epoch, *row) for epoch, row in enumerate(run.history, 1)]
    with whole_file(log) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
    print(*lines, sep="\n", flush=True)
    if len(run.history) == run.settings.epochs:
        print("this run is finished already; drawing its plots again")
    run.save(checkpoint)
    with threadpool_limits(threads, "blas"), np.errstate(all="ignore"):  # the loss will tell
        stopped = train(run, data, log, checkpoint)
    if run.history:
        finish(run, data, log)
    if stopped:
        print(
            f"stopped after {len(run.history)} of {run.settings.epochs} epochs; to go on, repeat "
            "the command with --resume",
            file=sys.stderr,
        )
    return 128 + stopped if stopped else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 (disk, divergence), 2 (bad input) or 128 + signal."""
    arguments = parse_arguments(argv)
    try:
        return execute(*open_run(*arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}; check --output-dir, files so far are whole", file=sys.stderr)
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 1


if __name__ == "__main__":
    sys.exit(main())
