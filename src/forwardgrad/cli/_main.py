"""The command `forwardgrad`: which part of it is meant, and what becomes of errors."""

import importlib
import importlib.metadata
import sys
from collections.abc import Callable, Sequence

from forwardgrad._errors import InputError, unknown_name

USAGE = """\
usage: forwardgrad COMMAND [OPTIONS]

Train neural networks without backpropagation.

commands:
  train       train a network:         forwardgrad train --dataset mnist --network mlp
  readout     read classes out of a    forwardgrad readout runs/contrastive
              contrastive run:
  reproduce   a paper's experiment:    forwardgrad reproduce toy
                                       (forwardgrad reproduce lists them)
  compare     all algorithms:          forwardgrad compare
  diagnose    gradients' bias, noise:  forwardgrad diagnose --algorithms fg-w fg-a
  report      one page of stored runs: forwardgrad report
  data        look at the data:        forwardgrad data show --dataset cifar10

forwardgrad COMMAND --help shows a command's options. forwardgrad --version shows the version.
"""

MODULES = {
    "train": "_train",
    "readout": "_readout",
    "reproduce": "_reproduce",
    "compare": "_reproduce",
    "diagnose": "_diagnose",
    "report": "_report",
    "data": "_data",
}
"""Where the function of each command is."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    **Arguments:**

    - `arguments`: those after `forwardgrad`; default: the process's.

    **Returns:**

    The exit code: 0, 2 for input that cannot be used, 128 + N after signal N.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if name == "--version":
        print(f"forwardgrad {importlib.metadata.version('forwardgrad')}")
        return 0
    try:
        return _command(name)(rest)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "forwardgrad":
            raise
        print(
            f"error: module {error.name!r} is missing; the commands need the extra 'train': "
            "pip install 'forwardgrad[train]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(interrupt, "signum", 2)
    except SystemExit as stop:
        # The option parser has said what is wrong.
        return stop.code if isinstance(stop.code, int) else 2


def _command(name: str) -> Callable[[Sequence[str]], int]:
    if name not in MODULES:
        raise unknown_name("command", name, MODULES)
    # Imported when it is known which, because JAX takes seconds.
    return getattr(importlib.import_module(f"forwardgrad.cli.{MODULES[name]}"), name)
