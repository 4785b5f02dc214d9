"""A loss for every block."""

import jax

from forwardgrad.networks import AbstractNetwork, copy_axes
from forwardgrad.networks._base import Examples
from forwardgrad.objectives._base import AbstractObjective, Outcome, heads_of, with_classifier
from forwardgrad.objectives._replicated import replicated_loss
from forwardgrad.objectives._supervised import Supervised
from forwardgrad.objectives._task import AbstractTask, Labels


class LocalLoss(AbstractObjective):
    r"""A loss at every block, for every patch and channel group.

    Block i has a head on its features and the loss $L_i$, replicated over patches and groups (see
    [`replicated_loss`][forwardgrad.objectives.replicated_loss]); the network's classifier has the
    cross-entropy L. A network of texts has a loss for every token instead, and no copies.

    - Local losses, `greedy=False`: $L + \sum_i L_i$. Gradients pass from block to block.
    - Greedy local losses, `greedy=True`: the same sum, but no gradient passes from one block to
      the one before it, or from the classifier to the last.

    In contrastive learning no gradient passes from the classifier to the last block in any case:
    it is a readout.

    **Arguments:**

    - `task`: what the blocks' losses are.
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

    task: AbstractTask = Supervised()
    greedy: bool = True
    blockwise: bool = True
    patchwise: bool = True
    groupwise: bool = True

    @property
    def needs_heads(self) -> bool:
        """Always."""
        return True

    def __call__(self, network: AbstractNetwork, examples: Examples, labels: Labels) -> Outcome:
        """The losses, block by block and the classifier's last, and the wrong predictions."""
        heads = heads_of(network, "local losses need")
        stop = jax.lax.stop_gradient if self.greedy and self.blockwise else lambda x: x
        x, terms, axes = network.embed(examples), [], []
        for i, (block, head) in enumerate(zip(network.blocks, heads, strict=True)):
            x = block(x)
            if self.blockwise or i == len(network.blocks) - 1:
                term, names = self._of_block(network, i, x, head, labels)
                terms.append(term)
                axes.append(names)
            x = stop(x)
        detached = self.greedy or not self.task.uses_labels
        return with_classifier(network, x, labels, terms, axes, detached=detached)

    def _of_block(self, network, number, x, head, labels):
        """The losses of a block, and the names of their axes."""
        if network.by_token:
            return self.task.losses(head(network.pooled(x)), labels), network.axes
        group, patch = copy_axes(number)
        return self._replicated(network, x, head, labels), (group, "example", patch)

    def _replicated(self, network, x, head, labels):
        features = network.features(x)
        groups = network.groups if self.groupwise else 1
        patches = features.shape[2] if self.patchwise else 1
        copies = (groups, patches, features, head.weight, head.bias)
        return replicated_loss(self.task, *copies, labels)
