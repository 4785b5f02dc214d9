"""From text to tokens and back: characters, bytes, or the pieces of a tokenizer."""

import abc
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, Int32

from forwardgrad._errors import InputError
from forwardgrad._files import local
from forwardgrad.data._tables import HUB_TIMEOUT, quiet

if TYPE_CHECKING:
    import tokenizers

_FILE = "tokenizer.json"

Ids = Int32[np.ndarray, " tokens"]


class Vocabulary(abc.ABC):
    """The tokens that there are, numbered from 0."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of tokens."""

    @abc.abstractmethod
    def encode(self, texts: Sequence[str]) -> Ids:
        """The tokens of some texts, one text after another, which must have tokens for them."""

    def unknown(self, texts: Sequence[str]) -> str | None:
        """What there is no token for in some texts, in words."""
        del texts
        return None

    @abc.abstractmethod
    def decode(self, ids: Int[np.ndarray, " tokens"]) -> str:
        """The text of some tokens."""

    @abc.abstractmethod
    def __str__(self) -> str:
        """All that decides which text is which tokens."""


@dataclass(frozen=True)
class Characters(Vocabulary):
    """Each of some characters is a token.

    **Arguments:**

    - `characters`: in the order of their code points, each once.

    >>> vocabulary = Characters.of(["abba", "cab"])
    >>> vocabulary.encode(["cab"]).tolist()
    [2, 0, 1]
    """

    characters: str

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Characters":
        """All characters of some texts."""
        return cls("".join(sorted(set().union(*texts))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, texts: Sequence[str]) -> Ids:
        """The number of each character."""
        own, points = _code_points(self.characters), _code_points("".join(texts))
        ids = np.minimum(np.searchsorted(own, points), len(own) - 1)
        assert np.array_equal(own[ids], points)
        return ids.astype(np.int32)

    def unknown(self, texts: Sequence[str]) -> str | None:
        """A character that is none of these."""
        odd = min(set().union(*texts).difference(self.characters), default=None)
        return odd and f"the character {odd!r} (U+{ord(odd):04X})"

    def decode(self, ids: Int[np.ndarray, " tokens"]) -> str:
        """The characters with these numbers."""
        return "".join(self.characters[i] for i in ids)

    def __str__(self) -> str:
        return f"characters {self.characters}"


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


@dataclass(frozen=True)
class Bytes(Vocabulary):
    """Each byte of a text in UTF-8 is a token.

    >>> Bytes().encode(["é"]).tolist()
    [195, 169]
    """

    def __len__(self) -> int:
        return 256

    def encode(self, texts: Sequence[str]) -> Ids:
        """The bytes."""
        return np.frombuffer("".join(texts).encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Int[np.ndarray, " tokens"]) -> str:
        """The text; � stands for bytes that are no character."""
        return bytes(ids.tolist()).decode(errors="replace")

    def __str__(self) -> str:
        return "bytes"


@dataclass(frozen=True, eq=False)
class Pieces(Vocabulary):
    """The tokens of a tokenizer of the Hugging Face library `tokenizers`."""

    tokenizer: "tokenizers.Tokenizer"

    def __len__(self) -> int:
        # Numbers may have gaps.
        return 1 + max(self.tokenizer.get_vocab().values())

    def encode(self, texts: Sequence[str]) -> Ids:
        """The pieces, with those that the tokenizer adds to each text."""
        try:
            found = self.tokenizer.encode_batch(list(texts))
        except Exception as error:  # the library raises nothing more specific
            raise InputError(f"tokenizer cannot cut a text into its tokens: {error}") from error
        return np.concatenate(
            [np.asarray(e.ids, np.int32) for e in found] or [np.empty(0, np.int32)]
        )

    def decode(self, ids: Int[np.ndarray, " tokens"]) -> str:
        """The text of these pieces."""
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def unknown(self, texts: Sequence[str]) -> str | None:
        """A character that the tokenizer drops without a word.

        One with a normaliser may mean to.
        """
        if self.tokenizer.normalizer is not None:
            return None
        found = sorted(c for c in set().union(*texts) if not c.isspace())
        try:
            ids = self.tokenizer.encode_batch(found, add_special_tokens=False)
        except Exception:  # of words, perhaps, which says so itself
            return None
        odd = next((c for c, e in zip(found, ids, strict=True) if not e.ids), None)
        return odd and f"the character {odd!r} (U+{ord(odd):04X})"

    def __str__(self) -> str:
        return self.tokenizer.to_str()


def pieces_of(name: str) -> Pieces:
    """The vocabulary of a tokenizer of the library `tokenizers`: a file, or a name on the hub.

    On the hub it is the `tokenizer.json` of a model, `"owner/name"`. It is kept in the hub
    library's cache, and is read from there if the hub cannot be reached.

    **Raises:**

    `InputError` if there is none, or it is not one.
    """
    import tokenizers

    path = local(Path(name), "tokenizer")
    if not path.is_file():
        path = _from_hub(name)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise InputError(f"tokenizer {name!r} is not a tokenizer's file: {error}") from error
    if not tokenizer.get_vocab():
        raise InputError(f"tokenizer {name!r} has no tokens")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Pieces(tokenizer)


def _from_hub(name: str) -> Path:
    """A model's tokenizer, downloaded once."""
    import huggingface_hub
    from huggingface_hub import errors

    what = f"tokenizer {name!r}"
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise InputError(
            f"{what} is not a file; expected 'chars', 'bytes', the file of a tokenizer "
            "(tokenizer.json), or a model on the Hugging Face hub that has one (owner/name)"
        )
    try:
        with quiet():
            found = huggingface_hub.hf_hub_download(name, _FILE, etag_timeout=HUB_TIMEOUT)
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise InputError(
            f"{what} is neither a file nor a public model on the Hugging Face hub"
        ) from error
    except Exception as error:  # name service, proxy, timeout, 5xx: depends on the HTTP library
        local_too = isinstance(error, errors.LocalEntryNotFoundError)
        if isinstance(error, errors.EntryNotFoundError) and not local_too:
            raise InputError(
                f"{what} is a model on the Hugging Face hub without a {_FILE}"
            ) from error
        raise InputError(
            f"{what} is not a file, and the Hugging Face hub cannot be reached for a model of that "
            "name, of which its local cache has no tokenizer"
        ) from error
    return Path(found)
