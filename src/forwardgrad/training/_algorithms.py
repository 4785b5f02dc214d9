"""The algorithms by their ids: an objective, an estimator, and settings that suit the pair."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from forwardgrad._errors import InputError, unknown_name
from forwardgrad.estimators import (
    AbstractEstimator,
    ActivityPerturbation,
    Backpropagation,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    NodePerturbation,
    WeightPerturbation,
)
from forwardgrad.networks import gpt_size_of, size_of
from forwardgrad.objectives import (
    AbstractObjective,
    AbstractTask,
    Contrastive,
    GlobalLoss,
    LocalLoss,
    Supervised,
)

OBJECTIVES: dict[str, Callable[[AbstractTask], AbstractObjective]] = {
    "": GlobalLoss,
    "l-": lambda task: LocalLoss(task, greedy=False),
    "lg-": lambda task: LocalLoss(task, greedy=True),
}
"""Where losses sit, by the prefix of an algorithm's id."""


class Estimation(NamedTuple):
    """How credit reaches the weights, with settings that suit it.

    A LocalMixer's normalised activations allow larger steps: `for_mixers` are settings that suit
    it better, and `for_contrastive` those for contrastive learning of one.
    """

    estimator: AbstractEstimator
    defaults: Mapping[str, Any]
    for_mixers: Mapping[str, Any]
    for_contrastive: Mapping[str, Any] = {}


FOR_MIXERS: dict[str, Any] = {"normalise_features": True}
"""Settings that all algorithms have on a LocalMixer."""

FOR_TEXTS: dict[str, Any] = {
    "optimizer": "adam",
    "learning_rate": 3e-3,
    "tangents": 16,
    "batch_size": 8,
    "epochs": 2,
    "log_every": 10,
}
"""Settings that suit decoders, with windows of 64 characters 512 tokens a step.

With a third or three times the learning rate, the validation loss of gpt/2/64 on `text` was higher
after 400 steps (bp, lg-fg-a; three times: fa, dfa, fg-w, fg-a).
"""


ESTIMATORS: dict[str, Estimation] = {
    "bp": Estimation(
        Backpropagation(), {"learning_rate": 0.02, "momentum": 0.9}, {"learning_rate": 0.05}
    ),
    "fa": Estimation(
        FeedbackAlignment(), {"learning_rate": 2e-3, "momentum": 0.9}, {"learning_rate": 0.05}
    ),
    "dfa": Estimation(
        DirectFeedbackAlignment(), {"learning_rate": 2e-3, "momentum": 0.9}, {"learning_rate": 0.05}
    ),
    "fg-w": Estimation(
        WeightPerturbation(tangents=16, clip=1.0, exact_last=True),
        {"learning_rate": 4e-3, "momentum": 0.0},
        {"learning_rate": 0.01, "momentum": 0.9},
        {"tangents": 1},
    ),
    "fg-a": Estimation(
        ActivityPerturbation(tangents=4),
        {"learning_rate": 1e-3, "momentum": 0.9},
        {"learning_rate": 0.03},
        {"learning_rate": 0.05, "tangents": 1},
    ),
    "np": Estimation(
        NodePerturbation(tangents=4),
        {"learning_rate": 1e-3, "momentum": 0.9},
        {"learning_rate": 0.03},
        {"learning_rate": 0.05, "tangents": 1},
    ),
}
"""By the rest of the id."""

UNDEFINED = dict.fromkeys(
    ("l-dfa", "lg-dfa"),
    "direct feedback alignment sends the error of one output layer to all others, and with local "
    "losses every block has an output layer of its own",
)
"""Pairs that make no algorithm, and why."""

ALGORITHMS: tuple[str, ...] = tuple(
    prefix + name for name in ESTIMATORS for prefix in OBJECTIVES if prefix + name not in UNDEFINED
)
"""The ids of the algorithms that can be trained with."""


def parts(algorithm: str, task: str) -> tuple[AbstractObjective, AbstractEstimator]:
    """The objective and the estimator of an algorithm.

    **Raises:**

    `InputError` if there is none of that id, with the reason if its pair is undefined.
    """
    if algorithm in UNDEFINED:
        raise InputError(f"algorithm {algorithm!r} is not defined: {UNDEFINED[algorithm]}")
    if algorithm not in ALGORITHMS:
        raise unknown_name("algorithm", algorithm, ALGORITHMS)
    prefix, name = split(algorithm)
    learned = Supervised() if task == "supervised" else Contrastive()
    return OBJECTIVES[prefix](learned), ESTIMATORS[name].estimator


def defaults(algorithm: str, network: str, task: str) -> dict[str, Any]:
    """Settings that suit an algorithm, on a network and for a task."""
    row = ESTIMATORS[split(algorithm)[1]]
    if gpt_size_of(network) is not None:
        return {**row.defaults, **FOR_TEXTS}
    if size_of(network) is None:
        return dict(row.defaults)
    contrastive = row.for_contrastive if task == "contrastive" else {}
    return {**row.defaults, **FOR_MIXERS, **row.for_mixers, **contrastive}


def split(algorithm: str) -> tuple[str, str]:
    """The prefix of an algorithm's id, which says where losses are, and the rest of it."""
    prefix = next(p for p in ("lg-", "l-", "") if algorithm.startswith(p))
    return prefix, algorithm.removeprefix(prefix)
