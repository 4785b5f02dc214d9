"""The papers' networks."""

from forwardgrad.networks._base import AbstractNetwork as AbstractNetwork
from forwardgrad.networks._base import copy_axes as copy_axes
from forwardgrad.networks._build import NAMES as NAMES
from forwardgrad.networks._build import build as build
from forwardgrad.networks._cnn import CNN as CNN
from forwardgrad.networks._local_mixer import SIZES as SIZES
from forwardgrad.networks._local_mixer import LocalMixer as LocalMixer
from forwardgrad.networks._local_mixer import Size as Size
from forwardgrad.networks._local_mixer import size_of as size_of
from forwardgrad.networks._mlp import MLP as MLP

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
