"""What depends on what in a program, by derivatives: `stop_gradient` cuts."""

import collections
import dataclasses
from collections.abc import Sequence

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from forwardgrad.rewrite._control import scan_counts
from forwardgrad.rewrite._examples import Axis
from forwardgrad.rewrite._walk import PROGRAMS, programs

Terms = frozenset[int]

BRANCHES = ("cond", "while")
"""Equations that are a layer as a whole: what happens in them depends on the data."""

LATER = -1
"""Among the outputs that a variable can change: a layer uses it."""

MARKED = -2
"""Among the outputs that a variable can change: it becomes a marked activation."""

MARK = "forwardgrad activation "


def is_mark(eqn: JaxprEqn) -> bool:
    """Whether an equation marks an activation."""
    return eqn.primitive.name == "name" and eqn.params["name"].startswith(MARK)


PARAMETER, LAYER, MARKED_LAYER = "parameter", "layer", "marked layer"
"""What a variable may be: made of parameters alone; or what a layer computes, still untouched."""

ELEMENTWISE = ("add", "add_any", "sub", "mul", "div")
"""Layers that make one with the layer before them."""

MOVES = ("transpose", "reshape", "squeeze", "expand_dims", "convert_element_type")
"""Equations that only rearrange what a layer computes, such as `vmap` leaves behind."""


@dataclasses.dataclass
class Dependence:
    """For every variable of a program and the programs inside it: the outputs that it can change.

    Where a program is called from several places, the variables inside have the outputs of all
    calls. That is also what every approximation here errs to: an output too many adds variance to
    an estimate, one too few would add bias.
    """

    outputs: dict[Var, Terms] = dataclasses.field(default_factory=dict)
    layers: set[Var] = dataclasses.field(default_factory=set)
    kinds: dict[Var, str | None] = dataclasses.field(default_factory=dict)
    examples: dict[Var, Axis] = dataclasses.field(default_factory=dict)
    uses: collections.Counter[Var] = dataclasses.field(default_factory=collections.Counter)
    counted: set[int] = dataclasses.field(default_factory=set)

    def of(self, variable: Var) -> Terms:
        """The outputs that `variable` can change."""
        return self.outputs.get(variable, frozenset())

    def add(self, atom: object, terms: Terms) -> None:
        """Note that `atom` can change these outputs."""
        if terms and not isinstance(atom, Literal):
            assert isinstance(atom, Var)
            self.outputs[atom] = self.of(atom) | terms

    def trace(self, jaxpr: Jaxpr, out_terms: Sequence[Terms]) -> list[Terms]:
        """Go through a program backwards; returns what each of its inputs can change."""
        for atom, terms in zip(jaxpr.outvars, out_terms, strict=True):
            self.add(atom, terms)
        for eqn in reversed(jaxpr.eqns):
            if eqn.primitive.name == "stop_gradient":
                continue
            out_terms = [self.of(v) for v in eqn.outvars]
            if is_mark(eqn):
                out_terms[0] = out_terms[0] - {LATER} | {MARKED}
            is_layer = not self.layers.isdisjoint(eqn.outvars)
            for atom, terms in zip(eqn.invars, self._through(eqn, out_terms), strict=True):
                self.add(atom, terms | {LATER} if is_layer and self._goes_in(eqn, atom) else terms)
        return [self.of(v) for v in jaxpr.invars]

    def _goes_in(self, eqn: JaxprEqn, atom: object) -> bool:
        """Whether `atom` is data that goes into a layer, and not through it."""
        if not isinstance(atom, Var) or self.kinds.get(atom) == PARAMETER:
            return False
        untouched = self.kinds.get(atom) in (LAYER, MARKED_LAYER)
        return not untouched or eqn.primitive.name not in ELEMENTWISE

    def find_layers(self, jaxpr: Jaxpr, kinds: Sequence[str | None]) -> list[str | None]:
        """Note the equations in which parameters meet data, and how often variables are used.

        `kinds` says what the inputs are; returns what the outputs are.
        """
        known: dict[Var, str | None] = dict(zip(jaxpr.invars, kinds, strict=True))
        self._count_uses(jaxpr)
        for eqn in jaxpr.eqns:
            known.update(zip(eqn.outvars, self._kinds_of_outputs(eqn, known), strict=True))
        for variable, kind in known.items():
            # Of two calls that disagree, neither is relied on.
            same = self.kinds.setdefault(variable, kind) == kind
            self.kinds[variable] = kind if same else None
        return [known.get(atom) if isinstance(atom, Var) else None for atom in jaxpr.outvars]

    def _count_uses(self, jaxpr: Jaxpr) -> None:
        if id(jaxpr) in self.counted:
            return
        self.counted.add(id(jaxpr))
        self.uses.update(atom for atom in jaxpr.outvars if isinstance(atom, Var))
        for eqn in jaxpr.eqns:
            for i, atom in enumerate(eqn.invars):
                if isinstance(atom, Var):
                    self.uses[atom] += _uses_of_input(eqn, i)

    def _kinds_of_outputs(
        self, eqn: JaxprEqn, known: dict[Var, str | None]
    ) -> Sequence[str | None]:
        kinds = [known.get(atom) if isinstance(atom, Var) else None for atom in eqn.invars]
        data = [a for a, k in zip(eqn.invars, kinds, strict=True) if k != PARAMETER]
        nothing = [None] * len(eqn.outvars)
        if is_mark(eqn):
            return [MARKED_LAYER]
        if eqn.primitive.name in MOVES and kinds == [LAYER]:
            (moved,) = [v for v in data if isinstance(v, Var)]
            return [LAYER] if self.uses[moved] == 1 else nothing
        if eqn.primitive.name in PROGRAMS and eqn.primitive.name not in BRANCHES:
            (program,) = programs(eqn)
            if eqn.primitive.name != "scan":
                return self.find_layers(program.jaxpr, kinds)
            consts, carry = scan_counts(eqn)
            kinds[consts : consts + carry] = [None] * carry
            self.find_layers(program.jaxpr, kinds)
            return nothing
        if PARAMETER not in kinds:
            return nothing
        if not any(isinstance(atom, Var) for atom in data) and eqn.primitive.name not in BRANCHES:
            return [PARAMETER] * len(eqn.outvars)
        self.layers.update(eqn.outvars)
        merged = eqn.primitive.name in ELEMENTWISE and MARKED_LAYER in kinds
        return [MARKED_LAYER if merged else LAYER] * len(eqn.outvars)

    def _through(self, eqn: JaxprEqn, out_terms: Sequence[Terms]) -> Sequence[Terms]:
        everything = frozenset().union(*out_terms)
        inner = programs(eqn)
        if not everything or len(inner) != 1 or eqn.primitive.name in BRANCHES:
            return [everything] * len(eqn.invars)
        if len(inner[0].jaxpr.invars) != len(eqn.invars):
            return [everything] * len(eqn.invars)
        if eqn.primitive.name == "scan":
            return self._trace_scan(eqn, inner[0].jaxpr, out_terms)
        return self._inside(inner[0].jaxpr, out_terms)

    def _inside(self, jaxpr: Jaxpr, out_terms: Sequence[Terms]) -> list[Terms]:
        """`trace` for one of several calls of a program."""
        call = Dependence(layers=self.layers, kinds=self.kinds)
        in_terms = call.trace(jaxpr, out_terms)
        for variable, terms in call.outputs.items():
            self.add(variable, terms)
        return in_terms

    def _trace_scan(
        self, eqn: JaxprEqn, jaxpr: Jaxpr, out_terms: Sequence[Terms]
    ) -> Sequence[Terms]:
        consts, carry = scan_counts(eqn)
        while True:
            in_terms = self._inside(jaxpr, out_terms)
            carried = in_terms[consts : consts + carry]
            wider = [a | b for a, b in zip(out_terms, carried, strict=False)]
            wider += out_terms[carry:]
            if wider == list(out_terms):
                return in_terms
            out_terms = wider


def _uses_of_input(eqn: JaxprEqn, position: int) -> int:
    """How often an equation uses one of its inputs, which inside a program may be several times."""
    inner = programs(eqn)
    name = eqn.primitive.name
    if name not in PROGRAMS or name in (*BRANCHES, "scan") or len(inner) != 1:
        return 1
    jaxpr = inner[0].jaxpr
    if len(jaxpr.invars) != len(eqn.invars):
        return 2
    own = jaxpr.invars[position]
    uses = sum(
        _uses_of_input(e, i) for e in jaxpr.eqns for i, atom in enumerate(e.invars) if atom is own
    )
    # What it becomes as an output is unknown here.
    return uses + 2 * sum(atom is own for atom in jaxpr.outvars)
