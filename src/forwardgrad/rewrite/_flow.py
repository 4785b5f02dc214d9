"""One pass backwards through a program: what each variable can change of the outputs, and where.

The pass follows derivatives: `stop_gradient`, rounding and integers let nothing through, and a
function with a rule of its own is what its rule says. What it carries back is up to the subclass;
how programs nest is known here alone.
"""

import abc
import functools
from collections.abc import Hashable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from forwardgrad._errors import InputError
from forwardgrad.rewrite._primitives import (
    CONSTANT,
    CUSTOM_JVP,
    CUSTOM_VJP,
    LINEAR_SOLVE,
    OF_ENTRIES,
    SHARD_MAP,
    is_ref,
    programs,
    scan_counts,
    while_counts,
)
from forwardgrad.rewrite._trace import inline, is_inexact, kind_of_rule, of_moving, pushed_forward

V = TypeVar("V")

DEEPEST = 8
"""Rules that call functions with rules are followed so far: one may call its own function."""


class Backward(abc.ABC, Generic[V]):
    """What is known of every variable, `found`, by what is known of a program's outputs.

    A variable that is used in several ways has what `join` makes of them; one that is not in
    `found` changes nothing.
    """

    def __init__(self):
        self.found: dict[Var, V] = {}
        self._depth = 0
        self._outs: Sequence[V | None] | None = None

    @abc.abstractmethod
    def join(self, a: V, b: V) -> V:
        """What holds of a value that is used in two ways."""

    @abc.abstractmethod
    def through(self, eqn: JaxprEqn, outs: Sequence[V | None]) -> Sequence[V | None]:
        """What holds of the inputs of an equation without programs inside."""

    def opaque(self, eqn: JaxprEqn, outs: Sequence[V | None]) -> Sequence[V | None]:
        """What holds of the inputs of an equation that is not followed."""
        return [self._joined(outs)] * len(eqn.invars)

    def written(self, eqn: JaxprEqn) -> Sequence[V | None]:
        """What holds of the inputs of an equation that may write to a `jax.Ref`: all that can be.

        Who reads it, and when, is not followed.
        """
        return self.opaque(eqn, self._outs or ())

    def into_loop(self, v: V, stacked: bool) -> V:
        """What holds inside of a loop's body, of what it carries or stacks."""
        del stacked
        return v

    def out_of_loop(self, v: V, stacked: bool) -> V:
        """What holds outside of a loop: of an input that is sliced, or that all iterations use."""
        del stacked
        return v

    def next_iteration(self, v: V) -> V:
        """What holds at the end of an iteration, of what the next one begins with."""
        return v

    def enter_shards(self, eqn: JaxprEqn, out: int, v: V) -> V:
        """What holds of an output of a `shard_map`, inside."""
        del eqn, out
        return v

    def leave_shards(self, eqn: JaxprEqn, i: int, v: V) -> V:
        """What holds of an input of a `shard_map`, outside."""
        del eqn, i
        return v

    def of(self, atom: Any) -> V | None:
        """What is known of a variable or literal."""
        return None if isinstance(atom, Literal) else self.found.get(atom)

    def note(self, atom: Any, v: V | None) -> None:
        """Take into account one more use of a variable."""
        if v is None or isinstance(atom, Literal) or not is_inexact(atom):
            return
        known = self.found.get(atom)
        self.found[atom] = v if known is None else self.join(known, v)

    def run(self, jaxpr: Jaxpr, outs: Sequence[V | None]) -> list[V | None]:
        """Go through a program; returns what holds of its inputs."""
        self._outs = outs if self._outs is None else self._outs
        for atom, v in zip(jaxpr.outvars, outs, strict=True):
            self.note(atom, v)
        for eqn in reversed(jaxpr.eqns):
            known = [self.found.get(v) for v in eqn.outvars]
            shared = any(map(is_ref, (*eqn.invars, *eqn.outvars)))
            if eqn.primitive.name in CONSTANT or not (shared or any(v is not None for v in known)):
                continue
            for atom, v in zip(eqn.invars, self._equation(eqn, known), strict=True):
                self.note(atom, v)
            for atom, v in zip(eqn.invars, self.written(eqn) if shared else (), strict=shared):
                self.note(atom, v)
        return [self.found.get(v) for v in jaxpr.invars]

    def _equation(self, eqn: JaxprEqn, outs: Sequence[V | None]) -> Sequence[V | None]:
        name, inner = eqn.primitive.name, programs(eqn)
        if name == "scan":
            return self._scan(eqn, inner[0].jaxpr, outs)
        if name == "while":
            conditions, consts = while_counts(eqn)
            body = eqn.params["body_jaxpr"].jaxpr
            return [*[None] * conditions, *self._around(body, outs, [], consts)]
        if name == "cond":
            branches = [self.run(branch.jaxpr, outs) for branch in inner]
            return [None, *map(self._joined, zip(*branches, strict=True))]
        if name == SHARD_MAP:
            return self._shards(eqn, inner[0].jaxpr, outs)
        if name == CUSTOM_JVP:
            return self.run_rule(eqn, outs)
        if name == CUSTOM_VJP and kind_of_rule(eqn) == "linear":
            return self.run_rule(pushed_forward(eqn).jaxpr.eqns[0], outs)
        if name == LINEAR_SOLVE:
            return self._linear_solve(eqn, outs)
        if inner and name not in OF_ENTRIES:
            return self.opaque(eqn, outs)
        return self.through(eqn, outs)

    def run_rule(self, eqn: JaxprEqn, outs: Sequence[V | None]) -> Sequence[V | None]:
        """The inputs of a function with a `custom_jvp`, by its rule."""
        rule = tangent_program(eqn) if self._depth < DEEPEST else None
        if rule is None:
            return self.opaque(eqn, outs)
        self._depth += 1
        floats = [v for v, atom in zip(outs, eqn.outvars, strict=True) if is_inexact(atom)]
        linear = _linear(rule.jaxpr, len(eqn.invars))
        ins = iter(self.run(linear, [*[None] * len(outs), *floats])[len(eqn.invars) :])
        self._depth -= 1
        return [next(ins) if is_inexact(atom) else None for atom in eqn.invars]

    def _joined(self, values: Sequence[V | None]) -> V | None:
        known = [v for v in values if v is not None]
        return functools.reduce(self.join, known) if known else None

    def _shards(self, eqn: JaxprEqn, jaxpr: Jaxpr, outs: Sequence[V | None]) -> Sequence[V | None]:
        inside = [v if v is None else self.enter_shards(eqn, i, v) for i, v in enumerate(outs)]
        ins = self.run(jaxpr, inside)
        return [v if v is None else self.leave_shards(eqn, i, v) for i, v in enumerate(ins)]

    def _linear_solve(self, eqn: JaxprEqn, outs: Sequence[V | None]) -> Sequence[V | None]:
        """By the derivative of `A x = b`, which is `A dx = db - dA x`, whatever solves it."""
        consts, jaxprs = eqn.params["const_lengths"], eqn.params["jaxprs"]
        solve, matvec = (inline(p, forward=True).jaxpr for p in (jaxprs.solve, jaxprs.matvec))
        b = self.run(solve, outs)[consts.solve :]
        if any(v is None is not out for v, out in zip(b, outs, strict=True)):
            return self.opaque(eqn, outs)
        operator = self.run(matvec, b)[: consts.matvec]
        return [*operator, *[None] * (len(eqn.invars) - len(operator) - len(b)), *b]

    def _scan(self, eqn: JaxprEqn, body: Jaxpr, outs: Sequence[V | None]) -> Sequence[V | None]:
        consts, carry = scan_counts(eqn)
        inside = [
            v if v is None else self.into_loop(v, stacked=i >= carry) for i, v in enumerate(outs)
        ]
        ins = self._around(body, inside[:carry], inside[carry:], consts)
        return [
            v if v is None else self.out_of_loop(v, stacked=i >= consts + carry)
            for i, v in enumerate(ins)
        ]

    def _around(
        self, body: Jaxpr, carry: Sequence[V | None], rest: Sequence[V | None], consts: int
    ) -> list[V | None]:
        """The inputs of a loop's body, once what goes around is the same before and after."""
        while True:
            ins = self.run(body, [*carry, *rest])
            wider = []
            for before, after in zip(carry, ins[consts : consts + len(carry)], strict=True):
                around = None if after is None else self.next_iteration(after)
                wider.append(self._joined([before, around]))
            if wider == list(carry):
                return ins
            carry = wider


def tangent_program(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The rule of a function with a `custom_jvp`.

    It takes the function's inputs, then the tangents of those that can have one; it returns the
    outputs, then likewise their tangents. None for a rule that takes no tangents, as that of a
    function that says it is not differentiable, or that needs the names of a mesh's axes.
    """
    avals = [v.aval for v in eqn.invars]
    moving = [i for i, v in enumerate(eqn.invars) if is_inexact(v)]

    def rule(primals, tangents):
        _, function = of_moving(eqn, primals)
        _, changes, outs = jax.jvp(function, [primals[i] for i in moving], tangents, has_aux=True)
        return outs, changes

    try:
        return inline(jax.make_jaxpr(rule)(avals, [avals[i] for i in moving]), forward=True)
    except InputError:
        raise
    except Exception:  # what a rule raises can be anything
        return None


def _linear(rule: Jaxpr, primals: int) -> Jaxpr:
    """A rule without what tangents do not enter, which may well be the function itself."""
    moving, eqns = set(rule.invars[primals:]), []
    for eqn in rule.eqns:
        if not moving.isdisjoint(atom for atom in eqn.invars if isinstance(atom, Var)):
            moving.update(eqn.outvars)
            eqns.append(eqn)
    return rule.replace(eqns=eqns)


Terms = frozenset[Hashable]


class Influence(Backward[Terms]):
    """Which of a program's outputs each variable can change.

    One too many adds variance to an estimate, one too few would add bias.
    """

    def join(self, a: Terms, b: Terms) -> Terms:
        """All of both."""
        return a | b

    def through(self, eqn: JaxprEqn, outs: Sequence[Terms | None]) -> Sequence[Terms | None]:
        """All outputs of an equation depend on all its inputs."""
        return self.opaque(eqn, outs)

    def run_rule(self, eqn: JaxprEqn, outs: Sequence[Terms | None]) -> Sequence[Terms | None]:
        """Whatever the rule says."""
        return self.opaque(eqn, outs)


class Part(NamedTuple):
    """A digit of an index: `(i // inner) % size`, i being the place along `axis`.

    Inside of loops, axis -1 is the number of the innermost one's iteration, -2 that of the next.
    `through` is None, or a variable with the number that stands for each place along the axis.
    """

    axis: int
    inner: int
    size: int
    through: Var | None = None


class Place(NamedTuple):
    """Where in a value the entries are that belong to one entry of the losses.

    `parts` are the digits of its index along an axis of the losses, the most significant first;
    None where they are not known. With `mixed`, losses with other indices depend on them as well.
    """

    parts: tuple[Part, ...] | None
    mixed: bool


MIXED = Place(None, True)
"""Every loss along an axis depends on every entry."""

UNKNOWN = Place(None, False)
"""Nothing is known."""


def join_places(a: Place, b: Place) -> Place:
    """What holds of a value that is used in two ways."""
    if a == b:
        return a
    apart = a.parts is not None and b.parts is not None and a.parts != b.parts
    if a.mixed or b.mixed or apart:
        return Place(None if apart else a.parts if b.parts is None else b.parts, True)
    return UNKNOWN


Key = tuple[int, str | None]
"""A term of the losses and the name of one of its axes, or None for a term that has none."""


def normal(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The same digits, with neighbours that are one made one."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        joined = last and last.axis == part.axis and last.inner == part.inner * part.size
        if last and joined and last.through is part.through is None:
            found[-1] = Part(part.axis, part.inner, last.size * part.size)
        else:
            found.append(part)
    return tuple(found)
