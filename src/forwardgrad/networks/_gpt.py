"""A decoder: a transformer that predicts each next token from those before it."""

import math
import re
from typing import ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from forwardgrad._errors import InputError
from forwardgrad.networks._base import AbstractNetwork, Features, Tokens
from forwardgrad.networks._layers import LAST_GAIN, Linear, make_heads, units_first
from forwardgrad.networks._normalise import normalise, widened

Stream = Float[Array, "batch tokens units"]

Positions = Literal["rotary", "learned"]

HEAD_UNITS = 32
"""Units of an attention head, at least, where the name leaves the number of heads open."""

BASE = 10_000.0
"""The slowest rotation takes so many times as long as the fastest one."""


class GPTSize(NamedTuple):
    """What a name such as `gpt/2/128` stands for."""

    layers: int
    width: int
    heads: int


def gpt_size_of(name: str) -> GPTSize | None:
    """The size of a decoder called `gpt/LAYERS/WIDTH` or `gpt/LAYERS/WIDTH/HEADS`; or None.

    Without a number of heads, these have 32 units or more.

    **Raises:**

    `InputError` if a name begins like that, and goes on otherwise.

    >>> gpt_size_of("gpt/2/128")
    GPTSize(layers=2, width=128, heads=4)
    """
    match = re.fullmatch(r"gpt/([1-9]\d*)/([1-9]\d*)(?:/([1-9]\d*))?", name)
    if match is None and name.split("/")[0] == "gpt":
        raise InputError(
            f"network {name!r} must be called gpt/LAYERS/WIDTH or gpt/LAYERS/WIDTH/HEADS, with "
            "numbers of at least 1"
        )
    if match is None:
        return None
    layers, width = int(match[1]), int(match[2])
    # Even ones, for rotary positions.
    fitting = (n for n in range(max(1, width // HEAD_UNITS), 0, -1) if width % (2 * n) == 0)
    return GPTSize(layers, width, int(match[3]) if match[3] else next(fitting, 1))


class Decoder(eqx.Module):
    """Attention to the tokens so far, then two linear layers on each; both add to their input."""

    queries: Linear
    keys: Linear
    values: Linear
    attended: Linear
    up: Linear
    down: Linear
    heads: int = eqx.field(static=True)
    rotary: bool = eqx.field(static=True)

    def __init__(self, size: GPTSize, rotary: bool, *, key: Key[Array, ""]):
        *keys, attended_key, up_key, down_key = jax.random.split(key, 6)
        width = size.width
        # Queries, keys and values are layers of their own: only queries keep their token.
        self.queries, self.keys, self.values = (Linear(width, width, key=k, gain=1.0) for k in keys)
        # The sum of all that is added to the stream starts as large as one normalised vector.
        last = 1 / (2 * size.layers)
        self.attended = Linear(width, width, key=attended_key, gain=last)
        self.up = Linear(width, 4 * width, key=up_key)
        self.down = Linear(4 * width, width, key=down_key, gain=last)
        self.heads, self.rotary = size.heads, rotary

    def __call__(self, x: Stream) -> Stream:
        x = x + self._attention(normalise(x, 2))
        return x + self.down(jax.nn.relu(self.up(normalise(x, 2))))

    def _attention(self, x: Stream) -> Stream:
        def split(y):
            return y.reshape(*y.shape[:2], self.heads, -1)

        queries, keys, values = (
            split(layer(x)) for layer in (self.queries, self.keys, self.values)
        )
        if self.rotary:
            queries, keys = rotated(queries), rotated(keys)
        mixed = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
        return self.attended(mixed.reshape(x.shape))


class GPT(AbstractNetwork):
    r"""A decoder of token sequences: each token is predicted from those before it.

    Every block normalises its input, and adds to it what causal attention and an MLP with a ReLU
    make of it (pre-norm). No normalisation has a learned scale, because the next layer has one. The
    blocks' heads, and the classifier, are linear layers on the normalised stream. They have an
    output for each token.

    **Arguments:**

    - `vocabulary`: the number of tokens that there are.
    - `context`: the length of a sequence.
    - `size`: layers, width, attention heads.
    - `key`: a random key.
    - `heads`: whether blocks have heads for losses of their own.
    - `positions`: `"rotary"` turns queries and keys by angles that grow with the position (Su et
        al. 2021); `"learned"` adds a vector for each position to the embedding.
    - `tied`: whether the classifier's weights are the embeddings. Heads have their own.

    **Raises:**

    `InputError` if the attention heads do not divide the width, into even parts for rotary
    positions.

    ??? cite "Reference"

        Radford, Wu, Child, Luan, Amodei & Sutskever, *Language Models are Unsupervised Multitask
        Learners*, 2019; Su, Lu, Pan, Murtadha, Wen & Liu, *RoFormer*, 2021
        ([arXiv:2104.09864](https://arxiv.org/abs/2104.09864)).

    >>> network = GPT(50, 16, GPTSize(2, 32, 2), key=jax.random.key(0))
    >>> network(jnp.zeros((5, 16), int)).shape
    (5, 16, 50)
    """

    by_token: ClassVar[bool] = True

    embedding: Float[Array, "vocabulary units"] | None
    places: Float[Array, "context units"] | None

    def __init__(
        self,
        vocabulary: int,
        context: int,
        size: GPTSize,
        *,
        key: Key[Array, ""],
        heads: bool = False,
        positions: Positions = "rotary",
        tied: bool = False,
    ):
        rotary = positions == "rotary"
        if size.width % (size.heads * (2 if rotary else 1)):
            even = ", into parts of an even number of units for rotary positions" if rotary else ""
            raise InputError(
                f"the attention heads (={size.heads}) must divide the width of network 'gpt', "
                f"which is {size.width}{even}"
            )
        *block_keys, embedding_key, place_key, last_key = jax.random.split(key, size.layers + 3)
        self.blocks = [Decoder(size, rotary, key=k) for k in block_keys]
        self.classifier = Linear(size.width, vocabulary, key=last_key, gain=LAST_GAIN)
        self.embedding = None if tied else _embeddings(embedding_key, vocabulary, size.width)
        self.places = None if rotary else _embeddings(place_key, context, size.width)
        units = [size.width] * size.layers
        self.heads = make_heads(units, vocabulary, None, key=key) if heads else None
        self.projection = None
        self.groups = 1
        # The stream is normalised as a whole where it is arranged.
        self.normalise_features = False

    def embed(self, examples: Tokens) -> Stream:
        """The embeddings of the tokens, with those of their places if these are learned."""
        if self.embedding is None:
            weights = self.classifier.weight
            # Of the size of other embeddings.
            x = math.sqrt(len(weights) / LAST_GAIN) * _rows(weights.T, examples)
        else:
            x = _rows(self.embedding, examples)
        return x if self.places is None else x + self.places[: examples.shape[1]]

    def arranged(self, x: Stream) -> Features:
        """The normalised stream."""
        return units_first(normalise(x, 2))


def _rows(table: Float[Array, "vocabulary units"], rows: Tokens) -> Stream:
    """Rows of a table, whose gradient is added up in float32 at least."""
    return widened(table)[rows].astype(table.dtype)


def _embeddings(key: Key[Array, ""], count: int, width: int) -> Float[Array, "count units"]:
    # As large as what the blocks add, all together. In a smaller stream, which the next
    # normalisation scales up, the noise of forward gradients would be that of the embeddings.
    return jax.random.normal(key, (count, width))


def rotated(
    x: Float[Array, "batch tokens heads units"],
) -> Float[Array, "batch tokens heads units"]:
    """Pairs of units, each turned by an angle in proportion to the position (Su et al. 2021)."""
    half = x.shape[-1] // 2
    speeds = BASE ** -(jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * speeds
    sine, cosine = jnp.sin(angles).astype(x.dtype), jnp.cos(angles).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate(
        [first * cosine - second * sine, first * sine + second * cosine], axis=-1
    )


def continuation(
    network: AbstractNetwork, prompt: Int[Array, " context"], count: int, key: Key[Array, ""]
) -> Int[Array, " count"]:
    """Tokens drawn one after another, each from what the network expects after the last ones.

    **Arguments:**

    - `network`: of tokens.
    - `prompt`: what comes before, as many tokens as the network looks back on.
    - `count`: how many to draw.
    - `key`: a random key.
    """

    def draw(window, key):
        token = jax.random.categorical(key, widened(network(window[None])[0, -1]))
        return jnp.append(window[1:], token), token

    return jax.lax.scan(draw, prompt, jax.random.split(key, count))[1]
