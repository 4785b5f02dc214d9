"""What estimators of activations' gradients share."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from forwardgrad._errors import InputError
from forwardgrad._losses import Losses
from forwardgrad.rewrite import Activation


def axes_of(activation: Activation, losses: Losses) -> tuple[str, ...]:
    """The names of an activation's axes.

    **Raises:**

    `InputError` if the losses come apart by examples and its axis of examples is unknown.
    """
    if activation.axes is not None:
        return activation.axes
    shape = activation.value.shape
    if any("example" in losses.axes[i] for i in activation.terms):
        raise InputError(
            f"it is unclear which axis of an activation of shape {shape} is that of the examples; "
            "mark it with forwardgrad.activation(z, 'example', 'unit', ...)"
        )
    return ("unit",) * len(shape)


def influenced(activation: Activation, losses: Losses) -> Array:
    """What an activation's entries can change of the losses, in a shape that broadcasts to it.

    Terms that it cannot change are left out, entries of other examples, patches and groups too.
    """
    axes = axes_of(activation, losses)
    total: Any = 0.0
    for i in sorted(activation.terms):
        names = losses.axes[i]
        kept = [name for name in names if name in axes]
        summed = tuple(j for j, name in enumerate(names) if name not in axes)
        term = jnp.sum(losses.terms[i], axis=summed)
        order = sorted(range(len(kept)), key=lambda j: axes.index(kept[j]))
        sizes = iter([term.shape[j] for j in order])
        shape = [next(sizes) if name in kept else 1 for name in axes]
        total = total + term.transpose(order).reshape(shape)
    return total
