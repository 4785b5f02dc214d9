"""Stored results: their types, one reader and writer, means over seeds, tables and figures."""

from forwardgrad.results._figures import COLORS as COLORS
from forwardgrad.results._figures import look as look
from forwardgrad.results._figures import picture as picture
from forwardgrad.results._figures import save as save
from forwardgrad.results._figures import scale as scale
from forwardgrad.results._records import MOST_SEEDS as MOST_SEEDS
from forwardgrad.results._records import AblationCell as AblationCell
from forwardgrad.results._records import Cell as Cell
from forwardgrad.results._records import CurveCell as CurveCell
from forwardgrad.results._records import Grid as Grid
from forwardgrad.results._records import Header as Header
from forwardgrad.results._records import Measurement as Measurement
from forwardgrad.results._records import Options as Options
from forwardgrad.results._records import Origin as Origin
from forwardgrad.results._records import Place as Place
from forwardgrad.results._records import Readout as Readout
from forwardgrad.results._records import Summary as Summary
from forwardgrad.results._records import TableCell as TableCell
from forwardgrad.results._store import VERSION as VERSION
from forwardgrad.results._store import as_line as as_line
from forwardgrad.results._store import fields as fields
from forwardgrad.results._store import read as read
from forwardgrad.results._store import read_lines as read_lines
from forwardgrad.results._store import without_none as without_none
from forwardgrad.results._store import write as write
from forwardgrad.results._tables import Entry as Entry
from forwardgrad.results._tables import Mean as Mean
from forwardgrad.results._tables import Table as Table
from forwardgrad.results._tables import csv as csv
from forwardgrad.results._tables import escaped as escaped
from forwardgrad.results._tables import fenced as fenced
from forwardgrad.results._tables import markdown as markdown
from forwardgrad.results._tables import over_seeds as over_seeds

__all__ = [
    "COLORS",
    "MOST_SEEDS",
    "VERSION",
    "AblationCell",
    "Cell",
    "CurveCell",
    "Entry",
    "Grid",
    "Header",
    "Mean",
    "Measurement",
    "Options",
    "Origin",
    "Place",
    "Readout",
    "Summary",
    "Table",
    "TableCell",
    "as_line",
    "csv",
    "escaped",
    "fenced",
    "fields",
    "look",
    "markdown",
    "over_seeds",
    "picture",
    "read",
    "read_lines",
    "save",
    "scale",
    "without_none",
    "write",
]
