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
    """How a gradient is found: exactly, or as a random estimate.

    An estimator is given to [`forwardgrad.value_and_grad`][], which checks the arguments. It is not
    called directly. A new one implements `value_and_grad`, and says whether it draws random
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


class AbstractStatefulEstimator(AbstractEstimator):
    """An estimator that remembers something from step to step.

    It is given to [`forwardgrad.estimation`][]. If it also works without a state, it may be given
    to [`forwardgrad.value_and_grad`][]; its own `value_and_grad` then says what it estimates with
    nothing remembered. The state is an argument and a result, and may be any pytree of arrays.
    """

    @property
    @abc.abstractmethod
    def needs_state(self) -> bool:
        """Whether it is of no use without what it remembers."""

    @abc.abstractmethod
    def init(self, fun: Objective, params: PyTree[Array]) -> PyTree:
        """The state before the first step.

        **Arguments:**

        - `fun`, `params`: as for `value_and_grad`.
        """

    @abc.abstractmethod
    def estimate(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None, state: Any
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array], PyTree]:
        """The objective's value, its auxiliary data, a gradient, and the next step's state.

        **Arguments:**

        - `fun`, `params`, `key`: as for `value_and_grad`.
        - `state`: what `init`, or the last step, returned.

        **Returns:**

        `((value, aux), grads, state)`, the state with the tree, shapes and dtypes that it had.

        **Raises:**

        `InputError` if the state is not one of this estimator and this function.
        """
