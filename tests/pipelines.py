"""Pipelines to be compared with a plain loop, and scenarios that need eight devices.

`python pipelines.py NAME ...` runs scenarios in a process of its own.
"""

import sys
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import forwardgrad as fg
from forwardgrad.networks import LocalMixer, Size
from forwardgrad.objectives import LocalLoss

ESTIMATORS = {
    "backpropagation": fg.Backpropagation(),
    "weight perturbation": fg.WeightPerturbation(tangents=2),
    "activity perturbation": fg.ActivityPerturbation(),
    "feedback alignment": fg.FeedbackAlignment(),
}
BLOCKS = 4


class Block(eqx.Module):
    """A block of a user's own, whose activation is no array."""

    linear: eqx.nn.Linear
    activation: Callable = jnp.tanh

    def __call__(self, x):
        return self.activation(jax.vmap(self.linear)(x))


class Head(eqx.Module):
    linear: eqx.nn.Linear

    def __call__(self, x):
        return jax.vmap(self.linear)(x)


def loss(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y) / len(y)


def own_stack(count, blocks=BLOCKS):
    """Stages, their parameters and micro-batches of a user's own blocks."""
    keys = jax.random.split(jax.random.key(0), 2 * blocks + 1)
    own = [Block(eqx.nn.Linear(12, 12, key=key)) for key in keys[:blocks]]
    heads = [Head(eqx.nn.Linear(12, 3, key=key)) for key in keys[blocks:-1]]
    x = jax.random.normal(keys[-1], (6, 16, 12))
    y = jnp.argmax(x[..., :3], axis=-1)
    return *fg.greedy_stages(own, heads, loss, count), list(zip(x, y, strict=True))


def local_mixer(count, blocks=BLOCKS):
    """The same of a LocalMixer and its local losses."""
    network = LocalMixer((8, 8, 1), Size(16, 2, 4, blocks), 3, key=jax.random.key(1))
    images = jax.random.normal(jax.random.key(2), (6, 8, 8, 8, 1))
    labels = jnp.argmax(images[..., 0, :3, 0], axis=-1)
    return *LocalLoss().stages(network, count), list(zip(images, labels, strict=True))


PROBLEMS = {"own stack": own_stack, "LocalMixer": local_mixer}
OPTIMISER = optax.adam(1e-2)


def keys_of(batches):
    return jax.random.split(jax.random.key(3), len(batches))


def in_a_pipeline(estimator, stages, params, batches, devices):
    """Values and parameters after all micro-batches."""
    pipeline = fg.BlockPipeline(stages, estimator, OPTIMISER, devices)
    state, values = pipeline.init(params, *batches[0]), []
    for batch, key in zip(batches, keys_of(batches), strict=True):
        value, output, state = pipeline.step(state, *batch, key=key)
        values.append(value)
    for tree, device in zip(state.params, devices, strict=True):
        leaves = filter(eqx.is_array, jax.tree.leaves(tree))
        assert all(leaf.devices() == {device} for leaf in leaves)
    return values, output, state.params


def one_after_another(estimator, stages, params, batches):
    """The same by a plain loop on one device."""

    @eqx.filter_jit
    def one(stage, model, memory, key, number, x, *targets):
        arrays, static = eqx.partition(model, eqx.is_inexact_array)

        def fun(arrays, x, *targets):
            return stage(eqx.combine(arrays, static), x, *targets)

        gradient = fg.value_and_grad(fun, estimator, has_aux=True)
        key = jax.random.fold_in(key, number)
        (value, x), grads = gradient(arrays, x, *targets, key=key)
        updates, memory = OPTIMISER.update(grads, memory, arrays)
        return eqx.apply_updates(model, updates), memory, value, x

    models = list(params)
    memories = [OPTIMISER.init(eqx.filter(model, eqx.is_inexact_array)) for model in models]
    every = []
    for (x, *targets), key in zip(batches, keys_of(batches), strict=True):
        values = []
        for i, stage in enumerate(stages):
            models[i], memories[i], value, x = one(
                stage, models[i], memories[i], key, np.int32(i), x, *targets
            )
            values.append(value)
        every.append(tuple(values))
    return every, x, tuple(models)


def assert_equal(found, right, tolerance=0.0):
    """Arrays of two trees, to the bit or to rounding."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True)
    for a, b in pairs:
        if eqx.is_array(a):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def on_devices():
    """Four stages on four devices, on two, and on one, and the plain loop, bit for bit."""
    for make in PROBLEMS.values():
        stages, params, batches = make(BLOCKS)
        for estimator in ESTIMATORS.values():
            right = one_after_another(estimator, stages, params, batches)
            some = jax.devices()
            for devices in (some[:4], [some[5], some[2], some[5], some[2]], some[:1] * 4):
                assert_equal(in_a_pipeline(estimator, stages, params, batches, devices), right)


def eight_stages():
    """As many stages as devices, which are found without being named."""
    stages, params, batches = local_mixer(8, blocks=8)
    estimator = fg.ActivityPerturbation()
    pipeline = fg.BlockPipeline(stages, estimator, OPTIMISER)
    assert list(pipeline.devices) == jax.devices()
    found = in_a_pipeline(estimator, stages, params, batches, jax.devices())
    assert_equal(found, one_after_another(estimator, stages, params, batches))


def moved():
    """A state goes on from the host's memory, or on other devices."""
    stages, params, batches = own_stack(2)
    estimator, devices = fg.FeedbackAlignment(), jax.devices()
    right = in_a_pipeline(estimator, stages, params, batches, devices[:2])
    for place in (lambda a: np.array(a), lambda a: jnp.array(a)):
        first = fg.BlockPipeline(stages, estimator, OPTIMISER, devices[2:4])
        state = first.init(params, *batches[0])
        for batch in batches[:3]:
            *_, state = first.step(state, *batch)
        state = jax.tree.map(lambda a, place=place: place(a) if eqx.is_array(a) else a, state)
        other = fg.BlockPipeline(stages, estimator, OPTIMISER, devices[4:6])
        for batch in batches[3:]:
            *_, state = other.step(state, *batch)
        assert_equal(state.params, right[-1])


SCENARIOS = {f.__name__: f for f in (on_devices, eight_stages, moved)}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, file=sys.stderr)
        SCENARIOS[name]()
