"""Normalisation without learned scale."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from forwardgrad.networks._sum import settled, summed

EPSILON = 1e-5


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalise(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """`x` with mean zero and variance one along an axis, computed in float32 at least."""
    return _normalised(x, axis)[0].astype(x.dtype)


def _normalised(x: Array, axis: int) -> tuple[Array, Array]:
    x = widened(x)
    centred = x - _mean(x, axis)
    # Of one size along the axis, because several tangents share it.
    variance = jax.lax.slice_in_dim(_mean(centred**2, axis), 0, 1, axis=axis)
    scale = jax.lax.rsqrt(variance + EPSILON)
    return centred * scale, scale


@normalise.defjvp
def _normalise_jvp(axis, primals, tangents):
    # In terms of the output, which is there anyway, instead of three intermediate results.
    (x,), (dx,) = primals, tangents
    y, scale = _normalised(x, axis)
    # Otherwise XLA rearranges what comes before, and computes it for each of its uses.
    dx = settled(widened(dx))
    tangent = scale * (dx - _mean(dx, axis) - y * _mean(y * dx, axis))
    return y.astype(x.dtype), tangent.astype(x.dtype)


def _mean(x: Array, axis: int) -> Array:
    return summed(x, axis) / x.shape[axis]


def widened(x: Array) -> Array:
    """`x` in float32 at least, for sums over many entries."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
