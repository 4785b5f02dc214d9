"""The variance of forward gradients of a LocalMixer, from its exact gradients.

For signs, one tangent, no clipping, and a network of one block and one patch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from forwardgrad._value_and_grad import value_and_grad
from forwardgrad.estimators import Backpropagation
from forwardgrad.networks._local_mixer import Block
from forwardgrad.networks._normalise import normalise
from forwardgrad.rewrite import Activation, Hooks, Program
from forwardgrad.training import Problem


def weight_variances(step: Problem) -> dict[str, Float[Array, "..."]]:
    r"""The variance of every entry of a weight-perturbed gradient, by layer.

    With $\hat g = (g \cdot v)\, v$ and entries of v that are signs,

    $$\operatorname{Var} \hat g_i = E[(g \cdot v)^2] - g_i^2 = \lVert g \rVert^2 - g_i^2,$$

    g being the gradient by all perturbed parameters: those that a layer comes after. Entries of a
    rank-one tangent are not independent, but have the same second moments, and squares of one.
    """
    _, grads = value_and_grad(step.loss, Backpropagation(), has_aux=True)(step.params, *step.batch)
    program = _program(step)
    leaves, _ = jax.tree_util.tree_flatten_with_path(grads)
    last, influence = program.of_last_layers(), program.influence()
    perturbed = {
        jax.tree_util.keystr(path): leaf
        for i, (path, leaf) in enumerate(leaves)
        if influence[i] and i not in last
    }
    square = sum(jnp.sum(leaf**2) for leaf in perturbed.values())
    return {name: square - leaf**2 for name, leaf in perturbed.items()}


def activity_variances(step: Problem) -> dict[str, Float[Array, "..."]]:
    r"""The variance of every entry of an activity-perturbed gradient, by layer.

    An example's activations z are perturbed by signs u where the ReLU after them has a slope (m is
    1 there, else 0), and $\hat g_z = d\,u$ with $d = \sum_k g_k u_k$ over all activations k that
    share it: those of the example in both layers or, where every group has a copy of the loss,
    those of its group. With $S = \sum_k g_k^2$,

    $$\operatorname{Cov}(\hat g_j, \hat g_l) = (S\,m_j - 2 g_j^2)\, \delta_{jl} + g_j g_l,$$

    and no covariance between activations that do not share d. These are the values after
    normalisation, which is differentiated in reverse as a part of the layer. With its Jacobian J,

    $$\operatorname{Var} \hat g_{a_j} = \sum_l J_{lj}^2 (S\,m_l - 2 g_l^2)
    + \Bigl(\sum_l J_{lj}\, g_l\Bigr)^2$$

    (of the last term one for each d). Examples are independent, so that for a weight with input x

    $$\operatorname{Var} \hat g_{W_{ij}} = \sum_n x_{ni}^2 \operatorname{Var} \hat g_{a_{nj}}.$$
    """
    (x, grouped_x), (mask, grouped_mask), (g, grouped_g), by_group = _layers(step)
    block: Block = step.params.blocks[0]
    squares = jnp.sum(g**2 + grouped_g**2, axis=2)
    shared = squares if by_group else jnp.sum(squares, axis=1, keepdims=True)
    a = jnp.einsum("iu,ib->bu", block.channel_weight, x) + block.channel_bias
    shares = (*shared.shape, -1)
    of_a = _through_normalisation(a, g.reshape(shares), mask.reshape(shares), shared)
    a = jnp.einsum("gcd,gcb->bgd", block.group_weight, grouped_x) + block.group_bias
    # This one is normalised within each group: all of a group share one d.
    of_groups = jax.vmap(_through_normalisation, in_axes=1, out_axes=1)
    one_share = (grouped_g[:, :, None], grouped_mask[:, :, None])
    of_grouped = of_groups(a, *one_share, jnp.broadcast_to(shared, squares.shape)[:, :, None])
    return {
        ".blocks[0].channel_weight": jnp.einsum("ib,bu->iu", x**2, of_a),
        ".blocks[0].channel_bias": jnp.sum(of_a, axis=0),
        ".blocks[0].group_weight": jnp.einsum("gcb,bgd->gcd", grouped_x**2, of_grouped),
        ".blocks[0].group_bias": jnp.sum(of_grouped, axis=0),
    }


def _through_normalisation(
    a: Float[Array, "batch units"],
    gradient: Float[Array, "batch shares members"],
    mask: Array,
    shared: Float[Array, "batch shares"],
) -> Float[Array, "batch units"]:
    """The variance of the estimate by `a`, given what is estimated by its normalised values.

    Those are in shares, each with the sum S of the squared derivatives that its d is made of.
    """
    jacobian = jax.vmap(jax.jacfwd(lambda a: normalise(a, 0)))(a)
    jacobian = jacobian.reshape(*gradient.shape, -1)
    diagonal = shared[:, :, None] * mask - 2 * gradient**2
    mean = jnp.einsum("bsmj,bsm->bsj", jacobian, gradient)
    return jnp.einsum("bsmj,bsm->bj", jacobian**2, diagonal) + jnp.sum(mean**2, axis=1)


def _layers(step: Problem) -> tuple[list[Array], list[Array], list[Array], bool]:
    """Inputs of the two layers; masks and derivatives [batch, groups, units] of what they compute.

    Layers are products of matrices: the examples, with one patch each, are the inputs' last axis.
    Last, whether the losses have a copy for every group.
    """
    program = _program(step)

    def total(shifts):
        remaining = iter(shifts)

        def shifted(a: Activation) -> Array:
            return a.value if a.last else a.value + next(remaining)

        hooks = Hooks(activation=shifted, layer_input=lambda a: a.value)
        terms, _, noted = program.with_hooks(program.leaves, hooks)
        losses = program.losses(terms)
        by_group = any("group 0" in names for names in losses.axes)
        arrays = [a.value for a in noted.inputs[:2]], [a.mask for a in noted.activations[:2]]
        return losses.total(), (*arrays, by_group)

    count, units, _ = step.params.blocks[0].group_weight.shape
    shape = (count, units, len(step.batch[1]), 1)
    zeros = [jnp.zeros(shape)] * 2
    grads, (inputs, masks, by_group) = jax.grad(total, has_aux=True)(zeros)

    def by_example(y):
        return y[..., 0].transpose(2, 0, 1)

    return (
        inputs,
        [by_example(m) for m in masks],
        [by_example(g) for g in grads],
        by_group,
    )


def _program(step: Problem) -> Program:
    return Program(lambda params: step.loss(params, *step.batch), step.params)
