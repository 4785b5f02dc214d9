"""Everything that decides the outcome of a run."""

import dataclasses
from pathlib import Path
from typing import Literal

from forwardgrad._errors import InputError

Optimizer = Literal["sgd", "adam", "adamw", "rmsprop", "lion"]
Schedule = Literal["constant", "cosine", "exponential", "linear"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run; None where the algorithm has a default of its own.

    **Raises:**

    `InputError` where a value is out of range.
    """

    dataset: str = "digits"
    """Data set: digits, mnist, cifar10, tiny-imagenet, imagenet, a Hugging Face name, a folder."""
    network: str = "mlp"
    """Network: logreg, mlp or cnn."""
    algorithm: str = "fg-w"
    """Algorithm: bp (backpropagation) or fg-w (forward gradient, weights perturbed)."""
    epochs: int = 100
    """Passes over the training set. The last, incomplete batch of each is left out."""
    iterations: int | None = None
    """Stop after this many steps instead."""
    seed: int = 0
    """Seed of everything random: weights, order of the examples, tangents."""
    out: Path | None = None
    """Folder of the run. Default: a new one, runs/DATASET-NETWORK-ALGORITHM-SEED."""
    data_dir: Path | None = None
    """Folder with DATASET/{train,test}.parquet. Default: $FORWARDGRAD_DATA, or the hub is asked."""
    resume: bool = False
    """Continue the run in --out, or start it if there is none."""

    batch_size: int = 64
    """Examples per step."""
    normalise: bool = True
    """Subtract the training images' mean and divide by their standard deviation, per channel."""
    width: int | None = None
    """Units of the hidden linear layers (mlp, cnn). Default: 1024."""
    depth: int | None = None
    """Number of hidden layers (mlp). Default: 2."""

    optimizer: Optimizer = "sgd"
    """Optimiser."""
    learning_rate: float | None = None
    """Learning rate at the start (after the warm-up)."""
    schedule: Schedule = "cosine"
    """Learning rate over the run: constant, cosine or linear to zero, or exponential."""
    decay: float = 1e-4
    """k of the exponential schedule: the rate at step i is learning_rate * exp(-i k)."""
    warmup: int = 0
    """Steps over which the learning rate first rises linearly from zero."""
    momentum: float | None = None
    """Momentum of sgd and rmsprop."""
    weight_decay: float = 0.0
    """Decoupled weight decay (times the learning rate)."""

    tangents: int | None = None
    """K: tangents whose forward gradients are averaged in a step."""
    distribution: Literal["rademacher", "normal", "sphere"] = "rademacher"
    """Distribution of the tangents."""
    structure: Literal["rank-one", "dense"] = "rank-one"
    """Structure of the tangents of weight matrices."""
    rank: int = 1
    """Outer products in a rank-one tangent."""
    orthogonal: bool = False
    """Orthogonalise the tangents of a step."""
    clip: float | None = 1.0
    """Bound on each directional derivative; None for none."""

    eval_every: int = 1
    """Epochs between evaluations on the test set."""
    log_every: int | None = None
    """Steps between further lines in metrics.jsonl; default: one line an epoch only."""
    checkpoint_every: float = 30.0
    """Seconds between checkpoints."""

    def __post_init__(self):
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise InputError(f"{name} must be at least {least}, got {value!r}")
        for name in ("learning_rate", "clip", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} must be positive, got {value!r}")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be at least 0 and below 1, got {self.momentum!r}")


_LEAST = {
    "epochs": 1,
    "iterations": 1,
    "seed": 0,
    "batch_size": 1,
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

NOT_OF_THE_RESULT = ("out", "data_dir", "resume", "checkpoint_every")
"""Settings that may differ between a run and its continuation."""


def as_json(config: TrainConfig) -> dict:
    """The settings as JSON values."""
    fields = dataclasses.asdict(config)
    return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}


def differences(stored: dict, config: TrainConfig) -> list[str]:
    """What a continuation would change, as `name (stored, new)`."""
    new = as_json(config)
    names = sorted((set(stored) | set(new)) - set(NOT_OF_THE_RESULT) - {"forwardgrad"})
    return [
        f"{name} ({stored.get(name)!r} there, {new.get(name)!r} now)"
        for name in names
        if stored.get(name) != new.get(name)
    ]
