"""Reading MNIST: its files in every state, failing downloads, and the sample as a fallback."""

import functools
import gzip
import hashlib
import http.server
import os
import shutil
import socket
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NAMES, SAMPLE, call, fails, raising, script, snapshot, start, write_idx
from torchvision import datasets


def compress(raw, names=NAMES, end=None):
    """Replace files by .gz archives, cut at an end."""
    for name in names:
        content = gzip.compress((raw / name).read_bytes(), mtime=0)
        (raw / f"{name}.gz").write_bytes(content[:end])
        (raw / name).unlink()


def test_sample_is_5000_digits_of_all_classes_in_equal_parts():
    assert SAMPLE.description.startswith("a sample of MNIST, 4000 training and 1000 test images, ")
    assert np.bincount(SAMPLE.test_labels).tolist() == [100] * 10
    images = np.concatenate([SAMPLE.images, SAMPLE.test_images])
    assert images.dtype == np.uint8 and len(np.unique(images, axis=0)) == 5000


PLACES = {".": "mine", "raw": "mine", "MNIST/raw": "mine", "Fashion": "Fashion"}
PLACES["FashionMNIST/raw"] = "FashionMNIST"


@pytest.mark.parametrize("place", PLACES)
def test_four_files_are_found_read_and_kept_in_any_folder(monkeypatch, place):
    """Without Tensor.numpy, as where PyTorch was built for another version of NumPy."""
    original = write_idx("original")
    folder = Path("mine", place)
    shutil.copytree(original, folder)
    compress(folder, NAMES[:3])
    before = snapshot(folder)
    monkeypatch.setattr(torch.Tensor, "numpy", None)
    dataset = script.load_data("auto", "mine")
    assert dataset.description.startswith(f"{PLACES[place]}, 50 training and 20 test images, sha")
    parts = (dataset.images, dataset.labels, dataset.test_images, dataset.test_labels)
    for part, name, begin in zip(parts, NAMES, (16, 8, 16, 8), strict=True):
        assert part.tobytes() == (original / name).read_bytes()[begin:]
    assert snapshot(folder) == snapshot(original) | before
    (folder / NAMES[1]).write_bytes((folder / NAMES[1]).read_bytes()[:-1] + b"\0")
    assert script.load_data("auto", Path("mine")).description != dataset.description


def test_directories_without_or_with_two_data_sets_and_contradicting_flags_are_refused():
    fails(call("--data-dir", "typo"), 2, "typo", "--data-dir")
    write_idx("mine")
    shutil.copytree("mine/MNIST/raw", "mine/Fashion/raw")
    before = snapshot()
    fails(call("--data-dir", "mine"), 2, Path("mine/MNIST/raw"), Path("mine/Fashion/raw"))
    both = call("--data-dir", "mine", "--dataset", "sample")
    assert both.status == 2 and "--data-dir and --dataset sample" in both.lines[-1]
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
    assert not raw.exists()
    script.load_data("auto", data_dir)
    assert f"downloading MNIST to {raw}\n" in capsys.readouterr().err
    assert snapshot(raw).keys() == {*NAMES, *(f"{name}.gz" for name in NAMES)}
    assert [*raw.parent.iterdir()] == [raw]
    serve("refused")
    script.load_data("auto", data_dir)
    assert "downloading" not in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["refused", "checksum", "stalls"])
def test_failed_download_is_an_error_or_a_reason_to_take_the_sample(serve, capsys, fault):
    serve(fault)
    Path("given").mkdir()
    for flags in (("--dataset", "mnist"), ("--data-dir", "given")):
        result = call(*flags, "--output-dir", "out")
        (error,) = [line for line in result.lines if line.startswith("error: ")]
        assert result.status == 2 and "Traceback" not in result.err
        assert str(Path("MNIST", "raw")) in error and all(name in error for name in NAMES)
        assert not Path("out").exists()
    assert script.load_data().name == "a sample of MNIST"
    raw = Path("data", "MNIST", "raw")
    assert f"\nwarning: no usable data in {raw} (" in capsys.readouterr().err
    serve()  # What a failed download has left does not keep the next one from succeeding.
    assert script.load_data().name == "data"


def write_header(*numbers):
    """A function that overwrites a file with big-endian numbers and then zeros."""
    count = np.prod(numbers[1:])
    return lambda path: path.write_bytes(struct.pack(f">{len(numbers)}i{count}x", *numbers))


def unpack_as_7_zip_does(path):
    for name in NAMES:
        (path.parent / name).rename(path.parents[2] / name.replace("-idx", ".idx"))


IMAGES, LABELS, TEST_IMAGES, _ = NAMES
DAMAGES = {  # the file, what happens to it, and what the message says beside its name
    "missing": (IMAGES, Path.unlink, ["No such file"]),
    "missing labels": (LABELS, Path.unlink, ["No such file"]),
    "empty": (TEST_IMAGES, lambda path: path.write_bytes(b""), ["0 bytes", "grey images"]),
    "cut": (TEST_IMAGES, lambda path: os.truncate(path, 999), ["(20, 28, 28) and 999 bytes"]),
    "cut archive": (TEST_IMAGES, lambda path: compress(path.parent, [path.name], -1), ["ended"]),
    "more labels": (LABELS, write_header(2049, 60), ["(60,)", "their labels"]),
    "one image": (IMAGES, write_header(2051, 1, 28, 28), ["(1, 28, 28)", "two or more"]),
    "in colour": (IMAGES, write_header(2052, 9, 28, 28, 3), ["(9, 28, 28, 3)", "grey images"]),
    "other size": (IMAGES, write_header(2051, 9, 32, 32), ["(9, 32, 32)", "784 pixels", "LAYERS"]),
    "web page": (IMAGES, lambda path: path.write_text("<!DOCTYPE html>"), ["15 bytes"]),
    "unpacked by 7-Zip": (IMAGES, unpack_as_7_zip_does, ["No such file"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_files_of_the_user_are_kept_and_no_reason_to_take_the_sample(serve, damage):
    serve()
    raw = write_idx("data")
    name, spoil, told = DAMAGES[damage]
    spoil(raw / name)
    before = snapshot()
    fails(call(), 2, name, *told, *NAMES, ".gz", "--dataset sample")
    assert snapshot() == before
