import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import forwardgrad as fg
from helpers import directional


def train(loss, params, estimator, steps, learning_rate):
    """The losses on the way, with Adam in one `scan`."""
    optimiser = optax.adam(learning_rate)

    @jax.jit
    def run(params):
        def step(carry, key):
            params, state = carry
            value, grads = fg.value_and_grad(loss, estimator)(params, key=key)
            updates, state = optimiser.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(step, (params, optimiser.init(params)), keys)[1]

    return run(params)


def fixed_point(params):
    """An equilibrium layer: rounds until it stands still; how many depends on the weights."""
    x = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)

    def unfinished(carry):
        i, _, change = carry
        return (change > 1e-4) & (i < 100)

    def body(carry):
        i, h, _ = carry
        new = jnp.tanh(0.4 * h @ params["W"] + x @ params["U"] + params["b"])
        return i + 1, new, jnp.max(jnp.abs(new - h))

    rounds, h, _ = jax.lax.while_loop(unfinished, body, (0, jnp.zeros((4, 3)), jnp.inf))
    return jnp.mean((h - 0.5 * x[:, ::-1]) ** 2), rounds


PARAMS = {"W": jnp.eye(3), "U": 0.1 * jnp.ones((3, 3)), "b": jnp.zeros(3)}


def test_while_loop_cannot_be_reversed():
    with pytest.raises(ValueError, match=r"[Rr]everse-mode"):
        jax.grad(lambda p: fixed_point(p)[0])(PARAMS)


@pytest.mark.parametrize(
    "estimator", [fg.WeightPerturbation(), fg.WeightPerturbation(tangents=3)], ids=repr
)
def test_while_loop_is_trained(estimator):
    losses = train(lambda p: fixed_point(p)[0], PARAMS, estimator, 400, 0.01)
    assert jnp.mean(losses[-20:]) < 0.2 * losses[0]


def test_while_loop_rounds_differ():
    """The test above is one of a loop whose length depends on the data."""
    near = jax.tree.map(lambda w: 0.01 * w, PARAMS)
    assert fixed_point(near)[1] != fixed_point(PARAMS)[1]


@pytest.mark.parametrize("tangents", [1, 3])
def test_while_loop_under_vmap(tangents):
    """Every example has its own number of rounds."""

    def root(w, y):
        """Newton's method for w0 z + w1 z^3 = y."""

        def body(carry):
            z, _ = carry
            new = z - (w[0, 0] * z + w[0, 1] * z**3 - y) / (w[0, 0] + 3 * w[0, 1] * z**2)
            return new, jnp.abs(new - z)

        return jax.lax.while_loop(lambda c: c[1] > 1e-6, body, (y, jnp.inf))[0]

    y = jnp.array([0.1, 1.0, 5.0])
    loss = lambda w: jnp.sum(jax.vmap(lambda y: root(w @ jnp.eye(2), y))(y) ** 2)  # noqa: E731
    w = jnp.array([[1.0, 0.5]])
    estimator = fg.WeightPerturbation(tangents=tangents)
    found = directional(loss, w, estimator, jax.random.key(0))
    expected = jax.vmap(lambda v: jax.jvp(loss, (w,), (v,))[1])(found.tangents)
    np.testing.assert_allclose(found.value, loss(w), rtol=1e-6)
    np.testing.assert_allclose(found.derivatives, expected, rtol=1e-4)


@jax.custom_vjp
def softplus(x):
    return jnp.logaddexp(x, 0)


def softplus_fwd(x):
    raise AssertionError("the reverse rule was called")


softplus.defvjp(softplus_fwd, lambda residuals, tangent: (tangent,))


def regression(params):
    """A network whose reverse rule raises: under `jit`, `vmap`, `remat` and `scan` too."""
    x = jnp.linspace(-2, 2, 24).reshape(8, 3)
    h = jax.jit(jax.vmap(lambda x: softplus(params["U"] @ x + params["b"])))(x)
    h = jax.checkpoint(lambda w, h: softplus(h @ w))(params["W"], h)
    h, _ = jax.lax.scan(lambda h, w: (softplus(h @ w), None), h, jnp.stack([params["W"]] * 2))
    return jnp.mean((h - jnp.cos(x)) ** 2)


def test_custom_vjp_cannot_be_differentiated():
    with pytest.raises(AssertionError, match="reverse rule"):
        jax.grad(regression)(PARAMS)
    with pytest.raises((TypeError, AssertionError)):
        jax.jvp(regression, (PARAMS,), (PARAMS,))


@pytest.mark.parametrize(
    "estimator",
    [fg.WeightPerturbation(), fg.WeightPerturbation(structure="dense", tangents=2)],
    ids=repr,
)
def test_custom_vjp_is_trained(estimator):
    losses = train(regression, PARAMS, estimator, 400, 0.01)
    assert jnp.mean(losses[-20:]) < 0.5 * losses[0]
