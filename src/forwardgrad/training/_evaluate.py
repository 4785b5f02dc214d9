"""The error of a network on a split."""

import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from forwardgrad.data import ResidentSplit, Split, StreamedSplit
from forwardgrad.training._state import Loss

BATCH = 500


def make_error(loss: Loss, split: Split, limit: int | None = None) -> Callable[[PyTree], float]:
    """A function of the parameters: the per cent of wrong predictions on a split.

    `limit` stops after about that many examples. A short batch is filled up
    with examples of the label -1, which is always wrong, so that one program serves all.
    """
    count = jax.jit(lambda params, images, labels: loss(params, images, labels)[1]["errors"])

    def error(params: PyTree) -> float:
        wrong, total = jnp.zeros((), jnp.int32), 0
        for images, labels in _batches(split, limit):
            missing = BATCH - len(labels)
            images = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])
            labels = np.pad(labels, (0, missing), constant_values=-1)
            wrong += count(params, images, labels) - missing
            total += BATCH - missing
        return 100.0 * int(wrong) / total

    return error


def _batches(split: Split, limit: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    stop = len(split) if limit is None else min(limit, len(split))
    if isinstance(split, ResidentSplit):
        for start in range(0, stop, BATCH):
            chosen = slice(start, min(start + BATCH, stop))
            yield split.images[chosen], split.labels[chosen]
        return
    assert isinstance(split, StreamedSplit)
    yield from itertools.islice(split.ordered(BATCH), -(-stop // BATCH))
