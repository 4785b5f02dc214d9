"""The picture of a run."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from forwardgrad._files import writing


def plot_curves(path: Path, lines: list[dict[str, Any]], title: str) -> None:
    """Loss and error against the epoch, as a PNG."""
    epochs = [line for line in lines if line["event"] == "epoch"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([e["epoch"] for e in epochs], [e["loss"] for e in epochs])
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    for name, label in (("train_error", "training, during the epoch"), ("test_error", "test")):
        points = [(e["epoch"], e[name]) for e in epochs if name in e]
        right.plot([x for x, _ in points], [y for _, y in points], label=label)
    right.set(xlabel="epoch", ylabel="error (%)", ylim=(0, None))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    with writing(path):
        temporary = path.with_name(f".{path.name}")
        figure.savefig(temporary, format="png", dpi=130)
        temporary.replace(path)
