"""What an experiment is: cells, each made and stored on its own, and how they are presented."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from os.path import lexists
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from forwardgrad import results
from forwardgrad._console import Console
from forwardgrad._errors import DivergedError, InputError, unknown_name
from forwardgrad._files import write_text
from forwardgrad._provenance import provenance
from forwardgrad.results import MOST_SEEDS, Grid, Place, Readout
from forwardgrad.results._records import AbstractCell, Cell
from forwardgrad.training import Run, TrainConfig, fit, fit_readout, readout_file
from forwardgrad.training._config import NetworkSettings, Precision, fitting, known, options_of

MOST_CELLS = 20_000
"""Of an experiment."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Settings that all experiments have."""

    out: Path | None = None
    """Folder of the results. Default: runs/reproduce/NAME, or runs/compare."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Settings of experiments whose cells are runs of `forwardgrad train`."""

    data_dir: Path | None = None
    """Folder with DATASET/{train,test}.parquet. Default: $FORWARDGRAD_DATA, or the hub is asked."""
    seeds: int = 3
    """Runs of each cell."""
    precision: Precision = "float32"
    """What networks compute with, as for train: float32, tf32, bfloat16."""


class Job(NamedTuple):
    """A cell to be made: the fields that tell its place, its seed, and the settings of its run.

    `rate` is the learning rate of other seeds that are stored.
    """

    place: Mapping[str, Any]
    seed: int = 0
    config: TrainConfig | None = None
    rate: float | None = None


class Presented(NamedTuple):
    """What is made of the cells: a figure; a table to be stored, and as Markdown."""

    figure: Figure
    rows: Sequence[Mapping[str, Any]] = ()
    text: str = ""


def run_config(options: Any, **settings: Any) -> TrainConfig:
    """The settings of a run: these, and of the options those that `forwardgrad train` has too."""
    shared = {k: v for k, v in results.fields(options).items() if k in known()}
    return fitting(**{**shared, **settings})


def trained(job: Job, options: Any, console: Console | None) -> Run:
    """The run of a cell, in a folder of its own: trained, or what is missing of it."""
    assert job.config is not None
    folder = run_folder(options, job.place, job.seed)
    return fit(dataclasses.replace(job.config, out=folder, resume=True), console=console)


def run_folder(options: Any, place: Mapping[str, Any], seed: int) -> Path:
    """Where the run of a cell is."""
    name = "-".join(map(str, (*place.values(), seed)))
    return options.out / "runs" / re.sub("[ /]", "-", name)


_OF_THE_RESULT = ("test_error", "train_error", "train_loss", "parameters", "seconds", "date")
_SETTINGS = ("learning_rate", "momentum", "tangents", "exact_last", "normalise_features")


def run_job(job: Job, options: Any, console: Console) -> dict[str, Any]:
    """Train, and return what the run ended with as fields of a cell."""
    return ending(trained(job, options, console), options)


def ending(run: Run, options: Any) -> dict[str, Any]:
    """What a run ended with, and its settings, as fields of a cell.

    A contrastive run's errors are those of a readout that is fitted afterwards; that of the run's
    own readout is the `online_error`.
    """
    end = {name: getattr(run.result, name) for name in _OF_THE_RESULT}
    end |= {k: v for k, v in options_of(run.config).items() if k in _SETTINGS}
    if run.config.task == "contrastive":
        end |= {"online_error": end["test_error"], **read_out(run.folder, options)}
    return end


def read_out(folder: Path, options: Any, *, untrained: bool = False) -> dict[str, float]:
    """The errors of a readout of a run's features, fitted unless that is stored."""
    path, examples = folder / readout_file(untrained), getattr(options, "examples", None)
    stored = results.read(path, Readout) if lexists(path) else None
    if stored is None or stored.limit != examples:
        settings = {"examples": examples, "untrained": untrained, "data_dir": options.data_dir}
        stored = fit_readout(folder, **settings)
    return {"test_error": stored.test_error, "train_error": stored.train_error}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cells:
    """An experiment's cells, and how they are presented.

    `plan` lists them in the order in which they are made, by `make`. All that are stored share the
    options `same`. What the report needs of a table: a title, what is tabulated, which of the
    option `columns` asks for a column, and the paper's errors.
    """

    kind: type[AbstractCell]
    plan: Callable[[Any], Iterator[Job]]
    present: Callable[[Sequence[Any]], Presented]
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
        seeds = getattr(options, "seeds", 1)
        if not 1 <= seeds <= MOST_SEEDS:
            bound = "least 1" if seeds < 1 else f"most {MOST_SEEDS}"
            raise InputError(f"seeds must be at {bound}, got {seeds}")
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
    cells: Cells
    """Those that it is made of."""

    def run(self, options: Any) -> Path:
        """Make its cells, those alone that are not stored yet, each of which is stored at once.

        **Returns:**

        The folder with its JSON, its figure, and where it has a table that as Markdown and CSV.

        **Raises:**

        `InputError` if an option is none that the experiment can have, or the folder holds what
        other options made; `DivergedError`, after all other cells, if one of them diverged.
        """
        if options.out is None:
            parent = "runs" if self.name == "compare" else "runs/reproduce"
            options = dataclasses.replace(options, out=Path(parent, self.name))
        jobs, console, kind = self.cells.jobs(options), Console(), self.cells.kind
        if not jobs:
            raise InputError(f"the options of {self.name} ask for no cells: one of them is empty")
        made = {(cell.place, cell.seed): cell for cell in self._stored(options, jobs)}
        diverged: list[str] = []
        for job in jobs:
            place = kind.at(job.place)
            if (place, job.seed) not in made:
                others = (c for c in made.values() if c.place == place)
                rate = next((getattr(c, "learning_rate", None) for c in others), None)
                where = ", ".join(filter(None, (place.column, *place.row, f"seed {job.seed}")))
                try:
                    fields = self.cells.make(job._replace(rate=rate), options, console)
                except DivergedError as error:
                    console.print(f"{where}: {error}", highlight=False)
                    diverged.append(where)
                    continue
                made[place, job.seed] = kind(seed=job.seed, **{**fields, **job.place})
                error = f": {fields['test_error']:.2f} %" if "test_error" in fields else ""
                console.print(f"{where}{error}", highlight=False)
                self._write(options, list(made.values()))
        if made:
            text = self._write(options, list(made.values()))
            console.print(text, highlight=False, soft_wrap=True)
        if diverged:
            raise DivergedError(f"of {len(jobs)} cells, these diverged: {'; '.join(diverged)}")
        return options.out

    def _stored(self, options: Any, jobs: Sequence[Job]) -> Sequence[AbstractCell]:
        """The cells of earlier calls in the same folder, which stay."""
        path = options.out / f"{self.name}.json"
        if not lexists(path):
            return ()
        found = results.read(path, Grid[self.cells.kind, self.options])
        of_runs = ("precision",) if isinstance(options, RunOptions) else ()
        for name in (*self.cells.same, *of_runs):
            before, now = getattr(found.options, name), getattr(options, name)
            if before != now:
                raise InputError(
                    f"{path} holds results for {name} {before}, not {now}: pass another --out"
                )
        try:
            if found.cells:
                self.cells.present(found.cells)
        except (LookupError, ValueError, ArithmeticError) as error:
            raise InputError(f"{path} is damaged: no figure can be made of it: {error}") from error
        self._check_networks(path, found.cells, jobs)
        return found.cells

    def _check_networks(
        self, path: Path, cells: Sequence[AbstractCell], jobs: Sequence[Job]
    ) -> None:
        """Refuse cells of a column's networks as they were before they normalised features."""
        stored = {
            cell.place.column: cell.normalise_features or False
            for cell in cells
            if isinstance(cell, Cell) and cell.learning_rate is not None
        }
        for job in jobs:
            if job.config is None or not isinstance(job.config.sizes, NetworkSettings):
                continue
            column = self.cells.kind.at(job.place).column
            now = job.config.sizes.normalise_features
            if (before := stored.get(column, now)) != now:
                raise InputError(
                    f"{path} holds results of {column} for normalise_features {before}, not {now}: "
                    "pass another --out"
                )

    def _write(self, options: Any, made: Sequence[AbstractCell]) -> str:
        """What there is so far, as JSON, Markdown and CSV, and its figure."""
        file, presented = options.out / self.name, self.cells.present(made)
        header = {"experiment": self.name, "options": as_options(options), **provenance()}
        stored = {"cells": list(map(results.without_none, made)), "table": presented.rows}
        results.write(file.with_suffix(".json"), {**header, **stored})
        if presented.rows:
            write_text(file.with_suffix(".md"), presented.text)
            write_text(file.with_suffix(".csv"), results.csv(presented.rows))
        results.save(presented.figure, file.with_suffix(".png"))
        return presented.text


def as_options(options: Any) -> dict[str, Any]:
    """The settings of an experiment as JSON values, without the folders."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in results.fields(options).items()
        if name not in ("out", "data_dir")
    }


def check_names(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    """Refuse names that are not known: `kind` is what they should have named.

    **Raises:**

    `InputError` for the first of them.
    """
    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known)
