"""What a run reports: JSON lines, the same for TensorBoard, and a picture of them."""

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from forwardgrad._files import write_text, writing
from forwardgrad.results import Measurement, as_line, fields
from forwardgrad.results._figures import panels
from forwardgrad.training._folder import METRICS


class Metrics:
    """The lines of `metrics.jsonl`, and the same numbers for TensorBoard.

    **Arguments:**

    - `folder`: of the run.
    - `lines`: those of the run so far, when it is continued; later ones are dropped.
    """

    def __init__(self, folder: Path, lines: Iterable[Measurement]):
        self._path = folder / METRICS
        lines = list(lines)
        write_text(self._path, "".join(map(as_line, lines)))
        with writing(folder):
            # Not SummaryWriter: on a full disk its thread dies, and the next lines wait for it.
            self._board = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
            self._record(file_version="brain.Event:2")
            if lines:
                # What an interrupted process wrote of later steps is not to be shown.
                step = lines[-1].step + 1
                self._record(step=step, session_log=SessionLog(status=SessionLog.START))

    def add(self, line: Measurement) -> None:
        """Add a line, wholly or not at all."""
        with writing(self._path), self._path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                rest = as_line(line).encode()
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
        with writing(self._path.parent):
            self._show(line)

    def close(self) -> None:
        """Let go of the files."""
        with writing(self._path.parent):
            self._board.close()

    def _show(self, line: Measurement) -> None:
        for name, value in fields(line).items():
            if isinstance(value, float) and name != "epoch":
                self._record(step=line.step, summary=scalar(name, value))
        self._board.flush()

    def _record(self, **event: Any) -> None:
        self._board.write(Event(wall_time=time.time(), **event).SerializeToString())


def curves(lines: Sequence[Measurement], title: str) -> Figure:
    """Loss and error against the epoch, and of a text the bits for each character."""
    by_text = any(line.bits_per_character is not None for line in lines)
    figure, (axes,) = panels(1, 3 if by_text else 2, size=(13.5 if by_text else 9, 3.6))
    # Few epochs, as of a text, show little.
    steps = [line for line in lines if line.event == "steps" and by_text]
    _plot(axes[0], steps or [line for line in lines if line.event == "epoch"], "loss")
    axes[0].set(ylabel="training loss", yscale="log")
    _plot(axes[1], lines, "train_error", label="training, during the epoch")
    _plot(axes[1], lines, "test_error", label="test")
    axes[1].set(ylabel="error (%)", ylim=(0, None))
    axes[1].legend()
    if by_text:
        _plot(axes[2], lines, "bits_per_character")
        axes[2].set(ylabel="bits a character (test)")
    for panel in axes:
        panel.set(xlabel="epoch")
    figure.suptitle(title)
    return figure


def _plot(panel: Axes, lines: Sequence[Measurement], name: str, **style: Any) -> None:
    points = [(line.epoch, getattr(line, name)) for line in lines]
    there = [(x, y) for x, y in points if y is not None]
    # A single one has no line.
    panel.plot(*zip(*there, strict=True), marker="o" if len(there) == 1 else "", **style)
