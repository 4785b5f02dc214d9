"""What the paper's tables have: which rows, which columns, which numbers."""

from collections.abc import Mapping, Sequence

from forwardgrad.experiments._table import Column
from forwardgrad.experiments._table_files import ALGORITHMS, ROWS
from forwardgrad.experiments._tables import COLUMNS, CONTRASTIVE_COLUMNS

PAPERS: Mapping[str, Mapping[str, Sequence[Column]]] = {
    "table3": COLUMNS,
    "table4": {name: (column,) for name, column in CONTRASTIVE_COLUMNS.items()},
}
"""For each of the paper's tables its columns, by the name that `--columns` knows them by."""

TITLES = {
    "table3": "Table 3 of Ren et al. (2023), supervised",
    "table4": "Table 4 of Ren et al. (2023), contrastive",
    "compare": "All algorithms on one data set",
    "ablation": "Which local losses help",
}

ERRORS = {"table4": "test error of a linear readout"}
"""What is tabulated, where it is not the test error."""


def in_order(algorithms: Sequence[str]) -> list[str]:
    """Each algorithm once, in the paper's order; those that it does not have come last."""
    names = list(dict.fromkeys(algorithms))
    return sorted(names, key=lambda name: ROWS.index(name) if name in ROWS else len(ROWS))


def published(experiment: str) -> dict[tuple[str, str], float]:
    """The paper's test errors in per cent, by column and algorithm."""
    return {
        (column.name, algorithm): error
        for columns in PAPERS.get(experiment, {}).values()
        for column in columns
        if column.paper
        for algorithm, error in zip(ALGORITHMS, column.paper, strict=True)
    }
