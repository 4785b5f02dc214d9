"""The output's error, sent to every layer at once."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from forwardgrad._errors import InputError
from forwardgrad.estimators._base import AbstractEstimator, Objective
from forwardgrad.estimators._distributions import rademacher
from forwardgrad.rewrite import Activation, Hooks, Program


class DirectFeedbackAlignment(AbstractEstimator):
    r"""Direct feedback alignment (DFA): the output's error goes straight to every layer.

    With $e = \partial L / \partial y$ the error of the output layer, the input $x$ of every later
    layer gets

    $$\hat g_x = e B^\top,$$

    with a fixed matrix $B$ of random signs for each, drawn once from the seed, whatever lies
    between $x$ and the output. What lies between $x$ and the layer before it, a nonlinearity, a
    normalisation, is differentiated as usual; the output layer gets its exact gradient.

    `fun` must return [`forwardgrad.Losses`][] with an axis of examples, because every example has
    an error of its own, and have one output layer that hidden layers lead to. A readout on
    features that are constants to it is no such layer; it gets its exact gradient.

    **Arguments:**

    - `seed`: of the feedback matrices.
    - `gain`: their entries are plus or minus the root of `gain` divided by the number of entries
        that $x$ has for an example; 2 is the scale of the networks' initial weights.

    **Raises:**

    `InputError` if `gain` is not positive; when called, if there is no axis of examples, or not one
    output layer.

    ??? cite "Reference"

        Nøkland, *Direct Feedback Alignment Provides Learning in Deep Neural Networks*, NIPS 2016.

    >>> import forwardgrad as fg, jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (8, 3))
    >>> def losses(w):
    ...     out = jnp.tanh(x @ w["first"]) @ w["last"]
    ...     return fg.Losses([jnp.mean(out**2, axis=1) / 8], [("example",)])
    >>> step = fg.value_and_grad(losses, fg.DirectFeedbackAlignment())
    >>> value, grads = step({"first": jnp.ones((3, 5)), "last": jnp.ones((5, 2))})
    >>> grads["first"].shape
    (3, 5)
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
        """The objective's value, and what direct feedback alignment takes for its gradient."""
        del key
        program = Program(fun, params)
        output = self._output(program)
        # What goes into a layer is cut off from what it comes from: see `ActivityPerturbation`.
        (value, _), pullback, (error, noted, aux) = jax.vjp(
            lambda leaves: self._forward(program, leaves, output), program.leaves, has_aux=True
        )
        gradients = [x.each(lambda x: self._feedback(x, output, error)) for x in noted]
        (grads,) = pullback((jnp.ones_like(value), gradients))
        return (value, program.auxiliary(aux)), program.treedef.unflatten(grads)

    @property
    def _fixed(self) -> Key[Array, ""]:
        return jax.random.key(self.seed)

    def _output(self, program: Program) -> Activation:
        """The output layer's activation, by its shape."""
        hooks = Hooks(activation=lambda a: a.value)
        noted = jax.eval_shape(
            lambda leaves: program.with_hooks(leaves, self._fixed, hooks)[2], program.leaves
        )
        hidden = frozenset().union(*[a.terms for a in noted.activations if not a.last])
        outputs = [a for a in noted.activations if a.last and (a.terms & hidden or not hidden)]
        if len(outputs) != 1 or outputs[0].stacked:
            raise InputError(
                f"DirectFeedbackAlignment needs one output layer, got {len(outputs)}"
                f"{' in a loop' if outputs and outputs[0].stacked else ''}; "
                "with local losses every block has one"
            )
        if outputs[0].axes is None or "example" not in outputs[0].axes:
            raise InputError(
                "DirectFeedbackAlignment needs a loss for every example: return "
                "forwardgrad.Losses([losses], [('example',)])"
            )
        return outputs[0]

    def _forward(self, program: Program, leaves: list[Array], output: Activation):
        """Value and layers' inputs, and what is not to be differentiated.

        The latter are the value's derivative by the output layer's activation, what is known of the
        inputs, and the auxiliary data.
        """

        def own(x):
            return x.axes is not None and "example" in x.axes and bool(x.terms & output.terms)

        def moved(shift):
            hooks = Hooks(
                activation=lambda a: a.value + shift if _same(a, output) else a.value,
                layer_input=lambda x: jax.lax.stop_gradient(x.value) if own(x) else x.value,
            )
            terms, aux, noted = program.with_hooks(leaves, self._fixed, hooks)
            return program.losses(terms).total(), (aux, [x for x in noted.inputs if own(x)])

        shift = jnp.zeros(output.value.shape, output.value.dtype)
        (value, (aux, noted)), error = jax.value_and_grad(moved, has_aux=True)(shift)
        return (value, [x.value for x in noted]), (error, noted, aux)

    def _feedback(self, x: Activation, output: Activation, error: Array) -> Array:
        """The error times a random matrix, in the shape of a layer's input."""
        assert x.axes is not None
        assert output.axes is not None
        place = x.axes.index("example")
        error = jnp.moveaxis(error, output.axes.index("example"), 0)
        error = error.reshape(len(error), -1)
        rest = [n for i, n in enumerate(x.value.shape) if i != place]
        size = math.prod(rest)
        signs = rademacher(x.key, (size, error.shape[1])).astype(error.dtype)
        sent = math.sqrt(self.gain / size) * error @ signs.T
        return jnp.moveaxis(sent.reshape(-1, *rest), 0, place).astype(x.value.dtype)


def _same(a: Activation, output: Activation) -> bool:
    """Whether an activation is the output layer's."""
    return a.last and bool(a.terms & output.terms)
