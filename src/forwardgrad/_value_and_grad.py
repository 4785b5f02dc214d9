"""The narrow waist: everything that trains calls this."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from forwardgrad._errors import InputError
from forwardgrad._losses import Losses
from forwardgrad.estimators import AbstractEstimator
from forwardgrad.rewrite import varying_like


def value_and_grad(
    fun: Callable[..., Any], estimator: AbstractEstimator, *, has_aux: bool = False
) -> Callable[..., tuple[Any, PyTree[Array]]]:
    """A function that evaluates `fun` and a gradient of it, by the given estimator.

    It stands where `jax.value_and_grad` stands: the gradient is with respect to the first
    argument, has its tree, shapes and dtypes, and goes into any Optax optimiser. It works under
    `jax.jit` (which is how to use it: without, the function is traced at every call), `vmap`,
    `scan` and sharding.

    **Arguments:**

    - `fun`: a function `fun(params, *args, **kwargs)` that returns a real scalar, or
        [`forwardgrad.Losses`][] that add up to one, or with `has_aux` a pair of either and anything
        else. `params` is a pytree of floating-point arrays; the other arguments may be anything.
    - `estimator`: for instance [`forwardgrad.WeightPerturbation`][].
    - `has_aux`: whether `fun` returns auxiliary data beside its value.

    **Returns:**

    A function `(params, *args, key=None, **kwargs) -> (value, grads)`, or `((value, aux), grads)`
    with `has_aux`. `key` is a `jax.random.key`: random estimators need it, exact ones ignore it.

    **Raises:**

    `InputError`, when called, if a parameter is not a floating-point array, if the value is not a
    real scalar, or if a random estimator is given no key.

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
    if not isinstance(estimator, AbstractEstimator):
        raise InputError(
            f"estimator must be an estimator such as WeightPerturbation(), got {estimator!r}"
        )

    _check_signature(fun)

    def evaluate(params, *args, key: Key[Array, ""] | None = None, **kwargs):
        params = checked_params(params)
        if estimator.needs_key and key is None:
            raise InputError(
                f"key is missing: {type(estimator).__name__} is random; "
                "pass key=jax.random.key(...), a new one at every step"
            )
        if estimator.needs_key and key is not None:
            # With a key for each worker of a `shard_map`, tangents and estimates are its own.
            params = jax.tree.map(lambda leaf: varying_like(leaf, key), params)

        closed = as_objective(fun, has_aux, args, kwargs)
        (value, aux), grads = estimator.value_and_grad(closed, params, key)
        return ((value, aux) if has_aux else value), grads

    return evaluate


def as_objective(fun: Callable, has_aux: bool, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`fun` as estimators take it: of the parameters alone, with losses and auxiliary data.

    Its attribute `given` has the arrays among the other arguments.
    """

    def objective(params):
        out = fun(params, *args, **kwargs)
        value, aux = _pair(out) if has_aux else (out, None)
        return _as_losses(value), aux

    objective.given = jax.tree.leaves((args, kwargs))  # pyright: ignore[reportFunctionMemberAccess]
    return objective


def _check_signature(fun: Callable) -> None:
    """Raise an `InputError` for a function whose own `key` would not reach it."""
    try:
        _, *others = inspect.signature(fun).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature, or without arguments
        return
    hidden = [p for p in others if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    if any(p.name == "key" for p in hidden):
        raise InputError(
            "fun must not have an optional argument called `key`, which the estimator takes; give "
            "it another name, for instance by lambda params, *args, noise: "
            "fun(params, *args, key=noise)"
        )


def checked_params(params: PyTree) -> PyTree[Array]:
    """`params` with every leaf an array.

    **Raises:**

    `InputError` if a leaf is not a floating-point array, or there is none.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    if not leaves:
        raise InputError("params holds no arrays: nothing to differentiate with respect to")
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None and isinstance(leaf, float):
            continue
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            name = jax.tree_util.keystr(path) or "itself"
            what = (
                f"a {dtype} array" if dtype is not None else getattr(leaf, "__name__", repr(leaf))
            )
            raise InputError(
                f"params{name if path else ' ' + name} must be a floating-point array, got {what}; "
                "split such leaves off first, for instance with "
                "equinox.partition(params, equinox.is_inexact_array)"
            )
    return treedef.unflatten([jnp.asarray(leaf) for _, leaf in leaves])


def _pair(out: Any) -> tuple[Any, Any]:
    if not (isinstance(out, tuple) and len(out) == 2):
        raise InputError(
            f"fun must return a pair (value, aux) with has_aux=True, got a {type(out).__name__}"
        )
    return out


def _as_losses(value: Any) -> Losses:
    if not isinstance(value, Losses):
        return Losses([_checked_value(value)], [()])
    for term in value.terms:
        if not jnp.issubdtype(jnp.result_type(term), jnp.floating):
            raise InputError(f"the terms of Losses must be real, got one of dtype {term.dtype}")
    return value


def _checked_value(value: Any) -> Array:
    if not eqx.is_array_like(value):
        raise InputError(
            f"fun must return a real floating-point scalar, got a {type(value).__name__}; "
            "auxiliary data needs has_aux=True"
        )
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(
            f"fun must return a real floating-point scalar, got an array of shape {shape} and "
            f"dtype {dtype}; reduce the loss, for instance with jax.numpy.mean"
        )
    return jnp.asarray(value)
