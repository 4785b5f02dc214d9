"""Feedback weights that are kept from step to step."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Inexact

from forwardgrad._errors import InputError
from forwardgrad.rewrite import Site


class Feedback(eqx.Module):
    """Feedback weights by the numbers of the layers that they belong to."""

    arrays: dict[int, Inexact[Array, "..."]]

    def check(self, shapes: Mapping[int, tuple[int, ...]], estimator: Any) -> None:
        """Raise an `InputError` unless these are the feedback weights of a function's layers."""
        own = {number: array.shape for number, array in self.arrays.items()}
        if own != dict(shapes):
            raise InputError(
                f"state must be the one that init returned for this function and {estimator}: it "
                f"has feedback weights of shapes {sorted(own.values())}, where "
                f"{sorted(shapes.values())} are needed"
            )


def at_iterations(array: Array, site: Site) -> Array:
    """The part of a stack that belongs to one iteration of the loops around a layer."""
    for i in site.iterations:
        array = jax.lax.dynamic_index_in_dim(array, i, keepdims=False)
    return array
