"""A decoder in Flax NNX that learns to write without backpropagation, credited token by token.

    python examples/decoder.py

The text is the language reference that every Python has. The model is an ordinary one, without
marks. Each block has a loss of its own for every token (`forwardgrad.greedy`; the head is one for
all). Activity perturbation multiplies a perturbed activation by the change of the losses that it
can influence: its own token's of its own block, for queries, projections and the MLP. Keys and
values get what comes back through the attention from the next layer's estimate, and what reaches
the loss past all other layers is exact (`exact_mixing`, `exact_direct`). Backpropagation has the
same losses, and then the usual one at the end. Printed is the last block's loss on text that was
held out.
"""

import dataclasses
from collections.abc import Callable
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import forwardgrad as fg


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of the example."""

    layers: int = 2
    """Blocks of the decoder."""
    width: int = 64
    """Of the residual stream."""
    context: int = 32
    """Characters that the next one is predicted from."""
    batch: int = 16
    """Examples of a step."""
    steps: int = 500
    """Steps of Adam."""
    tangents: int = 16
    """K, the tangents of a step."""
    rate: float = 0.003
    """The learning rate of backpropagation."""
    noisy_rate: float = 0.001
    """That of activity perturbation."""


class Block(nnx.Module):
    """Attention and an MLP, each after a norm and beside the residual stream."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The stream after the block [batch, tokens, width]."""
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Decoder(nnx.Module):
    """Words and places, blocks, a norm and a head."""

    def __init__(self, words: int, options: Options):
        rngs, width = nnx.Rngs(0), options.width
        self.words = nnx.Embed(words, width, rngs=rngs)
        self.places = nnx.Embed(options.context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(options.layers)])
        self.norm, self.head = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, words, rngs=rngs)

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """What the first block gets."""
        return self.words(tokens) + self.places(jnp.arange(tokens.shape[1]))

    def logits(self, x: jax.Array) -> jax.Array:
        """Of a block's output."""
        return self.head(self.norm(x))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The logits of the next tokens."""
        x = self.embedded(tokens)
        for block in self.blocks:
            x = block(x)
        return self.logits(x)


def entropies(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """A cross-entropy for each token; they add up to their mean."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets) / targets.size


def at_the_end(model: Decoder, text: jax.Array) -> fg.Losses:
    """The losses of the last block."""
    return fg.Losses([entropies(model(text[:, :-1]), text[:, 1:])], [("example", "token")])


def at_each_block(model: Decoder, text: jax.Array) -> fg.Losses:
    """Greedy losses: those of every block, which no gradient leaves."""
    x, targets = model.embedded(text[:, :-1]), text[:, 1:]
    axes = ("example", "token")
    losses, _ = fg.greedy(
        list(model.blocks), model.logits, x, lambda logits: entropies(logits, targets), axes=axes
    )
    return losses


def windows(options: Options) -> tuple[np.ndarray, np.ndarray, int]:
    """Windows of the text, those held out, and the number of different characters."""
    text = "".join(topics.topics[name] for name in sorted(topics.topics))
    characters = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = np.array([characters[c] for c in text], np.int32)
    count = len(tokens) // (options.context + 1)
    rows = tokens[: count * (options.context + 1)].reshape(count, -1)
    return rows[: -count // 10], rows[-count // 10 :], len(characters)


def train(
    options: Options,
    losses: Callable[..., fg.Losses],
    estimator: fg.AbstractEstimator,
    rate: float,
) -> float:
    """The loss of held-out text after training, in nats for each character."""
    rows, held_out, words = windows(options)
    model = Decoder(words, options)
    optimiser = nnx.Optimizer(model, optax.adam(rate), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimiser, text, key):
        _, grads = fg.nnx.value_and_grad(losses, estimator)(model, text, key=key)
        optimiser.update(model, grads)

    random = np.random.default_rng(0)
    for i in range(options.steps):
        chosen = rows[random.integers(0, len(rows), options.batch)]
        step(model, optimiser, jnp.asarray(chosen), jax.random.key(i))
    return float(nnx.jit(at_the_end)(model, jnp.asarray(held_out[:512])).total())


def main(options: Options) -> None:
    """Train three times and print."""
    perturbation = fg.ActivityPerturbation(
        tangents=options.tangents, exact_mixing=True, exact_direct=True
    )
    runs = {
        "backpropagation": (at_the_end, fg.Backpropagation(), options.rate),
        "backpropagation, greedy losses": (at_each_block, fg.Backpropagation(), options.rate),
        "activity perturbation, greedy losses": (at_each_block, perturbation, options.noisy_rate),
    }
    for name, run in runs.items():
        print(f"{name}: {train(options, *run):.3f} nats a character")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
