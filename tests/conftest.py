"""Shared by the test files: small data sets, runs of the script and what they leave."""

import contextlib
import io
import itertools
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from recipe import script

SAMPLE = script.load_data("sample", None)
EPOCH = re.compile(r"Epoch (\d+), Loss: (\d\.\d{6}), Test Loss: (\d\.\d{6}), Time: \d+\.\ds")


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    """Every test starts in an empty directory, to which the script then writes."""
    monkeypatch.chdir(tmp_path)


def write_idx(root, train=50, test=20, seed=0, shape=(28, 28)):
    """Write random images of rank 4 in MNIST's layout below root; return the files' folder."""
    rng = np.random.default_rng(seed)
    patterns = np.random.default_rng(0).random((4, shape[0] * shape[1]))
    raw = Path(root, "MNIST", "raw")
    raw.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("t10k", test)):
        images = (rng.random((count, 4)) @ patterns * 63).astype(np.uint8)
        header = struct.pack(">4i", 2051, count, *shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = bytes(i % 2 for i in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels)
    return raw


def call(*arguments, main=script.main):
    """main() with these arguments: its status, stdout, stderr and stderr's lines."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
    err = err.getvalue()
    return SimpleNamespace(status=status, out=out.getvalue(), err=err, lines=err.splitlines())


def fails(result, status, *texts):
    """That a call has ended with this status and one line, which contains the texts."""
    assert (result.status, len(result.lines), result.err[:7]) == (status, 1, "error: "), result.err
    assert [str(text) for text in texts if str(text) not in result.err] == [], result.err


def raising(function, error, at):
    """`function`, except that its call number `at` raises the error."""
    numbers = itertools.count(1)

    def maybe(*arguments, **options):
        if next(numbers) == at:
            raise error
        return function(*arguments, **options)

    return maybe


def start(*arguments, **options):
    """The script in a process of its own, as the user starts it."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, script.__file__, *map(str, arguments)], **options)


def read_log(directory="."):
    return Path(directory, "training_log.txt").read_text()


def logged(directory="."):
    """Number, training loss and test loss of the epochs in a log, as text."""
    return EPOCH.findall(read_log(directory))


def result_of(directory="."):
    """The final state of a run, without machine and times, in which no two runs agree."""
    run = script.load_run(Path(directory, "model.npz"))
    assert read_log(directory) == run.log
    facts = [line for line in run.log.splitlines() if not re.match("# From|Epoch", line)]
    rows = [(f"{n}", f"{a:.6f}", f"{b:.6f}") for n, (a, b) in enumerate(run.losses, 1)]
    assert EPOCH.findall(run.log) == rows
    arrays = (run.model.parameters, run.model.mean_image, run.velocity)
    return (facts, run.losses, *(array.tobytes() for array in arrays))


def snapshot(directory="."):
    """Name and content of all files below directory."""
    files = (path for path in Path(directory).rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The arguments of a run of four epochs on 50 images, and the directory of a finished one."""
    directory = tmp_path_factory.mktemp("small")
    write_idx(directory / "data")
    arguments = ["--data-dir", directory / "data", "--batch-size", 16, "--epochs", 4]
    assert call(*arguments, "--output-dir", directory / "whole").status == 0
    return arguments, directory / "whole"


@pytest.fixture
def no_plots(monkeypatch):
    """Spare a test the second that the plots of a run take."""
    monkeypatch.setattr(script, "finish", lambda *_: None)
