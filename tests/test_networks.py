"""Networks: sizes and formulas; the global loss by its definition."""

import functools

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
        # Ren et al.: 272K, 429K, 919K and 13.1M, heads included.
        ("s/1/1", MNIST, {}, 271_892),
        ("m/1/16", MNIST, {}, 429_076),
        ("m/8/16", (32, 32, 3), {}, 918_770),
        ("l/8/64", (32, 32, 3), {}, 13_074_674),
    ],
)
def test_parameter_counts(name, image_shape, sizes, count):
    assert parameters(make(name, image_shape, **sizes)) == count


@pytest.mark.parametrize(
    ("name", "image_shape"),
    [
        *((name, shape) for name in ("logreg", "mlp", "cnn") for shape in ((8, 8, 1), (9, 7, 3))),
        *((name, (9, 7, 3)) for name in ("s/1/1", "m/1/16")),
        *(("m/8/16", shape) for shape in ((8, 8, 1), (16, 24, 3))),
    ],
)
def test_logits_of_each_image_are_its_own(name, image_shape):
    network = make(name, image_shape, classes=4)
    images = np.random.default_rng(0).standard_normal((5, *image_shape), np.float32)
    apply = eqx.filter_jit(network)
    logits = np.asarray(apply(images))
    assert logits.shape == (5, 4)
    np.testing.assert_allclose(apply(images[2:3]), logits[2:3], rtol=1e-4, atol=1e-5)
    images[2] = np.flip(images[2])
    moved = apply(images)
    assert np.array_equal(np.any(np.array(moved != logits), axis=1), np.arange(5) == 2)


def test_mlp_is_its_formula():
    network = make("mlp", (2, 2, 1), classes=3, width=5, depth=1)
    images = jax.random.normal(jax.random.key(1), (7, 2, 2, 1))
    (block,), last = network.blocks, network.classifier
    first = block.linear
    hidden = np.maximum(np.array(images).reshape(7, 4) @ first.weight + first.bias, 0)
    np.testing.assert_allclose(network(images), hidden @ last.weight + last.bias, rtol=1e-5)


def test_cnn_pools_after_every_second_convolution():
    network = make("cnn", (8, 8, 1), classes=3, width=16)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    *convolutions, dense = network.blocks
    for i, block in enumerate(convolutions):
        x = jax.nn.relu(block.convolution(x))
        if i in (1, 3):
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    hidden = jax.nn.relu(x.reshape(2, -1) @ dense.linear.weight + dense.linear.bias)
    last = network.classifier
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    np.testing.assert_allclose(
        network(images), hidden @ last.weight + last.bias, rtol=1e-5, atol=1e-6
    )


def test_cnn_leaves_out_an_odd_last_row_and_column():
    network = make("cnn", (9, 9, 1), classes=3, width=16)
    assert network.blocks[-1].linear.weight.shape[0] == 2 * 2 * 64


def test_weights_have_the_variance_of_he():
    network = make("mlp")
    layers = [*(block.linear for block in network.blocks), network.classifier]
    for layer, gain in zip(layers, (2.0, 2.0, networks._layers.LAST_GAIN), strict=True):
        fan_in, size = layer.weight.shape[0], layer.weight.size
        # The relative standard error of a variance of n normal numbers is sqrt(2 / n).
        assert abs(jnp.var(layer.weight) * fan_in / gain - 1) < 4 * (2 / size) ** 0.5
        assert not np.any(layer.bias)


def test_seeds_decide_the_weights():
    same = jax.tree.map(np.array_equal, make("mlp", seed=1), make("mlp", seed=1))
    assert all(jax.tree.leaves(same))
    first, other = make("mlp", seed=1), make("mlp")
    assert not np.array_equal(first.classifier.weight, other.classifier.weight)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "mpl",
            {},
            "network 'mpl' is unknown; did you mean 'mlp'? (known: cnn, "
            "gpt/LAYERS/WIDTH, l/32/64, l/8/64, logreg, m/1/16, m/8/16, mlp, s/1/1)",
        ),
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
        ("m/1/16", {"width": 3}, "width (=3) is not a setting of network 'm/1/16'"),
        (
            "m/8/16",
            {"image_shape": (28, 32, 1)},
            "patches (=8 along a side) must divide the images' height and width, "
            "which are 28 and 32",
        ),
    ],
)
def test_impossible_networks(name, settings, message):
    with pytest.raises(InputError) as error:
        make(name, **settings)
    assert str(error.value) == message


def test_groups_must_divide_the_units():
    with pytest.raises(
        InputError, match=r"groups .=5. must divide the number of units, which is 8"
    ):
        networks.LocalMixer(MNIST, networks.Size(8, 1, 5, 1), 10, key=jax.random.key(0))


def mixer_by_hand(network, images):
    """LocalMixer one example at a time, patches first, in NumPy."""
    n, groups = network.patches, network.groups

    def normal(x, axis=-1):
        return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-5)

    def relu(x):
        return np.maximum(x, 0)

    logits = []
    for image in np.array(images, float):
        side = image.shape[0] // n
        x = np.stack(
            [image[side * i :, side * j :][:side, :side].ravel() for i, j in np.ndindex(n, n)]
        )
        for block in network.blocks:
            h = normal(x)
            if block.token is not None:
                h = relu(normal(np.array(block.token.weight).T @ h + block.token.bias[:, None]))
            h = relu(normal(h @ block.channel_weight + block.channel_bias))
            h = normal(h.reshape(n * n, groups, -1))
            h = np.einsum("pgc,gcd->pgd", h, block.group_weight) + block.group_bias
            h = relu(normal(h)).reshape(n * n, -1)
            x = h if block.token is None else x + h
        if network.normalise_features:
            x = normal(x.reshape(n * n, groups, -1)).reshape(n * n, -1)
        logits.append(x.mean(0) @ network.classifier.weight + network.classifier.bias)
    return np.stack(logits)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("size", [(12, 1, 1, 1), (12, 2, 3, 3), (16, 4, 4, 2)])
def test_local_mixer_is_its_formula(size, normalised):
    made = {"key": jax.random.key(0), "normalise_features": normalised}
    network = networks.LocalMixer((8, 8, 3), networks.Size(*size), 4, **made)
    images = jax.random.normal(jax.random.key(1), (5, 8, 8, 3))
    found = eqx.filter_jit(network)(images)
    np.testing.assert_allclose(found, mixer_by_hand(network, images), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["normalise", "relu"])
def test_derivatives_of_the_mixers_functions(name):
    """Forward, reverse, and forward over a batch of tangents, against `jax.numpy`."""

    def plain(x):
        if name == "relu":
            return jax.nn.relu(x)
        centred = x - jnp.mean(x, axis=0, keepdims=True)
        return centred / jnp.sqrt(jnp.mean(centred**2, axis=0, keepdims=True) + 1e-5)

    def own(x):
        of_mixers, of_all = networks._local_mixer, networks._normalise
        return of_mixers.relu(x) if name == "relu" else of_all.normalise(x, 0)

    x = jax.random.normal(jax.random.key(0), (6, 5))
    tangents = jax.random.normal(jax.random.key(1), (4, 6, 5))
    for derivative in (
        lambda f: f(x),
        lambda f: jax.vmap(lambda t: jax.jvp(f, (x,), (t,))[1])(tangents),
        lambda f: jax.vmap(lambda t: jax.vjp(f, x)[1](t)[0])(tangents),
    ):
        np.testing.assert_allclose(derivative(own), derivative(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("shape", [(7, 1, 4), (3, 24, 5), (31, 2, 3)])
def test_sums_are_those_of_numpy(shape, axis, dtype):
    """As it is, compiled over a batch, along another axis of a batch, and transposed."""
    x = jax.random.normal(jax.random.key(0), (4, *shape)).astype(dtype)
    atol, rtol = (1e-5, 1e-5) if dtype == np.float32 else (0.1, 0.01)
    close = functools.partial(np.testing.assert_allclose, atol=atol, rtol=rtol)
    sums = np.sum(np.array(x, float), axis=axis + 1, keepdims=True)

    def own(x):
        return networks._sum.summed(x, axis)

    last = jax.vmap(own, in_axes=3, out_axes=3)(x.transpose(1, 2, 3, 0)).transpose(3, 0, 1, 2)
    transposed = jax.vmap(lambda t: jax.vjp(own, x[0])[1](t)[0])(x)
    for found in (jnp.stack([own(one) for one in x]), jax.jit(jax.vmap(own))(x), last, transposed):
        assert found.dtype == dtype
        close(np.array(found, float), np.broadcast_to(sums, x.shape))
    close(np.array(networks._sum.total(x, axis + 1), float), sums.squeeze(axis + 1))


def test_sum_of_a_product_with_a_batched_array():
    """The sum that XLA gets wrong on a CPU, at a shape where it does."""
    y = jax.random.normal(jax.random.key(0), (512, 128, 64))
    tangents = jax.random.normal(jax.random.key(1), (2, 512, 128, 64))
    total = networks._sum.total
    found = jax.jit(jax.vmap(lambda t: total(y * t, 0)))(tangents)
    expected = np.sum(np.array(y)[None] * np.array(tangents), axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_global_loss_is_the_mean_cross_entropy():
    network = make("logreg", (2, 2, 1), classes=3)
    images = jax.random.normal(jax.random.key(1), (6, 2, 2, 1))
    labels = jnp.array([0, 1, 2, 0, 1, 2])
    logits = np.array(network(images), float)
    exp = np.exp(logits)
    expected = -np.mean(np.log(exp[np.arange(6), labels] / exp.sum(axis=1)))
    losses, aux = GlobalLoss()(network, images, labels)
    np.testing.assert_allclose(losses.total(), expected, rtol=1e-5)
    assert aux["errors"] == np.sum(logits.argmax(axis=1) != labels)


@pytest.mark.parametrize("name", ["logreg", "mlp", "cnn"])
def test_networks_learn_without_backpropagation(name):
    network = make(name, (4, 4, 1), classes=2, **({} if name == "logreg" else {"width": 16}))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    images = jax.random.normal(jax.random.key(1), (32, 4, 4, 1))
    labels = (jnp.mean(images, axis=(1, 2, 3)) > 0).astype(int)

    def loss(params):
        return GlobalLoss()(eqx.combine(params, static), images, labels)

    estimator = fg.WeightPerturbation(tangents=8, clip=1.0)
    gradient = fg.value_and_grad(loss, estimator, has_aux=True)

    # Compiled well, for convolutions with several tangents are slow in plain machine code.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 2})
    def step(params, i):
        (value, aux), grads = gradient(params, key=jax.random.fold_in(jax.random.key(2), i))
        params = jax.tree.map(lambda p, g: p - 0.02 * g, params, grads)
        return params, value, aux["errors"]

    values = []
    for i in range(400):
        params, value, errors = step(params, i)
        values.append(float(value))
        if values[-1] < 0.35 and errors <= 4:
            break
    assert values[0] > 0.6
    assert values[-1] < 0.35
    assert errors <= 4


def test_sizes_of_mixers():
    """The paper's names, and any other numbers of patches and groups."""
    assert networks.size_of("l/32/64") == networks.Size(2048, 32, 64, 4)
    assert networks.size_of("s/1/8") == networks.Size(256, 1, 8, 1)
    assert all(networks.size_of(name) for name in networks.SIZES)
    for name in ("m/8", "m/0/1", "x/1/1", "m/8/16/2", "m/08/16", "mlp"):
        assert networks.size_of(name) is None
    made = {"image_shape": (8, 8, 1), "classes": 3, "key": jax.random.key(0)}
    assert networks.build("s/4/2", **made).patches == 4
    with pytest.raises(InputError, match="network 'm/8' is unknown"):
        networks.build("m/8", **made)
    with pytest.raises(InputError, match=r"groups \(=3\) must divide the number of units"):
        networks.build("s/2/3", **made)


def test_heads_project_and_the_readout_gets_one_length():
    made = {"image_shape": (8, 8, 1), "classes": 3, "key": jax.random.key(0)}
    images = jax.random.uniform(jax.random.key(1), (4, 8, 8, 1))
    for name in ("mlp", "cnn", "s/2/4"):
        plain = networks.build(name, **made, heads=True)
        projecting = networks.build(name, **made, heads=True, projection=5)
        assert [head.weight.shape[1] for head in plain.heads] == [3] * len(plain.blocks)
        assert [head.weight.shape[1] for head in projecting.heads] == [5] * len(plain.blocks)
        pooled = projecting.pooled(projecting.blocks_output(images))
        scaled = pooled * (4 / np.linalg.norm(pooled, axis=1, keepdims=True))
        expected = projecting.classifier(scaled)
        np.testing.assert_allclose(projecting(images), expected, rtol=1e-4, atol=1e-5)
