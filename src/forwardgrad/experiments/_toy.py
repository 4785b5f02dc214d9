"""Forward gradients on the Beale and Rosenbrock functions (Baydin et al. 2022, Section 5.1).

Command: `forwardgrad reproduce toy`. Seconds on any machine.

The paper's figure shows that forward gradients take about as many steps as gradient descent on
these functions of two variables, each of them cheaper.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.colors import LogNorm

from forwardgrad._console import Console
from forwardgrad._value_and_grad import value_and_grad
from forwardgrad.estimators import AbstractEstimator, Backpropagation, WeightPerturbation
from forwardgrad.experiments._experiment import Cells, Experiment, Job, Options, Presented
from forwardgrad.experiments._measure import interleave
from forwardgrad.results._figures import band, look, panels
from forwardgrad.results._records import AbstractCell, Name, NotNegative, Number

Point = Float[Array, "2"]


def beale(p: Point) -> Float[Array, ""]:
    """The Beale function; its minimum is 0 at (3, 0.5)."""
    x, y = p
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def rosenbrock(p: Point) -> Float[Array, ""]:
    """The Rosenbrock function; its minimum is 0 at (1, 1)."""
    x, y = p
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@dataclasses.dataclass(frozen=True)
class _Problem:
    function: Callable[[Point], Float[Array, ""]]
    start: tuple[float, float]
    minimum: tuple[float, float]
    learning_rate: float
    window: tuple[float, float, float, float]


PROBLEMS = {
    "beale": _Problem(beale, (1.5, -0.1), (3.0, 0.5), 0.01, (0.5, 4.0, -1.0, 1.2)),
    "rosenbrock": _Problem(rosenbrock, (-1.0, 0.0), (1.0, 1.0), 5e-4, (-1.6, 1.6, -0.6, 1.6)),
}

METHODS: dict[str, AbstractEstimator] = {
    "forward gradient": WeightPerturbation(distribution="normal", structure="dense"),
    "gradient descent": Backpropagation(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyOptions(Options):
    """Settings of `reproduce toy`."""

    iterations: int = 1000
    """Steps of each run."""
    runs: int = 10
    """Runs of the forward gradient, each with other tangents."""
    seed: int = 0
    """Seed of the tangents."""
    repeats: int = 10
    """Interleaved timings of each method."""


@dataclasses.dataclass(frozen=True)
class Descent:
    """The points that a method went through, run by run, and the losses there."""

    seconds_per_step: NotNegative
    points: tuple[tuple[tuple[Number | None, Number | None], ...], ...]
    losses: tuple[tuple[Number | None, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescentCell(AbstractCell):
    """How each method went down a function of two variables."""

    ROW = ("function",)

    function: Name
    methods: dict[Name, Descent]


def _plan(options: ToyOptions) -> Iterator[Job]:
    for name in PROBLEMS:
        yield Job({"function": name}, options.seed)


def _make(job: Job, options: ToyOptions, console: Console) -> dict[str, Any]:
    descents = {
        name: jax.jit(_descent(PROBLEMS[job.place["function"]], estimator, options.iterations))
        for name, estimator in METHODS.items()
    }
    keys = jax.random.split(jax.random.key(job.seed), options.runs)
    calls = {n: lambda f=f: jax.block_until_ready(f(keys[0])) for n, f in descents.items()}
    seconds = interleave(calls, options.repeats)
    methods = {}
    for name, descent in descents.items():
        points, losses = jax.vmap(descent)(keys if METHODS[name].needs_key else keys[:1])
        methods[name] = Descent(
            float(np.median(seconds[name])) / options.iterations,
            np.asarray(points, float).round(6).tolist(),
            tuple(tuple(float(f"{loss:.6g}") for loss in run) for run in np.asarray(losses)),
        )
    return {"methods": methods}


def _descent(problem: _Problem, estimator: AbstractEstimator, iterations: int):
    gradient = value_and_grad(problem.function, estimator)

    def descent(key):
        def step(point, i):
            value, grad = gradient(point, key=jax.random.fold_in(key, i))
            return point - problem.learning_rate * grad, (point, value)

        return jax.lax.scan(step, jnp.array(problem.start), jnp.arange(iterations))[1]

    return descent


def _present(cells: Sequence[DescentCell]) -> Presented:
    """A row a function: trajectories, and its values against steps and time."""
    figure, rows = panels(len(cells), 3, size=(12, 3.4 * len(cells)))
    for cell, (left, middle, right) in zip(cells, rows, strict=True):
        _contours(left, PROBLEMS[cell.function])
        left.set_title(cell.function.capitalize())
        for algorithm, (method, data) in zip(("fg-w", "bp"), cell.methods.items(), strict=True):
            color = look(algorithm)[0]
            for points in data.points:
                left.plot(*np.array(points, float).T, color=color, lw=1, alpha=0.5)
            losses = np.array(data.losses, float)
            lines = losses.min(0), np.median(losses, 0), losses.max(0)
            steps = np.arange(losses.shape[1])
            for axes, x in ((middle, steps), (right, steps * data.seconds_per_step * 1e3)):
                band(axes, x, lines, color=color, label=method)
        middle.set(xlabel="iteration", ylabel="f", yscale="log")
        right.set(xlabel="time (ms)", ylabel="f", yscale="log")
        middle.legend()
    return Presented(figure)


def _contours(axes, problem: _Problem) -> None:
    left, right, bottom, top = problem.window
    x, y = np.meshgrid(np.linspace(left, right, 200), np.linspace(bottom, top, 200))
    values = jax.vmap(jax.vmap(problem.function))(jnp.stack([x, y], axis=-1))
    style: dict[str, Any] = {"norm": LogNorm(), "cmap": "Greys_r", "linewidths": 0.6}
    axes.contour(x, y, values, levels=np.logspace(-2, 3, 16), **style)
    axes.plot(*problem.minimum, "k*")
    axes.plot(*problem.start, "ko", ms=4)
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="x", ylabel="y")


TOY = Experiment(
    "toy",
    "forward gradient and gradient descent on Beale and Rosenbrock",
    ToyOptions,
    Cells(
        kind=DescentCell,
        plan=_plan,
        make=_make,
        present=_present,
        same=("iterations", "runs", "repeats"),
    ),
)
