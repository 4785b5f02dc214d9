"""Both kinds of data set as feeds for the compiled loop."""

import abc
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from forwardgrad._errors import InputError
from forwardgrad.data import ResidentSplit, Split, StreamedSplit
from forwardgrad.training._state import Feed

STACK = 32
"""Batches of a streamed set that go to the device at once."""


class AbstractFeeds(abc.ABC):
    """The feeds of one epoch after another."""

    @abc.abstractmethod
    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Feed, int, int]]:
        """Feeds for the steps of an epoch from `start` on, with the range of steps in each."""


class ResidentFeeds(AbstractFeeds):
    """All examples on the device; only their order changes."""

    def __init__(self, split: ResidentSplit, batch_size: int, key: Key[Array, ""]):
        self._images, self._labels = jnp.asarray(split.images), jnp.asarray(split.labels)
        steps = len(split) // batch_size

        @jax.jit
        def order(epoch):
            shuffled = jax.random.permutation(jax.random.fold_in(key, epoch), len(split))
            return shuffled[: steps * batch_size].reshape(steps, batch_size)

        self._order, self._steps = order, steps

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Feed, int, int]]:
        """One feed: the epoch."""
        yield Feed(self._images, self._labels, self._order(epoch)), start, self._steps


class StreamedFeeds(AbstractFeeds):
    """Stacks of batches, decoded ahead of the device's work."""

    def __init__(self, split: StreamedSplit, batch_size: int, seed: int):
        self._split, self._batch_size, self._seed = split, batch_size, seed

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Feed, int, int]]:
        """A feed for every `STACK` batches."""
        batches = self._split.batches(
            self._batch_size, seed=self._seed, epoch=epoch, start=start, drop_remainder=True
        )
        stack: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in batches:
            stack.append(batch)
            if len(stack) == STACK:
                yield self._feed(stack), 0, len(stack)
                stack = []
        if stack:
            yield self._feed(stack), 0, len(stack)

    def _feed(self, stack: list[tuple[np.ndarray, np.ndarray]]) -> Feed:
        # A short stack is filled up, so that one compiled loop serves all.
        full = [*stack, *[stack[-1]] * (STACK - len(stack))]
        images, labels = (np.concatenate(part) for part in zip(*full, strict=True))
        order = np.arange(len(images)).reshape(STACK, self._batch_size)
        return Feed(jnp.asarray(images), jnp.asarray(labels), jnp.asarray(order, jnp.int32))


def make_feeds(split: Split, batch_size: int, key: Key[Array, ""], seed: int) -> AbstractFeeds:
    """The feeds of a split.

    **Raises:**

    `InputError` if it has fewer examples than a batch.
    """
    if len(split) < batch_size:
        raise InputError(
            f"batch_size (={batch_size}) is larger than the training set of {len(split)} examples"
        )
    if isinstance(split, ResidentSplit):
        return ResidentFeeds(split, batch_size, key)
    assert isinstance(split, StreamedSplit)
    return StreamedFeeds(split, batch_size, seed)
