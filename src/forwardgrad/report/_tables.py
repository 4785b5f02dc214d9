"""Tables in the paper's form."""

from collections.abc import Iterable, Sequence

import numpy as np

from forwardgrad.report._missing import algorithms, gaps, names, seeds
from forwardgrad.report._paper import ERRORS, TITLES, published
from forwardgrad.report._read import ABLATION
from forwardgrad.report._stored import Cell, Origin, Table
from forwardgrad.report._view import Entry, TableView

Row = tuple[str, ...]


def view(table: Table, tables: Sequence[Table]) -> TableView:
    """Ours beside the paper's: a row an algorithm, a column a network."""
    columns = tuple(dict.fromkeys(cell.place.column for cell in table.cells))
    paper = {**published(table.experiment), **table.paper}
    means = mean_errors(table)
    rows = tuple(
        (row, tuple(_entry(table, column, row, means, paper) for column in columns))
        for row in _rows(table)
    )
    return TableView(
        title=title(table),
        source=table.path.as_posix(),
        caption=f"{_error(table).capitalize()} in per cent, mean ± standard deviation over seeds; "
        "the best of each column is bold",
        heads=table.heads,
        columns=columns,
        papers=tuple(any(place[0] == column for place in paper) for column in columns),
        rows=rows,
        origin=(*origin(table.origin), *_options(table)),
        gaps=gaps(table, tables),
    )


def findings(table: Table) -> list[str]:
    """The best of each column, in a sentence."""
    groups, paper = by_place(table.cells), {**published(table.experiment), **table.paper}
    lines = []
    for column in dict.fromkeys(column for column, _ in groups):
        means = {place: e for place, e in mean_errors(table).items() if place[0] == column}
        place = min(means, key=means.__getitem__)
        name, count = " ".join(filter(None, place[1])), len(groups[place])
        best = f"{name} has the least {_error(table)}, {means[place]:.2f} %"
        over = f" over {count} seeds" if count > 1 else " with one seed"
        theirs = [(error, name) for (c, name), error in paper.items() if c == column]
        beside = f"; in the paper {min(theirs)[1]}, {min(theirs)[0]:.2f} %" if theirs else ""
        lines.append(f"{title(table)}, {column}: {best}{over}{beside}.")
    return lines


def title(table: Table) -> str:
    """What the table is, and its folder."""
    name = TITLES.get(table.experiment, table.experiment)
    return f"{name}: {table.path.parent.as_posix()}"


def mean_errors(table: Table) -> dict[tuple[str, Row], float]:
    """Test errors by column and row, averaged over seeds."""
    groups = by_place(table.cells)
    return {place: float(np.mean([c.test_error for c in g])) for place, g in groups.items()}


def by_place(cells: Iterable[Cell]) -> dict[tuple[str, Row], list[Cell]]:
    """The seeds of each column and row."""
    groups: dict[tuple[str, Row], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.place.column, cell.place.row), []).append(cell)
    return groups


def origin(made: Origin) -> tuple[tuple[str, str], ...]:
    """Date, machine and versions, those that are known."""
    known = {"date": made.date, "machine": made.machine, "versions": made.versions}
    return tuple((name, value) for name, value in known.items() if value)


def _error(table: Table) -> str:
    return ERRORS.get(table.experiment, "test error")


def _rows(table: Table) -> list[Row]:
    stored = list(dict.fromkeys(cell.place.row for cell in table.cells))
    if table.experiment == ABLATION:
        return stored
    return [(algorithm,) for algorithm in algorithms(table)]


def _entry(
    table: Table,
    column: str,
    row: Row,
    means: dict[tuple[str, Row], float],
    paper: dict[tuple[str, str], float],
) -> Entry:
    theirs = paper.get((column, row[0]))
    papers = "" if theirs is None else f"{theirs:.2f}"
    errors = [c.test_error for c in table.cells if c.place[:2] == (column, row)]
    if not errors:
        return Entry(paper=papers, seeds="missing")
    mean, wanted = means[column, row], len(seeds(table))
    spread = f" ± {np.std(errors):.2f}" if len(errors) > 1 else ""
    count = str(len(errors)) if len(errors) == wanted else f"{len(errors)} of {wanted}"
    return Entry(
        error=f"{mean:.2f}{spread}",
        paper=papers,
        seeds=f"{count} seed{'s' if wanted > 1 else ''}",
        best=mean == min(error for (other, _), error in means.items() if other == column),
    )


def _options(table: Table) -> list[tuple[str, str]]:
    """The settings, apart from what the table shows itself."""
    shown = {"columns", "algorithms", "dataset", "network"}
    return [
        (name.replace("_", " "), ", ".join(names(table, name)) or str(value))
        for name, value in table.options.items()
        if name not in shown and value is not None
    ]
