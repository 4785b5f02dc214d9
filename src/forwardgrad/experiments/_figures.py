"""Figures on disk."""

from pathlib import Path

from matplotlib.figure import Figure

from forwardgrad._files import writing


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        figure.savefig(temporary, format="png", dpi=130)
        temporary.replace(path)
