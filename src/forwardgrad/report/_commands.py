"""Command lines, from settings."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from forwardgrad.report._read import CONFIG
from forwardgrad.report._stored import Run
from forwardgrad.training import TrainConfig
from forwardgrad.training._config import from_json


def command(words: Sequence[str], options: Mapping[str, Any]) -> str:
    """A line for the shell.

    >>> command(["reproduce", "table3"], {"columns": ["mnist"], "batch_size": 128, "resume": True})
    'forwardgrad reproduce table3 --columns mnist --batch-size 128 --resume'
    """
    options_words = [word for option in options.items() for word in _words(*option)]
    return shlex.join(["forwardgrad", *words, *options_words])


def resume(run: Run) -> str:
    """The command that continues a run: of its settings those that are not the defaults.

    **Raises:**

    `InputError` if this version does not know the settings.
    """
    config = from_json(dict(run.settings), run.folder / CONFIG)
    options = {}
    for field in dataclasses.fields(TrainConfig):
        value = getattr(config, field.name)
        if field.name not in ("out", "resume") and value != field.default:
            # Only a setting that is True or False, and never None, is a flag.
            options[field.name] = value if isinstance(field.default, bool) else str(value)
    return command(["train"], {**options, "out": run.folder, "resume": True})


def _words(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list | tuple):
        return [f"--{flag}", *map(str, value)]
    # A value that looks like an option has to be joined to its name.
    return [f"--{flag}={value}"] if str(value).startswith("-") else [f"--{flag}", str(value)]
