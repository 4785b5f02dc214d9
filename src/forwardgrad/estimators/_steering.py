"""Which losses an activation's entries can change, and K tangents at once."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import jaxpr_as_fun
from jax.interpreters import ad
from jaxtyping import Array

from forwardgrad._errors import MOST, InputError
from forwardgrad._losses import Losses
from forwardgrad.estimators._mixing import Mixing, credited, of_later
from forwardgrad.rewrite import (
    UNKNOWN,
    Activation,
    Part,
    Program,
    Site,
    line_of,
    shared,
    summed_change,
)


def influenced(
    activation: Activation, losses: Losses, program: Program, mixing: Mixing = "all"
) -> Array:
    """What an activation's entries can change of the losses, in a shape that broadcasts to it.

    Terms that it cannot change are left out, entries of other examples, patches and groups too.
    `mixing` says what tokens are credited with that change other tokens' losses.

    **Raises:**

    `InputError` if it is unknown where an axis of the losses is in the activation.
    """
    total: Any = 0.0
    for i in sorted(activation.terms):
        names = losses.axes[i]
        term = losses.terms[i]
        parts = [
            _own_parts(activation, i, names, name, mixing) if size > 1 else None
            for name, size in zip(names, term.shape, strict=True)
        ]
        term = term.astype(jnp.promote_types(term.dtype, jnp.float32))
        for j, own in enumerate(parts):
            if own is not None and activation.place(i, names[j]).mixed:
                term = of_later(term, j, mixing)
        term = jnp.sum(term, axis=tuple(j for j, own in enumerate(parts) if own is None))
        kept = [own for own in parts if own is not None]
        # A collective leaves no axis apart: what has one of its own stays with its worker.
        shared = frozenset() if kept else program.collectives
        term = summed_change(term, activation.value, shared)
        total = total + aligned(term, kept, activation.value.shape, program)
    return total


def _own_parts(
    activation: Activation, term: int, names: Sequence[str], name: str, mixing: Mixing
) -> tuple[Part, ...] | None:
    """The digits of a place along an axis of the losses, None for all places together."""
    place = activation.place(term, name)
    if place == UNKNOWN:
        raise unknown_axis(activation, name)
    if names.count(name) > 1 or (place.mixed and not credited(mixing, name, names)):
        return None
    return place.parts


def unknown_axis(activation: Activation, name: str) -> InputError:
    """The error for an activation in which an axis of the losses could not be found."""
    shape = activation.value.shape[activation.stacked :]
    what = "that of the examples" if name == "example" else f"that of {name!r}"
    return InputError(
        f"it is unclear which axis of an activation of shape {shape} is {what}, at "
        f"{activation.line}; mark it there with forwardgrad.activation(z, {name!r}, ...), a name "
        f"for each axis, or return losses without {name!r}"
    )


def aligned(
    term: Array, parts: Sequence[Sequence[Part]], shape: Sequence[int], program: Program
) -> Array:
    """An array whose axes have their places in a value of `shape`, to be broadcast to that."""
    digits: list[Part] = []
    for axis, own in reversed(list(enumerate(parts))):
        if own and own[0].through is not None:
            ids = program.plan.flow.value(own[0].through).reshape(-1)
            at = term.at[(*[slice(None)] * axis, ids)]
            term = at.get(mode="fill", fill_value=0, wrap_negative_indices=False)
            own = (Part(own[0].axis, 1, len(ids)),)
        _check_sizes(term.shape[axis], own, shape)
        term = term.reshape(*term.shape[:axis], *[p.size for p in own], *term.shape[axis + 1 :])
        digits = [*own, *digits]
    order = sorted(range(len(digits)), key=lambda i: (digits[i].axis, -digits[i].inner))
    return _spread(term.transpose(order), [digits[i] for i in order], shape)


def _check_sizes(size: int, parts: Sequence[Part], shape: Sequence[int]) -> None:
    if math.prod(p.size for p in parts) != size:
        raise InputError(
            f"an axis of {size} losses must be as long as the axis of an activation of shape "
            f"{tuple(shape)} that a mark calls by the same name"
        )


def _spread(term: Array, digits: Sequence[Part], shape: Sequence[int]) -> Array:
    """Axes that are digits of `shape`'s axes, ordered, as these axes; 1 where there are none."""
    split, full, merged = [], [], []
    for axis, size in enumerate(shape):
        own = [p for p in digits if p.axis == axis]
        rest = size
        for p in own:
            split += [1, p.size]
            full += [rest // (p.inner * p.size), p.size]
            rest = p.inner
        if own:
            split.append(1)
            full.append(rest)
        merged.append(size if own else 1)
    return jnp.broadcast_to(term.reshape(split), full).reshape(merged)


CACHE = 2**21
"""Bytes of one value's tangents that a processor works on at a time, where it has the choice."""


def over_tangents(
    along: Callable[..., tuple[Any, Any]],
    tangents: Any,
    count: int,
    program: Program,
    chunk: int | None = None,
    *,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """What one pass computes, and what each of K tangents adds to it, stacked.

    `vmap` is outside of `jvp`: what does not depend on the tangents is computed once for so many
    of them. It is kept for all of them if that needs less memory than all tangents at once. What
    `vmap` refuses is done one tangent after another.

    **Arguments:**

    - `along`: `along(tangent, pure=False) -> (once, each)`; with `pure`, effects are left out.
    - `tangents`: a tree of arrays, K their first axis.
    - `count`: K.
    - `program`: what is evaluated.
    - `chunk`: how many tangents at a time. Default: all, or so many as fit into a cache.
    - `reverse`: whether reverse mode then goes through the pass, and so keeps it. What the tangents
        add is a constant to it.
    """
    if count > 1 and not program.may_refuse_vmap:
        found = _with_shared(along, tangents, count, chunk, reverse)
        if found is not None:
            return found
    if chunk is None or chunk >= count:
        if count == 1 or not program.may_refuse_vmap:
            return _together(along, tangents, count)
        try:
            return isolated(functools.partial(_together, along, count=count), tangents)
        except Exception:  # what a callback or a primitive raises here can be anything
            chunk = 1
    first = (count - 1) % chunk + 1
    head = jax.tree.map(lambda a: a[:first], tangents)
    once, each = over_tangents(along, head, first, program, first)

    def rest(tangent):
        return over_tangents(functools.partial(along, pure=True), tangent, chunk, program, chunk)[1]

    later = _in_chunks(rest, jax.tree.map(lambda a: a[first:], tangents), chunk)
    return once, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), each, later)


def _with_shared(
    along: Callable[..., tuple[Any, Any]],
    tangents: Any,
    count: int,
    chunk: int | None,
    reverse: bool,
) -> tuple[Any, Any] | None:
    """The same in chunks that share what does not depend on the tangents; None if it is no gain."""
    # Elsewhere than on a CPU all of them at once is what is fast.
    if jax.default_backend() != "cpu" if chunk is None else chunk >= count:
        return None
    function = shared(along, jax.tree.map(lambda a: a[0], tangents), fixed=reverse)
    # Where what is computed once comes out of a loop with tangents in it, nothing can be shared.
    if function is None or any(jax.tree.leaves(function.depends[0])):
        return None
    size = function.largest
    if chunk is None:
        chunk = min(count, max(1, CACHE // max(1, size)))
    # An operation has its input and its output, each of them once for every tangent at a time. Of
    # what is kept, XLA keeps half: it makes one value of another one anew.
    dear = function.kept / 2 > 2 * (count - chunk) * size
    if chunk == count or (dear and not reverse):
        return None
    call = function.start()
    once, _ = call(jax.tree.map(lambda a: a[0], tangents))
    first = count % chunk
    each = _in_chunks(
        lambda part: _together(call, part, chunk)[1],
        jax.tree.map(lambda a: a[first:], tangents),
        chunk,
    )
    if first:
        _, head = _together(call, jax.tree.map(lambda a: a[:first], tangents), first)
        each = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), head, each)
    return once, each


def _together(along: Callable[..., tuple[Any, Any]], tangents: Any, count: int) -> tuple[Any, Any]:
    if count == 1:
        # Without the axis of one tangent XLA's layouts are better, by 5 to 10 % of the step.
        once, each = along(jax.tree.map(lambda a: a[0], tangents))
        return once, jax.tree.map(lambda d: jnp.asarray(d)[None], each)
    return jax.vmap(along, out_axes=(None, 0))(tangents)


def _in_chunks(each: Callable[[Any], Any], tangents: Any, chunk: int) -> Any:
    """`each` of so many tangents at a time, one chunk after another."""
    cut = jax.tree.map(lambda a: a.reshape(len(a) // chunk, chunk, *a.shape[1:]), tangents)
    return jax.tree.map(
        lambda d: d.reshape(d.shape[0] * chunk, *d.shape[2:]), jax.lax.map(each, cut)
    )


def check_one_by_one(program: Program, estimator: str) -> None:
    """Raise an `InputError` if several layers cannot be told apart, or one has no reverse mode."""
    for eqn in program.plan.while_loops:
        if any(program.plan.terms(v) for v in eqn.outvars):
            raise InputError(
                f"a parameter enters a while_loop at {line_of(eqn)}, which has no reverse "
                f"mode, and {estimator} needs that of every single layer; WeightPerturbation() "
                "needs none"
            )
    for eqn in program.plan.written:
        raise InputError(
            f"{estimator} cannot follow a parameter that is written to a jax.Ref at "
            f"{line_of(eqn)}; keep it in an array, or use WeightPerturbation()"
        )
    for layer in program.plan.layers.values():
        changes = any(program.plan.terms(v) for v in layer.eqn.outvars)
        if layer.deep and changes:
            raise InputError(
                f"{estimator} works layer by layer, and {layer.eqn.primitive.name} at "
                f"{line_of(layer.eqn)} holds several layers, one after another; take them out of "
                "it, or use WeightPerturbation()"
            )


def check_products(program: Program, estimator: str) -> None:
    """Raise an `InputError` if a product that may be one with a weight is not known to be one."""
    for eqn in program.plan.unclear:
        if any(program.plan.terms(v) for v in eqn.outvars):
            raise InputError(
                f"{estimator} cannot tell whether {eqn.primitive.name} at {line_of(eqn)} is a "
                "product with a weight: a parameter meets an array before, and it is unclear "
                "whether that is data. Return forwardgrad.Losses with an axis 'example' that can "
                "be followed, or close over the array instead of passing it to fun"
            )


def check_no_refs(program: Program, what: str) -> None:
    """Raise an `InputError` where JAX cannot differentiate layers by themselves."""
    if program.has_refs:
        raise InputError(
            f"{what} needs the derivatives of single layers, which JAX does not have where fun "
            "uses a jax.Ref; keep what is written there in an array, or use WeightPerturbation()"
        )


def check_no_exchange(program: Program, what: str) -> None:
    """Raise an `InputError` where a worker's values reach the losses of others."""
    if program.collectives:
        raise InputError(
            f"{what} cannot be used where the workers of a shard_map exchange what they compute, "
            f"along {sorted(program.collectives)}"
        )


def not_differentiable(tree: Any, estimator: str) -> Any:
    """`tree`, with an `InputError` for whatever differentiates it."""

    @jax.custom_jvp
    def guarded(arrays):
        return arrays

    def refuse(primals, tangents):
        moving = [t for t in jax.tree.leaves(tangents, is_leaf=_is_symbolic) if not _is_zero(t)]
        if moving:
            raise InputError(
                f"what {estimator} computes has no derivative; differentiate through "
                "WeightPerturbation() or FeedbackAlignment()"
            )
        (arrays,) = primals
        return arrays, jax.tree.map(lambda a: SymbolicZero.from_primal_value(a), arrays)

    guarded.defjvp(refuse, symbolic_zeros=True)
    return guarded(tree)


def _is_symbolic(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _is_zero(tangent: Any) -> bool:
    return _is_symbolic(tangent) or getattr(tangent, "dtype", None) == jax.dtypes.float0


def total_of(term: Array) -> Array:
    """The sum of a term's entries, in single precision at least."""
    return jnp.sum(term.astype(jnp.promote_types(term.dtype, jnp.float32)))


def check_counts(estimator: Any, *names: str) -> None:
    """Raise an `InputError` for fields that count nothing, or more than JAX can."""
    for name in names:
        value = getattr(estimator, name)
        if name == "chunk" and value is None:
            continue
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be an integer of at least 1, got {value!r}")
        if value > MOST:
            raise InputError(f"{name} must be at most {MOST}, got {value}")


def isolated(fun: Callable, *args: Any) -> Any:
    """`fun(*args)`, so that nothing of it happens where it raises."""
    closed, out = jax.make_jaxpr(fun, return_shape=True)(*args)
    outs = jaxpr_as_fun(closed)(*jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(out), outs)


def at_iterations(array: Array, site: Site) -> Array:
    """The part of a stack that belongs to one iteration of the loops around a layer."""
    for i in site.iterations:
        array = jax.lax.dynamic_index_in_dim(array, i, keepdims=False)
    return array


def zero(x: Array) -> ad.Zero:
    """A symbol for zero: it costs nothing, where an array of zeros costs a backward pass."""
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def pulled_back(pullback: Callable[[Any], Any], cotangents: Any) -> Any:
    """What comes back from cotangents, some of which are symbols for zero."""
    try:
        return pullback(cotangents)
    except Exception:  # not all of JAX's primitives take them: what a `scan` stacks must be arrays
        is_zero = lambda c: isinstance(c, ad.Zero)  # noqa: E731
        return pullback(jax.tree.map(ad.instantiate_zeros, cotangents, is_leaf=is_zero))
