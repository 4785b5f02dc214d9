"""Networks written twice: as a user writes them, and layer by layer for the oracle.

In all of them the loss of an example is half the squared distance of the output from the target,
and no hidden layer has more rows than a unit has inputs, so that gradients say what each output of
each layer was credited with.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import forwardgrad as fg
from oracle import Blocks, Layer

OUTPUTS = 3
MASK = jax.random.permutation(jax.random.key(0), jnp.tile(jnp.arange(10) < 6, (10, 1)), 1, True)
FROZEN = [jax.random.normal(key, (8, 8)) / 3 for key in jax.random.split(jax.random.key(1), 2)]


@dataclasses.dataclass(frozen=True)
class Network:
    """`losses(params, x)` are half squared distances, one array for each block."""

    outputs: Callable[[Any, Array], list[Array]]
    blocks: Blocks
    shapes: dict[str, tuple[int, ...]]
    input_shape: tuple[int, ...]
    heads: tuple[str, ...] = ("last",)
    head_biases: tuple[str, ...] = ()
    unit_variance: bool = False

    def losses(self, params: Any, x: Array, y: Array) -> fg.Losses:
        """A loss for every example and block."""
        terms = [0.5 * jnp.sum((out - y) ** 2, axis=1) for out in self.outputs(params, x)]
        return fg.Losses(terms, [("example",)] * len(terms))

    def total(self, params: Any, x: Array, y: Array) -> Array:
        """The sum of all losses."""
        return self.losses(params, x, y).total()

    def make(self, seed: int, batch: int = 3) -> tuple[dict[str, Array], Array, Array]:
        """Parameters, inputs and targets."""
        rng = np.random.default_rng([seed, batch])

        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape), jnp.float32)

        params = {}
        for name, shape in self.shapes.items():
            fan_in = shape[0] if len(shape) == 2 else shape[-2] if len(shape) > 2 else 4
            params[name] = normal(*shape) * (1.0 if self.unit_variance else fan_in**-0.5)
        return params, normal(batch, *self.input_shape), normal(batch, OUTPUTS)


def of(name: str) -> Callable[[Any], Array]:
    """A parameter as it is."""
    return lambda p: p[name]


def _mlp() -> Network:
    def outputs(p, x):
        h = jax.nn.relu(x @ p["first"] + p["a"])
        h = jax.nn.relu(h @ p["second"] + p["b"])
        return [h @ p["last"] + p["c"]]

    layers = [
        Layer(of("first"), of("a")),
        Layer(of("second"), of("b"), jax.nn.relu),
        Layer(of("last"), of("c"), jax.nn.relu),
    ]
    shapes = {"first": (8, 14), "a": (14,), "second": (14, 12), "b": (12,)}
    shapes |= {"last": (12, OUTPUTS), "c": (OUTPUTS,)}
    return Network(outputs, (tuple(layers),), shapes, (8,), head_biases=("c",))


def _equalised() -> Network:
    def dense(h, w):
        return h @ (w / jnp.sqrt(w.shape[0]))

    def outputs(p, x):
        return [dense(jnp.tanh(dense(jnp.tanh(dense(x, p["first"])), p["second"])), p["last"])]

    layers = [
        Layer(lambda p: p["first"] * 8**-0.5),
        Layer(lambda p: p["second"] * 9**-0.5, None, jnp.tanh),
        Layer(lambda p: p["last"] * 10**-0.5, None, jnp.tanh),
    ]
    shapes = {"first": (8, 9), "second": (9, 10), "last": (10, OUTPUTS)}
    return Network(outputs, (tuple(layers),), shapes, (8,), unit_variance=True)


def _masked() -> Network:
    def outputs(p, x):
        h = jnp.tanh(x @ (p["first"] * MASK) + p["a"])
        h = jnp.tanh(h @ jnp.where(MASK, p["second"], 0))
        return [h @ p["last"]]

    layers = [
        Layer(lambda p: p["first"] * MASK, of("a")),
        Layer(lambda p: p["second"] * MASK, None, jnp.tanh),
        Layer(of("last"), None, jnp.tanh),
    ]
    shapes = {"first": (10, 10), "a": (10,), "second": (10, 10), "last": (10, OUTPUTS)}
    return Network(outputs, (tuple(layers),), shapes, (10,))


def _merged_adapter() -> Network:
    def outputs(p, x):
        h = jnp.tanh(x @ (FROZEN[0] + p["A"] @ p["B"]))
        h = jnp.tanh(h @ (FROZEN[1] + p["C"] @ p["D"]))
        return [h @ p["last"]]

    layers = [
        Layer(lambda p: FROZEN[0] + p["A"] @ p["B"]),
        Layer(lambda p: FROZEN[1] + p["C"] @ p["D"], None, jnp.tanh),
        Layer(of("last"), None, jnp.tanh),
    ]
    shapes = {"A": (8, 4), "B": (4, 8), "C": (8, 4), "D": (4, 8), "last": (8, OUTPUTS)}
    return Network(outputs, (tuple(layers),), shapes, (8,))


def patches(images: Array) -> Array:
    """[batch, height, width, channels] to [batch, position, 2 * 2 * channels]."""
    _, height, width, _ = images.shape
    corners = [(i, j) for i in range(height - 1) for j in range(width - 1)]
    found = [images[:, i : i + 2, j : j + 2].reshape(len(images), -1) for i, j in corners]
    return jnp.stack(found, axis=1)


def _convolution() -> Network:
    def convolved(x, kernel):
        spec = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=spec)

    def outputs(p, x):
        h = jax.nn.relu(convolved(x, p["first"]) + p["a"])
        h = jnp.tanh(convolved(h, p["second"]))
        return [h.reshape(len(h), -1) @ p["last"]]

    layers = [
        Layer(lambda p: p["first"].reshape(20, 6), of("a"), rows=patches),
        Layer(
            lambda p: p["second"].reshape(24, 10),
            before=lambda z: jax.nn.relu(z).reshape(-1, 2, 2, 6),
            rows=patches,
        ),
        Layer(of("last"), before=lambda z: jnp.tanh(z).reshape(len(z), -1)),
    ]
    shapes = {"first": (2, 2, 5, 6), "a": (6,), "second": (2, 2, 6, 10), "last": (10, OUTPUTS)}
    return Network(outputs, (tuple(layers),), shapes, (3, 3, 5))


def _flattened_tokens() -> Network:
    def outputs(p, x):
        batch, time, _ = x.shape
        h = jnp.tanh(x @ p["first"] + p["a"])
        h = h.reshape(batch * time, -1) @ p["second"] + p["b"]
        h = jnp.tanh(h.reshape(batch, time, -1))
        return [jnp.mean(h, axis=1) @ p["last"]]

    layers = [
        Layer(of("first"), of("a")),
        Layer(of("second"), of("b"), jnp.tanh),
        Layer(of("last"), before=lambda z: jnp.mean(jnp.tanh(z), axis=1)),
    ]
    shapes = {"first": (8, 9), "a": (9,), "second": (9, 8), "b": (8,), "last": (8, OUTPUTS)}
    return Network(outputs, (tuple(layers),), shapes, (2, 8))


def _scan() -> Network:
    def outputs(p, x):
        h = x @ p["first"]
        stack = (p["stack"], p["biases"])
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h) @ w[0] + w[1], None), h, stack)
        return [jnp.tanh(h) @ p["last"]]

    layers = [
        Layer(of("first")),
        *[
            Layer(lambda p, i=i: p["stack"][i], lambda p, i=i: p["biases"][i], jnp.tanh)
            for i in range(3)
        ],
        Layer(of("last"), None, jnp.tanh),
    ]
    shapes = {"first": (7, 8), "stack": (3, 8, 8), "biases": (3, 8), "last": (8, OUTPUTS)}
    return Network(outputs, (tuple(layers),), shapes, (7,))


def _greedy() -> Network:
    def outputs(p, x):
        h = jnp.tanh(x @ p["first"] + p["a"])
        h = jnp.tanh(h @ p["second"])
        early = h @ p["early"] + p["c"]
        h = jnp.tanh(jax.lax.stop_gradient(h) @ p["third"] + p["b"])
        return [early, h @ p["last"]]

    first = (
        Layer(of("first"), of("a")),
        Layer(of("second"), None, jnp.tanh),
        Layer(of("early"), of("c"), jnp.tanh),
    )
    second = (Layer(of("third"), of("b")), Layer(of("last"), None, jnp.tanh))
    shapes = {"first": (8, 9), "a": (9,), "second": (9, 8), "early": (8, OUTPUTS)}
    shapes |= {"c": (OUTPUTS,), "third": (8, 9), "b": (9,), "last": (9, OUTPUTS)}
    return Network(outputs, (first, second), shapes, (8,), ("early", "last"), ("c",))


NETWORKS = {
    "mlp with biases and relu": _mlp(),
    "equalised learning rate": _equalised(),
    "masked layers": _masked(),
    "merged adapters": _merged_adapter(),
    "convolutions and dense": _convolution(),
    "flattened tokens": _flattened_tokens(),
    "scan over a stack": _scan(),
    "greedy blocks": _greedy(),
}
