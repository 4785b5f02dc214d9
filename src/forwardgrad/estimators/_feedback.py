"""What the estimators do alike that send errors back by random weights."""

import abc
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, Inexact, Key, PyTree

from forwardgrad._errors import InputError, with_article
from forwardgrad.estimators._base import AbstractStatefulEstimator, Objective
from forwardgrad.estimators._credit import ExplainedParameter, by_layer, explained
from forwardgrad.rewrite import Program


class Feedback(eqx.Module):
    """Feedback weights by the numbers of the layers that they belong to, and whose they are."""

    arrays: dict[int, Inexact[Array, "..."]]
    estimator: str = eqx.field(static=True)


class AbstractFeedback(AbstractStatefulEstimator):
    """An estimator with feedback weights, which are its state or are drawn in every step.

    Either way they are the same ones, by its `seed`, and their scale comes from its `gain`.
    """

    seed: eqx.AbstractVar[int]
    gain: eqx.AbstractVar[float]

    def __check_init__(self):
        if not self.gain > 0:
            raise InputError(f"gain must be positive, got {self.gain!r}")

    @property
    def needs_key(self) -> bool:
        """False."""
        return False

    @property
    def needs_state(self) -> bool:
        """False."""
        return False

    def value_and_grad(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        """The objective's value, and what the estimator takes for its gradient."""
        del key
        return self._estimate(_program(fun, params), None)

    def init(self, fun: Objective, params: PyTree[Array]) -> Feedback:
        """The feedback weights."""
        return Feedback(self._weights(_program(fun, params)), repr(self))

    def estimate(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None, state: Any
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array], Feedback]:
        """The same by the feedback weights in `state`, which stay as they are."""
        del key
        program = _program(fun, params)
        must = f"state must be the one that init returned for this function and {self!r}"
        if not isinstance(state, Feedback):
            raise InputError(f"{must}, got {with_article(type(state).__name__)}")
        if state.estimator != repr(self):
            raise InputError(f"{must}, got that of {state.estimator}")
        wanted = jax.eval_shape(lambda: self._weights(program))
        own, shapes = ({n: a.shape for n, a in arrays.items()} for arrays in (state.arrays, wanted))
        if own != shapes:
            raise InputError(
                f"{must}: it has feedback weights of shapes {sorted(own.values())}, where "
                f"{sorted(shapes.values())} are needed"
            )
        return (*self._estimate(program, state), state)

    @abc.abstractmethod
    def _weights(self, program: Program) -> dict[int, Array]:
        """The feedback weights by their numbers."""

    @abc.abstractmethod
    def _estimate(
        self, program: Program, state: Feedback | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        """Value, auxiliary data and gradient, by a state or by weights that are drawn."""


@explained.register
def _(estimator: AbstractFeedback, fun: Objective, params: PyTree) -> list[ExplainedParameter]:
    del estimator
    return by_layer(_program(fun, params), params, "feedback")


def _program(fun: Objective, params: PyTree[Array]) -> Program:
    return Program(fun, params, forward=False)
