"""What a step with 16 tangents costs on decoders of text.

    python benchmarks/text_steps.py --out results/benchmarks/decoder.json

As `benchmarks/step.py`: loss, gradient and SGD update in one compiled program, medians of
interleaved runs, with windows of 64 characters, 8 of them a step. The decoders differ in their
number of blocks. Tangents pass in chunks, and XLA counts what is in a loop once, so the flops are
those of a gradient for which all tangents pass at once.
"""

import functools
from typing import Any

import tyro
from rich.table import Table

from forwardgrad.experiments import Step
from forwardgrad.experiments._tokens import TANGENTS, TokensOptions, config_of, operations
from forwardgrad.training import TrainConfig, problem
from measure import Options, compare_steps, run

NETWORKS = ("gpt/2/128", "gpt/4/128", "gpt/8/128", "gpt/16/128")
METHODS = {
    "BP": "bp",
    "LG-BP": "lg-bp",
    "FG-W": "fg-w",
    "FG-A": "fg-a",
    "FG-A, exact": "fg-a+exact",
    "LG-FG-A": "lg-fg-a",
    "LG-FG-A, exact": "lg-fg-a+exact",
    "LG-FG-A, exact, guided": "lg-fg-a+exact+variate",
}
"""Methods of `reproduce tokens`, by what they are called here."""

DUE = (TANGENTS + 2) / 3
"""Passes: one forward, each tangent's, and that of the layers' last products; over BP's three."""


def compare(configs: dict[str, TrainConfig], repeats: int) -> dict[str, dict[str, float]]:
    """What `measure` says of the steps, with the flops of all tangents."""
    problems = {name: problem(config) for name, config in configs.items()}
    steps = {
        name: Step(lambda *given, p=p: p.loss(*given)[0], p.params, p.estimator, p.batch)
        for name, p in problems.items()
    }
    found = compare_steps(steps, repeats)
    for name, row in found.items():
        row["flops"] = operations(configs[name])
        del row["share_of_rate"]
    return found


def table(name: str, rows: dict[str, dict[str, float]]) -> Table:
    """The results of one decoder, relative to backpropagation."""
    result = Table(
        "", "ms", "/ BP", f"/ BP / {DUE:.0f}", "temp MiB", "/ BP", "flops / BP", title=name
    )
    bp = rows["BP"]
    for method, row in rows.items():
        ratios = {key: row[key] / bp[key] for key in ("median", "temp_bytes", "flops")}
        due = DUE if "FG" in method else 1
        result.add_row(
            method,
            f"{row['median'] * 1e3:.1f}",
            f"{ratios['median']:.2f}",
            f"{ratios['median'] / due:.2f}",
            f"{row['temp_bytes'] / 2**20:.1f}",
            f"{ratios['temp_bytes']:.2f}",
            f"{ratios['flops']:.2f}",
        )
    return result


def configs_of(network: str) -> dict[str, Any]:
    """The settings of each method's runs."""
    options = TokensOptions()
    return {name: config_of(options, method, network) for name, method in METHODS.items()}


if __name__ == "__main__":
    cases = {name: functools.partial(configs_of, name) for name in NETWORKS}
    options = tyro.cli(Options, description=__doc__)
    run("decoder", cases, options, compare, table, tangents=TANGENTS)
