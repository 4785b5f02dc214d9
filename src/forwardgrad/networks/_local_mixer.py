"""LocalMixer: a network whose blocks, patches and channel groups can learn on their own.

Activations have units first and patches last, so that mixing patches, mixing units and mixing the
units of each group are all matrix products without a transposition.
"""

import re
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from forwardgrad._errors import InputError
from forwardgrad.networks._base import AbstractNetwork, Features, Images, copy_axes
from forwardgrad.networks._layers import LAST_GAIN, Linear, he_normal, make_heads
from forwardgrad.networks._normalise import normalise
from forwardgrad.rewrite import activation


class Size(NamedTuple):
    """What a name such as `m/8/16` stands for."""

    units: int
    patches: int
    groups: int
    blocks: int


UNITS = {"s": 256, "m": 512, "l": 2048}

SIZES: tuple[str, ...] = ("s/1/1", "m/1/16", "m/8/16", "l/8/64", "l/32/64")
"""The paper's networks: units, patches along a side, channel groups."""


def size_of(name: str) -> Size | None:
    """The size of a LocalMixer called `units/patches/groups`, of the paper's or any other; or None.

    It has one block if there is one patch, and four otherwise, as in the paper.

    >>> size_of("m/8/16")
    Size(units=512, patches=8, groups=16, blocks=4)
    """
    match = re.fullmatch(rf"([{''.join(UNITS)}])/([1-9]\d*)/([1-9]\d*)", name)
    if match is None:
        return None
    patches, groups = int(match[2]), int(match[3])
    return Size(UNITS[match[1]], patches, groups, 1 if patches == 1 else 4)


class Block(eqx.Module):
    """Token mixing, channel mixing and grouped mixing, each normalised and followed by a ReLU.

    The first block of a network has no token mixing, and no residual connection.
    """

    token: Linear | None
    channel_weight: Float[Array, "inputs units"]
    channel_bias: Float[Array, " units"]
    group_weight: Float[Array, "groups channels channels"]
    group_bias: Float[Array, "groups channels"]
    number: int = eqx.field(static=True)

    def __init__(
        self,
        number: int,
        inputs: int,
        units: int,
        groups: int,
        patches: int | None,
        *,
        key: Key[Array, ""],
    ):
        token_key, channel_key, group_key = jax.random.split(key, 3)
        channels = units // groups
        self.token = None if patches is None else Linear(patches, patches, key=token_key)
        self.channel_weight = he_normal(channel_key, (inputs, units))
        self.channel_bias = jnp.zeros(units)
        self.group_weight = he_normal(group_key, (groups, channels, channels), fan_in=channels)
        self.group_bias = jnp.zeros((groups, channels))
        self.number = number

    def __call__(self, x: Features) -> Features:
        group, patch = copy_axes(self.number)
        # One number would always become zero.
        h = normalise(x, 0) if len(x) > 1 else x
        # Only now: the pixels of a nearly blank patch differ by less than rounding.
        h = h.astype(self.channel_weight.dtype)
        if self.token is not None:
            h = normalise(self.token(h), 0)
            h = relu(activation(h, "unit", "example", patch))
        h = _mixed(self.channel_weight, h) + self.channel_bias[:, None, None]
        h = normalise(h, 0).reshape(len(self.group_weight), -1, *h.shape[1:])
        h = normalise(relu(activation(h, group, "unit", "example", patch)), 1)
        h = _mixed(self.group_weight, h) + self.group_bias[:, :, None, None]
        h = normalise(h, 1)
        h = relu(activation(h, group, "unit", "example", patch)).reshape(-1, *h.shape[2:])
        return h if self.token is None else x + h


def _mixed(
    weight: Float[Array, "*groups inputs outputs"], h: Float[Array, "*groups inputs batch patches"]
) -> Float[Array, "*groups outputs batch patches"]:
    """Units mixed by a product of matrices, in whose derivatives XLA transposes no activations."""
    outputs = jnp.einsum("...io,...in->...on", weight, h.reshape(*h.shape[:-2], -1))
    return outputs.reshape(*outputs.shape[:-1], *h.shape[-2:])


class LocalMixer(AbstractNetwork):
    r"""Blocks on image patches, each with a head of its own, and a classifier on the last.

    An image is cut into `patches` x `patches` squares. Block 0 maps the pixels of a patch to H
    units, and mixes the units within each of G groups. Later blocks mix the patches first, and add
    their result to their input. No normalisation has a learned scale. The normalisations after a
    grouped layer and before a head are within groups, so that no group of a block depends on
    another one.

    **Arguments:**

    - `image_shape`: height, width and channels of an image.
    - `size`: units, patches along a side, groups, blocks.
    - `classes`: the number of outputs.
    - `key`: a random key.
    - `projection`: the number of the heads' outputs, where they project features. Default: that
        of the classes.
    - `normalise_features`: whether heads and classifier see each group's units normalised.

    **Raises:**

    `InputError` if the patches do not divide the image, or the groups the units.

    ??? cite "Reference"

        Ren, Kornblith, Liao & Hinton, *Scaling Forward Gradient with Local Losses*, ICLR 2023
        ([arXiv:2210.03310](https://arxiv.org/abs/2210.03310)), Section 5.

    >>> network = LocalMixer((8, 8, 1), Size(32, 2, 4, 3), 10, key=jax.random.key(0))
    >>> network(jnp.zeros((5, 8, 8, 1))).shape
    (5, 10)
    """

    patches: int = eqx.field(static=True)

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        size: Size,
        classes: int,
        *,
        key: Key[Array, ""],
        projection: int | None = None,
        normalise_features: bool = True,
    ):
        height, width, channels = image_shape
        if height % size.patches or width % size.patches:
            raise InputError(
                f"patches (={size.patches} along a side) must divide the images' height and width, "
                f"which are {height} and {width}"
            )
        if size.units % size.groups:
            raise InputError(
                f"groups (={size.groups}) must divide the number of units, which is {size.units}"
            )
        count = size.patches**2
        inputs = [height * width * channels // count, *[size.units] * (size.blocks - 1)]
        *block_keys, classifier_key = jax.random.split(key, size.blocks + 1)
        self.blocks = [
            Block(i, n, size.units, size.groups, None if i == 0 else count, key=k)
            for i, (n, k) in enumerate(zip(inputs, block_keys, strict=True))
        ]
        self.heads = make_heads([size.units] * size.blocks, classes, projection, key=key)
        self.classifier = Linear(size.units, classes, key=classifier_key, gain=LAST_GAIN)
        self.projection = projection
        self.groups = size.groups
        self.normalise_features = normalise_features
        self.patches = size.patches

    def embed(self, examples: Images) -> Features:
        """The pixels of each patch."""
        batch, height, width, channels = examples.shape
        n = self.patches
        x = examples.reshape(batch, n, height // n, n, width // n, channels)
        return x.transpose(2, 4, 5, 0, 1, 3).reshape(-1, batch, n * n)

    def arranged(self, x: Features) -> Features:
        """The activations as they are."""
        return x


@jax.custom_jvp
def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The positive part of `x`.

    As `jax.nn.relu`, which XLA's CPU backend computes with an array of zeros where normalisation
    follows.
    """
    zero, infinity = map(x.dtype.type, (0, np.inf))
    return jax.lax.clamp(zero, x, infinity)


@relu.defjvp
def _relu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return relu(x), jnp.where(x > 0, dx, 0)
