"""Estimators, problems to train, and tangents as arrays.

A new estimator gets one row in `ESTIMATORS`; a new kind of model one in `PROBLEMS`.
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import forwardgrad as fg
from forwardgrad.estimators._weight_perturbation import directional_derivatives
from forwardgrad.rewrite import Layout, Program

ESTIMATORS: dict[str, fg.AbstractEstimator] = {
    "backpropagation": fg.Backpropagation(),
    "weight perturbation": fg.WeightPerturbation(),
    "weight perturbation, four tangents": fg.WeightPerturbation(tangents=4),
    "weight perturbation, orthogonal": fg.WeightPerturbation(tangents=3, orthogonal=True),
    "weight perturbation, rank two": fg.WeightPerturbation(rank=2),
    "weight perturbation, normal": fg.WeightPerturbation(distribution="normal"),
    "weight perturbation, sphere": fg.WeightPerturbation(distribution="sphere"),
    "weight perturbation, dense": fg.WeightPerturbation(structure="dense"),
    "weight perturbation, dense sphere": fg.WeightPerturbation(
        structure="dense", distribution="sphere", tangents=2
    ),
    "weight perturbation, clipped": fg.WeightPerturbation(clip=0.5),
    "weight perturbation, last layers exact": fg.WeightPerturbation(exact_last=True),
    "activity perturbation": fg.ActivityPerturbation(),
    "activity perturbation, four tangents": fg.ActivityPerturbation(tangents=4),
    "activity perturbation, direct part exact": fg.ActivityPerturbation(exact_direct=True),
    "activity perturbation, in parts": fg.ActivityPerturbation(tangents=2, partition=2),
    "node perturbation": fg.NodePerturbation(),
    "node perturbation, three tangents in chunks": fg.NodePerturbation(tangents=3, chunk=2),
    "feedback alignment": fg.FeedbackAlignment(),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss `fun(params, *args)`, where training starts, and the data."""

    fun: Callable[..., jax.Array]
    params: Any
    args: tuple[jax.Array, ...] = ()


def _quadratic() -> Problem:
    return Problem(lambda w: jnp.sum((w - jnp.arange(6.0)) ** 2), jnp.zeros(6))


def _regression() -> Problem:
    x = jax.random.normal(jax.random.key(0), (32, 4))
    y = jnp.sin(x[:, :1]) + x[:, 1:2]

    def loss(params, x, y):
        hidden = jnp.tanh(x @ params["hidden"]["W"] + params["hidden"]["b"])
        return jnp.mean((hidden @ params["out"][0] + params["out"][1] - y) ** 2)

    W = 0.5 * jax.random.normal(jax.random.key(1), (4, 8))
    return Problem(
        loss,
        {"hidden": {"W": W, "b": jnp.zeros(8)}, "out": (jnp.zeros((8, 1)), jnp.float32(0.0))},
        (x, y),
    )


def _classifier() -> Problem:
    network = eqx.nn.MLP(4, 3, 8, 2, key=jax.random.key(2))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    x = jax.random.normal(jax.random.key(3), (32, 4))

    def loss(params, x, y):
        logits = jax.vmap(eqx.combine(params, static))(x)
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * y, axis=1))

    return Problem(loss, params, (x, jax.nn.one_hot(jnp.argmax(x[:, :3], axis=1), 3)))


def _convolution() -> Problem:
    x = jax.random.normal(jax.random.key(4), (16, 6, 6, 2))
    y = jnp.mean(jnp.abs(x), axis=(1, 2))

    def loss(params, x, y):
        spec = ("NHWC", "HWIO", "NHWC")
        h = jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=spec
        )
        h, _ = jax.lax.scan(lambda h, w: (h + jax.nn.relu(h @ w), None), h, params["blocks"])
        return jnp.mean((jnp.mean(jax.nn.relu(h), axis=(1, 2)) @ params["head"] - y) ** 2)

    keys = jax.random.split(jax.random.key(5), 3)
    return Problem(
        loss,
        {
            "kernel": 0.3 * jax.random.normal(keys[0], (3, 3, 2, 4)),
            "blocks": 0.3 * jax.random.normal(keys[1], (2, 4, 4)),
            "head": jnp.zeros((4, 2)),
        },
        (x, y),
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "quadratic": _quadratic,
    "regression": _regression,
    "Equinox classifier": _classifier,
    "convolutions and scan": _convolution,
}


def size(params: Any) -> int:
    """The number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def dot(a: Any, b: Any) -> jax.Array:
    """The scalar product of two trees."""
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def layouts(fun: Callable[[Any], jax.Array], params: Any) -> list[tuple]:
    """For each parameter its factors, a pair `(stacked axes, own axes)` each."""
    program = Program(lambda p: (fun(p), None), params)
    return [tuple((f.stacked, f.own) for f in layout) for layout in program.layouts()]


def build(layout: Layout, arrays: Sequence[jax.Array], shape: Sequence[int]) -> jax.Array:
    """The K tangents that a parameter's factors stand for, by the definition of `FactorShape`.

    Axis 0 of each factor is the tangent; one more axis in front of the layout's own is the terms
    that are summed over.
    """
    axes = [i for i, n in enumerate(shape) if n != 1]
    operands = []
    for factor, array in zip(layout, arrays, strict=True):
        spanned = [2 + axis for axis in (*factor.stacked, *factor.own)]
        terms = [1] if array.ndim > 1 + len(spanned) else []
        operands += [array, [0, *terms, *spanned]]
    out = jnp.einsum(*operands, [0, *(2 + axis for axis in axes)])
    return out.reshape(-1, *shape)


class Directional(NamedTuple):
    """What a program says about K tangents, and the tangents as arrays."""

    value: jax.Array
    derivatives: jax.Array
    tangents: Any


def directional(
    fun: Callable[[Any], jax.Array],
    params: Any,
    estimator: fg.WeightPerturbation,
    key: jax.Array,
    *,
    keep: Sequence[int] | None = None,
    tangents: bool = True,
) -> Directional:
    """The derivatives of `fun` along the tangents that `estimator` draws (or those to `keep`).

    The tangents are left out (None) on demand.
    """
    program = Program(lambda p: (fun(p), None), params)
    chosen = estimator._layouts(program)
    factors = estimator._factors(key, program.leaves, chosen)
    if keep is not None:
        factors = [[a[np.array(keep)] for a in arrays] for arrays in factors]
    found = directional_derivatives(program, chosen, dict(enumerate(factors)))
    (value,), derivatives = found.losses, found.changes[:, 0]
    if not tangents:
        return Directional(value, derivatives, None)
    built = [
        build(layout, arrays, leaf.shape)
        for layout, arrays, leaf in zip(chosen, factors, program.leaves, strict=True)
    ]
    return Directional(value, derivatives, program.treedef.unflatten(built))


def run_on_eight_devices(script: str, *words: str) -> None:
    """Run one of the scripts beside this one in a process that has eight devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(script), *words],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
