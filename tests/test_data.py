"""Reading MNIST: its files in every state, failing downloads, and the sample as a fallback."""

import builtins
import contextlib
import functools
import gzip
import hashlib
import http.server
import os
import sys
import threading
import time
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import NAMES, call, fail_for, fails, read_log, script, snapshot, write_idx
from torchvision import datasets


def assert_same_as_files(dataset, raw):
    assert dataset.images.tobytes() == (raw / NAMES[0]).read_bytes()[16:]
    assert dataset.test_images.tobytes() == (raw / NAMES[2]).read_bytes()[16:]
    assert dataset.test_labels.tobytes() == (raw / NAMES[3]).read_bytes()[8:]


def compress(raw, names=NAMES, change=bytes):
    """Replace files by .gz archives of their changed content."""
    for name in names:
        (raw / f"{name}.gz").write_bytes(gzip.compress(change((raw / name).read_bytes())))
        (raw / name).unlink()


def test_sample_is_4000_and_1000_digits_of_all_classes_in_equal_parts(sample):
    counts = "4000 training and 1000 test images"
    assert sample.description.startswith(f"a sample of MNIST, {counts}, sha256 ")
    images, test_images, labels = sample.images, sample.test_images, sample.test_labels
    assert (images.shape, test_images.shape) == ((4000, 784), (1000, 784))
    assert images.dtype == test_images.dtype == labels.dtype == np.uint8
    assert Counter(labels.tolist()) == dict.fromkeys(range(10), 100)
    assert len(np.unique(np.concatenate([images, test_images]), axis=0)) == 5000


def test_sample_is_part_of_mnists_training_images(mnist_dir, sample):
    mnist = {image.tobytes() for image in script.load_data("mnist", mnist_dir).images}
    images = [*sample.images, *sample.test_images]
    assert all(image.tobytes() in mnist for image in images)


@pytest.mark.parametrize("choice", ["auto", "mnist"])
@pytest.mark.parametrize("place", ["", "MNIST/raw"])
@pytest.mark.parametrize("compressed", [False, True])
def test_any_files_are_read_and_nothing_is_written(tmp_path, choice, place, compressed):
    raw, original = write_idx(tmp_path / "data"), write_idx(tmp_path / "original")
    if compressed:
        compress(raw)
    (tmp_path / "data" / NAMES[1]).write_text("a stray file must not hide the folder")
    (raw.parent / "processed").mkdir()  # what old torchvision versions have left
    for name in ("training.pt", "test.pt"):
        arrays = (torch.zeros(9, 28, 28, dtype=torch.uint8), torch.zeros(9))
        torch.save(arrays, raw.parent / "processed" / name)
    before = snapshot(tmp_path)
    dataset = script.load_data(choice, tmp_path / "data" / place)
    assert dataset.description.startswith("MNIST, 50 training and 20 test images, sha256 ")
    assert_same_as_files(dataset, original)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
def test_description_depends_on_every_image_and_label(tmp_path, name):
    path = write_idx(tmp_path) / name
    content = path.read_bytes()
    before = script.load_data("mnist", tmp_path).description
    assert script.load_data("mnist", tmp_path).description == before
    for place in (16, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert script.load_data("mnist", tmp_path).description != before


# Files that are damaged, unusable or unreadable. -------------------------------------------------
DAMAGES = {
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "wrong magic": lambda content: b"\0\0\x0d" + content[3:],
    "web page": lambda content: b"<!DOCTYPE html><html><body>403 Forbidden</body></html>",
    "huge count": lambda content: content[:4] + b"\xff\xff\xff\xff" + content[8:],
}
DAMAGED = [(what, kind) for what in ("file", "content of the archive") for kind in DAMAGES]
DAMAGED += [("archive", kind) for kind in ("cut", "empty", "wrong magic", "web page")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("damaged", "kind"), DAMAGED)
def test_damaged_file_is_no_reason_to_take_the_sample(tmp_path, name, damaged, kind):
    raw, end = write_idx(tmp_path / "data"), "" if damaged == "file" else ".gz"
    if damaged == "archive":
        compress(raw, [name])
    path = raw / (name + end * (damaged == "archive"))
    path.write_bytes(DAMAGES[kind](path.read_bytes()))
    if damaged == "content of the archive":
        compress(raw, [name])
    before = snapshot(tmp_path)
    for dataset in ("auto", "mnist"):
        arguments = ("--dataset", dataset, "--data-dir", tmp_path / "data")
        result = call(*arguments, "--output-dir", tmp_path / "out")
        fails(result, 2, raw / f"{name}{end}", "delete it or use another --data-dir")
    assert snapshot(tmp_path) == before


def alike(path, value):
    path.write_bytes(path.read_bytes()[:16] + bytes([value]) * (path.stat().st_size - 16))


UNUSABLE = {
    "one image": ("identical", lambda root, raw: write_idx(root, train=1)),
    "one test image": ("identical", lambda root, raw: write_idx(root, test=1)),
    "no image": ("damaged", lambda root, raw: write_idx(root, train=0)),
    "black images": ("identical", lambda root, raw: alike(raw / NAMES[0], 0)),
    "grey test images": ("identical", lambda root, raw: alike(raw / NAMES[2], 128)),
    "missing label": (r"labels \(49,\)", lambda root, raw: write_labels(raw, [1] * 49)),
    "label that is no digit": ("label of 10", lambda root, raw: write_labels(raw, [1] * 49 + [10])),
}


def write_labels(raw, labels):
    header = b"\0\0\x08\x01" + len(labels).to_bytes(4, "big")
    (raw / NAMES[1]).write_bytes(header + bytes(labels))


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_images_and_labels_are_refused_with_the_reason(tmp_path, kind):
    reason, change = UNUSABLE[kind]
    change(tmp_path, write_idx(tmp_path))
    with pytest.raises(script.InputError, match=reason):
        script.load_data("auto", tmp_path)


@pytest.mark.parametrize("place", ["", "MNIST/raw", f"MNIST/raw/{NAMES[2]}"])
def test_what_cannot_be_read_is_named_and_not_to_be_deleted(tmp_path, monkeypatch, place):
    write_idx(tmp_path / "data")
    path = tmp_path / "data" / place
    owner, function = (builtins, "open") if path.is_file() else (os, "listdir")
    fail_for(
        monkeypatch, owner, function, path, PermissionError(13, "Permission denied", str(path))
    )
    result = call("--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out")
    fails(result, 2, "Permission denied", path)
    assert "delete" not in result.err and not (tmp_path / "out").exists()


def test_lack_of_memory_is_no_reason_to_delete_files(tmp_path, monkeypatch):
    fail_for(monkeypatch, builtins, "open", write_idx(tmp_path) / NAMES[0], MemoryError())
    result = call("--data-dir", tmp_path, "--output-dir", tmp_path / "out")
    assert (result.status, result.lines) == (1, ["error: not enough memory"])


@pytest.mark.parametrize("function", ["compute_baselines", "train_epoch", "plot_latent_space"])
def test_lack_of_memory_later_is_one_line(small, tmp_path, monkeypatch, function):
    monkeypatch.setattr(script, function, lambda *_: np.zeros(1 << 62, np.uint8))
    fails(call(*small[0], "--output-dir", tmp_path), 1, "Unable to allocate")


@pytest.mark.parametrize("choice", ["auto", "mnist"])
def test_data_dir_that_is_a_file_is_refused(tmp_path, choice):
    (tmp_path / "file").write_text("mine")
    flags = ("--dataset", choice, "--data-dir", tmp_path / "file", "--output-dir", tmp_path)
    fails(call(*flags), 2, tmp_path / "file")


def test_missing_sample_and_missing_torchvision_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SAMPLE_FOLDER", tmp_path)
    result = call("--dataset", "sample", "--output-dir", tmp_path / "out")
    fails(result, 2, f"{tmp_path / NAMES[0]}'")  # not the archive, which is not missed
    for module in ("torchvision.datasets.mnist", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, module, None)
        flags = ("--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out")
        fails(
            call("--dataset", "sample" if module.endswith("mnist") else "auto", *flags), 1, module
        )


# Downloads. --------------------------------------------------------------------------------------
class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder. It may fall silent in the middle of a file."""

    def do_GET(self):
        self.server.requests.append(self.path[1:])
        super().do_GET()

    def copyfile(self, source, output):
        content = source.read()
        stalls = self.server.fault == "stalls"
        output.write(content[: len(content) // 2] if stalls else content)
        if stalls:
            self.server.over.wait(20)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Make torchvision download a small data set from a server with the given fault."""
    served = write_idx(tmp_path / "served")
    compress(served)
    contents = {name: (served / f"{name}.gz").read_bytes() for name in NAMES}
    resources = [(f"{name}.gz", hashlib.md5(contents[name]).hexdigest()) for name in NAMES]
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    with contextlib.ExitStack() as stack:

        def serve(fault=None):
            for name, content in contents.items():
                damaged = content[:-1] + b"!" if fault == "checksum" else content
                (served / f"{name}.gz").write_bytes(damaged)
            folder = tmp_path if fault == "404" else served
            handler = functools.partial(Handler, directory=folder)
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            server.fault, server.requests, server.over = fault, [], threading.Event()
            server.daemon_threads = True
            server.handle_error = lambda *_: None  # clients may go away
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            stack.callback(server.over.set)
            if fault == "refused":
                server.socket.close()
            url = f"http://127.0.0.1:{server.server_port}/"
            monkeypatch.setattr(datasets.MNIST, "mirrors", [url])
            return server

        yield serve


def test_download_happens_once(tmp_path, mirror):
    server = mirror()
    raw = tmp_path / "data" / "MNIST" / "raw"
    dataset = script.load_data("mnist", tmp_path / "data")
    assert_same_as_files(dataset, write_idx(tmp_path / "original"))
    assert set(server.requests) == {f"{name}.gz" for name in NAMES}
    assert sorted(path.name for path in raw.iterdir()) == sorted(NAMES)
    server.requests.clear()
    assert script.load_data("auto", tmp_path / "data").name == "MNIST"
    assert not server.requests


@pytest.mark.parametrize("compressed", [False, True])
def test_download_only_adds_what_is_missing(tmp_path, mirror, compressed):
    raw, original = write_idx(tmp_path / "data", seed=5), write_idx(tmp_path / "original", seed=5)
    (raw / NAMES[2]).unlink()
    if compressed:
        compress(raw, [NAMES[0], NAMES[1], NAMES[3]])
    before = snapshot(raw)
    mirror()
    dataset = script.load_data("auto", tmp_path / "data")
    served = (write_idx(tmp_path / "other") / NAMES[2]).read_bytes()
    assert snapshot(raw) == {**before, NAMES[2]: served}
    (original / NAMES[2]).write_bytes(served)
    assert_same_as_files(dataset, original)


@pytest.mark.parametrize("fault", ["404", "refused", "checksum", "stalls"])
def test_failed_download(tmp_path, mirror, monkeypatch, fault):
    monkeypatch.setattr(script, "SERVER_TIMEOUT", 0.3)
    server = mirror(fault)
    places = ("--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out")
    began = time.monotonic()
    result = call("--dataset", "mnist", *places)
    assert time.monotonic() - began < 15  # the server would be silent for 20 s
    errors = [line for line in result.lines if line.startswith("error: ")]
    assert result.status == 2 and len(errors) == 1 and "Traceback" not in result.err
    assert str(tmp_path / "data") in errors[0] and "--data-dir" in errors[0]
    assert bool(server.requests) == (fault != "refused")
    assert not (tmp_path / "out").exists() and not snapshot(tmp_path / "data")

    result = call("--epochs", 1, *places)
    warnings = [line for line in result.lines if line.startswith("warning: ")]
    assert result.status == 0 and len(warnings) == 1 and "sample" in warnings[0]
    assert str(tmp_path / "data" / "MNIST" / "raw") in warnings[0]
    assert "# a sample of MNIST, 4000" in read_log(tmp_path / "out")

    (write_idx(tmp_path / "part") / NAMES[3]).unlink()  # A part of MNIST is no reason for that.
    with pytest.raises(script.InputError, match=NAMES[3]):
        script.load_data("auto", tmp_path / "part")

    mirror()
    assert script.load_data("auto", tmp_path / "data").name == "MNIST"


def test_interrupted_download_leaves_nothing_behind(tmp_path, mirror, monkeypatch):
    mirror()
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=KeyboardInterrupt))
    result = call("--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out")
    assert (result.status, result.lines[-1]) == (130, "interrupted")
    assert not snapshot(tmp_path / "data")
