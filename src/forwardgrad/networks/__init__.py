"""The papers' networks, and a decoder of text."""

from forwardgrad.networks._base import AbstractNetwork, copy_axes
from forwardgrad.networks._build import NAMES, build
from forwardgrad.networks._cnn import CNN
from forwardgrad.networks._gpt import GPT, GPTSize, continuation, gpt_size_of
from forwardgrad.networks._local_mixer import SIZES, LocalMixer, Size, size_of
from forwardgrad.networks._mlp import MLP

__all__ = [
    "CNN",
    "GPT",
    "MLP",
    "NAMES",
    "SIZES",
    "AbstractNetwork",
    "GPTSize",
    "LocalMixer",
    "Size",
    "build",
    "continuation",
    "copy_axes",
    "gpt_size_of",
    "size_of",
]
