"""Learning curves, and cost against accuracy."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from forwardgrad.report._paper import in_order
from forwardgrad.report._read import number
from forwardgrad.report._runs import in_table
from forwardgrad.report._stored import Collection, Run
from forwardgrad.report._tables import by_place
from forwardgrad.report._view import Group, Plot, Point, Series
from forwardgrad.training._config import NOT_OF_THE_RESULT

CURVES = (("test_error", "test error (%)"), ("loss", "training loss"))

Cost = tuple[str, str, int, Point]


def curves(collection: Collection) -> tuple[Group, ...]:
    """Test error and loss against epochs, for runs that share task, data set and network."""
    groups = []
    for column, runs in _by_column(collection.runs).items():
        plots = []
        for key, ylabel in CURVES:
            series = [_curve(*each, key) for each in _alike(runs)]
            if series := tuple(s for s in series if s.points):
                name = f"curves-{len(groups) + 1}-{key.replace('_', '-')}"
                plots.append(Plot(name, "lines", "epochs", ylabel, series))
        if plots:
            counts = f"{len(runs)} run{'s' * (len(runs) > 1)}"
            note = f"{counts}; where there are several seeds, they are thin and their mean is thick"
            groups.append(Group(column, note, tuple(plots)))
    return tuple(groups)


def costs(collection: Collection) -> tuple[Group, ...]:
    """Seconds of training against test error: each column of a table, and the runs beside them."""
    found = [*_of_tables(collection), *_of_runs(collection)]
    shown = [(name, points) for name, points in found if len(points) > 1]
    return tuple(_cost(f"cost-{i}", *each) for i, each in enumerate(shown, 1))


def pareto(points: Sequence[Point]) -> list[bool]:
    """Whether no other point is at least as good in both coordinates, and better in one.

    >>> pareto([(1.0, 3.0), (2.0, 1.0), (2.0, 2.0), (3.0, 1.0)])
    [True, True, False, False]
    """
    return [not any(x <= a and y <= b and (x, y) != (a, b) for x, y in points) for a, b in points]


def _of_tables(collection: Collection) -> Iterator[tuple[str, list[Cost]]]:
    for table in (t for t in collection.tables if t.heads == ("algorithm",)):
        columns: dict[str, list[Cost]] = {}
        for (column, row), cells in by_place(table.cells).items():
            ends = [(c.seconds, c.test_error) for c in cells]
            _add(columns.setdefault(column, []), row[0], row[0], 0, ends)
        folder = table.path.parent.as_posix()
        yield from ((f"{column}, {folder}", points) for column, points in columns.items())


def _of_runs(collection: Collection) -> Iterator[tuple[str, list[Cost]]]:
    alone = [
        run
        for run in collection.runs
        if run.state == "finished" and not any(in_table(run, table) for table in collection.tables)
    ]
    for column, runs in _by_column(alone).items():
        points: list[Cost] = []
        for label, same, variant in _alike(runs):
            ends = [(number(r.summary.get("seconds")), r.summary["test_error"]) for r in same]
            _add(points, label, same[0].algorithm, variant, ends)
        yield f"{column}, single runs", points


def _by_column(runs: Iterable[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.column, []).append(run)
    return groups


def _alike(runs: Sequence[Run]) -> list[tuple[str, list[Run], int]]:
    """Runs that differ in the seed alone, with a label and the number among their algorithm's."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(repr(sorted(_settings(run).items(), key=lambda x: x[0])), []).append(run)
    found = []
    for algorithm in in_order([run.algorithm for run in runs]):
        own = [group for group in groups.values() if group[0].algorithm == algorithm]
        for i, group in enumerate(own):
            others = [_settings(other[0]) for other in own]
            found.append((_label(algorithm, _settings(group[0]), others), group, i))
    return found


def _settings(run: Run) -> dict[str, Any]:
    return {k: v for k, v in run.settings.items() if k not in ("seed", *NOT_OF_THE_RESULT)}


def _label(algorithm: str, settings: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """The algorithm, and those settings that tell it from the others."""
    differing = [k for k in settings if any(o.get(k) != settings[k] for o in others)]
    return ", ".join([algorithm, *(f"{k.replace('_', ' ')} {settings[k]}" for k in differing)])


def _curve(label: str, runs: Sequence[Run], variant: int, key: str) -> Series:
    """The mean over seeds, at the epochs that all of them have."""
    seeds = [_points(run, key) for run in runs]
    seeds = [points for points in seeds if points]
    common = set.intersection(*(set(points) for points in seeds)) if seeds else set()
    mean = tuple((x, float(np.mean([points[x] for points in seeds]))) for x in sorted(common))
    thin = tuple(tuple(sorted(points.items())) for points in seeds) if len(seeds) > 1 else ()
    return Series(label, runs[0].algorithm, mean, thin, variant)


def _points(run: Run, key: str) -> dict[float, float]:
    lines = [line for line in run.lines if line.get("event") == "epoch"]
    points = [(number(line.get("epoch")), number(line.get(key))) for line in lines]
    return {x: y for x, y in points if x is not None and y is not None}


def _add(
    costs: list[Cost],
    label: str,
    algorithm: str,
    variant: int,
    points: Sequence[tuple[float | None, float]],
) -> None:
    """The mean over seeds, of those whose seconds are known."""
    known = [(seconds, error) for seconds, error in points if seconds]
    if known:
        seconds, error = np.mean(known, axis=0)
        costs.append((label, algorithm, variant, (float(seconds), float(error))))


def _cost(name: str, title: str, costs: Sequence[Cost]) -> Group:
    best = pareto([point for *_, point in costs])
    order = in_order([algorithm for _, algorithm, *_ in costs])
    series = [
        Series(label, algorithm, (point,), variant=variant, marked=marked)
        for (label, algorithm, variant, point), marked in zip(costs, best, strict=True)
    ]
    series.sort(key=lambda s: order.index(s.algorithm))
    optimal = sorted((s.points[0], s.label) for s in series if s.marked)
    listed = "; ".join(f"{label} ({x:.3g} s, {y:.2f} %)" for (x, y), label in optimal)
    note = f"On the front, where nothing is both faster and more accurate: {listed}."
    plot = Plot(name, "points", "seconds of training", "test error (%)", tuple(series))
    return Group(title, note, (plot,))
