"""Who hears of a perturbation: the figure that explains credit by token.

    python benchmarks/tokens_figure.py --out docs/images/tokens.png

For each kind of layer of a decoder of two blocks, the losses of which tokens change if what the
layer computes for one token is perturbed: measured, as the norm of the Jacobian between the two, at
random weights. An outline is what the program says without being evaluated (`forwardgrad.explain`):
one for each token where an activation keeps it, and one for all where it mixes them. A minute.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import forwardgrad as fg
import tokens
from forwardgrad.results import save

TOKENS = 6
SIZES = tokens.Options(width=16, context=TOKENS, batch=2)
COLOUR, OUTLINE = "Blues", "#d8453e"


@dataclasses.dataclass(frozen=True)
class Options:
    """Where the figure goes."""

    out: Path = Path("tokens.png")
    """File for the figure, a PNG."""


def setup(greedy: bool) -> tuple[Any, Any]:
    """The losses of the decoder as a function of weights and shifts, and its weights."""
    x, y = tokens.batch(SIZES, np.random.default_rng(0))

    def losses(params, shifts=({}, {})):
        return tokens.losses(params, x, y, greedy, shifts)

    return losses, tokens.start(SIZES)


def heard(greedy: bool) -> list[dict[str, np.ndarray]]:
    """By block and kind of layer: how much a loss [token] hears of what is computed at [token]."""
    losses, params = setup(greedy)
    shape = (SIZES.batch, TOKENS)
    shifts = tuple(
        {k: jnp.zeros((*shape, SIZES.width * (4 if k == "up" else 1))) for k in tokens.KINDS}
        for _ in range(2)
    )

    def by_token(shifts):
        return sum(jnp.sum(term, axis=0) for term in losses(params, shifts).terms)

    jacobian = jax.jit(jax.jacrev(by_token))(shifts)
    norms = jax.tree.map(lambda j: np.asarray(jnp.linalg.norm(j, axis=(1, 3))), jacobian)
    return list(norms)


def kept(greedy: bool) -> list[dict[str, bool]]:
    """By block and kind of layer: whether the program says that it keeps its token."""
    losses, params = setup(greedy)
    rows = fg.explain(losses, fg.ActivityPerturbation(), params).rows
    axes = {row.path: row.axes for row in rows}

    def keeps(block: int, kind: str) -> bool:
        found = axes[f"['blocks'][{block}]['{kind}']"]
        return any(a.startswith("token") and a.endswith("axis 1") for a in found)

    return [{kind: keeps(block, kind) for kind in tokens.KINDS} for block in range(2)]


def draw(figure: Figure) -> None:
    """Two rows, for one loss at the end and for greedy losses; twelve columns, of two blocks."""
    every = figure.subplots(2, 13, gridspec_kw={"width_ratios": [*[1] * 6, 0.3, *[1] * 6]})
    for row, greedy in zip(every, (False, True), strict=True):
        row[6].axis("off")
        measured, said = heard(greedy), kept(greedy)
        for block in range(2):
            for axes, kind in zip(row[7 * block :], tokens.KINDS, strict=False):
                panel(axes, measured[block][kind], said[block][kind])
                if not greedy:
                    axes.set_title(kind, fontsize=9)
        row[0].set_ylabel("greedy\nlosses" if greedy else "one loss\nat the end", fontsize=9)
    for x, block in ((0.295, "first block"), (0.775, "second block")):
        figure.text(x, 0.93, block, ha="center", fontsize=10)
    figure.text(0.535, 0.03, "token that is perturbed →", ha="center", fontsize=9)
    figure.text(0.012, 0.5, "← token whose loss changes", va="center", rotation=90, fontsize=9)


def panel(axes: Axes, norms: np.ndarray, keeps: bool) -> None:
    """One kind of layer: shades for what is measured, outlines for what is said."""
    largest = norms.max()
    axes.imshow(np.where(norms > 1e-6 * largest, 0.25 + 0.75 * norms / largest, 0), COLOUR)
    axes.images[0].set_clim(0, 1.2)
    boxes = [(i, 1) for i in range(TOKENS)] if keeps else [(0, TOKENS)]
    for start, size in boxes:
        corner = (start - 0.5, start - 0.5)
        outline = Rectangle(corner, size, size, fill=False, ec=OUTLINE, lw=1.2, clip_on=False)
        axes.add_patch(outline)
    axes.spines[:].set_visible(False)
    axes.set(xticks=[], yticks=[])


def main(options: Options) -> None:
    """Measure and draw."""
    figure = Figure(figsize=(11, 2.5))
    figure.subplots_adjust(left=0.075, right=0.995, top=0.8, bottom=0.12, wspace=0.15, hspace=0.15)
    draw(figure)
    save(figure, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
