"""Where along a value's axes the axes of the losses are: rules, primitive by primitive.

A rule goes from an axis of an output back to the inputs. What it claims must hold of the
derivative: an axis that is claimed and does not hold would be a bias. A primitive that has no rule
here is unknown.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex, TypeAlias

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from forwardgrad.rewrite._flow import (
    MIXED,
    UNKNOWN,
    Backward,
    Key,
    Part,
    Place,
    join_places,
    normal,
)
from forwardgrad.rewrite._primitives import ELEMENTWISE, SCATTERS, programs, shape_of
from forwardgrad.rewrite._trace import INFO

Places: TypeAlias = dict[Key, Place]


class Aligned(int):
    """An axis along which an entry changes outputs at its own place, and at others."""


Target: TypeAlias = Any
"""For one input: the axis that an output's axis comes from, a `Place` or `Part` that says what is
known instead, or None where it has no derivative. Axes may be NumPy's integers."""

Rule: TypeAlias = Callable[["NamedAxes", JaxprEqn, int, int], Sequence[Target]]
"""From the number of an output and an axis of it to the inputs."""

RULES: dict[str, Rule] = {}


class NamedAxes(Backward[Places]):
    """The terms that each variable can change, and where in it the axes of these are."""

    def __init__(self, closed: ClosedJaxpr):
        super().__init__()
        self._consts = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        self._made = _producers(closed.jaxpr)
        self._located: dict[tuple[Var, Key], tuple[Part, ...] | None] = {}

    def join(self, a: Places, b: Places) -> Places:
        """The terms of both, each axis where both have it."""
        shared = {key: join_places(a[key], b[key]) for key in a.keys() & b.keys()}
        return {**a, **b, **shared}

    def through(self, eqn: JaxprEqn, outs: Sequence[Places | None]) -> Sequence[Places | None]:
        """By the primitive's rule."""
        found: list[Places | None] = [None] * len(eqn.invars)
        for number, places in enumerate(outs):
            for key, place in (places or {}).items():
                for i, moved in enumerate(self._moved(eqn, number, place)):
                    if moved is not None:
                        known, new = found[i], {key: moved}
                        found[i] = new if known is None else self.join(known, new)
        return found

    def opaque(self, eqn: JaxprEqn, outs: Sequence[Places | None]) -> Sequence[Places | None]:
        """Only what is mixed is known to be mixed."""
        unknown = [
            places and {k: MIXED if p.mixed else UNKNOWN for k, p in places.items()}
            for places in outs
        ]
        return super().opaque(eqn, unknown)

    def into_loop(self, v: Places, stacked: bool) -> Places:
        """The stack's axis becomes the iteration."""
        return _shifted(v, lambda axis: axis - 1 if stacked or axis < 0 else axis)

    def out_of_loop(self, v: Places, stacked: bool) -> Places:
        """The iteration becomes the stack's axis; what all iterations use is mixed along it."""

        def shift(axis):
            if stacked:
                return axis + 1
            return axis if axis >= 0 else None if axis == -1 else axis + 1

        return _shifted(v, shift)

    def next_iteration(self, v: Places) -> Places:
        """It changes what later iterations make."""
        return _shifted(v, lambda axis: None if axis == -1 else axis)

    def enter_shards(self, eqn: JaxprEqn, out: int, v: Places) -> Places:
        """Whole axes stay, cut as the output's sharding says."""
        return _resharded(v, eqn.params["out_specs"][out], eqn, out, into=True)

    def leave_shards(self, eqn: JaxprEqn, i: int, v: Places) -> Places:
        """Whole axes stay that the input's sharding cuts alike."""
        return _resharded(v, eqn.params["in_specs"][i], eqn, i, into=False)

    def _moved(self, eqn: JaxprEqn, number: int, place: Place) -> Sequence[Place | None]:
        name = eqn.primitive.name
        if place.parts is None:
            return [place] * len(eqn.invars)
        if name == "optimization_barrier":
            return [place if i == number else None for i in range(len(eqn.invars))]
        if name == "reshape":
            return [_reshaped(eqn, place), *[None] * (len(eqn.invars) - 1)]
        targets = [
            _targets(self, eqn, number, part) if part.axis >= 0 else [part.axis] * len(eqn.invars)
            for part in place.parts
        ]
        return [
            _placed(eqn, number, place, [t[i] for t in targets], atom)
            for i, atom in enumerate(eqn.invars)
        ]

    def located(self, v: Any, key: Key) -> Place:
        """Where an axis is in a variable, also if every way from there to the losses mixes it.

        What such a variable is made of may know it: keys are at the places of what they are made
        from, queries read that at the same places, and these belong to one loss each.
        """
        place = (self.of(v) or {}).get(key, UNKNOWN)
        if not place.mixed or place.parts is not None:
            return place
        if (v, key) not in self._located:
            self._located[v, key] = self._inherited(v, key)
        return Place(self._located[v, key], True)

    def _inherited(self, v: Any, key: Key) -> tuple[Part, ...] | None:
        eqn = self.maker(v)
        if eqn is None or programs(eqn):
            return None
        found = set()
        for i, atom in enumerate(eqn.invars):
            parts = None if isinstance(atom, Literal) else self.located(atom, key).parts
            if parts is not None:
                found.add(self._after(eqn, eqn.outvars.index(v), i, parts))
        return found.pop() if len(found) == 1 else None

    def _after(
        self, eqn: JaxprEqn, number: int, i: int, parts: tuple[Part, ...]
    ) -> tuple[Part, ...] | None:
        """Digits along an input's axes as those of an output, by the rules read backwards."""
        before, after = shape_of(eqn.invars[i]), shape_of(eqn.outvars[number])
        moved: list[Part] = []
        for part in parts:
            if part.axis < 0:
                moved.append(part)
                continue
            if part.through is not None:
                return None
            if eqn.primitive.name == "reshape" and i == 0:
                low = part.inner * math.prod(before[part.axis + 1 :])
                own = _digits(after, low, part.size) or []
            else:
                own = [part._replace(axis=axis) for axis in range(len(after))]
                own = [p for p in own if self._comes_from(eqn, number, i, p, part)]
                own = own if len(own) == 1 else []
            if not own:
                return None
            moved += own
        return normal(moved)

    def _comes_from(self, eqn: JaxprEqn, number: int, i: int, out: Part, part: Part) -> bool:
        found = self._moved(eqn, number, Place((out,), False))[i]
        return found is not None and found.parts == (part,)

    # What rules may ask for

    def maker(self, atom: Any) -> JaxprEqn | None:
        """The equation that computes a variable; None for what is given."""
        return self._made.get(atom) if isinstance(atom, Var) else None

    def value(self, atom: Any) -> Any:
        """A variable's value if it depends on no parameters and no loop, else None."""
        needed, eqns = self._slice(atom)
        if eqns is None:
            return None
        fixed = [v for v in needed if v in self._consts]
        jaxpr = Jaxpr((), fixed, [atom], eqns, frozenset(), INFO)
        return jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))(*[self._consts[v] for v in fixed])[0]

    def constant(self, atom: Any) -> np.ndarray | None:
        """A variable's value if it is known while tracing, else None."""
        if isinstance(atom, Literal):
            return np.asarray(atom.val)
        needed, eqns = self._slice(atom)
        if eqns is None or any(isinstance(self._consts.get(v), Tracer) for v in needed):
            return None
        with jax.ensure_compile_time_eval():
            return np.asarray(self.value(atom))

    def _slice(self, atom: Any) -> tuple[set[Var], list[JaxprEqn] | None]:
        """What a variable is computed from, and the equations in order."""
        needed, pending, eqns = set(), [atom], []
        while pending:
            v = pending.pop()
            if isinstance(v, Literal) or v in needed:
                continue
            needed.add(v)
            eqn = self._made.get(v)
            if eqn is not None:
                if programs(eqn) or eqn.effects:
                    return needed, None
                eqns.append(eqn)
                pending += eqn.invars
            elif v not in self._consts:
                return needed, None
        order = {id(eqn): i for i, eqn in enumerate(dict.fromkeys(self._made.values()))}
        return needed, sorted({id(e): e for e in eqns}.values(), key=lambda e: order[id(e)])


def _producers(jaxpr: Jaxpr) -> dict[Var, JaxprEqn]:
    found = {}
    for eqn in jaxpr.eqns:
        found.update(dict.fromkeys(eqn.outvars, eqn))
        for program in programs(eqn):
            found.update(_producers(program.jaxpr))
    return found


def _shifted(places: Places, shift: Callable[[int], int | None]) -> Places:
    def moved(place: Place) -> Place:
        if place.parts is None:
            return place
        axes = [shift(part.axis) for part in place.parts]
        if any(axis is None for axis in axes):
            return MIXED
        return Place(
            tuple(p._replace(axis=a) for p, a in zip(place.parts, axes, strict=True)), place.mixed
        )

    return {key: moved(place) for key, place in places.items()}


def _resharded(places: Places, spec: Any, eqn: JaxprEqn, i: int, into: bool) -> Places:
    """Places of whole axes with their sizes inside of a `shard_map`, or outside again."""
    atom = eqn.outvars[i] if into else eqn.invars[i]
    (program,) = programs(eqn)
    inner = (program.jaxpr.outvars if into else program.jaxpr.invars)[i]
    outer_shape, inner_shape = shape_of(atom), shape_of(inner)
    before, after = (outer_shape, inner_shape) if into else (inner_shape, outer_shape)

    def names(axis):
        return spec[axis] if axis < len(spec) else None

    def moved(place: Place) -> Place:
        if place.parts is None:
            return place
        parts = []
        for part in place.parts:
            whole = part.axis >= 0 and part[1:3] == (1, before[part.axis])
            if not whole or (not into and part.through != names(part.axis)):
                return UNKNOWN
            tag = names(part.axis) if into else None
            parts.append(Part(part.axis, 1, after[part.axis], tag))  # pyright: ignore[reportArgumentType]
        return Place(tuple(parts), place.mixed)

    return {key: moved(place) for key, place in places.items()}


def _targets(flow: NamedAxes, eqn: JaxprEqn, number: int, part: Part) -> Sequence[Target]:
    name = eqn.primitive.name
    if name in ELEMENTWISE:
        shape = shape_of(eqn.outvars[number])
        return [_same_axis(shape_of(atom), shape, part.axis) for atom in eqn.invars]
    if name not in RULES:
        return [UNKNOWN] * len(eqn.invars)
    return RULES[name](flow, eqn, number, part.axis)


def _same_axis(shape: Sequence[int], out: Sequence[int], axis: int) -> Target:
    """The axis of an operand that may be a scalar, or of size one where the result is larger."""
    return axis if len(shape) == len(out) and shape[axis] == out[axis] else MIXED


def _placed(
    eqn: JaxprEqn, number: int, place: Place, targets: Sequence[Target], atom: Any
) -> Place | None:
    """Where an index is in one input, by where each of its digits is."""
    if any(t is None for t in targets):
        return None
    lost = MIXED if place.mixed else UNKNOWN
    if any(t == UNKNOWN for t in targets):
        return lost
    if any(t == MIXED for t in targets):
        return MIXED
    parts, mixed, out = [], place.mixed, shape_of(eqn.outvars[number])
    assert place.parts is not None
    for part, target in zip(place.parts, targets, strict=True):
        if isinstance(target, Part):
            if part[1:] != (1, out[part.axis], None):
                return lost
            parts.append(target)
            continue
        own = operator.index(target)  # pyright: ignore[reportArgumentType]
        if own >= 0 and shape_of(atom)[own] != out[part.axis]:
            return lost
        mixed |= isinstance(target, Aligned)
        parts.append(part._replace(axis=own))
    return Place(normal(parts), mixed)


def _reshaped(eqn: JaxprEqn, place: Place) -> Place:
    """Digits of an index through a reshape, in which the row-major order stays."""
    before, after = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
    lost = MIXED if place.mixed else UNKNOWN
    if eqn.params["dimensions"] is not None:
        return lost
    parts: list[Part] = []
    assert place.parts is not None
    for part in place.parts:
        if part.axis < 0:
            parts.append(part)
            continue
        low = part.inner * math.prod(after[part.axis + 1 :])
        found = _digits(before, low, part.size if part.through is None else after[part.axis])
        if part.through is not None and found is not None:
            whole = len(found) == 1 and found[0][1:3] == (1, before[found[0].axis])
            found = [part._replace(axis=found[0].axis)] if whole else None
        if found is None:
            return lost
        parts += found
    return Place(normal(parts), place.mixed)


def _digits(shape: Sequence[int], low: int, size: int) -> list[Part] | None:
    """The digit `(i // low) % size` of a row-major index as digits along axes of `shape`."""
    if size == 1:
        ones = [i for i, n in enumerate(shape) if n == 1 and math.prod(shape[i + 1 :]) == low]
        return [Part(i, 1, 1) for i in ones[:1]]
    found, reached, tail = [], low, 1
    for axis in reversed(range(len(shape))):
        top = tail * shape[axis]
        if reached < low * size and tail <= reached < top:
            end = min(top, low * size)
            if reached % tail or end % reached:
                return None
            found.append(Part(axis, reached // tail, end // reached))
            reached = end
        tail = top
    return found[::-1] if reached == low * size else None


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return register


@_rule("transpose")
def _transpose(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    return [eqn.params["permutation"][axis]]


@_rule("broadcast_in_dim")
def _broadcast(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    where = list(eqn.params["broadcast_dimensions"])
    found: Target = MIXED
    if axis in where:
        own = where.index(axis)
        found = own if shape_of(eqn.invars[0])[own] == shape_of(eqn.outvars[0])[axis] else MIXED
    return [found, *[None] * (len(eqn.invars) - 1)]


@_rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
def _reduce(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    return [_kept(eqn, eqn.params["axes"])[axis]]


@_rule("reduce")
def _reduce_by(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    operands = len(eqn.invars) // 2
    return [*[_kept(eqn, eqn.params["dimensions"])[axis]] * operands, *[MIXED] * operands]


@_rule("squeeze")
def _squeeze(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    return [_kept(eqn, eqn.params["dimensions"])[axis]]


@_rule("expand_dims")
def _expand_dims(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    new = eqn.params["dimensions"]
    kept = [i for i in range(len(shape_of(eqn.outvars[0]))) if i not in new]
    return [MIXED if axis in new else kept.index(axis)]


@_rule("forwardgrad_summed")
def _summed(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    return [MIXED if axis == eqn.params["axis"] else axis]


def _kept(eqn: JaxprEqn, axes: Sequence[SupportsIndex]) -> list[int]:
    return [i for i in range(len(shape_of(eqn.invars[0]))) if i not in axes]


@_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    return [Aligned(axis) if axis == eqn.params["axis"] else axis]


@_rule("sort")
def _sort(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    return [MIXED if axis == eqn.params["dimension"] else axis] * len(eqn.invars)


@_rule("top_k")
def _top_k(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    along = eqn.params.get("axis", len(shape_of(eqn.invars[0])) - 1)
    return [MIXED if axis == along % len(shape_of(eqn.invars[0])) else axis]


@_rule("rev")
def _rev(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    return [MIXED if axis in eqn.params["dimensions"] else axis]


@_rule("triangular_solve")
def _triangular(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    rank = len(shape_of(eqn.invars[1]))
    solved = rank - 2 if eqn.params["left_side"] else rank - 1
    return [axis if axis < rank - 2 else MIXED, MIXED if axis == solved else axis]


@_rule("cholesky", "eigh", "lu", "qr", "householder_product", "svd")
def _matrices(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    ranks = [len(shape_of(atom)) for atom in eqn.invars]
    leading = min(ranks) - 2
    return [axis if axis < leading else MIXED] * len(eqn.invars)


@_rule("fft")
def _fft(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    kept = len(shape_of(eqn.invars[0])) - len(eqn.params["fft_lengths"])
    return [axis if axis < kept else MIXED]


@_rule("reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window")
def _windows(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    p = eqn.params
    alone = p["window_dimensions"][axis] == 1 and p["window_strides"][axis] == 1
    plain = all(p[name][axis] == 1 for name in ("base_dilation", "window_dilation") if name in p)
    own = alone and plain and tuple(p["padding"][axis]) == (0, 0)
    rank = len(shape_of(eqn.outvars[0]))
    return [axis if own and len(shape_of(a)) == rank else MIXED for a in eqn.invars]


@_rule("select_and_scatter_add", "select_and_gather_add")
def _window_choices(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    p = eqn.params
    alone = p["window_dimensions"][axis] == 1 and p["window_strides"][axis] == 1
    return [axis if alone and tuple(p["padding"][axis]) == (0, 0) else MIXED] * len(eqn.invars)


@_rule("dynamic_slice", "slice")
def _slice(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    return [axis, *[None] * (len(eqn.invars) - 1)]


@_rule("dynamic_update_slice")
def _update_slice(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    return [axis, axis, *[None] * (len(eqn.invars) - 2)]


@_rule("pad")
def _pad(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    plain = tuple(eqn.params["padding_config"][axis]) == (0, 0, 0)
    return [axis if plain else UNKNOWN, MIXED]


@_rule("concatenate")
def _concatenate(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    along = axis == eqn.params["dimension"] and len(eqn.invars) > 1
    return [UNKNOWN if along else axis] * len(eqn.invars)


@_rule("stack")
def _stack(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    new = eqn.params["axis"]
    return [UNKNOWN if axis == new else axis - (axis > new)] * len(eqn.invars)


@_rule("unstack")
def _unstack(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    return [axis + (axis >= eqn.params["axis"])]


@_rule("tile")
def _tile(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    reps = eqn.params["reps"]
    new = len(reps) - len(shape_of(eqn.invars[0]))
    if axis < new:
        return [MIXED]
    return [axis - new if reps[axis] == 1 else UNKNOWN]


@_rule("split")
def _split(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    return [UNKNOWN if axis == eqn.params["axis"] and len(eqn.outvars) > 1 else axis]


@_rule("dot_general")
def _dot_general(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    return _of_product(eqn, axis, *eqn.params["dimension_numbers"])


@_rule("ragged_dot_general")
def _ragged(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contracting, batch) = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions
    if not groups or {*numbers.lhs_ragged_dimensions} & {*contracting[0], *batch[0]}:
        return [UNKNOWN, UNKNOWN, None]
    left, _ = _of_product(eqn, axis, contracting, batch, extra=tuple(groups))
    return [left, MIXED, None]


def _of_product(
    eqn: JaxprEqn, axis: int, contracting: Any, batch: Any, extra: tuple[int, ...] = ()
) -> list[Target]:
    if axis < len(batch[0]):
        return [batch[0][axis], batch[1][axis]]
    used = [(*contracting[0], *batch[0]), (*contracting[1], *batch[1], *extra)]
    free = [
        [i for i in range(len(shape_of(atom))) if i not in used[s]]
        for s, atom in enumerate(eqn.invars[:2])
    ]
    place = axis - len(batch[0])
    if place < len(free[0]):
        return [free[0][place], MIXED]
    return [MIXED, free[1][place - len(free[0])]]


@_rule("conv_general_dilated")
def _conv(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    spec, p = eqn.params["dimension_numbers"], eqn.params
    if axis == spec.out_spec[0] and p["batch_group_count"] == 1:
        return [spec.lhs_spec[0], MIXED]
    if axis in spec.out_spec[2:]:
        # A window of one entry mixes no places.
        i = spec.out_spec.index(axis)
        kernel, s = shape_of(eqn.invars[1])[spec.rhs_spec[i]], i - 2
        steps = (p["window_strides"][s], p["lhs_dilation"][s], tuple(p["padding"][s]))
        return [spec.lhs_spec[i] if kernel == 1 and steps == (1, 1, (0, 0)) else MIXED, MIXED]
    return [UNKNOWN, MIXED] if axis != spec.out_spec[1] else [MIXED, MIXED]


@_rule("gather")
def _gather(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    numbers, shape = eqn.params["dimension_numbers"], shape_of(eqn.invars[0])
    batching, sizes = numbers.operand_batching_dims, eqn.params["slice_sizes"]
    if axis in numbers.offset_dims:
        gone = (*numbers.collapsed_slice_dims, *batching)
        kept = [i for i in range(len(shape)) if i not in gone]
        own = kept[numbers.offset_dims.index(axis)]
        return [own if sizes[own] == shape[own] else UNKNOWN, None]
    rank = len(shape_of(eqn.outvars[0]))
    index = [i for i in range(rank) if i not in numbers.offset_dims].index(axis)
    if index in numbers.start_indices_batching_dims:
        return [batching[numbers.start_indices_batching_dims.index(index)], None]
    n = shape_of(eqn.outvars[0])[axis]
    for column, operand_axis in enumerate(numbers.start_index_map):
        one = operand_axis in numbers.collapsed_slice_dims and shape[operand_axis] == n
        if one and _counts_up(_column(flow, eqn.invars[1], column), index, n):
            return [operand_axis, None]
    return [UNKNOWN, None]


def _column(flow: NamedAxes, atom: Any, column: int) -> np.ndarray | None:
    """One column of indices, if it is known while tracing."""
    made = flow.maker(atom)
    last = len(shape_of(atom)) - 1
    is_joined = made is not None and made.primitive.name == "concatenate"
    if made is not None and is_joined and made.params["dimension"] == last:
        for part in made.invars:
            if column < shape_of(part)[last]:
                known = flow.constant(part)
                return None if known is None else known[..., column]
            column -= shape_of(part)[last]
    known = flow.constant(atom)
    return None if known is None else known[..., column]


def _counts_up(index: np.ndarray | None, axis: int, n: int) -> bool:
    """Whether indices are 0, 1, 2, ... along an axis."""
    if index is None or index.ndim <= axis:
        return False
    return bool(np.all(np.moveaxis(index, axis, -1) == np.arange(n)))


@_rule(*SCATTERS)
def _scatter(flow: NamedAxes, eqn: JaxprEqn, out: int, axis: int) -> Sequence[Target]:
    numbers, shape = eqn.params["dimension_numbers"], shape_of(eqn.invars[0])
    _, indices, updates = eqn.invars
    if numbers.operand_batching_dims:
        return [axis, None, UNKNOWN]
    if axis not in numbers.inserted_window_dims:
        kept = [i for i in range(len(shape)) if i not in numbers.inserted_window_dims]
        own = numbers.update_window_dims[kept.index(axis)]
        same = shape_of(updates)[own] == shape[axis] and (
            axis not in numbers.scatter_dims_to_operand_dims
        )
        return [axis, None, own if same else UNKNOWN]
    # A segment sum: each entry of the updates belongs to the segment that its index names.
    scattered = [i for i in range(len(shape_of(updates))) if i not in numbers.update_window_dims]
    one = len(scattered) == 1 and shape_of(indices) == (shape_of(updates)[scattered[0]], 1)
    if one and numbers.scatter_dims_to_operand_dims == (axis,) and isinstance(indices, Var):
        known = flow.value(indices) is not None
        return [axis, None, Part(scattered[0], 1, shape[axis], indices) if known else UNKNOWN]
    return [axis, None, UNKNOWN]


def may_have_own(places: Places | None, name: str) -> bool:
    """Whether a value has, or may have, entries of its own for each entry along an axis."""
    found = [p for (_, n), p in (places or {}).items() if n == name]
    return any(p == UNKNOWN or p.parts is not None for p in found)


def places_of_terms(jaxpr: Jaxpr, axes: Sequence[Sequence[str]]) -> list[Places | None]:
    """What holds of a program's outputs, the first of which are terms with these names."""

    def of(term: int, names: Sequence[str]) -> Places:
        shape = shape_of(jaxpr.outvars[term])
        own = [Place((Part(i, 1, n),), False) for i, n in enumerate(shape)]
        return {(term, name): place for name, place in zip(names, own, strict=True)} or {
            (term, None): MIXED
        }

    found: list[Places | None] = [of(t, names) for t, names in enumerate(axes)]
    return found + [None] * (len(jaxpr.outvars) - len(found))
