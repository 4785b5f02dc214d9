"""A loss for every block."""

import jax
from jaxtyping import Array, Float, Int

from forwardgrad._errors import InputError
from forwardgrad._losses import Losses
from forwardgrad.networks import AbstractNetwork, copy_axes
from forwardgrad.objectives._base import AbstractObjective
from forwardgrad.objectives._cross_entropy import (
    cross_entropy,
    replicated_cross_entropy,
    wrong,
)


class LocalLoss(AbstractObjective):
    r"""A cross-entropy at every block, for every patch and channel group.

    Block i has a head on its features and the loss $L_i$, replicated over patches and groups (see
    `replicated_cross_entropy`); the network's classifier has the loss L.

    - Local losses, `greedy=False`: $L + \sum_i L_i$. Gradients pass from block to block.
    - Greedy local losses, `greedy=True`: the same sum, but no gradient passes from one block to
      the one before it, or from the classifier to the last.

    **Arguments:**

    - `greedy`: whether gradients stop between blocks.
    - `blockwise`: whether every block has a loss, or only the last.
    - `patchwise`: whether every patch has a copy of its own.
    - `groupwise`: whether every channel group has one.

    **Raises:**

    `InputError`, when called, if the network has no blocks, or no heads for them.

    ??? cite "Reference"

        Ren, Kornblith, Liao & Hinton, *Scaling Forward Gradient with Local Losses*, ICLR 2023
        ([arXiv:2210.03310](https://arxiv.org/abs/2210.03310)), Section 4.
    """

    greedy: bool = True
    blockwise: bool = True
    patchwise: bool = True
    groupwise: bool = True

    @property
    def needs_heads(self) -> bool:
        """True."""
        return True

    def __call__(
        self,
        network: AbstractNetwork,
        images: Float[Array, "batch height width channels"],
        labels: Int[Array, " batch"],
    ) -> tuple[Losses, dict[str, Array]]:
        """The losses, block by block and the classifier's last, and the wrong predictions."""
        if not network.blocks or network.heads is None:
            raise InputError(
                "local losses need a network with blocks that have heads, got "
                f"{type(network).__name__} with {len(network.blocks)} blocks and "
                f"{len(network.heads or ())} heads"
            )
        stop = jax.lax.stop_gradient if self.greedy else lambda x: x
        x, terms, axes = network.embed(images), [], []
        for i, (block, head) in enumerate(zip(network.blocks, network.heads, strict=True)):
            x = block(stop(x) if self.blockwise else x)
            if self.blockwise or i == len(network.blocks) - 1:
                group, patch = copy_axes(i)
                terms.append(self._replicated(network, x, head, labels))
                axes.append((group, "example", patch))
        logits = network.classify(stop(x))
        losses = Losses([*terms, cross_entropy(logits, labels)], [*axes, ("example",)])
        return losses, {"errors": wrong(logits, labels)}

    def _replicated(self, network, x, head, labels):
        features = network.features(x)
        return replicated_cross_entropy(
            network.groups if self.groupwise else 1,
            features.shape[2] if self.patchwise else 1,
            features,
            head.weight,
            head.bias,
            labels,
        )
