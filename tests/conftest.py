"""Shared by the test files: small data sets, runs of the script and what they leave."""

import contextlib
import io
import os
import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from recipe import script
from threadpoolctl import threadpool_limits

# One thread, because on a busy machine threads of BLAS can wait for each other most of the time.
threadpool_limits(1)
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # for processes that tests start
os.environ["OMP_NUM_THREADS"] = "1"

EPOCH = re.compile(r"Epoch (\d+), Loss: (\d\.\d{6}), Test Loss: (\d\.\d{6}), Time: \d+\.\ds")


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    """Every test starts in an empty directory, to which the script then writes."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def sample():
    return script.load_data("sample")


def write_idx(path, array):
    """Write an array of bytes to an idx file, the format of MNIST."""
    header = struct.pack(f">{array.ndim + 1}i", 2048 + array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_data(root, name="MNIST", train=50, test=20, seed=0, shape=(28, 28)):
    """Write random images in torchvision's layout below root; return the files' directory."""
    folder = Path(root, name, "raw")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    patterns = 255 * np.random.default_rng(0).random((4, *shape))
    for part, count in (("train", train), ("t10k", test)):
        weights = rng.random((count, 4)) / 4
        images = np.tensordot(weights, patterns, 1)
        write_idx(folder / f"{part}-images-idx3-ubyte", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count) % 2)
    return folder


@dataclass
class Result:
    """What a call of main has returned and printed."""

    status: int
    out: str
    err: str


def call(*arguments, main=script.main):
    """Call main() with these arguments."""
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
    return Result(status, out.getvalue(), err.getvalue())


def start(*arguments, **options):
    """The script in a process of its own, as the user starts it."""
    command = [sys.executable, script.__file__, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, **options)


def assert_error(result, *texts, status=2):
    """Assert that a call has ended with this status and one line with these texts."""
    assert result.status == status
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for text in texts:
        assert str(text) in result.err


def read_log(directory="."):
    return Path(directory, "training_log.txt").read_text()


def state(directory="."):
    """What a run has computed: header, losses and arrays, without times and versions."""
    run = script.load_run(Path(directory, "model.npz"))
    header = [line for line in run.log.splitlines() if not re.match("# From|Epoch", line)]
    arrays = [run.model.parameters, run.model.mean_image, run.velocity]
    return header, run.losses, [array.tobytes() for array in arrays]


def snapshot(directory="."):
    """Name and content of all files below directory."""
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The arguments of a run of four epochs on 50 images."""
    root = tmp_path_factory.mktemp("small")
    write_data(root)
    return ["--data-dir", root, "--batch-size", 16, "--epochs", 4]


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory):
    """The directory of a finished run with these arguments."""
    directory = tmp_path_factory.mktemp("whole")
    assert call(*small, "--output-dir", directory).status == 0
    return directory


@pytest.fixture
def no_plots(monkeypatch):
    """Spare a test the second that the plots of a run take."""
    monkeypatch.setattr(script, "finish", lambda *_: None)
