"""One run of `forwardgrad train`, as a cell of a table; and what many of them amount to."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from forwardgrad._files import read_json
from forwardgrad.training import TrainConfig, fit, fit_readout, readout_file, resolve

_OF_THE_RUN = ("test_error", "train_error", "train_loss", "parameters", "seconds", "date")
_SETTINGS = ("learning_rate", "momentum", "tangents", "exact_last")


def trained(
    config: TrainConfig, *, examples: int | None = None, console: Console | None = None
) -> dict[str, Any]:
    """What a run ends with, and its settings; the run is done, or what is missing of it.

    A contrastive run's errors are those of a readout that is fitted afterwards, on so many
    `examples`; that of the run's own readout is the `online_error`.
    """
    summary = fit(dataclasses.replace(config, resume=True), console=console)
    settings = resolve(config)
    cell = {
        **{k: summary[k] for k in _OF_THE_RUN},
        **{k: getattr(settings, k) for k in _SETTINGS},
    }
    if config.task == "contrastive":
        errors = read_out(Path(summary["out"]), examples=examples, data_dir=config.data_dir)
        cell |= {**errors, "online_error": summary["test_error"]}
    return cell


def read_out(
    folder: Path, *, examples: int | None, data_dir: Path | None, untrained: bool = False
) -> dict[str, float]:
    """The errors of a readout on a run's features, fitted unless that is stored."""
    path = folder / readout_file(untrained)
    stored = read_json(path) if path.exists() else None
    if stored is None or stored["limit"] != examples:
        stored = fit_readout(folder, data_dir=data_dir, examples=examples, untrained=untrained)
    return {name: stored[name] for name in ("test_error", "train_error")}


def over_seeds(cells: Iterable[dict[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """For cells that agree in `by`, the mean and the standard deviation of their test errors."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[k] for k in by), []).append(cell)
    return [
        {
            **dict(zip(by, values, strict=True)),
            "seeds": len(group),
            "test_error_mean": round(float(np.mean([c["test_error"] for c in group])), 4),
            "test_error_std": round(float(np.std([c["test_error"] for c in group])), 4),
            "seconds_median": float(np.median([c["seconds"] for c in group])),
        }
        for values, group in groups.items()
    ]
