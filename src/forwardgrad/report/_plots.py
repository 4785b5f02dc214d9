"""Learning curves, and cost against accuracy."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from forwardgrad.experiments import in_order
from forwardgrad.report._collect import Collection
from forwardgrad.report._table import column
from forwardgrad.results import look, picture, scale
from forwardgrad.results._figures import panels
from forwardgrad.results._tables import grouped
from forwardgrad.training import Run
from forwardgrad.training._config import of_the_result

Point = tuple[float, float]

_MARKERS = ("", "o", "^", "v", "x", "+")


class Series(NamedTuple):
    """A line, with the seeds that it is the mean of, or a single point."""

    label: str
    algorithm: str
    points: list[Point]
    seeds: list[list[Point]] = []  # noqa: RUF012
    variant: int = 0


class Plot(NamedTuple):
    """A picture, and what there is to see, in words."""

    name: str
    alt: str
    figure: Figure
    series: list[Series]


class Group(NamedTuple):
    """Plots under one heading."""

    title: str
    note: str
    plots: list[Plot]


def curves(collection: Collection) -> list[Group]:
    """Test error and loss against epochs, for runs that share task, data set and network."""
    groups: list[Group] = []
    for title, runs in grouped(collection.runs, column).items():
        plots = []
        for key, label in (("test_error", "test error (%)"), ("loss", "training loss")):
            series = [s for each in _alike(runs) if (s := _curve(*each, key)).points]
            if series:
                name = f"curves-{len(groups) + 1}-{key.replace('_', '-')}"
                plots.append(_plot(name, "epochs", label, series))
        if plots:
            counts = f"{len(runs)} run{'s' * (len(runs) > 1)}"
            note = f"{counts}; where there are several seeds, they are thin and their mean is thick"
            groups.append(Group(title, note, plots))
    return groups


def costs(collection: Collection) -> list[Group]:
    """Seconds of training against test error: each column of a table, and the runs beside them."""
    shown = [(title, series) for title, series in _costs(collection) if len(series) > 1]
    return [_cost(f"cost-{i}", *each) for i, each in enumerate(shown, 1)]


def pareto(points: Sequence[Point]) -> list[bool]:
    """Whether no other point is at least as good in both coordinates, and better in one.

    >>> pareto([(1.0, 3.0), (2.0, 1.0), (2.0, 2.0), (3.0, 1.0)])
    [True, True, False, False]
    """
    return [not any(x <= a and y <= b and (x, y) != (a, b) for x, y in points) for a, b in points]


def _costs(collection: Collection) -> Iterator[tuple[str, list[Series]]]:
    for table in (t for t in collection.tables if t.cells.kind.ROW == ("algorithm",)):
        for name, own in grouped(table.table.means.items(), lambda item: item[0].column).items():
            means = [(place.row[0], mean.cells) for place, mean in own]
            points = [s for label, cells in means for s in _mean(label, label, 0, cells)]
            yield f"{name}, {table.path.parent.as_posix()}", points
    finished = [run for run in collection.runs if run.state == "finished"]
    alone = [run for run in finished if not any(table.has(run) for table in collection.tables)]
    for title, runs in grouped(alone, column).items():
        ends = [(label, v, [run.result for run in same]) for label, same, v in _alike(runs)]
        points = [p for label, v, own in ends for p in _mean(label, own[0].algorithm, v, own)]
        yield f"{title}, single runs", points


def _mean(label: str, algorithm: str, variant: int, ends: Iterable[Any]) -> Iterator[Series]:
    """The mean over seeds, of those whose seconds are known."""
    known = [(end.seconds, end.test_error) for end in ends if end.seconds]
    if known:
        seconds, error = np.mean(known, axis=0)
        yield Series(label, algorithm, [(float(seconds), float(error))], variant=variant)


def _alike(runs: Sequence[Run]) -> list[tuple[str, list[Run], int]]:
    """Runs that differ in the seed alone, with a label and the number among their algorithm's."""
    groups, found = grouped(runs, lambda run: tuple(_settings(run).values())), []
    for algorithm in in_order([run.config.algorithm for run in runs]):
        own = [group for group in groups.values() if group[0].config.algorithm == algorithm]
        others = [_settings(group[0]) for group in own]
        for i, group in enumerate(own):
            differing = [k for k, v in others[i].items() if any(o[k] != v for o in others)]
            settings = [f"{k.replace('_', ' ')} {others[i][k]}" for k in differing]
            found.append((", ".join([algorithm, *settings]), group, i))
    return found


def _settings(run: Run) -> dict[str, Any]:
    return {k: v for k, v in of_the_result(run.config).items() if k != "seed"}


def _curve(label: str, runs: Sequence[Run], variant: int, key: str) -> Series:
    """The mean over seeds, at the epochs that all of them have."""
    lines = [[line for line in run.measurements if line.event == "epoch"] for run in runs]
    seeds = [{e.epoch: y for e in own if (y := getattr(e, key)) is not None} for own in lines]
    seeds = [points for points in seeds if points]
    common = set.intersection(*map(set, seeds)) if seeds else set()
    mean = [(x, float(np.mean([points[x] for points in seeds]))) for x in sorted(common)]
    thin = [sorted(points.items()) for points in seeds] if len(seeds) > 1 else []
    return Series(label, runs[0].config.algorithm, mean, thin, variant)


def _cost(name: str, title: str, series: list[Series]) -> Group:
    order = in_order([s.algorithm for s in series])
    series = sorted(series, key=lambda s: order.index(s.algorithm))
    best = [s for s, b in zip(series, pareto([s.points[0] for s in series]), strict=True) if b]
    best.sort(key=lambda s: s.points[0])
    listed = "; ".join(f"{s.label} ({x:.3g} s, {y:.2f} %)" for s in best for x, y in s.points)
    plot = _plot(name, "seconds of training", "test error (%)", series)
    axes, points = plot.figure.axes[0], [s.points[0] for s in best]
    axes.plot(*zip(*points, strict=True), color="gray", linewidth=1, linestyle=":")
    axes.plot(*zip(*points, strict=True), "o", color="gray", markersize=12, fillstyle="none")
    scale(axes, "x", [s.points[0][0] for s in series])
    note = f"On the front, where nothing is both faster and more accurate: {listed}."
    return Group(title, note, [plot])


def _plot(name: str, x: str, y: str, series: list[Series]) -> Plot:
    longest = max(len(_label(s)) for s in series)
    columns = max(1, min(4, 60 // (longest + 5)))
    size = (5.4, 3.4 + 0.22 * -(-len(series) // columns))
    figure, ((axes,),) = panels(1, 1, size=size)
    for each in series:
        _draw(axes, each)
    scale(axes, "y", [y for s in series for line in (s.points, *s.seeds) for _, y in line])
    axes.set(xlabel=x, ylabel=y)
    # Names are no formulas.
    with mpl.rc_context({"text.parse_math": False}):
        figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    # Every file has the same layout, whichever is made first.
    picture(figure)
    figure.set_layout_engine("none")
    ends = "; ".join(f"{s.label}: {s.points[-1][1]:.3g}" for s in series)
    return Plot(name, f"{y} against {x}, {'at the end ' * (x == 'epochs')}{ends}", figure, series)


def _draw(axes: Axes, series: Series) -> None:
    color, line, marker = look(series.algorithm)
    for points in series.seeds:
        axes.plot(*zip(*points, strict=True), color=color, linewidth=0.6, alpha=0.5)
    style: dict[str, Any] = {"linestyle": "none", "marker": marker}
    if len(series.points) > 1:
        marker = _MARKERS[series.variant % len(_MARKERS)]
        style = {"linestyle": line, "marker": marker, "linewidth": 1.8, "markevery": 0.1}
    axes.plot(*zip(*series.points, strict=True), color=color, label=_label(series), **style)


def _label(series: Series) -> str:
    """Without what a legend or an XML file cannot hold."""
    text = "".join(c if c.isprintable() else "?" for c in series.label)
    return (text.lstrip("_") or "?")[:60]
