"""What estimators should say, by formulas that share no code with the library.

A network is a tuple of blocks, one for each of its losses, and a block a tuple of layers, the last
of which is its head. What goes from one block to the next is a constant to the next. Axis 0 of
everything but a weight is the examples, and the loss of an example in a block is half the
squared distance of the head's output from the target.

The *credit* of a layer is what an estimator takes for the losses' derivative by the layer's output.
All gradients follow from it: weights get the transposed rows times the credit.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

# Compiling takes most of the tests' time: every program runs once or twice.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Layer(NamedTuple):
    """`rows(before(z)) @ weight(params) + bias(params)`, with z the layer before's output.

    `before` is what lies between two layers, and `rows` how this one reads its input, both free of
    parameters: a convolution multiplies patches. `weight` is the matrix that enters the product.
    """

    weight: Callable[[Any], Array]
    bias: Callable[[Any], Array] | None = None
    before: Callable[[Array], Array] = lambda z: z
    rows: Callable[[Array], Array] = lambda h: h


class Step(NamedTuple):
    """A layer at work: its input, rows and output, and how derivatives go back through both."""

    input: Array
    rows: Array
    output: Array
    between: Callable[[Array], tuple[Array]]
    gather: Callable[[Array], tuple[Array]]


Blocks = tuple[tuple[Layer, ...], ...]


def forward(blocks: Blocks, params: Any, x: Array) -> list[list[Step]]:
    """Every layer at work."""
    found = []
    for block in blocks:
        steps, z = [], x
        for layer in block:
            h, between = jax.vjp(layer.before, z)
            rows, gather = jax.vjp(layer.rows, h)
            z = rows @ layer.weight(params)
            z = z if layer.bias is None else z + layer.bias(params)
            steps.append(Step(h, rows, z, between, gather))
        found.append(steps)
        x = steps[-1].input
    return found


def through_the_layer(step: Step, credit: Array, matrix: Array) -> Array:
    """The credit of the layer before, where the credit of this one comes back by a matrix."""
    return step.between(step.gather(credit @ matrix.T)[0])[0]


def from_the_output(step: Step, error: Array, matrix: Array) -> Array:
    """The credit of the layer before, where the output's error comes to this one's input."""
    return step.between((error @ matrix.T).reshape(step.input.shape))[0]


def feedback_alignment(found, y, feedback) -> list[list[Array]]:
    """The credit of every layer; `feedback` has a matrix for each but a block's first one."""
    credit = []
    for steps, matrices in zip(found, feedback, strict=True):
        back = [steps[-1].output - y]
        for step, matrix in zip(steps[:0:-1], matrices[::-1], strict=True):
            back.insert(0, through_the_layer(step, back[0], matrix))
        credit.append(back)
    return credit


def direct_feedback_alignment(found, y, feedback) -> list[list[Array]]:
    """The credit of every layer; `feedback` has a matrix for each but a block's first one."""
    credit = []
    for steps, matrices in zip(found, feedback, strict=True):
        error = steps[-1].output - y
        sent = zip(steps[1:], matrices, strict=True)
        credit.append([*[from_the_output(step, error, m) for step, m in sent], error])
    return credit


def backpropagation(blocks: Blocks, params: Any, found, y) -> list[list[Array]]:
    """The exact credit: what comes back by the weights themselves."""
    weights = [[layer.weight(params) for layer in block[1:]] for block in blocks]
    return feedback_alignment(found, y, weights)


def activity_perturbation(exact, signs, together: bool) -> list[list[Array]]:
    """The credit that signs on all layers but the heads earn: the change of a loss, times the sign.

    The loss is that of the example and block, or with `together` the sum of all of them.
    """

    def by_example(sign, exact):
        return jnp.sum((sign * exact).reshape(len(sign), -1), axis=1)

    changes = [
        sum(map(by_example, block[:-1], of_exact[:-1]))
        for block, of_exact in zip(signs, exact, strict=True)
    ]
    if together:
        changes = [jnp.full_like(change, sum(map(jnp.sum, changes))) for change in changes]
    credit = []
    for block, of_exact, change in zip(signs, exact, changes, strict=True):
        earned = [s * change.reshape(-1, *[1] * (s.ndim - 1)) for s in block[:-1]]
        credit.append([*earned, of_exact[-1]])
    return credit


def gradients(blocks: Blocks, params: Any, found, credit) -> Any:
    """What the parameters get, layer by layer."""
    total = jax.tree.map(jnp.zeros_like, params)
    for block, steps, of_block in zip(blocks, found, credit, strict=True):
        for layer, step, delta in zip(block, steps, of_block, strict=True):
            delta = delta.reshape(-1, delta.shape[-1])
            to_weight = step.rows.reshape(-1, step.rows.shape[-1]).T @ delta
            grads = jax.vjp(layer.weight, params)[1](to_weight)
            if layer.bias is not None:
                grads += jax.vjp(layer.bias, params)[1](jnp.sum(delta, axis=0))
            total = jax.tree.map(lambda *terms: sum(terms), total, *grads)
    return total


@functools.cache
def _explained(blocks: Blocks) -> Callable:
    """Parameters and inputs to the matrix from credit to gradients, and outputs."""

    @jit
    def explained(params, x):
        found = forward(blocks, params, x)
        outputs = [[step.output for step in steps] for steps in found]
        start, unflatten = ravel_pytree(outputs)

        def by_credit(credit):
            return ravel_pytree(gradients(blocks, params, found, unflatten(credit)))[0]

        return jax.jacfwd(by_credit)(start), outputs

    return explained


def credit_of(blocks: Blocks, params: Any, x: Array, grads: Any) -> list[list[Array]]:
    """The credit that explains gradients: unique where no weight has more rows than inputs."""
    matrix, outputs = _explained(blocks)(params, x)
    target = np.asarray(ravel_pytree(grads)[0], float)
    credit = np.linalg.lstsq(np.asarray(matrix, float), target, rcond=1e-6)[0]
    return ravel_pytree(outputs)[1](jnp.asarray(credit, jnp.float32))


@functools.cache
def _equations(blocks: Blocks, direct: bool) -> Callable:
    """For every matrix what it is multiplied with, and what has to come out."""

    @jit
    def equations(params, x, y, credit):
        found, out = forward(blocks, params, x), []
        for steps, own in zip(found, credit, strict=True):
            error = steps[-1].output - y
            sent = [error] * len(own[1:]) if direct else own[1:]
            triples = zip(steps[1:], sent, own[:-1], strict=True)
            out.append([_equation(*triple, direct) for triple in triples])
        return out

    return equations


def solved(blocks: Blocks, cases: Sequence[tuple], direct: bool) -> list[list[Array]]:
    """The feedback matrices that explain the gradients in `cases`, of (params, x, y, grads)."""
    systems = [
        _equations(blocks, direct)(params, x, y, credit_of(blocks, params, x, grads))
        for params, x, y, grads in cases
    ]
    return jax.tree.map(_solution, *systems, is_leaf=lambda node: isinstance(node, tuple))


def _equation(step: Step, sent: Array, before: Array, direct: bool) -> tuple[Array, Array]:
    rows = step.input[0].size if direct else step.rows.shape[-1]
    send = from_the_output if direct else through_the_layer
    start = jnp.zeros((rows, sent.shape[-1]))
    return jax.jacfwd(lambda matrix: send(step, sent, matrix))(start), before


def _solution(*systems: tuple[Array, Array]) -> Array:
    """The matrix M with `factor . M = target` in all systems."""
    shape = systems[0][0].shape[-2:]
    factor = np.concatenate([np.reshape(a, (-1, shape[0] * shape[1])) for a, _ in systems])
    target = np.concatenate([np.ravel(b) for _, b in systems])
    matrix = np.linalg.lstsq(factor.astype(float), target.astype(float), rcond=1e-6)[0]
    return jnp.asarray(matrix.reshape(shape), jnp.float32)
