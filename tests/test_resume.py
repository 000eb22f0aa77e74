"""Interrupted, killed and resumed runs, full disks and damaged files: nothing is lost."""

import errno
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import EPOCH, call, fails, read_log, result_of, script, snapshot, start, write_idx

KILLS = int(os.environ.get("KILLS", 3))


def interrupting(function, at):
    """`function`, except that its call number `at` is a Ctrl-C."""
    calls = []

    def maybe(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return maybe


@pytest.fixture
def interrupted(small, tmp_path, monkeypatch):
    """The arguments and the directory of the small run, interrupted within its third epoch."""
    arguments, out = [*small[0], "--output-dir", tmp_path / "out"], tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(script, "sgd_step", interrupting(script.sgd_step, 10))
        assert call(*arguments).status == 130
    return arguments, out


# An epoch has four steps, and writes its model by the second os.replace: the log's is the first.
INSTANTS = [("script.sgd_step", 1, 0), ("script.sgd_step", 5, 1), ("script.sgd_step", 16, 3)]
INSTANTS += [("os.replace", 2, 0), ("os.replace", 3, 1), ("script.plot_losses", 1, 4)]


@pytest.mark.parametrize(("function", "at", "done"), INSTANTS)
def test_ctrl_c_says_what_is_saved_and_the_rest_ends_like_an_unbroken_run(
    small, tmp_path, monkeypatch, function, at, done
):
    arguments, whole = [*small[0], "--output-dir", tmp_path], small[1]
    owner, name = {"script": script, "os": os}[function.split(".")[0]], function.split(".")[1]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupting(getattr(owner, name), at))
        result = call(*arguments)
    promise = f"interrupted; --resume continues after epoch {done}" if done else "interrupted"
    assert (result.status, result.lines) == (130, [promise])
    assert len(EPOCH.findall(read_log(tmp_path))) == done
    assert snapshot(tmp_path).keys() == {"training_log.txt", *["model.npz"] * (done > 0)}
    assert call(*arguments, *(["--resume"] if done else [])).status == 0
    assert result_of(tmp_path) == result_of(whole)
    assert snapshot(tmp_path / "plots") == snapshot(whole / "plots")


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
        (out / ".model.npz.1.partial").write_bytes(b"what a kill within a save leaves")
        log = EPOCH.findall(read_log(out))
        assert [int(number) for number, _, _ in log] == list(range(1, len(log) + 1))
        done = len(script.load_run(out / "model.npz").losses)
        assert wanted <= done and len(log) in (done - 1, done)
    assert call(*arguments, "--output-dir", out, "--resume").status == 0
    assert result_of(out) == result_of(tmp_path / "whole")
    assert snapshot(out).keys() == snapshot(tmp_path / "whole").keys()


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("change", [lambda log: f"{log}Epoch 3, Loss: 0.1", lambda log: log[:-70]])
def test_log_that_is_ahead_or_behind_is_put_right(interrupted, small, change):
    arguments, out = interrupted
    (out / "training_log.txt").write_text(change(read_log(out)))
    assert call(*arguments, "--resume").status == 0
    assert result_of(out) == result_of(small[1])
    assert read_log(out).count("# From epoch") == 2 and "# From epoch 3 on: " in read_log(out)


@pytest.mark.usefixtures("no_plots")
def test_log_grows_line_by_line_in_one_file(small, tmp_path, monkeypatch):
    """As for a reader who follows it with tail -f."""
    inodes, train_epoch = [], script.train_epoch

    def record(*arguments):
        inodes.append((tmp_path / "training_log.txt").stat().st_ino)
        return train_epoch(*arguments)

    monkeypatch.setattr(script, "train_epoch", record)
    result = call(*small[0], "--output-dir", tmp_path)
    assert len(inodes) == 4 and len(set(inodes)) == 1
    assert result.out == read_log(tmp_path)


def test_finished_run_resumed_draws_its_plots_again(small, tmp_path):
    arguments, whole = small
    shutil.copytree(whole, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "plots")
    result = call(*arguments, "--output-dir", tmp_path / "out", "--resume")
    assert (result.status, result.err) == (0, "")
    assert result_of(tmp_path / "out") == result_of(whole)
    assert snapshot(tmp_path / "out" / "plots") == snapshot(whole / "plots")


OTHERS = [("--epochs", 5, "epochs"), ("--batch-size", 17, "batch_size")]
OTHERS += [("--lr", 0.6, "learning_rate"), ("--momentum", 0.5, "momentum"), ("--seed", 1, "seed")]
OTHERS += [("--dataset", "sample", "data"), ("--data-dir", "other", "data")]


@pytest.mark.parametrize(("flag", "value", "name"), OTHERS)
def test_other_settings_and_data_are_refused_and_named(interrupted, tmp_path, flag, value, name):
    arguments, out = interrupted
    before = snapshot(out)
    if flag == "--data-dir":
        write_idx(tmp_path / "other", seed=1)
        value = tmp_path / "other"
    result = call(*arguments, "--resume", flag, value)
    fails(result, 2, out / "model.npz", "--resume")
    stored, wanted = re.findall(rf"'{name}: (.+?)'", result.err)
    assert stored != wanted and (name == "data" or wanted == str(value)) and result.out == ""
    assert snapshot(out) == before


def test_resume_without_a_run(small, tmp_path):
    result = call(*small[0], "--resume", "--output-dir", tmp_path / "out")
    fails(result, 2, tmp_path / "out" / "model.npz", "--resume")
    assert not list(tmp_path.iterdir())


def test_plots_are_never_of_another_run_than_the_log(small, tmp_path, monkeypatch):
    arguments = [*small[0], "--output-dir", tmp_path]
    assert call(*arguments, "--seed", 1).status == 0
    (tmp_path / "plots" / "mine.png").write_bytes(b"mine")
    monkeypatch.setattr(script, "sgd_step", interrupting(script.sgd_step, 2))
    assert call(*arguments).status == 130
    assert "# seed: 0\n" in read_log(tmp_path)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["mine.png"]


# Disks that fail. --------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["out", "out/plots"])
def test_output_directory_that_is_a_file_is_noticed_before_training(small, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    result = call(*small[0], "--output-dir", tmp_path / "out")
    fails(result, 2, tmp_path / "out", "--output-dir")
    assert result.out == "" and (tmp_path / name).read_text() == "mine"


FAILING = [("write_bytes", at) for at in (1, 2, 5, 6, 8)]


def full_disk(original, at):
    """`original`, except that its call number `at` for a temporary file finds the disk full."""
    calls = []

    def maybe(path, *rest, **options):
        calls.extend([1] * Path(path).name.endswith(".partial"))
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(path, *rest, **options)

    return maybe


@pytest.mark.parametrize(("function", "at"), [("replace", 2), *FAILING])
def test_any_write_may_fail_and_nothing_is_lost(small, tmp_path, monkeypatch, function, at):
    """The log is begun, the model is written after each of four epochs, then three plots."""
    arguments, whole = [*small[0], "--output-dir", tmp_path], small[1]
    owner = {"write_bytes": Path, "replace": os}[function]
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, full_disk(getattr(owner, function), at))
        result = call(*arguments)
    order = ["training_log.txt", *["model.npz"] * 4, *(f"plots/{name}" for name in script.PLOTS)]
    fails(result, 2 if at == 1 else 1, "No space left on device", f"{tmp_path / order[at - 1]}'")
    files = snapshot(tmp_path).keys()
    assert files == set(order[: at - 1])
    assert call(*arguments, *(["--resume"] if "model.npz" in files else [])).status == 0
    assert result_of(tmp_path) == result_of(whole)
    assert snapshot(tmp_path).keys() == set(order)


# Rubbish in model.npz. ---------------------------------------------------------------------------
class Boom:
    def __reduce__(self):
        return (os.mkdir, ("pickle-was-run",))


def repack(path, **changes):
    """Change some arrays of an .npz file."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files} | changes
    np.savez(path, **arrays)


RUBBISH = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"not a zip file\n" * 100),
    "no end": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "no log": lambda path: np.savez(path, parameters=np.zeros(5)),
    "too few parameters": lambda path: repack(path, parameters=np.zeros(1000, np.float32)),
    "pickle": lambda path: repack(path, parameters=np.array([Boom()], object)),
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_bad_model_is_named_in_one_line_and_never_loaded(interrupted, kind):
    arguments, out = interrupted
    path = out / "model.npz"
    RUBBISH[kind](path)
    before = snapshot(out)
    fails(call(*arguments, "--resume"), 2, path)
    with pytest.raises(script.InputError):
        script.load_run(path)
    assert snapshot(out) == before and not Path("pickle-was-run").exists()
