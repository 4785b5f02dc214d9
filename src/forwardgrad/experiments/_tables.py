"""Every algorithm on the second paper's networks: Tables 3 and 4 of Ren et al. (2023), and a look.

Commands: `forwardgrad reproduce table3` (supervised), `forwardgrad reproduce table4` (contrastive)
and `forwardgrad compare`. Every cell is a run of `forwardgrad train` in a folder of its own, so an
interrupted table continues where it was.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from forwardgrad._console import Console
from forwardgrad._errors import InputError, unknown_name
from forwardgrad.experiments._experiment import (
    CellOptions,
    Cells,
    Job,
    Means,
    Presented,
    of_cells,
    read_out,
    run_job,
)
from forwardgrad.results import Place, Table, TableCell, look, markdown
from forwardgrad.training import ALGORITHMS as KNOWN
from forwardgrad.training import TrainConfig

ALGORITHMS = (
    *("bp", "l-bp", "lg-bp", "fa", "l-fa", "lg-fa", "dfa"),
    *("fg-w", "fg-a", "lg-fg-w", "lg-fg-a"),
)
"""The rows of the paper's tables, in its order."""

UNTRAINED = "untrained"
"""A row of Table 4: a readout of the network as it was initialised."""

ROWS = (UNTRAINED, *ALGORITHMS)


class Column(NamedTuple):
    """A network on a data set, and the paper's test errors (per cent) in the rows' order."""

    dataset: str
    network: str
    paper: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """How the column is headed."""
        return f"{self.dataset} {self.network}"


# fmt: off
TABLE3_COLUMNS: dict[str, tuple[Column, ...]] = {
    "mnist": (
        Column("mnist", "s/1/1",
               (2.66, 2.38, 2.43, 2.82, 3.21, 3.11, 3.31, 9.25, 3.24, 9.25, 3.24)),
        Column("mnist", "m/1/16",
               (2.41, 2.16, 2.81, 2.90, 2.90, 2.50, 3.17, 8.56, 3.76, 5.66, 2.55)),
    ),
    "cifar10": (
        Column("cifar10", "m/8/16",
               (33.6, 30.8, 33.8, 39.9, 39.7, 39.7, 38.8, 56.0, 59.7, 52.7, 30.7)),
    ),
}
"""The paper's columns of Table 3 that there are, by data set."""

TABLE4_COLUMNS: dict[str, tuple[Column, ...]] = {
    "m/8/16": (
        Column("cifar10", "m/8/16",
               (24.1, 24.7, 29.6, 45.9, 37.7, 36.7, 46.1, 53.4, 54.6, 52.7, 32.9)),
    ),
    "l/8/64": (Column("cifar10", "l/8/64"),),
}
"""Columns of Table 4, by network."""
# fmt: on


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableOptions(CellOptions):
    """Settings of any of the tables."""

    algorithms: tuple[str, ...] = ALGORITHMS
    """Algorithms, one row each."""
    epochs: int
    """Passes over the training set."""
    batch_size: int
    """Examples per step; in contrastive learning images, each in two views."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions(TableOptions):
    """Settings of `compare`."""

    dataset: str = "digits"
    """Data set, as for train."""
    network: str = "m/1/16"
    """Network, as for train."""
    out: Path = Path("runs/compare")
    epochs: int = 30
    batch_size: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table3Options(TableOptions):
    """Settings of `reproduce table3`."""

    columns: tuple[str, ...] = ("mnist",)
    """Data sets whose columns are wanted: mnist, cifar10."""
    out: Path = Path("runs/reproduce/table3")
    epochs: int = 40
    batch_size: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table4Options(TableOptions):
    """Settings of `reproduce table4`."""

    columns: tuple[str, ...] = ("m/8/16",)
    """Networks whose columns are wanted, on CIFAR-10: m/8/16, l/8/64."""
    algorithms: tuple[str, ...] = ROWS
    """Algorithms, one row each; untrained is a readout of the network before training."""
    out: Path = Path("runs/reproduce/table4")
    epochs: int = 100
    iterations: int | None = None
    """Stop after this many steps instead."""
    batch_size: int = 256
    warmup: int = 100
    """Steps over which the learning rate first rises."""
    examples: int | None = None
    """Training images that the readouts are fitted on. Default: all."""
    seeds: int = 1


def in_order(algorithms: Sequence[str]) -> list[str]:
    """Each algorithm once, in the paper's order; those that it does not have come last."""
    names = list(dict.fromkeys(algorithms))
    return sorted(names, key=lambda name: ROWS.index(name) if name in ROWS else len(ROWS))


def _plan(
    options: TableOptions, columns: Sequence[Column], rows: Sequence[str], **settings: Any
) -> Iterator[Job]:
    """Seed by seed: the table is complete early, and gets more exact."""
    for algorithm in options.algorithms:
        if algorithm not in rows:
            raise unknown_name("algorithm", algorithm, rows)
    # Untrained features are read from the folder of another run.
    algorithms = sorted(options.algorithms, key=lambda name: name == UNTRAINED)
    for seed in range(options.seeds):
        for column in columns:
            for algorithm in algorithms:
                config = TrainConfig(
                    dataset=column.dataset,
                    network=column.network,
                    algorithm=algorithm,
                    seed=seed,
                    epochs=options.epochs,
                    batch_size=options.batch_size,
                    out=_folder(options, column, algorithm, seed),
                    data_dir=options.data_dir,
                    **settings,
                )
                yield Job({"column": column.name, "algorithm": algorithm}, config)


def _folder(options: TableOptions, column: Any, algorithm: str, seed: int) -> Path:
    name = f"{column.dataset}-{column.network.replace('/', '-')}-{algorithm}-{seed}"
    return options.out / "runs" / name


def _chosen(names: Sequence[str], columns: Mapping[str, Sequence[Column]]) -> list[Column]:
    for name in names:
        if name not in columns:
            raise unknown_name("column", name, columns)
    return [column for name in names for column in columns[name]]


def _table3(options: Table3Options) -> Iterator[Job]:
    return _plan(options, _chosen(options.columns, TABLE3_COLUMNS), tuple(KNOWN))


def _table4(options: Table4Options) -> Iterator[Job]:
    columns = _chosen(options.columns, TABLE4_COLUMNS)
    settings = {"iterations": options.iterations, "warmup": options.warmup}
    return _plan(options, columns, (UNTRAINED, *KNOWN), task="contrastive", **settings)


def _compare(options: CompareOptions) -> Iterator[Job]:
    return _plan(options, [Column(options.dataset, options.network)], tuple(KNOWN))


def _with_untrained(job: Job, options: Table4Options, console: Console) -> dict[str, Any]:
    if job.config.algorithm != UNTRAINED:
        return run_job(job, options, console)
    for other in KNOWN:
        folder = _folder(options, job.config, other, job.config.seed)
        if (folder / "summary.json").exists():
            return {**read_out(folder, options, untrained=True), "seconds": 0.0}
    raise InputError(
        f"algorithm {UNTRAINED!r} needs a finished run of {job.place['column']} with seed "
        f"{job.config.seed} in {options.out / 'runs'}: add another algorithm"
    )


def _papers(columns: Mapping[str, Sequence[Column]]) -> dict[Place, float]:
    """The paper's test errors in per cent."""
    return {
        Place(column.name, (algorithm,)): error
        for group in columns.values()
        for column in group
        for algorithm, error in zip(ALGORITHMS, column.paper, strict=False)
    }


def _present(papers: Mapping[Place, float], error: str, means: Means) -> Presented:
    """A row an algorithm, a column a network, beside the paper's."""
    table, names = Table(means, papers), in_order([place.row[0] for place in means])
    places = [Place(column, (name,)) for column in table.columns for name in names]
    rows = [{**means[p].row, "paper": papers.get(p)} for p in places if p in means]
    heads, lines = ["algorithm"], [[name] for name in names]
    for column in table.columns:
        count = 1 + table.has_paper(column)
        heads += [column, "paper"][:count]
        for line in lines:
            entry = table.entry(column, (line[0],))
            line += [entry.ours, entry.paper][:count]
    return Presented(rows, markdown(heads, lines), _bars(rows, error))


def _bars(rows: Sequence[Mapping[str, Any]], error: str) -> Figure:
    """Bars of the errors, one picture a column, with marks at the paper's."""
    names = list(dict.fromkeys(row["column"] for row in rows))
    figure = Figure(figsize=(6.5 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        own = [row for row in rows if row["column"] == name]
        means, spreads = ([row[f"test_error_{k}"] for row in own] for k in ("mean", "std"))
        labels = [row["algorithm"] for row in own]
        places = np.arange(len(own))
        axes.bar(places, means, yerr=spreads, color=[look(label)[0] for label in labels])
        paper = [np.nan if row["paper"] is None else row["paper"] for row in own]
        if not np.all(np.isnan(paper)):
            axes.plot(places, paper, "_k", markersize=18, markeredgewidth=2, label="paper")
            axes.legend()
        axes.set_xticks(places, labels, rotation=45, ha="right")
        axes.set(ylabel=f"{error} (%)", title=name)
        axes.grid(axis="y", alpha=0.3)
    return figure


def _cells(plan: Any, columns: Mapping[str, Sequence[Column]], error: str, **fields: Any) -> Cells:
    papers = _papers(columns)
    present = functools.partial(_present, papers, error)
    names = {column.name: name for name, group in columns.items() for column in group}
    named = {"plan": plan, "columns": names, "error": error, "papers": papers, **fields}
    return Cells(kind=TableCell, present=present, **named)


TABLE3 = of_cells(
    "table3",
    "all algorithms on LocalMixers, beside the paper's numbers",
    Table3Options,
    _cells(
        _table3,
        TABLE3_COLUMNS,
        "test error",
        same=("epochs", "batch_size"),
        title="Table 3 of Ren et al. (2023), supervised",
    ),
)

TABLE4 = of_cells(
    "table4",
    "contrastive learning by all algorithms, with a linear readout",
    Table4Options,
    _cells(
        _table4,
        TABLE4_COLUMNS,
        "test error of a linear readout",
        same=("epochs", "iterations", "batch_size", "warmup", "examples"),
        make=_with_untrained,
        title="Table 4 of Ren et al. (2023), contrastive",
    ),
)

COMPARE = of_cells(
    "compare",
    "all algorithms on one data set",
    CompareOptions,
    _cells(
        _compare,
        {},
        "test error",
        same=("epochs", "batch_size"),
        title="All algorithms on one data set",
    ),
)
"""What `forwardgrad compare` runs."""
