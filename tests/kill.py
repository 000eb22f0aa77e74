"""Kill training runs with SIGKILL and resume them until they end; then compare the results.

    python tests/kill.py 100

Half of the kills come at a random instant, the others just before or after one of the calls by
which a file is written. After every kill each file must be absent or readable, and in the end
weights and log figures must be those of a run that was never interrupted, bit for bit.
"""

import math
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import sklearn.decomposition  # noqa: F401  imported here so that no forked child has to
from conftest import figures, same, script, weights
from matplotlib.figure import Figure
from torchvision import datasets  # noqa: F401

ARGUMENTS = ["--dataset", "sample", "--epochs", "3", "--batch-size", "200"]


def die_at(rng):
    """Make this process kill itself at one of the steps of writing a file."""
    module, name = rng.choice([(os, "replace"), (os, "fsync"), (os, "truncate"), (Path, "open")])
    original, countdown = getattr(module, name), rng.randint(1, 12)
    before = rng.random() < 0.5

    def deadly(*arguments, **options):
        nonlocal countdown
        countdown -= 1
        if countdown == 0 and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, deadly)


def run(arguments, rng=None, duration=0.0):
    """main() in a process of its own, killed if there is a `rng`; returns how it ended."""
    child = os.fork()
    if child == 0:
        Figure.savefig = lambda figure, file: file.write(b"a figure")  # drawing takes long
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        if rng and duration == 0:
            die_at(rng)
        os._exit(script.main(arguments))
    end = time.monotonic() + duration if duration else math.inf
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(ended[1])


def check_files(directory):
    """Raise unless every file is absent or whole; returns whether there is a checkpoint."""
    log, checkpoint = directory / "training_log.txt", directory / "checkpoint.npz"
    if log.exists():
        assert log.read_bytes().endswith(b"\n"), "half a line in the log"
        epochs = [int(line.split()[1].rstrip(",")) for line in figures(log)]
        assert epochs == list(range(1, len(epochs) + 1)), f"epochs {epochs} in the log"
    if (directory / "model.npz").exists():
        script.Autoencoder.load(directory / "model.npz")
    if not checkpoint.exists():
        return False
    script.Run.load(checkpoint)
    return True


def main(kills):
    rng = random.Random(kills)
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        begin = time.monotonic()
        assert run([*ARGUMENTS, "--output-dir", str(whole)]) == 0
        duration = time.monotonic() - begin
        done = runs = aimed = 0
        while done < kills:
            directory = Path(place) / f"run{runs}"
            arguments = [*ARGUMENTS, "--output-dir", str(directory)]
            status = None
            while status != 0:
                if done < kills:
                    random_instant = rng.random() < 0.5
                    delay = rng.uniform(0.01, duration) if random_instant else 0.0
                    status = run(arguments, rng, delay)
                else:
                    status = run(arguments)
                if status == -signal.SIGKILL:
                    done += 1
                    aimed += not random_instant
                elif status != 0:
                    raise AssertionError(f"{arguments} ended with status {status}")
                resumable = check_files(directory)
                arguments = [*ARGUMENTS, "--output-dir", str(directory)]
                arguments += ["--resume"] if resumable else []
            model = "model.npz"
            assert same(weights(directory / model), weights(whole / model)), "other weights"
            log = "training_log.txt"
            assert figures(directory / log) == figures(whole / log), "other log figures"
            assert (directory / log).read_text().splitlines()[-1].startswith("# PCA")
            runs += 1
    print(f"{done} kills, {aimed} of them while writing; {runs} of {runs} runs ended the same")


if __name__ == "__main__":
    main(int(sys.argv[1]))
