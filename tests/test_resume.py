"""Interrupted, killed and resumed runs, full disks and damaged files: nothing is lost."""

import os
import pkgutil
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    EPOCH,
    call,
    fails,
    raising,
    read_log,
    result_of,
    script,
    snapshot,
    start,
    write_idx,
)

KILLS = int(os.environ.get("KILLS", 2))  # how often a process is killed
PART = ".part.model.npz"  # a temporary file, which the next run replaces
CTRL_C, FULL = KeyboardInterrupt, OSError(28, "No space left on device")


# An epoch has four steps. The model is saved after each epoch, and finally three plots.
INSTANTS = [  # the error; what raises it, in which call; complete epochs; end of the message
    (CTRL_C, "mnist_autoencoder.sgd_step", 2, 0, "before an epoch was saved"),
    (CTRL_C, "mnist_autoencoder.sgd_step", 16, 3, "--resume continues after epoch 3"),
    (CTRL_C, "mnist_autoencoder.plot_losses", 1, 4, "--resume continues after epoch 4"),
    (CTRL_C, "os.replace", 1, 0, "before an epoch was saved"),
    (CTRL_C, "os.replace", 2, 1, "--resume continues after epoch 1"),
    (FULL, "numpy.savez", 1, 0, "No space left on device"),
    (FULL, "matplotlib.figure.Figure.savefig", 3, 4, "No space left on device"),
    (BrokenPipeError(32, "Broken pipe"), "builtins.print", 3, 2, "Broken pipe"),  # as by head
    (MemoryError(), "mnist_autoencoder.sgd_step", 16, 3, "MemoryError"),
]


@pytest.mark.parametrize(("error", "name", "at", "done", "told"), INSTANTS)
def test_whatever_ends_a_run_it_can_be_resumed(small, monkeypatch, error, name, at, done, told):
    arguments, whole = small
    if done < 4:  # Then plots would only take time.
        monkeypatch.setattr(script, "finish", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(name, raising(pkgutil.resolve_name(name), error, at))
        result = call(*arguments)
    assert (result.status, len(result.lines)) == (130 if error is CTRL_C else 1, 1)
    assert result.lines[0].endswith(told)
    files = {name for name in snapshot() if not re.search(r"/|^\.part\.", name)}
    assert files == ({"training_log.txt", "model.npz"} if done else set())
    assert not done or len(EPOCH.findall(read_log())) == done
    assert call(*arguments, *(["--resume"] if done else [])).status == 0
    assert result_of() == result_of(whole)
    if done == 4:
        assert snapshot() == snapshot(whole) | {name: snapshot()[name] for name in files}


@pytest.mark.parametrize("flags", [(), ("--seed", 1)])
def test_a_new_run_leaves_an_earlier_one_alone_until_its_first_epoch_is_saved(
    small, monkeypatch, no_plots, flags
):
    arguments, whole = small
    shutil.copytree(whole, ".", dirs_exist_ok=True)
    Path("training_log.txt").rename("kept elsewhere")
    Path("training_log.txt").symlink_to("kept elsewhere")
    Path("plots", "mine.png").write_bytes(b"mine")
    before = snapshot()
    for name, at in (("mnist_autoencoder.sgd_step", 4), ("os.replace", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(name, raising(pkgutil.resolve_name(name), CTRL_C, at))
            result = call(*arguments, *flags)
        note, end = result.lines
        assert {name for name, _ in snapshot().items() - before.items()} <= {PART}
        assert (result.status, end) == (130, "interrupted before an epoch was saved")
        assert note.startswith("note: ") and f"of 4 epochs in {Path.cwd()}; " in note
        assert note.endswith(f" use {'' if flags else '--resume or '}another --output-dir")
    with monkeypatch.context() as patch:
        patch.setattr(script, "sgd_step", raising(script.sgd_step, CTRL_C, 8))
        assert call(*arguments, *flags).lines[-1].endswith("--resume continues after epoch 1")
    assert len(EPOCH.findall(read_log())) == 1 and Path("training_log.txt").is_symlink()
    assert snapshot().keys() == before.keys() - {f"plots/{name}" for name in script.PLOTS}
    assert call(*arguments, *flags, "--resume").lines == []
    assert flags or result_of() == result_of(whole)


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
    shutil.copytree("whole", "out")
    for _ in range(KILLS):  # within the first epoch of a new run over a finished one, or after it
        before = snapshot("out")
        process = start(*arguments, "--seed", 1)
        next(line for line in process.stdout if line.startswith("# From epoch 1 on"))
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.communicate()
        if "# seed: 0\n" in script.load_run("out/model.npz").log:
            assert {name for name, _ in snapshot("out").items() - before.items()} <= {PART}
        else:
            assert call(*arguments, "--seed", 1, "--resume").status == 0
            assert "# seed: 1" in result_of("out")[0]
        shutil.rmtree("out")
        shutil.copytree("whole", "out")
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


SPOILED = {  # what happens to a finished run, and what is said of it
    "no model": (lambda: os.remove("model.npz"), "a run without --resume writes this file"),
    "no end": (lambda: os.truncate("model.npz", os.path.getsize("model.npz") - 30), "model.npz"),
    "no log": (lambda: np.savez("model.npz", parameters=np.zeros(5)), "model.npz"),
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
