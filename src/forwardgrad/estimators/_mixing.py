"""What an activation is credited with whose token is not the only one that it changes."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from forwardgrad._errors import InputError, unknown_name
from forwardgrad.rewrite import Program

TOKEN = "token"
"""The name that losses give to the axis that this is about."""


Named: TypeAlias = Literal["all", "causal"]
Mixing: TypeAlias = Named | float


def check_mixing(estimator: Any) -> None:
    """Raise an `InputError` if `mixing` is not one of the choices."""
    mixing = estimator.mixing
    if isinstance(mixing, str):
        if mixing not in get_args(Named):
            raise unknown_name("mixing", mixing, get_args(Named))
    elif isinstance(mixing, bool) or not isinstance(mixing, (int, float)) or not 0 <= mixing <= 1:
        raise InputError(f"mixing must be a name or a number between 0 and 1, got {mixing!r}")


def check_tokens(program: Program, option: str) -> None:
    """Raise an `InputError` for losses in which no token is known to an activation."""
    plan, axes = program.plan, program.axes
    if not any(TOKEN in names for names in axes):
        found = ", ".join(map(str, axes))
        raise InputError(
            f"{option} needs losses with an axis {TOKEN!r}: return forwardgrad.Losses([losses], "
            f"[('example', {TOKEN!r})]); the axes are {found or 'none'}"
        )
    keys = [(v, key) for v in plan.outputs for key in plan.places(v) if key[1] == TOKEN]
    if not any(plan.flow.located(v, key).parts for v, key in keys):
        raise InputError(
            f"{option} needs to know where the losses' axis {TOKEN!r} is in the activations, and "
            "it is in none of them: each of these losses depends on all entries of all activations"
        )


def of_later(changes: Float[Array, "..."], axis: int, mixing: Mixing) -> Float[Array, "..."]:
    """For each token, what it is credited with of its own and later tokens' changes."""
    if not isinstance(mixing, str):
        lag = jnp.arange(changes.shape[axis]) - jnp.arange(changes.shape[axis])[:, None]
        weight = jnp.where(lag >= 0, mixing ** jnp.maximum(lag, 0), 0).astype(changes.dtype)
        return jnp.moveaxis(jnp.tensordot(changes, weight, ((axis,), (1,))), -1, axis)
    return jax.lax.cumsum(changes, axis, reverse=True)


def credited(mixing: Mixing, name: str, names: Sequence[str]) -> bool:
    """Whether tokens along an axis of the losses are credited one by one, where they mix."""
    return mixing != "all" and name == TOKEN and names.count(name) == 1
