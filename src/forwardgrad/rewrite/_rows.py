"""Rows of a table that a program does not look up: the losses do not depend on them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Var

from forwardgrad.rewrite._primitives import programs, shape_of

PASSED_ON = ("convert_element_type", "copy", "pvary", "sharding_constraint")


class Lookup(NamedTuple):
    """An equation that takes rows of a parameter: its position, and the axis along which."""

    leaf: int
    axis: int


def lookups(jaxpr: Jaxpr) -> dict[int, Lookup]:
    """The equations, by their ids, that look up rows of parameters that nothing else uses."""
    found: dict[int, Lookup] = {}
    for leaf, v in enumerate(jaxpr.invars):
        uses = _uses(jaxpr, v)
        axes = [_axis(eqn) for eqn in uses]
        if uses and None not in axes and len({*axes}) == 1:
            found.update({id(eqn): Lookup(leaf, axes[0]) for eqn in uses})  # pyright: ignore[reportArgumentType]
    return found


def _uses(jaxpr: Jaxpr, v: Var) -> list[JaxprEqn]:
    """The equations that use a variable; none if it goes where this is not followed."""
    found = []
    if any(atom is v for atom in jaxpr.outvars):
        return []
    for eqn in jaxpr.eqns:
        if not any(atom is v for atom in eqn.invars):
            continue
        if eqn.primitive.name in PASSED_ON:
            inner = _uses(jaxpr, eqn.outvars[0])
            if not inner:
                return []
            found += inner
        elif programs(eqn) or any(atom is v for atom in eqn.invars[1:]):
            return []
        else:
            found.append(eqn)
    return found


def _axis(eqn: JaxprEqn) -> int | None:
    """The axis along which an equation takes whole rows; None if it does anything else."""
    shape, name = shape_of(eqn.invars[0]), eqn.primitive.name
    if name == "gather":
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        if numbers.operand_batching_dims or len(numbers.start_index_map) != 1:
            return None
    elif name == "slice":
        sizes = shape_of(eqn.outvars[0])
    elif name == "dynamic_slice":
        sizes = eqn.params["slice_sizes"]
    else:
        return None
    cut = [i for i, (n, size) in enumerate(zip(shape, sizes, strict=True)) if n != size]
    if len(cut) != 1:
        return None
    indexed = eqn.params["dimension_numbers"].start_index_map if name == "gather" else (cut[0],)
    return cut[0] if indexed == (cut[0],) else None


def taken(eqn: JaxprEqn, axis: int, inputs: Sequence[Any]) -> jax.Array:
    """Which rows an equation takes, one truth value for each."""
    n = shape_of(eqn.invars[0])[axis]
    rows = jnp.arange(n)
    if eqn.primitive.name == "slice":
        p = eqn.params
        step = 1 if p["strides"] is None else p["strides"][axis]
        start, limit = p["start_indices"][axis], p["limit_indices"][axis]
        return (rows >= start) & (rows < limit) & ((rows - start) % step == 0)
    size = eqn.params["slice_sizes"][axis]
    if eqn.primitive.name == "dynamic_slice":
        start = jnp.clip(inputs[1 + axis], 0, n - size)
        return (rows >= start) & (rows < start + size)
    first = jnp.asarray(inputs[1])[..., 0].reshape(-1)
    fills = eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    inside = (first >= 0) & (first <= n - size)
    starts = jnp.where(inside, first, n) if fills else jnp.clip(first, 0, n - size)
    ids = (starts[:, None] + jnp.arange(size)).reshape(-1)
    return jnp.zeros(n, bool).at[ids].set(True, mode="drop")
