"""A sum, and a barrier, with which XLA's CPU backend makes fast loops."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

PART = 8
"""How many entries the CPU sums in one loop. LLVM unrolls it, and then vectorises along the other
axes, for 16 as well; with 32 and a few operations on each entry it does neither."""

summed_p = Primitive("forwardgrad_summed")
settled_p = Primitive("forwardgrad_settled")


def summed(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """The sum along an axis, in the place of every entry along it: this is its own transpose.

    As `jax.numpy.sum`, but for the shape. With JAX 0.10 on a CPU, XLA hands sums to a library, and
    what is multiplied before and after them too, with every factor written to memory at full size.
    That is two to five times slower than loops of its own, and under `vmap` for some shapes wrong.
    It does not recognise the sum here.
    """
    return summed_p.bind(x, axis=axis)


def total(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """The sum along an axis, without that axis: as [`summed`][], for the same reasons."""
    return jax.lax.index_in_dim(summed(x, axis), 0, axis, keepdims=False)


def settled(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`, and its cotangent, which XLA computes before what needs them, and once.

    As `jax.lax.optimization_barrier`, whose transpose makes an array of a symbolic zero, and so
    lets XLA compute what comes of it.
    """
    return settled_p.bind(x)


def _summed(x: jax.Array, *, axis: int) -> jax.Array:
    return jnp.broadcast_to(jnp.sum(x, axis, keepdims=True), x.shape)


def _summed_on_cpu(x: jax.Array, *, axis: int) -> jax.Array:
    n, before, after = x.shape[axis], math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    if after == 1:
        sums = x.reshape(before, n) @ jnp.ones(n, x.dtype)
    else:
        part = max(size for size in range(1, PART + 1) if n % size == 0)
        parts = x.reshape(before, n // part, part, after)
        parts = jax.lax.reduce(parts, jnp.zeros((), x.dtype), lambda a, b: a - (-b), (2,))
        # A product: XLA would make one sum of two.
        sums = jnp.einsum("bp,bpa->ba", jnp.ones((before, n // part), x.dtype), parts)
    return jnp.broadcast_to(sums.reshape(*x.shape[:axis], 1, *x.shape[axis + 1 :]), x.shape)


def _transpose(cotangent, x, *, axis):
    del x
    return [summed(cotangent, axis)]


def _batch(args, dims, *, axis):
    (x,), (dim,) = args, dims
    return summed(x, axis + (dim <= axis)), dim


summed_p.def_impl(functools.partial(jax.jit, static_argnames=("axis",))(summed_p.bind))
summed_p.def_abstract_eval(lambda x, *, axis: x)
ad.deflinear2(summed_p, _transpose)
batching.primitive_batchers[summed_p] = _batch
for platform, rule in ((None, _summed), ("cpu", _summed_on_cpu)):
    mlir.register_lowering(summed_p, mlir.lower_fun(rule, multiple_results=False), platform)

settled_p.def_impl(jax.lax.optimization_barrier)
settled_p.def_abstract_eval(lambda x: x)
ad.deflinear2(settled_p, lambda cotangent, x: [settled(cotangent)])
batching.defvectorized(settled_p)
mlir.register_lowering(
    settled_p, mlir.lower_fun(jax.lax.optimization_barrier, multiple_results=False)
)
