"""Fully connected networks."""

import equinox as eqx
import jax
from jaxtyping import Array, Float, Key

from forwardgrad.networks._base import AbstractNetwork, Features, Images
from forwardgrad.networks._layers import LAST_GAIN, Linear, make_heads, units_first


class Dense(eqx.Module):
    """A linear layer on everything that an example has, and a ReLU."""

    linear: Linear

    def __init__(self, inputs: int, outputs: int, *, key: Key[Array, ""]):
        self.linear = Linear(inputs, outputs, key=key)

    def __call__(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch outputs"]:
        return jax.nn.relu(self.linear(x.reshape(x.shape[0], -1)))


class MLP(AbstractNetwork):
    """Fully connected layers with ReLU between them; without hidden ones, logistic regression.

    The paper's network is 784-1024-1024-10 (Baydin et al. 2022, Section 5.3).
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int,
        outputs: int,
        *,
        key: Key[Array, ""],
        heads: bool = False,
        projection: int | None = None,
        normalise_features: bool = False,
    ):
        *keys, last_key = jax.random.split(key, depth + 1)
        sizes = [inputs, *[width] * depth]
        self.blocks = [Dense(m, n, key=k) for m, n, k in zip(sizes, sizes[1:], keys, strict=False)]
        self.classifier = Linear(sizes[-1], outputs, key=last_key, gain=LAST_GAIN)
        self.heads = make_heads(sizes[1:], outputs, projection, key=key) if heads else None
        self.projection = projection
        self.groups = 1
        self.normalise_features = normalise_features

    def embed(self, examples: Images) -> Array:
        """All pixels of an image, as exact as the weights."""
        return examples.reshape(examples.shape[0], -1).astype(self.classifier.weight.dtype)

    def arranged(self, x: Float[Array, "batch units"]) -> Features:
        """The units, in one patch."""
        return units_first(x)
