"""Run time and memory as the network gets deeper (Baydin et al. 2022, Section 5.5).

Command: `forwardgrad reproduce scaling`. About a quarter of an hour on two cores; every cell is
stored as it comes, and a second call continues.

The paper's figure has a fully connected network with layers of 1024, and compares forward only,
backpropagation and forward gradients up to 100 layers.
"""

import dataclasses
from os.path import lexists
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from forwardgrad.estimators import Backpropagation, WeightPerturbation
from forwardgrad.experiments._experiment import Experiment, header, stored
from forwardgrad.experiments._measure import Step, checkpointed, interleave
from forwardgrad.results import Header, save, write

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class ScalingOptions:
    """Settings of `reproduce scaling`."""

    out: Path = Path("runs/reproduce/scaling")
    """Folder of the results."""
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
    """Seconds of a method's step, its temporary memory and its operations."""

    seconds: tuple[float, ...]
    temp_bytes: int
    flops: float


@dataclasses.dataclass(frozen=True)
class Depth:
    """What the methods cost on a network of that depth."""

    depth: int
    batch: int
    methods: dict[str, Cost]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling(Header):
    """What is stored."""

    options: ScalingOptions
    cells: dict[str, Depth]


def run_scaling(options: ScalingOptions) -> Path:
    """Run the experiment, or what is missing of it, and return the folder of its results."""
    path, cells = options.out / "scaling.json", {}
    if lexists(path):
        cells = dict(stored(path, Scaling, options, same=("width", "repeats")).cells)
    for depth in options.depths:
        for batch_size in options.batch_sizes:
            name = f"depth {depth}, batch {batch_size}"
            if name not in cells:
                cells[name] = _measure(depth, batch_size, options)
                write(path, {**header("scaling", options), "cells": cells})
    save(_figure(list(cells.values()), options), options.out / "scaling.png")
    return options.out


def _measure(depth: int, batch_size: int, options: ScalingOptions) -> Depth:
    params, batch = mlp_problem(depth, batch_size, options.width)
    steps = {name: Step(loss, params, e, batch) for name, (loss, e) in METHODS.items()}
    seconds = interleave(steps, options.repeats)
    costs = {
        name: Cost(tuple(float(f"{s:.6g}") for s in seconds[name]), step.temp_bytes, step.flops)
        for name, step in steps.items()
    }
    return Depth(depth, batch_size, costs)


def _figure(cells: list[Depth], options: ScalingOptions) -> Figure:
    figure = Figure(figsize=(5 * len(options.batch_sizes), 7), layout="constrained")
    axes = figure.subplots(2, len(options.batch_sizes), squeeze=False, sharex=True)
    for column, batch_size in enumerate(options.batch_sizes):
        mine = sorted((c for c in cells if c.batch == batch_size), key=lambda c: c.depth)
        depths = [c.depth for c in mine]
        for name in METHODS:
            rows = [c.methods[name] for c in mine]
            times = np.array([row.seconds for row in rows]) * 1e3
            mean, spread = times.mean(axis=1), times.std(axis=1)
            (line,) = axes[0, column].plot(depths, mean, marker=".", label=name)
            axes[0, column].fill_between(
                depths, mean - spread, mean + spread, alpha=0.2, color=line.get_color()
            )
            axes[1, column].plot(
                depths, [row.temp_bytes / MIB for row in rows], marker=".", label=name
            )
        axes[0, column].set(title=f"batch {batch_size}", ylabel="time of a step (ms)")
        axes[1, column].set(xlabel=f"layers of {options.width}", ylabel="temporary memory (MiB)")
    axes[0, 0].legend()
    for a in axes.flat:
        a.grid(alpha=0.3)
    return figure


SCALING = Experiment(
    "scaling", "time and memory of a step against depth", ScalingOptions, run_scaling
)
