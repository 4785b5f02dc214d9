"""What an objective is."""

import abc
from collections.abc import Sequence

import equinox as eqx
import jax
from jaxtyping import Array, Float, Int

from forwardgrad._errors import InputError
from forwardgrad._losses import Losses
from forwardgrad.networks import AbstractNetwork
from forwardgrad.objectives._supervised import cross_entropy, wrong
from forwardgrad.objectives._task import AbstractTask


class AbstractObjective(eqx.Module):
    """Where losses sit, and where gradients stop.

    Called as `objective(network, images, labels)`.
    """

    task: eqx.AbstractVar[AbstractTask]

    @property
    @abc.abstractmethod
    def needs_heads(self) -> bool:
        """Whether the network's blocks must have heads."""

    @abc.abstractmethod
    def __call__(
        self,
        network: AbstractNetwork,
        images: Float[Array, "batch height width channels"],
        labels: Int[Array, " batch"],
    ) -> tuple[Losses, dict[str, Array]]:
        """The losses, not added up, and `{"errors": the number of wrong predictions}`."""


def check_heads(network: AbstractNetwork, what: str) -> None:
    """Refuse a network without blocks, or without heads for them."""
    if not network.blocks or network.heads is None:
        raise InputError(
            f"{what} a network with blocks that have heads, got "
            f"{type(network).__name__} with {len(network.blocks)} blocks and "
            f"{len(network.heads or ())} heads"
        )


def with_classifier(
    network: AbstractNetwork,
    x: Array,
    labels: Int[Array, " batch"],
    terms: Sequence[Array],
    axes: Sequence[tuple[str, ...]],
    *,
    detached: bool,
) -> tuple[Losses, dict[str, Array]]:
    """The terms so far, and that of the network's classifier on the last block's output `x`.

    With `detached`, the features are constants to the classifier.
    """
    logits = network.classify(jax.lax.stop_gradient(x) if detached else x)
    losses = Losses([*terms, cross_entropy(logits, labels)], [*axes, ("example",)])
    return losses, {"errors": wrong(logits, labels)}
