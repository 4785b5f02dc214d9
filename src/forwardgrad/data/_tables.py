"""Where tables are: in parquet files, folders of images, on the Hugging Face hub."""

import contextlib
import glob
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import datasets.utils
import huggingface_hub
import huggingface_hub.utils
import pyarrow.parquet as pq
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from forwardgrad._errors import InputError
from forwardgrad.data._access import CachedTable, ParquetTable, Table, read_footers, reason

HUB_TIMEOUT = 5.0
"""Seconds before a hub that does not answer counts as out of reach."""

_TEST_SPLITS = ("test", "validation", "valid", "val")


def from_folder(
    folder: Path, test_split: str | None = None, stream: bool = False
) -> tuple[Table, Table]:
    """Train and test of a folder.

    It holds `{train,test}.parquet`, or `{train,test}/CLASS/IMAGE`, or parquet files as the hub has
    them, with or without its README.

    **Arguments:**

    - `folder`: the folder.
    - `test_split`, `stream`: as for `from_hub`.

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
            return read(paths["train"], stream), read(paths[test], stream)
    if next(folder.rglob("*.parquet"), None):
        source, what = str(folder.absolute()), f"folder {folder}"
        try:
            with quiet(), _offline():
                if files := _parquet_files(_builder(source)):
                    for split in _chosen(files, test_split, what):
                        read_footers(files[split])  # `datasets` passes over missing ones
                return _splits(source, str(folder), test_split, what, stream)
        except InputError:
            raise
        except Exception as error:  # readers, README and cache each have their own classes
            raise _folder_error(folder, error) from error
    raise InputError(
        f"folder {folder} holds no data set: put train.parquet and test.parquet there, "
        "or folders train and test with a folder of images for each class"
    )


def folder_splits(folder: Path) -> datasets.DatasetDict:
    """All splits of parquet files as the hub has them."""
    try:
        with quiet(), _offline():
            return _load(str(folder.absolute()))
    except InputError:
        raise
    except Exception as error:  # readers, README and cache each have their own classes
        raise _folder_error(folder, error) from error


def from_parquet(path: Path, stream: bool = False) -> Table:
    """The rows of one parquet file, once it has been seen to be one."""
    return ParquetTable(_footers(path), str(path)) if stream else cached_parquet(path)


def cached_parquet(path: Path) -> CachedTable:
    """The same, as a copy in the cache."""
    _footers(path)
    return _read("parquet", path, path)


def _footers(path: Path) -> dict[str, pq.FileMetaData]:
    if not path.is_file():
        raise InputError(f"file {path} is missing: put the {path.stem} rows there, as parquet")
    return read_footers([str(path)])


def from_images(folder: Path, stream: bool = False) -> Table:
    """The images of a folder that holds one folder of them for each class."""
    if not folder.is_dir():
        raise InputError(f"folder {folder} is missing: put a folder of images for each class there")
    if stream:
        raise _no_parquet(str(folder))
    return _read("imagefolder", folder, folder / "**")


def _read(builder: str, source: Path, files: Path) -> CachedTable:
    pattern = str(Path(glob.escape(str(source.absolute()))) / files.relative_to(source))
    try:
        # Online, even a local file makes `datasets` report to the hub that it is being read.
        with quiet(), _offline():
            rows = _load(builder, data_files={"train": pattern}, split="train")
    except InputError:
        raise
    except Exception as error:  # readers, decompressors and the cache each have their own classes
        raise InputError(
            f"{source} cannot be loaded as {builder} through the cache "
            f"{datasets.config.HF_DATASETS_CACHE}: {reason(error)}"
        ) from error
    return CachedTable(rows, str(source))


def from_hub(
    name: str, repository: str, test_split: str | None = None, stream: bool = False
) -> tuple[Table, Table]:
    """Train and test of a data set on the Hugging Face hub, or of its copy in the local cache.

    No code is downloaded: the package asks for `datasets` >= 4, which only reads data files.

    **Arguments:**

    - `name`: what the caller asked for.
    - `repository`: its name on the hub, `"owner/name"`.
    - `test_split`: what the hub calls the test split; None: the first of `test`, `validation`
        and `valid` that there is.
    - `stream`: read parquet files where they are, and make no copy.

    **Raises:**

    `InputError` if the hub has no such data set, cannot be reached within a few seconds and the
    cache does not have it either, has no train and test split, or has no parquet files to stream.
    """
    what = f"dataset {name!r} on the Hugging Face hub"
    with _hub(name, repository, "--stream" if stream else None):
        return _splits(repository, repository, test_split, what, stream)


def hub_splits(
    name: str, repository: str, *configuration: str, first: int | None = None
) -> Mapping[Any, datasets.Dataset]:
    """All splits of a data set on the hub, of the configuration if it has several.

    With `first`, only so many rows of each, and no more is downloaded than holds them.

    **Raises:**

    `InputError` as `from_hub`.
    """
    with _hub(name, repository, "--documents" if first is not None else None):
        if first is None:
            return _load(repository, *configuration)
        streams = _load(repository, *configuration, streaming=True)
        return {k: _first_rows(rows, first) for k, rows in streams.items()}


def _first_rows(rows: datasets.IterableDataset, count: int) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows.take(count)), features=rows.features)


@contextlib.contextmanager
def _hub(name: str, repository: str, stream: str | None) -> Iterator[None]:
    """The hub, or without it the local cache; what goes wrong becomes an `InputError`.

    `stream` is the option, if there is one, that wants rows of the hub itself.
    """
    with quiet():
        reachable = _hub_has(repository)
        if stream and not reachable:
            raise InputError(
                f"dataset {name!r}: the Hugging Face hub ({datasets.config.HF_ENDPOINT}) cannot be "
                f"reached to stream from; leave out {stream} to use what the local cache has"
            )
        try:
            with contextlib.nullcontext() if reachable else _offline():
                yield
        except InputError:
            raise
        except Exception as error:  # network, disk, parser: each has its own classes
            raise _hub_error(name, repository, reachable, error) from error


def _splits(
    source: str, where: str, test_split: str | None, what: str, stream: bool
) -> tuple[Table, Table]:
    """Train and test of a folder or a repository, in which `datasets` looks for the files."""
    if stream:
        builder = _builder(source)
        files = _parquet_files(builder)
        if not files:
            raise _no_parquet(where)
        names = _chosen(files, test_split, what)
        found = [
            ParquetTable(read_footers(files[s]), f"split {s!r} of {where}", builder.info.features)
            for s in names
        ]
    else:
        splits = _load(source)
        names = _chosen(map(str, splits), test_split, what)
        found = [CachedTable(splits[s], f"split {s!r} of {where}") for s in names]
    train, test = found
    return train, test


def _chosen(splits: Iterable[str], test_split: str | None, what: str) -> tuple[str, str]:
    """The train split, and of the others the given one, or the first that is for tests."""
    there = [*splits]
    test = next((s for s in (test_split, *_TEST_SPLITS) if s in there), "test")
    for split in ("train", test):
        if split not in there:
            raise InputError(f"{what} has no split {split!r}, only {', '.join(there)}")
    return "train", test


def _builder(source: str) -> datasets.DatasetBuilder:
    _check_cache()
    return datasets.load_dataset_builder(source)


def _parquet_files(builder: datasets.DatasetBuilder) -> dict[str, list[str]]:
    """The files of each split, if they are parquet."""
    splits = {str(split): [*files] for split, files in (builder.config.data_files or {}).items()}
    plain = all(file.endswith(".parquet") for files in splits.values() for file in files)
    return splits if plain else {}


def _no_parquet(where: str) -> InputError:
    return InputError(f"stream is for parquet files, which {where} does not have: leave it out")


def _check_cache() -> None:
    """Raise an `InputError` if there is no place for the cache of `datasets`."""
    if str(datasets.config.HF_DATASETS_CACHE).startswith("~"):
        raise InputError("no home folder is known for the cache of data sets: set HOME or HF_HOME")


def _load(*arguments: str, **options: Any) -> Any:
    """`datasets.load_dataset`, once it is known that there is a place for its cache."""
    _check_cache()
    return datasets.load_dataset(*arguments, **options)


def _folder_error(folder: Path, error: Exception) -> InputError:
    return InputError(
        f"folder {folder} cannot be loaded: {reason(error).rstrip('.')}; a folder inside "
        "of it may be meant, or put train.parquet and test.parquet there"
    )


def _hub_has(repository: str) -> bool:
    """Whether the hub answers; asked once, since `load_dataset` would retry for minutes."""
    hub = huggingface_hub.HfApi(endpoint=datasets.config.HF_ENDPOINT)
    try:
        hub.dataset_info(repository, timeout=HUB_TIMEOUT)
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
            f"{reason(error)}"
        )
    return InputError(
        f"dataset {name!r}: the Hugging Face hub ({datasets.config.HF_ENDPOINT}) cannot be reached "
        f"and its local cache has no copy; put {name}/train.parquet and {name}/test.parquet into a "
        "folder and name that folder with --data-dir, data_dir= or FORWARDGRAD_DATA"
    )


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
