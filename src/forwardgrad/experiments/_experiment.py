"""What an experiment is, and what it has stored."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from forwardgrad._errors import InputError
from forwardgrad._files import read_json


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One of the papers' tables or figures, as a command."""

    name: str
    """`forwardgrad reproduce NAME`."""
    summary: str
    """One line."""
    options: type
    """A dataclass of settings; the command's options."""
    run: Callable[[Any], Path]
    """Runs it, and returns the folder with its JSON and figure."""


def options_as_json(options: Any) -> dict[str, Any]:
    """The settings of an experiment as JSON values, without the folders."""
    fields = dataclasses.asdict(options)
    return {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in fields.items()
        if not isinstance(v, Path) and k != "data_dir"
    }


def stored_cells(path: Path, options: Any, same: Sequence[str]) -> Any:
    """The cells that an earlier call has stored, or None.

    **Raises:**

    `InputError` if one of the settings `same` was another.
    """
    if not path.exists():
        return None
    stored = read_json(path)
    for name in same:
        if stored["options"].get(name) != getattr(options, name):
            raise InputError(
                f"{path} holds results for {name} {stored['options'].get(name)}, not "
                f"{getattr(options, name)}: pass another --out"
            )
    return stored["cells"]
