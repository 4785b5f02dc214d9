"""How credit reaches the weights: exact gradients and estimates of them."""

from forwardgrad.estimators._activity_perturbation import (
    ActivityPerturbation as ActivityPerturbation,
)
from forwardgrad.estimators._backpropagation import Backpropagation as Backpropagation
from forwardgrad.estimators._balanced_tangents import BalancedTangents as BalancedTangents
from forwardgrad.estimators._base import AbstractEstimator as AbstractEstimator
from forwardgrad.estimators._base import AbstractStatefulEstimator as AbstractStatefulEstimator
from forwardgrad.estimators._control_variate import ControlVariate as ControlVariate
from forwardgrad.estimators._credit import ExplainedParameter as ExplainedParameter
from forwardgrad.estimators._direct_feedback_alignment import (
    DirectFeedbackAlignment as DirectFeedbackAlignment,
)
from forwardgrad.estimators._feedback_alignment import FeedbackAlignment as FeedbackAlignment
from forwardgrad.estimators._node_perturbation import NodePerturbation as NodePerturbation
from forwardgrad.estimators._scalars import Scalars as Scalars
from forwardgrad.estimators._weight_perturbation import WeightPerturbation as WeightPerturbation
from forwardgrad.estimators._worker_tangents import WorkerTangents as WorkerTangents

__all__ = [
    "AbstractEstimator",
    "AbstractStatefulEstimator",
    "ActivityPerturbation",
    "Backpropagation",
    "BalancedTangents",
    "ControlVariate",
    "DirectFeedbackAlignment",
    "ExplainedParameter",
    "FeedbackAlignment",
    "NodePerturbation",
    "Scalars",
    "WeightPerturbation",
    "WorkerTangents",
]
