"""From a file's JSON to what it stands for."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forwardgrad._errors import InputError
from forwardgrad._files import read_json
from forwardgrad.report._stored import Cell, Origin, Other, Place, Run, State, Table

GRIDS = ("table3", "table4", "compare")
"""Experiments whose cells have a column and an algorithm."""

ABLATION = "ablation"

COLUMN = ("column", "task", "dataset", "setting")
ROW = ("algorithm", "network", "variant", "groups", "blockwise", "patchwise", "groupwise")
"""What may tell the columns and the rows of a table from each other, where its cells have it."""

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"

_PNG = b"\x89PNG\r\n\x1a\n"


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if known and math.isfinite(value) else None


def read_run(folder: Path, problems: list[str]) -> Run:
    """The run in a folder; what is damaged besides its settings is added to `problems`.

    **Raises:**

    `InputError` if there are no settings.
    """
    settings = _settings(folder / CONFIG)
    lines = _lines(folder / METRICS, problems)
    summary = _summary(folder / SUMMARY, problems)
    last = lines[-1] if lines else {}
    diverged = not summary and last.get("event") == "diverged"
    state: State = "finished" if summary else "diverged" if diverged else "unfinished"
    reason = str(last.get("reason", "")) if diverged else ""
    return Run(folder, settings, state, tuple(lines), summary, _origin(summary), reason)


def read_result(path: Path) -> Table | Other | None:
    """The table or experiment in a file, or None if it is something else's.

    **Raises:**

    `InputError` if it is damaged.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        return None
    name = value.get("experiment", value.get("benchmark"))
    if not isinstance(name, str):
        return None
    if name in (*GRIDS, ABLATION) or _has_columns(value.get("cells")):
        return _table(path, name, value)
    return Other(path, name, _origin(value), _picture(path.with_suffix(".png")))


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"folder {path.parent} holds no run: {path} is missing")
    settings = read_json(path)
    needed = {"dataset": str, "network": str, "algorithm": str, "seed": int}
    if not isinstance(settings, dict) or not all(
        isinstance(settings.get(name), kind) for name, kind in needed.items()
    ):
        raise InputError(f"{path} is damaged: expected a run's settings")
    return settings


def _lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The lines before the first that is damaged."""
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for i, line in enumerate(text.splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            problems.append(f"{path} is damaged: line {i} is not a JSON object")
            break
        lines.append(value)
    return lines


def _summary(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        summary = read_json(path)
    except InputError as error:
        problems.append(str(error))
        return {}
    if not isinstance(summary, dict) or number(summary.get("test_error")) is None:
        problems.append(f"{path} is damaged: expected a summary with a test_error")
        return {}
    return summary


def _has_columns(cells: Any) -> bool:
    return isinstance(cells, list) and any(isinstance(c, dict) and "column" in c for c in cells)


def _table(path: Path, name: str, value: Mapping[str, Any]) -> Table:
    options, cells = value.get("options"), value.get("cells")
    if not isinstance(options, dict) or not isinstance(cells, list):
        raise InputError(f"{path} is damaged: expected options and cells")
    rows = value.get("table")
    paper = {
        (str(entry.get("column")), str(entry.get("algorithm"))): float(entry["paper"])
        for entry in (rows if isinstance(rows, list) else ())
        if isinstance(entry, dict) and number(entry.get("paper")) is not None
    }
    column, row = ("column",), ("algorithm",)
    if name == ABLATION:
        first = cells[0] if cells and isinstance(cells[0], dict) else {}
        column, row = (tuple(key for key in kind if key in first) for kind in (COLUMN, ROW))
    made = tuple(_cell(path, cell, column, row) for cell in cells)
    return Table(path, name, column, row, options, _origin(value), made, paper)


def _cell(path: Path, cell: Any, column: tuple[str, ...], row: tuple[str, ...]) -> Cell:
    cell = cell if isinstance(cell, dict) else {}
    error, seed = number(cell.get("test_error")), cell.get("seed")
    told = bool(column and row) and {*column, row[0]} <= set(cell)
    if error is None or not isinstance(seed, int) or not told:
        raise InputError(
            f"{path} is damaged: expected cells with column, algorithm, seed and test_error"
        )
    place = Place(
        " ".join(str(cell[key]) for key in column), tuple(_text(cell.get(key)) for key in row), seed
    )
    return Cell(
        place,
        error,
        number(cell.get("train_error")),
        number(cell.get("seconds")),
        cell["date"] if isinstance(cell.get("date"), str) else None,
        {k: cell[k] for k in ("learning_rate", "momentum", "tangents", "exact_last") if k in cell},
    )


def _text(value: Any) -> str:
    words = {None: "", True: "yes", False: "no"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _origin(value: Mapping[str, Any]) -> Origin:
    known = {}
    for field in dataclasses.fields(Origin):
        kind = int if field.name == "cores" else str
        if isinstance(value.get(field.name), kind):
            known[field.name] = value[field.name]
    return Origin(**known)


def _picture(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    picture = path.read_bytes()
    if not picture.startswith(_PNG):
        raise InputError(f"{path} is damaged: expected a PNG")
    return picture
