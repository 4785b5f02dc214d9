"""What blockwise, patchwise and groupwise losses each bring (Ren et al. 2023, Section 6).

Command: `forwardgrad reproduce ablation`. Greedy local losses with perturbed activations, on
LocalMixers with more and more channel groups: all local losses, each kind left out in turn, and
one loss for the whole network. Every cell is a run of `forwardgrad train` in a folder of its own,
so an interrupted ablation continues where it was.

The paper's figure shows that the error falls with the number of groups, and that each kind of
local loss lowers it.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from matplotlib.figure import Figure

from forwardgrad._errors import unknown_name
from forwardgrad.experiments._experiment import (
    CellOptions,
    Cells,
    Job,
    Means,
    Presented,
    of_cells,
)
from forwardgrad.results import AblationCell, Mean, markdown
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationOptions(CellOptions):
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


def _plan(options: AblationOptions) -> Iterator[Job]:
    """Seed by seed: the figure is complete early, and gets more exact."""
    tasks = get_args(Task)
    for field, names in (("settings", SETTINGS), ("tasks", tasks), ("variants", LINES)):
        for name in getattr(options, field):
            if name not in names:
                raise unknown_name(field.removesuffix("s"), name, names)
    parts = (options.tasks, options.settings, options.variants, options.groups)
    for seed in range(options.seeds):
        for place in itertools.product(*parts):
            yield _job(options, seed, *place)


def _job(
    options: AblationOptions, seed: int, task: Task, setting: str, variant: str, groups: int
) -> Job:
    dataset, size = SETTINGS[setting]
    folder = f"{task}-{setting}-{variant.replace(' ', '-')}-{groups}-{seed}"
    algorithm = {"algorithm": "lg-fg-a", "tangents": options.tangents, **LINES[variant]}
    config = TrainConfig(
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
    return Job({"task": task, "setting": setting, "variant": variant, "groups": groups}, config)


Panel = dict[tuple[str, int], Mean[AblationCell]]
"""Means by variant and number of groups."""


def _present(means: Means) -> Presented:
    """A table and a picture for each task and setting: a row a variant, a column a number."""
    panels: dict[str, Panel] = {}
    for mean in means.values():
        cell = mean.cells[0]
        title = "{}, {}/groups, {}".format(*SETTINGS[cell.setting], cell.task)
        panels.setdefault(title, {})[cell.variant, cell.groups] = mean
    text = "\n".join(f"**{title}**\n\n{_text(panel)}" for title, panel in panels.items())
    return Presented([mean.row for mean in means.values()], text, _figure(panels))


def _axes(panel: Panel) -> tuple[list[str], list[int]]:
    """The variants and the numbers of groups that there are."""
    variants, groups = (set(each) for each in zip(*panel, strict=True))
    return [name for name in LINES if name in variants], sorted(groups)


def _text(panel: Panel) -> str:
    variants, groups = _axes(panel)
    rows = [
        [name, *(panel[name, g].text if (name, g) in panel else "" for g in groups)]
        for name in variants
    ]
    return markdown(["groups", *map(str, groups)], rows)


def _figure(panels: Mapping[str, Panel]) -> Figure:
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, panel) in zip(every, panels.items(), strict=True):
        variants, groups = _axes(panel)
        for name in variants:
            own = [(g, panel[name, g]) for g in groups if (name, g) in panel]
            errors, spreads = ([getattr(m, k) for _, m in own] for k in ("error", "spread"))
            style = {"marker": ".", "capsize": 2, "label": name, **_STYLES[name]}
            axes.errorbar([g for g, _ in own], errors, yerr=spreads, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(groups, [str(g) for g in groups])
        axes.set(xlabel="channel groups", ylabel="test error (%)", title=title)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    return figure


_STYLES: dict[str, dict[str, Any]] = {
    "all local losses": {"color": "tab:red", "linewidth": 2.2},
    "not by block": {"color": "tab:purple"},
    "not by patch": {"color": "tab:orange"},
    "not by group": {"color": "tab:green"},
    "not by patch or group": {"color": "tab:olive"},
    "global loss": {"color": "tab:gray", "linestyle": "--"},
    BACKPROP: {"color": "tab:blue", "linestyle": ":"},
}

ABLATION = of_cells(
    "ablation",
    "what losses by block, patch and group each bring",
    AblationOptions,
    Cells(
        kind=AblationCell,
        plan=_plan,
        present=_present,
        same=("epochs", "iterations", "batch_size", "optimizer", "learning_rate", "tangents"),
        title="Which local losses help",
    ),
)
