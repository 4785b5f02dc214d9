"""What a run reports: JSON lines, TensorBoard, and the table at the end."""

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

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
        with writing(folder):
            self._board = SummaryWriter(
                str(folder), purge_step=lines[-1]["step"] + 1 if lines else None
            )

    def add(self, line: dict[str, Any]) -> None:
        """Add a line."""
        self.lines.append(line)
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if isinstance(value, float) and name != "epoch":
                self._board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Flush what TensorBoard has not written."""
        with writing(self._path):
            self._board.close()


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
