"""`forwardgrad report`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from forwardgrad._console import Console
from forwardgrad.cli._surroundings import parse
from forwardgrad.report import write_report

DESCRIPTION = """One page of stored runs: tables, learning curves, cost against accuracy, and the
commands that fill the cells that are missing."""


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Settings of `report`."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Where to look, and below. Default: runs, or results where there is none."""
    out: Path = Path("report.html")
    """The page. The same as Markdown is written beside it, with its pictures in NAME_files."""


def report(arguments: Sequence[str]) -> int:
    """Write the page, and say where it is."""
    options = parse(
        ReportOptions, "forwardgrad report", arguments, description=DESCRIPTION, computes=False
    )
    page = write_report(options.folders, options.out)
    Console(soft_wrap=True).print(
        f"report: {page}, {page.with_suffix('.md')}", highlight=False, markup=False
    )
    return 0
