"""What the page says, before it is HTML or Markdown."""

import dataclasses
from typing import Literal

from forwardgrad.report._missing import Gap

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A table's entry: ours, the paper's, from how many seeds, and whether it is the best."""

    error: str = ""
    paper: str = ""
    seeds: str = ""
    best: bool = False


@dataclasses.dataclass(frozen=True)
class TableView:
    """A table in the paper's form; `papers` says which columns have the paper's numbers beside."""

    title: str
    source: str
    caption: str
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    papers: tuple[bool, ...]
    rows: tuple[tuple[tuple[str, ...], tuple[Entry, ...]], ...]
    origin: tuple[tuple[str, str], ...]
    gaps: tuple[Gap, ...]

    @property
    def missing(self) -> int:
        """The number of cells that are missing."""
        return sum(len(gap.places) for gap in self.gaps)


@dataclasses.dataclass(frozen=True)
class Series:
    """A line or a point of a plot; `thin` are the seeds that a line is the mean of."""

    label: str
    algorithm: str
    points: tuple[Point, ...]
    thin: tuple[tuple[Point, ...], ...] = ()
    variant: int = 0
    marked: bool = False


@dataclasses.dataclass(frozen=True)
class Plot:
    """Axes and what is drawn in them. `name` is that of its file."""

    name: str
    kind: Literal["lines", "points"]
    xlabel: str
    ylabel: str
    series: tuple[Series, ...]

    @property
    def alt(self) -> str:
        """What there is to see, in words."""
        ends = "; ".join(f"{s.label}: {s.points[-1][1]:.3g}" for s in self.series)
        at = "at the end " if self.kind == "lines" else ""
        return f"{self.ylabel} against {self.xlabel}, {at}{ends}"


@dataclasses.dataclass(frozen=True)
class Group:
    """Plots under one heading."""

    title: str
    note: str
    plots: tuple[Plot, ...]


@dataclasses.dataclass(frozen=True)
class RunView:
    """A row of the table of all runs: texts, and what to sort numbers by."""

    texts: tuple[str, ...]
    keys: tuple[str, ...]
    state: str


@dataclasses.dataclass(frozen=True)
class Unfinished:
    """A run that was not finished, and the command that continues it, if there is one."""

    folder: str
    text: str
    command: str


@dataclasses.dataclass(frozen=True)
class OtherView:
    """An experiment that is no table."""

    name: str
    source: str
    origin: tuple[tuple[str, str], ...]
    picture: bytes | None
    file: str


@dataclasses.dataclass(frozen=True)
class Report:
    """All of it."""

    date: str
    facts: tuple[tuple[str, str], ...]
    findings: tuple[str, ...]
    tables: tuple[TableView, ...]
    unfinished: tuple[Unfinished, ...]
    curves: tuple[Group, ...]
    costs: tuple[Group, ...]
    run_heads: tuple[str, ...]
    runs: tuple[RunView, ...]
    others: tuple[OtherView, ...]
    problems: tuple[str, ...]

    @property
    def missing(self) -> int:
        """The number of cells that are missing in all tables."""
        return sum(table.missing for table in self.tables)
