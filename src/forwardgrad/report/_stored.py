"""What was found in the folders."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

State = Literal["finished", "unfinished", "diverged"]


@dataclasses.dataclass(frozen=True)
class Origin:
    """When a result was made, with which versions and where; None where the file does not say."""

    date: str | None = None
    backend: str | None = None
    device: str | None = None
    cores: int | None = None
    jax_version: str | None = None
    forwardgrad_version: str | None = None

    @property
    def machine(self) -> str:
        """Backend, device and cores."""
        device = self.device if self.device != self.backend else None
        cores = None if self.cores is None else f"{self.cores} cores"
        return ", ".join(part for part in (self.backend, device, cores) if part)

    @property
    def versions(self) -> str:
        """Those of JAX and of this package."""
        named = {"JAX": self.jax_version, "forwardgrad": self.forwardgrad_version}
        return ", ".join(f"{name} {version}" for name, version in named.items() if version)


class Place(NamedTuple):
    """Where a cell stands in a table."""

    column: str
    row: tuple[str, ...]
    seed: int


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run in a table; errors in per cent."""

    place: Place
    test_error: float
    train_error: float | None = None
    seconds: float | None = None
    date: str | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
    """A file of cells.

    `column` and `heads` say what the names of the columns and the parts of the rows are: an
    ablation has several, any other table a column and an algorithm. `paper` has the paper's test
    errors by these.
    """

    path: Path
    experiment: str
    column: tuple[str, ...]
    heads: tuple[str, ...]
    options: Mapping[str, Any]
    origin: Origin
    cells: tuple[Cell, ...]
    paper: Mapping[tuple[str, str], float]


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder of `forwardgrad train`: its settings, lines of metrics and summary."""

    folder: Path
    settings: Mapping[str, Any]
    state: State
    lines: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    origin: Origin
    reason: str = ""

    @property
    def algorithm(self) -> str:
        """The algorithm's id."""
        return self.settings["algorithm"]

    @property
    def place(self) -> Place:
        """Where the run stands in a table that it belongs to."""
        column = f"{self.settings['dataset']} {self.settings['network']}"
        return Place(column, (self.algorithm,), self.settings["seed"])

    @property
    def column(self) -> str:
        """Data set and network, as a table's column is headed; the task before, unless usual."""
        task = self.settings.get("task", "supervised")
        prefix = "" if task == "supervised" else f"{task} "
        return prefix + self.place.column


@dataclasses.dataclass(frozen=True)
class Other:
    """An experiment or a benchmark that is no table, and the picture beside it."""

    path: Path
    name: str
    origin: Origin
    picture: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Collection:
    """All that there is, in the order of the paths, and a sentence for what cannot be read."""

    folders: tuple[Path, ...]
    runs: tuple[Run, ...] = ()
    tables: tuple[Table, ...] = ()
    others: tuple[Other, ...] = ()
    problems: tuple[str, ...] = ()
