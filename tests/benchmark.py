"""The script beside PyTorch and scikit-learn.

    python tests/benchmark.py step      a training step, on the sample (some minutes)
    python tests/benchmark.py race      losses and times of several recipes (half an hour)
    python tests/benchmark.py growth    time and memory for 6,000 to 600,000 images (Linux)

`race` and `growth` need all of MNIST, in `data` or where --data-dir says. Nothing else should run
meanwhile. As the speed of machines drifts, contenders take turns, and times are ratios in a turn.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mnist_autoencoder as script  # noqa: E402

SETTINGS = script.Settings(epochs=10)
DECAY = SETTINGS.weight_decay / 60_000
SEEDS = (0, 1, 2)
TARGET = 0.0040  # the test loss to which epochs and time are counted
OURS = "this script"
USUAL = "usual recipe in PyTorch"
SAME = "the same recipe in PyTorch"
ADAM_RATES = {f"the same with Adam, {rate:g}": rate for rate in (5e-4, 1e-3, 2e-3, 4e-3)}
WARM_UP = 1000  # steps in which Adam's rate rises; without them, its losses are a tenth higher
BURST = 60  # steps
ROUNDS = 20


def worker(*arguments):
    """Start a process that runs one of this file's workers."""
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, **pipes, text=True)


def answer(*arguments):
    """What a worker prints at last, as JSON."""
    return json.loads(worker(*arguments).communicate()[0].splitlines()[-1])


def median_and_range(values):
    return f"{np.median(values):.2f} | {np.min(values):.2f} to {np.max(values):.2f}"


# PyTorch. ----------------------------------------------------------------------------------------
def usual_network():
    """ReLU, a sigmoid and nn.Linear's own initial weights; the input is not centred."""
    layers = []
    for layer in script.LAYERS:
        layers += [torch.nn.Linear(layer.inputs, layer.outputs), torch.nn.ReLU()]
    layers[-1] = torch.nn.Sigmoid()
    del layers[5]  # the latent code is linear
    return torch.nn.Sequential(*layers), torch.zeros(784)


def same_network(images, seed):
    """The script's network with the same initial weights, and its mean image."""
    model = script.Autoencoder(images.mean(axis=0) / 255, seed)
    layers = []
    all_weights, all_biases = model.split(model.parameters)
    for weights, biases in zip(all_weights, all_biases, strict=True):
        linear = torch.nn.Linear(*weights.shape)
        linear.weight.data = torch.tensor(weights.T.copy())
        linear.bias.data = torch.tensor(biases)
        layers += [linear, torch.nn.ELU()]
    layers[-1] = torch.nn.Hardtanh(0, 1)
    del layers[5]
    return torch.nn.Sequential(*layers), torch.tensor(model.mean_image)


def same_optimizer(network):
    options = {"momentum": SETTINGS.momentum, "nesterov": True, "weight_decay": DECAY}
    return torch.optim.SGD(network.parameters(), SETTINGS.learning_rate, fused=True, **options)


def torch_step(network, mean, optimizer, max_norm=None, compiled=False):
    """A function that takes a training step on uint8 images and returns their loss before it."""

    def loss_of(pixels):
        return torch.nn.functional.mse_loss(network(pixels - mean), pixels)

    if compiled:
        loss_of = torch.compile(loss_of)

    def step(batch):
        optimizer.zero_grad()
        loss = loss_of(torch.from_numpy(batch).float().div_(255))
        loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        optimizer.step()
        return loss.item()

    return step


# A training step. --------------------------------------------------------------------------------
def script_step(images):
    model = script.Autoencoder(images.mean(axis=0) / 255)
    velocity = np.zeros_like(model.parameters)
    rates = (SETTINGS.learning_rate, SETTINGS.momentum, SETTINGS.max_gradient_norm, DECAY)

    def step(batch):
        pixels = script.to_pixels(batch)
        activations = model.forward(pixels)
        gradient = model.backward(activations, pixels)
        script.sgd_step(model.parameters, velocity, gradient, *rates)
        return script.mean_squared_error(activations[-1], pixels)

    return step


def eager_step(images, compiled=False):
    network, mean = same_network(images, seed=0)
    return torch_step(network, mean, same_optimizer(network), SETTINGS.max_gradient_norm, compiled)


def sklearn_step(images):
    from sklearn.neural_network import MLPRegressor

    sizes = [layer.outputs for layer in script.LAYERS[:-1]]
    options = {"learning_rate_init": 0.01, "momentum": SETTINGS.momentum, "alpha": DECAY}
    network = MLPRegressor(hidden_layer_sizes=sizes, solver="sgd", batch_size=128, **options)

    def step(batch):
        pixels = script.to_pixels(batch)
        return network.partial_fit(pixels, pixels).loss_

    return step


STEPS = {
    OURS: script_step,
    "PyTorch eager": eager_step,
    "PyTorch compiled": partial(eager_step, compiled=True),
    "MLPRegressor (ReLU, linear output, no clipping)": sklearn_step,
}


def step_worker(name):
    """Print the first losses, then answer every line with the seconds per step in a burst."""
    images = script.load_data("sample", ROOT).images
    batches = np.random.default_rng(0).permutation(images)[:3840].reshape(-1, 128, 784)
    step = STEPS[name](images)
    print(json.dumps([step(batch) for batch in batches[:3]]), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        for index in range(BURST):
            step(batches[index % len(batches)])
        print((time.perf_counter() - begin) / BURST, flush=True)


def compare_steps(_):
    workers = {name: worker("step", name) for name in STEPS}
    losses = {name: json.loads(process.stdout.readline()) for name, process in workers.items()}
    for name in ("PyTorch eager", "PyTorch compiled"):
        np.testing.assert_allclose(losses[name], losses[OURS], rtol=1e-3)
    seconds = {name: [] for name in STEPS}
    for _ in range(ROUNDS + 1):
        for name, process in workers.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds[name].append(float(process.stdout.readline()))
            time.sleep(0.1)  # BLAS threads spin for a while after a burst
    print("| a training step | time / this script's | range |\n|---|---|---|")
    for name in STEPS:  # The first round is a warm-up.
        ratios = np.divide(seconds[name][1:], seconds[OURS][1:])
        print(f"| {name} | {median_and_range(ratios)} |")


# The race. ---------------------------------------------------------------------------------------
def script_epochs(images, test_pixels, seed, _, epochs=SETTINGS.epochs):
    """Yield the training loss, the test loss and the seconds of training of every epoch."""
    settings = replace(SETTINGS, seed=seed, epochs=epochs)
    model = script.Autoencoder(images.mean(axis=0) / 255, seed)
    velocity = np.zeros_like(model.parameters)
    for epoch in range(1, epochs + 1):
        begin = time.perf_counter()
        loss = script.train_epoch(model, velocity, images, epoch, settings)
        seconds = time.perf_counter() - begin
        outputs = model.forward(test_pixels)[-1]
        yield loss, script.mean_squared_error(outputs, test_pixels), seconds


def torch_epochs(images, test_pixels, seed, name):
    """The same of a recipe in PyTorch; the usual one goes on until it reaches the target."""
    torch.set_flush_denormal(True)  # as the usual recipe slows down by subnormal numbers
    torch.manual_seed(seed)
    network, mean = usual_network() if name == USUAL else same_network(images, seed)
    optimizer = torch.optim.Adam(network.parameters(), ADAM_RATES.get(name, 1e-3), fused=True)
    step = torch_step(network, mean, optimizer)
    if name == SAME:
        optimizer = same_optimizer(network)
        step = torch_step(network, mean, optimizer, SETTINGS.max_gradient_norm)
    peak = optimizer.param_groups[0]["lr"]
    x_test = torch.from_numpy(test_pixels)
    starts = range(0, len(images), SETTINGS.batch_size)
    total_steps = SETTINGS.epochs * len(starts)
    test_loss = np.inf
    for epoch in range(1, 100):
        if epoch > SETTINGS.epochs and (name != USUAL or test_loss <= TARGET):
            return
        begin = time.perf_counter()
        order = np.random.default_rng((seed, epoch)).permutation(len(images))
        loss_sum = 0.0
        for count, start in enumerate(starts, (epoch - 1) * len(starts)):
            if name != USUAL:
                rate = script.scheduled_learning_rate(count, total_steps, peak)
                warm_up = min(1, (count + 1) / WARM_UP) if name in ADAM_RATES else 1
                optimizer.param_groups[0]["lr"] = rate * warm_up
            batch = images[order[start : start + SETTINGS.batch_size]]
            loss_sum += step(batch) * len(batch)
        seconds = time.perf_counter() - begin
        with torch.no_grad():
            test_loss = torch.nn.functional.mse_loss(network(x_test - mean), x_test).item()
        yield loss_sum / len(images), test_loss, seconds


def race_worker(data_dir, seed, name):
    dataset = script.load_data("mnist", Path(data_dir))
    epochs = script_epochs if name == OURS else torch_epochs
    test_pixels = script.to_pixels(dataset.test_images)
    print(json.dumps(list(epochs(dataset.images, test_pixels, int(seed), name))))


def race(data_dir):
    names = [OURS, SAME, *ADAM_RATES, USUAL]
    results = {name: [] for name in names}
    for seed in SEEDS:
        for name in names:
            rows = np.array(answer("race", data_dir, seed, name))
            needed = 1 + int(np.flatnonzero(rows[:, 1] <= TARGET)[0])  # epochs to the target
            results[name].append([*rows[9, :2], needed, sum(rows[:needed, 2]), sum(rows[:10, 2])])
    head = "| recipe | training loss | test loss | epochs | time | range | time of ten | range |"
    print(f"{head}\n{'|---' * 8}|")
    for name in names:
        values = np.array(results[name])
        means = values.mean(axis=0)
        deviations = values.std(axis=0, ddof=1)
        losses = " | ".join(f"{means[i]:.6f} ± {deviations[i]:.6f}" for i in range(2))
        needed = f"{values[:, 2].min():.0f} to {values[:, 2].max():.0f}"
        to_target, to_ten = (values[:, 3:] / np.array(results[OURS])[:, 3:]).T
        times = f"{median_and_range(to_target)} | {median_and_range(to_ten)}"
        print(f"| {name} | {losses} | {needed} | {times} |")


# Growth. -----------------------------------------------------------------------------------------
def growth_worker(data_dir, count):
    """Print the seconds of an epoch, and the MB by which it raises the peak of the memory."""
    dataset = script.load_data("mnist", Path(data_dir))
    images = np.resize(dataset.images, (int(count), 784))
    test_pixels = script.to_pixels(dataset.test_images[:2])
    Path("/proc/self/clear_refs").write_text("5")  # count the peak anew

    def peak():
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

    before = peak()
    ((_, _, seconds),) = script_epochs(images, test_pixels, 0, OURS, epochs=1)
    print(json.dumps([seconds, peak() - before]))


def growth(data_dir):
    counts = (6_000, 60_000, 600_000)
    turns = np.array([[answer("growth", data_dir, count) for count in counts] for _ in range(3)])
    print("| images | time per image / that of 60,000 | range | peak memory |\n|---|---|---|---|")
    for index, count in enumerate(counts):
        ratios = turns[:, index, 0] / count * 60_000 / turns[:, 1, 0]
        print(f"| {count} | {median_and_range(ratios)} | {turns[:, index, 1].max():.0f} MB |")


def main():
    jobs = {"step": compare_steps, "race": race, "growth": growth}
    workers = {"step": step_worker, "race": race_worker, "growth": growth_worker}
    if sys.argv[1:2] == ["--worker"]:
        return workers[sys.argv[2]](*sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=jobs)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="holds MNIST/raw")
    arguments = parser.parse_args()
    jobs[arguments.what](arguments.data_dir)
    versions = f"torch {version('torch')}, scikit-learn {version('scikit-learn')}"
    print(f"{script.describe_machine(script.number_of_threads())}, {versions}")


if __name__ == "__main__":
    main()
