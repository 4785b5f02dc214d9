"""Stored tables, in the paper's form; and the table of all runs."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from forwardgrad.experiments import Cells, as_options, in_order
from forwardgrad.results import Cell, Entry, Grid, Place, Table, TableCell, over_seeds
from forwardgrad.training import Run, configure
from forwardgrad.training._config import of_the_result


@dataclasses.dataclass(frozen=True)
class StoredTable:
    """A file of cells, and how the experiment presents them."""

    path: Path
    grid: Grid[Any, Any]
    cells: Cells

    @cached_property
    def table(self) -> Table:
        """Means over seeds, beside the paper's."""
        return Table(over_seeds(self.grid.cells), self.cells.papers)

    @cached_property
    def options(self) -> dict[str, Any]:
        """Those of the last call, as JSON values."""
        given = self.grid.options
        return given if isinstance(given, dict) else as_options(given)

    @property
    def title(self) -> str:
        """What the table is, and its folder."""
        return f"{self.cells.title or self.grid.experiment}: {self.path.parent.as_posix()}"

    @property
    def seeds(self) -> int:
        """How many a complete table has: what is asked for, or what a cell has."""
        asked = self.options.get("seeds")
        return max([asked if isinstance(asked, int) else 1, *(c.seed + 1 for c in self.grid.cells)])

    @cached_property
    def rows(self) -> list[tuple[str, ...]]:
        """Those of a complete table."""
        stored = list(dict.fromkeys(place.row for place in self.table.means))
        if self.cells.kind is not TableCell:
            return stored
        asked = self.options.get("algorithms")
        names = [*asked] if isinstance(asked, list) else []
        names += [row[0] for row in (*stored, *(place.row for place in self.cells.papers))]
        return [(name,) for name in in_order(names)]

    def entries(self, row: tuple[str, ...]) -> list[tuple[str, Entry, str]]:
        """For each column its name, its entry, and from how many seeds that is."""
        found = []
        for column in self.table.columns:
            mean, wanted = self.table.means.get(Place(column, row)), self.seeds
            count = len(mean.cells) if mean else 0
            seeds = f"{count if count == wanted else f'{count} of {wanted}'} seed"
            seeds = f"{seeds}{'s' * (wanted > 1)}" if mean else "missing"
            found.append((column, self.table.entry(column, row), seeds))
        return found

    def has(self, run: Run) -> bool:
        """Whether a run is that of one of the table's cells."""
        inside = (self.path.parent / "runs").resolve() in run.folder.resolve().parents
        return inside and place(run) in {(cell.place, cell.seed) for cell in self.grid.cells}

    @property
    def facts(self) -> dict[str, str]:
        """Origin and options, apart from what the table shows itself."""
        shown, facts = {"columns", "algorithms", "dataset", "network"}, self.grid.facts
        for name in [n for n, v in self.options.items() if n not in shown and v is not None]:
            value = self.options[name]
            values = value if isinstance(value, list) else [value]
            facts[name.replace("_", " ")] = ", ".join(map(str, values))
        return facts


def place(run: Run) -> tuple[Place, int]:
    """Where the run stands in a table that it belongs to."""
    config = run.config
    return Place(f"{config.dataset} {config.network}", (config.algorithm,)), config.seed


def column(run: Run) -> str:
    """Task, unless it is the usual one, data set and network."""
    task = "" if run.config.task == "supervised" else f"{run.config.task} "
    return f"{task}{run.config.dataset} {run.config.network}"


HEADS = (
    *("data set and network", "algorithm", "seed", "test error (%)", "train error (%)"),
    *("seconds", "state", "epochs", "batch size", "learning rate", "tangents", "other settings"),
    *("backend", "date", "where"),
)

_SHOWN = (
    *("dataset", "network", "algorithm", "seed", "epochs", "batch_size", "learning_rate"),
    *("tangents", "task", "log_every"),
)


def rows(runs: Sequence[Run], tables: Sequence[StoredTable]) -> list[list[str]]:
    """A row for every run that has a folder, and for every cell of a table that has none."""
    found = [_of_run(run) for run in runs]
    for table in tables:
        own = {place(run) for run in runs if table.has(run)}
        cells = (cell for cell in table.grid.cells if (cell.place, cell.seed) not in own)
        found += [_of_cell(table, cell) for cell in cells]
    return [["" if value is None else str(value) for value in row] for row in found]


def progress(run: Run) -> str:
    """Where a run has stopped that is not finished."""
    last = run.measurements[-1] if run.measurements else None
    after = f" after {last.epoch:.4g} of {run.config.epochs} epochs" if last and last.epoch else ""
    if run.state == "diverged":
        because = f": {last.reason}" if last and last.reason else ""
        return f"diverged{after}{because}. A smaller learning rate or clip may help."
    return f"interrupted, or still running,{after or ' before the end of the first epoch'}."


def _of_run(run: Run) -> list[Any]:
    config, end = run.config, run.summary
    tested = [line for line in run.measurements if line.test_error is not None]
    settings, usual = of_the_result(config), of_the_result(configure())
    others = {k: v for k, v in settings.items() if v not in (None, usual.get(k))}
    rate, tangents = settings["learning_rate"], settings.get("tangents")
    return [
        *(column(run), config.algorithm, config.seed, *_results(end or (tested or [None])[-1])),
        *(run.state, config.epochs, config.batch_size, rate, tangents),
        *(_words(others), end and end.backend, end and end.date, run.folder.as_posix()),
    ]


def _of_cell(table: StoredTable, cell: Cell) -> list[Any]:
    others = {k: v for k in ("momentum", "exact_last") if (v := getattr(cell, k))}
    return [
        *(cell.place.column, ", ".join(cell.place.row), cell.seed, *_results(cell)),
        *("finished", table.options.get("epochs"), table.options.get("batch_size")),
        *(cell.learning_rate, cell.tangents, _words(others)),
        *(table.grid.backend, cell.date, table.path.as_posix()),
    ]


def _results(end: Any) -> list[str]:
    values = [getattr(end, name, None) for name in ("test_error", "train_error", "seconds")]
    return ["" if value is None else f"{value:.2f}" for value in values]


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name not in _SHOWN)
