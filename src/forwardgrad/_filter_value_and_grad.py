"""The front door for Equinox."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
from jaxtyping import Array, Key, PyTree

from forwardgrad._request import within
from forwardgrad._value_and_grad import value_and_grad
from forwardgrad.estimators import AbstractEstimator


def filter_value_and_grad(
    fun: Callable[..., Any],
    estimator: AbstractEstimator,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, PyTree[Array | None]]]:
    """A function that evaluates `fun` and a gradient of it, for models that hold more than arrays.

    It takes the place of `equinox.filter_value_and_grad`. The gradient is with respect to the
    floating-point arrays of the first argument, for instance an Equinox model. It has None in the
    place of everything else.

    **Arguments:**

    - `fun`: a function `fun(model, *args, **kwargs)` that returns a real scalar, or
        [`forwardgrad.Losses`][] that add up to one, or with `has_aux` a pair of either and anything
        else. `model` is any pytree. Leaves that are not floating-point arrays, such as functions,
        integers and flags, are passed on as they are.
    - `estimator`, `argnums`, `has_aux`: as for [`forwardgrad.value_and_grad`][].

    **Returns:**

    A function `(model, *args, key=None, **kwargs) -> (value, grads)`, or `((value, aux), grads)`
    with `has_aux`. `equinox.apply_updates` adds such gradients to a model; an Optax optimiser is
    initialised with `equinox.filter(model, equinox.is_inexact_array)`.

    **Raises:**

    `InputError` as for [`forwardgrad.value_and_grad`][].

    >>> import equinox as eqx, forwardgrad as fg, jax, jax.numpy as jnp
    >>> model = eqx.nn.MLP(3, 1, width_size=8, depth=1, key=jax.random.key(0))
    >>> def loss(model, x, y):
    ...     return jnp.mean((jax.vmap(model)(x) - y) ** 2)
    >>> gradient = fg.filter_value_and_grad(loss, fg.WeightPerturbation())
    >>> step = eqx.filter_jit(gradient)
    >>> value, grads = step(model, jnp.ones((4, 3)), jnp.ones((4, 1)), key=jax.random.key(1))
    >>> print(grads.layers[0].weight.shape, grads.activation)
    (8, 3) None
    """
    # What is wrong with the function or the estimator is said here, not at the first call.
    value_and_grad(fun, estimator, argnums=argnums, has_aux=has_aux)

    def evaluate(*args, key: Key[Array, ""] | None = None, **kwargs):
        arrays, static = list(args), {}
        for i in within(argnums, len(args)):
            arrays[i], static[i] = eqx.partition(args[i], eqx.is_inexact_array)

        @functools.wraps(fun, updated=())
        def combined(*args, **kwargs):
            whole = [eqx.combine(a, static[i]) if i in static else a for i, a in enumerate(args)]
            return fun(*whole, **kwargs)

        gradient = value_and_grad(combined, estimator, argnums=argnums, has_aux=has_aux)
        return gradient(*arrays, key=key, **kwargs)

    return evaluate
