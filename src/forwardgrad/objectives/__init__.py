"""Where losses sit and where gradients stop."""

from forwardgrad.objectives._base import AbstractObjective as AbstractObjective
from forwardgrad.objectives._cross_entropy import cross_entropy as cross_entropy
from forwardgrad.objectives._cross_entropy import (
    replicated_cross_entropy as replicated_cross_entropy,
)
from forwardgrad.objectives._global import GlobalLoss as GlobalLoss
from forwardgrad.objectives._local import LocalLoss as LocalLoss

__all__ = [
    "AbstractObjective",
    "GlobalLoss",
    "LocalLoss",
    "cross_entropy",
    "replicated_cross_entropy",
]
