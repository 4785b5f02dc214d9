"""Train neural networks in JAX without backpropagation."""

import importlib.metadata

from forwardgrad._diagnose import diagnose as diagnose
from forwardgrad._diagnosis import Diagnosis as Diagnosis
from forwardgrad._diagnosis import DiagnosisRow as DiagnosisRow
from forwardgrad._errors import InputError as InputError
from forwardgrad._explain import Explanation as Explanation
from forwardgrad._explain import explain as explain
from forwardgrad._losses import Losses as Losses
from forwardgrad._value_and_grad import value_and_grad as value_and_grad
from forwardgrad.estimators import AbstractEstimator as AbstractEstimator
from forwardgrad.estimators import ActivityPerturbation as ActivityPerturbation
from forwardgrad.estimators import Backpropagation as Backpropagation
from forwardgrad.estimators import DirectFeedbackAlignment as DirectFeedbackAlignment
from forwardgrad.estimators import ExplainedParameter as ExplainedParameter
from forwardgrad.estimators import FeedbackAlignment as FeedbackAlignment
from forwardgrad.estimators import WeightPerturbation as WeightPerturbation
from forwardgrad.rewrite import activation as activation

__version__ = importlib.metadata.version("forwardgrad")

__all__ = [
    "AbstractEstimator",
    "ActivityPerturbation",
    "Backpropagation",
    "Diagnosis",
    "DiagnosisRow",
    "DirectFeedbackAlignment",
    "ExplainedParameter",
    "Explanation",
    "FeedbackAlignment",
    "InputError",
    "Losses",
    "WeightPerturbation",
    "activation",
    "diagnose",
    "explain",
    "value_and_grad",
]
