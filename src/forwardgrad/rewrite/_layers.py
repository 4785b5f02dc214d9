"""Activations of a program: what its parameters make of data, and where to take hold of it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import JaxprEqn, Literal, Var

from forwardgrad._errors import InputError
from forwardgrad.rewrite._dependence import (
    BRANCHES,
    ELEMENTWISE,
    LATER,
    MARK,
    MARKED,
    MOVES,
    Dependence,
    Terms,
    is_mark,
)
from forwardgrad.rewrite._examples import UNKNOWN
from forwardgrad.rewrite._perturbed import Label, Perturbed
from forwardgrad.rewrite._walk import (
    PROGRAMS,
    AbstractWalk,
    Array,
    Value,
    evaluate,
    holds_custom_vjp,
    programs,
)

PRODUCTS = ("dot_general", "conv_general_dilated")


def activation(z: jax.Array, *axes: str) -> jax.Array:
    """`z`, marked as an activation, with the names of its axes.

    Without marks, every layer's output is an activation, and of its axes only that of the examples
    is known. An entry of a marked one is taken to influence those losses alone that have the same
    place along axes of the same name.

    **Arguments:**

    - `z`: the activation, before its nonlinearity.
    - `axes`: a name for each axis: those of [`forwardgrad.Losses`][], or any other.

    **Returns:**

    `z`.
    """
    return checkpoint_name(z, MARK + ",".join(axes))


@dataclasses.dataclass(eq=False)
class Pending:
    """What a layer has computed, before anything uses it."""

    value: jax.Array
    variable: Var
    axes: tuple[str, ...] | None = None
    settled: jax.Array | None = None


class Activation(eqx.Module):
    """What a layer computes, or what goes into one, as a hook gets it.

    `key` is a random key of its own; `axes` names its axes, where a mark or the losses' axis of
    examples tells; `mask` is None, or False where a ReLU has no slope; `terms` are those of the
    losses that it can change; `last` says that no layer comes between it and them; `stacked` counts
    the loops whose iterations the arrays hold along their first axes.
    """

    value: jax.Array
    key: jax.Array
    mask: jax.Array | None = None
    axes: tuple[str, ...] | None = eqx.field(static=True, default=None)
    terms: frozenset[int] = eqx.field(static=True, default=frozenset())
    last: bool = eqx.field(static=True, default=False)
    stacked: int = eqx.field(static=True, default=0)

    def each(self, function: Callable[["Activation"], jax.Array]) -> jax.Array:
        """`function` of the activation, or of that of every iteration, stacked alike."""
        if not self.stacked:
            return function(self)
        iterations = dataclasses.replace(self, stacked=self.stacked - 1)
        return jax.vmap(lambda a: a.each(function))(iterations)


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What is to be different in an evaluation.

    `activation(a)` returns what takes an activation's place, `layer_input(x)` what takes the place
    of data that goes into a layer, and `product(key, eqn, arrays, weight)` the output of a matrix
    product or convolution, the operand at position `weight` being the weight.
    """

    activation: Callable[[Activation], jax.Array] | None = None
    layer_input: Callable[[Activation], jax.Array] | None = None
    product: Callable[[jax.Array, JaxprEqn, Sequence[Array], int], jax.Array] | None = None


class Noted(NamedTuple):
    """What an evaluation's hooks were called with, in the order of the calls."""

    activations: list[Activation]
    inputs: list[Activation]


class LayerWalk(AbstractWalk):
    """Evaluates a program layer by layer, with hooks at what goes in and what comes out.

    A *layer* is an equation in which parameters meet data: a product, a convolution, a lookup, but
    also an added bias or a learned scale. What it computes is an activation as soon as anything
    but another elementwise layer uses it, so that a product and its bias are one.

    **Arguments:**

    - `dependence`: the program's.
    - `key`: a random key.
    - `hooks`: what is to be different.
    - `count`: a list with the number of keys that were used, shared with the bodies of loops.
    """

    def __init__(self, dependence: Dependence, key: jax.Array, hooks: Hooks, count: list[int]):
        self._dependence, self._key, self._hooks, self._count = dependence, key, hooks, count
        self._noted = Noted([], [])

    def iteration(self, i: jax.Array) -> "LayerWalk":
        """The walk through the body of a loop in its i-th iteration."""
        key = jax.random.fold_in(self._key, i)
        return LayerWalk(self._dependence, key, self._hooks, self._count)

    @property
    def noted(self) -> Noted:
        """What the hooks were called with so far."""
        return self._noted

    def note(self, stacked: Noted) -> None:
        """Take over what was noted in the iterations of a loop."""
        for own, inner in zip(self._noted, stacked, strict=True):
            own += [dataclasses.replace(a, stacked=a.stacked + 1) for a in inner]

    def record(self, contracted: Sequence[Label] = (), stacked: Sequence[Label] = ()) -> None:
        """Nothing is noted."""

    def array(self, value: Value) -> Array:
        """`value` as an array, and in the place of an activation what is to be there."""
        if isinstance(value, Perturbed):
            return value.value
        return self._settle(value, None) if isinstance(value, Pending) else value

    def equation(self, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value]:
        """The outputs of one equation."""
        name = eqn.primitive.name
        with_params = any(isinstance(v, Perturbed) for v in invals)
        if with_params and name == "while":
            raise InputError(
                "a parameter enters a while_loop, which has no reverse mode, and this estimator "
                "needs that of every single layer; WeightPerturbation() needs none"
            )
        with_pending = any(isinstance(v, Pending) for v in invals)
        if is_mark(eqn):
            axes = tuple(eqn.params["name"].removeprefix(MARK).split(","))
            value = invals[0].value if with_pending else invals[0]
            return [Pending(value, eqn.outvars[0], axes)]
        if name in BRANCHES and self._hooks.product is None:
            return self._branches(eqn, invals, with_params)
        if self._is_program(eqn) and (with_params or with_pending or holds_custom_vjp(eqn)):
            if name == "scan":
                invals = [v if isinstance(v, Perturbed) else self.array(v) for v in invals]
            return self._from_inside(PROGRAMS.get(name, PROGRAMS["jit"])(self, eqn, invals), eqn)
        if name in MOVES and with_pending and self._only_moved(invals[0]):
            return [Pending(out, v) for out, v in _pairs(evaluate(eqn, [invals[0].value]), eqn)]
        if not with_params:
            arrays = [self._settle(v, eqn) if isinstance(v, Pending) else v for v in invals]
            return evaluate(eqn, arrays)
        if any(
            not (isinstance(v, Perturbed) or isinstance(a, Literal))
            for v, a in zip(invals, eqn.invars, strict=True)
        ):
            return self._layer(eqn, invals)
        return [parameter(out) for out in evaluate(eqn, [self.array(v) for v in invals])]

    def _is_program(self, eqn: JaxprEqn) -> bool:
        name = eqn.primitive.name
        # The derivative of a function with a rule of its own does not know of other products.
        inline = self._hooks.product is not None and name.startswith("custom_jvp_call")
        return name in PROGRAMS or inline

    def _from_inside(self, outs: Sequence[Value], eqn: JaxprEqn) -> Sequence[Value]:
        """A program's outputs, by the names that they have outside."""
        for out, variable in zip(outs, eqn.outvars, strict=True):
            if isinstance(out, Pending) and self._dependence.uses[out.variable] == 1:
                out.variable = variable
        return outs

    def _only_moved(self, value: Value) -> bool:
        """Whether what a layer computes is used by the equation at hand alone."""
        unmarked = isinstance(value, Pending) and value.axes is None
        return unmarked and self._dependence.uses[value.variable] == 1

    def _branches(
        self, eqn: JaxprEqn, invals: Sequence[Value], with_params: bool
    ) -> Sequence[Value]:
        """A `cond` or `while_loop`, which is one layer if parameters enter it."""
        inside = LayerWalk(self._dependence, self._key, Hooks(), self._count)

        def apply(arrays: Sequence[Array]) -> Sequence[Array]:
            return PROGRAMS[eqn.primitive.name](inside, eqn, arrays)

        if not with_params:
            return apply([self.array(v) for v in invals])
        return [Pending(out, v) for out, v in _pairs(apply(self._inputs(eqn, invals)), eqn)]

    def _axes(self, variable: Any) -> tuple[str, ...] | None:
        axis = self._dependence.examples.get(variable)
        if axis is None or axis == UNKNOWN:
            return None
        return tuple("example" if i == axis else "unit" for i in range(len(variable.aval.shape)))

    def _next_key(self) -> jax.Array:
        self._count[0] += 1
        return jax.random.fold_in(self._key, self._count[0])

    def _layer(self, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value]:
        pending = [v for v in invals if isinstance(v, Pending)]
        if eqn.primitive.name in ELEMENTWISE and len(pending) == 1:
            outs = evaluate(
                eqn, [self.array(v) if v is not pending[0] else v.value for v in invals]
            )
            return [Pending(out, v, pending[0].axes) for out, v in _pairs(outs, eqn)]
        arrays = self._inputs(eqn, invals)
        weight = [isinstance(v, Perturbed) for v in invals].index(True)
        if self._hooks.product is None or eqn.primitive.name not in PRODUCTS:
            outs = evaluate(eqn, arrays)
        else:
            outs = [self._hooks.product(self._next_key(), eqn, arrays, weight)]
        return [Pending(out, v) for out, v in _pairs(outs, eqn)]

    def _inputs(self, eqn: JaxprEqn, invals: Sequence[Value]) -> list[Array]:
        """What goes into a layer: its parameters, and data as the hook has them."""
        terms = frozenset().union(*[self._dependence.of(v) for v in eqn.outvars])

        def read(value: Value, atom: Any) -> Array:
            array = self.array(value)
            if self._hooks.layer_input is None or isinstance(value, Perturbed):
                return array
            if isinstance(atom, Literal) or not jnp.issubdtype(jnp.result_type(array), jnp.inexact):
                return array
            data = Activation(
                array, self._next_key(), axes=self._axes(atom), terms=terms - {LATER, MARKED}
            )
            self._noted.inputs.append(data)
            return self._hooks.layer_input(data)

        return [read(v, a) for v, a in zip(invals, eqn.invars, strict=True)]

    def _settle(self, pending: Pending, user: JaxprEqn | None) -> jax.Array:
        """What takes the place of an activation, the same for all that use it."""
        if pending.settled is None:
            terms = self._dependence.of(pending.variable)
            if MARKED in terms and LATER not in terms:
                # It is on its way to a mark.
                return pending.value
            pending.settled = self._replaced(pending, terms, user)
        return pending.settled

    def _replaced(self, pending: Pending, terms: Terms, user: JaxprEqn | None) -> jax.Array:
        z, losses = pending.value, terms - {LATER, MARKED}
        if self._hooks.activation is None or not losses or not jnp.issubdtype(z.dtype, jnp.inexact):
            return z
        activation = Activation(
            z,
            self._next_key(),
            self._mask(pending, user),
            axes=pending.axes or self._axes(pending.variable),
            terms=losses,
            last=LATER not in terms,
        )
        self._noted.activations.append(activation)
        return self._hooks.activation(activation)

    def _mask(self, pending: Pending, user: JaxprEqn | None) -> jax.Array | None:
        """Where the ReLU that alone uses an activation has a slope."""
        threshold = None if user is None else _threshold(user)
        if threshold is None or self._dependence.uses[pending.variable] != 1:
            return None
        return jax.lax.stop_gradient(pending.value > threshold)


def _pairs(outs: Sequence[Array], eqn: JaxprEqn) -> list[tuple[Array, Var]]:
    return list(zip(outs, eqn.outvars, strict=True))


def _threshold(eqn: JaxprEqn) -> Any:
    """The constant c of an equation that is max(z, c), None for any other."""
    inner = programs(eqn)
    while len(inner) == 1 and len(inner[0].jaxpr.eqns) == 1:
        (eqn,) = inner[0].jaxpr.eqns
        inner = programs(eqn)
    if eqn.primitive.name == "clamp":
        least = eqn.invars[0]
        return least.val if isinstance(least, Literal) else None
    if eqn.primitive.name != "max":
        return None
    constants = [a.val for a in eqn.invars if isinstance(a, Literal)]
    return constants[0] if constants else None


def parameter(value: Any) -> Perturbed:
    """A value that depends on parameters alone."""
    return Perturbed(value, ((),) * jnp.ndim(value), ())
