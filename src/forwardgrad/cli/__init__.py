"""The command line."""

from forwardgrad.cli._main import main as main

__all__ = ["main"]
