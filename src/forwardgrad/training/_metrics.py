"""What a run reports: JSON lines, and the same for TensorBoard."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from forwardgrad._errors import InputError
from forwardgrad._files import write_lines, writing

FILE = "metrics.jsonl"


class Metrics:
    """The lines of `metrics.jsonl`, and the same numbers for TensorBoard.

    **Arguments:**

    - `folder`: of the run.
    - `lines`: those of the run so far, when it is continued; later ones are dropped.
    """

    def __init__(self, folder: Path, lines: list[dict[str, Any]]):
        self._path = folder / FILE
        self.lines = lines
        write_lines(self._path, lines)
        step = lines[-1]["step"] if lines else 0
        with writing(folder):
            # Not SummaryWriter: on a full disk its thread dies, and the next lines wait for it.
            self._board = RecordWriter(str(folder / f"events.out.tfevents.{time.time_ns()}"))
            self._record(file_version="brain.Event:2")
            if lines:
                # What an interrupted process wrote of later steps is not to be shown.
                self._record(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, line: dict[str, Any]) -> None:
        """Add a line, wholly or not at all; what is not finite becomes null, as JSON has it."""
        line = {
            k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in line.items()
        }
        self.lines.append(line)
        with writing(self._path), self._path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                rest = (json.dumps(line) + "\n").encode()
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

    def _show(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if isinstance(value, float) and name != "epoch":
                self._record(step=line["step"], summary=scalar(name, value))
        self._board.flush()

    def _record(self, **event: Any) -> None:
        self._board.write(Event(wall_time=time.time(), **event).SerializeToString())


def read_lines(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` lines of a run's metrics.

    **Raises:**

    `InputError` if there are fewer, or one is not JSON.
    """
    path = folder / FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    try:
        lines = [json.loads(line) for line in text.splitlines()[:count]]
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged: expected a JSON value a line, got {error}") from error
    if len(lines) < count:
        raise InputError(f"{path} is damaged: expected {count} lines, got {len(lines)}")
    return lines
