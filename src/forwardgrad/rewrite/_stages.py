"""Stages of a program: parts that no derivative connects, to be finished one after another."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from forwardgrad._errors import InputError
from forwardgrad.rewrite._flow import Influence
from forwardgrad.rewrite._primitives import is_lasting, is_ref, line_of, programs
from forwardgrad.rewrite._trace import Array, inline
from forwardgrad.rewrite._workers import varying


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a program, with the parameters and what earlier stages computed as its inputs.

    `jaxpr` takes the parameters at the positions `leaves`, then the variables `reads`; it returns
    `writes`.
    """

    jaxpr: Jaxpr
    leaves: tuple[int, ...]
    reads: tuple[Var, ...]
    writes: tuple[Var, ...]

    def without_effects(self) -> Jaxpr:
        """Its program without callbacks that return nothing, to be evaluated once more.

        **Raises:**

        `InputError` if other effects are left.
        """
        jaxpr = inline(ClosedJaxpr(self.jaxpr, ()), forward=True, pure=True).jaxpr
        left = [eqn for eqn in jaxpr.eqns if any(map(is_lasting, eqn.effects))]
        if left:
            raise InputError(
                f"tangents must be 1 where fun has effects that vmap refuses: the one at "
                f"{line_of(left[0])} would happen once for each tangent"
            )
        return jaxpr


def stages(jaxpr: Jaxpr, influence: Influence) -> list[Stage]:
    """A program, cut at each `stop_gradient` that no derivative can bypass.

    With greedy local losses, every block is a stage. While one stage is evaluated, the other stages
    keep nothing for their gradients.

    **Arguments:**

    - `jaxpr`: the program, whose inputs are its parameters.
    - `influence`: which terms of the losses its variables can change.
    """
    bounds = [0, *_cuts(jaxpr, influence), len(jaxpr.eqns)]
    last_use = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in variables(eqn.invars)}
    last_use |= {v: len(jaxpr.eqns) for v in variables(jaxpr.outvars)}
    parts = []
    for start, stop in itertools.pairwise(bounds):
        eqns = jaxpr.eqns[start:stop]
        defined = list(dict.fromkeys(v for eqn in eqns for v in eqn.outvars))
        writes = [v for v in defined if last_use.get(v, 0) >= stop]
        used = dict.fromkeys(v for eqn in eqns for v in variables(eqn.invars))
        if stop == len(jaxpr.eqns):
            writes += [v for v in jaxpr.invars if last_use.get(v) == stop]
            used |= dict.fromkeys(writes)
        leaves = [i for i, v in enumerate(jaxpr.invars) if v in used]
        own = {*defined, *jaxpr.invars}
        reads = [v for v in used if v not in own]
        inputs = [*[jaxpr.invars[i] for i in leaves], *reads]
        part = Jaxpr((), inputs, writes, eqns, jaxpr.effects, jaxpr.debug_info)
        parts.append(Stage(part, tuple(leaves), tuple(reads), tuple(writes)))
    return parts


def _cuts(jaxpr: Jaxpr, influence: Influence) -> list[int]:
    """The positions of the `stop_gradient` equations that no derivative passes by."""
    moving = dict.fromkeys(jaxpr.invars, -1)
    crossed: set[int] = set()
    candidates = []
    for i, eqn in enumerate(jaxpr.eqns):
        if any(map(is_ref, eqn.outvars)):  # who reads it, and when, is not followed
            return []
        inputs = [v for v in variables(eqn.invars) if v in moving]
        if eqn.primitive.name == "stop_gradient":
            candidates += [i] if inputs else []
            continue
        if inputs:
            moving.update(dict.fromkeys(eqn.outvars, i))
        if any(influence.of(v) for v in eqn.outvars):
            for v in inputs:
                crossed.update(range(moving[v] + 1, i + 1) if v not in jaxpr.invars else ())
    return [i for i in candidates if i not in crossed and i - 1 not in candidates and i > 0]


def variables(atoms: Iterable[object]) -> list[Var]:
    """Those of some inputs or outputs that are no constants."""
    return [atom for atom in atoms if isinstance(atom, Var)]


def defined(jaxpr: Jaxpr) -> frozenset[Var]:
    """The variables that a program computes, in programs inside as well."""
    found = {v for eqn in jaxpr.eqns for v in eqn.outvars}
    return frozenset(found).union(*(defined(p.jaxpr) for eqn in jaxpr.eqns for p in programs(eqn)))


def after(results: Any, arrays: Sequence[Any]) -> list[Any]:
    """`arrays`, which XLA cannot compute before `results`.

    A zero that is computed from the results is added. An `optimization_barrier` would not work,
    because it has gone when XLA decides what to compute first. Values that the workers of a
    `shard_map` share do not wait for values that they do not share.
    """
    leaves = [leaf for leaf in jax.tree.leaves(results) if leaf.size and _is_number(leaf)]

    @functools.cache
    def zero(axes):
        firsts = [_one_of(leaf) for leaf in leaves if varying(leaf) <= axes]
        one_of_each = sum([first.astype(jnp.float32) for first in firsts], jnp.float32(0))
        # XLA would repeat what is cheap for each that has to wait; tanh it computes once.
        bits = jax.lax.bitcast_convert_type(jnp.tanh(one_of_each), jnp.int32)
        return jnp.minimum(jnp.maximum(bits, 0), 0)

    return [a + zero(varying(a)).astype(a.dtype) if _is_number(a) else a for a in arrays]


def _one_of(array: Array) -> Array:
    """A number that needs the array: an entry, or where types say how it is sharded, the sum."""
    if any(jax.typeof(array).sharding.spec):
        return jnp.sum(array)
    # Not of the flattened array, which devices that each have a part would first have to gather.
    return jax.lax.slice(array, [0] * array.ndim, [1] * array.ndim).reshape(())


def _is_number(array: Any) -> bool:
    """Whether an array can be added to, which random keys and truth values cannot."""
    return jnp.issubdtype(array.dtype, jnp.number)
