"""Interrupted, killed and resumed runs, full disks and damaged files: nothing is lost."""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import EPOCH, call, fails, read_log, result_of, script, snapshot, start, write_idx

KILLS = int(os.environ.get("KILLS", 2))
FULL = OSError(28, "No space left on device")


def raising(function, error, at):
    """`function`, except that its call number `at` raises the error."""
    calls = []

    def maybe(*arguments, **options):
        calls.append(1)
        if len(calls) == at:
            raise error
        return function(*arguments, **options)

    return maybe


# An epoch has four steps. The log is written first, the model after each epoch, then three plots.
INSTANTS = [
    (KeyboardInterrupt(), script, "sgd_step", 1, 0),
    (KeyboardInterrupt(), script, "sgd_step", 16, 3),
    (KeyboardInterrupt(), script, "plot_losses", 1, 4),
    *((error, os, "replace", at, at - 2) for at in (2, 3) for error in (KeyboardInterrupt(), FULL)),
    *((FULL, Path, "write_bytes", at, at - 2) for at in (2, 5)),
    (FULL, Path, "write_bytes", 8, 4),
]


@pytest.mark.parametrize(("error", "owner", "name", "at", "done"), INSTANTS)
def test_whatever_ends_a_run_it_can_be_resumed(
    small, tmp_path, monkeypatch, error, owner, name, at, done
):
    arguments, whole = [*small[0], "--output-dir", tmp_path], small[1]
    if done < 4:  # Then plots would only take time.
        monkeypatch.setattr(script, "draw_plots", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, raising(getattr(owner, name), error, at))
        result = call(*arguments)
    if error is FULL:
        order = ["log", *["model.npz"] * 4, *script.PLOTS]
        fails(result, 1, "No space left on device", f"{order[at - 1]}'")
    else:
        told = f"interrupted; --resume continues after epoch {done}" if done else "interrupted"
        assert (result.status, result.lines) == (130, [told])
    assert len(EPOCH.findall(read_log(tmp_path))) == done
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files - set(script.PLOTS) == {"training_log.txt", *["model.npz"] * (done > 0)}
    assert call(*arguments, *(["--resume"] if done else [])).status == 0
    assert result_of(tmp_path) == result_of(whole)
    if done == 4:
        assert snapshot(tmp_path / "plots") == snapshot(whole / "plots")


@pytest.mark.skipif(sys.platform == "win32", reason="a console's Ctrl-C reaches every process")
def test_ctrl_c_as_the_user_presses_it(tmp_path):
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # as in a shell
    process = start("--dataset", "sample", "--output-dir", tmp_path, **options)
    for line in process.stdout:
        if line.startswith("Epoch 1,"):
            inode = (tmp_path / "training_log.txt").stat().st_ino
        if line.startswith("Epoch 2,"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("\n") == 1 and "--resume" in err
    assert (tmp_path / "training_log.txt").stat().st_ino == inode  # It grows, as for tail -f.


def test_killed_at_random_instants_and_resumed_ends_like_an_unbroken_run(tmp_path, monkeypatch):
    """Two kills, or as many as the environment's KILLS says."""
    rng = random.Random(KILLS)
    write_idx(tmp_path / "data", train=300)
    count = 8 * (KILLS + 2)
    arguments = ["--data-dir", tmp_path / "data", "--epochs", count, "--batch-size", 64]
    assert call(*arguments, "--output-dir", tmp_path / "whole").status == 0
    out, done = tmp_path / "out", 0
    for _ in range(KILLS):
        process = start(*arguments, "--output-dir", out, *(["--resume"] if done else []))
        wanted = done + rng.randint(1, 8)
        for line in process.stdout:
            match = EPOCH.match(line)
            if match and int(match[1]) >= wanted:
                break
        time.sleep(rng.uniform(0, 0.15))  # to be killed while it writes, too
        process.kill()
        process.communicate()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", raising(os.replace, KeyboardInterrupt, 1))
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            patch.setattr(os, "getpid", lambda: 1)
            script.write_atomically(out / "model.npz", b"as by a kill within a save")
        log = EPOCH.findall(read_log(out))
        assert [int(number) for number, _, _ in log] == list(range(1, len(log) + 1))
        done = len(script.load_run(out / "model.npz").losses)
        assert wanted <= done and len(log) in (done - 1, done)
    assert call(*arguments, "--output-dir", out, "--resume").status == 0
    assert result_of(out) == result_of(tmp_path / "whole")
    assert snapshot(out).keys() == snapshot(tmp_path / "whole").keys()
    assert f"# From epoch {done + 1} on: " in read_log(out)


def test_plots_are_never_of_another_run_than_the_log(small, tmp_path, monkeypatch):
    arguments = [*small[0], "--output-dir", tmp_path]
    assert call(*arguments, "--seed", 1).status == 0
    (tmp_path / "plots" / "mine.png").write_bytes(b"mine")
    monkeypatch.setattr(script, "sgd_step", raising(script.sgd_step, KeyboardInterrupt, 2))
    assert call(*arguments).status == 130
    assert "# seed: 0\n" in read_log(tmp_path)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["mine.png"]


@pytest.mark.parametrize("name", ["out", "out/plots"])
def test_output_directory_that_is_a_file_is_noticed_before_training(small, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    result = call(*small[0], "--output-dir", tmp_path / "out")
    fails(result, 2, tmp_path / "out", "--output-dir")
    assert result.out == "" and (tmp_path / name).read_text() == "mine"


RUBBISH = {
    "missing": lambda path: path.unlink(),
    "text": lambda path: path.write_bytes(b"not a zip file\n" * 100),
    "no end": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "no log": lambda path: np.savez(path, parameters=np.zeros(5)),
}


@pytest.mark.parametrize("kind", RUBBISH)
def test_bad_model_is_named_in_one_line(small, tmp_path, kind):
    out = shutil.copytree(small[1], tmp_path / "out")
    RUBBISH[kind](out / "model.npz")
    before = snapshot(out)
    result = call(*small[0], "--output-dir", out, "--resume")
    fails(result, 2, out / "model.npz", "without --resume")
    assert snapshot(out) == before
