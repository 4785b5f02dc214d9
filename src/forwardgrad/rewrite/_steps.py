"""Which activations lead to the next ones through what mixes an axis of the losses."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var

from forwardgrad.rewrite._axes import NamedAxes, Places, places_of_terms
from forwardgrad.rewrite._flow import UNKNOWN, Backward, Place
from forwardgrad.rewrite._plan import Plan
from forwardgrad.rewrite._primitives import ELEMENTWISE, MOVES


def mixing_steps(
    closed: ClosedJaxpr, plan: Plan, axes: Sequence[Sequence[str]], name: str
) -> frozenset[Var]:
    """The activations that something mixes along an axis before the next layer is reached.

    Those of attention are keys, values and queries: a product of two activations mixes the tokens
    of one of them, and no layer comes between. With them come scales and biases that only such
    activations use, as a normalisation in front of attention has them.
    """
    hidden = [v for v in plan.outputs if plan.places(v) and not plan.is_last(v)]
    hidden = [v for v in hidden if not plan.is_on_its_way(v)]
    products = [v for v in hidden if not is_elementwise(plan, v)]
    starts = {v: _anew(plan, v, name) for v in products}
    outs = places_of_terms(closed.jaxpr, axes)
    own = [p and {key: q for key, q in p.items() if key[1] == name} for p in outs]
    steps = _Steps(closed, plan, starts)
    steps.run(closed.jaxpr, own)
    met = _paths(closed, dict.fromkeys(products, False), steps.mixes)
    found = {
        v for v in hidden if met.get(v) or any(p.mixed for p in (steps.before(v) or {}).values())
    }
    while True:
        later = _paths(closed, {v: v in found for v in hidden}, frozenset())
        more = {v for v in hidden if v not in products and later.get(v)} - found
        if not more:
            return frozenset(found)
        found |= more


def ends(closed: ClosedJaxpr, terms: int, hidden: frozenset[Var]) -> frozenset[Var]:
    """Those of some activations that none of the others comes after."""
    paths = _Paths(dict.fromkeys(hidden, False), frozenset())
    others = len(closed.jaxpr.outvars) - terms
    paths.run(closed.jaxpr, [*[True] * terms, *[None] * others])
    return frozenset(v for v, alone in paths.before.items() if alone)


def _anew(plan: Plan, v: Var, name: str) -> Places:
    """Where an axis is in an activation, seen from what comes before it."""
    keys = [key for key in plan.places(v) if key[1] == name]
    parts = {key: plan.flow.located(v, key).parts for key in keys}
    return {key: UNKNOWN if p is None else Place(p, False) for key, p in parts.items()}


def is_elementwise(plan: Plan, v: Var) -> bool:
    """Whether an activation is what a scale or a bias alone makes of what is no layer's output."""
    eqn: JaxprEqn | None = plan.outputs[v].eqn
    while eqn is not None:
        layer = plan.layers.get(id(eqn))
        if layer is not None and layer.merged is None:
            return eqn.primitive.name in ELEMENTWISE
        if layer is None and eqn.primitive.name not in MOVES:
            return False
        eqn = plan.flow.maker(eqn.invars[0 if layer is None else layer.merged or 0])
    return False


class _Steps(NamedAxes):
    """`NamedAxes` from one layer back to the ones before it; `mixes` are equations that mix."""

    def __init__(self, closed: ClosedJaxpr, plan: Plan, starts: Mapping[Var, Places]):
        super().__init__(closed)
        self._plan, self._starts = plan, starts
        self._before: dict[Var, Places] = {}
        self.mixes: set[int] = set()

    def before(self, v: Var) -> Places | None:
        """What holds of an activation by the layers that follow it."""
        return self._before.get(v) if v in self._starts else self.of(v)

    def note(self, atom: Any, v: Places | None) -> None:
        """Take into account one more use of a variable; before an activation all is anew."""
        if v is None or isinstance(atom, Literal) or atom not in self._starts:
            return super().note(atom, v)
        self._before[atom] = self.join(self._before[atom], v) if atom in self._before else v
        self.found[atom] = self._starts[atom]
        return None

    def _equation(self, eqn: JaxprEqn, outs: Sequence[Places | None]) -> Sequence[Places | None]:
        found = super()._equation(eqn, outs)
        kept = {key for places in outs for key, p in (places or {}).items() if not p.mixed}
        for atom, places in zip(eqn.invars, found, strict=True):
            mixed = any(p.mixed and key in kept for key, p in (places or {}).items())
            if mixed and self._is_data(atom):
                self.mixes.add(id(eqn))
        return found

    def _is_data(self, atom: Any) -> bool:
        """Whether an axis of the losses is known to be in a variable, as it is in no weight."""
        flow = self._plan.flow
        return any(flow.located(atom, key).parts is not None for key in self._plan.places(atom))


class _Paths(Backward[bool]):
    """Whether all paths from a variable end well, or lead through one of some equations."""

    def __init__(self, ends: Mapping[Var, bool], equations: set[int] | frozenset[int]):
        super().__init__()
        self._ends, self._equations = ends, equations
        self.before: dict[Var, bool] = {}

    def join(self, a: bool, b: bool) -> bool:
        """Whether both do."""
        return a and b

    def note(self, atom: Any, v: bool | None) -> None:
        """Take into account one more use of a variable."""
        if v is not None and not isinstance(atom, Literal) and atom in self._ends:
            self.before[atom] = self.before.get(atom, True) and v
            v = self._ends[atom]
            self.found.pop(atom, None)
        super().note(atom, v)

    def through(self, eqn: JaxprEqn, outs: Sequence[bool | None]) -> Sequence[bool | None]:
        """As the outputs."""
        return self.opaque(eqn, outs)

    def _equation(self, eqn: JaxprEqn, outs: Sequence[bool | None]) -> Sequence[bool | None]:
        found = super()._equation(eqn, outs)
        return [True] * len(found) if id(eqn) in self._equations else found


def _paths(
    closed: ClosedJaxpr, ends: Mapping[Var, bool], equations: set[int] | frozenset[int]
) -> dict[Var, bool]:
    paths = _Paths(ends, equations)
    paths.run(closed.jaxpr, [False] * len(closed.jaxpr.outvars))
    return {v: paths.before[v] for v in ends if v in paths.before}
