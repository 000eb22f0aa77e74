# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "torchvision>=0.17", "matplotlib>=3.10", "scikit-learn>=1.5",
#     "joblib>=1.3", "threadpoolctl>=3.5", "tqdm>=4.66"]
# ///
"""A deep autoencoder for MNIST, from scratch in NumPy.

`python mnist_autoencoder.py` trains a 784-512-256-128-256-512-784 network to compress each 28x28
image to a latent code of 128 numbers and to reconstruct the image from that code. After 100 epochs,
its mean squared error is 0.00066 on the training images and 0.00079 on the test images (PCA with
codes of the same size: 0.00421). To experiment, edit Settings, ENCODER, DECODER or LOSS.
"""

import argparse
import hashlib
import os
import socket
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import joblib
import numpy as np
from matplotlib import color_sequences, style, ticker
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_info, threadpool_limits
from tqdm import tqdm


@dataclass(frozen=True)
class Settings:
    """The hyperparameters. The same settings, data, machine and libraries give the same run."""

    epochs: int = 100  # passes over the training images
    batch_size: int = 256  # images per mini-batch
    lr: float = 0.05  # peak learning rate for batches of 256 images (see learning_rate_at)
    decay_fraction: float = 0.65  # final part of the run, during which the rate falls to 0
    momentum: float = 0.985  # The velocity sums about the last 1 / (1 - 0.985) = 67 gradients.
    # Gradient clipping: gradients of a larger norm are scaled down to it. Without it, a large step
    # can push all outputs below 0 or above 1, where all gradients are 0, and learning stops.
    max_gradient_norm: float = 2.0
    weight_decay: float = 5.0  # divided by the number of training images: 5 / 60,000 = 8e-5
    seed: int = 0  # for the random initial weights and the shuffling of the images


# ---------------------------------------------------------------------------------------- network
# An activation function returns its value at z and its derivative there.
def elu(z):
    """z where z > 0, exp(z) - 1 elsewhere (Clevert et al. 2016, arxiv.org/abs/1511.07289)."""
    # ELU is max(z, derivative - 1): exp(z) - 1 >= z where z <= 0, and 1 - 1 < z where z > 0.
    # (np.where and np.expm1 are much slower, and so are exp's subnormal results below about -87.)
    derivative = np.exp(np.clip(z, -80, 0))
    return np.maximum(z, derivative - 1), derivative


def linear(z):
    """z itself; the derivative is 1."""
    return z, 1


def clamp(z):
    """z, but 0 where z < 0 and 1 where z > 1; the derivative is 1 between 0 and 1, 0 elsewhere."""
    return np.clip(z, 0, 1), (z > 0) & (z < 1)


# A loss function returns, for each pixel, its value and its derivative with respect to the output,
# both (n, 784). Training minimises loss = sum(values) / n; log and plots show the mean per pixel.
def squared_error(outputs, images):
    """(output - image)^2; the derivative is 2 (output - image)."""
    error = outputs - images
    return np.square(error), 2 * error


Layer = namedtuple("Layer", ["inputs", "outputs", "activation"])
ENCODER = (
    Layer(784, 512, elu),
    Layer(512, 256, elu),
    Layer(256, 128, linear),  # The outputs are the latent code.
)
DECODER = (
    Layer(128, 256, elu),
    Layer(256, 512, elu),
    Layer(512, 784, clamp),  # Most pixels are exactly 0, which a sigmoid never reaches.
)
LOSS = squared_error


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Convert uint8 images to float32 pixels in [0, 1]."""
    return np.divide(images, 255, dtype=np.float32)


class Autoencoder:
    """The network: its parameters, forward pass and backward pass.

    A mini-batch of n images is a matrix x of shape (n, 784), one image per row, with pixels in
    [0, 1]. From a_0 = x - mean image, the layers k = 0 ... 5 of ENCODER and DECODER compute

        z_(k+1) = a_k W_k + b_k
        a_(k+1) = f_k(z_(k+1))

    where f_k is the activation function of layer k. The encoder's output a_3, of shape (n, 128), is
    the latent code; the decoder's output a_6 reconstructs x. `parameters` holds all W_k, b_k.

    Weights are drawn from a normal distribution with variance 2 / inputs (He et al. 2015,
    arxiv.org/abs/1502.01852); biases start at 0. The last layer's weights start at 0 and its biases
    at the mean image, which clamp then outputs: random weights would put many outputs below 0 or
    above 1, where clamp's derivative is 0. (In the first step, no gradient reaches other layers.)
    """

    def __init__(self, mean_image, seed=0, encoder=ENCODER, decoder=DECODER, dtype=np.float32):
        self.layers = (*encoder, *decoder)
        # The last layer is compared with the first, as output and input have the same size.
        for layer, following in zip(self.layers, (*self.layers[1:], encoder[0]), strict=True):
            if layer.outputs != following.inputs:
                raise ValueError(f"the outputs of {layer} are not the inputs of {following}")
        self.code_index = len(encoder)  # The code is a_(code_index).
        self.image_size = encoder[0].inputs
        self.mean_image = np.asarray(mean_image, dtype).reshape(self.image_size)
        size = sum((layer.inputs + 1) * layer.outputs for layer in self.layers)
        self.parameters = np.zeros(size, dtype)
        weights, biases = self.unpack(self.parameters)
        rng = np.random.default_rng(seed)
        for w in weights[:-1]:  # whose shape is (inputs, outputs)
            w[:] = rng.normal(0, (2 / len(w)) ** 0.5, w.shape)
        biases[-1][:] = self.mean_image

    def unpack(self, vector: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """W_0 ... W_5, shapes (inputs, outputs), and b_0 ... b_5, as views of a vector."""
        weights = []
        biases = []
        for layer in self.layers:
            count = layer.inputs * layer.outputs
            w, b, vector = np.split(vector, [count, count + layer.outputs])  # vector is the rest
            weights.append(w.reshape(layer.inputs, layer.outputs))
            biases.append(b)
        return weights, biases

    def forward(self, a, first: int = 0, last: int | None = None) -> tuple[list, list]:
        """Apply the layers [first:last] to a; return all activations (first a) and the f_k'."""
        weights, biases = self.unpack(self.parameters)
        activations = [a]
        derivatives = []
        for layer, w, b in list(zip(self.layers, weights, biases, strict=True))[first:last]:
            z = a @ w + b
            a, derivative = layer.activation(z)
            activations.append(a)
            derivatives.append(derivative)
        return activations, derivatives

    def backward(self, activations: list, derivatives: list, da: np.ndarray) -> np.ndarray:
        """The gradient of the loss with respect to `parameters`, as a vector of the same layout.

        `activations` and `derivatives` are the results of forward. Let da_k be dloss/da_k, dz_k be
        dloss/dz_k and * the elementwise product. From `da`, which is da_6 (for the squared error:
        2 (a_6 - x) / n), the chain rule gives for k = 5 ... 0:

            dz_(k+1)   = da_(k+1) * f_k'(z_(k+1))
            dloss/dW_k = a_k^T dz_(k+1)
            dloss/db_k = sum of the rows of dz_(k+1)
            da_k       = dz_(k+1) W_k^T
        """
        weights, _ = self.unpack(self.parameters)
        gradient = np.empty_like(self.parameters)
        weight_gradients, bias_gradients = self.unpack(gradient)  # views, filled below
        for k in reversed(range(len(self.layers))):
            dz = da * derivatives[k]
            np.matmul(activations[k].T, dz, out=weight_gradients[k])
            np.sum(dz, axis=0, out=bias_gradients[k])
            if k > 0:  # da_0 is not needed.
                da = dz @ weights[k].T
        return gradient

    def last_activation(self, a, first: int, last: int | None) -> np.ndarray:
        """The last activation of forward, which runs on 1,000 rows at a time, to save memory."""
        parts = [a[start : start + 1000] for start in range(0, len(a), 1000)]
        return np.concatenate([self.forward(part, first, last)[0][-1] for part in parts])

    def encode(self, images) -> np.ndarray:
        """The codes (n, 128) of an array, list or tensor of n images, (n, 784) or (n, 28, 28).

        Pixels are in [0, 1], or uint8 from 0 to 255. Raises ValueError for other sizes or values.
        """
        x = np.asarray(images)
        if x.dtype == np.uint8 and x.max() > 1:  # else: 0 or 1, in [0, 1] already
            x = to_pixels(x)
        if x[:1].size != self.image_size or not (x.min() >= 0 and x.max() <= 1):  # true for NaN
            found = f"{x.shape} from {x.min():g} to {x.max():g}"
            raise ValueError(f"images must be n x {self.image_size} pixels in [0, 1], not {found}")
        x = x.reshape(len(x), self.image_size).astype(self.mean_image.dtype)
        return self.last_activation(x - self.mean_image, 0, self.code_index)

    def decode(self, codes) -> np.ndarray:
        """The images (n, 784), in [0, 1], of n codes (n, 128)."""
        return self.last_activation(np.asarray(codes, self.mean_image.dtype), self.code_index, None)

    def reconstruct(self, images) -> np.ndarray:
        """Encode n images, and decode their codes to images (n, 784)."""
        return self.decode(self.encode(images))


# --------------------------------------------------------------------------------------- training
def mean_loss(reconstruct, images: np.ndarray) -> float:
    """The mean LOSS per pixel of uint8 images (n, 784), scaled to [0, 1] and reconstructed."""
    loss_sum = 0.0
    for start in range(0, len(images), 1000):  # to save memory
        x = to_pixels(images[start : start + 1000])
        losses, _ = LOSS(reconstruct(x), x)
        loss_sum += float(np.sum(np.mean(losses.reshape(x.shape), axis=1)))  # LOSS is per pixel
    return loss_sum / len(images)


def learning_rate_at(step: int, total_steps: int, settings: Settings) -> float:
    """The learning rate at step 0 ... total_steps - 1: constant at first, then linearly down to 0.

    It is proportional to the batch size up to 256 images (Goyal et al. 2017,
    arxiv.org/abs/1706.02677), and to its square root beyond that.
    """
    ratio = settings.batch_size / 256
    peak = settings.lr * min(ratio, ratio**0.5)
    remaining = (total_steps - step) / total_steps
    return peak * min(1, remaining / settings.decay_fraction)


def sgd_step(parameters, velocity, gradient, learning_rate, decay, settings: Settings) -> None:
    """Take one step of SGD with Nesterov momentum, which changes all three vectors in place.

        g          <- gradient, scaled down to max_gradient_norm if its norm is larger
        g          <- g + decay * parameters
        v          <- momentum * (v + g)
        parameters <- parameters - learning_rate * (g + v)

    Nesterov momentum takes the gradient at a look-ahead point, where the velocity alone would take
    the parameters (Sutskever et al. 2013, proceedings.mlr.press/v28/sutskever13.html). Only that
    point is stored, as `parameters`: an update takes a gradient step (g) and looks ahead anew (v).
    Without clipping, this is torch.optim.SGD with nesterov=True.
    """
    norm = float(np.linalg.norm(gradient))
    if norm > settings.max_gradient_norm:
        gradient *= settings.max_gradient_norm / norm
    for start in range(0, len(parameters), 65_536):  # Parts fit in the cache: up to 12% faster.
        part = slice(start, start + 65_536)
        g = gradient[part] + decay * parameters[part]
        velocity[part] += g
        velocity[part] *= settings.momentum
        parameters[part] -= learning_rate * (g + velocity[part])


def train_epoch(model: Autoencoder, velocity, images, epoch: int, settings: Settings) -> float:
    """Train for an epoch on uint8 images (n, 784); return the mini-batches' mean loss per pixel."""
    batch_starts = range(0, len(images), settings.batch_size)
    total_steps = settings.epochs * len(batch_starts)
    first_step = (epoch - 1) * len(batch_starts)
    # A generator for each epoch, so that a resumed run shuffles as an uninterrupted one does.
    order = np.random.default_rng((settings.seed, epoch)).permutation(len(images))
    decay = settings.weight_decay / len(images)
    loss_sum = 0.0
    for step, batch_start in enumerate(batch_starts, first_step):
        batch_indices = order[batch_start : batch_start + settings.batch_size]
        x = to_pixels(images[batch_indices])
        activations, derivatives = model.forward(x - model.mean_image)
        losses, loss_derivatives = LOSS(activations[-1], x)
        loss_sum += float(np.sum(np.mean(losses, axis=1)))
        gradient = model.backward(activations, derivatives, loss_derivatives / len(x))
        learning_rate = learning_rate_at(step, total_steps, settings)
        sgd_step(model.parameters, velocity, gradient, learning_rate, decay, settings)
    return loss_sum / len(images)


# ------------------------------------------------------------------------------------------- data
class InputError(Exception):
    """A problem that the user can solve. The message says what is wrong."""


# Images are uint8 arrays (n, 784), test_labels integers (n,), and image_shape is (28, 28).
Dataset = namedtuple("Dataset", "name checksum images test_images test_labels image_shape")
SAMPLE_DIR = Path(__file__).resolve().parent / "data" / "sample"
DATA_DIR = Path("data")
MNIST_CHECKSUM = "48131c26b7c563dd"  # Only these data are called MNIST in log and plots.


def load_data(choice: str = "MNIST", data_dir: str | Path = DATA_DIR) -> Dataset:
    """Load MNIST, FashionMNIST or KMNIST from data_dir, or the "sample". Raises InputError.

    Missing files are downloaded if data_dir is the default; if MNIST cannot be, the sample is used.
    """
    from torchvision import datasets  # here, because PyTorch takes seconds to import

    name = "MNIST" if choice == "sample" else choice
    root = SAMPLE_DIR if choice == "sample" else Path(data_dir).expanduser()
    load = getattr(datasets, name)
    folder = root / name / "raw"  # where torchvision looks for these files
    files = [archive.removesuffix(".gz") for archive, _ in load.resources]
    missing = [file for file in files if not (folder / file).exists()]
    if missing and root != DATA_DIR:
        raise InputError(f"{name} is not in {folder}, as these files are missing: {missing}")
    try:
        if missing:
            print(f"downloading {name} to {folder}", file=sys.stderr)
        training = load(root, train=True, download=bool(missing))
        test = load(root, train=False, download=bool(missing))
    except Exception as error:  # torchvision raises many types of exception.
        problem = f"no usable {name} in {folder} ({error!r})"
        if missing and name == "MNIST":
            print(f"warning: {problem}; using a sample of 5,000 images", file=sys.stderr)
            return load_data("sample")
        raise InputError(f"{problem}: it needs undamaged {files}") from error
    # Tensor.numpy() would fail if PyTorch was built for another version of NumPy.
    images, test_images, test_labels = map(np.from_dlpack, (training.data, test.data, test.targets))
    size = ENCODER[0].inputs
    for x in (images, test_images):
        if x[0].size != size or x.max() < 2:
            raise InputError(f"{folder}: {x.shape} to {x.max()}, ENCODER: {size} pixels to 255")
    checksum = hashlib.sha256(b"".join((images, test_images, test_labels))).hexdigest()[:16]
    name = "MNIST" if checksum == MNIST_CHECKSUM else f"{root.resolve().name}/{name}"
    rows = [array.reshape(-1, size) for array in (images, test_images)]
    return Dataset(name, checksum, *rows, test_labels, images[0].shape)


# -------------------------------------------------------------------------------------------- run
PLOTS = ("plots/loss_curve.png", "plots/latent_space.png", "plots/reconstructions.png")


def fit_pca(dataset: Dataset) -> tuple[PCA, float]:
    """PCA with codes of the network's size, and its test loss. Raises InputError if that is nan."""
    components = min(ENCODER[-1].outputs, *dataset.images.shape)  # at most as many as images
    pca = PCA(components, svd_solver="covariance_eigh").fit(to_pixels(dataset.images))
    loss = mean_loss(lambda x: pca.inverse_transform(pca.transform(x)), dataset.test_images)
    if not np.isfinite(loss):
        raise InputError(f"LOSS is {loss} for PCA: clip the outputs in LOSS to [1e-6, 1 - 1e-6]")
    return pca, loss


@dataclass
class Run:
    """The state of a run, which model.npz stores (except saved_at) after every epoch."""

    model: Autoencoder
    velocity: np.ndarray  # a vector with the layout of model.parameters
    losses: list[list[float]]  # training loss and test loss of every epoch
    log: str  # the whole log; training_log.txt may lag behind it if the run is killed
    saved_at: int  # time of its last save or load (ns); a newer model.npz is another run's


def describe(layers: tuple[Layer, ...]) -> str:
    """Layers as text, such as "784-512 elu, 512-256 elu, 256-128 linear"."""
    return ", ".join(f"{x.inputs}-{x.outputs} {x.activation.__name__}" for x in layers)


NETWORK = f"# encoder: {describe(ENCODER)}\n# decoder: {describe(DECODER)}\n# loss: {LOSS.__name__}"


def load_run(path: str | Path, header: str = NETWORK) -> Run:
    """Load a run, with its `model`. Raises InputError unless its log has every line of `header`."""
    try:
        with np.load(path) as file:
            log = str(file["log"])
            for line in header.splitlines():
                if line not in log.splitlines():
                    raise ValueError(f"{line!r} must be as in its log")
            model = Autoencoder(file["mean_image"])
            model.parameters[:] = file["parameters"].reshape(model.parameters.shape)
            velocity = file["velocity"].reshape(model.parameters.shape)
            return Run(model, velocity, file["losses"].tolist(), log, os.stat(path).st_mtime_ns)
    except Exception as error:  # NumPy and zipfile raise many types of exception.
        raise InputError(f"{path} cannot be used: {error!r}") from error


def start_run(resume: bool, dataset, settings, pca: PCA, pca_loss: float, output: Path) -> Run:
    """A new run, or the saved one in `output`; creates that directory. Raises InputError."""
    data = f"{len(dataset.images)} training and {len(dataset.test_images)} test images"
    facts = {"data": f"{data}, sha256 {dataset.checksum}", **asdict(settings)}
    header = NETWORK + "".join(f"\n# {name}: {value}" for name, value in facts.items())
    if resume:
        run = load_run(output / "model.npz", header)
    else:
        model = Autoencoder(dataset.images.mean(axis=0) / 255, settings.seed)
        log = f"{header}\n# Test Loss of PCA with {pca.n_components_} components: {pca_loss:.6f}\n"
        run = Run(model, np.zeros_like(model.parameters), [], log, time.time_ns())
        if any((output / name).exists() for name in ("model.npz", "training_log.txt", *PLOTS)):
            print(f"note: the first epoch replaces the run in {output.resolve()}", file=sys.stderr)
    (output / "plots").mkdir(parents=True, exist_ok=True)
    if len(run.losses) < settings.epochs:
        run.log += f"# From epoch {len(run.losses) + 1}: {dataset.name}, NumPy {np.__version__}\n"
    return run


def save_epoch(run: Run, losses: list[float], line: str, output: Path) -> None:
    """Add an epoch's losses and its line of the log to `run`, and save `run` in `output`."""
    path = output / "model.npz"
    if path.exists() and path.stat().st_mtime_ns > run.saved_at:
        raise InputError(f"another run is writing to {output.resolve()}: use another --output-dir")
    all_losses = [*run.losses, losses]
    log = f"{run.log}{line}\n"
    arrays = {"mean_image": run.model.mean_image, "parameters": run.model.parameters}
    arrays |= {"velocity": run.velocity, "losses": all_losses, "log": log}
    temporary = output / f".part.{os.getpid()}.npz"
    np.savez(temporary, **arrays)
    os.replace(temporary, path)  # This saves the epoch, and replaces an earlier run.
    run.saved_at = path.stat().st_mtime_ns
    run.losses = all_losses
    run.log = log
    (output / "training_log.txt").write_text(log, encoding="utf-8")
    for name in PLOTS:
        (output / name).unlink(missing_ok=True)  # It may show an earlier run.


def train(run: Run, dataset: Dataset, settings: Settings, output: Path) -> None:
    """Train for the remaining epochs; save, log and print each. Raises InputError."""
    mean_image_loss = mean_loss(lambda x: run.model.mean_image, dataset.images)
    # Diverged: the loss exceeds both the mean image's and that of the network before this training.
    limit = 1.01 * max(mean_image_loss, mean_loss(run.model.reconstruct, dataset.images))
    remaining = range(len(run.losses) + 1, settings.epochs + 1)
    for epoch in tqdm(remaining, initial=len(run.losses), total=settings.epochs, disable=None):
        start = time.perf_counter()
        loss = train_epoch(run.model, run.velocity, dataset.images, epoch, settings)
        test_loss = mean_loss(run.model.reconstruct, dataset.test_images)
        seconds = time.perf_counter() - start
        if not (loss <= limit and np.isfinite(test_loss)):
            rates = f"--lr {settings.lr:g} (default: {Settings.lr:g})"
            raise InputError(f"training diverged in epoch {epoch} (loss {loss:g}) with {rates}")
        line = f"Epoch {epoch}, Loss: {loss:.6f}, Test Loss: {test_loss:.6f}, Time: {seconds:.1f}s"
        save_epoch(run, [loss, test_loss], line, output)
        with tqdm.external_write_mode():  # above the bar, which only terminals show (disable=None)
            print(line, flush=True)
    if min(run.losses[-1]) > min(0.9 * mean_image_loss, run.losses[0][0]):
        print("warning: the loss hardly fell, or it rose: another --lr may help", file=sys.stderr)


# ------------------------------------------------------------------------------------------ plots
COLORS = np.array(color_sequences["petroff10"])  # distinguishable for colour-blind readers
LOSS_NAME = f"mean {LOSS.__name__.removeprefix('mean_').replace('_', ' ')}"  # per pixel


def plot_losses(losses, pca_loss: float, name: str) -> Figure:
    """Training and test loss per epoch, with PCA's test loss as a line."""
    training, test = np.transpose(losses)
    epochs = range(1, len(losses) + 1)
    figure = Figure(figsize=(6, 4.5), dpi=200, layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs, training, "C0.-", label=f"training (epoch mean): {training[-1]:.5f}")
    axes.plot(epochs, test, "C1.--", label=f"test: {test[-1]:.5f}")
    axes.axhline(pca_loss, c="k", ls=":", label=f"PCA, test: {pca_loss:.5f}")
    axes.set(title=f"Loss on {name}", xlabel="epoch", ylabel=LOSS_NAME, yscale="log")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.4)
    axes.legend()
    return figure


def plot_latent_space(model: Autoencoder, dataset: Dataset) -> Figure:
    """The test images' codes by their first two principal components, and this plane decoded."""
    codes = model.encode(dataset.test_images)
    pca = PCA(min(2, *codes.shape), svd_solver="full").fit(codes)
    directions = np.zeros((2, codes.shape[1]))  # The second stays 0 if a code is one number.
    directions[: len(pca.components_)] = pca.components_
    points = (codes - pca.mean_) @ directions.T
    # A square around nearly all points, and the centres of 15 x 15 cells in it.
    low, high = np.percentile(points, [1, 99], axis=0)
    middle = (low + high) / 2
    reach = 0.55 * (high - low).max() or 1
    steps = (np.arange(15) - 7) / 7.5 * reach
    x, y = np.meshgrid(middle[0] + steps, middle[1] - steps)
    images = model.decode(pca.mean_ + np.column_stack([x.ravel(), y.ravel()]) @ directions)
    picture = np.block([[*row] for row in images.reshape(15, 15, *dataset.image_shape)])
    edges = (middle[0] - reach, middle[0] + reach, middle[1] - reach, middle[1] + reach)
    figure = Figure(figsize=(12, 6.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    left.set_title(f"Codes of test images of {dataset.name}")
    right.set_title("Images decoded from the points of this plane")
    shares = [f"{share:.0%} of the variance" for share in (*pca.explained_variance_ratio_, 0)]
    figure.supxlabel(f"first principal component ({shares[0]})", size="medium")
    left.set(ylabel=f"second principal component ({shares[1]})", aspect="equal")
    left.scatter(*points.T, s=12, c=COLORS[dataset.test_labels % 10], linewidths=0)
    for label in np.unique(dataset.test_labels):
        left.scatter([], [], s=80, color=COLORS[label % 10], label=label)
    figure.legend(loc="outside upper center", ncols=10, frameon=False)
    right.imshow(picture, "gray", vmin=0, vmax=1, extent=edges)  # Its extent limits both panels.
    return figure


def plot_reconstructions(model: Autoencoder, dataset: Dataset, pca: PCA) -> Figure:
    """The first test image of each label, and its reconstructions by the network and by PCA."""
    _, first_indices = np.unique(dataset.test_labels, return_index=True)
    x = to_pixels(dataset.test_images[first_indices[:10]])
    outputs = model.reconstruct(x)
    pca_outputs = pca.inverse_transform(pca.transform(x))
    rows = {"original": x, "autoencoder": outputs, "output -\noriginal": outputs - x}
    rows |= {"PCA": pca_outputs, "PCA -\noriginal": pca_outputs - x}
    figure = Figure(figsize=(10, 5.9), dpi=150, layout="constrained")
    sizes = f"{ENCODER[-1].outputs} numbers (PCA: {pca.n_components_})"
    figure.suptitle(f"Test images of {dataset.name} from codes of {sizes}")
    figure.supxlabel(f"below images: their {LOSS_NAME}; differences: -0.5 (blue) to 0.5 (red)")
    for axes, (name, images) in zip(figure.subplots(len(rows)), rows.items(), strict=True):
        strip = np.hstack(images.reshape(-1, *dataset.image_shape))
        axes.set(xticks=[], yticks=[], ylabel=name)
        if "-" in name:
            axes.imshow(strip, "RdBu_r", vmin=-0.5, vmax=0.5)
        else:
            axes.imshow(strip, "gray", vmin=0, vmax=1)
        if name in ("autoencoder", "PCA"):
            losses = np.mean(LOSS(images, x)[0], axis=1)
            centres = (np.arange(len(x)) + 0.5) * dataset.image_shape[1]
            axes.set_xticks(centres, [f"{loss:.4f}" for loss in losses])
    return figure


def finish(run: Run, dataset: Dataset, pca: PCA, pca_loss: float, output: Path) -> None:
    """Draw the plots into output/plots, and print the final test loss. Raises OSError."""
    (output / "training_log.txt").write_text(run.log, encoding="utf-8")  # A kill may have cut it.
    # Ignore the user's matplotlibrc, and print a dollar sign in a directory's name literally.
    with style.context(["default", {"text.parse_math": False}]):
        plot_losses(run.losses, pca_loss, dataset.name).savefig(output / PLOTS[0])
        plot_latent_space(run.model, dataset).savefig(output / PLOTS[1])
        plot_reconstructions(run.model, dataset, pca).savefig(output / PLOTS[2])
    test_loss = mean_loss(run.model.reconstruct, dataset.test_images)
    print(f"test loss: {test_loss:.6f} (PCA: {pca_loss:.6f}); see {output.resolve()}")


# ----------------------------------------------------------------------------------- command line
def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Exits with status 2 if it is invalid."""
    parser = argparse.ArgumentParser(description="Train an autoencoder.", allow_abbrev=False)
    add = parser.add_argument
    names = ("MNIST", "FashionMNIST", "KMNIST", "sample")
    add("--dataset", choices=names, default="MNIST", help="default: MNIST; sample: 5,000 digits")
    text = "where data sets are, in torchvision's layout (default: data; downloads go there only)"
    add("--data-dir", type=Path, default=DATA_DIR, help=text)
    add("--output-dir", type=Path, default=Path(), help="where to write to (default: here)")
    add("--resume", action="store_true", help="continue the run in --output-dir")
    for field in fields(Settings):
        text = f"default: {field.default} (see Settings in the script)"
        add("--" + field.name.replace("_", "-"), type=field.type, default=field.default, help=text)
    args = parser.parse_args(argv)
    positive = (args.epochs, args.batch_size, args.lr, args.decay_fraction, args.max_gradient_norm)
    fractions_fit = args.decay_fraction <= 1 and 0 <= args.momentum < 1
    if min(positive) <= 0 or args.weight_decay < 0 or args.seed < 0 or not fractions_fit:
        text = "epochs, batch size, lr, gradient norm and decay fraction (up to 1) must be positive"
        parser.error(f"{text}, weight decay and seed not negative, momentum from 0 to below 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns 0, or 1 after a failure, 2 for invalid input, 130 after Ctrl-C."""
    args = parse_arguments(argv)
    output = args.output_dir.expanduser()
    socket.setdefaulttimeout(30)  # A download is given up after 30 seconds without data.
    run = None
    try:
        dataset = load_data(args.dataset, args.data_dir)
        args.batch_size = min(args.batch_size, len(dataset.images))
        settings = Settings(*(getattr(args, field.name) for field in fields(Settings)))
        # At most 8 threads, because more do not help, and no more than this process may use.
        threads = min(8, joblib.cpu_count(), *(pool["num_threads"] for pool in threadpool_info()))
        with threadpool_limits(threads, "blas"), np.errstate(all="ignore"):  # train checks the loss
            pca, pca_loss = fit_pca(dataset)
            run = start_run(args.resume, dataset, settings, pca, pca_loss, output)
            print(run.log, end="", flush=True)
            train(run, dataset, settings, output)
            finish(run, dataset, pca, pca_loss, output)
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, OSError, MemoryError, UnicodeError) as error:
        message = f"stopped by {type(error).__name__}: {error}".removesuffix(": ")
        if run and run.losses:
            message += f"; the same command with --resume continues after epoch {len(run.losses)}"
        print(message, file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1


if __name__ == "__main__":
    sys.exit(main())
