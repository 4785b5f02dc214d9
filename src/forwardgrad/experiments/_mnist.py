"""Forward gradients and backpropagation on MNIST (Baydin et al. 2022, Sections 5.2 to 5.4).

Commands: `forwardgrad reproduce mnist-logreg`, `mnist-mlp`, `mnist-cnn` (`--data-dir` names a
folder with `mnist/train.parquet` and `mnist/test.parquet`).

The paper trains with batches of 64 and a learning rate that starts at 2e-5 or 2e-4 and decays as
eta_0 exp(-i k), k = 1e-4. Every cell is a run of `forwardgrad train` in a folder of its own, so an
interrupted experiment continues where it was.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from forwardgrad._console import Console
from forwardgrad.experiments._experiment import (
    Cells,
    Experiment,
    Job,
    Presented,
    RunOptions,
    run_config,
    trained,
)
from forwardgrad.results import CurveCell, look, markdown, over_seeds
from forwardgrad.results._figures import band, panels

ALGORITHMS = ("bp", "fg-w")

SETTINGS: dict[str, Any] = {
    "schedule": "exponential",
    **{"momentum": 0.0, "tangents": 1, "clip": None, "exact_last": False},
    "normalise": False,
    "eval_every": 1_000_000,
}
"""Of every run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MnistOptions(RunOptions):
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


def _plan(network: str, options: MnistOptions) -> Iterator[Job]:
    parts = (range(options.seeds), options.learning_rates, ALGORITHMS)
    for seed, rate, algorithm in itertools.product(*parts):
        place = {"algorithm": algorithm, "learning_rate": rate}
        given = {**SETTINGS, **place, "dataset": "mnist", "network": network, "seed": seed}
        yield Job(place, seed, run_config(options, **given))


def _make(job: Job, options: MnistOptions, console: Console) -> dict[str, Any]:
    run = trained(job, options, console)
    lines = [line for line in run.measurements if line.event == "steps"]
    return {
        **{name: getattr(run.result, name) for name in ("test_error", "seconds", "date")},
        "steps": tuple(line.step for line in lines),
        "losses": tuple(float(f"{line.loss:.5g}") for line in lines),
        "times": tuple(round(line.seconds or 0.0, 4) for line in lines),
    }


def _present(title: str, cells: Sequence[CurveCell]) -> Presented:
    """A row an algorithm and learning rate: the last loss and the test error over seeds."""
    rows, texts = [], []
    for place, mean in over_seeds(cells).items():
        losses = [cell.losses[-1] for cell in mean.cells]
        loss = float(np.mean(losses))
        rows.append({**mean.row, "loss_mean": loss, "loss_std": float(np.std(losses))})
        texts.append([*place.row, f"{loss:.4f}", mean.text])
    heads = ["algorithm", "learning rate", "loss", "test error"]
    return Presented(_figure(title, cells), rows, markdown(heads, texts))


def _figure(title: str, cells: Sequence[CurveCell]) -> Figure:
    figure, ((left, right),) = panels(1, 2, size=(10, 4), sharey=True)
    rates = sorted({cell.learning_rate or 0.0 for cell in cells})
    for (_, (algorithm, rate)), mean in sorted(over_seeds(cells).items()):
        losses = np.array([cell.losses for cell in mean.cells])
        lines = losses.min(0), losses.mean(0), losses.max(0)
        style = {
            "color": look(algorithm)[0],
            "linestyle": ("-", "--", ":", "-.")[rates.index(float(rate)) % 4],
            "label": f"{algorithm}, {rate}",
        }
        band(left, mean.cells[0].steps, lines, **style)
        band(right, np.mean([cell.times for cell in mean.cells], axis=0), lines, **style)
    left.set(xlabel="iteration", ylabel="training loss")
    right.set(xlabel="time (s)")
    left.legend(title="algorithm, learning rate")
    figure.suptitle(title)
    return figure


def _experiment(network: str, what: str) -> Experiment:
    name = f"mnist-{network}"
    cells = Cells(
        kind=CurveCell,
        plan=functools.partial(_plan, network),
        present=functools.partial(_present, name),
        make=_make,
        same=("iterations", "decay", "log_every"),
    )
    summary = f"forward gradient and backpropagation on MNIST, {what}"
    return Experiment(name, summary, MnistOptions, cells)


MNIST = [
    _experiment("logreg", "logistic regression"),
    _experiment("mlp", "fully connected network"),
    _experiment("cnn", "convolutional network"),
]
