"""How credit reaches each parameter, without a gradient being computed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from forwardgrad._request import Request
from forwardgrad.estimators import AbstractEstimator
from forwardgrad.estimators._credit import ExplainedParameter, explained


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What [`forwardgrad.explain`][] finds: a row for each array of parameters.

    Printed, it is a table.
    """

    estimator: str
    rows: tuple[ExplainedParameter, ...]

    def __str__(self) -> str:
        heads = ("parameter", "shape", "gradient", "axes", "terms", "built as an array by")
        lines: list[tuple[str, ...]] = [heads]
        for row in self.rows:
            terms = ", ".join(map(str, row.terms))
            first, *others = row.where or ("",)
            more = f" and {len(others)} more" if others else ""
            shape = "x".join(map(str, row.shape)) or "scalar"
            lines.append((row.path, shape, row.how, "; ".join(row.axes), terms, first + more))
        used = [i for i in range(len(heads)) if any(line[i] for line in lines[1:])]
        lines = [tuple(line[i] for i in used) for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([self.estimator, *padded])


def explain(
    fun: Callable[..., Any],
    estimator: AbstractEstimator,
    params: PyTree,
    *args: Any,
    has_aux: bool = False,
    **kwargs: Any,
) -> Explanation:
    """Say for each parameter how its gradient would be found.

    It traces `fun` and computes nothing, so it is cheap for large models too. Arrays may be
    `jax.ShapeDtypeStruct`s.

    **Arguments:**

    - `fun`, `has_aux`: as for [`forwardgrad.value_and_grad`][].
    - `estimator`: for instance [`forwardgrad.WeightPerturbation`][].
    - `params`, `args`, `kwargs`: what `fun` is called with.

    **Returns:**

    The explanation, whose `rows` are [`forwardgrad.ExplainedParameter`][]s. `print` it for a table.

    **Raises:**

    `InputError` where `value_and_grad` raises it while it traces `fun`.

    >>> import forwardgrad as fg, jax.numpy as jnp
    >>> def loss(w, x):
    ...     return jnp.mean((jnp.tanh(x @ w["in"] + w["bias"]) @ w["out"]) ** 2)
    >>> w = {"in": jnp.ones((3, 5)), "bias": jnp.zeros(5), "out": jnp.ones((5, 1))}
    >>> found = fg.explain(loss, fg.WeightPerturbation(exact_last=True), w, jnp.ones((8, 3)))
    >>> [(row.path, row.how) for row in found.rows]
    [("['bias']", 'dense'), ("['in']", 'rank-one'), ("['out']", 'exact')]
    """
    leaves, treedef = jax.tree.flatten((params, args, kwargs))
    arrays = [
        i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    ]
    found = []

    def trace(values):
        full = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            full[i] = value
        params, args, kwargs = treedef.unflatten(full)
        found.extend(explained(estimator, *request.objective((params, *args), kwargs)))

    request = Request(fun, estimator, 0, has_aux)
    jax.eval_shape(trace, [leaves[i] for i in arrays])
    return Explanation(repr(estimator), tuple(found))
