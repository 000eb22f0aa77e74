"""The network's mathematics against two oracles: central differences and PyTorch's autograd."""

import numpy as np
import pytest
import torch
from conftest import script

from mnist_autoencoder import LAYER_SIZES, Autoencoder

SMALL = (7, 6, 5, 3, 5, 6, 7)


def gradients(model, images):
    model.forward(images)
    model.backward()
    return [gradient.copy() for gradient in model.weight_gradients]


def with_biases(model, seed=1):
    """The model with random biases: zero ones would hide a wrong use of them."""
    rng = np.random.default_rng(seed)
    for weights in model.weights:
        weights[:, -1] = rng.normal(0, 0.3, len(weights))
    return model


def torch_twin(model):
    """The same network of PyTorch's own layers and with the same numbers."""
    layers = []
    for index, weights in enumerate(model.weights):
        layer = torch.nn.Linear(weights.shape[1] - 1, weights.shape[0])
        layer.weight.data = torch.from_numpy(weights[:, :-1].copy())
        layer.bias.data = torch.from_numpy(weights[:, -1].copy())
        layers += [layer, torch.nn.Sigmoid() if index == 5 else torch.nn.ELU()]
    del layers[5]  # the code is linear
    return torch.nn.Sequential(*layers)


def linear_layers(twin):
    return [layer for layer in twin if isinstance(layer, torch.nn.Linear)]


def test_every_gradient_equals_central_differences():
    rng = np.random.default_rng(0)
    model = with_biases(Autoencoder(0, SMALL, np.float64))
    images = rng.random((4, 7))
    step = 1e-6
    for weights, gradient in zip(model.weights, gradients(model, images), strict=True):
        for place in np.ndindex(*weights.shape):
            value = weights[place]
            weights[place] = value + step
            above = model.forward(images)
            weights[place] = value - step
            below = model.forward(images)
            weights[place] = value
            assert gradient[place] == pytest.approx((above - below) / (2 * step), abs=1e-9)


def test_gradients_of_the_whole_network_equal_central_differences_along_random_directions():
    rng = np.random.default_rng(0)
    model = with_biases(Autoencoder(0, LAYER_SIZES, np.float64))
    images = rng.random((3, 784))
    for weights, gradient in zip(model.weights, gradients(model, images), strict=True):
        for columns in (slice(None, -1), slice(-1, None)):  # weights, then biases
            direction = np.zeros_like(weights)
            direction[:, columns] = rng.standard_normal(direction[:, columns].shape)
            original, losses = weights.copy(), []
            for step in (1e-6, -1e-6):
                weights[:] = original + step * direction
                losses.append(model.forward(images))
            weights[:] = original
            slope = (losses[0] - losses[1]) / 2e-6
            assert np.vdot(gradient, direction) == pytest.approx(slope, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize("n", [1, 128])
def test_loss_and_every_gradient_equal_autograds(n):
    rng = np.random.default_rng(0)
    model = with_biases(Autoencoder(0, dtype=np.float64))
    images = rng.integers(0, 256, (n, 784), np.uint8)
    found = gradients(model, images)
    twin = torch_twin(model)
    targets = torch.from_numpy(images / 255)
    loss = torch.nn.functional.mse_loss(twin(targets), targets)
    loss.backward()
    assert model.forward(images) == pytest.approx(loss.item(), rel=1e-12)
    for gradient, layer in zip(found, linear_layers(twin), strict=True):
        np.testing.assert_allclose(gradient[:, :-1], layer.weight.grad, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(gradient[:, -1], layer.bias.grad, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_twenty_steps_equal_those_of_torch_optim_sgd(momentum):
    rng = np.random.default_rng(0)
    model = with_biases(Autoencoder(0, dtype=np.float64))
    twin = torch_twin(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=2.0, momentum=momentum)
    velocity = np.zeros_like(model.parameters)
    start = [weights.copy() for weights in model.weights]
    for _ in range(20):
        images = rng.integers(0, 256, (16, 784), np.uint8)
        targets = torch.from_numpy(images / 255)
        loss = torch.nn.functional.mse_loss(twin(targets), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert script.sgd_step(model, velocity, images, 2.0, momentum) == pytest.approx(loss.item())
    for weights, layer, before in zip(model.weights, linear_layers(twin), start, strict=True):
        assert np.abs(weights - before).max() > 1e-3
        np.testing.assert_allclose(weights[:, :-1], layer.weight.detach(), rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(weights[:, -1], layer.bias.detach(), rtol=1e-7, atol=1e-10)


def test_float32_training_stays_close_to_float64():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 784), np.uint8)
    single, double = (gradients(Autoencoder(3, dtype=t), images) for t in (np.float32, np.float64))
    for narrow, wide in zip(single, double, strict=True):
        assert narrow.dtype == np.float32
        assert np.linalg.norm(narrow - wide) < 1e-4 * np.linalg.norm(wide)


def test_scale_multiplies_the_whole_gradient():
    images = np.random.default_rng(0).random((5, 7))
    model = Autoencoder(0, SMALL, np.float64)
    plain = np.concatenate([gradient.ravel() for gradient in gradients(model, images)])
    np.testing.assert_allclose(model.backward(scale=3.5), 3.5 * plain)


def test_initial_weights_have_hes_variance_and_no_bias():
    for weights in Autoencoder(5).weights:
        inputs = weights.shape[1] - 1
        assert not weights[:, -1].any()
        assert abs(weights[:, :-1].mean()) < 4 * np.sqrt(2 / inputs / weights[:, :-1].size)
        assert weights[:, :-1].var() == pytest.approx(2 / inputs, rel=0.05)


def test_seeds():
    first, again, other = Autoencoder(seed=4), Autoencoder(seed=4), Autoencoder(seed=5)
    for one, two, three in zip(first.weights, again.weights, other.weights, strict=True):
        assert one.tobytes() == two.tobytes()
        assert not np.array_equal(one, three)


def test_learning_rate_is_torchs_cosine_times_a_warm_up():
    warmup, steps = script.WARMUP_STEPS, 3 * script.WARMUP_STEPS
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=8.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for step in range(steps):
        expected = scheduler.get_last_lr()[0] * min(1, (step + 1) / warmup)
        assert script.learning_rate(step, steps, 8.0) == pytest.approx(expected, abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_mean_loss_counts_every_image_once():
    images = np.random.default_rng(0).integers(0, 256, (1203, 784), np.uint8)
    model = Autoencoder(0, dtype=np.float64)
    assert script.mean_loss(model, images) == pytest.approx(model.forward(images))


def test_encode_and_decode_are_the_two_halves():
    model = with_biases(Autoencoder(0))
    images = np.random.default_rng(0).integers(0, 256, (1001, 784), np.uint8)
    codes, outputs = model.encode(images), model.reconstruct(images)
    twin = torch_twin(model)
    with torch.no_grad():
        pixels = torch.from_numpy(images / np.float32(255))
        np.testing.assert_allclose(codes, twin[:5](pixels), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(outputs, twin(pixels), rtol=1e-4, atol=1e-5)
    assert codes.shape == (1001, 128) and outputs.shape == (1001, 784)
    np.testing.assert_array_equal(outputs, model.decode(codes))
    loss = np.mean((outputs - images / 255) ** 2)
    assert model.forward(images) == pytest.approx(loss, rel=1e-5)


def test_all_kinds_of_images_give_the_same_codes():
    model = Autoencoder(0)
    images = np.random.default_rng(0).integers(0, 256, (3, 784), np.uint8)
    expected = model.encode(images)
    for same in (images.reshape(3, 28, 28), images / 255, (images / 255).astype(np.float32)):
        np.testing.assert_allclose(model.encode(same), expected, rtol=1e-4, atol=1e-5)
    assert model.encode(images[:0]).shape == (0, 128)


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (np.zeros((2, 783), np.uint8), "783"),
        (np.zeros(784, np.uint8), "784"),
        (np.zeros((1, 28, 27)), "27"),
        (np.zeros((1, 1, 28, 28)), "28, 28"),
        (np.float32(0), "()"),
        (np.zeros((2, 784), np.int64), "int64"),
        (np.zeros((2, 784), bool), "bool"),
        (np.zeros((2, 784), complex), "complex"),
        (np.full((1, 784), 255.0), "float64"),
        (np.full((1, 784), -0.1, np.float32), "float32"),
        (np.full((1, 784), np.nan), "float64"),
        (np.full((1, 784), "a"), "<U1"),
    ],
)
def test_other_images_are_refused_by_name(images, named):
    for method in (Autoencoder(0).encode, Autoencoder(0).reconstruct):
        with pytest.raises(ValueError, match=".*") as caught:
            method(images)
        assert named in str(caught.value)


@pytest.mark.parametrize(
    "codes", [np.zeros((2, 127)), np.zeros(128), np.zeros((1, 128), int), np.full((1, 128), np.inf)]
)
def test_other_codes_are_refused(codes):
    with pytest.raises(ValueError, match="codes must be"):
        Autoencoder(0).decode(codes)


def test_huge_codes_decode_without_a_warning(recwarn):
    assert np.isfinite(Autoencoder(0).decode(np.full((1, 128), 1e30))).all()
    assert not recwarn.list


def test_saved_model_is_the_same_model(tmp_path):
    model = with_biases(Autoencoder(7))
    model.save(tmp_path / "model.npz")
    images = np.random.default_rng(0).integers(0, 256, (4, 784), np.uint8)
    loaded = Autoencoder.load(str(tmp_path / "model.npz"))
    np.testing.assert_array_equal(loaded.reconstruct(images), model.reconstruct(images))
    assert [path.name for path in tmp_path.iterdir()] == ["model.npz"]
