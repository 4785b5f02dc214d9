"""What an experiment is; and one that is made of cells, each a run of `forwardgrad train`."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import lexists
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from forwardgrad._console import Console
from forwardgrad._errors import InputError
from forwardgrad._files import write_text
from forwardgrad._provenance import provenance
from forwardgrad.results import (
    MOST_SEEDS,
    Cell,
    Grid,
    Mean,
    Place,
    Readout,
    csv,
    fields,
    over_seeds,
    read,
    save,
    without_none,
    write,
)
from forwardgrad.training import Run, TrainConfig, fit, fit_readout, readout_file

MOST_CELLS = 20_000
"""Of an experiment."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellOptions:
    """Settings that all experiments made of cells have."""

    out: Path
    """Folder of the results."""
    data_dir: Path | None = None
    """Folder with DATASET/{train,test}.parquet. Default: $FORWARDGRAD_DATA, or the hub is asked."""
    seeds: int = 3
    """Runs of each cell."""


class Job(NamedTuple):
    """A cell to be made: the fields that tell its place, and the run's settings."""

    place: Mapping[str, Any]
    config: TrainConfig


Means = Mapping[Place, Mean[Any]]


def trained(run: Run, options: Any) -> dict[str, Any]:
    """What a run ended with, and its settings, as fields of a cell.

    A contrastive run's errors are those of a readout that is fitted afterwards; that of the run's
    own readout is the `online_error`.
    """
    end = run.result
    fields = {
        **{name: getattr(end, name) for name in _OF_THE_RESULT},
        **{name: getattr(run.config, name) for name in _SETTINGS},
    }
    if run.config.task == "contrastive":
        readout = read_out(run.folder, options)
        fields |= {"online_error": end.test_error, **readout}
    return fields


_OF_THE_RESULT = ("test_error", "train_error", "train_loss", "parameters", "seconds", "date")
_SETTINGS = ("learning_rate", "momentum", "tangents", "exact_last")


def read_out(folder: Path, options: Any, *, untrained: bool = False) -> dict[str, float]:
    """The errors of a readout of a run's features, fitted unless that is stored."""
    path, examples = folder / readout_file(untrained), getattr(options, "examples", None)
    stored = read(path, Readout) if lexists(path) else None
    if stored is None or stored.limit != examples:
        settings = {"examples": examples, "untrained": untrained, "data_dir": options.data_dir}
        stored = fit_readout(folder, **settings)
    return {"test_error": stored.test_error, "train_error": stored.train_error}


def run_job(job: Job, options: Any, console: Console) -> dict[str, Any]:
    """Train, or what is missing of it."""
    run = fit(dataclasses.replace(job.config, resume=True), console=console)
    return trained(run, options)


class Presented(NamedTuple):
    """What is made of the means over seeds: rows to be stored, a Markdown table, a figure."""

    rows: list[dict[str, Any]]
    text: str
    figure: Figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cells:
    """An experiment's cells, and how they are presented.

    `plan` lists them in the order in which they are made, by `make`. All that are stored share the
    options `same`. What the report needs: a title, what is tabulated, which of the option `columns`
    asks for a column, and the paper's errors.
    """

    kind: type[Cell]
    plan: Callable[[Any], Iterator[Job]]
    present: Callable[[Means], Presented]
    same: tuple[str, ...]
    make: Callable[[Job, Any, Console], dict[str, Any]] = run_job
    title: str = ""
    error: str = "test error"
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    papers: Mapping[Place, float] = dataclasses.field(default_factory=dict)

    def jobs(self, options: Any) -> list[Job]:
        """The plan, of which nothing is done yet.

        **Raises:**

        `InputError` if an option is none that the experiment can have.
        """
        if not 1 <= options.seeds <= MOST_SEEDS:
            bound = "least 1" if options.seeds < 1 else f"most {MOST_SEEDS}"
            raise InputError(f"seeds must be at {bound}, got {options.seeds}")
        jobs = list(itertools.islice(self.plan(options), MOST_CELLS + 1))
        if len(jobs) > MOST_CELLS:
            raise InputError(f"the options ask for more than {MOST_CELLS} cells")
        return jobs


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One of the papers' tables or figures, as a command."""

    name: str
    """`forwardgrad reproduce NAME`."""
    summary: str
    """One line."""
    options: type
    """A dataclass of settings; the command's options."""
    run: Callable[[Any], Path]
    """Runs it, and returns the folder with its JSON and figure."""
    cells: Cells | None = None
    """Those that it is made of, if it is."""


def of_cells(name: str, summary: str, options: type, cells: Cells) -> Experiment:
    """An experiment that makes its cells one by one, and those alone that are not stored yet."""
    return Experiment(name, summary, options, lambda given: _run(name, cells, given), cells)


def _run(name: str, cells: Cells, options: Any) -> Path:
    jobs, console = cells.jobs(options), Console()
    made = {(cell.place, cell.seed): cell for cell in _stored(name, cells, options)}
    for job in jobs:
        place, seed = cells.kind.at(job.place), job.config.seed
        if (place, seed) not in made:
            fields = cells.make(job, options, console)
            made[place, seed] = cells.kind(seed=seed, **{**fields, **job.place})
            where = ", ".join(filter(None, (place.column, *place.row, f"seed {seed}")))
            console.print(f"{where}: {fields['test_error']:.2f} %", highlight=False)
            _write(name, cells, options, list(made.values()))
    text = _write(name, cells, options, list(made.values()))
    console.print(text, highlight=False)
    return options.out


def _stored(name: str, cells: Cells, options: Any) -> Sequence[Cell]:
    """The cells of earlier calls in the same folder, which stay."""
    path, kind = options.out / f"{name}.json", Grid[cells.kind, type(options)]
    return stored(path, kind, options, cells.same).cells if lexists(path) else ()


def _write(name: str, cells: Cells, options: Any, made: Sequence[Cell]) -> str:
    """What there is so far, as JSON, Markdown and CSV, and its figure."""
    file, presented = options.out / name, cells.present(over_seeds(made))
    stored = {"cells": [without_none(cell) for cell in made], "table": presented.rows}
    write(file.with_suffix(".json"), {**header(name, options), **stored})
    write_text(file.with_suffix(".md"), presented.text)
    write_text(file.with_suffix(".csv"), csv(presented.rows))
    save(presented.figure, file.with_suffix(".png"))
    return presented.text


def header(name: str, options: Any) -> dict[str, Any]:
    """What an experiment's file begins with."""
    return {"experiment": name, "options": as_options(options), **provenance()}


def as_options(options: Any) -> dict[str, Any]:
    """The settings of an experiment as JSON values, without the folders."""
    return {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in fields(options).items()
        if not isinstance(v, Path) and k not in ("out", "data_dir")
    }


def stored(path: Path, kind: Any, options: Any, same: Sequence[str]) -> Any:
    """What an earlier call has stored.

    **Raises:**

    `InputError` if the file is damaged, or one of the settings `same` was another.
    """
    found = read(path, kind)
    for name in same:
        before, now = getattr(found.options, name), getattr(options, name)
        if before != now:
            raise InputError(
                f"{path} holds results for {name} {before}, not {now}: pass another --out"
            )
    return found
