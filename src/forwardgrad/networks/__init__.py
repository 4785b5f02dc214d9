"""The papers' networks."""

from forwardgrad.networks._build import NAMES as NAMES
from forwardgrad.networks._build import build as build
from forwardgrad.networks._cnn import CNN as CNN
from forwardgrad.networks._mlp import MLP as MLP

__all__ = ["CNN", "MLP", "NAMES", "build"]
