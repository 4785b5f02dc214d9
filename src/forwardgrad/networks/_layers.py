"""Layers that the networks share: weights [in, out], images [batch, height, width, channels]."""

import math
from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

LAST_GAIN = 0.02
"""Variance gain of an output layer: a network that starts undecided has a small first loss, and
so a small gradient, which is what the noise of a forward gradient is proportional to."""


def he_normal(
    key: Key[Array, ""], shape: tuple[int, ...], gain: float = 2.0, fan_in: int | None = None
) -> Float[Array, "..."]:
    """Normal weights of variance `gain / fan_in`, the fan-in by default all axes but the last.

    The default keeps the scale of activations through a ReLU (He et al. 2015).
    """
    return jax.random.normal(key, shape) * math.sqrt(gain / (fan_in or math.prod(shape[:-1])))


class Linear(eqx.Module):
    """`x @ weight + bias`, with `weight` [in, out]."""

    weight: Float[Array, "inputs outputs"]
    bias: Float[Array, " outputs"]

    def __init__(self, inputs: int, outputs: int, *, key: Key[Array, ""], gain: float = 2.0):
        self.weight = he_normal(key, (inputs, outputs), gain)
        self.bias = jnp.zeros(outputs)

    def __call__(self, x: Float[Array, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        # As matrices: of more axes, XLA transposes activations in derivatives.
        outputs = x.reshape(-1, x.shape[-1]) @ self.weight + self.bias
        return outputs.reshape(*x.shape[:-1], outputs.shape[1])


class Conv3x3(eqx.Module):
    """A 3x3 convolution that keeps height and width, with `weight` [3, 3, in, out]."""

    weight: Float[Array, "3 3 inputs outputs"]
    bias: Float[Array, " outputs"]

    def __init__(self, inputs: int, outputs: int, *, key: Key[Array, ""]):
        self.weight = he_normal(key, (3, 3, inputs, outputs))
        self.bias = jnp.zeros(outputs)

    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch height width outputs"]:
        y = jax.lax.conv_general_dilated(
            x, self.weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + self.bias


def max_pool(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch half_height half_width channels"]:
    """The maximum of each 2x2 square; an odd last row or column is left out."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def units_first(x: Float[Array, "batch *patches units"]) -> Float[Array, "units batch all_patches"]:
    """Units first and patches last, whatever number of axes those have."""
    return x.reshape(x.shape[0], -1, x.shape[-1]).transpose(2, 0, 1)


def make_heads(
    units: Sequence[int], classes: int, projection: int | None, *, key: Key[Array, ""]
) -> list[Linear]:
    """A linear layer for each block: to the classes, or if given to so many projected features."""
    keys = jax.random.split(jax.random.fold_in(key, 1), len(units))
    outputs, gain = (classes, LAST_GAIN) if projection is None else (projection, 1.0)
    return [Linear(n, outputs, key=k, gain=gain) for n, k in zip(units, keys, strict=True)]
