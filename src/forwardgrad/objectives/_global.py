"""One loss at the network's end."""

from jaxtyping import Array, Float, Int

from forwardgrad._losses import Losses
from forwardgrad.networks import AbstractNetwork
from forwardgrad.objectives._base import AbstractObjective
from forwardgrad.objectives._cross_entropy import cross_entropy, wrong


class GlobalLoss(AbstractObjective):
    r"""Mean softmax cross-entropy of the network's output.

    $$L = -\frac1B \sum_b \log \operatorname{softmax}(z_b)_{y_b}$$
    """

    @property
    def needs_heads(self) -> bool:
        """False."""
        return False

    def __call__(
        self,
        network: AbstractNetwork,
        images: Float[Array, "batch height width channels"],
        labels: Int[Array, " batch"],
    ) -> tuple[Losses, dict[str, Array]]:
        """The loss of every example, and the number of wrong predictions."""
        logits = network(images)
        return Losses([cross_entropy(logits, labels)], [("example",)]), {
            "errors": wrong(logits, labels)
        }
