"""The error of a network on a split."""

import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from forwardgrad.data import ResidentSplit, Split, StreamedSplit
from forwardgrad.objectives import wrong

BATCH = 500


Predict = Callable[[PyTree, Array], Array]
"""`(params, images uint8) -> logits`."""


def make_error(
    predict: Predict, split: Split, limit: int | None = None
) -> Callable[[PyTree], float]:
    """A function of the parameters: the per cent of wrong predictions on a split.

    `limit` stops after about that many examples.
    """

    @jax.jit
    def count(params, images, labels):
        return wrong(predict(params, images), labels)

    def error(params: PyTree) -> float:
        mistakes, total = jnp.zeros((), jnp.int32), 0
        for images, labels, padding in batches(split, limit):
            # What fills up a batch has a label that is always wrong.
            mistakes += count(params, images, labels) - padding
            total += len(labels) - padding
        return 100.0 * int(mistakes) / total

    return error


def batches(split: Split, limit: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Batches of `BATCH` examples in the split's order, and how many of each only fill it up.

    A short batch is filled up with black images of the label -1, so that one program serves all.
    """
    for images, labels in _batches(split, limit):
        missing = BATCH - len(labels)
        images = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])
        yield images, np.pad(labels, (0, missing), constant_values=-1), missing


def _batches(split: Split, limit: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    stop = len(split) if limit is None else min(limit, len(split))
    if isinstance(split, ResidentSplit):
        for start in range(0, stop, BATCH):
            chosen = slice(start, min(start + BATCH, stop))
            yield split.images[chosen], split.labels[chosen]
        return
    assert isinstance(split, StreamedSplit)
    yield from itertools.islice(split.ordered(BATCH), -(-stop // BATCH))
