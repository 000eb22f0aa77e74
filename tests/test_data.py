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
from conftest import ROOT, call, figures, script, write_idx
from matplotlib.figure import Figure
from torchvision import datasets

NAMES = [name.removesuffix(".gz") for name, _ in datasets.MNIST.resources]


class Server(http.server.ThreadingHTTPServer):
    """Serves MNIST's four archives from loopback, or fails in one of several ways."""

    daemon_threads = True

    def __init__(self, archives, fault):
        super().__init__(("127.0.0.1", 0), Handler)
        self.archives, self.fault, self.over = archives, fault, threading.Event()
        self.requests = []


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
            self.wfile.write(body[: len(body) // 2] if fault in ("early end", "stalls") else body)
            if fault == "stalls":
                self.server.over.wait(20)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Make torchvision download a small data set from a server of the given fault."""
    raw = write_idx(tmp_path / "served")
    archives = {f"{name}.gz": gzip.compress((raw / name).read_bytes()) for name in NAMES}
    resources = [(name, hashlib.md5(body).hexdigest()) for name, body in archives.items()]
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    with contextlib.ExitStack() as stack:

        def start(fault=None, extra_fault="503"):
            servers = [Server(archives, each) for each in (fault, extra_fault)]
            urls = []
            for server in servers:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                stack.callback(server.server_close)
                stack.callback(server.shutdown)
                stack.callback(server.over.set)
                urls.append(f"http://127.0.0.1:{server.server_port}/")
            monkeypatch.setattr(datasets.MNIST, "mirrors", urls[:1])
            monkeypatch.setattr(script, "EXTRA_MIRROR", urls[1])
            return servers[0]

        yield start


def test_sample_is_4000_and_1000_digits_of_all_classes_in_equal_parts():
    data = script.load_data("sample", ROOT / "no such place")
    assert data.name == "sample"
    assert data.train_images.shape == (4000, 784) and data.train_images.dtype == np.uint8
    assert data.test_images.shape == (1000, 784)
    assert Counter(data.test_labels.tolist()) == dict.fromkeys(range(10), 100)
    both = np.concatenate([data.train_images, data.test_images])
    assert len(np.unique(both, axis=0)) == 5000


def test_sample_is_part_of_mnists_training_images(mnist_dir):
    mnist = {image.tobytes() for image in script.load_data("mnist", mnist_dir).train_images}
    sample = script.load_data("sample", mnist_dir)
    for image in (*sample.train_images, *sample.test_images):
        assert image.tobytes() in mnist


def test_images_and_labels_arrive_as_they_are_in_the_files(tmp_path):
    raw = write_idx(tmp_path)
    data = script.load_data("mnist", tmp_path)
    for images, name in ((data.train_images, NAMES[0]), (data.test_images, NAMES[2])):
        assert images.tobytes() == (raw / name).read_bytes()[16:]
    assert data.test_labels.tobytes() == (raw / NAMES[3]).read_bytes()[8:]


def test_identity_tells_data_sets_apart(tmp_path):
    sets = [write_idx(tmp_path / str(n), seed=n).parent.parent for n in range(2)]
    first, second = (script.load_data("mnist", root).identity for root in sets)
    assert first != second
    assert first == script.load_data("mnist", sets[0]).identity
    assert first.startswith("mnist, 50 training and 20 test images")


def damage(path, kind):
    content = path.read_bytes()
    changed = {
        "cut": content[:-1],
        "longer": content + b"\0",
        "empty": b"",
        "half a header": content[:6],
        "wrong magic": b"\0\0\x0d" + content[3:],
        "gzipped": gzip.compress(content),
        "web page": b"<!DOCTYPE html><html><body>403 Forbidden</body></html>",
        "negative count": content[:4] + b"\xff\xff\xff\xff" + content[8:],
        "27 wide": content[:12] + b"\0\0\0\x1b" + content[16:],
    }
    path.write_bytes(changed[kind])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kind",
    ["cut", "longer", "empty", "half a header", "wrong magic", "gzipped", "web page"]
    + ["negative count"],
)
def test_damaged_file_is_named_in_one_line(tmp_path, name, kind):
    path = write_idx(tmp_path / "data") / name
    damage(path, kind)
    for dataset in ("auto", "mnist"):
        result = call(
            "--dataset", dataset, "--data-dir", tmp_path / "data", "--output-dir", tmp_path
        )
        assert (result.status, result.out, len(result.lines)) == (2, "", 1)
        assert str(path) in result.err and "delete it" in result.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


def test_damaged_file_is_named_though_another_is_missing(tmp_path):
    raw = write_idx(tmp_path)
    damage(raw / NAMES[0], "cut")
    (raw / NAMES[3]).unlink()
    with pytest.raises(script.InputError, match=NAMES[0]):
        script.load_data("auto", tmp_path)


def test_images_of_another_size_are_refused(tmp_path):
    damage(write_idx(tmp_path) / NAMES[0], "27 wide")
    with pytest.raises(script.InputError, match=NAMES[0]):
        script.load_data("auto", tmp_path)


@pytest.mark.parametrize(("train", "test"), [(1, 20), (50, 0), (0, 20)])
def test_too_few_images_are_refused(tmp_path, train, test):
    write_idx(tmp_path, train, test)
    with pytest.raises(script.InputError, match="at least 2"):
        script.load_data("auto", tmp_path)


def test_unequal_counts_are_refused(tmp_path):
    raw = write_idx(tmp_path / "one", train=50)
    other = write_idx(tmp_path / "two", train=49)
    (other / NAMES[1]).rename(raw / NAMES[1])
    with pytest.raises(script.InputError, match="50 and 49 train"):
        script.load_data("auto", tmp_path / "one")


def test_labels_that_are_no_digits_are_refused(tmp_path):
    path = write_idx(tmp_path) / NAMES[3]
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(script.InputError, match="label 10"):
        script.load_data("auto", tmp_path)


def test_download(tmp_path, mirror):
    server = mirror()
    data = script.load_data("mnist", tmp_path / "data")
    assert data.train_images.shape == (50, 784)
    count = len(server.requests)
    script.load_data("mnist", tmp_path / "data")
    assert len(server.requests) == count > 0


def test_only_missing_files_are_downloaded(tmp_path, mirror):
    raw = write_idx(tmp_path / "data", seed=5)
    mine = (raw / NAMES[0]).read_bytes()
    (raw / NAMES[2]).unlink()
    server = mirror()
    script.load_data("mnist", tmp_path / "data")
    assert set(server.requests) == {f"{NAMES[2]}.gz"}
    assert (raw / NAMES[0]).read_bytes() == mine


@pytest.mark.parametrize("fault", ["503", "reset", "early end", "checksum", "silent", "stalls"])
def test_failed_download(tmp_path, mirror, monkeypatch, capsys, fault):
    monkeypatch.setattr(script, "DOWNLOAD_TIMEOUT", 0.3)
    mirror(fault, extra_fault=fault)
    place = ("--data-dir", tmp_path / "data")
    began = time.monotonic()
    result = call("--dataset", "mnist", *place, "--output-dir", tmp_path / "out")
    assert time.monotonic() - began < 15  # a hang: the server would be silent for 20 s
    errors = [line for line in result.lines if line.startswith("error: ")]
    assert result.status == 2 and len(errors) == 1 and "Traceback" not in result.err
    assert "--data-dir" in errors[0] and str(tmp_path / "data") in errors[0]
    assert not (tmp_path / "out").exists()
    assert socket.getdefaulttimeout() is None

    assert script.load_data("auto", tmp_path / "data").name == "sample"
    warning = capsys.readouterr().err.splitlines()[-1]
    assert warning.startswith("warning: ")
    assert "sample of 5,000" in warning and "--data-dir" in warning

    mirror()  # what the failures have left does no harm now
    assert script.load_data("auto", tmp_path / "data").name == "mnist"


@pytest.mark.parametrize("fault", ["503", "reset", "early end", "checksum", "silent", "stalls"])
def test_second_mirror_serves_what_the_first_does_not(tmp_path, mirror, monkeypatch, fault):
    monkeypatch.setattr(script, "DOWNLOAD_TIMEOUT", 0.3)
    mirror(fault, extra_fault=None)
    assert len(script.load_data("mnist", tmp_path / "data").train_images) == 50


def test_refused_connection_falls_back_to_the_sample(tmp_path, monkeypatch, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/"
    monkeypatch.setattr(datasets.MNIST, "mirrors", [url])
    monkeypatch.setattr(script, "EXTRA_MIRROR", url)
    assert script.load_data("auto", tmp_path).name == "sample"
    assert "refused" in capsys.readouterr().err
    with pytest.raises(script.InputError, match="refused"):
        script.load_data("mnist", tmp_path)


def test_fallback_says_so_in_log_and_titles(tmp_path, mirror, monkeypatch):
    titles = []
    record = lambda figure, file: titles.append(figure.get_suptitle())  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", record)
    mirror("503")
    result = call("--epochs", 1, "--data-dir", tmp_path / "data", "--output-dir", tmp_path)
    assert result.status == 0 and "warning: " in result.err
    assert "# data: sample, 4000" in (tmp_path / "training_log.txt").read_text()
    assert len(titles) == 3 and all("sample of 5,000" in title for title in titles)


def test_data_dir_that_is_a_file_counts_as_no_mnist(tmp_path, mirror):
    mirror()
    (tmp_path / "file").write_text("")
    with pytest.raises(script.InputError, match="the download failed"):
        script.load_data("mnist", tmp_path / "file")


def test_sample_needs_no_network(tmp_path, mirror):
    server = mirror()
    script.load_data("sample", tmp_path)
    assert not server.requests


@pytest.mark.parametrize(("train", "test", "batch_size"), [(50, 20, 16), (5, 3, 128), (2, 2, 1)])
def test_any_number_of_images_trains(tmp_path, train, test, batch_size):
    write_idx(tmp_path, train, test)
    result = call(
        *("--data-dir", tmp_path, "--output-dir", tmp_path / "out"),
        *("--epochs", 2, "--batch-size", batch_size, "--lr", 0.1),
    )
    assert result.status == 0, result.err
    assert len(figures(tmp_path / "out" / "training_log.txt")) == 2
    assert len(list((tmp_path / "out" / "plots").iterdir())) == 3
