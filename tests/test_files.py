"""Files: data in every state, downloads, and runs that are interrupted, killed and resumed."""

import functools
import gzip
import hashlib
import http.server
import os
import pkgutil
import random
import re
import shutil
import socket
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, fails, logged, raising, result_of, script, snapshot, start, write_idx
from torchvision import datasets

NAMES = IMAGES, LABELS, TEST_IMAGES, _ = [x[:-3] for x, _ in datasets.MNIST.resources]  # no .gz


def compress(raw, names=NAMES, end=None):
    """Replace files by .gz archives, cut at an end."""
    for name in names:
        content = gzip.compress((raw / name).read_bytes(), mtime=0)
        (raw / f"{name}.gz").write_bytes(content[:end])
        (raw / name).unlink()


PLACES = {".": "mine", "raw": "mine", "MNIST/raw": "mine", "Fashion": "Fashion", "F/raw": "F"}


@pytest.mark.parametrize("place", PLACES)
def test_four_files_are_found_and_read_in_any_folder_and_nothing_written(monkeypatch, place):
    """Without Tensor.numpy, as where PyTorch was built for another version of NumPy."""
    original = write_idx("original")
    folder = Path("mine", place)
    shutil.copytree(original, folder)
    compress(folder, NAMES[:2])
    (folder / NAMES[3]).unlink()
    shutil.copytree(original, folder / NAMES[3])  # A file in a directory, as in Kaggle's archive.
    before = snapshot(folder)
    monkeypatch.setattr(torch.Tensor, "numpy", None)
    dataset = script.load_data("auto", "mine")
    assert dataset.description.startswith(f"{PLACES[place]}, 50 training and 20 test images, sha")
    parts = (dataset.images, dataset.labels, dataset.test_images, dataset.test_labels)
    for part, name, begin in zip(parts, NAMES, (16, 8, 16, 8), strict=True):
        assert part.tobytes() == (original / name).read_bytes()[begin:]
    assert snapshot(folder) == before  # It may be read-only.
    (folder / NAMES[2]).write_bytes((folder / NAMES[2]).read_bytes()[:-1] + b"\0")
    assert script.load_data("auto", Path("mine")).description != dataset.description


def test_directories_without_or_with_two_data_sets_and_contradicting_flags_are_refused():
    fails(call("--data-dir", "typo"), 2, "typo", "--data-dir")
    write_idx("mine")
    shutil.copytree("mine/MNIST/raw", "mine/Fashion/raw")
    before = snapshot()
    fails(call("--data-dir", "mine"), 2, Path("mine/MNIST/raw"), Path("mine/Fashion/raw"))
    fails(call("--data-dir", "mine", "--dataset", "sample"), 2, "--dataset sample", "--data-dir")
    with pytest.raises(script.InputError, match="--dataset Sample"):
        script.load_data("Sample")
    assert snapshot() == before and not Path("typo").exists()


@pytest.mark.parametrize("flags", [(), ("--dataset", "sample")])
def test_torchvision_that_cannot_be_imported_is_no_reason_to_take_the_sample(flags):
    Path("torchvision.py").write_text("raise RuntimeError('operator nms does not\\nexist')")
    process = start(*flags, env={**os.environ, "PYTHONPATH": "."})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: torchvision") and "install" in err
    assert {path.name for path in Path().iterdir()} <= {"torchvision.py", "__pycache__"}


@pytest.fixture
def serve(monkeypatch):
    """A function that makes torchvision download a small data set from a server with a fault."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(os.path, "expanduser", lambda path: str(path).replace("~/", ""))
    folder, servers = write_idx("served"), []
    compress(folder)
    archives = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in archives.items()]
    monkeypatch.setattr(datasets.MNIST, "resources", resources)

    def serve(fault=None):
        for name, content in archives.items():
            (folder / name).write_bytes(content[1:] if fault == "checksum" else content)
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)  # An object that nothing refers to would be deleted, and closed.
        if fault == "refused":
            server.server_close()
        elif fault != "stalls":  # Then it accepts connections and never answers.
            threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(script, "SERVER_TIMEOUT", 0.3 if fault == "stalls" else 30)
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [url])

    yield serve
    socket.setdefaulttimeout(None)


@pytest.mark.parametrize("data_dir", [None, "~/given"])
def test_download_happens_once_into_an_empty_directory_and_says_where_to(serve, capsys, data_dir):
    serve()
    root = Path("given" if data_dir else "data")
    raw = root / "MNIST" / "raw"
    write_idx("data/sample")  # as in this repository
    root.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(datasets.MNIST, "_load_data", raising(None, KeyboardInterrupt, 1))
        script.load_data("auto", data_dir)
    assert not raw.parent.exists()
    script.load_data("auto", data_dir)
    assert f"downloading MNIST to {raw}\n" in capsys.readouterr().err
    assert snapshot(raw).keys() == {*NAMES, *(f"{name}.gz" for name in NAMES)}
    assert len([*root.iterdir()]) == (1 if data_dir else 2) and [*raw.parent.iterdir()] == [raw]
    serve("refused")
    script.load_data("auto", data_dir)
    assert "downloading" not in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["refused", "checksum", "stalls"])
def test_failed_download_is_an_error_or_a_reason_to_take_the_sample(serve, capsys, fault):
    serve(fault)
    Path("given").mkdir()
    for root, flags in (("data", "--dataset mnist"), ("given", "--data-dir given")):
        result = call(*flags.split(), "--output-dir", "out")
        (error,) = [line for line in result.lines if line.startswith("error: ")]
        assert result.status == 2 and "Traceback" not in result.err
        assert f"no usable data in {root} (" in error and all(name in error for name in NAMES)
        assert not Path("out").exists() and [*Path(root).iterdir()] == []
    assert script.load_data().name == "a sample of MNIST"
    assert "\nwarning: no usable data in data (" in capsys.readouterr().err
    serve()  # What a failed download has left does not keep the next one from succeeding.
    assert script.load_data().name == "data"


def write(*numbers, pixel=b"\0"):
    """A function that overwrites a file with big-endian numbers and then equal pixels."""
    content = struct.pack(f">{len(numbers)}i", *numbers) + pixel * np.prod(numbers[1:])
    return lambda path: path.write_bytes(content)


DAMAGES = {  # the file, what happens to it, and what the message says beside its name
    "empty": (TEST_IMAGES, lambda path: path.write_bytes(b""), ["shape is ()"]),
    "cut": (TEST_IMAGES, lambda path: os.truncate(path, 999), ["20, 28, 28", "983"]),
    "cut archive": (TEST_IMAGES, lambda path: compress(path.parent, [path.name], -1), ["ended"]),
    "more labels": (LABELS, write(2049, 60), ["(60,)", "as many labels"]),
    "one image": (IMAGES, write(2051, 1, 28, 28), ["(1, 28, 28)", "two or more"]),
    "in colour": (IMAGES, write(2052, 9, 28, 28, 3), ["(9, 28, 28, 3)", "grey images"]),
    "other size": (IMAGES, write(2051, 9, 32, 32), ["(9, 32, 32)", "784 pixels", "LAYERS"]),
    "signed": (LABELS, write(0x0901, 50), ["needs bytes"]),
    "0 or 1": (IMAGES, write(2051, 9, 28, 28, pixel=b"\1"), ["0 (black) to 255 (white)"]),
    "renamed": (IMAGES, lambda path: path.rename(path.with_name("images.idx3-ubyte")), ["No such"]),
}


@pytest.mark.parametrize(("name", "spoil", "told"), DAMAGES.values(), ids=DAMAGES)
def test_unusable_files_are_kept_and_no_reason_to_take_the_sample(serve, name, spoil, told):
    serve()
    raw = write_idx("data")
    spoil(raw / name)
    before = snapshot()
    fails(call(), 2, f"({name} is ", *told, *NAMES, ".gz", "--dataset sample, no --data-dir")
    assert snapshot() == before


KILLS = int(os.environ.get("KILLS", 2))  # how often a process is killed
PART = ".part.model.npz"  # a temporary file, which the next run replaces
CTRL_C, FULL = KeyboardInterrupt, OSError(28, "No space left on device")
INSTANTS = [  # the error; where, in which call (4 steps an epoch); complete epochs; what is said
    (CTRL_C, "mnist_autoencoder.sgd_step", 16, 3, "--resume continues after epoch 3"),
    (CTRL_C, "mnist_autoencoder.plot_losses", 1, 4, "--resume continues after epoch 4"),
    (CTRL_C, "os.replace", 1, 0, "before a new epoch was saved"),
    (CTRL_C, "os.replace", 2, 1, "--resume continues after epoch 1"),
    (FULL, "numpy.savez", 1, 0, "No space left on device"),
    (FULL, "matplotlib.figure.Figure.savefig", 3, 4, "No space left on device"),
    (BrokenPipeError(32, "Broken pipe"), "builtins.print", 3, 2, "Broken pipe"),  # as by head
    (MemoryError(), "mnist_autoencoder.sgd_step", 16, 3, "MemoryError"),
]


@pytest.mark.parametrize(("error", "name", "at", "done", "told"), INSTANTS)
def test_whatever_ends_a_run_it_can_be_resumed(small, monkeypatch, error, name, at, done, told):
    arguments, whole = small
    if done < 4:  # Then plots would only take time.
        monkeypatch.setattr(script, "finish", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(name, raising(pkgutil.resolve_name(name), error, at))
        result = call(*arguments)
    assert (result.status, len(result.lines)) == (130 if error is CTRL_C else 1, 1)
    assert result.lines[0].endswith(told)
    files = {name for name in snapshot() if not re.search(r"/|^\.part\.", name)}
    assert files == ({"training_log.txt", "model.npz"} if done else set())
    assert not done or len(logged()) == done
    assert call(*arguments, *(["--resume"] if done else [])).status == 0
    assert result_of() == result_of(whole)
    if done == 4:
        assert snapshot() == snapshot(whole) | {name: snapshot()[name] for name in files}


@pytest.mark.parametrize("flags", [(), ("--seed", 1)])
def test_a_new_run_leaves_an_earlier_one_until_it_is_saved(small, monkeypatch, no_plots, flags):
    arguments, whole = small
    shutil.copytree(whole, ".", dirs_exist_ok=True)
    Path("training_log.txt").rename("kept elsewhere")
    Path("training_log.txt").symlink_to("kept elsewhere")
    Path("plots", "mine.png").write_bytes(b"mine")
    before = snapshot()
    for name, at in (("mnist_autoencoder.sgd_step", 4), ("os.replace", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(name, raising(pkgutil.resolve_name(name), CTRL_C, at))
            result = call(*arguments, *flags)
        note, end = result.lines
        assert {name for name, _ in snapshot().items() - before.items()} <= {PART}
        assert (result.status, end) == (130, "interrupted before a new epoch was saved")
        assert note.startswith("note: ") and f" in {Path.cwd()} (epochs: 4); " in note
        assert note.endswith(f" use {'' if flags else '--resume or '}another --output-dir")
    with monkeypatch.context() as patch:
        patch.setattr(script, "sgd_step", raising(script.sgd_step, CTRL_C, 8))
        assert call(*arguments, *flags).lines[-1].endswith("--resume continues after epoch 1")
    assert len(logged()) == 1 and Path("training_log.txt").is_symlink()
    assert snapshot().keys() == before.keys() - {f"plots/{name}" for name in script.PLOTS}
    assert call(*arguments, *flags, "--resume").lines == []
    assert flags or result_of() == result_of(whole)


def test_a_run_that_has_lost_a_file_is_noticed_too(small, monkeypatch, no_plots):
    for lost, use in (("training_log.txt", "--resume or another"), ("model.npz", "another")):
        shutil.copytree(small[1], ".", dirs_exist_ok=True)
        Path(lost).unlink()
        (note,) = call(*small[0]).lines
        assert note.endswith(f"(epochs: 4); to keep them, use {use} --output-dir")
    Path("model.npz").write_text("something else")
    assert call(*small[0]).lines[0].endswith("(epochs: 4); to keep them, use another --output-dir")
    monkeypatch.setattr(script, "load_data", raising(None, CTRL_C, 1))
    assert call(*small[0], "--resume").lines == ["interrupted before a new epoch was saved"]


def kill(process, awaited, rng):
    """Kill a process at a random instant after it has printed a line, perhaps while it writes."""
    next(line for line in process.stdout if line.startswith(awaited))
    time.sleep(rng.uniform(0, 0.15))
    process.kill()
    process.communicate()


def test_killed_at_random_instants_and_resumed_ends_like_an_unbroken_run():
    rng, done = random.Random(KILLS), 0
    write_idx("data", train=300)
    arguments = ["--data-dir", "data", "--epochs", 8 * (KILLS + 2), "--batch-size", 64]
    assert call(*arguments, "--output-dir", "whole").status == 0
    arguments += ["--output-dir", "out"]
    for _ in range(KILLS):
        wanted = done + rng.randint(1, 4)
        kill(start(*arguments, *(["--resume"] if done else [])), f"Epoch {wanted},", rng)
        log = logged("out")
        assert [int(number) for number, _, _ in log] == list(range(1, len(log) + 1))
        done = len(script.load_run("out/model.npz").losses)
        assert wanted <= done and len(log) in (done - 1, done)
    assert call(*arguments, "--resume").status == 0
    assert result_of("out") == result_of("whole")
    assert snapshot("out").keys() == snapshot("whole").keys()
    assert f"# From epoch {done + 1} on: " in script.load_run("out/model.npz").log
    shutil.copytree("whole", "out", dirs_exist_ok=True)
    for _ in range(KILLS):  # within the first epoch of a new run over a finished one
        kill(start(*arguments, "--seed", 1), "# From epoch 1 on", rng)
        changes = {name for name, _ in snapshot("out").items() - snapshot("whole").items()}
        if not changes <= {PART}:
            assert call(*arguments, "--seed", 1, "--resume").status == 0
            assert "# seed: 1" in result_of("out")[0]
            shutil.copytree("whole", "out", dirs_exist_ok=True)


SPOILED = {  # what happens to a finished run, and what is said of it
    "no model": (lambda: os.remove("model.npz"), "a run without --resume writes a model.npz"),
    "no log": (lambda: np.savez("model.npz", parameters=np.zeros(5)), "log is not a file"),
    "a text": (lambda: Path("model.npz").write_text("text"), "not a zip file"),
    "no plots": (lambda: Path("plots").rename("p") and Path("plots").touch(), "--output-dir"),
}


@pytest.mark.parametrize(("spoil", "told"), SPOILED.values(), ids=SPOILED)
def test_spoiled_run_is_one_line_and_left_as_it_is(small, spoil, told):
    shutil.copytree(small[1], ".", dirs_exist_ok=True)
    spoil()
    before = snapshot()
    fails(call(*small[0], "--resume"), 2, told)
    assert snapshot() == before
