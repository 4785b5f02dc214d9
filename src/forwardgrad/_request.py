"""What all front doors do alike with a function, an estimator, and the arguments of one call."""

import dataclasses
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from forwardgrad._errors import InputError, with_article
from forwardgrad._losses import Losses
from forwardgrad.estimators import AbstractEstimator
from forwardgrad.estimators._base import Objective
from forwardgrad.rewrite import varying_alike, varying_like


@dataclasses.dataclass(frozen=True)
class Request:
    """A function to be differentiated, by an estimator, with respect to some of its arguments.

    **Raises:**

    `InputError` if one of them is not what it has to be, or `fun` has an optional argument called
    `key`.
    """

    fun: Callable[..., Any]
    estimator: AbstractEstimator
    argnums: int | Sequence[int]
    has_aux: bool

    def __post_init__(self):
        if not isinstance(self.estimator, AbstractEstimator):
            raise InputError(
                "estimator must be an estimator such as WeightPerturbation(), "
                f"got {self.estimator!r}"
            )
        _check_signature(self.fun)
        as_argnums(self.argnums)

    def objective(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Objective, PyTree]:
        """The function of the differentiated arguments alone, and these."""
        positions = within(self.argnums, len(args))
        one = not isinstance(as_argnums(self.argnums), tuple)
        names = ["params" if i == 0 else f"argument {i}" for i in positions]
        chosen = _checked([args[i] for i in positions], names)

        def closed(params):
            full = list(args)
            for i, value in zip(positions, (params,) if one else params, strict=True):
                full[i] = value
            value, aux = as_pair(called(self.fun, full, kwargs), self.has_aux)
            return as_losses(value), aux

        others = [arg for i, arg in enumerate(args) if i not in positions]
        closed.given = jax.tree.leaves((others, kwargs))  # pyright: ignore[reportFunctionMemberAccess]
        return closed, chosen[0] if one else tuple(chosen)

    def placed(self, params: PyTree[Array], key: Key[Array, ""] | None) -> PyTree[Array]:
        """`params` where the key is: each worker of a `shard_map` may have its own.

        **Raises:**

        `InputError` if there is no key where the estimator needs one.
        """
        if not self.estimator.needs_key:
            return params
        key = checked_key(self.estimator, key)
        return jax.tree.map(lambda leaf: varying_like(leaf, key), params)

    def result(self, value: Any, aux: Any) -> Any:
        """Value and auxiliary data as the caller gets them."""
        return (value, aux) if self.has_aux else value


def checked_key(
    estimator: AbstractEstimator, key: Any, *, stacked: bool = False
) -> Key[Array, "*stacked"]:
    """A key, or with `stacked` a vector of keys, of the new kind.

    Keys of the old kind are arrays of words.

    **Raises:**

    `InputError` if it is not one.
    """
    if key is None:
        raise InputError(
            f"key is missing: {type(estimator).__name__} is random; "
            "pass key=jax.random.key(...), a new one at every step"
        )
    if eqx.is_array(key):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        axes = key.ndim - (0 if typed else 1)
        if (typed or key.dtype == jnp.uint32) and axes in ((0, 1) if stacked else (0,)):
            return key if typed else jax.random.wrap_key_data(key)
    shape = f" of shape {jnp.shape(key)}" if eqx.is_array(key) else ""
    raise InputError(
        f"key must be a single jax.random.key(...){' or a vector of them' if stacked else ''}, got "
        f"{with_article(type(key).__name__)}{shape}"
    )


def as_argnums(argnums: Any) -> int | tuple[int, ...]:
    """`argnums` as an integer, or for any sequence a tuple of them.

    **Raises:**

    `InputError` if it is neither, or there are none or the same ones twice.
    """
    try:
        return operator.index(argnums)
    except TypeError:
        pass
    try:
        found = tuple(operator.index(i) for i in argnums)
    except TypeError:
        found = ()
    if not found or len(set(found)) < len(found):
        raise InputError(
            f"argnums must be an integer or a sequence of different integers, got {argnums!r}"
        )
    return found


def within(argnums: int | Sequence[int], count: int) -> tuple[int, ...]:
    """The positions among `count` arguments that `argnums` stands for.

    **Raises:**

    `InputError` if there are not so many arguments, or two numbers stand for the same one.
    """
    numbers = as_argnums(argnums)
    numbers = numbers if isinstance(numbers, tuple) else (numbers,)
    positions = tuple(i + count if i < 0 else i for i in numbers)
    if any(not 0 <= i < count for i in positions) or len(set(positions)) < len(positions):
        raise InputError(
            f"argnums (={argnums!r}) must be positions of different arguments, of which fun is "
            f"called with {count} by position"
        )
    return positions


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
    return _checked([params], ["params"])[0]


def _checked(trees: Sequence[PyTree], names: Sequence[str]) -> list[PyTree[Array]]:
    if not jax.tree.leaves(trees):
        what = f"{' and '.join(names)} {'holds' if len(names) == 1 else 'hold'}"
        raise InputError(f"{what} no arrays: nothing to differentiate with respect to")
    return [_arrays(tree, name) for tree, name in zip(trees, names, strict=True)]


def _arrays(tree: PyTree, name: str) -> PyTree[Array]:
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None and isinstance(leaf, float):
            continue
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            where = jax.tree_util.keystr(path) or " itself"
            what = (
                with_article(f"{dtype} array")
                if dtype is not None
                else getattr(leaf, "__name__", repr(leaf))
            )
            raise InputError(
                f"{name}{where} must be a floating-point array, got {what}; leave such "
                "leaves out by forwardgrad.filter_value_and_grad, by equinox.partition(params, "
                "equinox.is_inexact_array), or by the filter of a flax.nnx.DiffState"
            )
    return treedef.unflatten([jnp.asarray(leaf) for _, leaf in leaves])


def as_pair(out: Any, has_aux: bool) -> tuple[Any, Any]:
    """Value and auxiliary data (None where there is none) of what a function returned.

    **Raises:**

    `InputError` if it is no pair with `has_aux`.
    """
    if not has_aux:
        return out, None
    if not (isinstance(out, tuple) and len(out) == 2):
        what = with_article(type(out).__name__)
        raise InputError(f"fun must return a pair (value, aux) with has_aux=True, got {what}")
    return out


def called(fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What a function returns.

    **Raises:**

    `InputError` in the place of Flax's error for a variable that belongs to another trace.
    """
    try:
        return fun(*args, **kwargs)
    except Exception as error:
        kind = type(error)
        # Flax may not be there, so that its class cannot be named.
        if kind.__name__ == "TraceContextError" and kind.__module__.startswith("flax."):
            raise InputError(
                "fun changes a Flax variable from outside of it, which JAX cannot follow; pass the "
                "module as an argument to forwardgrad.nnx.value_and_grad, or make a new one inside "
                f"of fun by flax.nnx.merge(..., copy=True) (Flax: {str(error).splitlines()[0]})"
            ) from error
        raise


def as_losses(value: Any) -> Losses:
    if not isinstance(value, Losses):
        return Losses([_checked_value(value)], [()])
    if not value.terms:
        raise InputError("the terms of Losses must be at least one array, got none")
    for term in value.terms:
        dtype = jnp.result_type(term)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise InputError(f"the terms of Losses must be real, got one of dtype {dtype}")
    # Each worker of a `shard_map` has them all, as it has their total.
    return Losses(varying_alike(value.terms), value.axes)


def _checked_value(value: Any) -> Array:
    if not eqx.is_array_like(value):
        what = with_article(type(value).__name__)
        raise InputError(
            f"fun must return a real floating-point scalar, got {what}; auxiliary data needs "
            "has_aux=True"
        )
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(
            f"fun must return a real floating-point scalar, got an array of shape {shape} and "
            f"dtype {dtype}; reduce the loss, for instance with jax.numpy.mean"
        )
    return jnp.asarray(value)
