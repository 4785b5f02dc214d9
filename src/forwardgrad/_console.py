"""Where a command prints."""

from collections.abc import Mapping

import rich.console
from rich.table import Table

from forwardgrad._files import discard_output


class Console(rich.console.Console):
    """A console whose reader may go: what was begun is done to its end, in silence."""

    def facts(self, title: str, rows: Mapping[str, str]) -> None:
        """A table of two columns."""
        table = Table(show_header=False, title=title)
        for row in rows.items():
            table.add_row(*row)
        self.print(table)

    def on_broken_pipe(self) -> None:
        """Print no more."""
        discard_output()
