"""`forwardgrad train`."""

from collections.abc import Sequence

from rich.table import Table

from forwardgrad._console import Console
from forwardgrad.cli._surroundings import parse
from forwardgrad.training import Run, TrainConfig, fit

DESCRIPTION = """Train a network, by default without backpropagation.

examples:
  forwardgrad train
      forward gradients on scikit-learn's digits, a minute on two cores
  forwardgrad train --dataset mnist --data-dir data --network cnn --algorithm bp --epochs 10
      backpropagation on data/mnist/{train,test}.parquet
  forwardgrad train --dataset mnist --tangents 16 --epochs 100 --out runs/long --resume
      start runs/long, or continue it after an interruption
"""


def train(arguments: Sequence[str]) -> int:
    """Train with the options given, and say what came of it."""
    config = parse(TrainConfig, "forwardgrad train", arguments, description=DESCRIPTION)
    console = Console()
    console.print(summary_table(fit(config, console=console)))
    return 0


def summary_table(run: Run) -> Table:
    """What a run did, and where its files are."""
    table, summary = Table(show_header=False, title="forwardgrad train"), run.result
    rows = {
        "task": summary.task,
        "algorithm": summary.algorithm,
        "network": f"{summary.network}, {summary.parameters:,} parameters",
        "data set": summary.dataset,
        "trained for": f"{summary.epochs:g} epochs, {summary.steps} steps, "
        f"{summary.seconds:.0f} s on {summary.backend}",
        "training loss": f"{summary.train_loss:.4f}",
        "training error": f"{summary.train_error:.2f} %",
        "test error": f"{summary.test_error:.2f} %",
        "files": f"{run.folder}/: summary.json, metrics.jsonl, curves.png, config.json, "
        "checkpoints",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
