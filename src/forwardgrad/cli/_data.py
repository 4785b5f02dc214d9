"""`forwardgrad data`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro

from forwardgrad._console import Console
from forwardgrad._errors import InputError, unknown_name
from forwardgrad.cli._sheet import contact_sheet
from forwardgrad.cli._surroundings import parse
from forwardgrad.data import Dataset, load
from forwardgrad.results import save
from forwardgrad.training import AugmentationSettings

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


SIMCLR = AugmentationSettings(augment="simclr")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Settings of `data show`."""

    dataset: str = "digits"
    """Data set, as for train."""
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
    image_size: int | None = None
    """Height and width of the images, as for train."""
    stream: bool = False
    """Make no copy in the cache, as for train."""
    augmentation: tyro.conf.OmitArgPrefixes[AugmentationSettings] = SIMCLR


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
    augmentation = options.augmentation.build()
    dataset = load(
        options.dataset,
        options.data_dir,
        label_column=options.label_column,
        image_size=options.image_size,
        stream=options.stream,
    )
    images, labels = _choose(dataset, options.images, options.seed)
    classes = [dataset.classes[label] for label in labels]
    title = f"{options.dataset}, {options.augmentation.augment}, seed {options.seed}"
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
    chosen = np.random.default_rng(seed).choice(len(dataset.train), count, replace=False)
    return dataset.train.take(chosen)
