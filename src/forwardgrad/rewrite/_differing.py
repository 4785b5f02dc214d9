"""Where a program's variables have other values: from iteration to iteration, worker to worker."""

from typing import Any

from jax.core import ShapedArray
from jax.extend.core import Jaxpr, JaxprEqn, Var

from forwardgrad.rewrite._primitives import programs, scan_counts
from forwardgrad.rewrite._workers import varying

Differing = frozenset[int | str]
"""Loops around a variable, numbered from outside in, and axes of workers."""


def differing(jaxpr: Jaxpr) -> dict[Var, Differing]:
    """For each variable the loops in which it changes, and the axes along which workers have parts.

    The latter are those along which *parameters* differ that it depends on: each worker has data of
    its own anyway.
    """
    found: dict[Var, Differing] = {v: _axes(v) for v in jaxpr.invars}
    _follow(jaxpr, found, 0)
    return found


def _axes(v: Var) -> frozenset[str]:
    return varying(v.aval) if isinstance(v.aval, ShapedArray) else frozenset()


def _of(atom: Any, found: dict[Var, Differing]) -> Differing:
    return found.get(atom, frozenset()) if isinstance(atom, Var) else frozenset()


def _follow(jaxpr: Jaxpr, found: dict[Var, Differing], depth: int) -> None:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            outs = _around(eqn, found, depth)
        else:
            together = frozenset().union(*[_of(atom, found) for atom in eqn.invars])
            outs = [together] * len(eqn.outvars)
        for v, own in zip(eqn.outvars, outs, strict=True):
            found[v] = frozenset(n for n in own if isinstance(n, int) or n in _axes(v))


def _around(eqn: JaxprEqn, found: dict[Var, Differing], depth: int) -> list[Differing]:
    """The outputs of a loop, once what goes around is the same before and after."""
    (program,) = programs(eqn)
    body = program.jaxpr
    consts, carry = scan_counts(eqn)
    ins = [_of(atom, found) for atom in eqn.invars]
    for i, v in enumerate(body.invars[consts:]):
        if i >= carry or body.outvars[i] is not v:
            ins[consts + i] |= {depth}
    while True:
        found.update(zip(body.invars, ins, strict=True))
        _follow(body, found, depth + 1)
        outs = [_of(atom, found) for atom in body.outvars]
        around = [a | b for a, b in zip(ins[consts:], outs[:carry], strict=False)]
        if around == ins[consts : consts + carry]:
            return [own - {depth} for own in (*around, *outs[carry:])]
        ins[consts : consts + carry] = around
