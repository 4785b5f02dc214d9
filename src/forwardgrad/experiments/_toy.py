"""Forward gradients on the Beale and Rosenbrock functions (Baydin et al. 2022, Section 5.1).

Command: `forwardgrad reproduce toy`. Seconds on any machine.

The paper's figure shows that forward gradients take about as many steps as gradient descent on
these functions of two variables, each of them cheaper.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from forwardgrad._value_and_grad import value_and_grad
from forwardgrad.estimators import AbstractEstimator, Backpropagation, WeightPerturbation
from forwardgrad.experiments._experiment import Experiment, header
from forwardgrad.experiments._measure import interleave
from forwardgrad.results import save, write

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


@dataclasses.dataclass(frozen=True)
class ToyOptions:
    """Settings of `reproduce toy`."""

    out: Path = Path("runs/reproduce/toy")
    """Folder of the results."""
    iterations: int = 1000
    """Steps of each run."""
    runs: int = 10
    """Runs of the forward gradient, each with other tangents."""
    seed: int = 0
    """Seed of the tangents."""
    repeats: int = 10
    """Interleaved timings of each method."""


def run_toy(options: ToyOptions) -> Path:
    """Run the experiment, and return the folder of its results."""
    results = {name: _solve(problem, options) for name, problem in PROBLEMS.items()}
    write(options.out / "toy.json", {**header("toy", options), "results": results})
    save(_figure(results), options.out / "toy.png")
    return options.out


def _solve(problem: _Problem, options: ToyOptions) -> dict[str, Any]:
    descents = {
        name: jax.jit(_descent(problem, estimator, options.iterations))
        for name, estimator in METHODS.items()
    }
    keys = jax.random.split(jax.random.key(options.seed), options.runs)
    seconds = interleave(
        {name: lambda f=f: jax.block_until_ready(f(keys[0])) for name, f in descents.items()},
        options.repeats,
    )
    results = {}
    for name, descent in descents.items():
        points, losses = jax.vmap(descent)(keys if METHODS[name].needs_key else keys[:1])
        results[name] = {
            "seconds_per_step": float(np.median(seconds[name])) / options.iterations,
            "points": np.asarray(points, float).round(6).tolist(),
            "losses": [[float(f"{v:.6g}") for v in row] for row in np.asarray(losses)],
        }
    return results


def _descent(problem: _Problem, estimator: AbstractEstimator, iterations: int):
    gradient = value_and_grad(problem.function, estimator)

    def descent(key):
        def step(point, i):
            value, grad = gradient(point, key=jax.random.fold_in(key, i))
            return point - problem.learning_rate * grad, (point, value)

        return jax.lax.scan(step, jnp.array(problem.start), jnp.arange(iterations))[1]

    return descent


def _figure(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(12, 3.4 * len(results)), layout="constrained")
    rows = figure.subplots(len(results), 3)
    for (name, result), (left, middle, right) in zip(results.items(), rows, strict=True):
        _contours(left, PROBLEMS[name])
        left.set_title(name.capitalize())
        for color, (method, data) in zip(("tab:red", "tab:blue"), result.items(), strict=True):
            for points in data["points"]:
                left.plot(*np.array(points).T, color=color, lw=1, alpha=0.5)
            losses = np.array(data["losses"])
            steps = np.arange(losses.shape[1])
            for axes, x in ((middle, steps), (right, steps * data["seconds_per_step"] * 1e3)):
                axes.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.2, lw=0)
                axes.plot(x, np.median(losses, 0), color=color, label=method)
        middle.set(xlabel="iteration", ylabel="f", yscale="log")
        right.set(xlabel="time (ms)", ylabel="f", yscale="log")
        middle.legend()
    return figure


def _contours(axes, problem: _Problem) -> None:
    left, right, bottom, top = problem.window
    x, y = np.meshgrid(np.linspace(left, right, 200), np.linspace(bottom, top, 200))
    values = jax.vmap(jax.vmap(problem.function))(jnp.stack([x, y], axis=-1))
    axes.contour(
        x, y, values, levels=np.logspace(-2, 3, 16), norm=LogNorm(), cmap="Greys_r", linewidths=0.6
    )
    axes.plot(*problem.minimum, "k*")
    axes.plot(*problem.start, "ko", ms=4)
    axes.set(xlim=(left, right), ylim=(bottom, top), xlabel="x", ylabel="y")


TOY = Experiment(
    "toy", "forward gradient and gradient descent on Beale and Rosenbrock", ToyOptions, run_toy
)
