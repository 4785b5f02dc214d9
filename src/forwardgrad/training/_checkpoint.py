"""Checkpoints: arrays by Orbax, with digests of its files, so that damage is noticed."""

import errno
import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from forwardgrad._errors import InputError
from forwardgrad._files import read_json, write_json, writing
from forwardgrad.training._state import TrainState

KEEP = 2
"""Checkpoints of a run that are kept: the last, and one in case it gets damaged."""

DIGESTS = "digests.json"

SPARE = 2**18
"""Bytes beside the arrays that must be free for a checkpoint: its index, and whole blocks."""


class Checkpoints:
    """The checkpoints of one run, in a folder.

    **Arguments:**

    - `folder`: where they are, or will be.
    - `reads`: only; another process may be writing.
    """

    def __init__(self, folder: Path, *, reads: bool = False):
        self._folder = folder.absolute()
        # Orbax logs choices that are made for us, and a trace for every error that it raises too.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        with writing(folder):
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=KEEP,
                    enable_async_checkpointing=False,
                    cleanup_tmp_directories=not reads,
                    read_only=reads,
                ),
                item_names=("arrays", "meta"),
            )

    def save(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Store a state and what belongs to it, if that step is not stored yet."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        arrays = named_arrays(state)
        with writing(self._folder):
            self._check_space(sum(array.nbytes for array in arrays.values()))
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(progress)
                ),
            )
            self._manager.wait_until_finished()
        where = self._folder / str(step)
        write_json(where / DIGESTS, _digests(where))

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any], dict[int, str]] | None:
        """The newest intact state and what belongs to it; None if none was stored.

        **Returns:**

        Also, for each newer step, a sentence that says how its checkpoint is damaged.

        **Raises:**

        `InputError` if every checkpoint is damaged or belongs to something else.
        """
        problems = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return *self._restore(step, like), problems
            except InputError as error:
                problems[step] = str(error)
        if problems:
            raise InputError(
                f"no checkpoint in {self._folder} can be used ({'; '.join(problems.values())}); "
                "start anew with another --out"
            )
        return None

    def discard(self, step: int) -> None:
        """Remove a damaged checkpoint: Orbax would store no older step beside it."""
        with writing(self._folder):
            self._manager.delete(step)

    def close(self) -> None:
        """Let go of the folder."""
        self._manager.close()

    def _check_space(self, size: int) -> None:
        # Where the disk fills up under Orbax, its threads print traces that nobody can catch.
        if shutil.disk_usage(self._folder).free < size + SPARE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _check(self, where: Path) -> None:
        """Raise an `InputError` for a damaged checkpoint: Orbax's threads would print traces."""
        if not (where / DIGESTS).exists():
            return  # the process ended before it wrote them, and after the checkpoint was whole
        try:
            intact = _digests(where) == read_json(where / DIGESTS)
        except (InputError, OSError) as error:
            raise InputError(f"checkpoint {where} is damaged: it cannot be read") from error
        if not intact:
            raise InputError(f"checkpoint {where} is damaged: its contents have changed")

    def _restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        where = self._folder / str(step)
        self._check(where)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore()
                ),
            )
            arrays, meta = restored["arrays"], dict(restored["meta"])
        except Exception as error:
            raise InputError(f"checkpoint {where} is damaged: it cannot be read") from error
        expected = named_arrays(like)
        if {k: (v.shape, v.dtype) for k, v in expected.items()} != {
            k: (v.shape, v.dtype) for k, v in arrays.items()
        }:
            raise InputError(f"checkpoint {where} holds the arrays of another network or optimiser")
        leaves = [jax.numpy.asarray(arrays[name]) for name in expected]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), meta


def named_arrays(state: TrainState) -> dict[str, np.ndarray]:
    """The arrays of a state by their place in it."""
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in paths}


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint, but for the one that holds them."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != DIGESTS
    }
