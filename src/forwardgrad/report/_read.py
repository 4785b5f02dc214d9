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
ABLATION_ROW = ("algorithm", "network", "groups", "blockwise", "patchwise", "groupwise")

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
    if name == ABLATION:
        return _table(path, name, value, ABLATION_ROW)
    if name in GRIDS or _has_columns(value.get("cells")):
        return _table(path, name, value, ("algorithm",))
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


def _table(path: Path, name: str, value: Mapping[str, Any], heads: tuple[str, ...]) -> Table:
    options, cells = value.get("options"), value.get("cells")
    if not isinstance(options, dict) or not isinstance(cells, list):
        raise InputError(f"{path} is damaged: expected options and cells")
    rows = value.get("table")
    paper = {
        (str(row.get("column")), str(row.get("algorithm"))): float(row["paper"])
        for row in (rows if isinstance(rows, list) else ())
        if isinstance(row, dict) and number(row.get("paper")) is not None
    }
    made = tuple(_cell(path, cell, heads) for cell in cells)
    return Table(path, name, heads, options, _origin(value), made, paper)


def _cell(path: Path, cell: Any, heads: tuple[str, ...]) -> Cell:
    cell = cell if isinstance(cell, dict) else {}
    error = number(cell.get("test_error"))
    column = " ".join(str(cell[k]) for k in ("column", "task", "dataset") if k in cell)
    known = "algorithm" in cell and isinstance(cell.get("seed"), int)
    if error is None or not column or not known:
        raise InputError(
            f"{path} is damaged: expected cells with column, algorithm, seed and test_error"
        )
    return Cell(
        Place(column, tuple(_text(cell.get(head)) for head in heads), cell["seed"]),
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
