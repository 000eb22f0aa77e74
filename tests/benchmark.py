"""This script beside PyTorch, scikit-learn and the floor; medians of ratios within a turn.

    python tests/benchmark.py step      a training step on the sample, a few minutes
    python tests/benchmark.py race      to a loss of 0.0040 and beyond, half an hour
    python tests/benchmark.py growth    time and memory with 6,000 to 600,000 images (Linux)

The last two need all of MNIST, in data or in the folder that --data-dir names. The contenders take
turns, each in a process of its own, since a machine's speed drifts: only ratios mean something.
A step has the same network, start, data and optimizer everywhere, but MLPRegressor has ReLU, a
linear output and no clipping; the floor is the time of its floating-point operations in products
of 1024x1024 matrices. The usual recipe is that of most tutorials, nn.Linear's own start, ReLU, Adam
at 1e-3, 128 images a step, with a constant rate or a cosine; its time is without the test loss.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mnist_autoencoder as script  # noqa: E402

STEPS, ROUNDS, LR, MOMENTUM, DECAY, TARGET = 60, 20, 1.0, 0.98, 1e-7, 0.0040
CONTENDERS = ("this script", "PyTorch eager", "PyTorch compiled", "MLPRegressor", "floor")


def new_run(images, **settings):
    model = script.Autoencoder(images.mean(axis=0) / 255)
    return script.Run({"seed": 0, **settings}, model, np.zeros_like(model.parameters), [])


def torch_network(activation):
    import torch

    layers = []
    for inputs, outputs in pairwise(script.LAYER_SIZES):
        layers += [torch.nn.Linear(inputs, outputs), activation()]
    layers[-1] = torch.nn.Sigmoid()
    del layers[5]  # the code is linear
    return torch.nn.Sequential(*layers)


def torch_step(images, compiled):
    import torch

    model = script.Autoencoder(images.mean(axis=0) / 255)
    network, mean = torch_network(torch.nn.ELU), torch.tensor(model.mean_image)
    linear = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
    for layer, weights, biases in zip(linear, model.weights, model.biases, strict=True):
        layer.weight.data, layer.bias.data = torch.tensor(weights.T.copy()), torch.tensor(biases)
    settings = {"lr": LR, "momentum": MOMENTUM, "nesterov": True, "weight_decay": DECAY}
    optimizer = torch.optim.SGD(network.parameters(), **settings, fused=True)

    def loss_of(x):
        return torch.nn.functional.mse_loss(network(x - mean), x)

    if compiled:
        loss_of = torch.compile(loss_of)

    def step(batch):
        optimizer.zero_grad()
        loss = loss_of(torch.from_numpy(batch).float().div_(255))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), script.CLIP_NORM)
        optimizer.step()
        return loss.item()

    return step


def contender(name, images):
    """A function that takes a training step with a mini-batch and returns its loss."""
    if name == "this script":
        run = new_run(images, momentum=MOMENTUM)
        return lambda batch: script.sgd_step(run, script.scaled(batch), LR, DECAY)
    if name.startswith("PyTorch"):
        return torch_step(images, name.endswith("compiled"))
    from sklearn.neural_network import MLPRegressor

    settings = {"solver": "sgd", "alpha": DECAY, "batch_size": 128, "momentum": MOMENTUM}
    settings["hidden_layer_sizes"] = script.LAYER_SIZES[1:-1]
    network = MLPRegressor(learning_rate_init=0.01, **settings)
    return lambda batch: network.partial_fit(*[script.scaled(batch)] * 2).loss_


def floor_seconds():
    """Of a step: 6 operations a weight and image, less the first layer's delta."""
    sizes = [inputs * outputs for inputs, outputs in pairwise(script.LAYER_SIZES)]
    a, b, out = np.random.default_rng(0).standard_normal((3, 1024, 1024), np.float32)
    begin = time.perf_counter()
    for _ in range(20):
        np.matmul(a, b, out=out)
    seconds = (time.perf_counter() - begin) / 20
    return seconds * 128 * (6 * sum(sizes) - 2 * sizes[0]) / (2 * 1024**3)


def step_worker(name):
    """Print the first losses; then answer each line with the seconds of a step in a burst."""
    images = script.load_data("sample", ROOT)[1]
    order = np.random.default_rng(0).permutation(len(images) // 128 * 128).reshape(-1, 128)
    if name != "floor":
        step = contender(name, images)
        print(json.dumps([step(images[rows]) for rows in order[:3]]), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        for index in range(STEPS * (name != "floor")):
            step(images[order[index % len(order)]])
        seconds = (time.perf_counter() - begin) / STEPS
        print(floor_seconds() if name == "floor" else seconds, flush=True)


def worker(*arguments):
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, **pipes, text=True)


def answer(*arguments):
    return json.loads(worker(*arguments).communicate()[0].splitlines()[-1])


def compare_steps(_):
    workers = {name: worker("step", name) for name in CONTENDERS}
    losses = [json.loads(workers[name].stdout.readline()) for name in CONTENDERS[:4]]
    np.testing.assert_allclose(losses[1:3], losses[:1] * 2, rtol=1e-3)
    seconds = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS + 1):  # the first is to warm up
        for name, process in workers.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds[name].append(float(process.stdout.readline()))
            time.sleep(0.1)  # threads go on spinning after a burst
    print(f"{'':18}{'images/s':>10}{'its time / ours':>17}")
    for name, found in seconds.items():
        found, ours = np.array(found[1:]), np.array(seconds["this script"][1:])
        print(f"{name:18}{128 / np.median(found):10.0f}{np.median(found / ours):17.2f}")


def script_epochs(images, test_images, epochs):
    """Yields training loss, test loss and training seconds so far, after each epoch."""
    lr = script.peak_learning_rate(128)
    run = new_run(images, epochs=epochs, batch_size=128, lr=lr, momentum=MOMENTUM)
    for _ in script.train(run, images, test_images, 1.0):
        yield *run.history[-1][:2], sum(row[2] for row in run.history)


def usual_epochs(images, test_images, epochs, cosine, target):
    """The same of the usual recipe, up to the epoch with a training loss of `target`."""
    import torch

    torch.manual_seed(0)
    network, seconds, steps = torch_network(torch.nn.ReLU), 0.0, epochs * -(-len(images) // 128)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cosine else None
    x_test, loss = torch.from_numpy(script.scaled(test_images)), torch.nn.MSELoss()
    for _ in range(epochs):
        begin, total = time.perf_counter(), 0.0
        for rows in torch.randperm(len(images)).split(128):
            x = torch.from_numpy(images)[rows].float().div_(255)
            optimizer.zero_grad()
            error = loss(network(x), x)
            error.backward()
            optimizer.step()
            if schedule:
                schedule.step()
            total += error.item() * len(x) / len(images)
        seconds += time.perf_counter() - begin
        with torch.no_grad():
            yield total, loss(network(x_test), x_test).item(), seconds
        if total <= target:
            return


def race_worker(data_dir, name, epochs, target):
    _, images, test_images, _ = script.load_data("mnist", Path(data_dir))
    if name == "ours":
        rows = script_epochs(images, test_images, int(epochs))
    else:
        rows = usual_epochs(images, test_images, int(epochs), name == "cosine", float(target))
    print(json.dumps(list(rows)))


def show(name, rows):
    """Print the last epoch; return the seconds until an epoch's training loss was <= TARGET."""
    reached = next((seconds for loss, _, seconds in rows if loss <= TARGET), np.inf)
    text = "epoch {:3}, {:.6f} / {:.6f}, {:5.1f} s".format(len(rows), *rows[-1])
    print(f"{name:32}{text}, {TARGET} after {reached:.1f} s", flush=True)
    return reached


def race(data_dir):
    ratios = []
    for epochs, target in ((60, TARGET), (60, TARGET), (100, 0)):
        ours = answer("race", data_dir, "ours", 10, 0)
        usual = answer("race", data_dir, "usual", epochs, target)
        fit = sum(row[2] <= ours[-1][2] for row in usual)  # epochs in the time of our ten
        own, other = show("ours", ours), show("usual", usual)
        show("usual, in our time", usual[:fit])
        show("cosine, in our time", answer("race", data_dir, "cosine", fit, 0))
        cosine = show("cosine over 20 epochs", answer("race", data_dir, "cosine", 20, 0))
        ratios.append([other / own, cosine / own, usual[9][2] / ours[9][2]])
    print("usual, cosine, ten epochs / ours:", np.median(ratios, axis=0).round(2), flush=True)
    for count in (10, 20, 100):
        show("usual", usual[:count])


def growth_worker(data_dir, count):
    images = script.load_data("mnist", Path(data_dir))[1]
    images = np.concatenate([images] * -(-int(count) // len(images)))[: int(count)]
    Path("/proc/self/clear_refs").write_text("5")  # count the peak anew

    def peak():
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

    before = peak()
    seconds = [row[2] for row in script_epochs(images, images[:2], 1)]
    print(json.dumps([seconds[0], peak() - before]))


def growth(data_dir):
    counts = (6_000, 60_000, 600_000)
    turns = np.array([[answer("growth", data_dir, count) for count in counts] for _ in range(3)])
    for index, count in enumerate(counts):
        ratio = np.median(turns[:, index, 0] / count * 60_000 / turns[:, 1, 0])
        memory = turns[:, index, 1].max()
        print(f"{count} images: {ratio:.2f} times 60,000's time an image, {memory:.0f} MB")


def main():
    jobs = {"step": compare_steps, "race": race, "growth": growth}
    if sys.argv[1:2] == ["--worker"]:
        return globals()[f"{sys.argv[2]}_worker"](*sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=jobs)
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="holds MNIST/raw")
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, NumPy {np.__version__}", flush=True)
    jobs[arguments.what](arguments.data_dir)


if __name__ == "__main__":
    main()
