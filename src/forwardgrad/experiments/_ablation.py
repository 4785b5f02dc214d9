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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from matplotlib.figure import Figure

from forwardgrad.experiments._experiment import (
    Cells,
    Experiment,
    Job,
    Presented,
    RunOptions,
    check_names,
    run_config,
)
from forwardgrad.results import AblationCell, Mean, Place, Table, over_seeds
from forwardgrad.results._figures import panels
from forwardgrad.training._config import Optimizer, Task

SETTINGS: dict[str, tuple[str, str]] = {
    "mnist": ("mnist", "s/4"),
    "cifar10": ("cifar10", "s/8"),
    "digits": ("digits", "s/2"),
    "paper": ("cifar10", "m/8"),
}
"""Data set, and size and patches of the networks."""

LINES: dict[str, dict[str, Any]] = {
    "all local losses": {"algorithm": "lg-fg-a"},
    "not by block": {"algorithm": "lg-fg-a", "blockwise": False},
    "not by patch": {"algorithm": "lg-fg-a", "patchwise": False},
    "not by group": {"algorithm": "lg-fg-a", "groupwise": False},
    "not by patch or group": {"algorithm": "lg-fg-a", "patchwise": False, "groupwise": False},
    "global loss": {"algorithm": "fg-a"},
    "backpropagation": {"algorithm": "bp"},
}
"""What is left out; last, exact gradients of the global loss, to compare with."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationOptions(RunOptions):
    """Settings of `reproduce ablation`."""

    settings: tuple[str, ...] = ("mnist", "cifar10")
    """Data sets with networks: mnist (s/4), cifar10 (s/8), digits (s/2), paper (cifar10, m/8)."""
    tasks: tuple[Task, ...] = ("supervised",)
    """supervised, contrastive."""
    groups: tuple[int, ...] = (1, 4, 16, 64)
    """Numbers of channel groups."""
    variants: tuple[str, ...] = tuple(LINES)
    """Which losses are left out, one line each; backpropagation to compare with."""
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
    check_names("setting", options.settings, SETTINGS)
    check_names("task", options.tasks, get_args(Task))
    check_names("variant", options.variants, LINES)
    parts = (options.tasks, options.settings, options.variants, options.groups)
    for seed, task, setting, variant, groups in itertools.product(range(options.seeds), *parts):
        place = {"task": task, "setting": setting, "variant": variant, "groups": groups}
        dataset, size = SETTINGS[setting]
        what = {"task": task, "dataset": dataset, "network": f"{size}/{groups}", "seed": seed}
        yield Job(place, seed, run_config(options, **{**what, **LINES[variant]}))


def _present(cells: Sequence[AblationCell]) -> Presented:
    """A table and a picture for each task and setting: a row a variant, a column a number."""
    found: dict[str, dict[Place, Mean[AblationCell]]] = {}
    for mean in over_seeds(sorted(cells, key=lambda cell: cell.groups)).values():
        cell = mean.cells[0]
        title = "{}, {}/groups, {}".format(*SETTINGS[cell.setting], cell.task)
        found.setdefault(title, {})[Place(str(cell.groups), (cell.variant,))] = mean
    tables = {title: Table(means, {}) for title, means in found.items()}
    texts = [f"**{title}**\n\n{t.text('groups', _lines(t))}" for title, t in tables.items()]
    rows = [mean.row for mean in over_seeds(cells).values()]
    return Presented(_figure(tables), rows, "\n".join(texts))


def _lines(table: Table) -> list[str]:
    stored = {place.row for place in table.means}
    return [name for name in LINES if (name,) in stored]


def _figure(tables: Mapping[str, Table]) -> Figure:
    figure, every = panels(1, len(tables), size=(5.5 * len(tables), 4.2))
    for axes, (title, table) in zip(every[0], tables.items(), strict=True):
        for name in _lines(table):
            own = {int(p.column): mean for p, mean in table.means.items() if p.row == (name,)}
            errors, spreads = ([getattr(m, k) for m in own.values()] for k in ("error", "spread"))
            style = {"color": f"C{list(LINES).index(name)}", "marker": ".", "capsize": 2}
            axes.errorbar(list(own), errors, yerr=spreads, label=name, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(map(int, table.columns)), table.columns)
        axes.set(xlabel="channel groups", ylabel="test error (%)", title=title)
    figure.axes[0].legend(fontsize=8)
    return figure


ABLATION = Experiment(
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
