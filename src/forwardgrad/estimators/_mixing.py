"""What an activation is credited with whose token is not the only one that it changes."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from forwardgrad._errors import InputError, unknown_name
from forwardgrad.rewrite import Program

TOKEN = "token"
"""The name that losses give to the axis that this is about."""


class Discounted(eqx.Module):
    r"""Later tokens count less: a `mixing` of [`forwardgrad.ActivityPerturbation`][].

    What an activation at token s changes of the loss of token $t \ge s$ is multiplied by
    $\gamma^{t-s}$. This has less variance than `"causal"`, and a bias: of the effect on later
    tokens, only so much is seen. With $\gamma = 1$ it is `"causal"`, with 0 a token is credited
    with its own loss alone.

    **Arguments:**

    - `rate`: $\gamma$, from 0 to 1.

    **Raises:**

    `InputError` if `rate` is out of range.

    >>> import forwardgrad as fg
    >>> fg.ActivityPerturbation(mixing=fg.Discounted(0.9)).mixing.rate
    0.9
    """

    rate: float

    def __check_init__(self):
        if not 0 <= self.rate <= 1:
            raise InputError(f"rate must be between 0 and 1, got {self.rate!r}")


Named: TypeAlias = Literal["all", "causal"]
Mixing: TypeAlias = Named | Discounted


def check_mixing(estimator: Any) -> None:
    """Raise an `InputError` if `mixing` is not one of the choices."""
    mixing = estimator.mixing
    if not isinstance(mixing, Discounted) and mixing not in get_args(Named):
        raise unknown_name("mixing", str(mixing), (*get_args(Named), "forwardgrad.Discounted(...)"))


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
    if isinstance(mixing, Discounted):
        lag = jnp.arange(changes.shape[axis]) - jnp.arange(changes.shape[axis])[:, None]
        weight = jnp.where(lag >= 0, mixing.rate ** jnp.maximum(lag, 0), 0).astype(changes.dtype)
        return jnp.moveaxis(jnp.tensordot(changes, weight, ((axis,), (1,))), -1, axis)
    return jax.lax.cumsum(changes, axis, reverse=True)


def credited(mixing: Mixing, name: str, names: Sequence[str]) -> bool:
    """Whether tokens along an axis of the losses are credited one by one, where they mix."""
    return mixing != "all" and name == TOKEN and names.count(name) == 1
