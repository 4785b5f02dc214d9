import contextlib
import functools
import http.server
import io
import socket
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import datasets
import datasets.config
import fsspec
import huggingface_hub.utils
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image

from data_helpers import (
    CLASSES,
    encode,
    pixels,
    real_folder,
    write_columns,
    write_images,
    write_pair,
    write_parquet,
)
from forwardgrad import InputError, data
from forwardgrad.data import _access, _decode, _stream, _tables
from forwardgrad.data._dataset import held_out


@pytest.fixture(scope="session")
def cache():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, cache):
    monkeypatch.delenv("FORWARDGRAD_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@functools.cache
def real(name: str) -> data.Dataset:
    """A data set of the folder of real ones; loaded once."""
    return data.load(name, real_folder())


def fails(match: str):
    """The next statement must raise an `InputError`, of one line, with these words."""

    @contextlib.contextmanager
    def block():
        with pytest.raises(InputError, match=match) as caught:
            yield
        assert "\n" not in str(caught.value)

    return block()


# Sound data


def test_digits():
    digits = data.load("digits")
    assert isinstance(digits.train, data.ResidentSplit)
    assert digits.image_shape == digits.train.images.shape[1:] == (8, 8, 1)
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.classes == tuple("0123456789")
    assert digits.train.images.max() == 255
    for split in (digits.train, digits.test):
        counts = np.bincount(split.labels)
        assert counts.max() - counts.min() <= 0.05 * len(split)  # stratified
    assert np.array_equal(digits.test.labels, data.load("digits").test.labels)


def test_statistics():
    digits = data.load("digits")
    scaled = digits.train.images / 255
    np.testing.assert_allclose(digits.mean, scaled.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(digits.std, scaled.std((0, 1, 2)), rtol=1e-6)


def test_statistics_of_constant_channel_can_be_divided_by(tmp_path):
    images = pixels(12, channels=3)
    images[..., 1] = 7
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", list(images), [0, 1, 2] * 4)
    dataset = data.load(str(tmp_path))
    assert dataset.std[1] == np.float32(1 / 255)
    assert dataset.mean[1] == np.float32(7 / 255)


@pytest.mark.parametrize("channels", [1, 3])
def test_parquet(tmp_path, channels):
    write_pair(tmp_path, channels=channels)
    dataset = data.load(str(tmp_path))
    assert dataset.image_shape == (6, 5, channels)
    assert dataset.classes == CLASSES
    assert np.array_equal(dataset.train.images, pixels(12, channels=channels))
    assert np.array_equal(dataset.test.images, pixels(6, channels=channels, seed=1))
    assert dataset.train.labels.dtype == np.int32
    assert dataset.train.labels.tolist() == [0, 1, 2] * 4


def test_images_in_folders(tmp_path):
    write_images(tmp_path / "train", pixels(9))
    write_images(tmp_path / "test", pixels(6, seed=1))
    dataset = data.load(str(tmp_path))
    assert dataset.classes == CLASSES
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(dataset.train.images, pixels(9)[[0, 3, 6, 1, 4, 7, 2, 5, 8]])
    assert len(dataset.test) == 6


@pytest.mark.parametrize("layout", ["parquet", "images"])
def test_folder_names_are_not_patterns(tmp_path, layout):
    folder = tmp_path / "a[1]*{b} validation"
    if layout == "parquet":
        write_pair(folder)
    else:
        write_images(folder / "train", pixels(6), ("test", "train"))
        write_images(folder / "test", pixels(6), ("test", "train"))
    assert len(data.load(str(folder)).test) == 6


def test_data_dir(tmp_path, monkeypatch):
    write_pair(tmp_path / "mnist")
    write_pair(tmp_path / "owner" / "name", train=9)
    assert len(data.load("mnist", tmp_path).train) == 12
    assert len(data.load("owner/name", str(tmp_path)).train) == 9
    monkeypatch.setenv("FORWARDGRAD_DATA", str(tmp_path))
    assert len(data.load("mnist").train) == 12
    assert len(data.load("digits").train) == 1437


def test_data_dir_may_be_read_only(tmp_path):
    write_pair(tmp_path / "mnist")
    for path in (*tmp_path.glob("mnist/*"), tmp_path / "mnist"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(tmp_path.rglob("*"))
    assert len(data.load("mnist", tmp_path).train) == 12
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "mnist").chmod(0o755)


def test_local_data_need_no_network(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **_: asked.append(a))
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    data.load(str(write_pair(tmp_path / "files")))
    for split in ("train", "test"):
        write_images(tmp_path / "images" / split, pixels(6))
    data.load(str(tmp_path / "images"))
    data.load("digits")
    assert asked == []
    assert not datasets.config.HF_HUB_OFFLINE


def test_changed_file_is_read_anew(tmp_path):
    write_pair(tmp_path)
    data.load(str(tmp_path))
    write_pair(tmp_path, train=9)
    assert len(data.load(str(tmp_path)).train) == 9


@pytest.mark.parametrize("columns", [("img", "label"), ("picture", "fine"), ("image", "target")])
def test_columns_are_found_by_type(tmp_path, columns):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", pixels(6), [0, 1, 2] * 2, columns=columns)
    assert data.load(str(tmp_path)).train.labels.tolist() == [0, 1, 2] * 2


@pytest.mark.parametrize("metadata", [True, False])
def test_plain_integer_labels(tmp_path, metadata):
    for split in ("train", "test"):
        path = tmp_path / f"{split}.parquet"
        write_parquet(path, pixels(6), [2, 1, 0] * 2, classes=None, metadata=metadata)
    dataset = data.load(str(tmp_path))
    assert dataset.classes == ("0", "1", "2")
    assert np.array_equal(dataset.train.images, pixels(6))
    assert dataset.train.labels.tolist() == [2, 1, 0] * 2


def test_label_column_is_told_from_other_integers(tmp_path):
    cells = [{"bytes": encode(image)} for image in pixels(4)]
    columns = {"id": [7, 8, 9, 10], "image": cells, "label": [1, 0, 1, 0]}
    for split in ("train", "test"):
        write_columns(tmp_path / f"{split}.parquet", columns)
    assert data.load(str(tmp_path)).train.labels.tolist() == [1, 0, 1, 0]


_HUB_COPIES = {
    "shards": [
        "data/train-00000-of-00002",
        "data/train-00001-of-00002",
        "data/test-00000-of-00001",
    ],
    "name": ["mnist/train-00000-of-00001", "mnist/test-00000-of-00001"],
    "converted": ["default/train/0000", "default/test/0000"],
    "folders": ["train/0000", "test/0000"],
    "validation shards": ["data/train-00000-of-00001", "data/validation-00000-of-00001"],
    "validation": ["train", "validation"],
    "val": ["train", "val"],
}


@pytest.mark.parametrize("files", _HUB_COPIES.values(), ids=_HUB_COPIES)
def test_a_copy_of_the_hubs_files(tmp_path, files):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Images\n")
    for i, file in enumerate(files):
        write_parquet(tmp_path / f"{file}.parquet", pixels(3, seed=i), [0, 1, 2])
    dataset = data.load(str(tmp_path))
    assert (len(dataset.train), len(dataset.test)) == (3 * len(files) - 3, 3)
    assert dataset.classes == CLASSES
    assert np.array_equal(dataset.test.images, pixels(3, seed=len(files) - 1))


def test_images_in_folders_with_a_validation_split(tmp_path):
    for split in ("train", "validation"):
        write_images(tmp_path / split, pixels(6))
    assert len(data.load(str(tmp_path)).test) == 6


def test_a_copy_without_a_test_split(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", pixels(3), [0, 1, 2])
    with fails("folder .* has no split 'test', only train"):
        data.load(str(tmp_path))


def test_a_damaged_copy(tmp_path):
    for split in ("train", "test"):
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        write_parquet(path, pixels(3), [0, 1, 2])
    (tmp_path / "README.md").write_text("---\nconfigs: [{config_name: a, data_files: no}]\n---\n")
    with fails("folder .* cannot be loaded: "):
        data.load(str(tmp_path))


SHARDS = ["data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001"]


@pytest.fixture
def shards(tmp_path) -> Path:
    """A copy of the hub's files: 3 rows in each."""
    for i, file in enumerate(SHARDS):
        write_parquet(tmp_path / f"{file}.parquet", pixels(3, seed=i), [0, 1, 2])
    return tmp_path


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("file", SHARDS)
def test_a_shard_that_is_not_sound(shards, file, stream):
    path = shards / f"{file}.parquet"
    content = path.read_bytes()
    write_parquet(path, [], [])
    with fails(f"file {path} has no rows"):
        data.load(str(shards), stream=stream)
    path.write_bytes(content[:-1])
    with fails(f"file {path} is not a complete parquet file"):
        data.load(str(shards), stream=stream)
    path.unlink()
    if "train" in file:
        with fails(f"file {path} is missing, of which .*data/train-0000.-of-00002.parquet speaks"):
            data.load(str(shards), stream=stream)
    path.write_bytes(content)
    assert len(data.load(str(shards), stream=stream).train) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_shards_that_differ(shards, stream):
    path = shards / "data" / "train-00001-of-00002.parquet"
    write_parquet(path, pixels(3), [0, 1, 2], classes=["dog", "cat", "eel"])
    with fails(f"same classes, but those of column 'label' in {path} are not those in .*train-0"):
        data.load(str(shards), stream=stream)
    write_parquet(path, pixels(3), [0, 1, 2], columns=("picture", "label"))
    with fails(rf"same columns, got \['label', 'picture'\] in {path} and \['image', 'label'\] in"):
        data.load(str(shards), stream=stream)


def test_the_column_of_labels_can_be_named(tmp_path):
    cells = [{"bytes": encode(image)} for image in pixels(4)]
    columns = {"image": cells, "one": [1, 0, 1, 0], "two": [0, 1, 2, 0], "caption": [*"abca"]}
    for split in ("train", "test"):
        write_columns(tmp_path / f"{split}.parquet", columns)
    with fails("has more than one column that could be labels; --label-column or label_column="):
        data.load(str(tmp_path))
    assert data.load(str(tmp_path), label_column="two").train.labels.tolist() == [0, 1, 2, 0]
    assert data.load(str(tmp_path), label_column="caption").classes == ("a", "b", "c")
    with fails("column 'three' of .* does not hold labels"):
        data.load(str(tmp_path), label_column="three")
    with fails("label_column .='two'. is not for dataset 'digits'"):
        data.load("digits", label_column="two")


def test_a_column_called_label_comes_first(tmp_path):
    label = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"image": datasets.Image(), "kind": label, "label": label})
    cells = [{"bytes": encode(image), "path": None} for image in pixels(2)]
    for split in ("train", "test"):
        columns = {"image": cells, "kind": [0, 0], "label": [0, 1]}
        write_columns(tmp_path / f"{split}.parquet", columns, features.arrow_schema)
    assert data.load(str(tmp_path)).train.labels.tolist() == [0, 1]
    assert data.load(str(tmp_path), label_column="kind").train.labels.tolist() == [0, 0]


def test_names_as_labels(tmp_path):
    cells = [{"bytes": encode(image)} for image in pixels(4)]
    for split, names in (("train", "bacb"), ("test", "abbb")):
        write_columns(tmp_path / f"{split}.parquet", {"image": cells, "label": [*names]})
    dataset = data.load(str(tmp_path))
    assert dataset.classes == ("a", "b", "c")
    assert dataset.train.labels.tolist() == [1, 0, 2, 1]
    assert dataset.test.labels.tolist() == [0, 1, 1, 1]
    write_columns(tmp_path / "test.parquet", {"image": cells, "label": [*"abdb"]})
    with fails("row 2 of .*test.parquet has label"):
        data.load(str(tmp_path))


def test_no_home_for_the_cache(tmp_path, monkeypatch):
    write_pair(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("~/.cache/huggingface/datasets"))
    with fails("no home folder is known for the cache of data sets: set HOME or HF_HOME"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("limit", [0, data.RESIDENT_LIMIT])
def test_grey_among_coloured_becomes_rgb(tmp_path, limit):
    grey, coloured = pixels(6), pixels(6, channels=3)
    mixed = [image for pair in zip(grey, coloured, strict=True) for image in pair]
    write_parquet(tmp_path / "train.parquet", mixed, [0, 1, 2] * 4)
    write_parquet(tmp_path / "test.parquet", grey, [0, 1, 2] * 2)
    dataset = data.load(str(tmp_path), resident_limit=limit)
    train, test = (everything(split)[0] for split in (dataset.train, dataset.test))
    assert np.array_equal(train[::2], np.repeat(grey, 3, axis=-1))
    assert np.array_equal(train[1::2], coloured)
    assert np.array_equal(test, np.repeat(grey, 3, axis=-1))


def test_modes_without_colours_become_grey(tmp_path):
    grey = pixels(1)[0, ..., 0]
    modes = []
    for mode in ("1", "L", "LA"):
        image = Image.fromarray(grey).convert(mode)
        image.save(tmp_path / "image.png")
        modes.append((tmp_path / "image.png").read_bytes())
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", modes, [0, 1, 2])
    images = data.load(str(tmp_path)).train.images
    assert images.shape == (3, 6, 5, 1)
    assert set(np.unique(images[0])) <= {0, 255}
    assert np.array_equal(images[1], images[2])


def test_palettes_become_rgb(tmp_path):
    colours = [[255, 0, 0], [0, 128, 255]]
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "L")
    image.putpalette(bytes(np.ravel(colours).tolist()))
    image.save(tmp_path / "image.png", transparency=bytes([0, 128]))
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [(tmp_path / "image.png").read_bytes()], [0])
    images = data.load(str(tmp_path)).train.images
    assert images.tolist() == [[colours, colours[::-1]]]


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with fails(r"train.parquet cannot be loaded as parquet through the cache .*file/cache: \S+"):
        data.load(str(write_pair(tmp_path)))


def everything(split: data.Split) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(split, data.ResidentSplit):
        return split.images, split.labels
    assert isinstance(split, data.StreamedSplit)
    return joined(split.ordered(5))


def joined(batches) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images), np.concatenate(labels)


# Images of mixed sizes


def photograph(size: tuple[int, int]) -> Image.Image:
    """A smooth coloured image, of this height and width, that is like none of its turns."""
    y, x = (np.linspace(0, 1, length) for length in size)
    y, x = y[:, None], x[None, :]
    colours = np.stack([x + 0 * y, y**2 + 0 * x, np.sin(7 * x * y) ** 2], axis=-1)
    return Image.fromarray(np.round(255 * colours).astype(np.uint8))


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def write_mixed(folder: Path, images: Sequence[bytes]) -> str:
    for split in ("train", "test"):
        write_parquet(folder / f"{split}.parquet", images, [0] * len(images), classes=["cat"])
    return str(folder)


def test_images_of_mixed_sizes_are_cropped_and_resized(tmp_path):
    sizes = [(8, 8), (16, 32), (48, 24), (4, 10), (2, 50), (64, 8), (1, 1)]
    images = [photograph(size) for size in sizes]
    folder = write_mixed(tmp_path, [saved(image) for image in images])
    found = data.load(folder, image_size=8)
    assert found.image_shape == (8, 8, 3)
    for image, pixels_found in zip(images, everything(found.train)[0], strict=True):
        width, height = (8 * length // min(image.size) for length in image.size)
        left, top = (width - 8) // 2, (height - 8) // 2
        whole = image.resize((width, height), Image.Resampling.BILINEAR)
        expected = np.asarray(whole.crop((left, top, left + 8, top + 8)), int)
        np.testing.assert_allclose(pixels_found.astype(int), expected, atol=1)
    assert np.array_equal(everything(found.train)[0][0], np.asarray(images[0]))  # as it was


def test_resident_and_streamed_images_are_the_same(tmp_path):
    images = [saved(photograph((h, 90 - h)), "JPEG") for h in range(30, 50)]
    folder = write_mixed(tmp_path, images)
    kept, streamed = (data.load(folder, image_size=16, resident_limit=n) for n in (2**30, 0))
    for one, other in ((kept.train, streamed.train), (kept.test, streamed.test)):
        assert np.array_equal(everything(one)[0], everything(other)[0])
    assert np.array_equal(kept.mean, streamed.mean)


@pytest.mark.parametrize("size", [(103, 150), (301, 203), (640, 427)])
def test_large_jpegs_are_decoded_at_a_fraction_of_their_size(tmp_path, size):
    image = photograph(size)
    jpeg, png = saved(image, "JPEG", quality=95), saved(image)
    images = data.load(write_mixed(tmp_path, [jpeg, png]), image_size=16).train.take(np.arange(2))
    small, whole = images[0].astype(int)
    assert _decode._decoded(None, 0, {"bytes": jpeg}, 16)[0].height < size[0]
    assert np.sqrt(np.mean((small - whole) ** 2)) < 2
    assert abs(np.mean(small - whole)) < 0.5  # nothing is shifted


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_images_are_upright(tmp_path, form):
    turns = Image.Transpose
    # How the camera held what is upright: the inverse of what the tag stands for.
    stored = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_90,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_270,
    }
    upright = photograph((101, 147))
    images = [saved(upright)]
    for orientation, turn in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        images.append(saved(upright.transpose(turn), form, exif=exif))
    folder = write_mixed(tmp_path, images)
    for size in (None, 12):
        found = data.load(folder, image_size=size).train.take(np.arange(8))[0].astype(int)
        assert found.shape == (8, *((size, size) if size else (101, 147)), 3)
        assert np.sqrt(np.mean((found - found[0]) ** 2, axis=(1, 2, 3))).max() < 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_is_resized(tmp_path, mode):
    image = photograph((60, 80))
    form = {"CMYK": "JPEG", "YCbCr": "TIFF"}.get(mode, "PNG")
    images = [saved(image.convert(mode), form)]
    found = data.load(write_mixed(tmp_path, images), image_size=8)
    grey = mode in ("1", "L", "LA")
    assert found.image_shape == (8, 8, 1 if grey else 3)
    square = image.convert("L" if grey else "RGB").crop((10, 0, 70, 60))
    expected = np.asarray(square.resize((8, 8), Image.Resampling.BILINEAR)).reshape(8, 8, -1)
    error = everything(found.train)[0][0].astype(int) - expected
    assert np.abs(error).mean() < (30 if mode in ("1", "P") else 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_do_no_harm(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = saved(photograph((20, 30)), "JPEG", exif=exif)
    damaged = jpeg.replace(exif.tobytes()[6:14], b"MM\0*\0\0\xff\xff")
    assert damaged != jpeg
    assert data.load(write_mixed(tmp_path, [damaged])).image_shape == (20, 30, 3)


def test_a_mode_that_does_not_become_grey(tmp_path, monkeypatch):
    monkeypatch.setattr(_decode, "_PROBES", 2)
    grey = saved(Image.new("L", (5, 5)))
    lab = saved(Image.new("LAB", (5, 5)), "TIFF")
    with fails("row 1 of .*train.parquet: conversion from LAB to .* not supported"):
        data.load(write_mixed(tmp_path, [grey, lab, grey]))


def test_imagenet_has_a_usual_size(tmp_path):
    write_mixed(tmp_path / "imagenet", [saved(photograph((30 + i, 40))) for i in range(3)])
    assert data.load("imagenet", tmp_path).image_shape == (224, 224, 3)
    assert data.load("imagenet", tmp_path, image_size=32).image_shape == (32, 32, 3)
    write_mixed(tmp_path / "imagenet", [saved(photograph((20, 20)))] * 3)
    assert data.load("imagenet", tmp_path).image_shape == (20, 20, 3)


@pytest.mark.parametrize("size", [0, -3, 4097])
def test_bad_image_size(tmp_path, size):
    with fails(f"image_size must be from 1 to 4096, got {size}"):
        data.load(str(write_pair(tmp_path)), image_size=size)
    with fails(f"image_size .={size}. is not for dataset 'digits'"):
        data.load("digits", image_size=size)


def test_images_are_held_out(tmp_path):
    found = data.load(str(write_pair(tmp_path, train=30)))
    images = found.train.take(np.arange(30))[0]
    cut = held_out(found, 0.2)
    parts = [split.take(np.arange(len(split)))[0] for split in (cut.train, cut.validation)]
    assert [len(part) for part in parts] == [24, 6]
    assert {image.tobytes() for part in parts for image in part} == {i.tobytes() for i in images}
    assert len(cut.test) == len(found.test)
    np.testing.assert_array_equal(parts[1], held_out(found, 0.2).validation.take(np.arange(6))[0])


@pytest.mark.parametrize(("share", "count"), [(0.01, 0), (0.99, 12)])
def test_too_few_or_all_are_held_out(tmp_path, share, count):
    with fails(rf"hold_out \(={share}\) of 12 training images is {count} of them"):
        held_out(data.load(str(write_pair(tmp_path))), share)


def test_streamed_images_are_not_held_out(tmp_path):
    with fails("hold_out must be 0 where images are streamed, got 0.2"):
        held_out(data.load(str(write_pair(tmp_path)), stream=True), 0.2)


# Streams


@pytest.fixture(params=["cached", "file", "shards", "hub"])
def streamed(tmp_path, monkeypatch, request) -> data.Dataset:
    """50 images, and 7, in four row groups: a stream of each kind."""
    stream = request.param != "cached"
    if request.param in ("cached", "file"):
        folder = write_pair(tmp_path, train=50, test=7)
        return data.load(str(folder), resident_limit=0, stream=stream)
    for shard, part in enumerate((slice(0, 30), slice(30, 50))):
        path = tmp_path / "data" / f"train-0000{shard}-of-00002.parquet"
        write_parquet(path, pixels(50)[part], [i % 3 for i in range(50)][part])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", pixels(7), [0] * 7)
    if request.param == "shards":
        return data.load(str(tmp_path), stream=True)
    return data.load(far_away(tmp_path, monkeypatch), stream=True)


def far_away(folder: Path, monkeypatch) -> str:
    """The name of a data set whose files are in another file system, as those of the hub are."""
    builder = datasets.load_dataset_builder(str(folder))
    memory, files = fsspec.filesystem("memory"), builder.config.data_files
    for paths in files.values():
        for i, path in enumerate(paths):
            paths[i] = f"memory://{path}"
            memory.pipe(paths[i], Path(path).read_bytes())
            Path(path).unlink()
    monkeypatch.setattr(_tables, "_hub_has", lambda _: True)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda _: builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("a copy was made"))
    return "owner/name"


def test_limit_decides_what_is_resident(tmp_path):
    folder = str(write_pair(tmp_path))
    exact = (12 + 6) * 6 * 5
    kept, streamed = (data.load(folder, resident_limit=limit) for limit in (exact, exact - 1))
    assert isinstance(kept.train, data.ResidentSplit)
    assert isinstance(kept.test, data.ResidentSplit)
    assert isinstance(streamed.train, data.StreamedSplit)
    assert isinstance(streamed.test, data.StreamedSplit)
    assert (len(streamed.train), len(streamed.test)) == (12, 6)
    assert np.array_equal(kept.mean, streamed.mean)
    assert np.array_equal(kept.std, streamed.std)


def test_ordered_is_complete(streamed):
    batches = list(streamed.train.ordered(8))
    assert [len(labels) for _, labels in batches] == [8] * 6 + [2]
    images, labels = joined(batches)
    assert np.array_equal(images, pixels(50))
    assert labels.tolist() == [i % 3 for i in range(50)]
    assert labels.dtype == np.int32


def order(split: data.StreamedSplit, **kwargs) -> list[int]:
    """Which rows the batches hold, in their order; images and labels must belong together."""
    rows = {image.tobytes(): row for row, image in enumerate(pixels(50))}
    images, labels = joined(split.batches(8, **kwargs))
    found = [rows[image.tobytes()] for image in images]
    assert labels.tolist() == [row % 3 for row in found]
    return found


def test_an_epoch_has_every_example_once(streamed):
    assert sorted(order(streamed.train, seed=3, epoch=5)) == list(range(50))


def test_order_depends_on_seed_and_epoch_alone(streamed):
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1), (2**40, 10**6)]
    orders = [order(streamed.train, seed=seed, epoch=epoch) for seed, epoch in pairs]
    assert len({tuple(o) for o in [*orders, range(50)]}) == len(pairs) + 1
    again = [order(streamed.train, seed=seed, epoch=epoch) for seed, epoch in pairs]
    assert orders == again


@pytest.mark.parametrize("start", [0, 1, 5, 6])
def test_start_skips_batches(streamed, start):
    whole = order(streamed.train, seed=1, epoch=2)
    assert order(streamed.train, seed=1, epoch=2, start=start) == whole[8 * start :]


def test_start_after_the_end(streamed):
    assert list(streamed.train.batches(8, seed=1, epoch=2, start=7)) == []


def test_start_decodes_nothing_of_what_it_skips(streamed, monkeypatch):
    decoded = []
    original = _decode._decoded
    monkeypatch.setattr(
        _decode, "_decoded", lambda t, row, *rest: decoded.append(row) or original(t, row, *rest)
    )
    rest = order(streamed.train, seed=1, epoch=2, start=5)
    assert sorted(decoded) == sorted(rest)


def test_remainder_can_be_dropped(streamed):
    batches = list(streamed.train.batches(8, seed=0, epoch=0, drop_remainder=True))
    assert [len(labels) for _, labels in batches] == [8] * 6


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("kind", ["batches", "ordered"])
def test_shares_make_up_every_batch(streamed, parts, kind):
    """Of 50 examples: the last batch has two, and some of its shares have none."""

    def batches(batch_size, **share):
        if kind == "ordered":
            return list(streamed.train.ordered(batch_size, **share))
        return list(streamed.train.batches(batch_size, seed=1, epoch=2, **share))

    for whole, *shares in zip(
        batches(8), *(batches(8, share=(i, parts)) for i in range(parts)), strict=True
    ):
        assert all(len(labels) <= 8 // parts for _, labels in shares)
        for array, cut in zip(whole, zip(*shares, strict=True), strict=True):
            assert np.array_equal(array, np.concatenate(cut))


@pytest.mark.parametrize("share", [(0, 3), (2, 2), (-1, 2), (0, 0)])
def test_a_share_that_there_is_not(streamed, share):
    with pytest.raises(InputError, match="share must be"):
        streamed.train.batches(8, seed=0, epoch=0, share=share)


@pytest.mark.parametrize("stream", [False, True])
def test_stream_that_is_left_early_ends_its_threads(tmp_path, stream):
    before = threading.active_count()
    folder = write_pair(tmp_path, train=50, test=7)
    streamed = data.load(str(folder), resident_limit=0, stream=stream)
    batches = streamed.train.batches(4, seed=0, epoch=0)
    next(batches)
    del batches
    if stream:  # reads ahead as long as the data set is there
        del streamed
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"epoch": -2}, "epoch must not be negative, got -2"),
        ({"start": -3}, "start must not be negative, got -3"),
    ],
)
def test_bad_stream_arguments(streamed, arguments, match):
    with fails(match):
        streamed.train.batches(**({"batch_size": 4, "seed": 0, "epoch": 0} | arguments))


def test_later_row_of_another_size_ends_the_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("forwardgrad.data._load._SAMPLE", 3)
    monkeypatch.setattr(_decode, "_PROBES", 3)
    images = [*pixels(20)]
    images[4] = pixels(1, size=(6, 6))[0]
    write_pair(tmp_path)
    write_parquet(tmp_path / "train.parquet", images, [0] * 20)
    train = data.load(str(tmp_path), resident_limit=0).train
    batches = train.ordered(2)
    assert len([next(batches), next(batches)]) == 2
    with fails(r"row 4 of .*train.parquet is 6x6, row 0 is 6x5; --image-size or image_size="):
        list(batches)


@pytest.fixture
def windowed(tmp_path, monkeypatch) -> data.StreamedSplit:
    """A stream of 40 row groups of 16 rows whose window is 4 of them."""
    write_pair(tmp_path, train=640)
    size = _access.read_footers([str(tmp_path / "train.parquet")])
    total = sum(f.row_group(i).total_byte_size for f in size.values() for i in range(40))
    monkeypatch.setattr(_access, "_WINDOW", total // 10)
    train = data.load(str(tmp_path), stream=True).train
    assert isinstance(train, data.StreamedSplit)
    return train


def rows_in_order(split: data.StreamedSplit, **options) -> np.ndarray:
    """Which rows come, without decoding them."""
    order = split._rows.table.shuffled(**options)
    return np.array([order[i] for i in range(len(split))])


def test_a_stream_moves_a_window_over_the_files(windowed):
    groups = rows_in_order(windowed, seed=3) // 16
    assert np.bincount(groups).tolist() == [16] * 40
    first = [np.flatnonzero(groups == g)[0] for g in range(40)]
    last = [np.flatnonzero(groups == g)[-1] for g in range(40)]
    in_use = [sum(a <= i <= b for a, b in zip(first, last, strict=True)) for i in range(640)]
    assert max(in_use) <= 7
    assert np.median(in_use) >= 3
    assert np.corrcoef(first, np.arange(40))[0, 1] ** 2 < 0.2  # groups in random order, too
    assert not np.array_equal(groups, rows_in_order(windowed, seed=4) // 16)


def test_a_stream_reads_every_row_group_once(windowed, monkeypatch):
    read = []
    original = _access._read
    monkeypatch.setattr(_access, "_read", lambda *a: read.append(a[3]) or original(*a))
    table = windowed._rows.table
    table._reading.cache_clear()
    images, _ = joined(windowed.batches(8, seed=5, epoch=0))
    assert len({image.tobytes() for image in images}) == 640
    assert len(read) == len(set(read)) == 40
    read.clear()
    table._reading.cache_clear()
    assert len(joined(windowed.batches(8, seed=5, epoch=0, start=70))[0]) == 80
    assert len(read) <= 12  # of what a resumed epoch skips, nothing is read


def test_a_stream_begins_with_more_than_one_row_group(windowed):
    """Files are often sorted by class."""
    for seed in range(10):
        rows = rows_in_order(windowed, seed=seed)
        assert min(len(set(part // 16)) for part in np.split(rows, 40)) >= 2


def test_a_stream_has_the_same_images_as_a_copy(tmp_path):
    folder = str(write_pair(tmp_path, train=50, test=7))
    copy, stream = data.load(folder), data.load(folder, stream=True)
    assert (copy.classes, copy.image_shape) == (stream.classes, stream.image_shape)
    for one, other in ((copy.train, stream.train), (copy.test, stream.test)):
        for a, b in zip(everything(one), everything(other), strict=True):
            assert np.array_equal(a, b)


def test_a_stream_makes_no_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data.load(str(write_pair(tmp_path / "files")), stream=True)
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_streamed(tmp_path, monkeypatch):
    with fails("stream .=True. is not for dataset 'digits'"):
        data.load("digits", stream=True)
    for split in ("train", "test"):
        write_images(tmp_path / "images" / split, pixels(6))
    with fails("stream is for parquet files, which .*images/train does not have"):
        data.load(str(tmp_path / "images"), stream=True)
    for split in ("train", "test"):
        write_parquet(tmp_path / "plain" / f"{split}.parquet", pixels(3), [0, 1, 2], classes=None)
    with fails("column 'label' of .*train.parquet must be of classes that have names .*ClassLabel"):
        data.load(str(tmp_path / "plain"), stream=True)
    monkeypatch.setattr(_access, "LARGEST_GROUP", 100)
    write_pair(tmp_path / "large")
    with fails(r"row group 0 of .*train.parquet has \d+ bytes, .* leave out --stream"):
        data.load(str(tmp_path / "large"), stream=True)


@pytest.mark.parametrize("label", [-1, None, 3])
def test_label_outside_the_classes_of_a_stream(tmp_path, monkeypatch, label):
    monkeypatch.setattr("forwardgrad.data._load._SAMPLE", 3)
    write_pair(tmp_path)
    write_parquet(tmp_path / "train.parquet", pixels(20), [0, 1, 2, 0, label, *[0] * 15])
    train = data.load(str(tmp_path), stream=True).train
    with fails(f"row 4 of .*train.parquet has label {-1 if label is None else label}, outside"):
        list(train.ordered(3))


def test_a_stream_passes_over_row_groups_without_rows(tmp_path):
    table = pq.read_table(write_pair(tmp_path) / "train.parquet")
    with pq.ParquetWriter(tmp_path / "train.parquet", table.schema) as writer:
        for part in (table[:0], table[:5], table[:0], table[5:], table[:0]):
            writer.write_table(part)
    train = data.load(str(tmp_path), stream=True).train
    assert np.array_equal(everything(train)[0], pixels(12))
    assert len(joined(train.batches(5, seed=0, epoch=0))[1]) == 12


def test_a_stream_whose_file_is_gone(tmp_path):
    train = data.load(str(write_pair(tmp_path, train=50)), stream=True).train
    train._rows.table._reading.cache_clear()
    (tmp_path / "train.parquet").unlink()
    for _ in range(2):
        with fails(r"row group \d of .*train.parquet cannot be read: .*No such file"):
            list(train.ordered(50))


# Bad names and folders


@pytest.mark.parametrize(("name", "near"), [("mnst", "'mnist'"), ("cifar-10", "'cifar10'")])
@pytest.mark.parametrize("with_folder", [True, False])
def test_unknown_name(tmp_path, name, near, with_folder):
    with fails(f"dataset '{name}' is unknown; did you mean {near}.*known: .*tiny-imagenet"):
        data.load(name, tmp_path if with_folder else None)


@pytest.mark.parametrize("name", ["", " ", "no such name"])
def test_names_that_are_no_names(name):
    with fails("dataset '.*' is unknown"):
        data.load(name)


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/where", "~/no-such-folder-here", "~no-such-user/a", "a/b/c"]
)
def test_missing_folder(name):
    with fails(f"dataset '{name}' is not a folder"):
        data.load(name)


def test_missing_data_dir(tmp_path, monkeypatch):
    with fails(r"data_dir .*nowhere is not a folder"):
        data.load("mnist", tmp_path / "nowhere")
    monkeypatch.setenv("FORWARDGRAD_DATA", str(tmp_path / "nowhere"))
    with fails(r"FORWARDGRAD_DATA .*nowhere is not a folder"):
        data.load("mnist")


@pytest.mark.parametrize("name", ["mnist", "imagenet", "owner/name"])
def test_data_dir_without_the_dataset_does_not_ask_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.setattr(_tables, "_hub_has", lambda _: pytest.fail("the hub was asked"))
    with fails(f"not in the data folder .*{name}/train.parquet and .*{name}/test.parquet"):
        data.load(name, tmp_path)


def test_folder_without_a_dataset(tmp_path):
    with fails(r"holds no data set: put train.parquet and test.parquet there"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_split(tmp_path, split):
    write_pair(tmp_path / "files")
    (tmp_path / "files" / f"{split}.parquet").unlink()
    with fails(f"file .*{split}.parquet is missing"):
        data.load(str(tmp_path / "files"))
    write_images(tmp_path / "images" / ("train" if split == "test" else "test"), pixels(6))
    with fails(f"folder .*{split} is missing"):
        data.load(str(tmp_path / "images"))


def test_image_folder_without_images(tmp_path):
    write_images(tmp_path / "train", pixels(6))
    (tmp_path / "test").mkdir()
    with fails("test cannot be loaded as imagefolder .*cache"):
        data.load(str(tmp_path))


def test_image_folder_without_classes(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / split, pixels(6), classes=[""])
    with fails("train has no column of labels"):
        data.load(str(tmp_path))


# Bad files


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("keep", [0, 3, 200, -1])
def test_truncated_parquet(tmp_path, split, keep):
    path = write_pair(tmp_path) / f"{split}.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with fails(f"file .*{split}.parquet is not a complete parquet file"):
        data.load(str(tmp_path))


def test_parquet_with_a_damaged_middle(tmp_path):
    path = write_pair(tmp_path, train=300) / "train.parquet"
    content = bytearray(path.read_bytes())
    content[4:10_000] = bytes(9_996)
    path.write_bytes(content)
    with fails(r"train.parquet cannot be loaded as parquet .*: \S+"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_parquet(tmp_path, split):
    write_pair(tmp_path)
    write_parquet(tmp_path / f"{split}.parquet", [], [])
    with fails(f"{split}.parquet has no rows"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("column", [[1, 2, 3], ["a", "b", "c"], [[[1]], [[2]], [[3]]]])
def test_no_column_of_images(tmp_path, column):
    for split in ("train", "test"):
        columns = {"image": column, "label": [0, 1, 0]}
        write_columns(tmp_path / f"{split}.parquet", columns)
    with fails(r"train.parquet has no column of images \(it has 'image': .*, 'label': int64\)"):
        data.load(str(tmp_path))


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({}, "has no column of labels"),
        ({"label": [0.0, 1.0]}, "column 'label' of .* does not hold labels: .*'label': float64"),
        ({"one": [0, 1], "two": [1, 0]}, "has more than one column that could be labels"),
    ],
)
def test_no_column_of_labels(tmp_path, columns, match):
    cells = [{"bytes": encode(image)} for image in pixels(2)]
    for split in ("train", "test"):
        write_columns(tmp_path / f"{split}.parquet", {"image": cells} | columns)
    with fails(match):
        data.load(str(tmp_path))


_OUTSIDE = [-1, None, -2, 3, 2**40]


@pytest.mark.parametrize(
    ("split", "classes", "label"),
    [
        *(("train", CLASSES, label) for label in _OUTSIDE),
        *(("test", CLASSES, label) for label in _OUTSIDE),
        # Without names, the integers of the training split make the classes.
        *(("train", None, label) for label in (-1, None, -2)),
        *(("test", None, label) for label in _OUTSIDE),
    ],
)
def test_label_outside_the_classes(tmp_path, split, label, classes):
    for part in ("train", "test"):
        labels = [0, 1, 2, 0, 1, 2, label if part == split else 0]
        write_parquet(tmp_path / f"{part}.parquet", pixels(7), labels, classes=classes)
    shown = -1 if label is None else label
    with fails(f"row 6 of .*{split}.parquet has label {shown}, outside the 3 classes"):
        data.load(str(tmp_path))


def test_plain_integer_labels_with_a_gap(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", pixels(3), [0, 1, 3], classes=None)
    with fails("labels of .* must be 0, 1, 2, ... without gaps: 3 occurs, 2 does not"):
        data.load(str(tmp_path))


def test_train_and_test_of_different_classes(tmp_path):
    write_pair(tmp_path)
    write_parquet(tmp_path / "test.parquet", pixels(3), [0, 1, 2], classes=["cat", "eel", "dog"])
    with fails(r"same classes, got 3 \('cat', 'dog', 'eel'\) and 3 \('cat', 'eel', 'dog'\)"):
        data.load(str(tmp_path))
    for split, classes in (("train", "abcd"), ("test", "abc")):
        write_images(tmp_path / "images" / split, pixels(12), classes)
    with fails(r"same classes, got 4 \('a', 'b', 'c', ...\) and 3"):
        data.load(str(tmp_path / "images"))


@pytest.mark.parametrize("other", [{"size": (5, 6)}, {"channels": 3}])
def test_train_and_test_of_different_shapes(tmp_path, other):
    write_pair(tmp_path)
    write_parquet(tmp_path / "test.parquet", pixels(3, **other), [0, 1, 2])
    with fails(r"same shape .*\(6, 5, 1\) in .*train.parquet and \(\d, \d, \d\) in .*test"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("limit", [0, data.RESIDENT_LIMIT])
@pytest.mark.parametrize("split", ["train", "test"])
def test_images_of_mixed_sizes(tmp_path, split, limit):
    images = [*pixels(300)]
    images[150] = images[7] = pixels(1, size=(4, 9))[0]
    write_pair(tmp_path)
    write_parquet(tmp_path / f"{split}.parquet", images, [0] * 300)
    with fails(f"row 7 of .*{split}.parquet is 4x9, row 0 is 6x5"):
        data.load(str(tmp_path), resident_limit=limit)


BROKEN = {
    "no image": b"hello",
    "nothing": b"",
    "truncated PNG": encode(pixels(1, size=(6, 5))[0])[:60],
    "truncated JPEG": encode(pixels(1, size=(6, 5))[0], "JPEG")[:200],
}


@pytest.mark.parametrize("limit", [0, data.RESIDENT_LIMIT])
@pytest.mark.parametrize("row", [0, 5, 99])
@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_undecodable_image(tmp_path, content, row, limit):
    images = [*pixels(100)]
    images[row] = content
    write_pair(tmp_path)
    write_parquet(tmp_path / "train.parquet", images, [0] * 100)
    with fails(f"row {row} of .*train.parquet cannot be decoded as an image: .+"):
        data.load(str(tmp_path), resident_limit=limit)


def test_missing_image(tmp_path):
    write_pair(tmp_path)
    write_parquet(tmp_path / "train.parquet", [*pixels(3), None], [0, 1, 2, 0])
    with fails("row 3 of .*train.parquet holds no image"):
        data.load(str(tmp_path))


def test_deep_image(tmp_path):
    deep = Image.fromarray(np.full((6, 5), 40_000, np.uint16))
    deep.save(tmp_path / "deep.png")
    write_pair(tmp_path)
    images = [*pixels(3), (tmp_path / "deep.png").read_bytes()]
    write_parquet(tmp_path / "test.parquet", images, [0, 1, 2, 0])
    with fails("row 3 of .*test.parquet has pixels of more than 8 bits"):
        data.load(str(tmp_path))


def test_bad_arrays():
    labels = np.zeros(2, np.int32)
    with fails(r"images must be uint8 .* got float64 \[2, 3, 3, 1\]"):
        data.ResidentSplit(np.zeros((2, 3, 3, 1)), labels)
    with fails(r"labels must be int32 \[3\], one for each image, got int32 \[2\]"):
        data.ResidentSplit(np.zeros((3, 3, 3, 1), np.uint8), labels)


# The hub


@pytest.mark.parametrize(("name", "files"), [("mnist", "mnist"), ("owner/name", "owner/name")])
def test_hub_out_of_reach(monkeypatch, name, files):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{port}")
    begin = time.monotonic()
    with fails(f"hub .*{port}.* cannot be reached .*put {files}/train.parquet and {files}/test"):
        data.load(name)
    with fails(f"hub .*{port}.* cannot be reached to stream from; leave out --stream"):
        data.load(name, stream=True)
    assert time.monotonic() - begin < 10
    assert not datasets.config.HF_HUB_OFFLINE


class _NoSuchRepository(http.server.BaseHTTPRequestHandler):
    """A hub that has nothing."""

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_hub_without_the_dataset(monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _NoSuchRepository) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(
            datasets.config, "HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}"
        )
        with fails("dataset 'owner/name' is unknown: the Hugging Face hub has no"):
            data.load("owner/name")
        server.shutdown()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one data set, of the given splits; returns what it was asked for."""
    asked = []
    write_pair(tmp_path)

    def build(*splits: str):
        files = {"train": "train.parquet"} | dict.fromkeys(splits, "test.parquet")
        table = {s: datasets.Dataset.from_parquet(str(tmp_path / files[s])) for s in splits}
        monkeypatch.setattr(_tables, "_hub_has", lambda _: True)
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *a: asked.append(a) or datasets.DatasetDict(table)
        )
        return asked

    return build


@pytest.mark.parametrize(
    ("name", "repository", "test"),
    [
        ("mnist", "ylecun/mnist", "test"),
        ("cifar10", "uoft-cs/cifar10", "test"),
        ("tiny-imagenet", "zh-plus/tiny-imagenet", "valid"),
        ("imagenet", "ILSVRC/imagenet-1k", "validation"),
        ("owner/name", "owner/name", "validation"),
    ],
)
def test_hub(hub, name, repository, test):
    asked = hub("train", test)
    dataset = data.load(name)
    assert asked == [(repository,)]
    assert (dataset.name, len(dataset.train), len(dataset.test)) == (name, 6, 6)


def test_hub_without_a_split(hub):
    hub("train", "extra")
    with fails("dataset 'mnist' on the Hugging Face hub has no split 'test', only train, extra"):
        data.load("mnist")


def test_hub_that_fails_later(monkeypatch):
    def broken(*_):
        raise RuntimeError("outer") from OSError(28, "No space left on device")

    monkeypatch.setattr(_tables, "_hub_has", lambda _: True)
    monkeypatch.setattr(datasets, "load_dataset", broken)
    with fails("dataset 'mnist' .*cannot be loaded: .*No space left on device"):
        data.load("mnist")


def test_hub_out_of_reach_but_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:1")
    write_pair(tmp_path)
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    # What `load_dataset("owner/name")` leaves behind, made of local files.
    builder = Parquet(data_files=files, dataset_name="name", hash="hash")
    with _tables.quiet():
        builder.download_and_prepare()
    made, version = Path(builder.cache_dir), tmp_path / "cache/owner___name/default/0.0.0"
    version.mkdir(parents=True)
    made.rename(version / "hash")
    info = version / "hash" / "dataset_info.json"
    info.write_text(info.read_text().replace(builder.config_id, "default"))
    dataset = data.load("owner/name")
    assert np.array_equal(dataset.train.images, pixels(12))


# The terminal


def test_nothing_is_printed_and_settings_are_restored(tmp_path, capfd):
    datasets.enable_progress_bars()
    before = datasets.logging.get_verbosity(), huggingface_hub.utils.logging.get_verbosity()
    data.load(str(write_pair(tmp_path)))
    with contextlib.suppress(InputError):
        data.load(str(tmp_path / "nowhere"))
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
    after = datasets.logging.get_verbosity(), huggingface_hub.utils.logging.get_verbosity()
    assert after == before


# Real data


def test_mnist():
    mnist = real("mnist")
    assert isinstance(mnist.train, data.ResidentSplit)
    assert mnist.train.images.shape == (60_000, 28, 28, 1)
    assert mnist.test.images.shape == (10_000, 28, 28, 1)
    assert mnist.classes == tuple("0123456789")
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(mnist.train.labels).tolist() == counts
    assert np.bincount(mnist.test.labels)[:3].tolist() == [980, 1135, 1032]
    np.testing.assert_allclose(mnist.mean, [0.13066], atol=1e-5)
    np.testing.assert_allclose(mnist.std, [0.30811], atol=1e-5)


@pytest.mark.slow
def test_cifar10():
    cifar = real("cifar10")
    assert isinstance(cifar.train, data.ResidentSplit)
    assert cifar.image_shape == (32, 32, 3)
    assert cifar.classes[:3] == ("airplane", "automobile", "bird")
    assert np.bincount(cifar.train.labels).tolist() == [5000] * 10
    assert np.bincount(cifar.test.labels).tolist() == [1000] * 10
    # The published statistics; the copy at hand is compressed.
    np.testing.assert_allclose(cifar.mean, [0.4914, 0.4822, 0.4465], atol=2e-3)
    np.testing.assert_allclose(cifar.std, [0.2470, 0.2435, 0.2616], atol=3e-3)


@functools.cache
def tiny_validation() -> tuple[np.ndarray, np.ndarray]:
    return joined(real("tiny-imagenet").test.ordered(512))


def test_tiny_imagenet_is_streamed():
    tiny = real("tiny-imagenet")
    assert isinstance(tiny.train, data.StreamedSplit)
    assert (len(tiny.train), len(tiny.test)) == (100_000, 10_000)
    assert (tiny.image_shape, len(tiny.classes)) == ((64, 64, 3), 200)
    np.testing.assert_allclose(tiny.mean, [0.4802, 0.4481, 0.3975], atol=0.01)
    images, labels = next(tiny.train.batches(100, seed=0, epoch=0))
    assert (images.shape, images.dtype) == ((100, 64, 64, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((100,), np.int32)
    assert len(np.unique(labels)) > 50  # shuffled


def test_tiny_imagenet_is_deterministic():
    train = real("tiny-imagenet").train

    def some(**kwargs):
        batches = train.batches(64, seed=4, **kwargs)
        return joined([next(batches) for _ in range(3)])

    images, labels = some(epoch=1, start=10)
    again, labels_again = some(epoch=1, start=10)
    assert np.array_equal(images, again)
    assert np.array_equal(labels, labels_again)
    assert np.array_equal(some(epoch=1, start=12)[0][:64], images[128:])
    assert not np.array_equal(some(epoch=2, start=10)[0], images)


@pytest.mark.slow
def test_tiny_imagenet_epoch_has_every_example_once():
    images, labels = tiny_validation()
    shuffled, shuffled_labels = joined(real("tiny-imagenet").test.batches(512, seed=0, epoch=0))
    assert np.bincount(labels).tolist() == [50] * 200

    def multiset(images, labels):
        return sorted((hash(i.tobytes()), int(k)) for i, k in zip(images, labels, strict=True))

    assert not np.array_equal(labels, shuffled_labels)
    assert multiset(images, labels) == multiset(shuffled, shuffled_labels)


@pytest.mark.slow
def test_tiny_imagenet_grey_images_are_converted():
    cells = real("tiny-imagenet").test._rows.table.cells([*range(1000)])["image"]
    modes = [datasets.Image().decode_example(cell).mode for cell in cells]
    grey = [row for row, mode in enumerate(modes) if mode == "L"]
    assert 0 < len(grey) < 100
    pixels_of_grey = tiny_validation()[0][grey]
    assert (pixels_of_grey == pixels_of_grey[..., :1]).all()


@pytest.mark.slow
def test_streaming_keeps_a_bounded_part_in_memory():
    tiny = real("tiny-imagenet")
    batch = 128 * 64 * 64 * 3
    arrow_before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        for _ in zip(range(60), tiny.train.batches(128, seed=0, epoch=0), strict=False):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (_stream._AHEAD + 2 * _stream._THREADS + 4) * batch + 2**23
    assert pa.total_allocated_bytes() - arrow_before < 2**24  # rows are memory-mapped
