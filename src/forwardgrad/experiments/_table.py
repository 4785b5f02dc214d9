"""Tables of algorithms and networks: every cell is a run of `forwardgrad train`."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from forwardgrad._console import Console
from forwardgrad._errors import InputError, unknown_name
from forwardgrad._files import write_json, write_text
from forwardgrad._provenance import provenance
from forwardgrad.experiments._cells import over_seeds, read_out, trained
from forwardgrad.experiments._experiment import options_as_json, stored_cells
from forwardgrad.experiments._table_files import ALGORITHMS, ROWS, UNTRAINED, as_csv, markdown, plot
from forwardgrad.training import TrainConfig


@dataclasses.dataclass(frozen=True)
class Column:
    """A network on a data set, and the paper's test errors (per cent) in the rows' order."""

    dataset: str
    network: str
    paper: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """How the column is headed."""
        return f"{self.dataset} {self.network}"


@dataclasses.dataclass(frozen=True)
class Table:
    """Which table, and what its cells have in common.

    `settings` are those of every run; `same` the options that all stored cells share; `examples`
    those that readouts are fitted on; `papers` the paper's numbers by column.
    """

    name: str
    columns: Sequence[Column]
    options: Any
    out: Path
    error: str = "test error"
    papers: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    same: tuple[str, ...] = ("epochs", "batch_size")
    examples: int | None = None

    def config(self, column: Column, algorithm: str, seed: int) -> TrainConfig:
        """The settings of a cell."""
        folder = f"{column.dataset}-{column.network.replace('/', '-')}-{algorithm}-{seed}"
        return TrainConfig(
            dataset=column.dataset,
            network=column.network,
            algorithm=algorithm,
            seed=seed,
            epochs=self.options.epochs,
            batch_size=self.options.batch_size,
            out=self.out / "runs" / folder,
            data_dir=self.options.data_dir,
            **self.settings,
        )


def run_table(table: Table, rows: Sequence[str]) -> Path:
    """Run a table with any of `rows`, or what is missing of it; returns its folder."""
    options = table.options
    if options.seeds < 1:
        raise InputError(f"seeds must be at least 1, got {options.seeds}")
    for algorithm in options.algorithms:
        if algorithm not in rows:
            raise unknown_name("algorithm", algorithm, rows)
    console, path = Console(), table.out / f"{table.name}.json"
    # Cells of earlier calls in the same folder stay in the table.
    earlier = stored_cells(path, options, same=table.same) or ()
    cells = {(c["column"], c["algorithm"], c["seed"]): c for c in earlier}
    for column, algorithm, seed in _order(table):
        place = (column.name, algorithm, seed)
        if place not in cells:
            cell = _cell(table, column, algorithm, seed, console)
            console.print(f"{column.name}, {algorithm}, seed {seed}: {cell['test_error']:.2f} %")
            cells[place] = dict(zip(_PLACE, place, strict=True)) | cell
        _write(table, list(cells.values()))
    text = (table.out / f"{table.name}.md").read_text(encoding="utf-8")
    console.print(text, highlight=False)
    return table.out


_PLACE = ("column", "algorithm", "seed")


def _order(table: Table) -> Iterator[tuple[Column, str, int]]:
    """Seed by seed: the table is complete early, and gets more exact."""
    for seed in range(table.options.seeds):
        for column in table.columns:
            # Untrained features are read from the folder of a run.
            for algorithm in sorted(table.options.algorithms, key=lambda name: name == UNTRAINED):
                yield column, algorithm, seed


def _cell(
    table: Table, column: Column, algorithm: str, seed: int, console: Console
) -> dict[str, Any]:
    if algorithm != UNTRAINED:
        config = table.config(column, algorithm, seed)
        return trained(config, examples=table.examples, console=console)
    for other in ALGORITHMS:
        folder = table.config(column, other, seed).out
        if folder is not None and (folder / "summary.json").exists():
            options = {"examples": table.examples, "data_dir": table.options.data_dir}
            return {**read_out(folder, **options, untrained=True), "seconds": 0.0}
    raise InputError(
        f"algorithm {UNTRAINED!r} needs a finished run of {column.name} with seed {seed} in "
        f"{table.out / 'runs'}: add another algorithm"
    )


def _write(table: Table, cells: list[dict[str, Any]]) -> None:
    """The table so far, as JSON, Markdown and CSV, and its figure."""
    header = {"experiment": table.name, "options": options_as_json(table.options), **provenance()}
    rows = _rows(table, cells)
    files = table.out / table.name
    write_json(files.with_suffix(".json"), {**header, "cells": cells, "table": rows})
    write_text(files.with_suffix(".md"), markdown(rows))
    write_text(files.with_suffix(".csv"), as_csv(rows))
    plot(files.with_suffix(".png"), rows, table.error)


def _rows(table: Table, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of the test error, and the paper's."""
    rows = over_seeds(cells, by=("column", "algorithm"))
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    rows.sort(key=lambda row: (columns.index(row["column"]), ROWS.index(row["algorithm"])))
    return [{**row, "paper": _paper(table, row)} for row in rows]


def _paper(table: Table, row: dict[str, Any]) -> float | None:
    """What the paper has in that place."""
    numbers = dict(zip(ALGORITHMS, table.papers.get(row["column"], ()), strict=False))
    return numbers.get(row["algorithm"])
