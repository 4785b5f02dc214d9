"""A picture of what an augmentation does."""

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure

from forwardgrad.augmentation import AbstractAugmentation, Chain, augment

LETTERS = 12
"""Of a class's name that fit above an image."""


class Row(NamedTuple):
    """A row of the sheet: what is written next to it, in one line or two, and its images."""

    label: str
    images: Float[np.ndarray, "images height width channels"]


def contact_sheet(
    augmentation: AbstractAugmentation,
    images: UInt8[np.ndarray, "images height width channels"],
    classes: Sequence[str],
    title: str,
    *,
    seed: int,
) -> Figure:
    """A figure with the rows of `rows`, a column for each image, headed by its class."""
    made = rows(augmentation, images, seed=seed)
    size = (2 + 0.8 * len(images), 0.7 + 0.8 * len(made))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, wrap=True)
    grid = figure.subplots(len(made), len(images), squeeze=False)
    for places, row in zip(grid, made, strict=True):
        for axes, image in zip(places, row.images, strict=True):
            colours = np.broadcast_to(image, (*image.shape[:2], 3))
            axes.imshow(colours, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        places[0].set_ylabel(row.label, rotation=0, ha="right", va="center", fontsize=8)
    for axes, name in zip(grid[0], classes, strict=True):
        short = name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"
        axes.set_title(short, fontsize=8)
    return figure


def rows(
    augmentation: AbstractAugmentation,
    images: UInt8[np.ndarray, "images height width channels"],
    *,
    seed: int,
) -> list[Row]:
    """The images as they are, after each of a chain's parts alone, and after all, twice.

    A part that comes with a probability is applied to every image, and its probability written
    next to it. What never changes images of this shape has no row.
    """
    floats = jnp.asarray(images, jnp.float32) / 255
    parts = augmentation.augmentations if isinstance(augmentation, Chain) else ()
    drawn = [(_label(part), _always(part)) for part in parts if _changes(part, floats[0])]
    if _changes(augmentation, floats[0]):
        drawn += [(f"all of it,\n{draw} draw", augmentation) for draw in ("first", "second")]
    key = jax.random.key(seed)
    return [
        Row("as they are", np.asarray(floats)),
        *(
            Row(label, np.asarray(_augment(part, floats, jax.random.fold_in(key, i))))
            for i, (label, part) in enumerate(drawn)
        ),
    ]


_augment = eqx.filter_jit(augment)


def _changes(augmentation: AbstractAugmentation, image: jax.Array) -> bool:
    return augmentation(image, key=jax.random.key(0)) is not image


def _always(augmentation: AbstractAugmentation) -> AbstractAugmentation:
    if getattr(augmentation, "probability", 1) == 1:
        return augmentation
    return dataclasses.replace(augmentation, probability=1.0)


def _label(augmentation: AbstractAugmentation) -> str:
    """The class's name in words, and how often it is applied."""
    name = " ".join(re.findall("[A-Z][a-z]*", type(augmentation).__name__)).lower()
    probability = getattr(augmentation, "probability", 1)
    if probability == 1:
        return name
    # A default that depends on the image.
    often = "sometimes" if probability is None else f"probability {probability:g}"
    return f"{name},\n{often}"
