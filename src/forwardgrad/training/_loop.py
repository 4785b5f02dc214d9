"""The one training loop."""

import contextlib
import dataclasses
import importlib.metadata
import time
from collections.abc import Iterator
from os.path import lexists
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree
from rich.console import Console

from forwardgrad._errors import DivergedError, InputError
from forwardgrad._files import write_text, writing
from forwardgrad.data import Dataset, Text
from forwardgrad.results import Measurement, Summary, read_lines, save, write
from forwardgrad.training._batches import Evaluation, Feed
from forwardgrad.training._checkpoint import Checkpoints, Progressed
from forwardgrad.training._config import TrainConfig, of_the_result, options_of
from forwardgrad.training._devices import Devices
from forwardgrad.training._folder import (
    CHECKPOINTS,
    CONFIG,
    CURVES,
    METRICS,
    SAMPLE,
    SUMMARY,
    Run,
    check_text,
    find_folder,
    load_config,
    locked,
    make_folder,
    read_run,
)
from forwardgrad.training._interrupt import Interrupted, StopRequest
from forwardgrad.training._metrics import Metrics, curves
from forwardgrad.training._precision import products_of
from forwardgrad.training._progress import Progress
from forwardgrad.training._setup import Setup, digest
from forwardgrad.training._state import TrainState

CHUNK_SECONDS = 1.0
"""How long the compiled loop runs before it looks at signals, the clock and the terminal."""

DRAWS = 3
"""The version of how tangents and feedback weights are drawn, which a run keeps to its end."""


def fit(
    config: TrainConfig, *, console: Console | None = None, devices: Devices | None = None
) -> Run:
    """Train a network, and leave everything about it in a folder.

    The folder gets `config.json`, `metrics.jsonl`, `summary.json`, `curves.png`, TensorBoard
    events and `checkpoints/`. A run that was interrupted, by whatever, and is continued with
    `resume` ends with the same bits as one that was not.

    **Arguments:**

    - `config`: the settings.
    - `console`: shows a progress line, if given.
    - `devices`: those that share the work, of one process or several, which then all call this
        with the same settings. Default: one. Any number continues a run of any other.

    **Returns:**

    The run, whose `result` is what `summary.json` holds.

    **Raises:**

    - `InputError` if a setting, a file or the folder cannot be used, or the loss is not finite.
    - `Interrupted` after SIGINT or SIGTERM, when a checkpoint has been written.
    """
    devices, products = devices or Devices(), products_of(config.precision)
    with devices.watched(), products, Progress(console) as progress:
        devices.check_equal(_version_and_settings(config))
        folder, finished = devices.first(lambda: _look(config), tuple[Path, bool])
        if finished:
            progress.note(f"The run in {folder} is finished already.")
            return _finished(config, folder, devices)
        progress.note(f"loading {config.dataset} ...")
        setup = devices.together(lambda: Setup(config, devices))
        devices.check_equal({"the data set": digest(setup.data) if devices.processes > 1 else ""})
        with contextlib.ExitStack() as stack:
            folder, finished = devices.first(
                lambda: _claim(config, folder, setup.data, stack), tuple[Path, bool]
            )
            if finished:
                return _finished(config, folder, devices)
            session = stack.enter_context(
                contextlib.closing(_Session(config, folder, setup, progress))
            )
            session.train()
            return session.finish()


def _version_and_settings(config: TrainConfig) -> dict[str, Any]:
    """What all processes of a run have to have in common."""
    options = {name: str(value) for name, value in of_the_result(config).items()}
    ours = importlib.metadata.version("forwardgrad")
    versions = {"the version of forwardgrad": ours, "the version of JAX": jax.__version__}
    return {**versions, "the number of devices": jax.local_device_count(), **options}


def _look(config: TrainConfig) -> tuple[Path, bool]:
    """The folder of a run, and whether the run in it is finished."""
    folder, finished = find_folder(config)
    return folder, finished is not None


def _claim(
    config: TrainConfig, folder: Path, data: Dataset | Text, stack: contextlib.ExitStack
) -> tuple[Path, bool]:
    """The folder made, and held as long as the stack; and whether the run in it is finished."""
    with writing(folder):
        folder = make_folder(config, folder)
    stack.enter_context(locked(folder))
    # Another process may have had it while the data were read.
    _, finished = find_folder(dataclasses.replace(config, out=folder))
    if finished is None and not lexists(folder / CONFIG):
        write(folder / CONFIG, options_of(config))
    if finished is None:
        check_text(folder, data, keeps=True)
    return folder, finished is not None


def _finished(config: TrainConfig, folder: Path, devices: Devices) -> Run:
    """The finished run of a folder, which only one process may be able to read."""
    summary = devices.first(lambda: read_run(folder)[0].result, Summary)
    return read_run(folder)[0] if devices.leads else Run(folder, config, (), summary)


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
    normalised as the settings say, or on tokens [batch, context].

    **Raises:**

    `InputError` if the folder holds no run or no checkpoint, or all are damaged.
    """
    config, setup, params = restored(Path(folder), data_dir)
    return config, setup.network(params)


def restored(folder: Path, data_dir: Path | str | None) -> tuple[TrainConfig, Setup, PyTree]:
    """The settings of the run in a folder, the run made ready, and its last parameters.

    **Raises:**

    `InputError` if the folder holds no run or no checkpoint, or all are damaged.
    """
    config = load_config(folder)
    if data_dir is not None:
        config = dataclasses.replace(config, data_dir=Path(data_dir))
    if not (folder / CHECKPOINTS).is_dir():
        raise InputError(f"folder {folder} holds no checkpoint yet")
    setup = Setup(config)
    check_text(folder, setup.data, keeps=False)
    with contextlib.closing(Checkpoints(folder / CHECKPOINTS, reads=True)) as checkpoints:
        found = checkpoints.restore(setup.state)
    if found is None:
        raise InputError(f"folder {folder} holds no checkpoint yet")
    return config, setup, found.state.params


_OF_THE_CONFIG = ("task", "algorithm", "network", "dataset", "seed")


class _Session:
    """A process's share of a run: from a checkpoint, or the start, to an end or the next.

    Of several processes, each computes its part, and the first one reads and writes the folder.
    """

    def __init__(self, config: TrainConfig, folder: Path, setup: Setup, progress: Progress):
        self.config, self.folder, self.setup, self.progress = config, folder, setup, progress
        self.devices = setup.devices
        self.checkpoints: Checkpoints | None = None
        self.metrics: Metrics | None = None
        self.state, self.stored = setup.state, setup.state
        self.seconds, lines, self.begun = self.devices.first(
            self._open, tuple[float, tuple[Measurement, ...], bool]
        )
        self.lines = list(lines)
        self.state = self.devices.whole(sent(self.devices, self.stored))
        self.step = int(self.state.step)
        self.saved_at = time.monotonic()
        self.pace = CHUNK_SECONDS

    def _open(self) -> tuple[float, tuple[Measurement, ...], bool]:
        """Read the last checkpoint, and be ready to write.

        Returns the seconds and the lines up to it, and whether the estimator has begun there.
        """
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, keep=self.config.keep_checkpoints)
        seconds, lines, begun = 0.0, (), False
        if (found := self.checkpoints.restore(self.setup.state)) is not None:
            self._check_draws(found.progress.draws)
            self.stored, begun = found.state, found.remembers
            seconds = found.progress.seconds
            lines = self._lines_before(found.progress.lines)
            for step, problem in found.damaged.items():
                self.progress.note(f"{problem}; continuing from an older one")
                self.checkpoints.discard(step)
        self.metrics = Metrics(self.folder, lines)
        return seconds, lines, begun

    def train(self) -> None:
        """Take the state to the last step."""
        self.progress.start(
            self.step, self.setup.steps, self.setup.steps_per_epoch, self.setup.tokens_per_step
        )
        with StopRequest() as stop:
            for feed, start, end in self._chunks():
                began = time.monotonic()
                self.state = self.setup.advance(self.state, feed, start, end)
                losses = np.asarray(self.state.losses)
                elapsed = time.monotonic() - began
                self.seconds += elapsed
                self.step += end - start
                self._check_finite(losses, end - start)
                self._report(losses)
                late = time.monotonic() - self.saved_at > self.config.checkpoint_every
                # What clocks and signals say must be the same in all processes.
                self.pace, late, signum = self.devices.most(
                    elapsed / (end - start), late, stop.signum or 0
                )
                if signum:
                    self._stop(int(signum))
                if late:
                    self._save()

    def finish(self) -> Run:
        """Measure the final errors, and write the sample, the picture and the summary."""
        self._save(wait=True)
        train_error = self.setup.on_train(self.state.params).error
        measure = self.setup.on_validation
        validation = None if measure is None else measure(self.state.params)
        summary = self.devices.first(lambda: self._write_summary(train_error, validation), Summary)
        return Run(self.folder, self.config, tuple(self.lines), summary)

    def _write_summary(self, train_error: float, validation: Evaluation | None) -> Summary:
        config, lines = self.config, tuple(self.lines)
        assert lines[-1].test_error is not None
        assert lines[-1].loss is not None
        epochs = self.step / self.setup.steps_per_epoch
        summary = Summary.here(
            **{name: getattr(config, name) for name in _OF_THE_CONFIG},
            epochs=int(epochs) if epochs.is_integer() else epochs,
            steps=self.step,
            parameters=self.setup.parameters,
            test_error=lines[-1].test_error,
            train_error=train_error,
            train_loss=lines[-1].loss,
            test_loss=lines[-1].test_loss,
            bits_per_character=lines[-1].bits_per_character,
            validation_loss=None if validation is None else validation.loss,
            validation_error=None if validation is None else validation.error,
            seconds=self.seconds,
        )
        if self.setup.tokens_per_step is not None:
            write_text(self.folder / SAMPLE, self.setup.sample(self.state.params))
        title = f"{config.algorithm}, {config.network}, {config.dataset}"
        save(curves(lines, title), self.folder / CURVES)
        # Last: a run is finished when its summary is there.
        write(self.folder / SUMMARY, summary)
        return summary

    def close(self) -> None:
        """Let go of the files."""
        for held in filter(None, (self.metrics, self.checkpoints)):
            held.close()

    def _check_draws(self, draws: int) -> None:
        if draws != DRAWS:
            raise InputError(
                f"the checkpoint in {self.folder / CHECKPOINTS} is of an earlier version of "
                "forwardgrad, which drew other tangents and feedback weights, so that this one "
                "cannot continue the run: start anew with another --out"
            )

    def _lines_before(self, count: int) -> tuple[Measurement, ...]:
        """The metrics that the checkpoint knows of; what came after it is done again."""
        lines, problem = read_lines(self.folder / METRICS, Measurement)
        if len(lines) < count:
            raise problem or InputError(
                f"{self.folder / METRICS} is damaged: expected {count} lines, got {len(lines)}"
            )
        return lines[:count]

    def _chunks(self) -> Iterator[tuple[Feed, int, int]]:
        """Feeds with ranges of steps in them, each about `CHUNK_SECONDS` long."""
        count, compiled = 1, False
        while self.step < self.setup.steps:
            for feed, start, stop in self.setup.feeds(
                *divmod(self.step, self.setup.steps_per_epoch)
            ):
                if not compiled:
                    if not self.begun:
                        self.state = self.setup.begin(self.state, feed, start)
                    # No steps: compiles, and so keeps that out of the run's seconds.
                    self.state, compiled = self.setup.advance(self.state, feed, start, start), True
                while start < stop and self.step < self.setup.steps:
                    end = start + min(count, stop - start, self._steps_to_next_line())
                    yield feed, start, end
                    count = max(1, min(2 * count, int(CHUNK_SECONDS / self.pace)))
                    start = end
                if self.step == self.setup.steps:
                    return

    def _steps_to_next_line(self) -> int:
        left = self.setup.steps - self.step
        every = self.config.line_every
        return left if every is None else min(left, every - self.step % every)

    def _check_finite(self, losses: np.ndarray, count: int) -> None:
        steps = np.arange(self.step - count, self.step)
        values = losses[steps % self.setup.steps_per_epoch]
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise self._diverged(f"the loss is {values[bad[0]]} at step {steps[bad[0]]}")

    def _diverged(self, what: str) -> DivergedError:
        self._add("diverged", reason=what)
        rate = self.config.optimisation.learning_rate
        return DivergedError(
            f"{what}, the run diverged: try a learning_rate below {rate} or a "
            f"smaller clip; the last finite checkpoint is kept in {self.folder / CHECKPOINTS}"
        )

    def _report(self, losses: np.ndarray) -> None:
        position = (self.step - 1) % self.setup.steps_per_epoch + 1
        every = self.config.line_every
        if every is not None and self.step % every == 0:
            count = min(every, self.setup.steps_per_epoch)
            recent = losses[np.arange(self.step - count, self.step) % self.setup.steps_per_epoch]
            evaluates = self.config.eval_steps and self.step % self.config.eval_steps == 0
            tested = self._tested() if evaluates else {}
            self._add("steps", loss=float(np.mean(recent)), learning_rate=self._rate(), **tested)
        if position == self.setup.steps_per_epoch or self.step == self.setup.steps:
            self._report_epoch(losses[:position], position)
        self.progress.update(self.step, float(np.mean(losses[:position])))

    def _report_epoch(self, losses: np.ndarray, position: int) -> None:
        wrong = int(np.sum(np.asarray(self.state.errors)[:position]))
        epoch, tested = -(-self.step // self.setup.steps_per_epoch), {}
        if epoch % self.config.eval_every == 0 or self.step == self.setup.steps:
            tested = self._tested()
        self._add(
            "epoch",
            loss=float(np.mean(losses)),
            learning_rate=self._rate(),
            train_error=100.0 * wrong / (position * self.setup.predictions_per_step),
            **tested,
        )

    def _tested(self) -> dict[str, Any]:
        """What the network makes of the test set now."""
        error, loss = self.setup.on_test(self.state.params)
        self.progress.measured, bits = f" error {error:.2f} %", None
        if isinstance(self.setup.data, Text):
            bits = self.setup.data.bits_per_character(loss)
            self.progress.measured += f" {bits:.3f} bits/character"
        return {"test_error": error, "test_loss": loss, "bits_per_character": bits}

    def _rate(self) -> float:
        return float(np.asarray(self.setup.learning_rate(self.step)))

    def _add(self, event: str, **fields: Any) -> None:
        epoch = self.step / self.setup.steps_per_epoch
        place = {"epoch": epoch, "step": self.step, "seconds": self.seconds}
        self.lines.append(line := Measurement(event=event, **place, **fields))
        self.devices.first(lambda: self.metrics and self.metrics.add(line))

    def _stop(self, signum: int) -> None:
        self._save(wait=True)
        raise Interrupted(
            f"stopped at step {self.step} of {self.setup.steps}; the checkpoint is in "
            f"{self.folder / CHECKPOINTS}, and --resume --out {self.folder} continues the run",
            signum,
        )

    def _save(self, *, wait: bool = False) -> None:
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(self.state.params)):
            raise self._diverged(f"the parameters are not finite after step {self.step}")
        self.devices.first(lambda: self._store(wait))
        self.saved_at = time.monotonic()

    def _store(self, wait: bool) -> None:
        assert self.checkpoints is not None
        progress = Progressed(DRAWS, self.seconds, len(self.lines))
        self.checkpoints.save(self.state, progress)
        if wait:
            self.checkpoints.settle()


def sent(devices: Devices, state: TrainState) -> TrainState:
    """The state that the first process has."""
    if devices.processes == 1:
        return state
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, state))
    data = devices.sent(b"".join(leaf.tobytes() for leaf in leaves))
    ends = np.cumsum([leaf.nbytes for leaf in leaves])[:-1]
    parts = np.split(np.frombuffer(data, np.uint8), ends)
    arrays = [
        part.view(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)
