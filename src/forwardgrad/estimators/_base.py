"""What an estimator is."""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
from jaxtyping import Array, Float, Key, PyTree

from forwardgrad._losses import Losses

Objective: TypeAlias = Callable[[PyTree], tuple[Losses, Any]]
"""A function of the parameters alone that returns losses and auxiliary data."""


class AbstractEstimator(eqx.Module):
    """How credit reaches the weights: an exact gradient, or a random estimate of one.

    An estimator is given to [`forwardgrad.value_and_grad`][], which checks the arguments; it is
    not called by hand. A new one implements `value_and_grad`, and says whether it draws random
    numbers.
    """

    @property
    @abc.abstractmethod
    def needs_key(self) -> bool:
        """Whether it draws random numbers."""

    @abc.abstractmethod
    def value_and_grad(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        """The objective's value, its auxiliary data, and a gradient.

        **Arguments:**

        - `fun`: returns `(losses, aux)` for one argument, the parameters; the objective is the
            losses' total.
        - `params`: a pytree of inexact arrays.
        - `key`: a random key; None where `needs_key` is False.

        **Returns:**

        `((value, aux), grads)`, `grads` with the tree, shapes and dtypes of `params`.
        """
