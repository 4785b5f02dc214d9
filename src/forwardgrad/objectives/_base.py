"""What an objective is."""

import abc

import equinox as eqx
from jaxtyping import Array, Float, Int

from forwardgrad._losses import Losses
from forwardgrad.networks import AbstractNetwork


class AbstractObjective(eqx.Module):
    """Where losses sit, and where gradients stop.

    Called as `objective(network, images, labels)`.
    """

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
