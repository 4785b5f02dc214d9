"""One page of stored runs: tables, curves, costs, and the commands that fill what is missing."""

from forwardgrad.report._page import write_report as write_report

__all__ = ["write_report"]
