"""What many calls of a function have in common, computed once."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from forwardgrad.rewrite._stages import variables
from forwardgrad.rewrite._trace import INFO, inline


class Shared(NamedTuple):
    """A function of which that is computed once that does not depend on its argument.

    - `start`: computes that, and returns the function, whose calls compute the rest.
    - `kept`: the bytes of what is computed once and is needed in the calls.
    - `largest`: the bytes of the largest array that a call computes.
    - `depends`: of which outputs it is not known that they are the same in all calls. A loop's are
        none of those, if its body has anything to do with the argument.
    """

    start: Callable[[], Callable[[Any], Any]]
    kept: int
    largest: int
    depends: Any


def shared(function: Callable[[Any], Any], like: Any, *, fixed: bool) -> Shared | None:
    """A function of one argument (a tree of arrays), for many calls; None if it has effects.

    **Arguments:**

    - `function`: the function.
    - `like`: an argument.
    - `fixed`: whether what a call computes is a constant to derivatives.
    """
    traced, out = jax.make_jaxpr(function, return_shape=True)(like)
    closed = inline(traced, forward=True)
    jaxpr = closed.jaxpr
    if jaxpr.effects:
        return None
    own, early, late = set(jaxpr.invars), [], []
    for eqn in jaxpr.eqns:
        depends = not own.isdisjoint(variables(eqn.invars))
        (late if depends else early).append(eqn)
        own.update(eqn.outvars if depends else ())
    # In the program's order: a set's order would differ from process to process.
    needed = dict.fromkeys(v for eqn in late for v in variables(eqn.invars) if v not in own)
    outs = variables(jaxpr.outvars)
    given = dict(zip(jaxpr.constvars, closed.consts, strict=True))

    def start() -> Callable[[Any], Any]:
        known = given | _run(early, given, [*needed, *(v for v in outs if v not in own)])
        kept = {v: jax.lax.stop_gradient(known[v]) if fixed else known[v] for v in needed}

        def call(argument: Any) -> Any:
            arguments = dict(zip(jaxpr.invars, jax.tree.leaves(argument), strict=True))
            made = _run(late, kept | arguments, [v for v in outs if v in own])
            found = known | arguments | made
            values = [a.val if isinstance(a, Literal) else found[a] for a in jaxpr.outvars]
            return jax.tree.unflatten(jax.tree.structure(out), values)

        return call

    return Shared(
        start,
        kept=sum(_bytes(v) for v in needed if v not in given),
        largest=max([_bytes(v) for eqn in late for v in eqn.outvars], default=0),
        depends=jax.tree.unflatten(
            jax.tree.structure(out), [isinstance(a, Var) and a in own for a in jaxpr.outvars]
        ),
    )


def _run(
    eqns: Sequence[JaxprEqn], given: Mapping[Var, Any], wanted: Iterable[Var]
) -> dict[Var, Any]:
    """The values of the wanted variables that are not given, after the equations."""
    made = list(dict.fromkeys(v for v in wanted if v not in given))
    jaxpr = Jaxpr((), [*given], made, list(eqns), frozenset(), INFO)
    return dict(zip(made, jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))(*given.values()), strict=True))


def _bytes(v: Var) -> int:
    aval: Any = v.aval
    return math.prod(aval.shape) * aval.dtype.itemsize
