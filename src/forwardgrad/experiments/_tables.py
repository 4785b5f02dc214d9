"""Every algorithm on the second paper's networks: Tables 3 and 4 of Ren et al. (2023), and a look.

Commands: `forwardgrad reproduce table3` (supervised), `forwardgrad reproduce table4` (contrastive)
and `forwardgrad compare`. Every cell is a run of `forwardgrad train` in a folder of its own, so an
interrupted table continues where it was. A row is an algorithm, or one with some of its options, as
`forwardgrad.experiments._methods` has them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from matplotlib.figure import Figure

from forwardgrad._console import Console
from forwardgrad._errors import InputError
from forwardgrad.experiments._experiment import (
    Cells,
    Experiment,
    Job,
    Presented,
    check_names,
    read_out,
    run_folder,
    run_job,
)
from forwardgrad.experiments._methods import method_config, method_of
from forwardgrad.experiments._search import SearchOptions, check_search, search
from forwardgrad.results import Place, Table, TableCell, look, over_seeds
from forwardgrad.results._figures import panels
from forwardgrad.results._records import algorithm_of
from forwardgrad.training import ALGORITHMS as KNOWN
from forwardgrad.training._config import Augment, changed

ALGORITHMS = (
    *("bp", "l-bp", "lg-bp", "fa", "l-fa", "lg-fa", "dfa"),
    *("fg-w", "fg-a", "lg-fg-w", "lg-fg-a"),
)
"""The rows of the paper's tables, in its order."""

FIRST_RATE = 1e-2
"""Where the search for a learning rate begins."""

HOLD_OUT = 0.1
"""Share of the training images that the search is judged by."""

UNTRAINED = "untrained"
"""A row of Table 4: a readout of the network as it was initialised."""

ROWS = (UNTRAINED, *ALGORITHMS)

Columns = Mapping[str, Sequence[str]]
"""Data sets with networks, by what the option `columns` calls them."""

Papers = Mapping[Place, float]

Defaults = Mapping[str, Any]

TABLE3_COLUMNS: Columns = {
    "mnist": ("mnist s/1/1", "mnist m/1/16"),
    "cifar10": ("cifar10 m/8/16",),
    "small": ("cifar10 m/4/16",),
    "tiny-imagenet": ("tiny-imagenet m/8/16",),
    "imagenet": ("imagenet l/32/64",),
}
TABLE4_COLUMNS: Columns = {
    "m/8/16": ("cifar10 m/8/16",),
    "l/8/64": ("cifar10 l/8/64",),
    "small": ("cifar10 m/4/16",),
}


def _papers(columns: Mapping[str, Sequence[float]]) -> Papers:
    return {
        Place(column, (algorithm,)): error
        for column, errors in columns.items()
        for algorithm, error in zip(ALGORITHMS, errors, strict=True)
    }


# fmt: off
TABLE3_PAPER = _papers({
    "mnist s/1/1": (2.66, 2.38, 2.43, 2.82, 3.21, 3.11, 3.31, 9.25, 3.24, 9.25, 3.24),
    "mnist m/1/16": (2.41, 2.16, 2.81, 2.90, 2.90, 2.50, 3.17, 8.56, 3.76, 5.66, 2.55),
    "cifar10 m/8/16": (33.6, 30.8, 33.8, 39.9, 39.7, 39.7, 38.8, 56.0, 59.7, 52.7, 30.7),
})
TABLE4_PAPER = _papers({
    "cifar10 m/8/16": (24.1, 24.7, 29.6, 45.9, 37.7, 36.7, 46.1, 53.4, 54.6, 52.7, 32.9),
})
# fmt: on


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableOptions(SearchOptions):
    """Settings of any of the tables."""

    algorithms: tuple[str, ...] = ALGORITHMS
    """Algorithms, one row each; with +adamw, +balance, +crop, +decay, +dense, +direct, +orthogonal,
    +variate and @TANGENTS for options of train."""
    epochs: int | None
    """Passes over the training set."""
    iterations: int | None = None
    """Stop after this many steps instead."""
    batch_size: int | None
    """Examples per step."""
    image_size: int | None = None
    """Height and width that images are resized to, as for train. Default: as they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions(TableOptions):
    """Settings of `compare`."""

    dataset: str = "digits"
    """Data set, as for train."""
    network: str = "m/1/16"
    """Network, as for train."""
    epochs: int = 30
    batch_size: int = 64
    warmup: int = 0
    """Steps over which the learning rate first rises."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PapersOptions(TableOptions):
    """What `reproduce table3` and `reproduce table4` have in common."""

    SHORT: ClassVar[Defaults]
    PAPER: ClassVar[Defaults]
    """What the authors' published configuration has, which is that of ImageNet. Its warm-up of ten
    epochs is here ten of CIFAR-10."""

    settings: Literal["short", "paper"] = "short"
    """Settings that are not given: short, for small machines; or paper, those of the authors'
    published configuration, which is that of ImageNet."""
    epochs: int | None = None
    """Passes over the training set. Default: 40 in table3, 100 in table4; paper: 120, 800."""
    batch_size: int | None = None
    """Examples per step; in contrastive learning images, each in two views. Default: 128, 256;
    paper: 256, 2048."""
    warmup: int | None = None
    """Steps over which the learning rate first rises. Default: 0, 100; paper: 1950, 240, which are
    ten epochs of CIFAR-10."""

    def __post_init__(self):
        defaults = self.PAPER if self.settings == "paper" else self.SHORT
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None and field.name in defaults:
                object.__setattr__(self, field.name, defaults[field.name])

    @property
    def of_runs(self) -> Mapping[str, Any]:
        """Settings of the runs that are no options here."""
        own = {field.name for field in dataclasses.fields(self)}
        settings = self.PAPER if self.settings == "paper" else {}
        return {name: value for name, value in settings.items() if name not in own}


_PUBLISHED = {"momentum": 0.9, "schedule": "cosine", "weight_decay": 1e-4, "tangents": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table3Options(_PapersOptions):
    """Settings of `reproduce table3`."""

    SHORT: ClassVar[Defaults] = {"epochs": 40, "batch_size": 128, "warmup": 0, "augment": "none"}
    PAPER: ClassVar[Defaults] = {
        **{"epochs": 120, "batch_size": 256, "warmup": 1950, "augment": "simclr"},
        **{"optimizer": "sgd", "learning_rate": 0.05, "least_area": 0.3, **_PUBLISHED},
    }

    columns: tuple[str, ...] = ("mnist",)
    """Data sets whose columns are wanted: mnist, cifar10, imagenet; and two that the paper does not
    have: small, m/4/16 on cifar10, which takes a quarter of the time with --image-size 16, and
    tiny-imagenet, m/8/16."""
    augment: Augment | None = None
    """Random changes of the training images, as for train: none, crop-flip, simclr. Default: none;
    paper: simclr, with a least area of 0.3."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table4Options(_PapersOptions):
    """Settings of `reproduce table4`."""

    SHORT: ClassVar[Defaults] = {"epochs": 100, "batch_size": 256, "warmup": 100}
    PAPER: ClassVar[Defaults] = {
        **{"epochs": 800, "batch_size": 2048, "warmup": 240, "least_area": 0.08},
        **{"optimizer": "lars", "learning_rate": 0.1, "scale_learning_rate": True, **_PUBLISHED},
    }

    columns: tuple[str, ...] = ("m/8/16",)
    """Networks whose columns are wanted, on CIFAR-10: m/8/16, l/8/64; and small, m/4/16, which the
    paper does not have, and which takes a quarter of the time with --image-size 16."""
    algorithms: tuple[str, ...] = ROWS
    """Algorithms, one row each; untrained is a readout of the network before training."""
    examples: int | None = None
    """Training images that the readouts are fitted on. Default: all."""
    seeds: int = 1


def in_order(algorithms: Sequence[str]) -> list[str]:
    """Each row once, in the paper's order of algorithms; those that it does not have come last."""

    def place(name: str) -> int:
        algorithm = algorithm_of(name)
        return ROWS.index(algorithm) if algorithm in ROWS else len(ROWS)

    return sorted(dict.fromkeys(algorithms), key=place)


def is_row(name: str) -> bool:
    """Whether a table can have a row of this name.

    >>> is_row("lg-fg-a@16"), is_row("lg-fg-a+nothing")
    (True, False)
    """
    try:
        return name == UNTRAINED or bool(method_of(name))
    except InputError:
        return False


def _plan(columns: Columns, task: str, options: Any) -> Iterator[Job]:
    """Seed by seed: the table is complete early, and gets more exact."""
    check_search(options)
    if task == "contrastive" and options.search_iterations:
        raise InputError(
            "search_iterations must be 0 in contrastive learning, where how well the readout "
            f"predicts says little of the features, got {options.search_iterations}"
        )
    # Untrained features are read from the folder of another run.
    algorithms = sorted(options.algorithms, key=lambda name: name == UNTRAINED)
    chosen, more = _chosen(columns, options), getattr(options, "of_runs", {})
    for seed, column, algorithm in itertools.product(range(options.seeds), chosen, algorithms):
        # A network's name has no space, a folder's may.
        dataset, _, network = column.rpartition(" ")
        what = {"task": task, "dataset": dataset, "network": network, "seed": seed}
        config = None
        if task == "supervised" or algorithm != UNTRAINED:
            config = method_config(options, algorithm, more, **what)
        yield Job({"column": column, "algorithm": algorithm}, seed, config)


def _chosen(columns: Columns, options: Any) -> list[str]:
    if not columns:
        return [f"{options.dataset} {options.network}"]
    check_names("column", options.columns, columns)
    if options.settings == "paper" and "mnist" in options.columns:
        raise InputError(
            "settings 'paper' are for images in colour, and columns have mnist: pass others"
        )
    return [column for name in options.columns for column in columns[name]]


def _make(job: Job, options: Any, console: Console) -> dict[str, Any]:
    if job.place["algorithm"] != UNTRAINED:
        return _train(job, options, console)
    for other in KNOWN:
        folder = run_folder(options, {**job.place, "algorithm": other}, job.seed)
        if (folder / "summary.json").exists():
            return {**read_out(folder, options, untrained=True), "seconds": 0.0}
    raise InputError(
        f"algorithm {UNTRAINED!r} needs a finished run of {job.place['column']} with seed "
        f"{job.seed} in {options.out}/runs: add another algorithm"
    )


def _train(job: Job, options: Any, console: Console) -> dict[str, Any]:
    """A cell that is trained, with a learning rate that is searched if the options say so."""
    assert job.config is not None
    warmup = job.config.optimisation.warmup
    short = {"hold_out": HOLD_OUT, "warmup": min(warmup, options.search_iterations // 4)}
    config = functools.partial(changed, job.config)
    rate, tried = search(
        job, lambda **given: config({**short, **given}), FIRST_RATE, options, console
    )
    job = job._replace(config=config({"learning_rate": rate}))
    return {**run_job(job, options, console), **tried}


def _present(papers: Papers, error: str, cells: Sequence[TableCell]) -> Presented:
    """A row an algorithm, a column a network, beside the paper's."""
    table = Table(over_seeds(cells), papers)
    names = in_order([cell.algorithm for cell in cells])
    places = [Place(column, (name,)) for column in table.columns for name in names]
    stored = [place for place in places if place in table.means]
    rows = [{**table.means[place].row, "paper": papers.get(place)} for place in stored]
    return Presented(_bars(rows, error), rows, table.text("algorithm", names))


def _bars(rows: Sequence[Mapping[str, Any]], error: str) -> Figure:
    """Bars of the errors, one picture a column, with marks at the paper's."""
    names = list(dict.fromkeys(row["column"] for row in rows))
    figure, every = panels(1, len(names), size=(6.5 * len(names), 4))
    for axes, name in zip(every[0], names, strict=True):
        own = [row for row in rows if row["column"] == name]
        means, spreads = ([row[f"test_error_{k}"] for row in own] for k in ("mean", "std"))
        labels = [row["algorithm"] for row in own]
        places, colors = range(len(own)), [look(label)[0] for label in labels]
        axes.bar(places, means, yerr=spreads, color=colors)
        if any(row["paper"] for row in own):
            paper = [row["paper"] or np.nan for row in own]
            axes.plot(places, paper, "_k", markersize=18, markeredgewidth=2, label="paper")
            axes.legend()
        axes.set_xticks(places, labels, rotation=45, ha="right")
        axes.set(ylabel=f"{error} (%)", title=name)
    return figure


_SAME = ("epochs", "iterations", "batch_size", "image_size", "warmup", "search_iterations")
"""Options that all cells of a table share."""


def _table(
    name: str,
    summary: str,
    options: type[TableOptions],
    title: str,
    columns: Columns,
    papers: Papers,
    task: str = "supervised",
    same: tuple[str, ...] = (),
) -> Experiment:
    error = "test error" if task == "supervised" else "test error of a linear readout"
    cells = Cells(
        kind=TableCell,
        plan=functools.partial(_plan, columns, task),
        make=_make,
        present=functools.partial(_present, papers, error),
        same=(*_SAME, *same),
        title=title,
        error=error,
        columns={column: key for key, group in columns.items() for column in group},
        papers=papers,
    )
    return Experiment(name, summary, options, cells)


TABLE3 = _table(
    "table3",
    "all algorithms on LocalMixers, beside the paper's numbers",
    Table3Options,
    "Table 3 of Ren et al. (2023), supervised",
    TABLE3_COLUMNS,
    TABLE3_PAPER,
    same=("settings", "augment"),
)

TABLE4 = _table(
    "table4",
    "contrastive learning by all algorithms, with a linear readout",
    Table4Options,
    "Table 4 of Ren et al. (2023), contrastive",
    TABLE4_COLUMNS,
    TABLE4_PAPER,
    task="contrastive",
    same=("settings", "examples"),
)

COMPARE = _table(
    "compare",
    "all algorithms on one data set",
    CompareOptions,
    "All algorithms on one data set",
    columns={},
    papers={},
)
"""What `forwardgrad compare` runs."""
