"""How credit reaches the weights: exact gradients and estimates of them."""

from forwardgrad.estimators._backpropagation import Backpropagation as Backpropagation
from forwardgrad.estimators._base import AbstractEstimator as AbstractEstimator
from forwardgrad.estimators._weight_perturbation import WeightPerturbation as WeightPerturbation

__all__ = ["AbstractEstimator", "Backpropagation", "WeightPerturbation"]
