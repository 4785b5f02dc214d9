"""An algorithm with some of its options, in a word.

A method is called `ALGORITHM[+OPTION...][@TANGENTS]`, such as `lg-fg-a+exact@16`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from forwardgrad._errors import InputError, unknown_name
from forwardgrad.experiments._experiment import run_config
from forwardgrad.training import ALGORITHMS, TrainConfig
from forwardgrad.training._config import check_names

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.0},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01},
    "decay": {"weight_decay": 5e-4},
    "crop": {"augment": "crop-flip"},
    "causal": {"mixing": "causal"},
    "mixing": {"exact_mixing": True},
    "direct": {"exact_direct": True},
    "dense": {"structure": "dense"},
    "orthogonal": {"orthogonal": True},
    "exact": {"exact_mixing": True, "exact_direct": True},
    "balance": {"balance": "relative"},
    "variate": {"control_variate": True},
}
"""What can be added to an algorithm."""


class Method(NamedTuple):
    """An algorithm, and the options that its name asks for."""

    algorithm: str
    options: dict[str, Any]


def method_of(name: str) -> Method:
    """What a name such as `lg-fg-a+exact@16` stands for.

    **Raises:**

    `InputError` if it is none.

    >>> method_of("lg-fg-a+mixing@4")
    Method(algorithm='lg-fg-a', options={'tangents': 4, 'exact_mixing': True})
    """
    rest, at, tangents = name.partition("@")
    algorithm, *added = rest.split("+")
    if algorithm not in ALGORITHMS:
        raise unknown_name("algorithm", algorithm, ALGORITHMS)
    if at and not (tangents.isdecimal() and len(tangents) < 10 and int(tangents)):
        raise InputError(f"method {name!r} must end in a number of tangents below 1e9 after @")
    options: dict[str, Any] = {"tangents": int(tangents)} if at else {}
    for option in added:
        if option not in OPTIONS:
            raise unknown_name(f"option of method {name!r}", option, OPTIONS)
        options |= OPTIONS[option]
    return Method(algorithm, options)


def method_config(options: Any, name: str, usual: Mapping[str, Any], **given: Any) -> TrainConfig:
    """The settings of a run by the method of this name.

    Its own options go before an experiment's `usual` ones, and those that are `given` before both.

    **Raises:**

    `InputError` if one of its own is none that its algorithm has.
    """
    algorithm, own = method_of(name)
    config = run_config(options, **{**usual, **own, "algorithm": algorithm, **given})
    check_names(own, config)
    return config
