"""A picture of what an augmentation does."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure

from forwardgrad.augmentation import AbstractAugmentation, Chain, augment

# That of `save`, so that a pixel of the sheet is a pixel of the file.
DPI = 130
_CELL = 96
_GAP = 4
_TOP, _LEFT, _MARGIN = 62, 190, 12
# Pixels that a letter of a class's name takes, about.
_LETTER = 9


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
    pixels = montage([row.images for row in made])
    height, width = pixels.shape[0] + _TOP + _MARGIN, pixels.shape[1] + _LEFT + _MARGIN
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    # Unlike `imshow`, never resampled.
    figure.figimage(pixels, xo=_LEFT, yo=_MARGIN, origin="upper")

    def write(text, x, y, **style):
        figure.text(x / width, 1 - y / height, text, **{"fontsize": 8, "va": "center", **style})

    title = _short(title, width // _LETTER - 3)
    write(title, _MARGIN, _TOP / 2 - 8, fontsize=9, weight="bold")
    for x, cell, name in _centres(pixels.shape[1], classes):
        write(_short(name, cell // _LETTER), _LEFT + x, _TOP - 6, ha="center", va="bottom")
    for y, _, row in _centres(pixels.shape[0], made):
        write(row.label, _MARGIN, _TOP + y, linespacing=1.5)
    return figure


def _centres(pixels: int, items: Sequence[Any]) -> Iterator[tuple[float, int, Any]]:
    """For each item, along one axis of the montage, the middle and the length of its cell."""
    cell = (pixels + _GAP) // len(items) - _GAP
    for i, item in enumerate(items):
        yield i * (cell + _GAP) + cell / 2, cell, item


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


def montage(
    images: Sequence[Float[np.ndarray, "images height width channels"]],
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Rows of images, enlarged by a whole number, with white between them."""
    array = np.rint(255 * np.stack(images)).astype(np.uint8)
    scale = max(1, round(_CELL / max(array.shape[2:4])))
    array = np.broadcast_to(array, (*array.shape[:-1], 3)).repeat(scale, 2).repeat(scale, 3)
    array = np.pad(array, [(0, 0), (0, 0), (0, _GAP), (0, _GAP), (0, 0)], constant_values=255)
    down, across, height, width, _ = array.shape
    array = array.transpose(0, 2, 1, 3, 4).reshape(down * height, across * width, 3)
    return array[:-_GAP, :-_GAP]


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


def _short(name: str, letters: int) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}…"
