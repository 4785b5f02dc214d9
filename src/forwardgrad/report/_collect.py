"""Runs, tables and experiments, found in folders."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from forwardgrad._errors import InputError
from forwardgrad.report._read import CONFIG, METRICS, SUMMARY, read_result, read_run
from forwardgrad.report._stored import Collection, Other, Run, Table

DEFAULT_FOLDERS = (Path("runs"), Path("results"))
"""Where runs are looked for: the first of these that exists."""


def collect(folders: Sequence[Path]) -> Collection:
    """All that is stored in the folders and below them; `checkpoints` are not entered.

    **Raises:**

    `InputError` if one is not a folder, or there is nothing.
    """
    folders = tuple(folders) or _default()
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"folders: {folder} is not a folder")
    runs, tables, others, problems = [], [], [], []
    for folder, names in _walk(folders):
        found = [_or_problem(read, problems) for read in _readers(folder, names, problems)]
        runs += [each for each in found if isinstance(each, Run)]
        tables += [each for each in found if isinstance(each, Table)]
        others += [each for each in found if isinstance(each, Other)]
    if not (runs or tables or others or problems):
        raise InputError(
            f"folders: {', '.join(map(str, folders))} hold no results: expected folders of "
            "forwardgrad train, or JSON files of forwardgrad reproduce and compare"
        )
    return Collection(folders, tuple(runs), tuple(tables), tuple(others), tuple(problems))


def _default() -> tuple[Path, ...]:
    for folder in DEFAULT_FOLDERS:
        if folder.is_dir():
            return (folder,)
    raise InputError(
        f"folders: there is neither {' nor '.join(map(str, DEFAULT_FOLDERS))} here: "
        "expected the folders to read"
    )


def _walk(folders: Sequence[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Every folder once, with the sorted names of its files; hidden ones are left out."""
    seen = set()
    for top in folders:
        for place, inner, names in os.walk(top):
            inner[:] = sorted(n for n in inner if n != "checkpoints" and not n.startswith("."))
            folder = Path(place)
            if folder.resolve() not in seen:
                seen.add(folder.resolve())
                yield folder, sorted(n for n in names if not n.startswith("."))


def _readers(
    folder: Path, names: Sequence[str], problems: list[str]
) -> Iterator[Callable[[], Run | Table | Other | None]]:
    if {CONFIG, METRICS, SUMMARY} & set(names):
        # Other JSON files in a run's folder are parts of the run.
        yield lambda: read_run(folder, problems)
        return
    for name in names:
        if name.endswith(".json"):
            yield lambda path=folder / name: read_result(path)


def _or_problem(
    read: Callable[[], Run | Table | Other | None], problems: list[str]
) -> Run | Table | Other | None:
    try:
        return read()
    except InputError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{error.filename} cannot be read: {error.strerror}")
    return None
