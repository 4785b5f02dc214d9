"""Where a command prints."""

import rich.console

from forwardgrad._files import discard_output


class Console(rich.console.Console):
    """A console whose reader may go: what was begun is done to its end, in silence."""

    def on_broken_pipe(self) -> None:
        """Print no more."""
        discard_output()
