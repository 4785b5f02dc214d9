"""Feedback weights that are kept from step to step."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Inexact

from forwardgrad._errors import InputError
from forwardgrad.estimators._base import AbstractEstimator
from forwardgrad.rewrite import Site


class Feedback(eqx.Module):
    """Feedback weights by the numbers of the layers that they belong to, and whose they are."""

    arrays: dict[int, Inexact[Array, "..."]]
    estimator: str = eqx.field(static=True)


def check(state: Any, estimator: AbstractEstimator, shapes: Mapping[int, tuple[int, ...]]) -> None:
    """Raise an `InputError` unless a state is an estimator's feedback weights for these layers."""
    must = f"state must be the one that init returned for this function and {estimator!r}"
    if not isinstance(state, Feedback):
        raise InputError(f"{must}, got a {type(state).__name__}")
    if state.estimator != repr(estimator):
        raise InputError(f"{must}, got that of {state.estimator}")
    own = {number: array.shape for number, array in state.arrays.items()}
    if own != dict(shapes):
        raise InputError(
            f"{must}: it has feedback weights of shapes {sorted(own.values())}, where "
            f"{sorted(shapes.values())} are needed"
        )


def at_iterations(array: Array, site: Site) -> Array:
    """The part of a stack that belongs to one iteration of the loops around a layer."""
    for i in site.iterations:
        array = jax.lax.dynamic_index_in_dim(array, i, keepdims=False)
    return array
