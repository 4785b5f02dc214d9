"""Forward gradients and backpropagation on MNIST (Baydin et al. 2022, Sections 5.2 to 5.4).

Commands: `forwardgrad reproduce mnist-logreg`, `mnist-mlp`, `mnist-cnn` (`--data-dir` names a
folder with `mnist/train.parquet` and `mnist/test.parquet`).

The paper trains with batches of 64 and a learning rate that starts at 2e-5 or 2e-4 and decays as
eta_0 exp(-i k), k = 1e-4. Every cell is a run of `forwardgrad train` in a folder of its own, so an
interrupted experiment continues where it was.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from forwardgrad._console import Console
from forwardgrad.experiments._experiment import (
    CellOptions,
    Cells,
    Experiment,
    Job,
    Means,
    Presented,
    of_cells,
)
from forwardgrad.results import CurveCell, Mean, look, markdown
from forwardgrad.training import TrainConfig, fit

ALGORITHMS = ("bp", "fg-w")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MnistOptions(CellOptions):
    """Settings of `reproduce mnist-*`."""

    iterations: int = 5000
    """Steps of each run."""
    seeds: int = 5
    learning_rates: tuple[float, ...] = (2e-5, 2e-4)
    """Learning rates at the start."""
    decay: float = 1e-4
    """k of the exponential decay."""
    log_every: int = 50
    """Steps between the points of the curves, each the mean loss since the last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogregOptions(MnistOptions):
    """Settings of `reproduce mnist-logreg`."""

    out: Path = Path("runs/reproduce/mnist-logreg")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpOptions(MnistOptions):
    """Settings of `reproduce mnist-mlp`."""

    out: Path = Path("runs/reproduce/mnist-mlp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CnnOptions(MnistOptions):
    """Settings of `reproduce mnist-cnn`."""

    out: Path = Path("runs/reproduce/mnist-cnn")


def _plan(network: str, options: MnistOptions) -> Iterator[Job]:
    for seed in range(options.seeds):
        for rate in options.learning_rates:
            for algorithm in ALGORITHMS:
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
                    out=options.out / "runs" / f"{algorithm}-{rate:g}-{seed}",
                    data_dir=options.data_dir,
                )
                yield Job({"algorithm": algorithm, "learning_rate": rate}, config)


def _make(job: Job, options: MnistOptions, console: Console) -> dict[str, Any]:
    run = fit(dataclasses.replace(job.config, resume=True), console=console)
    lines = [line for line in run.measurements if line.event == "steps"]
    return {
        **{name: getattr(run.result, name) for name in ("test_error", "seconds", "date")},
        "steps": tuple(line.step for line in lines),
        "losses": tuple(float(f"{line.loss:.5g}") for line in lines),
        "times": tuple(round(line.seconds or 0.0, 4) for line in lines),
    }


def _row(mean: Mean[CurveCell]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of the test error, and of the final loss."""
    losses = [cell.losses[-1] for cell in mean.cells]
    return {**mean.row, "loss_mean": float(np.mean(losses)), "loss_std": float(np.std(losses))}


def _present(name: str, means: Means) -> Presented:
    rows = [_row(mean) for mean in means.values()]
    texts = [
        [*place.row, f"{row['loss_mean']:.4f}", mean.text]
        for (place, mean), row in zip(means.items(), rows, strict=True)
    ]
    heads = ["algorithm", "learning rate", "loss", "test error"]
    return Presented(rows, markdown(heads, texts), _figure(means, name))


def _figure(means: Means, title: str) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rates = sorted({float(place.row[1]) for place in means})
    for place, mean in sorted(means.items()):
        losses = np.array([cell.losses for cell in mean.cells])
        times = np.mean([cell.times for cell in mean.cells], axis=0)
        first, color = mean.cells[0], look(place.row[0])[0]
        style = ("-", "--", ":", "-.")[rates.index(float(place.row[1])) % 4]
        for axes, x in ((left, first.steps), (right, times)):
            axes.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.15, lw=0)
            axes.plot(x, losses.mean(0), style, color=color, label=", ".join(place.row))
    left.set(xlabel="iteration", ylabel="training loss")
    right.set(xlabel="time (s)")
    left.legend(title="algorithm, learning rate")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    return figure


def _experiment(network: str, what: str, options: type) -> Experiment:
    name = f"mnist-{network}"
    cells = Cells(
        kind=CurveCell,
        plan=functools.partial(_plan, network),
        present=functools.partial(_present, name),
        make=_make,
        same=("iterations", "decay", "log_every"),
    )
    summary = f"forward gradient and backpropagation on MNIST, {what}"
    return of_cells(name, summary, options, cells)


MNIST = [
    _experiment("logreg", "logistic regression", LogregOptions),
    _experiment("mlp", "fully connected network", MlpOptions),
    _experiment("cnn", "convolutional network", CnnOptions),
]
