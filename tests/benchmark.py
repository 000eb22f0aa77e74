"""Training speed of this script beside PyTorch's, scikit-learn's and the floor.

    python tests/benchmark.py           batch size 128, a few minutes
    python tests/benchmark.py --full    also 64 and 256, an epoch, the time to a loss of 0.0040,
                                        and how time and memory grow with the number of images

Every contender is a process of its own and trains in bursts of 60 steps, in turn with the others
and with a pause after each, since threads go on spinning for a while and disturb the next one. The
ratios are medians over the rounds of the ratio within a round: the machine's own speed drifts.

The floor is the time that the step's floating-point operations take in products of two 1024x1024
float32 matrices. MLPRegressor has the same layers and optimizer, but ReLU, also on the code, and a
linear output, since it offers nothing nearer.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mnist_autoencoder as script  # noqa: E402

STEPS, ROUNDS, PAUSE = 60, 20, 0.1
LR, MOMENTUM = 1.0, 0.9
CONTENDERS = ["this script", "PyTorch eager", "PyTorch compiled", "MLPRegressor", "floor"]


def floating_point_operations(n):
    """Of one step: 2 per weight and image for each product; the first needs no V^T d."""
    pairs = list(zip(script.LAYER_SIZES, script.LAYER_SIZES[1:], strict=False))
    weights = [inputs * outputs for inputs, outputs in pairs]
    return n * (6 * sum(weights) - 2 * weights[0])


def script_step():
    model = script.Autoencoder(0)
    velocity = np.zeros_like(model.parameters)
    return lambda images, lr=LR: script.sgd_step(model, velocity, images, lr, MOMENTUM)


def torch_step(compiled):
    import torch

    layers = []
    for index, weights in enumerate(script.Autoencoder(0).weights):
        layer = torch.nn.Linear(weights.shape[1] - 1, weights.shape[0])
        layer.weight.data = torch.from_numpy(weights[:, :-1].copy())
        torch.nn.init.zeros_(layer.bias)
        layers += [layer, torch.nn.Sigmoid() if index == 5 else torch.nn.ELU()]
    del layers[5]
    network = torch.nn.Sequential(*layers)
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM, fused=True)

    def loss_of(images):
        return torch.nn.functional.mse_loss(network(images), images)

    if compiled:
        loss_of = torch.compile(loss_of)

    def step(images, lr=LR):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = loss_of(torch.from_numpy(images).float().div_(255))
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def mlp_step(n):
    from sklearn.neural_network import MLPRegressor

    settings = {"solver": "sgd", "alpha": 0, "batch_size": n, "learning_rate_init": 0.01}
    hidden = script.LAYER_SIZES[1:-1]
    regressor = MLPRegressor(hidden_layer_sizes=hidden, momentum=0.9, random_state=0, **settings)

    def step(images):
        images = script.scaled(images)
        regressor.partial_fit(images, images)
        return regressor.loss_

    step.regressor = regressor
    return step


def floor_step(n):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 1024, 1024), np.float32)
    out = np.empty_like(a)
    share = floating_point_operations(n) / (2 * 1024**3)

    def burst():
        begin = time.perf_counter()
        for _ in range(20):
            np.matmul(a, b, out=out)
        return (time.perf_counter() - begin) / 20 * share

    return burst


def worker(name, n):
    """Answer each line of standard input with the seconds of a step, the mean of a burst."""
    warnings.simplefilter("ignore")
    images = script.load_data("sample", ROOT).train_images
    order = np.random.default_rng(0).permutation(len(images))
    batches = [images[order[start : start + n]] for start in range(0, len(images) - n + 1, n)]
    if name == "floor":
        burst = floor_step(n)
    else:
        step = {
            "this script": script_step,
            "PyTorch eager": lambda: torch_step(compiled=False),
            "PyTorch compiled": lambda: torch_step(compiled=True),
            "MLPRegressor": lambda: mlp_step(n),
        }[name]()
        first_losses = [float(step(batch)) for batch in batches[:3]]
        if name == "MLPRegressor":
            first_losses = mlp_check(n, batches)

        def burst():
            for index in range(3):
                step(batches[index])
            begin = time.perf_counter()
            for index in range(STEPS):
                rows = order[index % len(batches) * n :][:n]
                step(images[rows])
            return (time.perf_counter() - begin) / STEPS

    burst()
    print(json.dumps(None if name == "floor" else first_losses), flush=True)
    for _ in sys.stdin:
        print(burst(), flush=True)


def mlp_check(n, batches):
    """MLPRegressor's loss of each batch beside one computed from its weights by hand."""
    step = mlp_step(n)
    step(batches[0])
    pairs = []
    for batch in batches[1:3]:
        activations = images = script.scaled(batch).astype(float)
        regressor = step.regressor
        for weights, bias in zip(regressor.coefs_, regressor.intercepts_, strict=True):
            z = activations @ weights + bias
            activations = np.maximum(z, 0)
        pairs.append([float(np.mean((z - images) ** 2) / 2), float(step(batch))])
    return pairs


def start(name, n):
    command = [sys.executable, __file__, "--worker", name, "--batch-size", str(n)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def compare(n):
    """Print the table for one batch size."""
    workers = {name: start(name, n) for name in CONTENDERS}
    losses = {name: json.loads(process.stdout.readline()) for name, process in workers.items()}
    for name in CONTENDERS[:3]:
        np.testing.assert_allclose(losses[name], losses["this script"], rtol=1e-4)
    for by_hand, reported in losses["MLPRegressor"]:
        np.testing.assert_allclose(reported, by_hand, rtol=1e-4)
    time.sleep(1)
    seconds = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name, process in workers.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds[name].append(float(process.stdout.readline()))
            time.sleep(PAUSE)
    for process in workers.values():
        process.stdin.close()
        process.wait()
    mine = np.array(seconds["this script"])
    print(f"\nbatch size {n}; first losses {', '.join(f'{x:.6f}' for x in losses['this script'])}")
    print(f"{'':18}{'images/s':>10}{'ms/step':>9}{'its time / ours':>17}")
    for name in CONTENDERS:
        step = statistics.median(seconds[name])
        ratio = np.median(np.array(seconds[name]) / mine)
        print(f"{name:18}{n / step:10.0f}{step * 1e3:9.2f}{ratio:17.2f}", flush=True)
    faster = np.minimum(seconds["PyTorch eager"], seconds["PyTorch compiled"])
    print(f"the faster PyTorch of each round / ours: {np.median(faster / mine):.2f}", flush=True)


def train_until(step, images, epochs, target):
    """Seconds until an epoch's mean loss is at or below target, and that epoch."""
    steps = -(-len(images) // 128)
    begin = time.perf_counter()
    for epoch in range(epochs):
        order = np.random.default_rng((0, epoch + 1)).permutation(len(images))
        total = 0.0
        for index in range(steps):
            batch = images[order[index * 128 :][:128]]
            lr = script.learning_rate(epoch * steps + index, epochs * steps, script.Settings().lr)
            total += float(step(batch, lr)) * len(batch)
        if total / len(images) <= target:
            break
    return time.perf_counter() - begin, epoch + 1


def peak_memory(start_anew=False):
    """The largest memory of this process in MB, as Linux counts it, so far or from now on."""
    if start_anew:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def long_worker(task, images_or_dir):
    """One epoch, the way to 0.0040, or an epoch of many images; prints seconds and MB."""
    data = script.load_data("mnist", Path(images_or_dir))
    kind, _, rest = task.partition(":")
    images = data.train_images
    if kind == "grow":
        count = int(rest)
        images = np.concatenate([images] * -(-count // len(images)))[:count]
        del data
    before = peak_memory(start_anew=True)  # or reading the data would hide what training takes
    step = torch_step(compiled=False) if rest == "PyTorch" else script_step()
    step(images[:128])
    if kind == "reach":
        found = train_until(step, images, 10, 0.0040)
    else:
        found = train_until(step, images, 1, -1.0)
    print(json.dumps([*found, peak_memory() - before]))


def run_long(task, data_dir):
    command = [sys.executable, __file__, "--worker", task, "--data-dir", str(data_dir)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return json.loads(answer.stdout)


def long_comparisons(data_dir):
    print("\nall of MNIST, batch size 128, three turns each, medians")
    for kind, meaning in (("epoch", "an epoch"), ("reach", "to a training loss of 0.0040")):
        turns = {name: [] for name in ("script", "PyTorch")}
        for _ in range(3):
            for name, found in turns.items():
                found.append(run_long(f"{kind}:{name}", data_dir))
                time.sleep(1)
        for name, found in turns.items():
            seconds, epoch, _ = statistics.median_low(found)
            print(f"{meaning}, {name}: {seconds:.1f} s, epoch {epoch}")
        ratios = [theirs[0] / ours[0] for ours, theirs in zip(*turns.values(), strict=True)]
        print(f"{meaning}, PyTorch's time / ours: {statistics.median(ratios):.2f}", flush=True)
    counts = (6_000, 60_000, 600_000)
    turns = [[run_long(f"grow:{count}", data_dir) for count in counts] for _ in range(3)]
    for index, count in enumerate(counts):
        times = [turn[index][0] / count for turn in turns]
        growth = [turn[index][0] / count * 60_000 / turn[1][0] for turn in turns]
        memory = max(turn[index][2] for turn in turns)
        print(
            f"an epoch of {count} images: {statistics.median(times) * 1e6:.1f} us an image, "
            f"{statistics.median(growth):.2f} times that of 60000 in the same turn; peak memory "
            f"{memory:.0f} MB above that of libraries and data",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="all comparisons; needs all of MNIST")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="holds MNIST/raw")
    parser.add_argument("--batch-size", type=int, default=128, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker in CONTENDERS:
        worker(arguments.worker, arguments.batch_size)
    elif arguments.worker:
        long_worker(arguments.worker, arguments.data_dir)
    else:
        import torch

        print(
            f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
            f"NumPy {np.__version__}, PyTorch {torch.__version__}",
            flush=True,
        )
        for n in (128, 64, 256) if arguments.full else (128,):
            compare(n)
        if arguments.full:
            long_comparisons(arguments.data_dir)


if __name__ == "__main__":
    main()
