# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "torchvision>=0.17", "matplotlib>=3.8", "scikit-learn>=1.5",
#     "joblib>=1.3", "threadpoolctl>=3.5", "tqdm>=4.66"]
# ///
"""A deep autoencoder for MNIST, from scratch in NumPy.

`python mnist_autoencoder.py` trains a 784-512-256-128-256-512-784 network to compress each 28x28
image to a latent code of 128 numbers and to reconstruct the image from that code. After 100 epochs,
its mean squared error is 0.00066 on the training images and 0.00079 on the test images, where PCA
reaches 0.00421 with codes of the same size. To experiment, edit the tables Settings and LAYERS.
"""

import argparse
import contextlib
import gzip
import hashlib
import os
import platform
import socket
import sys
import tempfile
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
    from threadpoolctl import ThreadpoolController, threadpool_info, threadpool_limits
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
    # The peak, for 256 images (`main` adapts it). Large, as a mean over pixels has small gradients.
    learning_rate: float = 44.0
    decay_start: float = 0.35  # After this fraction of the run, the rate begins to fall to 0.
    momentum: float = 0.985  # sgd_step's velocity is then roughly the sum of 67 gradients
    # Gradient clipping: a larger gradient is scaled to this norm. Otherwise, one large step could
    # push all outputs below 0 or above 1, where all gradients are 0, and learning would stop.
    max_gradient_norm: float = 0.0025
    weight_decay: float = 0.006  # of weights and biases; divided by the number of training images
    seed: int = 0  # for the random initial weights and the shuffling of the images


# ---------------------------------------------------------------------------------------- network
# An activation function returns its value at z and its derivative there.
def elu(z):
    """z where z > 0, exp(z) - 1 elsewhere (Clevert et al. 2016, arxiv.org/abs/1511.07289)."""
    # The derivative is exp(0) = 1 where z > 0. Elsewhere, exp(z) - 1 is never below z.
    # np.where and np.expm1 are much slower. The -80 avoids subnormal numbers, which are slow, too.
    derivative = np.exp(np.clip(z, -80, 0))
    return np.maximum(z, derivative - 1), derivative


def linear(z):
    """The identity: z, with the derivative 1."""
    return z, 1


def clip(z):
    """0 where z < 0, 1 where z > 1, z in between; the derivative is 1 in between, 0 elsewhere."""
    return np.clip(z, 0, 1), (z > 0) & (z < 1)


Layer = namedtuple("Layer", ["inputs", "outputs", "activation"])
LAYERS = (
    Layer(784, 512, elu),
    Layer(512, 256, elu),
    Layer(256, 128, linear),  # the output is the latent code
    Layer(128, 256, elu),
    Layer(256, 512, elu),
    Layer(512, 784, clip),  # reaches 0 and 1, unlike a sigmoid
)


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Convert uint8 images to float32 pixels in [0, 1]."""
    return np.divide(images, 255, dtype=np.float32)


class Autoencoder:
    """The network: its parameters, forward pass and backward pass.

    A mini-batch of n images is a matrix x of shape (n, 784), one image per row, with pixels in
    [0, 1]. From a_0 = x - mean image, the layers k = 0 ... 5 compute

        z_(k+1) = a_k W_k + b_k
        a_(k+1) = f_k(z_(k+1))

    where f_k is the activation function of layer k. The loss is the mean squared error

        loss = sum((a_6 - x)^2) / (784 n)

    The latent code is a_(code_index), the output of the narrowest hidden layer (the first, if
    several are equal): here a_3, of shape (n, 128). The numbers are those of LAYERS as it stands.
    `mean_image` has the shape (784,); the vector `parameters` holds all weights and biases.

    The output layer clips to [0, 1], because four fifths of MNIST's pixels are exactly 0. No
    gradient flows through a clipped output, so an output learns only from images for which it is
    not clipped. A pixel that is 0 in all training images starts at 0 and stays there, as it should.

    Weights are drawn from a normal distribution with variance 2 / inputs (He et al. 2015,
    arxiv.org/abs/1502.01852); biases start at 0. The output layer's weights start at 0 and its
    biases at the mean image, which the untrained network then outputs. Random weights would clip
    many outputs. Zero weights pass no gradient back, but only in the first step.
    """

    def __init__(self, mean_image, seed=0, layers=LAYERS, dtype=np.float32):
        self.mean_image = np.asarray(mean_image, dtype)
        self.layers = layers
        self.code_index = 1 + np.argmin([layer.outputs for layer in layers[:-1]])  # as in a_(k+1)
        size = sum((layer.inputs + 1) * layer.outputs for layer in layers)
        self.parameters = np.zeros(size, dtype)
        weights, biases = self.split(self.parameters)
        rng = np.random.default_rng(seed)
        for layer, w in zip(layers[:-1], weights[:-1], strict=True):
            w[:] = rng.normal(0, (2 / layer.inputs) ** 0.5, w.shape)
        biases[-1][:] = self.mean_image

    def split(self, vector: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """W_0 ... W_5, shapes (inputs, outputs), and b_0 ... b_5, as views of a vector."""
        weights = []
        biases = []
        for layer in self.layers:
            count = layer.inputs * layer.outputs
            w, b, vector = np.split(vector, [count, count + layer.outputs])
            weights.append(w.reshape(layer.inputs, layer.outputs))
            biases.append(b)
        return weights, biases

    def forward(self, images: np.ndarray) -> tuple[list[np.ndarray], list]:
        """The activations a_0 ... a_6 and the derivatives f_0'(z_1) ... f_5'(z_6) for images x."""
        return self.apply_layers(images - self.mean_image, range(len(self.layers)))

    def apply_layers(self, a: np.ndarray, chosen: range) -> tuple[list[np.ndarray], list]:
        """The activations, beginning with the input a, and the derivatives of the chosen layers."""
        weights, biases = self.split(self.parameters)
        activations = [a]
        derivatives = []
        for k in chosen:
            z = activations[-1] @ weights[k]
            z += biases[k]
            a, derivative = self.layers[k].activation(z)
            activations.append(a)
            derivatives.append(derivative)
        return activations, derivatives

    def backward(self, activations: list, derivatives: list, difference: np.ndarray) -> np.ndarray:
        """The gradient of the loss with respect to `parameters`, as a vector of the same layout.

        `activations` and `derivatives` are the results of forward, and `difference` is a_6 - x.
        Write da_k for dloss/da_k, dz_k for dloss/dz_k and * for the elementwise product. The chain
        rule gives da_6 and then, for k = 5 ... 0, the other derivatives:

            da_6       = 2 (a_6 - x) / (784 n)
            dz_(k+1)   = da_(k+1) * f_k'(z_(k+1))
            dloss/dW_k = a_k^T dz_(k+1)
            dloss/db_k = sum of the rows of dz_(k+1)
            da_k       = dz_(k+1) W_k^T
        """
        weights, _ = self.split(self.parameters)
        gradient = np.empty_like(self.parameters)
        weight_gradients, bias_gradients = self.split(gradient)  # views, filled below
        da = 2 / difference.size * difference
        for k in reversed(range(len(self.layers))):
            dz = da * derivatives[k]
            np.matmul(activations[k].T, dz, out=weight_gradients[k])
            np.sum(dz, axis=0, out=bias_gradients[k])
            if k > 0:  # da_0 is not needed.
                da = dz @ weights[k].T
        return gradient

    def encode(self, images) -> np.ndarray:
        """The codes (n, 128) of images that are uint8 or in [0, 1]; ValueError for others."""
        x = np.asarray(images)
        size = self.mean_image.size
        if np.prod(x.shape[1:]) != size and (x.size != size or x.squeeze().ndim > 2):
            raise ValueError(f"images of {size} pixels are needed, not an array of shape {x.shape}")
        if x.dtype == np.uint8:
            x = to_pixels(x)
        if not np.isfinite(x).all():
            raise ValueError("some pixels are NaN or infinite: replace them")
        if ((x < 0) | (x > 1)).any():
            advice = "make black 0 and white 1 (divide 0 to 255 by 255), then clip to [0, 1]"
            raise ValueError(f"pixels from {x.min():.9g} to {x.max():.9g}: {advice}")
        x = np.asarray(x, self.mean_image.dtype).reshape(-1, size)
        parts = np.array_split(x, len(x) // 1000 + 1)  # as all layers of all images need gigabytes
        return np.concatenate([self.forward(part)[0][self.code_index] for part in parts])

    def decode(self, codes) -> np.ndarray:
        """The images (n, 784), in [0, 1], of codes (n, 128) or (128,); ValueError for others."""
        a = np.atleast_2d(np.asarray(codes, self.mean_image.dtype))
        size = self.layers[self.code_index].inputs
        if a.shape[1:] != (size,) or not np.isfinite(a).all():
            raise ValueError(f"codes of {size} finite numbers are needed; the shape is {a.shape}")
        return self.apply_layers(a, range(self.code_index, len(self.layers)))[0][-1]


INPUTS = [layer.inputs for layer in LAYERS]
OUTPUTS = [layer.outputs for layer in LAYERS]
if len(LAYERS) < 2 or [*INPUTS[1:], INPUTS[0]] != OUTPUTS or min(OUTPUTS) < 1:
    needed = f"a hidden layer and positive sizes that fit, not inputs {INPUTS}, outputs {OUTPUTS}"
    print(f"error: LAYERS in {__file__} need {needed}", file=sys.stderr)
    sys.exit(2)
IMAGE_SIZE = INPUTS[0]
CODE_SIZE = min(OUTPUTS[:-1])
NETWORK = "-".join(str(size) for size in (IMAGE_SIZE, *OUTPUTS))
NETWORK += ", " + " ".join(layer.activation.__name__ for layer in LAYERS)


# --------------------------------------------------------------------------------------- training
def reconstruction_loss(model: Autoencoder, images: np.ndarray) -> float:
    """The mean squared error of the reconstructions of uint8 images (n, 784)."""
    square_sum = 0.0
    for part in np.array_split(images, len(images) // 1000 + 1):  # to need little memory
        pixels = to_pixels(part)
        difference = model.forward(pixels)[0][-1] - pixels
        square_sum += float(np.sum(np.square(difference)))
    return square_sum / images.size


def default_learning_rate(batch_size: int) -> float:
    """The default peak learning rate for a batch size (Goyal et al., arxiv.org/abs/1706.02677)."""
    ratio = batch_size / 256  # Settings.learning_rate is for 256 images.
    # Proportional to the size up to 256, above to its square root, or it would be too large.
    return Settings.learning_rate * min(ratio, ratio**0.5)


def scheduled_learning_rate(step: int, total_steps: int, settings: Settings) -> float:
    """The learning rate of a step. Steps are numbered from 0 to total_steps - 1."""
    # The factor is 1 until the fraction decay_start of the run is over, and then falls to 0.
    remaining = (total_steps - step) / total_steps
    return settings.learning_rate * min(1, remaining / max(1 - settings.decay_start, 1e-9))


def sgd_step(parameters, velocity, gradient, learning_rate, decay, settings: Settings):
    """Take one step of SGD with Nesterov momentum. All three vectors are overwritten.

        g          <- gradient, scaled down to max_gradient_norm if its norm is larger
        g          <- g + decay * parameters
        v          <- momentum * (v + g)
        parameters <- parameters - learning_rate * (g + v)

    Nesterov momentum evaluates the gradient at a look-ahead point, where the velocity alone would
    take the parameters (Sutskever et al. 2013, proceedings.mlr.press/v28/sutskever13.html). That is
    what `parameters` stores, so each step undoes the last look-ahead and adds the next one.
    Without clipping, a step equals one of torch.optim.SGD with nesterov=True.
    """
    norm = float(np.linalg.norm(gradient))
    if norm > settings.max_gradient_norm:
        gradient *= settings.max_gradient_norm / norm
    gradient += decay * parameters
    velocity += gradient
    velocity *= settings.momentum
    gradient += velocity
    gradient *= learning_rate
    parameters -= gradient


def train_epoch(model: Autoencoder, velocity, images, epoch: int, settings: Settings) -> float:
    """Train for epoch 1, 2, ... with uint8 images (n, 784); update velocity; return the loss."""
    batch_starts = range(0, len(images), settings.batch_size)
    total_steps = settings.epochs * len(batch_starts)
    first_step = (epoch - 1) * len(batch_starts)
    # A generator for each epoch, so that a resumed run shuffles like one never interrupted.
    order = np.random.default_rng((settings.seed, epoch)).permutation(len(images))
    decay = settings.weight_decay / len(images)  # More images need less.
    square_sum = 0.0
    for step, batch_start in enumerate(batch_starts, first_step):
        chosen = order[batch_start : batch_start + settings.batch_size]
        batch = to_pixels(images[chosen])
        activations, derivatives = model.forward(batch)
        difference = activations[-1] - batch
        square_sum += float(np.sum(np.square(difference)))  # before the step
        gradient = model.backward(activations, derivatives, difference)
        learning_rate = scheduled_learning_rate(step, total_steps, settings)
        sgd_step(model.parameters, velocity, gradient, learning_rate, decay, settings)
    return square_sum / images.size


# ------------------------------------------------------------------------------------------- data
class InputError(Exception):
    """Invalid input from the user. The message says what is wrong and what to do."""


@dataclass
class Dataset:
    """Training and test images with their labels, as uint8 arrays."""

    name: str
    description: str  # the name, the numbers of images and a checksum
    images: np.ndarray  # the training images, shape (n, 784)
    labels: np.ndarray  # shape (n,)
    test_images: np.ndarray  # shape (m, 784)
    test_labels: np.ndarray  # shape (m,)
    image_shape: tuple[int, int]  # height and width


SAMPLE = "a sample of MNIST"
SAMPLE_DIR = Path(__file__).resolve().parent / "data" / "sample"
# The names of data sets by checksum. Any other data set is named after its directory.
NAMES = {"06b0d1f124c4e5fa": "MNIST", "8a7adbe9b5c3bf45": SAMPLE}
FILES = "train-images-idx3-ubyte, train-labels-idx1-ubyte, "
FILES += "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"
SERVER_TIMEOUT = 30  # seconds until a server that does not answer is given up


def explain(error: Exception) -> str:
    """The message of an exception on one line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def read_dataset(mnist, folder: Path) -> Dataset:
    """Read the four files in `folder`, or their .gz archives. Raises ValueError."""
    arrays = []
    with tempfile.TemporaryDirectory() as unpacked:  # because `folder` may be read-only
        for name in FILES.split(", "):
            path = folder / name
            try:
                if path.is_dir():  # as in Kaggle's archive
                    path /= name
                if not path.exists():
                    path = Path(unpacked, name)
                    path.write_bytes(gzip.decompress((folder / f"{name}.gz").read_bytes()))
                header = [*np.fromfile(path, ">i4", 5).tolist(), 0]  # only [0] for an empty file
                shape = tuple(header[1 : header[0] % 256 + 1])  # % 256: the number of dimensions
                if "images" in name:
                    fits = len(shape) == 3 and shape[0] > 1 and shape[1] * shape[2] == IMAGE_SIZE
                else:
                    fits = shape == (len(arrays[-1]),)
                if not fits:
                    needed = f"grey images of {IMAGE_SIZE} pixels (see LAYERS) and as many labels"
                    raise ValueError(f"its shape is {shape} instead of two or more {needed}")
                # Tensor.numpy() would fail if PyTorch was built for another version of NumPy.
                array = np.from_dlpack(mnist.read_sn3_pascalvincent_tensor(path, strict=False))
                if array.dtype != np.uint8 or ("images" in name and array.max() < 2):
                    raise ValueError("it needs bytes, with pixels from 0 (black) to 255 (white)")
                arrays.append(array)
            except Exception as error:  # An EOFError, for example, does not say what is cut.
                raise ValueError(f"{name} is missing, cut or unusable: {explain(error)}") from error
    checksum = hashlib.sha256(b"".join(arrays)).hexdigest()[:16]
    own_names = [part for part in folder.resolve().parts if part not in ("MNIST", "raw")]
    name = NAMES.get(checksum, own_names[-1])
    images, labels, test_images, test_labels = arrays
    facts = f"{name}, {len(images)} training and {len(test_images)} test images, sha256 {checksum}"
    rows = [array.reshape(len(array), IMAGE_SIZE) for array in (images, test_images)]
    return Dataset(name, facts, rows[0], labels, rows[1], test_labels, images.shape[1:])


def load_data(choice: str = "auto", data_dir: str | Path | None = None) -> Dataset:
    """The data set for --dataset and --data-dir. Raises InputError or ImportError."""
    if choice not in ("auto", "mnist", "sample") or (choice == "sample" and data_dir):
        raise InputError(f"--dataset {choice} is unknown, or cannot be combined with --data-dir")
    try:
        from torchvision.datasets import mnist  # here, because PyTorch takes seconds to import
    except Exception as error:  # RuntimeError, for example, if it was built for another PyTorch
        raise ImportError(f"torchvision fails (reinstall it?): {explain(error)}") from error
    root = SAMPLE_DIR if choice == "sample" else Path(os.path.expanduser(data_dir or "data"))
    if data_dir and not root.is_dir():
        raise InputError(f"there is no directory {root}: correct --data-dir")
    # A folder counts if a file in it is named like MNIST's, so that MNIST never takes its place.
    places = [root, *root.glob("*"), *root.glob("*/raw")]
    folders = sorted({file.parent for place in places for file in place.glob("*ubyte*")})
    if len(folders) > 1 and folders[0] != root:  # which comes first
        raise InputError(f"{folders[0]} and {folders[1]} both hold data: choose with --data-dir")
    folder = folders[0] if folders else root / "MNIST" / "raw"
    download = choice != "sample" and not folders
    try:
        if download:
            print(f"downloading MNIST to {folder}", file=sys.stderr)
            socket.setdefaulttimeout(SERVER_TIMEOUT)
            root.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as temporary:  # where no data are looked for
                mnist.MNIST(temporary, download=True)
                os.renames(Path(temporary, "MNIST", "raw"), folder)
        return read_dataset(mnist, folder)
    except Exception as error:
        problem = f"no usable data in {root if download else folder} ({explain(error)})"
        if download and choice == "auto" and not data_dir:
            print(f"warning: {problem}; using a sample of 5,000 images", file=sys.stderr)
            return load_data("sample")
        if choice == "sample":
            raise InputError(f"{problem}: restore it, or LAYERS") from error
        advice = f"put {FILES} there, or only their .gz archives, or use the sample"
        raise InputError(f"{problem}: {advice} (--dataset sample, no --data-dir)") from error


# -------------------------------------------------------------------------------------------- run
PLOTS = ("loss_curve.png", "latent_space.png", "reconstructions.png")
Baselines = namedtuple("Baselines", ["mean_image_loss", "pca_loss", "pca", "pca_name"])


def compute_baselines(dataset: Dataset) -> Baselines:
    """The test losses of the mean training image and of PCA with codes of the network's size."""
    components = min(CODE_SIZE, IMAGE_SIZE, len(dataset.images))  # no more than there are images
    pca = PCA(components, svd_solver="covariance_eigh").fit(to_pixels(dataset.images))
    pixels = to_pixels(dataset.test_images)
    pca_loss = np.mean(np.square(pca.inverse_transform(pca.transform(pixels)) - pixels))
    mean_image_loss = np.mean(np.square(pca.mean_ - pixels))
    return Baselines(mean_image_loss, pca_loss, pca, f"PCA with {components} components")


@dataclass
class Run:
    """The state of a run. model.npz stores it after every epoch."""

    model: Autoencoder
    velocity: np.ndarray  # a vector with the layout of model.parameters
    losses: list[list[float]]  # training loss and test loss of every epoch
    log: str  # the whole log; training_log.txt may lag behind it if the run is killed


def describe_libraries() -> str:
    """What affects floating-point rounding: versions, BLAS libraries, their kernels and threads."""
    facts = [f"Python {platform.python_version()}, NumPy {np.__version__}"]
    for pool in ThreadpoolController().select(user_api="blas").info():
        kernels = f"{pool['version']} {pool.get('architecture', '')} x {pool['num_threads']}"
        facts.append(f"{pool['internal_api']} {kernels}")
    return ", ".join(facts)


def load_run(path: str | Path, header: str = f"# network: {NETWORK}") -> Run:
    """Read a run of this network, whose log begins with `header`. Raises InputError.

    To use a trained network: load_run("model.npz").model.encode(images).
    """
    advice = "a run without --resume writes a model.npz after every epoch"
    try:
        with np.lib.npyio.NpzFile(path) as file:  # np.load would take a text for pickled data.
            log = str(file["log"])
            for found, expected in zip(log.splitlines(), header.splitlines(), strict=False):
                if found != expected:
                    advice = "a run keeps network, data and settings (its learning rate follows "
                    advice += "--epochs): restore them, or start anew in another --output-dir"
                    raise ValueError(f"its log says {found!r} instead of {expected!r}")
            model = Autoencoder(file["mean_image"])
            model.parameters[:] = file["parameters"]
            return Run(model, file["velocity"], file["losses"].tolist(), log)
    except Exception as error:  # NumPy and zipfile raise many types of exception.
        raise InputError(f"{path} cannot be used ({explain(error)}): {advice}") from error


def start_run(resume: bool, dataset, settings, baselines: Baselines, output: Path) -> Run:
    """A new run, or the saved one in `output`; also creates `output`. Raises InputError."""
    facts = {"network": NETWORK, "data": dataset.description, **asdict(settings)}
    header = "".join(f"# {name}: {value}\n" for name, value in facts.items())
    path = output / "model.npz"
    log_path = output / "training_log.txt"
    if resume:
        run = load_run(path, header)
    else:
        model = Autoencoder(dataset.images.mean(axis=0) / 255, settings.seed)
        log = f"{header}# Test Loss of the mean image: {baselines.mean_image_loss:.6f}\n"
        log += f"# Test Loss of {baselines.pca_name}: {baselines.pca_loss:.6f}\n"
        run = Run(model, np.zeros_like(model.parameters), losses=[], log=log)
        old_log = resume_or = ""
        with contextlib.suppress(Exception):  # Either file may be missing, or not a run's.
            old_log = log_path.read_text("utf-8")
        with contextlib.suppress(Exception):
            old_log = str(np.load(path)["log"])
            resume_or = "--resume or " if old_log.startswith(header) else ""
        if old_log or path.exists():
            old = f"model, log and plots in {output.resolve()} (epochs: {old_log.count('Time: ')})"
            advice = f"to keep them, use {resume_or}another --output-dir"
            print(f"note: the first new epoch replaces any {old}; {advice}", file=sys.stderr)
    try:
        (output / "plots").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{explain(error)}: use another --output-dir") from error
    if len(run.losses) < settings.epochs:
        run.log += f"# From epoch {len(run.losses) + 1} on: {describe_libraries()}\n"
    if resume:  # If the process was killed, training_log.txt may lack the last line.
        log_path.write_text(run.log, encoding="utf-8")
    return run


def write_atomically(path: Path, write) -> None:
    """Call write(temporary file), then rename that file, so that `path` is never half-written."""
    temporary = path.with_name(f".part.{path.name}")
    write(temporary)
    os.replace(temporary, path)


def save_epoch(run: Run, losses: list[float], line: str, output: Path) -> None:
    """Add an epoch's losses and its line of the log to `run`, and save `run` in `output`."""
    all_losses = [*run.losses, losses]
    log = f"{run.log}{line}\n"
    arrays = {"mean_image": run.model.mean_image, "parameters": run.model.parameters}
    arrays |= {"velocity": run.velocity, "losses": all_losses, "log": log}
    # Until this line, a new run leaves an earlier run's files alone. From here on, --resume works.
    write_atomically(output / "model.npz", partial(np.savez, **arrays))
    run.losses = all_losses  # after saving, so that main never reports an epoch that is not saved
    run.log = log
    is_first = len(all_losses) == 1  # It replaces the log of an earlier run.
    with open(output / "training_log.txt", "w" if is_first else "a", encoding="utf-8") as file:
        file.write(log if is_first else f"{line}\n")
    for name in PLOTS:
        (output / "plots" / name).unlink(missing_ok=True)


def train(run: Run, dataset: Dataset, settings: Settings, output: Path) -> None:
    """Train for the remaining epochs; save, log and print each. Raises FloatingPointError."""
    # The untrained network outputs the mean image, unless LAYERS end with, say, a sigmoid.
    untrained_loss = reconstruction_loss(Autoencoder(run.model.mean_image), dataset.images)
    done = len(run.losses)
    remaining = range(done + 1, settings.epochs + 1)
    # disable=None shows the progress bar only in a terminal.
    for epoch in tqdm(remaining, initial=done, total=settings.epochs, unit="epoch", disable=None):
        start = time.perf_counter()
        loss = train_epoch(run.model, run.velocity, dataset.images, epoch, settings)
        test_loss = reconstruction_loss(run.model, dataset.test_images)
        seconds = time.perf_counter() - start
        # 1% more is allowed for rounding. Comparisons with NaN are false.
        if not (loss <= 1.01 * untrained_loss and np.isfinite(test_loss)):
            default = default_learning_rate(settings.batch_size)
            advice = f"try --lr {min(default, settings.learning_rate / 2):g} (default: {default:g})"
            raise FloatingPointError(f"training diverged in epoch {epoch} ({loss:.4f}); {advice}")
        line = f"Epoch {epoch}, Loss: {loss:.6f}, Test Loss: {test_loss:.6f}, Time: {seconds:.1f}s"
        save_epoch(run, [loss, test_loss], line, output)
        with tqdm.external_write_mode():  # above the progress bar
            print(line, flush=True)


# ------------------------------------------------------------------------------------------ plots
def plot_losses(losses, baselines: Baselines, name: str, settings: Settings) -> Figure:
    """Training and test loss per epoch, with PCA's test loss as a line."""
    training, test = np.transpose(losses)
    epochs = range(1, len(losses) + 1)
    figure = Figure(figsize=(6, 4.5), dpi=200, layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs, training, "C0.-", label=f"training (epoch mean): {training[-1]:.5f}")
    axes.plot(epochs, test, "C1.--", label=f"test: {test[-1]:.5f}")
    axes.axhline(baselines.pca_loss, c="k", ls=":", label=f"PCA, test: {baselines.pca_loss:.5f}")
    fall = settings.decay_start * len(losses)
    if settings.decay_start < 1:
        axes.axvline(fall, c="gray", lw=0.8, label=f"learning rate falls after epoch {fall:g}")
    axes.set(title=f"Loss on {name}", xlabel="epoch", ylabel="mean squared error", yscale="log")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.4)
    axes.legend()
    return figure


def plot_latent_space(model: Autoencoder, dataset: Dataset) -> Figure:
    """The test images' codes in a plane, and the images decoded from a grid of its points."""
    codes = model.encode(dataset.test_images)
    if CODE_SIZE > 2:
        pca = PCA(2, svd_solver="full").fit(codes)
        origin = pca.mean_
        directions = pca.components_
        first, second = [f"{share:.1%} of the variance" for share in pca.explained_variance_ratio_]
        labels = [f"first principal component ({first})", f"second principal component ({second})"]
    else:
        origin = np.zeros(CODE_SIZE)
        directions = np.eye(2, CODE_SIZE)
        labels = [*["first number of the code", "second number of the code"][:CODE_SIZE], ""]
    points = (codes - origin) @ directions.T
    # A square around all points, and the centres of 15 x 15 cells in it.
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    reach = np.ptp(points, axis=0).max() / 2 or 1
    steps = (np.arange(15) - 7) / 7.5 * reach
    x, y = np.meshgrid(middle[0] + steps, middle[1] - steps)
    images = model.decode(origin + np.column_stack([x.ravel(), y.ravel()]) @ directions)
    picture = np.block([[*row] for row in images.reshape(15, 15, *dataset.image_shape)])
    figure = Figure(figsize=(12, 6.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    left.set(title=f"Codes of the test images of {dataset.name}", ylabel=labels[1], aspect="equal")
    right.set(title="Images decoded from the points of this plane")
    figure.supxlabel(labels[0], size="medium")
    order = np.random.default_rng(0).permutation(len(points))  # so that no digit hides another
    digits = dataset.test_labels[order]
    dots = left.scatter(*points[order].T, s=5, c=digits, cmap="tab10", alpha=0.7, linewidths=0)
    handles, names = dots.legend_elements(num=None, fmt="{x:.0f}", markersize=8)
    figure.legend(handles, names, loc="outside upper center", ncols=10, frameon=False)
    edges = (middle[0] - reach, middle[0] + reach, middle[1] - reach, middle[1] + reach)
    right.imshow(picture, "gray", vmin=0, vmax=1, extent=edges)
    return figure


def plot_reconstructions(model: Autoencoder, dataset: Dataset, pca: PCA) -> Figure:
    """The first test image of each label, and its reconstructions by the network and by PCA."""
    _, first_places = np.unique(dataset.test_labels, return_index=True)
    chosen = dataset.test_images[first_places[:10]]
    originals = to_pixels(chosen)
    rows = {"original": originals, "autoencoder": model.decode(model.encode(chosen))}
    rows["error"] = rows["autoencoder"] - originals
    rows["PCA"] = pca.inverse_transform(pca.transform(originals))
    rows["PCA's error"] = rows["PCA"] - originals
    figure = Figure(figsize=(10, 5.7), dpi=150, layout="constrained")
    figure.suptitle(f"Test images of {dataset.name}, decoded from codes of {CODE_SIZE} numbers")
    figure.supxlabel("errors: output - original, -0.5 (blue) to 0.5 (red)", size="medium")
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


def finish(run: Run, dataset: Dataset, baselines: Baselines, settings: Settings, output: Path):
    """Draw the plots into output/plots; print what came out, and where it is. Raises OSError."""
    print("drawing the plots", flush=True)
    # Ignore the user's matplotlibrc, and take a dollar sign in a directory's name as it is.
    with style.context(["default", {"text.parse_math": False}]):
        figures = [plot_losses(run.losses, baselines, dataset.name, settings)]
        figures.append(plot_latent_space(run.model, dataset))
        figures.append(plot_reconstructions(run.model, dataset, baselines.pca))
        for name, figure in zip(PLOTS, figures, strict=True):
            write_atomically(output / "plots" / name, figure.savefig)
    print(f"training_log.txt, plots and model.npz are in {output.resolve()}")
    loss = run.losses[-1][1]
    print(f"test loss: {loss:.6f}; {baselines.pca_name}: {baselines.pca_loss:.6f}")
    if loss > 0.9 * baselines.mean_image_loss:
        default = default_learning_rate(settings.batch_size)
        advice = f"undo edits, or try more epochs or images, or another --lr (default: {default:g})"
        print(f"warning: the network has learned next to nothing; {advice}", file=sys.stderr)
    if dataset.name == SAMPLE:
        print("this was a sample of MNIST; losses on all of MNIST are different")


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
    count = partial(number, int, 1, 100_000)
    for flag, convert, default, meaning in (
        ("--epochs", count, Settings.epochs, "number of epochs"),
        ("--batch-size", count, Settings.batch_size, "images per mini-batch"),
        ("--momentum", partial(number, float, 0, 0.99), Settings.momentum, "momentum coefficient"),
        ("--seed", partial(number, int, 0, 2**32 - 1), Settings.seed, "seed of the random numbers"),
        ("--output-dir", Path, Path(), "where to write to"),
    ):
        text = f"{meaning} (default: {default})"
        # argparse converts, and so checks, a default only if it is a string.
        parser.add_argument(flag, type=convert, default=str(default), help=text)
    text = f"peak learning rate (default: {Settings.learning_rate:g} for batches of 256 images)"
    parser.add_argument("--lr", type=partial(number, float, 1e-6, 1000), help=text)
    parser.add_argument("--data-dir", type=Path, help="where the data are, or go (default: data)")
    text = "auto (default): mnist, or sample (5,000 images) if the download to data fails"
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
            run = start_run(args.resume, dataset, settings, baselines, output)
            print(run.log, end="", flush=True)
            train(run, dataset, settings, output)
            finish(run, dataset, baselines, settings, output)
        return 0
    except KeyboardInterrupt:
        status = 130
        message = "interrupted before a new epoch was saved"
        if run and run.losses:
            message = f"interrupted; --resume continues after epoch {len(run.losses)}"
    except (InputError, ImportError, OSError, MemoryError, ArithmeticError, UnicodeError) as error:
        status = 2 if isinstance(error, InputError) else 1
        message = f"error: {explain(error)}"
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
