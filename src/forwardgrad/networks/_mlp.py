"""Fully connected networks."""

import math

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key

from forwardgrad.networks._layers import Linear

LAST_GAIN = 0.02
"""Variance gain of the output layer: a network that starts undecided has a small first loss, and
so a small gradient, which is what the noise of a forward gradient is proportional to."""


class MLP(eqx.Module):
    """Fully connected layers with ReLU between them; none hidden is logistic regression.

    The paper's network is 784-1024-1024-10 (Baydin et al. 2022, Section 5.3).
    """

    layers: list[Linear]

    def __init__(self, inputs: int, width: int, depth: int, outputs: int, *, key: Key[Array, ""]):
        sizes = [inputs, *[width] * depth, outputs]
        gains = [*[2.0] * depth, LAST_GAIN]
        self.layers = [
            Linear(m, n, key=k, gain=gain)
            for m, n, k, gain in zip(
                sizes, sizes[1:], jax.random.split(key, depth + 1), gains, strict=False
            )
        ]

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        x = images.reshape(images.shape[0], math.prod(images.shape[1:]))
        *hidden, last = self.layers
        for layer in hidden:
            x = jax.nn.relu(layer(x))
        return last(x)
