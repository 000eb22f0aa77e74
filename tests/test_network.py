"""The network and its training step against oracles: central differences and PyTorch."""

import numpy as np
import pytest
import torch
from conftest import script

from mnist_autoencoder import LAYER_SIZES, Autoencoder

SMALL = (7, 6, 5, 3, 5, 6, 7)


def network(layer_sizes=LAYER_SIZES, dtype=np.float64, seed=0):
    """A network with no weight or bias at zero, where a wrong use of it would not show."""
    rng = np.random.default_rng(seed)
    model = Autoencoder(rng.random(layer_sizes[0]), seed, layer_sizes, dtype)
    model.weights[-1][:] = rng.normal(0, 0.05, model.weights[-1].shape)
    for biases in model.biases:
        biases += rng.normal(0, 0.3, biases.shape)
    return model


def pixels(n, seed=1, size=784):
    return np.random.default_rng(seed).random((n, size))


def torch_twin(model):
    """The same network of PyTorch's own layers and with the same numbers."""
    layers = []
    for index, (weights, biases) in enumerate(zip(model.weights, model.biases, strict=True)):
        layer = torch.nn.Linear(*weights.shape)
        layer.weight.data = torch.tensor(weights.T)
        layer.bias.data = torch.tensor(biases)
        layers += [layer, torch.nn.Sigmoid() if index == 5 else torch.nn.ELU()]
    del layers[5]  # the code is linear
    return torch.nn.Sequential(*layers)


def torch_loss(twin, model, images):
    x = torch.tensor(images)
    return torch.nn.functional.mse_loss(twin(x - torch.tensor(model.mean_image)), x)


def flat(twin, what):
    """The twin's parameters, or their gradients, in the order of the model's vector."""
    linear = [layer for layer in twin if isinstance(layer, torch.nn.Linear)]
    pairs = [(what(layer.weight).T, what(layer.bias)) for layer in linear]
    return torch.cat([part.reshape(-1) for pair in pairs for part in pair]).numpy()


def test_every_gradient_equals_central_differences():
    model, images, step = network(SMALL), pixels(4, size=7), 1e-6

    def loss():
        return np.mean((model.forward(images)[-1] - images) ** 2)

    gradient = model.backward(model.forward(images), images).copy()
    for place, value in enumerate(model.parameters):
        model.parameters[place] = value + step
        above = loss()
        model.parameters[place] = value - step
        below = loss()
        model.parameters[place] = value
        assert gradient[place] == pytest.approx((above - below) / (2 * step), abs=1e-9)
    assert np.count_nonzero(gradient) == gradient.size


@pytest.mark.parametrize("n", [1, 128])
def test_outputs_and_every_gradient_equal_autograds(n):
    model, images = network(), pixels(n)
    activations = model.forward(images)
    gradient = model.backward(activations, images)
    twin = torch_twin(model)
    loss = torch_loss(twin, model, images)
    loss.backward()
    assert script.mean_square(activations[-1] - images) == pytest.approx(loss.item(), rel=1e-12)
    expected = flat(twin, lambda parameter: parameter.grad)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("momentum", [0.5, 0.98])
@pytest.mark.parametrize("clip", [1e9, 2e-3])
def test_twenty_steps_equal_those_of_torch_optim_sgd(monkeypatch, momentum, clip):
    monkeypatch.setattr(script, "CLIP_NORM", clip)
    model = network()
    twin, start = torch_twin(model), model.parameters.copy()
    settings = {"lr": 2.0, "momentum": momentum, "nesterov": True, "weight_decay": 1e-3}
    optimizer = torch.optim.SGD(twin.parameters(), **settings)
    run = script.Run({"momentum": momentum}, model, np.zeros_like(model.parameters), [])
    clipped = 0
    for step in range(20):
        images = pixels(16, seed=step)
        optimizer.zero_grad()
        loss = torch_loss(twin, model, images)
        loss.backward()
        norm = np.linalg.norm(flat(twin, lambda parameter: parameter.grad))
        if norm > clip:
            clipped += 1
            for parameter in twin.parameters():
                parameter.grad *= clip / norm
        optimizer.step()
        assert script.sgd_step(run, images, 2.0, 1e-3) == pytest.approx(loss.item())
    assert (clipped > 0) == (clip < 1)
    assert np.abs(model.parameters - start).max() > 1e-4
    expected = flat(twin, torch.Tensor.detach)
    np.testing.assert_allclose(model.parameters, expected, rtol=1e-7, atol=1e-10)


def test_float32_gradient_is_that_of_float64_but_for_rounding():
    narrow, wide = network(dtype=np.float32), network()
    images = np.round(pixels(64) * 255).astype(np.uint8)
    x = script.scaled(images)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, images / 255, rtol=1e-6)
    single = narrow.backward(narrow.forward(x), x)
    double = wide.backward(wide.forward(images / 255), images / 255)
    assert single.dtype == np.float32
    assert np.linalg.norm(single - double) < 1e-4 * np.linalg.norm(double)


def test_activations_are_torchs_and_finite_and_silent_at_extremes(recwarn):
    z = np.array([-1e30, -1e4, -100, 0, 100, 1e4, 1e30], np.float32)
    for function, slope in (script.ELU, script.LINEAR, script.SIGMOID):
        assert np.isfinite(function(z)).all() and np.isfinite(slope(function(z))).all()
    z = torch.linspace(-30, 30, 601, dtype=torch.float64)
    for ours, theirs in ((script.ELU, torch.nn.ELU()), (script.SIGMOID, torch.nn.Sigmoid())):
        np.testing.assert_allclose(ours[0](z.numpy()), theirs(z), rtol=1e-9, atol=1e-15)
    assert not recwarn.list


def test_weights_start_with_hes_variance_and_the_network_as_the_mean_image():
    mean = np.random.default_rng(0).random(784)
    mean[:100] = 0
    model = Autoencoder(mean, seed=5)
    for weights, biases in zip(model.weights[:-1], model.biases[:-1], strict=True):
        inputs = len(weights)
        assert not biases.any()
        assert abs(weights.mean()) < 4 * np.sqrt(2 / inputs / weights.size)
        assert weights.var() == pytest.approx(2 / inputs, rel=0.05)
    outputs = model.forward(pixels(3).astype(np.float32))[-1]
    np.testing.assert_allclose(outputs, [mean.clip(0.002, 0.998)] * 3, rtol=1e-4)


@pytest.mark.parametrize("steps", [46_900, 500, 7, 1])
def test_learning_rate_goes_up_and_down_in_straight_lines(steps):
    warmup = min(1000, steps / 5)
    for step in range(steps):
        up = np.interp(step, [-1, warmup - 1], [0, 8])
        down = np.interp(step, [warmup, steps], [8, 0])
        rate = script.learning_rate(step, steps, 8.0)
        assert rate == pytest.approx(min(up, down)) and 0 < rate <= 8


def test_peak_learning_rate_is_linear_below_128_images_and_a_root_above():
    peak = script.peak_learning_rate
    assert peak(128) == 15
    for n in (1, 8, 64):
        assert peak(2 * n) == pytest.approx(2 * peak(n))
        assert peak(128 * 4 * n) == pytest.approx(2 * peak(128 * n))


def test_encode_and_decode_are_the_two_halves():
    model = network(dtype=np.float32)
    images = np.round(pixels(101) * 255).astype(np.uint8)
    codes, outputs = model.encode(images), model.reconstruct(images)
    twin, x = torch_twin(model), torch.tensor(images / np.float32(255))
    with torch.no_grad():
        centred = x - torch.tensor(model.mean_image)
        np.testing.assert_allclose(codes, twin[:5](centred), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(outputs, twin(centred), rtol=1e-4, atol=1e-5)
    assert codes.shape == (101, 128) and outputs.shape == (101, 784)
    np.testing.assert_array_equal(outputs, model.decode(codes))


def test_all_kinds_of_images_give_the_same_codes():
    model = network(dtype=np.float32)
    images = np.round(pixels(3) * 255).astype(np.uint8)
    expected = model.encode(images)
    for same in (images.reshape(3, 28, 28), images / 255, (images / 255).astype(np.float32)):
        np.testing.assert_allclose(model.encode(same), expected, rtol=1e-4, atol=1e-5)
    assert model.encode(images[:0]).shape == (0, 128)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 783), np.uint8),
        np.zeros(784, np.uint8),
        np.zeros((1, 28, 27)),
        np.float32(0),
        np.full((1, 784), 2),
        np.full((1, 784), 255.0),
        np.full((1, 784), -0.1, np.float32),
        np.full((1, 784), np.nan),
    ],
)
def test_other_images_are_refused(images):
    for method in (network().encode, network().reconstruct):
        with pytest.raises(ValueError, match="images of 784 pixels"):
            method(images)
