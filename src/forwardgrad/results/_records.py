"""What files of results hold. A field that older files lack has a default."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, Self, TypeVar

from msgspec import Meta

from forwardgrad._provenance import provenance

# Infinity is none of these; JSON has it as 1e999.
Number = Annotated[float, Meta(ge=-1e300, le=1e300)]
NotNegative = Annotated[float, Meta(ge=0, le=1e12)]
Percent = Annotated[float, Meta(ge=0, le=100)]
Count = Annotated[int, Meta(ge=0)]
Name = Annotated[str, Meta(max_length=1000)]
Atom = None | bool | int | float | Name
Options = dict[Name, Atom | list[Atom]]
"""Those of an experiment that is not known."""

MOST_SEEDS = 1000
"""Runs of one cell, at most: they are numbered from 0."""


def algorithm_of(method: str) -> str:
    """The algorithm of a row such as `lg-fg-a+exact@16`, without what + and @ add to it."""
    return re.split("[+@]", method)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """When something was made, with which versions and where; None where a file does not say."""

    date: Name | None = None
    forwardgrad_version: Name | None = None
    jax_version: Name | None = None
    jaxlib_version: Name | None = None
    python_version: Name | None = None
    backend: Name | None = None
    device: Name | None = None
    cores: Count | None = None

    @classmethod
    def here(cls, **fields: Any) -> Self:
        """Something made now, on this machine."""
        return cls(**{**provenance(), **fields})

    @property
    def facts(self) -> dict[str, str]:
        """Date, machine and versions in words, those that are known."""
        device = self.device if self.device != self.backend else None
        cores = None if self.cores is None else f"{self.cores} cores"
        named = {"JAX": self.jax_version, "forwardgrad": self.forwardgrad_version}
        facts = {
            "date": self.date,
            "machine": ", ".join(filter(None, (self.backend, device, cores))),
            "versions": ", ".join(f"{name} {v}" for name, v in named.items() if v),
        }
        return {name: value for name, value in facts.items() if value}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """A line of `metrics.jsonl`: the state of a run, or why it diverged. Errors in per cent."""

    event: Name
    epoch: NotNegative
    step: Count
    seconds: NotNegative | None = None
    loss: Number | None = None
    learning_rate: Number | None = None
    train_error: Percent | None = None
    test_error: Percent | None = None
    test_loss: Number | None = None
    bits_per_character: Number | None = None
    reason: Name | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome(Origin):
    """What was trained on what, and how well. Errors in per cent."""

    task: Name = "supervised"
    algorithm: Name
    network: Name
    dataset: Name
    seed: Count
    test_error: Percent
    train_error: Percent
    seconds: NotNegative


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(Outcome):
    """`summary.json`: what a run ended with.

    Losses of test and validation are cross-entropies, in nats.
    """

    epochs: int | float
    steps: Count
    parameters: Count
    train_loss: Number
    test_loss: Number | None = None
    validation_loss: Number | None = None
    validation_error: Percent | None = None
    bits_per_character: Number | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readout(Outcome):
    """`readout.json`: the errors of a readout of a run's features.

    It was fitted on so many `examples`; `limit` is how many were asked for, None for all.
    """

    features: Count
    examples: Count
    limit: Count | None
    converged: bool


class Place(NamedTuple):
    """Where a cell stands in a table."""

    column: str
    row: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractCell:
    """A part of an experiment, and where it stands.

    `COLUMN` and `ROW` are the fields that tell its column and its row; seeds share a place.
    """

    COLUMN: ClassVar[tuple[str, ...]] = ()
    ROW: ClassVar[tuple[str, ...]] = ()

    seed: Count

    @classmethod
    def at(cls, fields: Mapping[str, Any]) -> Place:
        """The place that these fields tell."""
        column, row = ([str(fields[name]) for name in names] for names in (cls.COLUMN, cls.ROW))
        return Place(" ".join(column), tuple(row))

    @property
    def place(self) -> Place:
        """Where the cell stands."""
        names = (*self.COLUMN, *self.ROW)
        return self.at({name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(AbstractCell):
    """A run: where it stands, what it ended with, its settings.

    If its learning rate was searched, `rates` were tried in shorter runs, with the validation
    losses `rate_losses`.
    """

    seed: Annotated[int, Meta(ge=0, lt=MOST_SEEDS)]
    test_error: Percent
    train_error: Percent | None = None
    online_error: Percent | None = None
    train_loss: Number | None = None
    parameters: Count | None = None
    seconds: NotNegative | None = None
    date: Name | None = None
    learning_rate: Number | None = None
    momentum: Number | None = None
    tangents: Count | None = None
    exact_last: bool | None = None
    normalise_features: bool | None = None
    rates: tuple[NotNegative, ...] | None = None
    rate_losses: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableCell(Cell):
    """A cell of Table 3, of Table 4, or of `compare`."""

    COLUMN = ("column",)
    ROW = ("algorithm",)

    column: Name
    algorithm: Name


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblationCell(Cell):
    """A cell of the ablation."""

    COLUMN = ("task", "setting")
    ROW = ("variant", "groups")

    task: Name
    setting: Name
    variant: Name
    groups: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurveCell(Cell):
    """A run of the first paper's MNIST experiments, with the mean losses between its steps."""

    ROW = ("algorithm", "learning_rate")

    algorithm: Name
    steps: tuple[Count, ...]
    losses: tuple[Number, ...]
    times: tuple[NotNegative, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCell(Cell):
    """A run on text: losses in nats a token, those of the test text on the way.

    A step sees so many `tokens`, and a gradient takes so many `operations`.
    """

    COLUMN = ("network",)
    ROW = ("method",)

    network: Name
    method: Name
    validation_loss: Number
    test_loss: Number
    bits_per_character: Number
    steps: tuple[Count, ...]
    losses: tuple[Number, ...]
    times: tuple[NotNegative, ...]
    operations: Annotated[float, Meta(ge=0, le=1e30)]
    tokens: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header(Origin):
    """What every file of an experiment or of a benchmark begins with."""

    experiment: Name = ""
    benchmark: Name = ""


C = TypeVar("C", bound=AbstractCell, covariant=True)
Given = TypeVar("Given", covariant=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid(Header, Generic[C, Given]):
    """An experiment that is made of cells: its options, and those that are stored."""

    options: Given
    cells: tuple[C, ...]
