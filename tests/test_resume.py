"""Interrupted, killed and resumed runs, full disks and damaged files: nothing is lost."""

import errno
import io
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import EPOCH, call, fails, read_log, result_of, script, snapshot, start, write_idx

KILLS = int(os.environ.get("KILLS", 3))


@pytest.fixture
def interrupted(small, tmp_path, monkeypatch):
    """The arguments and the directory of the same run, interrupted within its third epoch."""
    arguments, out = [*small[0], "--output-dir", tmp_path / "out"], tmp_path / "out"
    assert interrupt_at(monkeypatch, 10, arguments).status == 130
    return arguments, out


def interrupt_at(monkeypatch, step, arguments):
    """Call main, with a Ctrl-C during the given step of it."""
    sgd_step, calls = script.sgd_step, []

    def interrupting(*vectors, **rest):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        sgd_step(*vectors, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(script, "sgd_step", interrupting)
        return call(*arguments)


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("step", [1, 5, 12, 16])
def test_resumed_after_ctrl_c_ends_like_an_unbroken_run(small, tmp_path, monkeypatch, step):
    arguments, whole = [*small[0], "--output-dir", tmp_path], small[1]
    result = interrupt_at(monkeypatch, step, arguments)
    done = (step - 1) // 4  # the epoch that was under way is lost
    assert result.status == 130 and len(result.lines) == 1
    assert ("--resume" in result.err) == (done > 0)  # which would be refused before that
    assert snapshot(tmp_path).keys() == ({"model.npz", "training_log.txt"} if done else set())
    if done:
        assert len(EPOCH.findall(read_log(tmp_path))) == done
    assert call(*arguments, *(["--resume"] if done else [])).status == 0
    assert result_of(tmp_path) == result_of(whole)


@pytest.mark.skipif(sys.platform == "win32", reason="a console's Ctrl-C reaches every process")
def test_ctrl_c_as_the_user_presses_it(tmp_path):
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # as in a shell
    process = start("--dataset", "sample", "--output-dir", tmp_path, **options)
    for line in process.stdout:
        if line.startswith("Epoch 2,"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("\n") == 1 and "--resume" in err
    assert len(EPOCH.findall(read_log(tmp_path))) >= 2


def test_killed_at_random_instants_and_resumed_ends_like_an_unbroken_run(tmp_path):
    """Three kills, or as many as the environment's KILLS says."""
    rng = random.Random(KILLS)
    write_idx(tmp_path / "data", train=300)
    count = 8 * (KILLS + 2)
    arguments = ["--data-dir", tmp_path / "data", "--epochs", count, "--batch-size", 64]
    assert call(*arguments, "--output-dir", tmp_path / "whole").status == 0
    seconds = [float(x) for x in re.findall(r"Time: (\S+)s", read_log(tmp_path / "whole"))]
    out, done = tmp_path / "out", 0
    for _ in range(KILLS):
        resume = ["--resume"] if (out / "model.npz").exists() else []
        process = start(*arguments, "--output-dir", out, *resume)
        wanted = done + rng.randint(1, 8)
        for line in process.stdout:
            match = EPOCH.match(line)
            if match and int(match[1]) >= wanted:
                break
        time.sleep(rng.uniform(0, 3 * max(*seconds, 0.05)))  # to be killed while it writes, too
        process.kill()
        process.communicate()
        log = EPOCH.findall(read_log(out))
        assert [int(number) for number, _, _ in log] == list(range(1, len(log) + 1))
        done = len(script.load_run(out / "model.npz").losses)
        assert wanted <= done and len(log) in (done - 1, done)
    assert call(*arguments, "--output-dir", out, "--resume").status == 0
    assert result_of(out) == result_of(tmp_path / "whole")


@pytest.mark.usefixtures("no_plots")
def test_log_that_is_ahead_behind_or_gone_is_put_right(interrupted, small):
    arguments, out = interrupted
    state, log = (out / "model.npz").read_bytes(), read_log(out)
    for text in (log + "Epoch 3, Loss: 0.1", log[:-70], None):
        (out / "model.npz").write_bytes(state)
        (out / "training_log.txt").unlink()
        if text is not None:
            (out / "training_log.txt").write_text(text)
        assert call(*arguments, "--resume").status == 0
        assert result_of(out) == result_of(small[1])


def test_finished_run_resumed_makes_its_log_and_plots_again(small, tmp_path, monkeypatch):
    """On another machine, too, and the test images pass through the network only once."""
    arguments, whole = small
    calls, apply_layers = [], script.Autoencoder.apply_layers

    def record(model, a, first, end):
        calls.append((len(a), first, end))
        return apply_layers(model, a, first, end)

    monkeypatch.setattr(script.Autoencoder, "apply_layers", record)
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "training_log.txt").unlink()
    shutil.rmtree(tmp_path / "out" / "plots")
    monkeypatch.setattr(script, "describe_machine", lambda threads: "another machine")
    result = call(*arguments, "--output-dir", tmp_path / "out", "--resume")
    assert (result.status, result.err) == (0, "")
    assert result_of(tmp_path / "out") == result_of(whole)
    assert read_log(tmp_path / "out") == read_log(whole)
    assert snapshot(tmp_path / "out" / "plots") == snapshot(whole / "plots")
    assert calls == [(20, 0, 3), (20, 3, 6)]


OTHERS = [("--epochs", 5, "epochs"), ("--batch-size", 17, "batch_size")]
OTHERS += [("--lr", 0.6, "learning_rate"), ("--momentum", 0.5, "momentum"), ("--seed", 1, "seed")]
OTHERS += [("--dataset", "sample", "data"), ("--data-dir", "other", "data")]
OTHERS += [("edited", 9, "max_gradient_norm"), ("edited", 9, "weight_decay")]


@pytest.mark.parametrize(("flag", "value", "name"), OTHERS)
def test_other_settings_are_refused(interrupted, tmp_path, monkeypatch, flag, value, name):
    arguments, out = interrupted
    before, choose = snapshot(out), script.choose_settings
    if flag == "--data-dir":
        value = write_idx(tmp_path / "other", seed=1)
    if flag == "edited":
        monkeypatch.setattr(script, "choose_settings", lambda *a: replace(choose(*a), **{name: 9}))
    result = call(*arguments, "--resume", *([flag, value] if flag != "edited" else []))
    fails(result, 2)
    stored, wanted = re.search(rf"with {name} (.+), not {name} (.+): resume", result.err).groups()
    assert stored != wanted and (str(value) in wanted or flag == "--data-dir") and result.out == ""
    assert snapshot(out) == before


def test_resume_without_a_run(small, tmp_path):
    result = call(*small[0], "--resume", "--output-dir", tmp_path / "out")
    fails(result, 2, tmp_path / "out" / "model.npz", "--resume")
    assert not list(tmp_path.iterdir())


def test_another_number_of_threads_is_told_and_logged(interrupted):
    arguments, out = interrupted
    before = read_log(out)
    if "BLAS threads 1," in before:
        pytest.skip("needs two cores")
    with script.threadpool_limits(1):
        result = call(*arguments, "--resume")
    assert result.status == 0 and len(result.lines) == 1
    assert "warning" in result.err and "no longer be bit-identical" in result.err
    log = read_log(out)
    assert log.startswith(before) and result.out == log
    machines = re.findall(r"# From epoch (\d) on: .*BLAS threads (\d+),", log)
    assert [epoch for epoch, _ in machines] == ["1", "3"] and machines[1][1] == "1"
    assert [int(epoch) for epoch, _, _ in EPOCH.findall(log)] == [1, 2, 3, 4]


def test_plots_are_never_of_another_run_than_the_log(small, tmp_path, monkeypatch):
    arguments = [*small[0], "--output-dir", tmp_path]
    assert call(*arguments, "--seed", 1).status == 0
    (tmp_path / "plots" / "mine.png").write_bytes(b"mine")
    before = snapshot(tmp_path)
    assert interrupt_at(monkeypatch, 2, arguments).status == 130
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk(os.replace, 1))
        assert call(*arguments).status == 1
    assert snapshot(tmp_path) == before
    for resume in ([], ["--resume"]):
        (tmp_path / "plots" / "loss_curve.png").write_bytes(b"of another run")
        assert interrupt_at(monkeypatch, 7, [*arguments, *resume]).status == 130
        assert read_log(tmp_path) != before["training_log.txt"].decode()
        assert [path.name for path in (tmp_path / "plots").iterdir()] == ["mine.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="cannot replace a file that is being read")
def test_two_runs_in_one_folder_both_end_and_the_model_is_always_whole(small, tmp_path):
    processes = [start(*small[0], "--output-dir", tmp_path) for _ in range(2)]
    reads = 0
    while any(process.poll() is None for process in processes):
        time.sleep(0.02)
        if (tmp_path / "model.npz").exists():
            reads += len(script.load_run(tmp_path / "model.npz").losses) > 0
    assert [process.communicate()[1] for process in processes] == ["", ""]
    assert [process.returncode for process in processes] == [0, 0] and reads > 0
    assert result_of(tmp_path) == result_of(small[1])
    assert not [name for name in snapshot(tmp_path) if name.endswith(".partial")]


# Disks that fail. --------------------------------------------------------------------------------
@pytest.mark.parametrize("place", ["", "plots"])
def test_folder_without_permission_is_noticed_before_training(small, tmp_path, monkeypatch, place):
    temporary_file = tempfile.TemporaryFile

    def refuse(dir):
        if dir == tmp_path / place:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return temporary_file(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(script, "train", None)
    result = call(*small[0], "--output-dir", tmp_path)
    fails(result, 2, "Permission denied", tmp_path / place)


def full_disk(original, at):
    """`original`, except that its call number `at` for a temporary file finds the disk full."""
    calls = []

    def maybe(path, *rest, **options):
        calls.extend([1] * Path(path).name.endswith(".partial"))
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the file")
        return original(path, *rest, **options)

    return maybe


@pytest.mark.parametrize("function", ["write_bytes", "replace"])
@pytest.mark.parametrize("at", [1, 2, 5, 6, 9, 10, 11])
def test_any_write_may_fail_and_nothing_is_lost(small, tmp_path, monkeypatch, function, at):
    """The model and the log are written after each of four epochs, then three plots."""
    arguments, whole = [*small[0], "--output-dir", tmp_path], small[1]
    owner = {"write_bytes": Path, "replace": os}[function]
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, full_disk(getattr(owner, function), at))
        result = call(*arguments)
    order = [*["model.npz", "training_log.txt"] * 4, *(f"plots/{name}" for name in script.PLOTS)]
    fails(result, 1, "No space left on device", f"{tmp_path / order[at - 1]}'")
    files = snapshot(tmp_path).keys()
    assert files == set(order[: at - 1])
    resume = ["--resume"] if "model.npz" in files else []
    if resume:
        assert len(script.load_run(tmp_path / "model.npz").losses) == min(at // 2, 4)
    assert call(*arguments, *resume).status == 0
    assert result_of(tmp_path) == result_of(whole)
    assert snapshot(tmp_path).keys() == set(order)


# Rubbish in model.npz. ---------------------------------------------------------------------------
def repack(content, **changes):
    """The bytes of an .npz file with some arrays changed, or left out for a None."""
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files} | changes
    file = io.BytesIO()
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return file.getvalue()


def flip(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


class Boom:
    def __reduce__(self):
        return (os.mkdir, ("pickle-was-run",))


RUBBISH = {
    "empty": lambda content: b"",
    "text": lambda content: b"not a zip file\n" * 100,
    "no end": lambda content: content[:-30],
    "flipped parameter": lambda content: flip(content, len(content) // 4),
    "flipped velocity": lambda content: flip(content, len(content) * 3 // 4),
    "another dtype": lambda content: b"<f2".join(content.rsplit(b"<f4", 1)),  # of the velocity
    "npy": lambda content: zipfile.ZipFile(io.BytesIO(content)).read("parameters.npy"),
    "no parameters": lambda content: repack(content, parameters=None),
    "no velocity": lambda content: repack(content, velocity=None),
    "too few parameters": lambda content: repack(content, parameters=np.zeros(1000, np.float32)),
    "pickle": lambda content: repack(content, parameters=np.array([Boom()], object)),
    "no metadata": lambda content: repack(content, metadata=None),
    "metadata are no JSON": lambda content: repack(content, metadata="{"),
    "metadata nest deeply": lambda content: repack(content, metadata="[" * 50_000),
    "other settings": lambda content: repack(content, metadata='{"settings": {"rate": 4}}'),
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_bad_model_is_named_in_one_line_and_never_loaded(interrupted, kind):
    arguments, out = interrupted
    path = out / "model.npz"
    path.write_bytes(RUBBISH[kind](path.read_bytes()))
    before = snapshot(out)
    fails(call(*arguments, "--resume"), 2, f"{path} is damaged")
    with pytest.raises(script.InputError):
        script.load_run(path)
    assert snapshot(out) == before and not Path("pickle-was-run").exists()
