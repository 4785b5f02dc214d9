"""Credit by token: how near one estimate comes to the exact gradient, by kind of layer.

    python benchmarks/tokens.py --out results/benchmarks/tokens.json

A decoder of two layers on characters of Python's language reference, with one loss at the end and
with greedy losses; and the bias of discounting. Some ten minutes on two cores. How cosines grow
with the number of tangents is what `forwardgrad reproduce tokens-cosine` measures.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.table import Table

import forwardgrad as fg
import measure

KINDS = ("query", "key", "value", "out", "up", "down")

RATES = (0.9, 0.5, 0.0)
"""Of discounts."""

SHARED = ("out", "repeats", "only")
"""Options of all benchmarks."""


@dataclasses.dataclass(frozen=True)
class Options(measure.Options):
    """Settings of the measurement."""

    width: int = 64
    """Of the residual stream."""
    context: int = 32
    """Characters."""
    batch: int = 8
    """Examples of one step."""
    tangents: int = 16
    """K."""
    keys: int = 24
    """Estimates that the mean cosine is of."""
    steps: int = 300
    """Steps of Adam on exact gradients before the measurement."""


def text() -> tuple[np.ndarray, int]:
    """The language reference as numbers of characters, and how many characters there are."""
    written = "".join(topics.topics[name] for name in sorted(topics.topics))
    characters = {c: i for i, c in enumerate(sorted(set(written)))}
    return np.array([characters[c] for c in written]), len(characters)


TEXT, CHARACTERS = text()


def batch(options: Options, rng: np.random.Generator) -> tuple[jax.Array, jax.Array]:
    """Inputs and the characters after each of them."""
    starts = rng.integers(0, len(TEXT) - options.context - 1, options.batch)
    rows = np.stack([TEXT[i : i + options.context + 1] for i in starts])
    return jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:])


def start(options: Options) -> Any:
    """Weights of the decoder; each block has a head, and the last one's is the model's."""
    keys = iter(jax.random.split(jax.random.key(0), 100))
    n = options.width

    def matrix(rows: int, columns: int, scale: float = 1.0) -> jax.Array:
        return scale / rows**0.5 * jax.random.normal(next(keys), (rows, columns))

    def block() -> dict[str, jax.Array]:
        square = {name: matrix(n, n) for name in ("query", "key", "value")}
        mlp = {"up": matrix(n, 4 * n), "down": matrix(4 * n, n, 0.5)}
        scales = {"norm": jnp.ones(n), "norm2": jnp.ones(n), "norm3": jnp.ones(n)}
        return {**square, **mlp, **scales, "out": matrix(n, n, 0.5), "head": matrix(n, CHARACTERS)}

    words = 0.5 * jax.random.normal(next(keys), (CHARACTERS, n))
    places = 0.3 * jax.random.normal(next(keys), (options.context, n))
    return {"words": words, "places": places, "blocks": [block(), block()]}


def normal(x: jax.Array) -> jax.Array:
    """`x` with unit mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def block(p: dict[str, jax.Array], h: jax.Array, shifts: dict[str, Any]) -> jax.Array:
    """Attention with four heads, and an MLP; `shifts` are added to what products compute."""

    def product(name: str, x: jax.Array) -> jax.Array:
        return x @ p[name] + shifts.get(name, 0.0)

    def heads(z: jax.Array) -> jax.Array:
        return z.reshape(*z.shape[:2], 4, -1)

    x = normal(h) * p["norm"]
    q, k, v = (heads(product(name, x)) for name in ("query", "key", "value"))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    scores = jnp.where(jnp.tri(h.shape[1]) > 0, scores, -1e9)
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
    h = h + product("out", mixed.reshape(h.shape))
    return h + product("down", jax.nn.gelu(product("up", normal(h) * p["norm2"])))


def losses(p: Any, x: jax.Array, y: jax.Array, greedy: bool, shifts: Any = ({}, {})) -> fg.Losses:
    """A loss for each character, at the end or after each block."""
    h, terms = p["words"][x] + p["places"], []
    for i, own in enumerate(p["blocks"]):
        h = block(own, jax.lax.stop_gradient(h) if greedy and i else h, shifts[i])
        if greedy or own is p["blocks"][-1]:
            logits = normal(h) * own["norm3"] @ own["head"]
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            terms.append(entropy / entropy.size)
    return fg.Losses(terms, [("example", "token")] * len(terms))


def trained(options: Options, greedy: bool) -> Any:
    """Weights after some steps of Adam."""
    params, optimiser = start(options), optax.adam(3e-3)
    rng = np.random.default_rng(0)

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(lambda p: losses(p, x, y, greedy).total())(params)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(params, updates), state

    state = optimiser.init(params)
    for _ in range(options.steps):
        params, state = step(params, state, *batch(options, rng))
    return params


def unequal(params: Any) -> Any:
    """Weights of layers whose gradients differ much, as after a bad start."""
    factors = {"out": 0.01, "down": 30.0, "up": 0.1}
    return {
        **params,
        "blocks": [
            {name: factors.get(name, 1.0) * w for name, w in own.items()}
            for own in params["blocks"]
        ],
    }


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b) / jnp.maximum(jnp.sqrt(jnp.sum(a**2) * jnp.sum(b**2)), 1e-30)


def cosines(options: Options, fun: Callable, params: Any, estimator: Any) -> Any:
    """The mean cosine of one estimate with the exact gradient."""
    exact = jax.jit(jax.grad(lambda p: fun(p).total()))(params)
    init, step = fg.estimation(fun, estimator)
    state = init(params)

    def one(total, key):
        grads = step(params, key=key, state=state)[1]
        return jax.tree.map(lambda t, g, e: t + cosine(g, e), total, grads, exact), None

    keys = jax.random.split(jax.random.key(3), options.keys)
    zeros = jax.tree.map(lambda _: 0.0, params)
    total = jax.jit(lambda keys: jax.lax.scan(one, zeros, keys)[0])(keys)
    return jax.tree.map(lambda t: float(t) / options.keys, total)


def biases(options: Options, fun: Callable, params: Any, rate: float) -> Any:
    """`|E[g] - exact| / |exact|` of each product's output, where later losses are discounted."""
    sizes = {"up": 4 * options.width}
    shape = (options.batch, options.context)
    shifts = tuple(
        {k: jnp.zeros((*shape, sizes.get(k, options.width))) for k in KINDS} for _ in "ab"
    )

    def by_token(shifts):
        return sum(jnp.sum(term, axis=0) for term in fun(params, shifts=shifts).terms)

    lag = np.arange(options.context)[:, None] - np.arange(options.context)
    weight = np.where(lag >= 0, rate ** np.maximum(lag, 0.0), 0)

    def bias(jacobian):
        credit, exact = jnp.einsum("ts,tbsd->bsd", weight, jacobian), jnp.sum(jacobian, axis=0)
        return float(jnp.linalg.norm(credit - exact) / jnp.linalg.norm(exact))

    return {"blocks": jax.tree.map(bias, jax.jacrev(by_token)(shifts))}


def estimators_of(tangents: int) -> dict[str, fg.AbstractEstimator]:
    """What is compared."""
    make = functools.partial(fg.ActivityPerturbation, tangents=tangents)
    step = make(exact_mixing=True)
    return {
        "all tokens": make(),
        "causal": make(mixing="causal"),
        **{f"discounted, {r}": make(mixing=r) for r in RATES},
        "one exact step": step,
        "and direct part": make(exact_mixing=True, exact_direct=True),
        "and causal": make(exact_mixing=True, exact_direct=True, mixing="causal"),
        "step, relative": fg.BalancedTangents(step),
        "step, absolute": fg.BalancedTangents(step, "absolute"),
        "weight perturbation": fg.WeightPerturbation(tangents=tangents),
    }


def measured(options: Options, greedy: bool, differ: bool) -> dict[str, dict[str, float]]:
    """Cosines by estimator, and biases by rate of discount, of each kind of layer."""
    params = trained(options, greedy)
    params = unequal(params) if differ else params
    x, y = batch(options, np.random.default_rng(7))
    fun = functools.partial(losses, x=x, y=y, greedy=greedy)
    found = {
        f"cosine, {name}": cosines(options, fun, params, estimator)
        for name, estimator in estimators_of(options.tangents).items()
    }
    found |= {f"bias, discounted, {r}": biases(options, fun, params, r) for r in RATES}
    return {name: _by_layer(of_blocks["blocks"]) for name, of_blocks in found.items()}


def _by_layer(blocks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {f"{kind} {i}": round(own[kind], 4) for i, own in enumerate(blocks, 1) for kind in KINDS}


def table(name: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """The results of one case."""
    result = Table("", *next(iter(rows.values())), title=name)
    for row, values in rows.items():
        result.add_row(row, *[f"{value:.2f}" for value in values.values()])
    return result


CASES = {
    "one loss at the end": (False, False),
    "one loss at the end, layers that differ": (False, True),
    "greedy losses": (True, False),
    "greedy losses, layers that differ": (True, True),
}
"""Whether losses are greedy, and whether gradients differ much by layer."""

if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    calls = {
        name: functools.partial(functools.partial, measured, options, *case)
        for name, case in CASES.items()
    }
    settings = {k: v for k, v in dataclasses.asdict(options).items() if k not in SHARED}
    measure.run("tokens", calls, options, lambda call, _: call(), table, **settings)
