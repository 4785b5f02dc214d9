"""Scalar products of gradient estimates, and the statistics that they make."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from forwardgrad._diagnosis import DiagnosisRow, ratio

ROUNDING = 32
"""A bias below this many units of rounding is none."""


class _Running(NamedTuple):
    """The mean of the estimates so far, and the difference of the last pair."""

    mean: list[Array]
    difference: list[Array]


class Products(NamedTuple):
    """Scalar products, the last axis that of the layers; before it, that of samples or pairs."""

    with_exact: np.ndarray
    squares: np.ndarray
    differences: np.ndarray
    successive: np.ndarray
    mean_with_exact: np.ndarray
    mean: np.ndarray
    error: np.ndarray
    exact: np.ndarray

    def of(self, layers: Sequence[int]) -> "Products":
        """Those over some layers together."""
        return Products(*(np.asarray(p)[..., list(layers)].sum(axis=-1) for p in self))


def products_of_samples(
    gradient: Callable[[Array], list[Array]], exact: list[Array], keys: Array
) -> Products:
    """Draw an estimate for each key, and keep scalar products of it alone.

    **Arguments:**

    - `gradient`: a function of a key that returns an estimate, an array a layer.
    - `exact`: the exact gradient, likewise.
    - `keys`: an even number of keys.
    """
    running = _Running(*[[jnp.zeros_like(leaf) for leaf in exact] for _ in range(2)])
    noted = []
    for i in range(0, len(keys), 2):
        running, products = _add_pair(
            running, exact, gradient(keys[i]), gradient(keys[i + 1]), i + 2
        )
        # Waits for the pair: no more than one is ever in memory.
        noted.append([np.asarray(p, float) for p in products])
    pairs = [np.stack(column) for column in zip(*noted, strict=True)]
    mean_with_exact, mean, error = (np.asarray(p, float) for p in _of_mean(running.mean, exact))
    return Products(
        with_exact=np.concatenate(pairs[0]),
        squares=np.concatenate(pairs[1]),
        differences=pairs[2],
        successive=pairs[3][1:],  # The first pair has none before it.
        mean_with_exact=mean_with_exact,
        mean=mean,
        error=error,
        exact=np.asarray(_products(exact, exact), float),
    )


@functools.partial(jax.jit, donate_argnums=0)
def _add_pair(
    running: _Running, exact: list[Array], first: list[Array], second: list[Array], count: Array
) -> tuple[_Running, tuple[Array, ...]]:
    """The running values with two more estimates, `count` being their number then."""
    pair = (first, second)
    mean = jax.tree.map(
        lambda m, a, b: m + ((a - m) + (b - m)) / count, running.mean, first, second
    )
    difference = jax.tree.map(jnp.subtract, first, second)
    products = (
        jnp.stack([_products(x, exact) for x in pair]),
        jnp.stack([_products(x, x) for x in pair]),
        _products(difference, difference),
        _products(difference, running.difference),
    )
    return _Running(mean, difference), products


@jax.jit
def _of_mean(mean: list[Array], exact: list[Array]) -> tuple[Array, ...]:
    error = jax.tree.map(jnp.subtract, mean, exact)
    return _products(mean, exact), _products(mean, mean), _products(error, error)


def _products(a: list[Array], b: list[Array]) -> Array:
    """The scalar product in every layer."""
    return jnp.stack([jnp.vdot(x, y) for x, y in zip(a, b, strict=True)])


def row(name: str, parameters: int, of: Products, unit: float) -> DiagnosisRow:
    """What the scalar products say; `unit` is the parameters' unit of rounding."""
    count, norm = len(of.squares), math.sqrt(of.exact)
    # An estimate of zero has no direction; it counts as a right angle.
    scale = norm * np.sqrt(of.squares)
    cosines = np.divide(of.with_exact, scale, out=np.zeros(count), where=scale > 0)
    variance = float(np.mean(of.differences)) / 2
    squared = np.mean(of.successive**2) / 4 if len(of.successive) else 0.0
    squared = max(squared, variance**2 / max(parameters, 1))
    noise = 2 * (count + 2) / count**3 * squared
    return DiagnosisRow(
        name=name,
        parameters=parameters,
        norm=norm,
        cosine=float(cosines.mean()) if norm else None,
        cosine_error=_standard_error(cosines) if norm else None,
        cosine_of_mean=ratio(float(of.mean_with_exact), norm * math.sqrt(of.mean)),
        bias_squared=float(of.error) - variance / count,
        bias_squared_error=math.hypot(
            math.sqrt(noise), (ROUNDING * unit) ** 2 * float(of.exact + of.mean)
        ),
        variance=variance,
        variance_error=_standard_error(of.differences / 2),
    )


def _standard_error(values: np.ndarray) -> float:
    return float(np.std(values)) / math.sqrt(len(values))
