"""What an estimate by weight perturbation consists of, besides what its key gives."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Key, UInt32

from forwardgrad._errors import InputError, with_article
from forwardgrad.estimators._distributions import portable
from forwardgrad.rewrite import Layout

if TYPE_CHECKING:
    from forwardgrad.estimators._weight_perturbation import WeightPerturbation


class Drawn(NamedTuple):
    """How the tangents of one parameter are drawn, and which derivatives they are multiplied by.

    `layout` are its factors; workers along the mesh axes `axes` draw apart. `part` is the position
    of its derivatives (None: it changes nothing), and `rows` the axis along which rows are that
    may not be looked up.
    """

    shape: tuple[int, ...]
    layout: Layout
    axes: tuple[str, ...]
    part: int | None
    rows: int | None


class Scalars(eqx.Module):
    """What one step of [`forwardgrad.WeightPerturbation`][] has measured.

    [`forwardgrad.directional_derivatives`][] makes it, and [`forwardgrad.apply_scalars`][] makes a
    gradient of it. It is a pytree of arrays, to be sent, stored, or stacked by `jax.lax.scan`; what
    else it holds is the same in every step, and says what they belong to.

    - `value`: the objective.
    - `derivatives`: those along the K tangents, an array for each part of the parameters that
        influences losses of its own: one in all, or with greedy local losses one a block.
    - `rows`: by the position of a parameter, which of its rows were looked up. Empty with
        `mask_rows=False`, and for models that look up none.
    - `key`: the words of the key.
    """

    value: Float[Array, "*steps"]
    derivatives: tuple[Float[Array, "*steps tangents"], ...]
    rows: dict[int, Bool[Array, "*steps rows"]]
    key: UInt32[Array, "*steps 2"]
    drawn: tuple[Drawn, ...] = eqx.field(static=True)
    estimator: "WeightPerturbation" = eqx.field(static=True)


def checked(
    scalars: Any, estimator: "WeightPerturbation", leaves: Sequence[Any], key: Key[Array, "..."]
) -> Scalars:
    """Scalars, if they are this estimator's, this model's and this key's.

    A key that is only known when a compiled program runs makes them NaN where it is another one.

    **Raises:**

    `InputError` if they are not.
    """
    if not isinstance(scalars, Scalars):
        raise InputError(
            "scalars must be what forwardgrad.directional_derivatives returns, got "
            f"{with_article(type(scalars).__name__)}"
        )
    if estimator.unchunked() != scalars.estimator:
        raise InputError(
            f"estimator must be the one that the scalars were made by, {scalars.estimator}, got "
            f"{estimator}"
        )
    pairs = itertools.zip_longest((d.shape for d in scalars.drawn), (p.shape for p in leaves))
    for number, (expected, shape) in enumerate(pairs):
        if expected != shape:
            raise InputError(
                "params must be those that the scalars were made with, whose array number "
                f"{number} has shape {expected}, got shape {shape}"
            )
    shape = (*key.shape, estimator.tangents)
    if wrong := [d.shape for d in scalars.derivatives if d.shape != shape]:
        raise InputError(f"scalars must have derivatives of shape {shape}, got {wrong[0]}")
    words = words_of(key) if key.ndim == 0 else jax.vmap(words_of)(key)
    same = jnp.all(words == scalars.key, axis=-1)
    if not isinstance(same, Tracer):
        if not same.all():
            made, got = (w.reshape(-1, 2)[jnp.argmin(same)].tolist() for w in (scalars.key, words))
            raise InputError(
                f"key must be the one that the scalars were made with, of words {made}, got {got}"
            )
        return scalars
    trusted = [jnp.where(same[..., None], d, jnp.nan) for d in scalars.derivatives]
    return eqx.tree_at(lambda s: s.derivatives, scalars, tuple(trusted))


def words_of(key: Key[Array, ""]) -> UInt32[Array, "2"]:
    """The words of a key, by which it is known again."""
    return jax.random.key_data(portable(key))
