"""Guesses of derivatives: unbiased whatever they are, and less variance where they are right."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from test_activity_perturbation import on_network
from test_balanced_tangents import greedy, losses, weights, with_powers
from test_tokens import LAYERS, STREAM, errors_of, in_turn, made, residual
from token_models import INPUTS, TARGETS

X = jax.random.normal(jax.random.key(0), (6, 4))
KEYS = jax.random.split(jax.random.key(1), 3000)
W = weights()


def linear(w, x=X):
    """Two linear layers and an output, each example with a loss of its own."""
    out = x @ w["first"] @ w["second"] @ w["last"]
    return fg.Losses([jnp.mean((out - jnp.sin(3 * x[:, :2])) ** 2, axis=1)], [("example",)])


def with_relu(w):
    out = jax.nn.relu(X @ w["first"]) @ w["last"]
    return fg.Losses([jnp.mean((out - 1) ** 2, axis=1)], [("example",)])


def two_heads(w):
    """A layer that changes both losses, and one that changes the second."""
    h = jnp.tanh(X @ w["first"])
    first = jnp.mean((h @ w["last"] - 1) ** 2, axis=1)
    h = jnp.sin(h @ w["second"])
    return fg.Losses([first, jnp.mean((h @ w["last"]) ** 2, axis=1)], [("example",)] * 2)


def one_by_one(w):
    """The examples in a loop, and a ReLU."""

    def of_one(x):
        return jnp.mean((jax.nn.relu(x @ w["first"]) @ w["second"] @ w["last"] - 1) ** 2)

    return fg.Losses([jax.lax.map(of_one, X)], [("example",)])


def mixing(p):
    """What the first layer computes goes to all later tokens, linearly."""
    x = jnp.cumsum(p["words"][INPUTS] @ p["in"], axis=1) @ p["out"] @ p["head"]
    return fg.Losses([jnp.mean((x - TARGETS[..., None]) ** 2, axis=2)], [("example", "token")])


FUNCTIONS = {
    "loop": lambda: (losses, W),
    "greedy": lambda: (greedy, W),
    "two heads": lambda: (two_heads, W),
    "one by one": lambda: (one_by_one, W),
    "local losses": lambda: on_network("mixer", "local")[:2],
    "greedy losses": lambda: on_network("mixer", "greedy")[:2],
    "greedy losses of vectors": lambda: on_network("mlp", "greedy")[:2],
    "decoder": lambda: made("NNX")[:2],
    "Mamba": lambda: made("Mamba")[:2],
}


def guided(fun, params, estimator, seed=3):
    """A state with random weights."""
    state = fg.estimation(fun, estimator).init(params)
    leaves, treedef = jax.tree.flatten(state.weights)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(k, a.shape, a.dtype) for k, a in zip(keys, leaves, strict=True)]
    return eqx.tree_at(lambda s: s.weights, state, treedef.unflatten(drawn))


def knowing(fun, params, estimator, weights):
    """A state with these weights, by the activations' numbers."""
    state = fg.estimation(fun, estimator).init(params)
    known = {**state.weights, **{(0, number): weight for number, weight in weights.items()}}
    assert jax.tree.map(jnp.shape, known) == jax.tree.map(jnp.shape, state.weights)
    return eqx.tree_at(lambda s: s.weights, state, known)


def drawn(fun, params, estimator, state, keys=KEYS):
    step = fg.estimation(fun, estimator).step
    return jax.jit(jax.vmap(lambda key: step(params, key=key, state=state)[1]))(keys)


def exact(fun, params):
    return jax.grad(lambda p: fun(p).total())(params)


def squared_error(found, exact):
    return float(jnp.sum((found - exact) ** 2) / len(found))


# No bias


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_bias_whatever_the_guesses_are(name, balanced):
    fun, params = FUNCTIONS[name]()
    both = name == "decoder"
    inner = in_turn(fg.ActivityPerturbation(exact_mixing=both, exact_direct=both), fun, params)
    balance = fg.BalancedTangents(inner, every=100)
    estimator = fg.ControlVariate(balance if balanced else inner)
    state = guided(fun, params, estimator)
    if balanced:
        state = eqx.tree_at(lambda s: s.inner, state, with_powers(balance, fun, params))
    step = fg.estimation(fun, estimator).step
    grads = jax.jit(lambda p: step(p, key=KEYS[0], state=state)[1])(params)
    found = errors_of(exact(fun, params), grads)
    assert max(found.values()) < 1e-3, found


def test_no_bias_by_finite_differences():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: a.astype("float64"), STREAM)
        inner = in_turn(fg.NodePerturbation(sigma=1e-7, exact_direct=True), residual, params)
        estimator = fg.ControlVariate(inner)
        state = guided(residual, params, estimator)
        step = fg.estimation(residual, estimator).step
        grads = jax.jit(lambda p: step(p, key=KEYS[0], state=state)[1])(params)
        found = errors_of(exact(residual, params), grads)
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("distribution", ["rademacher", "normal", "sphere"])
def test_random_tangents_have_that_mean(distribution):
    """Within five standard errors in every entry."""
    estimator = fg.ControlVariate(fg.ActivityPerturbation(distribution=distribution))
    found = drawn(losses, W, estimator, guided(losses, W, estimator))
    for g, e in zip(jax.tree.leaves(found), jax.tree.leaves(exact(losses, W)), strict=True):
        error = np.std(g, axis=0) / len(KEYS) ** 0.5
        assert np.all(np.abs(np.mean(g, axis=0) - e) <= 5 * error + 1e-5 * np.abs(e).max())


def test_steps_with_one_key_have_tangents_of_their_own():
    estimator = fg.ControlVariate(fg.ActivityPerturbation())
    init, step = fg.estimation(losses, estimator)
    state = init(W)
    later = eqx.tree_at(lambda s: s.steps, state, state.steps + 1)
    first, second = (step(W, key=KEYS[0], state=s)[1]["first"] for s in (state, later))
    assert not np.allclose(first, second)


# The variance


RIGHT = {0: (W["second"] @ W["last"]).T, 1: W["last"].T}


@pytest.mark.parametrize(
    ("inner", "close"),
    [
        (fg.ActivityPerturbation(), 1e-5),
        (fg.ActivityPerturbation(tangents=3), 1e-5),
        (fg.ActivityPerturbation(tangents=3, partition=2), 1e-5),
        (fg.NodePerturbation(sigma=1e-3), 3e-3),
        (fg.BalancedTangents(fg.ActivityPerturbation()), 1e-5),
    ],
)
def test_an_estimate_is_exact_where_the_guesses_are(inner, close):
    estimator = fg.ControlVariate(inner)
    state = knowing(linear, W, estimator, RIGHT)
    _, grads, _ = fg.estimation(linear, estimator).step(W, key=KEYS[0], state=state)
    found = errors_of(exact(linear, W), grads)
    assert max(found.values()) < close, found


def test_units_that_a_relu_switches_off_have_no_guess():
    estimator = fg.ControlVariate(fg.ActivityPerturbation())
    state = knowing(with_relu, W, estimator, {0: W["last"].T})
    _, grads, _ = fg.estimation(with_relu, estimator).step(W, key=KEYS[0], state=state)
    found = errors_of(exact(with_relu, W), grads)
    assert max(found.values()) < 1e-5, found


def test_the_direct_part_is_not_guessed_again():
    """What no other layer comes after has no guess, and is the error that others' are made from."""
    estimator = fg.ControlVariate(fg.ActivityPerturbation(exact_direct=True))
    state = knowing(linear, W, estimator, {0: W["second"].T})
    _, grads, _ = fg.estimation(linear, estimator).step(W, key=KEYS[0], state=state)
    found = errors_of(exact(linear, W), grads)
    assert max(found.values()) < 1e-5, found


def test_the_variance_is_that_of_what_is_not_guessed():
    """Of signs: the squares of an example's other entries of `g - b`, times its input's."""
    estimator = fg.ControlVariate(fg.ActivityPerturbation(tangents=2))
    state = guided(linear, W, estimator)
    out = X @ W["first"] @ W["second"] @ W["last"]
    error = jax.grad(lambda out: jnp.sum(jnp.mean((out - jnp.sin(3 * X[:, :2])) ** 2, axis=1)))(out)
    first, second = (error @ (RIGHT[n] - state.weights[0, n]) for n in (0, 1))
    power = jnp.sum(first**2 + second**2, axis=1, keepdims=True)
    expected = (X**2).T @ (power - first**2) / 2
    found = jnp.var(drawn(linear, W, estimator, state)["first"], axis=0)
    np.testing.assert_allclose(jnp.sum(found), jnp.sum(expected), rtol=0.05)
    np.testing.assert_allclose(found, expected, rtol=0.25)


def test_what_mixes_tokens_hears_less_noise():
    """It has no guess here, and less comes from the layer above, whose guess is right."""
    estimator = fg.ControlVariate(fg.ActivityPerturbation())
    params = {name: LAYERS[name] for name in ("words", "in", "out", "head")}
    params["out"] *= 0.1
    state = knowing(mixing, params, estimator, {2: params["head"].T})
    blind = fg.estimation(mixing, estimator).init(params)
    expected = exact(mixing, params)
    right, without = (drawn(mixing, params, estimator, s) for s in (state, blind))
    for name in ("words", "in"):
        better, worse = (squared_error(found[name], expected[name]) for found in (right, without))
        assert better < 0.2 * worse


# Learning


@pytest.mark.parametrize(
    "inner", [fg.ActivityPerturbation(), fg.BalancedTangents(fg.ActivityPerturbation())]
)
def test_guesses_become_right(inner):
    """In one compiled loop over data that are new in every step."""
    estimator = fg.ControlVariate(inner)
    init, step = fg.estimation(linear, estimator)

    def update(state, key):
        x = jax.random.normal(key, (32, 4))
        return step(W, x, key=key, state=state)[2], None

    start = init(W, X)
    state, _ = jax.jit(lambda s: jax.lax.scan(update, s, KEYS[:400]))(start)
    assert int(state.steps) == 400
    for n, right in RIGHT.items():
        assert jnp.linalg.norm(state.weights[0, n] - right) < 0.1 * jnp.linalg.norm(right)
    before, after = (
        squared_error(drawn(linear, W, estimator, s)["first"], exact(linear, W)["first"])
        for s in (start, state)
    )
    assert after < 0.02 * before


def test_the_weights_are_those_of_least_squares():
    """Of decayed squares with weights by the errors, and the ridge that the noise asks for."""
    decay, tangents = 0.8, 2
    estimator = fg.ControlVariate(fg.ActivityPerturbation(tangents=tangents), decay)
    init, step = fg.estimation(linear, estimator)
    state = init(W, X)
    gram, moments = np.zeros((2, 2)), np.zeros((2, 5))
    for i, x in enumerate(jax.random.normal(jax.random.key(5), (4, 3, 4))):
        out = x @ W["first"] @ W["second"] @ W["last"]
        error = np.asarray(out - jnp.sin(3 * x[:, :2]))
        _, grads, state = step(W, x, key=KEYS[i], state=state)
        # Three examples of four inputs: what the product was differentiated with can be found.
        estimate = np.linalg.pinv(x.T) @ grads["first"]
        size = np.sum(error**2, axis=1, keepdims=True)
        weight = 1 / np.sqrt(size + np.mean(size))
        error, estimate = weight * error, weight * estimate
        ridge = 10 / (tangents * 3) * np.sum(error**2) * (1 if i == 0 else 1 - decay)
        gram = decay * gram + error.T @ error + ridge * np.eye(2)
        moments = decay * moments + error.T @ estimate
    np.testing.assert_allclose(state.grams[0, 0], gram, rtol=1e-4)
    np.testing.assert_allclose(state.weights[0, 0], np.linalg.solve(gram, moments), rtol=1e-3)


def test_a_step_that_is_no_number_is_forgotten():
    init, step = fg.estimation(losses, fg.ControlVariate(fg.ActivityPerturbation()))
    _, _, state = step(W, key=KEYS[0], state=init(W))
    broken = jax.tree.map(lambda a: jnp.nan * a, W)
    _, _, after = jax.jit(step)(broken, key=KEYS[0], state=state)
    for a, b in zip(jax.tree.leaves(after.weights), jax.tree.leaves(state.weights), strict=True):
        np.testing.assert_array_equal(a, b)


def test_half_precision():
    w = jax.tree.map(lambda a: a.astype(jnp.bfloat16), W)
    init, step = fg.estimation(losses, fg.ControlVariate(fg.ActivityPerturbation()))
    state = init(w)
    for key in KEYS[:3]:
        _, grads, state = step(w, key=key, state=state)
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(grads))
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves((grads, state.weights)))


# What is refused


def test_states_of_others():
    estimator = fg.ControlVariate(fg.ActivityPerturbation())
    init, step = fg.estimation(losses, estimator)
    state = init(W)
    must = "state must be the one that init returned for this function and ControlVariate"
    other = fg.estimation(losses, fg.ControlVariate(fg.NodePerturbation())).init(W)
    for params, wrong, more in (
        (W, (), "got a tuple"),
        (W, other, "got that of"),
        (weights(width=3), state, "it has weights of shapes"),
    ):
        with pytest.raises(fg.InputError, match=must) as found:
            step(params, key=KEYS[0], state=wrong)
        assert more in str(found.value)
    for door in (fg.value_and_grad, fg.filter_value_and_grad, fg.nnx.value_and_grad):
        with pytest.raises(fg.InputError, match="ControlVariate needs its state"):
            door(losses, estimator)


def test_losses_without_guesses():
    for fun, inner in (
        (lambda w: losses(w).total(), fg.ActivityPerturbation()),
        (with_relu, fg.ActivityPerturbation(exact_direct=True)),
    ):
        with pytest.raises(fg.InputError, match="ControlVariate finds no perturbed activation"):
            fg.estimation(fun, fg.ControlVariate(inner)).init(W)


def test_it_is_explained_as_the_estimator():
    inner = fg.ActivityPerturbation()
    rows = fg.explain(losses, fg.ControlVariate(inner), W).rows
    assert rows == fg.explain(losses, inner, W).rows


def test_refusals(unchecked):
    inner = fg.ActivityPerturbation()
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"estimator": fg.WeightPerturbation()}, "estimator must be an ActivityPerturbation or"),
        (
            {"estimator": fg.BalancedTangents(fg.WeightPerturbation())},
            "estimator must be an ActivityPerturbation or",
        ),
        ({"estimator": inner, "decay": 1.0}, r"decay must be at least 0 and below 1, got 1\.0"),
    )
    for options, message in cases:
        with pytest.raises(fg.InputError, match=message):
            fg.ControlVariate(**options)
