"""Checkpoints: arrays by Orbax, with digests of its files, so that damage is noticed."""

import dataclasses
import errno
import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp

from forwardgrad._errors import InputError
from forwardgrad._files import writing
from forwardgrad.results import read, write
from forwardgrad.training._state import TrainState

DIGESTS = "digests.json"

LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""Files that Orbax writes when all others are there; it needs neither to read a checkpoint."""

SPARE = 2**18
"""Bytes beside the arrays that must be free for a checkpoint: its index, and whole blocks."""


@dataclasses.dataclass(frozen=True)
class Progressed:
    """What belongs to a state: the version of its draws, its seconds, and its lines of metrics."""

    draws: int
    seconds: float
    lines: int


class Restored(NamedTuple):
    """A state and what belongs to it; and how newer ones are damaged, by their steps.

    `remembers` says whether what the estimator remembers is in the state, or only room for it.
    """

    state: TrainState
    progress: Progressed
    remembers: bool
    damaged: dict[int, str]


class Checkpoints:
    """The checkpoints of one run, in a folder.

    **Arguments:**

    - `folder`: where they are, or will be.
    - `keep`: how many of the last are kept.
    - `reads`: only; another process may be writing.
    """

    def __init__(self, folder: Path, *, keep: int = 1, reads: bool = False):
        self._folder = folder.absolute()
        self._saving: int | None = None
        for path in folder.rglob("*"):
            # Orbax would wait for a pipe.
            if not (path.is_file() or path.is_dir()):
                raise InputError(f"checkpoint {path} is damaged: expected a file")
        # Orbax logs choices that are made for us, and a trace for every error that it raises too.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        with writing(folder):
            if not reads:
                self._folder.mkdir(exist_ok=True)
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
                    cleanup_tmp_directories=not reads,
                    read_only=reads,
                    create=False,  # which Orbax wants where not all processes take part
                    multiprocessing_options=ocp.options.MultiprocessingOptions(
                        primary_host=0, active_processes={0}
                    ),
                ),
                item_names=("arrays", "meta"),
            )

    def save(self, state: TrainState, progress: Progressed) -> None:
        """Store a state and what belongs to it, if that step is not stored yet.

        A copy is written while the training goes on; `settle` waits for it. What went wrong with
        one is raised by the next call of either.
        """
        self.settle()
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        # Copies: the next step overwrites what it is given.
        arrays = {name: array.copy() for name, array in named_arrays(state).items()}
        with writing(self._folder):
            self._check_space(sum(array.nbytes for array in arrays.values()))
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(vars(progress))
                ),
            )

    def settle(self) -> None:
        """Wait until what was to be saved is."""
        with writing(self._folder):
            self._manager.wait_until_finished()

    def _seal(self) -> None:
        """Add the digests, in Orbax's thread, when all is written and has not its name yet."""
        (where,) = self._folder.glob(f"{self._saving}.*tmp*")
        write(where / DIGESTS, _digests(where))

    def restore(self, like: TrainState) -> Restored | None:
        """The newest intact state; None if none was stored.

        **Raises:**

        `InputError` if every checkpoint is damaged or belongs to something else.
        """
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return Restored(*self._restore(step, like), damaged)
            except InputError as error:
                damaged[step] = str(error)
        if damaged:
            raise InputError(
                f"no checkpoint in {self._folder} can be used ({'; '.join(damaged.values())}); "
                "start anew with another --out"
            )
        return None

    def discard(self, step: int) -> None:
        """Remove a damaged checkpoint: Orbax would store no older step beside it."""
        with writing(self._folder):
            self._manager.delete(step)

    def close(self) -> None:
        """Let go of the folder."""
        with writing(self._folder):
            self._manager.close()

    def _check_space(self, size: int) -> None:
        # Where the disk fills up under Orbax, its threads print traces that nobody can catch.
        if shutil.disk_usage(self._folder).free < size + SPARE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _check(self, where: Path) -> None:
        """Raise an `InputError` for a damaged checkpoint: Orbax's threads would print traces."""
        if not (where / DIGESTS).exists():
            return  # earlier versions wrote them last, and may have ended before
        try:
            stored = read(where / DIGESTS, dict[str, str])
            intact = _digests(where).items() == {
                (name, value) for name, value in stored.items() if Path(name).name not in LATER
            }
        except (InputError, OSError) as error:
            raise InputError(f"checkpoint {where} is damaged: it cannot be read") from error
        if not intact:
            raise InputError(f"checkpoint {where} is damaged: its contents have changed")

    def _restore(self, step: int, like: TrainState) -> tuple[TrainState, Progressed, bool]:
        where = self._folder / str(step)
        self._check(where)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()
                ),
            )
            arrays, meta = restored["arrays"], restored["meta"]
            # The first versions of the package had no number for their draws.
            progress = msgspec.convert({"draws": 0, **meta}, Progressed)
        except Exception as error:
            raise InputError(f"checkpoint {where} is damaged: it cannot be read") from error
        expected = named_arrays(like)
        # Earlier versions drew feedback weights in every step, and remembered nothing.
        stateless = {k: v for k, v in expected.items() if not k.startswith(".estimator")}
        remembers = arrays.keys() != stateless.keys()
        wanted = expected if remembers else stateless
        if {k: (v.shape, v.dtype) for k, v in wanted.items()} != {
            k: (v.shape, v.dtype) for k, v in arrays.items()
        }:
            raise InputError(f"checkpoint {where} holds the arrays of another network or optimiser")
        leaves = [jax.numpy.asarray(arrays.get(name, own)) for name, own in expected.items()]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), progress, remembers


def named_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """The arrays of a state by their place in it."""
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in paths}


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint, but for the one that holds them."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in (DIGESTS, *LATER)
    }
