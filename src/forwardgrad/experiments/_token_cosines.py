"""How near estimates of a decoder's gradient come to the exact one, by kind of layer.

Command: `forwardgrad reproduce tokens-cosine`. The weights are those after some steps of
backpropagation of the same objective, and the batch is one of the training text.

An estimate with K tangents is the mean of K estimates with one. So the estimates with one tangent
are drawn once, and averaged over groups of K, for all K at the same time. The prediction for K
tangents is $(1 + V / (K |g|^2))^{-1/2}$, with V the variance of one tangent's estimates.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from matplotlib.figure import Figure

from forwardgrad._console import Console
from forwardgrad._errors import InputError
from forwardgrad._estimation import estimation
from forwardgrad.estimators import Backpropagation
from forwardgrad.experiments._experiment import (
    Cells,
    Experiment,
    Job,
    Presented,
    run_config,
    trained,
)
from forwardgrad.experiments._methods import method_of
from forwardgrad.experiments._tokens import TextOptions, check_decoder, config_of
from forwardgrad.results import look, markdown
from forwardgrad.results._figures import panels
from forwardgrad.results._records import AbstractCell, Count, Name, NotNegative, Number
from forwardgrad.training import Problem, load_run, problem
from forwardgrad.training._algorithms import split
from forwardgrad.training._config import changed, options_of

RATE = 3e-3
"""Learning rate of the steps before."""

SHOWN = 16
"""K of the table, or the nearest one."""

KINDS = ("queries", "keys", "values", "attended", "up", "down")
"""Layers of a block of `gpt/...`; a kind's weights are those of all blocks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineOptions(TextOptions):
    """Settings of `reproduce tokens-cosine`."""

    methods: tuple[str, ...] = (
        *("fg-w", "fg-w+dense", "np", "fg-a", "fg-a+mixing", "fg-a+exact"),
        *("lg-fg-w", "lg-np", "lg-fg-a", "lg-fg-a+mixing", "lg-fg-a+exact"),
    )
    """Algorithms with options, as for tokens, without numbers of tangents."""
    network: str = "gpt/2/128"
    """A decoder: gpt/LAYERS/WIDTH."""
    iterations: int = 300
    """Steps of backpropagation before."""
    largest: int = 1024
    """The largest K; the others are a quarter of the next one."""
    repeats: int = 2
    """Estimates with so many tangents."""
    seed: int = 0
    """Seed of weights, batches and tangents."""
    data_dir: Path | None = None
    """Folder of the text, as for train."""


@dataclasses.dataclass(frozen=True)
class KindCosines:
    """Mean cosines of a kind's estimates with K tangents, as measured and as predicted.

    `error` is their standard error, and `of_mean` the cosine of the mean of all estimates.
    """

    kind: Name
    cosines: tuple[Number, ...]
    errors: tuple[NotNegative, ...]
    predicted: tuple[Number, ...]
    of_mean: Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineCell(AbstractCell):
    """The cosines of a method, for numbers of tangents, by kind of layer."""

    ROW = ("method",)

    method: Name
    tangents: tuple[Count, ...]
    kinds: tuple[KindCosines, ...]


def _plan(options: CosineOptions) -> Iterator[Job]:
    check_decoder(options.network)
    if options.largest < 1 or options.repeats < 1:
        raise InputError(
            f"largest and repeats must be at least 1, got {options.largest}, {options.repeats}"
        )
    for name in options.methods:
        config = config_of(options, name, options.network)
        if "@" in name or "tangents" not in options_of(config):
            raise InputError(
                f"method {name!r} must be one that perturbs, without a number of tangents"
            )
        prefix, _ = split(method_of(name).algorithm)
        what = {"network": options.network, "algorithm": f"{prefix}bp", "learning_rate": RATE}
        yield Job({"method": name}, options.seed, run_config(options, **what))


def _make(job: Job, options: CosineOptions, console: Console) -> dict[str, Any]:
    assert job.config is not None
    name = job.place["method"]
    # All methods with the same objective have the weights of one run.
    run = trained(job._replace(place={"trained": job.config.algorithm}), options, console)
    _, network = load_run(run.folder)
    given = {"tangents": 1, "seed": job.seed}
    # Clipped estimates have a bias.
    config = changed(config_of(options, name, options.network, **given), {"clip": None})
    step = problem(config, network)
    levels = _levels(options.largest)
    measured = _measured(step, levels, options.repeats, jax.random.key(job.seed))
    return {"tangents": tuple(levels), "kinds": measured}


def _levels(most: int) -> list[int]:
    """K and its quarters, from 1 or 2 or 3 on."""
    levels = [most]
    while levels[0] >= 4:
        levels.insert(0, levels[0] // 4)
    return levels


def _measured(
    step: Problem, levels: Sequence[int], repeats: int, key: Array
) -> tuple[KindCosines, ...]:
    """Cosines of all kinds of layers, from so many estimates with one tangent as it takes."""
    exact = _by_kind(_gradient(step._replace(estimator=Backpropagation())))
    init, estimate = estimation(step.loss, step.estimator, has_aux=True)
    steps, sizes = levels[-1] * repeats, jnp.array(levels)
    own = {kind: jnp.sum(g**2) for kind, g in exact.items()}

    @jax.jit
    def run(keys, state):
        def one(carry, given):
            state, sums, total = carry
            i, key = given
            _, grads, state = estimate(step.params, *step.batch, key=key, state=state)
            grads = _by_kind(grads)
            sums = {kind: s + grads[kind] for kind, s in sums.items()}
            total = {kind: t + grads[kind] for kind, t in total.items()}
            found = {k: _cosine(s, exact[k]) for k, s in sums.items()}
            power = {kind: jnp.sum(g**2) for kind, g in grads.items()}
            ends = (i + 1) % sizes == 0
            sums = {kind: jnp.where(ends[:, None], 0.0, s) for kind, s in sums.items()}
            return (state, sums, total), (found, power)

        zeros = {kind: jnp.zeros((len(levels), g.size)) for kind, g in exact.items()}
        total = jax.tree.map(jnp.zeros_like, exact)
        given = jnp.arange(steps), keys
        (_, _, total), out = jax.lax.scan(one, (state, zeros, total), given)
        return {kind: _cosine(t, exact[kind]) for kind, t in total.items()}, out

    state = init(step.params, *step.batch)
    of_mean, (found, power) = jax.device_get(run(jax.random.split(key, steps), state))
    return tuple(
        _summed_up(
            kind, levels, found[kind], float(np.mean(power[kind]) / own[kind]), of_mean[kind]
        )
        for kind in exact
    )


def _summed_up(
    kind: str, levels: Sequence[int], found: np.ndarray, power: float, of_mean: Any
) -> KindCosines:
    """Means over the groups of each level; `power` is one estimate's over the exact one's."""
    groups = [found[k - 1 :: k, i] for i, k in enumerate(levels)]
    return KindCosines(
        kind,
        cosines=tuple(float(np.mean(g)) for g in groups),
        errors=tuple(float(np.std(g) / max(1, len(g) - 1) ** 0.5) for g in groups),
        predicted=tuple(float((1 + max(0.0, power - 1) / k) ** -0.5) for k in levels),
        of_mean=float(of_mean),
    )


def _gradient(step: Problem) -> PyTree[Array]:
    init, estimate = estimation(step.loss, step.estimator, has_aux=True)
    state = init(step.params, *step.batch)
    return jax.jit(estimate)(step.params, *step.batch, state=state)[1]


def _by_kind(grads: PyTree[Array]) -> dict[str, Array]:
    """The weights' gradients of each kind of layer, as one vector."""
    found: dict[str, list[Array]] = {kind: [] for kind in KINDS}
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        match = re.fullmatch(r"\.blocks\[\d+\]\.(\w+)\.weight", jax.tree_util.keystr(path))
        if match:
            found[match[1]].append(grad.ravel())
    return {kind: jnp.concatenate(parts) for kind, parts in found.items()}


def _cosine(a: Array, b: Array) -> Array:
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b)
    return a @ b / jnp.maximum(norms, jnp.finfo(a.dtype).tiny)


def _present(cells: Sequence[CosineCell]) -> Presented:
    """A row a method: cosines of one tangent, of 16 or the like, and of the mean, by kind."""
    rows, texts = [], []
    for cell in cells:
        for kind in cell.kinds:
            for k, *values in zip(
                cell.tangents, kind.cosines, kind.errors, kind.predicted, strict=True
            ):
                names = ("cosine", "cosine_error", "predicted")
                numbers = dict(zip(names, values, strict=True))
                rows.append({"method": cell.method, "kind": kind.kind, "tangents": k, **numbers})
        shown = min(range(len(cell.tangents)), key=lambda i: abs(cell.tangents[i] - SHOWN))
        values = (f"{kind.cosines[shown]:.3f} ({kind.predicted[shown]:.3f})" for kind in cell.kinds)
        texts.append([cell.method, str(cell.tangents[shown]), *values])
    kinds = [kind.kind for kind in cells[0].kinds]
    return Presented(_figure(cells), rows, markdown(["method", "K", *kinds], texts))


def _figure(cells: Sequence[CosineCell]) -> Figure:
    """Cosines against K, a picture a kind of layer; dotted: predicted."""
    kinds = [kind.kind for kind in cells[0].kinds]
    figure, every = panels(2, 3, size=(13, 7), sharex=True, sharey=True)
    for axes, (i, kind) in zip(every.flat, enumerate(kinds), strict=True):
        for cell in cells:
            color, line, marker = look(cell.method)
            alpha = 0.5 if "+" in cell.method else 1.0
            found = cell.kinds[i]
            axes.plot(cell.tangents, found.predicted, ":", color=color, alpha=alpha)
            style = {"color": color, "linestyle": line, "marker": marker, "ms": 3, "alpha": alpha}
            axes.plot(cell.tangents, found.cosines, label=cell.method, **style)
        axes.set(title=kind, xscale="log")
    for axes in every[-1]:
        axes.set_xlabel("tangents")
    for axes in every[:, 0]:
        axes.set_ylabel("cosine with the exact gradient")
    every[0, -1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


TOKENS_COSINE = Experiment(
    "tokens-cosine",
    "how near estimates of a decoder's gradient are to the exact one",
    CosineOptions,
    Cells(
        kind=CosineCell,
        plan=_plan,
        make=_make,
        present=_present,
        same=("network", "dataset", "context", "batch_size", "iterations", "largest", "repeats"),
    ),
)
