"""Rules for the equations that a perturbed weight enters.

Three of them use the weight (`dot_general`, `conv_general_dilated`, `gather`); the others move,
cast or cut it, and do the same to its factors.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from forwardgrad.rewrite._perturbed import RANK, Factor, Label, Perturbed, contract, multiply
from forwardgrad.rewrite._trace import Array, evaluate
from forwardgrad.rewrite._walk import Value, Walk, rule


@rule("dot_general")
def _dot_general(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value] | None:
    if all(isinstance(v, Perturbed) for v in invals):
        of_both = _two_weights(walk, eqn, *invals)
        if of_both is not None:
            return [of_both]
    side = _weight_side(invals)
    weight = invals[side]
    (contracting, batch) = eqn.params["dimension_numbers"]
    summed = [n for i in contracting[side] for n in weight.axes[i]]
    stacked = [n for i in batch[side] for n in weight.axes[i]]
    walk.record(contracted=summed, stacked=stacked)
    free = {*weight.labels} - {*summed, *stacked}
    factors = [{*f.labels} for term in weight.terms if len(term) > 1 for f in term]
    if any(labels & {*summed} and labels & free for labels in factors):
        # A product with such a factor costs as much as one with the tangent, for each term.
        return None
    x = walk.array(invals[1 - side])
    x_labels, out_labels = _dot_labels(weight, x.ndim, contracting, batch, side)
    out_shape = _out_shape(eqn)
    options = {
        "precision": eqn.params["precision"],
        "preferred_element_type": eqn.params["preferred_element_type"],
    }

    def primal(x, value):
        (y,) = evaluate(eqn, (x, value) if side == 1 else (value, x))
        return y

    def contribution(x, w):
        sizes = [w.size(n) if n in w.labels else x.shape[n.axis] for n in x_labels]
        factor = Factor(x.reshape(sizes), x_labels)
        (term,) = w.terms
        return contract(factor, term, out_labels, **options).reshape(out_shape)

    return [walk.apply(weight, primal, contribution, x)]


def _weight_side(invals: Sequence[Value]) -> int:
    """The operand whose factors are used; of two weights the larger one."""
    sizes = [v.value.size if isinstance(v, Perturbed) else -1 for v in invals]
    return int(sizes[1] >= sizes[0])


def _two_weights(walk: Walk, eqn: JaxprEqn, v: Perturbed, w: Perturbed) -> Perturbed | None:
    """The product of two weights as a weight, by the product rule.

    None where their axes are merged ones, or a weight meets itself.
    """
    contracting, batch = eqn.params["dimension_numbers"]
    pairs = [*zip(*contracting, strict=True), *zip(*batch, strict=True)]
    single = all(len(axis) <= 1 for axis in (*v.axes, *w.axes))
    if not single or {*v.labels} & {*w.labels}:
        return None
    if any(bool(v.axes[i]) != bool(w.axes[j]) for i, j in pairs):
        return None
    for weight, side in ((v, 0), (w, 1)):
        walk.record(
            contracted=[n for i in contracting[side] for n in weight.axes[i]],
            stacked=[n for i in batch[side] for n in weight.axes[i]],
        )
    renamed = walk.rename(
        w, {n: m for i, j in pairs for n, m in zip(w.axes[j], v.axes[i], strict=True)}
    )
    if renamed is None:
        return None
    (value,) = evaluate(eqn, [v.value, w.value])
    shared = [v.axes[i] for i in batch[0]]
    free = [
        [axis for i, axis in enumerate(p.axes) if i not in (*contracting[s], *batch[s])]
        for s, p in enumerate((v, renamed))
    ]
    axes = (*shared, *free[0], *free[1])
    summed = {n for i in contracting[0] for n in v.axes[i]}
    left, right = (Factor(p.value.reshape(_sizes(p)), p.labels) for p in (v, renamed))
    terms = [_merged(term, right, summed) for term in v.terms]
    terms += [_merged(term, left, summed) for term in renamed.terms]
    return Perturbed(value, axes, tuple(terms))


def _sizes(w: Perturbed) -> list[int]:
    """The shape without the axes of size one, which have no labels."""
    return [n for n, axis in zip(w.value.shape, w.axes, strict=True) if axis]


def _merged(term: Sequence[Factor], array: Factor, summed: set[Label]) -> tuple[Factor, ...]:
    """A product of factors with one more, summed over some labels."""
    rest = [f for f in term if summed.isdisjoint(f.labels)]
    inner = [f for f in term if not summed.isdisjoint(f.labels)]
    labels = dict.fromkeys(n for f in (*inner, array) for n in f.labels if n not in summed)
    return (*rest, Factor(multiply([*inner, array], tuple(labels)), tuple(labels)))


def _dot_labels(
    weight: Perturbed,
    x_ndim: int,
    contracting: tuple[Sequence[int], Sequence[int]],
    batch: tuple[Sequence[int], Sequence[int]],
    side: int,
) -> tuple[tuple[Label, ...], tuple[Label, ...]]:
    """The labels of x and of the product, given those of the weight."""
    x_axes: list[tuple[Label, ...]] = [(Label(-2, i),) for i in range(x_ndim)]
    for pairs in (contracting, batch):
        for i, j in zip(pairs[1 - side], pairs[side], strict=True):
            x_axes[i] = weight.axes[j]
    used_w, used_x = ({*contracting[s], *batch[s]} for s in (side, 1 - side))
    free_w = [axis for i, axis in enumerate(weight.axes) if i not in used_w]
    free_x = [axis for i, axis in enumerate(x_axes) if i not in used_x]
    shared = [weight.axes[i] for i in batch[side]]
    order = [*shared, *free_x, *free_w] if side == 1 else [*shared, *free_w, *free_x]
    return _flatten(x_axes), _flatten(order)


def _flatten(axes: Sequence[tuple[Label, ...]]) -> tuple[Label, ...]:
    return tuple(label for axis in axes for label in axis)


@rule("conv_general_dilated")
def _conv(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value] | None:
    x, weight = invals
    if not isinstance(weight, Perturbed) or eqn.params["batch_group_count"] != 1:
        return None
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    walk.record(contracted=_flatten([a for i, a in enumerate(weight.axes) if i != out_axis]))

    def primal(x, value):
        return evaluate(eqn, (x, value))[0]

    def contribution(x, w):
        factors = _separate_output(w, out_axis)
        if factors is None:
            return primal(x, w.tangent())
        return _conv_by_factors(eqn, x, w, *factors)

    return [walk.apply(weight, primal, contribution, walk.array(x))]


def _separate_output(w: Perturbed, out_axis: int) -> tuple[list[Factor], Factor] | None:
    """The factors over kernel and input channels, and the one over output channels."""
    if len(w.axes[out_axis]) != 1:
        return None
    (label,) = w.axes[out_axis]
    (term,) = w.terms
    over_out = [f for f in term if label in f.labels]
    if len(over_out) != 1 or not set(over_out[0].labels) <= {label, RANK}:
        return None
    return [f for f in term if label not in f.labels], over_out[0]


def _conv_by_factors(
    eqn: JaxprEqn, x: Array, w: Perturbed, over_in: list[Factor], over_out: Factor
) -> jax.Array:
    """A convolution to one channel a group (and term), spread over the output channels."""
    if not over_in:
        return evaluate(eqn, (x, w.tangent()))[0]
    p = eqn.params
    spec, groups = p["dimension_numbers"], p["feature_group_count"]
    out_axis = spec.rhs_spec[0]
    (label,) = w.axes[out_axis]
    terms = over_out.size(RANK) if RANK in over_out.labels else 1
    inner = [n for i, axis in enumerate(w.axes) if i != out_axis for n in axis]
    kernel = multiply(over_in, [*inner, RANK] if terms > 1 else inner)
    shape = [n for i, n in enumerate(w.value.shape) if i != out_axis]
    kernel = jnp.moveaxis(kernel.reshape(*shape, terms), -1, out_axis).astype(w.value.dtype)
    y = jax.lax.conv_general_dilated(
        x,
        jnp.concatenate([kernel] * groups, axis=out_axis),
        window_strides=p["window_strides"],
        padding=p["padding"],
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["rhs_dilation"],
        dimension_numbers=spec,
        feature_group_count=groups,
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )
    channel = spec.out_spec[1]
    y = jnp.moveaxis(y, channel, -1)
    y = y.reshape(*y.shape[:-1], groups, terms)
    spread = multiply([over_out], [RANK, label] if terms > 1 else [label])
    spread = spread.reshape(terms, groups, -1)
    y = y * spread[0] if terms == 1 else jnp.einsum("...gr,rgo->...go", y, spread)
    y = y.reshape(*y.shape[:-2], w.value.shape[out_axis])
    return jnp.moveaxis(y, -1, channel)


@rule("gather")
def _gather(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value] | None:
    weight, indices = invals
    if not isinstance(weight, Perturbed):
        return None
    d, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    cut = [i for i, n in enumerate(sizes) if n != weight.value.shape[i]]
    if len(cut) != 1 or d.operand_batching_dims or {*d.collapsed_slice_dims} - {*cut}:
        return None
    (axis,) = cut
    fills = eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    # Any start along the whole axes is clipped to zero, unless it empties the slice.
    looked_up = axis in d.start_index_map and (len(d.start_index_map) == 1 or not fills)
    if not (looked_up and sizes[axis] == 1 and len(weight.axes[axis]) == 1):
        return None
    index = indices[..., d.start_index_map.index(axis)]
    if index.ndim:
        walk.record(contracted=weight.axes[axis])
    else:
        walk.record(stacked=weight.axes[axis])
    (value,) = evaluate(eqn, (weight.value, indices))
    (label,) = weight.axes[axis]
    new = tuple(label.child(2 + i) for i in range(index.ndim))
    mode = "fill" if fills else "clip"
    offset = iter(
        [
            axes if i != axis else ()
            for i, axes in enumerate(weight.axes)
            if i not in d.collapsed_slice_dims
        ]
    )
    batch = iter([(n,) for n in new])
    axes = [next(offset) if i in d.offset_dims else next(batch) for i in range(value.ndim)]
    return [weight.map(value, lambda f: _pick(f, label, index, new, mode), axes)]


def _pick(f: Factor, label: Label, indices: Array, new: tuple[Label, ...], mode: str) -> Factor:
    """The factor at `indices` along `label`; their axes are `new`."""
    if label not in f.labels:
        return f
    i = f.labels.index(label)
    at = f.array.at[(*[slice(None)] * i, indices)]
    picked = at.get(mode=mode, fill_value=0, wrap_negative_indices=False)
    return Factor(picked, (*f.labels[:i], *new, *f.labels[i + 1 :]))


@rule("transpose")
def _transpose(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value]:
    return [invals[0].transpose(eqn.params["permutation"])]


@rule("reshape", "squeeze", "expand_dims", "broadcast_in_dim")
def _reshape(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value] | None:
    weight, *dynamic = invals
    shape = _out_shape(eqn)
    permutes = eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None
    if dynamic or permutes or math.prod(shape) != weight.value.size:
        return None
    reshaped = weight.reshape(shape)
    return None if reshaped is None else [reshaped]


@rule(
    *("convert_element_type", "copy", "copy_p", "sharding_constraint", "reshard", "pvary"),
    *("name", "forwardgrad_mark"),
)
def _same_layout(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value] | None:
    weight = invals[0]
    (value,) = evaluate(eqn, [weight.value])
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return [value]
    if jnp.iscomplexobj(weight.value) and not jnp.iscomplexobj(value):
        return None
    return [weight.with_value(value)]


@rule("stop_gradient")
def _stop_gradient(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value]:
    # The value may have a tangent too, of data that were added.
    return evaluate(eqn, [invals[0].value])


@rule("neg")
def _neg(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value]:
    return [invals[0].with_value(-invals[0].value, scale=jnp.asarray(-1.0))]


@rule("mul", "div")
def _scale(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value] | None:
    side = 0 if isinstance(invals[0], Perturbed) else 1
    divides = eqn.primitive.name == "div"
    if isinstance(invals[1 - side], Perturbed) or (divides and side == 1):
        return None
    weight, other = invals[side], jnp.asarray(invals[1 - side])
    (value,) = evaluate(eqn, [weight.value if i == side else v for i, v in enumerate(invals)])
    scale = 1 / other if divides else other
    if not other.ndim:
        return [weight.with_value(value, scale=scale)]
    if value.shape != weight.value.shape:
        return None
    scaled = weight.times(value, scale)
    return None if scaled is None else [scaled]


@rule("add", "sub", "add_any")
def _add(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value] | None:
    sign = -1.0 if eqn.primitive.name == "sub" else 1.0
    return _sum_of(walk, eqn, invals, [jnp.ones(()), jnp.asarray(sign)])


@rule("select_n")
def _select(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value] | None:
    which, *cases = invals
    chosen = [(jnp.asarray(which).astype(int) == i).astype(jnp.float32) for i in range(len(cases))]
    return _sum_of(walk, eqn, invals, [jnp.ones(()), *chosen])


def _sum_of(
    walk: Walk, eqn: JaxprEqn, invals: Sequence[Value], scales: Sequence[jax.Array]
) -> Sequence[Value] | None:
    """The weight whose tangent is the sum of those of the inputs, each times its scale."""
    (value,) = evaluate(eqn, [v.value if isinstance(v, Perturbed) else v for v in invals])
    total: Perturbed | None = None
    for v, scale in zip(invals, scales, strict=True):
        if not isinstance(v, Perturbed):
            continue
        if v.value.shape != value.shape:
            return None
        own = v.times(value, scale) if scale.ndim else v.with_value(value, scale=scale)
        other = own if own is None or total is None else walk.like(total, own)
        if other is None:
            return None
        total = other if total is None else total + other
    assert total is not None
    return [total.with_value(value)]


@rule("slice")
def _slice(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value] | None:
    p = eqn.params
    strides = p["strides"] or [1] * len(p["start_indices"])
    cuts = list(zip(p["start_indices"], p["limit_indices"], strides, strict=True))

    def cut(axis):
        start, limit, stride = cuts[axis]
        return lambda a, i: jax.lax.slice_in_dim(a, start, limit, stride, axis=i)

    return _each_axis(walk, invals[0], _out_shape(eqn), cut)


@rule("dynamic_slice")
def _dynamic_slice(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value] | None:
    weight, *starts = invals
    if not isinstance(weight, Perturbed):
        return None
    sizes = eqn.params["slice_sizes"]

    def cut(axis):
        return lambda a, i: jax.lax.dynamic_slice_in_dim(
            a, starts[axis], sizes[axis], axis=i, allow_negative_indices=False
        )

    return _each_axis(walk, weight, sizes, cut)


def _each_axis(walk: Walk, weight: Perturbed, shape: Sequence[int], cut) -> list[Value] | None:
    """Cut every axis whose size changes, in the value and in the factors."""
    result: Perturbed | None = weight
    for axis, size in enumerate(shape):
        if size == weight.value.shape[axis]:
            continue
        if size == 1:
            walk.record(stacked=weight.axes[axis])
        result = result.map_axis(axis, cut(axis))
        if result is None:
            return None
    return [result]


@rule("split")
def _split(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value] | None:
    axis, start, parts = eqn.params["axis"], 0, []
    for size in eqn.params["sizes"]:
        cut = lambda a, i, s=start, n=size: jax.lax.slice_in_dim(a, s, s + n, axis=i)  # noqa: E731
        parts.append(invals[0].map_axis(axis, cut))
        start += size
    return None if any(part is None for part in parts) else parts


@rule("rev")
def _rev(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value] | None:
    result: Perturbed | None = invals[0]
    for axis in eqn.params["dimensions"]:
        result = result and result.map_axis(axis, lambda a, i: jnp.flip(a, i))
    return None if result is None else [result]


def _out_shape(eqn: JaxprEqn) -> tuple[int, ...]:
    return eqn.outvars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
