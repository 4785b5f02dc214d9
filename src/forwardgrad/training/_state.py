"""What a run is at one moment, and the compiled loop that takes it further."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from forwardgrad._losses import Losses
from forwardgrad._value_and_grad import value_and_grad
from forwardgrad.estimators import AbstractEstimator
from forwardgrad.training._batches import AbstractInputs, Feed
from forwardgrad.training._devices import ONE, Devices


class TrainState(eqx.Module):
    """Parameters, optimiser, the number of steps done, and the losses of the current epoch."""

    params: PyTree
    optimiser: PyTree
    step: Int[Array, ""]
    losses: Float[Array, " steps"]
    errors: Int[Array, " steps"]


Loss = Callable[[PyTree, Array, Array], tuple[Losses, dict[str, Array]]]
"""`(params, examples, labels) -> (losses, {"errors": count})`, as a network gets them."""


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
    inputs: AbstractInputs,
    estimator: AbstractEstimator,
    optimiser: optax.GradientTransformation,
    keys: tuple[Key[Array, ""], Key[Array, ""]],
    *,
    parts: int = 1,
    compiled_loop: bool = True,
    devices: Devices = ONE,
) -> Advance:
    """The loop over steps, compiled as a whole, or step by step.

    Either way, how an epoch is cut into calls changes nothing: the steps are those of one program.

    **Arguments:**

    - `loss`: what is learned.
    - `inputs`: what the network gets to see of a batch.
    - `estimator`, `optimiser`: what becomes of the loss.
    - `keys`: for the inputs and for the estimator.
    - `parts`: into how many a batch is cut, for the memory of one.
    - `compiled_loop`: whether the loop is part of the program.
    - `devices`: where the state is whole, and a batch is cut.
    """
    gradient = value_and_grad(loss, estimator, has_aux=True)

    def of_part(params: PyTree, examples: Array, labels: Array, keys: Sequence[Array]):
        (value, aux), grads = gradient(
            params, *inputs.training(examples, labels, keys[0]), key=keys[1]
        )
        return value, aux["errors"], grads

    of_batch: Callable = of_part
    if parts > 1:
        of_batch = _in_parts(of_part, parts, devices, unroll=not compiled_loop)

    def step(i: Array, state: TrainState, feed: Feed) -> TrainState:
        batch = devices.keep_cut(feed.batch(i))
        own = [jax.random.fold_in(key, state.step) for key in keys]
        value, errors, grads = of_batch(state.params, *batch, own)
        updates, optimiser_state = optimiser.update(grads, state.optimiser, state.params)
        position = state.step % state.losses.size
        after = TrainState(
            params=optax.apply_updates(state.params, updates),
            optimiser=optimiser_state,
            step=state.step + 1,
            losses=state.losses.at[position].set(value),
            errors=state.errors.at[position].set(errors),
        )
        return devices.keep_whole(after)

    return _compiled_loop(step) if compiled_loop else _step_by_step(step)


def _in_parts(of_part: Callable, parts: int, devices: Devices, *, unroll: bool) -> Callable:
    """Loss, errors and gradient of a batch, a mean over examples, from those of its parts."""

    def of_batch(params: PyTree, examples: Array, labels: Array, keys: Sequence[Array]):
        def add(total, part):
            i, examples, labels = part
            own = [jax.random.fold_in(key, i) for key in keys]
            return jax.tree.map(jnp.add, total, of_part(params, examples, labels, own)), None

        cut = [a.reshape(parts, -1, *a.shape[1:]) for a in (examples, labels)]
        cut = devices.keep_cut(cut, axis=1)
        like = jax.eval_shape(of_part, params, *[a[0] for a in cut], keys)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
        (value, errors, grads), _ = jax.lax.scan(
            add, zeros, (jnp.arange(parts), *cut), unroll=unroll
        )
        return value / parts, errors, jax.tree.map(lambda g: g / parts, grads)

    return of_batch


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


def slow_in_loops(function: Callable, *args: Any) -> bool:
    """Whether a compiled loop would make a function, or its gradient, slow.

    XLA's CPU backend has fast convolutions for gradients in a program's outermost computation
    only; in a loop they take fifty times as long.
    """
    if jax.default_backend() != "cpu":
        return False
    return "conv_general_dilated" in str(jax.make_jaxpr(function)(*args))
