"""Flops and temporary memory, as XLA counts them; nothing here is executed."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import forwardgrad as fg
from forwardgrad.networks import LocalMixer, Size
from forwardgrad.objectives import Contrastive, GlobalLoss, LocalLoss

WIDTH = 1024
BATCH = 512


def loss(params, x, y):
    """The scaling MLP: equal layers, ReLU, cross-entropy."""
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["W"] + layer["b"])
    logits = x @ last["W"] + last["b"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))


@functools.cache
def compiled(estimator: fg.AbstractEstimator | None, depth: int, batch: int = BATCH):
    """An SGD step with its parameters donated (without an estimator: the loss), compiled."""

    def step(params, x, y, key):
        if estimator is None:
            return loss(params, x, y)
        value, grads = fg.value_and_grad(loss, estimator)(params, x, y, key=key)
        return value, jax.tree.map(lambda p, g: p - 1e-4 * g, params, grads)

    layer = {
        "W": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32),
        "b": jax.ShapeDtypeStruct((WIDTH,), jnp.float32),
    }
    x = jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32)
    y = jax.ShapeDtypeStruct((batch,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    donated = (0,) if estimator is not None else ()
    return jax.jit(step, donate_argnums=donated).lower([layer] * depth, x, y, key).compile()


def flops(*args) -> float:
    return compiled(*args).cost_analysis()["flops"]


def temp(*args) -> int:
    return compiled(*args).memory_analysis().temp_size_in_bytes


@functools.cache
def mixer_step(name: str, blocks: int, projection: int | None = None):
    """An algorithm's compiled step on a LocalMixer, SGD included."""
    network = LocalMixer(
        (32, 32, 3), Size(256, 8, 16, blocks), 10, key=jax.random.key(0), projection=projection
    )
    params, static = eqx.partition(network, eqx.is_inexact_array)
    images, labels = jnp.zeros((64, 32, 32, 3)), jnp.zeros(64, int)
    objective, estimator = ALGORITHMS[name]
    if projection is not None:
        objective = dataclasses.replace(objective, task=Contrastive())

    def step(params, key):
        def losses(params):
            return objective(eqx.combine(params, static), images, labels)[0]

        value, grads = fg.value_and_grad(losses, estimator)(params, key=key)
        return value, jax.tree.map(lambda p, g: p - 1e-4 * g, params, grads)

    return jax.jit(step, donate_argnums=0).lower(params, jax.random.key(0)).compile()


def mixer_temp(name: str, blocks: int, projection: int | None = None) -> int:
    """Its temporary memory in bytes."""
    return mixer_step(name, blocks, projection).memory_analysis().temp_size_in_bytes


ARRAY = 4 * 256 * 64 * 64
"""Bytes of what a block of `mixer_temp` computes of its batch."""

ALGORITHMS = {
    "bp": (GlobalLoss(), fg.Backpropagation()),
    "dfa": (GlobalLoss(), fg.DirectFeedbackAlignment()),
    "lg-bp": (LocalLoss(), fg.Backpropagation()),
    "lg-fg-w": (LocalLoss(), fg.WeightPerturbation(exact_last=True)),
    "lg-fg-a": (LocalLoss(), fg.ActivityPerturbation()),
    "fg-w, 16 tangents": (GlobalLoss(), fg.WeightPerturbation(tangents=16)),
    "fg-w, 16 at once": (GlobalLoss(), fg.WeightPerturbation(tangents=16, chunk=16)),
}
FG_W, BP = fg.WeightPerturbation(), fg.Backpropagation()


def test_one_tangent_costs_two_forward_passes():
    """Backpropagation costs three."""
    forward = flops(None, 10)
    assert flops(FG_W, 10) < 2.05 * forward
    assert flops(BP, 10) > 2.8 * forward


def test_tangents_share_the_primal():
    """Four tangents: five forward passes' products instead of two, not eight."""
    one = flops(FG_W, 10)
    assert flops(fg.WeightPerturbation(tangents=4), 10) <= 2.5 * one


def test_dense_tangents_share_the_primal():
    one, four = (flops(fg.WeightPerturbation(structure="dense", tangents=k), 3) for k in (1, 4))
    assert four <= (1 + 2 * 4) / 3 * one * 1.05


def test_memory_does_not_grow_with_depth():
    assert temp(FG_W, 15) <= 1.3 * temp(FG_W, 5)
    assert temp(BP, 15) > 1.8 * temp(BP, 5)


@pytest.mark.slow
def test_memory_of_a_hundred_layers():
    assert temp(FG_W, 100) <= 1.3 * temp(FG_W, 5)
    assert temp(FG_W, 100) <= 0.1 * temp(BP, 100)


@pytest.mark.parametrize(
    "estimator",
    [
        fg.WeightPerturbation(tangents=4),
        fg.WeightPerturbation(rank=3),
        fg.WeightPerturbation(clip=1.0, distribution="sphere"),
        fg.WeightPerturbation(tangents=4, orthogonal=True),
    ],
    ids=repr,
)
def test_gradient_is_not_materialised(estimator):
    """The outer products go into the update: no temporary of a weight's size."""
    matrix = 4 * WIDTH * WIDTH
    assert temp(estimator, 4, 16) < 0.5 * matrix
    assert temp(fg.WeightPerturbation(structure="dense"), 4, 16) > 2 * matrix


@pytest.mark.slow
def test_direct_feedback_computes_no_derivatives_between_layers():
    """Those that go on from a layer's input are symbols for zero, also in normalisations."""
    dfa, bp = (mixer_step(name, 4).cost_analysis()["flops"] for name in ("dfa", "bp"))
    assert dfa < 0.85 * bp


@pytest.mark.slow
def test_memory_of_contrastive_losses():
    """The batch's scores are small beside its activations."""
    assert mixer_temp("lg-fg-a", 4, 128) <= 12 * ARRAY
    assert mixer_temp("lg-fg-a", 4, 128) <= 1.1 * mixer_temp("lg-fg-a", 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arrays", "blocks"), [("lg-fg-a", 12, 4), ("lg-fg-w", 6, 4), ("lg-bp", 15, 8)]
)
def test_memory_of_greedy_losses_does_not_grow_with_blocks(name, arrays, blocks):
    """Backpropagation needs 27 arrays for four blocks, and 12 for two."""
    assert mixer_temp(name, blocks) <= 1.2 * mixer_temp(name, blocks // 2)
    assert mixer_temp(name, 4) <= arrays * ARRAY
    assert 1.5 * mixer_temp("bp", 2) < mixer_temp("bp", 4) <= 28 * ARRAY


@pytest.mark.slow
def test_memory_of_many_tangents():
    """Of one forward pass for all is kept less than all tangents at once would need."""
    assert mixer_temp("fg-w, 16 tangents", 4) <= 38 * ARRAY
    assert mixer_temp("fg-w, 16 at once", 4) > 70 * ARRAY
