"""A function of the parameters as a program, and the factors that suit each parameter."""

import copy
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal, Var

from forwardgrad._losses import Losses
from forwardgrad.rewrite import _control, _rules  # noqa: F401  (they register their rules)
from forwardgrad.rewrite._axes import NamedAxes, Places
from forwardgrad.rewrite._flow import Influence, Part, Place
from forwardgrad.rewrite._layers import Activation, Hooks, LayerWalk, Noted
from forwardgrad.rewrite._perturbed import (
    RANK,
    TANGENTS,
    Factor,
    Label,
    Perturbed,
    multiply,
    placed_like,
)
from forwardgrad.rewrite._plan import Plan
from forwardgrad.rewrite._primitives import (
    UNBATCHABLE,
    is_lasting,
    is_ref,
    names,
    programs,
    shape_of,
)
from forwardgrad.rewrite._rows import Lookup, lookups
from forwardgrad.rewrite._stages import Stage, after, defined, stages
from forwardgrad.rewrite._steps import ends, is_elementwise, mixing_steps
from forwardgrad.rewrite._trace import inline, trace
from forwardgrad.rewrite._walk import Roles, Sketch
from forwardgrad.rewrite._workers import collectives, varying_like


@dataclasses.dataclass(frozen=True)
class FactorShape:
    """One factor of a parameter's tangent.

    `stacked` of its axes index slices that have a tangent of their own; it spans the `own` ones.
    """

    stacked: tuple[int, ...]
    own: tuple[int, ...]

    def labels(self, leaf: int) -> tuple[Label, ...]:
        """The labels of the factor's axes."""
        return tuple(Label(leaf, axis) for axis in (*self.stacked, *self.own))


Layout = tuple[FactorShape, ...]
"""The factors of one parameter's tangent."""


class Program:
    """`fun(params) -> (losses, aux)` as a jaxpr, to be evaluated with some operations replaced.

    **Arguments:**

    - `fun`: a function of one pytree of arrays that returns a tree of losses and any auxiliary
        data. Its attribute `given`, if it has one, holds arrays that it closes over which are data.
    - `params`: that pytree.
    - `forward`: whether forward mode is to go through it.
    - `twice`: whether reverse mode is then to go through the derivative.
    """

    def __init__(
        self,
        fun: Callable[[Any], tuple[Any, Any]],
        params: Any,
        *,
        forward: bool = True,
        twice: bool = False,
    ):
        self.leaves, self.treedef = jax.tree.flatten(params)
        structure = []

        def flat(leaves):
            losses, aux = fun(self.treedef.unflatten(leaves))
            terms, losses_treedef = jax.tree.flatten(losses)
            arrays, static = eqx.partition(aux, lambda leaf: isinstance(leaf, jax.Array))
            aux_leaves, aux_treedef = jax.tree.flatten(arrays)
            structure.append((losses_treedef, aux_treedef, static))
            return terms, aux_leaves

        self._closed = inline(trace(flat, self.leaves), forward, twice=twice)
        self._losses_treedef, self._aux_treedef, self._static_aux = structure[-1]
        self._forward = forward
        self._given = getattr(fun, "given", ())
        self._towards: dict[Var, dict[Var, Places]] = {}
        self._steps: dict[str, frozenset[Var]] = {}

    def stage_by_stage(
        self, run: Callable[[Stage, int, list[jax.Array]], tuple[Sequence[jax.Array], Any]]
    ) -> tuple[list[jax.Array], list[jax.Array], list[Any]]:
        """The program's outputs, by a function that evaluates a stage.

        `run(stage, number, reads) -> (writes, results)` may differentiate within the stage. No
        stage begins before the stage before it has its results, so only one of them needs memory.

        **Returns:**

        The losses, one array a term; the arrays among the auxiliary data; each stage's results.
        """
        jaxpr = self._closed.jaxpr
        env = dict(zip(jaxpr.constvars, self._closed.consts, strict=True))
        everything: list[Any] = []
        for number, stage in enumerate(self.stages):
            reads = [env[v] for v in stage.reads]
            if everything:
                reads = after(everything[-1], reads)
            writes, results = run(stage, number, reads)
            env.update(zip(stage.writes, writes, strict=True))
            everything.append(results)
        outs = [jnp.asarray(v.val if isinstance(v, Literal) else env[v]) for v in jaxpr.outvars]
        return outs[: self.terms], outs[self.terms :], everything

    def whole(self) -> tuple[Stage, Sequence[jax.Array]]:
        """All of it as one stage, and what that reads."""
        old = self._closed.jaxpr
        reads = tuple(old.constvars)
        inputs = [*old.invars, *reads]
        jaxpr = Jaxpr((), inputs, old.outvars, old.eqns, old.effects, old.debug_info)
        writes = tuple(v for v in old.outvars if isinstance(v, Var))
        return Stage(jaxpr, tuple(range(len(self.leaves))), reads, writes), self._closed.consts

    def with_hooks(
        self, leaves: Sequence[jax.Array], hooks: Hooks
    ) -> tuple[list[jax.Array], list[jax.Array], Noted]:
        """The losses, the auxiliary data, and what the hooks were called with."""
        walk = LayerWalk(self.plan, hooks)
        outs = walk.arrays(self._closed.jaxpr, self._closed.consts, leaves)
        arrays = [jnp.asarray(out) for out in outs]
        return arrays[: self.terms], arrays[self.terms :], walk.noted

    def described(self) -> list[Activation]:
        """All activations, with the shapes of their values in the place of these."""
        hooks = Hooks(activation=lambda a: a.value)
        return jax.eval_shape(
            lambda leaves: self.with_hooks(leaves, hooks)[2].activations, self.leaves
        )

    @functools.cached_property
    def stages(self) -> list[Stage]:
        """Its stages."""
        return stages(self._closed.jaxpr, self._influence)

    def terms_of(self, stage: Stage) -> dict[int, int]:
        """Where among a stage's `writes` which terms of the losses are."""
        variables = self._closed.jaxpr.outvars[: self.terms]
        return {i: stage.writes.index(v) for i, v in enumerate(variables) if v in stage.writes}

    @functools.cached_property
    def _influence(self) -> Influence:
        influence = Influence()
        terms = [frozenset({i} if i < self.terms else ()) for i in range(self._outputs)]
        influence.run(self._closed.jaxpr, [t or None for t in terms])
        return influence

    @functools.cached_property
    def plan(self) -> Plan:
        """Its layers and activations."""
        return Plan(self._closed, self.axes, self._given, self.collectives, self._forward)

    @property
    def axes(self) -> Sequence[Sequence[str]]:
        """For each term of the losses, the names of its axes."""
        losses = self.losses([None] * self.terms)
        return losses.axes if isinstance(losses, Losses) else ((),) * self.terms

    def mixing_steps(self, name: str) -> frozenset[Var]:
        """The activations that something mixes along an axis before the next layer is reached."""
        if name not in self._steps:
            self._steps[name] = mixing_steps(self._closed, self.plan, self.axes, name)
        return self._steps[name]

    def hidden(self, passed: frozenset[Var] = frozenset()) -> frozenset[Var]:
        """The activations below the last layers, but for those that are passed by."""
        plan = self.plan
        found = {v for v in plan.outputs if plan.terms(v) and not plan.is_last(v)}
        return frozenset(v for v in found - passed if not plan.is_on_its_way(v))

    def direct(self, passed: frozenset[Var]) -> frozenset[Var]:
        """The activations that no other one comes after, but for those that are passed by."""
        return ends(self._closed, self.terms, self.hidden(passed))

    def with_direct_scales(self, passed: frozenset[Var]) -> frozenset[Var]:
        """`passed`, and scales and biases by themselves that only last layers come after."""
        while True:
            more = {v for v in self.direct(passed) if is_elementwise(self.plan, v)}
            if not more:
                return passed
            passed |= more

    def last(self) -> frozenset[Var]:
        """The activations of the last layers."""
        return frozenset(
            v for v in self.plan.outputs if self.plan.terms(v) and self.plan.is_last(v)
        )

    def no_shifts(self, stage: Stage, activations: frozenset[Var]) -> dict[int, jax.Array]:
        """Zeros like those activations that a stage has, by their numbers, the loops first."""
        found = {}
        for v in defined(stage.jaxpr) & activations:
            output, aval = self.plan.outputs[v], v.aval
            shape = (*output.loops, *shape_of(v))
            zeros = jnp.zeros(shape, aval.dtype)  # pyright: ignore[reportAttributeAccessIssue]
            found[output.number] = varying_like(zeros, aval)
        return found

    def places_towards(self, variable: Var) -> dict[Var, Places]:
        """Where in all other variables the axes of one are, called "0", "1" and so on.

        The first ones are the loops that it is in.
        """
        if variable not in self._towards:
            flow, loops = NamedAxes(self._closed), self.plan.outputs[variable].loops
            shape = (*loops, *shape_of(variable))
            parts = [Part(i - len(loops), 1, n) for i, n in enumerate(shape)]
            flow.note(variable, {(0, str(i)): Place((p,), False) for i, p in enumerate(parts)})
            flow.run(self._closed.jaxpr, [None] * self._outputs)
            self._towards[variable] = flow.found
        return self._towards[variable]

    @functools.cached_property
    def collectives(self) -> frozenset[str]:
        """The axes along which workers exchange what they compute."""
        return collectives(self._closed.jaxpr)

    @functools.cached_property
    def lookups(self) -> dict[int, Lookup]:
        """The equations that look up rows of parameters, where nothing else uses these."""
        return lookups(self._closed.jaxpr)

    @property
    def has_effects(self) -> bool:
        """Whether it does anything but compute."""
        return any(map(is_lasting, self._closed.jaxpr.effects))

    @property
    def has_refs(self) -> bool:
        """Whether it makes a `jax.Ref`, or uses one."""
        jaxpr = self._closed.jaxpr
        return any(is_ref(v) for eqn in jaxpr.eqns for v in (*eqn.invars, *eqn.outvars))

    @functools.cached_property
    def may_refuse_vmap(self) -> bool:
        """Whether it holds effects, or primitives that cannot always be batched."""
        jaxpr = self._closed.jaxpr
        return bool(jaxpr.effects) or not names(jaxpr).isdisjoint(UNBATCHABLE)

    @property
    def _outputs(self) -> int:
        return len(self._closed.jaxpr.outvars)

    @property
    def terms(self) -> int:
        """The number of terms that the losses have."""
        return self._losses_treedef.num_leaves

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each term of the losses."""
        return [shape_of(v) for v in self._closed.jaxpr.outvars[: self.terms]]

    def losses(self, terms: Sequence[jax.Array | None]) -> Any:
        """The losses, as `fun` returned them; None in the place of one that is not known."""
        return self._losses_treedef.unflatten(terms)

    def influence(self) -> list[frozenset[int]]:
        """For each parameter, the terms of the losses that it can change."""
        known = [self._influence.of(v) for v in self._closed.jaxpr.invars]
        return [frozenset(t for t in terms or () if isinstance(t, int)) for terms in known]

    def of_last_layers(self) -> list[int]:
        """The positions of the parameters that no layer comes after."""
        parameters = enumerate(self._closed.jaxpr.invars)
        return [i for i, v in parameters if self.plan.terms(v) and self.plan.is_last(v)]

    def auxiliary(self, arrays: Sequence[jax.Array]) -> Any:
        """The auxiliary data, as `fun` returned it."""
        return eqx.combine(self._aux_treedef.unflatten(arrays), self._static_aux)

    def at(self, leaves: Sequence[jax.Array]) -> "Program":
        """The program at other parameters of the same shapes."""
        other = copy.copy(self)
        other.leaves = list(leaves)
        return other

    def layouts(self) -> list[Layout]:
        """A layout for each parameter, from what the program does with it.

        A parameter that is contracted, looked up or convolved with gets two factors: one over the
        axes that are summed over, and one over the others. If `scan`, indexing or a batch axis
        cuts the parameter into slices, each slice has its own pair. Any other parameter is dense.
        """
        walk = self._sketched([one_factor_an_axis(leaf.shape) for leaf in self.leaves])
        return [_layout(leaf.shape, walk.roles[i]) for i, leaf in enumerate(self.leaves)]

    def built(self, layouts: Sequence[Layout]) -> dict[int, list[str]]:
        """Where tangents with these layouts have to be built as arrays, by parameter."""
        found: dict[int, list[str]] = {}
        for leaf, where in sorted(self._sketched(layouts).built):
            found.setdefault(leaf, []).append(where)
        return found

    def _sketched(self, layouts: Sequence[Layout]) -> Sketch:
        walk = Sketch(None)

        def run(leaves):
            weights = [
                perturbed(i, leaf, layout, None)
                for i, (leaf, layout) in enumerate(zip(leaves, layouts, strict=True))
            ]
            return walk.arrays(self._closed.jaxpr, self._closed.consts, weights)

        jax.eval_shape(run, self.leaves)
        return walk

    def activations(self) -> list[list[Var]]:
        """For each parameter the activations that it makes by itself."""
        found: list[list[Var]] = [[] for _ in self.leaves]

        nothing: frozenset[int] = frozenset()

        def go(jaxpr: Jaxpr, sources: list[frozenset[int]]) -> None:
            known = dict(zip(jaxpr.invars, sources, strict=True))
            for eqn in jaxpr.eqns:
                ins = [known.get(a, nothing) if isinstance(a, Var) else nothing for a in eqn.invars]
                if eqn.primitive.name == "scan":
                    go(programs(eqn)[0].jaxpr, ins)
                own = nothing.union(*ins)
                for v in eqn.outvars:
                    known[v] = own
                    if v in self.plan.outputs and not self.plan.is_on_its_way(v):
                        known[v] = nothing
                        for i in sorted(own):
                            found[i].append(v)

        go(self._closed.jaxpr, [frozenset({i}) for i in range(len(self.leaves))])
        return found


def dense_layout(shape: Sequence[int]) -> Layout:
    """One factor with all of the parameter's axes."""
    return (FactorShape((), _axes(shape)),)


def one_factor_an_axis(shape: Sequence[int]) -> Layout:
    """A factor for every axis."""
    return tuple(FactorShape((), (axis,)) for axis in _axes(shape)) or dense_layout(shape)


def _layout(shape: Sequence[int], roles: Roles) -> Layout:
    axes = set(_axes(shape))
    stacked = axes & roles.stacked
    contracted = (axes & (roles.contracted or set())) - stacked
    free = axes - stacked - contracted
    if not contracted or not free:
        return dense_layout(shape)
    return tuple(
        FactorShape(tuple(sorted(stacked)), tuple(sorted(own))) for own in (contracted, free)
    )


def computed_in(dtype: Any) -> Any:
    """The type that factors of a weight have: eight bits are for storage alone."""
    return jnp.float32 if jnp.dtype(dtype).itemsize == 1 else dtype


def masked_rows(layout: Layout, arrays: Sequence[jax.Array], axis: int, rows: jax.Array) -> list:
    """The factors of a parameter's tangents, without those rows along an axis that are not used."""
    found = []
    for shape, array in zip(layout, arrays, strict=True):
        axes = (*shape.stacked, *shape.own)
        if axis in axes:
            mask = rows.reshape(-1, *[1] * (len(axes) - axes.index(axis) - 1))
            array = jnp.where(mask, array, 0)
        found.append(array)
    return found


def _axes(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis for axis, size in enumerate(shape) if size != 1)


def perturbed(
    leaf: int, value: jax.Array, layout: Layout, arrays: Sequence[jax.Array] | None
) -> Perturbed | jax.Array:
    """The parameter at position `leaf` with its tangent (of ones, where `arrays` is None)."""
    if value.size == 0:
        return value
    axes = tuple((Label(leaf, axis),) if size != 1 else () for axis, size in enumerate(value.shape))
    if arrays is None:
        dtype = computed_in(value.dtype)
        arrays = [jnp.ones(factor_shape(value.shape, f), dtype) for f in layout]
    return Perturbed(value, axes, (named(leaf, layout, arrays),))


def named(
    leaf: int, layout: Layout, arrays: Sequence[jax.Array], extra: Sequence[Label] = (RANK,)
) -> tuple[Factor, ...]:
    """The factors of one parameter with their labels, `extra` in front where there are more."""
    factors = []
    for shape, array in zip(layout, arrays, strict=True):
        labels = shape.labels(leaf)
        factors.append(Factor(array, (*extra[: array.ndim - len(labels)], *labels)))
    return tuple(factors)


def factor_shape(shape: Sequence[int], factor: FactorShape) -> tuple[int, ...]:
    """The array shape of one factor of a parameter."""
    return tuple(shape[axis] for axis in (*factor.stacked, *factor.own))


MOST_UNROLLED = 16
"""Up to so many outer products, adding them up entry by entry beats a matrix product.

It fuses with the optimiser's update and needs no memory (measured on CPU: six times faster for two
terms, as fast for 24).
"""


def combine_tangents(
    leaf: int,
    value: jax.Array,
    layout: Layout,
    arrays: Sequence[jax.Array],
    coefficients: jax.Array,
) -> jax.Array:
    """`sum_k coefficients[k] V_k` for tangents stacked along the first axis of their factors."""
    out = tuple(Label(leaf, axis) for axis in _axes(value.shape))
    weights = Factor(coefficients.astype(computed_in(value.dtype)), (TANGENTS,))
    factors = (weights, *named(leaf, layout, arrays, extra=(TANGENTS, RANK)))
    terms = [factors]
    summed = (TANGENTS, RANK)
    sizes = {label: f.size(label) for f in factors for label in summed if label in f.labels}
    if len(layout) > 1 and math.prod(sizes.values()) <= MOST_UNROLLED:
        for label, size in sizes.items():
            terms = [tuple(f.at(label, i) for f in term) for term in terms for i in range(size)]
    total = functools.reduce(operator.add, [multiply(term, out) for term in terms])
    return placed_like(total.reshape(value.shape).astype(value.dtype), value)
