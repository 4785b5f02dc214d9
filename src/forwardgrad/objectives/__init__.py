"""Where losses sit, where gradients stop, and what the losses are."""

from forwardgrad.objectives._base import AbstractObjective as AbstractObjective
from forwardgrad.objectives._contrastive import Contrastive as Contrastive
from forwardgrad.objectives._contrastive import two_views as two_views
from forwardgrad.objectives._global import GlobalLoss as GlobalLoss
from forwardgrad.objectives._local import LocalLoss as LocalLoss
from forwardgrad.objectives._replicated import replicated_loss as replicated_loss
from forwardgrad.objectives._replicated import separate_losses as separate_losses
from forwardgrad.objectives._supervised import Supervised as Supervised
from forwardgrad.objectives._supervised import cross_entropy as cross_entropy
from forwardgrad.objectives._supervised import wrong as wrong
from forwardgrad.objectives._task import AbstractTask as AbstractTask

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
