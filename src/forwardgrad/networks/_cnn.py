"""The convolutional network of the first paper."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key

from forwardgrad._errors import InputError
from forwardgrad.networks._base import AbstractNetwork, Features, Images
from forwardgrad.networks._layers import (
    LAST_GAIN,
    Conv3x3,
    Linear,
    make_heads,
    max_pool,
    units_first,
)
from forwardgrad.networks._mlp import Dense

CHANNELS = 64


class Convolution(eqx.Module):
    """A 3x3 convolution and a ReLU, and where asked for the maximum of each 2x2 square."""

    convolution: Conv3x3
    pools: bool = eqx.field(static=True)

    def __init__(self, inputs: int, pools: bool, *, key: Key[Array, ""]):
        self.convolution = Conv3x3(inputs, CHANNELS, key=key)
        self.pools = pools

    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch new_height new_width channels"]:
        x = jax.nn.relu(self.convolution(x))
        return max_pool(x) if self.pools else x


class CNN(AbstractNetwork):
    """Four 3x3 convolutions of 64 channels, a 2x2 maximum after every second, two linear layers.

    All but the last layer are followed by a ReLU (Baydin et al. 2022, Section 5.4).
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        width: int,
        classes: int,
        *,
        key: Key[Array, ""],
        heads: bool = False,
        projection: int | None = None,
        normalise_features: bool = False,
    ):
        height, breadth, channels = image_shape
        if min(height, breadth) < 4:
            raise InputError(
                f"images of {height}x{breadth} are too small for network 'cnn', which halves them "
                "twice; expected at least 4x4"
            )
        *keys, hidden_key, last_key = jax.random.split(key, 6)
        inputs = [channels, CHANNELS, CHANNELS, CHANNELS]
        flat = (height // 2 // 2) * (breadth // 2 // 2) * CHANNELS
        convolutions = [
            Convolution(m, pools=i % 2 == 1, key=k)
            for i, (m, k) in enumerate(zip(inputs, keys, strict=True))
        ]
        self.blocks = [*convolutions, Dense(flat, width, key=hidden_key)]
        self.classifier = Linear(width, classes, key=last_key, gain=LAST_GAIN)
        units = [*[CHANNELS] * 4, width]
        self.heads = make_heads(units, classes, projection, key=key) if heads else None
        self.projection = projection
        self.groups = 1
        self.normalise_features = normalise_features

    def embed(self, examples: Images) -> Images:
        """The images, as exact as the weights."""
        return examples.astype(self.classifier.weight.dtype)

    def arranged(self, x: Float[Array, "batch *patches units"]) -> Features:
        """The channels, with every pixel a patch; or the units, in one."""
        return units_first(x)
