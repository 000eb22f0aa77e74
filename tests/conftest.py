"""What several test files share: small data sets, finished runs, the place of all of MNIST."""

import contextlib
import io
import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "mnist_autoencoder.py"
sys.path.insert(0, str(ROOT))

import mnist_autoencoder as script  # noqa: E402


def write_idx(root: Path, train: int = 50, test: int = 20, seed: int = 0) -> Path:
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


def call(*arguments) -> SimpleNamespace:
    """main() with these arguments: its status, stdout, stderr and stderr's lines."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = script.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
    lines = err.getvalue().splitlines()
    return SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue(), lines=lines)


def figures(log: Path) -> list[str]:
    """The epoch lines of a log without their times, which no two runs share."""
    lines = log.read_text().splitlines()
    return [line.rpartition(", Time")[0] for line in lines if line.startswith("Epoch")]


def weights(npz: Path) -> dict[str, np.ndarray]:
    """All that a model or checkpoint file holds, but for the history with its times."""
    with np.load(npz, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files if name in ("parameters", "velocity")}


def same(first: dict, second: dict) -> bool:
    """Equal names and arrays, bit for bit."""
    return first.keys() == second.keys() and all(
        first[name].tobytes() == second[name].tobytes() for name in first
    )


@pytest.fixture(scope="session")
def sample_run(tmp_path_factory):
    """Three epochs on the sample; tests read the directory and leave it as it is."""
    directory = tmp_path_factory.mktemp("sample_run")
    result = call("--dataset", "sample", "--epochs", 3, "--output-dir", directory)
    assert result.status == 0, result.err
    return SimpleNamespace(directory=directory, out=result.out)


@pytest.fixture(scope="session")
def mnist_dir():
    places = [ROOT / "data", ROOT.parent / "shared" / "mnist"]
    if "MNIST_DIR" in os.environ:
        places = [Path(os.environ["MNIST_DIR"])]
    for place in places:
        if (place / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
            return place
    pytest.skip("needs all of MNIST: set MNIST_DIR to the folder that holds MNIST/raw")
