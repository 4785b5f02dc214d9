"""How credit reaches each parameter, in words."""

import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import Array, PyTree

from forwardgrad._errors import InputError
from forwardgrad.estimators._base import Objective
from forwardgrad.rewrite import Program


@dataclasses.dataclass(frozen=True)
class ExplainedParameter:
    """How the gradient of one array of parameters is found.

    **Arguments:**

    - `path`: its path in `params` (`jax.tree_util.keystr`).
    - `shape`: its shape.
    - `how`: `"rank-one"` or `"dense"`, a tangent of its own; `"activation"`, a perturbation of what
        its layer computes; `"reverse"`, one step of reverse mode from the estimates of the layers
        after it; `"feedback"`, errors that come back through random weights; `"exact"`; or
        `"none"`, if no loss depends on it.
    - `where`: where its tangent has to be built as an array: primitive, file, line.
    - `terms`: the positions of those terms of the losses that it can change.
    - `axes`: where each axis of the losses is in what its layer computes, for instance
        `"example: axis 0"`, or `"mixed"` if each of these losses depends on every entry.
    """

    path: str
    shape: tuple[int, ...]
    how: str
    where: tuple[str, ...] = ()
    terms: tuple[int, ...] = ()
    axes: tuple[str, ...] = ()


@functools.singledispatch
def explained(estimator: Any, fun: Objective, params: PyTree[Array]) -> list[ExplainedParameter]:
    """A row for each parameter: what an estimator does with it."""
    del fun, params
    raise InputError(f"estimator must be one that can be explained, got {estimator!r}")


def of_parameters(program: Program, params: PyTree[Array], how: list[str]) -> list[Any]:
    """Rows with what all estimators have in common; `how` for parameters that change the losses."""
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    rows = []
    for (path, leaf), kind, terms in zip(paths, how, program.influence(), strict=True):
        name = jax.tree_util.keystr(path) or "params"
        found = tuple(sorted(terms))
        rows.append(ExplainedParameter(name, leaf.shape, kind if terms else "none", terms=found))
    return rows


def by_layer(
    program: Program,
    params: PyTree[Array],
    hidden: str,
    reverse: frozenset[Any] = frozenset(),
) -> list[ExplainedParameter]:
    """Rows for an estimator that treats layers below others in one way, and the last exactly.

    Of the former, those in `reverse` get their gradients from the layers after them.
    """
    plan = program.plan
    below = [[v for v in vs if not plan.is_last(v)] for vs in program.activations()]
    how = [("reverse" if vs[0] in reverse else hidden) if vs else "exact" for vs in below]
    rows = of_parameters(program, params, how)
    return [
        dataclasses.replace(row, axes=tuple(_in_words(plan.places(vs[0])))) if vs else row
        for row, vs in zip(rows, below, strict=True)
    ]


def _in_words(places: Any) -> list[str]:
    found = []
    for (term, name), place in sorted(places.items(), key=str):
        if name is None:
            continue
        where = "unknown" if not place.mixed else "mixed"
        if place.parts is not None and not place.mixed:
            axes = dict.fromkeys("a loop" if p.axis < 0 else f"axis {p.axis}" for p in place.parts)
            where = " and ".join(axes)
        found.append(f"{name}: {where}" if term == 0 else f"{name} of term {term}: {where}")
    return list(dict.fromkeys(found))
