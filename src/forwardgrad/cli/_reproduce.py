"""`forwardgrad reproduce` and `forwardgrad compare`."""

from collections.abc import Sequence

from forwardgrad._console import Console
from forwardgrad._errors import unknown_name
from forwardgrad.cli._surroundings import parse
from forwardgrad.experiments import COMPARE, EXPERIMENTS, Experiment


def reproduce(arguments: Sequence[str]) -> int:
    """Run one of the papers' experiments, or list them."""
    if not arguments or arguments[0] in ("-h", "--help"):
        console = Console(soft_wrap=True)
        console.print(
            "usage: forwardgrad reproduce NAME [OPTIONS]\n\nexperiments:", highlight=False
        )
        for experiment in EXPERIMENTS.values():
            console.print(f"  {experiment.name:14s}{experiment.summary}", highlight=False)
        return 0
    name, *rest = arguments
    if name not in EXPERIMENTS:
        raise unknown_name("experiment", name, EXPERIMENTS)
    return _run(EXPERIMENTS[name], f"forwardgrad reproduce {name}", rest)


def compare(arguments: Sequence[str]) -> int:
    """Run every algorithm on one data set."""
    return _run(COMPARE, "forwardgrad compare", arguments)


def _run(experiment: Experiment, prog: str, arguments: Sequence[str]) -> int:
    options = parse(experiment.options, prog, arguments, description=experiment.summary)
    out = experiment.run(options)
    Console(soft_wrap=True).print(f"results and figure: {out}", highlight=False)
    return 0
