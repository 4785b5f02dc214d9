"""How busy a pipeline of greedy blocks keeps its devices: 1, 2, 4 and 8 stages of eight blocks.

    python benchmarks/pipeline.py --repeats 5 --out results/benchmarks/pipeline.json \
        --figure docs/images/pipeline.png

Devices are simulated on this machine. Utilisation is the share of the time between the first
stage's start and the last one's end in which a device works, over all devices.

- Ideal: M / (M + S - 1), for M micro-batches through S equal stages.
- Computed: each stage's step is timed by itself, on its own micro-batch; then these times, or the
  operations that XLA counts in place of them, are put into the schedule. Handing over takes no
  time there. The times are those of the processor, to which it matters little what else runs.
- Measured: the pipeline as it runs, by the clock, where there is a core for each device (on Linux);
  the time of one stage on one core, divided by the number of stages and their time on as many
  cores. The shortest of the repeats counts.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.table import Table

import forwardgrad as fg
import measure
from forwardgrad._pipeline import Own, advance, arguments
from forwardgrad.experiments import interleave
from forwardgrad.networks import LocalMixer, Size
from forwardgrad.objectives import LocalLoss
from forwardgrad.results import save
from forwardgrad.results._figures import panels

STAGES = (1, 2, 4, 8)
BLOCKS = 8
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RUN = 32
"""Micro-batches of the table, and of what is measured."""

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
"""Those that this process may use, where it can say so."""

SEED = 0
OPTIMISER = optax.sgd(1e-3)
ESTIMATOR = fg.ActivityPerturbation()


@dataclasses.dataclass(frozen=True)
class Options(measure.Options):
    """Settings of the benchmark."""

    figure: Path | None = None
    """File for the figure, a PNG."""


class Problem(NamedTuple):
    """`make(count) -> (stages, params)`, and a micro-batch."""

    make: Callable[[int], tuple[Sequence[Any], Sequence[Any]]]
    batch: tuple[jax.Array, jax.Array]


class Dense(eqx.Module):
    """A layer with normalised inputs."""

    linear: eqx.nn.Linear

    def __call__(self, x):
        return jax.vmap(self.linear)(jax.nn.standardize(x))


class Block(Dense):
    """A residual block."""

    def __call__(self, x):
        return x + jax.nn.relu(super().__call__(x))


def stack() -> Problem:
    """Eight equal blocks of 1024 units, on 128 examples."""
    keys = jax.random.split(jax.random.key(SEED), 2 * BLOCKS + 1)
    blocks = [Block(eqx.nn.Linear(1024, 1024, key=key)) for key in keys[:BLOCKS]]
    heads = [Dense(eqx.nn.Linear(1024, 10, key=key)) for key in keys[BLOCKS:-1]]

    def loss(logits, y):
        return optax.softmax_cross_entropy_with_integer_labels(logits, y) / len(y)

    x = jax.random.normal(keys[-1], (128, 1024))
    y = jnp.arange(128) % 10
    return Problem(lambda count: fg.greedy_stages(blocks, heads, loss, count), (x, y))


def local_mixer() -> Problem:
    """The second paper's m/8/16 with eight blocks, on 16 images of CIFAR-10's shape."""
    size = Size(units=512, patches=8, groups=16, blocks=BLOCKS)
    network = LocalMixer((32, 32, 3), size, 10, key=jax.random.key(SEED))
    images = jax.random.normal(jax.random.key(SEED + 1), (16, 32, 32, 3))
    labels = jnp.arange(16) % 10
    return Problem(lambda count: LocalLoss().stages(network, count), (images, labels))


def makespan(times: Sequence[float], micro_batches: int) -> float:
    """When the last stage is done: a stage waits for its own last step, and for the one before."""
    free = np.zeros(len(times))
    for _ in range(micro_batches):
        ready = 0.0
        for stage, taken in enumerate(times):
            ready = free[stage] = max(ready, free[stage]) + taken
    return float(free[-1])


def utilisation(times: Sequence[float], micro_batches: int) -> float:
    """The share of the time in which a device works, over all devices."""
    return micro_batches * sum(times) / (len(times) * makespan(times, micro_batches))


def alone(problem: Problem, count: int, repeats: int) -> tuple[list[float], list[float]]:
    """Processor seconds and flops of each stage's step, by itself on one device."""
    stages, params = problem.make(count)
    key, (x, *targets) = jax.random.key(SEED), problem.batch
    calls, flops = [], []
    for i, (stage, own) in enumerate(zip(stages, params, strict=True)):
        pipeline = fg.BlockPipeline([stage], ESTIMATOR, OPTIMISER, jax.devices()[:1])
        state = pipeline.init([own], x, *targets)
        given = (stage, ESTIMATOR, OPTIMISER, key, np.int32(i), x, targets)
        own = Own(state.params[0], state.optimiser[0], state.estimator[0])
        given, *holder, static = arguments(given, own)
        program = advance.lower(given, holder[0], static).compile()
        flops.append(program.cost_analysis()["flops"])

        def call(program=program, given=given, holder=holder):
            began = time.process_time()
            holder[0], value, output = program(given, holder[0])
            jax.block_until_ready((holder[0], value, output))
            return output, time.process_time() - began

        calls.append(call)
        x, _ = call()
    seconds = [[call()[1] for call in calls] for _ in range(repeats)]
    return [median(times) for times in zip(*seconds, strict=True)], flops


def together(
    problem: Problem, counts: Sequence[int], repeats: int
) -> dict[int, tuple[float, float]]:
    """Seconds of a run with so many stages, each on a device of its own, and of handing out a step.

    The latter are the controller's, for one stage and micro-batch.
    """
    handing: dict[int, list[float]] = {count: [] for count in counts}

    def run_of(count):
        stages, params = problem.make(count)
        pipeline = fg.BlockPipeline(stages, ESTIMATOR, OPTIMISER)
        holder = [pipeline.init(params, *problem.batch)]
        keys = list(jax.random.split(jax.random.key(SEED), RUN))

        def run():
            use_cores(count)
            began = time.thread_time()
            for key in keys:
                _, _, holder[0] = pipeline.step(holder[0], *problem.batch, key=key)
            handing[count].append((time.thread_time() - began) / (RUN * count))
            jax.block_until_ready(eqx.filter(holder[0].params, eqx.is_array))

        return run

    seconds = interleave({str(count): run_of(count) for count in counts}, repeats)
    return {count: (min(seconds[str(count)]), median(handing[count])) for count in counts}


def use_cores(count: int) -> None:
    """Leave so many cores to this process.

    The devices of a process share its threads, and one device alone would use them all.
    """
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), CORES[:count])


def compare(problem: Problem, repeats: int) -> dict[str, Any]:
    """What the table and the figure show, for each number of stages."""
    took = together(problem, [count for count in STAGES if count <= len(CORES)], repeats)
    rows = {}
    for count in STAGES:
        seconds, flops = alone(problem, count, repeats)
        rows[str(count)] = {
            "seconds": seconds,
            "flops": flops,
            "ideal": {str(m): utilisation([1.0] * count, m) for m in MICRO_BATCHES},
            "by_seconds": {str(m): utilisation(seconds, m) for m in MICRO_BATCHES},
            "by_flops": {str(m): utilisation(flops, m) for m in MICRO_BATCHES},
        }
        if count in took:
            taken, handing = took[count]
            share = took[1][0] / (count * taken)
            measured = {"run_seconds": taken, "handing_seconds": handing, "measured": share}
            rows[str(count)] |= measured
    return rows


def table_of(name: str, rows: Mapping[str, Any]) -> Table:
    """Utilisation with each number of stages."""
    result = Table(title=f"{name}, {RUN} micro-batches")
    for column in ("stages", "slowest ms", "GFLOP", "ideal", "by flops", "by times", "measured"):
        result.add_column(column, justify="right")
    for count, row in rows.items():
        shares = [row[kind][str(RUN)] for kind in ("ideal", "by_flops", "by_seconds")]
        result.add_row(
            count,
            f"{max(row['seconds']) * 1e3:.1f}",
            f"{sum(row['flops']) / 1e9:.2f}",
            *[f"{share:.3f}" for share in shares],
            f"{row['measured']:.3f}" if "measured" in row else "",
        )
    return result


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Utilisation against the number of micro-batches, a panel for each network."""
    figure, (every,) = panels(1, len(results), size=(5 * len(results), 3.8), sharey=True)
    for axes, (name, rows) in zip(every, results.items(), strict=True):
        for i, (count, row) in enumerate(rows.items()):
            x, style = [int(m) for m in row["ideal"]], {"color": f"C{i}"}
            label = f"{count} stage{'s' if count != '1' else ''}"
            axes.plot(x, row["ideal"].values(), ":", **style)
            axes.plot(x, row["by_seconds"].values(), "-", label=label, **style)
        axes.set(title=name, xlabel="micro-batches", xscale="log", ylim=(0, 1.05))
        axes.set_xticks(x, x)
        axes.minorticks_off()
    every[0].set_ylabel("utilisation")
    every[0].legend(title="computed; dotted: ideal")
    save(figure, path)


CASES = {"8 equal blocks of 1024 units": stack, "LocalMixer m/8/16, 8 blocks": local_mixer}

if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    jax.config.update("jax_num_cpu_devices", max(STAGES))
    header = {"seed": SEED, "estimator": repr(ESTIMATOR), "micro_batches": RUN}
    results = measure.run("pipeline", CASES, options, compare, table_of, **header)
    if options.figure is not None:
        draw(results, options.figure)
