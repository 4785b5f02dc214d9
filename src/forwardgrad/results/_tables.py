"""Cells over their seeds; rows as Markdown and as comma-separated values."""

import csv as _csv
import dataclasses
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from forwardgrad.results._records import Cell, Place

C = TypeVar("C", bound=Cell, covariant=True)
T = TypeVar("T")
K = TypeVar("K")


class Mean(NamedTuple, Generic[C]):
    """The test error of a place: mean and standard deviation over its seeds, in per cent."""

    cells: tuple[C, ...]
    error: float
    spread: float

    @property
    def text(self) -> str:
        """The error, with its spread where there are several seeds."""
        return f"{self.error:.2f}" + (f" ± {self.spread:.2f}" if len(self.cells) > 1 else "")

    @property
    def seconds(self) -> float | None:
        """The median of those that are known."""
        known = [cell.seconds for cell in self.cells if cell.seconds is not None]
        return float(np.median(known)) if known else None

    @property
    def row(self) -> dict[str, Any]:
        """The place and the numbers, by name."""
        first = self.cells[0]
        return {
            **{name: getattr(first, name) for name in (*first.COLUMN, *first.ROW)},
            "seeds": len(self.cells),
            "test_error_mean": round(self.error, 4),
            "test_error_std": round(self.spread, 4),
            "seconds_median": self.seconds,
        }


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items by their keys, in order."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def over_seeds(cells: Iterable[C]) -> dict[Place, Mean[C]]:
    """The mean of every place, in the order of the cells."""
    means = {}
    for place, group in grouped(cells, lambda cell: cell.place).items():
        errors = [cell.test_error for cell in group]
        means[place] = Mean(tuple(group), float(np.mean(errors)), float(np.std(errors)))
    return means


class Entry(NamedTuple):
    """A table's entry: ours, the paper's, and whether ours is the best of its column."""

    ours: str
    paper: str
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Means in their places, beside what the paper has there."""

    means: Mapping[Place, Mean[Any]]
    papers: Mapping[Place, float]

    @property
    def columns(self) -> list[str]:
        """Those that have a cell."""
        return list(dict.fromkeys(place.column for place in self.means))

    def has_paper(self, column: str) -> bool:
        """Whether the paper has numbers for a column."""
        return any(place.column == column for place in self.papers)

    def entry(self, column: str, row: tuple[str, ...]) -> Entry:
        """What is in that place."""
        theirs, mean = self.papers.get(Place(column, row)), self.means.get(Place(column, row))
        best = min(m.error for place, m in self.means.items() if place.column == column)
        ours, paper = mean.text if mean else "", "" if theirs is None else f"{theirs:.2f}"
        return Entry(ours, paper, mean is not None and mean.error == best)

    def text(self, head: str, names: Iterable[str]) -> str:
        """As Markdown: a row for each name, under that head, and the paper's errors beside ours."""
        heads, lines = [head], [[name] for name in names]
        for column in self.columns:
            count = 1 + self.has_paper(column)
            heads += [column, "paper"][:count]
            for line in lines:
                entry = self.entry(column, (line[0],))
                line += [entry.ours, entry.paper][:count]
        return markdown(heads, lines)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """A table of texts: `names` columns to the left, numbers to the right.

    >>> print(markdown(["algorithm", "error"], [["bp", "1.00"]]), end="")
    | algorithm | error |
    |---|--:|
    | bp | 1.00 |
    """
    rule = f"|{'---|' * names}{'--:|' * (len(heads) - names)}"
    lines = [f"| {' | '.join(texts)} |" for texts in (heads, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def escaped(value: Any) -> Any:
    """A text on one line, in which nothing means anything to Markdown or HTML; markup stays."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    text = re.sub(r"\s+", " ", value).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]>|#~$])", r"\\\1", text)


def fenced(command: str) -> str:
    """A block of shell, between fences that the command does not have."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    return f"{fence}bash\n{command}\n{fence}"


def csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as comma-separated values, headed by their names."""
    text = io.StringIO()
    writer = _csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
