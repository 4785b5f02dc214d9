"""Rows of one split before they are decoded: in a cache, or in parquet files that stay in place."""

import abc
import functools
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import datasets
import datasets.table
import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from jaxtyping import Int

from forwardgrad._errors import InputError

LARGEST_GROUP = 2**28
"""Bytes of the largest row group that is read as a whole."""

# Bytes and rows of the row groups that a random order draws from at a time, at most.
_WINDOW = 2**27
_WINDOW_ROWS = 2**15
_READERS = 4
# Row groups that the rows spread over a table are taken from.
_SPREAD = 8


class Table(abc.ABC):
    """Random access to rows, and what to call them in messages."""

    where: str
    features: datasets.Features

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @abc.abstractmethod
    def column(self, name: str) -> pa.ChunkedArray | None:
        """A whole column, or None where it would have to be fetched."""

    @abc.abstractmethod
    def select(self, *columns: str) -> "Table":
        """These columns alone, images undecoded."""

    @abc.abstractmethod
    def cells(self, rows: list[int]) -> dict[str, list[Any]]:
        """What is in these rows, by column."""

    @abc.abstractmethod
    def spread(self, count: int) -> Int[np.ndarray, " rows"]:
        """At most `count` rows, the first among them, as evenly spread as is cheap."""

    @abc.abstractmethod
    def shuffled(self, seed: int) -> grain.MapDataset[int]:
        """All rows in random order."""


class CachedTable(Table):
    """A memory-mapped copy in the cache of `datasets`."""

    def __init__(self, rows: datasets.Dataset, where: str):
        self.rows, self.where, self.features = rows, where, rows.features

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column."""
        return self.rows.data.column(name)

    def select(self, *columns: str) -> Table:
        """These columns alone, images undecoded."""
        rows = self.rows.select_columns([*columns])
        for name in columns:
            if isinstance(self.features[name], datasets.Image):
                rows = rows.cast_column(name, datasets.Image(decode=False))
        return CachedTable(rows, self.where)

    def cells(self, rows: list[int]) -> dict[str, list[Any]]:
        """What is in these rows, by column."""
        return self.rows[rows]

    def spread(self, count: int) -> Int[np.ndarray, " rows"]:
        """At most `count` rows, the first and last among them."""
        return evenly(len(self), count)

    def shuffled(self, seed: int) -> grain.MapDataset[int]:
        """All rows in random order."""
        return grain.MapDataset.range(len(self)).shuffle(seed=seed)


class ParquetTable(Table):
    """Rows of parquet files, on this machine or elsewhere, of which no copy is made.

    Row groups are read whole, and those that were used last are kept. So the random order draws
    from a window of row groups that moves over all of them, themselves in random order.

    **Arguments:**

    - `footers`: those of the files, by path or address.
    - `where`: what to call the rows.
    - `features`: types of the columns. Default: what the first file says.
    - `columns`: those that are read.

    **Raises:**

    `InputError` if a row group is too large to be read whole.
    """

    def __init__(
        self,
        footers: Mapping[str, pq.FileMetaData],
        where: str,
        features: datasets.Features | None = None,
        columns: Sequence[str] = (),
    ):
        self._footers, self.where, self._columns = footers, where, [*columns]
        schema = next(iter(footers.values())).schema.to_arrow_schema()
        self.features = features or datasets.Features.from_arrow_schema(schema)
        self._groups = [
            (file, i)
            for file, footer in footers.items()
            for i in range(footer.num_row_groups)
            if footer.row_group(i).num_rows
        ]
        groups = [footers[file].row_group(i) for file, i in self._groups]
        self._ends = np.cumsum([group.num_rows for group in groups])
        sizes = [group.total_byte_size for group in groups]
        if max(sizes) > LARGEST_GROUP:
            file, i = self._groups[int(np.argmax(sizes))]
            raise InputError(
                f"row group {i} of {file} has {max(sizes)} bytes, and a stream reads row groups "
                f"whole: write it with row groups of at most {LARGEST_GROUP}, or leave out --stream"
            )
        count, total = len(groups), sum(sizes)
        self._window = max(2, round(count * min(_WINDOW / total, _WINDOW_ROWS / len(self))))
        self._lock = threading.Lock()
        # At the ends of an epoch, half as many again are in use; the rest is for reading ahead.
        self._reading = functools.lru_cache(3 * self._window // 2 + 2)(self._reader())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def column(self, name: str) -> None:
        """Nothing: all files would have to be read."""

    def select(self, *columns: str) -> Table:
        """These columns alone, images undecoded."""
        return ParquetTable(self._footers, self.where, self.features, columns)

    def cells(self, rows: list[int]) -> dict[str, list[Any]]:
        """What is in these rows, by column."""
        numbers = np.searchsorted(self._ends, rows, side="right").tolist()
        with self._lock:  # or else two threads may begin to read the same one
            reading = {number: self._reading(number) for number in dict.fromkeys(numbers)}
        groups = {number: future.result() for number, future in reading.items()}
        places = [
            (groups[number], row - self._ends[number])
            for row, number in zip(rows, numbers, strict=True)
        ]
        return {
            name: [group[name][int(place)].as_py() for group, place in places]
            for name in self._columns
        }

    def spread(self, count: int) -> Int[np.ndarray, " rows"]:
        """At most `count` rows, the first and last among them, of a few row groups."""
        chosen = evenly(len(self._groups), _SPREAD)
        starts = [0, *self._ends.tolist()]
        share = count // len(chosen)
        parts = [starts[i] + evenly(starts[i + 1] - starts[i], share) for i in chosen]
        return np.concatenate(parts)

    def shuffled(self, seed: int) -> grain.MapDataset[int]:
        """All rows in an order in which only so many row groups are in use at a time.

        The row groups are in random order. A row's place is its group's, plus a random part of the
        window's length.
        """
        random = np.random.RandomState(seed)  # its streams are the same in every version of NumPy
        count = len(self._groups)
        window = min(self._window, count)
        first = np.clip(random.permutation(count) - window // 2, 0, count - window)
        lengths = np.diff(self._ends, prepend=0)
        places = np.repeat(first, lengths) + window * random.random_sample(len(self))
        return grain.MapDataset.range(len(self)).map(np.argsort(places).item)

    def _reader(self) -> Callable[[int], Future[pa.Table]]:
        """A function that begins to read a row group.

        It does not hold the table, which would then outlive its last use, and with it the threads.
        """
        groups, footers = self._groups, self._footers
        features = datasets.Features({name: self.features[name] for name in self._columns})
        files, _ = url_to_fs(groups[0][0])
        readers, failures = ThreadPoolExecutor(_READERS), []

        def read(number: int) -> pa.Table:
            if failures:  # those that wait have not to find out for themselves, at a time-out each
                raise failures[0]
            file, group = groups[number]
            try:
                return _read(files, file, footers[file], group, features)
            except Exception as error:  # network, disk, parser: each has its own classes
                failures.append(
                    InputError(f"row group {group} of {file} cannot be read: {reason(error)}")
                )
                raise failures[0] from error

        return functools.partial(readers.submit, read)


def _read(
    files: AbstractFileSystem,
    file: str,
    footer: pq.FileMetaData,
    group: int,
    features: datasets.Features,
) -> pa.Table:
    """The columns `features` of a row group."""
    with files.open(file, cache_type="none") as stream:
        source = pq.ParquetFile(stream, metadata=footer, pre_buffer=True)
        table = source.read_row_group(group, [*features])
    return datasets.table.table_cast(table, features.arrow_schema)


def read_footers(files: Sequence[str]) -> dict[str, pq.FileMetaData]:
    """The footers of parquet files, once each has been seen to be complete and to have rows.

    **Raises:**

    `InputError` if one is not, or if files are missing that the others' names speak of.
    """
    _check_numbering(files)
    system, _ = url_to_fs(files[0])

    def footer(file: str) -> pq.FileMetaData:
        try:
            with system.open(file, cache_type="none") as stream:
                return pq.read_metadata(stream)
        except Exception as error:  # network, disk, parser: each has its own classes
            raise InputError(
                f"file {file} is not a complete parquet file (truncated?): {reason(error)}"
            ) from error

    with ThreadPoolExecutor(_READERS) as readers:
        found = dict(zip(files, readers.map(footer, files), strict=True))
    for file, metadata in found.items():
        if metadata.num_rows == 0:
            raise no_rows(f"file {file}")
    _check_alike(found)
    return found


def _check_alike(footers: Mapping[str, pq.FileMetaData]) -> None:
    """Raise an `InputError` if files differ in columns or classes: one file speaks for all."""
    schemas = {file: footer.schema.to_arrow_schema() for file, footer in footers.items()}
    (first, expected), *others = (
        (file, datasets.Features.from_arrow_schema(schema)) for file, schema in schemas.items()
    )
    for file, features in others:
        if {*features} != {*expected}:
            raise InputError(
                f"files of a split must have the same columns, got {sorted(features)} in {file} "
                f"and {sorted(expected)} in {first}"
            )
        for name, feature in features.items():
            pair = feature, expected[name]
            if all(isinstance(f, datasets.ClassLabel) for f in pair) and pair[0] != pair[1]:
                raise InputError(
                    f"files of a split must have the same classes, but those of column {name!r} "
                    f"in {file} are not those in {first}"
                )


def _check_numbering(files: Sequence[str]) -> None:
    """Raise an `InputError` if a file of `train-00000-of-00002.parquet` and so on is missing."""
    for file in files:
        if numbered := re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.parquet)", file):
            begin, number, of, count, end = numbered.groups()
            for i in range(int(count)):
                if (other := f"{begin}{i:0{len(number)}}{of}{count}{end}") not in files:
                    raise InputError(f"file {other} is missing, of which {file} speaks")


def no_rows(where: str) -> InputError:
    """The error for an empty split or file."""
    return InputError(f"{where} has no rows; expected at least one image with its label")


def reason(error: BaseException) -> str:
    """The first line of the error that began it all."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def evenly(length: int, count: int) -> Int[np.ndarray, " rows"]:
    """At most `count` of the first `length` integers, first and last among them, evenly spread."""
    return np.unique(np.linspace(0, length - 1, count).astype(np.int64))
