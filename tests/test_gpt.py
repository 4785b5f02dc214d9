"""The decoder: its formula, what it may look at, and its gradients by token."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad import InputError, networks
from forwardgrad.networks import GPT, GPTSize, _gpt, build, continuation, gpt_size_of
from forwardgrad.objectives import GlobalLoss, LocalLoss

VOCABULARY, CONTEXT = 11, 6
VARIANTS = [
    {"positions": positions, "tied": tied}
    for positions in ("rotary", "learned")
    for tied in (False, True)
]


SIZE = GPTSize(2, 16, 2)


def small(size=SIZE, **settings):
    return GPT(VOCABULARY, CONTEXT, size, key=jax.random.key(0), **settings)


def batch(count=4):
    tokens = jax.random.randint(jax.random.key(1), (count, CONTEXT + 1), 0, VOCABULARY)
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("gpt/2/128", (2, 128, 4)),
        ("gpt/8/512", (8, 512, 16)),
        ("gpt/1/16", (1, 16, 1)),
        ("gpt/3/100", (3, 100, 2)),
        ("gpt/3/98", (3, 98, 1)),
        ("gpt/1/9", (1, 9, 1)),
        ("gpt/12/768/12", (12, 768, 12)),
        *((name, None) for name in ("mlp", "m/8/16", "gptt/2/8")),
    ],
)
def test_names(name, size):
    assert gpt_size_of(name) == size


@pytest.mark.parametrize("name", ["gpt", "gpt/2", "gpt/0/8", "gpt/2/8/0", "gpt/2/8/4/2", "gpt/2/x"])
def test_names_that_say_too_little(name):
    with pytest.raises(InputError, match=f"network '{name}' must be called gpt/LAYERS/WIDTH or"):
        gpt_size_of(name)


def test_parameter_counts():
    """Four attention layers and two of the MLP a block, all with biases; embeddings; the end."""
    block = 4 * (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16)
    embedding, end, places = VOCABULARY * 16, 16 * VOCABULARY + VOCABULARY, CONTEXT * 16

    def count(**settings):
        return sum(a.size for a in jax.tree.leaves(eqx.filter(small(**settings), eqx.is_array)))

    assert count() == 2 * block + embedding + end
    assert count(tied=True) == 2 * block + end
    assert count(positions="learned") == 2 * block + embedding + end + places
    assert count(heads=True) == 2 * block + embedding + 3 * end


def by_hand(network, tokens):
    """The logits of one sequence, token by token."""

    def of(layer, x):
        return x @ np.asarray(layer.weight, np.float64) + np.asarray(layer.bias)

    def normal(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)

    def turned(x):
        half = x.shape[1] // 2
        angles = np.outer(np.arange(len(x)), 10_000.0 ** -(np.arange(half) / half))
        z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag], axis=1)

    tied, rotary = network.embedding is None, network.places is None
    table = network.classifier.weight.T if tied else network.embedding
    x = np.asarray(table, np.float64)[tokens] * np.sqrt(16 / 0.02) ** tied
    x = x if rotary else x + np.asarray(network.places)[: len(tokens)]
    for block in network.blocks:
        h, attended = normal(x), []
        parts = (
            np.split(of(getattr(block, n), h), block.heads, 1)
            for n in ("queries", "keys", "values")
        )
        for q, k, v in zip(*parts, strict=True):
            q, k = (turned(q), turned(k)) if rotary else (q, k)
            scores = q @ k.T / np.sqrt(q.shape[1])
            weights = np.tril(np.exp(scores - scores.max()))
            attended.append(weights / weights.sum(1, keepdims=True) @ v)
        x = x + of(block.attended, np.concatenate(attended, 1))
        x = x + of(block.down, np.maximum(of(block.up, normal(x)), 0))
    return of(network.classifier, normal(x))


@pytest.mark.parametrize("settings", VARIANTS)
def test_the_formula(settings):
    # Weights of another scale than the first ones show more.
    network = jax.tree.map(lambda a: 3 * a + 0.01 if eqx.is_array(a) else a, small(**settings))
    tokens, _ = batch()
    logits = eqx.filter_jit(network)(tokens)
    assert logits.shape == (4, CONTEXT, VOCABULARY)
    for found, sequence in zip(logits, tokens, strict=True):
        np.testing.assert_allclose(
            found, by_hand(network, np.asarray(sequence)), rtol=2e-4, atol=2e-4
        )


@pytest.mark.parametrize("settings", VARIANTS)
def test_no_token_sees_a_later_one(settings):
    network, (tokens, _) = small(**settings), batch(1)
    changed = tokens.at[0, 3].set((tokens[0, 3] + 1) % VOCABULARY)
    before, after = (eqx.filter_jit(network)(t) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert jnp.all(jnp.any(before[:, 3:] != after[:, 3:], axis=-1))


def test_there_are_no_marks():
    assert "activation(" not in inspect.getsource(_gpt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "gpt/1/16/3"},
            r"attention heads \(=3\) must divide the width of network 'gpt', which is 16, into "
            "parts of an even number",
        ),
        ({"name": "gpt/1/6/2"}, r"heads \(=2\) must divide .* 6, into parts of an even number"),
        ({"name": "gpt/1/16/3", "positions": "learned"}, r"heads \(=3\) must divide .* is 16$"),
        ({"context": None}, "network 'gpt/1/16' reads text: expected a context"),
        (
            {"image_shape": (8, 8, 1)},
            "network 'gpt/1/16' reads text: expected a context and no image",
        ),
        ({"width": 8}, r"width \(=8\) is not a setting of network 'gpt/1/16'"),
        ({"name": "mlp"}, "network 'mlp' takes images: expected an image_shape"),
        (
            {"name": "gpt/1"},
            "network 'gpt/1' must be called gpt/LAYERS/WIDTH or gpt/LAYERS/WIDTH/HEADS",
        ),
    ],
)
def test_impossible_decoders(settings, message):
    made = {"name": "gpt/1/16", "context": 8, "classes": 5, "key": jax.random.key(0), **settings}
    with pytest.raises(InputError, match=message):
        build(**made)


def test_losses_are_by_example_and_token():
    network, (tokens, following) = small(heads=True), batch()
    logits = network(tokens)
    expected = (
        -jnp.take_along_axis(jax.nn.log_softmax(logits), following[..., None], 2)[..., 0] / 24
    )
    wrong = jnp.sum(jnp.argmax(logits, -1) != following)
    for objective, count in ((GlobalLoss(), 1), (LocalLoss(), 3), (LocalLoss(greedy=False), 3)):
        losses, aux = objective(network, tokens, following)
        assert losses.axes == (("example", "token"),) * count
        np.testing.assert_allclose(losses.terms[-1], expected, rtol=1e-5)
        assert aux["errors"] == wrong
    assert jnp.isclose(jnp.sum(expected), GlobalLoss()(network, tokens, following)[0].total())


def test_a_greedy_block_learns_from_its_own_loss_alone():
    """The embedding belongs to the first block, and the classifier to none."""
    network, (tokens, following) = small(heads=True), batch()
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def term(params, i):
        losses, _ = LocalLoss()(eqx.combine(params, static), tokens, following)
        return jnp.sum(losses.terms[i])

    def reached(i):
        grads = jax.grad(term)(params, i)
        parts = {
            "embedding": grads.embedding, "first": grads.blocks[0], "second": grads.blocks[1],
            "head 0": grads.heads[0], "head 1": grads.heads[1], "classifier": grads.classifier,
        }  # fmt: skip
        return {k for k, part in parts.items() if any(map(jnp.any, jax.tree.leaves(part)))}

    assert reached(0) == {"embedding", "first", "head 0"}
    assert reached(1) == {"second", "head 1"}
    assert reached(2) == {"classifier"}


def test_which_layers_keep_their_token():
    network, (tokens, following) = small(heads=True), batch()
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def losses(params):
        return LocalLoss()(eqx.combine(params, static), tokens, following)

    rows = fg.explain(losses, fg.ActivityPerturbation(), params, has_aux=True).rows
    found = {row.path: str(row) for row in rows}
    for path, row in found.items():
        mixes = any(word in path for word in (".keys", ".values", ".embedding"))
        exact = any(word in path for word in (".heads", ".classifier"))
        assert ("mixed" in row, "exact" in row) == (mixes, exact), path


@pytest.mark.slow
@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("greedy", [True, False])
def test_the_estimate_is_unbiased(greedy, settings):
    """Within five standard errors of the exact gradient, for every parameter."""
    network, (tokens, following) = small(GPTSize(2, 8, 2), heads=True, **settings), batch(2)
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def losses(params):
        return LocalLoss(greedy=greedy)(eqx.combine(params, static), tokens, following)[0]

    exact = jax.grad(lambda p: losses(p).total())(params)
    estimate = fg.value_and_grad(losses, fg.ActivityPerturbation(tangents=16))
    keys = jax.random.split(jax.random.key(3), 256)
    samples = jax.jit(lambda k: jax.lax.map(lambda key: estimate(params, key=key)[1], k))(keys)
    for path, found in jax.tree_util.tree_leaves_with_path(samples):
        truth = exact
        for step in path:
            truth = truth[step.idx] if hasattr(step, "idx") else getattr(truth, step.name)
        error = jnp.std(found, axis=0) / 16 + 1e-7
        z = (jnp.mean(found, axis=0) - truth) / error
        assert jnp.max(jnp.abs(z)) < 5, jax.tree_util.keystr(path)


def test_a_continuation_is_drawn_from_the_networks_probabilities():
    """Of a network that has learned nothing but how often a token occurs."""
    network = small()
    odds = jnp.log(jnp.arange(1.0, VOCABULARY + 1))
    zero = jnp.zeros_like(network.classifier.weight)
    network = eqx.tree_at(lambda n: (n.classifier.weight, n.classifier.bias), network, (zero, odds))
    prompt = jnp.zeros(CONTEXT, int)
    drawn = eqx.filter_jit(continuation)(network, prompt, 4000, jax.random.key(0))
    shares = jnp.bincount(drawn, length=VOCABULARY) / 4000
    expected = jax.nn.softmax(odds)
    assert jnp.all(jnp.abs(shares - expected) < 5 * jnp.sqrt(expected / 4000))


def test_a_continuation_sees_the_last_tokens():
    """A network whose next token is the last one and one more, by its embeddings."""
    network = small(GPTSize(1, 16, 2))
    silent = jax.tree.map(lambda a: jnp.zeros_like(a) if eqx.is_array(a) else a, network.blocks)
    codes = jax.random.normal(jax.random.key(0), (VOCABULARY, 16))
    follow = 50 * jnp.linalg.pinv(networks._normalise.normalise(codes, 1))
    follow = jnp.roll(follow, 1, axis=1)
    network = eqx.tree_at(
        lambda n: (n.blocks, n.embedding, n.classifier.weight), network, (silent, codes, follow)
    )
    drawn = continuation(network, jnp.zeros(CONTEXT, int), 15, jax.random.key(1))
    assert drawn.tolist() == [(i + 1) % VOCABULARY for i in range(15)]
