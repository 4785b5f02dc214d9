"""Plots as SVG to be set into a page, and as PNG."""

import io
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from forwardgrad.report._view import Plot, Series

COLORS = {
    "bp": "#2f7fc1",
    "fa": "#9a6fc9",
    "dfa": "#cf5fa5",
    "fg-w": "#c87512",
    "fg-a": "#d8453e",
    "": "#84878c",
}
"""By estimator, each with a contrast of three to one on white and on black; last: any other."""

STYLES = {"": ("-", "o"), "l-": ("--", "s"), "lg-": ("-.", "D")}
"""Line and marker by objective."""

WIDE = 4
"""Ratio of the largest to the smallest value from which on an axis is logarithmic."""

VARIANTS = ("", "o", "^", "v", "x", "+")
"""Markers that tell lines of one algorithm from each other."""

# A colour that is used for nothing else; in the page it becomes that of the text.
INK = "#0a0b0d"
MUTED = {"color": INK, "alpha": 0.2}

_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "forwardgrad",
    # Names in labels are no formulas.
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}

_NAMESPACE = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


def svg(plot: Plot) -> str:
    """The plot as an element of HTML, without anything that clashes with a second one."""
    file = io.StringIO()
    _save(plot, file, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        _adapt(element, plot.name)
    width, height = root.attrib.pop("width"), root.attrib.pop("height")
    root.set("style", f"max-width: {width}; aspect-ratio: {width[:-2]} / {height[:-2]}")
    root.set("role", "img")
    root.set("aria-label", plot.alt)
    return ET.tostring(root, encoding="unicode").replace(INK, "currentColor")


def png(plot: Plot) -> bytes:
    """The plot as a file's bytes."""
    file = io.BytesIO()
    _save(plot, file, format="png", dpi=130, metadata={"Software": None})
    return file.getvalue()


def _save(plot: Plot, file: Any, **options: Any) -> None:
    with mpl.rc_context(_SETTINGS), warnings.catch_warnings():
        # A name in letters that the font lacks is shown by the browser's.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        _draw(plot).savefig(file, **options)


def _draw(plot: Plot) -> Figure:
    rows = -(-len(plot.series) // _legend_columns(plot))
    figure = Figure(figsize=(5.4, 3.4 + 0.22 * rows), layout="constrained")
    axes = figure.subplots()
    for series in plot.series:
        (_line if plot.kind == "lines" else _point)(axes, series)
    if plot.kind == "points":
        _front(axes, plot)
        _scale(axes.xaxis, axes.set_xscale, [x for series in plot.series for x, _ in series.points])
    values = [y for s in plot.series for line in (s.points, *s.thin) for _, y in line]
    _scale(axes.yaxis, axes.set_yscale, values)
    axes.set(xlabel=plot.xlabel, ylabel=plot.ylabel)
    axes.grid(which="both", linewidth=0.6, **MUTED)
    handles, _ = axes.get_legend_handles_labels()
    figure.legend(
        loc="outside lower center", ncols=_legend_columns(plot), handles=handles, frameon=False
    )
    return figure


def _scale(axis: Axis, set_scale: Callable[[str], None], values: Sequence[float]) -> None:
    """Logarithmic where the values ask for it, with ticks that are plain numbers."""
    if 0 < WIDE * min(values) < max(values):
        set_scale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend_columns(plot: Plot) -> int:
    longest = max(len(series.label) for series in plot.series)
    return max(1, min(4, 60 // (longest + 5)))


def _look(series: Series) -> tuple[str, str, str]:
    """Colour, line and marker."""
    name = series.algorithm
    prefix = next((p for p in ("lg-", "l-") if name.startswith(p)), "")
    return (COLORS.get(name.removeprefix(prefix), COLORS[""]), *STYLES[prefix])


def _line(axes: Axes, series: Series) -> None:
    color, style, _ = _look(series)
    for points in series.thin:
        axes.plot(*zip(*points, strict=True), color=color, linewidth=0.6, alpha=0.5)
    marker = VARIANTS[series.variant % len(VARIANTS)]
    look = {"color": color, "linestyle": style, "linewidth": 1.8, "label": _label(series)}
    # A single epoch makes no line.
    marker = marker or ("o" if len(series.points) == 1 else "")
    axes.plot(*zip(*series.points, strict=True), marker=marker, markevery=0.1, **look)


def _point(axes: Axes, series: Series) -> None:
    color, _, marker = _look(series)
    fill = color if series.marked else "none"
    look = {"color": color, "markerfacecolor": fill, "markersize": 7, "linestyle": "none"}
    axes.plot(*zip(*series.points, strict=True), marker=marker, label=_label(series), **look)


def _front(axes: Axes, plot: Plot) -> None:
    points = sorted(series.points[0] for series in plot.series if series.marked)
    axes.plot(*zip(*points, strict=True), color=INK, alpha=0.5, linewidth=1, linestyle=":")
    for series in plot.series:
        if series.marked:
            axes.annotate(
                series.algorithm.encode("ascii", "replace").decode(),
                series.points[0],
                xytext=(5, 5),
                textcoords="offset points",
                fontsize=8.5,
            )


def _label(series: Series) -> str:
    """Without what a legend or an XML file cannot hold."""
    text = "".join(c if c.isprintable() else "?" for c in series.label)
    return (text.lstrip("_") or "?")[:60]


def _adapt(element: ET.Element, name: str) -> None:
    """Without namespaces, and with ids of the plot's own."""
    element.tag = element.tag.removeprefix(_NAMESPACE)
    link = element.attrib.pop(_LINK, None)
    if link is not None:
        element.set("href", f"#{name}-{link.removeprefix('#')}")
    for key, value in element.attrib.items():
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif "url(#" in value:
            element.set(key, value.replace("url(#", f"url(#{name}-"))
