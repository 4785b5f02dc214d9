"""Small language models as their libraries' users write them, with a loss for each token.

`MODELS[name]() -> (losses, params)`; `losses(params)` are of two examples of four tokens each.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import forwardgrad as fg

WORDS, WIDTH, TOKENS, EXAMPLES = 7, 6, 4, 2
TEXT = jax.random.randint(jax.random.key(0), (EXAMPLES, TOKENS + 1), 0, WORDS)
INPUTS, TARGETS = TEXT[:, :-1], TEXT[:, 1:]


def of_logits(logits: jax.Array) -> fg.Losses:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS)
    return fg.Losses([losses / losses.size], [("example", "token")])


class NNXBlock(nnx.Module):
    """A pre-norm block with the library's attention."""

    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class NNXDecoder(nnx.Module):
    """Two blocks, places that are learned, and a head of its own."""

    def __init__(self, rngs):
        self.words = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.places = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(2)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, WORDS, rngs=rngs)

    def __call__(self, tokens):
        x = self.words(tokens) + self.places(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions."""
    first, second = jnp.split(x, 2, axis=-1)
    angle = jnp.arange(x.shape[1])[:, None, None] / 10 ** jnp.arange(first.shape[-1])
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class NNXOwnBlock(nnx.Module):
    """Queries, keys and values from one product, rotary positions, attention written out."""

    def __init__(self, rngs):
        self.scale = nnx.Param(jnp.ones(WIDTH))
        self.fused = nnx.Linear(WIDTH, 6 * WIDTH, use_bias=False, rngs=rngs)
        self.project = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.gate = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        normal = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-3) * self.scale
        fused = self.fused(normal).reshape(*x.shape[:2], 3, 2, WIDTH)
        q, k, v = jnp.moveaxis(fused, 2, 0)
        scores = jnp.einsum("bthd,bshd->bhts", rotated(q), rotated(k)) / WIDTH**0.5
        scores = jnp.where(jnp.tri(x.shape[1]) > 0, scores, jnp.finfo(scores.dtype).min)
        out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)
        x = x + self.project(out.reshape(*x.shape[:2], -1))
        return x + self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class NNXOwnDecoder(nnx.Module):
    """Two blocks that are computed again on the way back, and the embedding as the head."""

    def __init__(self, rngs):
        self.words = nnx.Param(jax.random.normal(rngs.params(), (WORDS, WIDTH)))
        self.blocks = nnx.List([NNXOwnBlock(rngs) for _ in range(2)])

    def __call__(self, tokens):
        x = self.words[tokens]
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return x @ self.words.T


class GemmaNorm(nnx.Module):
    """A scale that is learned as its difference from one."""

    def __init__(self, width, rngs):
        self.scale = nnx.Param(0.1 * jax.random.normal(rngs.params(), (width,)))

    def __call__(self, x):
        normal = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        return normal * (1 + self.scale)


class GemmaEinsum(nnx.Module):
    """A product with a weight of several axes."""

    def __init__(self, spec, shape, rngs):
        self.spec = spec
        self.w = nnx.Param(0.4 * jax.random.normal(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.spec, x, self.w)


class GemmaAttention(nnx.Module):
    """Four heads of queries on two of keys and values, scores with a soft cap, perhaps a window."""

    def __init__(self, window, rngs):
        self.window = window
        self.query = GemmaEinsum("BTD,NDH->BTNH", (4, WIDTH, 2), rngs)
        self.key_value = GemmaEinsum("BSD,CKDH->CBSKH", (2, 2, WIDTH, 2), rngs)
        self.out = GemmaEinsum("BTNH,NHD->BTD", (4, 2, WIDTH), rngs)
        self.query_norm, self.key_norm = GemmaNorm(2, rngs), GemmaNorm(2, rngs)

    def __call__(self, x):
        key, value = self.key_value(x)
        query = rotated(self.query_norm(self.query(x))) * 2**-0.5
        key = rotated(self.key_norm(key))
        query = query.reshape(*query.shape[:2], 2, 2, 2)
        scores = jnp.einsum("BTKGH,BSKH->BTKGS", query, key)
        scores = 5.0 * jnp.tanh(scores / 5.0)
        seen = jnp.tri(x.shape[1], dtype=bool)
        if self.window is not None:
            seen = seen & jnp.triu(jnp.ones_like(seen), 1 - self.window)
        scores = jnp.where(seen[None, :, None, None], scores, -2.4e38)
        mixed = jnp.einsum("BTKGS,BSKH->BTKGH", jax.nn.softmax(scores, axis=-1), value)
        return self.out(mixed.reshape(*mixed.shape[:2], 4, 2))


class GemmaBlock(nnx.Module):
    """Norms before and after attention and MLP, which is gated by GELU."""

    def __init__(self, window, rngs):
        self.attention = GemmaAttention(window, rngs)
        self.before, self.after = GemmaNorm(WIDTH, rngs), GemmaNorm(WIDTH, rngs)
        self.before_mlp, self.after_mlp = GemmaNorm(WIDTH, rngs), GemmaNorm(WIDTH, rngs)
        self.gate = nnx.Linear(WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.after(self.attention(self.before(x)))
        z = self.before_mlp(x)
        return x + self.after_mlp(self.down(nnx.gelu(self.gate(z)) * self.up(z)))


class Gemma(nnx.Module):
    """The architecture of Gemma 2 and 3: a window in every other block, one table in and out."""

    def __init__(self, rngs):
        self.words = nnx.Param(jax.random.normal(rngs.params(), (WORDS, WIDTH)))
        self.blocks = nnx.List([GemmaBlock(window, rngs) for window in (2, None)])
        self.norm = GemmaNorm(WIDTH, rngs)

    def __call__(self, tokens):
        x = self.words[(tokens,)]
        x *= jnp.sqrt(x.shape[-1]).astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        logits = jnp.dot(self.norm(x), self.words.T)
        return 30.0 * jnp.tanh(logits / 30.0)


def of_nnx(module):
    def make():
        graph, params = nnx.split(module(nnx.Rngs(0)), nnx.Param)
        return lambda p: of_logits(nnx.merge(graph, p)(INPUTS)), params

    return make


class EquinoxBlock(eqx.Module):
    """A post-norm block for one example."""

    attention: eqx.nn.MultiheadAttention
    norm1: eqx.nn.LayerNorm
    norm2: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=keys[0])
        self.norm1 = self.norm2 = eqx.nn.LayerNorm(WIDTH)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, activation=jax.nn.relu, key=keys[1])

    def __call__(self, x):
        mask = jnp.tril(jnp.ones((len(x), len(x)), bool))
        x = jax.vmap(self.norm1)(x + self.attention(x, x, x, mask=mask))
        return jax.vmap(self.norm2)(x + jax.vmap(self.mlp)(x))


class EquinoxDecoder(eqx.Module):
    """Two blocks, stacked for a `scan`."""

    words: eqx.nn.Embedding
    blocks: EquinoxBlock
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.words = eqx.nn.Embedding(WORDS, WIDTH, key=keys[0])
        self.blocks = eqx.filter_vmap(EquinoxBlock)(keys[1:3])
        self.head = eqx.nn.Linear(WIDTH, WORDS, key=keys[3])

    def __call__(self, tokens):
        arrays, static = eqx.partition(self.blocks, eqx.is_array)
        x = jax.vmap(self.words)(tokens)
        x, _ = jax.lax.scan(lambda x, own: (eqx.combine(own, static)(x), None), x, arrays)
        return jax.vmap(self.head)(x)


def of_equinox(make_module):
    def make():
        params, static = eqx.partition(make_module(jax.random.key(1)), eqx.is_inexact_array)
        return lambda p: of_logits(jax.vmap(eqx.combine(p, static))(INPUTS)), params

    return make


def weights(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(2), len(shapes))
    return {
        name: jax.random.normal(key, shape) / shape[0] ** 0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def mamba_block(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A selective scan, with a causal convolution in front and a gate behind."""
    inner, gate = jnp.split(x @ p["in"], 2, axis=-1)
    inner = jax.lax.conv_general_dilated(
        inner,
        p["conv"][:, None],
        (1,),
        [(1, 0)],
        feature_group_count=inner.shape[-1],
        dimension_numbers=("NTC", "TIO", "NTC"),
    )
    inner = jax.nn.silu(inner)
    step = jax.nn.softplus(inner @ p["step"] + p["step bias"])
    write, read = inner @ p["write"], inner @ p["read"]

    def along(state, now):
        inner, step, write, read = now
        decay = jnp.exp(-step[..., None] * jnp.exp(p["decay"]))
        state = decay * state + (step * inner)[..., None] * write[:, None]
        return state, jnp.sum(state * read[:, None], axis=-1)

    state = jnp.zeros((*inner.shape[::2], write.shape[-1]))
    sequence = [jnp.swapaxes(a, 0, 1) for a in (inner, step, write, read)]
    out = jnp.swapaxes(jax.lax.scan(along, state, sequence)[1], 0, 1)
    return x + ((out + p["skip"] * inner) * jax.nn.silu(gate)) @ p["out"]


def mamba():
    """Two blocks of a selective scan."""
    shapes: dict[str, Any] = {
        **{"in": (WIDTH, 4 * WIDTH), "conv": (2, 2 * WIDTH), "step": (2 * WIDTH, 2 * WIDTH)},
        **{"step bias": (2 * WIDTH,), "write": (2 * WIDTH, 3), "read": (2 * WIDTH, 3)},
        **{"decay": (2 * WIDTH, 3), "skip": (2 * WIDTH,), "out": (2 * WIDTH, WIDTH)},
    }
    params = {
        "words": weights(words=(WORDS, WIDTH))["words"],
        "blocks": [weights(**shapes), jax.tree.map(lambda a: 0.8 * a, weights(**shapes))],
        "head": weights(head=(WIDTH, WORDS))["head"],
    }

    def losses(p):
        x = p["words"][INPUTS]
        for block in p["blocks"]:
            x = mamba_block(block, x)
        return of_logits(x @ p["head"])

    return losses, params


def recurrent():
    """A layer that goes from token to token, and one that does not."""

    def losses(p):
        def step(h, x):
            h = jnp.tanh(x + h @ p["state"])
            return h, h

        x = jnp.swapaxes(p["words"][INPUTS] @ p["in"], 0, 1)
        h = jnp.swapaxes(jax.lax.scan(step, jnp.zeros((EXAMPLES, WIDTH)), x)[1], 0, 1)
        return of_logits(jnp.tanh(h @ p["out"]) @ p["head"])

    square = dict.fromkeys(("in", "state", "out"), (WIDTH, WIDTH))
    return losses, weights(words=(WORDS, WIDTH), **square, head=(WIDTH, WORDS))


MODELS = {
    "NNX": of_nnx(NNXDecoder),
    "NNX, own attention": of_nnx(NNXOwnDecoder),
    "Gemma": of_nnx(Gemma),
    "Equinox": of_equinox(EquinoxDecoder),
    "Mamba": mamba,
    "recurrence": recurrent,
}
