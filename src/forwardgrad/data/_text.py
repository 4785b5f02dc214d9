"""Text by name, from files, folders or the Hugging Face hub, as windows of tokens."""

import hashlib
import importlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import grain
import numpy as np
from jaxtyping import Int, Int32
from numpy.lib.stride_tricks import sliding_window_view

from forwardgrad._errors import InputError, unknown_name
from forwardgrad._files import local
from forwardgrad.data._access import CachedTable
from forwardgrad.data._dataset import Batch, Share, Split, part_of
from forwardgrad.data._load import NAMES, RESIDENT_LIMIT, data_folder
from forwardgrad.data._stream import StreamedSplit
from forwardgrad.data._tables import cached_parquet, folder_splits, hub_splits, quiet
from forwardgrad.data._vocabulary import Bytes, Characters, Vocabulary, pieces_of

TEXT = "text"
"""The name of the text that every Python has."""

_SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""What the three splits are called, in files and on the hub."""

# Of what there is, for test and then for validation, where they are not there.
_HELD_OUT = 0.1
_MOST_HELD_OUT = 2**20
_FEWEST_DOCUMENTS = 10
_SPLIT_SEED = 0
# Documents that become tokens at once; what is left of the last window is dropped.
_DOCUMENTS = 1000
# Windows of each split that tell one text from another.
_DIGESTED = 1024


@dataclass(frozen=True, eq=False)
class ResidentText(Split):
    """A split of a text that is held in memory.

    **Arguments:**

    - `tokens`: windows of one more token than the context: each is predicted from those before it.
    """

    tokens: Int32[np.ndarray, "windows length"]

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        """These windows, without their last tokens and without their first."""
        return _inputs_and_labels(self.tokens[rows])

    def ordered(self, batch_size: int, *, share: Share = (0, 1)) -> Iterator[Batch]:
        """All windows in their order; the last batch may be short."""
        mine = part_of(batch_size, share)
        for start in range(0, len(self), batch_size):
            yield _inputs_and_labels(self.tokens[start : start + batch_size][mine])


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of a split that stay on disk, memory-mapped."""

    rows: datasets.Dataset

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        """These windows, without their last tokens and without their first."""
        return _inputs_and_labels(_tokens(self.rows[rows.tolist()]))

    @property
    def example_bytes(self) -> int:
        """The bytes of a window's tokens."""
        return self.take(np.zeros(1, int))[0].nbytes

    def shuffled(self, seed: int) -> grain.MapDataset[int]:
        """All windows in random order."""
        return grain.MapDataset.range(len(self)).shuffle(seed=seed)


@dataclass(frozen=True, eq=False)
class Text:
    """A text as windows of tokens, split by document.

    **Arguments:**

    - `name`: what it was loaded as.
    - `vocabulary`: the tokens that there are.
    - `context`: the tokens of a window that are inputs.
    - `train`, `validation`, `test`: the splits.
    - `characters_per_token`: in the test split, on average.
    """

    name: str
    vocabulary: Vocabulary
    context: int
    train: Split
    validation: Split
    test: Split
    characters_per_token: float

    def bits_per_character(self, loss: float) -> float:
        """A loss for each token of the test split, in nats, as bits for each character."""
        return loss / math.log(2) / self.characters_per_token

    @property
    def digest(self) -> str:
        """A number for the vocabulary and the windows: another text has another one."""
        found = hashlib.sha256(str(self.vocabulary).encode())
        for split in (self.train, self.validation, self.test):
            rows = np.unique(np.linspace(0, len(split) - 1, _DIGESTED).astype(np.int64))
            found.update(f"{len(split)} {self.context}".encode())
            for part in split.take(rows):
                found.update(np.ascontiguousarray(part, "<i4").tobytes())
        return found.hexdigest()


def load_text(
    name: str,
    data_dir: Path | str | None = None,
    *,
    text_column: str | None = None,
    tokenizer: str = "chars",
    context: int = 64,
    documents: int | None = None,
    resident_limit: int = RESIDENT_LIMIT,
) -> Text:
    """A text, from a file, a folder, the Hugging Face hub, or this Python.

    Documents follow one another, each with a line's end at its end, and are cut into windows of
    `context` tokens and the one that comes next. Without a split for validation or test, a tenth of
    the training documents, chosen at random, always the same, becomes it. Of fewer than ten
    documents the end becomes it.

    **Arguments:**

    - `name`: `"text"`, the language reference of the running Python; a text file; a folder of text
        files, each a document; a parquet file, or a folder of them; or a data set on the hub,
        `"owner/name"` or `"owner/name/configuration"`.
    - `data_dir`: a folder that holds `NAME`. Default: the environment variable `FORWARDGRAD_DATA`.
        With it the hub is never asked.
    - `text_column`: the column of the text in a table. Default: `text`, else the only column of
        strings.
    - `tokenizer`: `"chars"`: each character of the text is a token (of the training split, if there
        is another for test); `"bytes"`; a file of the library `tokenizers`; or `"owner/name"`, a
        model on the hub that has one.
    - `context`: the length of a window.
    - `documents`: take only so many documents of each split, the first ones. Of a data set on the
        hub, no more is downloaded than holds them. Default: all.
    - `resident_limit`: bytes of tokens, as inputs and labels, that are held in memory.

    **Returns:**

    The text.

    **Raises:**

    `InputError`, with a sentence that says what to do, if the name is unknown, a file is missing or
    not text in UTF-8, a table has no such column, a split is shorter than a window or has
    characters that the training split has not, or the hub cannot be reached.

    >>> text = load_text("text", context=32)
    >>> tokens, following = text.train.take(np.array([0]))
    >>> tokens.shape, (tokens[:, 1:] == following[:, :-1]).all()
    ((1, 32), np.True_)
    """
    if context < 1:
        raise InputError(f"context must be at least 1, got {context}")
    if documents is not None and documents < 1:
        raise InputError(f"documents must be at least 1, got {documents}")
    found = _found(name, data_folder(data_dir), documents)
    first = {k: _first(table, documents) for k, table in found.items()}
    given = {k: _column(table, text_column) for k, table in first.items()}
    splits = _all_splits(given)
    if tokenizer == "chars":
        # Of all that was split here, for else a rare letter could not be tested.
        own = given.values() if len(given) == 1 else [splits["train"]]
        vocabulary = Characters.of(text for table in own for text in _texts(table))
    else:
        vocabulary = Bytes() if tokenizer == "bytes" else pieces_of(tokenizer)
    cut = {k: _windows(table, vocabulary, tokenizer, context) for k, table in splits.items()}
    resident = 8 * context * sum(map(len, cut.values())) <= resident_limit
    train, validation, test = (
        ResidentText(_tokens(rows[:])) if resident else StreamedSplit(Windows(rows))
        for rows in cut.values()
    )
    characters = float(np.mean(cut["test"]["characters"])) / context
    return Text(name, vocabulary, context, train, validation, test, characters)


def holds_text(name: str) -> bool:
    """Whether a data set can only be text, by its name."""
    path = Path(os.path.expanduser(name))
    return name == TEXT or (path.is_file() and path.suffix != ".parquet")


def _inputs_and_labels(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return windows[:, :-1], windows[:, 1:]


def _tokens(rows: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(rows["tokens"], np.int32)


def _first(table: CachedTable, documents: int | None) -> CachedTable:
    if documents is None or documents >= len(table.rows):
        return table
    with quiet():
        return CachedTable(table.rows.select(range(documents)), table.where)


def _found(name: str, data_dir: Path | None, documents: int | None) -> dict[str, CachedTable]:
    """The tables of `name`, by split: this Python's, under `data_dir`, local, or on the hub."""
    if name == TEXT:
        topics = importlib.import_module("pydoc_data.topics").topics
        return {"train": _of_texts(topics.values(), "the language reference of this Python")}
    if name in NAMES:
        raise InputError(f"dataset {name!r} holds images; expected text")
    for path in (*([data_dir / name] if data_dir and name else []), local(Path(name), "dataset")):
        if name and path.exists():
            return _from_path(path)
    words = name.split("/")
    if len(words) in (2, 3) and all(words) and not name.startswith((".", "~")):
        if data_dir is not None:
            raise InputError(f"dataset {name!r} is not in the data folder {data_dir}")
        repository, configuration = "/".join(words[:2]), words[2:]
        tables = hub_splits(name, repository, *configuration, first=documents)
        return _known_splits(tables, f"dataset {name!r} on the Hugging Face hub")
    if "/" in name or "." in name:
        raise InputError(f"dataset {name!r} is neither a file nor a folder")
    raise unknown_name("dataset", name, (TEXT,))


def _from_path(path: Path) -> dict[str, CachedTable]:
    if path.suffix == ".parquet":
        return {"train": cached_parquet(path)}
    if path.is_file():
        return {"train": _of_texts([_read(path)], f"file {path}")}
    tables = {k: path / f"{name}.parquet" for k, names in _SPLITS.items() for name in names}
    if any(table.exists() for table in tables.values()):
        return {k: cached_parquet(table) for k, table in tables.items() if table.exists()}
    if next(path.rglob("*.parquet"), None):
        return _known_splits(folder_splits(path), f"folder {path}")
    return _from_files(path)


def _from_files(folder: Path) -> dict[str, CachedTable]:
    """Files and folders called as splits are these; else all files are one."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and not _hidden(f, folder)]
    if not files:
        raise InputError(f"folder {folder} holds no files; expected text files or parquet files")
    parts = {f: f.relative_to(folder).parts[0].split(".")[0] for f in files}
    split_of = {name: k for k, names in _SPLITS.items() for name in names}
    if "train" not in parts.values():
        split_of = dict.fromkeys(parts.values(), "train")
    texts: dict[str, list[str]] = {}
    for file in files:
        if parts[file] in split_of:
            texts.setdefault(split_of[parts[file]], []).append(_read(file))
    return {k: _of_texts(texts[k], f"split {k!r} of folder {folder}") for k in texts}


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _read(file: Path) -> str:
    try:
        # Line ends as they are.
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"file {file} is not text in UTF-8: byte {error.start} is "
            f"0x{error.object[error.start]:02x}"
        ) from error


def _of_texts(texts: Any, where: str) -> CachedTable:
    return CachedTable(datasets.Dataset.from_dict({"text": list(texts)}), where)


def _known_splits(tables: Mapping[Any, datasets.Dataset], where: str) -> dict[str, CachedTable]:
    found = {
        k: CachedTable(tables[name], f"split {name!r} of {where}")
        for k, names in _SPLITS.items()
        for name in names
        if name in tables
    }
    if "train" not in found:
        raise InputError(f"{where} has no split 'train', only {', '.join(map(str, tables))}")
    return found


def _column(table: CachedTable, column: str | None) -> CachedTable:
    """The column of texts alone, called `text`."""
    strings = [name for name, f in table.rows.features.items() if _is_string(f)]
    if column is None and len(strings) != 1 and "text" not in strings:
        problem = "more than one column of strings" if strings else "no column of strings"
        hint = "; --text-column or text_column= names one" if strings else ""
        raise InputError(f"{table.where} has {problem}{hint} (it has {_names(table)})")
    column = column or ("text" if "text" in strings else strings[0])
    if column not in strings:
        raise InputError(
            f"text_column {column!r} of {table.where} is not a column of strings (it has "
            f"{_names(table)})"
        )
    rows = table.rows.select_columns(column)
    rows = rows if column == "text" else rows.rename_column(column, "text")
    if empty := rows.data.column("text").null_count:
        raise InputError(f"{empty} rows of {table.where} have no text in column {column!r}")
    return CachedTable(rows, table.where)


def _is_string(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _names(table: CachedTable) -> str:
    return ", ".join(map(repr, table.rows.features)) or "no columns"


def _texts(table: CachedTable) -> Iterator[str]:
    batch: Any
    for batch in table.rows.iter(_DOCUMENTS):
        yield from map(_ended, batch["text"])


def _ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def _all_splits(given: dict[str, CachedTable]) -> dict[str, CachedTable]:
    """Train, validation and test; those that are not there are held out of the training split."""
    if "test" not in given and "validation" in given:
        given = {"train": given["train"], "test": given["validation"]}
    train, held_out = given["train"], {}
    for name in ("test", "validation"):
        if name not in given:
            train, held_out[name] = _hold_out(train, name)
    splits = {**given, **held_out, "train": train}
    return {name: splits[name] for name in _SPLITS}


def _hold_out(table: CachedTable, name: str) -> tuple[CachedTable, CachedTable]:
    """A table without some of its documents, and these."""
    lengths = np.fromiter(map(len, _texts(table)), np.int64)
    least = left = min(_HELD_OUT * lengths.sum(), _MOST_HELD_OUT)
    chosen = np.zeros(len(lengths), bool)
    if len(lengths) >= _FEWEST_DOCUMENTS:
        for i in np.random.default_rng(_SPLIT_SEED).permutation(len(lengths)):
            if lengths[i] <= left:
                chosen[i], left = True, left - lengths[i]
            if left < least / 10:
                break
    where = f"what is held out of {table.where} for {name}"
    if lengths @ chosen > least / 2:
        rest, part = (np.flatnonzero(which).tolist() for which in (~chosen, chosen))
        with quiet():
            return (
                CachedTable(table.rows.select(rest), table.where),
                CachedTable(table.rows.select(part), where),
            )
    # Few documents, or long ones.
    text = "".join(_texts(table))
    place = len(text) - int(least)
    return _of_texts([text[:place]], table.where), _of_texts([text[place:]], where)


def _windows(
    table: CachedTable, vocabulary: Vocabulary, tokenizer: str, context: int
) -> datasets.Dataset:
    """A row for each window: its tokens, and how many characters they stand for."""
    of_train = ", the characters of the training split" if tokenizer == "chars" else ""

    def cut(batch: Mapping[str, list[str]]) -> dict[str, Any]:
        texts = [*map(_ended, batch["text"])]
        if odd := vocabulary.unknown(texts):
            raise InputError(
                f"{table.where} has {odd}, which is none of the {len(vocabulary)} tokens of "
                f"tokenizer {tokenizer!r}{of_train}; with 'bytes' there is none that is unknown"
            )
        ids = vocabulary.encode(texts)
        count = max(0, len(ids) - 1) // context
        windows = sliding_window_view(ids, context + 1)[::context] if count else ids[:0, None]
        characters = sum(map(len, texts)) / max(1, len(ids)) * context
        return {"tokens": windows[:count], "characters": [characters] * count}

    features = datasets.Features(
        {
            "tokens": datasets.Sequence(datasets.Value("int32"), length=context + 1),
            "characters": datasets.Value("float32"),
        }
    )
    with quiet():
        rows = table.rows.map(
            cut, batched=True, batch_size=_DOCUMENTS, remove_columns=["text"], features=features
        )
    if not len(rows):
        raise InputError(
            f"{table.where} has fewer tokens than a window, which is context (={context}) and one "
            "more"
        )
    return rows.with_format("numpy")
