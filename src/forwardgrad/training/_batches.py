"""What a network gets to see: feeds of the compiled loop, inputs, and what is tested on."""

import itertools
import math
from collections.abc import Callable, Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from forwardgrad._errors import InputError
from forwardgrad.augmentation import AbstractAugmentation, augment
from forwardgrad.data import Dataset, ResidentSplit, Split, StreamedSplit
from forwardgrad.data._dataset import Share, part_of
from forwardgrad.objectives import two_views, wrong
from forwardgrad.training._config import TrainConfig
from forwardgrad.training._devices import ONE, Devices


class Feed(eqx.Module):
    """Examples on the devices: those of each batch, or all, and which of these each batch has."""

    images: UInt8[Array, "*steps examples height width channels"]
    labels: Int[Array, "*steps examples"]
    order: Int[Array, "steps batch"] | None = None

    def batch(self, i: Int[Array, ""] | int) -> tuple[Array, Array]:
        """The images and labels of a batch."""
        chosen = i if self.order is None else self.order[i]
        return self.images[chosen], self.labels[chosen]


class Inputs(eqx.Module):
    """From a batch as it is stored to a batch as a network gets it.

    **Arguments:**

    - `augmentation`: random changes of the training images.
    - `views`: how many of each image a step sees: 1, or 2 one after the other.
    - `shift`, `scale`: subtracted from the pixels in [0, 1], and what the rest is divided by.
    """

    augmentation: AbstractAugmentation
    views: int = eqx.field(static=True)
    shift: Float[Array, " channels"]
    scale: Float[Array, " channels"]

    def training(
        self,
        images: UInt8[Array, "batch height width channels"],
        labels: Int[Array, " batch"],
        key: Key[Array, ""],
    ) -> tuple[Float[Array, "examples height width channels"], Int[Array, " examples"]]:
        """Augmented images, and labels, of a step."""
        pixels = _to_unit(images)
        keys = jax.random.split(key, self.views)
        views = [augment(self.augmentation, pixels, k) for k in keys]
        if self.views == 1:
            return self._normalised(views[0]), labels
        return self._normalised(two_views(*views)), two_views(labels, labels)

    def plain(
        self, images: UInt8[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Images as they are."""
        return self._normalised(_to_unit(images))

    def _normalised(self, pixels: Array) -> Array:
        return (pixels - self.shift) / self.scale


def _to_unit(images: Array) -> Array:
    return images.astype(jnp.float32) / 255


def make_inputs(config: TrainConfig, data: Dataset) -> Inputs:
    """What the settings make of a data set's images."""
    channels = data.image_shape[2]
    return Inputs(
        augmentation=config.augmentation.build(),
        views=2 if config.task == "contrastive" else 1,
        shift=jnp.asarray(data.mean) if config.normalise else jnp.zeros(channels),
        scale=jnp.asarray(data.std) if config.normalise else jnp.ones(channels),
    )


STACK = 32
"""Batches of a streamed set that go to the device at once, at most."""

STACK_BYTES = 2**24
"""Bytes of these batches, at most, unless one alone has more."""


Feeds = Callable[[int, int], Iterator[tuple[Feed, int, int]]]
"""`feeds(epoch, start)`: for the steps of an epoch from `start` on, with the range in each."""


def _resident(
    split: ResidentSplit, batch_size: int, key: Key[Array, ""], devices: Devices
) -> Feeds:
    """All examples on every device, in one feed; only their order changes."""
    images, labels = devices.whole((jnp.asarray(split.images), jnp.asarray(split.labels)))
    steps = len(split) // batch_size

    @jax.jit
    def order(epoch):
        shuffled = jax.random.permutation(jax.random.fold_in(key, epoch), len(split))
        return devices.keep_cut(shuffled[: steps * batch_size].reshape(steps, batch_size), axis=1)

    def feeds(epoch: int, start: int) -> Iterator[tuple[Feed, int, int]]:
        yield Feed(images, labels, order(epoch)), start, steps

    return feeds


def _streamed(split: StreamedSplit, batch_size: int, seed: int, devices: Devices) -> Feeds:
    """Stacks of batches, decoded ahead of the devices' work, by each process for its own."""
    possible = STACK_BYTES // (batch_size * math.prod(split.image_shape))
    size = max(1, min(STACK, possible))

    def feeds(epoch: int, start: int) -> Iterator[tuple[Feed, int, int]]:
        batches = split.batches(
            batch_size,
            seed=seed,
            epoch=epoch,
            start=start,
            drop_remainder=True,
            share=devices.share,
        )
        while stack := list(itertools.islice(batches, size)):
            # A short stack is filled up, so that one compiled loop serves all.
            full = [*stack, *[stack[-1]] * (size - len(stack))]
            parts = (np.stack(part) for part in zip(*full, strict=True))
            yield Feed(*devices.cut(tuple(parts), axis=1)), 0, len(stack)

    return feeds


def make_feeds(
    split: Split, batch_size: int, key: Key[Array, ""], seed: int, devices: Devices = ONE
) -> Feeds:
    """The feeds of a split.

    **Raises:**

    `InputError` if it has fewer examples than a batch.
    """
    if len(split) < batch_size:
        raise InputError(
            f"batch_size (={batch_size}) is larger than the training set of {len(split)} examples"
        )
    if isinstance(split, ResidentSplit):
        return _resident(split, batch_size, key, devices)
    assert isinstance(split, StreamedSplit)
    return _streamed(split, batch_size, seed, devices)


BATCH = 500


Predict = Callable[[PyTree, Array], Array]
"""`(params, images uint8) -> logits`."""


def make_error(
    predict: Predict, split: Split, limit: int | None = None, *, devices: Devices = ONE
) -> Callable[[PyTree], float]:
    """A function of the parameters: the per cent of wrong predictions on a split.

    `limit` stops after so many examples.
    """
    size = -(-BATCH // devices.count) * devices.count
    total = len(split) if limit is None else min(limit, len(split))

    @jax.jit
    def count(params, images, labels, mistakes):
        return devices.keep_whole(mistakes + wrong(predict(params, images), labels))

    def error(params: PyTree) -> float:
        mistakes, seen = np.int32(0), 0
        for images, labels, _ in batches(split, limit, size, devices.share):
            mistakes = count(params, *devices.cut((images, labels)), mistakes)
            seen += size
        # What fills up a batch has a label that is always wrong.
        return 100.0 * (int(mistakes) - (seen - total)) / total

    return error


def batches(
    split: Split, limit: int | None = None, size: int = BATCH, share: Share = (0, 1)
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """A share of batches in the split's order, and how many of each share only fill it up.

    A short batch is filled up with black images, so that one program serves all. These have the
    label -1, and so do images after the first `limit`.
    """
    count = len(split) if limit is None else min(limit, len(split))
    mine = part_of(size, share)
    parts = itertools.islice(split.ordered(size, share=share), -(-count // size))
    for number, (images, labels) in enumerate(parts):
        missing = mine.stop - mine.start - len(labels)
        images = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])
        labels = np.pad(labels, (0, missing), constant_values=-1)
        labels[max(0, count - number * size - mine.start) :] = -1
        yield images, labels, int(np.sum(labels < 0))
