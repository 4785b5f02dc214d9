"""What a data set of images is to the rest of the package, and what a split of any is."""

import abc
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Int32, UInt8

from forwardgrad._errors import InputError

# Keeps the division by `std` harmless where a channel is (nearly) constant: one grey level.
_LEAST_STD = 1 / 255
_PART = 1024
_HOLD_OUT_SEED = 0

Batch = (
    tuple[UInt8[np.ndarray, "batch height width channels"], Int32[np.ndarray, " batch"]]
    | tuple[Int32[np.ndarray, "batch tokens"], Int32[np.ndarray, "batch tokens"]]
)
"""Images and their labels; or tokens, and for each the one that comes next."""

Share = tuple[int, int]
"""Which part of every batch is meant, from 0, and how many equal ones it is cut into."""


def part_of(batch_size: int, share: Share) -> slice:
    """The rows of a batch that a share is.

    **Raises:**

    `InputError` if there is no such part, or the batch cannot be cut.

    >>> part_of(64, (1, 4))
    slice(16, 32, None)
    """
    part, parts = share
    if not 0 <= part < parts or batch_size % parts:
        raise InputError(
            f"share must be (i, n) with i from 0 to n - 1 and an n that divides batch_size "
            f"(={batch_size}), got {share}"
        )
    rows = batch_size // parts
    return slice(part * rows, (part + 1) * rows)


class Split(abc.ABC):
    """A part of a data set: so many examples, images with a label or pieces of text.

    It comes in two kinds. A [`forwardgrad.data.ResidentSplit`][] of images, or a
    [`forwardgrad.data.ResidentText`][], holds arrays that fit on the device; a
    [`forwardgrad.data.StreamedSplit`][] makes batches while they are asked for.
    """

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of examples."""

    @abc.abstractmethod
    def take(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        """These examples and their labels."""

    @abc.abstractmethod
    def ordered(self, batch_size: int, *, share: Share = (0, 1)) -> Iterator[Batch]:
        """All examples in the order of the file, for evaluation; the last batch may be short.

        `share` is `(i, n)` for part i of every batch, cut into n equal ones.
        """


@dataclass(frozen=True, eq=False)
class ResidentSplit(Split):
    """A split that is held in memory, decoded.

    **Arguments:**

    - `images`: grey levels or colours, 0 to 255, channels last.
    - `labels`: the class of each image, from 0.
    """

    images: UInt8[np.ndarray, "examples height width channels"]
    labels: Int32[np.ndarray, " examples"]

    def __post_init__(self):
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise InputError(
                "images must be uint8 [examples, height, width, channels], "
                f"got {self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != np.int32:
            raise InputError(
                f"labels must be int32 [{len(self.images)}], one for each image, "
                f"got {self.labels.dtype} {list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        """These images and their labels."""
        return self.images[rows], self.labels[rows]

    def ordered(self, batch_size: int, *, share: Share = (0, 1)) -> Iterator[Batch]:
        """All examples in their order; the last batch may be short."""
        mine = part_of(batch_size, share)
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield self.images[part][mine], self.labels[part][mine]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images of one size, split into train and test.

    **Arguments:**

    - `name`: what it was loaded as.
    - `image_shape`: height, width and channels (1: grey, 3: RGB) of every image.
    - `classes`: the names of the classes; a label is an index into them.
    - `train`, `test`: the two splits.
    - `mean`, `std`: of each channel over the training images scaled to [0, 1] (a sample of
        them, if they are streamed). `std` is at least 1/255, so that it can be divided by.
    - `validation`: training images that were held out, if any were.
    """

    name: str
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: Float[np.ndarray, " channels"]
    std: Float[np.ndarray, " channels"]
    validation: Split | None = None


def held_out(data: Dataset, share: float) -> Dataset:
    """The data set with a share of its training images for validation, always the same ones.

    Mean and standard deviation stay those of all training images.

    **Raises:**

    `InputError` if they are streamed, or none would be left.
    """
    train = data.train
    if not isinstance(train, ResidentSplit):
        raise InputError(f"hold_out must be 0 where images are streamed, got {share}")
    rows = np.random.default_rng(_HOLD_OUT_SEED).permutation(len(train))
    count = round(share * len(train))
    if not 0 < count < len(train):
        raise InputError(f"hold_out (={share}) of {len(train)} training images is {count} of them")
    validation, rest = (ResidentSplit(*train.take(np.sort(r))) for r in np.split(rows, [count]))
    return dataclasses.replace(data, train=rest, validation=validation)


def channel_statistics(
    images: UInt8[np.ndarray, "examples height width channels"],
) -> tuple[Float[np.ndarray, " channels"], Float[np.ndarray, " channels"]]:
    """Mean and standard deviation of each channel over all pixels of images scaled to [0, 1].

    **Returns:**

    Mean and standard deviation, float32, the latter at least 1/255.

    >>> mean, std = channel_statistics(np.full((1, 1, 2, 1), 51, np.uint8))
    >>> print(mean, std)
    [0.2] [0.00392157]
    """
    levels = np.arange(256) / 255
    counts = np.stack([_histogram(images[..., c]) for c in range(images.shape[-1])])
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ levels
    variance = (share * (levels - mean[:, None]) ** 2).sum(axis=1)
    std = np.maximum(np.sqrt(variance), _LEAST_STD)
    return mean.astype(np.float32), std.astype(np.float32)


def _histogram(channel: UInt8[np.ndarray, "examples height width"]) -> np.ndarray:
    """How often each of the 256 levels occurs; in parts, since `bincount` makes int64 copies."""
    parts = (channel[i : i + _PART] for i in range(0, len(channel), _PART))
    return np.sum([np.bincount(part.ravel(), minlength=256) for part in parts], axis=0)
