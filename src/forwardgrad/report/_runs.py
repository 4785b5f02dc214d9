"""All runs in one table, and those that were not finished."""

import dataclasses
from collections.abc import Iterator

from forwardgrad._errors import InputError
from forwardgrad.report._commands import resume
from forwardgrad.report._read import ABLATION, number
from forwardgrad.report._stored import Cell, Collection, Run, Table
from forwardgrad.report._view import RunView, Unfinished
from forwardgrad.training import TrainConfig

HEADS = (
    *("data set and network", "algorithm", "seed", "test error (%)", "train error (%)"),
    *("seconds", "state", "epochs", "batch size", "learning rate", "tangents", "other settings"),
    *("backend", "date", "where"),
)

_SHOWN = (
    *("dataset", "network", "algorithm", "seed", "epochs", "batch_size", "learning_rate"),
    *("tangents", "task", "out", "data_dir", "resume", "checkpoint_every", "log_every"),
)


def rows(collection: Collection) -> tuple[RunView, ...]:
    """A row for every run that has a folder, and for every cell of a table that has none."""
    runs = [_of_run(run) for run in collection.runs]
    cells = [_of_cell(t, c) for t in collection.tables for c in _without_folder(t, collection)]
    return tuple(runs + cells)


def unfinished(collection: Collection, problems: list[str]) -> tuple[Unfinished, ...]:
    """Runs without a summary; what stands in the way of a command is added to `problems`."""
    views = []
    for run in collection.runs:
        if run.state == "finished":
            continue
        text = f"{run.column}, {run.algorithm}, seed {run.settings['seed']}: {_progress(run)}"
        line = ""
        if run.state == "unfinished":
            try:
                line = resume(run)
            except InputError as error:
                problems.append(str(error))
        views.append(Unfinished(run.folder.as_posix(), text, line))
    return tuple(views)


def in_table(run: Run, table: Table) -> bool:
    """Whether a run is that of one of the table's cells."""
    inside = (table.path.parent / "runs").resolve() in run.folder.resolve().parents
    return inside and any(cell.place == run.place for cell in table.cells)


def _progress(run: Run) -> str:
    epochs = number(run.lines[-1].get("epoch")) if run.lines else None
    after = f"after {epochs:.4g} of {run.settings.get('epochs', '?')} epochs" if epochs else ""
    if run.state == "diverged":
        reason = f": {run.reason}" if run.reason else ""
        return f"diverged {after}{reason}. A smaller learning rate or clip may help.".replace(
            "  ", " "
        )
    return f"interrupted, or still running, {after or 'before the end of the first epoch'}."


def _without_folder(table: Table, collection: Collection) -> Iterator[Cell]:
    own = {run.place for run in collection.runs if in_table(run, table)}
    yield from (cell for cell in table.cells if cell.place not in own)


def _of_run(run: Run) -> RunView:
    settings, summary = run.settings, run.summary
    last = next((line for line in reversed(run.lines) if "test_error" in line), {})
    known = summary or last
    others = ", ".join(
        f"{field.name} {settings[field.name]}"
        for field in dataclasses.fields(TrainConfig)
        if field.name not in _SHOWN
        and field.name in settings
        and settings[field.name] not in (None, field.default)
    )
    return _row(
        [run.column, run.algorithm, settings["seed"]],
        [known.get("test_error"), known.get("train_error"), known.get("seconds")],
        [run.state, settings.get("epochs"), settings.get("batch_size")],
        [settings.get("learning_rate"), settings.get("tangents"), others],
        [run.origin.backend, run.origin.date, run.folder.as_posix()],
        state=run.state,
    )


def _of_cell(table: Table, cell: Cell) -> RunView:
    options, (column, row, seed) = table.options, cell.place
    rate, tangents = cell.settings.get("learning_rate"), cell.settings.get("tangents")
    others = ", ".join(
        f"{k} {v}" for k, v in cell.settings.items() if k not in _SHOWN and v not in (None, False)
    )
    name = ", ".join(filter(None, row)) if table.experiment == ABLATION else row[0]
    return _row(
        [column, name, seed],
        [cell.test_error, cell.train_error, cell.seconds],
        ["finished", options.get("epochs"), options.get("batch_size")],
        [rate, tangents, others],
        [table.origin.backend, cell.date, table.path.as_posix()],
        state="finished",
    )


def _row(who: list, results: list, how: list, settings: list, where: list, state: str) -> RunView:
    results = [number(value) for value in results]
    values = [*who, *results, *how, *settings, *where]
    texts = [_text(value) for value in [*who, *map(_rounded, results), *how, *settings, *where]]
    keys = ["" if number(value) is None else repr(number(value)) for value in values]
    return RunView(tuple(texts), tuple(keys), state)


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _text(value: object) -> str:
    return "" if value is None else str(value)
