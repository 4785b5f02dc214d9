"""How a run is going: a line on a terminal, elsewhere a new one every few seconds."""

import contextlib
import time
from typing import Self

import rich.progress as rp
from rich.console import Console
from rich.table import Column

PLAIN_SECONDS = 5.0
"""Seconds between lines where there is no terminal."""


class Progress:
    """A progress line on a console; silent without one.

    **Arguments:**

    - `console`: where to.
    """

    error: float | None = None

    def __init__(self, console: Console | None):
        self._console = console or Console(quiet=True)
        self._live = self._console.is_interactive or self._console.is_jupyter
        # Only the bar gives way where the terminal is narrow.
        whole = Column(no_wrap=True)
        self._bar = rp.Progress(
            rp.TextColumn("{task.description}", table_column=whole),
            rp.BarColumn(bar_width=None),
            rp.TimeRemainingColumn(table_column=whole.copy()),
            console=self._console,
            disable=console is None or not self._live,
            speed_estimate_period=30,
        )
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        # A terminal that is gone must not hide why the run ends.
        with contextlib.suppress(OSError):
            self._bar.stop()

    def note(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, step: int, steps: int, steps_per_epoch: int) -> None:
        """Show the bar."""
        self._per_epoch, self._epochs = steps_per_epoch, -(-steps // steps_per_epoch)
        self._task = self._bar.add_task("", total=steps, completed=step)

    def update(self, step: int, loss: float) -> None:
        """Show that `step` steps are done."""
        task = self._bar.tasks[0]
        error = f" error {self.error:.2f} %" if self.error is not None else ""
        rate = f" {task.speed:.0f}/s" if task.speed else ""
        epoch = -(-step // self._per_epoch)
        line = f"epoch {epoch}/{self._epochs} loss {loss:.4g}{error}{rate}"
        self._bar.update(self._task, completed=step, description=line)
        late = time.monotonic() - self._said >= PLAIN_SECONDS
        if not self._live and (late or step == task.total):
            self._said = time.monotonic()
            self.note(line)
