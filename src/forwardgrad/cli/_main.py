"""The command `forwardgrad`: which part of it is meant, and what becomes of errors."""

import importlib.metadata
import sys
from collections.abc import Callable, Sequence

from forwardgrad._errors import InputError, unknown_name

USAGE = """\
usage: forwardgrad COMMAND [OPTIONS]

Train neural networks without backpropagation.

commands:
  train       train a network:         forwardgrad train --dataset mnist --network mlp
  reproduce   a paper's experiment:    forwardgrad reproduce toy
                                       (forwardgrad reproduce lists them)
  compare     all algorithms:          forwardgrad compare
  data        augmented images:        forwardgrad data show --augment simclr

forwardgrad COMMAND --help shows a command's options. forwardgrad --version shows the version.
"""


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
    # Imported when it is known which, because JAX takes seconds.
    if name == "train":
        from forwardgrad.cli._train import train

        return train
    if name == "reproduce":
        from forwardgrad.cli._reproduce import reproduce

        return reproduce
    if name == "compare":
        from forwardgrad.cli._reproduce import compare

        return compare
    if name == "data":
        from forwardgrad.cli._data import data

        return data
    raise unknown_name("command", name, ("train", "reproduce", "compare", "data"))
