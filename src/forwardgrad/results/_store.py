"""One reader and one writer: JSON is checked against a type where it is read."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from forwardgrad._errors import InputError
from forwardgrad._files import open_file, write_text

VERSION = 1
"""The version of the files that are written now; those that do not say theirs are of version 0."""

MOST_BYTES = 2**26
"""Of a file; toy.json, the largest that is stored, has 2**21."""

MOST_LINE = 2**16
"""Bytes of a line."""

T = TypeVar("T")


def read(path: Path, kind: type[T]) -> T:
    """What a JSON file holds, as a value of the type `kind`.

    Fields that the type does not have are passed over.

    **Arguments:**

    - `path`: the file.
    - `kind`: a dataclass, or whatever msgspec can make of JSON.

    **Raises:**

    `InputError` if there is no such file, it is no JSON, of a newer version, or of another type.
    """
    with open_file(path) as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise InputError(f"{path} is damaged: it is larger than {MOST_BYTES // 2**20} MiB")
    value = _decoded(path, data)
    # What may be anybody's file has a version of its own.
    version = value.pop("version", 0) if isinstance(value, dict) and kind is not Any else 0
    if isinstance(version, int) and version > VERSION:
        raise InputError(
            f"{path} is of another version of forwardgrad: its format is {version}, and this one "
            f"reads up to {VERSION}"
        )
    return _converted(path, value, kind)


def read_lines(path: Path, kind: type[T]) -> tuple[tuple[T, ...], InputError | None]:
    """The lines of a file before the first that is damaged, and what is wrong with that one."""
    lines: list[T] = []
    try:
        with open_file(path) as file:
            while line := file.readline(MOST_LINE + 1):
                where = f"line {len(lines) + 1} of {path}"
                if len(line) > MOST_LINE:
                    raise InputError(f"{where} is damaged: it is longer than {MOST_LINE} bytes")
                lines.append(_converted(where, _decoded(where, line), kind))
    except InputError as error:
        return tuple(lines), error
    return tuple(lines), None


def write(path: Path, value: Any) -> None:
    """Replace a file by the JSON of a dataclass or a dictionary at once.

    Paths become texts, and what is not finite becomes null.
    """
    value = fields(value) if dataclasses.is_dataclass(value) else value
    write_text(path, _encoded({**value, "version": VERSION}, indent=2) + "\n")


def as_line(record: Any) -> str:
    """A dataclass as a line of JSON, of what is there."""
    return _encoded(without_none(record)) + "\n"


def _encoded(value: Any, indent: int | None = None) -> str:
    # Python writes words for what is not finite, which are no JSON, and reads them as we please.
    plain = json.loads(json.dumps(value, default=_plain), parse_constant=lambda _: None)
    return json.dumps(plain, indent=indent)


def _plain(value: Any) -> Any:
    return fields(value) if dataclasses.is_dataclass(value) else os.fspath(value)


def fields(record: Any) -> dict[str, Any]:
    """The fields of a dataclass: in `vars`, msgspec leaves out those that have their default."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def without_none(record: Any) -> dict[str, Any]:
    """The fields of a dataclass that are there."""
    return {name: value for name, value in fields(record).items() if value is not None}


def _decoded(where: Path | str, data: bytes) -> Any:
    try:
        return json.loads(data, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else f"got {error}"
        raise InputError(f"{where} is damaged: expected JSON, {_short(reason)}") from error


def _converted(where: Path | str, value: Any, kind: type[T]) -> T:
    try:
        # The one type that msgspec does not know is a path.
        return msgspec.convert(value, kind, dec_hook=lambda kind, value: kind(value))
    except (ValueError, TypeError, RecursionError) as error:
        text = _short(str(error))
        raise InputError(f"{where} is damaged: {text[:1].lower()}{text[1:]}") from error


def _short(text: str) -> str:
    return " ".join(text.split())[:300]
