"""A weight on its way through a program, with its perturbation kept as factors.

A tangent that is a product of small factors, `V[i, j] = a[i] b[j]`, need never be built as long as
everything that happens to the weight can be said of the factors. Axes are therefore *named*: every
axis of the value is a tuple of labels (more than one where axes were merged, none where the size
is one), every factor lists the labels it spans, and the tangent is the product of the factors,
summed over the labels that the value does not have (the terms of a tangent of rank two or more).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from forwardgrad.rewrite._workers import varying_like


class Label(NamedTuple):
    """The name of an axis: one of a parameter's, or a part that it was split into."""

    leaf: int
    axis: int
    part: tuple[int, ...] = ()

    def child(self, i: int) -> "Label":
        """The name of the `i`-th part."""
        return Label(self.leaf, self.axis, (*self.part, i))


RANK = Label(-1, 0)
"""The label that the terms of a low-rank tangent are summed over."""

TANGENTS = Label(-1, 1)
"""The label that the K tangents of an estimator are summed over."""


@dataclasses.dataclass(frozen=True, eq=False)
class Factor:
    """One factor of a tangent: an array and the label of each of its axes."""

    array: jax.Array
    labels: tuple[Label, ...]

    def size(self, label: Label) -> int:
        """The number of entries along `label`."""
        return self.array.shape[self.labels.index(label)]

    def map(self, label: Label, fn: Callable[[jax.Array, int], jax.Array]) -> "Factor":
        """The factor with `fn(array, axis)` applied where it has `label`, else itself."""
        if label not in self.labels:
            return self
        return Factor(fn(self.array, self.labels.index(label)), self.labels)

    def split(self, label: Label, sizes: tuple[int, int]) -> "Factor":
        """The factor with the axis of `label` split in two."""
        if label not in self.labels:
            return self
        i = self.labels.index(label)
        shape = self.array.shape
        return Factor(
            self.array.reshape(*shape[:i], *sizes, *shape[i + 1 :]),
            (*self.labels[:i], label.child(0), label.child(1), *self.labels[i + 1 :]),
        )

    def at(self, label: Label, index: int) -> "Factor":
        """The factor at one place along `label`, without that axis."""
        if label not in self.labels:
            return self
        i = self.labels.index(label)
        return Factor(
            jax.lax.index_in_dim(self.array, index, i, keepdims=False),
            (*self.labels[:i], *self.labels[i + 1 :]),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Perturbed:
    """A weight `value` and its tangent, the sum of `terms`, each a product of factors.

    `axes[i]` are the labels whose (row-major) product is axis `i` of `value`; `is_zero` says that
    the value is known to be zero.
    """

    value: jax.Array
    axes: tuple[tuple[Label, ...], ...]
    terms: tuple[tuple[Factor, ...], ...]
    is_zero: bool = False

    def map(
        self, value: jax.Array, fn: Callable[[Factor], Factor], axes: Any = None
    ) -> "Perturbed":
        """The weight with its value's entries in another order, and `fn` of every factor."""
        terms = tuple(tuple(map(fn, term)) for term in self.terms)
        return Perturbed(value, self.axes if axes is None else tuple(axes), terms, self.is_zero)

    @property
    def labels(self) -> tuple[Label, ...]:
        """The labels of all axes, in order."""
        return tuple(label for axis in self.axes for label in axis)

    def size(self, label: Label) -> int:
        """The number of entries along `label`."""
        return next(f.size(label) for term in self.terms for f in term if label in f.labels)

    def tangent(self) -> jax.Array:
        """The tangent as an array of the value's shape and dtype."""
        total = sum(multiply(term, self.labels) for term in self.terms)
        return jnp.asarray(total).reshape(self.value.shape).astype(self.value.dtype)

    def transpose(self, permutation: Sequence[int]) -> "Perturbed":
        """The weight with its axes permuted."""
        return Perturbed(
            self.value.transpose(permutation),
            tuple(self.axes[i] for i in permutation),
            self.terms,
            self.is_zero,
        )

    def reshape(self, shape: Sequence[int]) -> "Perturbed | None":
        """The weight reshaped, or None where the axes do not merge and split along factors."""
        if not self.value.size:
            return None
        w = self.drop_singletons()
        pending = list(w.labels)
        axes = []
        for size in shape:
            axis: list[Label] = []
            while size > 1:
                label = pending.pop(0)
                have = w.size(label)
                if size % have and have % size:
                    return None
                if have > size:
                    w = w.split(label, (size, have // size))
                    pending.insert(0, label.child(1))
                    label, have = label.child(0), size
                axis.append(label)
                size //= have
            axes.append(tuple(axis))
        return Perturbed(self.value.reshape(shape), tuple(axes), w.terms, w.is_zero)

    def split(self, label: Label, sizes: tuple[int, int]) -> "Perturbed":
        """The same weight with one label made two."""
        parts = (label.child(0), label.child(1))
        axes = tuple(
            tuple(new for old in axis for new in (parts if old == label else (old,)))
            for axis in self.axes
        )
        return self.map(self.value, lambda f: f.split(label, sizes), axes)

    def drop_singletons(self) -> "Perturbed":
        """The same weight without labels of size one."""
        found = self
        for label in self.labels:
            if self.size(label) == 1:
                axes = [tuple(x for x in axis if x != label) for axis in found.axes]
                found = found.map(self.value, lambda f, label=label: f.at(label, 0), axes)
        return found

    def map_axis(self, axis: int, fn: Callable[[jax.Array, int], jax.Array]) -> "Perturbed | None":
        """The weight with a selection along `axis`, `fn(array, axis)`, done to value and factors.

        None where the axis is made of several labels.
        """
        value = fn(self.value, axis)
        if len(self.axes[axis]) != 1:
            return (
                Perturbed(value, self.axes, self.terms)
                if value.shape[axis] == self.value.shape[axis] == 1
                else None
            )
        (label,) = self.axes[axis]
        return self.map(value, lambda f: f.map(label, fn))

    def with_value(self, value: jax.Array, scale: jax.Array | None = None) -> "Perturbed":
        """The weight with another value of the same layout and its tangent times `scale`."""
        if scale is None:
            return Perturbed(value, self.axes, self.terms)
        terms = []
        for first, *rest in self.terms:
            own = scale if jnp.iscomplexobj(scale) else scale.astype(first.array.dtype)
            terms.append((Factor(first.array * own, first.labels), *rest))
        return Perturbed(value, self.axes, tuple(terms))

    def times(self, value: jax.Array, array: jax.Array) -> "Perturbed | None":
        """The weight with another value, and its tangent times an array entry by entry.

        None where an axis has several labels.
        """
        if any(len(axis) > 1 for axis in self.axes) or array.ndim != self.value.ndim:
            return None
        kept = [i for i, n in enumerate(array.shape) if n != 1]
        if any(not self.axes[i] for i in kept):
            return None
        labels = tuple(self.axes[i][0] for i in kept)
        factor = Factor(array.reshape([array.shape[i] for i in kept]), labels)
        return Perturbed(value, self.axes, tuple((*term, factor) for term in self.terms))

    def renamed(self, names: Mapping[Label, Label]) -> "Perturbed":
        """The same weight with other labels."""

        def new(labels):
            return tuple(names.get(label, label) for label in labels)

        return self.map(
            self.value, lambda f: Factor(f.array, new(f.labels)), [new(axis) for axis in self.axes]
        )

    def __add__(self, other: "Perturbed") -> "Perturbed":
        """The sum with a weight whose axes have the same labels."""
        return Perturbed(self.value + other.value, self.axes, self.terms + other.terms)


def multiply(factors: Sequence[Factor], out: Sequence[Label]) -> jax.Array:
    """The product of `factors` with axes `out`, summed over every other label."""
    result = factors[0]
    for i, factor in enumerate(factors[1:], start=1):
        later = {label for f in factors[i + 1 :] for label in f.labels}
        result = _multiply_two(result, factor, keep={*out, *later})
    return _arrange(result, out)


def contract(
    x: Factor, factors: Sequence[Factor], out: Sequence[Label], **dot_options
) -> jax.Array:
    """`multiply((x, *factors), out)`, the factors that shrink `x` first."""
    summed = set(x.labels) - set(out)
    operands = [x, *sorted(factors, key=lambda f: summed.isdisjoint(f.labels))]
    result = operands[0]
    for i, factor in enumerate(operands[1:], start=2):
        later = {label for f in operands[i:] for label in f.labels}
        result = _multiply_two(result, factor, keep={*out, *later}, **dot_options)
    return _arrange(result, out)


def _multiply_two(x: Factor, y: Factor, keep: set[Label], **dot_options) -> Factor:
    labels = tuple(dict.fromkeys((*x.labels, *y.labels)))
    kept = tuple(label for label in labels if label in keep)
    if kept == labels:
        # Broadcasting fuses with whatever consumes the product; a dot would not.
        return Factor(_broadcast(x, labels) * _broadcast(y, labels), labels)
    letter = {label: i for i, label in enumerate(labels)}
    if x.labels[-1:] and x.labels[-1] in keep:
        # A product is fastest as it stands if the summed axis is last on the left, else first.
        x, y = y, x
    operands = [z for f in (x, y) for z in (f.array, [letter[label] for label in f.labels])]
    array = jnp.einsum(*operands, [letter[label] for label in kept], **dot_options)
    return Factor(array, kept)


def _broadcast(x: Factor, labels: Sequence[Label]) -> jax.Array:
    order = sorted(range(len(x.labels)), key=lambda i: labels.index(x.labels[i]))
    shape = [x.size(label) if label in x.labels else 1 for label in labels]
    return x.array.transpose(order).reshape(shape)


def _arrange(x: Factor, out: Sequence[Label]) -> jax.Array:
    summed = [i for i, label in enumerate(x.labels) if label not in out]
    array = jnp.sum(x.array, axis=summed) if summed else x.array
    kept = [label for label in x.labels if label in out]
    return array.transpose([kept.index(label) for label in out])


def placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """`x` placed as `like` is where types tell: on an explicit mesh, in `shard_map`."""
    x = varying_like(x, like)
    own, wanted = jax.typeof(x).sharding, jax.typeof(like).sharding
    if own.spec == wanted.spec or wanted.mesh.empty:
        return x
    return x if own == wanted else jax.sharding.reshard(x, wanted)
