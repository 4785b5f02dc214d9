"""The line that shows how a run is going."""

from typing import Self

import rich.progress as rp
from rich.console import Console


class Progress:
    """A progress line on a console; silent without one.

    **Arguments:**

    - `console`: where to.
    """

    error: float | None = None

    def __init__(self, console: Console | None):
        self._bar = rp.Progress(
            rp.TextColumn("{task.description}"),
            rp.BarColumn(bar_width=None),
            rp.TextColumn("{task.fields[numbers]}"),
            rp.TimeRemainingColumn(),
            console=console or Console(quiet=True),
            disable=console is None,
            speed_estimate_period=30,
        )
        self._task: rp.TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def start(self, step: int, steps: int, steps_per_epoch: int) -> None:
        """Show the bar."""
        self._per_epoch, self._epochs = steps_per_epoch, -(-steps // steps_per_epoch)
        self._task = self._bar.add_task("", total=steps, completed=step, numbers="")

    def update(self, step: int, loss: float) -> None:
        """Show that `step` steps are done."""
        assert self._task is not None
        task = self._bar.tasks[0]
        rate = f", {task.speed:.0f} steps/s" if task.speed else ""
        error = f", test error {self.error:.2f} %" if self.error is not None else ""
        self._bar.update(
            self._task,
            completed=step,
            description=f"epoch {-(-step // self._per_epoch)}/{self._epochs}",
            numbers=f"loss {loss:.4f}{error}{rate}",
        )
