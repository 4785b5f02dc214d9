"""`forwardgrad readout`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro

from forwardgrad._console import Console
from forwardgrad.cli._surroundings import parse
from forwardgrad.training import fit_readout, readout_file

DESCRIPTION = """Fit a linear readout of the classes on the features of a finished contrastive run.

examples:
  forwardgrad readout runs/contrastive
      the test error of logistic regression on the run's features
  forwardgrad readout runs/contrastive --untrained
      the same on the features of the network before its training
"""


@dataclasses.dataclass(frozen=True)
class ReadoutOptions:
    """Settings of `readout`."""

    run: tyro.conf.Positional[Path]
    """Folder of the run; it gets readout.json."""
    examples: int | None = None
    """Training images that the readout is fitted on. Default: all."""
    untrained: bool = False
    """Take the features that the network had before its training."""
    data_dir: Path | None = None
    """Folder with DATASET/{train,test}.parquet. Default: where the run had them."""


def readout(arguments: Sequence[str]) -> int:
    """Fit a readout, and say how well it does."""
    options = parse(ReadoutOptions, "forwardgrad readout", arguments, description=DESCRIPTION)
    result = fit_readout(
        options.run,
        data_dir=options.data_dir,
        examples=options.examples,
        untrained=options.untrained,
    )
    facts = {
        "features": f"{result.features} of {result.network}, {result.algorithm}",
        "fitted on": f"{result.examples:,} images of {result.dataset}",
        "training error": f"{result.train_error:.2f} %",
        "test error": f"{result.test_error:.2f} %",
        "file": str(options.run / readout_file(options.untrained)),
    }
    Console().facts("forwardgrad readout", facts)
    return 0
