"""The walk: evaluate a jaxpr while some of its values are perturbed weights.

Every equation that no perturbed weight enters is evaluated as it stands. One that a weight enters
has a rule (`_rules.py`) or gets the weight with its tangent built as an array, which is always
correct. Loops and branches are walked through (`_control.py`).
"""

import abc
import dataclasses
import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from forwardgrad.rewrite._perturbed import Factor, Label, Perturbed, placed_like
from forwardgrad.rewrite._primitives import line_of
from forwardgrad.rewrite._rows import Lookup, taken
from forwardgrad.rewrite._trace import Array, evaluate

Value: TypeAlias = Any
"""An array, or a `Perturbed` weight."""

Rule: TypeAlias = Callable[[Any, JaxprEqn, Sequence[Value]], "Sequence[Value] | None"]
"""Evaluates one equation; None where it finds the weight in a place that it has no formula for."""

READING_BOUND = 8
"""A product with a weight this many times larger than its input is bound by reading the weight.

Reading it once for the input and its tangent makes the step of an MLP with layers of 1024 and
batch 64 some 8 % faster on a CPU; from batch 256 on there is nothing to gain.
"""

RULES: dict[str, Rule] = {}
"""Primitive name to rule, for the equations that a perturbed weight enters."""

PROGRAMS: dict[str, Rule] = {}
"""Primitive name to rule, for the equations that hold programs."""


def rule(*names: str, table: dict[str, Any] = RULES) -> Callable[[Any], Any]:
    """Register a rule under the names of its primitives."""

    def register(fn: Any) -> Any:
        table.update(dict.fromkeys(names, fn))
        return fn

    return register


@dataclasses.dataclass
class Roles:
    """What becomes of the axes of one parameter where it is first contracted."""

    stacked: set[int] = dataclasses.field(default_factory=set)
    contracted: set[int] | None = None


class AbstractWalk(abc.ABC):
    """An evaluation of a program in which some values are not arrays yet."""

    def __call__(self, jaxpr: Jaxpr, consts: Sequence[Value], args: Sequence[Value]) -> list[Value]:
        """The outputs of `jaxpr`, which need not be arrays either."""
        env: dict[Var, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Value:
            return atom.val if isinstance(atom, Literal) else env[atom]

        for eqn in jaxpr.eqns:
            outs = self.equation(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def arrays(self, jaxpr: Jaxpr, consts: Sequence[Value], args: Sequence[Value]) -> list[Array]:
        """The outputs of `jaxpr`, as arrays."""
        return [self.array(out) for out in self(jaxpr, consts, args)]

    @abc.abstractmethod
    def array(self, value: Value) -> Array:
        """`value` as an array."""

    @abc.abstractmethod
    def equation(self, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value]:
        """The outputs of one equation."""

    @abc.abstractmethod
    def iteration(self, i: jax.Array) -> "AbstractWalk":
        """What evaluates the body of a loop in its i-th iteration."""

    @property
    def noted(self) -> Any:
        """A tree of arrays that a walk leaves beside its outputs."""
        return None

    def note(self, stacked: Any) -> None:
        """Take over `noted` of the iterations of a loop, stacked."""
        del stacked


@dataclasses.dataclass(frozen=True)
class Walk(AbstractWalk):
    """One evaluation of a program with perturbed weights.

    `eps` is the scalar with respect to which the program is differentiated. Without it, the program
    is evaluated at the sum of weights and tangents, which is right for what is linear in them.
    `single` says that there is one tangent; an input and its tangent may then be multiplied with a
    weight in one product. `rows` collects which rows of parameters `lookups` take.
    """

    eps: jax.Array | None
    single: bool = False
    lookups: Mapping[int, Lookup] = dataclasses.field(default_factory=dict)
    rows: dict[int, jax.Array] = dataclasses.field(default_factory=dict)

    def array(self, value: Value) -> Array:
        """`value` as an array; the tangent of a perturbed weight is built."""
        if not isinstance(value, Perturbed):
            return value
        return self.apply(value, lambda _, w: w, lambda _, w: w.tangent())

    def apply(
        self,
        weight: Perturbed,
        primal: Callable[[Any, jax.Array], jax.Array],
        contribution: Callable[[Any, Perturbed], jax.Array],
        x: Any = (),
    ) -> jax.Array:
        """`primal(x, weight)`, bilinear, with the weight's tangent applied through its factors.

        Its directional derivative is `primal(dx, W) + deps * contribution(x, W)`, where
        `contribution(x, W)` is `primal(x, V)` computed from the factors of the tangent V.
        """
        if self.eps is None:
            terms = [Perturbed(weight.value, weight.axes, (term,)) for term in weight.terms]
            changes = [contribution(x, term) for term in terms]
            if not weight.is_zero:
                changes.append(primal(x, weight.value))
            like = jax.eval_shape(primal, x, weight.value)
            return functools.reduce(operator.add, [c.astype(like.dtype) for c in changes])
        # The rule outlives the trace of a loop's body, whose arrays it must not hold on to.
        axes, layout = weight.axes, [[f.labels for f in term] for term in weight.terms]
        single = self.single

        @jax.custom_jvp
        def op(eps, x, value, arrays):
            del eps, arrays
            return primal(x, value)

        def jvp(primals, tangents):
            _, x, value, arrays = primals
            deps, dx, dvalue, _ = tangents
            terms, moved = [], None
            if not _is_zero(dx) and single and value.size >= READING_BOUND * x.size:
                out, moved = jax.vmap(primal, (0, None))(jnp.stack([x, dx]), value)
            else:
                out = primal(x, value)
            if not _is_zero(deps):
                for own, labels in zip(arrays, layout, strict=True):
                    term = tuple(Factor(a, n) for a, n in zip(own, labels, strict=True))
                    scaled = Perturbed(value, axes, (term,)).with_value(value, scale=deps)
                    terms.append(contribution(x, scaled))
            # After the contribution: XLA keeps the order, and convolutions are faster in this one.
            if not _is_zero(dx):
                terms.append(primal(dx, value) if moved is None else moved)
            if not _is_zero(dvalue):
                terms.append(primal(x, dvalue))
            terms = [placed_like(t.astype(out.dtype), out) for t in terms]
            return out, sum(terms, start=jnp.zeros_like(out))

        op.defjvp(jvp, symbolic_zeros=True)
        arrays = [[f.array for f in term] for term in weight.terms]
        return op(self.eps, x, weight.value, arrays)

    def record(self, contracted: Sequence[Label] = (), stacked: Sequence[Label] = ()) -> None:
        """Take note of what a rule does with the axes that the labels came from."""
        del contracted, stacked

    def like(self, weight: Perturbed, other: Perturbed) -> Perturbed | None:
        """`other` with the labels of a weight of the same shape, None where these do not agree."""
        names = {}
        for own, its in zip(weight.axes, other.axes, strict=True):
            if len(own) != len(its) or len(own) > 1:
                return None
            names.update(zip(its, own, strict=True))
        return self.rename(other, names)

    def rename(self, weight: Perturbed, names: Mapping[Label, Label]) -> Perturbed | None:
        """A weight with other labels, which are then known to mean the same."""
        return weight.renamed(names) if len({*names.values()}) == len(names) else None

    def iteration(self, i: jax.Array) -> "Walk":
        """The same walk."""
        return self

    def equation(self, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value]:
        """The outputs of one equation, by its rule if a weight enters it."""
        name = eqn.primitive.name
        if id(eqn) in self.lookups:
            leaf, axis = self.lookups[id(eqn)]
            used = taken(eqn, axis, invals)
            self.rows[leaf] = self.rows[leaf] | used if leaf in self.rows else used
        perturbed = any(isinstance(v, Perturbed) for v in invals)
        if perturbed and name in PROGRAMS:
            outs = PROGRAMS[name](self, eqn, invals)
        elif perturbed and name in RULES:
            outs = RULES[name](self, eqn, invals)
        else:
            outs = None
        if outs is not None:
            return outs
        return self.evaluate(eqn, [self.array(v) for v in invals])

    def evaluate(self, eqn: JaxprEqn, arrays: Sequence[Array]) -> Sequence[Array]:
        """The outputs of an equation at arrays."""
        return evaluate(eqn, arrays)


@dataclasses.dataclass(frozen=True)
class Sketch(Walk):
    """A walk that finds out what becomes of the weights, and computes little else.

    `roles` collects how each parameter (by its position) is used, and `built` which parameters'
    tangents have to be built as arrays, and where; `at` is the equation at hand.
    """

    roles: dict[int, Roles] = dataclasses.field(default_factory=lambda: defaultdict(Roles))
    aliases: dict[tuple[int, int], set[Label]] = dataclasses.field(default_factory=dict)
    built: set[tuple[int, str]] = dataclasses.field(default_factory=set)
    at: list[JaxprEqn] = dataclasses.field(default_factory=list)

    def array(self, value: Value) -> Array:
        """An array in the place of `value`."""
        if not isinstance(value, Perturbed):
            return value
        where = f"{self.at[0].primitive} at {line_of(self.at[0])}" if self.at else "the end"
        self.built.update((label.leaf, where) for label in value.labels)
        return value.value

    def apply(
        self,
        weight: Perturbed,
        primal: Callable[[Any, jax.Array], jax.Array],
        contribution: Callable[[Any, Perturbed], jax.Array],
        x: Any = (),
    ) -> Array:
        """An array in the place of what the equation at hand computes."""
        nothing = _nothing(self.at[0])
        return primal(x, weight.value) if nothing is None else nothing[0]

    def equation(self, eqn: JaxprEqn, invals: Sequence[Value]) -> Sequence[Value]:
        """The outputs of one equation, by its rule if a weight enters it."""
        if eqn.primitive.name not in PROGRAMS:
            self.at[:] = [eqn]
        return super().equation(eqn, invals)

    def evaluate(self, eqn: JaxprEqn, arrays: Sequence[Array]) -> Sequence[Array]:
        """Arrays in the place of an equation's outputs."""
        nothing = _nothing(eqn)
        return evaluate(eqn, arrays) if nothing is None else nothing

    def record(self, contracted: Sequence[Label] = (), stacked: Sequence[Label] = ()) -> None:
        """Take note of what a rule does with the axes that the labels came from."""
        stacked, contracted = (self._with_aliases(labels) for labels in (stacked, contracted))
        for label in stacked:
            if self.roles[label.leaf].contracted is None:
                self.roles[label.leaf].stacked.add(label.axis)
        # Only where it is first contracted: a tied embedding is looked up, then multiplied with.
        first = {n.leaf for n in contracted if self.roles[n.leaf].contracted is None}
        for leaf in first:
            self.roles[leaf].contracted = {n.axis for n in contracted if n.leaf == leaf}

    def _with_aliases(self, labels: Sequence[Label]) -> list[Label]:
        found = list(dict.fromkeys(labels))
        for label in found:
            found += [alias for alias in self.aliases.get(label[:2], ()) if alias not in found]
        return found

    def rename(self, weight: Perturbed, names: Mapping[Label, Label]) -> Perturbed | None:
        """A weight with other labels, which are then known to mean the same."""
        for old, new in names.items():
            if old[:2] != new[:2]:
                self.aliases.setdefault(new[:2], set()).add(Label(*old[:2]))
        return super().rename(weight, names)


def _nothing(eqn: JaxprEqn) -> list[Array] | None:
    """Zeros that take no memory in the place of an equation's outputs.

    None where an output is more than its shape and type: on a mesh, or a key.
    """
    avals: list[Any] = [v.aval for v in eqn.outvars]
    plain = all(
        isinstance(a, ShapedArray)
        and not jnp.issubdtype(a.dtype, jax.dtypes.extended)
        and a.sharding.mesh.empty
        for a in avals
    )
    return [np.broadcast_to(np.zeros((), a.dtype), a.shape) for a in avals] if plain else None


def _is_zero(tangent: Any) -> bool:
    leaves = jax.tree.leaves(tangent, is_leaf=lambda t: isinstance(t, SymbolicZero))
    return all(isinstance(leaf, SymbolicZero) for leaf in leaves)
