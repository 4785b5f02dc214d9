"""Tangents as long as each layer needs them: unbiased for any length, and measured right."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad.estimators._balanced_layers import Layer, balanced
from forwardgrad.estimators._balanced_tangents import Rule, _scales
from test_tokens import STREAM, errors_of, in_turn, made, residual

X = jax.random.normal(jax.random.key(0), (6, 4))
KEYS = jax.random.split(jax.random.key(1), 800)
NP = fg.NodePerturbation(sigma=1e-3)


def weights(scale=1.0, width=5):
    keys = jax.random.split(jax.random.key(2), 4)
    shapes = {"first": (4, width), "stack": (2, width, width), "second": (width, width)}
    made = zip(keys, {**shapes, "last": (width, 2)}.items(), strict=True)
    found = {name: 0.7 * jax.random.normal(key, shape) for key, (name, shape) in made}
    return {**found, "second": scale * found["second"]}


def losses(w, shifts=(0.0, 0.0)):
    """Two layers by themselves, one of which may be small, and two in a loop."""
    h = jnp.tanh(X @ w["first"] + shifts[0])
    h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h, w["stack"])
    h = jnp.sin(h @ w["second"] + shifts[1])
    return fg.Losses([jnp.mean((h @ w["last"] - 1) ** 2, axis=1)], [("example",)])


def greedy(w):
    """Two blocks that know nothing of each other."""
    h = jnp.tanh(jnp.tanh(X @ w["first"]) @ w["stack"][0])
    first = jnp.mean((h @ w["last"] - 1) ** 2, axis=1)
    h = jnp.tanh(jnp.tanh(jax.lax.stop_gradient(h) @ w["stack"][1]) @ w["second"])
    return fg.Losses([first, jnp.mean((h @ w["last"]) ** 2, axis=1)], [("example",)] * 2)


def with_powers(estimator, fun, params, seed=3):
    """A state with powers over ten orders of magnitude."""
    state = fg.estimation(fun, estimator).init(params)
    powers = 10 ** jax.random.uniform(jax.random.key(seed), state.power.shape, minval=-10.0)
    return eqx.tree_at(lambda s: s.power, state, powers)


FUNCTIONS = {
    "loop": (losses, weights()),
    "greedy": (greedy, weights()),
    "decoder": made("NNX")[:2],
    "Mamba": made("Mamba")[:2],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_bias_whatever_the_lengths_are(name):
    fun, params = FUNCTIONS[name]
    exact = name == "decoder"
    inner = fg.ActivityPerturbation(exact_mixing=exact, exact_direct=exact)
    estimator = fg.BalancedTangents(in_turn(inner, fun, params), every=100)
    state = with_powers(estimator, fun, params)
    step = fg.estimation(fun, estimator).step
    grads = jax.jit(lambda p: step(p, key=KEYS[0], state=state)[1])(params)
    found = errors_of(jax.grad(lambda p: fun(p).total())(params), grads)
    assert max(found.values()) < 1e-3, found


def power_by_derivatives(w):
    """Of the two layers that have a shift: the sum of squares of each loss's derivatives."""
    shift = (jnp.zeros((6, 5)), jnp.zeros((6, 5)))
    jacobian = jax.jacrev(lambda s: losses(w, s).terms[0])(shift)
    return np.array([np.sum(np.square(j)) for j in jacobian])


@pytest.mark.parametrize("inner", [fg.ActivityPerturbation(), NP])
def test_the_power_is_that_of_the_derivatives(inner):
    """Within five standard errors over many tangents."""
    w = weights(0.1)
    estimator = fg.BalancedTangents(inner)
    how = balanced(inner)
    program = how.program(lambda w: (losses(w), None), w, "")
    layers = how.layers(program)
    assert [(a.first, a.powers, a.entries) for a in layers.values()] == [
        (0, 1, 5),
        (1, 2, 5),
        (3, 1, 5),
    ]

    @jax.jit
    @jax.vmap
    def drawn(key):
        places = jnp.array([0, 3])
        return jax.vmap(lambda i: how.power(program, program.leaves, layers, i, key, 1))(places)

    found = drawn(KEYS)
    error = jnp.std(found, axis=0) / len(KEYS) ** 0.5
    expected = power_by_derivatives(w)
    assert np.all(np.abs(jnp.mean(found, axis=0) - expected) < 5 * error)
    first = fg.estimation(losses, estimator).init(w).power
    assert first.shape == (4,)
    assert np.all(np.abs(np.log(first[jnp.array([0, 3])] / expected)) < 1.5)


@pytest.mark.parametrize("inner", [fg.ActivityPerturbation, fg.NodePerturbation])
def test_what_is_exact_has_no_power(inner):
    """Of a residual stream's layers the last one; of the others the part past other layers."""
    every = [inner(exact_direct=exact) for exact in (False, True)]
    plain, direct = [
        fg.estimation(residual, fg.BalancedTangents(e)).init(STREAM).power for e in every
    ]
    assert len(plain) == 5  # words, in, middle, out, scale
    assert len(direct) == 3
    np.testing.assert_allclose(direct[2], plain[2], rtol=1e-2)  # all of it comes through `out`
    assert np.all(direct[:2] < 0.7 * plain[:2])


def test_the_lengths_are_the_formula():
    power = jnp.array([1.0, 1e-6, 0.04, 1e-30])
    terms = frozenset([0])
    layers = {n: Layer(n, entries, terms, ()) for n, entries in enumerate([4.0, 4.0, 9.0, 4.0])}
    expected_squares: dict[Rule, list[float]] = {
        "relative": [2.0, 2e6, 75.0, 2.0],  # the last has no gradient yet
        "absolute": [2.0, 2e3, 15.0, 2.0],
    }
    for rule, expected in expected_squares.items():
        squares = np.square(_scales(power, layers, rule))
        np.testing.assert_allclose(squares / squares[0], np.array(expected) / 2.0, rtol=1e-5)
        np.testing.assert_allclose(np.dot(squares, [4, 4, 9, 4]), 21, rtol=1e-5)


def test_layers_that_hear_each_other_have_a_factor_in_common():
    terms = [{0}, {2}, {1}, {2, 3}, {0, 1}, set()]
    layers = {n: Layer(n, 1.0, frozenset(t), ()) for n, t in enumerate(terms)}
    power = jnp.array([1.0, 1.0, 1e-4, 1e-2, 1e-6, 0.0])
    *squares, apart = np.square(_scales(power, layers, "relative"))
    squares = np.array(squares)
    assert apart == 1
    np.testing.assert_allclose(squares / squares[[0, 1, 0, 1, 0]], 1 / power[:5], rtol=1e-4)
    np.testing.assert_allclose([squares[[0, 2, 4]].mean(), squares[[1, 3]].mean()], 1, rtol=1e-4)


def relative_error(fun, params, estimator):
    """The error of each parameter's gradient by its norm, squared, added up over parameters."""
    init, step = fg.estimation(fun, estimator)
    state = init(params)
    exact = jax.grad(lambda p: fun(p).total())(params)
    drawn = jax.jit(jax.vmap(lambda key: step(params, key=key, state=state)[1]))(KEYS)
    errors = jax.tree.map(lambda g, e: jnp.sum((g - e) ** 2) / jnp.sum(e**2) / len(g), drawn, exact)
    return sum(jax.tree.leaves(errors))


def test_small_gradients_are_not_drowned():
    """Where one layer's gradient is a thousand times smaller."""
    w = weights()
    w = {**w, "second": 1e-3 * w["second"]}
    plain = relative_error(losses, w, fg.ActivityPerturbation())
    for inner in (fg.ActivityPerturbation(), NP):
        assert relative_error(losses, w, fg.BalancedTangents(inner)) < 1e-2 * plain
    absolute = relative_error(losses, w, fg.BalancedTangents(fg.ActivityPerturbation(), "absolute"))
    assert absolute < 0.1 * plain


@pytest.mark.parametrize("every", [1, 3])
def test_layers_are_measured_in_turn(every):
    """In one compiled scan, one layer every few steps, and then from the first one again."""
    w = weights()
    init, step = fg.estimation(
        losses, fg.BalancedTangents(fg.ActivityPerturbation(tangents=2), every=every)
    )

    def update(state, key):
        _, _, after = step(w, key=key, state=state)
        return after, after.power != state.power

    _, measured = jax.lax.scan(update, init(w), KEYS[:30])
    expected = [(i // every) % 4 if i % every == 0 else -1 for i in range(30)]
    np.testing.assert_array_equal(measured, np.array(expected)[:, None] == np.arange(4))


def test_a_measurement_that_is_no_number_is_forgotten():
    w = weights()
    estimator = fg.BalancedTangents(fg.ActivityPerturbation(), every=1)
    init, step = fg.estimation(losses, estimator)
    state = init(w)
    _, _, after = jax.jit(step)(jax.tree.map(lambda a: jnp.nan * a, w), key=KEYS[0], state=state)
    np.testing.assert_array_equal(after.power, state.power)


def test_one_layer_needs_no_balance():
    def fun(w):
        return fg.Losses([jnp.sum((X @ w) ** 2, axis=1)], [("example",)])

    w = jnp.ones((4, 2))
    init, step = fg.estimation(fun, fg.BalancedTangents(fg.ActivityPerturbation()))
    _, grads, _ = step(w, key=KEYS[0], state=init(w))
    np.testing.assert_allclose(grads, jax.grad(lambda w: fun(w).total())(w), rtol=1e-6)


def test_half_precision():
    w = jax.tree.map(lambda a: a.astype(jnp.float16), weights(1e-3))
    init, step = fg.estimation(losses, fg.BalancedTangents(fg.ActivityPerturbation()))
    _, grads, _ = step(w, key=KEYS[0], state=init(w))
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))


def test_states_of_others():
    estimator = fg.BalancedTangents(fg.ActivityPerturbation())
    init, step = fg.estimation(losses, estimator)
    w, state = weights(), init(weights())
    must = "state must be the one that init returned for this function and BalancedTangents"
    other = fg.estimation(losses, fg.BalancedTangents(NP)).init(w)
    deeper = {**w, "stack": jnp.concatenate([w["stack"]] * 2)}
    for params, wrong, more in (
        (w, (), "got a tuple"),
        (w, other, "got that of"),
        (deeper, state, "it has powers of 4 layers, where 6 are needed"),
    ):
        with pytest.raises(fg.InputError, match=must) as found:
            step(params, key=KEYS[0], state=wrong)
        assert more in str(found.value)
    for door in (fg.value_and_grad, fg.filter_value_and_grad, fg.nnx.value_and_grad):
        with pytest.raises(fg.InputError, match="BalancedTangents needs its state"):
            door(losses, estimator)


# Weights

MANY = jax.random.split(jax.random.key(5), 20_000)

WEIGHTS = {
    "rank one": fg.WeightPerturbation(),
    "rank two": fg.WeightPerturbation(rank=2),
    "dense": fg.WeightPerturbation(structure="dense"),
    "three tangents": fg.WeightPerturbation(tangents=3, chunk=2),
    "last layer exact": fg.WeightPerturbation(exact_last=True),
}


def with_exact_powers(estimator, fun, params):
    """A state with the powers as they are; and the layers' sizes and squared norms."""
    state = fg.estimation(fun, estimator).init(params)
    exact = jax.grad(lambda p: fun(p).total())(params)
    leaves = [exact[name] for name in sorted(params)]
    if estimator.estimator.structure == "rank-one":
        leaves = [layer for g in leaves for layer in (g if g.ndim == 3 else [g])]
    if estimator.estimator.exact_last:
        leaves.pop(1)  # of "first", "last", "second", "stack"
    power = jnp.array([jnp.sum(g**2) for g in leaves])
    return eqx.tree_at(lambda s: s.power, state, power), np.array([g.size for g in leaves]), power


def variance(fun, params, estimator, state):
    """The total variance of one estimate, its standard error, and the mean's error in its own."""
    step = fg.estimation(fun, estimator).step
    drawn = jax.jit(jax.vmap(lambda key: step(params, key=key, state=state)[1]))(MANY)
    exact = jax.grad(lambda p: fun(p).total())(params)
    errors = jax.tree.map(lambda g, e: np.reshape(g - e, (len(MANY), -1)), drawn, exact)
    errors = np.concatenate(jax.tree.leaves(errors), axis=1)
    squares, deviation = np.sum(errors**2, axis=1), errors.std(0)
    random = deviation > 1e-6 * deviation.max()  # but for what is exact to rounding
    bias = np.abs(errors.mean(0) / np.maximum(deviation, 1e-30))[random] * len(MANY) ** 0.5
    return squares.mean(), squares.std() / len(MANY) ** 0.5, bias.max()


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_have_no_bias_and_the_variance_of_the_formula(name):
    """Within five standard errors, also for the mean of every entry."""
    inner, w = WEIGHTS[name], weights(1e-2)
    estimator = fg.BalancedTangents(inner, "absolute", every=100)
    state, sizes, power = with_exact_powers(estimator, losses, w)
    found, error, bias = variance(losses, w, estimator, state)
    balanced_out = np.sum(np.sqrt(sizes * power)) ** 2 - np.sum(power)
    plain = (np.sum(sizes) - 1) * np.sum(power)
    assert abs(found - balanced_out / inner.tangents) < 5 * error
    assert balanced_out < 0.6 * plain
    assert bias < 5


@pytest.mark.parametrize("fun", [losses, greedy])
def test_weights_have_no_bias_whatever_the_lengths_are(fun):
    estimator = fg.BalancedTangents(fg.WeightPerturbation(), every=100)
    state = with_powers(estimator, fun, weights(), seed=4)
    assert variance(fun, weights(), estimator, state)[2] < 5


@pytest.mark.parametrize("scale", [1.0, 1e-2])
@pytest.mark.parametrize("fun", [losses, greedy])
def test_balanced_weights_have_no_more_variance(fun, scale):
    """By measured powers, which are off by a fourth or so, a few per cent more at most."""
    w, inner = weights(scale), fg.WeightPerturbation()
    estimator = fg.BalancedTangents(inner, "absolute", every=100)
    state = fg.estimation(fun, estimator).init(w)
    found, error, _ = variance(fun, w, estimator, state)
    plain = jax.jit(jax.vmap(lambda key: fg.value_and_grad(fun, inner)(w, key=key)[1]))(MANY)
    exact = jax.grad(lambda p: fun(p).total())(w)
    squares = sum(
        np.sum(np.reshape(g - e, (len(MANY), -1)) ** 2, axis=1)
        for g, e in zip(jax.tree.leaves(plain), jax.tree.leaves(exact), strict=True)
    )
    assert found < 1.05 * np.mean(squares) + 5 * error
    assert scale == 1 or found < 0.75 * np.mean(squares)


@pytest.mark.parametrize("tangents", [1, 16])
def test_powers_of_weights_are_averages_over_some_thirty_tangents(tangents):
    """Their relative variance is 2 in 32 where each is that of a square of a normal number."""
    w = weights()
    estimator = fg.BalancedTangents(fg.WeightPerturbation(tangents=tangents), every=1)
    state, _, exact = with_exact_powers(estimator, losses, w)
    step = fg.estimation(losses, estimator).step

    def update(state, key):
        _, _, state = step(w, key=key, state=state)
        return state, state.power

    _, powers = jax.lax.scan(update, state, MANY[:4000])
    ratio = np.array(powers[500:]) / exact
    assert np.all(np.abs(ratio.mean(0) - 1) < 0.1)
    assert 0.5 / 32 < np.mean(ratio.var(0)) < 3.5 / 32


def test_orthogonal_tangents_of_weights():
    """A projection of the gradient, where parameters are measured by their scales."""
    w, inner = weights(), fg.WeightPerturbation(tangents=4, structure="dense", orthogonal=True)
    estimator = fg.BalancedTangents(inner, "absolute", every=100)
    state, sizes, _ = with_exact_powers(estimator, losses, w)
    _, grads, _ = fg.estimation(losses, estimator).step(w, key=KEYS[0], state=state)
    how = balanced(inner)
    scales = _scales(
        state.power, how.layers(how.program(lambda w: (losses(w), None), w, "")), "absolute"
    )
    exact = jax.grad(lambda w: losses(w).total())(w)
    found, exact = [
        np.concatenate(
            [np.ravel(s * g) for s, g in zip(scales, jax.tree.leaves(tree), strict=True)]
        )
        for tree in (grads, exact)
    ]
    np.testing.assert_allclose(found @ exact, 4 / np.sum(sizes) * found @ found, rtol=1e-4)


def test_rows_that_are_not_looked_up_get_no_noise():
    words = jnp.array([0, 2, 2])
    w = {"table": jnp.ones((4, 3)), "out": jnp.ones((3, 2))}

    def fun(w):
        return fg.Losses([jnp.sum(jnp.sin(w["table"][words] @ w["out"]), axis=1)], [("example",)])

    estimator = fg.BalancedTangents(fg.WeightPerturbation())
    state = with_powers(estimator, fun, w)
    _, grads, _ = fg.estimation(fun, estimator).step(w, key=KEYS[0], state=state)
    assert np.any(grads["table"] != 0, axis=1).tolist() == [True, False, True, False]


def test_weights_need_no_derivatives_of_single_layers():
    """As without a balance: a loop whose length depends on the data."""

    def fun(w):
        def body(carry):
            i, h = carry
            return i + 1, jnp.tanh(h @ w["second"])

        h = jax.lax.while_loop(lambda c: c[0] < 2, body, (0, X @ w["first"]))[1]
        return jnp.mean((h @ w["last"] - 1) ** 2)

    w = {name: weights()[name] for name in ("first", "second", "last")}
    init, step = fg.estimation(fun, fg.BalancedTangents(fg.WeightPerturbation()))
    _, grads, _ = jax.jit(step)(w, key=KEYS[0], state=init(w))
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


def test_scalars_are_those_of_tangents_that_all_workers_know(unchecked):
    estimator = fg.BalancedTangents(fg.WeightPerturbation())
    for refuses in (
        lambda: fg.directional_derivatives(losses, estimator),
        lambda: fg.WorkerTangents(estimator, "data"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(fg.InputError, match="estimator must be a WeightPerturbation"):
            refuses()


# What it is used with


def test_it_is_explained_as_the_estimator():
    inner = fg.ActivityPerturbation()
    rows = fg.explain(losses, fg.BalancedTangents(inner), weights()).rows
    assert rows == fg.explain(losses, inner, weights()).rows


def test_effects_are_refused():
    def fun(w):
        jax.debug.callback(lambda x: None, w["first"][0, 0])
        return losses(w)

    with pytest.raises(fg.InputError, match="fun must have no effects"):
        fg.estimation(fun, fg.BalancedTangents(fg.ActivityPerturbation())).init(weights())


def test_refusals(unchecked):
    inner = fg.ActivityPerturbation()
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"estimator": fg.Backpropagation()}, "estimator must be an ActivityPerturbation, Node"),
        ({"estimator": inner, "rule": "best"}, "rule 'best' is unknown"),
        ({"estimator": inner, "every": 0}, "every must be an integer of at least 1, got 0"),
    )
    for options, message in cases:
        with pytest.raises(fg.InputError, match=message):
            fg.BalancedTangents(**options)
