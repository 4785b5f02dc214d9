"""Every algorithm on the second paper's networks: Table 3 of Ren et al. (2023), and a quick look.

Commands: `forwardgrad reproduce table3` and `forwardgrad compare`. Every cell is a run of
`forwardgrad train` in a folder of its own, so an interrupted table continues where it was.
"""

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from forwardgrad._errors import InputError, unknown_name
from forwardgrad._files import write_json, write_text
from forwardgrad.experiments._experiment import (
    Experiment,
    options_as_json,
    provenance,
    stored_cells,
)
from forwardgrad.experiments._figures import save
from forwardgrad.training import TrainConfig, fit, resolve

ALGORITHMS = (
    *("bp", "l-bp", "lg-bp", "fa", "l-fa", "lg-fa", "dfa"),
    *("fg-w", "fg-a", "lg-fg-w", "lg-fg-a"),
)
"""The rows of the paper's table, in its order."""


@dataclasses.dataclass(frozen=True)
class Column:
    """A network on a data set, and the paper's test errors (per cent) in the rows' order."""

    dataset: str
    network: str
    paper: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """How the column is headed."""
        return f"{self.dataset} {self.network}"


COLUMNS: dict[str, tuple[Column, ...]] = {
    "mnist": (
        Column(
            "mnist", "s/1/1", (2.66, 2.38, 2.43, 2.82, 3.21, 3.11, 3.31, 9.25, 3.24, 9.25, 3.24)
        ),
        Column(
            "mnist", "m/1/16", (2.41, 2.16, 2.81, 2.90, 2.90, 2.50, 3.17, 8.56, 3.76, 5.66, 2.55)
        ),
    ),
    "cifar10": (
        Column(
            *("cifar10", "m/8/16"),
            (33.6, 30.8, 33.8, 39.9, 39.7, 39.7, 38.8, 56.0, 59.7, 52.7, 30.7),
        ),
    ),
}
"""The paper's columns that there are, by data set."""


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Settings of `compare`."""

    dataset: str = "digits"
    """Data set, as for train."""
    network: str = "m/1/16"
    """Network, as for train."""
    algorithms: tuple[str, ...] = ALGORITHMS
    """Algorithms, one row each."""
    out: Path | None = None
    """Folder of the results. Default: runs/compare."""
    data_dir: Path | None = None
    """Folder with DATASET/{train,test}.parquet. Default: $FORWARDGRAD_DATA, or the hub is asked."""
    epochs: int = 30
    """Passes over the training set."""
    batch_size: int = 64
    """Examples per step."""
    seeds: int = 3
    """Runs of each cell."""


@dataclasses.dataclass(frozen=True)
class Table3Options:
    """Settings of `reproduce table3`."""

    columns: tuple[str, ...] = ("mnist",)
    """Data sets whose columns are wanted: mnist, cifar10."""
    algorithms: tuple[str, ...] = ALGORITHMS
    """Algorithms, one row each."""
    out: Path | None = None
    """Folder of the results. Default: runs/reproduce/table3."""
    data_dir: Path | None = None
    """Folder with DATASET/{train,test}.parquet. Default: $FORWARDGRAD_DATA, or the hub is asked."""
    epochs: int = 40
    """Passes over the training set."""
    batch_size: int = 128
    """Examples per step."""
    seeds: int = 3
    """Runs of each cell."""


def run_table3(options: Table3Options) -> Path:
    """Run the table, or what is missing of it, and return the folder of its results."""
    for name in options.columns:
        if name not in COLUMNS:
            raise unknown_name("column", name, COLUMNS)
    columns = [column for name in options.columns for column in COLUMNS[name]]
    return _run("table3", columns, options, options.out or Path("runs/reproduce/table3"))


def run_compare(options: CompareOptions) -> Path:
    """Run all algorithms on one data set, and return the folder of the results."""
    columns = [Column(options.dataset, options.network)]
    return _run("compare", columns, options, options.out or Path("runs/compare"))


def _run(name: str, columns: list[Column], options: Any, out: Path) -> Path:
    if options.seeds < 1:
        raise InputError(f"seeds must be at least 1, got {options.seeds}")
    for algorithm in options.algorithms:
        if algorithm not in ALGORITHMS:
            raise unknown_name("algorithm", algorithm, ALGORITHMS)
    console, path = Console(), out / f"{name}.json"
    # Cells of earlier calls in the same folder stay in the table.
    earlier = stored_cells(path, options, same=("epochs", "batch_size")) or ()
    cells = {(c["column"], c["algorithm"], c["seed"]): c for c in earlier}
    # Seed by seed: the table is complete early, and gets more exact.
    for seed in range(options.seeds):
        for column in columns:
            for algorithm in options.algorithms:
                cell = _cell(column, algorithm, seed, out, options, console)
                cells[column.name, algorithm, seed] = cell
        header = {"experiment": name, "options": options_as_json(options), **provenance()}
        rows = _rows(list(cells.values()))
        write_json(path, {**header, "cells": list(cells.values()), "table": rows})
        write_text(out / f"{name}.md", _markdown(rows))
        write_text(out / f"{name}.csv", _csv(rows))
        _plot(out / f"{name}.png", rows)
    console.print((out / f"{name}.md").read_text(encoding="utf-8"), highlight=False)
    return out


def _cell(
    column: Column, algorithm: str, seed: int, out: Path, options: Any, console: Console
) -> dict[str, Any]:
    folder = f"{column.dataset}-{column.network.replace('/', '-')}-{algorithm}-{seed}"
    config = TrainConfig(
        dataset=column.dataset,
        network=column.network,
        algorithm=algorithm,
        seed=seed,
        epochs=options.epochs,
        batch_size=options.batch_size,
        out=out / "runs" / folder,
        data_dir=options.data_dir,
        resume=True,
    )
    summary = fit(config, console=console)
    console.print(f"{column.name}, {algorithm}, seed {seed}: {summary['test_error']:.2f} %")
    settings = resolve(config)
    return {
        "column": column.name,
        "algorithm": algorithm,
        "seed": seed,
        **{k: summary[k] for k in _OF_THE_RUN},
        **{k: getattr(settings, k) for k in _SETTINGS},
    }


_SETTINGS = ("learning_rate", "momentum", "tangents", "exact_last")
_OF_THE_RUN = ("test_error", "train_error", "train_loss", "parameters", "seconds", "date")


def _rows(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of the test error, and the paper's."""
    rows = []
    for name in dict.fromkeys(cell["column"] for cell in cells):
        papers = _PAPERS.get(name, {})
        for algorithm in ALGORITHMS:
            group = [c for c in cells if (c["column"], c["algorithm"]) == (name, algorithm)]
            if not group:
                continue
            errors = [cell["test_error"] for cell in group]
            rows.append(
                {
                    "column": name,
                    "algorithm": algorithm,
                    "seeds": len(group),
                    "test_error_mean": round(float(np.mean(errors)), 4),
                    "test_error_std": round(float(np.std(errors)), 4),
                    "seconds_median": float(np.median([cell["seconds"] for cell in group])),
                    "paper": papers.get(algorithm),
                }
            )
    return rows


_PAPERS = {
    column.name: dict(zip(ALGORITHMS, column.paper, strict=True))
    for columns in COLUMNS.values()
    for column in columns
    if column.paper
}


def _markdown(rows: list[dict[str, Any]]) -> str:
    """Test errors in per cent, a row an algorithm, a column a network beside the paper's."""
    columns = list(dict.fromkeys(row["column"] for row in rows))
    heads = ["algorithm"]
    for name in columns:
        heads += [name, *(["paper"] if name in _PAPERS else [])]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    places = {(row["column"], row["algorithm"]): row for row in rows}
    for algorithm in ALGORITHMS:
        found = [places.get((name, algorithm)) for name in columns]
        if any(found):
            texts = [t for name, row in zip(columns, found, strict=True) for t in _texts(name, row)]
            lines.append(f"| {' | '.join([algorithm, *texts])} |")
    return "\n".join(lines) + "\n"


def _texts(column: str, row: dict[str, Any] | None) -> list[str]:
    """An entry of the table, and beside it the paper's where the column has them."""
    if row is None:
        return [""] * (2 if column in _PAPERS else 1)
    spread = f" ± {row['test_error_std']:.2f}" if row["seeds"] > 1 else ""
    own = f"{row['test_error_mean']:.2f}{spread}"
    return [own, f"{row['paper']:.2f}"] if column in _PAPERS else [own]


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _plot(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(row["column"] for row in rows))
    figure = Figure(figsize=(6.5 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        own = [row for row in rows if row["column"] == name]
        places = np.arange(len(own))
        means = [row["test_error_mean"] for row in own]
        bars = axes.bar(places, means, yerr=[row["test_error_std"] for row in own])
        for bar, row in zip(bars, own, strict=True):
            bar.set_color(_COLORS[row["algorithm"].removeprefix("lg-").removeprefix("l-")])
        if name in _PAPERS:
            paper = [row["paper"] for row in own]
            axes.plot(places, paper, "_k", markersize=18, markeredgewidth=2, label="paper")
            axes.legend()
        axes.set_xticks(places, [row["algorithm"] for row in own], rotation=45, ha="right")
        axes.set(ylabel="test error (%)", title=name)
        axes.grid(axis="y", alpha=0.3)
    save(figure, path)


_COLORS = {
    "bp": "tab:blue",
    "fa": "tab:purple",
    "dfa": "tab:pink",
    "fg-w": "tab:orange",
    "fg-a": "tab:red",
}

TABLE3 = Experiment(
    "table3", "all algorithms on LocalMixers, beside the paper's numbers", Table3Options, run_table3
)
COMPARE = Experiment("compare", "all algorithms on one data set", CompareOptions, run_compare)
"""What `forwardgrad compare` runs."""
