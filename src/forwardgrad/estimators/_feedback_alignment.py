"""Backpropagation with other weights on the way back."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Float, Key, PyTree

from forwardgrad._errors import InputError
from forwardgrad.estimators._base import AbstractEstimator, Objective
from forwardgrad.rewrite import Hooks, Program, evaluate


class FeedbackAlignment(AbstractEstimator):
    r"""Feedback alignment (FA): errors come back through fixed random weights.

    In a layer $z = x W$ backpropagation sends the error $\delta$ of its output back to its input as
    $\delta W^\top$. Here it is

    $$\hat g_x = \delta B^\top, \qquad \hat g_W = x^\top \delta,$$

    with $B$ of the shape of $W$, drawn once from the seed and never learned. Everything else,
    nonlinearities and normalisation, is differentiated as usual. The result is a biased gradient:
    learning works because $W$ comes to align with $B$.

    Matrix products and convolutions of any model are found by walking its program; lookups, biases
    and scales have nothing to send back. A weight that is used twice has two feedback weights.

    **Arguments:**

    - `seed`: of the feedback weights.
    - `gain`: their variance is `gain` divided by the number of inputs of a unit; 2 is that of the
        networks' initial weights.

    **Raises:**

    `InputError` if `gain` is not positive.

    ??? cite "Reference"

        Lillicrap, Cownden, Tweed & Akerman, *Random synaptic feedback weights support error
        backpropagation for deep learning*, Nature Communications 7, 2016.

    >>> import forwardgrad as fg, jax, jax.numpy as jnp
    >>> params = {"first": jnp.ones((3, 5)), "last": jnp.ones((5, 2))}
    >>> step = fg.value_and_grad(
    ...     lambda p: jnp.sum(jnp.ones((4, 3)) @ p["first"] @ p["last"]), fg.FeedbackAlignment()
    ... )
    >>> value, grads = step(params)
    >>> print(grads["last"][0], bool(jnp.any(grads["first"] != 8)))
    [12. 12.] True
    """

    seed: int = 0
    gain: float = 2.0

    def __check_init__(self):
        if not self.gain > 0:
            raise InputError(f"gain must be positive, got {self.gain!r}")

    @property
    def needs_key(self) -> bool:
        """False."""
        return False

    def value_and_grad(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        """The objective's value, and what feedback alignment takes for its gradient."""
        del key
        program = Program(fun, params)

        def product(key, eqn, arrays, weight):
            inputs = jax.random.normal(key, arrays[weight].shape, jnp.float32)
            scale = math.sqrt(self.gain / _fan_in(eqn, weight))
            feedback = (scale * inputs).astype(arrays[weight].dtype)
            return _product_with_feedback(eqn, arrays, weight, feedback)

        def objective(leaves):
            hooks = Hooks(product=product)
            terms, aux, _ = program.with_hooks(leaves, jax.random.key(self.seed), hooks)
            return program.losses(terms).total(), aux

        (value, aux), grads = jax.value_and_grad(objective, has_aux=True)(program.leaves)
        return (value, program.auxiliary(aux)), program.treedef.unflatten(grads)


def _fan_in(eqn: JaxprEqn, weight: int) -> int:
    """The number of inputs that a unit of a layer has."""
    shape = eqn.invars[weight].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
    if eqn.primitive.name == "dot_general":
        (contracting, _) = eqn.params["dimension_numbers"]
        return math.prod(shape[i] for i in contracting[weight])
    return math.prod(shape) // shape[eqn.params["dimension_numbers"].rhs_spec[0]]


def _product_with_feedback(
    eqn: JaxprEqn, arrays: Sequence[Array], weight: int, feedback: Array
) -> Array:
    def apply(x, w):
        return evaluate(eqn, (w, x) if weight == 0 else (x, w))[0]

    @jax.custom_vjp
    def layer(x, w, feedback):
        del feedback
        return apply(x, w)

    def backward(saved, error):
        x, w, feedback = saved
        (to_x,) = jax.vjp(lambda x: apply(x, feedback), x)[1](error)
        (to_w,) = jax.vjp(lambda w: apply(x, w), w)[1](error)
        return to_x, to_w, jnp.zeros_like(feedback)

    layer.defvjp(lambda x, w, feedback: (apply(x, w), (x, w, feedback)), backward)
    return layer(arrays[1 - weight], arrays[weight], feedback)
