"""Cost of a compiled step: what XLA says of it, and what the clock says, side by side."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from forwardgrad._estimation import estimation
from forwardgrad.estimators import AbstractEstimator
from forwardgrad.rewrite import after

LEARNING_RATE = 1e-6

Loss = Callable[..., Any]
"""`loss(params, *batch)`."""


def sgd_step(
    loss: Loss, estimator: AbstractEstimator | None
) -> tuple[Callable[..., PyTree], Callable[..., tuple[PyTree, Any]]]:
    """`init(params, *batch) -> state` and `step((params, state), key, *batch)`: an SGD update.

    The step returns `((params, state), value)`. Without an estimator, it is the loss alone
    ("forward only").
    """
    if estimator is None:
        return lambda *_: (), lambda own, key, *batch: (None, loss(own[0], *batch))
    init, estimate = estimation(loss, estimator)

    def step(own, key, *batch):
        params, state = own
        value, grads, state = estimate(params, *batch, key=key, state=state)
        params = jax.tree.map(lambda p, g: p - LEARNING_RATE * g.astype(p.dtype), params, grads)
        return (params, state), value

    return init, step


class Step:
    """A compiled step with parameters and an estimator's state of its own, updated in place.

    **Arguments:**

    - `loss`: `loss(params, *batch)`.
    - `params`: its parameters, arrays, or their shapes if the step is never called.
    - `estimator`: what estimates its gradient, or None for the loss alone.
    - `batch`: its other arguments.
    """

    def __init__(
        self, loss: Loss, params: PyTree, estimator: AbstractEstimator | None, batch: tuple
    ):
        self._key, self._batch, self._updates = jax.random.key(0), batch, estimator is not None
        init, step = sgd_step(loss, estimator)
        own = params, jax.eval_shape(init, params, *batch)
        jitted = jax.jit(step, donate_argnums=(0,) if self._updates else ())
        self.compiled = jitted.lower(own, self._key, *batch).compile()
        if isinstance(jax.tree.leaves(params)[0], jax.Array):
            copy = jax.tree.map(jnp.copy, params) if self._updates else params
            self._own = copy, jax.jit(init)(params, *batch)

    @property
    def examples(self) -> int:
        """How many examples the batch has: the length of its arrays' first axis."""
        return jax.tree.leaves(self._batch)[0].shape[0]

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
        own, value = self.compiled(self._own, self._key, *self._batch)
        jax.block_until_ready((own, value))
        if self._updates:
            self._own = own


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
