"""Rules for equations that hold programs: the walk goes through them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import JaxprEqn

from forwardgrad.rewrite._flow import tangent_program
from forwardgrad.rewrite._perturbed import Factor, Perturbed
from forwardgrad.rewrite._primitives import scan_counts, while_counts
from forwardgrad.rewrite._trace import evaluate, is_inexact, no_tangent, with_none_for_integers
from forwardgrad.rewrite._walk import PROGRAMS, AbstractWalk, Sketch, Value, Walk, rule


@rule("scan", table=PROGRAMS)
def _scan(walk: AbstractWalk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value]:
    body = eqn.params["jaxpr"]
    num_consts, num_carry = scan_counts(eqn)
    consts = invals[:num_consts]
    init = [walk.array(v) for v in invals[num_consts : num_consts + num_carry]]
    stacks = [_Stack(walk, v) for v in invals[num_consts + num_carry :]]

    def step(carry, slices):
        i, parts = slices
        xs = [stack.at(part) for stack, part in zip(stacks, parts, strict=True)]
        inner = walk.iteration(i)
        outs = inner.arrays(body.jaxpr, body.consts, [*consts, *carry, *xs])
        return outs[:num_carry], (outs[num_carry:], inner.noted)

    carry, (ys, noted) = jax.lax.scan(
        step,
        init,
        (jnp.arange(eqn.params["length"]), [stack.arrays for stack in stacks]),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    walk.note(noted)
    return [*carry, *ys]


class _Stack:
    """A scanned-over input: what `scan` slices, and the slice as a value of the walk."""

    def __init__(self, walk: AbstractWalk, value: Value):
        if isinstance(value, Perturbed) and len(value.axes[0]) > 1:
            value = walk.array(value)
        self.weight = value if isinstance(value, Perturbed) else None
        if self.weight is None:
            self.arrays = [value]
            return
        walk.record(stacked=self.weight.axes[0])  # pyright: ignore
        # A stack of one slice has no label: its factors are the slice's.
        self.label = next(iter(self.weight.axes[0]), None)
        self.sliced = [
            jnp.moveaxis(f.array, f.labels.index(self.label), 0)
            for term in self.weight.terms
            for f in term
            if self.label in f.labels
        ]
        self.arrays = [self.weight.value, *self.sliced]

    def at(self, parts: Sequence[jax.Array]) -> Value:
        if self.weight is None:
            return parts[0]
        value, *slices = parts
        rest = iter(slices)

        def slice_of(f: Factor) -> Factor:
            if self.label not in f.labels:
                return f
            return Factor(next(rest), tuple(n for n in f.labels if n != self.label))

        return self.weight.map(value, slice_of, self.weight.axes[1:])


@rule("while", table=PROGRAMS)
def _while(walk: AbstractWalk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value]:
    cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    n_cond, n_body = while_counts(eqn)
    cond_consts, body_consts = invals[:n_cond], invals[n_cond : n_cond + n_body]
    init = [walk.array(v) for v in invals[n_cond + n_body :]]

    def unfinished(carry):
        return walk.arrays(cond.jaxpr, cond.consts, [*cond_consts, *carry])[0]

    def advance(carry):
        new = walk.arrays(body.jaxpr, body.consts, [*body_consts, *carry])
        if not batched:
            return new
        # Under vmap every example has a condition of its own: its axes lead those of the carry.
        going = unfinished(carry)
        return [
            jnp.where(jnp.expand_dims(going, range(going.ndim, jnp.ndim(n))), n, c)
            for n, c in zip(new, carry, strict=True)
        ]

    batched = cond.out_avals[0].shape != ()
    return jax.lax.while_loop(lambda carry: jnp.any(unfinished(carry)), advance, init)


@rule("cond", table=PROGRAMS)
def _cond(walk: AbstractWalk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value]:
    index, *operands = invals
    branches = [
        lambda branch=branch: walk.arrays(branch.jaxpr, branch.consts, operands)
        for branch in eqn.params["branches"]
    ]
    return jax.lax.switch(index, branches)


@rule("custom_jvp_call", table=PROGRAMS)
def _custom_jvp(walk: Walk, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value] | None:
    """A function with a rule of its own, whose rule is walked with the weights' factors."""
    program = tangent_program(eqn)
    if program is None:
        return None
    weights = [v if isinstance(v, Perturbed) else None for v in invals]
    arrays = [v.value if isinstance(v, Perturbed) else v for v in invals]
    moving = [i for i, v in enumerate(eqn.invars) if is_inexact(v)]
    if isinstance(walk, Sketch):
        own = [jnp.zeros_like(arrays[i]) if weights[i] is None else invals[i] for i in moving]
        walk.arrays(program.jaxpr, program.consts, [*arrays, *own])
        return walk.evaluate(eqn, arrays)
    like = {i: w for i, w in enumerate(weights) if w is not None}
    shapes = {i: (w.axes, [[f.labels for f in term] for term in w.terms]) for i, w in like.items()}
    factors = {i: [[f.array for f in term] for term in w.terms] for i, w in like.items()}

    @jax.custom_jvp
    def call(eps, arrays, factors):
        del eps, factors
        return evaluate(eqn, arrays)

    def jvp(primals, tangents):
        _, arrays, factors = primals
        d_eps, moved, _ = tangents
        zeros = [isinstance(moved[i], SymbolicZero) for i in moving]
        moved = [as_array(moved[i], arrays[i]) for i in moving]

        scaled = [
            _with_factors(d, zero, as_array(d_eps, walk.eps), *shapes[i], factors[i])
            if i in shapes
            else d
            for i, d, zero in zip(moving, moved, zeros, strict=True)
        ]
        # The rule is linear in the tangents: it takes the sum of what comes from data and weights.
        sums = dataclasses.replace(walk, eps=None)
        outs = sums.arrays(program.jaxpr, program.consts, [*arrays, *scaled])
        outs, changes = outs[: len(eqn.outvars)], outs[len(eqn.outvars) :]
        return outs, with_none_for_integers(changes, outs)

    call.defjvp(jvp, symbolic_zeros=True)
    return call(walk.eps, arrays, factors)


def _with_factors(
    tangent: jax.Array,
    is_zero: bool,
    scale: jax.Array,
    axes: Any,
    labels: Sequence[Sequence[Any]],
    arrays: Sequence[Any],
) -> Perturbed:
    """The tangent of a weight as a weight: what comes from elsewhere, and its own factors."""
    terms = [
        tuple(Factor(a, n) for a, n in zip(own, names, strict=True))
        for own, names in zip(arrays, labels, strict=True)
    ]
    weight = Perturbed(tangent, axes, tuple(terms)).with_value(tangent, scale)
    return dataclasses.replace(weight, is_zero=is_zero)


def as_array(tangent: Any, like: Any) -> Any:
    """A tangent that may be a symbol for zero, as an array."""
    if not isinstance(tangent, SymbolicZero):
        return tangent
    return jnp.zeros_like(like) if is_inexact(like) else no_tangent(like)
