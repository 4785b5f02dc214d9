"""What a network offers: blocks, a classifier, and heads where blocks have losses of their own."""

import abc
import functools
from collections.abc import Callable
from typing import ClassVar, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from forwardgrad.networks._layers import Linear
from forwardgrad.networks._normalise import normalise, widened

Images: TypeAlias = Float[Array, "batch height width channels"]

Tokens: TypeAlias = Int[Array, "batch tokens"]

Examples: TypeAlias = Images | Tokens
"""What a network is called on: images, or sequences of tokens."""

Features = Float[Array, "units batch patches"]
"""What heads and the classifier see: units first, in groups of equal size, and patches last.

The patches of a text are its tokens.
"""


def copy_axes(block: int) -> tuple[str, str]:
    """What the axes of a block's groups and patches are called, in its activations and losses.

    Every block has names of its own, because the blocks after it mix its groups and patches.
    """
    return f"group {block}", f"patch {block}"


READOUT_LENGTH = 4.0
"""Of the features that a readout gets: such that it is stable at the learning rates of the rest."""


def _of_one_length(x: Float[Array, "batch units"]) -> Float[Array, "batch units"]:
    square = jnp.sum(widened(x) ** 2, axis=1, keepdims=True)
    return x * (READOUT_LENGTH * jax.lax.rsqrt(square + 1e-6)).astype(x.dtype)


def _seen(groups: int | None, x: Features) -> Features:
    """Each group of units with mean zero and variance one; without groups, all as they are."""
    # One number would always become zero.
    if groups is None or groups == len(x):
        return x
    return normalise(x.reshape(groups, -1, *x.shape[1:]), 1).reshape(x.shape)


class AbstractNetwork(eqx.Module):
    """Blocks one after another, and a linear classifier on the last one's features.

    If the blocks have losses of their own, each block has a head, which is a linear layer. A head
    has as many outputs as the classifier, or `projection` outputs in contrastive learning.

    A network of images has one output for an image, a network of texts one for each token.
    """

    by_token: ClassVar[bool] = False
    """Whether examples are sequences of tokens, with an output for each."""

    blocks: list[Callable[[Array], Array]]
    heads: list[Linear] | None
    classifier: Linear
    groups: int = eqx.field(static=True)
    projection: int | None = eqx.field(static=True)
    normalise_features: bool = eqx.field(static=True)

    @property
    def axes(self) -> tuple[str, ...]:
        """What the axes of the losses of the classifier's output are called."""
        return ("example", "token") if self.by_token else ("example",)

    @abc.abstractmethod
    def embed(self, examples: Examples) -> Array:
        """The first block's input."""

    @abc.abstractmethod
    def arranged(self, x: Array) -> Features:
        """A block's output (or the first one's input) by units, examples and patches."""

    def features(self, x: Array) -> Features:
        """What heads and the classifier see of a block's output.

        With `normalise_features` each group of units has mean zero and variance one, at every
        patch, so that the features of a group depend on no other.
        """
        return self.seen(self.arranged(x))

    @property
    def seen(self) -> Callable[[Features], Features]:
        """What becomes of arranged outputs before heads and the classifier see them."""
        return functools.partial(_seen, self.groups if self.normalise_features else None)

    def pooled(self, x: Array) -> Float[Array, "batch *tokens units"]:
        """The mean of a block's features over patches; of each token its own features."""
        if self.by_token:
            return self.features(x).transpose(1, 2, 0)
        return jnp.mean(self.features(x), axis=2).T

    def classify(self, x: Array) -> Float[Array, "batch *tokens classes"]:
        """The logits for the last block's output: a linear layer on its pooled features.

        If the heads project features, the classifier is a readout. Nothing limits the size of the
        features then, so they are scaled to one length.
        """
        pooled = self.pooled(x)
        return self.classifier(pooled if self.projection is None else _of_one_length(pooled))

    def blocks_output(self, examples: Examples) -> Array:
        """What the last block computes."""
        x = self.embed(examples)
        for block in self.blocks:
            x = block(x)
        return x

    def __call__(self, examples: Examples) -> Float[Array, "batch *tokens classes"]:
        """The logits."""
        return self.classify(self.blocks_output(examples))
