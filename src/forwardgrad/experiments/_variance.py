"""Measured variances of forward gradients beside what theory says (Ren et al. 2023, Section 3).

Command: `forwardgrad reproduce variance`. Four minutes on two cores.

The paper derives how the variance falls from perturbed weights to perturbed activations, and with
losses for every group of channels. Here the variance of every entry of the gradient is predicted
exactly, for signs, one tangent, and a LocalMixer of one block and one patch, and held against
samples of the estimators as they are.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from forwardgrad._console import Console
from forwardgrad._diagnosis import DiagnosisRow
from forwardgrad._errors import InputError
from forwardgrad.experiments._diagnose import diagnosis_of
from forwardgrad.experiments._experiment import (
    Cells,
    Experiment,
    Job,
    Options,
    Presented,
    check_names,
    run_config,
)
from forwardgrad.experiments._theory import activity_variances, weight_variances
from forwardgrad.networks import size_of
from forwardgrad.results import look, markdown
from forwardgrad.results._figures import panels
from forwardgrad.results._records import AbstractCell, Name, NotNegative
from forwardgrad.training import problem

ALGORITHMS = ("fg-w", "lg-fg-w", "fg-a", "lg-fg-a")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VarianceOptions(Options):
    """Settings of `reproduce variance`."""

    dataset: str = "mnist"
    """Data set, as for train."""
    network: str = "m/1/16"
    """A LocalMixer with one block and one patch: s/1/1 or m/1/16."""
    algorithms: tuple[str, ...] = ALGORITHMS
    """Algorithms: fg-w, lg-fg-w, fg-a, lg-fg-a."""
    samples: int = 4000
    """Estimates of the gradient, an even number."""
    batch_size: int = 64
    """Examples in the batch."""
    seed: int = 0
    """Seed of the weights, the batch and the estimates."""
    data_dir: Path | None = None
    """Folder with DATASET/{train,test}.parquet. Default: $FORWARDGRAD_DATA, or the hub is asked."""


@dataclasses.dataclass(frozen=True)
class LayerVariance:
    """Total variance of the estimate of a layer's gradient, or of all; the exact one's norm."""

    layer: Name
    norm: NotNegative
    measured: NotNegative
    measured_error: NotNegative
    predicted: NotNegative
    ratio: NotNegative
    ratio_error: NotNegative


@dataclasses.dataclass(frozen=True, kw_only=True)
class VarianceCell(AbstractCell):
    """The variances of an algorithm's estimates, layer by layer; of all layers last."""

    ROW = ("algorithm",)

    algorithm: Name
    layers: tuple[LayerVariance, ...]


def _plan(options: VarianceOptions) -> Iterator[Job]:
    """One tangent, no clipping, and exact gradients for the last layers whatever the algorithm."""
    check_names("algorithm", options.algorithms, ALGORITHMS)
    size = size_of(options.network)
    if size is None or size.patches > 1:
        raise InputError(
            f"network must be a LocalMixer with one patch, s/1/1 or m/1/16, got {options.network!r}"
        )
    for algorithm in options.algorithms:
        place = {"algorithm": algorithm}
        config = run_config(options, **place, tangents=1, clip=None, exact_last=True)
        yield Job(place, options.seed, config)


def _make(job: Job, options: VarianceOptions, console: Console) -> dict[str, Any]:
    assert job.config is not None
    step = problem(job.config)
    predict = weight_variances if job.config.algorithm.endswith("w") else activity_variances
    predicted = {name: float(np.sum(np.asarray(v, float))) for name, v in predict(step).items()}
    predicted["all"] = sum(predicted.values())
    diagnosis = diagnosis_of(step, options.seed, options.samples)
    # The other layers' gradients are exact: they add nothing to the variance of all.
    layers = [row for row in diagnosis.layers if row.name in predicted]
    total = dataclasses.replace(diagnosis.total, norm=math.hypot(*(row.norm for row in layers)))
    return {"layers": tuple(_beside(row, predicted[row.name]) for row in (*layers, total))}


def _beside(row: DiagnosisRow, predicted: float) -> LayerVariance:
    measured = (row.variance, row.variance_error)
    ratio = (value / predicted for value in measured)
    return LayerVariance(row.name, row.norm, *measured, predicted, *ratio)


def _present(cells: Sequence[VarianceCell]) -> Presented:
    """Two tables: variances layer by layer; and by which factor they fall."""
    rows, lines = [], []
    for cell in cells:
        for row in cell.layers:
            rows.append({"algorithm": cell.algorithm, **dataclasses.asdict(row)})
            ratio = f"{row.ratio:.4f} ± {row.ratio_error:.4f}"
            variances = (f"{row.measured:.4g}", f"{row.predicted:.4g}", ratio)
            lines.append([cell.algorithm, _short(row.layer), *variances])
    heads = ("algorithm", "layer", "measured", "predicted", "ratio")
    texts = [markdown(heads, lines, names=2), _falls(cells)]
    return Presented(_figure(cells), rows, "\n".join(texts))


def _falls(cells: Sequence[VarianceCell]) -> str:
    """How far each total variance, relative to the gradient, is below the first one's."""
    first, lines = cells[0].layers[-1], []
    for cell in cells:
        row = cell.layers[-1]
        measured, predicted = row.measured / row.norm**2, row.predicted / row.norm**2
        factor = first.measured / first.norm**2 / measured
        error = factor * math.hypot(*(r.measured_error / r.measured for r in (first, row)))
        fall = "1" if row is first else f"{factor:.4g} ± {error:.2g}"
        theory = first.predicted / first.norm**2 / predicted
        numbers = (f"{n:.4g}" for n in (row.norm**2, measured, predicted))
        lines.append([cell.algorithm, *numbers, fall, f"{theory:.4g}"])
    measured = f"{cells[0].algorithm}'s / it, measured"
    heads = ("algorithm", "‖g‖²", "V/‖g‖², measured", "predicted", measured, "predicted")
    return markdown(heads, lines)


def _short(layer: str) -> str:
    return layer.removeprefix(".blocks[0].")


def _figure(cells: Sequence[VarianceCell]) -> Figure:
    """Measured variances with their predictions, and the ratios of both."""
    figure, ((left, right),) = panels(1, 2, size=(12, 4.2))
    for i, cell in enumerate(cells):
        places = np.arange(len(cell.layers)) + 0.6 * ((i + 0.5) / len(cells) - 0.5)
        color, _, marker = look(cell.algorithm)
        style = {"fmt": marker, "ms": 4, "capsize": 3, "color": color, "label": cell.algorithm}
        for axes, name in ((left, "measured"), (right, "ratio")):
            values = [getattr(row, name) for row in cell.layers]
            errors = [2 * getattr(row, f"{name}_error") for row in cell.layers]
            axes.errorbar(places, values, yerr=errors, **style)
        label = None if i else "predicted"
        left.plot(places, [row.predicted for row in cell.layers], "_k", ms=14, label=label)
    left.set(ylabel="total variance of one estimate", yscale="log")
    right.axhline(1, color="k", lw=0.8)
    right.set(ylabel="measured / predicted (± 2 standard errors)")
    left.legend(ncols=2)
    names = [_short(row.layer) for row in cells[0].layers]
    for axes in (left, right):
        axes.set_xticks(range(len(names)), names, rotation=20)
    return figure


VARIANCE = Experiment(
    "variance",
    "variance of forward gradients, measured and predicted",
    VarianceOptions,
    Cells(
        kind=VarianceCell,
        plan=_plan,
        make=_make,
        present=_present,
        same=("dataset", "network", "samples", "batch_size", "seed"),
    ),
)
