"""A loss for every block."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array

from forwardgrad._errors import InputError
from forwardgrad._greedy_stages import grouped
from forwardgrad._losses import Losses
from forwardgrad.networks import GPT, AbstractNetwork, copy_axes
from forwardgrad.networks._base import Examples
from forwardgrad.networks._normalise import widened
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
        heads_of(network, "local losses need")
        x, terms, axes = self._through(network, network.embed(examples), labels)
        detached = self.greedy or not self.task.uses_labels
        return with_classifier(network, x, labels, terms, axes, detached=detached)

    def stages(self, network: AbstractNetwork, count: int) -> tuple[list[Any], list[Any]]:
        """A network's blocks in groups, for a [`forwardgrad.BlockPipeline`][].

        The first stage takes images or tokens, and the last one has the classifier. Its output is
        what the objective returns beside the losses, `{"errors": the number of wrong predictions}`.

        **Arguments:**

        - `network`: with blocks that have heads.
        - `count`: the number of stages. They have equally many blocks, or the first ones have one
            more.

        **Returns:**

        `(stages, params)`: functions `stage(params, x, labels) -> (losses, output)`, and for each
        its parameters, the network with these blocks alone.

        **Raises:**

        `InputError` if gradients pass from one block to another, the stages are more than the
        blocks, the embedding is tied to the classifier, or the network has no blocks or no heads
        for them.

        >>> import forwardgrad as fg, jax.numpy as jnp, optax
        >>> from forwardgrad.networks import LocalMixer, Size
        >>> network = LocalMixer((8, 8, 1), Size(32, 2, 4, 3), 10, key=jax.random.key(0))
        >>> stages, params = LocalLoss().stages(network, 3)
        >>> devices = jax.devices()[:1] * 3
        >>> pipeline = fg.BlockPipeline(stages, fg.ActivityPerturbation(), optax.sgd(0.1), devices)
        >>> images, labels = jnp.ones((5, 8, 8, 1)), jnp.arange(5)
        >>> state = pipeline.init(params, images, labels)
        >>> values, output, state = pipeline.step(state, images, labels, key=jax.random.key(1))
        >>> print(len(values), output["errors"])
        3 4
        """
        heads = heads_of(network, "local losses need")
        if not (self.greedy and self.blockwise):
            raise InputError(
                "a pipeline needs a loss at every block and no gradients between blocks, got "
                f"greedy={self.greedy} and blockwise={self.blockwise}"
            )
        if count > 1 and isinstance(network, GPT) and network.embedding is None:
            raise InputError(
                "a pipeline of several stages needs an embedding that is not tied to the "
                "classifier, whose weights the first and the last stage would share"
            )
        total, stages, parts = len(network.blocks), [], []
        for own in grouped(total, count):
            last = own.stop == total
            part = (network.blocks[own], heads[own], network.classifier if last else None)
            # What embeds the examples is in the first stage alone.
            like = eqx.filter(network, eqx.is_inexact_array, inverse=True) if own.start else network
            parts.append(eqx.tree_at(_trained, like, part))
            stages.append(_Stage(self, own.start, last))
        return stages, parts

    def _through(self, network, x, labels, first=0):
        """The output of a network's blocks, their losses and the names of these losses' axes."""
        stop = jax.lax.stop_gradient if self.greedy and self.blockwise else lambda x: x
        terms, axes = [], []
        for i, (block, head) in enumerate(zip(network.blocks, network.heads, strict=True)):
            x = block(x)
            if self.blockwise or i == len(network.blocks) - 1:
                term, names = self._of_block(network, first + i, x, head, labels)
                terms.append(term)
                axes.append(names)
            x = stop(x)
        return x, terms, axes

    def _of_block(self, network, number, x, head, labels):
        """The losses of a block, and the names of their axes."""
        if network.by_token:
            return self.task.losses(head(network.pooled(x)), labels), network.axes
        group, patch = copy_axes(number)
        return self._replicated(network, x, head, labels), (group, "example", patch)

    def _replicated(self, network, x, head, labels):
        features = widened(network.arranged(x))
        groups = network.groups if self.groupwise else 1
        patches = features.shape[2] if self.patchwise else 1
        copies = (groups, patches, features, head.weight, head.bias)
        return replicated_loss(self.task, *copies, labels, see=network.seen)


def _trained(network: AbstractNetwork) -> tuple[Any, Any, Any]:
    return network.blocks, network.heads, network.classifier


class _Stage(eqx.Module):
    """A stage of a pipeline: the blocks of a network from number `first` on."""

    objective: LocalLoss
    first: int = eqx.field(static=True)
    last: bool = eqx.field(static=True)

    def __call__(self, network: AbstractNetwork, x: Array, labels: Labels) -> tuple[Losses, Any]:
        x = x if self.first else network.embed(x)
        x, terms, axes = self.objective._through(network, x, labels, self.first)
        if self.last:
            return with_classifier(network, x, labels, terms, axes, detached=True)
        return Losses(terms, axes), x
