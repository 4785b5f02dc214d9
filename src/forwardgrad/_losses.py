"""Losses that have not been added up."""

import functools
import operator
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from forwardgrad._errors import InputError, with_article


class Losses(eqx.Module):
    """Losses whose sum is the objective, with names for their axes.

    A function that is given to [`forwardgrad.value_and_grad`][] may return its losses in this form,
    instead of adding them up. An exact gradient is that of the sum. A forward gradient has less
    variance, because a perturbation is multiplied by the change of only those losses that it can
    influence.

    **Arguments:**

    - `terms`: arrays of any shapes.
    - `axes`: for each term the names of its axes, such as `"example"` and `"token"`. Where these
        are in the activations is followed back through the program, or said by a mark,
        [`forwardgrad.activation`][].

    **Raises:**

    `InputError` if a term is no array, or the names do not fit the terms.

    >>> import forwardgrad as fg, jax.numpy as jnp
    >>> losses = fg.Losses([jnp.array([0.5, 0.25])], [("example",)])
    >>> print(losses.total())
    0.75
    """

    terms: tuple[Float[Array, "..."], ...]
    axes: tuple[tuple[str, ...], ...] = eqx.field(static=True)

    def __init__(self, terms: Sequence[Array], axes: Sequence[Sequence[str]]):
        self.terms = tuple(terms)
        self.axes = tuple(tuple(names) for names in axes)

    def __check_init__(self):
        odd = [type(t).__name__ for t in self.terms if not eqx.is_array_like(t)]
        if odd:
            raise InputError(f"the terms of Losses must be arrays, got {with_article(odd[0])}")
        if [jnp.ndim(term) for term in self.terms] != [len(names) for names in self.axes]:
            raise InputError(
                f"axes (={self.axes}) must name every axis of every term, whose shapes are "
                f"{', '.join(str(jnp.shape(term)) for term in self.terms)}"
            )

    def total(self) -> Float[Array, ""]:
        """The sum of all entries of all terms."""
        # Their types may differ, also where the caller's own arrays must not be mixed.
        with jax.numpy_dtype_promotion("standard"):
            return functools.reduce(operator.add, [jnp.sum(term) for term in self.terms])
