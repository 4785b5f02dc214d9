"""The narrow waist: everything that trains calls this."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Array, Key, PyTree

from forwardgrad._errors import InputError
from forwardgrad._request import Request
from forwardgrad.estimators import AbstractEstimator, AbstractStatefulEstimator


def value_and_grad(
    fun: Callable[..., Any],
    estimator: AbstractEstimator,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, PyTree[Array]]]:
    """A function that evaluates `fun` and a gradient of it, by the given estimator.

    It takes the place of `jax.value_and_grad`. The gradient has the tree, shapes and dtypes of the
    parameters, and goes into any Optax optimiser. The function works under `jax.jit`, `vmap`,
    `scan` and sharding. Use it under `jax.jit`: otherwise `fun` is traced at every call.

    **Arguments:**

    - `fun`: a function `fun(params, *args, **kwargs)` that returns a real scalar, or
        [`forwardgrad.Losses`][] that add up to one, or with `has_aux` a pair of either and anything
        else. `params` is a pytree of floating-point arrays; the other arguments may be anything.
    - `estimator`: for instance [`forwardgrad.WeightPerturbation`][].
    - `argnums`: the argument to differentiate with respect to, or a sequence of several. The other
        arguments are data, for estimators that make a difference. Negative numbers count from the
        end.
    - `has_aux`: whether `fun` returns auxiliary data beside its value.

    **Returns:**

    A function `(params, *args, key=None, **kwargs) -> (value, grads)`, or `((value, aux), grads)`
    with `has_aux`. `grads` is a tuple if `argnums` is a sequence. `key` is a `jax.random.key`.
    Random estimators need it, and exact ones ignore it.

    **Raises:**

    `InputError` if `argnums` is not an integer or a sequence of different ones, or if the estimator
    works only with a state ([`forwardgrad.estimation`][]); when called, if a parameter is not a
    floating-point array, if the value is not a real scalar, or if a random estimator is given no
    key.

    >>> import forwardgrad as fg, jax, jax.numpy as jnp, optax
    >>> def loss(params, x, y):
    ...     return jnp.mean((x @ params["W"] + params["b"] - y) ** 2)
    >>> params = {"W": jnp.zeros((3, 1)), "b": jnp.zeros(1)}
    >>> x = jax.random.normal(jax.random.key(0), (64, 3))
    >>> y = x @ jnp.array([[1.0], [-2.0], [0.5]]) + 1.0
    >>> step = jax.jit(fg.value_and_grad(loss, fg.WeightPerturbation(tangents=4)))
    >>> optimiser = optax.sgd(0.05)
    >>> state = optimiser.init(params)
    >>> for i in range(300):
    ...     value, grads = step(params, x, y, key=jax.random.key(i))
    ...     updates, state = optimiser.update(grads, state)
    ...     params = optax.apply_updates(params, updates)
    >>> bool(value < 1e-3)
    True
    """
    request = Request(fun, estimator, argnums, has_aux)
    if isinstance(estimator, AbstractStatefulEstimator) and estimator.needs_state:
        raise InputError(
            f"{type(estimator).__name__} needs its state from step to step: use "
            "forwardgrad.estimation(fun, estimator), whose step takes and returns it"
        )

    def evaluate(*args, key: Key[Array, ""] | None = None, **kwargs):
        objective, params = request.objective(args, kwargs)
        params = request.placed(params, key)
        (value, aux), grads = estimator.value_and_grad(objective, params, key)
        return request.result(value, aux), grads

    return evaluate
