"""Where losses sit, where gradients stop, and what the losses are."""

from forwardgrad.objectives._base import AbstractObjective
from forwardgrad.objectives._contrastive import Contrastive, two_views
from forwardgrad.objectives._global import GlobalLoss
from forwardgrad.objectives._local import LocalLoss
from forwardgrad.objectives._replicated import replicated_loss, separate_losses
from forwardgrad.objectives._supervised import Supervised, cross_entropy, wrong
from forwardgrad.objectives._task import AbstractTask

__all__ = [
    "AbstractObjective",
    "AbstractTask",
    "Contrastive",
    "GlobalLoss",
    "LocalLoss",
    "Supervised",
    "cross_entropy",
    "replicated_loss",
    "separate_losses",
    "two_views",
    "wrong",
]
