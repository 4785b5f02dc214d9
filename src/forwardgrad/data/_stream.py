"""Batches that are decoded while they are asked for."""

import os
from collections.abc import Iterator
from typing import Protocol

import grain
import numpy as np
from jaxtyping import Int

from forwardgrad._errors import InputError
from forwardgrad.data._dataset import Batch, ResidentSplit, Share, Split, part_of
from forwardgrad.data._decode import Rows

_THREADS = min(16, os.cpu_count() or 1)
# Batches that wait or are being decoded, at most, and their bytes: this bounds the memory.
_AHEAD = 2 * _THREADS
_AHEAD_BYTES = 2**29
_RESIDENT_CHUNK = 512


class RandomAccess(Protocol):
    """So many examples, any of which can be had."""

    def __len__(self) -> int: ...

    @property
    def example_bytes(self) -> int: ...

    def take(self, rows: Int[np.ndarray, " batch"]) -> Batch: ...

    def shuffled(self, seed: int) -> grain.MapDataset[int]: ...


class StreamedSplit(Split):
    """A split that stays where it is, on disk or far away; threads decode batches ahead of use.

    At most a few batches per processor core are decoded at any time, whatever the split's size.
    Threads, and not processes: most of decoding an image does not hold Python's lock.

    **Arguments:**

    - `rows`: random access to decoded rows, or to windows of a text.
    """

    def __init__(self, rows: RandomAccess):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def example_bytes(self) -> int:
        """The bytes of a decoded example."""
        return self._rows.example_bytes

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
        share: Share = (0, 1),
    ) -> Iterator[Batch]:
        """One epoch's batches, in an order that depends on `seed` and `epoch` alone.

        Every example comes exactly once. `start` skips batches without decoding them, so that a
        resumed epoch goes on with the batch it would have had.

        **Arguments:**

        - `batch_size`: the number of examples of a batch.
        - `seed`, `epoch`: not negative; another pair is another order.
        - `start`: the number of batches to skip.
        - `drop_remainder`: leave out the last batch if it is short.
        - `share`: `(i, n)` decodes only part i of every batch, cut into n equal ones.

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
        order = self._rows.shuffled(shuffle_seed)
        return self._decode(order, batch_size, start, drop_remainder, share)

    def ordered(self, batch_size: int, *, share: Share = (0, 1)) -> Iterator[Batch]:
        """All examples in the order of the file, for evaluation; the last batch may be short."""
        return self._decode(grain.MapDataset.range(len(self)), batch_size, share=share)

    def _decode(
        self,
        order: grain.MapDataset[int],
        batch_size: int,
        start: int = 0,
        drop_remainder: bool = False,
        share: Share = (0, 1),
    ) -> Iterator[Batch]:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        mine = part_of(batch_size, share)
        batches = order.batch(batch_size, drop_remainder=drop_remainder)[start:]
        ahead = _AHEAD_BYTES // (batch_size * self.example_bytes)
        ahead = max(1, min(_AHEAD, ahead))
        options = grain.ReadOptions(min(_THREADS, ahead), prefetch_buffer_size=ahead)
        decoded = batches.map(lambda rows: self._rows.take(rows[mine]))
        return iter(decoded.to_iter_dataset(options))


def resident(rows: Rows) -> ResidentSplit:
    """Decode all rows, in parallel, into memory.

    **Raises:**

    `InputError` for the first row that does not hold an image of the right size.
    """
    images = np.empty((len(rows), *rows.image_shape), np.uint8)
    labels = np.empty(len(rows), np.int32)
    filled = 0
    for chunk, of_chunk in StreamedSplit(rows).ordered(_RESIDENT_CHUNK):
        part = slice(filled, filled + len(chunk))
        images[part], labels[part] = chunk, of_chunk
        filled += len(chunk)
    return ResidentSplit(images, labels)
