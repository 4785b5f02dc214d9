"""Data sets by name."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from forwardgrad._errors import InputError, unknown_name
from forwardgrad.data._access import Table
from forwardgrad.data._dataset import Dataset, channel_statistics
from forwardgrad.data._decode import train_and_test
from forwardgrad.data._digits import digits
from forwardgrad.data._stream import StreamedSplit, resident
from forwardgrad.data._tables import from_folder, from_hub

RESIDENT_LIMIT = 2**30
"""Bytes of decoded images, train and test together, up to which a data set is held in memory."""

_LARGEST = 4096

# Images of a streamed split, evenly spread, that are decoded at once: for its mean and standard
# deviation, and to meet images of other sizes before the training does.
_SAMPLE = 1024


@dataclass(frozen=True)
class _Hub:
    """Where the hub has a data set, and the usual size for one whose images have many."""

    repository: str
    test_split: str | None = "test"
    image_size: int | None = None


_HUB = {
    "mnist": _Hub("ylecun/mnist"),
    "cifar10": _Hub("uoft-cs/cifar10"),
    "tiny-imagenet": _Hub("zh-plus/tiny-imagenet", "valid"),
    "imagenet": _Hub("ILSVRC/imagenet-1k", "validation", image_size=224),
}

NAMES: tuple[str, ...] = ("digits", *_HUB)
"""The data sets that have a name of their own."""


def load(
    name: str,
    data_dir: Path | str | None = None,
    *,
    label_column: str | None = None,
    image_size: int | None = None,
    stream: bool = False,
    resident_limit: int = RESIDENT_LIMIT,
) -> Dataset:
    """A data set of labelled images, from a file, a folder or the Hugging Face hub.

    A set whose decoded images need no more than `resident_limit` bytes is decoded at once, into
    [`forwardgrad.data.ResidentSplit`][]s; a larger one becomes
    [`forwardgrad.data.StreamedSplit`][]s, which never hold it whole. Images must have one size,
    or get it with `image_size`; where some have colours, all are converted to RGB. No downloaded
    code is run.

    **Arguments:**

    - `name`: one of `NAMES`; the name of a data set on the Hugging Face hub (`"owner/name"`); or
        a local folder that holds `train.parquet` and `test.parquet` in the hub's schema, or
        folders `train` and `test` with a folder of images for each class, or what was downloaded
        from the hub. Where there is no `test`, it is `validation`. `"digits"` comes with
        scikit-learn and needs no file.
    - `data_dir`: a folder that holds `NAME/train.parquet` and `NAME/test.parquet`. Default: the
        environment variable `FORWARDGRAD_DATA`. With it the hub is never asked.
    - `label_column`: the column of the labels. Default: `label` or `labels`, else the first
        column of classes, else the only column of integers.
    - `image_size`: height and width of the images: of each, training or test, the square in the
        middle that is as long as the shorter side, resized. Default: images stay as they are;
        those of `imagenet`, if they differ in size, become 224 x 224.
    - `stream`: read parquet files in place, here or on the hub, while batches are asked for,
        whatever the size of the data set. Nothing is copied into the cache of data sets. Random
        orders then draw from a window that moves over the files.
    - `resident_limit`: in bytes.

    **Returns:**

    The data set.

    **Raises:**

    `InputError`, with a sentence that says what to do, if the name is unknown, a file is missing,
    empty, truncated or without images and labels, an image cannot be decoded or has another size,
    a label is outside the classes, train and test do not match, or the hub cannot be reached.

    >>> dataset = load("digits")
    >>> len(dataset.train), len(dataset.test), dataset.image_shape, len(dataset.classes)
    (1437, 360, (8, 8, 1), 10)
    """
    folder = data_folder(data_dir)
    if name == "text":
        raise InputError("dataset 'text' holds text; expected images")
    if name == "digits":
        given = {"label_column": label_column, "image_size": image_size, "stream": stream or None}
        for option, value in given.items():
            if value is not None:
                raise InputError(f"{option} (={value!r}) is not for dataset 'digits'")
        return digits()
    if image_size is not None and not 1 <= image_size <= _LARGEST:
        raise InputError(f"image_size must be from 1 to {_LARGEST}, got {image_size}")
    usual_size = _HUB[name].image_size if name in _HUB else None
    tables = _tables(name, folder, stream)
    train, test, classes = train_and_test(*tables, label_column, image_size, usual_size)
    decoded = (len(train) + len(test)) * math.prod(train.image_shape)
    if decoded <= resident_limit and not stream:
        splits = resident(train), resident(test)
        sample = splits[0].images
    else:
        splits = StreamedSplit(train), StreamedSplit(test)
        # Of both, which shows bad rows early.
        sample, _ = (rows.take(rows.table.spread(_SAMPLE))[0] for rows in (train, test))
    return Dataset(name, train.image_shape, classes, *splits, *channel_statistics(sample))


def data_folder(data_dir: Path | str | None) -> Path | None:
    source = "data_dir" if data_dir else "FORWARDGRAD_DATA"
    data_dir = data_dir or os.environ.get("FORWARDGRAD_DATA")
    if not data_dir:
        return None
    folder = Path(os.path.expanduser(data_dir))
    if not folder.is_dir():
        raise InputError(f"{source} {folder} is not a folder; expected one that holds data sets")
    return folder


def _tables(name: str, data_dir: Path | None, stream: bool) -> tuple[Table, Table]:
    """Where `name` is: under `data_dir`, else a local folder, else on the hub."""
    local = Path(os.path.expanduser(name))  # unlike the method, leaves an unknown user be
    on_hub = name in _HUB or (name.count("/") == 1 and not name.startswith((".", "/", "~")))
    entry = _HUB.get(name, _Hub(name, None))
    if data_dir is not None and name and (data_dir / name).is_dir():
        return from_folder(data_dir / name, entry.test_split, stream)
    if name and name not in _HUB and local.is_dir():
        return from_folder(local, None, stream)
    if on_hub and data_dir is not None:
        raise InputError(
            f"dataset {name!r} is not in the data folder {data_dir}: put it there as "
            f"{data_dir / name / 'train.parquet'} and {data_dir / name / 'test.parquet'}"
        )
    if on_hub:
        return from_hub(name, entry.repository, entry.test_split, stream)
    if "/" in name:
        raise InputError(f"dataset {name!r} is not a folder; expected one that holds a data set")
    raise unknown_name("dataset", name, NAMES)
