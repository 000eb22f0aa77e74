"""Interrupted, killed and resumed runs, full disks and damaged files: nothing is lost."""

import itertools
import os
import pkgutil
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import EPOCH, call, fails, read_log, result_of, script, snapshot, start, write_idx

KILLS = int(os.environ.get("KILLS", 2))  # how often a process is killed
CTRL_C, FULL = KeyboardInterrupt, OSError(28, "No space left on device")


def raising(function, error, at):
    """`function`, except that its call number `at` raises the error."""
    numbers = itertools.count(1)

    def maybe(*arguments, **options):
        if next(numbers) == at:
            raise error
        return function(*arguments, **options)

    return maybe


# An epoch has four steps. The log is written first, the model after each epoch, then three plots.
INSTANTS = [  # the error; what raises it, in which call; complete epochs; end of the message
    (CTRL_C, "mnist_autoencoder.sgd_step", 16, 3, "--resume continues after epoch 3"),
    (CTRL_C, "mnist_autoencoder.plot_losses", 1, 4, "--resume continues after epoch 4"),
    (CTRL_C, "os.replace", 2, 0, "interrupted"),
    (CTRL_C, "os.replace", 3, 1, "--resume continues after epoch 1"),
    (FULL, "pathlib.Path.write_bytes", 2, 0, "No space left on device: 'model.npz'"),
    (FULL, "pathlib.Path.write_bytes", 8, 4, "reconstructions.png'"),
    (BrokenPipeError(32, "Broken pipe"), "builtins.print", 3, 2, "Broken pipe"),  # as by head
    (MemoryError("Unable to allocate"), "mnist_autoencoder.sgd_step", 16, 3, "Unable to allocate"),
]


@pytest.mark.parametrize(("error", "name", "at", "done", "told"), INSTANTS)
def test_whatever_ends_a_run_it_can_be_resumed(small, monkeypatch, error, name, at, done, told):
    arguments, whole = small
    if done < 4:  # Then plots would only take time.
        monkeypatch.setattr(script, "draw_plots", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(name, raising(pkgutil.resolve_name(name), error, at))
        result = call(*arguments)
    assert (result.status, len(result.lines)) == (130 if error is CTRL_C else 1, 1)
    assert result.lines[0].endswith(told)
    assert len(EPOCH.findall(read_log())) == done
    files = {Path(name).name for name in snapshot()}
    assert files - set(script.PLOTS) == {"training_log.txt", *(["model.npz"] if done else [])}
    assert call(*arguments, *(["--resume"] if done else [])).status == 0
    assert result_of() == result_of(whole)
    if done == 4:
        assert snapshot("plots") == snapshot(whole / "plots")


@pytest.mark.skipif(sys.platform == "win32", reason="a console's Ctrl-C reaches every process")
def test_ctrl_c_as_the_user_presses_it():
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # as in a shell
    process = start("--dataset", "sample", **options)
    next(line for line in process.stdout if line.startswith("Epoch 1,"))  # waits for this line
    with open("training_log.txt") as log:  # as tail -f does
        next(line for line in process.stdout if line.startswith("Epoch 2,"))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert "Epoch 2," in log.read()
    assert process.returncode == 130
    assert err.count("\n") == 1 and "--resume" in err


def test_killed_at_random_instants_and_resumed_ends_like_an_unbroken_run():
    rng = random.Random(KILLS)
    write_idx("data", train=300)
    arguments = ["--data-dir", "data", "--epochs", 8 * (KILLS + 2), "--batch-size", 64]
    assert call(*arguments, "--output-dir", "whole").status == 0
    arguments += ["--output-dir", "out"]
    done = 0
    for _ in range(KILLS):
        process = start(*arguments, *(["--resume"] if done else []))
        wanted = done + rng.randint(1, 4)
        next(line for line in process.stdout if line.startswith(f"Epoch {wanted},"))
        time.sleep(rng.uniform(0, 0.15))  # to be killed while it writes, too
        process.kill()
        process.communicate()
        log = EPOCH.findall(read_log("out"))
        assert [int(number) for number, _, _ in log] == list(range(1, len(log) + 1))
        done = len(script.load_run("out/model.npz").losses)
        assert wanted <= done and len(log) in (done - 1, done)
    assert call(*arguments, "--resume").status == 0
    assert result_of("out") == result_of("whole")
    assert snapshot("out").keys() == snapshot("whole").keys()
    assert f"# From epoch {done + 1} on: " in read_log("out")


@pytest.mark.parametrize("at", [3, 7])  # the save of a model, and of the second plot
def test_a_run_removes_the_plots_and_temporary_files_of_a_killed_one(small, monkeypatch, at):
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)  # Every process writes files of other names.
        patch.setattr(os, "replace", raising(os.replace, CTRL_C, at))
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # A killed process cannot do this.
        assert call(*small[0], "--seed", 1).status == 130
    assert any(Path(name).name.startswith(".") for name in snapshot())
    Path("plots", "mine.png").write_bytes(b"mine")
    monkeypatch.setattr(script, "sgd_step", raising(script.sgd_step, CTRL_C, 2))
    assert call(*small[0]).status == 130
    assert "# seed: 0\n" in read_log()
    assert snapshot().keys() == {"model.npz", "training_log.txt", "plots/mine.png"}


SPOILED = {  # what happens to a finished run, and what is said of it
    "no model": (lambda: os.remove("model.npz"), "model.npz"),
    "no end": (lambda: os.truncate("model.npz", os.path.getsize("model.npz") - 30), "--resume"),
    "no log": (lambda: np.savez("model.npz", parameters=np.zeros(5)), "--resume"),
    "no plots": (lambda: Path("plots").rename("p") and Path("plots").touch(), "--output-dir"),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_run_is_one_line_and_left_as_it_is(small, kind):
    shutil.copytree(small[1], ".", dirs_exist_ok=True)
    spoil, told = SPOILED[kind]
    spoil()
    before = snapshot()
    fails(call(*small[0], "--resume"), 2, told)
    assert snapshot() == before
