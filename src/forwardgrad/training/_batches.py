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
from forwardgrad.objectives import two_views, wrong
from forwardgrad.training._config import TrainConfig


class Feed(eqx.Module):
    """Examples on the device, and which of them make up each batch."""

    images: UInt8[Array, "examples height width channels"]
    labels: Int[Array, " examples"]
    order: Int[Array, "steps batch"]


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


def _resident(split: ResidentSplit, batch_size: int, key: Key[Array, ""]) -> Feeds:
    """All examples on the device, in one feed; only their order changes."""
    images, labels = jnp.asarray(split.images), jnp.asarray(split.labels)
    steps = len(split) // batch_size

    @jax.jit
    def order(epoch):
        shuffled = jax.random.permutation(jax.random.fold_in(key, epoch), len(split))
        return shuffled[: steps * batch_size].reshape(steps, batch_size)

    def feeds(epoch: int, start: int) -> Iterator[tuple[Feed, int, int]]:
        yield Feed(images, labels, order(epoch)), start, steps

    return feeds


def _streamed(split: StreamedSplit, batch_size: int, seed: int) -> Feeds:
    """Stacks of batches, decoded ahead of the device's work."""
    possible = STACK_BYTES // (batch_size * math.prod(split.image_shape))
    size = max(1, min(STACK, possible))

    def feeds(epoch: int, start: int) -> Iterator[tuple[Feed, int, int]]:
        batches = split.batches(
            batch_size, seed=seed, epoch=epoch, start=start, drop_remainder=True
        )
        while stack := list(itertools.islice(batches, size)):
            # A short stack is filled up, so that one compiled loop serves all.
            full = [*stack, *[stack[-1]] * (size - len(stack))]
            images, labels = (np.concatenate(part) for part in zip(*full, strict=True))
            order = np.arange(len(images)).reshape(size, batch_size)
            feed = Feed(jnp.asarray(images), jnp.asarray(labels), jnp.asarray(order, jnp.int32))
            yield feed, 0, len(stack)

    return feeds


def make_feeds(split: Split, batch_size: int, key: Key[Array, ""], seed: int) -> Feeds:
    """The feeds of a split.

    **Raises:**

    `InputError` if it has fewer examples than a batch.
    """
    if len(split) < batch_size:
        raise InputError(
            f"batch_size (={batch_size}) is larger than the training set of {len(split)} examples"
        )
    if isinstance(split, ResidentSplit):
        return _resident(split, batch_size, key)
    assert isinstance(split, StreamedSplit)
    return _streamed(split, batch_size, seed)


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
    count = len(split) if limit is None else min(limit, len(split))
    for images, labels in itertools.islice(split.ordered(BATCH), -(-count // BATCH)):
        missing = BATCH - len(labels)
        images = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])
        yield images, np.pad(labels, (0, missing), constant_values=-1), missing
