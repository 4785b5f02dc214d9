"""What a table lacks, and the commands that fill it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from forwardgrad.experiments import as_options, in_order, is_row
from forwardgrad.report._table import StoredTable
from forwardgrad.results import Place, TableCell
from forwardgrad.results._tables import grouped
from forwardgrad.training import command


class Gap(NamedTuple):
    """Cells that are missing, by their places and seeds, and the command that fills just these."""

    cells: list[tuple[Place, int]]
    command: str

    @property
    def texts(self) -> list[str]:
        """What is missing, a line for each column and its seeds."""
        lines: dict[tuple[str, str], list[str]] = {}
        for place, cells in grouped(self.cells, lambda cell: cell[0]).items():
            text = f"seed{'s' * (len(cells) > 1)} {', '.join(str(seed) for _, seed in cells)}"
            lines.setdefault((place.column, text), []).append(" ".join(place.row))
        return [f"{column}: {', '.join(rows)}; {text}" for (column, text), rows in lines.items()]


def gaps(table: StoredTable, tables: Sequence[StoredTable]) -> list[Gap]:
    """What a table's options ask for, or the paper has, and is not stored.

    A column of the paper that is in none of `tables` is missing in the first of them that
    reproduces the same table.

    **Raises:**

    `InputError` if the options are none that the experiment can have.
    """
    stored, found = {(cell.place, cell.seed) for cell in table.grid.cells}, []
    for options in _complete(table, tables):
        jobs = [(table.cells.kind.at(job.place), job.seed) for job in table.cells.jobs(options)]
        if missing := [job for job in jobs if job not in stored]:
            found.append(Gap(missing, _command(table, options, missing)))
    return found


def _complete(table: StoredTable, tables: Sequence[StoredTable]) -> Iterator[Any]:
    """The options that a complete table, or each column of it, would be made with."""
    options = table.grid.options
    if table.cells.kind is not TableCell:
        yield options
    elif not isinstance(options, dict):
        names = tuple(row[0] for row in table.rows if is_row(row[0]))
        options = dataclasses.replace(options, algorithms=names, seeds=table.seeds)
        if table.cells.columns:
            yield dataclasses.replace(options, columns=_columns(table, tables))
            return
        for column in dict.fromkeys([*table.table.columns, f"{options.dataset} {options.network}"]):
            # A network's name has no space, a folder's may.
            dataset, _, network = column.rpartition(" ")
            yield dataclasses.replace(options, dataset=dataset, network=network)


def _columns(table: StoredTable, tables: Sequence[StoredTable]) -> tuple[str, ...]:
    """Those that are begun; and of the paper's, in the first table, those that no table has."""
    kin = [other for other in tables if other.cells is table.cells]
    begun = {name for other in kin for name in _begun(other)}
    numbered = [table.cells.columns[place.column] for place in table.cells.papers]
    new = [name for name in numbered if name not in begun and table is kin[0]]
    return tuple(dict.fromkeys([*_begun(table), *new]))


def _begun(table: StoredTable) -> list[str]:
    """Columns that are asked for or have a cell, by what `--columns` calls them."""
    stored = [name for column, name in table.cells.columns.items() if column in table.table.columns]
    return [*table.grid.options.columns, *stored]


def _command(table: StoredTable, options: Any, missing: Sequence[tuple[Place, int]]) -> str:
    """The options, with those columns, algorithms and seeds alone that are missing."""
    chosen: dict[str, Any] = {}
    if table.cells.columns:
        names = [table.cells.columns[place.column] for place, _ in missing]
        chosen["columns"] = list(dict.fromkeys(names))
    elif table.cells.kind is TableCell:
        chosen = {"dataset": options.dataset, "network": options.network}
    if table.cells.kind is TableCell:
        chosen["algorithms"] = in_order([place.row[0] for place, _ in missing])
    chosen["seeds"] = 1 + max(seed for _, seed in missing)
    rest = {k: v for k, v in as_options(options).items() if k not in chosen and v not in (None, [])}
    name = table.grid.experiment
    words = [name] if name == "compare" else ["reproduce", name]
    return command(words, {**chosen, **rest, "out": table.path.parent})
