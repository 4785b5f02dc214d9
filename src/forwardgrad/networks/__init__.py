"""The papers' networks."""

from forwardgrad.networks._base import AbstractNetwork, copy_axes
from forwardgrad.networks._build import NAMES, build
from forwardgrad.networks._cnn import CNN
from forwardgrad.networks._local_mixer import SIZES, LocalMixer, Size, size_of
from forwardgrad.networks._mlp import MLP

__all__ = [
    "CNN",
    "MLP",
    "NAMES",
    "SIZES",
    "AbstractNetwork",
    "LocalMixer",
    "Size",
    "build",
    "copy_axes",
    "size_of",
]
