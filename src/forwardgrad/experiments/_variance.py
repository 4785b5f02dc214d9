"""Measured variances of forward gradients beside what theory says (Ren et al. 2023, Section 3).

Command: `forwardgrad reproduce variance`. Four minutes on two cores.

The paper derives how the variance falls from perturbed weights to perturbed activations, and with
losses for every group of channels. Here the variance of every entry of the gradient is predicted
exactly, for signs, one tangent, and a LocalMixer of one block and one patch, and held against
samples of the estimators as they are.
"""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

from forwardgrad._console import Console
from forwardgrad._diagnose import diagnose
from forwardgrad._diagnosis import Diagnosis
from forwardgrad._errors import InputError, unknown_name
from forwardgrad._files import write_text
from forwardgrad.experiments._experiment import Experiment, header
from forwardgrad.experiments._theory import activity_variances, weight_variances
from forwardgrad.networks import size_of
from forwardgrad.results import markdown, save, write
from forwardgrad.training import Problem, TrainConfig, problem

ALGORITHMS = ("fg-w", "lg-fg-w", "fg-a", "lg-fg-a")


@dataclasses.dataclass(frozen=True)
class VarianceOptions:
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
    out: Path = Path("runs/reproduce/variance")
    """Folder of the results."""
    data_dir: Path | None = None
    """Folder with DATASET/{train,test}.parquet. Default: $FORWARDGRAD_DATA, or the hub is asked."""


def run_variance(options: VarianceOptions) -> Path:
    """Run the experiment, and return the folder of its results."""
    for name in options.algorithms:
        if name not in ALGORITHMS:
            raise unknown_name("algorithm", name, ALGORITHMS)
    size = size_of(options.network)
    if size is None or size.patches > 1:
        raise InputError(
            f"network must be a LocalMixer with one patch, s/1/1 or m/1/16, got {options.network!r}"
        )
    rows: list[Row] = []
    for name in options.algorithms:
        step = problem(_config(name, options))
        predict = weight_variances if name.endswith("w") else activity_variances
        rows += _rows(name, _measured(step, options), predict(step))
        write(options.out / "variance.json", {**header("variance", options), "rows": rows})
    write_text(options.out / "variance.md", _text(rows))
    save(_figure(rows), options.out / "variance.png")
    Console(soft_wrap=True).print(_text(rows), highlight=False)
    return options.out


def _config(algorithm: str, options: VarianceOptions) -> TrainConfig:
    """One tangent, no clipping, and exact gradients for the last layers whatever the algorithm."""
    return TrainConfig(
        dataset=options.dataset,
        network=options.network,
        algorithm=algorithm,
        seed=options.seed,
        batch_size=options.batch_size,
        data_dir=options.data_dir,
        **{"tangents": 1, "clip": None, "exact_last": True},
    )


def _measured(step: Problem, options: VarianceOptions) -> Diagnosis:
    key = jax.random.fold_in(jax.random.key(options.seed), 1)
    settings = {"key": key, "samples": options.samples, "has_aux": True}
    return diagnose(step.loss, step.estimator, step.params, *step.batch, **settings)


@dataclasses.dataclass(frozen=True)
class Row:
    """Measured and predicted total variance of a layer, or of all together."""

    algorithm: str
    layer: str
    norm: float
    measured: float
    measured_error: float
    predicted: float
    ratio: float
    ratio_error: float


def _rows(algorithm: str, diagnosis: Diagnosis, predicted: dict[str, Array]) -> list[Row]:
    """Those of every perturbed layer, and of all."""
    layers = [row for row in diagnosis.layers if row.name in predicted]
    norm = math.sqrt(sum(row.norm**2 for row in layers))
    totals = {name: float(np.sum(np.asarray(v, float))) for name, v in predicted.items()}
    totals["all"] = sum(totals.values())
    # The other layers' gradients are exact: they add nothing to the variance of all.
    return [
        Row(
            algorithm,
            row.name,
            norm if row is diagnosis.total else row.norm,
            row.variance,
            row.variance_error,
            totals[row.name],
            row.variance / totals[row.name],
            row.variance_error / totals[row.name],
        )
        for row in (*layers, diagnosis.total)
    ]


def _text(rows: list[Row]) -> str:
    """Two tables: variances layer by layer; and by which factor they fall."""
    layers = [
        [
            *(r.algorithm, _short(r.layer), f"{r.measured:.4g}", f"{r.predicted:.4g}"),
            f"{r.ratio:.4f} ± {r.ratio_error:.4f}",
        ]
        for r in rows
    ]
    totals = [r for r in rows if r.layer == "all"]
    first = f"{totals[0].algorithm}'s / it, measured"
    heads = ("algorithm", "‖g‖²", "V/‖g‖², measured", "predicted", first, "predicted")
    return "\n".join(
        [
            markdown(["algorithm", "layer", "measured", "predicted", "ratio"], layers, names=2),
            markdown(heads, [_fall(row, totals[0]) for row in totals]),
        ]
    )


def _fall(row: Row, first: Row) -> list[str]:
    """A line of the second table: how far the relative variance is below the first one's."""
    measured, predicted = (
        [getattr(r, kind) / r.norm**2 for r in (first, row)] for kind in ("measured", "predicted")
    )
    factor = measured[0] / measured[1]
    error = factor * math.hypot(*(r.measured_error / r.measured for r in (first, row)))
    fall = "1" if row is first else f"{factor:.4g} ± {error:.2g}"
    numbers = (row.norm**2, measured[1], predicted[1])
    return [
        row.algorithm,
        *(f"{n:.4g}" for n in numbers),
        fall,
        f"{predicted[0] / predicted[1]:.4g}",
    ]


def _short(layer: str) -> str:
    return layer.removeprefix(".blocks[0].")


def _figure(rows: list[Row]) -> Figure:
    names = list(dict.fromkeys(row.algorithm for row in rows))
    layers = list(dict.fromkeys(row.layer for row in rows))
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        own = [row for row in rows if row.algorithm == name]
        places = np.arange(len(layers)) + width * (i - (len(names) - 1) / 2)
        left.bar(places, [row.measured for row in own], width, color=f"C{i}", label=name)
        label = "predicted" if i == len(names) - 1 else None
        predicted = [row.predicted for row in own]
        left.plot(places, predicted, "_k", ms=14, mew=2, label=label)
        ratios, errors = ([getattr(row, k) for row in own] for k in ("ratio", "ratio_error"))
        bars = 2 * np.array(errors)
        right.errorbar(places, ratios, yerr=bars, fmt="o", ms=4, capsize=3, color=f"C{i}")
    left.set(ylabel="total variance of one estimate", yscale="log")
    left.legend(ncols=2)
    right.axhline(1, color="k", lw=0.8)
    right.set(ylabel="measured / predicted (± 2 standard errors)")
    for axes in (left, right):
        axes.set_xticks(range(len(layers)), [_short(layer) for layer in layers], rotation=20)
        axes.grid(axis="y", alpha=0.3)
    return figure


VARIANCE = Experiment(
    "variance",
    "variance of forward gradients, measured and predicted",
    VarianceOptions,
    run_variance,
)
