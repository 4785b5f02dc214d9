"""What a command makes of where it runs: its options, JAX's and matplotlib's settings, memory."""

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import matplotlib
import tyro

from forwardgrad._errors import InputError, check_seed
from forwardgrad._files import local

Options = TypeVar("Options")


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Results that do not depend on settings of the environment; errors of the machine in words.

    **Raises:**

    `InputError` where memory does not suffice, or JAX was asked to stop at numbers that are not
    finite and met one.
    """
    settings = (
        jax.enable_x64(False),
        jax.default_prng_impl("threefry2x32"),
        jax.threefry_partitionable(True),
        # These are for the code that somebody is writing, and not for what it calls.
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
        jax.transfer_guard("allow"),
        jax.disable_jit(False),
        matplotlib.rc_context(),
    )
    with contextlib.ExitStack() as stack:
        for setting in settings:
            stack.enter_context(setting)
        matplotlib.rcdefaults()
        try:
            yield
        except FloatingPointError as error:
            raise InputError(
                "a number is not finite, and JAX_DEBUG_NANS or JAX_DEBUG_INFS asks to stop there: "
                f"{_line(error)}"
            ) from error
        except (MemoryError, jax.errors.JaxRuntimeError) as error:
            said = re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.I)
            if not (said or isinstance(error, MemoryError)):
                raise
            raise InputError(f"the memory does not suffice: {_line(error)}") from error


def parse(
    options: type[Options],
    prog: str,
    arguments: Sequence[str],
    *,
    computes: bool = True,
    **settings: Any,
) -> Options:
    """The options of a command, with `~` in paths expanded; `settings` are tyro's.

    **Raises:**

    `InputError` if a path is not a local one, a seed is out of range, or JAX has no device where
    the command computes.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed: Any = tyro.cli(options, prog=prog, args=arguments, **settings)
    except SystemExit as stop:
        # What the options were to become has refused them; its own words suffice.
        cause = stop.__context__
        while cause is not None and not isinstance(cause, InputError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(said.getvalue())
        raise
    if computes:
        check_device()  # now: nothing has been read or written yet
    return _settled(parsed)


def _settled(options: Any) -> Any:
    """Options, and those inside of them, with local paths and a seed in range."""
    changed = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name == "seed" and value is not None:
            check_seed(value)
        if isinstance(value, Path):
            changed[field.name] = local(value, field.name)
        elif isinstance(value, tuple):
            changed[field.name] = tuple(
                local(part, field.name) if isinstance(part, Path) else part for part in value
            )
        elif dataclasses.is_dataclass(value) and not isinstance(value, eqx.Module):
            changed[field.name] = _settled(value)
    return dataclasses.replace(options, **changed)


def check_device() -> None:
    """Raise an `InputError` if JAX has no device."""
    try:
        jax.numpy.zeros(()).block_until_ready()
    except (RuntimeError, AssertionError) as error:  # the latter without CUDA's plugin
        names = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_DEFAULT_DEVICE")
        asked = ", ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        raise InputError(
            f"JAX finds no device with {asked or 'its defaults'}; JAX_PLATFORMS=cpu takes the "
            f"processor ({_line(error)})"
        ) from error


def _line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]
