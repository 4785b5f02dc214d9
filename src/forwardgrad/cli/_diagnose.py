"""`forwardgrad diagnose`."""

from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from forwardgrad._console import Console
from forwardgrad._diagnosis import HEADS, Diagnosis, cells, cost_in_words
from forwardgrad.cli._surroundings import parse
from forwardgrad.experiments import DiagnoseOptions, run_diagnose

DESCRIPTION = """Hold an algorithm's gradients against the exact ones, layer by layer.

examples:
  forwardgrad diagnose
      what train does by default, at its first step
  forwardgrad diagnose --dataset mnist --data-dir data --network m/1/16 --algorithms fg-w fg-a
      two algorithms on the same batch
  forwardgrad diagnose --run runs/digits-mlp-fg-w-0 --tangents 64
      a trained network, with more tangents than it was trained with
"""


def diagnose(arguments: Sequence[str]) -> int:
    """Diagnose with the options given, and print a table."""
    options = parse(DiagnoseOptions, "forwardgrad diagnose", arguments, description=DESCRIPTION)
    diagnoses = run_diagnose(options)
    table = diagnosis_table(diagnoses)
    console = Console()
    # A narrow terminal, or a file, gets long lines: numbers cut in two cannot be read.
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(console.width, needed)
    console.print(table)
    for name, diagnosis in diagnoses.items():
        console.print(f"{name}: {cost_in_words(diagnosis)}", highlight=False, soft_wrap=True)
    files = f"{options.out}/: diagnosis.json, diagnosis.png"
    console.print(f"files: {files}", highlight=False, soft_wrap=True)
    return 0


def diagnosis_table(diagnoses: Mapping[str, Diagnosis]) -> Table:
    """A block for each algorithm, a row for each layer."""
    table = Table(title="Gradients, beside the exact one")
    for i, head in enumerate(HEADS):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    for name, diagnosis in diagnoses.items():
        table.add_section()
        table.add_row(f"[bold]{name}[/bold], {diagnosis.samples} samples")
        for row in diagnosis.rows:
            # What is in brackets is an index, and no markup.
            table.add_row(*map(escape, cells(row)))
    return table
