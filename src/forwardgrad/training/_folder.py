"""The folder of a run: whose it is, and whether it may be written."""

from pathlib import Path
from typing import Any

from forwardgrad._errors import InputError
from forwardgrad._files import read_json, write_json, writing
from forwardgrad.training._config import TrainConfig, as_json, differences

CONFIG, SUMMARY, CHECKPOINTS, CURVES = "config.json", "summary.json", "checkpoints", "curves.png"


def open_folder(config: TrainConfig) -> tuple[Path, dict[str, Any] | None]:
    """The folder that a run writes to, and its summary if it is finished already.

    **Raises:**

    `InputError` if the folder holds a run and `resume` is not set, a run with other settings, or
    files of something else.
    """
    folder = _choose(config)
    stored = folder / CONFIG
    if stored.exists():
        _check_same(folder, config)
        summary = folder / SUMMARY
        return folder, read_json(summary) if summary.exists() else None
    with writing(folder):
        occupied = folder.exists() and any(folder.iterdir())
    if occupied:
        raise InputError(f"out folder {folder} holds files but no {CONFIG}: it is not a run's")
    write_json(stored, as_json(config))
    return folder, None


def _choose(config: TrainConfig) -> Path:
    if config.out is not None:
        return config.out
    name = f"{config.dataset}-{config.network}-{config.algorithm}-{config.seed}".replace("/", "_")
    first = folder = Path("runs") / name
    number = 2
    while folder.exists() and not config.resume:
        folder = first.with_name(f"{name}-{number}")
        number += 1
    return folder


def _check_same(folder: Path, config: TrainConfig) -> None:
    if not config.resume:
        raise InputError(
            f"out folder {folder} already holds a run: pass --resume to continue it, or another "
            "--out"
        )
    stored = read_json(folder / CONFIG)
    if not isinstance(stored, dict):
        raise InputError(f"{folder / CONFIG} is damaged: expected a JSON object")
    different = differences(stored, config)
    if different:
        raise InputError(
            f"out folder {folder} holds a run with other settings: {'; '.join(different)}"
        )
