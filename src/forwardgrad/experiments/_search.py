"""Learning rates, found by shorter runs on the validation examples.

The search begins in the middle of a grid of factors 3, and goes upwards as long as the validation
loss falls, or else downwards. Of rates within 1 % of the lowest loss it takes the smallest. All
seeds of a cell have the rate of the first one.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from forwardgrad._console import Console
from forwardgrad._errors import DivergedError, InputError
from forwardgrad.experiments._experiment import Job, RunOptions, trained
from forwardgrad.training import TrainConfig

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Learning rates of the search."""

NEARLY = 1.01
"""How many times the lowest loss one may be that is no worse."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions(RunOptions):
    """Settings of experiments whose runs have learning rates that are searched."""

    search_iterations: int = 0
    """Steps of each run of the search for a learning rate; 0 for the usual rates instead."""
    rates: tuple[float, ...] = ()
    """Learning rates that are tried. Default: as many of 1e-4, 3e-4, 1e-3, ... as it takes."""


def search(
    job: Job, config: Callable[..., TrainConfig], first: float, options: Any, console: Console
) -> tuple[float, dict[str, Any]]:
    """The learning rate with the best validation loss, after shorter runs with the first seed.

    `config` makes settings of options; `first` is where the search begins. If `rates` is a single
    one, that is it. Without a search it is the job's own.

    **Returns:**

    The rate, and what was tried as fields of a cell.

    **Raises:**

    `DivergedError` if all of them diverged; `InputError` if there are rates to be tried and no
    steps, or fewer.
    """
    if options.search_iterations < 0:
        raise InputError(f"search_iterations must be at least 0, got {options.search_iterations}")
    if len(options.rates) == 1:
        return options.rates[0], {}
    if not options.search_iterations:
        if options.rates:
            raise InputError(
                f"rates must be a single one where search_iterations is 0, got {options.rates}"
            )
        assert job.config is not None
        return job.config.optimisation.learning_rate, {}
    name = ", ".join(map(str, job.place.values()))
    found: dict[float, float] = {}

    def loss(rate: float) -> float:
        steps = options.search_iterations
        short = config(learning_rate=rate, iterations=steps, eval_steps=None, seed=0)
        place = {**job.place, "rate": rate, "steps": steps}
        try:
            value = trained(Job(place, 0, short), options, None).result.validation_loss
        except DivergedError:
            value = math.inf
        assert value is not None
        if not job.seed:
            console.print(f"{name}, learning rate {rate}: {value:.3f}", highlight=False)
        return found.setdefault(rate, value)

    if options.rates:
        for rate in options.rates:
            loss(rate)
    else:
        climb(loss, RATES.index(first))
    if min(found.values()) == math.inf:
        raise DivergedError(f"{name} diverged with learning rates {[*found]}")
    rates, losses = zip(*sorted(found.items()), strict=True)
    return chosen(found), {"rates": rates, "rate_losses": losses}


def chosen(found: Mapping[float, float]) -> float:
    """The smallest rate whose loss is nearly the lowest: longer runs of noisy steps need less.

    >>> chosen({1e-3: 2.393, 3e-3: 2.382, 1e-2: 3.071})
    0.001
    """
    lowest = min(found.values())
    return min(rate for rate, loss in found.items() if loss <= NEARLY * lowest)


def climb(loss: Callable[[float], float], first: int) -> None:
    """Go up the learning rates from the first one while the loss falls; or else, down."""
    lowest = start = loss(RATES[first])
    for rates in (RATES[first + 1 :], RATES[:first][::-1]):
        for rate in rates:
            if not (there := loss(rate)) < lowest:
                break
            lowest = there
        if lowest < start:
            return
