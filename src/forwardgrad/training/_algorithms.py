"""The algorithms by their ids: an objective, an estimator, and settings that suit the pair."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from forwardgrad._errors import InputError, unknown_name
from forwardgrad.estimators import (
    AbstractEstimator,
    ActivityPerturbation,
    Backpropagation,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    WeightPerturbation,
)
from forwardgrad.networks import size_of
from forwardgrad.objectives import (
    AbstractObjective,
    AbstractTask,
    Contrastive,
    GlobalLoss,
    LocalLoss,
    Supervised,
)
from forwardgrad.training._config import WITH_MOMENTUM, TrainConfig


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A row of the papers' tables.

    `defaults` are settings that suit it, `for_mixers` those that suit a LocalMixer better: its
    normalised activations allow larger steps, and `for_contrastive` those for contrastive learning
    of one.
    """

    objective: Callable[[TrainConfig], AbstractObjective]
    estimator: Callable[[TrainConfig], AbstractEstimator]
    defaults: Mapping[str, Any]
    for_mixers: Mapping[str, Any]
    for_contrastive: Mapping[str, Any]


def _weight_perturbation(config: TrainConfig) -> WeightPerturbation:
    assert config.tangents is not None
    return WeightPerturbation(
        tangents=config.tangents,
        distribution=config.distribution,
        structure=config.structure,
        rank=config.rank,
        orthogonal=config.orthogonal,
        clip=config.clip,
        exact_last=bool(config.exact_last),
    )


def _activity_perturbation(config: TrainConfig) -> ActivityPerturbation:
    assert config.tangents is not None
    return ActivityPerturbation(tangents=config.tangents, distribution=config.distribution)


def _task(config: TrainConfig) -> AbstractTask:
    return Supervised() if config.task == "supervised" else Contrastive(config.temperature)


def _local(config: TrainConfig, greedy: bool) -> LocalLoss:
    return LocalLoss(
        _task(config),
        greedy=greedy,
        blockwise=config.blockwise,
        patchwise=config.patchwise,
        groupwise=config.groupwise,
    )


OBJECTIVES: dict[str, Callable[[TrainConfig], AbstractObjective]] = {
    "": lambda config: GlobalLoss(_task(config)),
    "l-": lambda config: _local(config, greedy=False),
    "lg-": lambda config: _local(config, greedy=True),
}
"""Where losses sit, by the prefix of an algorithm's id."""

Settings = dict[str, Any]
Estimation = tuple[Callable[[TrainConfig], AbstractEstimator], Settings, Settings, Settings]

NO_NOISE = {"learning_rate": 0.02, "momentum": 0.9, "tangents": 1, "exact_last": False}

WITH_FEEDBACK = {**NO_NOISE, "learning_rate": 2e-3}

ESTIMATORS: dict[str, Estimation] = {
    "bp": (lambda config: Backpropagation(), NO_NOISE, {"learning_rate": 0.05}, {}),
    "fa": (lambda config: FeedbackAlignment(), WITH_FEEDBACK, {"learning_rate": 0.05}, {}),
    "dfa": (lambda config: DirectFeedbackAlignment(), WITH_FEEDBACK, {"learning_rate": 0.05}, {}),
    "fg-w": (
        _weight_perturbation,
        {"learning_rate": 4e-3, "momentum": 0.0, "tangents": 16, "exact_last": True},
        {"learning_rate": 0.01, "momentum": 0.9},
        {"tangents": 1},
    ),
    "fg-a": (
        _activity_perturbation,
        {"learning_rate": 1e-3, "momentum": 0.9, "tangents": 4, "exact_last": False},
        {"learning_rate": 0.03},
        {"learning_rate": 0.05, "tangents": 1},
    ),
}
"""How credit reaches the weights, by the rest of the id; defaults, and those for a LocalMixer."""

AUGMENTED: dict[str, str] = {"supervised": "none", "contrastive": "simclr"}
"""How training images are changed by default, by the task."""

UNDEFINED = dict.fromkeys(
    ("l-dfa", "lg-dfa"),
    "direct feedback alignment sends the error of one output layer to all others, and with local "
    "losses every block has an output layer of its own",
)
"""Pairs that make no algorithm, and why."""

ALGORITHMS: dict[str, Algorithm] = {
    prefix + name: Algorithm(objective, *estimation)
    for name, estimation in ESTIMATORS.items()
    for prefix, objective in OBJECTIVES.items()
    if prefix + name not in UNDEFINED
}
"""The algorithms that can be trained with."""


def algorithm(name: str) -> Algorithm:
    """The algorithm of that id.

    **Raises:**

    `InputError` if there is none, with the reason if its pair is undefined.
    """
    if name in UNDEFINED:
        raise InputError(f"algorithm {name!r} is not defined: {UNDEFINED[name]}")
    if name not in ALGORITHMS:
        raise unknown_name("algorithm", name, ALGORITHMS)
    return ALGORITHMS[name]


def resolve(config: TrainConfig) -> TrainConfig:
    """The settings with the algorithm's defaults in place of None."""
    chosen = algorithm(config.algorithm)
    defaults = {**chosen.defaults, "augment": AUGMENTED[config.task]}
    if size_of(config.network) is not None:
        defaults |= chosen.for_mixers
        defaults |= chosen.for_contrastive if config.task == "contrastive" else {}
    missing = {k: v for k, v in defaults.items() if getattr(config, k) is None}
    if config.optimizer not in WITH_MOMENTUM:
        missing["momentum"] = 0.0
    return dataclasses.replace(config, **missing)
