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
from conftest import NAMES, SAMPLE, call, fails, script, snapshot, start, write_idx
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


def test_files_of_another_data_set_are_read_and_kept(monkeypatch):
    """Without Tensor.numpy, as where PyTorch was built for another version of NumPy."""
    raw, original = write_idx("data"), write_idx("original")
    compress(raw, NAMES[:3])
    (raw.parent / "processed").mkdir()  # as left by old torchvision versions
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(9, 28, 28), torch.zeros(9)), raw.parent / "processed" / name)
    before = snapshot(raw)
    monkeypatch.setattr(torch.Tensor, "numpy", None)
    dataset = script.load_data("auto", None)
    assert dataset.description.startswith("data, 50 training and 20 test images, sha256 ")
    assert dataset.images.tobytes() == (original / NAMES[0]).read_bytes()[16:]
    assert dataset.test_images.tobytes() == (original / NAMES[2]).read_bytes()[16:]
    assert dataset.test_labels.tobytes() == (original / NAMES[3]).read_bytes()[8:]
    assert snapshot(raw) == snapshot(original) | before
    (raw / NAMES[1]).write_bytes((raw / NAMES[1]).read_bytes()[:-1] + b"\0")
    assert script.load_data("auto", Path("data")).description != dataset.description


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


@pytest.mark.parametrize("data_dir", [None, Path("~/given")])
def test_download_happens_once_and_says_where_to(serve, capsys, data_dir):
    serve()
    root = Path("given" if data_dir else "data")
    sample = write_idx(root / "sample")  # as in this repository
    script.load_data("auto", data_dir)
    assert f"downloading MNIST to {root / 'MNIST' / 'raw'}\n" in capsys.readouterr().err
    assert snapshot(root / "MNIST" / "raw").items() >= snapshot(sample).items()
    serve("refused")
    script.load_data("auto", data_dir)
    assert "downloading" not in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["refused", "checksum", "stalls"])
def test_failed_download_is_an_error_or_a_reason_to_take_the_sample(serve, capsys, fault):
    serve(fault)
    for flags in (("--dataset", "mnist"), ("--data-dir", "given")):
        result = call(*flags, "--output-dir", "out")
        (error,) = [line for line in result.lines if line.startswith("error: ")]
        assert result.status == 2 and "Traceback" not in result.err
        assert str(Path("MNIST", "raw")) in error and all(name in error for name in NAMES)
        assert not Path("out").exists()
        shutil.rmtree("data", ignore_errors=True)
    assert script.load_data("auto", None).name == "a sample of MNIST"
    raw = Path("data", "MNIST", "raw")
    assert f"\nwarning: no usable data in {raw} (" in capsys.readouterr().err
    (raw / NAMES[0]).touch()  # a file of the user
    assert call("--output-dir", "out").status == 2
    serve()  # What a failed download has left does not keep the next one from succeeding.
    assert script.load_data("auto", None).name == "data"


def unpack_as_7_zip_does(path):
    for name in NAMES:
        (path.parent / name).rename(path.parents[2] / name.replace("-idx", ".idx"))


DAMAGES = {  # the file and what happens to it
    "missing": (NAMES[0], Path.unlink),
    "cut archive": (NAMES[2], lambda path: compress(path.parent, [path.name], end=-1)),
    "more labels": (NAMES[1], lambda path: path.write_bytes(struct.pack(">2i60x", 2049, 60))),
    "one image": (NAMES[0], lambda path: write_idx(path.parents[2], train=1)),
    "unpacked by 7-Zip": (NAMES[0], unpack_as_7_zip_does),
    "one level too high": (NAMES[0], lambda path: path.parent.rename(path.parents[2] / "raw")),
    "other folder": (NAMES[0], lambda path: path.parents[1].rename(path.parents[2] / "Fashion")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_files_of_the_user_are_kept_and_no_reason_to_take_the_sample(serve, damage):
    serve()
    raw = write_idx("mine")
    name, spoil = DAMAGES[damage]
    spoil(raw / name)
    before = snapshot()
    fails(call("--data-dir", "mine"), 2, raw, *NAMES, ".gz", "--dataset sample")
    assert snapshot() == before
