"""The classification loss; and one for every patch and channel group, at the price of one."""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Float[Array, " batch"]:
    r"""Softmax cross-entropy of every example, scaled to add up to the batch's mean.

    $$\ell_b = -\frac1B \log \operatorname{softmax}(z_b)_{y_b}$$
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels) / len(labels)


def wrong(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Int[Array, ""]:
    """The number of wrong predictions."""
    return jnp.sum(jnp.argmax(logits, axis=-1) != labels)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def replicated_cross_entropy(
    groups: int,
    patches: int,
    features: Float[Array, "units batch all_patches"],
    weight: Float[Array, "units classes"],
    bias: Float[Array, " classes"],
    labels: Int[Array, " batch"],
) -> Float[Array, "groups batch patches"]:
    r"""The cross-entropy of a linear head, once for each group and patch.

    The head sees the features' mean over patches,
    $z_b = W^\top \frac1P \sum_p h_{\cdot b p} + c$, and the loss $\ell_b$ of an example is the
    same for every copy. But copy (g, p) depends on the features of its group and patch alone: the
    others are constants to it. All copies are scaled to add up to the mean loss $\frac1B
    \sum_b \ell_b$, whose derivative is then the sum of theirs.

    The closed form is

    $$\mathrm d\ell_{gbp} = \frac1P \sum_{u \in g} \frac{\partial \ell_b}{\partial \bar h_{ub}}\,
    \mathrm d h_{ubp},$$

    so that no copy is ever computed. The copies' values are equal shares of the loss, and do not
    say which features they depend on: a finite difference cannot take the derivative's place.

    **Arguments:**

    - `groups`: the number of groups that have a copy of their own; 1 for none.
    - `patches`: the number of patches that have one: all of them, or 1 for none.
    - `features`: activations, units first and patches last.
    - `weight`, `bias`: of the head.
    - `labels`: the classes.

    **Returns:**

    The losses of the copies, which add up to the batch's mean loss.

    ??? cite "Reference"

        Ren, Kornblith, Liao & Hinton, *Scaling Forward Gradient with Local Losses*, ICLR 2023,
        Section 4.
    """
    losses = cross_entropy(jnp.mean(features, axis=2).T @ weight + bias, labels)
    return _copies(losses, groups, patches)


@replicated_cross_entropy.defjvp
def _jvp(groups, patches, primals, tangents):
    features, weight, bias, labels = primals
    d_features, d_weight, d_bias, _ = tangents
    pooled = jnp.mean(features, axis=2)
    losses, of_head = jax.jvp(
        lambda w, b: cross_entropy(pooled.T @ w + b, labels), (weight, bias), (d_weight, d_bias)
    )
    error = jax.nn.softmax(pooled.T @ weight + bias) - jax.nn.one_hot(labels, weight.shape[1])
    scale = 1 / (features.shape[1] * features.shape[2])
    gradient = scale * (weight @ error.T)
    moved = gradient[:, :, None] * d_features
    if patches == 1:
        moved = jnp.sum(moved, axis=2, keepdims=True)
    moved = jnp.sum(moved.reshape(groups, -1, *moved.shape[1:]), axis=1)
    return _copies(losses, groups, patches), moved + _copies(of_head, groups, patches)


def _copies(losses, groups, patches):
    copy = losses / (groups * patches)
    return jnp.broadcast_to(copy[None, :, None], (groups, len(losses), patches))
