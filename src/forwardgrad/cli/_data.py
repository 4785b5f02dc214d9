"""`forwardgrad data`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from forwardgrad._console import Console
from forwardgrad._errors import InputError, unknown_name
from forwardgrad.augmentation import build
from forwardgrad.cli._sheet import contact_sheet
from forwardgrad.cli._surroundings import parse
from forwardgrad.data import Dataset, ResidentSplit, StreamedSplit, load
from forwardgrad.results import save

USAGE = """\
usage: forwardgrad data COMMAND [OPTIONS]

commands:
  show   what an augmentation makes of images, as a picture
"""

DESCRIPTION = """Draw training images, and what an augmentation makes of them, into one picture.

examples:
  forwardgrad data show --augment crop-flip
      scikit-learn's digits, into sheet.png
  forwardgrad data show --dataset cifar10 --data-dir data --jitter 1 --seed 3 --out strong.png
      SimCLR's augmentation at full strength, other images and draws
"""

MOST_IMAGES = 32
"""As many fit next to each other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Settings of `data show`."""

    dataset: str = "digits"
    """Data set, as for train."""
    augment: str = "simclr"
    """Augmentation: none, crop-flip or simclr."""
    seed: int = 0
    """Seed of the choice of images and of what is done to them."""
    images: int = 8
    """Images, one column each."""
    out: Path = Path("sheet.png")
    """File of the picture, a PNG; it is replaced if it is there."""
    data_dir: Path | None = None
    """Folder with DATASET/{train,test}.parquet. Default: $FORWARDGRAD_DATA, or the hub is asked."""
    label_column: str | None = None
    """Column of the labels, as for train."""
    least_area: float = 0.2
    """Least area of simclr's crop, as a share of the image's."""
    jitter: float = 0.5
    """Strength of simclr's changes of colour, from 0 to 1."""
    blur: float | None = None
    """Probability of simclr's blur. Default: 1/2 for images of 64 pixels a side or more, else 0."""


def data(arguments: Sequence[str]) -> int:
    """What is done with a data set without training."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    name, *rest = arguments
    if name != "show":
        raise unknown_name("data command", name, ("show",))
    return _show(rest)


def _show(arguments: Sequence[str]) -> int:
    options = parse(ShowOptions, "forwardgrad data show", arguments, description=DESCRIPTION)
    _check(options)
    augmentation = build(
        options.augment, least_area=options.least_area, jitter=options.jitter, blur=options.blur
    )
    dataset = load(options.dataset, options.data_dir, label_column=options.label_column)
    images, labels = _choose(dataset, options.images, options.seed)
    classes = [dataset.classes[label] for label in labels]
    title = f"{options.dataset}, {options.augment}, seed {options.seed}"
    save(contact_sheet(augmentation, images, classes, title, seed=options.seed), options.out)
    Console(soft_wrap=True).print(f"picture: {options.out}", highlight=False)
    return 0


def _check(options: ShowOptions) -> None:
    if not 1 <= options.images <= MOST_IMAGES:
        raise InputError(f"images must be from 1 to {MOST_IMAGES}, got {options.images}")
    if options.out.suffix.lower() != ".png" or options.out.is_dir():
        raise InputError(f"out must be a file with the ending .png, got {options.out}")


def _choose(dataset: Dataset, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training images and their labels, in random order."""
    if count > len(dataset.train):
        raise InputError(
            f"images (={count}) must be at most the number of training images, {len(dataset.train)}"
        )
    if isinstance(dataset.train, StreamedSplit):
        return next(dataset.train.batches(count, seed=seed, epoch=0))
    assert isinstance(dataset.train, ResidentSplit)
    chosen = np.random.default_rng(seed).choice(len(dataset.train), count, replace=False)
    return dataset.train.images[chosen], dataset.train.labels[chosen]
