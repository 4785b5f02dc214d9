"""The algorithms by their ids: an objective, an estimator, and settings that suit the pair."""

import dataclasses
from collections.abc import Callable

from forwardgrad._errors import InputError, unknown_name
from forwardgrad.estimators import AbstractEstimator, Backpropagation, WeightPerturbation
from forwardgrad.objectives import GlobalLoss
from forwardgrad.training._config import WITH_MOMENTUM, TrainConfig


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A row of the papers' tables."""

    objective: Callable
    estimator: Callable[[TrainConfig], AbstractEstimator]
    defaults: dict


def _weight_perturbation(config: TrainConfig) -> WeightPerturbation:
    assert config.tangents is not None
    return WeightPerturbation(
        tangents=config.tangents,
        distribution=config.distribution,
        structure=config.structure,
        rank=config.rank,
        orthogonal=config.orthogonal,
        clip=config.clip,
    )


ALGORITHMS: dict[str, Algorithm] = {
    "bp": Algorithm(
        GlobalLoss(),
        lambda config: Backpropagation(),
        {"learning_rate": 0.02, "momentum": 0.9, "tangents": 1},
    ),
    "fg-w": Algorithm(
        GlobalLoss(),
        _weight_perturbation,
        {"learning_rate": 4e-3, "momentum": 0.0, "tangents": 16},
    ),
}
"""The algorithms that can be trained with."""

PLANNED = ("l-bp", "lg-bp", "fa", "l-fa", "lg-fa", "dfa", "fg-a", "lg-fg-w", "lg-fg-a")
"""Ids of the second paper's algorithms that are not here yet."""


def algorithm(name: str) -> Algorithm:
    """The algorithm of that id.

    **Raises:**

    `InputError` if there is none.
    """
    if name in PLANNED:
        raise InputError(
            f"algorithm {name!r} is not available yet (available: {', '.join(ALGORITHMS)})"
        )
    if name not in ALGORITHMS:
        raise unknown_name("algorithm", name, ALGORITHMS)
    return ALGORITHMS[name]


def resolve(config: TrainConfig) -> TrainConfig:
    """The settings with the algorithm's defaults in place of None."""
    defaults = algorithm(config.algorithm).defaults
    missing = {k: v for k, v in defaults.items() if getattr(config, k) is None}
    if config.optimizer not in WITH_MOMENTUM:
        missing["momentum"] = 0.0
    return dataclasses.replace(config, **missing)
