import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import forwardgrad as fg

WIDTH, CLASSES = 6, 3
X = jax.random.normal(jax.random.key(0), (4, 5, WIDTH))
Y = jax.random.randint(jax.random.key(1), (4, 5), 0, CLASSES)
AXES = ("example", "token")


class Residual(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.up = eqx.nn.Linear(WIDTH, 2 * WIDTH, key=keys[0])
        self.down = eqx.nn.Linear(2 * WIDTH, WIDTH, key=keys[1])

    def one(self, x):
        return x + self.down(jax.nn.relu(self.up(x)))

    def __call__(self, x):
        # Tokens hear of each other, so that a block's input matters for more than its own token.
        return jax.vmap(jax.vmap(self.one))(x) + 0.1 * jnp.mean(x, axis=1, keepdims=True)


class Stack(eqx.Module):
    embedding: eqx.nn.Linear
    blocks: list[Residual]
    heads: list[eqx.nn.Linear]

    def __init__(self, depth=3):
        keys = jax.random.split(jax.random.key(2), 2 * depth + 1)
        self.embedding = eqx.nn.Linear(WIDTH, WIDTH, key=keys[0])
        self.blocks = [Residual(key) for key in keys[1 : depth + 1]]
        self.heads = [eqx.nn.Linear(WIDTH, CLASSES, key=key) for key in keys[depth + 1 :]]


def cross_entropy(logits):
    labels = jnp.tile(Y, (len(logits) // len(Y), 1))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels) / labels.size


def each_token(layer):
    return jax.vmap(jax.vmap(layer))


def losses(stack, heads="own", inputs=X):
    x = each_token(stack.embedding)(inputs)
    own = [each_token(head) for head in stack.heads]
    chosen = {"own": own, "shared": own[0], "tied": lambda x: (x @ stack.embedding.weight)[..., :3]}
    return fg.greedy(stack.blocks, chosen[heads], x, cross_entropy, axes=AXES)


def by_hand(stack, heads):
    """The sum of the blocks' losses, each a function of its own block's input as a number."""
    x, total = each_token(stack.embedding)(X), 0.0
    for i, block in enumerate(stack.blocks):
        x = block(x)
        head = {"own": stack.heads[i], "shared": stack.heads[0]}.get(heads)
        out = each_token(head)(x) if head else (x @ stack.embedding.weight)[..., :3]
        total += jnp.sum(cross_entropy(out))
        x = jax.lax.stop_gradient(x)
    return total


@pytest.mark.parametrize("heads", ["own", "shared", "tied"])
def test_a_block_learns_from_its_own_loss(heads):
    stack = Stack()
    step = fg.filter_value_and_grad(lambda s: losses(s, heads), fg.Backpropagation(), has_aux=True)
    (value, output), grads = step(stack)
    expected, exact = eqx.filter_value_and_grad(by_hand)(stack, heads)
    assert output.shape == X.shape
    assert jnp.allclose(value, expected)
    for a, b in zip(*map(jax.tree.leaves, (grads, exact)), strict=True):
        assert jnp.allclose(a, b, atol=1e-6)


def test_a_forward_gradient_is_that_of_the_own_block():
    stack = Stack()
    explained = fg.explain(lambda s: losses(s)[0], fg.ActivityPerturbation(), stack)
    influenced = {row.path: set(row.terms) for row in explained.rows if ".blocks" in row.path}
    assert influenced == {path: {int(path.split("[")[1][0])} for path in influenced}
    assert len(influenced) == 12
    step = eqx.filter_jit(
        fg.filter_value_and_grad(losses, fg.ActivityPerturbation(tangents=256), has_aux=True)
    )
    samples = [step(stack, key=jax.random.key(i))[1] for i in range(16)]
    exact = fg.filter_value_and_grad(losses, fg.Backpropagation(), has_aux=True)(stack)[1]
    for leaf, *draws in zip(*map(jax.tree.leaves, (exact, *samples)), strict=True):
        draws = jnp.stack(draws)
        error = jnp.std(draws, axis=0) / jnp.sqrt(len(draws))
        # By Student's t, one of some 10,000 means of 16 draws is farther away.
        assert jnp.all(jnp.abs(jnp.mean(draws, axis=0) - leaf) <= 5.5 * error + 1e-6)


def test_memory_does_not_grow_with_blocks():
    many = jnp.tile(X, (256, 1, 1))

    def temp(depth):
        params, rest = eqx.partition(Stack(depth), eqx.is_inexact_array)
        step = fg.value_and_grad(
            lambda p, x: losses(eqx.combine(p, rest), inputs=x)[0],
            fg.ActivityPerturbation(tangents=8),
        )
        compiled = jax.jit(step).lower(params, many, key=jax.random.key(0)).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temp(12) <= 1.1 * temp(4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: ([], s.heads), "got 3 heads for 0 blocks"),
        (lambda s: (s.blocks, s.heads[:2]), "got 2 heads for 3 blocks"),
        (lambda s: ([*s.blocks, s.blocks[1]], each_token(s.heads[0])), "blocks 1 and 3 share"),
        (lambda s: ([jnp.tanh, jnp.sin, jnp.tanh], each_token(s.heads[0])), "blocks 0 and 2"),
    ],
)
def test_what_makes_no_greedy_stack_is_refused(change, match):
    def wrong(stack):
        blocks, heads = change(stack)
        return fg.greedy(blocks, heads, X, cross_entropy, axes=AXES)[0]

    with pytest.raises(fg.InputError, match=match):
        fg.filter_value_and_grad(wrong, fg.Backpropagation())(Stack())
