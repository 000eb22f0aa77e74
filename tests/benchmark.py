"""The script beside PyTorch: the time of an epoch, and the losses of other recipes.

    python tests/benchmark.py step    on the sample, in turns (some minutes; run nothing else)
    python tests/benchmark.py race    on MNIST, after --epochs 10 or more (up to hours)

`race` needs MNIST in `data`, or where --data-dir says. Its two processes have one thread each.
A rival is named by its optimizer, its peak learning rate and its batch size: adam/0.001/128.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import joblib
import numpy as np
import torch
from recipe import ROOT, in_two_processes, mean_and_deviation, script, train
from threadpoolctl import threadpool_info, threadpool_limits

SETTINGS = script.Settings()
OURS = "script"
SAME = f"sgd/{SETTINGS.lr}/{SETTINGS.batch_size}"  # the script's recipe in PyTorch
TIMED = [OURS, SAME, SAME.replace("sgd", "compiled"), "adam/0.002/128", "adam/0.002/256"]
RATES = (0.00025, 0.0005, 0.001, 0.002, 0.003, 0.004)
RIVALS = [f"adam/{rate}/{size}" for size in (128, 256) for rate in RATES]
RIVALS += ["adamw/0.002/128", "defaults/0.001/128"]
ROUNDS = 20


# The script in PyTorch. --------------------------------------------------------------------------
def torch_network(model):
    """The network of a model, with the same parameters, made of PyTorch's own layers."""
    layers = []
    for w, b in zip(*model.unpack(model.parameters), strict=True):
        linear = torch.nn.Linear(*w.shape)
        linear.weight.data = torch.tensor(w.T.copy())
        linear.bias.data = torch.tensor(b)
        layers += [linear, torch.nn.ELU()]
    layers[5] = torch.nn.Identity()  # The latent code is linear.
    layers[-1] = torch.nn.Hardtanh(0, 1)
    return torch.nn.Sequential(*layers)


def default_network():
    """ReLU, a sigmoid output, and nn.Linear's own initial weights."""
    layers = []
    for layer in script.ENCODER + script.DECODER:
        layers += [torch.nn.Linear(layer.inputs, layer.outputs), torch.nn.ReLU()]
    layers[5] = torch.nn.Identity()
    layers[-1] = torch.nn.Sigmoid()
    return torch.nn.Sequential(*layers)


def torch_loss(outputs, x):
    """The squared error, summed over pixels and averaged over images."""
    return torch.nn.functional.mse_loss(outputs, x, reduction="sum") / len(x)


def optimizer_step(network, optimizer):
    """A function that takes a step for images x and inputs a_0 and returns the loss before it."""

    def step(x, a, rate):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = torch_loss(network(a), x)
        loss.backward()
        if isinstance(optimizer, torch.optim.SGD):
            torch.nn.utils.clip_grad_norm_(network.parameters(), SETTINGS.max_gradient_norm)
        optimizer.step()
        return loss

    return step


def compiled_step(network, decay):
    """The script's step like optimizer_step's, but written out, and compiled as a whole."""
    parameters = dict(network.named_parameters())
    velocities = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def loss_of(parameters, x, a):
        return torch_loss(torch.func.functional_call(network, parameters, a), x)

    def step(x, a, rate):
        gradients, loss = torch.func.grad_and_value(loss_of)(parameters, x, a)
        norm = torch.sqrt(sum(g.square().sum() for g in gradients.values()))
        scale = torch.clamp(SETTINGS.max_gradient_norm / norm, max=1)
        for name, p in parameters.items():
            g = scale * gradients[name] + decay * p
            velocities[name].add_(g).mul_(SETTINGS.momentum)
            p.sub_(rate * (g + velocities[name]))
        return loss

    compiled = torch.compile(step)
    return lambda x, a, rate: compiled(x, a, torch.tensor(rate))


class Rival:
    """A network that PyTorch trains by the recipe that `name` describes."""

    def __init__(self, name, images, seed=0, epochs=100):
        self.kind, rate, size = name.split("/")
        self.images = images
        self.batch_size = int(size)
        # settings.batch_size stays 256, because a rival's rate does not follow its batch size.
        self.settings = replace(SETTINGS, lr=float(rate), seed=seed, epochs=epochs)
        model = script.Autoencoder(images.mean(axis=0) / 255, seed)
        self.mean_image = torch.tensor(model.mean_image)
        self.network = torch_network(model)
        if self.kind == "defaults":
            torch.manual_seed(seed)
            self.mean_image = torch.zeros_like(self.mean_image)  # The input is not centred.
            self.network = default_network()
        parameters = self.network.parameters()
        decay = SETTINGS.weight_decay / len(images)
        if self.kind == "sgd":
            options = {"momentum": SETTINGS.momentum, "nesterov": True, "weight_decay": decay}
            optimizer = torch.optim.SGD(parameters, fused=True, **options)
        else:
            adam = torch.optim.AdamW if self.kind == "adamw" else torch.optim.Adam
            optimizer = adam(parameters, fused=True)
        self.step = optimizer_step(self.network, optimizer)
        if self.kind == "compiled":
            self.step = torch.no_grad()(compiled_step(self.network, decay))

    def rate(self, step, total_steps):
        """Adam warms up for a fifth of a run, but no more than 5 epochs."""
        if self.kind == "defaults":
            return self.settings.lr
        rate = script.learning_rate_at(step, total_steps, self.settings)
        if self.kind in ("sgd", "compiled"):
            return rate
        warm_up = total_steps * min(1 / 5, 5 / self.settings.epochs)
        return rate * min(1, (step + 1) / warm_up)

    def train_epoch(self, epoch):
        """Train for epoch 1, 2, ...; return the mean loss per pixel."""
        starts = range(0, len(self.images), self.batch_size)
        total_steps = self.settings.epochs * len(starts)
        order = np.random.default_rng((self.settings.seed, epoch)).permutation(len(self.images))
        loss_sum = 0.0
        for number, start in enumerate(starts, (epoch - 1) * len(starts)):
            batch = self.images[order[start : start + self.batch_size]]
            x = torch.from_numpy(batch).float().div_(255)
            loss = self.step(x, x - self.mean_image, self.rate(number, total_steps))
            loss_sum += loss.item() * len(x)
        return loss_sum / self.images.size

    def reconstruct(self, x):
        with torch.no_grad():
            return self.network(torch.from_numpy(x) - self.mean_image).numpy()


# The time of an epoch. ---------------------------------------------------------------------------
def time_worker(name):
    """Train for an epoch after every line of input; print its loss and its seconds."""
    images = script.load_data("sample").images
    model = script.Autoencoder(images.mean(axis=0) / 255)
    velocity = np.zeros_like(model.parameters)
    # Freeing an array like MNIST's test images makes glibc keep memory for the temporary arrays of
    # each step, as it does in a run. Otherwise, every step would begin with page faults.
    script.to_pixels(np.zeros((10_000, images.shape[1]), np.uint8))
    rival = None if name == OURS else Rival(name, images)
    threads = min(8, joblib.cpu_count(), *(pool["num_threads"] for pool in threadpool_info()))
    with threadpool_limits(threads, "blas"):
        for epoch, _ in enumerate(sys.stdin, 1):
            begin = time.perf_counter()
            if rival:
                loss = rival.train_epoch(epoch)
            else:
                loss = script.train_epoch(model, velocity, images, epoch, SETTINGS)
            print(json.dumps([loss, time.perf_counter() - begin]), flush=True)


def compare_times():
    command = [sys.executable, __file__, "step", "--worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {name: subprocess.Popen([*command, name], **pipes) for name in TIMED}
    results = {name: [] for name in TIMED}
    for _ in range(ROUNDS + 1):
        for name, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            results[name].append(json.loads(worker.stdout.readline()))
            time.sleep(0.1)  # BLAS threads spin for a while.
    print("an epoch | time\n---|---")
    for name in TIMED:
        losses, seconds = np.transpose(results[name])
        if name in TIMED[1:3]:
            np.testing.assert_allclose(losses[:5], np.transpose(results[OURS])[0][:5], rtol=0.01)
        ratios = seconds[1:] / np.transpose(results[OURS])[1][1:]  # The first round is a warm-up.
        print(f"{name} | {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})")
    print(f"\nNumPy {np.__version__}, PyTorch {torch.__version__}, {platform.processor()}")


# The race. ---------------------------------------------------------------------------------------
def race_losses(name, seed, dataset, epochs):
    """The training loss and the test loss of a recipe after the last epoch."""
    if name == OURS:
        return train(script, dataset, epochs, seed)[1:]
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # Subnormal numbers would slow the defaults down.
    rival = Rival(name, dataset.images, seed, epochs)
    for epoch in range(1, epochs + 1):
        loss = rival.train_epoch(epoch)
    return loss, script.mean_loss(rival.reconstruct, dataset.test_images)


def race(dataset, epochs, rivals):
    names = [OURS, OURS, OURS, *rivals]
    seeds = [0, 1, 2] + [0] * len(rivals)
    results = in_two_processes(race_losses, names, seeds, repeat(dataset), repeat(epochs))
    print("recipe | training loss | test loss\n---|---|---", flush=True)
    ours = [next(results) for _ in range(3)]
    print(OURS, *map(mean_and_deviation, np.transpose(ours)), sep=" | ", flush=True)
    for name, losses in zip(rivals, results, strict=True):
        print(name, *(f"{loss:.6f}" for loss in losses), sep=" | ", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("step", "race"))
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="holds MNIST")
    parser.add_argument("--epochs", type=int, default=10, help="of race (default: 10)")
    parser.add_argument("--rivals", nargs="+", default=RIVALS, help="of race, as adam/0.001/128")
    parser.add_argument("--worker", choices=TIMED, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        time_worker(arguments.worker)
    elif arguments.what == "step":
        compare_times()
    else:
        dataset = script.load_data("MNIST", arguments.data_dir)
        race(dataset, arguments.epochs, arguments.rivals)


if __name__ == "__main__":
    main()
