"""Credit by token on models of other libraries, written as their users write them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad.rewrite import Hooks, Program
from test_activity_perturbation import assert_unbiased, flat
from test_axes import check
from token_models import EXAMPLES, MODELS, TOKENS

# Which axes are found


KEPT = {
    "NNX": "[1] out, [1] query, [1] down, [1] up, [1] norm2, norm",
    "NNX, own attention": "[1] project, [1] down, [1] up, [1] gate",
    "Equinox": "",
    "Mamba": "[1] read, [1] skip, [1] out",
    "recurrence": "out",
}
"""What keeps its token: what no attention, convolution or recurrence comes after."""


@functools.cache
def made(name):
    losses, params = MODELS[name]()
    return losses, params, jax.jit(jax.grad(lambda p: losses(p).total()))(params)


def named(path):
    """`blocks`, `[1]`, `out`, `kernel`: the parts of a parameter's path, without libraries' own."""
    text = path.replace(".value", "").replace("'", "").replace("]", "").replace("[", ".")
    return [part for part in text.split(".") if part]


@pytest.mark.parametrize("name", KEPT)
def test_queries_and_mlps_keep_their_token_and_what_is_read_later_mixes(name):
    losses, params, _ = made(name)
    kept = set()
    for row in fg.explain(losses, fg.ActivityPerturbation(), params).rows:
        token = [axis for axis in row.axes if axis.startswith("token")]
        if row.how == "exact":
            continue
        assert token, row
        assert any(axis.startswith("example: axis") for axis in row.axes)
        if token != ["token: mixed"]:
            block, *rest = [p for p in named(row.path) if p not in ("blocks", "attention")]
            kept.add(f"[{block}] {rest[0]}" if block.isdigit() else block)
    assert kept == {k for k in KEPT[name].split(", ") if k}


# Without a bias


def placed(losses, params):
    """Where each activation begins in a vector of all of them, and the loops it is in, by number.

    Also how long that vector is.
    """

    def run(leaves):
        program = Program(lambda p: (losses(p), None), params)
        return program.with_hooks(leaves, Hooks(activation=lambda a: a.value))[2].activations

    found, total = {}, 0
    for a in jax.eval_shape(run, jax.tree.leaves(params)):
        found[a.number] = (total, a.value.shape[: a.stacked])
        total += a.value.size
    return found, total


def in_turn(estimator, losses, params):
    """The estimator with all unit vectors as its tangents, one after another.

    Their mean is the mean over random tangents, but for rounding: that is linear in `E[u u']`,
    which is the identity, and unit vectors add up to the same.
    """
    where, total = placed(losses, params)

    class InTurn(type(estimator)):
        def _tangent(self, key, activation, k, scale=1.0):
            start, loops = where[activation.number]
            iteration = jnp.zeros((), int)
            for i, length in zip(activation.iterations, loops, strict=True):
                iteration = iteration * length + i
            z = activation.value
            own = jnp.arange(z.size) == k - start - iteration * z.size
            u = jnp.where(own, jnp.sqrt(1.0 * total), 0.0).reshape(z.shape)
            return (scale * u).astype(z.dtype)

    fields = {f: getattr(estimator, f) for f in estimator.__dataclass_fields__}
    return InTurn(**{**fields, "tangents": total, "chunk": 100})


def errors(name, estimator, precision="float32"):
    """The error of the mean estimate by parameter, relative to the gradient's largest entry.

    Some gradients are zero, as that of a bias of keys.
    """
    losses, params, exact = made(name)
    with jax.enable_x64(precision == "float64"):
        params = jax.tree.map(lambda p: p.astype(precision), params)
        estimate = fg.value_and_grad(losses, in_turn(estimator, losses, params))
        grads = jax.jit(lambda p: estimate(p, key=jax.random.key(0))[1])(params)
    least = 1e-3 * max(np.abs(e).max() for e in jax.tree.leaves(exact))
    return {
        jax.tree_util.keystr(path): np.abs(np.subtract(g, e)).max() / max(least, np.abs(e).max())
        for (path, e), g in zip(
            jax.tree_util.tree_leaves_with_path(exact), jax.tree.leaves(grads), strict=True
        )
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_mean_of_the_estimates_is_the_gradient(name):
    found = errors(name, fg.ActivityPerturbation())
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("name", ["NNX, own attention", "Equinox", "Mamba"])
def test_the_mean_of_finite_differences_is_near_the_gradient(name):
    found = errors(name, fg.NodePerturbation(step=1e-7), "float64")
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("name", ["NNX", "Equinox", "Mamba"])
def test_random_tangents_have_that_mean(name):
    """Within five standard errors in every entry, and within 1.5 over all entries."""
    losses, params, exact = made(name)
    keys = jax.random.split(jax.random.key(3), 300)
    assert_unbiased(losses, params, fg.ActivityPerturbation(), keys, flat(exact))


@pytest.mark.parametrize("name", MODELS)
def test_claims_about_the_axes_hold(name):
    losses, params, _ = made(name)
    check(losses, params, loops=True)


# Feedback by token


def only_at(losses, token):
    """The losses of one token of the first example."""

    def fun(p):
        (term,) = losses(p).terms
        chosen = jnp.zeros((EXAMPLES, TOKENS)).at[0, token].set(1.0)
        return fg.Losses([term * chosen], [("example", "token")])

    return fun


def test_direct_feedback_sends_an_error_to_its_own_token():
    """The gradient of a hidden layer is then one outer product: what goes in, times the error."""
    losses, params, _ = made("NNX")
    estimate = jax.jit(
        lambda token: fg.value_and_grad(only_at(losses, token), fg.DirectFeedbackAlignment())(
            params
        )[1]
    )
    for token in range(TOKENS):
        block = estimate(token)["blocks"][1]
        for kernel in (block["up"]["kernel"], block["down"]["kernel"]):
            values = jnp.linalg.svd(kernel[...], compute_uv=False)
            assert values[0] > 0
            assert values[1] < 1e-5 * values[0]
