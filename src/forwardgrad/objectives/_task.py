"""What a loss compares a network's outputs with."""

import abc
from typing import ClassVar

import equinox as eqx
from jaxtyping import Array, Float, Int

Outputs = Float[Array, "batch *tokens outputs"]
"""What a linear layer makes of the examples, or of each of their tokens."""

Labels = Int[Array, "batch *tokens"]

PerExample = Float[Array, "batch *tokens"]


class AbstractTask(eqx.Module):
    """A loss of every example, as a function of a linear layer's outputs.

    An objective says where the losses are, and a task says what they are. The loss of an example
    may depend on other examples. What is learned is the sum of the losses, and `error` is its
    derivative.
    """

    uses_labels: ClassVar[bool]
    """Whether features learn from labels.

    Where they do not, the network's classifier is a readout: it learns alongside, on features that
    are constants to it.
    """

    @abc.abstractmethod
    def losses(self, outputs: Outputs, labels: Labels) -> PerExample:
        """The loss of each example, scaled to add up to the batch's mean."""

    @abc.abstractmethod
    def error(self, outputs: Outputs, labels: Labels) -> Outputs:
        """The derivative of the losses' sum by the outputs."""
