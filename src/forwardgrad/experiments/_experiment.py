"""What an experiment is, and what every stored result says of its origin."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from forwardgrad import __version__
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


def provenance() -> dict[str, Any]:
    """Date, versions and machine, for a stored result."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "forwardgrad_version": __version__,
        "jax_version": jax.__version__,
        "jaxlib_version": importlib.metadata.version("jaxlib"),
        "python_version": platform.python_version(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }


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
        if stored["options"][name] != getattr(options, name):
            raise InputError(
                f"{path} holds results for {name} {stored['options'][name]}, not "
                f"{getattr(options, name)}: pass another --out"
            )
    return stored["cells"]
