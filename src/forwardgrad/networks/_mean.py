"""A mean that is right under `vmap` on a CPU."""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

sum_p = Primitive("forwardgrad_sum")


def mean(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """The mean along an axis, which stays with size one.

    As `jax.numpy.mean`. With JAX 0.10 on a CPU, that of the product of an array and a batched one,
    which `vmap` over tangents makes of a normalisation's derivative, is up to fifty times slower
    and for some shapes wrong: XLA hands sums over to a library, and what is multiplied before them
    too. It does not recognise the sum that this one becomes under `vmap`.
    """
    return jnp.expand_dims(sum_p.bind(x, axis=axis, batched=False), axis) / x.shape[axis]


def _reduce(x: jax.Array, *, axis: int, batched: bool) -> jax.Array:
    if not batched:
        return jnp.sum(x, axis=axis)
    return jax.lax.reduce(x, jnp.zeros((), x.dtype), lambda a, b: a - (-b), (axis,))


def _transpose(cotangent, x, *, axis, batched):
    del batched
    return [jnp.broadcast_to(jnp.expand_dims(cotangent, axis), x.aval.shape)]


def _batch(args, dims, *, axis, batched):
    del batched
    (x,), (dim,) = args, dims
    return sum_p.bind(x, axis=axis + (dim <= axis), batched=True), dim - (dim > axis)


def _abstract(x, *, axis, batched):
    del batched
    return x.update(shape=x.shape[:axis] + x.shape[axis + 1 :])


sum_p.def_impl(functools.partial(jax.jit, static_argnames=("axis", "batched"))(_reduce))
sum_p.def_abstract_eval(_abstract)
ad.deflinear2(sum_p, _transpose)
batching.primitive_batchers[sum_p] = _batch
mlir.register_lowering(sum_p, mlir.lower_fun(_reduce, multiple_results=False))
