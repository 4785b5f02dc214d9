"""Train neural networks in JAX without backpropagation."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from forwardgrad import _jax as _jax
from forwardgrad._diagnose import diagnose as diagnose
from forwardgrad._diagnosis import Diagnosis as Diagnosis
from forwardgrad._diagnosis import DiagnosisRow as DiagnosisRow
from forwardgrad._errors import InputError as InputError
from forwardgrad._estimation import Estimation as Estimation
from forwardgrad._estimation import estimation as estimation
from forwardgrad._explain import Explanation as Explanation
from forwardgrad._explain import explain as explain
from forwardgrad._filter_value_and_grad import filter_value_and_grad as filter_value_and_grad
from forwardgrad._greedy import greedy as greedy
from forwardgrad._greedy_stages import greedy_stages as greedy_stages
from forwardgrad._losses import Losses as Losses
from forwardgrad._online import OnlineState as OnlineState
from forwardgrad._online import online as online
from forwardgrad._pipeline import BlockPipeline as BlockPipeline
from forwardgrad._pipeline import PipelineState as PipelineState
from forwardgrad._replay import ReplayLog as ReplayLog
from forwardgrad._replay import replay as replay
from forwardgrad._scalars import apply_scalars as apply_scalars
from forwardgrad._scalars import directional_derivatives as directional_derivatives
from forwardgrad._value_and_grad import value_and_grad as value_and_grad
from forwardgrad.estimators import AbstractEstimator as AbstractEstimator
from forwardgrad.estimators import AbstractStatefulEstimator as AbstractStatefulEstimator
from forwardgrad.estimators import ActivityPerturbation as ActivityPerturbation
from forwardgrad.estimators import Backpropagation as Backpropagation
from forwardgrad.estimators import BalancedTangents as BalancedTangents
from forwardgrad.estimators import ControlVariate as ControlVariate
from forwardgrad.estimators import DirectFeedbackAlignment as DirectFeedbackAlignment
from forwardgrad.estimators import ExplainedParameter as ExplainedParameter
from forwardgrad.estimators import FeedbackAlignment as FeedbackAlignment
from forwardgrad.estimators import NodePerturbation as NodePerturbation
from forwardgrad.estimators import Scalars as Scalars
from forwardgrad.estimators import WeightPerturbation as WeightPerturbation
from forwardgrad.estimators import WorkerTangents as WorkerTangents
from forwardgrad.rewrite import activation as activation

if TYPE_CHECKING:
    from forwardgrad import nnx as nnx

__version__ = importlib.metadata.version("forwardgrad")

__all__ = [
    "AbstractEstimator",
    "AbstractStatefulEstimator",
    "ActivityPerturbation",
    "Backpropagation",
    "BalancedTangents",
    "BlockPipeline",
    "ControlVariate",
    "Diagnosis",
    "DiagnosisRow",
    "DirectFeedbackAlignment",
    "Estimation",
    "ExplainedParameter",
    "Explanation",
    "FeedbackAlignment",
    "InputError",
    "Losses",
    "NodePerturbation",
    "OnlineState",
    "PipelineState",
    "ReplayLog",
    "Scalars",
    "WeightPerturbation",
    "WorkerTangents",
    "activation",
    "apply_scalars",
    "diagnose",
    "directional_derivatives",
    "estimation",
    "explain",
    "filter_value_and_grad",
    "greedy",
    "greedy_stages",
    "online",
    "replay",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    # Flax is no dependency, and takes a second to import.
    if name == "nnx":
        return importlib.import_module("forwardgrad.nnx")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
