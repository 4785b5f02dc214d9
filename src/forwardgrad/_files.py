"""Files that are whole or absent."""

import contextlib
import errno
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from forwardgrad._errors import InputError

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission is denied",
    errno.EROFS: "the file system is read-only",
    errno.EEXIST: "a part of the path is a file",
    errno.EISDIR: "there is a folder of that name",
    errno.ENOTDIR: "a part of the path is a file",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a disk can do to a write into one sentence.

    **Raises:**

    `InputError` that names the path and the reason.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = _DISK.get(getattr(error, "errno", None) or 0)
        if reason is None and "No space left" in str(error):
            reason = _DISK[errno.ENOSPC]
        if reason is None:
            raise
        raise InputError(
            f"cannot write {path}: {reason}; what was written before is kept, and a run continues "
            "from its last checkpoint with --resume"
        ) from error


def local(path: Path, name: str) -> Path:
    """A path with `~` expanded.

    **Raises:**

    `InputError`, naming the setting `name`, if it is an address, or the home of nobody.

    >>> local(Path("gs://bucket/run"), "out")
    Traceback (most recent call last):
    forwardgrad._errors.InputError: out must be a local path, got the address gs:/bucket/run
    """
    # Two letters or more: one is a drive.
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path), re.I):
        raise InputError(f"{name} must be a local path, got the address {path}")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise InputError(f"{name} (={path}) begins with the home of a user unknown here") from error


def discard_output() -> None:
    """Have what is left of standard output, and what follows, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def write_text(path: Path, text: str) -> None:
    """Replace a file by another at once: a reader sees the old one or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """`write_text` of bytes."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A file to be read; nothing else is opened, and a pipe would be waited for.

    **Raises:**

    `InputError` that names the path and the reason.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{path} is damaged: expected a file, got something else of that name")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
