"""The folder of a run: whose it is, and whether it may be written."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from forwardgrad._errors import InputError
from forwardgrad._files import read_json, write_json, writing
from forwardgrad.training._config import TrainConfig, as_json, differences, from_json

CONFIG, SUMMARY, CHECKPOINTS, CURVES = "config.json", "summary.json", "checkpoints", "curves.png"
LOCK = ".lock"


def find_folder(config: TrainConfig) -> tuple[Path, dict[str, Any] | None]:
    """The folder that a run will write to, and its summary if it is finished already.

    Nothing is written: the data and the network may still turn out not to be usable.

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
        # A write that was cut short leaves a hidden file, and the folder as good as new.
        occupied = folder.exists() and any(f.name[0] != "." for f in folder.iterdir())
    if occupied:
        raise InputError(f"out folder {folder} holds files but no {CONFIG}: it is not a run's")
    return folder, None


def make_folder(config: TrainConfig, folder: Path) -> Path:
    """The folder, or the next one if another process has just made the one without a given name."""
    new = config.out is None and not config.resume
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=not new)
            return folder
        except FileExistsError:
            if not new:
                raise
            folder = _choose(config)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; the operating system ends this with the process.

    **Raises:**

    `InputError` if another process is at work in it.
    """
    with writing(folder):
        try:
            lock = filelock.FileLock(folder / LOCK, timeout=0)
            lock.acquire()
        except filelock.Timeout as error:
            raise InputError(
                f"out folder {folder} is in use: another process trains this run now"
            ) from error
    try:
        yield
    finally:
        lock.release()


def claim_folder(folder: Path, config: TrainConfig) -> None:
    """Make the folder this run's, unless it is already."""
    if not (folder / CONFIG).exists():
        write_json(folder / CONFIG, as_json(config))


def load_config(folder: Path) -> TrainConfig:
    """The settings of the run in a folder.

    **Raises:**

    `InputError` if it holds no run, or the file is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"folder {folder} holds no run: {path} is missing")
    return from_json(read_json(path), path)


def _choose(config: TrainConfig) -> Path:
    if config.out is not None:
        return config.out
    task = "" if config.task == "supervised" else f"{config.task}-"
    name = f"{task}{config.dataset}-{config.network}-{config.algorithm}-{config.seed}"
    name = name.replace("/", "_")
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
    different = differences(load_config(folder), config)
    if different:
        raise InputError(
            f"out folder {folder} holds a run with other settings: {'; '.join(different)}"
        )
