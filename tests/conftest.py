"""What several test files share: small data sets, runs of the script, the place of all of MNIST."""

import contextlib
import io
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "mnist_autoencoder.py"
sys.path.insert(0, str(ROOT))

import mnist_autoencoder as script  # noqa: E402

NAMES = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]
EPOCH = re.compile(r"Epoch (\d+), Loss: (\d\.\d{6}), Test Loss: (\d\.\d{6}), Time: \d+\.\ds")


def write_idx(root, train=50, test=20, seed=0):
    """Write random digits in MNIST's layout below root; returns the folder of the files."""
    rng = np.random.default_rng(seed)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">4i", 2051, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">2i", 2049, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return raw


def call(*arguments):
    """main() with these arguments: its status, stdout, stderr and stderr's lines."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = script.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
    lines = err.getvalue().splitlines()
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue(), lines=lines)


def start(*arguments, **options):
    """The script in a process of its own, as the user starts it."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments)], **options)


def result_of(directory):
    """All that a run has ended with, but for the times, which no two runs share."""
    epochs = [match[:3] for match in EPOCH.findall((directory / "training_log.txt").read_text())]
    with np.load(directory / "model.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    losses = arrays.pop("history")[:, :2]
    assert epochs == [(f"{n}", f"{a:.6f}", f"{b:.6f}") for n, (a, b) in enumerate(losses, 1)]
    return {"losses": losses.tobytes(), **{name: a.tobytes() for name, a in arrays.items()}}


def snapshot(directory):
    """Name and content of all files below directory."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def sample():
    """What load_data says of the sample: identity, images, test images, labels."""
    return script.load_data("sample", ROOT)


@pytest.fixture(scope="session")
def sample_run(tmp_path_factory):
    """Five epochs on the sample; tests read the directory and leave it as it is."""
    directory = tmp_path_factory.mktemp("sample_run")
    result = call("--dataset", "sample", "--epochs", 5, "--output-dir", directory)
    assert result.status == 0, result.err
    return SimpleNamespace(directory=directory, out=result.out)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Arguments of a run of four epochs on 50 images, and the directory of one that was whole."""
    directory = tmp_path_factory.mktemp("small")
    write_idx(directory)
    arguments = ["--data-dir", directory, "--batch-size", 16, "--epochs", 4]
    assert call(*arguments, "--output-dir", directory / "whole").status == 0
    return arguments, directory / "whole"


@pytest.fixture(scope="session")
def mnist_dir():
    place = Path(os.environ.get("MNIST_DIR", ROOT / "data"))
    if not all((place / "MNIST" / "raw" / name).is_file() for name in NAMES):
        pytest.skip("needs all of MNIST in data, or in the folder that MNIST_DIR names")
    return place
