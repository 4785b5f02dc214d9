"""Classification."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from forwardgrad.networks._normalise import widened
from forwardgrad.objectives._task import AbstractTask, Labels, Outputs, PerExample


def cross_entropy(logits: Float[Array, "batch *tokens classes"], labels: Labels) -> PerExample:
    r"""Softmax cross-entropy of every example, scaled to add up to the batch's mean.

    $$\ell_b = -\frac1B \log \operatorname{softmax}(z_b)_{y_b}$$

    Of texts it is that of every token, and the mean is over all tokens.
    """
    return optax.softmax_cross_entropy_with_integer_labels(widened(logits), labels) / labels.size


def wrong(logits: Float[Array, "batch *tokens classes"], labels: Labels) -> Int[Array, ""]:
    """The number of wrong predictions."""
    return jnp.sum(jnp.argmax(logits, axis=-1) != labels)


class Supervised(AbstractTask):
    """Classification: the outputs are logits, their loss is the softmax cross-entropy."""

    uses_labels: ClassVar[bool] = True

    def losses(self, outputs: Outputs, labels: Labels) -> PerExample:
        """[`cross_entropy`][forwardgrad.objectives.cross_entropy]."""
        return cross_entropy(outputs, labels)

    def error(self, outputs: Outputs, labels: Labels) -> Outputs:
        """The softmax, less one at the label, divided by the number of labels."""
        outputs = widened(outputs)
        target = jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)
        return (jax.nn.softmax(outputs) - target) / labels.size
