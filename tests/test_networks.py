"""Networks: sizes and formulas; the global loss by its definition."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad import networks
from forwardgrad._errors import InputError
from forwardgrad.objectives import GlobalLoss

MNIST = (28, 28, 1)


def make(name, image_shape=MNIST, classes=10, seed=0, **sizes):
    return networks.build(
        name, image_shape=image_shape, classes=classes, key=jax.random.key(seed), **sizes
    )


def parameters(network):
    return sum(a.size for a in jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array)))


def linear(inputs, outputs):
    return inputs * outputs + outputs


@pytest.mark.parametrize(
    ("name", "image_shape", "sizes", "count"),
    [
        ("logreg", MNIST, {}, 7_850),
        ("mlp", MNIST, {}, 1_863_690),
        ("mlp", MNIST, {"depth": 0}, 7_850),
        ("mlp", (8, 8, 1), {"width": 32, "depth": 3}, linear(64, 32) + 2 * linear(32, 32) + 330),
        (
            "cnn",
            MNIST,
            {},
            linear(9, 64) + 3 * linear(9 * 64, 64) + linear(7 * 7 * 64, 1024) + linear(1024, 10),
        ),
        (
            "cnn",
            (32, 32, 3),
            {"width": 128},
            linear(27, 64) + 3 * linear(9 * 64, 64) + linear(8 * 8 * 64, 128) + linear(128, 10),
        ),
    ],
)
def test_parameter_counts(name, image_shape, sizes, count):
    assert parameters(make(name, image_shape, **sizes)) == count


@pytest.mark.parametrize("name", networks.NAMES)
@pytest.mark.parametrize("image_shape", [(8, 8, 1), (9, 7, 3)])
def test_logits_of_each_image_are_its_own(name, image_shape):
    network = make(name, image_shape, classes=4)
    images = jax.random.normal(jax.random.key(1), (5, *image_shape))
    logits = network(images)
    assert logits.shape == (5, 4)
    np.testing.assert_allclose(network(images[2:3]), logits[2:3], rtol=1e-5, atol=1e-6)
    moved = network(images.at[2].add(1.0))
    assert np.array_equal(np.any(np.array(moved != logits), axis=1), np.arange(5) == 2)


def test_mlp_is_its_formula():
    network = make("mlp", (2, 2, 1), classes=3, width=5, depth=1)
    images = jax.random.normal(jax.random.key(1), (7, 2, 2, 1))
    first, last = network.layers
    hidden = np.maximum(np.array(images).reshape(7, 4) @ first.weight + first.bias, 0)
    np.testing.assert_allclose(network(images), hidden @ last.weight + last.bias, rtol=1e-5)


def test_cnn_pools_after_every_second_convolution():
    network = make("cnn", (8, 8, 1), classes=3, width=16)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    for i, convolution in enumerate(network.convolutions):
        x = jax.nn.relu(convolution(x))
        if i in (1, 3):
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    hidden = jax.nn.relu(x.reshape(2, -1) @ network.hidden.weight + network.hidden.bias)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    np.testing.assert_allclose(
        network(images), hidden @ network.last.weight + network.last.bias, rtol=1e-5, atol=1e-6
    )


def test_cnn_leaves_out_an_odd_last_row_and_column():
    network = make("cnn", (9, 9, 1), classes=3, width=16)
    assert network.hidden.weight.shape[0] == 2 * 2 * 64


def test_weights_have_the_variance_of_he():
    network = make("mlp")
    for layer, gain in zip(network.layers, (2.0, 2.0, networks._mlp.LAST_GAIN), strict=True):
        fan_in, size = layer.weight.shape[0], layer.weight.size
        # The relative standard error of a variance of n normal numbers is sqrt(2 / n).
        assert abs(jnp.var(layer.weight) * fan_in / gain - 1) < 4 * (2 / size) ** 0.5
        assert not np.any(layer.bias)


def test_seeds_decide_the_weights():
    same = jax.tree.map(np.array_equal, make("mlp", seed=1), make("mlp", seed=1))
    assert all(jax.tree.leaves(same))
    assert not np.array_equal(make("mlp", seed=1).layers[0].weight, make("mlp").layers[0].weight)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mpl", {}, "network 'mpl' is unknown; did you mean 'mlp'? (known: cnn, logreg, mlp)"),
        ("mlp", {"width": 0}, "width must be at least 1, got 0"),
        ("mlp", {"depth": -1}, "depth must be at least 0, got -1"),
        ("logreg", {"width": 3}, "width (=3) is not a setting of network 'logreg'"),
        ("cnn", {"depth": 3}, "depth (=3) is not a setting of network 'cnn', only of 'mlp'"),
        (
            "cnn",
            {"image_shape": (3, 28, 1)},
            "images of 3x28 are too small for network 'cnn', which halves them twice; "
            "expected at least 4x4",
        ),
    ],
)
def test_impossible_networks(name, settings, message):
    with pytest.raises(InputError) as error:
        make(name, **settings)
    assert str(error.value) == message


def test_global_loss_is_the_mean_cross_entropy():
    network = make("logreg", (2, 2, 1), classes=3)
    images = jax.random.normal(jax.random.key(1), (6, 2, 2, 1))
    labels = jnp.array([0, 1, 2, 0, 1, 2])
    logits = np.array(network(images), float)
    exp = np.exp(logits)
    expected = -np.mean(np.log(exp[np.arange(6), labels] / exp.sum(axis=1)))
    loss, aux = GlobalLoss()(network, images, labels)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert aux["errors"] == np.sum(logits.argmax(axis=1) != labels)


@pytest.mark.parametrize("name", networks.NAMES)
def test_networks_learn_without_backpropagation(name):
    network = make(name, (4, 4, 1), classes=2, **({} if name == "logreg" else {"width": 16}))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    images = jax.random.normal(jax.random.key(1), (32, 4, 4, 1))
    labels = (jnp.mean(images, axis=(1, 2, 3)) > 0).astype(int)

    def loss(params):
        return GlobalLoss()(eqx.combine(params, static), images, labels)

    estimator = fg.WeightPerturbation(tangents=8, clip=1.0)
    gradient = fg.value_and_grad(loss, estimator, has_aux=True)

    @jax.jit
    def train(params):
        def step(params, i):
            (value, _), grads = gradient(params, key=jax.random.fold_in(jax.random.key(2), i))
            return jax.tree.map(lambda p, g: p - 0.02 * g, params, grads), value

        return jax.lax.scan(step, params, jnp.arange(400))

    params, losses = train(params)
    assert losses[0] > 0.6
    assert losses[-1] < 0.35
    assert loss(params)[1]["errors"] <= 4
