"""Tasks, local losses: closed forms against their definitions, and where gradients stop."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad.networks import LocalMixer, Size, build, copy_axes
from forwardgrad.networks._normalise import normalise
from forwardgrad.objectives import (
    Contrastive,
    GlobalLoss,
    LocalLoss,
    Supervised,
    cross_entropy,
    replicated_loss,
    separate_losses,
    two_views,
)

UNITS, BATCH, PATCHES, CLASSES = 6, 6, 4, 3
TASKS = {"supervised": Supervised(), "contrastive": Contrastive(temperature=0.3)}


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return (
        jax.random.normal(keys[0], (UNITS, BATCH, PATCHES)),
        jax.random.normal(keys[1], (UNITS, CLASSES)),
        jax.random.normal(keys[2], (CLASSES,)),
    )


LABELS = jnp.array([0, 1, 2, 2, 0, 1])


def tiled(task, groups, patches, features, weight, bias):
    """The definition: a copy of the head and the loss for each group, example and patch.

    Each copy sees all features, but only those of its group, example and patch as more than
    constants; its value is the loss of its example.
    """

    def copy(own, example):
        seen = jnp.where(own, features, jax.lax.stop_gradient(features))
        # The head learns from all copies together, from each with the share that is its example's.
        heads = [w / (groups * patches) for w in (weight, bias)]
        shared = [
            jax.lax.stop_gradient(w - h) + h for w, h in zip((weight, bias), heads, strict=True)
        ]
        outputs = jnp.mean(seen, 2).T @ shared[0] + shared[1]
        outputs = jnp.where(jnp.arange(BATCH)[:, None] == example, outputs, cut(outputs))
        # The value of one example's loss, with the derivative of them all.
        losses = task.losses(outputs, LABELS)
        others = jnp.sum(losses) - losses[example]
        return losses[example] + others - cut(others)

    cut = jax.lax.stop_gradient
    shape = (groups, UNITS // groups, BATCH, patches, PATCHES // patches)
    places = np.array(list(np.ndindex(groups, BATCH, patches)))
    own = np.zeros((len(places), *shape), bool)
    for i, (g, b, p) in enumerate(places):
        own[i, g, :, b, p] = True
    copies = jax.vmap(copy)(own.reshape(-1, *features.shape), places[:, 1])
    return copies.reshape(groups, BATCH, patches)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("patches", [1, PATCHES])
@pytest.mark.parametrize("normalised", [False, True])
def test_replicated_loss_is_its_definition(task, groups, patches, normalised):
    def see(features):
        parts = features.reshape(groups, -1, *features.shape[1:])
        return normalise(parts, 1).reshape(features.shape) if normalised else features

    def closed(*args):
        return replicated_loss(task, groups, patches, *args, LABELS, see=see)

    def definition(features, *head):
        return tiled(task, groups, patches, see(features), *head)

    @jax.jit
    def both(args, tangents):
        """Values, changes, and what comes back, by either."""
        found = []
        for fun in (closed, definition):
            value, pullback = jax.vjp(fun, *args)
            cotangent = jax.random.normal(jax.random.key(2), value.shape)
            found.append((*jax.jvp(fun, args, tangents), pullback(cotangent)))
        return found

    (value, change, back), expected = both(inputs(), inputs(1))
    # The values are shared out, the derivatives are those of whole copies.
    np.testing.assert_allclose(value, expected[0] / (groups * patches), rtol=1e-5)
    np.testing.assert_allclose(change, expected[1], rtol=1e-4, atol=1e-6)
    for a, b in zip(back, expected[2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_replicated_loss_adds_up_to_the_mean_loss(task):
    features, weight, bias = inputs()

    def whole(features, weight, bias):
        return jnp.sum(task.losses(jnp.mean(features, 2).T @ weight + bias, LABELS))

    def copies(*args):
        return jnp.sum(replicated_loss(task, 3, PATCHES, *args, LABELS))

    expected = jax.jit(jax.value_and_grad(whole, (0, 1, 2)))(features, weight, bias)
    value, grads = jax.jit(jax.value_and_grad(copies, (0, 1, 2)))(features, weight, bias)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    for a, b in zip(grads, expected[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_error_is_the_derivative_of_the_losses(task):
    z = jax.random.normal(jax.random.key(3), (BATCH, 4)).at[0].set(0.0)
    expected = jax.grad(lambda z: jnp.sum(task.losses(z, LABELS)))(z)
    np.testing.assert_allclose(task.error(z, LABELS), expected, rtol=1e-4, atol=1e-5)


def test_contrastive_loss_by_hand():
    """Loops over the formula, in double precision."""
    z = np.asarray(jax.random.normal(jax.random.key(4), (BATCH, 4)), float)
    u = z / np.sqrt(np.sum(z**2, axis=1, keepdims=True))
    expected = []
    for i in range(BATCH):
        scores = {k: np.exp(u[i] @ u[k] / 0.3) for k in range(BATCH) if k != i}
        expected.append(-np.log(scores[(i + BATCH // 2) % BATCH] / sum(scores.values())) / BATCH)
    found = Contrastive(temperature=0.3).losses(jnp.asarray(z, jnp.float32), LABELS)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_contrastive_loss_ignores_labels_and_scale():
    z = jax.random.normal(jax.random.key(5), (BATCH, 4))
    task = Contrastive()
    np.testing.assert_allclose(task.losses(z, LABELS), task.losses(7 * z, 0 * LABELS), rtol=1e-5)


def test_separate_losses_share_out_what_examples_do_to_each_other():
    """Each loss moves with its own outputs alone, and their sum as it does anyway."""
    task, z = Contrastive(), jax.random.normal(jax.random.key(6), (BATCH, 4))
    jacobian = jax.jit(jax.jacfwd(lambda z: separate_losses(task, z, LABELS)))(z)
    off = jacobian * (1 - jnp.eye(BATCH))[:, :, None]
    assert not np.any(off)
    np.testing.assert_allclose(jacobian.sum(0), task.error(z, LABELS), atol=1e-6)
    np.testing.assert_allclose(
        jax.grad(lambda z: jnp.sum(separate_losses(task, z, LABELS)))(z),
        task.error(z, LABELS),
        atol=1e-6,
    )


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_batch_that_is_no_two_views(count):
    with pytest.raises(fg.InputError, match=f"two views of at least two images.*batch of {count}"):
        Contrastive().losses(jnp.ones((count, 4)), jnp.zeros(count, int))


def test_views_of_different_sizes():
    first, second = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 6, 6, 3))
    with pytest.raises(fg.InputError, match=r"one shape, got \[2, 8, 8, 3\] and \[2, 6, 6, 3\]"):
        two_views(first, second)


def test_temperature_must_be_positive():
    with pytest.raises(fg.InputError, match=r"temperature must be positive, got 0\.0"):
        Contrastive(temperature=0.0)


NETWORK = LocalMixer((4, 4, 1), Size(8, 2, 2, 3), CLASSES, key=jax.random.key(0))
IMAGES = jax.random.normal(jax.random.key(1), (BATCH, 4, 4, 1))


def gradient(objective, network=NETWORK, labels=LABELS):
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def fun(params, labels):
        return objective(eqx.combine(params, static), IMAGES, labels)[0].total()

    return jax.jit(jax.value_and_grad(fun))(params, labels)


def some(tree):
    return any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(tree))


def shapes(objective, network=NETWORK):
    """Those of the terms."""
    losses, _ = jax.eval_shape(lambda: objective(network, IMAGES, LABELS))
    return [term.shape for term in losses.terms]


def test_terms_and_their_axes():
    losses, aux = jax.jit(lambda: LocalLoss()(NETWORK, IMAGES, LABELS))()
    assert [term.shape for term in losses.terms] == [(2, BATCH, 4)] * 3 + [(BATCH,)]
    expected = [(copy_axes(i)[0], "example", copy_axes(i)[1]) for i in range(3)]
    assert losses.axes == (*expected, ("example",))
    assert aux["errors"] == jax.jit(lambda: GlobalLoss()(NETWORK, IMAGES, LABELS))()[1]["errors"]
    assert shapes(LocalLoss(patchwise=False)) == [(2, BATCH, 1)] * 3 + [(BATCH,)]
    assert shapes(LocalLoss(groupwise=False)) == [(1, BATCH, 4)] * 3 + [(BATCH,)]
    assert len(shapes(LocalLoss(blockwise=False))) == 2


@pytest.mark.parametrize("patchwise", [True, False])
@pytest.mark.parametrize("groupwise", [True, False])
def test_copies_change_neither_value_nor_exact_gradient(patchwise, groupwise):
    expected = gradient(LocalLoss(patchwise=False, groupwise=False))
    found = gradient(LocalLoss(patchwise=patchwise, groupwise=groupwise))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def of_terms(objective):
    """The gradient of each term."""
    params, static = eqx.partition(NETWORK, eqx.is_inexact_array)

    def fun(params):
        losses, _ = objective(eqx.combine(params, static), IMAGES, LABELS)
        return jnp.stack([jnp.sum(term) for term in losses.terms])

    rows = jax.tree.map(np.asarray, jax.jit(jax.jacrev(fun))(params))
    count = len(jax.tree.leaves(rows)[0])
    return [jax.tree.map(lambda row, i=i: row[i], rows) for i in range(count)]


@pytest.mark.parametrize("greedy", [True, False])
def test_a_block_learns_from(greedy):
    *of_blocks, grads = of_terms(LocalLoss(greedy=greedy))
    assert [some(block) for block in grads.blocks] == [not greedy] * 3
    assert some(grads.classifier)
    assert len(of_blocks) == 3
    for i, grads in enumerate(of_blocks):
        reached = [some(block) for block in grads.blocks]
        assert reached == [j == i if greedy else j <= i for j in range(3)]
        assert [some(head) for head in grads.heads] == [j == i for j in range(3)]
        assert not some(grads.classifier)


def test_one_greedy_loss_at_the_end_reaches_every_block():
    grads = of_terms(LocalLoss(blockwise=False))[0]
    assert all(some(block) for block in grads.blocks)


def test_a_group_does_not_see_the_others():
    """What a copy says of a group's last layer is nothing of another group's."""
    params, static = eqx.partition(NETWORK, eqx.is_inexact_array)

    def copy(params):
        return jnp.sum(LocalLoss()(eqx.combine(params, static), IMAGES, LABELS)[0].terms[1][0])

    grads = jax.jit(jax.grad(copy))(params)
    assert some(grads.blocks[1].group_weight[0])
    assert not some(grads.blocks[1].group_weight[1])


PROJECTING = LocalMixer((4, 4, 1), Size(8, 2, 2, 3), CLASSES, key=jax.random.key(0), projection=5)
OBJECTIVES = {
    "global": GlobalLoss(Contrastive()),
    "local": LocalLoss(Contrastive(), greedy=False),
    "greedy": LocalLoss(Contrastive()),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_readout_never_changes_the_features(objective):
    """Other labels, another readout: everything but the readout's gradient is the same bits."""
    value, grads = gradient(objective, PROJECTING)
    other = eqx.tree_at(
        lambda n: (n.classifier.weight, n.classifier.bias),
        PROJECTING,
        (PROJECTING.classifier.weight * 3 + 1, PROJECTING.classifier.bias - 2),
    )
    other_value, changed = gradient(objective, other, LABELS[::-1])
    assert value != other_value
    same = eqx.tree_equal(grads.blocks, changed.blocks)
    assert bool(same)
    assert bool(eqx.tree_equal(grads.heads, changed.heads))
    assert some(grads.blocks)
    assert some(grads.classifier)
    assert not eqx.tree_equal(grads.classifier, changed.classifier)


def test_global_contrastive_loss_is_its_definition():
    def plain(network):
        outputs = network.heads[-1](network.pooled(network.blocks_output(IMAGES)))
        features = jax.lax.stop_gradient(network.blocks_output(IMAGES))
        losses = Contrastive().losses(outputs, LABELS)
        return jnp.sum(losses) + jnp.sum(cross_entropy(network.classify(features), LABELS))

    params, static = eqx.partition(PROJECTING, eqx.is_inexact_array)
    expected = jax.jit(jax.value_and_grad(lambda p: plain(eqx.combine(p, static))))(params)
    value, grads = gradient(OBJECTIVES["global"], PROJECTING)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_contrastive_terms_and_their_axes():
    assert shapes(OBJECTIVES["greedy"], PROJECTING) == [(2, BATCH, 4)] * 3 + [(BATCH,)]
    losses, _ = jax.jit(lambda: OBJECTIVES["global"](PROJECTING, IMAGES, LABELS))()
    assert losses.axes == (("example",), ("example",))


def test_networks_without_blocks_or_heads():
    sizes = {"image_shape": (4, 4, 1), "classes": CLASSES, "key": jax.random.key(0)}
    for network, match in (
        (build("logreg", **sizes, heads=True), "got MLP with 0 blocks and 0 heads"),
        (build("mlp", **sizes, width=4), "got MLP with 2 blocks and 0 heads"),
    ):
        with pytest.raises(fg.InputError, match=match):
            LocalLoss()(network, IMAGES, LABELS)
        with pytest.raises(fg.InputError, match=match):
            GlobalLoss(Contrastive())(network, IMAGES, LABELS)
