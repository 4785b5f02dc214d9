"""The one kind of error that is the caller's to mend."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An argument, file or setting that cannot be used.

    The message is one sentence that names the argument, its value and what was expected. The
    command line prints it without a traceback and exits with code 2.
    """


class DivergedError(InputError):
    """A run whose loss or parameters are not finite any more."""


def with_article(name: str) -> str:
    """A name with its article.

    >>> with_article("int"), with_article("dict"), with_article("uint8 array")
    ('an int', 'a dict', 'a uint8 array')
    """
    vowel = name[0].lower() in "aeio"  # "u" is spoken as in uint
    return f"an {name}" if vowel else f"a {name}"


MOST = 2**31 - 1
"""The most that an integer of JAX counts."""


def check_seed(seed: int) -> None:
    """Raise an `InputError` for a seed that is another one's twin: JAX takes 32 bits of it."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be from 0 to {2**32 - 1}, got {seed}")


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An `InputError` for a name that nothing is registered under, with the nearest ones.

    **Arguments:**

    - `kind`: what the name should have named, for instance `"network"`.
    - `name`: the name as given.
    - `known`: the names there are.

    **Returns:**

    The error, not yet raised.

    >>> print(unknown_name("network", "mpl", ["mlp", "cnn"]))
    network 'mpl' is unknown; did you mean 'mlp'? (known: cnn, mlp)
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return InputError(f"{kind} {name!r} is unknown{hint} (known: {', '.join(known)})")
