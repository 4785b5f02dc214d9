"""Decoders that learn text without backpropagation, beside backpropagation.

Command: `forwardgrad reproduce tokens`. Every cell is a run of `forwardgrad train` in a folder of
its own, with a learning rate that shorter runs have found, so an interrupted experiment continues
where it was.

Methods are named as in `forwardgrad.experiments._methods`. Their learning rates are searched on the
validation text.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from forwardgrad._console import Console
from forwardgrad._errors import InputError
from forwardgrad._estimation import estimation
from forwardgrad.experiments._experiment import (
    Cells,
    Experiment,
    Job,
    Options,
    Presented,
    ending,
    trained,
)
from forwardgrad.experiments._methods import method_config, method_of
from forwardgrad.experiments._search import SearchOptions, check_search, search
from forwardgrad.results import TokenCell, look, markdown, over_seeds
from forwardgrad.results._figures import panels
from forwardgrad.results._tables import grouped
from forwardgrad.training import TrainConfig, problem
from forwardgrad.training._config import changed, options_of, reads_text

TANGENTS = 16
"""K of methods that do not say theirs."""

FIRST_RATE = {"sgd": 1e-1, "adamw": 3e-3}
"""Where the search begins, by the optimiser."""

COLORS = ("black", "deeppink", "gray", "teal", "saddlebrown", "purple", "olive")
"""In figures, of what is added to algorithms."""

CHUNK = 16
"""Evaluations of node perturbation at a time, for their memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions(Options):
    """Settings of experiments on text."""

    dataset: str = "text"
    """Text, as for train."""
    context: int = 64
    """Tokens of a window."""
    batch_size: int = 8
    """Windows of a step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensOptions(SearchOptions, TextOptions):
    """Settings of `reproduce tokens`."""

    methods: tuple[str, ...] = (
        *("bp", "bp+sgd", "lg-bp", "fg-w", "np@256"),
        *("fg-a", "fg-a+mixing", "fg-a+exact", "fg-a+exact+variate"),
        *("lg-fg-a", "lg-fg-a+exact", "lg-fg-a+exact+balance", "lg-fg-a+exact+variate"),
        *("lg-fg-a@4", "lg-fg-a+exact@4", "lg-fg-a+exact+variate@4"),
        *("lg-fg-a@64", "lg-fg-a+exact@64", "lg-fg-a+exact+variate@64"),
    )
    """Algorithms, with +causal, +mixing, +direct, +exact (the last two), +balance, +variate,
    +dense, +sgd and @TANGENTS."""
    networks: tuple[str, ...] = ("gpt/2/128",)
    """Decoders: gpt/LAYERS/WIDTH."""
    iterations: int = 1000
    """Steps of each run."""
    search_iterations: int = 300
    eval_steps: int = 100
    """Steps between the points of the curves, losses on the test text."""
    seeds: int = 3


def config_of(options: Any, name: str, network: str, **given: Any) -> TrainConfig:
    """The settings of a run by the method of this name."""
    algorithm, _ = method_of(name)
    usual = {"optimizer": "adamw", "weight_decay": 0.01, "tangents": TANGENTS}
    evaluates = {"eval_steps": getattr(options, "eval_steps", None), "log_every": None}
    chunk = {"chunk": CHUNK} if algorithm.endswith("np") else {}
    return method_config(options, name, {**usual, **evaluates, **chunk}, network=network, **given)


def check_decoder(network: str) -> None:
    """Raise an `InputError` for a network of another kind."""
    if not reads_text(network):
        raise InputError(f"network {network!r} must be called gpt/LAYERS/WIDTH")


def _plan(options: TokensOptions) -> Iterator[Job]:
    """Seed by seed, so that the table is complete early."""
    check_search(options)
    for network in options.networks:
        check_decoder(network)
    parts = (range(options.seeds), options.networks, options.methods)
    for seed, network, method in itertools.product(*parts):
        place = {"network": network, "method": method}
        yield Job(place, seed, config_of(options, method, network, seed=seed))


def _make(job: Job, options: TokensOptions, console: Console) -> dict[str, Any]:
    assert job.config is not None
    first = FIRST_RATE[job.config.optimisation.optimizer]
    settings = functools.partial(config_of, options, **_named(job))
    rate, tried = search(job, settings, first, options, console)
    config = settings(seed=job.seed, learning_rate=rate)
    run = trained(job._replace(config=config), options, console)
    lines = [line for line in run.measurements if line.event == "steps"]
    losses = ("test_loss", "validation_loss", "bits_per_character")
    return {
        **ending(run, options),
        **{name: getattr(run.result, name) for name in losses},
        **tried,
        "steps": tuple(line.step for line in lines),
        "losses": tuple(float(f"{line.test_loss:.5g}") for line in lines),
        "times": tuple(round(line.seconds or 0.0, 3) for line in lines),
        "operations": operations(config),
        "tokens": config.batch_size * options.context,
    }


def operations(config: TrainConfig) -> float:
    """XLA's count of a gradient's operations.

    It counts a loop once. So all tangents are compiled at once here, and nothing is run.
    """
    tangents = options_of(config).get("tangents")
    config = config if tangents is None else changed(config, {"chunk": tangents})
    step = problem(config)
    init, estimate = estimation(step.loss, step.estimator, has_aux=True)
    given = (step.params, *step.batch)
    state = jax.eval_shape(init, *given)
    one = jax.jit(lambda key, state, *given: estimate(*given, key=key, state=state))
    analysis = one.lower(jax.random.key(0), state, *given).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def _named(job: Job) -> dict[str, str]:
    return {"name": job.place["method"], "network": job.place["network"]}


def _present(cells: Sequence[TokenCell]) -> Presented:
    """A row a network and method: losses over seeds, and what a step takes beside `bp`."""
    rows, texts = [], []
    for mean in over_seeds(cells).values():
        first = mean.cells[0]
        values = {
            name: [getattr(cell, name) for cell in mean.cells]
            for name in ("validation_loss", "test_loss", "bits_per_character")
        }
        by_bp = _beside(first, cells)
        numbers = {f"{name}_mean": float(np.mean(v)) for name, v in values.items()}
        spreads = {f"{name}_std": float(np.std(v)) for name, v in values.items()}
        settings = {"learning_rate": first.learning_rate, "operations": first.operations}
        rows.append({**mean.row, **settings, "operations_beside_bp": by_bp, **numbers, **spreads})
        losses = [_with_spread(values[name]) for name in ("validation_loss", "test_loss")]
        cost = "" if by_bp is None else f"{by_bp:.2f}"
        texts.append([first.network, first.method, f"{first.learning_rate:g}", *losses, cost])
    heads = [
        "network",
        "method",
        "learning rate",
        "validation loss",
        "test loss",
        "operations / bp",
    ]
    return Presented(_figure(cells), rows, markdown(heads, texts, names=2))


def _with_spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _beside(cell: TokenCell, cells: Sequence[TokenCell]) -> float | None:
    """A step's operations over those of backpropagation's."""
    bp = [c.operations for c in cells if (c.network, c.method) == (cell.network, "bp")]
    return cell.operations / bp[0] if bp else None


def _figure(cells: Sequence[TokenCell]) -> Figure:
    """Test losses against tokens, operations and time, a row of pictures a network.

    With more tangents, a line is thicker. Options have colours of their own.
    """
    networks = grouped(cells, lambda cell: cell.network)
    added = {cell.method: cell.method.partition("@")[0].partition("+")[2] for cell in cells}
    options = dict.fromkeys(filter(None, added.values()))
    colors = dict(zip(options, itertools.cycle(COLORS), strict=False))
    figure, every = panels(len(networks), 3, size=(15, 4.2 * len(networks)), sharey="row")
    for axes, (network, of_network) in zip(every, networks.items(), strict=True):
        for method, own in grouped(of_network, lambda cell: cell.method).items():
            color, line, marker = look(method)
            color = colors.get(added[method], color)
            losses = np.mean([cell.losses for cell in own], axis=0)
            steps = np.array(own[0].steps)
            style = {"color": color, "linestyle": line, "marker": marker, "ms": 3, "label": method}
            style["linewidth"] = 0.8 + 0.3 * math.log2(own[0].tangents or TANGENTS) / 2
            times = np.mean([cell.times for cell in own], axis=0)
            for panel, x in zip(
                axes, (steps * own[0].tokens, steps * own[0].operations, times), strict=True
            ):
                panel.plot(x, losses, **style)
        axes[0].set(ylabel=f"test loss, {network} (nats)", xlabel="tokens")
        axes[1].set(xlabel="operations", xscale="log")
        axes[2].set(xlabel="time (s)", xscale="log")
        axes[2].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


TOKENS = Experiment(
    "tokens",
    "decoders that learn text without backpropagation",
    TokensOptions,
    Cells(
        kind=TokenCell,
        plan=_plan,
        make=_make,
        present=_present,
        same=("dataset", "context", "batch_size", "iterations", "search_iterations", "eval_steps"),
    ),
)
