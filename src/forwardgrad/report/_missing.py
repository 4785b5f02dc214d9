"""The cells that a table lacks, and the commands that fill them."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from forwardgrad.report._commands import command
from forwardgrad.report._paper import PAPERS, in_order, published
from forwardgrad.report._read import ABLATION
from forwardgrad.report._stored import Place, Table

COMPARE = "compare"


@dataclasses.dataclass(frozen=True)
class Gap:
    """Cells that are missing, and the command that fills just these."""

    places: tuple[Place, ...]
    command: str

    @property
    def texts(self) -> tuple[str, ...]:
        """What is missing, a line for each column and its seeds."""
        rows: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for column, row, seed in self.places:
            rows.setdefault((column, row), []).append(seed)
        lines: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for (column, row), seeds in rows.items():
            lines.setdefault((column, tuple(seeds)), []).append(" ".join(filter(None, row)))
        return tuple(
            f"{column}: {', '.join(names)}; seed{'s' * (len(seeds) > 1)} {_join(seeds)}"
            for (column, seeds), names in lines.items()
        )


def gaps(table: Table, tables: Sequence[Table]) -> tuple[Gap, ...]:
    """What is missing of a table: what its options ask for, or the paper has, and is not stored.

    Algorithms are those of the options, of the cells and of the paper; seeds as many as the
    options ask for or a cell has. A column of the paper that is in none of `tables` is
    missing in the first of them that reproduces the same table.
    """
    if table.experiment == ABLATION:
        return tuple(_of_ablation(table))
    if table.experiment == COMPARE:
        return tuple(
            gap for column in _columns(table) for gap in _grouped(table, {column: (column,)})
        )
    return tuple(_grouped(table, _selections(table, tables)))


def seeds(table: Table) -> range:
    """The seeds of a table that is complete."""
    return range(max([_seeds_asked(table), *(cell.place.seed + 1 for cell in table.cells)]))


def algorithms(table: Table) -> list[str]:
    """The rows of a table that is complete, in the paper's order."""
    stored = [cell.place.row[0] for cell in table.cells]
    papers = [algorithm for _, algorithm in (*table.paper, *published(table.experiment))]
    return in_order([*names(table, "algorithms"), *stored, *papers])


def names(table: Table, option: str) -> list[str]:
    """An option that is a list of names."""
    value = table.options.get(option)
    return [str(name) for name in value] if isinstance(value, list) else []


def _seeds_asked(table: Table) -> int:
    asked = table.options.get("seeds")
    return asked if isinstance(asked, int) else 1


def _grouped(table: Table, selections: Mapping[str, Sequence[str]]) -> Iterator[Gap]:
    """One command for all algorithms that lack the same seeds of the same columns."""
    stored = {cell.place for cell in table.cells}
    lacking: dict[tuple[str, int], dict[str, list[Place]]] = {}
    for algorithm in algorithms(table):
        for name, columns in selections.items():
            every = [Place(c, (algorithm,), seed) for c in columns for seed in seeds(table)]
            if missing := [place for place in every if place not in stored]:
                count = 1 + max(place.seed for place in missing)
                lacking.setdefault((algorithm, count), {})[name] = missing
    commands: dict[tuple[tuple[str, ...], int], list[tuple[str, list[Place]]]] = {}
    for (algorithm, count), missing in lacking.items():
        places = [place for group in missing.values() for place in group]
        commands.setdefault((tuple(missing), count), []).append((algorithm, places))
    for (selected, count), rows in commands.items():
        places = tuple(place for _, group in rows for place in group)
        yield Gap(places, _command(table, selected, [name for name, _ in rows], count))


def _command(table: Table, selected: Sequence[str], rows: Sequence[str], count: int) -> str:
    changed: dict[str, Any] = {"algorithms": rows, "seeds": count}
    if table.experiment == COMPARE:
        # A network's name has no space, a folder's may.
        dataset, _, network = selected[0].rpartition(" ")
        words, chosen = [COMPARE], {"dataset": dataset, "network": network}
    else:
        words, chosen = ["reproduce", table.experiment], {"columns": selected}
    return command(words, {**chosen, **changed, **_rest(table, {*chosen, *changed})})


def _rest(table: Table, but: set[str]) -> dict[str, Any]:
    """The other options, as they were, and the folder."""
    kept = {k: v for k, v in table.options.items() if k not in but and v is not None}
    return {**kept, "out": table.path.parent}


def _of_ablation(table: Table) -> Iterator[Gap]:
    """What its options ask for; where they do not say it, the seeds of what was begun."""
    stored = {cell.place for cell in table.cells}
    asked = _asked(table)
    count = len(seeds(table)) if asked is None else _seeds_asked(table)
    wanted = asked or dict.fromkeys(cell.place[:2] for cell in table.cells)
    every = [Place(*place, seed) for seed in range(count) for place in wanted]
    if missing := tuple(place for place in every if place not in stored):
        options = {"seeds": count, **_rest(table, {"seeds"})}
        yield Gap(missing, command(["reproduce", ABLATION], options))


def _asked(table: Table) -> list[tuple[str, tuple[str, ...]]] | None:
    """All combinations of the options that list the parts of columns and rows."""
    lists = [names(table, f"{key.removesuffix('s')}s") for key in (*table.column, *table.heads)]
    if not lists or not all(lists):
        return None
    count = len(table.column)
    return [(" ".join(each[:count]), each[count:]) for each in itertools.product(*lists)]


def _columns(table: Table) -> list[str]:
    asked = [table.options.get("dataset"), table.options.get("network")]
    own = [" ".join(map(str, asked))] if all(asked) else []
    return list(dict.fromkeys([*(cell.place.column for cell in table.cells), *own]))


def _selections(table: Table, tables: Sequence[Table]) -> dict[str, tuple[str, ...]]:
    """The columns of a complete table, by what `--columns` calls them."""
    papers = PAPERS.get(table.experiment, {})
    known = {name: tuple(c.name for c in columns) for name, columns in papers.items()}
    kin = [other for other in tables if other.experiment == table.experiment]
    begun = {name for other in kin for name in _begun(other, known)}
    selected = _begun(table, known)
    if table is kin[0]:
        numbered = [name for name, columns in papers.items() if any(c.paper for c in columns)]
        selected += [name for name in numbered if name not in begun]
    stored = dict.fromkeys(cell.place.column for cell in table.cells)
    return {name: known.get(name) or _matching(name, stored) for name in selected}


def _begun(table: Table, known: Mapping[str, Sequence[str]]) -> list[str]:
    """What is asked for or stored."""
    stored = {cell.place.column for cell in table.cells}
    held = [name for name, columns in known.items() if stored & set(columns)]
    return list(dict.fromkeys([*names(table, "columns"), *held]))


def _matching(name: str, stored: Mapping[str, Any]) -> tuple[str, ...]:
    """The columns with this data set or this network."""
    return tuple(c for c in stored if name in (c.rpartition(" ")[0], c.rpartition(" ")[2])) or (
        name,
    )


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
