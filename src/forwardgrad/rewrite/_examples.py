"""Which axis of every value in a program is that of the examples."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, JaxprEqn, Var

from forwardgrad.rewrite._control import scan_counts, while_counts
from forwardgrad.rewrite._walk import programs

UNKNOWN = "unknown"
"""Losses of examples depend on it, in a way that is not followed here."""

MIXED = "mixed"
"""Losses of several examples depend on every entry, as with batch normalisation."""

Axis = int | str | None
"""An axis, or one of the above; None where no loss with an axis of examples depends on it."""

Rule = Callable[[JaxprEqn, int], Sequence[Axis]]

RULES: dict[str, Rule] = {}
"""Primitive name to rule: from the axis of an equation's first output to those of its inputs."""

NOTE = "forwardgrad examples"


def of_examples(x: jax.Array) -> jax.Array:
    """`x`, with the note that along its first axis each loss of an example depends on one entry.

    It is for losses whose derivatives say so, by a rule of their own, where their values do not.
    """
    return checkpoint_name(x, NOTE)


def example_axes(jaxpr: Jaxpr, out_axes: Sequence[Axis]) -> dict[Var, Axis]:
    """Follows the axis of the examples from a program's outputs back through it.

    **Arguments:**

    - `jaxpr`: the program.
    - `out_axes`: for each output its axis of examples, or None.

    **Returns:**

    What is known of each variable, in the programs inside as well.
    """
    found: dict[Var, Axis] = {}
    _follow(jaxpr, out_axes, found)
    return found


def _join(a: Axis, b: Axis) -> Axis:
    """What holds of a value that is used in two ways."""
    if a is None or a == b:
        return b
    if b is None or b == UNKNOWN:
        return a
    return b if a == UNKNOWN else MIXED


def _follow(jaxpr: Jaxpr, out_axes: Sequence[Axis], found: dict[Var, Axis]) -> Sequence[Axis]:
    def note(atoms: Sequence[Any], axes: Sequence[Axis]) -> None:
        for atom, axis in zip(atoms, axes, strict=True):
            if isinstance(atom, Var) and jnp.issubdtype(atom.aval.dtype, jnp.inexact):  # pyright: ignore[reportAttributeAccessIssue]
                found[atom] = _join(found.get(atom), axis)

    note(jaxpr.outvars, out_axes)
    for eqn in reversed(jaxpr.eqns):
        axes = [found.get(v) for v in eqn.outvars]
        if eqn.primitive.name != "stop_gradient" and any(axis is not None for axis in axes):
            note(eqn.invars, _inputs(eqn, axes, found))
    return [found.get(v) for v in jaxpr.invars]


def _inputs(eqn: JaxprEqn, axes: Sequence[Axis], found: dict[Var, Axis]) -> Sequence[Axis]:
    inner = programs(eqn)
    name = eqn.primitive.name
    if name == "scan":
        return _scan(eqn, axes, inner[0].jaxpr, found)
    if name == "while":
        return _while(eqn, axes, eqn.params["body_jaxpr"].jaxpr, found)
    if name == "cond":
        branches = [_follow(branch.jaxpr, axes, found) for branch in inner]
        return [None, *[functools.reduce(_join, a) for a in zip(*branches, strict=True)]]
    if len(inner) == 1 and len(inner[0].jaxpr.invars) == len(eqn.invars):
        return _follow(inner[0].jaxpr, axes, found)
    if name == "optimization_barrier":
        return axes
    if name == "name" and eqn.params["name"] == NOTE:
        return [0]
    axis = functools.reduce(_join, axes)
    if inner or not isinstance(axis, int):
        return [UNKNOWN if inner else axis] * len(eqn.invars)
    out = eqn.outvars[axes.index(axis)]
    inputs = RULES.get(name, _same_place)(eqn, axis)
    return [
        MIXED if isinstance(i, int) and _shape(atom)[i] != _shape(out)[axis] else i
        for atom, i in zip(eqn.invars, inputs, strict=True)
    ]


def _scan(
    eqn: JaxprEqn, axes: Sequence[Axis], body: Jaxpr, found: dict[Var, Axis]
) -> Sequence[Axis]:
    consts, carry = scan_counts(eqn)

    def inside(axis: Axis) -> Axis:
        if not isinstance(axis, int):
            return axis
        return UNKNOWN if axis == 0 else axis - 1

    stacked = [inside(axis) for axis in axes[carry:]]
    inputs = _around(body, axes[:carry], stacked, consts, found)
    later = [axis + 1 if isinstance(axis, int) else axis for axis in inputs[consts + carry :]]
    return [*inputs[: consts + carry], *later]


def _while(
    eqn: JaxprEqn, axes: Sequence[Axis], body: Jaxpr, found: dict[Var, Axis]
) -> Sequence[Axis]:
    of_condition, of_body = while_counts(eqn)
    return [*[None] * of_condition, *_around(body, axes, [], of_body, found)]


def _around(
    body: Jaxpr, carry: Sequence[Axis], rest: Sequence[Axis], consts: int, found: dict[Var, Axis]
) -> Sequence[Axis]:
    """The inputs of a loop's body, once what goes around has the same axes before and after."""
    while True:
        inputs = _follow(body, [*carry, *rest], found)
        wider = [_join(a, b) for a, b in zip(carry, inputs[consts:], strict=False)]
        if wider == list(carry):
            return [*inputs[:consts], *carry, *inputs[consts + len(carry) :]]
        carry = wider


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _rule(*names: str):
    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


def _same_place(eqn: JaxprEqn, axis: int) -> Sequence[Axis]:
    rank = len(_shape(eqn.outvars[0]))
    return [axis if len(_shape(atom)) == rank else MIXED for atom in eqn.invars]


@_rule("scatter", "scatter-add")
def _unknown(eqn: JaxprEqn, axis: int) -> Sequence[Axis]:
    return [UNKNOWN] * len(eqn.invars)


@_rule("gather")
def _gather(eqn: JaxprEqn, axis: int) -> Sequence[Axis]:
    numbers, shape = eqn.params["dimension_numbers"], _shape(eqn.invars[0])
    batching = numbers.operand_batching_dims
    found: Axis = UNKNOWN
    if axis in numbers.offset_dims:
        gone = (*numbers.collapsed_slice_dims, *batching)
        kept = [i for i in range(len(shape)) if i not in gone]
        own = kept[numbers.offset_dims.index(axis)]
        found = own if eqn.params["slice_sizes"][own] == shape[own] else UNKNOWN
    else:
        rank = len(_shape(eqn.outvars[0]))
        index = [i for i in range(rank) if i not in numbers.offset_dims].index(axis)
        if index in numbers.start_indices_batching_dims:
            found = batching[numbers.start_indices_batching_dims.index(index)]
    return [found, UNKNOWN]


@_rule("dynamic_slice", "slice", "pad", "concatenate")
def _where_sizes_agree(eqn: JaxprEqn, axis: int) -> Sequence[Axis]:
    size, rank = _shape(eqn.outvars[0])[axis], len(_shape(eqn.outvars[0]))
    of_same_rank = [len(_shape(atom)) == rank for atom in eqn.invars]
    return [
        axis if same and _shape(atom)[axis] == size else UNKNOWN
        for atom, same in zip(eqn.invars, of_same_rank, strict=True)
    ]


@_rule("sort", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "rev", "top_k")
def _along_an_axis(eqn: JaxprEqn, axis: int) -> Sequence[Axis]:
    last = len(_shape(eqn.outvars[0])) - 1
    names = ("dimension", "dimensions", "axis")
    along = next((eqn.params[name] for name in names if name in eqn.params), last)
    mixes = axis in along if isinstance(along, tuple) else axis == along
    return [MIXED if mixes else axis] * len(eqn.invars)


@_rule("cholesky", "eigh", "fft", "lu", "qr", "svd", "triangular_solve")
def _of_last_two_axes(eqn: JaxprEqn, axis: int) -> Sequence[Axis]:
    return [axis if axis < len(_shape(a)) - 2 else MIXED for a in eqn.invars]


@_rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
def _windows(eqn: JaxprEqn, axis: int) -> Sequence[Axis]:
    alone = eqn.params["window_dimensions"][axis] == 1
    return [axis if alone and _shape(atom) else MIXED for atom in eqn.invars]


@_rule("transpose")
def _transpose(eqn: JaxprEqn, axis: int) -> Sequence[Axis]:
    return [eqn.params["permutation"][axis]]


@_rule("broadcast_in_dim")
def _broadcast(eqn: JaxprEqn, axis: int) -> Sequence[Axis]:
    where = list(eqn.params["broadcast_dimensions"])
    found: Axis = where.index(axis) if axis in where else MIXED
    return [found, *[None] * (len(eqn.invars) - 1)]


@_rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
def _reduce(eqn: JaxprEqn, axis: int) -> Sequence[Axis]:
    rank = len(_shape(eqn.invars[0]))
    return [[i for i in range(rank) if i not in eqn.params["axes"]][axis]]


@_rule("forwardgrad_sum")
def _sum(eqn: JaxprEqn, axis: int) -> Sequence[Axis]:
    return [axis + (eqn.params["axis"] <= axis)]


@_rule("reshape", "squeeze", "expand_dims")
def _reshape(eqn: JaxprEqn, axis: int) -> Sequence[Axis]:
    before, after = _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    outer = math.prod(after[:axis])
    same = [i for i, n in enumerate(before) if n == after[axis] and math.prod(before[:i]) == outer]
    return [same[0] if same else UNKNOWN, *[None] * (len(eqn.invars) - 1)]


@_rule("dot_general")
def _dot_general(eqn: JaxprEqn, axis: int) -> Sequence[Axis]:
    contracting, batch = eqn.params["dimension_numbers"]
    if axis < len(batch[0]):
        return [batch[0][axis], batch[1][axis]]
    free = [
        [i for i in range(len(_shape(atom))) if i not in (*contracting[s], *batch[s])]
        for s, atom in enumerate(eqn.invars)
    ]
    place = axis - len(batch[0])
    if place < len(free[0]):
        return [free[0][place], MIXED]
    return [MIXED, free[1][place - len(free[0])]]


@_rule("conv_general_dilated")
def _conv(eqn: JaxprEqn, axis: int) -> Sequence[Axis]:
    spec = eqn.params["dimension_numbers"]
    return [spec.lhs_spec[0] if axis == spec.out_spec[0] else UNKNOWN, MIXED]
