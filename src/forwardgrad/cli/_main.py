"""The command `forwardgrad`: which part of it is meant, and what becomes of errors."""

import contextlib
import importlib
import importlib.metadata
import io
import os
import sys
from collections.abc import Callable, Sequence

from forwardgrad._errors import InputError, unknown_name
from forwardgrad._files import discard_output

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

    - `arguments`: those after `forwardgrad`; default: the process's, which is then the command's
        own, and set up for it.

    **Returns:**

    The exit code: 0, 2 for what cannot be used, 128 + N after signal N.
    """
    if arguments is None:
        _own_process()
        arguments = sys.argv[1:]
    try:
        code = _run(*(arguments or ["--help"]))
        _flush()
    except BrokenPipeError:
        # Whoever read has seen enough.
        with contextlib.suppress(OSError):
            _flush()
        return 128 + 13
    except InputError as error:
        return _stopped(f"error: {error}", 2)
    except OSError as error:
        with contextlib.suppress(OSError):
            _flush()
        where = f"{error.filename}: " if error.filename else ""
        return _stopped(f"error: {where}{error.strerror or error}", 2)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "forwardgrad":
            raise
        return _stopped(
            f"error: module {error.name!r} is missing; the commands need the extra 'train': "
            "pip install 'forwardgrad[train]'",
            2,
        )
    except KeyboardInterrupt as interrupt:
        code = 128 + getattr(interrupt, "signum", 2)
        return _stopped(f"\n{interrupt or 'interrupted'}", code)
    return code


def _run(name: str, *rest: str) -> int:
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if name == "--version":
        print(f"forwardgrad {importlib.metadata.version('forwardgrad')}")
        return 0
    if name not in MODULES:
        raise unknown_name("command", name, MODULES)
    try:
        # Imported when it is known which, because JAX takes seconds.
        return _command(name)(rest)
    except SystemExit as stop:
        # The option parser has shown the help, or said what is wrong.
        return stop.code if isinstance(stop.code, int) else 2


def _command(name: str) -> Callable[[Sequence[str]], int]:
    module = importlib.import_module(f"forwardgrad.cli.{MODULES[name]}")
    surroundings = importlib.import_module("forwardgrad.cli._surroundings")
    return surroundings.settled()(getattr(module, name))


def _own_process() -> None:
    """Make the process independent of settings that are meant for others."""
    # A notebook's backend, which its shell commands inherit, may not even be installed here.
    os.environ["MPLBACKEND"] = "agg"
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def _stopped(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr)
    return code


def _flush() -> None:
    """Write what is left, or forget it: at the exit, Python would try again, and complain."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        discard_output()
        raise
