"""The report's files."""

import datetime
import os
from collections.abc import Sequence
from pathlib import Path

from forwardgrad._errors import InputError
from forwardgrad._files import write_bytes
from forwardgrad.report._build import build
from forwardgrad.report._collect import collect
from forwardgrad.report._render import html, markdown, pictures
from forwardgrad.report._view import Report


def write_report(
    folders: Sequence[str | os.PathLike[str]] = (),
    out: str | os.PathLike[str] = "report.html",
    *,
    date: str | None = None,
) -> Path:
    """Write one page of the runs, tables and experiments that are stored in folders.

    The page `out` is complete in itself. Beside it the same is written as Markdown, `NAME.md`,
    with its pictures in the folder `NAME_files`.

    **Arguments:**

    - `folders`: where to look, and below. Default: `runs`, or `results` where there is none.
    - `out`: the page, a name that ends in `.html`.
    - `date`: what the page says of when it was made. Default: now.

    **Returns:**

    The page's path.

    **Raises:**

    `InputError` if a folder does not exist, nothing is stored, or `out` cannot be written.
    """
    return write(read(folders, date), Path(out))


def read(folders: Sequence[str | os.PathLike[str]], date: str | None) -> Report:
    """What the page of these folders says."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return build(collect([Path(folder) for folder in folders]), date or now)


def write(report: Report, out: Path) -> Path:
    """The page, the Markdown and its pictures."""
    if out.suffix != ".html":
        raise InputError(f"out must be the name of a file that ends in .html, got {out}")
    files = out.with_name(f"{out.stem}_files")
    # All is made before the first file is written.
    page, text, images = html(report), markdown(report, files.name), pictures(report)
    for name, data in images.items():
        write_bytes(files / name, data)
    # A folder's name need not be Unicode.
    write_bytes(out.with_suffix(".md"), text.encode("utf-8", "replace"))
    write_bytes(out, page.encode("utf-8", "replace"))
    return out
