"""Ctrl-C and SIGTERM, told to a loop that looks when it can."""

import signal
import threading
from types import FrameType
from typing import Self


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop, and has left a checkpoint.

    **Arguments:**

    - `message`: what was done, and how to continue.
    - `signum`: the signal; a command exits with 128 more than it.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """While entered, SIGINT and SIGTERM set `signum`; a second one has its usual effect."""

    signum: int | None = None

    def __enter__(self) -> Self:
        # Only the main thread may set handlers; elsewhere the caller's own remain.
        main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
        self._previous = {n: signal.signal(n, self._note) for n in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
