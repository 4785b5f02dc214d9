"""Small data sets on disk, sound and unsound, for the tests of `forwardgrad.data`."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

CLASSES = ("cat", "dog", "eel")

REAL = Path(os.environ.get("FORWARDGRAD_DATA") or Path(__file__).parents[2] / "shared" / "data")


def real_folder() -> Path:
    """The folder of real data sets; a test that needs them is skipped where there is none."""
    if not REAL.is_dir():
        pytest.skip(f"no real data: folder {REAL} is not there (set FORWARDGRAD_DATA)")
    return REAL


def pixels(count: int, *, size: tuple[int, int] = (6, 5), channels: int = 1, seed: int = 0):
    """Random images; no two of them are alike."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, *size, channels), dtype=np.uint8)


def encode(image: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, form)
    return buffer.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[np.ndarray | bytes | None],
    labels: Sequence[int | None],
    *,
    classes: Sequence[str] | None = CLASSES,
    metadata: bool = True,
    columns: tuple[str, str] = ("image", "label"),
) -> Path:
    """A parquet file in the hub's schema; `metadata=False` leaves out Hugging Face's part."""
    cells = [
        None
        if image is None
        else {"bytes": image if isinstance(image, bytes) else encode(image), "path": None}
        for image in images
    ]
    feature = datasets.Value("int64") if classes is None else datasets.ClassLabel(names=[*classes])
    features = datasets.Features({columns[0]: datasets.Image(), columns[1]: feature})
    schema = features.arrow_schema if metadata else features.arrow_schema.remove_metadata()
    return write_columns(path, {columns[0]: cells, columns[1]: [*labels]}, schema)


def write_columns(path: Path, columns: dict[str, Any], schema: pa.Schema | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=16)
    return path


def write_pair(folder: Path, *, train: int = 12, test: int = 6, channels: int = 1) -> Path:
    """A sound data set of `train` and `test` images in three classes."""
    for seed, (split, count) in enumerate((("train", train), ("test", test))):
        images = pixels(count, channels=channels, seed=seed)
        write_parquet(folder / f"{split}.parquet", list(images), [i % 3 for i in range(count)])
    return folder


def write_images(folder: Path, images: np.ndarray, classes: Sequence[str] = CLASSES) -> Path:
    """An image folder: one folder for each class, the images dealt out in turn."""
    for i, image in enumerate(images):
        path = folder / classes[i % len(classes)] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image))
    return folder
