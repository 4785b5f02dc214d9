"""A recurrence that learns to remember while it runs, without unrolling it.

    python examples/online.py --out results/benchmarks/online.json

A stream of random bits, and at every step the question which of two earlier ones were equal: the
exclusive or of the bits two and five steps ago. Nothing of what a step sees says so, the LSTM has
to keep it. It is trained by forward gradients whose tangents go along with its state
(`forwardgrad.online`), by backpropagation through the last n steps for several n, and through all.
All of them update the weights at the end of a sequence; "at each step" does it 32 times as often.

Printed are the loss in bits on new sequences (1 is a guess), for the best learning rate of the
first seed; the cosine of one sequence's gradient with the exact one at the start; and the temporary
memory of one gradient at this length and at one sixteen times as long. Ten minutes on two cores.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import tyro
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.table import Table

import forwardgrad as fg
from forwardgrad.experiments import provenance
from forwardgrad.results import write

DELAYS = (2, 5)


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of the example."""

    length: int = 32
    """Steps of a sequence, a multiple of 8."""
    units: int = 16
    """Of the LSTM."""
    batch: int = 32
    """Sequences at a time."""
    updates: int = 1000
    """Batches of sequences."""
    tangents: tuple[int, ...] = (1, 16, 64)
    """K, each by itself."""
    rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Learning rates of Adam, of which the best is taken."""
    seeds: int = 3
    """Runs with the best of them."""
    out: Path | None = None
    """File for the results."""


class Network(eqx.Module):
    """An LSTM and a head."""

    cell: eqx.nn.LSTMCell
    head: eqx.nn.Linear

    def __init__(self, units: int, key: jax.Array):
        keys = jax.random.split(key)
        self.cell = eqx.nn.LSTMCell(1, units, key=keys[0])
        self.head = eqx.nn.Linear(units, 1, key=keys[1])

    def __call__(self, carry: Any, bits: jax.Array) -> tuple[Any, jax.Array]:
        """The next state, and the logits of the answers."""
        carry = jax.vmap(self.cell)(2.0 * bits[:, None] - 1, carry)
        return carry, jax.vmap(self.head)(carry[0])[:, 0]


def sequences(options: Options, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bits and answers, steps first. The first answers are about bits before the sequence: 0."""
    bits = jax.random.bernoulli(key, shape=(options.length, options.batch)).astype(int)
    first, second = (jnp.pad(bits, ((d, 0), (0, 0)))[: options.length] for d in DELAYS)
    return bits, first ^ second


def recurrence(options: Options) -> tuple[Callable[..., Any], Callable[..., Any], Any]:
    """A step of the recurrence, its weights from a key, and the state that it begins with."""
    static = eqx.partition(Network(options.units, jax.random.key(0)), eqx.is_inexact_array)[1]

    def cell(params: Any, carry: Any, now: Any) -> tuple[Any, jax.Array]:
        bits, answers = now
        carry, logits = eqx.combine(params, static)(carry, bits)
        losses = optax.sigmoid_binary_cross_entropy(logits, answers) / jnp.log(2)
        return carry, jnp.mean(losses) / options.length

    def weights(key: jax.Array) -> Any:
        return eqx.filter(Network(options.units, key), eqx.is_inexact_array)

    return cell, weights, (jnp.zeros((options.batch, options.units)),) * 2


Gradient = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
"""Of a sequence: weights, the sequence and a key to its loss and its gradient."""


def truncated(options: Options, steps: int) -> Gradient:
    """Backpropagation through so many steps, and again through the next ones."""
    cell, _, carry = recurrence(options)

    def loss(params, carry, window):
        carry, losses = jax.lax.scan(functools.partial(cell, params), carry, window)
        return jnp.sum(losses), carry

    def gradient(params, sequence, key):
        del key
        windows = jax.tree.map(lambda a: a.reshape(-1, steps, *a.shape[1:]), sequence)

        def one(held, window):
            carry, total, grads = held
            (value, carry), new = jax.value_and_grad(loss, has_aux=True)(params, carry, window)
            return (carry, total + value, jax.tree.map(jnp.add, grads, new)), None

        start = carry, jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        (_, total, grads), _ = jax.lax.scan(one, start, windows)
        return total, grads

    return gradient


def carried(options: Options, tangents: int) -> Gradient:
    """Forward gradients of all steps, added up."""
    cell, _, carry = recurrence(options)
    init, step = fg.online(cell, fg.WeightPerturbation(tangents=tangents))

    def gradient(params, sequence, key):
        def one(held, now):
            state, total, grads = held
            value, new, state = step(params, now, state=state)
            return (state, total + value, jax.tree.map(jnp.add, grads, new)), None

        start = init(params, carry, key=key), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        (_, total, grads), _ = jax.lax.scan(one, start, sequence)
        return total, grads

    return gradient


Update = Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]]
"""Weights, the optimiser's state, a sequence and a key to new weights and a new state."""


def at_the_end(gradient: Gradient, optimiser: Any) -> Update:
    """One update for a sequence."""

    def update(params, memory, sequence, key):
        updates, memory = optimiser.update(gradient(params, sequence, key)[1], memory)
        return optax.apply_updates(params, updates), memory

    return update


def at_each_step(options: Options, tangents: int, optimiser: Any) -> Update:
    """An update after every step, whose tangents then belong in part to older weights."""
    cell, _, carry = recurrence(options)
    init, step = fg.online(cell, fg.WeightPerturbation(tangents=tangents))

    def update(params, memory, sequence, key):
        def one(held, now):
            state, params, memory = held
            _, grads, state = step(params, now, state=state)
            updates, memory = optimiser.update(grads, memory)
            return (state, optax.apply_updates(params, updates), memory), None

        start = init(params, carry, key=key), params, memory
        return jax.lax.scan(one, start, sequence)[0][1:]

    return update


def methods(options: Options) -> dict[str, tuple[Gradient, Callable[[Any], Update]]]:
    """By name, the gradient of a sequence, and the update with an optimiser."""
    found: dict[str, tuple[Gradient, Callable[[Any], Update]]] = {}
    named = {
        "immediate derivative": 1,
        "backpropagation, 4 steps": 4,
        "backpropagation, 8 steps": 8,
        "backpropagation, all steps": options.length,
    }
    for name, steps in named.items():
        gradient = truncated(options, steps)
        found[name] = gradient, functools.partial(at_the_end, gradient)
    for k in options.tangents:
        gradient = carried(options, k)
        found[f"online, K = {k}"] = gradient, functools.partial(at_the_end, gradient)
    k = max(options.tangents)
    each = functools.partial(at_each_step, options, k)
    found[f"online, K = {k}, at each step"] = carried(options, k), each
    return found


def trained(options: Options, update_with: Callable[[Any], Update]) -> Callable[..., jax.Array]:
    """The loss in bits on new sequences, after training at a rate from a seed."""
    _, weights, _ = recurrence(options)
    exact = truncated(options, options.length)

    def run(rate, seed):
        optimiser = optax.adam(rate)
        update = update_with(optimiser)
        own = jax.random.split(jax.random.fold_in(jax.random.key(1), seed), 3)
        params = weights(own[0])

        def one(held, key):
            keys = jax.random.split(key)
            return update(*held, sequences(options, keys[0]), keys[1]), None

        keys = jax.random.split(own[1], options.updates)
        (params, _), _ = jax.lax.scan(one, (params, optimiser.init(params)), keys)
        tests = jax.random.split(own[2], 20)
        losses = jax.lax.map(lambda key: exact(params, sequences(options, key), key)[0], tests)
        return jnp.mean(losses)

    return jax.jit(run)


def quality(options: Options, gradient: Gradient) -> float:
    """The mean cosine of one sequence's gradient with the exact one, at the start."""
    _, weights, _ = recurrence(options)
    exact = truncated(options, options.length)

    def cosine(key):
        keys = jax.random.split(key, 3)
        params, sequence = weights(keys[0]), sequences(options, keys[1])
        a, b = (ravel_pytree(g(params, sequence, keys[2])[1])[0] for g in (gradient, exact))
        return jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)

    keys = jax.random.split(jax.random.key(5), 50)
    return float(jnp.mean(jax.jit(lambda keys: jax.lax.map(cosine, keys))(keys)))


def memory(options: Options, name: str, times: int) -> int:
    """Temporary bytes of the gradient of a sequence that is so many times as long."""
    longer = dataclasses.replace(options, length=times * options.length)
    _, weights, _ = recurrence(longer)
    key = jax.random.key(0)
    arguments = weights(key), sequences(longer, key), key
    compiled = jax.jit(methods(longer)[name][0]).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def measured(options: Options, name: str) -> dict[str, Any]:
    """What is stored about one method."""
    gradient, update_with = methods(options)[name]
    run, began = trained(options, update_with), time.monotonic()
    by_rate = {rate: float(run(rate, 0)) for rate in options.rates}
    best = min(by_rate, key=by_rate.__getitem__)
    others = [float(run(best, seed)) for seed in range(1, options.seeds)]
    return {
        "losses": [by_rate[best], *others],
        "rate": best,
        "loss by rate": [[rate, loss] for rate, loss in by_rate.items()],
        "cosine": quality(options, gradient),
        "bytes": memory(options, name, 1),
        "bytes, 16 times as long": memory(options, name, 16),
        "seconds": round(time.monotonic() - began),
    }


def main(options: Options) -> None:
    """Measure, print and store."""
    table = Table("", "bits", "rate", "cosine", "KiB", "KiB, 16 x as long", title="delayed xor")
    results = {}
    for name in methods(options):
        results[name] = found = measured(options, name)
        losses = ", ".join(f"{loss:.3f}" for loss in found["losses"])
        sizes = [f"{found[k] / 1024:.0f}" for k in ("bytes", "bytes, 16 times as long")]
        table.add_row(name, losses, f"{found['rate']:g}", f"{found['cosine']:.2f}", *sizes)
        if options.out is not None:
            own = {k: v for k, v in dataclasses.asdict(options).items() if k != "out"}
            write(options.out, {"benchmark": "online", **own, **provenance(), "results": results})
    Console(width=110).print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
