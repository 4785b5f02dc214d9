"""The convolutional network of the first paper."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key

from forwardgrad._errors import InputError
from forwardgrad.networks._layers import Conv3x3, Linear, max_pool
from forwardgrad.networks._mlp import LAST_GAIN

CHANNELS = 64


class CNN(eqx.Module):
    """Four 3x3 convolutions of 64 channels, a 2x2 maximum after every second, two linear layers.

    All but the last layer are followed by a ReLU (Baydin et al. 2022, Section 5.4).
    """

    convolutions: list[Conv3x3]
    hidden: Linear
    last: Linear

    def __init__(
        self, image_shape: tuple[int, int, int], width: int, classes: int, *, key: Key[Array, ""]
    ):
        height, breadth, channels = image_shape
        if min(height, breadth) < 4:
            raise InputError(
                f"images of {height}x{breadth} are too small for network 'cnn', which halves them "
                "twice; expected at least 4x4"
            )
        *keys, hidden_key, last_key = jax.random.split(key, 6)
        inputs = [channels, CHANNELS, CHANNELS, CHANNELS]
        self.convolutions = [Conv3x3(m, CHANNELS, key=k) for m, k in zip(inputs, keys, strict=True)]
        features = (height // 2 // 2) * (breadth // 2 // 2) * CHANNELS
        self.hidden = Linear(features, width, key=hidden_key)
        self.last = Linear(width, classes, key=last_key, gain=LAST_GAIN)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        x = images
        for i, convolution in enumerate(self.convolutions):
            x = jax.nn.relu(convolution(x))
            if i % 2 == 1:
                x = max_pool(x)
        return self.last(jax.nn.relu(self.hidden(x.reshape(x.shape[0], -1))))
