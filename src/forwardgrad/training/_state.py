"""What a run is at one moment, and the compiled loop that takes it further."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from forwardgrad._value_and_grad import value_and_grad
from forwardgrad.estimators import AbstractEstimator


class TrainState(eqx.Module):
    """Parameters, optimiser, the number of steps done, and the losses of the current epoch."""

    params: PyTree
    optimiser: PyTree
    step: Int[Array, ""]
    losses: Float[Array, " steps"]
    errors: Int[Array, " steps"]


class Feed(eqx.Module):
    """Examples on the device, and which of them make up each batch."""

    images: UInt8[Array, "examples height width channels"]
    labels: Int[Array, " examples"]
    order: Int[Array, "steps batch"]


Loss = Callable[[PyTree, Array, Array], tuple[Float[Array, ""], dict[str, Array]]]
"""`(params, images uint8, labels) -> (loss, {"errors": count})`."""


def initial_state(
    params: PyTree, optimiser: optax.GradientTransformation, steps_per_epoch: int
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        params=params,
        optimiser=optimiser.init(params),
        step=jnp.zeros((), jnp.int32),
        losses=jnp.zeros(steps_per_epoch),
        errors=jnp.zeros(steps_per_epoch, jnp.int32),
    )


def make_advance(
    loss: Loss,
    estimator: AbstractEstimator,
    optimiser: optax.GradientTransformation,
    key: Key[Array, ""],
) -> Callable[[TrainState, Feed, Any, Any], TrainState]:
    """The compiled loop: `advance(state, feed, start, stop)` does steps `feed.order[start:stop]`.

    One program serves every number of steps, so how an epoch is cut into calls changes nothing.
    """
    gradient = value_and_grad(loss, estimator, has_aux=True)

    def step(state: TrainState, images: Array, labels: Array) -> TrainState:
        (value, aux), grads = gradient(
            state.params, images, labels, key=jax.random.fold_in(key, state.step)
        )
        updates, optimiser_state = optimiser.update(grads, state.optimiser, state.params)
        position = state.step % state.losses.size
        return TrainState(
            params=optax.apply_updates(state.params, updates),
            optimiser=optimiser_state,
            step=state.step + 1,
            losses=state.losses.at[position].set(value),
            errors=state.errors.at[position].set(aux["errors"]),
        )

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state: TrainState, feed: Feed, start: Array, stop: Array) -> TrainState:
        def body(i, state):
            batch = feed.order[i]
            return step(state, feed.images[batch], feed.labels[batch])

        return jax.lax.fori_loop(start, stop, body, state)

    return advance
