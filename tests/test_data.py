"""Reading MNIST: damaged files, downloads that fail in every way, the sample as a fallback."""

import contextlib
import gzip
import hashlib
import http.server
import socket
import threading
import time
from collections import Counter

import numpy as np
import pytest
from conftest import NAMES, call, script, snapshot, write_idx
from torchvision import datasets

FAULTS = ["503", "reset", "checksum", "silent", "stalls"]


class Server(http.server.ThreadingHTTPServer):
    """Serves MNIST's four archives from loopback, or fails in one of several ways."""

    daemon_threads = True

    def __init__(self, archives, fault):
        super().__init__(("127.0.0.1", 0), Handler)
        self.archives, self.fault, self.over = archives, fault, threading.Event()
        self.requests = []

    def handle_error(self, request, client_address):
        """A client that goes away, as it should when the server is silent, is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.requests.append(name)
        fault, body = self.server.fault, self.server.archives[name]
        if fault == "silent":
            self.server.over.wait(20)
        elif fault == "503":
            self.send_error(503)
        elif fault == "reset":
            self.connection.close()
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fault == "checksum":
                body = body[:-1] + bytes([body[-1] ^ 1])
            if fault == "stalls":
                self.wfile.write(body[: len(body) // 2])
                self.server.over.wait(20)
            else:
                self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Make torchvision download a small data set from a server with the given fault."""
    raw = write_idx(tmp_path / "served")
    archives = {f"{name}.gz": gzip.compress((raw / name).read_bytes()) for name in NAMES}
    resources = [(name, hashlib.md5(body).hexdigest()) for name, body in archives.items()]
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    with contextlib.ExitStack() as stack:

        def serve(fault=None):
            server = Server(archives, fault)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            stack.callback(server.over.set)
            url = f"http://127.0.0.1:{server.server_port}/"
            monkeypatch.setattr(datasets.MNIST, "mirrors", [url])
            return server

        yield serve


def test_sample_is_4000_and_1000_digits_of_all_classes_in_equal_parts(sample):
    identity, images, test_images, labels = sample
    assert identity.startswith("sample of MNIST, 4000 training and 1000 test images, sha256 ")
    assert (images.shape, test_images.shape) == ((4000, 784), (1000, 784))
    assert images.dtype == test_images.dtype == labels.dtype == np.uint8
    assert Counter(labels.tolist()) == dict.fromkeys(range(10), 100)
    assert len(np.unique(np.concatenate([images, test_images]), axis=0)) == 5000


def test_sample_is_part_of_mnists_training_images(mnist_dir, sample):
    mnist = {image.tobytes() for image in script.load_data("mnist", mnist_dir)[1]}
    assert all(image.tobytes() in mnist for part in sample[1:3] for image in part)


def test_images_and_labels_arrive_as_they_are_in_the_files(tmp_path):
    raw = write_idx(tmp_path)
    identity, images, test_images, labels = script.load_data("mnist", tmp_path)
    assert identity.startswith("MNIST, 50 training and 20 test images, sha256 ")
    assert images.tobytes() == (raw / NAMES[0]).read_bytes()[16:]
    assert test_images.tobytes() == (raw / NAMES[2]).read_bytes()[16:]
    assert labels.tobytes() == (raw / NAMES[3]).read_bytes()[8:]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", [16, -1])
def test_identity_covers_every_image_and_label(tmp_path, name, place):
    path = write_idx(tmp_path) / name
    before = script.load_data("mnist", tmp_path)[0]
    assert script.load_data("mnist", tmp_path)[0] == before
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert script.load_data("mnist", tmp_path)[0] != before


DAMAGES = {
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "wrong magic": lambda content: b"\0\0\x0d" + content[3:],
    "web page": lambda content: b"<!DOCTYPE html><html><body>403 Forbidden</body></html>",
    "huge count": lambda content: content[:4] + b"\xff\xff\xff\xff" + content[8:],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_file_is_one_line_and_never_a_reason_to_take_the_sample(tmp_path, name, kind):
    raw = write_idx(tmp_path / "data")
    (raw / name).write_bytes(DAMAGES[kind]((raw / name).read_bytes()))
    for dataset in ("auto", "mnist"):
        arguments = ("--dataset", dataset, "--data-dir", tmp_path / "data")
        result = call(*arguments, "--output-dir", tmp_path / "out")
        assert (result.status, result.out, len(result.lines)) == (2, "", 1)
        assert str(raw) in result.err and "delete" in result.err and "--data-dir" in result.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(("train", "test"), [(1, 20), (50, 1), (0, 20)])
def test_too_few_images_are_refused(tmp_path, train, test):
    write_idx(tmp_path, train, test)
    with pytest.raises(script.InputError):
        script.load_data("auto", tmp_path)


def test_images_and_labels_that_do_not_belong_together_are_refused(tmp_path):
    raw, other = write_idx(tmp_path / "one"), write_idx(tmp_path / "two", train=49)
    (raw / NAMES[1]).write_bytes((other / NAMES[1]).read_bytes())
    with pytest.raises(script.InputError, match="49 labels"):
        script.load_data("auto", tmp_path / "one")


def test_labels_that_are_no_digits_are_refused(tmp_path):
    path = write_idx(tmp_path) / NAMES[3]
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(script.InputError, match="labels up to 10"):
        script.load_data("auto", tmp_path)


def test_download_happens_once(tmp_path, mirror):
    server = mirror()
    assert len(script.load_data("mnist", tmp_path / "data")[1]) == 50
    assert set(server.requests) == {f"{name}.gz" for name in NAMES}
    server.requests.clear()
    assert len(script.load_data("auto", tmp_path / "data")[1]) == 50
    assert not server.requests


def test_only_missing_files_are_downloaded(tmp_path, mirror):
    raw = write_idx(tmp_path / "data", seed=5)
    (raw / NAMES[2]).unlink()
    mine = snapshot(raw)
    server = mirror()
    script.load_data("auto", tmp_path / "data")
    assert set(server.requests) == {f"{NAMES[2]}.gz"}
    assert mine.items() <= snapshot(raw).items()


@pytest.fixture
def impatient(monkeypatch):
    """Make the seconds that a server may stay silent a fraction of one."""
    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: set_timeout(seconds / 100))
    yield
    set_timeout(None)


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_download(tmp_path, mirror, impatient, fault):
    server = mirror(fault)
    places = ("--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out")
    began = time.monotonic()
    result = call("--dataset", "mnist", *places)
    assert time.monotonic() - began < 15  # the server would be silent for 20 s
    errors = [line for line in result.lines if line.startswith("error: ")]
    assert result.status == 2 and len(errors) == 1 and "Traceback" not in result.err
    assert str(tmp_path / "data") in errors[0] and "--data-dir" in errors[0]
    assert not (tmp_path / "out").exists() and server.requests

    result = call("--epochs", 1, *places)
    warnings = [line for line in result.lines if line.startswith("warning: ")]
    assert result.status == 0 and len(warnings) == 1 and "sample" in warnings[0]
    assert "data sample of MNIST, 4000" in (tmp_path / "out" / "training_log.txt").read_text()

    mirror()  # what the failures have left does no harm now
    assert script.load_data("auto", tmp_path / "data")[0].startswith("MNIST, 50")


def test_download_that_fails_half_way_is_an_error_and_is_completed_later(tmp_path, mirror):
    server = mirror("503")
    raw = write_idx(tmp_path / "data")
    (raw / NAMES[3]).unlink()
    with pytest.raises(script.InputError):
        script.load_data("auto", tmp_path / "data")
    server.fault = None
    assert script.load_data("auto", tmp_path / "data")[0].startswith("MNIST, 50")


def test_refused_connection_and_unusable_folder_fall_back_to_the_sample(
    tmp_path, monkeypatch, capsys
):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    monkeypatch.setattr(datasets.MNIST, "mirrors", [url])
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "data", tmp_path / "file"):
        assert script.load_data("auto", place)[0].startswith("sample")
        assert capsys.readouterr().err.splitlines()[-1].startswith("warning: ")
        with pytest.raises(script.InputError):
            script.load_data("mnist", place)
