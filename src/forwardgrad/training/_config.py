"""Everything that decides the outcome of a run."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, get_args

from forwardgrad._errors import InputError, check_seed, unknown_name
from forwardgrad._files import local
from forwardgrad.results import fields

Task = Literal["supervised", "contrastive"]
Augment = Literal["none", "crop-flip", "simclr"]
Optimizer = Literal["sgd", "adam", "adamw", "rmsprop", "lion", "lars"]
Schedule = Literal["constant", "cosine", "exponential", "linear"]
Distribution = Literal["rademacher", "normal", "sphere"]
Structure = Literal["rank-one", "dense"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run; None where the algorithm has a default of its own.

    **Raises:**

    `InputError` where a value is out of range.
    """

    task: Task = "supervised"
    """What is learned: classes, or without labels what two views of an image share (contrastive),
    with a linear readout of the classes alongside."""
    dataset: str = "digits"
    """Data set: digits, mnist, cifar10, tiny-imagenet, imagenet, a Hugging Face name, a folder."""
    network: str = "mlp"
    """Network: logreg, mlp, cnn, or a LocalMixer: s/1/1, m/1/16, m/8/16, l/8/64, l/32/64, or
    any other size/patches/groups of s, m or l."""
    algorithm: str = "fg-w"
    """Algorithm: bp, fa, dfa, fg-w or fg-a; with local losses l-bp, l-fa, l-fg-w, l-fg-a; with
    greedy ones lg-bp, lg-fa, lg-fg-w, lg-fg-a."""
    epochs: int = 100
    """Passes over the training set. The last, incomplete batch of each is left out."""
    iterations: int | None = None
    """Stop after this many steps instead."""
    seed: int = 0
    """Seed of everything random: weights, order of the examples, tangents."""
    out: Path | None = None
    """Folder of the run. Default: a new one, runs/[contrastive-]DATASET-NETWORK-ALGORITHM-SEED."""
    data_dir: Path | None = None
    """Folder with DATASET/{train,test}.parquet. Default: $FORWARDGRAD_DATA, or the hub is asked."""
    label_column: str | None = None
    """Column of the labels. Default: label, else the first of classes, or the only of integers."""
    resume: bool = False
    """Continue the run in --out, or start it if there is none."""

    batch_size: int = 64
    """Examples per step."""
    accumulate: int = 1
    """Parts that a batch is cut into, one after another, with their gradients averaged: for
    batches that do not fit in memory."""
    augment: Augment | None = None
    """Random changes of the training images. Default: none; simclr for contrastive learning."""
    least_area: float = 0.2
    """Least share of an image that a random resized crop keeps (simclr)."""
    jitter: float = 0.5
    """Strength of the colour jitter (simclr)."""
    blur: float | None = None
    """Probability of a blur (simclr). Default: 0.5 for images of 64 pixels and more, else 0."""
    normalise: bool = True
    """Subtract the training images' mean and divide by their standard deviation, per channel."""
    width: int | None = None
    """Units of the hidden linear layers (mlp, cnn). Default: 1024."""
    depth: int | None = None
    """Number of hidden layers (mlp). Default: 2."""
    projection: int = 128
    """Outputs of the heads in contrastive learning."""
    temperature: float = 0.5
    """Temperature of the contrastive loss."""
    blockwise: bool = True
    """With local losses: one for every block, or only for the last."""
    patchwise: bool = True
    """With local losses: one for every patch."""
    groupwise: bool = True
    """With local losses: one for every channel group."""

    optimizer: Optimizer = "sgd"
    """Optimiser."""
    learning_rate: float | None = None
    """Learning rate at the start (after the warm-up)."""
    scale_learning_rate: bool = False
    """Multiply the learning rate by batch_size / 256."""
    schedule: Schedule = "cosine"
    """Learning rate over the run: constant, cosine or linear to zero, or exponential."""
    decay: float = 1e-4
    """k of the exponential schedule: the rate at step i is learning_rate * exp(-i k)."""
    warmup: int = 0
    """Steps over which the learning rate first rises linearly from zero."""
    momentum: float | None = None
    """Momentum of sgd, rmsprop and lars."""
    weight_decay: float = 0.0
    """Weight decay; adamw and lion decouple it, the others add it to the gradient (lars but for
    biases)."""

    tangents: int | None = None
    """K: tangents whose forward gradients are averaged in a step."""
    distribution: Distribution = "rademacher"
    """Distribution of the tangents."""
    structure: Structure = "rank-one"
    """Structure of the tangents of weight matrices."""
    rank: int = 1
    """Outer products in a rank-one tangent."""
    orthogonal: bool = False
    """Orthogonalise the tangents of a step."""
    exact_last: bool | None = None
    """Exact gradients for layers that no other comes after (fg-w and its kin)."""
    clip: float | None = 1.0
    """Bound on each directional derivative; None for none."""

    eval_every: int = 1
    """Epochs between evaluations on the test set."""
    log_every: int | None = None
    """Steps between further lines in metrics.jsonl; default: one line an epoch only."""
    checkpoint_every: float = 30.0
    """Seconds between checkpoints."""

    def __post_init__(self):
        check_seed(self.seed)
        if self.out is not None:
            object.__setattr__(self, "out", local(self.out, "out"))
            if not str(self.out).isprintable():  # a name in another encoding too
                raise InputError(f"out must be a printable name in UTF-8, got {str(self.out)!r}")
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise unknown_name(name, str(getattr(self, name)), get_args(kind))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise InputError(f"{name} must be at least {least}, got {value!r}")
            if value is not None and value > MOST:
                raise InputError(f"{name} must be at most {MOST}, got {value!r}")
        for name in ("learning_rate", "clip", "checkpoint_every", "temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be positive and finite, got {value!r}")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be at least 0 and below 1, got {self.momentum!r}")
        if self.momentum and self.optimizer not in WITH_MOMENTUM:
            raise InputError(
                f"momentum (={self.momentum}) is not a setting of optimizer {self.optimizer!r}, "
                f"only of {', '.join(WITH_MOMENTUM)}"
            )
        self._check_batch()
        if self.task == "contrastive" and self.augment == "none":
            raise InputError(
                "augment must not be 'none' with task 'contrastive': both views of an image would "
                "be the same"
            )

    def _check_batch(self) -> None:
        if self.batch_size % self.accumulate:
            raise InputError(
                f"accumulate (={self.accumulate}) must divide batch_size, which is "
                f"{self.batch_size}"
            )
        if self.task == "supervised":
            return
        if self.batch_size < 2:
            raise InputError(
                f"batch_size must be at least 2 with task 'contrastive', got {self.batch_size}: "
                "an image is told apart from the others of its batch"
            )
        if self.accumulate > 1:
            raise InputError(
                f"accumulate (={self.accumulate}) must be 1 with task 'contrastive': its loss "
                "compares every image of a batch with all others, and is not a mean over parts"
            )


_CHOICES = {
    "task": Task,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "distribution": Distribution,
    "structure": Structure,
}

MOST = 2**31 - 1
"""The most that an integer of JAX counts."""

_LEAST = {
    "epochs": 1,
    "iterations": 1,
    "batch_size": 1,
    "accumulate": 1,
    "projection": 1,
    "width": 1,
    "depth": 0,
    "decay": 0,
    "warmup": 0,
    "weight_decay": 0,
    "tangents": 1,
    "rank": 1,
    "eval_every": 1,
    "log_every": 1,
}

WITH_MOMENTUM = ("sgd", "rmsprop", "lars")
"""Optimisers that have a momentum of their own to set."""

NOT_OF_THE_RESULT = ("out", "data_dir", "resume", "checkpoint_every")
"""Settings that may differ between a run and its continuation."""


def of_the_result(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide a run's bits."""
    return {k: v for k, v in fields(config).items() if k not in NOT_OF_THE_RESULT}


def differences(stored: TrainConfig, config: TrainConfig) -> list[str]:
    """What a continuation would change, as `name (stored, new)`."""
    before, now = of_the_result(stored), of_the_result(config)
    return [f"{k} ({before[k]!r} there, {now[k]!r} now)" for k in now if before[k] != now[k]]
