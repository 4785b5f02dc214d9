"""Where losses sit and where gradients stop."""

from forwardgrad.objectives._global import GlobalLoss as GlobalLoss

__all__ = ["GlobalLoss"]
