"""What a run is at one moment, and the compiled loop that takes it further."""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from forwardgrad._losses import Losses
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


Loss = Callable[[PyTree, Array, Array], tuple[Losses, dict[str, Array]]]
"""`(params, images uint8, labels) -> (losses, {"errors": count})`."""


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


Advance = Callable[[TrainState, Feed, int, int], TrainState]
"""`advance(state, feed, start, stop)` does steps `feed.order[start:stop]`."""


def make_advance(
    loss: Loss,
    estimator: AbstractEstimator,
    optimiser: optax.GradientTransformation,
    key: Key[Array, ""],
    *,
    compiled_loop: bool = True,
) -> Advance:
    """The loop over steps, compiled as a whole, or step by step.

    Either way, how an epoch is cut into calls changes nothing: the steps are those of one program.
    """
    gradient = value_and_grad(loss, estimator, has_aux=True)

    def step(i: Array, state: TrainState, feed: Feed) -> TrainState:
        batch = feed.order[i]
        (value, aux), grads = gradient(
            state.params,
            feed.images[batch],
            feed.labels[batch],
            key=jax.random.fold_in(key, state.step),
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

    return _compiled_loop(step) if compiled_loop else _step_by_step(step)


def _compiled_loop(step: Callable) -> Advance:
    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state: TrainState, feed: Feed, start: Array, stop: Array) -> TrainState:
        return jax.lax.fori_loop(start, stop, lambda i, state: step(i, state, feed), state)

    return advance


def _step_by_step(step: Callable) -> Advance:
    compiled = jax.jit(step, donate_argnums=1)

    def advance(state: TrainState, feed: Feed, start: int, stop: int) -> TrainState:
        if start == stop:
            # A call for no steps is one to compile.
            compiled(start, jax.tree.map(jnp.copy, state), feed)
        for i in range(start, stop):
            state = compiled(i, state, feed)
        return state

    return advance


def slow_in_loops(loss: Loss, params: PyTree, images: Array, labels: Array) -> bool:
    """Whether a compiled loop would make the loss's gradient slow.

    XLA's CPU backend has fast convolutions for gradients in a program's outermost computation
    only; in a loop they take fifty times as long.
    """
    if jax.default_backend() != "cpu":
        return False
    return "conv_general_dilated" in str(jax.make_jaxpr(loss)(params, images, labels))
