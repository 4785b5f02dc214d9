"""What blockwise, patchwise and groupwise losses each bring (Ren et al. 2023, Section 6).

Command: `forwardgrad reproduce ablation`. Greedy local losses with perturbed activations, on
LocalMixers with more and more channel groups: all local losses, each kind left out in turn, and
one loss for the whole network. Every cell is a run of `forwardgrad train` in a folder of its own,
so an interrupted ablation continues where it was.

The paper's figure shows that the error falls with the number of groups, and that each kind of
local loss lowers it.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from forwardgrad._console import Console
from forwardgrad._errors import InputError, unknown_name
from forwardgrad._files import write_json, write_text
from forwardgrad._provenance import provenance
from forwardgrad.experiments._cells import over_seeds, trained
from forwardgrad.experiments._experiment import Experiment, options_as_json, stored_cells
from forwardgrad.experiments._figures import save
from forwardgrad.training import TrainConfig
from forwardgrad.training._config import Optimizer, Task

SETTINGS: dict[str, tuple[str, str]] = {
    "mnist": ("mnist", "s/4"),
    "cifar10": ("cifar10", "s/8"),
    "digits": ("digits", "s/2"),
    "paper": ("cifar10", "m/8"),
}
"""Data set, and size and patches of the networks."""

VARIANTS: dict[str, dict[str, Any]] = {
    "all local losses": {},
    "not by block": {"blockwise": False},
    "not by patch": {"patchwise": False},
    "not by group": {"groupwise": False},
    "not by patch or group": {"patchwise": False, "groupwise": False},
    "global loss": {"algorithm": "fg-a"},
}
"""What is left out."""

BACKPROP = "backpropagation"
"""A line to compare with: exact gradients of the global loss."""

LINES = {**VARIANTS, BACKPROP: {"algorithm": "bp"}}


@dataclasses.dataclass(frozen=True)
class AblationOptions:
    """Settings of `reproduce ablation`."""

    settings: tuple[str, ...] = ("mnist", "cifar10")
    """Data sets with networks: mnist (s/4), cifar10 (s/8), digits (s/2), paper (cifar10, m/8)."""
    tasks: tuple[Task, ...] = ("supervised",)
    """supervised, contrastive."""
    groups: tuple[int, ...] = (1, 4, 16, 64)
    """Numbers of channel groups."""
    variants: tuple[str, ...] = tuple(LINES)
    """Which losses are left out, one line each; backpropagation to compare with."""
    out: Path = Path("runs/reproduce/ablation")
    """Folder of the results."""
    data_dir: Path | None = None
    """Folder with DATASET/{train,test}.parquet. Default: $FORWARDGRAD_DATA, or the hub is asked."""
    epochs: int = 3
    """Passes over the training set."""
    iterations: int | None = None
    """Stop after this many steps instead."""
    batch_size: int = 128
    """Examples per step."""
    optimizer: Optimizer = "adam"
    """Optimiser; sgd is unstable at the heads of several blocks at first."""
    learning_rate: float = 2e-3
    """Learning rate at the start."""
    tangents: int = 1
    """Tangents whose forward gradients are averaged in a step."""
    seeds: int = 3
    """Runs of each cell."""


def run_ablation(options: AblationOptions) -> Path:
    """Run the ablation, or what is missing of it, and return the folder of its results."""
    _check(options)
    console, path = Console(), options.out / "ablation.json"
    same = ("epochs", "iterations", "batch_size", "optimizer", "learning_rate", "tangents")
    stored = stored_cells(path, options, same=same) or ()
    cells = {tuple(cell[k] for k in _PLACE): cell for cell in stored}
    for place in _order(options):
        if place not in cells:
            cell = trained(_config(options, *place), console=console)
            console.print(f"{', '.join(map(str, place))}: {cell['test_error']:.2f} %")
            cells[place] = dict(zip(_PLACE, place, strict=True)) | cell
            _write(options, list(cells.values()))
    _write(options, list(cells.values()))
    return options.out


_PLACE = ("task", "setting", "variant", "groups", "seed")


def _check(options: AblationOptions) -> None:
    known = {
        "settings": SETTINGS,
        "tasks": ("supervised", "contrastive"),
        "variants": LINES,
    }
    for field, names in known.items():
        for name in getattr(options, field):
            if name not in names:
                raise unknown_name(field.removesuffix("s"), name, names)
    if options.seeds < 1:
        raise InputError(f"seeds must be at least 1, got {options.seeds}")


def _order(options: AblationOptions) -> Iterator[tuple[Task, str, str, int, int]]:
    """Seed by seed: the figure is complete early, and gets more exact."""
    for seed in range(options.seeds):
        for task in options.tasks:
            for setting in options.settings:
                for variant in options.variants:
                    for groups in options.groups:
                        yield task, setting, variant, groups, seed


def _config(
    options: AblationOptions, task: Task, setting: str, variant: str, groups: int, seed: int
) -> TrainConfig:
    dataset, size = SETTINGS[setting]
    folder = f"{task}-{setting}-{variant.replace(' ', '-')}-{groups}-{seed}"
    algorithm = {"algorithm": "lg-fg-a", "tangents": options.tangents, **LINES[variant]}
    return TrainConfig(
        task=task,
        dataset=dataset,
        network=f"{size}/{groups}",
        seed=seed,
        epochs=options.epochs,
        iterations=options.iterations,
        batch_size=options.batch_size,
        optimizer=options.optimizer,
        learning_rate=options.learning_rate,
        out=options.out / "runs" / folder,
        data_dir=options.data_dir,
        **algorithm,
    )


def _write(options: AblationOptions, cells: list[dict[str, Any]]) -> None:
    header = {"experiment": "ablation", "options": options_as_json(options), **provenance()}
    rows = over_seeds(cells, by=_PLACE[:-1])
    write_json(options.out / "ablation.json", {**header, "cells": cells, "table": rows})
    write_text(options.out / "ablation.md", _markdown(rows))
    _plot(options.out / "ablation.png", rows)


def _panels(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["task"], row["setting"]) for row in rows))


def _title(task: str, setting: str) -> str:
    dataset, size = SETTINGS[setting]
    return f"{dataset}, {size}/groups, {task}"


def _markdown(rows: list[dict[str, Any]]) -> str:
    """A table for each panel: a row a variant, a column a number of groups."""
    return "\n".join(_panel_as_text(rows, *panel) for panel in _panels(rows))


def _panel_as_text(rows: list[dict[str, Any]], task: str, setting: str) -> str:
    own = [row for row in rows if (row["task"], row["setting"]) == (task, setting)]
    groups = sorted({row["groups"] for row in own})
    errors = {(row["variant"], row["groups"]): _entry(row) for row in own}
    lines = [f"**{_title(task, setting)}**", ""]
    lines += [f"| groups | {' | '.join(map(str, groups))} |", f"|---|{'--:|' * len(groups)}"]
    for variant in (name for name in LINES if any(row["variant"] == name for row in own)):
        entries = [errors.get((variant, g), "") for g in groups]
        lines.append(f"| {' | '.join([variant, *entries])} |")
    return "\n".join(lines) + "\n"


def _entry(row: dict[str, Any]) -> str:
    spread = f" ± {row['test_error_std']:.2f}" if row["seeds"] > 1 else ""
    return f"{row['test_error_mean']:.2f}{spread}"


def _plot(path: Path, rows: list[dict[str, Any]]) -> None:
    panels = _panels(rows)
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for variant in LINES:
            own = [r for r in rows if (r["task"], r["setting"], r["variant"]) == (*panel, variant)]
            own.sort(key=lambda row: row["groups"])
            if own:
                axes.errorbar(
                    [row["groups"] for row in own],
                    [row["test_error_mean"] for row in own],
                    yerr=[row["test_error_std"] for row in own],
                    marker=".",
                    capsize=2,
                    label=variant,
                    **_STYLES[variant],
                )
        ticks = sorted({r["groups"] for r in rows if (r["task"], r["setting"]) == panel})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(g) for g in ticks])
        axes.set(xlabel="channel groups", ylabel="test error (%)", title=_title(*panel))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    save(figure, path)


_STYLES: dict[str, dict[str, Any]] = {
    "all local losses": {"color": "tab:red", "linewidth": 2.2},
    "not by block": {"color": "tab:purple"},
    "not by patch": {"color": "tab:orange"},
    "not by group": {"color": "tab:green"},
    "not by patch or group": {"color": "tab:olive"},
    "global loss": {"color": "tab:gray", "linestyle": "--"},
    BACKPROP: {"color": "tab:blue", "linestyle": ":"},
}

ABLATION = Experiment(
    "ablation", "what losses by block, patch and group each bring", AblationOptions, run_ablation
)
