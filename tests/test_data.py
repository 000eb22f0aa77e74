"""Reading MNIST: its files in every state, failing downloads, and the sample as a fallback."""

import functools
import gzip
import hashlib
import http.server
import os
import shutil
import socket
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import NAMES, call, fails, script, snapshot, start, write_idx
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


@pytest.mark.parametrize("compressed", [False, True])
def test_files_of_another_data_set_are_read_and_kept(tmp_path, monkeypatch, compressed):
    """Without Tensor.numpy, as where PyTorch was built for another version of NumPy."""
    raw, original = write_idx(tmp_path / "fashion"), write_idx(tmp_path / "original")
    if compressed:
        compress(raw)
    (raw.parent / "processed").mkdir()  # as left by old torchvision versions
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(9, 28, 28), torch.zeros(9)), raw.parent / "processed" / name)
    before = snapshot(raw)
    monkeypatch.setattr(torch.Tensor, "numpy", None)
    dataset = script.load_data("auto", tmp_path / "fashion")
    assert dataset.description.startswith("fashion, 50 training and 20 test images, sha256 ")
    assert_same_as_files(dataset, original)
    assert snapshot(raw) == snapshot(original) | before
    labels = (raw / NAMES[1]).read_bytes()
    (raw / NAMES[1]).write_bytes(labels[:-1] + b"\0")
    assert script.load_data("auto", tmp_path / "fashion").description != dataset.description


def compress_and_cut(path):
    compress(path.parent, [path.name])
    archive = path.with_name(f"{path.name}.gz")
    archive.write_bytes(archive.read_bytes()[:-1])


def make_smaller(path):
    """Fewer images than labels."""
    write_idx(path.parent / "other", train=40, test=10)
    shutil.copy(path.parent / "other" / "MNIST" / "raw" / path.name, path)


def rename_as_7_zip_does(path):
    path.rename(path.with_name(path.name.replace("-idx", ".idx")))


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "web page": lambda path: path.write_bytes(b"<!DOCTYPE html><html>403 Forbidden</html>"),
    "renamed": rename_as_7_zip_does,
    "cut archive": compress_and_cut,
    "fewer images than labels": make_smaller,
    "no image": lambda path: write_idx(path.parents[2], train=0),
}


@pytest.mark.parametrize(("damage", "name"), [*zip(DAMAGES, NAMES * 2, strict=False)])
def test_damaged_or_missing_file_is_one_line_and_never_a_reason_to_take_the_sample(
    tmp_path, name, damage
):
    raw = write_idx(tmp_path / "data")
    DAMAGES[damage](raw / name)
    before = snapshot(tmp_path)
    result = call("--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out")
    fails(result, 2, raw, *NAMES, ".gz", "--dataset sample")
    assert snapshot(tmp_path) == before


def test_lack_of_memory_is_one_line(small, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "train_epoch", lambda *_: np.zeros(1 << 62, np.uint8))
    fails(call(*small[0], "--output-dir", tmp_path), 1, "Unable to allocate")


def test_script_without_the_sample_names_the_missing_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SAMPLE_DIR", tmp_path / "sample")
    fails(call("--dataset", "sample", "--output-dir", tmp_path), 2, tmp_path / "sample")


BROKEN = [("raise RuntimeError('operator nms does not\\nexist')", ())]
BROKEN += [("import no_such_module", ("--dataset", "sample"))]


@pytest.mark.parametrize(("text", "flags"), BROKEN)
def test_torchvision_that_cannot_be_imported_is_no_reason_to_take_the_sample(tmp_path, text, flags):
    (tmp_path / "torchvision.py").write_text(text)
    process = start(*flags, env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: torchvision") and "install" in err
    assert {path.name for path in tmp_path.iterdir()} <= {"torchvision.py", "__pycache__"}


# Downloads. --------------------------------------------------------------------------------------
class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Make torchvision download a small data set from a server with the given fault."""
    monkeypatch.chdir(tmp_path)  # MNIST is downloaded to ./data.
    monkeypatch.setattr(script, "SERVER_TIMEOUT", 0.3)
    compress(write_idx(tmp_path / "served"))
    archives = {path.name: path.read_bytes() for path in tmp_path.rglob("*.gz")}
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in archives.items()]
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    servers = []

    def serve(fault=None):
        folder = tmp_path / f"mirror with fault {fault}"
        folder.mkdir()
        for name, content in archives.items():
            if fault != "404":
                (folder / name).write_bytes(content[fault == "checksum" :])
        handler = functools.partial(Handler, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        if fault == "refused":
            server.server_close()
        elif fault != "stalls":  # then it accepts connections and never answers
            threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [url])

    yield serve
    socket.setdefaulttimeout(None)


@pytest.mark.parametrize("data_dir", [None, "given"])
def test_download_happens_once_and_says_where_to(tmp_path, mirror, capsys, data_dir):
    mirror()
    directory = tmp_path / data_dir if data_dir else None
    dataset = script.load_data("auto", directory)
    assert f"downloading MNIST to {directory or 'data'}/MNIST/raw\n" in capsys.readouterr().err
    assert_same_as_files(dataset, write_idx(tmp_path / "original"))
    mirror("refused")
    script.load_data("auto", directory)
    assert "downloading" not in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["404", "refused", "checksum", "stalls"])
def test_failed_download(tmp_path, mirror, capsys, fault):
    mirror(fault)
    for flags in (("--dataset", "mnist"), ("--data-dir", tmp_path / "given")):
        result = call(*flags, "--output-dir", tmp_path / "out")
        (error,) = [line for line in result.lines if line.startswith("error: ")]
        assert result.status == 2 and "Traceback" not in result.err
        assert "MNIST/raw" in error and all(name in error for name in NAMES)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
    assert script.load_data("auto", None).name == "a sample of MNIST"
    lines = capsys.readouterr().err.splitlines()
    (warning,) = [line for line in lines if line.startswith("warning: ")]
    assert "data/MNIST/raw" in warning and "sample" in warning
    mirror()  # What a failed download has left does not keep the next one from succeeding.
    assert script.load_data("auto", None).name == "data"


@pytest.mark.parametrize("rename", [False, True])
def test_download_never_replaces_files_in_a_directory_that_the_user_has_named(
    tmp_path, mirror, capsys, rename
):
    raw = write_idx(tmp_path / "mine", seed=5)
    compress(raw, NAMES[:1])
    for name in NAMES[1:]:
        rename_as_7_zip_does(raw / name) if rename else (raw / NAMES[2]).unlink(missing_ok=True)
    before = snapshot(tmp_path / "mine")
    mirror()
    with pytest.raises(script.InputError, match=NAMES[2]):
        script.load_data("auto", tmp_path / "mine")
    assert snapshot(tmp_path / "mine").items() >= before.items()
    assert "downloading" not in capsys.readouterr().err
