"""The one training loop."""

import contextlib
import dataclasses
import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree
from rich.console import Console

from forwardgrad import __version__
from forwardgrad._errors import InputError
from forwardgrad._files import write_json, writing
from forwardgrad.training._algorithms import resolve
from forwardgrad.training._checkpoint import Checkpoints
from forwardgrad.training._config import TrainConfig
from forwardgrad.training._folder import (
    CHECKPOINTS,
    CURVES,
    SUMMARY,
    claim_folder,
    find_folder,
    load_config,
    locked,
    make_folder,
)
from forwardgrad.training._interrupt import Interrupted, StopRequest
from forwardgrad.training._metrics import Metrics, read_lines
from forwardgrad.training._plots import plot_curves
from forwardgrad.training._progress import Progress
from forwardgrad.training._run import Run
from forwardgrad.training._state import Feed, TrainState

CHUNK_SECONDS = 1.0
"""How long the compiled loop runs before it looks at signals, the clock and the terminal."""

DRAWS = 2
"""The version of how tangents and feedback weights are drawn, which a run keeps to its end."""


def fit(config: TrainConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Train a network, and leave everything about it in a folder.

    The folder gets `config.json`, `metrics.jsonl`, `summary.json`, `curves.png`, TensorBoard
    events and `checkpoints/`. A run that was interrupted, by whatever, and is continued with
    `resume` ends with the same bits as one that was not.

    **Arguments:**

    - `config`: the settings.
    - `console`: shows a progress line, if given.

    **Returns:**

    The summary, as in `summary.json`, and `"out"`, the folder.

    **Raises:**

    - `InputError` if a setting, a file or the folder cannot be used, or the loss is not finite.
    - `Interrupted` after SIGINT or SIGTERM, when a checkpoint has been written.
    """
    config = resolve(config)
    folder, finished = find_folder(config)
    if finished is not None:
        return {**finished, "out": str(folder), "was_finished": True}
    with Progress(console) as progress:
        progress.note(f"loading {config.dataset} ...")
        run = Run(config)
        with writing(folder):
            folder = make_folder(config, folder)
        with locked(folder):
            # Another process may have had it while the data were read.
            _, finished = find_folder(dataclasses.replace(config, out=folder))
            if finished is not None:
                return {**finished, "out": str(folder), "was_finished": True}
            claim_folder(folder, config)
            with contextlib.closing(_Session(config, folder, run, progress)) as session:
                session.train()
                return session.finish()


def load_run(
    folder: Path | str, *, data_dir: Path | str | None = None
) -> tuple[TrainConfig, eqx.Module]:
    """The settings of a run and its network, from the last checkpoint.

    **Arguments:**

    - `folder`: the run's, as `fit` left it; finished or not.
    - `data_dir`: as in `TrainConfig`, if the data are no longer where the run had them. They say
        what images and classes the network is for.

    **Returns:**

    The settings, and the network: to be called on float images [batch, height, width, channels],
    normalised as the settings say.

    **Raises:**

    `InputError` if the folder holds no run or no checkpoint, or all are damaged.
    """
    config, run, params = restored(Path(folder), data_dir)
    return config, run.network(params)


def restored(folder: Path, data_dir: Path | str | None) -> tuple[TrainConfig, Run, PyTree]:
    """The settings of the run in a folder, the run made ready, and its last parameters.

    **Raises:**

    `InputError` if the folder holds no run or no checkpoint, or all are damaged.
    """
    config = load_config(folder)
    if data_dir is not None:
        config = dataclasses.replace(config, data_dir=Path(data_dir))
    if not (folder / CHECKPOINTS).is_dir():
        raise InputError(f"folder {folder} holds no checkpoint yet")
    run = Run(config)
    with contextlib.closing(Checkpoints(folder / CHECKPOINTS, reads=True)) as checkpoints:
        found = checkpoints.restore(run.state)
    if found is None:
        raise InputError(f"folder {folder} holds no checkpoint yet")
    return config, run, found[0].params


class _Session:
    """One process's share of a run: from a checkpoint, or the start, to an end or the next."""

    def __init__(self, config: TrainConfig, folder: Path, run: Run, progress: Progress):
        self.config, self.folder, self.run, self.progress = config, folder, run, progress
        self.checkpoints = Checkpoints(folder / CHECKPOINTS)
        self.state, self.seconds, lines = run.state, 0.0, []
        restored = self.checkpoints.restore(run.state)
        if restored is not None and restored[1].get("draws") != DRAWS:
            raise InputError(
                f"the checkpoint in {folder / CHECKPOINTS} is of an earlier version of "
                "forwardgrad, which drew other tangents and feedback weights, so that this one "
                "cannot continue the run: start anew with another --out"
            )
        if restored is not None:
            self.state, stored, problems = restored
            self.seconds = stored["seconds"]
            lines = read_lines(folder, stored["lines"])
            for step, problem in problems.items():
                progress.note(f"{problem}; continuing from an older one")
                self.checkpoints.discard(step)
        self.step = int(self.state.step)
        self.metrics = Metrics(folder, lines)
        self.saved_at = time.monotonic()
        self.pace = CHUNK_SECONDS

    def train(self) -> None:
        """Take the state to the last step."""
        self.progress.start(self.step, self.run.steps, self.run.steps_per_epoch)
        with StopRequest() as stop:
            for feed, start, end in self._chunks():
                began = time.monotonic()
                self.state = self.run.advance(self.state, feed, start, end)
                losses = np.asarray(self.state.losses)
                elapsed = time.monotonic() - began
                self.seconds += elapsed
                self.step += end - start
                self.pace = elapsed / (end - start)
                self._check_finite(losses, end - start)
                self._report(losses)
                if stop.signum is not None:
                    self._stop(stop.signum)
                if time.monotonic() - self.saved_at > self.config.checkpoint_every:
                    self._save()

    def finish(self) -> dict[str, Any]:
        """Measure the final errors, and write the summary and the picture."""
        self._save()
        last = self.metrics.lines[-1]
        epochs = self.step / self.run.steps_per_epoch
        summary = {
            "task": self.config.task,
            "algorithm": self.config.algorithm,
            "network": self.config.network,
            "dataset": self.config.dataset,
            "epochs": int(epochs) if epochs.is_integer() else epochs,
            "steps": self.step,
            "seed": self.config.seed,
            "parameters": self.run.parameters,
            "test_error": last["test_error"],
            "train_error": self.run.train_error(self.state.params),
            "train_loss": last["loss"],
            "seconds": self.seconds,
            "backend": jax.default_backend(),
            "jax_version": jax.__version__,
            "forwardgrad_version": __version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        title = f"{self.config.algorithm}, {self.config.network}, {self.config.dataset}"
        plot_curves(self.folder / CURVES, self.metrics.lines, title)
        # Last: a run is finished when its summary is there.
        write_json(self.folder / SUMMARY, summary)
        return {**summary, "out": str(self.folder), "was_finished": False}

    def close(self) -> None:
        """Let go of the files."""
        self.metrics.close()
        self.checkpoints.close()

    def _chunks(self) -> Iterator[tuple[Feed, int, int]]:
        """Feeds with ranges of steps in them, each about `CHUNK_SECONDS` long."""
        count, compiled = 1, False
        while self.step < self.run.steps:
            for feed, start, stop in self.run.feeds.epoch(
                *divmod(self.step, self.run.steps_per_epoch)
            ):
                if not compiled:
                    # No steps: compiles, and so keeps that out of the run's seconds.
                    self.state, compiled = self.run.advance(self.state, feed, start, start), True
                while start < stop and self.step < self.run.steps:
                    end = start + min(count, stop - start, self._steps_to_next_line())
                    yield feed, start, end
                    count = max(1, min(2 * count, int(CHUNK_SECONDS / self.pace)))
                    start = end
                if self.step == self.run.steps:
                    return

    def _steps_to_next_line(self) -> int:
        left = self.run.steps - self.step
        if self.config.log_every is None:
            return left
        return min(left, self.config.log_every - self.step % self.config.log_every)

    def _check_finite(self, losses: np.ndarray, count: int) -> None:
        steps = np.arange(self.step - count, self.step)
        values = losses[steps % self.run.steps_per_epoch]
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise self._diverged(f"the loss is {values[bad[0]]} at step {steps[bad[0]]}")

    def _diverged(self, what: str) -> InputError:
        self.metrics.add({**self._place("diverged"), "reason": what})
        return InputError(
            f"{what}, the run diverged: try a learning_rate below {self.config.learning_rate} or a "
            f"smaller clip; the last finite checkpoint is kept in {self.folder / CHECKPOINTS}"
        )

    def _report(self, losses: np.ndarray) -> None:
        position = (self.step - 1) % self.run.steps_per_epoch + 1
        every = self.config.log_every
        if every is not None and self.step % every == 0:
            count = min(every, self.run.steps_per_epoch)
            recent = losses[np.arange(self.step - count, self.step) % self.run.steps_per_epoch]
            self.metrics.add(self._line("steps", float(np.mean(recent))))
        if position == self.run.steps_per_epoch or self.step == self.run.steps:
            self._report_epoch(losses[:position], position)
        self.progress.update(self.step, float(np.mean(losses[:position])))

    def _report_epoch(self, losses: np.ndarray, position: int) -> None:
        line = self._line("epoch", float(np.mean(losses)))
        wrong = int(np.sum(np.asarray(self.state.errors)[:position]))
        line["train_error"] = 100.0 * wrong / (position * self.run.examples_per_step)
        epoch = -(-self.step // self.run.steps_per_epoch)
        if epoch % self.config.eval_every == 0 or self.step == self.run.steps:
            line["test_error"] = self.run.test_error(self.state.params)
            self.progress.error = line["test_error"]
        self.metrics.add(line)

    def _line(self, event: str, loss: float) -> dict[str, Any]:
        rate = float(np.asarray(self.run.learning_rate(self.step)))
        return {**self._place(event), "loss": loss, "learning_rate": rate}

    def _place(self, event: str) -> dict[str, Any]:
        epoch = self.step / self.run.steps_per_epoch
        return {"event": event, "epoch": epoch, "step": self.step, "seconds": self.seconds}

    def _stop(self, signum: int) -> None:
        self._save()
        raise Interrupted(
            f"stopped at step {self.step} of {self.run.steps}; the checkpoint is in "
            f"{self.folder / CHECKPOINTS}, and --resume --out {self.folder} continues the run",
            signum,
        )

    def _save(self) -> None:
        if not all(np.isfinite(leaf).all() for leaf in _parameters(self.state)):
            raise self._diverged(f"the parameters are not finite after step {self.step}")
        progress = {"draws": DRAWS, "seconds": self.seconds, "lines": len(self.metrics.lines)}
        self.checkpoints.save(self.state, progress)
        self.saved_at = time.monotonic()


def _parameters(state: TrainState) -> Iterator[np.ndarray]:
    return (np.asarray(leaf) for leaf in jax.tree.leaves(state.params))
