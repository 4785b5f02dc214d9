"""What a run is at one moment, and the compiled loop that takes it further."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from forwardgrad._estimation import estimation
from forwardgrad._losses import Losses
from forwardgrad.estimators import AbstractEstimator, AbstractStatefulEstimator
from forwardgrad.training._batches import AbstractInputs, Feed
from forwardgrad.training._devices import ONE, Devices


class TrainState(eqx.Module):
    """Parameters, optimiser, estimator, the number of steps done, the losses of the current epoch.

    Of the optimiser and the estimator, it is what they remember; `()` where that is nothing.
    """

    params: PyTree
    optimiser: PyTree
    estimator: PyTree
    step: Int[Array, ""]
    losses: Float[Array, " steps"]
    errors: Int[Array, " steps"]


Loss = Callable[[PyTree, Array, Array], tuple[Losses, dict[str, Array]]]
"""`(params, examples, labels) -> (losses, {"errors": count})`, as a network gets them."""


def initial_state(
    params: PyTree,
    optimiser: optax.GradientTransformation,
    steps_per_epoch: int,
    estimator: PyTree = (),
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        params=params,
        optimiser=optimiser.init(params),
        estimator=estimator,
        step=jnp.zeros((), jnp.int32),
        losses=jnp.zeros(steps_per_epoch),
        errors=jnp.zeros(steps_per_epoch, jnp.int32),
    )


Begin = Callable[[TrainState, Feed, int], TrainState]
"""`begin(state, feed, start)` has the estimator see the batch of the next step."""

Advance = Callable[[TrainState, Feed, int, int], TrainState]
"""`advance(state, feed, start, stop)` does steps `feed.order[start:stop]`."""


def make_begin(
    loss: Loss,
    inputs: AbstractInputs,
    estimator: AbstractEstimator,
    keys: tuple[Key[Array, ""], Key[Array, ""]],
    *,
    parts: int = 1,
    devices: Devices = ONE,
) -> Begin:
    """What the estimator remembers before its first step, which is of the first part of a batch.

    **Arguments:**

    - as for `make_advance`.
    """
    if not isinstance(estimator, AbstractStatefulEstimator):
        return lambda state, feed, start: state
    init = estimation(loss, estimator, has_aux=True).init

    @jax.jit
    def seen(state: TrainState, feed: Feed, start: Array) -> PyTree:
        key = jax.random.fold_in(keys[0], state.step)
        batch = feed.batch(start)
        if parts > 1:
            key = jax.random.fold_in(key, 0)
            batch = [a[: len(a) // parts] for a in batch]
        examples, labels = devices.keep_cut(batch)
        return devices.keep_whole(init(state.params, *inputs.training(examples, labels, key)))

    return lambda state, feed, start: dataclasses.replace(state, estimator=seen(state, feed, start))


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
    gradient = estimation(loss, estimator, has_aux=True).step

    def of_part(
        params: PyTree, remembered: PyTree, examples: Array, labels: Array, keys: Sequence[Array]
    ):
        (value, aux), grads, remembered = gradient(
            params,
            *inputs.training(examples, labels, keys[0]),
            key=keys[1],
            state=remembered,
        )
        return (value, aux["errors"], grads), remembered

    of_batch: Callable = of_part
    if parts > 1:
        of_batch = _in_parts(of_part, parts, devices, unroll=not compiled_loop)

    def step(i: Array, state: TrainState, feed: Feed) -> TrainState:
        batch = devices.keep_cut(feed.batch(i))
        own = [jax.random.fold_in(key, state.step) for key in keys]
        (value, errors, grads), remembered = of_batch(state.params, state.estimator, *batch, own)
        updates, optimiser_state = optimiser.update(grads, state.optimiser, state.params)
        position = state.step % state.losses.size
        after = TrainState(
            params=optax.apply_updates(state.params, updates),
            optimiser=optimiser_state,
            estimator=remembered,
            step=state.step + 1,
            losses=state.losses.at[position].set(value),
            errors=state.errors.at[position].set(errors),
        )
        return devices.keep_whole(after)

    return _compiled_loop(step) if compiled_loop else _step_by_step(step)


def _in_parts(of_part: Callable, parts: int, devices: Devices, *, unroll: bool) -> Callable:
    """Loss, errors and gradient of a batch, a mean over examples, from those of its parts."""

    def of_batch(
        params: PyTree, remembered: PyTree, examples: Array, labels: Array, keys: Sequence[Array]
    ):
        def add(carry, part):
            total, remembered = carry
            i, examples, labels = part
            own = [jax.random.fold_in(key, i) for key in keys]
            found, remembered = of_part(params, remembered, examples, labels, own)
            return (jax.tree.map(jnp.add, total, found), remembered), None

        cut = [a.reshape(parts, -1, *a.shape[1:]) for a in (examples, labels)]
        cut = devices.keep_cut(cut, axis=1)
        like, _ = jax.eval_shape(of_part, params, remembered, *[a[0] for a in cut], keys)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
        ((value, errors, grads), remembered), _ = jax.lax.scan(
            add, (zeros, remembered), (jnp.arange(parts), *cut), unroll=unroll
        )
        return (value / parts, errors, jax.tree.map(lambda g: g / parts, grads)), remembered

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
