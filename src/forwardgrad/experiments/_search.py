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

MOST_RATE = 1e12
"""The largest learning rate that can be tried."""

NEARLY = 1.01
"""How many times the lowest loss one may be that is no worse."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions(RunOptions):
    """Settings of experiments whose runs have learning rates that are searched."""

    search_iterations: int = 0
    """Steps of each run of the search for a learning rate; 0 for the usual rates instead."""
    rates: tuple[float, ...] = ()
    """Learning rates that are tried. Default: as many of 1e-4, 3e-4, 1e-3, ... as it takes."""


def check_search(options: SearchOptions) -> None:
    """Raise an `InputError` for options that no search can have."""
    if options.search_iterations < 0:
        raise InputError(f"search_iterations must be at least 0, got {options.search_iterations}")
    if not all(0 < rate <= MOST_RATE for rate in options.rates):
        raise InputError(f"rates must be above 0 and at most {MOST_RATE:g}, got {options.rates}")
    if len(options.rates) > 1 and not options.search_iterations:
        raise InputError(
            f"rates must be a single one where search_iterations is 0, got {options.rates}"
        )


def search(
    job: Job, config: Callable[..., TrainConfig], first: float, options: Any, console: Console
) -> tuple[float, dict[str, Any]]:
    """The learning rate with the best validation loss, after shorter runs with the first seed.

    `config` makes settings of options; `first` is where the search begins. If `rates` is a single
    one, that is it. Without a search it is the job's own. A cell of which another seed is stored
    has that one's.

    **Returns:**

    The rate, and what was tried as fields of a cell, without the rates that diverged.

    **Raises:**

    `DivergedError` if all of them diverged; `InputError` if another seed has a rate that is not
    wanted.
    """
    name = ", ".join(map(str, job.place.values()))
    if job.rate is not None:
        if options.rates and job.rate not in options.rates:
            raise InputError(
                f"rates must have {job.rate}, the learning rate of the other seeds of {name}, got "
                f"{options.rates}: pass another --out"
            )
        return job.rate, {}
    if len(options.rates) == 1:
        return options.rates[0], {}
    if not options.search_iterations:
        assert job.config is not None
        return job.config.optimisation.learning_rate, {}
    found: dict[float, float] = {}

    def loss(rate: float) -> float:
        steps = options.search_iterations
        short = config(learning_rate=rate, iterations=steps, eval_steps=None, seed=0)
        place = {**job.place, "rate": rate, "steps": steps}
        try:
            value = trained(Job(place, 0, short), options, None).result.validation_loss
        except DivergedError:
            value = None
        # The parameters after a last finite loss need not be finite.
        value = value if value is not None and math.isfinite(value) else math.inf
        console.print(f"{name}, learning rate {rate}: {value:.3f}", highlight=False)
        return found.setdefault(rate, value)

    if options.rates:
        for rate in options.rates:
            loss(rate)
    else:
        climb(loss, RATES.index(first))
    if min(found.values()) == math.inf:
        raise DivergedError(f"{name} diverged with learning rates {[*found]}")
    finite = {rate: loss for rate, loss in sorted(found.items()) if loss < math.inf}
    tried = {"rates": tuple(finite), "rate_losses": tuple(finite.values())}
    return chosen(finite), tried


def chosen(found: Mapping[float, float]) -> float:
    """The smallest rate whose loss is nearly the lowest: longer runs of noisy steps need less.

    >>> chosen({1e-3: 2.393, 3e-3: 2.382, 1e-2: 3.071})
    0.001
    """
    lowest = min(found.values())
    return min(rate for rate, loss in found.items() if loss <= NEARLY * lowest)


def climb(loss: Callable[[float], float], first: int) -> None:
    """Go up the learning rates from the first one while the loss falls; or else, down.

    From one that diverges, infinite, down until one does not.
    """
    lowest = start = loss(RATES[first])
    above = RATES[first + 1 :] if start < math.inf else ()
    for rates in (above, RATES[:first][::-1]):
        for rate in rates:
            if (there := loss(rate)) >= lowest and lowest < math.inf:
                break
            lowest = there
        if lowest < start:
            return
