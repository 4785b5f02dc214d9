"""FG-A: against exact gradients, by its statistics, and without reverse mode between layers."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import forwardgrad as fg
from forwardgrad.networks import LocalMixer, Size, build
from forwardgrad.objectives import Contrastive, GlobalLoss, LocalLoss
from forwardgrad.rewrite import Hooks, Program

X = jax.random.normal(jax.random.key(0), (6, 4))
KEYS = jax.random.split(jax.random.key(1), 600)
WEIGHTS = {
    "first": 0.6 * jax.random.normal(jax.random.key(2), (4, 5)),
    "bias": 0.1 * jnp.arange(5.0),
    "last": 0.6 * jax.random.normal(jax.random.key(3), (5, 2)),
}


def by_example(out):
    return fg.Losses([jnp.mean(out**2, axis=1)], [("example",)])


def two_layers(w, nonlinearity=jnp.tanh):
    return by_example(nonlinearity(X @ w["first"] + w["bias"]) @ w["last"])


def flat(tree, batch=()):
    return np.concatenate([np.reshape(a, (*batch, -1)) for a in jax.tree.leaves(tree)], axis=-1)


def exact(fun, params):
    return jax.jit(fg.value_and_grad(fun, fg.Backpropagation()))(params)[1]


def samples(fun, params, estimator, keys=KEYS):
    gradient = fg.value_and_grad(fun, estimator)
    grads = jax.jit(jax.vmap(lambda k: gradient(params, key=k)[1]))(keys)
    return flat(grads, (len(keys),)).astype(float)


def assert_unbiased(fun, params, estimator, keys=KEYS, expected=None):
    """The mean over keys is the gradient, within five standard errors of every entry."""
    drawn = samples(fun, params, estimator, keys)
    expected = flat(exact(fun, params)) if expected is None else expected
    error = drawn.std(0) / np.sqrt(len(keys))
    scale = np.abs(expected).max()
    assert np.all(np.abs(drawn.mean(0) - expected) <= 5 * error + 1e-5 * scale)
    random = error > 1e-5 * scale
    if random.sum() > 50:
        z = (drawn.mean(0) - expected)[random] / error[random]
        assert np.sqrt(np.mean(z**2)) < 1.5
    return random


NETWORKS = {
    "mixer": LocalMixer((4, 4, 1), Size(8, 2, 2, 2), 3, key=jax.random.key(0)),
    "mlp": build(
        "mlp",
        **{"image_shape": (4, 4, 1), "classes": 3, "key": jax.random.key(0)},
        **{"width": 8, "heads": True},
    ),
}
OBJECTIVES = {
    "global": GlobalLoss(),
    "local": LocalLoss(greedy=False),
    "greedy": LocalLoss(),
    "greedy, not by patch or group": LocalLoss(patchwise=False, groupwise=False),
    "greedy, not by block": LocalLoss(blockwise=False),
}
ESTIMATORS = {
    "activity": fg.ActivityPerturbation(),
    "activity, four normal tangents": fg.ActivityPerturbation(tangents=4, distribution="normal"),
    "activity, sphere": fg.ActivityPerturbation(distribution="sphere"),
    "weight": fg.WeightPerturbation(),
    "weight, last layers exact": fg.WeightPerturbation(exact_last=True, tangents=2),
}


@functools.cache
def on_network(network, objective):
    """The losses of some images as a function of parameters, those, and the exact gradient."""
    params, static = eqx.partition(NETWORKS[network], eqx.is_inexact_array)
    images = jax.random.normal(jax.random.key(1), (5, 4, 4, 1))
    labels = jnp.array([0, 1, 2, 0, 1])

    def fun(params):
        return OBJECTIVES[objective](eqx.combine(params, static), images, labels)[0]

    return fun, params, flat(exact(fun, params))


def pairwise(*choices):
    """Every second row of the product: every two names of different choices meet."""
    rows = itertools.product(*(enumerate(choice) for choice in choices))
    return [[name for _, name in row] for row in rows if sum(i for i, _ in row) % 2 == 0]


@pytest.mark.parametrize(
    ("network", "objective", "estimator"), pairwise(NETWORKS, OBJECTIVES, ESTIMATORS)
)
def test_unbiased_on_networks(network, objective, estimator):
    fun, params, expected = on_network(network, objective)
    random = assert_unbiased(fun, params, ESTIMATORS[estimator], expected=expected)
    # The last layers are exact, for all but plain weight perturbation.
    if estimator != "weight":
        *_, last = jax.tree.leaves(params)
        assert not np.any(random[-last.size :])


CONTRASTIVE = {
    "global": GlobalLoss(Contrastive()),
    "local": LocalLoss(Contrastive(), greedy=False),
    "greedy": LocalLoss(Contrastive()),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "objective", "estimator"),
    pairwise(["mixer", "mlp"], CONTRASTIVE, ["activity", "weight, last layers exact"]),
)
def test_unbiased_where_a_loss_compares_examples(name, objective, estimator):
    """Each example's loss has its own share of the change, and negatives have theirs."""
    made = {"image_shape": (4, 4, 1), "classes": 3, "key": jax.random.key(0), "projection": 4}
    networks = {
        "mixer": lambda: LocalMixer((4, 4, 1), Size(8, 2, 2, 2), 3, key=made["key"], projection=4),
        "mlp": lambda: build("mlp", **made, width=16, depth=1, heads=True),
    }
    params, static = eqx.partition(networks[name](), eqx.is_inexact_array)
    images = jax.random.normal(jax.random.key(1), (6, 4, 4, 1))

    def fun(params):
        labels = jnp.array([0, 1, 2, 0, 1, 2])
        return CONTRASTIVE[objective](eqx.combine(params, static), images, labels)[0]

    # The entries of a single layer's gradient are correlated: it takes more samples to tell.
    keys = jax.random.split(KEYS[0], 3000) if name == "mlp" else KEYS
    random = assert_unbiased(fun, params, ESTIMATORS[estimator], keys)
    assert random.any()
    # The readout is a last layer, and exact.
    *_, readout = jax.tree.leaves(params)
    assert not np.any(random[-readout.size :])


def test_examples_that_a_loss_compares_are_perturbed_apart():
    """A loss for each example has less noise than their sum, though each depends on all."""
    network = LocalMixer((4, 4, 1), Size(8, 2, 2, 2), 3, key=jax.random.key(0), projection=4)
    params, static = eqx.partition(network, eqx.is_inexact_array)
    images = jax.random.normal(jax.random.key(1), (8, 4, 4, 1))

    def fun(params, together):
        losses, _ = CONTRASTIVE["global"](eqx.combine(params, static), images, jnp.zeros(8, int))
        return losses.total() if together else losses

    variances = [
        samples(lambda p, t=t: fun(p, t), params, fg.ActivityPerturbation()).var(0).sum()
        for t in (False, True)
    ]
    assert variances[0] < 0.3 * variances[1]


def stacked(params):
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), X, params["blocks"])
    return by_example(h @ params["last"])


def branching(params):
    h = jnp.tanh(X @ params["first"])
    h = jax.lax.cond(jnp.sum(X) > 100, lambda w, h: h, lambda w, h: jnp.sin(h @ w), params["w"], h)
    return by_example(h @ params["last"])


def convolutional(params):
    spec = ("NHWC", "HWIO", "NHWC")
    x = X.reshape(6, 2, 2, 1)
    h = jax.lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=spec)
    return by_example(jax.nn.relu(h).reshape(6, -1) @ params["last"])


def looked_up(params):
    tokens = jnp.array([[0, 1], [2, 0], [1, 1], [2, 2], [0, 0], [1, 2]])
    return by_example(jnp.tanh(jnp.mean(params["table"][tokens], axis=1)) @ params["last"])


def summed(params):
    return two_layers(params).total()


def weights_of(**shapes):
    keys = jax.random.split(jax.random.key(4), len(shapes))
    return {
        name: 0.5 * jax.random.normal(k, s)
        for k, (name, s) in zip(keys, shapes.items(), strict=True)
    }


PROGRAMS = {
    "two layers": (two_layers, WEIGHTS),
    "a plain scalar": (summed, WEIGHTS),
    "scan": (stacked, weights_of(blocks=(3, 4, 4), last=(4, 2))),
    "cond": (branching, weights_of(first=(4, 4), w=(4, 4), last=(4, 2))),
    "convolution": (convolutional, weights_of(kernel=(2, 2, 1, 3), last=(12, 2))),
    "embedding": (looked_up, weights_of(table=(3, 4), last=(4, 2))),
    "remat": (jax.checkpoint(two_layers), WEIGHTS),
    "jit": (jax.jit(two_layers), WEIGHTS),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_unbiased_on_programs(program):
    fun, params = PROGRAMS[program]
    assert_unbiased(fun, params, fg.ActivityPerturbation())


def equinox_model():
    model = eqx.nn.MLP(4, 2, 8, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda p: jax.vmap(eqx.combine(p, static))(X)


def nnx_model():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=rngs),
        nnx.LayerNorm(8, rngs=rngs),
        nnx.relu,
        nnx.Linear(8, 2, rngs=rngs),
    )
    graph, params = nnx.split(model, nnx.Param)
    return params, lambda p: nnx.merge(graph, p)(X)


@pytest.mark.parametrize("make", [equinox_model, nnx_model])
def test_unmodified_models(make):
    """The axis of the examples is found by itself: the variance is lower than with one scalar."""
    params, apply = make()
    assert_unbiased(lambda p: by_example(apply(p)), params, fg.ActivityPerturbation())
    one = samples(lambda p: by_example(apply(p)).total(), params, fg.ActivityPerturbation())
    each = samples(lambda p: by_example(apply(p)), params, fg.ActivityPerturbation())
    assert each.var(0).sum() < 0.5 * one.var(0).sum()


def relu_beside_another_use(w):
    both = jax.jit(lambda z: jnp.maximum(z, 0) + z)
    return by_example(both(X @ w["first"]) @ w["last"])


def used_twice_outside(w):
    z = jax.jit(lambda x: x @ w["first"])(X)
    return by_example((jax.nn.relu(z) + z) @ w["last"])


def returned_by_a_program(w):
    z = jax.jit(lambda z: z)(X @ w["first"])
    return by_example((jax.nn.relu(z) + z) @ w["last"])


def one_program_twice(w):
    layer = jax.jit(lambda w, x: jax.nn.relu(x @ w))
    h = layer(w["square"], layer(w["square"], X))
    return by_example((h + layer(w["square"], X)) @ w["last"])


def moved(w):
    z = jnp.einsum("io,bi->ob", w["first"], X).T
    return by_example(jax.nn.relu(z + w["bias"]) @ w["last"])


def moved_and_kept(w):
    z = jnp.einsum("io,bi->ob", w["first"], X)
    return by_example(jax.nn.relu(z.T + w["bias"] + jnp.mean(z)) @ w["last"])


def normalised_by_batch(w):
    z = X @ w["first"]
    h = (z - jnp.mean(z, 0)) / jnp.sqrt(jnp.var(z, 0) + 1) * (1 + w["bias"])
    return by_example(jax.nn.relu(h) @ w["last"])


def in_reverse_too(w):
    z = jnp.tanh(X @ w["first"])
    return by_example((z + jnp.cumsum(z, 0)[::-1]) @ w["last"])


def indexed_losses(w):
    out = jax.nn.log_softmax(jnp.tanh(X @ w["first"]) @ w["last"])
    chosen = jnp.take_along_axis(out, jnp.array([[0], [1], [1], [0], [1], [0]]), axis=1)
    return fg.Losses([-chosen[:, 0]], [("example",)])


WAYS = [
    *(normalised_by_batch, in_reverse_too, indexed_losses),
    *(relu_beside_another_use, used_twice_outside, returned_by_a_program),
    *(one_program_twice, moved, moved_and_kept),
]


@pytest.mark.parametrize("fun", WAYS)
def test_unbiased_where_a_mask_or_a_merger_is_in_doubt(fun):
    weights = {**WEIGHTS, "square": 0.6 * jnp.ones((4, 4)) - jnp.eye(4)}
    if fun is one_program_twice:
        weights["last"] = weights["last"][:4]
    assert_unbiased(fun, weights, fg.ActivityPerturbation(), jax.random.split(KEYS[0], 4000))


def activations(fun, params):
    program = Program(lambda p: (fun(p), None), params)
    hooks = Hooks(activation=lambda a: a.value)
    return program.with_hooks(program.leaves, hooks)[2].activations


def test_product_and_bias_are_one_activation_under_vmap():
    """`vmap` puts a transposition between them."""
    params, apply = equinox_model()
    found = activations(lambda p: by_example(apply(p)), params)
    assert [a.value.shape for a in found] == [(6, 8), (6, 8), (6, 2)]
    assert [a.place(0, "example").parts for a in found] == [((0, 1, 6, None),)] * 3
    assert [a.mask is not None for a in found] == [True, True, False]
    assert [a.last for a in found] == [False, False, True]


def test_one_layer_is_exact():
    def fun(w):
        return by_example(X @ w)

    w = jnp.ones((4, 2))
    _, grad = fg.value_and_grad(fun, fg.ActivityPerturbation())(w, key=KEYS[0])
    np.testing.assert_allclose(grad, exact(fun, w), rtol=1e-6)


def test_variance_falls_with_the_number_of_tangents():
    one, many = (
        samples(two_layers, WEIGHTS, fg.ActivityPerturbation(tangents=k)).var(0).sum()
        for k in (1, 8)
    )
    assert 0.08 < many / one < 0.18


def test_units_that_a_relu_switches_off_are_not_perturbed():
    weights = {**WEIGHTS, "bias": jnp.array([-50.0, 50.0, 0.0, 50.0, -50.0])}
    drawn = samples(lambda w: two_layers(w, jax.nn.relu), weights, fg.ActivityPerturbation())
    first = drawn[:, 5:25].reshape(-1, 4, 5)
    assert not np.any(first[..., [0, 4]])
    assert np.all(first[..., [1, 3]] != 0)


@pytest.mark.parametrize("relu", [lambda z: jnp.maximum(z, 0), jax.nn.relu, jax.nn.relu6])
def test_units_at_the_threshold_have_the_slope_that_jax_gives_them(relu):
    """Half a slope of `maximum` at a tie, as where a layer begins at zero; none of a ReLU."""
    weights = {**WEIGHTS, "first": jnp.zeros((4, 5)), "bias": jnp.array([0, 0, 0, 1.0, -1.0])}
    assert_unbiased(lambda w: two_layers(w, relu), weights, fg.ActivityPerturbation())


@jax.custom_vjp
def one_way(x):
    return jnp.tanh(x)


def refuse(*_):
    raise AssertionError("reverse mode reached a nonlinearity")


one_way.defvjp(lambda x: (jnp.tanh(x), None), refuse)


def test_no_reverse_mode_between_layers():
    def fun(w):
        return two_layers(w, one_way)

    with pytest.raises(AssertionError, match="reverse mode"):
        exact(fun, WEIGHTS)
    _, grads = fg.value_and_grad(fun, fg.ActivityPerturbation())(WEIGHTS, key=KEYS[0])
    _, same = fg.value_and_grad(two_layers, fg.ActivityPerturbation())(WEIGHTS, key=KEYS[0])
    np.testing.assert_allclose(flat(grads), flat(same), rtol=1e-5, atol=1e-7)


def test_a_while_loop_between_layers():
    def halved(h):
        return jax.lax.while_loop(lambda h: jnp.max(h) > 1, lambda h: h / 2, h)

    def fun(w):
        return two_layers(w, halved)

    with pytest.raises(ValueError, match=r"[Rr]everse-mode"):
        exact(fun, WEIGHTS)
    drawn = samples(fun, WEIGHTS, fg.ActivityPerturbation())
    forward = jax.jacfwd(lambda w: fun(w).total())(WEIGHTS)
    error = drawn.std(0) / np.sqrt(len(drawn))
    assert np.all(np.abs(drawn.mean(0) - flat(forward)) <= 5 * error + 1e-5)


def test_groups_have_their_own_changes():
    """Two groups with a loss each, found in the program or said by a mark."""
    w = weights_of(first=(2, 4, 3), last=(2, 3))

    def fun(w, mark):
        z = jnp.einsum("bi,gic->gbc", X, w["first"])
        h = jnp.tanh(mark(z))
        return fg.Losses([jnp.einsum("gbc,gc->gb", h, w["last"]) ** 2], [("group", "example")])

    def marked(w):
        return fun(w, lambda z: fg.activation(z, "group", "example", "unit"))

    def plain(w):
        return fun(w, lambda z: z)

    def summed(w):
        (losses,) = plain(w).terms
        return fg.Losses([jnp.sum(losses, axis=0)], [("example",)])

    for f in (marked, plain):
        assert_unbiased(f, w, fg.ActivityPerturbation())
        variances = [samples(g, w, fg.ActivityPerturbation()).var(0).sum() for g in (f, summed)]
        assert variances[0] < 0.8 * variances[1]


def fails(match):
    return pytest.raises(fg.InputError, match=match)


@pytest.mark.usefixtures("unchecked")
def test_bad_input():
    with fails("tangents must be an integer of at least 1, got 0"):
        fg.ActivityPerturbation(tangents=0)
    with fails("distribution 'gauss' is unknown"):
        fg.ActivityPerturbation(distribution="gauss")
    with fails("key is missing"):
        fg.value_and_grad(two_layers, fg.ActivityPerturbation())(WEIGHTS)
    with fails("must name every axis of every term"):
        fg.Losses([jnp.ones(3)], [()])
    with fails("must be real"):
        fg.value_and_grad(
            lambda w: fg.Losses([jnp.ones(3, int)], [("example",)]), fg.ActivityPerturbation()
        )(WEIGHTS, key=KEYS[0])


def test_a_parameter_in_a_while_loop():
    def fun(w):
        return jnp.sum(jax.lax.while_loop(lambda h: jnp.sum(h) < 9, lambda h: h + w, jnp.ones(3)))

    with fails("a parameter enters a while_loop"):
        fg.value_and_grad(fun, fg.ActivityPerturbation())(jnp.ones(3), key=KEYS[0])


def test_an_unknown_axis_of_examples():
    w = weights_of(first=(4, 5), last=(6, 6))

    def fun(w):
        shuffled = jnp.tanh(X @ w["first"])[jnp.array([3, 1, 0, 2, 5, 4])]
        return by_example(shuffled @ jnp.ones((5, 6)) @ w["last"])

    with fails(
        r"it is unclear which axis of an activation of shape \(6, 5\) is that of the examples, at "
        r".*test_activity_perturbation.py:\d+.*; mark it there with forwardgrad.activation"
    ):
        fg.value_and_grad(fun, fg.ActivityPerturbation())(w, key=KEYS[0])


def marked_as(*names, width=None):
    """Losses whose hidden activations, one for each example and unit, are marked."""

    def fun(w):
        hidden = fg.activation((X @ w["first"])[:, :width], *names)
        return by_example(jnp.tanh(hidden) @ w["last"][:width])

    return fun


def test_a_mark_that_contradicts_the_program():
    """Here axis 1 is as long as the examples' axis, so that no size gives the mistake away."""
    w = weights_of(first=(4, len(X)), last=(len(X), 2))
    step = lambda fun: fg.value_and_grad(fun, fg.ActivityPerturbation())(w, key=KEYS[0])  # noqa: E731
    with fails("'example' that is another one.*'unit', 'example'.*'example' is axis 0"):
        step(marked_as("unit", "example"))
    with fails("must be as long"):
        step(marked_as("example", "example"))
    step(marked_as("example", "unit"))
    step(marked_as("another", "unit"))

    def one_by_one(w):
        losses = jax.lax.map(lambda x: jnp.sum(fg.activation(x @ w["first"], "example") ** 2), X)
        return fg.Losses([losses], [("example",)])

    with fails("'example' is a loop"):
        step(lambda w: fg.Losses(one_by_one({"first": jnp.tanh(w["first"])}).terms, [("example",)]))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("names", [("example",), ("example", None), ("example", ["unit"]), (0, 1)])
def test_marks_that_are_no_names(names):
    w = weights_of(first=(4, 5), last=(5, 2))
    with fails("activation must name every axis by a string"):
        fg.value_and_grad(marked_as(*names), fg.Backpropagation())(w)
