"""Arrays with some digits of their axes in front."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Array

from forwardgrad.rewrite import Part


class Digits(NamedTuple):
    """Where some digits are in an array of a shape; what is left of it are its units."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def are_apart(self) -> bool:
        """Whether no two of them are the same entries' places."""
        for axis, size in enumerate(self.shape):
            for part in self._of(axis):
                if size % (part.inner * part.size):
                    return False
                size = part.inner
        return True

    @property
    def places(self) -> int:
        """The number of places that they have together."""
        return math.prod(part.size for part in self.parts)

    @property
    def units(self) -> int:
        """The number of entries in each place."""
        return math.prod(self.shape) // self.places

    def in_front(self, array: Array) -> Array:
        """An array of the shape, with an axis for all places, and one for the units."""
        sizes, order = self._cut()
        return array.reshape(sizes).transpose(order).reshape(self.places, -1)

    def back(self, array: Array) -> Array:
        """What has these two axes, in the shape."""
        sizes, order = self._cut()
        where = sorted(range(len(order)), key=order.__getitem__)
        return array.reshape([sizes[i] for i in order]).transpose(where).reshape(self.shape)

    def _of(self, axis: int) -> Sequence[Part]:
        return sorted((p for p in self.parts if p.axis == axis), key=lambda p: -p.inner)

    def _cut(self) -> tuple[list[int], list[int]]:
        """The sizes of all digits and of what is between them, and the order to put them in."""
        sizes: list[int] = []
        at: dict[Part, int] = {}
        for axis, size in enumerate(self.shape):
            for part in self._of(axis):
                at[part] = len(sizes) + 1
                sizes += [size // (part.inner * part.size), part.size]
                size = part.inner
            sizes.append(size)
        first = [at[part] for part in self.parts]
        return sizes, [*first, *(i for i in range(len(sizes)) if i not in first)]
