"""Models that the step is measured on: `PROBLEMS[name]() -> (loss, params, batch, checkpointed)`.

`checkpointed` is the same loss for backpropagation that saves memory, or None.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from forwardgrad.experiments import checkpointed, checkpointed_mlp_loss, mlp_loss, mlp_problem
from forwardgrad.networks import build


def scaling_mlp(depth, batch_size):
    """Layers of 1024 with ReLU, as in `forwardgrad reproduce scaling`."""
    params, batch = mlp_problem(depth, batch_size, 1024)
    return mlp_loss, params, batch, checkpointed_mlp_loss


def cnn():
    """The first paper's convolutional network on MNIST-shaped images, batch 64."""
    network = build("cnn", image_shape=(28, 28, 1), classes=10, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def loss(params, images, labels):
        return _cross_entropy(eqx.combine(params, static)(images), labels)

    images = jax.random.normal(jax.random.key(1), (64, 28, 28, 1))
    return loss, params, (images, jax.random.randint(jax.random.key(2), (64,), 0, 10)), None


def equinox_mlp():
    """Equinox's own MLP, 17 layers of 1024 under `vmap`, batch 256."""
    network = eqx.nn.MLP(1024, 1024, 1024, 16, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)

    def loss(params, x, y):
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - y) ** 2)

    batch = tuple(jax.random.normal(jax.random.key(i), (256, 1024)) for i in (1, 2))
    return loss, params, batch, None


class Block(nnx.Module):
    """A transformer block: attention and a feed-forward layer, each normalised and added."""

    def __init__(self, width, heads, rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    """A causal language model from Flax NNX's layers."""

    def __init__(self, vocabulary, length, width, heads, depth, *, rngs):
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens, checkpoints=False):
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        *blocks, last = self.blocks
        for block in blocks:
            x = _checkpointed(block, x, mask) if checkpoints else block(x, mask)
        x = last(x, mask)  # Its gradient is due at once: a checkpoint would save nothing.
        return self.head(self.norm(x))


def _checkpointed(block, x, mask):
    graph, params, rest = nnx.split(block, nnx.Param, ...)
    return checkpointed(lambda p, x: nnx.merge(graph, p, rest)(x, mask))(params, x)


def nnx_transformer(width):
    """Six blocks with 8 heads, on 8 sequences of 128 tokens out of 1000."""
    model = Transformer(1000, 128, width, 8, 6, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tokens = jax.random.randint(jax.random.key(1), (8, 129), 0, 1000)

    def loss(params, inputs, targets, checkpoints=False):
        return _cross_entropy(nnx.merge(graph, params, rest)(inputs, checkpoints), targets)

    batch = (tokens[:, :-1], tokens[:, 1:])
    return loss, params, batch, functools.partial(loss, checkpoints=True)


def _cross_entropy(logits, labels):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


PROBLEMS = {
    **{
        f"MLP {depth}x1024, batch {batch}": functools.partial(scaling_mlp, depth, batch)
        for depth in (10, 30)
        for batch in (512, 64)
    },
    "CNN, batch 64": cnn,
    "Equinox MLP 17x1024, batch 256": equinox_mlp,
    **{
        f"NNX transformer 6x{width}, 8x128 tokens": functools.partial(nnx_transformer, width)
        for width in (256, 512)
    },
}
