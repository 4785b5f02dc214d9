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

    measured: str = ""
    """What the last evaluation found."""

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

    def start(self, step: int, steps: int, steps_per_epoch: int, tokens: int | None = None) -> None:
        """Show the bar, with steps a second, or with the tokens of a step the tokens a second."""
        self._tokens = tokens
        self._per_epoch, self._epochs = steps_per_epoch, -(-steps // steps_per_epoch)
        self._task = self._bar.add_task("", total=steps, completed=step)

    def update(self, step: int, loss: float) -> None:
        """Show that `step` steps are done."""
        task = self._bar.tasks[0]
        speed, tokens = task.speed or 0, self._tokens
        rate = f" {speed * tokens:,.0f} tokens/s" if tokens else f" {speed:.0f}/s"
        epoch = -(-step // self._per_epoch)
        line = f"epoch {epoch}/{self._epochs} loss {loss:.4g}{self.measured}{rate * bool(speed)}"
        self._bar.update(self._task, completed=step, description=line)
        late = time.monotonic() - self._said >= PLAIN_SECONDS
        if not self._live and (late or step == task.total):
            self._said = time.monotonic()
            self.note(line)
