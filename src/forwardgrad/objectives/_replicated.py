"""A loss for every example, patch and channel group, at the price of one."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from forwardgrad.networks._sum import total
from forwardgrad.objectives._task import AbstractTask, Labels, Outputs, PerExample
from forwardgrad.rewrite import transparent


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def separate_losses(task: AbstractTask, outputs: Outputs, labels: Labels) -> PerExample:
    r"""A task's losses, each differentiated by the outputs of its own example alone.

    The outputs of other examples are constants to it. If a loss compares examples with each other,
    its change is divided among the examples that cause it,

    $$\mathrm d\ell_b = \frac{\partial L}{\partial z_b} \cdot \mathrm d z_b,
    \qquad L = \sum_b \ell_b,$$

    so the sum of the losses keeps its derivative.
    """
    return task.losses(transparent(outputs), labels)


@separate_losses.defjvp
def _separate_jvp(task, primals, tangents):
    outputs, labels = primals
    change = jnp.sum(task.error(outputs, labels) * tangents[0], axis=1)
    return task.losses(outputs, labels), change


def _all(features):
    return features


def replicated_loss(
    task: AbstractTask,
    groups: int,
    patches: int,
    features: Float[Array, "units batch all_patches"],
    weight: Float[Array, "units outputs"],
    bias: Float[Array, " outputs"],
    labels: Labels,
    *,
    see: Callable[[Array], Array] = _all,
) -> Float[Array, "groups batch patches"]:
    r"""The loss of a linear head, once for each example, group and patch.

    The head sees the features' mean over patches,
    $z_b = W^\top \frac1P \sum_p h_{\cdot b p} + c$, and the loss $\ell_b$ of an example is the
    same for every copy. But copy (g, b, p) depends on the features of its group, example and patch
    alone. All other features are constants to it, including those of other examples if the task
    compares examples. The copies are scaled to add up to the loss $L = \sum_b \ell_b$, and so do
    their derivatives.

    The closed form is

    $$\mathrm d\ell_{gbp} = \frac1P \sum_{u \in g} \frac{\partial L}{\partial \bar h_{ub}}\,
    \mathrm d h_{ubp}, \qquad
    \frac{\partial L}{\partial \bar h} = W \frac{\partial L}{\partial z}^\top,$$

    so no copy is ever computed. The values of the copies are equal shares of the loss. They do not
    show which features a copy depends on, so a finite difference cannot replace the derivative.

    **Arguments:**

    - `task`: what the head's outputs are for.
    - `groups`: the number of groups that have a copy of their own; 1 for none.
    - `patches`: the number of patches that have one: all of them, or 1 for none.
    - `features`: activations, units first and patches last.
    - `weight`, `bias`: of the head.
    - `labels`: the classes.
    - `see`: what the head sees of the features, such as normalised ones. What it sees of a group,
        an example and a patch must be a function of these alone. Default: the features.

    **Returns:**

    The losses of the copies, which add up to the batch's loss.

    ??? cite "Reference"

        Ren, Kornblith, Liao & Hinton, *Scaling Forward Gradient with Local Losses*, ICLR 2023,
        Section 4.
    """
    return _replicated(see, task, groups, patches, features, weight, bias, labels)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _replicated(see, task, groups, patches, features, weight, bias, labels):
    outputs = transparent(jnp.mean(see(features), axis=2).T @ weight + bias)
    return _copies(task.losses(outputs, labels), groups, patches)


@_replicated.defjvp
def _replicated_jvp(see, task, groups, patches, primals, tangents):
    features, weight, bias, labels = primals
    d_features, d_weight, d_bias, _ = tangents
    seen, back = jax.vjp(see, features)
    pooled = jnp.mean(seen, axis=2)
    outputs = pooled.T @ weight + bias
    error = task.error(outputs, labels)
    # The head's own change is shared out to the copies.
    of_head = jnp.sum(error * (pooled.T @ d_weight + d_bias), axis=1)
    gradient = weight @ error.T / features.shape[2]
    # Back through what is seen, once for all tangents.
    (gradient,) = back(jnp.broadcast_to(gradient[:, :, None], features.shape))
    moved = gradient * d_features
    if patches == 1:
        moved = jnp.sum(moved, axis=2, keepdims=True)
    moved = total(moved.reshape(groups, -1, *moved.shape[1:]), 1)
    losses = task.losses(outputs, labels)
    return _copies(losses, groups, patches), moved + _copies(of_head, groups, patches)


def _copies(losses, groups, patches):
    copy = losses / (groups * patches)
    return jnp.broadcast_to(copy[None, :, None], (groups, len(losses), patches))
