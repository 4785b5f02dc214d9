"""What an objective is."""

import abc
from collections.abc import Sequence

import equinox as eqx
import jax
from jaxtyping import Array

from forwardgrad._errors import InputError
from forwardgrad._losses import Losses
from forwardgrad.networks import AbstractNetwork
from forwardgrad.networks._base import Examples
from forwardgrad.networks._layers import Linear
from forwardgrad.objectives._supervised import cross_entropy, wrong
from forwardgrad.objectives._task import AbstractTask, Labels

Outcome = tuple[Losses, dict[str, Array]]
"""The losses, not added up, and `{"errors": the number of wrong predictions}`."""


class AbstractObjective(eqx.Module):
    """Where losses sit, and where gradients stop.

    Called as `objective(network, examples, labels)`.
    """

    task: eqx.AbstractVar[AbstractTask]

    @property
    @abc.abstractmethod
    def needs_heads(self) -> bool:
        """Whether the network's blocks must have heads."""

    @abc.abstractmethod
    def __call__(self, network: AbstractNetwork, examples: Examples, labels: Labels) -> Outcome:
        """The losses, not added up, and `{"errors": the number of wrong predictions}`."""


def heads_of(network: AbstractNetwork, what: str) -> list[Linear]:
    """The heads of a network's blocks.

    **Raises:**

    `InputError` if the network has no blocks, or no heads for them.
    """
    if network.blocks and network.heads is not None:
        return network.heads
    raise InputError(
        f"{what} a network with blocks that have heads, got {type(network).__name__} with "
        f"{len(network.blocks)} blocks and {len(network.heads or ())} heads"
    )


def with_classifier(
    network: AbstractNetwork,
    x: Array,
    labels: Labels,
    terms: Sequence[Array],
    axes: Sequence[tuple[str, ...]],
    *,
    detached: bool,
) -> Outcome:
    """The terms so far, and that of the network's classifier on the last block's output `x`.

    With `detached`, the features are constants to the classifier.
    """
    logits = network.classify(jax.lax.stop_gradient(x) if detached else x)
    losses = Losses([*terms, cross_entropy(logits, labels)], [*axes, network.axes])
    return losses, {"errors": wrong(logits, labels)}
