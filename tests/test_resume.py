"""Stop it, kill it, fill its disk, feed it rubbish: what was complete stays complete."""

import errno
import io
import os
import random
import re
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import EPOCH, call, result_of, script, snapshot, start, write_idx

KILLS = int(os.environ.get("KILLS", 4))


@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory):
    """The directory of the same run as `small`, interrupted by Ctrl-C within its third epoch."""
    directory = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        assert interrupt_at(patch, 10, [*small[0], "--output-dir", directory]).status == 130
    return directory


@pytest.fixture
def interrupted(small, stopped, tmp_path):
    """The arguments and a copy of the directory of the interrupted run."""
    shutil.copytree(stopped, tmp_path / "out")
    return [*small[0], "--output-dir", tmp_path / "out"], tmp_path / "out"


def interrupt_at(monkeypatch, step, arguments):
    """Call main, with a Ctrl-C during the given step of it."""
    sgd_step, calls = script.sgd_step, []

    def interrupting(*rest):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return sgd_step(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(script, "sgd_step", interrupting)
        return call(*arguments)


@pytest.mark.parametrize("step", [1, 5, 12, 16])
def test_ctrl_c_keeps_the_whole_epochs_and_resume_ends_like_an_unbroken_run(
    small, tmp_path, monkeypatch, step
):
    arguments, whole = [*small[0], "--output-dir", tmp_path], small[1]
    result = interrupt_at(monkeypatch, step, arguments)
    assert result.status == 130 and "--resume" in result.err and len(result.lines) == 1
    done = (step - 1) // 4  # the epoch that was under way is lost
    expected = {"model.npz", "training_log.txt"} if done else set()
    assert snapshot(tmp_path).keys() == expected
    if done:
        assert len(EPOCH.findall((tmp_path / "training_log.txt").read_text())) == done
    assert call(*arguments, *(["--resume"] if done else [])).status == 0
    assert result_of(tmp_path) == result_of(whole)


@pytest.mark.skipif(sys.platform == "win32", reason="a console's Ctrl-C can't be sent to one child")
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
    assert len(EPOCH.findall((tmp_path / "training_log.txt").read_text())) >= 2


def test_killed_at_random_instants_and_resumed_ends_like_an_unbroken_run(tmp_path):
    """Four kills, or as many as the environment's KILLS says."""
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
        done = len(script.load_run(out / "model.npz", stored_settings(out)).history)
        assert wanted <= done and len(log) in (done - 1, done)
    assert call(*arguments, "--output-dir", out, "--resume").status == 0
    assert result_of(out) == result_of(tmp_path / "whole")


def read_log(directory):
    return (directory / "training_log.txt").read_text()


def stored_settings(directory):
    with np.load(directory / "model.npz") as file:
        return script.json.loads(str(file["settings"]))


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


def test_finished_run_resumed_makes_its_log_and_plots_again(small, tmp_path):
    arguments, whole = small
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "training_log.txt").unlink()
    shutil.rmtree(tmp_path / "out" / "plots")
    assert call(*arguments, "--output-dir", tmp_path / "out", "--resume").status == 0
    assert result_of(tmp_path / "out") == result_of(whole)
    assert snapshot(tmp_path / "out" / "plots") == snapshot(whole / "plots")


@pytest.mark.parametrize(
    "flags",
    [("--epochs", 5), ("--batch-size", 17), ("--lr", 0.6), ("--momentum", 0.5), ("--seed", 1)]
    + [("--dataset", "sample")],
)
def test_other_settings_are_refused_with_both(interrupted, flags):
    arguments, out = interrupted
    before = snapshot(out)
    result = call(*arguments, "--resume", *flags)
    assert (result.status, result.out, len(result.lines)) == (2, "", 1)
    name = {"--dataset": "data"}.get(flags[0], flags[0][2:].replace("-", "_"))
    values = re.findall(rf"'{name}': ([^,}}]+)", result.err)
    assert len(set(values)) == 2 and str(flags[1]) in values[1]
    assert snapshot(out) == before


def test_other_data_are_refused(interrupted, tmp_path):
    arguments, out = interrupted
    write_idx(tmp_path / "other", seed=1)
    before = snapshot(out)
    result = call(*arguments, "--resume", "--data-dir", tmp_path / "other")
    assert (result.status, len(result.lines)) == (2, 1) and result.err.count("sha256") == 2
    assert snapshot(out) == before


def test_resume_without_a_run(small, tmp_path):
    result = call(*small[0], "--resume", "--output-dir", tmp_path / "out")
    assert (result.status, result.out, len(result.lines)) == (2, "", 1)
    assert str(tmp_path / "out" / "model.npz") in result.err and "--resume" in result.err
    assert not list(tmp_path.iterdir())


# Disks that fail. --------------------------------------------------------------------------------


def full_disk(original, at):
    """`original`, but the call number `at` for a file that is written finds the disk full."""
    calls = []

    def maybe(path, *rest, **options):
        calls.extend([1] * Path(path).name.endswith(".partial"))
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the file")
        return original(path, *rest, **options)

    return maybe


@pytest.mark.parametrize("function", ["write_bytes", "replace"])
@pytest.mark.parametrize("at", [1, 2, 5, 6, 9, 11, 13])
def test_any_write_may_fail_and_nothing_is_lost(small, tmp_path, monkeypatch, function, at):
    """Model and log after each of four epochs and at the end, then three plots."""
    arguments, whole = [*small[0], "--output-dir", tmp_path], small[1]
    owner = {"write_bytes": Path, "replace": os}[function]
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, full_disk(getattr(owner, function), at))
        result = call(*arguments)
    assert result.status == 1 and len(result.lines) == 1 and "No space" in result.err
    order = [*["model.npz", "training_log.txt"] * 5]
    order += [f"plots/{name}.png" for name in ("loss_curve", "latent_space", "reconstructions")]
    files = {name for name in snapshot(tmp_path) if not name.endswith(".partial")}
    assert files == set(order[: at - 1])
    resume = ["--resume"] if "model.npz" in files else []
    if resume:
        done = script.load_run(tmp_path / "model.npz", stored_settings(tmp_path)).history
        assert len(done) == min(at // 2, 4)
    assert call(*arguments, *resume).status == 0
    assert result_of(tmp_path) == result_of(whole)
    assert snapshot(tmp_path).keys() == set(order)


def test_write_that_the_system_cuts_off(small, tmp_path):
    resource = pytest.importorskip("resource", reason="needs limits on the size of files")
    limit = (5_000_000, 5_000_000)  # half of a model
    options = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)}
    process = start(*small[0], "--output-dir", tmp_path, **options)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.count("\n") == 1 and "File too large" in err
    assert all(name.endswith(".partial") for name in snapshot(tmp_path))


def test_output_directory_that_is_a_file_is_found_before_training(small, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "train", None)
    (tmp_path / "file").write_text("mine")
    result = call(*small[0], "--output-dir", tmp_path / "file")
    assert result.status == 1 and len(result.lines) == 1 and str(tmp_path / "file") in result.err
    assert snapshot(tmp_path) == {"file": b"mine"}


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
    "half": lambda content: content[: len(content) // 2],
    "no end": lambda content: content[:-30],
    "no start": lambda content: content[1000:],
    "flipped parameter": lambda content: flip(content, len(content) // 4),
    "npy": lambda content: zipfile.ZipFile(io.BytesIO(content)).read("parameters.npy"),
    "lacks an array": lambda content: repack(content, parameters=None),
    "lacks the mean image": lambda content: repack(content, mean_image=None),
    "too short": lambda content: repack(content, parameters=np.zeros(1000, np.float32)),
    "pickle": lambda content: repack(content, parameters=np.array([Boom()], object)),
}
RUN_RUBBISH = {
    **RUBBISH,
    "flipped bit of a shape": lambda content: b"(1132940,)".join(content.rsplit(b"(1132944,)", 1)),
    "flipped velocity": lambda content: flip(content, len(content) * 3 // 4),
    "no velocity": lambda content: repack(content, velocity=None),
    "no history": lambda content: repack(content, history=None),
    "settings are no JSON": lambda content: repack(content, settings="{"),
    "settings are a number": lambda content: repack(content, settings="3"),
    "settings nest deeply": lambda content: repack(content, settings="[" * 50_000),
}


@pytest.mark.parametrize("kind", RUN_RUBBISH)
def test_bad_run_is_named_in_one_line(interrupted, kind):
    arguments, out = interrupted
    path = out / "model.npz"
    path.write_bytes(RUN_RUBBISH[kind](path.read_bytes()))
    before = snapshot(out)
    result = call(*arguments, "--resume")
    assert (result.status, result.out, len(result.lines)) == (2, "", 1)
    assert str(path) in result.err
    assert snapshot(out) == before and not Path("pickle-was-run").exists()


@pytest.mark.parametrize("kind", RUBBISH)
def test_bad_model_is_never_loaded(small, tmp_path, kind):
    path = tmp_path / "model.npz"
    path.write_bytes(RUBBISH[kind]((small[1] / "model.npz").read_bytes()))
    with pytest.raises(Exception):  # noqa: B017  of a dozen types, all from numpy.load
        script.Autoencoder.load(path)
    assert not Path("pickle-was-run").exists()
