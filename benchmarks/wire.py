"""What crosses the network in a data parallel step: ours, and backpropagation's.

    python benchmarks/wire.py --out results/benchmarks/wire.json

Every step is compiled for eight workers, simulated on this machine, and nothing is run: the
numbers are those of the compiled program's collectives. "bytes" is what each worker hands over in a
step, summed over the operands of its collectives; how often a byte travels on the way to all others
is the network's affair. The step is loss, gradient and SGD update; the loss is averaged over the
workers, too.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import tyro
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from rich.table import Table

import forwardgrad as fg
import measure
from forwardgrad.networks import build
from forwardgrad.training import configure
from measure import Options

WORKERS = 8

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
_CALL = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\((.*?)\)")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """A collective of a compiled program: its kind, and the bytes of all that goes in."""

    kind: str
    size: int


class Problem(NamedTuple):
    """A loss `loss(params, *batch)`, shapes of its arguments, the batch that of one worker."""

    loss: Callable[..., Any]
    params: Any
    batch: tuple[Any, ...]
    estimators: Mapping[str, fg.AbstractEstimator]


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, from its text.

    **Raises:**

    `ValueError` if one of them is in a loop, where it would be counted once.
    """
    found = []
    shapes = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ", text, re.MULTILINE))
    inside = True
    for line in text.splitlines():
        if line and not line[0].isspace():
            inside = not line.startswith("ENTRY")
        if call := _CALL.search(line):
            if inside:
                raise ValueError(f"a collective in a loop: {line.strip()[:200]}")
            operands = re.findall(r"%([\w.-]+)", call[3])
            size = sum(_size(shapes[name]) for name in operands)
            found.append(Collective(call[2], size))
    return found


def _size(shape: str) -> int:
    """The bytes of an array, or of those of a tuple."""
    return sum(
        _BYTES.get(kind, 4) * math.prod(map(int, filter(None, axes.split(","))))
        for kind, axes in _SHAPE.findall(shape)
    )


def step_of(problem: Problem, estimator: fg.AbstractEstimator) -> Callable[..., Any]:
    """`step(params, key, *batch) -> (params, value)` of workers along "data"."""

    def step(params, key, *batch):
        exact = isinstance(estimator, fg.Backpropagation)
        # Each worker differentiates its own losses, and then they add up.
        own = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)
        gradient = fg.value_and_grad(problem.loss, estimator)
        value, grads = gradient(own if exact else params, *batch, key=key)
        grads = jax.lax.psum(grads, "data") if exact else grads
        params = jax.tree.map(lambda p, g: p - 1e-3 / WORKERS * g, params, grads)
        return params, jax.lax.pmean(value, "data")

    return step


def compiled(problem: Problem, estimator: fg.AbstractEstimator) -> Any:
    """The step of eight workers, compiled."""
    mesh = jax.make_mesh((WORKERS,), ("data",), axis_types=(AxisType.Auto,))
    specs = (P(), P(), *[P("data")] * len(problem.batch))
    step = jax.shard_map(
        step_of(problem, estimator), mesh=mesh, in_specs=specs, out_specs=(P(), P())
    )
    batch = [
        jax.ShapeDtypeStruct((WORKERS * a.shape[0], *a.shape[1:]), a.dtype) for a in problem.batch
    ]
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(step, donate_argnums=0).lower(problem.params, key, *batch).compile()


WEIGHT = fg.WeightPerturbation(mask_rows=False)
METHODS = {
    "BP": fg.Backpropagation(),
    "FG-W": WEIGHT,
    "FG-W, a tangent for each worker": fg.WorkerTangents(WEIGHT, "data"),
}


def mlp() -> Problem:
    """A small fully connected network, for the tests."""

    def loss(params, x, y):
        return jnp.mean((jnp.tanh(x @ params["first"]) @ params["last"] - y) ** 2)

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = {"first": shape((32, 64)), "last": shape((64, 8))}
    return Problem(loss, params, (shape((4, 32)), shape((4, 8))), METHODS)


def local_mixer(algorithm: str, methods: tuple[str, ...]) -> Problem:
    """The second paper's l/8/64 on 16 images of CIFAR-10's shape a worker."""

    def make():
        return build("l/8/64", image_shape=(32, 32, 3), classes=10, key=jax.random.key(0))

    params, static = eqx.partition(eqx.filter_eval_shape(make), _is_weight)
    objective = configure(algorithm=algorithm).objective

    def loss(params, images, labels):
        return objective(eqx.combine(params, static), images, labels)[0]

    images = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((16,), jnp.int32)
    return Problem(loss, params, (images, labels), {name: METHODS[name] for name in methods})


def _is_weight(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.floating)


def transformer() -> Problem:
    """A causal language model of a billion parameters, on two sequences of 512 tokens a worker."""
    layers, width, heads, vocabulary, length = 24, 1792, 14, 32768, 512
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    blocks = {
        "norm": shape((layers, 2, width)),
        "qkv": shape((layers, width, 3, heads, width // heads)),
        "out": shape((layers, heads, width // heads, width)),
        "up": shape((layers, width, 4 * width)),
        "down": shape((layers, 4 * width, width)),
    }
    params = {
        "tokens": shape((vocabulary, width)),
        "positions": shape((length, width)),
        "blocks": blocks,
        "head": shape((width, vocabulary)),
    }

    def normalised(x, scale):
        return scale * x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    def block(x, w):
        q, k, v = jnp.einsum("btw,wchd->cbthd", normalised(x, w["norm"][0]), w["qkv"])
        x += jnp.einsum(
            "bthd,hdw->btw", jax.nn.dot_product_attention(q, k, v, is_causal=True), w["out"]
        )
        return x + jax.nn.gelu(normalised(x, w["norm"][1]) @ w["up"]) @ w["down"], None

    def loss(params, inputs, targets):
        x = params["tokens"][inputs] + params["positions"]
        x, _ = jax.lax.scan(block, x, params["blocks"])
        logits = normalised(x, 1.0) @ params["head"]
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    return Problem(loss, params, (tokens, tokens), METHODS)


def bytes_of(problem: Problem, repeats: int) -> dict[str, dict[str, Any]]:
    """The collectives of each method's step, and their bytes."""
    del repeats
    results = {}
    for method, estimator in problem.estimators.items():
        found = collectives(compiled(problem, estimator).as_text())
        results[method] = {
            "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(problem.params)),
            "bytes": sum(c.size for c in found),
            "messages": len(found),
            "kinds": sorted({c.kind for c in found}),
        }
    return results


def table_of(name: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """The results of one model."""
    first = next(iter(rows.values()))
    result = Table(title=f"{name}, {first['parameters']:,} parameters")
    for column in ("", "bytes", "messages", "kinds"):
        result.add_column(column, justify="left" if column in ("", "kinds") else "right")
    for method, row in rows.items():
        kinds = ", ".join(row["kinds"])
        result.add_row(method, f"{row['bytes']:,}", str(row["messages"]), kinds)
    return result


EVERY = tuple(METHODS)
CASES = {
    "small MLP": mlp,
    "l/8/64, one loss": functools.partial(local_mixer, "fg-w", EVERY),
    "l/8/64, greedy local losses": functools.partial(local_mixer, "lg-fg-w", EVERY),
    "transformer, 24 layers of 1792": transformer,
}

if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    jax.config.update("jax_num_cpu_devices", WORKERS)
    measure.run("wire", CASES, options, bytes_of, table_of, workers=WORKERS)
