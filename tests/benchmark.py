"""The script beside PyTorch and scikit-learn.

    python tests/benchmark.py step      a training step, on the sample (some minutes)
    python tests/benchmark.py growth    time and memory for 6,000 to 600,000 images (Linux)
    python tests/benchmark.py race      losses and times of several recipes (hours)

`growth` and `race` need MNIST, in `data` or where --data-dir says. Nothing else should run
meanwhile. As the speed of machines drifts, contenders take turns, and times are ratios in a turn.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

try:
    import resource  # on Linux and macOS
except ModuleNotFoundError:
    resource = None

import numpy as np
import torch
from recipe import ROOT, load_mnist, print_head, print_machine, print_row, script, script_conditions

SETTINGS = script.Settings()
OURS = "this script"
SAME = "the same recipe in PyTorch"
COMMON = "a common recipe"
FULL_RACE = 10  # epochs of the race with all contenders
FULL_RACE_ADAMS = [f"{rate}/{size}" for size in (128, 256) for rate in (25e-5, 5e-4, 1e-3, 2e-3)]
TARGET = 0.0040  # the test loss to which a full race counts epochs and time
BURST = 60  # steps
ROUNDS = 20


def start(*arguments):
    """Start a process that runs one of this file's workers."""
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(*arguments):
    """What a worker prints at last, as JSON."""
    return json.loads(start(*arguments).communicate()[0].splitlines()[-1])


def median_and_range(ratios):
    text = f"{np.median(ratios):.2f}"
    if np.ptp(ratios) > 0:
        text += f" ({np.min(ratios):.2f} to {np.max(ratios):.2f})"
    return text


# PyTorch. ----------------------------------------------------------------------------------------
def common_network():
    """ReLU, a sigmoid and nn.Linear's own initial weights; the input is not centred."""
    layers = []
    for layer in script.LAYERS:
        layers += [torch.nn.Linear(layer.inputs, layer.outputs), torch.nn.ReLU()]
    layers[-1] = torch.nn.Sigmoid()
    del layers[5]  # the latent code is linear
    return torch.nn.Sequential(*layers), torch.zeros(784)


def torch_network(model):
    """The network of a model with the same parameters, made of PyTorch's own layers."""
    layers = []
    for weights, biases in zip(*model.split(model.parameters), strict=True):
        linear = torch.nn.Linear(*weights.shape)
        linear.weight.data = torch.tensor(weights.T.copy())
        linear.bias.data = torch.tensor(biases)
        layers += [linear, torch.nn.ELU()]
    layers[-1] = torch.nn.Hardtanh(0, 1)
    del layers[5]  # the latent code is linear
    return torch.nn.Sequential(*layers)


def same_network(images, seed):
    """The script's network with the same initial weights, and its mean image."""
    model = script.Autoencoder(images.mean(axis=0) / 255, seed)
    return torch_network(model), torch.tensor(model.mean_image)


def same_optimizer(network, image_count, settings):
    options = {"lr": settings.learning_rate, "momentum": settings.momentum, "nesterov": True}
    weight_decay = settings.weight_decay / image_count
    return torch.optim.SGD(network.parameters(), weight_decay=weight_decay, fused=True, **options)


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
    weight_decay = SETTINGS.weight_decay / len(images)
    model = script.Autoencoder(images.mean(axis=0) / 255)
    velocity = np.zeros_like(model.parameters)

    def step(batch):
        pixels = script.to_pixels(batch)
        activations, derivatives = model.forward(pixels)
        difference = activations[-1] - pixels
        loss = float(np.mean(np.square(difference)))
        gradient = model.backward(activations, derivatives, difference)
        rate = SETTINGS.learning_rate
        script.sgd_step(model.parameters, velocity, gradient, rate, weight_decay, SETTINGS)
        return loss

    return step


def eager_step(images, compiled=False):
    network, mean = same_network(images, seed=0)
    optimizer = same_optimizer(network, len(images), SETTINGS)
    return torch_step(network, mean, optimizer, SETTINGS.max_gradient_norm, compiled)


def sklearn_step(images):
    from sklearn.neural_network import MLPRegressor

    sizes = [layer.outputs for layer in script.LAYERS[:-1]]
    options = {"learning_rate_init": 0.01, "momentum": SETTINGS.momentum, "solver": "sgd"}
    alpha = SETTINGS.weight_decay / len(images)
    size = SETTINGS.batch_size
    network = MLPRegressor(hidden_layer_sizes=sizes, batch_size=size, alpha=alpha, **options)

    def step(batch):
        pixels = script.to_pixels(batch)
        return network.partial_fit(pixels, pixels).loss_

    return step


EAGER = "PyTorch, eager"
COMPILED = "PyTorch, compiled"
STEPS = {
    OURS: script_step,
    EAGER: eager_step,
    COMPILED: partial(eager_step, compiled=True),
    "scikit-learn's `MLPRegressor` (ReLU, linear output, no gradient clipping)": sklearn_step,
}


def warm_up():
    """Free a large array, as a run does with the test images of MNIST before it trains.

    Freeing one of up to 32 MB makes glibc keep as much memory. Otherwise, it would return the
    temporary arrays of every step to the system, and each step would begin with page faults.
    """
    script.to_pixels(np.zeros((10_000, script.IMAGE_SIZE), np.uint8))


def page_faults():
    """How many pages the system has given to this process, where it counts them."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


def step_worker(name):
    """Print the first losses, then answer every line with a step's seconds and page faults."""
    images = script.load_data("sample", None).images
    size = SETTINGS.batch_size
    chosen = np.random.default_rng(0).permutation(images)[: len(images) // size * size]
    batches = chosen.reshape(-1, size, images.shape[1])
    step = STEPS[name](images)
    warm_up()
    print(json.dumps([step(batch) for batch in batches[:3]]), flush=True)
    for _ in sys.stdin:
        faults = page_faults()
        begin = time.perf_counter()
        for index in range(BURST):
            step(batches[index % len(batches)])
        seconds = time.perf_counter() - begin
        print(json.dumps([seconds / BURST, (page_faults() - faults) / BURST]), flush=True)


def compare_steps(_):
    workers = {name: start("step", name) for name in STEPS}
    losses = {name: json.loads(process.stdout.readline()) for name, process in workers.items()}
    for name in (EAGER, COMPILED):
        np.testing.assert_allclose(losses[name], losses[OURS], rtol=1e-3)
    seconds = {name: [] for name in STEPS}
    faults = {name: [] for name in STEPS}
    for _ in range(ROUNDS + 1):
        for name, process in workers.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            burst_seconds, burst_faults = json.loads(process.stdout.readline())
            seconds[name].append(burst_seconds)
            faults[name].append(burst_faults)
            time.sleep(0.1)  # BLAS threads spin for a while after a burst
    print_head("a training step", "time", "page faults")
    for name in STEPS:  # The first round is a warm-up.
        ratios = np.divide(seconds[name][1:], seconds[OURS][1:])
        print_row(name, median_and_range(ratios), f"{np.median(faults[name][1:]):.0f}")
    print_machine("torch", "scikit-learn")


# Growth. -----------------------------------------------------------------------------------------
def growth_worker(data_dir, count):
    """Print the seconds of an epoch, and the MB by which it raises the peak of the memory."""
    dataset = script.load_data("mnist", Path(data_dir))
    warm_up()
    images = np.resize(dataset.images, (int(count), 784))
    test_images = dataset.test_images[:2]
    Path("/proc/self/clear_refs").write_text("5")  # count the peak anew

    def peak():
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

    before = peak()
    ((_, _, seconds),) = script_epochs(images, test_images, replace(SETTINGS, epochs=1))
    print(json.dumps([seconds, peak() - before]))


def growth(arguments):
    counts = (6_000, 60_000, 600_000)
    turns = [[answer("growth", arguments.data_dir, n) for n in counts] for _ in range(3)]
    seconds, memory = np.moveaxis(turns, 2, 0)
    title = "time per image, relative to 60,000 images"
    print_head("training images", title, "memory that training adds to the data")
    for index, count in enumerate(counts):
        ratios = seconds[:, index] / count * 60_000 / seconds[:, 1]
        print_row(f"{count:,}", median_and_range(ratios), f"{memory[:, index].max():.0f} MB")
    print_machine()


# The race. ---------------------------------------------------------------------------------------
def script_epochs(images, test_images, settings):
    """Yield the training loss, the test loss and the seconds of training of every epoch."""
    model = script.Autoencoder(images.mean(axis=0) / 255, settings.seed)
    velocity = np.zeros_like(model.parameters)
    for epoch in range(1, settings.epochs + 1):
        begin = time.perf_counter()
        loss = script.train_epoch(model, velocity, images, epoch, settings)
        seconds = time.perf_counter() - begin
        yield loss, script.reconstruction_loss(model, test_images), seconds


def rival_rate(recipe, step, total_steps, settings, adam_warm_up):
    """The learning rate of a step of a rival."""
    if recipe == COMMON:
        return settings.learning_rate
    rate = script.scheduled_learning_rate(step, total_steps, settings)
    if recipe == SAME:
        return rate
    return rate * min(1, (step + 1) / (adam_warm_up * total_steps))


def rival_epochs(images, test_images, settings, recipe, adam_warm_up):
    """The same of SAME, COMMON or Adam, whose recipe is given as "rate/batch size"."""
    torch.set_flush_denormal(True)  # as subnormal numbers slow the common recipe down
    torch.manual_seed(settings.seed)
    network, mean = same_network(images, settings.seed)
    if recipe == SAME:
        optimizer = same_optimizer(network, len(images), settings)
        step = torch_step(network, mean, optimizer, settings.max_gradient_norm)
    else:
        rate, size = (0.001, 128) if recipe == COMMON else recipe.split("/")
        if recipe == COMMON:
            network, mean = common_network()
        settings = replace(settings, learning_rate=float(rate), batch_size=int(size))
        optimizer = torch.optim.Adam(network.parameters(), settings.learning_rate, fused=True)
        step = torch_step(network, mean, optimizer)
    x_test = torch.from_numpy(script.to_pixels(test_images))
    starts = range(0, len(images), settings.batch_size)
    total_steps = settings.epochs * len(starts)
    goes_on = recipe == COMMON and settings.epochs == FULL_RACE
    test_loss = np.inf
    epoch = 0
    while epoch < settings.epochs or (goes_on and test_loss > TARGET and epoch < 100):
        epoch += 1
        begin = time.perf_counter()
        order = np.random.default_rng((settings.seed, epoch)).permutation(len(images))
        loss_sum = 0.0
        for count, first in enumerate(starts, (epoch - 1) * len(starts)):
            rate = rival_rate(recipe, count, total_steps, settings, adam_warm_up)
            optimizer.param_groups[0]["lr"] = rate
            batch = images[order[first : first + settings.batch_size]]
            loss_sum += step(batch) * len(batch)
        seconds = time.perf_counter() - begin
        with torch.no_grad():
            test_loss = torch.nn.functional.mse_loss(network(x_test - mean), x_test).item()
        yield loss_sum / len(images), test_loss, seconds


def race_worker(data_dir, epochs, adam_warm_up, seed, recipe):
    dataset = script.load_data("mnist", Path(data_dir))
    warm_up()
    settings = replace(SETTINGS, epochs=int(epochs), seed=int(seed))
    run = (dataset.images, dataset.test_images, settings)
    other = partial(rival_epochs, recipe=recipe, adam_warm_up=float(adam_warm_up))
    rows = script_epochs(*run) if recipe == OURS else other(*run)
    print(json.dumps(list(rows)))


def loss_and_deviation(losses):
    if len(losses) == 1:
        return f"{losses[0]:.6f}"
    return f"{np.mean(losses):.6f} ± {np.std(losses, ddof=1):.6f}"


def row_name(recipe):
    if "/" not in recipe:
        return recipe
    rate, size = recipe.split("/")
    return f"the same network with Adam, rate {float(rate):g}, batch size {size}"


def target_cells(results, ours):
    """The epochs that each run needs for the target, and their time relative to the script's."""
    needed = []
    seconds = []
    for rows in (*results, *ours):
        reached = np.flatnonzero(rows[:, 1] <= TARGET)
        if len(reached) == 0:
            return "not reached", "not reached"
        needed.append(reached[0] + 1)
        seconds.append(rows[: needed[-1], 2].sum())
    count = len(results)
    fewest, most = min(needed[:count]), max(needed[:count])
    epochs = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return epochs, median_and_range(np.divide(seconds[:count], seconds[count:]))


def race(arguments):
    full = arguments.epochs == FULL_RACE
    recipes = [OURS, *arguments.adams.split(","), COMMON]
    columns = ["recipe", "training loss", "test loss", "time"]
    if full:
        recipes = [OURS, SAME, *FULL_RACE_ADAMS, COMMON]
        columns += [f"epochs to test loss {TARGET:.4f}", "time to it"]
    rivals_seeds = arguments.rivals_seeds or arguments.seeds
    options = (arguments.data_dir, arguments.epochs, arguments.warm_up)
    results = {recipe: [] for recipe in recipes}
    for seed in range(arguments.seeds):
        for recipe in recipes if seed < rivals_seeds else [OURS]:
            results[recipe].append(np.array(answer("race", *options, seed, recipe)))
    print_head(*columns)
    for recipe, runs in results.items():
        last = np.array([rows[arguments.epochs - 1] for rows in runs])
        ours = results[OURS][: len(runs)]
        cells = [loss_and_deviation(last[:, 0]), loss_and_deviation(last[:, 1])]
        seconds = [[rows[: arguments.epochs, 2].sum() for rows in turn] for turn in (runs, ours)]
        cells.append("1" if recipe == OURS else median_and_range(np.divide(*seconds)))
        if full:
            epochs, ratio = target_cells(runs, ours)
            cells += [epochs, "1" if recipe == OURS else ratio]
        print_row(row_name(recipe), *cells)
    print_machine("torch")


def main():
    jobs = {"step": compare_steps, "growth": growth, "race": race}
    workers = {"step": step_worker, "growth": growth_worker, "race": race_worker}
    if sys.argv[1:2] == ["--worker"]:
        with script_conditions():
            return workers[sys.argv[2]](*sys.argv[3:])
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=jobs)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="holds MNIST/raw")
    parser.add_argument("--epochs", type=int, default=FULL_RACE, help="of `race` (default: 10)")
    parser.add_argument("--seeds", type=int, default=3, help="of `race` (default: 3)")
    text = "of these, those that other recipes than the script's run (default: all)"
    parser.add_argument("--rivals-seeds", type=int, help=text)
    text = "fraction of a run in which Adam's rate rises (default: 0.2)"
    parser.add_argument("--warm-up", type=float, default=0.2, help=text)
    text = "rates/batch sizes of Adam, if --epochs is not 10 (default: 0.001/128,0.0005/128)"
    parser.add_argument("--adams", default="0.001/128,0.0005/128", help=text)
    arguments = parser.parse_args()
    if arguments.what != "step":
        load_mnist(parser, arguments.data_dir)  # It may have to be downloaded.
    with script_conditions():
        jobs[arguments.what](arguments)


if __name__ == "__main__":
    main()
