"""Data in every state: found, missing, damaged, renamed, downloaded."""

import functools
import gzip
import hashlib
import http.server
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_error, call, script, snapshot, write_data, write_idx
from torchvision import datasets

NAMES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_images_and_test_labels_are_those_of_the_files(monkeypatch, name):
    """Without Tensor.numpy, as where PyTorch was built for another version of NumPy."""
    monkeypatch.setattr(torch.Tensor, "numpy", None)
    folder = write_data("mine", name)
    dataset = script.load_data(name, "mine")
    assert dataset.images.tobytes() == (folder / NAMES[0]).read_bytes()[16:]
    assert dataset.test_images.tobytes() == (folder / NAMES[2]).read_bytes()[16:]
    assert bytes(dataset.test_labels.tolist()) == (folder / NAMES[3]).read_bytes()[8:]
    assert dataset.name == f"mine/{name}"
    assert dataset.image_shape == (28, 28)


def test_data_are_identified_by_their_content_and_not_by_their_directory():
    folder = write_data("mine")
    checksum = script.load_data("MNIST", "mine").checksum
    shutil.copytree("mine", "renamed")
    assert script.load_data("MNIST", "renamed").checksum == checksum
    for name in (NAMES[0], NAMES[2], NAMES[3]):  # Training labels are not used.
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + b"\7")
        assert script.load_data("MNIST", "mine").checksum != checksum
        (folder / name).write_bytes(content)


def test_nothing_is_downloaded_or_written_to_a_data_dir():
    Path("mine").mkdir()
    Path("mine", "digit.png").write_bytes(b"mine")
    before = snapshot()
    result = call("--dataset", "KMNIST", "--data-dir", "mine")
    assert_error(result, "KMNIST", Path("mine/KMNIST/raw"), "missing", *NAMES)
    assert_error(call("--data-dir", "typo"), "MNIST", Path("typo/MNIST/raw"), "missing", *NAMES)
    assert snapshot() == before
    assert not Path("typo").exists()


def cut(folder):
    path = folder / NAMES[2]
    path.write_bytes(path.read_bytes()[:999])


def swap(folder):
    shutil.copy(folder / NAMES[1], folder / NAMES[0])


def use_other_sizes(folder):
    write_idx(folder / NAMES[2], np.full((20, 32, 32), 255))


def use_zeros_and_ones(folder):
    write_idx(folder / NAMES[0], np.arange(9 * 784).reshape(9, 28, 28) % 2)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (cut, "invalid"),
        (swap, "Error"),
        (use_other_sizes, "(20, 32, 32) to 255, ENCODER: 784 pixels"),
        (use_zeros_and_ones, "pixels to 255"),
    ],
)
def test_unusable_files_are_an_error_and_no_reason_to_take_the_sample(spoil, told):
    folder = write_data("data")
    spoil(folder)
    before = snapshot()
    assert_error(call(), folder, told)
    assert snapshot() == before


@pytest.fixture
def serve(monkeypatch):
    """A function that makes torchvision download a small data set from a server with a fault."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = write_data("served")
    resources = []
    for name in NAMES:
        archive = gzip.compress((folder / name).read_bytes(), mtime=0)
        (folder / f"{name}.gz").write_bytes(archive)
        resources.append((f"{name}.gz", hashlib.md5(archive).hexdigest()))
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    servers = []
    served = []

    def serve(fault=None):
        if fault == "checksum":
            (folder / f"{NAMES[0]}.gz").write_bytes(b"another file")
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)  # An object that nothing refers to would be closed.
        if fault == "refused":
            server.server_close()
        elif fault != "silent":  # Then it accepts connections and never answers.
            threading.Thread(target=server.serve_forever, daemon=True).start()
            served.append(server)
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [url])
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [url])

    yield serve
    socket.setdefaulttimeout(None)
    for server in served:
        server.shutdown()  # A thread that served a closed socket would never come to rest.
    for server in servers:
        server.server_close()


def test_missing_data_are_downloaded_to_the_default_directory_once(serve, capsys):
    serve()
    assert script.load_data().name == "data/MNIST"
    assert f"downloading MNIST to {Path('data/MNIST/raw')}\n" in capsys.readouterr().err
    serve("refused")
    assert script.load_data().name == "data/MNIST"
    assert "downloading" not in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["refused", "checksum", "silent"])
def test_the_sample_replaces_mnist_with_a_warning_if_the_download_fails(serve, capsys, fault):
    serve(fault)
    socket.setdefaulttimeout(0.3)
    assert script.load_data().name == "sample/MNIST"
    err = capsys.readouterr().err
    assert "\nwarning: no usable MNIST in data" in err
    assert err.endswith("using a sample of 5,000 images\n")


def test_the_next_run_repairs_a_download_that_was_interrupted(serve, monkeypatch):
    serve()
    with monkeypatch.context() as patch:
        patch.setattr(gzip.GzipFile, "read", lambda *_: 1 / 0)  # while the first file is unpacked
        script.load_data()
    assert script.load_data().name == "data/MNIST"


def test_the_sample_of_mnist_does_not_replace_another_data_set(serve):
    serve("refused")
    result = call("--dataset", "FashionMNIST")
    assert result.status == 2
    assert "\nerror: no usable FashionMNIST in data" in result.err
    for name in NAMES:
        assert name in result.err


def test_a_silent_server_is_given_up():
    call("--data-dir", "typo")
    assert 0 < socket.getdefaulttimeout() <= 60
    socket.setdefaulttimeout(None)
