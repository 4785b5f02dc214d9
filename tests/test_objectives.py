"""Local losses: the closed form against its definition, and where gradients stop."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad.networks import LocalMixer, Size, build, copy_axes
from forwardgrad.objectives import GlobalLoss, LocalLoss, cross_entropy, replicated_cross_entropy

UNITS, BATCH, PATCHES, CLASSES = 6, 5, 4, 3


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(keys[0], (UNITS, BATCH, PATCHES)),
        jax.random.normal(keys[1], (UNITS, CLASSES)),
        jax.random.normal(keys[2], (CLASSES,)),
    )


LABELS = jnp.array([0, 1, 2, 2, 0])


def tiled(groups, patches, features, weight, bias):
    """The definition: a copy of the head and the loss for each group and patch.

    Each copy sees all features, but only those of its group and patch as more than constants.
    """
    copies = []
    for g in range(groups):
        of_group = []
        for p in range(patches):
            own = jnp.zeros((groups, UNITS // groups, BATCH, patches, PATCHES // patches))
            own = own.at[g, :, :, p].set(1).reshape(features.shape) == 1
            seen = jnp.where(own, features, jax.lax.stop_gradient(features))
            # The head learns from all copies together.
            heads = [w / (groups * patches) for w in (weight, bias)]
            shared = [
                jax.lax.stop_gradient(w - h) + h for w, h in zip((weight, bias), heads, strict=True)
            ]
            of_group.append(cross_entropy(jnp.mean(seen, 2).T @ shared[0] + shared[1], LABELS))
        copies.append(jnp.stack(of_group, axis=1))
    return jnp.stack(copies)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("patches", [1, PATCHES])
def test_replicated_loss_is_its_definition(groups, patches):
    def closed(*args):
        return replicated_cross_entropy(groups, patches, *args, LABELS)

    def definition(*args):
        return tiled(groups, patches, *args)

    args, tangents = inputs(), inputs(1)
    value, change = jax.jvp(closed, args, tangents)
    expected, expected_change = jax.jvp(definition, args, tangents)
    # The values are shared out, the derivatives are those of whole copies.
    np.testing.assert_allclose(value, expected / (groups * patches), rtol=1e-5)
    np.testing.assert_allclose(change, expected_change, rtol=1e-4, atol=1e-6)
    cotangent = jax.random.normal(jax.random.key(2), value.shape)
    back = jax.vjp(closed, *args)[1](cotangent)
    for a, b in zip(back, jax.vjp(definition, *args)[1](cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_replicated_loss_adds_up_to_the_mean_loss():
    features, weight, bias = inputs()

    def whole(features, weight, bias):
        return jnp.sum(cross_entropy(jnp.mean(features, 2).T @ weight + bias, LABELS))

    def copies(*args):
        return jnp.sum(replicated_cross_entropy(3, PATCHES, *args, LABELS))

    expected = jax.value_and_grad(whole, (0, 1, 2))(features, weight, bias)
    value, grads = jax.value_and_grad(copies, (0, 1, 2))(features, weight, bias)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    for a, b in zip(grads, expected[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


NETWORK = LocalMixer((4, 4, 1), Size(8, 2, 2, 3), CLASSES, key=jax.random.key(0))
IMAGES = jax.random.normal(jax.random.key(1), (BATCH, 4, 4, 1))


def gradient(objective, network=NETWORK):
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def fun(params):
        return objective(eqx.combine(params, static), IMAGES, LABELS)[0].total()

    return jax.value_and_grad(fun)(params)


def some(tree):
    return any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(tree))


def test_terms_and_their_axes():
    losses, aux = LocalLoss()(NETWORK, IMAGES, LABELS)
    assert [term.shape for term in losses.terms] == [(2, BATCH, 4)] * 3 + [(BATCH,)]
    expected = [(copy_axes(i)[0], "example", copy_axes(i)[1]) for i in range(3)]
    assert losses.axes == (*expected, ("example",))
    assert aux["errors"] == GlobalLoss()(NETWORK, IMAGES, LABELS)[1]["errors"]
    shapes = [t.shape for t in LocalLoss(patchwise=False)(NETWORK, IMAGES, LABELS)[0].terms]
    assert shapes == [(2, BATCH, 1)] * 3 + [(BATCH,)]
    shapes = [t.shape for t in LocalLoss(groupwise=False)(NETWORK, IMAGES, LABELS)[0].terms]
    assert shapes == [(1, BATCH, 4)] * 3 + [(BATCH,)]
    assert len(LocalLoss(blockwise=False)(NETWORK, IMAGES, LABELS)[0].terms) == 2


@pytest.mark.parametrize("patchwise", [True, False])
@pytest.mark.parametrize("groupwise", [True, False])
def test_copies_change_neither_value_nor_exact_gradient(patchwise, groupwise):
    expected = gradient(LocalLoss(patchwise=False, groupwise=False))
    found = gradient(LocalLoss(patchwise=patchwise, groupwise=groupwise))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def of_one_term(objective, term):
    params, static = eqx.partition(NETWORK, eqx.is_inexact_array)

    def fun(params):
        return jnp.sum(objective(eqx.combine(params, static), IMAGES, LABELS)[0].terms[term])

    return jax.grad(fun)(params)


@pytest.mark.parametrize("greedy", [True, False])
def test_a_block_learns_from(greedy):
    for i in range(3):
        grads = of_one_term(LocalLoss(greedy=greedy), i)
        reached = [some(block) for block in grads.blocks]
        assert reached == [j == i if greedy else j <= i for j in range(3)]
        assert [some(head) for head in grads.heads] == [j == i for j in range(3)]
        assert not some(grads.classifier)
    grads = of_one_term(LocalLoss(greedy=greedy), 3)
    assert [some(block) for block in grads.blocks] == [not greedy] * 3
    assert some(grads.classifier)


def test_one_greedy_loss_at_the_end_reaches_every_block():
    grads = of_one_term(LocalLoss(blockwise=False), 0)
    assert all(some(block) for block in grads.blocks)


def test_a_group_does_not_see_the_others():
    """What a copy says of a group's last layer is nothing of another group's."""
    params, static = eqx.partition(NETWORK, eqx.is_inexact_array)

    def copy(params):
        return jnp.sum(LocalLoss()(eqx.combine(params, static), IMAGES, LABELS)[0].terms[1][0])

    grads = jax.grad(copy)(params)
    assert some(grads.blocks[1].group_weight[0])
    assert not some(grads.blocks[1].group_weight[1])


def test_networks_without_blocks_or_heads():
    sizes = {"image_shape": (4, 4, 1), "classes": CLASSES, "key": jax.random.key(0)}
    for network, match in (
        (build("logreg", **sizes, heads=True), "got MLP with 0 blocks and 0 heads"),
        (build("mlp", **sizes, width=4), "got MLP with 2 blocks and 0 heads"),
    ):
        with pytest.raises(fg.InputError, match=match):
            LocalLoss()(network, IMAGES, LABELS)
