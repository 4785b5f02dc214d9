"""Cost of a compiled step: what XLA says of it, and what the clock says, side by side."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from forwardgrad._value_and_grad import value_and_grad
from forwardgrad.estimators import AbstractEstimator
from forwardgrad.rewrite import after

LEARNING_RATE = 1e-6

Loss = Callable[..., Any]
"""`loss(params, *batch)`."""


def sgd_step(loss: Loss, estimator: AbstractEstimator | None) -> Callable[..., tuple[PyTree, Any]]:
    """`step(params, key, *batch) -> (params, value)`: a loss, a gradient and an SGD update.

    Without an estimator, the loss alone ("forward only").
    """
    if estimator is None:
        return lambda params, key, *batch: (None, loss(params, *batch))
    gradient = value_and_grad(loss, estimator)

    def step(params, key, *batch):
        value, grads = gradient(params, *batch, key=key)
        return jax.tree.map(
            lambda p, g: p - LEARNING_RATE * g.astype(p.dtype), params, grads
        ), value

    return step


class Step:
    """A compiled step and its own copy of the parameters, which it updates in place.

    **Arguments:**

    - `loss`: `loss(params, *batch)`.
    - `params`: its parameters, arrays, or their shapes if the step is never called.
    - `estimator`: what estimates its gradient, or None for the loss alone.
    - `batch`: its other arguments.
    """

    def __init__(
        self, loss: Loss, params: PyTree, estimator: AbstractEstimator | None, batch: tuple
    ):
        donated = () if estimator is None else (0,)
        jitted = jax.jit(sgd_step(loss, estimator), donate_argnums=donated)
        self._key = jax.random.key(0)
        self.compiled = jitted.lower(params, self._key, *batch).compile()
        self._batch, self._updates = batch, estimator is not None
        if isinstance(jax.tree.leaves(params)[0], jax.Array):
            self._params = jax.tree.map(jnp.copy, params) if self._updates else params

    @property
    def temp_bytes(self) -> int:
        """XLA's temporary memory of the step, in bytes."""
        analysis = self.compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    @property
    def flops(self) -> float:
        """XLA's count of floating-point operations."""
        analysis = self.compiled.cost_analysis()
        assert analysis is not None
        return analysis["flops"]

    def __call__(self) -> None:
        """Do one step, and wait for it."""
        params, value = self.compiled(self._params, self._key, *self._batch)
        jax.block_until_ready((params, value))
        if self._updates:
            self._params = params


def interleave(steps: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` rounds over all of `steps` after one to warm up.

    Each round has another order: what a step finds in the caches depends on the one before it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps.items())
    for round_number in range(repeats + 1):
        random.Random(round_number).shuffle(order)
        for name, step in order:
            began = time.perf_counter()
            step()
            if round_number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def checkpointed(fun: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`fun`, of which backpropagation keeps the arguments and computes the rest again.

    `jax.checkpoint` is for this, and holds on a CPU with JAX 0.12. With JAX 0.10, XLA removes the
    barrier that it relies on there, finds everything computed already, and keeps it. Here the
    second computation cannot begin before the gradient of the result is there, because a zero
    computed from it is added to the arguments. Arguments larger than the result are taken as they
    are: a copy of a weight matrix would need more memory than it saves.

    **Arguments:**

    - `fun`: a function of pytrees of arrays that returns an array, and closes over nothing that is
        differentiated.

    **Returns:**

    The same function, for reverse mode alone.

    >>> import jax, jax.numpy as jnp
    >>> from forwardgrad.experiments import checkpointed
    >>> layer = checkpointed(lambda w, x: w * x**2)
    >>> print(jax.grad(layer)(jnp.array(3.0), jnp.array(2.0)))
    4.0
    """

    @jax.custom_vjp
    def call(*args):
        return fun(*args)

    def forward(*args):
        return fun(*args), args

    def backward(args, gradient):
        leaves, tree = jax.tree.flatten(args)
        delayed = after(gradient, leaves)
        args = tree.unflatten(
            late if leaf.size <= gradient.size else leaf
            for leaf, late in zip(leaves, delayed, strict=True)
        )
        return jax.vjp(fun, *args)[1](gradient)

    call.defvjp(forward, backward)
    return call
