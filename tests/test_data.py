"""Reading MNIST: its files in every state, failing downloads, and the sample as a fallback."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import NAMES, call, fails, read_log, script, snapshot, start, write_idx
from torchvision import datasets


def assert_same_as_files(dataset, raw):
    assert dataset.images.tobytes() == (raw / NAMES[0]).read_bytes()[16:]
    assert dataset.test_images.tobytes() == (raw / NAMES[2]).read_bytes()[16:]
    assert dataset.test_labels.tobytes() == (raw / NAMES[3]).read_bytes()[8:]


def compress(raw, names=NAMES):
    """Replace files by .gz archives."""
    for name in names:
        (raw / f"{name}.gz").write_bytes(gzip.compress((raw / name).read_bytes(), mtime=0))
        (raw / name).unlink()


def test_sample_is_4000_and_1000_digits_of_all_classes_in_equal_parts(sample):
    counts = "4000 training and 1000 test images"
    assert sample.description.startswith(f"a sample of MNIST, {counts}, sha256 ")
    images, test_images, labels = sample.images, sample.test_images, sample.test_labels
    assert (images.shape, test_images.shape) == ((4000, 784), (1000, 784))
    assert images.dtype == test_images.dtype == labels.dtype == np.uint8
    assert Counter(labels.tolist()) == dict.fromkeys(range(10), 100)
    assert len(np.unique(np.concatenate([images, test_images]), axis=0)) == 5000


def test_only_mnist_is_called_mnist_and_the_sample_is_part_of_it(mnist_dir, sample):
    mnist = script.load_data("mnist", mnist_dir)
    assert mnist.name == "MNIST" and len(mnist.images) == 60_000
    known = {image.tobytes() for image in mnist.images}
    assert all(image.tobytes() in known for image in [*sample.images, *sample.test_images])


@pytest.mark.parametrize("choice", ["auto", "mnist"])
@pytest.mark.parametrize("compressed", [False, True])
def test_files_of_another_data_set_are_read_and_kept(tmp_path, monkeypatch, choice, compressed):
    """Without Tensor.numpy, as where PyTorch was built for another version of NumPy."""
    raw, original = write_idx(tmp_path / "fashion"), write_idx(tmp_path / "original")
    if compressed:
        compress(raw)
    (raw.parent / "processed").mkdir()  # what old torchvision versions have left
    for name in ("training.pt", "test.pt"):
        arrays = (torch.zeros(9, 28, 28, dtype=torch.uint8), torch.zeros(9))
        torch.save(arrays, raw.parent / "processed" / name)
    before = snapshot(raw)
    monkeypatch.setattr(torch.Tensor, "numpy", None)
    dataset = script.load_data(choice, tmp_path / "fashion")
    assert dataset.description.startswith("fashion, 50 training and 20 test images, sha256 ")
    assert_same_as_files(dataset, original)
    assert snapshot(raw) == snapshot(original) | before


@pytest.mark.parametrize("name", NAMES)
def test_description_depends_on_every_image_and_label(tmp_path, name):
    path = write_idx(tmp_path) / name
    content = path.read_bytes()
    before = script.load_data("mnist", tmp_path).description
    for place in (16, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert script.load_data("mnist", tmp_path).description != before


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_web_page(path):
    path.write_bytes(b"<!DOCTYPE html><html><body>403 Forbidden</body></html>")


def rename_as_7_zip_does(path):
    path.rename(path.with_name(path.name.replace("-idx", ".idx")))


def compress_and_cut(path):
    compress(path.parent, [path.name])
    cut(path.with_name(f"{path.name}.gz"))


def make_smaller(path):
    """Fewer images than labels, or the other way round, or images of another size."""
    write_idx(path.parent / "other", train=40, test=10)
    shutil.copy(path.parent / "other" / "MNIST" / "raw" / path.name, path)


DAMAGES = [cut, replace_by_web_page, rename_as_7_zip_does, compress_and_cut, make_smaller]


@pytest.mark.parametrize(("damage", "name"), [*zip(DAMAGES, [*NAMES, NAMES[0]], strict=True)])
def test_damaged_or_missing_file_is_one_line_and_never_a_reason_to_take_the_sample(
    tmp_path, name, damage
):
    raw = write_idx(tmp_path / "data")
    damage(raw / name)
    before = snapshot(tmp_path)
    result = call("--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out")
    fails(result, 2, raw, *NAMES, ".gz", "--dataset sample")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("train", "test"), [(1, 20), (50, 1), (0, 20)])
def test_too_few_images_are_refused(tmp_path, train, test):
    raw = write_idx(tmp_path, train, test)
    fails(call("--data-dir", tmp_path, "--output-dir", tmp_path / "out"), 2, raw)


def test_lack_of_memory_is_one_line(small, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "train_epoch", lambda *_: np.zeros(1 << 62, np.uint8))
    fails(call(*small[0], "--output-dir", tmp_path), 1, "Unable to allocate")


BROKEN = ["RuntimeError('operator torchvision::nms does not\\nexist')", "OSError('a DLL')", None]


@pytest.mark.parametrize("error", BROKEN)
@pytest.mark.parametrize("flags", [(), ("--dataset", "sample")])
def test_torchvision_that_cannot_be_imported_is_no_reason_to_take_the_sample(
    tmp_path, error, flags
):
    text = f"raise {error}" if error else "import no_such_module"
    (tmp_path / "torchvision.py").write_text(text)
    process = start(*flags, env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: torchvision") and "install" in err
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == [
        "torchvision.py"
    ]


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
    monkeypatch.chdir(tmp_path)  # MNIST is downloaded to ./data.
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


@pytest.mark.parametrize("data_dir", [None, "given"])
def test_download_happens_once_and_says_where_to(tmp_path, mirror, capsys, data_dir):
    server = mirror()
    directory = tmp_path / data_dir if data_dir else None
    dataset = script.load_data("auto", directory)
    assert f"downloading MNIST to {directory or 'data'}/MNIST/raw\n" in capsys.readouterr().err
    assert_same_as_files(dataset, write_idx(tmp_path / "original"))
    assert set(server.requests) == {f"{name}.gz" for name in NAMES}
    server.requests.clear()
    script.load_data("auto", directory)
    assert not server.requests and "downloading" not in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["404", "refused", "checksum", "stalls"])
def test_failed_download(tmp_path, mirror, monkeypatch, fault):
    monkeypatch.setattr(script, "SERVER_TIMEOUT", 0.3)
    server = mirror(fault)
    began = time.monotonic()
    for flags in (("--dataset", "mnist"), ("--data-dir", tmp_path / "given")):
        result = call(*flags, "--output-dir", tmp_path / "out")
        errors = [line for line in result.lines if line.startswith("error: ")]
        assert result.status == 2 and len(errors) == 1 and "Traceback" not in result.err
        assert "MNIST/raw" in errors[0] and all(name in errors[0] for name in NAMES)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
    assert time.monotonic() - began < 15  # the server would be silent for 20 s
    assert bool(server.requests) == (fault != "refused")

    result = call("--epochs", 1, "--output-dir", tmp_path / "out")
    warnings = [line for line in result.lines if line.startswith("warning: ")]
    assert result.status == 0 and len(warnings) == 1 and "sample" in warnings[0]
    assert "# data: a sample of MNIST, 4000" in read_log(tmp_path / "out")

    mirror()  # What a failed download has left does not keep the next one from succeeding.
    assert script.load_data("auto", None).name == "data"


def test_download_never_replaces_files_in_a_directory_that_the_user_has_named(tmp_path, mirror):
    raw = write_idx(tmp_path / "mine", seed=5)
    (raw / NAMES[2]).unlink()
    compress(raw, NAMES[:1])
    before = snapshot(tmp_path)
    server = mirror()
    with pytest.raises(script.InputError, match=NAMES[2]):
        script.load_data("auto", tmp_path / "mine")
    assert not server.requests and snapshot(tmp_path).items() >= before.items()


def test_kaggles_folder_is_no_reason_to_download(tmp_path, mirror):
    server, raw = mirror(), write_idx(tmp_path / "mine")
    for name in NAMES:
        rename_as_7_zip_does(raw / name)
    with pytest.raises(script.InputError, match=NAMES[2]):
        script.load_data("auto", tmp_path / "mine")
    assert not server.requests


def test_script_without_the_sample_says_so(tmp_path):
    """As where somebody has only downloaded the script."""
    shutil.copy(script.__file__, tmp_path / "alone.py")
    command = [sys.executable, tmp_path / "alone.py", "--dataset", "sample"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert str(tmp_path / "data" / "sample" / "MNIST" / "raw") in result.stderr
