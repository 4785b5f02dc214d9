"""Workers of a `shard_map`: along which axes of its mesh values differ, and sums over them.

What a worker computes may reach the losses of others by a collective. Each has then to perturb
apart, and to know how the losses of all change.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Jaxpr

from forwardgrad._errors import InputError
from forwardgrad.rewrite._primitives import NO_COLLECTIVES, SHARD_MAP, programs


def collectives(jaxpr: Jaxpr) -> frozenset[str]:
    """The axes along which workers exchange what they compute, around a program."""
    found: set[str] = set()
    for eqn in jaxpr.eqns:
        own = set().union(*[collectives(program.jaxpr) for program in programs(eqn)])
        if eqn.primitive.name == SHARD_MAP:
            own -= {*eqn.params["mesh"].axis_names}
        if eqn.primitive.name not in NO_COLLECTIVES:
            given = [eqn.params.get("axes", ()), eqn.params.get("axis_name", ())]
            names = [(g,) if isinstance(g, str) else tuple(g or ()) for g in given]
            own.update(name for group in names for name in group if isinstance(name, str))
        found |= own
    return frozenset(found)


def varying(x: Any) -> frozenset[str]:
    """The axes along which workers may have different values of an array, as far as types tell."""
    aval = x if isinstance(x, ShapedArray) else jax.typeof(x)
    return frozenset(aval.manual_axis_type.varying)


def varying_alike(arrays: Sequence[Any]) -> list[Any]:
    """Arrays that all vary along the axes that one of them varies along."""
    axes = frozenset().union(*map(varying, arrays))
    return [_spread(a, axes) for a in arrays]


def varying_like(x: jax.Array, like: Any) -> jax.Array:
    """`x`, in a `shard_map` varying along all mesh axes that `like` varies along."""
    return _spread(x, varying(like))


def _spread(x: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def untyped(axes: Iterable[str]) -> frozenset[str]:
    """Those axes about which types say nothing: with `check_vma=False`, or of a `vmap`."""
    return frozenset(axis for axis in axes if axis not in varying(jax.lax.axis_index(axis)))


def summed_change(change: jax.Array, like: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The change of all workers' losses that `like` causes, from the change of one worker's losses.

    `axes` are those along which it reaches other workers. A value that several workers share
    changes the losses of all of them.
    """
    names = _summed_over(change, like, axes)
    return jax.lax.psum(change, names) if names else change


def summed_changes(
    changes: Sequence[jax.Array], likes: Sequence[jax.Array], axes: frozenset[str]
) -> list[jax.Array]:
    """`summed_change` of several changes of one shape, those along the same axes at once."""
    names = [_summed_over(change, like, axes) for change, like in zip(changes, likes, strict=True)]
    return _together(changes, names, lambda a, names: jax.lax.psum(a, names) if names else a)


def gathered(arrays: Sequence[jax.Array], axis: str) -> list[jax.Array]:
    """Arrays of all workers along an axis, stacked, the same for all of these.

    Those of one shape and type go in one message.
    """
    to = "varying" if untyped([axis]) else "invarying"

    def gather(stacked, kind):
        del kind
        return jnp.swapaxes(jax.lax.all_gather(stacked, axis, to=to), 0, 1)

    return _together(arrays, [(str(jax.typeof(a)), *sorted(varying(a))) for a in arrays], gather)


def _together(
    arrays: Sequence[jax.Array],
    names: Sequence[tuple[str, ...]],
    send: Callable[[jax.Array, tuple[str, ...]], jax.Array],
) -> list[jax.Array]:
    """What `send(array, names)` makes of each array, those with the same names in one message."""
    found: dict[int, jax.Array] = {}
    # In one order on all workers, which would wait for each other.
    for group in dict.fromkeys(names):
        members = [i for i, own in enumerate(names) if own == group]
        stacked = jnp.stack([arrays[i] for i in members])
        found.update(zip(members, send(stacked, group), strict=True))
    return [found[i] for i in range(len(arrays))]


def _summed_over(change: jax.Array, like: jax.Array, axes: frozenset[str]) -> tuple[str, ...]:
    own = varying(change)
    return tuple(sorted((own - varying(like)) | (own & axes) | untyped(axes)))


def key_of_worker(key: jax.Array, axes: Iterable[str]) -> jax.Array:
    """A random key for each worker along some axes."""
    for axis in sorted(axes):
        key = jax.random.fold_in(key, jax.lax.axis_index(axis))
    return key


def check_typed(axes: Iterable[str], estimator: str) -> None:
    """Raise an `InputError` where types do not say whether workers share a value."""
    unknown = ", ".join(map(repr, sorted(untyped(axes))))
    if unknown:
        raise InputError(
            f"fun must not exchange anything along {unknown}, because "
            f"{estimator} cannot know there which parameters workers share: leave check_vma of "
            "jax.shard_map at True, or average values and gradients outside of fun"
        )
