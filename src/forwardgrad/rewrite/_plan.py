"""What is a layer in a program, what its activations are, and what comes after what.

A *weight* is what parameters alone make, with constants or without: `w / sqrt(n)`, `w * mask`,
`W0 + A @ B`. A *layer* is an equation in which weights meet data. What it computes is an
*activation*, together with what a bias or a scale does to it right after.
"""

import collections
import copy
import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from forwardgrad.rewrite._axes import NamedAxes, Places, may_have_own, places_of_terms
from forwardgrad.rewrite._differing import differing
from forwardgrad.rewrite._flow import MIXED, UNKNOWN, Influence, Terms
from forwardgrad.rewrite._mark import mark_p
from forwardgrad.rewrite._primitives import (
    BRANCHES,
    CONSTANT,
    CUSTOM_JVP,
    CUSTOM_VJP,
    MATRICES,
    MERGED,
    MOVES,
    PRODUCTS,
    SENT_BACK,
    SHARD_MAP,
    is_ref,
    programs,
    scan_counts,
)
from forwardgrad.rewrite._trace import is_inexact

LATER, MARKED = "a later layer uses it", "it becomes a marked activation"
OPEN, MET = "errors come to it without a matrix", "it goes into a layer"
"""Among what a variable can change."""

WHOLE = (*BRANCHES, CUSTOM_JVP, CUSTOM_VJP, SHARD_MAP)
"""Equations with programs inside that are one layer if weights meet data in them."""


class Kind(NamedTuple):
    """Whether a value has a derivative by the parameters, and whether it is data."""

    moves: bool = False
    data: bool = False

    def __or__(self, other: "Kind") -> "Kind":
        return Kind(self.moves or other.moves, self.data or other.data)


WEIGHT = Kind(moves=True)


@dataclasses.dataclass(frozen=True)
class Layer:
    """An equation in which weights meet data: the positions of both among its inputs.

    `merged` is the position of an activation to which it only adds a bias, or applies a scale.
    `deep` says that it holds several layers, one after another. `moves` says that its data have a
    derivative with respect to parameters. `loops` are the lengths of the loops around it,
    `own_loops` the positions of those in which its weights change, and `workers` the axes along
    which each worker has a part of them.
    """

    eqn: JaxprEqn
    number: int
    weights: tuple[int, ...]
    data: tuple[int, ...]
    merged: int | None
    deep: bool
    moves: bool
    loops: tuple[int, ...]
    own_loops: tuple[int, ...]
    workers: tuple[str, ...]
    first_input: int

    @property
    def is_product(self) -> bool:
        """Whether it is one matrix product or convolution."""
        return self.eqn.primitive.name in PRODUCTS

    @property
    def needs_matrix(self) -> bool:
        """Whether errors come back through it by a matrix, not entry by entry."""
        return self.eqn.primitive.name not in SENT_BACK


@dataclasses.dataclass(frozen=True)
class Output:
    """A variable that is an activation: the names that a mark gives its axes, and what uses it."""

    number: int
    eqn: JaxprEqn
    names: tuple[str | None, ...] | None
    user: JaxprEqn | None
    loops: tuple[int, ...]


class Plan:
    """The layers and activations of a program.

    **Arguments:**

    - `closed`: the program, whose inputs are its parameters.
    - `axes`: the names of the axes of its first outputs, which are the terms of the losses.
    - `given`: constants that are arguments of the user's function.
    - `collectives`: the axes along which workers exchange what they compute.
    - `rules`: whether losses that split up their derivative by a rule are kept whole. Marks are
        about these rules; of values, what is mixed stays mixed whatever a mark says.
    """

    def __init__(
        self,
        closed: ClosedJaxpr,
        axes: Sequence[Sequence[str]],
        given: Sequence[Any],
        collectives: frozenset[str],
        rules: bool = True,
    ):
        self.rules = rules
        jaxpr = closed.jaxpr
        self.flow = NamedAxes(closed)
        self.flow.run(jaxpr, places_of_terms(jaxpr, axes))
        self.uses = _uses(jaxpr)
        self._differs = differing(jaxpr)
        self.collectives = collectives
        self._by_example = any("example" in names for names in axes)
        self._met: frozenset[int] = frozenset()
        self._find(closed, axes, given)
        # What every loss depends on may be data that are mixed later, or a constant of a weight; if
        # no layer comes of the weight, it is data.
        unmet = [e for e in self._constants if self.terms(e.outvars[0]) and not self._meets(e)]
        if unmet:
            self._met = frozenset(map(id, unmet))
            self._find(closed, axes, given)

    def _meets(self, eqn: JaxprEqn) -> bool:
        return any(MET in (self.order.of(v) or ()) for v in eqn.outvars)

    def _find(
        self, closed: ClosedJaxpr, axes: Sequence[Sequence[str]], given: Sequence[Any]
    ) -> None:
        jaxpr = closed.jaxpr
        self.layers: dict[int, Layer] = {}
        self.outputs: dict[Var, Output] = {}
        self.while_loops: list[JaxprEqn] = []
        self.written: list[JaxprEqn] = []
        self._constants: list[JaxprEqn] = []
        self.unclear: list[JaxprEqn] = []
        self._with_given: set[Var] = set()
        self._pending: dict[Var, Output] = {}
        self._loops: tuple[int, ...] = ()
        known = {id(value) for value in given} if not self._by_example else set()
        kinds = dict.fromkeys(jaxpr.invars, WEIGHT)
        for v, const in zip(jaxpr.constvars, closed.consts, strict=True):
            kinds[v] = Kind(data=id(const) in known)
        self._walk(jaxpr, kinds)
        self.order = _Order(self.layers, self.flow)
        terms = [frozenset([t, OPEN]) for t in range(len(axes))]
        self.order.run(jaxpr, [*terms, *[frozenset()] * (len(jaxpr.outvars) - len(terms))])

    def places(self, v: Any) -> Places:
        """Where the axes of the losses are in a variable; empty for what changes none."""
        return self.flow.of(v) or {}

    def terms(self, v: Any) -> frozenset[int]:
        """The terms of the losses that a variable can change."""
        return frozenset(term for term, _ in self.places(v))

    def loops_of(self, *variables: Any) -> tuple[int, ...]:
        """The loops around variables in which they change, numbered from outside in."""
        differs = frozenset().union(*[self._differs.get(v, ()) for v in variables])
        return tuple(sorted(n for n in differs if isinstance(n, int)))

    def workers_of(self, *variables: Any) -> tuple[str, ...]:
        """The axes along which each worker has a part of variables, by its part of parameters."""
        differs = frozenset().union(*[self._differs.get(v, ()) for v in variables])
        return tuple(sorted(n for n in differs if isinstance(n, str)))

    def is_last(self, v: Any) -> bool:
        """Whether no layer comes between a variable and the losses."""
        return not {LATER, MARKED} & (self.order.of(v) or frozenset())

    def is_on_its_way(self, v: Any) -> bool:
        """Whether a variable is not an activation yet, but will be one that is marked."""
        after = self.order.of(v) or frozenset()
        return MARKED in after and LATER not in after

    @functools.cached_property
    def _sent_to(self) -> set[Any]:
        """What goes into layers that errors come back through by a matrix."""
        layers = [layer for layer in self.layers.values() if layer.needs_matrix]
        return {layer.eqn.invars[i] for layer in layers for i in layer.data}

    def needs_feedback(self, v: Any) -> bool:
        """Whether a layer's input must be sent an error, for it to have one of its own.

        Scales and biases are differentiated as usual where a product comes after them, and where
        what goes in is one for all examples, such as the statistics of a batch normalisation.
        """
        if v in self._sent_to:
            return True
        places = [place for (_, name), place in self.places(v).items() if name == "example"]
        is_statistic = bool(places) and all(place == MIXED for place in places)
        return OPEN in (self.order.of(v) or ()) and not is_statistic

    # Forwards: kinds, layers, activations

    def _walk(self, jaxpr: Jaxpr, kinds: dict[Var, Kind]) -> list[Kind]:
        """Find the layers of a program, given what its inputs are; returns what its outputs are."""

        def kind_of(atom):
            if is_ref(atom):  # what is in it may be anything
                return Kind(True, True)
            return Kind() if isinstance(atom, Literal) else kinds.get(atom, Kind())

        for eqn in jaxpr.eqns:
            outs = self._equation(eqn, [kind_of(atom) for atom in eqn.invars])
            for v, kind in zip(eqn.outvars, outs, strict=True):
                moves = kind.moves and is_inexact(v) and eqn.primitive.name not in CONSTANT
                kinds[v] = Kind(moves, kind.data)
        for atom in jaxpr.outvars:
            self._settle(atom, None)
        return [kind_of(atom) for atom in jaxpr.outvars]

    def _equation(self, eqn: JaxprEqn, kinds: list[Kind]) -> Sequence[Kind]:
        name = eqn.primitive.name
        if name == "scan":
            for atom in eqn.invars:
                self._settle(atom, eqn)
            return self._scan(eqn, kinds)
        anything = functools.reduce(operator.or_, kinds, Kind())
        if eqn.primitive is mark_p:
            self._settle(eqn.invars[0], eqn)
            self._pending[eqn.outvars[0]] = self._output(eqn, eqn.params["names"])
            return [anything]
        weights = tuple(i for i, k in enumerate(kinds) if k == WEIGHT)
        data = tuple(i for i, k in enumerate(kinds) if self._is_data(eqn, i, k, weights))
        if name == "optimization_barrier":
            for atom in eqn.invars:
                self._settle(atom, eqn)
            return kinds
        self._take_for_weights(eqn, kinds)
        if weights and any(map(is_ref, (*eqn.invars, *eqn.outvars))):
            self.written.append(eqn)
        if name == "while" and weights:
            self.while_loops.append(eqn)
        if not weights or not data:
            if self._by_example and weights and name in (*PRODUCTS, *WHOLE):
                others = [a for i, a in enumerate(eqn.invars) if i not in weights]
                if any(is_inexact(a) and not isinstance(a, Literal) for a in others):
                    self._constants.append(eqn)
            return self._no_layer(eqn, kinds, anything, weights)
        deep = False
        if programs(eqn) and name in WHOLE:
            deep = self._is_deep(eqn, kinds, data)
        self._add_layer(eqn, weights, data, deep, any(kinds[i].moves for i in data))
        return [Kind(True, True)] * len(eqn.outvars)

    def _take_for_weights(self, eqn: JaxprEqn, kinds: Sequence[Kind]) -> None:
        """Note a product that looks like one of two activations, and may be one with a weight.

        An array that a parameter is added to or scaled with may be its data or its constant, where
        it is not known in which arrays examples have entries of their own.
        """
        moving = [a for a, k in zip(eqn.invars, kinds, strict=True) if k == Kind(True, True)]
        is_product = eqn.primitive.name in MATRICES
        if is_product and len(moving) > 1 and not _has_batch(eqn):
            lost = any(UNKNOWN in self.places(a).values() for a in moving)
            if lost or not self._with_given.isdisjoint(moving):
                self.unclear.append(eqn)
        if any(k.moves for k in kinds) and any(k.data for k in kinds):
            only = not is_product and self._with_given.issuperset(moving)
            if only if moving else not self._by_example:
                self._with_given.update(eqn.outvars)

    def _is_data(self, eqn: JaxprEqn, i: int, kind: Kind, weights: Sequence[int]) -> bool:
        """Whether an input of an equation is data to the weights that enter beside it."""
        atom = eqn.invars[i]
        if isinstance(atom, Literal) or i in weights:
            return False
        if not is_inexact(atom):
            # Which rows are looked up: data, if the rows are then an example's.
            picks = eqn.primitive.name == "gather" and not self._by_example
            return picks or any(may_have_own(self.places(v), "example") for v in eqn.outvars)
        if kind.data or id(eqn) in self._met:
            return True
        if self._by_example:
            return may_have_own(self.places(atom), "example")
        return eqn.primitive.name in PRODUCTS

    def _no_layer(
        self, eqn: JaxprEqn, kinds: Sequence[Kind], kind: Kind, weights: Sequence[int]
    ) -> Sequence[Kind]:
        variables = [a for a in eqn.invars if not isinstance(a, Literal)]
        moved = variables[0] if len(variables) == 1 else None
        if eqn.primitive.name in MOVES and moved in self._pending and self.uses[moved] == 1:
            pending = self._pending[moved]
            if pending.names is None:
                del self._pending[moved]
                self._pending[eqn.outvars[0]] = pending
                return [kind]
        for atom in variables:
            self._settle(atom, eqn)
        if weights and all(k in (WEIGHT, Kind()) for k in kinds):
            return [WEIGHT] * len(eqn.outvars)
        return [kind] * len(eqn.outvars)

    def _add_layer(
        self,
        eqn: JaxprEqn,
        weights: tuple[int, ...],
        data: tuple[int, ...],
        deep: bool,
        moves: bool,
    ) -> None:
        merged = names = None
        if eqn.primitive.name in MERGED and len(data) == 1 and len(weights) == 1:
            before = eqn.invars[data[0]]
            if before in self._pending and self.uses[before] == 1:
                merged, names = data[0], self._pending.pop(before).names
        for i in data:
            if i != merged:
                self._settle(eqn.invars[i], eqn)
        inputs = sum(len(layer.eqn.invars) for layer in self.layers.values())
        self.layers[id(eqn)] = Layer(
            eqn,
            len(self.layers),
            weights,
            data,
            merged,
            deep,
            moves,
            self._loops,
            self.loops_of(*[eqn.invars[i] for i in weights]),
            self.workers_of(*[eqn.invars[i] for i in weights]),
            inputs,
        )
        for v in eqn.outvars:
            self._pending[v] = self._output(eqn, names)

    def _output(self, eqn: JaxprEqn, names: tuple[str | None, ...] | None) -> Output:
        return Output(0, eqn, names, None, self._loops)

    def _settle(self, atom: Any, user: JaxprEqn | None) -> None:
        """Something uses what a layer has computed: it is an activation."""
        pending = self._pending.pop(atom, None) if isinstance(atom, Var) else None
        if pending is not None:
            alone = user if self.uses[atom] == 1 else None
            number = len(self.outputs)
            self.outputs[atom] = dataclasses.replace(pending, number=number, user=alone)

    def _scan(self, eqn: JaxprEqn, kinds: list[Kind]) -> Sequence[Kind]:
        (program,) = programs(eqn)
        consts, carry = scan_counts(eqn)
        kinds = list(kinds)
        self._loops = (*self._loops, eqn.params["length"])
        while True:
            layers, outputs = dict(self.layers), dict(self.outputs)
            outs = self._walk(program.jaxpr, dict(zip(program.jaxpr.invars, kinds, strict=True)))
            around = [a | b for a, b in zip(kinds[consts:], outs[:carry], strict=False)]
            if around == kinds[consts : consts + carry]:
                break
            self.layers.clear()
            self.layers.update(layers)
            self.outputs = outputs
            kinds[consts : consts + carry] = around
        self._loops = self._loops[:-1]
        return [*around, *outs[carry:]]

    def _is_deep(self, eqn: JaxprEqn, kinds: Sequence[Kind], data: Sequence[int]) -> bool:
        """Whether in the programs inside of an equation one layer leads to another."""
        # What comes from outside does not move here, to tell it from what layers inside compute.
        given = [k if k == WEIGHT else Kind(data=i in data) for i, k in enumerate(kinds)]
        for program in programs(eqn):
            own = given[len(given) - len(program.jaxpr.invars) :]
            while True:
                inner = copy.copy(self)
                inner.layers, inner.outputs, inner._pending, inner._loops = {}, {}, {}, ()
                outs = inner._walk(program.jaxpr, dict(zip(program.jaxpr.invars, own, strict=True)))
                for layer in inner.layers.values():
                    if layer.deep or (layer.moves and layer.merged is None):
                        return True
                first = len(own) - len(outs)
                # What one iteration makes, the next begins with.
                around = [a | b for a, b in zip(own[first:], outs, strict=False)]
                if eqn.primitive.name != "while" or around == own[first:]:
                    break
                own = [*own[:first], *around]
        return False


def _has_batch(eqn: JaxprEqn) -> bool:
    """Whether a product is one of matrices that belong to each other, as those of examples do."""
    return eqn.primitive.name == "dot_general" and bool(eqn.params["dimension_numbers"][1][0])


def _uses(jaxpr: Jaxpr) -> collections.Counter:
    """How often variables are used, in programs inside as well."""
    found = collections.Counter(a for a in jaxpr.outvars if isinstance(a, Var))
    for eqn in jaxpr.eqns:
        found.update(a for a in eqn.invars if isinstance(a, Var))
        for program in programs(eqn):
            found += _uses(program.jaxpr)
    return found


class _Order(Influence):
    """`Influence` that also notes what comes after a variable: layers, and marks."""

    def __init__(self, layers: dict[int, Layer], flow: NamedAxes):
        super().__init__()
        self._layers, self._flow = layers, flow

    def written(self, eqn: JaxprEqn) -> Sequence[Terms | None]:
        """It may go into any layer."""
        return [(v or frozenset()) | {LATER} for v in super().written(eqn)]

    def _equation(self, eqn: JaxprEqn, outs: Sequence[Terms | None]) -> Sequence[Terms | None]:
        layer = self._layers.get(id(eqn))
        if layer is None and eqn.primitive is not mark_p:
            return super()._equation(eqn, outs)
        everything = self._joined(outs) or frozenset()
        if layer is None:
            return [(everything - {LATER}) | {MARKED}]
        later = (everything - {OPEN} if layer.needs_matrix else everything) | {LATER}
        before = layer.weights if layer.deep else ()
        found = [
            later if (i in layer.data and i != layer.merged) or i in before else everything
            for i in range(len(eqn.invars))
        ]
        for i in layer.weights:
            # What is a weight there, but has entries for each example, is what a layer made.
            if not may_have_own(self._flow.of(eqn.invars[i]), "example"):
                found[i] |= {MET}
        return found
