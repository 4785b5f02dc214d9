"""Backpropagation with other weights on the way back."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from forwardgrad._errors import InputError
from forwardgrad.estimators._distributions import draw, feedback_key
from forwardgrad.estimators._feedback import AbstractFeedback, Feedback
from forwardgrad.estimators._steering import at_iterations, check_one_by_one, check_products
from forwardgrad.rewrite import (
    SENT_BACK,
    Hooks,
    Layer,
    Program,
    Site,
    computed_in,
    evaluate,
    is_inexact,
    line_of,
    placed_like,
)


class FeedbackAlignment(AbstractFeedback):
    r"""Feedback alignment (FA): errors come back through fixed random weights.

    In a layer $z = x W$ backpropagation sends the error $\delta$ of its output back to its input as
    $\delta W^\top$. Here it is

    $$\hat g_x = \delta B^\top, \qquad \hat g_W = x^\top \delta,$$

    $B$ has the shape of $W$. It is drawn once from the seed, and never learned. Everything else,
    such as nonlinearities and normalisation, is differentiated as usual. The gradient is biased.
    Learning works because $W$ becomes aligned with $B$.

    The matrix products and convolutions of any model are found by walking its program. Lookups,
    biases and scales have nothing to send back. B takes the place of whatever the product is made
    with; in `x @ (W * mask)` this is the masked weight. A weight that is used twice has two
    feedback weights. In a loop it has one for all iterations, and each slice of a stack that a loop
    goes through has its own. Shards of a weight in a `shard_map` have parts of their own.
    [`forwardgrad.estimation`][] keeps them from step to step. `value_and_grad`
    draws the same ones again in every step.

    **Arguments:**

    - `seed`: of the feedback weights.
    - `gain`: their variance is `gain` divided by the number of inputs of a unit; 2 is that of the
        networks' initial weights.

    **Raises:**

    `InputError` if `gain` is not positive; when called, if errors would come back through the
    weights of a layer that has no feedback weight, such as a linear solve.

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

    def _estimate(
        self, program: Program, state: Feedback | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        check_one_by_one(program, "FeedbackAlignment")
        check_products(program, "FeedbackAlignment")
        _check_layers(program)

        products = _products(program)
        kept = {} if state is None else state.arrays
        if state is None:  # What all iterations of a loop have in common is drawn once.
            shared = [layer for layer in products.values() if layer.loops and not layer.own_loops]
            kept = {layer.number: self._drawn(layer, _site(layer, ())) for layer in shared}

        def product(layer, site, arrays):
            if layer.number not in products:
                return evaluate(layer.eqn, arrays)[0]
            drawn = functools.partial(self._drawn, layer)
            iterations = tuple(site.iterations[i] for i in layer.own_loops)
            return _product_with_feedback(layer, arrays, kept.get(layer.number), drawn, iterations)

        def objective(leaves):
            terms, aux, _ = program.with_hooks(leaves, Hooks(product=product))
            return program.losses(terms).total(), aux

        (value, aux), grads = jax.value_and_grad(objective, has_aux=True)(program.leaves)
        return (value, program.auxiliary(aux)), program.treedef.unflatten(grads)

    def _drawn(self, layer: Layer, site: Site) -> Array:
        """The feedback weight of one layer, in one iteration of those loops that change it."""
        aval = layer.eqn.invars[layer.weights[0]].aval
        scale = math.sqrt(self.gain / max(1, _fan_in(layer)))
        key = site.key(feedback_key(self.seed))
        dtype = computed_in(aval.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        return _normal(key, aval.shape, scale, dtype)  # pyright: ignore[reportAttributeAccessIssue]

    def _weights(self, program: Program) -> dict[int, Array]:
        """One for each product that errors come back through, for each weight that loops make."""

        def along(layer, lengths, iterations):
            if not lengths:
                return self._drawn(layer, _site(layer, iterations))
            return jax.vmap(lambda i: along(layer, lengths[1:], (*iterations, i)))(
                jnp.arange(lengths[0])
            )

        return {
            n: along(layer, [layer.loops[i] for i in layer.own_loops], ())
            for n, layer in _products(program).items()
        }


def _site(layer: Layer, iterations: tuple[Array, ...]) -> Site:
    """Where a layer's feedback weight belongs: workers that share a weight share it too."""
    return Site(layer.number, iterations, layer.workers)


@functools.partial(jax.jit, static_argnames=("shape", "scale", "dtype"))
def _normal(key: Array, shape: tuple[int, ...], scale: float, dtype: Any) -> Array:
    # Compiled, because a state drawn eagerly would differ in the last bit from one in a loop.
    return (scale * draw(key, shape, "normal", dtype=dtype)).astype(dtype)


def _products(program: Program) -> dict[int, Layer]:
    """The products that errors come back through, by their numbers."""
    plan = program.plan
    return {
        layer.number: layer
        for layer in plan.layers.values()
        if layer.is_product and layer.moves and plan.terms(layer.eqn.outvars[0])
    }


def _check_layers(program: Program) -> None:
    """Raise an `InputError` where errors would come back through a weight itself."""
    for layer in program.plan.layers.values():
        name = layer.eqn.primitive.name
        reached = layer.moves and any(program.plan.terms(v) for v in layer.eqn.outvars)
        if reached and not layer.is_product and name not in SENT_BACK:
            raise InputError(
                f"FeedbackAlignment has no feedback weight for {name} at {line_of(layer.eqn)}, "
                "through which errors would come back by the weight itself; write it as a matrix "
                "product or a convolution, or use another estimator"
            )


def _fan_in(layer: Layer) -> int:
    """The number of inputs that a unit of a layer has."""
    eqn, (weight,) = layer.eqn, layer.weights
    shape = eqn.invars[weight].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
    if eqn.primitive.name == "conv_general_dilated":
        return math.prod(shape) // shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    if "ragged_dot_dimension_numbers" in eqn.params:
        numbers = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    else:
        numbers = eqn.params["dimension_numbers"]
    return math.prod(shape[i] for i in numbers[0][weight])


def _product_with_feedback(
    layer: Layer,
    arrays: Sequence[Any],
    kept: Array | None,
    drawn: Callable[[Site], Array],
    iterations: tuple[Array, ...],
) -> Array:
    """A product whose errors come back by a feedback weight: of `kept`, or drawn when they do."""
    (weight,) = layer.weights
    (data,) = (i for i in layer.data if is_inexact(arrays[i]))

    def apply(x, w):
        operands = list(arrays)
        operands[data], operands[weight] = x, w
        return evaluate(layer.eqn, operands)[0]

    @jax.custom_vjp
    def product(x, w, kept, iterations):
        del kept, iterations
        return apply(x, w)

    def backward(saved, error):
        x, w, kept, iterations = saved
        site = _site(layer, iterations)
        feedback = drawn(site) if kept is None else at_iterations(kept, site)
        feedback = placed_like(feedback.astype(w.dtype), w)
        (to_x,) = jax.vjp(lambda x: apply(x, feedback), x)[1](error)
        (to_w,) = jax.vjp(lambda w: apply(x, w), w)[1](error)
        return to_x, to_w, None, None

    product.defvjp(lambda x, w, *rest: (apply(x, w), (x, w, *rest)), backward)
    return product(arrays[data], arrays[weight], kept, iterations)
