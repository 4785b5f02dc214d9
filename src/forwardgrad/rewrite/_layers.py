"""Evaluating a program with something else in the place of its activations."""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from forwardgrad._errors import InputError
from forwardgrad.rewrite._axes import Places
from forwardgrad.rewrite._flow import MIXED, Part, Place, normal, tangent_program
from forwardgrad.rewrite._plan import Layer, Output, Plan
from forwardgrad.rewrite._primitives import CUSTOM_JVP, line_of, names, programs, shape_of
from forwardgrad.rewrite._trace import Array, evaluate, is_inexact
from forwardgrad.rewrite._walk import PROGRAMS, AbstractWalk
from forwardgrad.rewrite._workers import key_of_worker, untyped, varying


class Site(NamedTuple):
    """One of a program's layers, and in loops the numbers of the iterations, from outside in.

    `workers` are the axes of a mesh along which each worker has one of its own.
    """

    number: int
    iterations: tuple[jax.Array, ...]
    workers: tuple[str, ...] = ()

    def key(self, key: jax.Array) -> jax.Array:
        """A random key for this place."""
        for number in (self.number, *self.iterations):
            key = jax.random.fold_in(key, number)
        return key_of_worker(key, self.workers)


class Activation(eqx.Module):
    """What a layer computes, or what goes into one, as a hook gets it.

    - `terms`: the losses that it can change.
    - `places`: where in it the axes of these losses are.
    - `mask`: None, or False where a ReLU has no slope.
    - `last`: whether no layer comes between it and the losses.
    - `moves`: whether it has a derivative with respect to parameters.
    - `line`: the line of the user's code.
    - `variable`: its name in the program.
    - `stacked`: the number of loops whose iterations the arrays hold along their first axes.
    """

    value: Array
    iterations: tuple[jax.Array, ...]
    mask: jax.Array | None
    number: int = eqx.field(static=True)
    places: tuple[tuple[Any, Place], ...] = eqx.field(static=True, default=())
    last: bool = eqx.field(static=True, default=False)
    moves: bool = eqx.field(static=True, default=True)
    line: str = eqx.field(static=True, default="")
    variable: Var | None = eqx.field(static=True, default=None)
    stacked: int = eqx.field(static=True, default=0)
    workers: tuple[str, ...] = eqx.field(static=True, default=())

    @property
    def site(self) -> Site:
        """Which one it is."""
        return Site(self.number, self.iterations, self.workers)

    @property
    def terms(self) -> frozenset[int]:
        """The terms of the losses that it can change."""
        return frozenset(term for (term, _), _ in self.places)

    def place(self, term: int, name: str) -> Place:
        """Where one axis of one term is, loops being the first axes."""
        place = dict(self.places).get((term, name), MIXED)
        if place.parts is None:
            return place
        parts = tuple(p._replace(axis=p.axis + self.stacked) for p in place.parts)
        return Place(parts, place.mixed)

    @property
    def kept(self) -> frozenset[int]:
        """Its axes that axes of the losses are known to lie along, loops being the first."""
        found = [p.axis for _, place in self.places for p in place.parts or ()]
        return frozenset(axis + self.stacked for axis in found)

    def each(self, function: Callable, *args: Any) -> Any:
        """`function(activation, *args)` of the activation of every iteration, stacked alike."""
        if not self.stacked:
            return function(self, *args)
        iterations = dataclasses.replace(self, stacked=self.stacked - 1)
        return jax.vmap(lambda a, *args: a.each(function, *args))(iterations, *args)


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What is replaced in an evaluation.

    - `activation(a)` returns what replaces an activation.
    - `layer_input(x)` returns what replaces the data that goes into a layer.
    - `product(layer, site, arrays)` returns what a product computes.
    - `held(x)` replaces the values behind `stop_gradient`, and where a ReLU has no slope.
    """

    activation: Callable[[Activation], jax.Array] | None = None
    layer_input: Callable[[Activation], jax.Array] | None = None
    product: Callable[[Layer, Site, Sequence[Array]], jax.Array] | None = None
    held: Callable[[Array], jax.Array] | None = None


class Noted(NamedTuple):
    """What an evaluation's hooks were called with, in the order of the calls."""

    activations: list[Activation]
    inputs: list[Activation]


class LayerWalk(AbstractWalk):
    """Evaluates a program with hooks at what goes into its layers and what comes out."""

    def __init__(self, plan: Plan, hooks: Hooks, iterations: tuple[jax.Array, ...] = ()):
        self._plan, self._hooks, self._iterations = plan, hooks, iterations
        self._noted, self._read = Noted([], []), {}

    def iteration(self, i: jax.Array) -> "LayerWalk":
        """The walk through the body of a loop in its i-th iteration."""
        return LayerWalk(self._plan, self._hooks, (*self._iterations, i))

    @property
    def noted(self) -> Noted:
        """What the hooks were called with so far."""
        return self._noted

    def note(self, stacked: Noted) -> None:
        """Take over what was noted in the iterations of a loop."""
        for own, inner in zip(self._noted, stacked, strict=True):
            own += [dataclasses.replace(a, stacked=a.stacked + 1) for a in inner]

    def array(self, value: Array) -> Array:
        """`value`."""
        return value

    def equation(self, eqn: JaxprEqn, invals: Sequence[Array]) -> Sequence[Array]:
        """The outputs of one equation."""
        layer = self._plan.layers.get(id(eqn))
        if layer is not None:
            outs = self._layer(layer, invals)
        elif eqn.primitive.name == "scan" and self._has_layers(eqn):
            outs = PROGRAMS["scan"](self, eqn, invals)
            assert outs is not None
        elif eqn.primitive.name == "stop_gradient" and self._hooks.held is not None:
            outs = [self._hooks.held(x) for x in invals]
        else:
            outs = self._evaluate(eqn, invals)
        return [self._replaced(v, out) for v, out in zip(eqn.outvars, outs, strict=True)]

    def _has_layers(self, eqn: JaxprEqn) -> bool:
        def anywhere(jaxpr: Jaxpr) -> bool:
            return any(
                id(e) in self._plan.layers
                or any(v in self._plan.outputs for v in e.outvars)
                or (e.primitive.name == "scan" and anywhere(programs(e)[0].jaxpr))
                for e in jaxpr.eqns
            )

        return anywhere(programs(eqn)[0].jaxpr)

    def _layer(self, layer: Layer, invals: Sequence[Array]) -> Sequence[Array]:
        eqn, arrays = layer.eqn, list(invals)
        if self._hooks.layer_input is not None:
            for i in layer.data:
                if i != layer.merged and is_inexact(eqn.invars[i]):
                    arrays[i] = self._input(eqn.invars[i], layer, i, arrays[i])
        if self._hooks.product is not None and any(self._plan.places(v) for v in eqn.outvars):
            return [self._hooks.product(layer, Site(layer.number, self._iterations), arrays)]
        return self._evaluate(eqn, arrays)

    def _evaluate(self, eqn: JaxprEqn, arrays: Sequence[Array]) -> Sequence[Array]:
        """The outputs of an equation that holds no activations."""
        held, name = self._hooks.held, eqn.primitive.name
        if held is None or name not in ("scan", "while", "cond"):
            return evaluate(eqn, arrays)
        if not any("stop_gradient" in names(program.jaxpr) for program in programs(eqn)):
            return evaluate(eqn, arrays)
        outs = PROGRAMS[name](LayerWalk(self._plan, Hooks(held=held)), eqn, arrays)
        assert outs is not None
        return outs

    def _input(self, atom: Any, layer: Layer, position: int, value: Array) -> Array:
        """What takes the place of data that goes into layers, the same for all of them."""
        if atom not in self._read:
            data = Activation(
                value,
                self._iterations,
                None,
                layer.first_input + position,
                places=tuple(self._plan.places(atom).items()),
                moves=layer.moves,
                line=line_of(layer.eqn),
                variable=atom,
            )
            self._noted.inputs.append(data)
            assert self._hooks.layer_input is not None
            self._read[atom] = self._hooks.layer_input(data)
        return self._read[atom]

    def _replaced(self, v: Var, z: Array) -> Array:
        """What takes the place of a variable's value."""
        output = self._plan.outputs.get(v)
        if output is None or self._hooks.activation is None or not is_inexact(v):
            return z
        places = self._plan.places(v)
        if not places or self._plan.is_on_its_way(v):
            return z
        if output.names is not None:
            named = _named(places, output, shape_of(v))
            places = {
                k: p if p.mixed and not self._plan.rules else named[k] for k, p in places.items()
            }
        places = {k: self._plan.flow.located(v, k) if p == MIXED else p for k, p in places.items()}
        mask, held = _mask(output, z), self._hooks.held
        activation = Activation(
            z,
            self._iterations,
            mask if mask is None or held is None else held(mask),
            output.number,
            places=tuple(places.items()),
            last=self._plan.is_last(v),
            line=line_of(output.eqn),
            variable=v,
            workers=tuple(self._plan.collectives & (varying(z) | untyped(self._plan.collectives))),
        )
        self._noted.activations.append(activation)
        return self._hooks.activation(activation)


def _named(places: Places, output: Output, shape: Sequence[int]) -> Places:
    """Where axes are, by the names of a mark."""
    assert output.names is not None
    found = {}
    for (term, name), place in places.items():
        axes = [i for i, n in enumerate(output.names) if n == name and name is not None]
        parts = normal([Part(i, 1, shape[i]) for i in axes])
        if axes:
            _check_mark(name, parts, place, output, shape)
        found[term, name] = Place(parts, False) if axes else place
    return found


def _check_mark(
    name: str | None, marked: Any, place: Place, output: Output, shape: Sequence[int]
) -> None:
    """Raise an `InputError` for a mark that puts a name elsewhere than where it is known to be."""
    known = place.parts or ()
    followed = not place.mixed and all(p.through is None for p in known)
    size, own = (math.prod(p.size for p in parts) for parts in (known, marked))
    if followed and size == own > 1 and marked != known:
        where = " and ".join(dict.fromkeys(str(p.axis) for p in known if p.axis >= 0))
        raise InputError(
            f"activation must not call an axis {name!r} that is another one: at "
            f"{line_of(output.eqn)} the names are {output.names} for a shape {tuple(shape)}, and "
            f"{name!r} is {f'axis {where}' if where else 'a loop'}"
        )


def _mask(output: Output, z: Array) -> jax.Array | None:
    """Where the ReLU that alone uses an activation has a slope."""
    threshold = None if output.user is None else _threshold(output.user)
    if output.user is None or threshold is None:
        return None
    # Where both are the same, JAX's `max` has half a slope.
    has_slope = operator.ge if output.user.primitive.name == "max" else operator.gt
    return jax.lax.stop_gradient(has_slope(z, threshold))


def _threshold(eqn: JaxprEqn) -> Any:
    """The constant c of an equation that is max(z, c), and has no slope below; else None."""
    if eqn.primitive.name == CUSTOM_JVP:
        rule = tangent_program(eqn)
        return None if rule is None else _threshold_of_rule(rule.jaxpr)
    if eqn.primitive.name == "clamp":
        least = eqn.invars[0]
        return least.val if isinstance(least, Literal) else None
    if eqn.primitive.name != "max":
        return None
    constants = [a.val for a in eqn.invars if isinstance(a, Literal)]
    return constants[0] if constants else None


FILLS = ("broadcast_in_dim", "convert_element_type", "reshard", "sharding_constraint")
"""What makes an array of a constant; on a mesh, JAX says where."""


def _threshold_of_rule(rule: Jaxpr) -> Any:
    """The same, where the derivative is given by a rule: `where(z > c, dz, 0)`."""
    made = {v: eqn for eqn in rule.eqns for v in eqn.outvars}
    last = made.get(rule.outvars[-1]) if isinstance(rule.outvars[-1], Var) else None
    if last is None or last.primitive.name != "select_n" or len(last.invars) != 3:
        return None
    where, zero, moved = last.invars
    while not isinstance(zero, Literal):
        full = made.get(zero)
        if full is None or full.primitive.name not in FILLS:
            return None
        zero = full.invars[0]
    test = None if isinstance(where, Literal) else made.get(where)
    if zero.val != 0 or moved is not rule.invars[-1]:
        return None
    if test is None or test.primitive.name != "gt" or test.invars[0] is not rule.invars[0]:
        return None
    return test.invars[1].val if isinstance(test.invars[1], Literal) else None
