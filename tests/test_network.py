"""The network and its training step against oracles: central differences and PyTorch."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmark import torch_network
from conftest import script

from mnist_autoencoder import LAYERS, Autoencoder, Settings

SIZES = [(7, 6), (6, 5), (5, 3), (3, 5), (5, 6), (6, 7)]
SMALL = [x._replace(inputs=a, outputs=b) for x, (a, b) in zip(LAYERS, SIZES, strict=True)]


def network(layers=LAYERS, dtype=np.float64):
    """A network whose parameters are all different from 0, some of whose outputs are clipped."""
    rng = np.random.default_rng(0)
    model = Autoencoder(rng.random(layers[0].inputs), 0, layers, dtype)
    weights, biases = model.split(model.parameters)
    weights[-1][:] = rng.normal(0, 0.5 / np.sqrt(len(weights[-1])), weights[-1].shape)
    for b in biases:
        b += rng.normal(0, 0.1, b.shape)
    return model


def gradient_of(model, images):
    activations, derivatives = model.forward(images)
    return model.backward(activations, derivatives, activations[-1] - images)


def pixels(n, seed=1, size=784):
    return np.random.default_rng(seed).random((n, size))


def torch_loss(twin, model, images):
    x = torch.tensor(images)
    return torch.nn.functional.mse_loss(twin(x - torch.tensor(model.mean_image)), x)


def flat(twin, what):
    """The twin's parameters, or their gradients, in the order of the model's vector."""
    return np.concatenate([np.ravel(what(part).numpy().T) for part in twin.parameters()])


def test_every_gradient_equals_central_differences():
    model, images, step = network(SMALL), pixels(20, size=7), 1e-6

    def loss_at(place, value):
        model.parameters[place] = value
        return np.mean((model.forward(images)[0][-1] - images) ** 2)

    outputs = model.forward(images)[0][-1]
    assert 0.05 < np.mean((outputs == 0) | (outputs == 1)) < 0.5
    gradient = gradient_of(model, images)
    for place, value in enumerate(model.parameters.copy()):
        difference = loss_at(place, value + step) - loss_at(place, value - step)
        model.parameters[place] = value
        assert gradient[place] == pytest.approx(difference / (2 * step), abs=1e-9)
    assert np.count_nonzero(gradient) == gradient.size


@pytest.mark.parametrize("n", [1, 128])
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [("f8", 1e-12, 1e-15), ("f4", 1e-6, 1e-8)])
def test_outputs_and_every_gradient_equal_autograds(n, dtype, rtol, atol):
    model, images = network(dtype=dtype), pixels(n).astype(dtype)
    activations, _ = model.forward(images)
    gradient = gradient_of(model, images)
    twin = torch_network(model)
    loss = torch_loss(twin, model, images)
    loss.backward()
    np.testing.assert_allclose(np.mean((activations[-1] - images) ** 2), loss.item(), rtol)
    assert {array.dtype for array in [*activations, gradient]} == {np.dtype(dtype)}
    expected = flat(twin, lambda parameter: parameter.grad)
    np.testing.assert_allclose(gradient, expected, 1000 * rtol, atol)


@pytest.mark.parametrize(
    ("momentum", "max_norm", "clipped"), [(0.5, 1e9, 0), (0.98, 0.2, 19), (0.98, 1e-2, 20)]
)
def test_twenty_steps_equal_those_of_torch_optim_sgd(momentum, max_norm, clipped):
    model = network()
    twin = torch_network(model)
    options = {"lr": 0.5, "momentum": momentum, "nesterov": True, "weight_decay": 1e-3}
    optimizer = torch.optim.SGD(twin.parameters(), **options)
    settings = replace(Settings(), momentum=momentum, max_gradient_norm=max_norm)
    velocity, norms = np.zeros_like(model.parameters), []
    for step in range(20):
        images = pixels(16, seed=step)
        optimizer.zero_grad()
        torch_loss(twin, model, images).backward()
        norms.append(np.linalg.norm(flat(twin, lambda parameter: parameter.grad)))
        for parameter in twin.parameters():
            parameter.grad *= min(1, max_norm / norms[-1])
        optimizer.step()
        gradient = gradient_of(model, images)
        script.sgd_step(model.parameters, velocity, gradient, 0.5, 1e-3, settings)
    assert sum(norm > max_norm for norm in norms) == clipped
    expected = flat(twin, torch.Tensor.detach)
    np.testing.assert_allclose(model.parameters, expected, rtol=1e-7, atol=1e-10)


ORACLES = {"elu": torch.nn.ELU(), "linear": torch.nn.Identity(), "clip": torch.nn.Hardtanh(0, 1)}


@pytest.mark.parametrize("name", ORACLES)
def test_activations_and_derivatives_are_torchs(name):
    function = getattr(script, name)
    z = torch.linspace(-30, 30, 601, dtype=torch.float64, requires_grad=True)
    expected = ORACLES[name](z)
    expected.sum().backward()
    a, derivative = function(z.detach().numpy())
    np.testing.assert_allclose(a, expected.detach(), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(derivative * np.ones(601), z.grad, rtol=1e-9, atol=1e-15)
    with np.errstate(all="raise"):
        a, derivative = function(np.array([-1e30, -1e4, -100, 0, 100, 1e4, 1e30], np.float32))
        assert np.isfinite(a).all() and np.isfinite(derivative).all()
        assert a.dtype == (a * derivative).dtype == np.float32


def test_weights_start_with_hes_variance_and_the_network_as_the_mean_image():
    mean = np.maximum(np.random.default_rng(0).random(784) - 0.1, 0)
    model = Autoencoder(mean, seed=5)
    weights, biases = model.split(model.parameters)
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        assert not b.any()
        assert abs(w.mean()) < 4 * np.sqrt(2 / len(w) / w.size)
        assert w.var() == pytest.approx(2 / len(w), rel=0.05)
    outputs = model.forward(pixels(3).astype(np.float32))[0][-1]
    np.testing.assert_array_equal(outputs, [mean.astype(np.float32)] * 3)
    assert (Autoencoder(mean, seed=6).parameters != model.parameters).any()


@pytest.mark.parametrize("steps", [23_500, 7, 1])
@pytest.mark.parametrize("start", [0.0, 0.25, 1.0])
def test_learning_rate_is_constant_and_then_falls_to_zero(steps, start):
    settings = replace(Settings(), learning_rate=3.0, decay_start=start)
    rates = [script.scheduled_learning_rate(step, steps, settings) for step in range(steps)]
    expected = np.interp(range(steps), [0, start * steps, steps], [3, 3, 0])
    np.testing.assert_allclose(rates, expected, rtol=1e-9)
    peak = script.default_learning_rate
    assert (peak(256), peak(64)) == (Settings.learning_rate, Settings.learning_rate / 4)
    assert peak(1024) == pytest.approx(2 * Settings.learning_rate)


def test_encode_and_decode_are_the_two_halves_for_all_kinds_of_images():
    model = network(dtype=np.float32)
    images = np.round(pixels(2001) * 255).astype(np.uint8)
    codes = model.encode(images)
    outputs = model.decode(codes)
    activations, _ = model.forward(images / np.float32(255))
    np.testing.assert_allclose(codes, activations[3], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outputs, activations[6], rtol=1e-4, atol=1e-5)
    loss = np.mean((activations[6] - images / 255) ** 2)
    assert script.reconstruction_loss(model, images) == pytest.approx(loss, rel=1e-5)
    square, floats = images.reshape(-1, 1, 28, 28), images / 255
    several = (square, floats, floats[:9].tolist(), torch.from_numpy(square), torch.tensor(floats))
    np.testing.assert_array_equal(model.encode(images > 99), model.encode((images > 99) + 0.0))
    for same in (*several, images[0], square[0, 0], square[:1], floats[0].reshape(28, 28).tolist()):
        close = codes[: np.asarray(same).size // 784]
        np.testing.assert_allclose(model.encode(same), close, rtol=1e-4, atol=1e-5)
    for same in (codes[0], codes[0].tolist(), torch.from_numpy(codes[:1])):
        np.testing.assert_allclose(model.decode(same), outputs[:1], rtol=1e-4, atol=1e-5)


WRONG = {  # images, and what is said of them
    "transposed": (np.zeros((784, 9)), r"784 pixels .*\(784, 9\)"),
    "up to 255": (np.linspace(-1e-9, 255, 784), "-1e-09 to 255: .*divide 0 to 255 by 255"),
    "below black": (np.linspace(-14, 1, 784), r"-14 to 1: .* clip to \[0, 1\]"),
    "four smaller": (np.zeros((4, 14, 14)), r"784 pixels .*\(4, 14, 14\)"),
    "a little above 1": (np.full(784, 1.01), r"from 1.01 to 1.01: .* clip to \[0, 1\]"),
    "not a number": (np.full(784, np.nan), "NaN"),
}


@pytest.mark.parametrize(("images", "told"), WRONG.values(), ids=WRONG)
def test_encode_names_the_fault_of_unusable_images(images, told):
    with pytest.raises(ValueError, match=told):
        network(dtype=np.float32).encode(images)
    for codes in (np.zeros((2, 127)), np.zeros((128, 2)), np.zeros((1, 1, 128)), [np.nan] * 128):
        with pytest.raises(ValueError, match=r"codes of 128 finite .*\("):
            network(dtype=np.float32).decode(codes)


def test_encoding_needs_little_memory_beside_the_images():
    images = np.zeros((60_000, 784), np.uint8)
    tracemalloc.start()
    network(dtype=np.float32).encode(images)
    assert tracemalloc.get_traced_memory()[1] < 16 * images.nbytes  # A float32 copy is 4 times it.
    tracemalloc.stop()
