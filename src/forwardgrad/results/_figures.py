"""The look of an algorithm in every figure, and figures on disk."""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike

from forwardgrad._files import write_bytes
from forwardgrad.results._records import algorithm_of

COLORS = {
    "bp": "#2f7fc1",
    "fa": "#9a6fc9",
    "dfa": "#cf5fa5",
    "fg-w": "#c87512",
    "fg-a": "#d8453e",
    "np": "#2e8b57",
    "": "#84878c",
}
"""By estimator, each with a contrast of three to one on white and on black; last: any other."""

STYLES = {"": ("-", "o"), "l-": ("--", "s"), "lg-": ("-.", "D")}
"""Line and marker by objective."""


def look(algorithm: str) -> tuple[str, str, str]:
    """Colour, line and marker of an algorithm, whatever is added to it by + or @."""
    algorithm = algorithm_of(algorithm)
    prefix = next((p for p in ("lg-", "l-") if algorithm.startswith(p)), "")
    return (COLORS.get(algorithm.removeprefix(prefix), COLORS[""]), *STYLES[prefix])


def picture(figure: Figure, kind: Literal["png", "svg"] = "png") -> bytes:
    """A figure as a file's bytes; an SVG has no background."""
    options: dict[str, Any] = {"dpi": 130, "metadata": {"Software": None}}
    if kind == "svg":
        options = {"transparent": True, "metadata": {"Date": None}}
    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "forwardgrad"}), warnings.catch_warnings():
        # A letter that the font lacks is a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(file, format=kind, **options)
    return file.getvalue()


def panels(
    rows: int, columns: int, *, size: tuple[float, float], **options: Any
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes [rows, columns], with a grid in each.

    **Arguments:**

    - `rows`, `columns`: how many axes.
    - `size`: of the figure, width and height in inches.
    - `options`: of `matplotlib.figure.Figure.subplots`.
    """
    figure = Figure(figsize=size, layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in every.flat:
        axes.grid(alpha=0.3)
    return figure, every


def band(axes: Axes, x: ArrayLike, lines: Sequence[ArrayLike], **style: Any) -> None:
    """A line, with what is between the one below it and the one above in its colour."""
    low, middle, high = lines
    (line,) = axes.plot(x, middle, **style)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_bytes(path, picture(figure))


def scale(axes: Axes, name: Literal["x", "y"], values: Sequence[float]) -> None:
    """Make an axis logarithmic where the values are far apart, with ticks that are numbers."""
    axis = axes.xaxis if name == "x" else axes.yaxis
    if 0 < 4 * min(values) < max(values):
        axes.set(**{f"{name}scale": "log"})
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
