"""Augmentations by name."""

import inspect
from collections.abc import Callable

from forwardgrad._errors import InputError, unknown_name
from forwardgrad.augmentation._base import AbstractAugmentation, Chain, check_range
from forwardgrad.augmentation._blur import GaussianBlur
from forwardgrad.augmentation._colours import ColorJitter, RandomGrayscale
from forwardgrad.augmentation._geometry import RandomCrop, RandomFlip, RandomResizedCrop


def _none() -> AbstractAugmentation:
    return Chain()


def _crop_flip() -> AbstractAugmentation:
    return Chain((RandomCrop(), RandomFlip()))


def _simclr(
    *, least_area: float = 0.2, jitter: float = 0.5, blur: float | None = None
) -> AbstractAugmentation:
    check_range("jitter", jitter)
    if blur is not None:
        check_range("blur", blur)
    strong, weak = 0.8 * jitter, 0.2 * jitter
    return Chain(
        (
            RandomResizedCrop(least_area),
            RandomFlip(),
            ColorJitter(strong, strong, strong, weak),
            RandomGrayscale(),
            GaussianBlur(blur),
        )
    )


AUGMENTATIONS: dict[str, Callable[..., AbstractAugmentation]] = {
    "none": _none,
    "crop-flip": _crop_flip,
    "simclr": _simclr,
}
"""What makes each augmentation that has a name, given those of `build`'s settings that it has."""

_DEFAULTS = inspect.getfullargspec(_simclr).kwonlydefaults or {}


def build(
    name: str, *, least_area: float = 0.2, jitter: float = 0.5, blur: float | None = None
) -> AbstractAugmentation:
    """An augmentation by name.

    `"none"` leaves images as they are. `"crop-flip"` is the usual one of supervised training:
    [`forwardgrad.augmentation.RandomCrop`][], [`forwardgrad.augmentation.RandomFlip`][].
    `"simclr"` is that of contrastive learning: [`forwardgrad.augmentation.RandomResizedCrop`][],
    [`forwardgrad.augmentation.RandomFlip`][], [`forwardgrad.augmentation.ColorJitter`][],
    [`forwardgrad.augmentation.RandomGrayscale`][], [`forwardgrad.augmentation.GaussianBlur`][].

    **Arguments:**

    - `name`: one of [`forwardgrad.augmentation.AUGMENTATIONS`][].
    - `least_area`: the least area of SimCLR's crop, as a share of the image's. Chen et al. have
        0.08, for ImageNet; 0.2 is usual for small images.
    - `jitter`: SimCLR's strength $s$ of the changes of colour: brightness, contrast and saturation
        by up to $0.8 s$, hue by up to $0.2 s$. Chen et al. have 1 for ImageNet, 0.5 for CIFAR-10.
    - `blur`: SimCLR's probability of a blur. Default: 1/2 for images whose shorter side has at
        least 64 pixels, else 0.

    **Returns:**

    What to call on an image with values in [0, 1], or to give to
    [`forwardgrad.augmentation.augment`][].

    **Raises:**

    `InputError` if the name is unknown, or a setting is out of range or not the augmentation's to
    set.

    ??? cite "Reference"

        Chen, Kornblith, Norouzi, Hinton. *A Simple Framework for Contrastive Learning of Visual
        Representations*, ICML 2020, arXiv 2002.05709, appendices A and B.9.

    >>> build("crop-flip")
    Chain(augmentations=(RandomCrop(), RandomFlip()))
    """
    if name not in AUGMENTATIONS:
        raise unknown_name("augmentation", name, AUGMENTATIONS)
    settings = {"least_area": least_area, "jitter": jitter, "blur": blur}
    own = inspect.signature(AUGMENTATIONS[name]).parameters
    for setting, value in settings.items():
        if setting not in own and value != _DEFAULTS[setting]:
            raise InputError(f"{setting} (={value}) is not a setting of augmentation {name!r}")
    return AUGMENTATIONS[name](**{k: v for k, v in settings.items() if k in own})
