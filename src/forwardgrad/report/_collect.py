"""Runs, tables and other experiments, found in folders."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from forwardgrad._errors import InputError
from forwardgrad._files import open_file
from forwardgrad.experiments import COMPARE, EXPERIMENTS, Cells
from forwardgrad.report._table import StoredTable
from forwardgrad.results import Grid, Header, Options, TableCell, read
from forwardgrad.training import Run, read_run

DEFAULT_FOLDERS = (Path("runs"), Path("results"))
_TABLES = {e.name: e for e in (*EXPERIMENTS.values(), COMPARE) if e.cells.title}
_UNKNOWN = Cells(kind=TableCell, plan=iter, present=NotImplemented, same=())
_OF_A_RUN = {"config.json", "metrics.jsonl", "summary.json"}


class Other(NamedTuple):
    """An experiment that is no table, or a benchmark, and the picture beside it."""

    path: Path
    header: Header
    picture: bytes | None


@dataclasses.dataclass
class Collection:
    """All that there is, in the order of the paths, and a sentence for what cannot be read."""

    folders: Sequence[Path]
    runs: list[Run] = dataclasses.field(default_factory=list)
    tables: list[StoredTable] = dataclasses.field(default_factory=list)
    others: list[Other] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def collect(folders: Sequence[Path]) -> Collection:
    """All that is stored in the folders and below them; `checkpoints` are not entered.

    **Raises:**

    `InputError` if one is not a folder, or there is nothing that can be read.
    """
    found = Collection(folders or [folder for folder in DEFAULT_FOLDERS if folder.is_dir()][:1])
    if not found.folders:
        raise InputError("folders: there is neither runs nor results here: expected the folders")
    for folder in found.folders:
        if not folder.is_dir():
            raise InputError(f"folders: {folder} is not a folder")
    for folder, names in _walk(found.folders):
        # Other JSON files in a run's folder are parts of the run.
        of_a_run = not _OF_A_RUN.isdisjoint(names)
        for path in [folder] if of_a_run else [folder / n for n in names if n.endswith(".json")]:
            try:
                _add(found, path)
            except InputError as error:
                found.problems.append(str(error))
    if not (found.runs or found.tables or found.others):
        raise InputError(
            f"folders: {', '.join(map(str, found.folders))} hold no results: expected folders of "
            "forwardgrad train, or JSON files of forwardgrad reproduce and compare"
            + "".join(f"; {problem}" for problem in found.problems[:1])
        )
    return found


def _walk(folders: Sequence[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Every folder once, with the sorted names of its files; hidden ones are left out."""
    seen = set()
    for top in folders:
        for place, inner, names in os.walk(top):
            # A folder in the place of a run's file is a part of the run.
            files = {*names, *_OF_A_RUN.intersection(inner)}
            inner[:] = sorted(n for n in {*inner} - files - {"checkpoints"} if n[0] != ".")
            folder = Path(place)
            if folder.resolve() not in seen:
                seen.add(folder.resolve())
                yield folder, sorted(name for name in files if name[0] != ".")


def _add(found: Collection, path: Path) -> None:
    if path.is_dir():
        run, problems = read_run(path)
        found.runs.append(run)
        found.problems += map(str, problems)
        return
    value = read(path, Any)  # pyright: ignore[reportArgumentType]
    if not isinstance(value, dict) or not {"experiment", "benchmark"} & set(value):
        return
    name, cells = value.get("experiment"), value.get("cells")
    known = _TABLES.get(name) if isinstance(name, str) else None
    if known:
        grid = read(path, Grid[known.cells.kind, known.options])
        found.tables.append(StoredTable(path, grid, known.cells))
    elif isinstance(cells, list) and any(isinstance(c, dict) and "column" in c for c in cells):
        found.tables.append(StoredTable(path, read(path, Grid[TableCell, Options]), _UNKNOWN))
    else:
        found.others.append(Other(path, read(path, Header), _picture(path.with_suffix(".png"))))


def _picture(path: Path) -> bytes | None:
    if not os.path.lexists(path):
        return None
    with open_file(path) as file:
        if (picture := file.read(2**26)).startswith(b"\x89PNG\r\n\x1a\n"):
            return picture
    raise InputError(f"{path} is damaged: expected a PNG")
