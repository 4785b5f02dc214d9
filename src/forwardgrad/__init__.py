"""Train neural networks in JAX without backpropagation."""

import importlib.metadata

from forwardgrad._errors import InputError as InputError
from forwardgrad._value_and_grad import value_and_grad as value_and_grad
from forwardgrad.estimators import AbstractEstimator as AbstractEstimator
from forwardgrad.estimators import Backpropagation as Backpropagation
from forwardgrad.estimators import WeightPerturbation as WeightPerturbation

__version__ = importlib.metadata.version("forwardgrad")

__all__ = [
    "AbstractEstimator",
    "Backpropagation",
    "InputError",
    "WeightPerturbation",
    "value_and_grad",
]
