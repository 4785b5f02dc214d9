"""The page in HTML, and the same in Markdown."""

import base64
import datetime
import importlib.resources
import os
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from forwardgrad._errors import InputError
from forwardgrad._files import write_bytes
from forwardgrad.report._collect import Other, collect
from forwardgrad.report._missing import Gap, gaps
from forwardgrad.report._plots import Group, costs, curves
from forwardgrad.report._table import HEADS, StoredTable, column, progress, rows
from forwardgrad.results import escaped, fenced, picture
from forwardgrad.training import Run


class Report(NamedTuple):
    """What the page says."""

    date: str
    tables: list[tuple[StoredTable, list[Gap]]]
    unfinished: list[Run]
    curves: list[Group]
    costs: list[Group]
    runs: list[list[str]]
    others: list[Other]
    problems: list[str]


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
    found, tables = collect([Path(folder) for folder in folders]), []
    for table in found.tables:
        try:
            tables.append((table, gaps(table, found.tables)))
        except InputError as error:
            found.problems.append(f"{table.path} is damaged: {error}")
    date = date or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    unfinished = [run for run in found.runs if run.state != "finished"]
    ours = (unfinished, curves(found), costs(found), rows(found.runs, found.tables))
    return Report(date, tables, *ours, found.others, found.problems)


def write(report: Report, out: Path) -> Path:
    """The page, the Markdown and its pictures."""
    if out.suffix != ".html":
        raise InputError(f"out must be the name of a file that ends in .html, got {out}")
    files = out.with_name(f"{out.stem}_files")
    plots = [plot for group in (*report.curves, *report.costs) for plot in group.plots]
    images = {f"{plot.name}.png": picture(plot.figure) for plot in plots}
    others = enumerate(report.others, 1)
    images |= {f"experiment-{i}.png": other.picture for i, other in others if other.picture}
    # All is made before the first file is written. A folder's name need not be Unicode.
    page, text = (t.encode("utf-8", "replace") for t in (html(report), _markdown(report, files)))
    for name, data in images.items():
        write_bytes(files / name, data)
    write_bytes(out.with_suffix(".md"), text)
    write_bytes(out, page)
    return out


def html(report: Report) -> str:
    """One file that asks for no other."""
    filters: dict[str, Any] = {"base64": lambda data: base64.b64encode(data).decode("ascii")}
    filters["svg"] = lambda plot: filters["base64"](picture(plot.figure, "svg"))
    return _rendered("template.html.j2", report, filters, autoescape=True)


def _markdown(report: Report, files: Path) -> str:
    """A file that shows the pictures in the folder beside it."""
    filters = {
        "fenced": lambda command: Markup(fenced(command)),
        "url": lambda name: Markup(urllib.parse.quote(name)),
    }
    text = _rendered("template.md.j2", report, filters, finalize=escaped, files=files.name)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _rendered(name: str, report: Report, filters: Any, files: str = "", **options: Any) -> str:
    folder = importlib.resources.files("forwardgrad.report")
    loader = jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8"))
    strict = {"undefined": jinja2.StrictUndefined, "lstrip_blocks": True, "trim_blocks": True}
    environment = jinja2.Environment(loader=loader, **strict, **options)
    environment.filters |= filters
    known = {"heads": HEADS, "progress": progress, "column": column, "files": files}
    return environment.get_template(name).render(report=report, **known)
