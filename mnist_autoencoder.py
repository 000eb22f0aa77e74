# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "numpy>=1.26", "torchvision>=0.17", "matplotlib>=3.8", "scikit-learn>=1.5", "joblib>=1.3",
#     "threadpoolctl>=3.1", "tqdm>=4.66"]
# ///
"""A deep autoencoder for MNIST, from scratch in NumPy.

`python mnist_autoencoder.py` trains a 784-512-256-128-256-512-784 network to compress each 28x28
image to a latent code of 128 numbers and to reconstruct the image from that code. After 100 epochs,
its mean squared error is 0.00067 on the training images and 0.00081 on the test images. PCA, the
best linear method on the training images, reaches 0.00421 on the test images with codes of the same
size. To experiment, edit Settings and LAYERS, the tables from which everything else follows.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import os
import platform
import socket
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(f"error: Python 3.10 or later is needed; this is {platform.python_version()}")
if __name__ == "__main__":
    # A notebook sets MPLBACKEND; if that backend is missing here, Matplotlib cannot be imported.
    os.environ.pop("MPLBACKEND", None)

try:
    import joblib
    import numpy as np
    from matplotlib import style, ticker
    from matplotlib.figure import Figure
    from sklearn.decomposition import PCA
    from threadpoolctl import threadpool_info, threadpool_limits
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; install the packages with: pip install -r requirements.txt")
except Exception as error:  # for example, if Matplotlib finds no directory for its files
    sys.exit(" ".join(f"error: a package cannot be imported: {error}".split()))  # on one line


@dataclass(frozen=True)
class Settings:
    """The hyperparameters. Two runs with the same data and settings agree, up to rounding."""

    epochs: int = 100  # passes over the training images
    batch_size: int = 256  # images per mini-batch
    # Peak learning rate for 256 images per mini-batch. `main` adapts it to other sizes.
    # It is large because a mean over pixels has small gradients.
    learning_rate: float = 28.0
    decay_start: float = 0.25  # After this fraction of the run, the rate begins to fall to 0.
    momentum: float = 0.98  # sgd_step's velocity is then roughly the sum of the last 50 gradients
    # Gradient clipping: a gradient with a larger norm is scaled down to this norm. Otherwise, a
    # single large step could push every output below 0 or above 1, where the derivative of the
    # output layer's activation is 0. All gradients would then be 0, and learning would stop.
    max_gradient_norm: float = 0.0025
    # Weight decay of weights and biases. train_epoch divides it by the number of images.
    weight_decay: float = 0.006
    seed: int = 0  # for the random initial weights and the shuffling of the images


# ---------------------------------------------------------------------------------------- network
def elu(z):
    """z where z > 0, exp(z) - 1 elsewhere (Clevert et al. 2016, arxiv.org/abs/1511.07289)."""
    # Where z > 0, the second argument is exp(0) - 1 = 0; elsewhere, exp(z) - 1 is never below z.
    # np.where and np.expm1 are much slower. The -80 avoids subnormal numbers, which are slow, too.
    return np.maximum(z, np.exp(np.clip(z, -80, 0)) - 1)


def elu_derivative(a):
    """elu'(z) in terms of a = elu(z), as z is not kept: 1 where a > 0, a + 1 elsewhere."""
    return np.minimum(a, 0) + 1


def linear(z):
    """The identity: z."""
    return z


def linear_derivative(a):
    """linear'(z) = 1."""
    return np.ones_like(a)


def clip(z):
    """0 where z < 0, 1 where z > 1, z in between."""
    return np.clip(z, 0, 1)


def clip_derivative(a):
    """clip'(z) in terms of a = clip(z): 1 where 0 < a < 1, 0 elsewhere."""
    return (a > 0) & (a < 1)


Layer = namedtuple("Layer", ["inputs", "outputs", "activation", "derivative"])
LAYERS = (
    Layer(784, 512, elu, elu_derivative),
    Layer(512, 256, elu, elu_derivative),
    Layer(256, 128, linear, linear_derivative),  # the output is the latent code
    Layer(128, 256, elu, elu_derivative),
    Layer(256, 512, elu, elu_derivative),
    Layer(512, 784, clip, clip_derivative),  # reaches 0 and 1, unlike a sigmoid
)


class Autoencoder:
    """The network: its parameters, forward pass and backward pass.

    A mini-batch of n images is a matrix x of shape (n, 784), one image per row, with pixels in
    [0, 1]. Starting from a_0 = x - mean image, the layers k = 0 ... 5 compute

        z_(k+1) = a_k W_k + b_k
        a_(k+1) = f_k(z_(k+1))

    where f_k is the activation function of layer k. The loss is the mean squared error

        loss = sum((a_6 - x)^2) / (784 n)

    The latent code is the output of the narrowest hidden layer (the first, if several are equal):
    here a_3, of shape (n, 128). The numbers in these docstrings are those of LAYERS as it stands.

    The output layer clips to [0, 1], because four fifths of MNIST's pixels are exactly 0. No
    gradient flows through a clipped output, so an output learns only from images for which it is
    not clipped. A pixel that is 0 in all training images starts at 0 and stays there, as it should.

    Weights are drawn from a normal distribution with variance 2 / inputs (He et al. 2015,
    arxiv.org/abs/1502.01852); biases start at 0. The output layer is different: its weights start
    at 0 and its biases at the mean image, so that the untrained network reconstructs every image as
    the mean image. Random weights would clip many outputs from the start. In the first step, zero
    weights pass no gradient back to the other layers; after it, most of these weights are not 0.

    `mean_image` is the mean of the training images, shape (784,), in [0, 1]. To check gradients,
    `layers` can be smaller and `dtype` float64. The vector `parameters` holds all weights and
    biases, and a_(code_index) is the code. Layers that do not fit together raise ValueError.
    """

    def __init__(self, mean_image, seed=0, layers=LAYERS, dtype=np.float32):
        # Compare each layer with the next, and the last with the first.
        for layer, following in zip(layers, (*layers[1:], layers[0]), strict=True):
            if layer.outputs != following.inputs:
                fault = f"{layer.outputs} outputs meet {following.inputs} inputs"
                raise ValueError(f"the layers do not fit together: {fault}")
        self.mean_image = np.asarray(mean_image, dtype)
        self.layers = layers
        hidden_sizes = [layer.outputs for layer in layers[:-1]]
        self.code_index = hidden_sizes.index(min(hidden_sizes)) + 1  # Layer k computes a_(k+1).
        size = sum((layer.inputs + 1) * layer.outputs for layer in layers)
        self.parameters = np.zeros(size, dtype)
        weights, biases = self.split(self.parameters)
        rng = np.random.default_rng(seed)
        for layer, w in zip(layers[:-1], weights[:-1], strict=True):
            w[:] = rng.normal(0, (2 / layer.inputs) ** 0.5, w.shape)
        biases[-1][:] = self.mean_image

    def split(self, vector: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Views of W_0 ... W_5, shapes (inputs, outputs), and b_0 ... b_5, shapes (outputs,).

        `vector` is `parameters`, or a vector with the same layout such as the gradient.
        """
        weights = []
        biases = []
        start = 0
        for layer in self.layers:
            middle = start + layer.inputs * layer.outputs
            end = middle + layer.outputs
            weights.append(vector[start:middle].reshape(layer.inputs, layer.outputs))
            biases.append(vector[middle:end])
            start = end
        return weights, biases

    def forward(self, images: np.ndarray) -> list[np.ndarray]:
        """The activations a_0 ... a_6 for images (n, 784) with pixels in [0, 1]."""
        return self.apply_layers(images - self.mean_image, range(len(self.layers)))

    def apply_layers(self, a: np.ndarray, chosen: range) -> list[np.ndarray]:
        """The input a of the first chosen layer, then the output of each chosen layer."""
        weights, biases = self.split(self.parameters)
        activations = [a]
        for k in chosen:
            z = activations[-1] @ weights[k] + biases[k]
            activations.append(self.layers[k].activation(z))
        return activations

    def backward(self, activations: list[np.ndarray], images: np.ndarray) -> np.ndarray:
        """The gradient of the loss with respect to `parameters`, as a vector of the same layout.

        `activations` is the result of forward(images), and x is `images`. Write da_k for
        dloss/da_k, dz_k for dloss/dz_k and * for the elementwise product. The chain rule gives
        da_6 and then, for k = 5 ... 0, the other derivatives:

            da_6       = 2 (a_6 - x) / (784 n)
            dz_(k+1)   = da_(k+1) * f_k'(z_(k+1))
            dloss/dW_k = a_k^T dz_(k+1)
            dloss/db_k = sum of the rows of dz_(k+1)
            da_k       = dz_(k+1) W_k^T
        """
        weights, _ = self.split(self.parameters)
        gradient = np.empty_like(self.parameters)
        weight_gradients, bias_gradients = self.split(gradient)  # views, filled below
        da = 2 / images.size * (activations[-1] - images)
        for k in reversed(range(len(self.layers))):
            dz = da * self.layers[k].derivative(activations[k + 1])
            np.matmul(activations[k].T, dz, out=weight_gradients[k])
            np.sum(dz, axis=0, out=bias_gradients[k])
            if k > 0:  # da_0 is not needed.
                da = dz @ weights[k].T
        return gradient

    def encode(self, images: np.ndarray) -> np.ndarray:
        """The latent codes (n, 128) of images (n, 784) or (n, 28, 28), for use after training.

        Pixels are of dtype uint8 or lie in [0, 1]. Raises ValueError for other images.
        """
        size = self.mean_image.size
        x = images / 255 if images.dtype == np.uint8 else images
        if np.prod(x.shape[1:]) != size or not ((x >= 0) & (x <= 1)).all():
            raise ValueError(f"not {size} pixels, uint8 or in [0, 1]: {x.dtype} of shape {x.shape}")
        return self.forward(x.reshape(-1, size).astype(self.mean_image.dtype))[self.code_index]

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The images (n, 784), pixels in [0, 1], decoded from latent codes (n, 128)."""
        return self.apply_layers(codes, range(self.code_index, len(self.layers)))[-1]


# What the rest of the script needs to know about LAYERS.
if len(LAYERS) < 2:
    sys.exit(f"error: LAYERS in {__file__} has no hidden layer, whose output would be the code")
IMAGE_SIZE = LAYERS[0].inputs
CODE_SIZE = min(layer.outputs for layer in LAYERS[:-1])
SIZES = "-".join(str(size) for size in (IMAGE_SIZE, *(layer.outputs for layer in LAYERS)))
ACTIVATIONS = " ".join(layer.activation.__name__ for layer in LAYERS)
NETWORK = f"{SIZES}, {ACTIVATIONS}"


# --------------------------------------------------------------------------------------- training
def to_pixels(images: np.ndarray) -> np.ndarray:
    """Convert uint8 images to float32 pixels in [0, 1]."""
    return np.divide(images, 255, dtype=np.float32)


def mean_squared_error(outputs: np.ndarray, images: np.ndarray) -> float:
    """The mean of (outputs - images)^2 over all images and pixels."""
    return float(np.mean(np.square(outputs - images)))


def default_learning_rate(batch_size: int) -> float:
    """The default peak learning rate for a batch size.

    It is proportional to the batch size (Goyal et al. 2017, arxiv.org/abs/1706.02677), but beyond
    256 only to its square root, because it would otherwise become too large.
    """
    ratio = batch_size / 256  # for which Settings.learning_rate was chosen
    return Settings.learning_rate * min(ratio, ratio**0.5)


def scheduled_learning_rate(step: int, total_steps: int, settings: Settings) -> float:
    """The learning rate of a step. Steps are numbered from 0 to total_steps - 1."""
    # The factor is 1 until the fraction decay_start of the run is over, and then falls linearly
    # to 0. If decay_start is 1, it never falls.
    remaining = (total_steps - step) / total_steps
    return settings.learning_rate * min(1, remaining / max(1 - settings.decay_start, 1e-9))


# An update passes several times over parameters, velocity and gradient, 4.5 MB each. Blocks of
# 256 KB stay in the processor's cache between passes, which makes a training step 10% faster.
BLOCK_SIZE = 65_536  # float32 values


def sgd_step(parameters, velocity, gradient, learning_rate, decay, settings: Settings):
    """Take one step of SGD with Nesterov momentum. All three vectors are overwritten.

        g          <- gradient, scaled down to max_gradient_norm if its norm is larger
        g          <- g + decay * parameters
        v          <- momentum * (v + g)
        parameters <- parameters - learning_rate * (g + v)

    Nesterov momentum moves a point p to p' = p - learning_rate * (v + g), where g is the gradient
    at the look-ahead point q = p - learning_rate * v (Sutskever et al. 2013,
    proceedings.mlr.press/v28/sutskever13.html; -learning_rate * v here is momentum * v there).
    `parameters` stores q, not p. With v' = momentum * (v + g), the next look-ahead point is
    q' = p' - learning_rate * v'. Inserting p' and p = q + learning_rate * v gives
    q' = q - learning_rate * (g + v'), the last line above, where v is already v'. This is exact at
    a constant learning rate. Without gradient clipping, a step equals one of torch.optim.SGD with
    nesterov=True.
    """
    norm = float(np.linalg.norm(gradient))
    if norm > settings.max_gradient_norm:
        gradient *= settings.max_gradient_norm / norm
    for start in range(0, len(parameters), BLOCK_SIZE):
        block = slice(start, start + BLOCK_SIZE)
        g = gradient[block]
        v = velocity[block]
        g += decay * parameters[block]
        v += g
        v *= settings.momentum
        g += v
        g *= learning_rate
        parameters[block] -= g


def train_epoch(model: Autoencoder, velocity, images, epoch: int, settings: Settings) -> float:
    """Train for one epoch, numbered from 1 to settings.epochs, on uint8 images (n, 784).

    model.parameters and velocity, a vector of the same layout, are updated in place. Returns the
    training loss averaged over the epoch, each mini-batch measured before its step.
    """
    batch_starts = range(0, len(images), settings.batch_size)
    total_steps = settings.epochs * len(batch_starts)
    first_step = (epoch - 1) * len(batch_starts)
    # A generator for each epoch, so that a resumed run shuffles like one never interrupted.
    order = np.random.default_rng((settings.seed, epoch)).permutation(len(images))
    decay = settings.weight_decay / len(images)  # More images need less.
    loss_sum = 0.0
    for step, batch_start in enumerate(batch_starts, first_step):
        chosen = order[batch_start : batch_start + settings.batch_size]
        batch = to_pixels(images[chosen])
        activations = model.forward(batch)
        loss_sum += mean_squared_error(activations[-1], batch) * len(batch)
        gradient = model.backward(activations, batch)
        learning_rate = scheduled_learning_rate(step, total_steps, settings)
        sgd_step(model.parameters, velocity, gradient, learning_rate, decay, settings)
    return loss_sum / len(images)


# ------------------------------------------------------------------------------------------- data
class InputError(Exception):
    """Invalid input from the user. The message says what is wrong and what to do."""


@dataclass
class Dataset:
    """Training and test images, as uint8 arrays."""

    name: str
    description: str  # the name, the numbers of images and a checksum
    images: np.ndarray  # the training images, shape (n, 784)
    test_images: np.ndarray  # shape (m, 784)
    test_labels: np.ndarray  # shape (m,)
    image_shape: tuple[int, int]  # height and width


SAMPLE_DIR = Path(__file__).resolve().parent / "data" / "sample"
# The names of data sets by checksum. Any other data set is named after its directory.
NAMES = {"06b0d1f124c4e5fa": "MNIST", "8a7adbe9b5c3bf45": "a sample of MNIST"}
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
FILES += ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SERVER_TIMEOUT = 30  # seconds until a server that does not answer is given up


def explain(error: Exception) -> str:
    """The message of an exception on one line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file, then rename it, so that `path` is never half-written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.mnist_autoencoder")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        # The error may name the temporary file or no file at all; name `path` instead.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def import_mnist() -> type:
    """torchvision's class for MNIST. Raises ImportError if the import fails for any reason."""
    try:
        from torchvision import datasets  # here, because PyTorch takes seconds to import
    except Exception as error:  # RuntimeError, for example, if it was built for another PyTorch
        raise ImportError(f"torchvision cannot be used; reinstall it: {explain(error)}") from error

    class MNIST(datasets.MNIST):  # torchvision names the files' folder after the class.
        def _check_legacy_exist(self):
            return False  # Otherwise, torchvision would read files of its old versions.

    return MNIST


def read_dataset(mnist_class: type, root: Path, download: bool) -> Dataset:
    """Read the files in root/MNIST/raw, or download them first. Raises many types of exception."""
    for archive in (root / "MNIST" / "raw").glob("*.gz"):
        file = archive.with_suffix("")
        if not (download or file.exists()):  # torchvision unpacks only if download is True.
            write_atomically(file, gzip.decompress(archive.read_bytes()))
    parts = [mnist_class(root, train=train, download=download) for train in (True, False)]
    # Tensor.numpy() would fail if PyTorch was built for another version of NumPy.
    images, test_images = [np.from_dlpack(part.data) for part in parts]
    labels, test_labels = [np.from_dlpack(part.targets).astype(np.uint8) for part in parts]
    for x, y in ((images, labels), (test_images, test_labels)):
        if len(x) < 2 or len(x) != len(y) or x[0].size != IMAGE_SIZE:
            needed = f"2 or more images of {IMAGE_SIZE} pixels (see LAYERS) with labels are needed"
            raise ValueError(f"{needed}; found images {x.shape} and labels {y.shape}")
    content = b"".join([images, labels, test_images, test_labels])  # the bytes of these arrays
    checksum = hashlib.sha256(content).hexdigest()[:16]
    name = NAMES.get(checksum, root.resolve().name)
    facts = f"{name}, {len(images)} training and {len(test_images)} test images, sha256 {checksum}"
    rows = images.reshape(-1, IMAGE_SIZE)
    test_rows = test_images.reshape(-1, IMAGE_SIZE)
    return Dataset(name, facts, rows, test_rows, test_labels, images.shape[1:])


def load_data(choice: str, data_dir: Path | None) -> Dataset:
    """The data set for --dataset ("auto", "mnist" or "sample") and --data-dir (None if not given).

    If a download fails, "auto" falls back to the sample, unless --data-dir was given or the default
    directory already held files of a data set. Raises InputError or ImportError.
    """
    mnist_class = import_mnist()
    root = SAMPLE_DIR if choice == "sample" else Path(os.path.expanduser(data_dir or "data"))
    raw = root / "MNIST" / "raw"
    # Files in root/FashionMNIST/raw count, too, and those in root, if root is itself MNIST or raw.
    no_files = not any([*root.glob("*/raw/*"), *root.glob("*/*ubyte*"), *root.glob("*ubyte*")])
    complete = all(any(raw.glob(f"{name}*")) for name in FILES)  # perhaps as .gz
    # A download may complete the default directory; one that the user has named must have none.
    download = choice != "sample" and not complete and (no_files or not data_dir)
    if download:
        print(f"downloading MNIST to {raw}", file=sys.stderr)
        socket.setdefaulttimeout(SERVER_TIMEOUT)
    try:
        return read_dataset(mnist_class, root, download)
    except Exception as error:
        problem = f"no usable data in {raw} ({explain(error)})"
        if no_files and choice == "auto" and not data_dir:
            print(f"warning: {problem}; using a sample of 5,000 images", file=sys.stderr)
            return load_data("sample", None)
        files = ", ".join(FILES)
        advice = "" if choice == "sample" else "; or use an empty --data-dir or --dataset sample"
        raise InputError(f"{problem}: it needs {files}, as they are or as .gz{advice}") from error


# -------------------------------------------------------------------------------------------- run
PLOTS = ("loss_curve.png", "latent_space.png", "reconstructions.png")
# The test loss of the mean training image, that of PCA, and the fitted PCA.
Baselines = namedtuple("Baselines", ["mean_image_loss", "pca_loss", "pca"])


def compute_baselines(dataset: Dataset) -> Baselines:
    """Fit PCA with codes of the network's size, or smaller if there are fewer training images."""
    components = min(CODE_SIZE, IMAGE_SIZE, len(dataset.images))
    pca = PCA(components, svd_solver="covariance_eigh").fit(to_pixels(dataset.images))
    pixels = to_pixels(dataset.test_images)
    pca_loss = mean_squared_error(pca.inverse_transform(pca.transform(pixels)), pixels)
    return Baselines(mean_squared_error(pca.mean_, pixels), pca_loss, pca)


@dataclass
class Run:
    """The state of a run. model.npz stores it after every epoch."""

    model: Autoencoder
    velocity: np.ndarray  # a vector with the layout of model.parameters
    losses: list[list[float]]  # training loss and test loss of every epoch
    log: str  # the whole log; training_log.txt may lag behind it if the run is killed


def log_header(description: str, settings: Settings) -> str:
    """The first lines of a log. To be resumed, a run must have begun with the same header."""
    facts = {"network": NETWORK, "data": description, **asdict(settings)}
    return "".join(f"# {name}: {value}\n" for name, value in facts.items())


def new_run(dataset: Dataset, settings: Settings, baselines: Baselines) -> Run:
    """A run before its first epoch. Raises InputError if the rows of LAYERS do not fit together."""
    try:
        model = Autoencoder(dataset.images.mean(axis=0) / 255, settings.seed)
    except ValueError as error:
        raise InputError(f"{error}: edit LAYERS in {__file__}") from error
    log = log_header(dataset.description, settings)
    log += f"# Test Loss of the mean image: {baselines.mean_image_loss:.6f}\n"
    size = baselines.pca.n_components_
    log += f"# Test Loss of PCA with {size} components: {baselines.pca_loss:.6f}\n"
    return Run(model, velocity=np.zeros_like(model.parameters), losses=[], log=log)


def load_run(path: str | Path, header: str = f"# network: {NETWORK}") -> Run:
    """Read a run of this network, whose log begins with `header`. Raises InputError.

    To use a trained network: load_run("model.npz").model.encode(images).
    """
    advice = "run without --resume to start a new run"
    try:
        with np.load(path) as file:
            log = str(file["log"])
            for found, expected in zip(log.splitlines(), header.splitlines(), strict=False):
                if found != expected:
                    raise ValueError(f"its log says {found!r} instead of {expected!r}")
            model = Autoencoder(file["mean_image"])
            velocity = np.zeros_like(model.parameters)
            model.parameters[:] = file["parameters"]
            velocity[:] = file["velocity"]
            return Run(model, velocity, file["losses"].tolist(), log)
    except Exception as error:  # NumPy and zipfile raise many types of exception.
        raise InputError(f"{path} cannot be used ({explain(error)}): {advice}") from error


def prepare_output(output: Path, log: str) -> None:
    """Write the log so far; remove the plots and temporary files of earlier runs in `output`."""
    plots = output / "plots"
    try:
        plots.mkdir(parents=True, exist_ok=True)
        leftovers = [*output.glob(".*.mnist_autoencoder"), *plots.glob(".*.mnist_autoencoder")]
        for path in (*leftovers, *(plots / name for name in PLOTS)):
            path.unlink(missing_ok=True)
        write_atomically(output / "training_log.txt", log.encode())
    except OSError as error:
        raise InputError(f"{output} is not writable ({error}): use another --output-dir") from error


def describe_libraries() -> str:
    """What affects floating-point rounding: versions, BLAS libraries, their kernels and threads."""
    facts = [f"Python {platform.python_version()}, NumPy {np.__version__}"]
    for pool in threadpool_info():
        if pool["user_api"] == "blas":
            name = f"{pool['internal_api']} {pool['version']} {pool.get('architecture', '')}"
            facts.append(f"{name} x {pool['num_threads']}")
    return ", ".join(facts)


def train(run: Run, dataset: Dataset, settings: Settings, output: Path) -> None:
    """Train for the remaining epochs, and save, log and print each of them.

    Raises FloatingPointError if training diverges, or OSError.
    """
    test_pixels = to_pixels(dataset.test_images)
    some_pixels = to_pixels(dataset.images[:: 1 + len(dataset.images) // 10_000])  # 10,000 or fewer
    # The untrained network outputs the mean image, unless LAYERS end with, say, a sigmoid.
    untrained = Autoencoder(run.model.mean_image, settings.seed)
    untrained_loss = mean_squared_error(untrained.forward(some_pixels)[-1], some_pixels)
    done = len(run.losses)
    remaining = range(done + 1, settings.epochs + 1)
    # disable=None shows the progress bar only in a terminal.
    for epoch in tqdm(remaining, initial=done, total=settings.epochs, unit="epoch", disable=None):
        start = time.perf_counter()
        loss = train_epoch(run.model, run.velocity, dataset.images, epoch, settings)
        test_loss = mean_squared_error(run.model.forward(test_pixels)[-1], test_pixels)
        seconds = time.perf_counter() - start
        # 1% more is allowed, as some_pixels are not all images. Comparisons with NaN are false.
        if not (loss <= 1.01 * untrained_loss and np.isfinite(test_loss)):
            problem = f"training diverged: training loss {loss:.4f} in epoch {epoch}"
            raise FloatingPointError(f"{problem}; try an --lr below {settings.learning_rate:g}")
        line = f"Epoch {epoch}, Loss: {loss:.6f}, Test Loss: {test_loss:.6f}, Time: {seconds:.1f}s"
        losses = [*run.losses, [loss, test_loss]]
        log = f"{run.log}{line}\n"
        arrays = {"mean_image": run.model.mean_image, "parameters": run.model.parameters}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays, velocity=run.velocity, losses=losses, log=log)
        write_atomically(output / "model.npz", buffer.getvalue())
        run.losses = losses  # after saving, so that main never reports an epoch that is not saved
        run.log = log
        with open(output / "training_log.txt", "a") as file:
            file.write(f"{line}\n")
        with tqdm.external_write_mode():  # above the progress bar
            print(line, flush=True)
    if run.losses[-1][1] > mean_squared_error(run.model.mean_image, test_pixels) / 2:
        advice = "try more epochs or images, a larger code or another --lr"
        print(f"warning: the test loss is above half the mean image's; {advice}", file=sys.stderr)


# ------------------------------------------------------------------------------------------ plots
def plot_losses(losses, baselines: Baselines, name: str, settings: Settings) -> Figure:
    """Training and test loss per epoch, with PCA's test loss as a line."""
    training, test = np.transpose(losses)
    epochs = range(1, len(losses) + 1)
    marker = "o" if len(losses) < 20 else ""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs, training, f"C0{marker}-", label=f"training (epoch mean): {training[-1]:.5f}")
    axes.plot(epochs, test, f"C1{marker}--", label=f"test: {test[-1]:.5f}")
    axes.axhline(baselines.pca_loss, c="k", ls=":", label=f"PCA, test: {baselines.pca_loss:.5f}")
    fall_start = settings.decay_start * len(losses)
    if fall_start < len(losses):
        axes.axvline(fall_start, c="gray", lw=0.8, label="the learning rate begins to fall")
    axes.set_title(f"Loss on {name} (mean image: {baselines.mean_image_loss:.4f})")
    axes.set(xlabel="epoch", ylabel="mean squared error", yscale="log")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(10, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.4)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def plot_latent_space(codes: np.ndarray, dataset: Dataset) -> Figure:
    """The first two principal components of the latent codes (m, 128) of the test images."""
    pca = PCA(2, svd_solver="full")
    # A column of zeros is added, so that PCA(2) works for codes of one number, too.
    points = pca.fit_transform(np.pad(codes, [(0, 0), (0, 1)]))
    first, second = pca.explained_variance_ratio_
    figure = Figure(figsize=(8, 7), dpi=150, layout="constrained")
    axes = figure.subplots()
    shown = f"{min(2, CODE_SIZE)} of {CODE_SIZE} principal components"
    axes.set_title(f"Latent codes of the test images of {dataset.name}:\n{shown}")
    axes.set_xlabel(f"first principal component ({first:.1%} of the variance)")
    axes.set_ylabel(f"second principal component ({second:.1%} of the variance)")
    axes.set_aspect("equal", adjustable="datalim")
    order = np.random.default_rng(0).permutation(len(points))  # so that no digit hides another
    colors = [f"C{label}" for label in dataset.test_labels[order]]
    axes.scatter(*points[order].T, s=5, c=colors, alpha=0.6, linewidths=0)
    # Ten colours are hard to tell apart, so each label stands at the median of its points.
    for label in np.unique(dataset.test_labels):
        x, y = np.median(points[dataset.test_labels == label], axis=0)
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": f"C{label}"}
        axes.text(x, y, str(label), ha="center", va="center", bbox=box)
    return figure


def plot_reconstructions(dataset: Dataset, outputs: np.ndarray, pca: PCA) -> Figure:
    """The first image of each label, reconstructed. `outputs` are those of all test images."""
    _, first_places = np.unique(dataset.test_labels, return_index=True)
    chosen = first_places[:10]
    originals = to_pixels(dataset.test_images[chosen])
    rows = {"original": originals, "autoencoder": outputs[chosen]}
    rows["error"] = rows["autoencoder"] - originals
    rows["PCA"] = pca.inverse_transform(pca.transform(originals))
    rows["PCA's error"] = rows["PCA"] - originals
    figure = Figure(figsize=(10, 5.7), dpi=150, layout="constrained")
    figure.suptitle(f"Test images of {dataset.name}, decoded from codes of {CODE_SIZE} numbers")
    figure.supxlabel("first image of each label; errors: -0.5 (blue) to 0.5 (red)", size="medium")
    grid = figure.subplots(len(rows), len(chosen), squeeze=False)
    for cells, (label, images) in zip(grid, rows.items(), strict=True):
        cells[0].set_ylabel(label)
        for cell, image in zip(cells, images, strict=True):
            cell.set(xticks=[], yticks=[])
            pixels = image.reshape(dataset.image_shape)
            if "error" in label:
                cell.imshow(pixels, "RdBu_r", vmin=-0.5, vmax=0.5)
                cell.set_xlabel(f"MSE {np.mean(np.square(image)):.4f}")
            else:
                cell.imshow(pixels, "gray", vmin=0, vmax=1)
    return figure


def draw_plots(run: Run, dataset: Dataset, baselines: Baselines, settings: Settings, output: Path):
    """Draw the three plots and write them to output/plots. Raises OSError."""
    activations = run.model.forward(to_pixels(dataset.test_images))
    # Ignore the user's matplotlibrc, and take a dollar sign in a directory's name as it is.
    with style.context(["default", {"text.parse_math": False}]):
        figures = [plot_losses(run.losses, baselines, dataset.name, settings)]
        figures.append(plot_latent_space(activations[run.model.code_index], dataset))
        figures.append(plot_reconstructions(dataset, activations[-1], baselines.pca))
        for name, figure in zip(PLOTS, figures, strict=True):
            buffer = io.BytesIO()
            figure.savefig(buffer)
            write_atomically(output / "plots" / name, buffer.getvalue())


# ----------------------------------------------------------------------------------- command line
def number(kind: type, low: float, high: float, text: str) -> float:
    """Convert an argument to a number from low to high."""
    with contextlib.suppress(ValueError):
        value = kind(text)
        if low <= value <= high:  # never true for NaN
            return value
    raise argparse.ArgumentTypeError(f"must be {kind.__name__} from {low} to {high}: {text!r}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Exits with status 2 if it is invalid."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", allow_abbrev=False)
    parser.description = "Train an autoencoder; write training_log.txt, plots/ and model.npz."

    def add(flag, convert, default, meaning):
        text = f"{meaning} (default: {default})"
        # argparse converts, and so checks, a default only if it is a string.
        parser.add_argument(flag, type=convert, default=str(default), help=text)

    count = partial(number, int, 1, 100_000)
    add("--epochs", count, Settings.epochs, "number of epochs")
    add("--batch-size", count, Settings.batch_size, "images per mini-batch")
    add("--momentum", partial(number, float, 0, 0.99), Settings.momentum, "momentum coefficient")
    add("--seed", partial(number, int, 0, 2**32 - 1), Settings.seed, "seed of the random numbers")
    add("--output-dir", Path, Path(), "where to write to")
    default = f"{default_learning_rate(Settings.batch_size):g}, scaled with the batch size"
    text = f"peak learning rate (default: {default})"
    parser.add_argument("--lr", type=partial(number, float, 1e-6, 1000), help=text)
    parser.add_argument("--data-dir", type=Path, help="where MNIST is, or goes (default: data)")
    text = "auto (default): MNIST, or a sample of 5,000 images if it cannot be downloaded"
    parser.add_argument("--dataset", choices=("auto", "mnist", "sample"), default="auto", help=text)
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns 0, or 1 after a failure, 2 for invalid input, 130 after Ctrl-C."""
    if sys.stderr is None:  # stderr was closed, but tqdm and torchvision would write to it.
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    args = parse_arguments(argv)
    output = Path(os.path.expanduser(args.output_dir))
    run = None
    try:
        dataset = load_data(args.dataset, args.data_dir)
        batch_size = min(args.batch_size, len(dataset.images))
        rate = args.lr or default_learning_rate(batch_size)
        settings = Settings(args.epochs, batch_size, rate, momentum=args.momentum, seed=args.seed)
        # 8 threads, or fewer if this process may only use fewer. More than 8 do not help.
        threads = min(8, joblib.cpu_count(), *(pool["num_threads"] for pool in threadpool_info()))
        # Overflow needs no warning, because train checks the loss.
        with threadpool_limits(threads, "blas"), np.errstate(all="ignore"):
            baselines = compute_baselines(dataset)
            if args.resume:
                run = load_run(output / "model.npz", log_header(dataset.description, settings))
            else:
                run = new_run(dataset, settings, baselines)
            if len(run.losses) < settings.epochs:
                run.log += f"# From epoch {len(run.losses) + 1} on: {describe_libraries()}\n"
            prepare_output(output, run.log)
            print(run.log, end="", flush=True)
            train(run, dataset, settings, output)
            draw_plots(run, dataset, baselines, settings, output)
        return 0
    except KeyboardInterrupt:
        status = 130
        message = "interrupted"
        if run and run.losses:
            message += f"; --resume continues after epoch {len(run.losses)}"
    except InputError as error:
        status = 2
        message = f"error: {explain(error)}"
    except (OSError, ImportError, MemoryError, FloatingPointError, UnicodeError) as error:
        status = 1
        message = f"error: {explain(error)}"
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
