"""Run time and memory as the network gets deeper (Baydin et al. 2022, Section 5.5).

Command: `forwardgrad reproduce scaling`. About a quarter of an hour on two cores; every cell is
stored as it comes, and a second call continues.

The paper's figure has a fully connected network with layers of 1024, and compares forward only,
backpropagation and forward gradients up to 100 layers.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from forwardgrad._console import Console
from forwardgrad.estimators import Backpropagation, WeightPerturbation
from forwardgrad.experiments._experiment import Cells, Experiment, Job, Options, Presented
from forwardgrad.experiments._measure import Step, checkpointed, interleave
from forwardgrad.results._figures import band, panels
from forwardgrad.results._records import AbstractCell, Count, Name, NotNegative

MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingOptions(Options):
    """Settings of `reproduce scaling`."""

    depths: tuple[int, ...] = (1, 2, 5, 10, 20, 30, 50, 70, 100)
    """Numbers of layers."""
    batch_sizes: tuple[int, ...] = (64, 512)
    """Examples in a batch."""
    width: int = 1024
    """Units of a layer."""
    repeats: int = 10
    """Interleaved timings of each method."""


def mlp_loss(params: list[dict], x: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of a fully connected network with ReLU between its layers."""
    *hidden, last = params
    logits = _hidden(hidden, x) @ last["W"] + last["b"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def checkpointed_mlp_loss(params: list[dict], x: jax.Array, labels: jax.Array) -> jax.Array:
    """`mlp_loss`, of which backpropagation keeps what goes from segment to segment of the layers.

    From the output to the input, segments have 2, 2, 3, 3, 4, 4, ... layers, up to about the square
    root of the depth. A segment that is computed again keeps two arrays a layer, the product and
    its ReLU; each segment before it still keeps one. So two segments fewer before it leave room for
    one more layer, and all segments need about the same memory.
    """
    for segment in _segments(params[:-2]):
        x = checkpointed(_hidden)(segment, x)
    return mlp_loss(params[-2:], x, labels)


def _segments(layers: list[dict]) -> list[list[dict]]:
    segments = []
    while layers:
        size = 2 + len(segments) // 2
        segments.insert(0, layers[-size:])
        layers = layers[:-size]
    return segments


def _hidden(layers: list[dict], x: jax.Array) -> jax.Array:
    for p in layers:
        x = jax.nn.relu(x @ p["W"] + p["b"])
    return x


METHODS = {
    "forward only": (mlp_loss, None),
    "BP": (mlp_loss, Backpropagation()),
    "BP, checkpointed": (checkpointed_mlp_loss, Backpropagation()),
    "FG-W, dense": (mlp_loss, WeightPerturbation(structure="dense")),
    "FG-W, rank-one": (mlp_loss, WeightPerturbation()),
}
"""Loss and estimator of each method."""


def mlp_problem(depth: int, batch_size: int, width: int) -> tuple[list[dict], tuple]:
    """Parameters of `depth` square layers, and a batch of inputs and labels."""
    *keys, x_key, label_key = jax.random.split(jax.random.key(0), depth + 2)
    params = [
        {"W": jax.random.normal(k, (width, width)) * (2 / width) ** 0.5, "b": jnp.zeros(width)}
        for k in keys
    ]
    x = jax.random.normal(x_key, (batch_size, width))
    return params, (x, jax.random.randint(label_key, (batch_size,), 0, width))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of a method's steps, its temporary memory in bytes, and its operations."""

    seconds: tuple[NotNegative, ...]
    temp_bytes: Count
    flops: NotNegative


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostCell(AbstractCell):
    """What each method's step costs on a network of that depth, with batches of that size."""

    ROW = ("depth", "batch")

    depth: Count
    batch: Count
    methods: dict[Name, Cost]


def _plan(options: ScalingOptions) -> Iterator[Job]:
    for depth, batch_size in itertools.product(options.depths, options.batch_sizes):
        yield Job({"depth": depth, "batch": batch_size})


def _make(job: Job, options: ScalingOptions, console: Console) -> dict[str, Any]:
    params, batch = mlp_problem(job.place["depth"], job.place["batch"], options.width)
    steps = {name: Step(loss, params, e, batch) for name, (loss, e) in METHODS.items()}
    seconds = interleave(steps, options.repeats)
    costs = {
        name: Cost(tuple(float(f"{s:.6g}") for s in seconds[name]), step.temp_bytes, step.flops)
        for name, step in steps.items()
    }
    return {"methods": costs}


def _present(cells: Sequence[CostCell]) -> Presented:
    """Time and memory against depth, a column a batch size."""
    sizes = sorted({cell.batch for cell in cells})
    figure, every = panels(2, len(sizes), size=(5 * len(sizes), 7), sharex=True)
    for (above, below), batch_size in zip(every.T, sizes, strict=True):
        own = sorted((c for c in cells if c.batch == batch_size), key=lambda cell: cell.depth)
        depths = [cell.depth for cell in own]
        for name in METHODS:
            costs = [cell.methods[name] for cell in own]
            times = 1e3 * np.array([cost.seconds for cost in costs])
            mean, spread = times.mean(axis=1), times.std(axis=1)
            style = {"marker": ".", "label": name}
            band(above, depths, (mean - spread, mean, mean + spread), **style)
            below.plot(depths, [cost.temp_bytes / MIB for cost in costs], **style)
        above.set(title=f"batch {batch_size}", ylabel="time of a step (ms)")
        below.set(xlabel="layers", ylabel="temporary memory (MiB)")
    figure.axes[0].legend()
    return Presented(figure)


SCALING = Experiment(
    "scaling",
    "time and memory of a step against depth",
    ScalingOptions,
    Cells(kind=CostCell, plan=_plan, make=_make, present=_present, same=("width", "repeats")),
)
