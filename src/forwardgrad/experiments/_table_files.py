"""A table as Markdown, as CSV and as a figure."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from forwardgrad.experiments._figures import save

ALGORITHMS = (
    *("bp", "l-bp", "lg-bp", "fa", "l-fa", "lg-fa", "dfa"),
    *("fg-w", "fg-a", "lg-fg-w", "lg-fg-a"),
)
"""The rows of the paper's tables, in its order."""

UNTRAINED = "untrained"
"""A row of Table 4: a readout of the network as it was initialised."""

ROWS = (UNTRAINED, *ALGORITHMS)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Test errors in per cent, a row an algorithm, a column a network beside the paper's."""
    columns = list(dict.fromkeys(row["column"] for row in rows))
    papers = _with_paper(rows)
    heads = ["algorithm"]
    for name in columns:
        heads += [name, *(["paper"] if name in papers else [])]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    places = {(row["column"], row["algorithm"]): row for row in rows}
    for algorithm in ROWS:
        found = [places.get((name, algorithm)) for name in columns]
        if any(found):
            texts = [
                text
                for name, row in zip(columns, found, strict=True)
                for text in _texts(row, name in papers)
            ]
            lines.append(f"| {' | '.join([algorithm, *texts])} |")
    return "\n".join(lines) + "\n"


def _with_paper(rows: list[dict[str, Any]]) -> set[str]:
    """The columns that the paper has."""
    return {row["column"] for row in rows if row["paper"] is not None}


def _texts(row: dict[str, Any] | None, with_paper: bool) -> list[str]:
    """An entry of the table, and beside it the paper's where the column has them."""
    if row is None:
        return [""] * (2 if with_paper else 1)
    spread = f" ± {row['test_error_std']:.2f}" if row["seeds"] > 1 else ""
    own = f"{row['test_error_mean']:.2f}{spread}"
    if not with_paper:
        return [own]
    return [own, "" if row["paper"] is None else f"{row['paper']:.2f}"]


def as_csv(rows: list[dict[str, Any]]) -> str:
    """The rows as comma-separated values."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plot(path: Path, rows: list[dict[str, Any]], error: str) -> None:
    """Bars of the errors, one picture a column, with marks at the paper's."""
    names = list(dict.fromkeys(row["column"] for row in rows))
    figure = Figure(figsize=(6.5 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        own = [row for row in rows if row["column"] == name]
        places = np.arange(len(own))
        means = [row["test_error_mean"] for row in own]
        bars = axes.bar(places, means, yerr=[row["test_error_std"] for row in own])
        for bar, row in zip(bars, own, strict=True):
            bar.set_color(_COLORS[row["algorithm"].removeprefix("lg-").removeprefix("l-")])
        if name in _with_paper(rows):
            paper = [np.nan if row["paper"] is None else row["paper"] for row in own]
            axes.plot(places, paper, "_k", markersize=18, markeredgewidth=2, label="paper")
            axes.legend()
        axes.set_xticks(places, [row["algorithm"] for row in own], rotation=45, ha="right")
        axes.set(ylabel=f"{error} (%)", title=name)
        axes.grid(axis="y", alpha=0.3)
    save(figure, path)


_COLORS = {
    UNTRAINED: "tab:gray",
    "bp": "tab:blue",
    "fa": "tab:purple",
    "dfa": "tab:pink",
    "fg-w": "tab:orange",
    "fg-a": "tab:red",
}
