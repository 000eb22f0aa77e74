"""The network and its training step against oracles: central differences and PyTorch."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmark import torch_loss, torch_network
from conftest import script

from mnist_autoencoder import Autoencoder, Layer, Settings


def scaled_down(layers):
    """The same layers with fewer inputs and outputs: 784 becomes 9, and 128 becomes 3."""
    small = []
    for layer in layers:
        small.append(Layer(layer.inputs // 100 + 2, layer.outputs // 100 + 2, layer.activation))
    return tuple(small)


SMALL_ENCODER = scaled_down(script.ENCODER)
SMALL_DECODER = scaled_down(script.DECODER)


def shaken(model):
    """The network with parameters that are all different from 0; some outputs are clamped."""
    rng = np.random.default_rng(0)
    weights, biases = model.unpack(model.parameters)
    weights[-1][:] = rng.normal(0, 0.5 / np.sqrt(len(weights[-1])), weights[-1].shape)
    for b in biases:
        b += rng.normal(0, 0.1, b.shape)
    return model


def network(dtype=np.float64):
    """A network of the script's size."""
    return shaken(Autoencoder(np.random.default_rng(1).random(784), dtype=dtype))


def pixels(n, seed=1, size=784):
    return np.random.default_rng(seed).random((n, size))


def loss_and_gradient(model, x):
    activations, derivatives = model.forward(x - model.mean_image)
    losses, loss_derivatives = script.LOSS(activations[-1], x)
    gradient = model.backward(activations, derivatives, loss_derivatives / len(x))
    return np.sum(losses) / len(x), gradient


def torch_backward(twin, model, images):
    """The loss of the network in PyTorch, whose parameters then have gradients."""
    x = torch.tensor(images)
    twin.zero_grad()
    loss = torch_loss(twin(x - torch.tensor(model.mean_image)), x)
    loss.backward()
    return loss.item()


def flat(tensors):
    """PyTorch's parameters, or their gradients, in the order of the script's vector."""
    return np.concatenate([tensor.detach().numpy().T.ravel() for tensor in tensors])


def test_every_gradient_equals_central_differences():
    """With the script's own tables and loss, so that it also checks a reader's edits of these."""
    mean_image = np.linspace(0.2, 0.8, 9)
    model = shaken(Autoencoder(mean_image, 0, SMALL_ENCODER, SMALL_DECODER, np.float64))
    x = pixels(20, size=9)
    _, gradient = loss_and_gradient(model, x)
    step = 1e-6
    for place, value in enumerate(model.parameters.copy()):
        model.parameters[place] = value + step
        above, _ = loss_and_gradient(model, x)
        model.parameters[place] = value - step
        below, _ = loss_and_gradient(model, x)
        model.parameters[place] = value
        assert gradient[place] == pytest.approx((above - below) / (2 * step), abs=1e-7)
    assert np.count_nonzero(gradient) > gradient.size / 2


@pytest.mark.parametrize("n", [1, 128])
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [("f8", 1e-9, 1e-12), ("f4", 1e-3, 1e-5)])
def test_loss_and_every_gradient_equal_autograds(n, dtype, rtol, atol):
    model = network(dtype)
    x = pixels(n).astype(dtype)
    outputs = model.forward(x - model.mean_image)[0][-1]
    assert 0.01 < np.mean((outputs == 0) | (outputs == 1)) < 0.5
    loss, gradient = loss_and_gradient(model, x)
    twin = torch_network(model)
    assert loss == pytest.approx(torch_backward(twin, model, x), rel=rtol / 100)
    expected = flat(parameter.grad for parameter in twin.parameters())
    np.testing.assert_allclose(gradient, expected, rtol, atol)
    assert gradient.dtype == dtype


@pytest.mark.parametrize(("momentum", "max_norm"), [(0.5, 1e9), (0.98, 30.0), (0.98, 1.0)])
def test_ten_steps_equal_those_of_torch_optim_sgd(momentum, max_norm):
    model = network()
    velocity = np.zeros_like(model.parameters)
    settings = replace(Settings(), momentum=momentum, max_gradient_norm=max_norm)
    twin = torch_network(model)
    options = {"lr": 3e-4, "momentum": momentum, "nesterov": True, "weight_decay": 1e-3}
    optimizer = torch.optim.SGD(twin.parameters(), **options)
    for step in range(10):
        x = pixels(16, seed=step)
        torch_backward(twin, model, x)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
        optimizer.step()
        _, gradient = loss_and_gradient(model, x)
        script.sgd_step(model.parameters, velocity, gradient, 3e-4, 1e-3, settings)
    np.testing.assert_allclose(model.parameters, flat(twin.parameters()), rtol=1e-5, atol=1e-8)


def test_gradients_are_clipped_to_the_norm_and_smaller_ones_are_not_changed():
    settings = replace(Settings(), momentum=0.0, max_gradient_norm=2.0)
    for norm, expected in ((0.0, 0.0), (1.5, 1.5), (3.0, 2.0)):
        parameters = np.zeros(100_000)
        gradient = np.full(100_000, norm / np.sqrt(100_000))
        script.sgd_step(parameters, np.zeros(100_000), gradient, 1.0, 0.0, settings)
        assert np.linalg.norm(parameters) == pytest.approx(expected)


ORACLES = {"elu": torch.nn.ELU(), "linear": torch.nn.Identity(), "clamp": torch.nn.Hardtanh(0, 1)}


@pytest.mark.parametrize("name", ORACLES)
def test_activations_and_derivatives_are_torchs(name):
    z = torch.linspace(-30, 30, 601, dtype=torch.float64, requires_grad=True)
    expected = ORACLES[name](z)
    expected.sum().backward()
    a, derivative = getattr(script, name)(z.detach().numpy())
    np.testing.assert_allclose(a, expected.detach(), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(derivative * np.ones(601), z.grad, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", ORACLES)
def test_activations_are_finite_float32_for_extreme_values(name):
    z = np.array([-1e30, -1e4, -100, 0, 100, 1e4, 1e30], np.float32)
    with np.errstate(all="raise"):
        a, derivative = getattr(script, name)(z)
    assert np.isfinite(a).all() and np.isfinite(derivative).all()
    assert a.dtype == (a * derivative).dtype == np.float32


def test_initial_weights_have_hes_variance_and_other_biases_than_the_last_are_zero():
    model = Autoencoder(np.ones(784), seed=5)
    weights, biases = model.unpack(model.parameters)
    for w, b in zip(weights[:-1], biases[:-1], strict=True):
        assert abs(w.mean()) < 4 * np.sqrt(2 / len(w) / w.size)
        assert w.var() == pytest.approx(2 / len(w), rel=0.05)
        assert not b.any()
    assert (Autoencoder(np.ones(784), seed=6).parameters != model.parameters).any()


def test_untrained_network_outputs_the_mean_image():
    mean_image = np.random.default_rng(0).random(784).astype(np.float32)
    model = Autoencoder(mean_image)
    np.testing.assert_array_equal(model.decode(model.encode(pixels(3))), [mean_image] * 3)


@pytest.mark.parametrize("steps", [1, 7, 1000])
@pytest.mark.parametrize("fraction", [1e-9, 0.65, 1.0])
def test_learning_rate_is_constant_and_then_falls_to_zero(steps, fraction):
    settings = replace(Settings(), lr=3.0, decay_fraction=fraction)
    rates = [script.learning_rate_at(step, steps, settings) for step in range(steps)]
    start = steps * (1 - fraction)
    expected = np.interp(range(steps), [0, start, steps], [3, 3, 0])
    np.testing.assert_allclose(rates, expected, rtol=1e-9)


def test_learning_rate_is_proportional_to_small_batches_and_to_the_root_of_large_ones():
    for batch_size, factor in ((256, 1), (64, 1 / 4), (1024, 2)):
        settings = replace(Settings(), lr=3.0, batch_size=batch_size)
        assert script.learning_rate_at(0, 10, settings) == pytest.approx(3 * factor)


def test_every_step_gets_its_images_gradient_learning_rate_and_weight_decay(monkeypatch):
    images = np.random.default_rng(0).integers(256, size=(50, 784), dtype=np.uint8)
    settings = Settings(epochs=3, batch_size=16)
    model = Autoencoder(np.full(784, 0.5))
    forward = model.forward
    batches = []
    gradients = []
    steps = []

    def forward_and_record(x):
        batches.append(x)
        return forward(x)

    def record(parameters, velocity, gradient, learning_rate, decay, settings):
        gradients.append(gradient)
        steps.append((learning_rate, decay))

    monkeypatch.setattr(model, "forward", forward_and_record)
    monkeypatch.setattr(script, "sgd_step", record)
    loss = script.train_epoch(model, None, images, 2, settings)
    assert [len(batch) for batch in batches] == [16, 16, 16, 2]
    for batch, gradient in zip(batches, gradients, strict=True):
        _, expected = loss_and_gradient(Autoencoder(model.mean_image), batch + model.mean_image)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    shuffled = np.concatenate(batches)
    inputs = script.to_pixels(images) - model.mean_image
    assert sorted(map(bytes, shuffled)) == sorted(map(bytes, inputs))
    rates = [script.learning_rate_at(step, 12, settings) for step in range(4, 8)]
    assert steps == [(rate, settings.weight_decay / 50) for rate in rates]
    assert loss == pytest.approx(np.mean((images / 255 - 0.5) ** 2), rel=1e-5)
    orders = {shuffled.tobytes()}
    for seed, epoch in ((0, 3), (1, 2)):
        batches.clear()
        script.train_epoch(model, None, images, epoch, replace(settings, seed=seed))
        orders.add(np.concatenate(batches).tobytes())
    assert len(orders) == 3


def test_encode_and_decode_are_the_two_halves_of_forward():
    model = network(np.float32)
    images = np.round(pixels(2001) * 255).astype(np.uint8)
    activations, _ = model.forward(images / np.float32(255) - model.mean_image)
    codes = model.encode(images)
    np.testing.assert_allclose(codes, activations[3], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(model.decode(codes), activations[6], rtol=1e-4, atol=1e-5)


def test_encode_takes_arrays_lists_and_tensors_of_pixels_or_bytes():
    model = network(np.float32)
    images = np.round(pixels(9) * 255).astype(np.uint8)
    codes = model.encode(images)
    square = images.reshape(9, 28, 28)
    floats = images / 255
    for same in (square, floats, floats.tolist(), torch.tensor(square), torch.tensor(floats)):
        np.testing.assert_allclose(model.encode(same), codes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [bool, np.uint8, int])
def test_encode_takes_0_and_1_of_any_type_for_black_and_white(dtype):
    model = network(np.float32)
    images = (pixels(9) > 0.5).astype(dtype)
    np.testing.assert_array_equal(model.encode(images), model.encode(images * 1.0))


UNUSABLE = {
    "four smaller": np.zeros((4, 14, 14)),
    "four smaller in rows": np.zeros((4, 196)),
    "transposed": np.zeros((784, 9)),
    "a single one": np.zeros(784),
    "up to 255": np.linspace(0, 255, 784).reshape(1, 784),
    "below black": np.full((1, 784), -0.1),
    "not a number": np.full((1, 784), np.nan),
}


@pytest.mark.parametrize("images", UNUSABLE.values(), ids=UNUSABLE)
def test_encode_refuses_other_shapes_and_values(images):
    with pytest.raises(ValueError, match="images .*must be"):
        network(np.float32).encode(images)


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_using_the_network_needs_little_memory_beside_its_input(part):
    model = network(np.float32)
    rows = np.zeros((20_000, {"encode": 784, "decode": 128}[part]), np.float32)
    activations = 4 * 20_000 * (512 + 256 + 128)  # bytes, if all were kept
    outputs = 4 * 20_000 * 784
    tracemalloc.start()
    getattr(model, part)(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < outputs + outputs + activations


def test_layers_that_do_not_fit_are_named():
    encoder = (Layer(9, 6, script.elu), Layer(5, 3, script.linear))
    with pytest.raises(ValueError, match="inputs=9, outputs=6.*inputs=5, outputs=3"):
        Autoencoder(np.zeros(9), 0, encoder, SMALL_DECODER)
    with pytest.raises(ValueError, match="inputs=7, outputs=9.*inputs=8, outputs=3"):
        Autoencoder(np.zeros(8), 0, (Layer(8, 3, script.linear),), SMALL_DECODER)
