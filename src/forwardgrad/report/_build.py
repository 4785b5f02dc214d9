"""From what was found to what the page says."""

from collections import Counter
from collections.abc import Iterable

from forwardgrad.report import _plots, _runs, _tables
from forwardgrad.report._stored import Collection, Origin
from forwardgrad.report._view import OtherView, Report


def build(collection: Collection, date: str) -> Report:
    """The page of a collection, made at that date."""
    problems = list(collection.problems)
    unfinished = _runs.unfinished(collection, problems)
    tables = tuple(_tables.view(table, collection.tables) for table in collection.tables)
    return Report(
        date=date,
        facts=_facts(collection),
        findings=tuple(line for table in collection.tables for line in _tables.findings(table)),
        tables=tables,
        unfinished=unfinished,
        curves=_plots.curves(collection),
        costs=_plots.costs(collection),
        run_heads=_runs.HEADS,
        runs=_runs.rows(collection),
        others=tuple(
            OtherView(
                other.name,
                other.path.as_posix(),
                _tables.origin(other.origin),
                other.picture,
                f"experiment-{i}.png",
            )
            for i, other in enumerate(collection.others, 1)
        ),
        problems=tuple(problems),
    )


def _facts(collection: Collection) -> tuple[tuple[str, str], ...]:
    states = Counter(run.state for run in collection.runs)
    cells = sum(len(table.cells) for table in collection.tables)
    runs = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    origins = [item.origin for item in (*collection.tables, *collection.others, *collection.runs)]
    facts = {
        "folders": ", ".join(folder.as_posix() for folder in collection.folders),
        "tables": f"{len(collection.tables)}, with {cells} cells",
        "runs of forwardgrad train": f"{len(collection.runs)}{f' ({runs})' if runs else ''}",
        "other experiments": str(len(collection.others)),
        "versions": _each(origin.versions for origin in origins),
        "machines": _each(_machines(origins)),
    }
    return tuple((name, value) for name, value in facts.items() if value)


def _machines(origins: list[Origin]) -> list[str]:
    """Runs know their backend alone, which says nothing new beside a machine that has it."""
    whole = [origin.machine for origin in origins if origin.cores or origin.device]
    known = {origin.backend for origin in origins if origin.cores or origin.device}
    return whole + [o.machine for o in origins if o.backend not in known]


def _each(values: Iterable[str]) -> str:
    return "; ".join(sorted(set(filter(None, values))))
