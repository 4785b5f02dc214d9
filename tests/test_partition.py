"""Tangents that are each in one part of the layers: unbiased, and with less to compute."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from test_balanced_tangents import greedy, losses, weights, with_powers
from test_tokens import STREAM, errors_of, in_turn, made, residual

FUNCTIONS = {
    "loop": (losses, weights()),
    "greedy": (greedy, weights()),
    "stream": (residual, STREAM),
    "decoder": made("NNX")[:2],
    "Mamba": made("Mamba")[:2],
}

DEEP = {"in": (6, 8), "one": (8, 8), "two": (8, 8), "three": (8, 8), "four": (8, 8), "out": (8, 2)}
X = jax.random.normal(jax.random.key(0), (16, 6))


def deep(w):
    h = X
    for name in DEEP:
        h = (jnp.tanh(h) if name != "in" else h) @ w[name]
    return fg.Losses([jnp.mean((h - 1) ** 2, axis=1)], [("example",)])


def deep_weights():
    keys = jax.random.split(jax.random.key(1), len(DEEP))
    shapes = zip(DEEP.items(), keys, strict=True)
    return {name: 0.4 * jax.random.normal(key, shape) for (name, shape), key in shapes}


def worst_error(fun, params, estimator):
    """Of the mean over all unit vectors, relative to the gradient's largest entry."""
    own = in_turn(estimator, fun, params)
    grads = jax.jit(lambda p: fg.value_and_grad(fun, own)(p, key=jax.random.key(0))[1])(params)
    return max(errors_of(jax.grad(lambda p: fun(p).total())(params), grads).values())


OPTIONS = {
    "loop": {"partition": 3},
    "greedy": {"partition": 2},
    "stream": {"partition": 3, "exact_direct": True},
    "decoder": {"partition": 2, "exact_mixing": True, "exact_direct": True},
    "Mamba": {"partition": 2},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_mean_of_the_estimates_is_the_gradient(name):
    estimator = fg.ActivityPerturbation(**OPTIONS[name])
    assert worst_error(*FUNCTIONS[name], estimator) < 1e-3


@pytest.mark.parametrize("name", ["greedy", "stream"])
def test_the_mean_of_the_differences_is_near_the_gradient(name):
    estimator = fg.NodePerturbation(sigma=3e-4, **OPTIONS[name])
    assert worst_error(*FUNCTIONS[name], estimator) < 2e-2


def test_balanced_tangents_in_parts_have_no_bias():
    inner = in_turn(fg.ActivityPerturbation(partition=2), greedy, weights())
    estimator = fg.BalancedTangents(inner, every=100)
    state = with_powers(estimator, greedy, weights())
    step = fg.estimation(greedy, estimator).step
    grads = jax.jit(lambda w: step(w, key=jax.random.key(0), state=state)[1])(weights())
    found = errors_of(jax.grad(lambda w: greedy(w).total())(weights()), grads)
    assert max(found.values()) < 1e-3


@pytest.mark.parametrize("tangents", [5, 8])
def test_each_layer_has_its_share_of_the_tangents(tangents):
    """Five layers in four parts, with five tangents or eight: within five standard errors."""
    w = deep_weights()
    estimator = fg.ActivityPerturbation(tangents=tangents, partition=4)
    keys = jax.random.split(jax.random.key(2), 4000)
    drawn = jax.jit(jax.vmap(lambda key: fg.value_and_grad(deep, estimator)(w, key=key)[1]))(keys)
    exact = jax.grad(lambda w: deep(w).total())(w)
    for name in DEEP:
        error = np.std(drawn[name], axis=0) / len(keys) ** 0.5
        off = np.abs(np.mean(drawn[name], axis=0) - exact[name])
        assert np.all(off < 5 * error + 1e-5 * np.abs(exact[name]).max()), name


def cost(fun, params, estimator):
    step = fg.value_and_grad(fun, estimator)
    compiled = jax.jit(lambda p, key: step(p, key=key)).lower(params, jax.random.key(0)).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


def test_less_is_pushed_through():
    """Nothing before the first perturbed layer: of five layers in five parts a half."""
    w = {name: jnp.tile(a, (8, 8)) for name, a in deep_weights().items()}
    x = jnp.tile(X, (4, 8))

    def fun(w):
        h = x
        for name in DEEP:
            h = (jnp.tanh(h) if name != "in" else h) @ w[name]
        return fg.Losses([jnp.mean((h - 1) ** 2, axis=1)], [("example",)])

    whole = fg.ActivityPerturbation(tangents=20, chunk=20)
    flops, _ = cost(fun, w, whole)
    fewer, _ = cost(fun, w, dataclasses.replace(whole, partition=5))
    none, _ = cost(fun, w, dataclasses.replace(whole, tangents=1))
    # Products after a layer: 5 for each tangent, or 3 on average.
    assert (fewer - none) / (flops - none) < 0.65


@pytest.mark.parametrize("kind", [fg.ActivityPerturbation, fg.NodePerturbation])
def test_more_parts_than_layers_or_tangents(kind):
    """Then there are as many as there can be."""
    w = deep_weights()
    for tangents, parts, same in ((2, 9, 2), (9, 9, 5)):
        grads = [
            fg.value_and_grad(deep, kind(tangents=tangents, partition=n))(w, key=jax.random.key(3))[
                1
            ]
            for n in (parts, same)
        ]
        for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
            np.testing.assert_array_equal(a, b)


def test_refusals():
    with pytest.raises(fg.InputError, match="partition must be an integer of at least 1, got 0"):
        fg.ActivityPerturbation(partition=0)
