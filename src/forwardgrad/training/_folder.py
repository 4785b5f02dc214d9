"""The folder of a run: whose it is, whether it may be written, and what it holds."""

import contextlib
import dataclasses
import shlex
from collections.abc import Iterator, Mapping, Sequence
from os.path import lexists
from pathlib import Path
from typing import Any, Literal

import filelock

from forwardgrad._errors import InputError
from forwardgrad._files import writing
from forwardgrad.data import Dataset, Text
from forwardgrad.results import Measurement, Summary, read, read_lines, write
from forwardgrad.training._config import (
    TrainConfig,
    differences,
    fitting,
    not_default,
)

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
CHECKPOINTS, CURVES, SAMPLE = "checkpoints", "curves.png", "sample.txt"
TEXT = "text.json"
LOCK = ".lock"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its folder has it.

    **Arguments:**

    - `folder`: of the run.
    - `config`: its settings.
    - `measurements`: the lines of its metrics.
    - `summary`: what it ended with; None if it is not finished.
    """

    folder: Path
    config: TrainConfig
    measurements: tuple[Measurement, ...]
    summary: Summary | None

    @property
    def result(self) -> Summary:
        """What the run ended with.

        **Raises:**

        `InputError` if it is not finished.
        """
        if self.summary is None:
            raise InputError(
                f"the run in {self.folder} is not finished: continue it with {self.command}"
            )
        return self.summary

    @property
    def command(self) -> str:
        """What continues the run, with those of its settings that are not the defaults."""
        given = {**not_default(self.config), "out": self.folder, "resume": True}
        return command(["train"], given)

    @property
    def state(self) -> Literal["finished", "diverged", "unfinished"]:
        """How far it got."""
        if self.summary is not None:
            return "finished"
        diverged = self.measurements and self.measurements[-1].event == "diverged"
        return "diverged" if diverged else "unfinished"


def read_run(folder: Path | str) -> tuple[Run, tuple[InputError, ...]]:
    """The run in a folder, and what is damaged of it besides its settings.

    Of metrics the lines before the first that is damaged are taken, and a summary that is damaged
    counts as none.

    **Raises:**

    `InputError` if the folder holds no run, or its settings are damaged.
    """
    folder, problems = Path(folder), []
    config, summary, lines = load_config(folder), None, ()
    if lexists(folder / METRICS):
        lines, problem = read_lines(folder / METRICS, Measurement)
        problems += [problem] if problem else []
    if lexists(folder / SUMMARY):
        try:
            summary = read(folder / SUMMARY, Summary)
        except InputError as error:
            problems.append(error)
    return Run(folder, config, lines, summary), tuple(problems)


def load_config(folder: Path) -> TrainConfig:
    """The settings of the run in a folder; one that it did not know yet has its default.

    Earlier versions stored the options of all algorithms, and at first not all of its own.

    **Raises:**

    `InputError` if it holds no run, or the file is damaged.
    """
    path = folder / CONFIG
    if not lexists(path):
        raise InputError(f"folder {folder} holds no run: {path} is missing")
    stored = read(path, dict[str, Any])
    try:
        return fitting(**{"exact_last": False, "normalise_features": False, **stored})
    except InputError as error:
        raise InputError(f"{path} is damaged or of another version: {error}") from error


def find_folder(config: TrainConfig) -> tuple[Path, Run | None]:
    """The folder that a run will write to, and the run in it if that is finished already.

    Nothing is written: the data and the network may still turn out not to be usable.

    **Raises:**

    `InputError` if the folder holds a run and `resume` is not set, a run with other settings, or
    files of something else.
    """
    folder = _choose(config)
    if lexists(folder / CONFIG):
        _check_same(folder, config)
        if not lexists(folder / SUMMARY):
            return folder, None
        run, problems = read_run(folder)
        for problem in problems:
            raise problem
        return folder, run
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


def check_text(folder: Path, data: Dataset | Text, *, keeps: bool) -> None:
    """Compare a run's text with the one that it had at its start, which `keeps` notes down.

    **Raises:**

    `InputError` if it is another text, or its tokens are others.
    """
    path = folder / TEXT
    if not isinstance(data, Text):
        return
    if keeps and not lexists(path):
        write(path, {"digest": data.digest})
    if lexists(path) and read(path, dict[str, Any]).get("digest") != data.digest:
        raise InputError(
            f"the run in {folder} is of another text than {data.name!r} is now: its documents, its "
            "tokenizer or, of 'text', the version of Python has changed"
        )


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


def command(words: Sequence[str], options: Mapping[str, Any]) -> str:
    """A line for the shell.

    >>> command(["reproduce", "table3"], {"columns": ["mnist"], "batch_size": 128, "resume": True})
    'forwardgrad reproduce table3 --columns mnist --batch-size 128 --resume'
    """
    return shlex.join(["forwardgrad", *words, *(w for o in options.items() for w in _words(*o))])


def _words(name: str, value: Any) -> Iterator[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        yield f"--{flag}" if value else f"--no-{flag}"
    elif isinstance(value, list | tuple):
        yield from (f"--{flag}", *map(str, value))
    elif str(value).startswith("-"):
        # A value that looks like an option has to be joined to its name.
        yield f"--{flag}={value}"
    else:
        yield from (f"--{flag}", str(value))
