"""What a network gets to see: feeds of the compiled loop, inputs, and what is tested on."""

import abc
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree, Shaped, UInt8

from forwardgrad._errors import InputError
from forwardgrad.augmentation import AbstractAugmentation, augment
from forwardgrad.data import Dataset, Split, StreamedSplit, Text
from forwardgrad.data._dataset import Share, part_of
from forwardgrad.objectives import two_views, wrong
from forwardgrad.training._config import ImageSettings, TrainConfig
from forwardgrad.training._devices import ONE, Devices


class Feed(eqx.Module):
    """Examples on the devices: those of each batch, or all, and which of these each batch has."""

    examples: Shaped[Array, "*shape"]
    labels: Int[Array, "*labels"]
    order: Int[Array, "steps batch"] | None = None

    def batch(self, i: Int[Array, ""] | int) -> tuple[Array, Array]:
        """The examples and labels of a batch."""
        chosen = i if self.order is None else self.order[i]
        return self.examples[chosen], self.labels[chosen]


class AbstractInputs(eqx.Module):
    """From a batch as it is stored to a batch as a network gets it."""

    views: eqx.AbstractVar[int]
    """How many of each example a step sees."""

    @abc.abstractmethod
    def training(self, examples: Array, labels: Array, key: Key[Array, ""]) -> tuple[Array, Array]:
        """The examples, and the labels, of a step."""

    @abc.abstractmethod
    def plain(self, examples: Array) -> Array:
        """Examples as they are."""


class TextInputs(AbstractInputs):
    """Tokens, as they are stored."""

    views: int = eqx.field(static=True, default=1)

    def training(
        self, examples: Int[Array, "batch tokens"], labels: Array, key: Key[Array, ""]
    ) -> tuple[Int[Array, "batch tokens"], Array]:
        """The tokens and the ones that follow."""
        del key
        return examples, labels

    def plain(self, examples: Int[Array, "batch tokens"]) -> Int[Array, "batch tokens"]:
        """The tokens."""
        return examples


class Inputs(AbstractInputs):
    """Images: augmented and normalised.

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
        examples: UInt8[Array, "batch height width channels"],
        labels: Int[Array, " batch"],
        key: Key[Array, ""],
    ) -> tuple[Float[Array, "examples height width channels"], Int[Array, " examples"]]:
        """Augmented images, and labels, of a step."""
        pixels = _to_unit(examples)
        keys = jax.random.split(key, self.views)
        views = [augment(self.augmentation, pixels, k) for k in keys]
        if self.views == 1:
            return self._normalised(views[0]), labels
        return self._normalised(two_views(*views)), two_views(labels, labels)

    def plain(
        self, examples: UInt8[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Images as they are."""
        return self._normalised(_to_unit(examples))

    def _normalised(self, pixels: Array) -> Array:
        return (pixels - self.shift) / self.scale


def _to_unit(images: Array) -> Array:
    return images.astype(jnp.float32) / 255


def make_inputs(config: TrainConfig, data: Dataset | Text) -> AbstractInputs:
    """What the settings make of a data set's images, or of a text."""
    if isinstance(data, Text):
        return TextInputs()
    settings, channels = config.data, data.image_shape[2]
    assert isinstance(settings, ImageSettings)
    return Inputs(
        augmentation=settings.augmentation.build(),
        views=2 if config.task == "contrastive" else 1,
        shift=jnp.asarray(data.mean) if settings.normalise else jnp.zeros(channels),
        scale=jnp.asarray(data.std) if settings.normalise else jnp.ones(channels),
    )


STACK = 32
"""Batches of a streamed set that go to the device at once, at most."""

STACK_BYTES = 2**24
"""Bytes of these batches, at most, unless one alone has more."""


Feeds = Callable[[int, int], Iterator[tuple[Feed, int, int]]]
"""`feeds(epoch, start)`: for the steps of an epoch from `start` on, with the range in each."""


def _resident(split: Split, batch_size: int, key: Key[Array, ""], devices: Devices) -> Feeds:
    """All examples on every device, in one feed; only their order changes."""
    examples, labels = devices.whole(tuple(map(jnp.asarray, next(split.ordered(len(split))))))
    steps = len(split) // batch_size

    @jax.jit
    def order(epoch):
        shuffled = jax.random.permutation(jax.random.fold_in(key, epoch), len(split))
        return devices.keep_cut(shuffled[: steps * batch_size].reshape(steps, batch_size), axis=1)

    def feeds(epoch: int, start: int) -> Iterator[tuple[Feed, int, int]]:
        yield Feed(examples, labels, order(epoch)), start, steps

    return feeds


def _streamed(split: StreamedSplit, batch_size: int, seed: int, devices: Devices) -> Feeds:
    """Stacks of batches, decoded ahead of the devices' work, by each process for its own."""
    possible = STACK_BYTES // (batch_size * split.example_bytes)
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
    if isinstance(split, StreamedSplit):
        return _streamed(split, batch_size, seed, devices)
    return _resident(split, batch_size, key, devices)


BATCH = 500
"""Examples that are evaluated at once, at most."""

MOST_OUTPUTS = 2**24
"""Logits that are computed at once, at most."""


Predict = Callable[[PyTree, Array], Array]
"""`(params, examples) -> logits`, of examples as they are stored."""


class Evaluation(NamedTuple):
    """How well predictions are, on average: the per cent that are wrong, the cross-entropy."""

    error: float
    loss: float


def make_evaluation(
    predict: Predict,
    split: Split,
    limit: int | None = None,
    batch: int = BATCH,
    *,
    devices: Devices = ONE,
) -> Callable[[PyTree], Evaluation]:
    """A function of the parameters: how well predictions are on a split.

    `limit` stops after so many examples.
    """
    size = -(-batch // devices.count) * devices.count
    total = len(split) if limit is None else min(limit, len(split))

    @jax.jit
    def add(totals, params, examples, labels):
        logits, there = predict(params, examples), labels >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        # What fills up a batch has a label that is always wrong.
        mistakes = wrong(logits, labels) - jnp.sum(~there)
        loss = jnp.sum(jnp.where(there, losses, 0))
        return devices.keep_whole((totals[0] + mistakes, totals[1] + loss))

    def evaluate(params: PyTree) -> Evaluation:
        totals, count = (np.int32(0), np.float32(0)), 0
        for examples, labels, _ in batches(split, limit, size, devices.share):
            totals = add(totals, params, *devices.cut((examples, labels)))
            count = total * math.prod(labels.shape[1:])
        return Evaluation(100.0 * int(totals[0]) / count, float(totals[1]) / count)

    return evaluate


def batches(
    split: Split, limit: int | None = None, size: int = BATCH, share: Share = (0, 1)
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """A share of batches in the split's order, and how many of each share only fill it up.

    A short batch is filled up with zeros, so that one program serves all. These have the label -1,
    and so do examples after the first `limit`.
    """

    def filled(array, missing, value):
        return np.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)], constant_values=value)

    count = len(split) if limit is None else min(limit, len(split))
    mine = part_of(size, share)
    parts = itertools.islice(split.ordered(size, share=share), -(-count // size))
    for number, (examples, labels) in enumerate(parts):
        missing = mine.stop - mine.start - len(labels)
        labels = filled(labels, missing, -1)
        there = max(0, count - number * size - mine.start)
        labels[there:] = -1
        yield filled(examples, missing, 0), labels, max(0, len(labels) - there)
