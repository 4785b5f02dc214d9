"""What a training step costs: FG-W against backpropagation, in one process, interleaved.

    python benchmarks/step.py --out results/benchmarks/step.json
    python benchmarks/step.py --torch --only MLP # with PyTorch beside it: pip install '.[bench]'

Every step is loss, gradient and SGD update in one compiled program that updates the parameters in
place. Times are medians of interleaved runs; read the ratios. "BP, checkpointed" scans over the
layers of the scaling MLP, each in `jax.checkpoint`. PyTorch's threads slow JAX down in the same
process, which is why it is no part of the first command.
"""

import dataclasses
import time
from pathlib import Path
from statistics import median

import tyro
from rich.console import Console
from rich.table import Table

import forwardgrad as fg
from forwardgrad._files import write_json
from forwardgrad.experiments import (
    Step,
    checkpointed_mlp_loss,
    interleave,
    mlp_loss,
    provenance,
    stacked,
)
from models import PROBLEMS

METHODS = {
    "forward only": None,
    "BP": fg.Backpropagation(),
    "FG-W": fg.WeightPerturbation(),
    "FG-W, 4 tangents": fg.WeightPerturbation(tangents=4),
    "FG-W, dense": fg.WeightPerturbation(structure="dense"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    out: Path | None = None
    """File for the results."""
    repeats: int = 15
    """Interleaved timings of each method."""
    only: str = ""
    """Measure only the models whose name contains this."""
    torch: bool = False
    """Also measure PyTorch's torch.func.jvp and .backward() on the scaling MLPs."""


def measure(name: str, options: Options) -> dict:
    """Medians, spread, memory and flops of each method on one model."""
    loss, params, batch = PROBLEMS[name]()
    steps = {method: Step(loss, params, e, batch) for method, e in METHODS.items()}
    if loss is mlp_loss:
        remat = Step(checkpointed_mlp_loss, stacked(params), METHODS["BP"], batch)
        steps["BP, checkpointed"] = remat
    calls = dict(steps)
    if options.torch and name.startswith("MLP"):
        from torch_steps import torch_steps

        calls |= torch_steps(params, batch)
    seconds = interleave(calls, options.repeats)
    return {
        method: {
            "median": median(times),
            "minimum": min(times),
            "maximum": max(times),
            **(
                {"temp_bytes": steps[method].temp_bytes, "flops": steps[method].flops}
                if method in steps
                else {}
            ),
        }
        for method, times in seconds.items()
    }


def table(name: str, rows: dict) -> Table:
    """The results of one model, relative to backpropagation and to the forward pass."""
    result = Table(title=name)
    for column in ("", "ms", "/ BP", "/ forward", "temp MiB", "/ BP", "GFLOP"):
        result.add_column(column, justify="left" if column == "" else "right")
    bp, forward = rows["BP"], rows["forward only"]
    for method, row in rows.items():
        known = "flops" in row
        result.add_row(
            method,
            f"{row['median'] * 1e3:.1f}",
            f"{row['median'] / bp['median']:.2f}",
            f"{row['median'] / forward['median']:.2f}",
            f"{row['temp_bytes'] / 2**20:.1f}" if known else "",
            f"{row['temp_bytes'] / bp['temp_bytes']:.2f}" if known else "",
            f"{row['flops'] / 1e9:.1f}" if known else "",
        )
    return result


def main() -> None:
    """Measure, print, store."""
    options = tyro.cli(Options, description=__doc__)
    console, results = Console(width=100), {}
    for name in PROBLEMS:
        if options.only not in name:
            continue
        began = time.monotonic()
        results[name] = measure(name, options)
        console.print(table(name, results[name]))
        console.print(f"({time.monotonic() - began:.0f} s)")
        if options.out is not None:
            header = {"benchmark": "step", "repeats": options.repeats, **provenance()}
            write_json(options.out, {**header, "results": results})


if __name__ == "__main__":
    main()
