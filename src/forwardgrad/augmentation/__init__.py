"""Random changes of training images, on the device and under `jit`."""

from forwardgrad.augmentation._base import AbstractAugmentation as AbstractAugmentation
from forwardgrad.augmentation._base import Chain as Chain
from forwardgrad.augmentation._base import augment as augment
from forwardgrad.augmentation._blur import GaussianBlur as GaussianBlur
from forwardgrad.augmentation._build import AUGMENTATIONS as AUGMENTATIONS
from forwardgrad.augmentation._build import build as build
from forwardgrad.augmentation._colours import ColorJitter as ColorJitter
from forwardgrad.augmentation._colours import RandomGrayscale as RandomGrayscale
from forwardgrad.augmentation._geometry import RandomCrop as RandomCrop
from forwardgrad.augmentation._geometry import RandomFlip as RandomFlip
from forwardgrad.augmentation._geometry import RandomResizedCrop as RandomResizedCrop

__all__ = [
    "AUGMENTATIONS",
    "AbstractAugmentation",
    "Chain",
    "ColorJitter",
    "GaussianBlur",
    "RandomCrop",
    "RandomFlip",
    "RandomGrayscale",
    "RandomResizedCrop",
    "augment",
    "build",
]
