"""Steps side by side: time, memory, flops, and how near they come to the machine's rate."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from forwardgrad.experiments import Step, interleave, provenance
from forwardgrad.results import write

SIZE = 4096
"""The machine's rate is that of a product of two matrices of this size."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a benchmark."""

    out: Path | None = None
    """File for the results."""
    repeats: int = 15
    """Interleaved timings of each method."""
    only: str = ""
    """Measure only the models whose name contains this."""


Steps = Mapping[str, Callable[[], None]]
"""Steps by their method: "forward only" and "BP" are what the others are compared with."""


def run(
    benchmark: str,
    cases: Mapping[str, Callable[[], Any]],
    options: Options,
    compare: Callable[[Any, int], Any] | None = None,
    table: Callable[[str, Any], Any] | None = None,
    **header: Any,
) -> dict[str, Any]:
    """Measure, print, store and return the results of every model that is wanted.

    A benchmark of something other than steps brings its own `compare` and `table`.
    """
    compare, table = compare or compare_steps, table or table_of_steps
    console, results = Console(width=100), {}
    for name, make in cases.items():
        if options.only not in name:
            continue
        began = time.monotonic()
        results[name] = compare(make(), options.repeats)
        console.print(table(name, results[name]))
        console.print(f"({time.monotonic() - began:.0f} s)")
        if options.out is not None:
            origin = {"benchmark": benchmark, "repeats": options.repeats, **header, **provenance()}
            write(options.out, {**origin, "results": results})
    return results


def compare_steps(steps: Steps, repeats: int) -> dict[str, dict[str, float]]:
    """Medians, spread, memory and flops of each method, and the share of the machine's rate."""
    matrix = jax.random.normal(jax.random.key(0), (SIZE, SIZE))
    product = jax.jit(jnp.matmul)
    seconds = interleave(
        {**steps, "": lambda: jax.block_until_ready(product(matrix, matrix))}, repeats
    )
    rate = 2 * SIZE**3 / median(seconds.pop(""))
    return {
        method: {
            "median": median(times),
            "minimum": min(times),
            "maximum": max(times),
            **(_of_program(step, median(times), rate) if isinstance(step, Step) else {}),
        }
        for (method, step), times in zip(steps.items(), seconds.values(), strict=True)
    }


def _of_program(step: Step, seconds: float, rate: float) -> dict[str, float]:
    return {
        "examples_per_second": step.examples / seconds,
        "temp_bytes": step.temp_bytes,
        "flops": step.flops,
        "share_of_rate": step.flops / (rate * seconds),
    }


def table_of_steps(name: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """The results of one model, relative to backpropagation and to the forward pass."""
    result = Table(title=name)
    times, memory = ("ms", "examples/s", "/ BP", "/ forward"), ("temp MiB", "/ BP")
    for column in ("", *times, *memory, "GFLOP", "of the rate"):
        result.add_column(column, justify="left" if column == "" else "right")
    bp, forward = rows["BP"], rows["forward only"]
    for method, row in rows.items():
        known = "flops" in row
        result.add_row(
            method,
            f"{row['median'] * 1e3:.1f}",
            f"{row['examples_per_second']:.0f}" if known else "",
            f"{row['median'] / bp['median']:.2f}",
            f"{row['median'] / forward['median']:.2f}",
            f"{row['temp_bytes'] / 2**20:.1f}" if known else "",
            f"{row['temp_bytes'] / bp['temp_bytes']:.3f}" if known else "",
            f"{row['flops'] / 1e9:.1f}" if known else "",
            f"{row['share_of_rate']:.2f}" if known else "",
        )
    return result
