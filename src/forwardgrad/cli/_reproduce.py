"""`forwardgrad reproduce`."""

from collections.abc import Sequence

import tyro
from rich.console import Console

from forwardgrad._errors import unknown_name
from forwardgrad.experiments import EXPERIMENTS


def reproduce(arguments: Sequence[str]) -> int:
    """Run one of the papers' experiments, or list them."""
    console = Console(soft_wrap=True)
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print(
            "usage: forwardgrad reproduce NAME [OPTIONS]\n\nexperiments:", highlight=False
        )
        for experiment in EXPERIMENTS.values():
            console.print(f"  {experiment.name:14s}{experiment.summary}", highlight=False)
        return 0
    name, *rest = arguments
    if name not in EXPERIMENTS:
        raise unknown_name("experiment", name, EXPERIMENTS)
    experiment = EXPERIMENTS[name]
    options = tyro.cli(
        experiment.options,
        prog=f"forwardgrad reproduce {name}",
        description=experiment.summary,
        args=rest,
    )
    out = experiment.run(options)
    console.print(f"results and figure: {out}", highlight=False)
    return 0
