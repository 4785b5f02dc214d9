import jax
import jax.numpy as jnp
import pytest

import forwardgrad as fg
from forwardgrad.estimators import _steering
from forwardgrad.rewrite import shared

W = jax.random.normal(jax.random.key(0), (8, 8))


def bent(x, k):
    """A function of k by a tangent: the primal pass does not depend on it."""
    value, change = jax.jvp(lambda x: jnp.tanh(jnp.tanh(x @ W) @ W), (x,), (k * x,))
    return value, change


def test_what_does_not_depend_on_the_argument_is_computed_once():
    x = jnp.ones((4, 8))
    function = shared(lambda k: bent(x, k), jnp.zeros(()), fixed=False)
    assert function is not None
    call = function.start()
    calls = jax.make_jaxpr(lambda ks: [call(k) for k in ks])(jnp.arange(3.0))
    # Two tangents' products for each call; the two of the primal were computed before.
    assert sum(eqn.primitive.name == "dot_general" for eqn in calls.jaxpr.eqns) == 6
    assert function.largest == x.nbytes
    # The slopes of two layers, each computed from one array or two, by the version of JAX.
    assert function.kept in (2 * x.nbytes, 4 * x.nbytes)
    assert function.depends == (False, True)
    for k in (0.0, 0.5):
        for own, expected in zip(call(jnp.float32(k)), bent(x, k), strict=True):
            assert jnp.allclose(own, expected, atol=1e-6)


@pytest.mark.parametrize("fixed", [False, True])
def test_only_what_is_fixed_has_no_derivative(fixed):
    def total(x):
        function = shared(lambda k: bent(x, k), jnp.zeros(()), fixed=fixed)
        assert function is not None
        value, change = function.start()(jnp.float32(0.5))
        return jnp.sum(value) + jnp.sum(change)

    def expected(x):
        value, change = bent(x, 0.5)
        return jnp.sum(value) + jnp.sum(jax.lax.stop_gradient(change) if fixed else change)

    x = jax.random.normal(jax.random.key(1), (4, 8))
    assert jnp.allclose(jax.grad(total)(x), jax.grad(expected)(x), atol=1e-5)


def test_a_function_with_effects_is_not_shared():
    def noisy(k):
        jax.debug.callback(lambda: None)
        return k

    assert shared(noisy, jnp.zeros(()), fixed=False) is None


def test_what_comes_out_of_a_loop_with_the_argument_in_it_depends_on_it():
    def function(k):
        return jax.jvp(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x * x, x), (2.0,), (k,))

    found = shared(function, jnp.zeros(()), fixed=True)
    assert found is not None
    assert found.depends == (True, True)


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_layers_in_a_loop_keep_their_gradients(chunk):
    """The exact gradient of a last layer, after layers in a `scan`."""
    x = jax.random.normal(jax.random.key(1), (16, 8))

    def losses(params):
        h, _ = jax.lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, params["layers"])
        return fg.Losses([jnp.mean((h @ params["last"]) ** 2, axis=1) / 16], [("example",)])

    params = {"layers": jnp.stack([W, W]), "last": W[:, :3]}
    estimator = fg.ActivityPerturbation(tangents=4, chunk=chunk)
    grads = fg.value_and_grad(losses, estimator)(params, key=jax.random.key(2))[1]
    exact = fg.value_and_grad(losses, fg.Backpropagation())(params)[1]
    assert jnp.allclose(grads["last"], exact["last"], rtol=1e-4)
    assert jnp.any(grads["layers"] != 0)


@pytest.mark.parametrize(
    "estimator", [fg.ActivityPerturbation(tangents=7), fg.WeightPerturbation(tangents=7)]
)
@pytest.mark.parametrize("cache", [1, 1500, 10**6])
def test_a_cache_changes_no_estimate(estimator, cache, monkeypatch):
    x = jax.random.normal(jax.random.key(1), (16, 8))

    def losses(params):
        h = jax.nn.relu(x @ params["first"])
        return fg.Losses([jnp.mean((h @ params["last"]) ** 2, axis=1) / 16], [("example",)])

    params = {"first": W, "last": W[:, :3]}
    step = fg.value_and_grad(losses, estimator)
    monkeypatch.setattr(_steering, "shared", lambda *args, **options: None)
    value, grads = step(params, key=jax.random.key(2))
    monkeypatch.setattr(_steering, "shared", shared)
    monkeypatch.setattr(_steering, "CACHE", cache)
    again, same = step(params, key=jax.random.key(2))
    assert jnp.allclose(value, again)
    for a, b in zip(*map(jax.tree.leaves, (grads, same)), strict=True):
        assert jnp.allclose(a, b, rtol=1e-4, atol=1e-5)
