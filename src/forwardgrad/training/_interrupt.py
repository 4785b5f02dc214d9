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
    """While entered, SIGINT, SIGTERM and SIGHUP set `signum`; a second one has its usual effect.

    One that is ignored, as `nohup` has it, stays ignored.
    """

    signum: int | None = None

    def __enter__(self) -> Self:
        # Only the main thread may set handlers; elsewhere the caller's own remain.
        main = threading.current_thread() is threading.main_thread()
        names = ("SIGINT", "SIGTERM", "SIGHUP") if main else ()
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        heard = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
        self._previous = {n: signal.signal(n, self._note) for n in heard}
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
