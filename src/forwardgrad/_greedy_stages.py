"""Stages for a pipeline, from any stack of blocks."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array

from forwardgrad._errors import InputError, with_article
from forwardgrad._greedy import greedy
from forwardgrad._losses import Losses


def greedy_stages(
    blocks: Sequence[Callable[[Any], Any]],
    heads: Callable[[Any], Any] | Sequence[Callable[[Any], Any]],
    loss: Callable[..., Array],
    count: int,
    *,
    axes: Sequence[str] = ("example",),
) -> tuple[list[Callable[..., tuple[Losses, Any]]], list[tuple[list[Any], list[Any]]]]:
    """A stack of blocks in groups, for a [`forwardgrad.BlockPipeline`][].

    A stage is some neighbouring blocks under [`forwardgrad.greedy`][]. The groups are of equal
    length, or the first ones are longer by one.

    **Arguments:**

    - `blocks`, `heads`, `axes`: as for [`forwardgrad.greedy`][]; pytrees such as Equinox modules,
        whose arrays are the weights. A head that has weights cannot be one for all.
    - `loss`: `loss(output, *targets)`, from a head's output to the losses, not added up.
    - `count`: the number of stages.

    **Returns:**

    `(stages, params)`: functions `stage(params, x, *targets) -> (losses, output)`, and for each its
    parameters, a pair of blocks and heads.

    **Raises:**

    `InputError` if the stages are more than the blocks, the heads not as many as the blocks, or a
    block has no arrays.

    >>> import equinox as eqx, forwardgrad as fg, jax, jax.numpy as jnp, optax
    >>> class Block(eqx.Module):
    ...     linear: eqx.nn.Linear
    ...     def __call__(self, x):
    ...         return x + jnp.tanh(jax.vmap(self.linear)(x))
    >>> keys = jax.random.split(jax.random.key(0), 6)
    >>> blocks = [Block(eqx.nn.Linear(4, 4, key=key)) for key in keys[:3]]
    >>> heads = [Block(eqx.nn.Linear(4, 4, key=key)) for key in keys[3:]]
    >>> def loss(output, y):
    ...     return jnp.mean((output - y) ** 2, axis=1) / len(y)
    >>> stages, params = fg.greedy_stages(blocks, heads, loss, 2)
    >>> [len(blocks) for blocks, heads in params]
    [2, 1]
    >>> devices = jax.devices()[:1] * 2
    >>> pipeline = fg.BlockPipeline(stages, fg.ActivityPerturbation(), optax.sgd(0.1), devices)
    >>> x, y = jnp.ones((8, 4)), jnp.zeros((8, 4))
    >>> state = pipeline.init(params, x, y)
    >>> values, output, state = pipeline.step(state, x, y, key=jax.random.key(1))
    >>> output.shape
    (8, 4)
    """
    each = [heads] * len(blocks) if callable(heads) else list(heads)
    if len(each) != len(blocks):
        raise InputError(
            f"heads must be one for each of the {len(blocks)} blocks, got {len(each)} heads"
        )
    groups = grouped(len(blocks), count)
    for i, block in enumerate(blocks):
        if not any(map(eqx.is_inexact_array, jax.tree.leaves(block))):
            raise InputError(
                f"blocks[{i}] must be a pytree whose floating-point arrays are its weights, such "
                f"as an Equinox module, got {with_article(type(block).__name__)} that holds none"
            )
    params = [(list(blocks[own]), each[own]) for own in groups]
    return [_Greedy(loss, tuple(axes))] * count, params


@dataclasses.dataclass(frozen=True)
class _Greedy:
    """A stage whose parameters are its blocks and heads."""

    loss: Callable[..., Array]
    axes: tuple[str, ...]

    def __call__(self, params: Any, x: Any, *targets: Any) -> tuple[Losses, Any]:
        blocks, heads = params
        return greedy(blocks, heads, x, lambda out: self.loss(out, *targets), axes=self.axes)


def grouped(blocks: int, count: int) -> list[slice]:
    """Which of so many blocks are in each of `count` groups.

    **Raises:**

    `InputError` if there are not so many blocks.
    """
    if not 1 <= count <= blocks:
        raise InputError(
            f"the number of stages must be from 1 to that of the blocks, which is {blocks}, got "
            f"{count}"
        )
    bounds = [-(-blocks * i // count) for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]
