"""Batches that are decoded while they are asked for."""

import os
from collections.abc import Iterator
from typing import Protocol

import grain
import numpy as np
from jaxtyping import Int

from forwardgrad._errors import InputError
from forwardgrad.data._dataset import Batch, ResidentSplit, Split
from forwardgrad.data._decode import Rows

_THREADS = min(16, os.cpu_count() or 1)
# Decoded batches that wait, at most; with those in the threads' hands this bounds the memory.
_AHEAD = 2 * _THREADS
_RESIDENT_CHUNK = 512


class RandomAccess(Protocol):
    """So many examples, any of which can be had."""

    def __len__(self) -> int: ...

    def take(self, rows: Int[np.ndarray, " batch"]) -> Batch: ...


class StreamedSplit(Split):
    """A split that stays on disk, memory-mapped; threads decode batches ahead of their use.

    At most a few batches per processor core are decoded at any time, whatever the split's size.

    **Arguments:**

    - `rows`: random access to decoded rows, or to windows of a text.
    """

    def __init__(self, rows: RandomAccess):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        """These images, decoded, and their labels."""
        return self._rows.take(rows)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        start: int = 0,
        drop_remainder: bool = False,
    ) -> Iterator[Batch]:
        """One epoch's batches, in an order that depends on `seed` and `epoch` alone.

        Every example comes exactly once. `start` skips batches without decoding them, so that a
        resumed epoch goes on with the batch it would have had.

        **Arguments:**

        - `batch_size`: the number of examples of a batch.
        - `seed`, `epoch`: not negative; another pair is another order.
        - `start`: the number of batches to skip.
        - `drop_remainder`: leave out the last batch if it is short.

        **Returns:**

        Pairs of images, uint8 `[batch, height, width, channels]`, and labels, int32 `[batch]`.

        **Raises:**

        `InputError` if an argument is out of range; while iterating, for a row that does not hold
        an image of the right size.
        """
        for name, value in (("seed", seed), ("epoch", epoch), ("start", start)):
            if value < 0:
                raise InputError(f"{name} must not be negative, got {value}")
        shuffle_seed = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
        order = grain.MapDataset.range(len(self)).shuffle(seed=shuffle_seed)
        return self._decode(order, batch_size, start, drop_remainder)

    def ordered(self, batch_size: int) -> Iterator[Batch]:
        """All examples in the order of the file, for evaluation; the last batch may be short."""
        return self._decode(grain.MapDataset.range(len(self)), batch_size)

    def _decode(
        self,
        order: grain.MapDataset[int],
        batch_size: int,
        start: int = 0,
        drop_remainder: bool = False,
    ) -> Iterator[Batch]:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        batches = order.batch(batch_size, drop_remainder=drop_remainder)[start:]
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
        return iter(batches.map(self._rows.take).to_iter_dataset(options))


def resident(rows: Rows) -> ResidentSplit:
    """Decode all rows, in parallel, into memory.

    **Raises:**

    `InputError` for the first row that does not hold an image of the right size.
    """
    images = np.empty((len(rows), *rows.image_shape), np.uint8)
    filled = 0
    for chunk, _ in StreamedSplit(rows).ordered(_RESIDENT_CHUNK):
        images[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return ResidentSplit(images, rows.labels)
