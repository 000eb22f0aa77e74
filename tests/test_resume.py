"""Stop it, kill it, fill its disk, feed it rubbish: what was complete stays complete."""

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SCRIPT, call, figures, same, script, weights, write_idx
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure


@pytest.fixture(scope="module", autouse=True)
def quick_figures():
    """Drawing takes longer than all else in these tests, and others look at the figures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, file: file.write(b"a figure"))
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A data set of 50 images, and four epochs on it that were never interrupted."""
    directory = tmp_path_factory.mktemp("small")
    write_idx(directory)
    arguments = ["--data-dir", directory, "--batch-size", 16, "--lr", 0.5, "--epochs", 4]
    assert call(*arguments, "--output-dir", directory / "whole").status == 0
    return arguments, directory / "whole"


@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory):
    """The directory of the same run, interrupted by Ctrl-C within its third epoch."""
    directory = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        arguments = [*small[0], "--output-dir", directory]
        assert stop_at(patch, 2 * 4 + 2, arguments).status == 130
    return directory


@pytest.fixture
def interrupted(small, stopped, tmp_path):
    """The arguments and a copy of the directory of the interrupted run."""
    out = tmp_path / "out"
    shutil.copytree(stopped, out)
    return [*small[0], "--output-dir", out], out


def stop_at(monkeypatch, step, arguments, number=signal.SIGINT, times=1):
    """Call main, with a signal, or several, during the given step of it."""
    sgd_step, count = script.sgd_step, 0

    def signalling(*rest):
        nonlocal count
        count += 1
        if count == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return sgd_step(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(script, "sgd_step", signalling)
        return call(*arguments)


def snapshot(directory):
    """Name and content of all files below directory."""
    files = (path for path in Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def assert_equal_runs(one, other):
    assert figures(one / "training_log.txt") == figures(other / "training_log.txt")
    assert same(weights(one / "model.npz"), weights(other / "model.npz"))
    assert same(weights(one / "checkpoint.npz"), weights(other / "checkpoint.npz"))


@pytest.mark.parametrize(
    ("step", "number", "status"),
    [*((step, signal.SIGINT, 130) for step in (1, 5, 12, 16)), (11, signal.SIGTERM, 143)],
)
def test_signal_keeps_the_complete_epochs_and_resume_ends_like_an_unbroken_run(
    small, tmp_path, monkeypatch, step, number, status
):
    arguments, whole = small
    arguments = [*arguments, "--output-dir", tmp_path]
    handler = signal.getsignal(number)
    result = stop_at(monkeypatch, step, arguments, number)
    assert signal.getsignal(number) == handler
    epochs = (step - 1) // 4  # the one that was under way is lost
    assert result.status == status and "--resume" in result.err and len(result.lines) == 1
    assert figures(tmp_path / "training_log.txt") == figures(whole / "training_log.txt")[:epochs]
    assert len(script.Run.load(tmp_path / "checkpoint.npz").history) == epochs
    assert (tmp_path / "plots" / "loss_curve.png").exists() == (epochs > 0)

    assert call(*arguments, "--resume").status == 0
    assert_equal_runs(tmp_path, whole)


def test_second_signal_leaves_at_once_with_whole_files(small, tmp_path, monkeypatch):
    arguments, whole = small
    arguments = [*arguments, "--output-dir", tmp_path]
    plot_losses = script.plot_losses

    def plot_and_interrupt(*rest):
        plot_losses(*rest)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(script, "plot_losses", plot_and_interrupt)
    result = stop_at(monkeypatch, 9, arguments)
    assert result.status == 130 and not result.err
    assert sorted(snapshot(tmp_path)) == [
        "checkpoint.npz",
        "plots/loss_curve.png",
        "training_log.txt",
    ]
    monkeypatch.undo()
    assert call(*arguments, "--resume").status == 0
    assert_equal_runs(tmp_path, whole)


def test_second_signal_within_a_mini_batch_leaves_at_once(small, tmp_path, monkeypatch):
    arguments, whole = small
    arguments = [*arguments, "--output-dir", tmp_path]
    result = stop_at(monkeypatch, 9, arguments, signal.SIGTERM, times=2)
    assert result.status == 143 and not result.err
    assert sorted(snapshot(tmp_path)) == ["checkpoint.npz", "training_log.txt"]
    assert call(*arguments, "--resume").status == 0
    assert_equal_runs(tmp_path, whole)


def test_signal_before_training_leaves_at_once_and_writes_nothing(small, tmp_path, monkeypatch):
    load_data = script.load_data

    def interrupt(*rest):
        os.kill(os.getpid(), signal.SIGINT)
        return load_data(*rest)

    monkeypatch.setattr(script, "load_data", interrupt)
    result = call(*small[0], "--output-dir", tmp_path / "out")
    assert result.status == 130 and not result.err and not (tmp_path / "out").exists()


def test_ctrl_c_as_the_user_presses_it(tmp_path):
    command = [sys.executable, SCRIPT, "--dataset", "sample", "--output-dir", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("Epoch 2,"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("\n") == 1 and "--resume" in err
    assert len(figures(tmp_path / "training_log.txt")) >= 2


def test_unfinished_run_is_not_destroyed(interrupted, small):
    arguments, out = interrupted
    before = snapshot(out)
    result = call(*arguments)
    assert (result.status, result.out, len(result.lines)) == (2, "", 1)
    for part in ("--resume", "--overwrite", "2 of 4", str(out / "checkpoint.npz")):
        assert part in result.err
    assert snapshot(out) == before
    assert call(*arguments, "--overwrite").status == 0
    assert_equal_runs(out, small[1])


def test_finished_run_makes_room_for_a_new_one(small, tmp_path):
    arguments, whole = small
    shutil.copytree(whole, tmp_path / "out")
    assert call(*arguments, "--output-dir", tmp_path / "out", "--seed", 1).status == 0
    log = tmp_path / "out" / "training_log.txt"
    assert figures(log) != figures(whole / "training_log.txt")


def test_finished_run_resumed_says_so_and_draws_its_plots_again(small, tmp_path):
    arguments, whole = small
    shutil.copytree(whole, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "plots")
    result = call(*arguments, "--output-dir", tmp_path / "out", "--resume")
    assert result.status == 0 and "finished" in result.out
    after = snapshot(tmp_path / "out")
    assert after.keys() == before.keys()
    for name in before.keys() - {"checkpoint.npz"}:
        assert zip_free(after[name]) == zip_free(before[name]), name


def zip_free(content):
    """The members of a zip file, which also holds times of writing; else the content."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return content
    archive = zipfile.ZipFile(io.BytesIO(content))
    return {name: archive.read(name) for name in archive.namelist()}


def test_log_that_is_ahead_behind_or_gone_is_put_right(interrupted, small):
    arguments, out = interrupted
    log, checkpoint = out / "training_log.txt", (out / "checkpoint.npz").read_bytes()
    whole = log.read_text()
    for text in (whole + "Epoch 3, Loss: 0.1", whole[:-70], None):
        (out / "checkpoint.npz").write_bytes(checkpoint)
        if text is None:
            log.unlink()
        else:
            log.write_text(text)
        assert call(*arguments, "--resume").status == 0
        assert_equal_runs(out, small[1])


def test_resume_takes_the_settings_from_the_checkpoint(interrupted, small):
    _, out = interrupted
    assert call("--resume", "--output-dir", out).status == 0
    assert_equal_runs(out, small[1])


CONTRADICTIONS = [
    ("--epochs", "5", "4"),
    ("--batch-size", "17", "16"),
    ("--lr", "0.6", "0.5"),
    ("--momentum", "0.5", "0.9"),
    ("--seed", "1", "0"),
    ("--blas-threads", "1", "8"),
    ("--dataset", "sample", "mnist"),
]


@pytest.mark.parametrize(("flag", "value", "stored"), CONTRADICTIONS)
def test_contradicting_flag_is_refused_with_both_values(interrupted, flag, value, stored):
    _, out = interrupted
    before = snapshot(out)
    result = call("--resume", "--output-dir", out, flag, value)
    assert (result.status, result.out, len(result.lines)) == (2, "", 1)
    for part in (flag, value, stored):
        assert part in result.err
    assert snapshot(out) == before


def test_other_data_are_refused(interrupted, tmp_path):
    _, out = interrupted
    write_idx(tmp_path / "other", seed=1)
    before = snapshot(out)
    result = call("--resume", "--output-dir", out, "--data-dir", tmp_path / "other")
    assert (result.status, len(result.lines)) == (2, 1) and result.err.count("sha256") == 2
    assert snapshot(out) == before


def test_resume_without_a_checkpoint(tmp_path):
    result = call("--resume", "--output-dir", tmp_path / "out")
    assert (result.status, result.out, len(result.lines)) == (2, "", 1)
    assert str(tmp_path / "out" / "checkpoint.npz") in result.err
    assert not list(tmp_path.iterdir())


# Disks that fail. --------------------------------------------------------------------------------


def failing(original, at):
    """`original`, but the call number `at` finds the disk full."""
    count = 0

    def maybe(*rest, **options):
        nonlocal count
        count += 1
        if count == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the file")
        return original(*rest, **options)

    return maybe


@pytest.mark.parametrize(
    ("function", "at"), [*(("fsync", at) for at in range(1, 11)), ("replace", 2), ("replace", 9)]
)
def test_every_write_may_fail_and_nothing_is_lost(small, tmp_path, monkeypatch, function, at):
    """Two files at the start, one for each of four epochs, three plots and the model."""
    arguments, whole = small
    arguments = [*arguments, "--output-dir", tmp_path]
    monkeypatch.setattr(os, function, failing(getattr(os, function), at))
    result = call(*arguments)
    monkeypatch.undo()
    assert result.status == 1 and len(result.lines) == 1 and "No space" in result.err
    files = snapshot(tmp_path)
    expected = ["training_log.txt", "checkpoint.npz", *["checkpoint.npz"] * 4]
    expected += ["plots/loss_curve.png", "plots/latent_space.png", "plots/reconstructions.png"]
    assert files.keys() == set(expected[: at - 1])
    if "checkpoint.npz" in files:
        run = script.Run.load(tmp_path / "checkpoint.npz")
        assert len(run.history) == min(at - 3, 4)
        assert call(*arguments, "--resume").status == 0
        assert_equal_runs(tmp_path, whole)


def test_half_a_log_line_is_taken_back(interrupted, small, monkeypatch):
    arguments, out = interrupted
    before = (out / "training_log.txt").read_text()
    path_open = Path.open

    class HalfFile(io.StringIO):
        def write(self, text):
            with path_open(out / "training_log.txt", "a") as file:
                file.write(text[: len(text) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_half(path, mode="r", **options):
        return HalfFile() if mode == "a" else path_open(path, mode, **options)

    monkeypatch.setattr(Path, "open", open_half)
    result = call(*arguments, "--resume")
    monkeypatch.undo()
    assert result.status == 1 and len(result.lines) == 1
    assert (out / "training_log.txt").read_text() == before
    assert call(*arguments, "--resume").status == 0
    assert_equal_runs(out, small[1])


@pytest.mark.parametrize("limit", [9_000_000])
def test_file_size_limit(small, tmp_path, limit):
    """A limit of the operating system makes the writes themselves fail, in their midst."""
    arguments = [*small[0], "--output-dir", tmp_path]
    command = [sys.executable, SCRIPT, *map(str, arguments)]

    def restrict():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=restrict)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "File too large" in result.stderr
    assert snapshot(tmp_path).keys() <= {"training_log.txt"}


def test_full_disk_is_found_before_training(small, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "train", None)
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    result = call(*small[0], "--output-dir", tmp_path / "out")
    assert result.status == 1 and len(result.lines) == 1 and str(tmp_path / "out") in result.err
    assert not snapshot(tmp_path)


@pytest.mark.parametrize("place", ["file", "file/below", "read-only/out"])
def test_unusable_output_directory_is_found_before_training(small, tmp_path, monkeypatch, place):
    monkeypatch.setattr(script, "train", None)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "read-only").mkdir(mode=0o500)
    if place.startswith("read-only") and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    result = call(*small[0], "--output-dir", tmp_path / place)
    assert result.status in (1, 2) and len(result.lines) == 1 and "Traceback" not in result.err
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_missing_output_directory_is_made(small, tmp_path):
    assert call(*small[0], "--output-dir", tmp_path / "a" / "b" / "c").status == 0
    assert_equal_runs(tmp_path / "a" / "b" / "c", small[1])


# Rubbish in checkpoint and model files. ----------------------------------------------------------


def repack(path, **changes):
    """The bytes of an .npz file with some arrays changed, or left out for a None."""
    with np.load(path, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays.update(changes)
    file = io.BytesIO()
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return file.getvalue()


def about(path, change):
    """The array `about` of a checkpoint after `change` of its decoded content."""
    with np.load(path) as archive:
        content = json.loads(archive["about"].item())
    change(content)
    return np.array(json.dumps(content).encode(), "S32768")


def compressed(path):
    file = io.BytesIO()
    np.savez_compressed(file, parameters=np.zeros(80_000_000, np.float32))
    return file.getvalue()


def huge_header(path, shape):
    """A model of which one array claims another shape than its data have."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "parameters.npy":
                header = io.BytesIO()
                description = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(header, description)
                content = header.getvalue() + content[128:]
            new.writestr(name, content)
    return out.getvalue()


class Boom:
    def __reduce__(self):
        return (os.mkdir, ("pickle-was-run",))


def nan_in(shape):
    array = np.zeros(shape, np.float32)
    array[-1] = np.nan
    return array


SIZE = script.Autoencoder().parameters.size
RUBBISH = {
    "empty": lambda p: b"",
    "text": lambda p: b"not a zip file\n" * 100,
    "half": lambda p: p.read_bytes()[: p.stat().st_size // 2],
    "no end": lambda p: p.read_bytes()[:-30],
    "no start": lambda p: p.read_bytes()[1000:],
    "flipped data byte": lambda p: flip(p.read_bytes(), p.stat().st_size // 2),
    "npy": lambda p: zipfile.ZipFile(p).read("parameters.npy"),
    "lacks an array": lambda p: repack(p, parameters=None),
    "too short": lambda p: repack(p, parameters=np.zeros(SIZE - 1, np.float32)),
    "too long": lambda p: repack(p, parameters=np.zeros(SIZE + 1, np.float32)),
    "wrong shape": lambda p: repack(p, parameters=np.zeros((1, SIZE), np.float32)),
    "wrong dtype": lambda p: repack(p, parameters=np.zeros(SIZE, np.float64)),
    "integers": lambda p: repack(p, parameters=np.zeros(SIZE, np.int32)),
    "big-endian": lambda p: repack(p, parameters=np.zeros(SIZE, ">f4")),
    "NaN": lambda p: repack(p, parameters=nan_in(SIZE)),
    "infinity": lambda p: repack(p, parameters=np.full(SIZE, np.inf, np.float32)),
    "pickle": lambda p: repack(p, parameters=np.array([Boom()], object)),
    "huge array": compressed,
    "huge header": lambda p: huge_header(p, (10**6, 10**6)),
    "negative header": lambda p: huge_header(p, (-SIZE,)),
    "no header": lambda p: huge_header(p, ()),
}
ABOUT = {
    "no settings": lambda content: content.pop(),
    "missing setting": lambda content: content[0].pop("seed"),
    "setting out of range": lambda content: content[0].update(momentum="2"),
    "setting of another type": lambda content: content[0].update(epochs=[4]),
    "epochs that never were": lambda content: content.__setitem__(2, 3),
    "more epochs than there are": lambda content: content.__setitem__(2, 5),
    "negative epochs": lambda content: content.__setitem__(2, -1),
    "epochs as a text": lambda content: content.__setitem__(2, "2"),
}
CHECKPOINT_RUBBISH = {
    **RUBBISH,
    **{name: lambda p, c=change: repack(p, about=about(p, c)) for name, change in ABOUT.items()},
    "about is no JSON": lambda p: repack(p, about=np.array(b"{", "S32768")),
    "about nests deeply": lambda p: repack(p, about=np.array(b"[" * 32768, "S32768")),
    "about is another JSON": lambda p: repack(p, about=np.array(b"3", "S32768")),
    "NaN in velocity": lambda p: repack(p, velocity=nan_in(SIZE)),
    "history too long": lambda p: repack(p, history=np.zeros((3, 3))),
}


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("kind", CHECKPOINT_RUBBISH)
def test_bad_checkpoint_is_named_in_one_line(interrupted, kind):
    _, out = interrupted
    path = out / "checkpoint.npz"
    path.write_bytes(CHECKPOINT_RUBBISH[kind](path))
    before = snapshot(out)
    for flags in (["--resume"], []):
        result = call("--output-dir", out, *flags)
        assert (result.status, result.out, len(result.lines)) == (2, "", 1)
        assert f"{path} can't be used: " in result.err and len(result.err) > len(str(path)) + 30
    assert snapshot(out) == before
    assert not Path("pickle-was-run").exists()


@pytest.mark.parametrize("kind", RUBBISH)
def test_bad_model_is_a_value_error_that_names_it(small, tmp_path, kind):
    path = tmp_path / "model.npz"
    path.write_bytes(RUBBISH[kind](small[1] / "model.npz"))
    with pytest.raises(ValueError, match="model.npz can't be used: ."):
        script.Autoencoder.load(path)
    assert not Path("pickle-was-run").exists()


def test_small_file_that_unpacks_to_much_is_refused_unread(tmp_path):
    path = tmp_path / "model.npz"
    path.write_bytes(compressed(path))
    tracemalloc.start()
    with pytest.raises(ValueError, match="bytes"):
        script.Autoencoder.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000  # an eighth of what the file declares


def test_missing_model_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        script.Autoencoder.load(tmp_path / "model.npz")


def damage(data, content):
    """Flip, cut and insert bytes of content as hypothesis decides, near its ends above all."""
    ends = st.integers(0, 3000) | st.integers(-3000, -1) | st.integers(0, len(content) - 1)
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(ends) % max(len(content), 1)
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            content = (
                content[:place]
                + data.draw(st.binary(min_size=1, max_size=8))
                + content[place + 8 :]
            )
        elif kind == "cut":
            content = content[:place] + content[place + data.draw(st.integers(1, 5000)) :]
        else:
            content = content[:place] + data.draw(st.binary(max_size=100)) + content[place:]
    return content


def loads_or_says_why(load, errors):
    """Whatever the file, an object or a clean error, soon and in little memory."""
    begin, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        assert load() is not None
    except errors as error:
        assert str(error)
    assert time.monotonic() - begin < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300_000  # KB


FUZZ = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", ["model.npz", "checkpoint.npz"])
def test_fuzzed_npz_files(small, tmp_path, name):
    content = (small[1] / name).read_bytes()
    load = {"model.npz": script.Autoencoder.load, "checkpoint.npz": script.Run.load}[name]

    @FUZZ
    @given(st.data())
    def fuzz(data):
        (tmp_path / name).write_bytes(damage(data, content))
        loads_or_says_why(lambda: load(tmp_path / name), script.InputError)

    fuzz()


def test_fuzzed_idx_files(small, tmp_path):
    raw = write_idx(tmp_path)
    originals = {path: path.read_bytes() for path in raw.iterdir()}

    @FUZZ
    @given(st.data(), st.sampled_from(sorted(originals)))
    def fuzz(data, path):
        for each, content in originals.items():
            each.write_bytes(damage(data, content) if each == path else content)
        loads_or_says_why(lambda: script.load_data("mnist", tmp_path), script.InputError)

    fuzz()


def test_kills():
    """A handful; `python tests/kill.py 100` is the whole test."""
    command = [sys.executable, ROOT / "tests" / "kill.py", "4"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "4 kills" in result.stdout
