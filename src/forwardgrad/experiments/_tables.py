"""Every algorithm on the second paper's networks: Tables 3 and 4 of Ren et al. (2023), and a look.

Commands: `forwardgrad reproduce table3` (supervised), `forwardgrad reproduce table4` (contrastive)
and `forwardgrad compare`. Every cell is a run of `forwardgrad train` in a folder of its own, so an
interrupted table continues where it was.
"""

import dataclasses
from pathlib import Path

from forwardgrad._errors import unknown_name
from forwardgrad.experiments._experiment import Experiment
from forwardgrad.experiments._table import Column, Table, run_table
from forwardgrad.experiments._table_files import ALGORITHMS, ROWS

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
"""The paper's columns of Table 3 that there are, by data set."""

PAPERS = {c.name: c.paper for group in COLUMNS.values() for c in group if c.paper}

CONTRASTIVE_COLUMNS: dict[str, Column] = {
    "m/8/16": Column(
        *("cifar10", "m/8/16"),
        (24.1, 24.7, 29.6, 45.9, 37.7, 36.7, 46.1, 53.4, 54.6, 52.7, 32.9),
    ),
    "l/8/64": Column("cifar10", "l/8/64"),
}
"""Columns of Table 4, by network."""


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


@dataclasses.dataclass(frozen=True)
class Table4Options:
    """Settings of `reproduce table4`."""

    columns: tuple[str, ...] = ("m/8/16",)
    """Networks whose columns are wanted, on CIFAR-10: m/8/16, l/8/64."""
    algorithms: tuple[str, ...] = ROWS
    """Algorithms, one row each; untrained is a readout of the network before training."""
    out: Path | None = None
    """Folder of the results. Default: runs/reproduce/table4."""
    data_dir: Path | None = None
    """Folder with DATASET/{train,test}.parquet. Default: $FORWARDGRAD_DATA, or the hub is asked."""
    epochs: int = 100
    """Passes over the training set."""
    iterations: int | None = None
    """Stop after this many steps instead."""
    batch_size: int = 256
    """Images per step, each in two views."""
    warmup: int = 100
    """Steps over which the learning rate first rises."""
    examples: int | None = None
    """Training images that the readouts are fitted on. Default: all."""
    seeds: int = 1
    """Runs of each cell."""


def run_table3(options: Table3Options) -> Path:
    """Run the table, or what is missing of it, and return the folder of its results."""
    for name in options.columns:
        if name not in COLUMNS:
            raise unknown_name("column", name, COLUMNS)
    columns = [column for name in options.columns for column in COLUMNS[name]]
    out = options.out or Path("runs/reproduce/table3")
    return run_table(Table("table3", columns, options, out, papers=PAPERS), ALGORITHMS)


def run_compare(options: CompareOptions) -> Path:
    """Run all algorithms on one data set, and return the folder of the results."""
    columns = [Column(options.dataset, options.network)]
    return run_table(
        Table("compare", columns, options, options.out or Path("runs/compare")), ALGORITHMS
    )


def run_table4(options: Table4Options) -> Path:
    """Run the table, or what is missing of it, and return the folder of its results."""
    for name in options.columns:
        if name not in CONTRASTIVE_COLUMNS:
            raise unknown_name("column", name, CONTRASTIVE_COLUMNS)
    table = Table(
        name="table4",
        columns=[CONTRASTIVE_COLUMNS[name] for name in options.columns],
        options=options,
        out=options.out or Path("runs/reproduce/table4"),
        error="test error of the readout",
        papers={c.name: c.paper for c in CONTRASTIVE_COLUMNS.values() if c.paper},
        settings={
            "task": "contrastive",
            "iterations": options.iterations,
            "warmup": options.warmup,
        },
        same=("epochs", "iterations", "batch_size", "warmup", "examples"),
        examples=options.examples,
    )
    return run_table(table, ROWS)


TABLE3 = Experiment(
    "table3", "all algorithms on LocalMixers, beside the paper's numbers", Table3Options, run_table3
)
COMPARE = Experiment("compare", "all algorithms on one data set", CompareOptions, run_compare)
"""What `forwardgrad compare` runs."""

TABLE4 = Experiment(
    "table4",
    "contrastive learning by all algorithms, with a linear readout",
    Table4Options,
    run_table4,
)
