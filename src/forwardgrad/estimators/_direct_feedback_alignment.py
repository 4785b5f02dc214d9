"""The output's error, sent to every layer at once."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from forwardgrad._errors import InputError
from forwardgrad.estimators._digits import Digits
from forwardgrad.estimators._distributions import draw, feedback_key
from forwardgrad.estimators._feedback import AbstractFeedback, Feedback
from forwardgrad.estimators._steering import (
    at_iterations,
    check_one_by_one,
    check_products,
    not_differentiable,
    pulled_back,
    zero,
)
from forwardgrad.rewrite import (
    Activation,
    Hooks,
    Part,
    Program,
    key_of_worker,
    placed_like,
    summed_change,
    varying_like,
)


class _Way(NamedTuple):
    """How the error of an output layer comes to a layer's input.

    Every place that both have gets the error of that place: `positions` are axes of the output,
    `digits` where they are in the input. Of the output, `units` entries are left for each of them,
    of the input `entries`, of which `scale` in one iteration of loops over layers. Where these are
    complex, so is the matrix: both parts get an error of their own. Along the axes `workers` each
    worker has a matrix of its own.
    """

    number: int
    output: int
    positions: tuple[int, ...]
    digits: tuple[Part, ...]
    units: int
    entries: int
    scale: int
    is_complex: bool
    workers: tuple[str, ...]

    def gathered(self, error: Array) -> Array:
        """The error with an axis for each digit, and one for the units."""
        rest = [i for i in range(error.ndim) if i not in self.positions]
        error = error.transpose(*self.positions, *rest)
        return error.reshape(*[digit.size for digit in self.digits], -1)

    def spread(self, sent: Array, shape: Sequence[int]) -> Array:
        """What has an axis for each digit, and one for the entries, in the input's shape."""
        return Digits(tuple(shape), self.digits).back(sent)


class DirectFeedbackAlignment(AbstractFeedback):
    r"""Direct feedback alignment (DFA): the output's error goes straight to every layer.

    Let $e = \partial L / \partial y$ be the error of the output layer. The input $x$ of every
    matrix product or convolution after the first gets

    $$\hat g_x = e B^\top,$$

    whatever lies between $x$ and the output. Each $x$ has its own fixed matrix $B$ of random signs,
    drawn once from the seed. What lies between $x$ and the product before it (a nonlinearity, a
    normalisation, a scale) is differentiated as usual. The output layer gets its exact gradient. If
    only scales come after $x$, the value that they are multiplied with gets feedback as well. If
    $x$ is complex, both parts of $B$ are random signs. Workers of a `shard_map` with weights of
    their own have matrices of their own.

    `fun` must return [`forwardgrad.Losses`][] with an axis of examples, because every example has
    its own error. It must have an output layer that hidden layers lead to. A readout whose inputs
    are constants to it does not count as one; it gets its exact gradient.

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

    def _estimate(
        self, program: Program, state: Feedback | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        check_one_by_one(program, "DirectFeedbackAlignment")
        check_products(program, "DirectFeedbackAlignment")
        outputs = _outputs(program)
        # What goes into a layer is cut off from what it comes from: see `ActivityPerturbation`.
        (value, _), pullback, (inputs, aux) = jax.vjp(
            lambda leaves, shifts: _forward(program, leaves, outputs, shifts),
            program.leaves,
            _no_shifts(program, outputs),
            has_aux=True,
        )
        unused = [zero(x.value) for x in inputs]
        last, errors = pulled_back(pullback, (jnp.ones_like(value), unused))
        ways = [_ways(program, outputs, x) for x in inputs]
        gradients = [
            self._feedback(x, of_x, errors, state) for x, of_x in zip(inputs, ways, strict=True)
        ]
        hidden, _ = pulled_back(pullback, (zero(value), gradients))
        grads = jax.tree.map(jnp.add, last, hidden)
        value, aux, grads = not_differentiable((value, aux, grads), "DirectFeedbackAlignment")
        return (value, program.auxiliary(aux)), program.treedef.unflatten(grads)

    def _weights(self, program: Program) -> dict[int, Array]:
        """For each input that gets feedback, a matrix for each output layer that it changes."""
        outputs = _outputs(program)
        inputs = jax.eval_shape(
            lambda leaves: _forward(program, leaves, outputs, _no_shifts(program, outputs))[1][0],
            program.leaves,
        )
        ways = [way for x in inputs for way in _ways(program, outputs, x)]
        return {way.number: self._matrix(way) for way in ways}

    def _matrix(self, way: _Way) -> Array:
        key = jax.random.fold_in(feedback_key(self.seed), way.number)
        key = key_of_worker(key, way.workers)
        dtype = jnp.complex64 if way.is_complex else jnp.float32
        return draw(key, (way.entries, way.units), "rademacher", dtype=dtype)

    def _feedback(
        self, x: Activation, ways: Sequence[_Way], errors: Sequence[Array], state: Feedback | None
    ) -> Array:
        """The errors times random matrices, in the shape of a layer's input."""
        total: Any = jnp.zeros_like(x.value)
        for way in ways:
            signs = self._matrix(way) if state is None else state.arrays[way.number]
            error = way.gathered(errors[way.output])
            if way.is_complex:
                error = error.astype(jnp.promote_types(error.dtype, signs.dtype))
            signs = placed_like(signs.astype(error.dtype), error)
            sent = math.sqrt(self.gain / way.scale) * error @ signs.T
            total = total + way.spread(sent, x.value.shape)
        total = summed_change(total, x.value, frozenset())
        return placed_like(total.astype(x.value.dtype), x.value)


def _outputs(program: Program) -> list[Any]:
    """The variables of the output layers that hidden layers lead to."""
    plan = program.plan
    found = {v: plan.is_last(v) for v in plan.outputs if plan.terms(v)}
    hidden = frozenset().union(*[plan.terms(v) for v, last in found.items() if not last])
    outputs = [v for v, last in found.items() if last and (plan.terms(v) & hidden or not hidden)]
    if not outputs:
        raise InputError("DirectFeedbackAlignment needs an output layer, got none")
    for v in outputs:
        places = [place for (_, name), place in plan.places(v).items() if name == "example"]
        if not places:
            raise InputError(
                "DirectFeedbackAlignment needs a loss for every example: return "
                "forwardgrad.Losses([losses], [('example',)])"
            )
    return outputs


def _no_shifts(program: Program, outputs: Sequence[Any]) -> list[Array]:
    """Zeros in the shapes of the output layers, the loops around them first."""
    shapes = [(*program.plan.outputs[v].loops, *v.aval.shape) for v in outputs]
    # A worker's errors are its own: what all have in common would get the sum of theirs.
    return [
        varying_like(jnp.zeros(shape, v.aval.dtype), v.aval)
        for shape, v in zip(shapes, outputs, strict=True)
    ]


def _forward(
    program: Program, leaves: list[Array], outputs: Sequence[Any], shifts: Sequence[Array]
):
    """Value and layers' inputs; what is known of the inputs, and the auxiliary data.

    The value's derivatives by `shifts`, which are zeros, are the errors of the output layers.
    """
    numbers = {program.plan.outputs[v].number: i for i, v in enumerate(outputs)}
    reached = frozenset().union(*[program.plan.terms(v) for v in outputs])

    def gets_feedback(x):
        return x.moves and bool(x.terms & reached) and program.plan.needs_feedback(x.variable)

    def shift(a):
        if a.site.number not in numbers:
            return a.value
        return a.value + at_iterations(shifts[numbers[a.site.number]], a.site)

    hooks = Hooks(
        activation=shift,
        layer_input=lambda x: jax.lax.stop_gradient(x.value) if gets_feedback(x) else x.value,
    )
    terms, aux, noted = program.with_hooks(leaves, hooks)
    inputs = [x for x in noted.inputs if gets_feedback(x)]
    return (program.losses(terms).total(), [x.value for x in inputs]), (inputs, aux)


def _ways(program: Program, outputs: Sequence[Any], x: Activation) -> list[_Way]:
    """How errors come to a layer's input, one way from each output that it changes."""
    found = []
    for o, v in enumerate(outputs if x.value.size else ()):
        if not x.terms & program.plan.terms(v):
            continue
        assert x.variable is not None
        places = program.places_towards(v).get(x.variable)
        loops = len(program.plan.outputs[v].loops)
        shape = (*program.plan.outputs[v].loops, *v.aval.shape)
        digits: dict[int, tuple[Part, ...]] = {}
        for axis in range(len(shape)):
            place = (places or {}).get((0, str(axis)))
            if place is not None and place.parts and place.parts[0].through is None:
                digits[axis] = tuple(p._replace(axis=p.axis + x.stacked) for p in place.parts)
        _check_examples(program, v, digits, loops, x)
        flat = tuple(p for own in digits.values() for p in own)
        held = math.prod(p.size for p in flat)
        entries = math.prod(x.value.shape) // held
        layers = [
            n for i, n in enumerate(x.value.shape[: x.stacked]) if i not in [p.axis for p in flat]
        ]
        units = math.prod(shape) // math.prod(shape[axis] for axis in digits)
        number = x.site.number * len(outputs) + o
        found.append(
            _Way(
                number,
                o,
                tuple(digits),
                flat,
                units,
                entries,
                entries // math.prod(layers),
                jnp.issubdtype(x.value.dtype, jnp.complexfloating),
                program.plan.workers_of(v, x.variable),
            )
        )
    return found


def _check_examples(
    program: Program, v: Any, digits: Mapping[int, Any], loops: int, x: Activation
) -> None:
    """Raise an `InputError` unless the examples' axis is among those that both have."""
    for (_, name), place in program.plan.places(v).items():
        if name != "example":
            continue
        if place.parts is None or any(p.axis + loops not in digits for p in place.parts):
            raise InputError(
                "DirectFeedbackAlignment needs the axis of the examples in the input of every "
                f"layer; it is unclear in the one of shape {x.value.shape[x.stacked :]} at {x.line}"
            )
