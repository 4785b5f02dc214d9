"""The exact gradient by reverse mode."""

from typing import Any

import jax
from jaxtyping import Array, Float, Key, PyTree

from forwardgrad.estimators._base import AbstractEstimator, Objective
from forwardgrad.estimators._credit import ExplainedParameter, explained, of_parameters
from forwardgrad.rewrite import Program


class Backpropagation(AbstractEstimator):
    r"""The exact gradient $\nabla f(\theta)$, by reverse-mode differentiation (`jax.vjp`).

    With it, the same step, loop and command serve as the baseline. It draws no random numbers, and
    ignores `key`.

    ??? cite "Reference"

        Rumelhart, Hinton & Williams, *Learning representations by back-propagating errors*,
        Nature 323, 1986.

    >>> import forwardgrad as fg, jax.numpy as jnp
    >>> step = fg.value_and_grad(lambda w: jnp.sum(w**2), fg.Backpropagation())
    >>> value, grad = step(jnp.array([1.0, 2.0]))
    >>> print(value, grad)
    5.0 [2. 4.]
    """

    @property
    def needs_key(self) -> bool:
        """False."""
        return False

    def value_and_grad(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        """The objective's value and its exact gradient."""
        del key

        def total(params):
            losses, aux = fun(params)
            return losses.total(), aux

        return jax.value_and_grad(total, has_aux=True)(params)


@explained.register
def _(estimator: Backpropagation, fun: Objective, params: PyTree) -> list[ExplainedParameter]:
    del estimator
    program = Program(fun, params, forward=False)
    return of_parameters(program, params, ["exact"] * len(program.leaves))
