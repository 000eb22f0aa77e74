"""Runs: flags, what a run leaves, and how it is interrupted, killed and resumed."""

import os
import pkgutil
import random
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    EPOCH,
    assert_error,
    call,
    read_log,
    script,
    snapshot,
    start,
    state,
    write_data,
)
from matplotlib.figure import Figure

KILLS = int(os.environ.get("KILLS", 1))  # how often a process is killed


def raising_at(number, error, function=None):
    """The function, except that its call with this number raises the error."""
    count = 0

    def maybe(*arguments, **options):
        nonlocal count
        count += 1
        if count == number:
            raise error
        return function(*arguments, **options) if function else None

    return maybe


def losses(directory="."):
    return script.load_run(Path(directory, "model.npz")).losses


def test_a_run_writes_a_log_a_model_and_three_plots(whole):
    plots = {"plots/loss_curve.png", "plots/latent_space.png", "plots/reconstructions.png"}
    assert snapshot(whole).keys() == {"model.npz", "training_log.txt", *plots}
    assert all(
        content.startswith(b"\x89PNG") for name, content in snapshot(whole / "plots").items()
    )


def test_the_log_has_a_header_and_a_line_with_both_losses_for_every_epoch(whole):
    lines = read_log(whole).splitlines()
    assert lines[0] == "# encoder: 784-512 elu, 512-256 elu, 256-128 linear"
    assert lines[1] == "# decoder: 128-256 elu, 256-512 elu, 512-784 clamp"
    assert lines[2] == "# loss: squared_error"
    assert lines[3].startswith("# data: 50 training and 20 test images, sha256 ")
    assert "# epochs: 4" in lines
    assert "# batch_size: 16" in lines
    rows = [EPOCH.fullmatch(line).groups() for line in lines[-4:]]
    expected = [(f"{a:.6f}", f"{b:.6f}") for a, b in losses(whole)]
    assert rows == [(str(number), *pair) for number, pair in enumerate(expected, 1)]


def test_logged_losses_of_pca_are_scikit_learns(whole, small):
    dataset = script.load_data("MNIST", small[1])
    x = dataset.images / 255
    y = dataset.test_images / 255
    _, _, directions = np.linalg.svd(x - x.mean(axis=0))
    projection = directions[:50].T @ directions[:50]  # as there are only 50 images
    loss = np.mean(((y - x.mean(axis=0)) @ projection + x.mean(axis=0) - y) ** 2)
    logged = re.search(r"Test Loss of PCA with 50 components: (\S+)", read_log(whole))[1]
    assert float(logged) == pytest.approx(loss, abs=2e-6)


def test_the_last_test_loss_is_that_of_the_network_in_the_plots(whole, small, monkeypatch, capsys):
    monkeypatch.setattr(Figure, "savefig", lambda *_: None)
    dataset = script.load_data("MNIST", small[1])
    run = script.load_run(whole / "model.npz")
    run.model.parameters *= 0.9  # A reader may have put back an earlier epoch's, for example.
    script.finish(run, dataset, *script.fit_pca(dataset), Path())
    images = dataset.test_images / 255
    loss = np.mean((run.model.reconstruct(images) - images) ** 2)
    printed = re.search(r"test loss: (\S+)", capsys.readouterr().out)[1]
    assert float(printed) == pytest.approx(loss, abs=1e-6)
    assert abs(loss - run.losses[-1][1]) > 1e-5


def test_ten_epochs_on_the_sample_restore_its_test_images_better_than_pca(no_plots):
    assert call("--dataset", "sample", "--epochs", 10).status == 0
    pca_loss = float(re.search(r"PCA .*: (\S+)", read_log())[1])
    assert losses()[-1][1] < pca_loss


def test_the_same_flags_give_the_same_run_bit_for_bit(small, whole, no_plots):
    assert call(*small).status == 0
    assert state() == state(whole)


@pytest.mark.parametrize(
    "flag",
    ["--seed 1", "--momentum 0.5", "--lr 0.1", "--max-gradient-norm 0.5", "--weight-decay 9"],
)
def test_other_flags_give_another_run_and_stand_in_its_log(small, whole, no_plots, flag):
    name, value = flag.split()
    result = call(*small, name, value)
    assert f"# {name[2:].replace('-', '_')}: {float(value):g}" in result.out.replace(".0\n", "\n")
    assert losses() != losses(whole)


def test_a_batch_is_at_most_the_whole_data_set(small, no_plots):
    assert "# batch_size: 50\n" in call(*small, "--batch-size", 99).out


@pytest.mark.parametrize(
    "flags",
    [
        "--epochs 0",
        "--epochs 2.5",
        "--batch-size -128",
        "--lr 0",
        "--momentum 1",
        "--seed -1",
        "--max-gradient-norm -1",
        "--weight-decay -1",
        "--decay-fraction 0",
        "--decay-fraction 65",
        "--decay-fraction nan",
        "--dataset cifar",
        "--epoch 5",
        "stray",
    ],
)
def test_bad_flags_are_refused_before_anything_is_done(monkeypatch, flags):
    monkeypatch.setattr(script, "load_data", None)
    result = call(*flags.split())
    assert (result.status, result.out) == (2, "")
    message = result.err.splitlines()[-1].partition("error: ")[2]  # The usage names all flags.
    name = flags.split()[0].strip("-").removeprefix("max-")
    assert name.replace("-", " ") in message.replace("-", " ")


@pytest.mark.parametrize("flags", ["--lr 100", "--lr nan", "--lr inf"])
def test_divergence_is_an_error_that_names_the_rate_and_the_default(no_plots, flags):
    result = call("--dataset", "sample", *flags.split())
    default = f"(default: {script.Settings.lr:g})"
    assert_error(result, "training diverged in epoch 1", flags.split()[1], default)


@pytest.mark.parametrize(
    "flags",
    [
        "--momentum 0",
        "--lr 0.12",
        "--batch-size 8 --epochs 1",
        "--max-gradient-norm 0.5",
        "--weight-decay 0",
    ],
)
def test_flags_far_from_their_defaults_learn(flags, no_plots):
    result = call("--dataset", "sample", "--epochs", 2, *flags.split())
    assert (result.status, result.err) == (0, "")
    assert losses()[-1][1] < 0.03


def test_divergence_keeps_the_last_good_epoch(small, whole, monkeypatch):
    rate_at = script.learning_rate_at
    monkeypatch.setattr(script, "learning_rate_at", lambda *a: rate_at(*a) if a[0] < 8 else 1e3)
    assert_error(call(*small), "epoch 3")
    assert losses() == losses(whole)[:2]
    assert snapshot("plots") == {}


def test_a_network_that_is_hardly_better_than_the_mean_image_is_warned_of(small, no_plots):
    result = call(*small, "--lr", 1e-9)
    assert (result.status, result.err.count("\n")) == (0, 1)
    assert "warning: the loss hardly fell" in result.err


def test_a_first_epoch_that_has_learnt_is_not_warned_of(no_plots):
    flags = ("--dataset", "sample", "--epochs", 1, "--batch-size", 100_000)
    assert call(*flags).err == ""
    training_loss, test_loss = losses()[0]
    assert test_loss < 0.7 * training_loss


def test_a_training_loss_that_rises_is_warned_of(small, no_plots, monkeypatch):
    falling_and_rising = iter([2e-6, 1e-6, 3e-6])
    monkeypatch.setattr(script, "train_epoch", lambda *_: next(falling_and_rising))
    result = call(*small, "--epochs", 3)
    assert (result.status, result.err.count("\n")) == (0, 1)
    assert "warning: the loss hardly fell, or it rose" in result.err


CTRL_C = KeyboardInterrupt()
FULL = OSError(28, "No space left on device")
INSTANTS = [  # the error, the call that it ends (4 steps an epoch), and the epochs that are saved
    (CTRL_C, "mnist_autoencoder.sgd_step", 16, 3),
    (CTRL_C, "mnist_autoencoder.plot_losses", 1, 4),
    (CTRL_C, "os.replace", 1, 0),
    (CTRL_C, "os.replace", 2, 1),
    (FULL, "numpy.savez", 1, 0),
    (FULL, "numpy.savez", 3, 2),
    (FULL, "matplotlib.figure.Figure.savefig", 2, 4),
    (FileNotFoundError(2, "plots is gone"), "matplotlib.figure.Figure.savefig", 1, 4),
    (MemoryError("of an array"), "mnist_autoencoder.sgd_step", 16, 3),
    (UnicodeEncodeError("ascii", "ö", 0, 1, "cannot print"), "builtins.print", 3, 2),
]


@pytest.mark.parametrize(("error", "name", "number", "done"), INSTANTS)
def test_whatever_ends_a_run_is_said_and_the_run_can_be_resumed(
    small, whole, monkeypatch, error, name, number, done
):
    if done < 4:  # Plots would only take time.
        monkeypatch.setattr(script, "finish", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(name, raising_at(number, error, pkgutil.resolve_name(name)))
        result = call(*small)
    assert result.status == (130 if error is CTRL_C else 1)
    assert result.err.count("\n") == 1
    assert type(error).__name__ in result.err
    assert str(error) in result.err
    assert result.err.endswith(f" --resume continues after epoch {done}\n") == (done > 0)
    assert call(*small, *(["--resume"] if done else [])).status == 0
    assert state() == state(whole)
    if done == 4:
        assert snapshot("plots") == snapshot(whole / "plots")


def test_a_new_run_leaves_an_earlier_one_alone_until_its_first_epoch_is_saved(
    small, whole, monkeypatch, no_plots
):
    shutil.copytree(whole, ".", dirs_exist_ok=True)
    Path("plots", "mine.png").write_bytes(b"mine")
    before = snapshot()
    with monkeypatch.context() as patch:
        patch.setattr(script, "sgd_step", raising_at(4, CTRL_C, script.sgd_step))
        result = call(*small, "--seed", 1)
    assert result.err.startswith(f"note: the first epoch replaces the run in {Path.cwd()}\n")
    assert snapshot() == before
    with monkeypatch.context() as patch:
        patch.setattr(script, "sgd_step", raising_at(8, CTRL_C, script.sgd_step))
        call(*small, "--seed", 1)
    assert len(losses()) == 1
    assert len(EPOCH.findall(read_log())) == 1
    assert snapshot().keys() == {"model.npz", "training_log.txt", "plots/mine.png"}


@pytest.mark.parametrize("name", ["model.npz", "training_log.txt", "plots/loss_curve.png"])
def test_files_that_will_be_replaced_are_announced(small, no_plots, name):
    Path("plots").mkdir()
    Path(name).write_text("mine")
    assert call(*small).err.startswith("note: the first epoch replaces the run in")


def test_a_second_run_in_the_same_directory_ends_in_an_error(small, whole, monkeypatch, no_plots):
    save_epoch = script.save_epoch

    def save_epoch_of_two(*arguments):
        monkeypatch.setattr(script, "save_epoch", save_epoch)
        assert call(*small).status == 0  # the other run
        save_epoch(*arguments)

    monkeypatch.setattr(script, "save_epoch", save_epoch_of_two)
    assert_error(call(*small, "--seed", 1), "another run", Path.cwd(), "--output-dir")
    assert state() == state(whole)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--epochs 5", "# epochs: 5"),
        ("--seed 1", "# seed: 1"),
        ("--batch-size 8", "# batch_size: 8"),
        ("--dataset sample", "# data: 4000 training"),
    ],
)
def test_another_run_is_not_resumed_and_the_difference_is_named(small, whole, flags, told):
    shutil.copytree(whole, ".", dirs_exist_ok=True)
    before = snapshot()
    assert_error(call(*small, *flags.split(), "--resume"), "model.npz", told)
    assert snapshot() == before


def test_a_run_of_a_renamed_directory_of_data_is_resumed(small, whole, no_plots):
    shutil.copytree(whole, ".", dirs_exist_ok=True)
    shutil.copytree(small[1], "renamed")
    assert call("--data-dir", "renamed", *small[2:], "--resume").status == 0


def spoil_nothing_but_remove():
    Path("model.npz").unlink()


def spoil_with_text():
    Path("model.npz").write_text("text")


def spoil_by_cutting():
    content = Path("model.npz").read_bytes()
    Path("model.npz").write_bytes(content[:-1000])


def spoil_shape_of(name):
    arrays = dict(np.load("model.npz"))
    arrays[name] = arrays[name][:1]
    np.savez("model.npz", **arrays)


def spoil_parameters():
    spoil_shape_of("parameters")


def spoil_velocity():
    spoil_shape_of("velocity")


def spoil_mean_image():
    spoil_shape_of("mean_image")


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_nothing_but_remove,
        spoil_with_text,
        spoil_by_cutting,
        spoil_parameters,
        spoil_velocity,
        spoil_mean_image,
    ],
)
def test_a_spoiled_model_is_one_line_and_left_as_it_is(small, whole, spoil):
    shutil.copytree(whole, ".", dirs_exist_ok=True)
    spoil()
    before = snapshot()
    assert_error(call(*small, "--resume"), "model.npz")
    assert snapshot() == before


def kill_after(process, awaited, rng):
    """Kill a process at a random instant after it has printed a line, perhaps while it writes."""
    for line in process.stdout:
        if line.startswith(awaited):
            break
    time.sleep(rng.uniform(0, 0.15))
    process.kill()
    process.communicate()


def test_killed_at_random_instants_and_resumed_ends_like_an_unbroken_run():
    rng = random.Random(KILLS)
    write_data("data", train=300)
    flags = ["--data-dir", "data", "--epochs", 6 * (KILLS + 1), "--batch-size", 64]
    assert call(*flags, "--output-dir", "whole").status == 0
    flags += ["--output-dir", "out"]
    done = 0
    for _ in range(KILLS):
        wanted = done + rng.randint(1, 4)
        resume = ["--resume"] if done else []
        kill_after(start(*flags, *resume), f"Epoch {wanted},", rng)
        done = len(losses("out"))
        assert done >= wanted
        log = read_log("out")
        assert script.load_run("out/model.npz").log.startswith(log)
        # A kill between opening and writing the file leaves it empty; the next run mends it.
        assert log == "" or len(EPOCH.findall(log)) in (done - 1, done)
    assert call(*flags, "--resume").status == 0
    assert state("out") == state("whole")
    assert snapshot("out/plots") == snapshot("whole/plots")
    assert read_log("out") == script.load_run("out/model.npz").log


def test_a_kill_in_the_first_epoch_leaves_the_earlier_run_or_can_be_resumed(whole, no_plots):
    rng = random.Random(KILLS)
    write_data("data", train=300)
    flags = ["--data-dir", "data", "--epochs", 2, "--batch-size", 64, "--output-dir", "out"]
    for _ in range(KILLS):
        shutil.copytree(whole, "out", dirs_exist_ok=True)
        kill_after(start(*flags), "# From epoch 1:", rng)
        kept = {name: snapshot("out").get(name) for name in snapshot(whole)}
        if kept != snapshot(whole):
            assert call(*flags, "--resume").status == 0
            assert len(losses("out")) == 2


def test_a_log_that_lacks_the_last_line_is_mended(small, whole):
    shutil.copytree(whole, ".", dirs_exist_ok=True)
    lines = read_log().splitlines(keepends=True)
    Path("training_log.txt").write_text("".join(lines[:-1]))
    assert call(*small, "--resume").status == 0
    assert read_log() == read_log(whole)


def test_as_the_user_starts_it(small, whole):
    """With somebody else's settings of Matplotlib, which would change the plots."""
    Path("matplotlibrc").write_text("axes.facecolor: black\ntext.usetex: True\n")
    process = start(*small, "--output-dir", "out", env={**os.environ, "MATPLOTLIBRC": "."})
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out.startswith(read_log("out"))
    assert re.search(rf"^test loss: {losses('out')[-1][1]:.6f} \(PCA: \d", out, re.MULTILINE)
    assert state("out") == state(whole)
    assert snapshot("out/plots") == snapshot(whole / "plots")
