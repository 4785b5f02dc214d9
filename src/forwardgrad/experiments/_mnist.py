"""Forward gradients and backpropagation on MNIST (Baydin et al. 2022, Sections 5.2 to 5.4).

Commands: `forwardgrad reproduce mnist-logreg`, `mnist-mlp`, `mnist-cnn` (`--data-dir` names a
folder with `mnist/train.parquet` and `mnist/test.parquet`).

The paper trains with batches of 64 and a learning rate that starts at 2e-5 or 2e-4 and decays as
eta_0 exp(-i k), k = 1e-4. Every cell is a run of `forwardgrad train` in a folder of its own, so an
interrupted experiment continues where it was.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from forwardgrad._files import write_json
from forwardgrad._provenance import provenance
from forwardgrad.experiments._experiment import Experiment, options_as_json
from forwardgrad.experiments._figures import save
from forwardgrad.training import TrainConfig, fit

ALGORITHMS = ("bp", "fg-w")


@dataclasses.dataclass(frozen=True)
class MnistOptions:
    """Settings of `reproduce mnist-*`."""

    out: Path | None = None
    """Folder of the results. Default: runs/reproduce/NAME."""
    data_dir: Path | None = None
    """Folder with mnist/{train,test}.parquet. Default: $FORWARDGRAD_DATA, or the hub is asked."""
    iterations: int = 5000
    """Steps of each run."""
    seeds: int = 5
    """Runs of each cell."""
    learning_rates: tuple[float, ...] = (2e-5, 2e-4)
    """Learning rates at the start."""
    decay: float = 1e-4
    """k of the exponential decay."""
    log_every: int = 50
    """Steps between the points of the curves, each the mean loss since the last."""


def run_mnist(network: str, options: MnistOptions) -> Path:
    """Run the experiment, or what is missing of it, and return the folder of its results."""
    name = f"mnist-{network}"
    out = options.out or Path("runs/reproduce") / name
    cells = [
        _cell(network, algorithm, rate, seed, out, options)
        for seed in range(options.seeds)
        for rate in options.learning_rates
        for algorithm in ALGORITHMS
    ]
    header = {"experiment": name, "options": options_as_json(options), **provenance()}
    write_json(out / f"{name}.json", {**header, "cells": cells, "table": _table(cells)})
    _plot(out / f"{name}.png", cells, name)
    return out


def _cell(
    network: str, algorithm: str, rate: float, seed: int, out: Path, options: MnistOptions
) -> dict[str, Any]:
    folder = out / "runs" / f"{algorithm}-{rate:g}-{seed}"
    config = TrainConfig(
        dataset="mnist",
        network=network,
        algorithm=algorithm,
        seed=seed,
        iterations=options.iterations,
        learning_rate=rate,
        schedule="exponential",
        decay=options.decay,
        momentum=0.0,
        tangents=1,
        clip=None,
        exact_last=False,
        normalise=False,
        log_every=options.log_every,
        eval_every=1_000_000,
        out=folder,
        data_dir=options.data_dir,
        resume=True,
    )
    summary = fit(config)
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [line for line in lines if line["event"] == "steps"]
    return {
        "algorithm": algorithm,
        "learning_rate": rate,
        "seed": seed,
        "test_error": summary["test_error"],
        "seconds": summary["seconds"],
        "date": summary["date"],
        "steps": [p["step"] for p in points],
        "losses": [float(f"{p['loss']:.5g}") for p in points],
        "times": [round(p["seconds"], 4) for p in points],
    }


def _groups(cells: list[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["algorithm"], cell["learning_rate"]), []).append(cell)
    return groups


def _table(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of the final loss and the test error."""
    rows = []
    for (algorithm, rate), group in _groups(cells).items():
        losses = [cell["losses"][-1] for cell in group]
        errors = [cell["test_error"] for cell in group]
        rows.append(
            {
                "algorithm": algorithm,
                "learning_rate": rate,
                "seeds": len(group),
                "loss_mean": float(np.mean(losses)),
                "loss_std": float(np.std(losses)),
                "test_error_mean": float(np.mean(errors)),
                "test_error_std": float(np.std(errors)),
                "seconds_median": float(np.median([cell["seconds"] for cell in group])),
            }
        )
    return rows


def _plot(path: Path, cells: list[dict[str, Any]], title: str) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rates = sorted({cell["learning_rate"] for cell in cells})
    for (algorithm, rate), group in sorted(_groups(cells).items()):
        losses = np.array([cell["losses"] for cell in group])
        times = np.mean([cell["times"] for cell in group], axis=0)
        color = {"bp": "tab:blue", "fg-w": "tab:red"}[algorithm]
        style = ("-", "--", ":", "-.")[rates.index(rate) % 4]
        for axes, x in ((left, group[0]["steps"]), (right, times)):
            axes.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.15, lw=0)
            axes.plot(x, losses.mean(0), style, color=color, label=f"{algorithm}, {rate:g}")
    left.set(xlabel="iteration", ylabel="training loss")
    right.set(xlabel="time (s)")
    left.legend(title="algorithm, learning rate")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    save(figure, path)


MNIST = [
    Experiment(
        f"mnist-{network}",
        f"forward gradient and backpropagation on MNIST, {what}",
        MnistOptions,
        functools.partial(run_mnist, network),
    )
    for network, what in (
        ("logreg", "logistic regression"),
        ("mlp", "fully connected network"),
        ("cnn", "convolutional network"),
    )
]
