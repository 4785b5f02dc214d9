"""Tables of undecoded rows: from parquet files, folders of images, the Hugging Face hub."""

import contextlib
import glob
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import datasets.utils
import huggingface_hub
import huggingface_hub.utils
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from forwardgrad._errors import InputError

# Seconds before a hub that does not answer counts as out of reach.
_HUB_TIMEOUT = 5.0
_TEST_SPLITS = ("test", "validation", "valid", "val")


@dataclass(frozen=True)
class Table:
    """Rows of one split, memory-mapped, and what to call them in messages."""

    rows: datasets.Dataset
    where: str


def from_folder(folder: Path, test_split: str | None = None) -> tuple[Table, Table]:
    """Train and test of a folder.

    It holds `{train,test}.parquet`, or `{train,test}/CLASS/IMAGE`, or parquet files as the hub has
    them, with or without its README.

    **Arguments:**

    - `folder`: the folder.
    - `test_split`: as for `from_hub`.

    **Raises:**

    `InputError` if it is none of these, or a file is missing, empty, truncated or unreadable.
    """
    for ending, read in ((".parquet", from_parquet), ("", from_images)):
        paths = {split: folder / f"{split}{ending}" for split in ("train", *_TEST_SPLITS)}
        found = [split for split, path in paths.items() if path.exists()]
        # A folder called train may also hold shards of parquet.
        there = [split for split in found if not any(paths[split].glob("*.parquet"))]
        if there:
            test = next((split for split in there if split != "train"), "test")
            return read(paths["train"]), read(paths[test])
    if next(folder.rglob("*.parquet"), None):
        return _chosen(folder_splits(folder), test_split, f"folder {folder}", str(folder))
    raise InputError(
        f"folder {folder} holds no data set: put train.parquet and test.parquet there, "
        "or folders train and test with a folder of images for each class"
    )


def folder_splits(folder: Path) -> datasets.DatasetDict:
    """All splits of parquet files as the hub has them."""
    try:
        with quiet(), _offline():
            return _load(str(folder.absolute()))
    except Exception as error:  # readers, README and cache each have their own classes
        raise InputError(
            f"folder {folder} cannot be loaded: {_reason(error).rstrip('.')}; a folder inside "
            "of it may be meant, or put train.parquet and test.parquet there"
        ) from error


def from_parquet(path: Path) -> Table:
    """The rows of one parquet file, once it has been seen to be one."""
    if not path.is_file():
        raise InputError(f"file {path} is missing: put the {path.stem} rows there, as parquet")
    try:
        rows = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"file {path} is not a complete parquet file (truncated?): {_reason(error)}"
        ) from error
    if rows == 0:
        raise no_rows(str(path))
    return _read("parquet", path, path)


def no_rows(where: str) -> InputError:
    """The error for an empty split."""
    return InputError(f"{where} has no rows; expected at least one")


def from_images(folder: Path) -> Table:
    """The images of a folder that holds one folder of them for each class."""
    if not folder.is_dir():
        raise InputError(f"folder {folder} is missing: put a folder of images for each class there")
    return _read("imagefolder", folder, folder / "**")


def _read(builder: str, source: Path, files: Path) -> Table:
    pattern = str(Path(glob.escape(str(source.absolute()))) / files.relative_to(source))
    try:
        # Online, even a local file makes `datasets` report to the hub that it is being read.
        with quiet(), _offline():
            rows = _load(builder, data_files={"train": pattern}, split="train")
    except Exception as error:  # readers, decompressors and the cache each have their own classes
        raise InputError(
            f"{source} cannot be loaded as {builder} through the cache "
            f"{datasets.config.HF_DATASETS_CACHE}: {_reason(error)}"
        ) from error
    return Table(rows, str(source))


def from_hub(name: str, repository: str, test_split: str | None = None) -> tuple[Table, Table]:
    """Train and test of a data set on the Hugging Face hub, or of its copy in the local cache.

    No code is downloaded: the package asks for `datasets` >= 4, which only reads data files.

    **Arguments:**

    - `name`: what the caller asked for.
    - `repository`: its name on the hub, `"owner/name"`.
    - `test_split`: what the hub calls the test split; None: the first of `test`, `validation`
        and `valid` that there is.

    **Raises:**

    `InputError` if the hub has no such data set, cannot be reached within a few seconds and the
    cache does not have it either, or has no train and test split.
    """
    splits = hub_splits(name, repository)
    return _chosen(splits, test_split, f"dataset {name!r} on the Hugging Face hub", repository)


def hub_splits(name: str, repository: str, *configuration: str) -> datasets.DatasetDict:
    """All splits of a data set on the hub, of the configuration if it has several.

    **Raises:**

    `InputError` as `from_hub`.
    """
    with quiet():
        reachable = _hub_has(repository)
        try:
            with contextlib.nullcontext() if reachable else _offline():
                return _load(repository, *configuration)
        except Exception as error:  # network, disk, parser: each has its own classes
            raise _hub_error(name, repository, reachable, error) from error


def _chosen(
    splits: datasets.DatasetDict, test_split: str | None, what: str, where: str
) -> tuple[Table, Table]:
    """The train split, and of the others the given one, or the first that is for tests."""
    test = next((s for s in (test_split, *_TEST_SPLITS) if s in splits), "test")
    missing = [split for split in ("train", test) if split not in splits]
    if missing:
        raise InputError(f"{what} has no split {missing[0]!r}, only {', '.join(map(str, splits))}")
    train, test = (Table(splits[s], f"split {s!r} of {where}") for s in ("train", test))
    return train, test


def _load(*arguments: str, **options: Any) -> Any:
    """`datasets.load_dataset`, once it is known that there is a place for its cache."""
    if str(datasets.config.HF_DATASETS_CACHE).startswith("~"):
        raise InputError("no home folder is known for the cache of data sets: set HOME or HF_HOME")
    return datasets.load_dataset(*arguments, **options)


def _hub_has(repository: str) -> bool:
    """Whether the hub answers; asked once, since `load_dataset` would retry for minutes."""
    hub = huggingface_hub.HfApi(endpoint=datasets.config.HF_ENDPOINT)
    try:
        hub.dataset_info(repository, timeout=_HUB_TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"dataset {repository!r} is unknown: the Hugging Face hub has no public data set "
            "of that name, and no local folder is called so"
        ) from error
    except Exception:  # name service, proxy, timeout, 5xx: depends on the HTTP library
        return False
    return True


def _hub_error(name: str, repository: str, reachable: bool, error: Exception) -> InputError:
    if reachable:
        return InputError(
            f"dataset {name!r} ({repository} on the Hugging Face hub) cannot be loaded: "
            f"{_reason(error)}"
        )
    return InputError(
        f"dataset {name!r}: the Hugging Face hub ({datasets.config.HF_ENDPOINT}) cannot be reached "
        f"and its local cache has no copy; put {name}/train.parquet and {name}/test.parquet into a "
        "folder and name that folder with --data-dir, data_dir= or FORWARDGRAD_DATA"
    )


def _reason(error: BaseException) -> str:
    """The first line of the error that began it all."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """`datasets` reads files and its cache, and does not wait for a network."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings of the Hugging Face libraries."""
    with contextlib.ExitStack() as restore, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in (datasets.utils, huggingface_hub.utils):
            restore.callback(library.logging.set_verbosity, library.logging.get_verbosity())
            library.logging.set_verbosity(logging.CRITICAL)
            if not library.are_progress_bars_disabled():
                restore.callback(library.enable_progress_bars)
                library.disable_progress_bars()
        yield
