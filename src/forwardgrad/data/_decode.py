"""From a table's rows to pixels and labels."""

import io
import math
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import grain
import numpy as np
import PIL.ExifTags
import PIL.Image
from jaxtyping import Int, Int32, Int64, UInt8
from PIL.Image import Image

from forwardgrad._errors import InputError
from forwardgrad.data._access import Table, no_rows

Mode = Literal["L", "RGB"]

_GREY_MODES = ("1", "L", "LA", "La")
# Rows, spread over the split, that decide whether its images have colours and one size.
_PROBES = 64
# How much larger than needed a JPEG is decoded before it is resized, at least. With 2, photographs
# differ by less than one of 255 levels (root mean square) from those decoded whole.
_GAP = 2
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_LABEL_NAMES = ("label", "labels")


@dataclass(frozen=True)
class Labels:
    """The labels of a split, if they are at hand, and the names of the classes, if there are any.

    Of a table that is streamed, labels come with the images, and classes have names.
    """

    column: str
    values: Int64[np.ndarray, " examples"] | None
    classes: tuple[str, ...] | None


@dataclass(frozen=True, eq=False)
class Rows:
    """Random access to the decoded images and the labels of one split.

    **Arguments:**

    - `table`: where the undecoded images are.
    - `column`: the name of the images' column.
    - `labels`: the class of each row.
    - `classes`: how many there are.
    - `mode`: what every image is converted to, grey (`"L"`) or colour (`"RGB"`).
    - `size`: height and width of every image.
    - `resize`: whether those of other sizes are cropped to a square and resized, or refused.
    """

    table: Table
    column: str
    labels: Labels
    classes: int
    mode: Mode
    size: tuple[int, int]
    resize: bool

    def __len__(self) -> int:
        return len(self.table)

    @property
    def example_bytes(self) -> int:
        """The bytes of a decoded image."""
        return math.prod(self.image_shape)

    def shuffled(self, seed: int) -> grain.MapDataset[int]:
        """All rows in random order."""
        return self.table.shuffled(seed)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return (*self.size, len(self.mode))

    def take(
        self, rows: Int[np.ndarray, " batch"]
    ) -> tuple[UInt8[np.ndarray, "batch height width channels"], Int32[np.ndarray, " batch"]]:
        """Decode these rows.

        **Raises:**

        `InputError` for the first row that does not hold an image of the right size or, in a
        stream, a label.
        """
        images = np.empty((len(rows), *self.image_shape), np.uint8)
        cells = self.table.cells(rows.tolist())
        for image, row, cell in zip(images, rows, cells[self.column], strict=True):
            image[...] = self._pixels(int(row), cell)
        if self.labels.values is None:
            labels = np.array([-1 if k is None else k for k in cells[self.labels.column]])
            _check_range(self.table, rows, labels, self.classes)
        else:
            labels = self.labels.values[rows]
        return images, labels.astype(np.int32)

    def _pixels(self, row: int, cell: Any) -> UInt8[np.ndarray, "height width channels"]:
        height, width = self.size
        image, extent = _decoded(self.table, row, cell, height if self.resize else None)
        turn = _turn(image)
        image.info.pop("transparency", None)  # dropped anyway, and Pillow would warn
        if image.mode != self.mode:
            try:
                image = image.convert(self.mode)
            except ValueError as error:
                raise InputError(f"row {row} of {self.table.where}: {error}") from error
        if self.resize:
            image = _square(image, extent, height)
        if turn is not None:
            image = image.transpose(turn)
        if (image.height, image.width) != self.size:
            raise InputError(
                f"images must have one size (height x width): row {row} of {self.table.where} is "
                f"{image.height}x{image.width}, row 0 is {height}x{width}; --image-size or "
                "image_size= crops and resizes them"
            )
        return np.asarray(image).reshape(self.image_shape)


def train_and_test(
    train: Table,
    test: Table,
    label_column: str | None = None,
    image_size: int | None = None,
    usual_size: int | None = None,
) -> tuple[Rows, Rows, tuple[str, ...]]:
    """Rows of both splits, with the same kind of images and the same classes.

    **Arguments:**

    - `train`, `test`: the tables.
    - `label_column`: the column of the labels, where it is not to be found.
    - `image_size`: height and width that all images are cropped and resized to.
    - `usual_size`: the same, if some training images differ in size.

    **Returns:**

    The rows of train and of test, and the names of the classes.

    **Raises:**

    `InputError` if a split has no column of images or none of labels, if a label is outside the
    classes, or if the splits differ in their classes, in size or in having colours.
    """
    for table in (train, test):
        if not len(table):
            raise no_rows(table.where)
    train_labels = _labels(train, label_column)
    test_labels = _labels(test, label_column, train_labels.classes)
    classes = _classes(train, train_labels, test_labels)
    for table, labels in ((train, train_labels), (test, test_labels)):
        if labels.values is not None:
            _check_range(table, np.arange(len(table)), labels.values, len(classes))
    train_rows = _rows(train, train_labels, len(classes), "L", image_size, usual_size)
    size = train_rows.size[0] if train_rows.resize else None
    test_rows = _rows(test, test_labels, len(classes), train_rows.mode, size)
    if train_rows.image_shape != test_rows.image_shape:
        raise InputError(
            "train and test must hold images of the same shape (height, width, channels), got "
            f"{train_rows.image_shape} in {train.where} and {test_rows.image_shape} in {test.where}"
            + ("; --image-size or image_size= gives them one" * (train_rows.size != test_rows.size))
        )
    return train_rows, test_rows, classes


def _rows(
    table: Table,
    labels: Labels,
    classes: int,
    mode: Mode,
    image_size: int | None,
    usual_size: int | None = None,
) -> Rows:
    """Rows in `mode`, or in colour if some image has colours.

    They have `image_size`; without it, the size of row 0 or, if some differ, `usual_size`.
    """
    column = _image_column(table)
    raw = table.select(column, labels.column) if labels.values is None else table.select(column)
    probes = raw.spread(_PROBES).tolist()
    cells = raw.cells(probes)[column]
    images = [_decoded(raw, row, cell)[0] for row, cell in zip(probes, cells, strict=True)]
    if any(image.mode not in _GREY_MODES for image in images):
        mode = "RGB"
    sizes = [_upright_size(image) for image in images]
    square = image_size or (usual_size if len({*sizes}) > 1 else None)
    size = (square, square) if square else sizes[0]
    return Rows(raw, column, labels, classes, mode, size, resize=bool(square))


def _decoded(
    table: Table, row: int, cell: Any, side: int | None = None
) -> tuple[Image, tuple[float, float]]:
    """The image in a cell `{bytes, path}`, in its own mode, with its width and height.

    With `side`, a JPEG of more than twice that size is decoded at a half, a quarter or an eighth of
    its size, which is cheaper. The width and height are then fractions of the last pixels short.
    """
    content, path = (cell.get("bytes"), cell.get("path")) if cell else (None, None)
    source = path if content is None else io.BytesIO(content)
    if source is None:
        raise InputError(f"row {row} of {table.where} holds no image")
    try:
        image = PIL.Image.open(source)
        drafted = None if side is None else image.draft(None, (_GAP * side, _GAP * side))
        image.load()
    except Exception as error:  # every image format raises its own classes
        raise InputError(
            f"row {row} of {table.where} cannot be decoded as an image: "
            f"{str(error) or type(error).__name__}"
        ) from error
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"row {row} of {table.where} has pixels of more than 8 bits (mode {image.mode!r}); "
            "expected an 8-bit grey or colour image"
        )
    return image, image.size if drafted is None else drafted[1][2:]


def _square(image: Image, extent: tuple[float, float], side: int) -> Image:
    """The square in the middle, as long as the shorter side, resized to `side`."""
    least = min(extent)
    left, top = ((length - least) / 2 for length in extent)
    box = (left, top, left + least, top + least)
    return image.resize((side, side), PIL.Image.Resampling.BILINEAR, box)


def _turn(image: Image) -> PIL.Image.Transpose | None:
    """What makes the image upright, as the camera has noted it down."""
    try:
        return _TURNS.get(image.getexif().get(PIL.ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data are common, and no reason to do without the image
        return None


def _upright_size(image: Image) -> tuple[int, int]:
    turn = _turn(image)
    upright = image if turn is None else image.transpose(turn)
    return upright.height, upright.width


def _image_column(table: Table) -> str:
    """The name of the first column of images."""
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image) or _is_bare_image(feature):
            return name
    raise InputError(f"{table.where} has no column of images (it has {_columns(table)})")


def _is_bare_image(feature: Any) -> bool:
    """Whether it is what a parquet file without Hugging Face's metadata has for an image."""
    content = feature.get("bytes") if isinstance(feature, dict) else None
    return isinstance(content, datasets.Value) and content.dtype in ("binary", "large_binary")


def _labels(table: Table, column: str | None, names: tuple[str, ...] | None = None) -> Labels:
    """The labels of a table, in a column of classes, of integers, or of names.

    `names` are the classes of the training split, for a column of names.
    """
    column = column or _label_column(table)
    feature = table.features.get(column)
    named = isinstance(feature, datasets.ClassLabel)
    if not (named or _is_text(feature) or _is_integer(feature)):
        raise InputError(
            f"column {column!r} of {table.where} does not hold labels: expected integers, names or "
            f"classes (it has {_columns(table)})"
        )
    cells = table.column(column)
    if cells is None:
        if not named:
            raise InputError(
                f"column {column!r} of {table.where} must be of classes that have names for a "
                f"stream to begin with the first of them (it has {_columns(table)}): write it as "
                "ClassLabel, or leave out --stream"
            )
        return Labels(column, None, tuple(feature.names))
    if _is_text(feature):
        texts = cells.to_pylist()
        classes = names or tuple(sorted({*texts} - {None}))
        place = {name: i for i, name in enumerate(classes)}
        return Labels(column, np.array([place.get(text, -1) for text in texts], np.int64), classes)
    # A missing label counts as -1, which marks unlabelled data on the hub.
    values = cells.cast("int64", safe=False).fill_null(-1).to_numpy()
    return Labels(column, values, tuple(feature.names) if named else None)


def _label_column(table: Table) -> str:
    """`label` or `labels`, else the first column of classes, else the only one of integers."""
    features = table.features
    classes = [name for name, f in features.items() if isinstance(f, datasets.ClassLabel)]
    named = [name for name in _LABEL_NAMES if name in (classes or features)]
    integers = [name for name, f in features.items() if _is_integer(f)]
    if named or classes:
        return (named or classes)[0]
    if len(integers) == 1:
        return integers[0]
    problem = "more than one column that could be" if integers else "no column of"
    raise InputError(
        f"{table.where} has {problem} labels; --label-column or label_column= names one "
        f"(it has {_columns(table)})"
    )


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))


def _columns(table: Table) -> str:
    kinds = {n: getattr(f, "dtype", type(f).__name__) for n, f in table.features.items()}
    return ", ".join(f"{name!r}: {kind}" for name, kind in kinds.items())


def _classes(table: Table, train: Labels, test: Labels) -> tuple[str, ...]:
    """The names of the classes; plain integer labels are their own names."""
    if train.classes and test.classes and train.classes != test.classes:
        raise InputError(
            f"train and test must have the same classes, got {_listed(train.classes)} and "
            f"{_listed(test.classes)}"
        )
    if train.classes or test.classes or train.values is None:
        return train.classes or test.classes or ()
    present = np.unique(train.values[train.values >= 0])
    gaps = np.flatnonzero(present != np.arange(len(present)))
    if gaps.size:
        raise InputError(
            f"labels of {table.where} must be 0, 1, 2, ... without gaps: "
            f"{present[gaps[0]]} occurs, {gaps[0]} does not"
        )
    return tuple(str(label) for label in present)


def _listed(classes: tuple[str, ...]) -> str:
    shown = ", ".join(repr(name) for name in classes[:3])
    return f"{len(classes)} ({shown}{', ...' if len(classes) > 3 else ''})"


def _check_range(
    table: Table, rows: Int[np.ndarray, " rows"], labels: Int[np.ndarray, " rows"], classes: int
) -> None:
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        row, label = rows[outside[0]], labels[outside[0]]
        raise InputError(
            f"row {row} of {table.where} has label {label}, outside the {classes} classes from 0"
            + (" (-1 marks unlabelled data)" if label == -1 else "")
        )
