"""Node perturbation: activity perturbation with steps of a finite size."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad.networks import build
from forwardgrad.objectives import Contrastive, GlobalLoss, LocalLoss

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (6, 4))


def params(*shapes):
    keys = jax.random.split(jax.random.key(2), len(shapes))
    return [jax.random.normal(k, s) / np.sqrt(s[-2]) for k, s in zip(keys, shapes, strict=True)]


def by_example(h):
    return fg.Losses([jnp.mean(h**2, axis=-1)], [("example",)])


def mlp(w):
    return by_example(jnp.tanh(jnp.tanh(X @ w[0]) @ w[1]) @ w[2])


def relu(w):
    return by_example(jax.nn.relu(jax.nn.relu(X @ w[0]) @ w[1]) @ w[2])


def scanned(w):
    h, _ = jax.lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), jnp.tanh(X @ w[0]), w[1])
    return by_example(h @ w[2])


def softmax(w):
    h = jax.nn.softmax(X @ w[0]) @ w[1]
    logits = jnp.tanh(h) @ w[2]
    return fg.Losses([jax.nn.logsumexp(logits, axis=1) - logits[:, 0]], [("example",)])


def held(w):
    """What `stop_gradient` holds would change the losses at first order."""
    h = X @ w[0]
    h = jnp.tanh(h * jax.lax.stop_gradient(1 + h)) @ w[1]
    return by_example((h - 0.5 * jax.lax.stop_gradient(h)) @ w[2])


def held_in_loop(w):
    def body(h, w):
        return h + jnp.tanh(h @ w) * jax.lax.stop_gradient(h), None

    h, _ = jax.lax.scan(body, X @ w[0], w[1])
    h, _ = jax.lax.scan(lambda h, _: (h * jax.lax.stop_gradient(h), None), h, None, length=2)
    return by_example(jax.lax.cond(h.sum() > 1e9, lambda h: h, _held_in_branch, h) @ w[2])


def _held_in_branch(h):
    return h * jax.lax.stop_gradient(jnp.sin(h))


def rounded(w):
    """A straight-through estimate, by `stop_gradient`."""
    h = X @ w[0]
    h = h + jax.lax.stop_gradient(jnp.round(4 * h) / 4 - h)
    return by_example(jnp.tanh(h @ w[1]) @ w[2])


def greedy(w):
    h = jnp.tanh(X @ w[0])
    first = jnp.mean((h @ w[2]) ** 2, axis=1)
    h = jnp.tanh(jax.lax.stop_gradient(h) @ w[1])
    return fg.Losses([first, jnp.mean((h @ w[2]) ** 2, axis=1)], [("example",)] * 2)


def plain(w):
    return mlp(w).total()


SQUARE = ((4, 5), (5, 5), (5, 3))
STACKED = ((4, 5), (3, 5, 5), (5, 3))
CASES = {
    "mlp": (mlp, SQUARE),
    "relu": (relu, SQUARE),
    "scanned": (scanned, STACKED),
    "softmax": (softmax, SQUARE),
    "held": (held, SQUARE),
    "held in loop": (held_in_loop, STACKED),
    "rounded": (rounded, SQUARE),
    "greedy": (greedy, SQUARE),
    "plain": (plain, SQUARE),
}


@pytest.mark.parametrize("case", CASES)
def test_becomes_activity_perturbation(case):
    """With the same noise, the difference is the derivative as steps get small."""
    fun, shapes = CASES[case]
    with jax.enable_x64(True):
        w = [p.astype(jnp.float64) for p in params(*shapes)]
        node = fg.NodePerturbation(tangents=3, sigma=1e-6, chunk=2)
        activity = fg.ActivityPerturbation(tangents=3)
        (value, got), (_, wanted) = jax.jit(
            lambda w: [fg.value_and_grad(fun, e)(w, key=KEY) for e in (node, activity)]
        )(w)
        losses = fun(w)
        total = losses.total() if isinstance(losses, fg.Losses) else losses
        np.testing.assert_allclose(value, total, rtol=1e-6)
        for a, b in zip(map(np.asarray, got), map(np.asarray, wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_is_the_formula():
    """With the identity as input, the gradient is what the layer's output is credited with."""
    w, h = params((6, 5), (5, 3)), 0.3

    def losses(w, noise=0.0):
        return by_example(jnp.tanh(jnp.eye(6) @ w[0] + noise) @ w[1])

    def change(noise):
        return (losses(w, h * noise).terms[0] - losses(w).terms[0]) / h

    credit = fg.value_and_grad(losses, fg.NodePerturbation(sigma=h))(w, key=KEY)[1][0]
    signs = jnp.sign(credit)  # those of the noise, or all of them turned round
    either = [np.abs(credit - change(s * signs)[:, None] * s * signs).max(1) for s in (1, -1)]
    np.testing.assert_array_less(np.minimum(*either), 1e-5)
    assert np.abs(credit).min() > 1e-3


@pytest.mark.parametrize(
    ("objective", "size"),
    [
        (LocalLoss(), "s/2/2"),
        (GlobalLoss(Contrastive()), "s/1/2"),
        (LocalLoss(Contrastive()), "s/1/2"),
    ],
)
def test_is_right_where_a_loss_splits_up_its_derivative(objective, size):
    """Copies of a loss for patches and groups differ in their derivatives, not in their values."""
    network = build(
        size,
        image_shape=(8, 8, 1),
        classes=3,
        key=KEY,
        heads=objective.needs_heads,
        projection=None if objective.task.uses_labels else 4,
    )
    images = jax.random.normal(jax.random.key(3), (4, 8, 8, 1))
    labels = jnp.arange(4) % 3
    weights, static = eqx.partition(network, eqx.is_inexact_array)

    def fun(w):
        return objective(eqx.combine(w, static), images, labels)[0]

    exact = fg.value_and_grad(fun, fg.Backpropagation())(weights)[1]
    estimate = fg.value_and_grad(fun, fg.NodePerturbation(tangents=8, sigma=0.02))

    def projected(_, key):
        """One estimate's share of the exact gradient, for every array of weights."""
        grads = estimate(weights, key=key)[1]
        return None, jax.tree.map(lambda g, e: jnp.vdot(g, e) / jnp.vdot(e, e), grads, exact)

    keys = jax.random.split(jax.random.key(4), 32)
    shares = jax.jit(lambda keys: jax.lax.scan(projected, None, keys)[1])(keys)
    for share in jax.tree.leaves(shares):
        share = share[jnp.isfinite(share)]  # no loss depends on it where there is no gradient
        if len(share):
            error = jnp.std(share) / np.sqrt(len(share))
            assert abs(jnp.mean(share) - 1) < 4 * error + 1e-2


@functools.partial(jax.jit, static_argnums=0)
def gradient(estimator, w):
    return fg.value_and_grad(mlp, estimator)(w, key=KEY)[1]


def test_chunks_change_nothing():
    w = params(*SQUARE)
    whole = gradient(fg.NodePerturbation(tangents=5), w)
    for chunk in (1, 2, 5, 9):
        for a, b in zip(
            gradient(fg.NodePerturbation(tangents=5, chunk=chunk), w), whole, strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_sigma_must_be_positive(sigma):
    with pytest.raises(fg.InputError, match="sigma must be positive and finite, got"):
        fg.NodePerturbation(sigma=sigma)


def test_refuses_effects():
    def fun(w):
        jax.debug.print("{}", w[0].sum(), ordered=True)
        return mlp(w)

    with pytest.raises(fg.InputError, match="have no effects"):
        fg.value_and_grad(fun, fg.NodePerturbation())(params(*SQUARE), key=KEY)


def test_refuses_what_vmap_refuses():
    def fun(w):
        h = jax.pure_callback(np.tanh, jax.ShapeDtypeStruct((6, 5), jnp.float32), X @ w[0])
        return by_example(h @ w[1] @ w[2])

    with pytest.raises(fg.InputError, match="must be one that vmap takes"):
        fg.value_and_grad(fun, fg.NodePerturbation())(params(*SQUARE), key=KEY)


def test_needs_no_derivative_of_the_losses():
    """A callback that vmap takes has none; its axes are then not known."""

    def fun(w, last=lambda h: h):
        h = fg.activation(X @ w[0], "example", "unit")
        return by_example(last(jnp.tanh(h)) @ w[1])

    def unknown(h):
        shape = jax.ShapeDtypeStruct(h.shape, h.dtype)
        return jax.pure_callback(np.asarray, shape, h, vmap_method="sequential")

    w = params((4, 5), (5, 3))
    with pytest.raises(ValueError, match="JVP"):
        jax.grad(lambda w: fun(w, unknown).total())(w)
    got = fg.value_and_grad(lambda w: fun(w, unknown), fg.NodePerturbation())(w, key=KEY)[1]
    wanted = fg.value_and_grad(fun, fg.NodePerturbation())(w, key=KEY)[1]
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
