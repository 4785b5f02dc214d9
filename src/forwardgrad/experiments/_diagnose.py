"""How good the gradients of a training run are, algorithm by algorithm.

Command: `forwardgrad diagnose`. Half a minute for three algorithms on m/1/16 and two cores.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from matplotlib.figure import Figure

from forwardgrad._diagnose import diagnose
from forwardgrad._diagnosis import Diagnosis, DiagnosisRow
from forwardgrad._errors import InputError
from forwardgrad._provenance import provenance
from forwardgrad.results import look, save, write
from forwardgrad.results._figures import panels
from forwardgrad.training import Problem, TrainConfig, load_run, problem
from forwardgrad.training._config import Task, fitting, options_of

BATCH_SIZE = 128


@dataclasses.dataclass(frozen=True)
class DiagnoseOptions:
    """Settings of `diagnose`; None where the stored run's are meant, or train's defaults."""

    task: Task | None = None
    """supervised or contrastive, as for train."""
    dataset: str | None = None
    """Data set, as for train."""
    network: str | None = None
    """Network, as for train."""
    algorithms: tuple[str, ...] = ()
    """Algorithms, as for train. Default: that of the run."""
    run: Path | None = None
    """Folder of a stored run, whose settings and weights are taken instead of initial ones."""
    samples: int = 256
    """Estimates of the gradient, an even number."""
    batch_size: int | None = None
    """Examples in the batch, the first of the seed's order. Default: 128, or the run's."""
    seed: int | None = None
    """Seed of the initial weights, the order of the examples and the estimates."""
    tangents: int | None = None
    """K: tangents that an estimate is the average over."""
    out: Path = Path("runs/diagnose")
    """Folder of diagnosis.json and diagnosis.png."""
    label_column: str | None = None
    """Column of the labels, as for train."""
    image_size: int | None = None
    """Height and width of the images, as for train."""
    stream: bool | None = None
    """Make no copy in the cache, as for train."""
    data_dir: Path | None = None
    """Folder with DATASET/{train,test}.parquet. Default: $FORWARDGRAD_DATA, or the hub is asked."""


def run_diagnose(options: DiagnoseOptions) -> dict[str, Diagnosis]:
    """Diagnose the gradient of every algorithm.

    The numbers and a figure are left in `options.out`.

    **Returns:**

    The diagnoses, by algorithm.

    **Raises:**

    `InputError` if a setting, the run or a file cannot be used.
    """
    stored, given, network = _settings(options)
    names = options.algorithms or [stored["algorithm"]]
    configs = [_with_algorithm(stored, given, name) for name in names]
    diagnoses = {
        config.algorithm: diagnosis_of(problem(config, network), config.seed, options.samples)
        for config in configs
    }
    entries = [{"algorithm": name, **found.as_json()} for name, found in diagnoses.items()]
    settings = {k: getattr(configs[0], k) for k in _SHARED}
    settings["weights"] = "initial" if options.run is None else f"of run {options.run.name}"
    header = {"experiment": "diagnose", "options": settings, **provenance()}
    write(options.out / "diagnosis.json", {**header, "diagnoses": entries})
    figure = plot_diagnoses(diagnoses, "{network}, {dataset}, {task}".format(**settings))
    save(figure, options.out / "diagnosis.png")
    return diagnoses


_OF_THE_ALGORITHM = ("learning_rate", "momentum", "tangents", "exact_last")
_SHARED = ("task", "dataset", "network", "batch_size", "seed")


def _settings(
    options: DiagnoseOptions,
) -> tuple[dict[str, Any], dict[str, Any], eqx.Module | None]:
    """The options of the run, those that are given, and the stored network, if any."""
    names = ("batch_size", "data_dir", "dataset", "image_size", "label_column", "network")
    names += ("seed", "stream", "tangents", "task")
    given = {k: getattr(options, k) for k in names if getattr(options, k) is not None}
    if options.run is None:
        return {"algorithm": "fg-w", "batch_size": BATCH_SIZE}, given, None
    for name in ("task", "dataset", "label_column", "image_size", "stream", "network", "seed"):
        if name in given:
            raise InputError(f"{name} (={given[name]}) is set by the run in {options.run}")
    config, network = load_run(options.run, data_dir=options.data_dir)
    return options_of(config), given, network


def _with_algorithm(stored: dict[str, Any], given: dict[str, Any], name: str) -> TrainConfig:
    if name != stored["algorithm"]:
        # The others are those that suit its own algorithm.
        stored = {k: v for k, v in stored.items() if k not in _OF_THE_ALGORITHM}
    return fitting(**{**stored, **given, "algorithm": name})


def diagnosis_of(step: Problem, seed: int, samples: int) -> Diagnosis:
    """How good the gradients of a training step are."""
    # A key apart from those that the run itself draws from.
    arguments = {"key": jax.random.fold_in(jax.random.key(seed), 1), "has_aux": True}
    return diagnose(
        step.loss, step.estimator, step.params, *step.batch, samples=samples, **arguments
    )


def plot_diagnoses(diagnoses: Mapping[str, Diagnosis], title: str) -> Figure:
    """Cosine, relative variance and bias of every layer, a colour and a mark an algorithm."""
    # The heads of local losses are not in every network.
    most_first = sorted(diagnoses.values(), key=lambda diagnosis: -len(diagnosis.rows))
    names = [*dict.fromkeys(row.name for diagnosis in most_first for row in diagnosis.rows)]
    height = 1.5 + len(names) * (0.2 + 0.11 * len(diagnoses))
    figure, (axes,) = panels(1, 3, size=(13, height), sharey=True)
    cosine, variance, bias = axes
    for i, (name, diagnosis) in enumerate(diagnoses.items()):
        own = np.array([names.index(row.name) for row in diagnosis.rows])
        places = own + 0.7 * ((i + 0.5) / len(diagnoses) - 0.5)
        color, _, marker = look(name)
        style = {"fmt": marker, "ms": 4, "capsize": 2, "color": color, "label": name}
        intervals = np.array([_intervals(row) for row in diagnosis.rows], float)
        for each, (low, middle, high) in zip(axes, intervals.transpose(1, 2, 0), strict=True):
            each.errorbar(middle, places, xerr=(middle - low, high - middle), **style)
    cosine.set(xlabel="cosine with the exact gradient, mean over estimates", xlim=(None, 1.05))
    cosine.set_yticks(range(len(names)), names)
    cosine.invert_yaxis()
    variance.set(xlabel="variance / ‖exact gradient‖²")
    if any(row.variance for diagnosis in diagnoses.values() for row in diagnosis.rows):
        variance.set_xscale("log")
    bias.set(xlabel="bias / ‖exact gradient‖")
    bias.set_xscale("symlog", linthresh=0.01)
    bias.set_xlim(left=-1e-3)
    figure.legend(*cosine.get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(f"{title}; error bars are two standard errors")
    return figure


def _intervals(row: DiagnosisRow) -> list[np.ndarray]:
    """Cosine, relative variance and bias, each between the ends of its error bar; NaN for none."""
    norm, ends = row.norm or np.nan, np.array([-2, 0, 2])
    cosine = np.nan if row.cosine is None else row.cosine + ends * (row.cosine_error or 0)
    variance = row.variance + ends * row.variance_error if row.variance else np.nan
    bias = np.maximum(row.bias_squared + ends * row.bias_squared_error, 0) ** 0.5
    return [part * np.ones(3) for part in (cosine, variance / norm**2, bias / norm)]
