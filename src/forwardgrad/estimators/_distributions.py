"""Random factors with zero mean and unit covariance."""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, Key

Distribution: TypeAlias = Literal["rademacher", "normal", "sphere"]

DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)


def portable(key: Key[Array, ""]) -> Key[Array, ""]:
    """A key of JAX's default kind made of any other, which is the same in loops and under `vmap`.

    The hardware's generators (`rbg`) draw other numbers under `vmap` than one by one.
    """
    if jax.random.key_impl(key) == "threefry2x32":
        return key
    words = jax.random.key_data(key).reshape(-1)
    own = jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32), impl="threefry2x32")
    for i in range(words.size):
        own = jax.random.fold_in(own, words[i])
    return own


FEEDBACK = (0x66776467, 0x72616421)
"""What feedback weights are drawn from besides their seed, so that no key of a user gives them."""


def feedback_key(seed: int) -> Key[Array, ""]:
    """The key of an estimator's feedback weights."""
    words = jnp.asarray(FEEDBACK, jnp.uint32)
    return jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), seed)


WORD = 32
"""Bits of a random word, each of which is a sign."""


def rademacher(
    key: Key[Array, ""],
    shape: Sequence[int],
    scale: Float[Array, "..."] | float = 1.0,
    axis: int | None = None,
) -> Float[Array, "..."]:
    """Independent signs, -1 or 1 with equal probability, times `scale`.

    One random 32-bit word makes 32 of them, which is some thirty times faster than a word each.

    **Arguments:**

    - `key`: a random key.
    - `shape`: the shape of the result.
    - `scale`: in a shape that broadcasts to it.
    - `axis`: the one along which a word's signs lie. If the result is cut along other axes, each
        device draws its own part. Default: they lie along the flattened result, which every
        device draws as a whole.

    **Returns:**

    An array of that shape.
    """
    if axis is None:
        negative = _bits(key, (math.prod(shape),), 0).reshape(shape)
    else:
        negative = _bits(key, shape, axis)
    return jnp.where(negative, -scale, scale)


def _bits(key: Key[Array, ""], shape: Sequence[int], axis: int) -> Bool[Array, "..."]:
    """Random bits, of which those of a word lie along an axis."""
    before, size, after = shape[:axis], shape[axis], shape[axis + 1 :]
    count = -(-size // WORD)
    # Drawn without axes of 1: XLA counts once for all draws of a shape.
    words = jax.random.bits(key, [n for n in (*before, count, *after) if n != 1], jnp.uint32)
    words = words.reshape(*before, count, 1, *after)
    places = jax.lax.broadcasted_iota(
        jnp.uint32, (*[1] * (axis + 1), WORD, *[1] * len(after)), axis + 1
    )
    bits = ((words >> places) & 1 == 1).reshape(*before, count * WORD, *after)
    return jax.lax.slice_in_dim(bits, 0, size, axis=axis)


def axis_of_words(shape: Sequence[int], cut: Collection[int]) -> int | None:
    """An axis along which signs can be drawn, so that devices can cut the array along `cut`.

    The last one that is long enough for words to be half used at least; None if none is.
    """
    long = [a for a, n in enumerate(shape) if a not in cut and 2 * n >= WORD * -(-n // WORD)]
    return long[-1] if long else None


def draw_dense(
    key: Key[Array, ""], count: int, shapes: Sequence[Sequence[int]], distribution: Distribution
) -> list[Float[Array, "count ..."]]:
    """`count` independent arrays of each shape, each shape from a key of its own.

    **Arguments:**

    - `key`: a random key.
    - `count`: how many of each.
    - `shapes`: the shapes.
    - `distribution`: `"rademacher"`, or a standard normal for the others.

    **Returns:**

    A float32 array of shape `(count, *shape)` for each shape.
    """
    keys = jax.random.split(key, len(shapes))
    return [_sampler(distribution)(k, (count, *s)) for k, s in zip(keys, shapes, strict=True)]


def draw_small(
    key: Key[Array, ""], count: int, shapes: Sequence[Sequence[int]], distribution: Distribution
) -> list[Float[Array, "count ..."]]:
    """As `draw_dense`, with a single call of the generator, for the many small factors of a model.

    A call costs more than the few thousand numbers that one factor needs.
    """
    sizes = [math.prod(shape) for shape in shapes]
    total = count * sum(sizes)
    sample = _sampler(distribution)
    # Two halves in a loop: XLA would fuse a single draw into every consumer, and so repeat it for
    # each entry of an outer product (an optimisation barrier does not stop it on the CPU).
    halves = jax.lax.map(lambda k: sample(k, (-(-total // 2),)), jax.random.split(key))
    flat = halves.reshape(-1)[:total].reshape(count, -1)
    bounds = [0, *itertools.accumulate(sizes)]
    return [
        flat[:, start:stop].reshape(count, *shape)
        for start, stop, shape in zip(bounds, bounds[1:], shapes, strict=False)
    ]


def draw(
    key: Key[Array, ""],
    shape: Sequence[int],
    distribution: Distribution,
    scale: Float[Array, "..."] | float = 1.0,
    dtype: Any = jnp.float32,
    axis: int | None = None,
) -> Inexact[Array, "..."]:
    """One array of independent entries, or a vector on the sphere, times `scale`.

    Of a complex one, real and imaginary part are independent, each with unit variance. `axis` is
    that of `rademacher`.
    """
    if jnp.issubdtype(dtype, jnp.complexfloating):
        parts = draw(key, (2, *shape), distribution, axis=None if axis is None else axis + 1)
        return (scale * jax.lax.complex(parts[0], parts[1])).astype(dtype)
    if distribution == "rademacher":
        return rademacher(key, shape, scale, axis)
    z = jax.random.normal(key, tuple(shape))
    return scale * (to_sphere(z, range(z.ndim)) if distribution == "sphere" else z)


def _sampler(distribution: Distribution) -> Callable[..., Array]:
    return rademacher if distribution == "rademacher" else jax.random.normal


def to_sphere(z: Float[Array, "..."], axes: Sequence[int]) -> Float[Array, "..."]:
    """`z` scaled along `axes` to the norm that unit variances have, the root of their size.

    A standard normal vector becomes one that is uniform on the sphere.
    """
    size = math.prod(z.shape[axis] for axis in axes)
    return z * jax.lax.rsqrt(jnp.sum(z**2, axis=tuple(axes), keepdims=True) / size)
