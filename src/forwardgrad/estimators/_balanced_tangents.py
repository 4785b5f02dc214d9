"""Activity perturbation with tangents as long as each layer needs them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from forwardgrad._errors import MOST, InputError, unknown_name, with_article
from forwardgrad.estimators._base import AbstractStatefulEstimator, Objective
from forwardgrad.estimators._credit import ExplainedParameter, explained
from forwardgrad.estimators._distributions import feedback_key, portable
from forwardgrad.estimators._perturbed_activities import AbstractPerturbedActivities
from forwardgrad.estimators._steering import at_iterations, check_no_refs, check_one_by_one
from forwardgrad.rewrite import Activation, Hooks, Program

Rule: TypeAlias = Literal["relative", "absolute"]

SMALLEST = 1e-16
"""A layer with a smaller share of the power is taken for one that has no gradient yet."""

LONGEST = 2.0**15
"""No entry's tangent is longer, so that half precision holds it."""

KEPT = 0.5
"""What is kept of an earlier measurement when a layer is measured again."""


class Balance(eqx.Module):
    """What [`forwardgrad.BalancedTangents`][] remembers.

    - `power`: of each layer, the sum of squares of the losses' changes along its tangent alone.
    - `steps`: the number of steps so far.
    - `estimator`, `layers`: whose they are.
    """

    power: Float[Array, "layers"]
    steps: Int[Array, ""]
    estimator: str = eqx.field(static=True)
    layers: tuple[int, ...] = eqx.field(static=True)


class _Layer(NamedTuple):
    """Where an activation's powers are, how many of its entries share a loss, and which losses.

    `loops` are those around it in which its weights change, as positions and lengths: each of their
    iterations has a power of its own.
    """

    first: int
    entries: float
    terms: frozenset[int]
    loops: tuple[tuple[int, int], ...]

    @property
    def iterations(self) -> int:
        return math.prod(length for _, length in self.loops)

    def own(self, array: Array, activation: Activation) -> Array:
        """The entry that belongs to one iteration of these loops."""
        own = array[self.first : self.first + self.iterations]
        own = own.reshape([length for _, length in self.loops])
        iterations = tuple(activation.iterations[i] for i, _ in self.loops)
        return at_iterations(own, activation.site._replace(iterations=iterations))


class BalancedTangents(AbstractStatefulEstimator):
    r"""Perturbed activities with longer tangents where the losses hear less of them.

    One directional derivative $d$ is shared by all layers, and so is its noise. If one layer's
    gradient is much larger than another's, the other's estimate is all noise. Here layer m gets the
    tangent $s_m u_m$ and the estimate

    $$\hat g_m = \frac1K \sum_{k=1}^K \frac{d_k u_{m,k}}{s_m},$$

    which is unbiased for any $s$. Let $N_m$ be the number of the layer's entries that share a loss,
    and $P_m$ the power of the losses' change if only this layer is perturbed, which is the sum of
    squares of the derivatives of each loss. The relative error, summed over layers, is least for

    $$s_m^2 = \sqrt{N_m} / P_m,$$

    and the absolute error for $s_m^2 = \sqrt{N_m / P_m}$. Scales are divided by a common factor, so
    that an entry is perturbed as much as without them on average.

    The powers are the state. `init` measures all of them; then one layer in turn is measured every
    few steps, along a tangent in this layer alone. In a loop over layers, each of them has its own.

    **Arguments:**

    - `estimator`: an [`forwardgrad.ActivityPerturbation`][] or [`forwardgrad.NodePerturbation`][].
    - `rule`: which error is least, the `"relative"` one or the `"absolute"` one.
    - `every`: the number of steps from one measurement to the next. One costs as much as a step
        with one tangent.

    **Raises:**

    `InputError` where an argument is out of range; when called, where the estimator raises it, if
    the state is not one of this estimator and this function, if `fun` has effects, or if the
    workers of a `shard_map` exchange what they compute.

    ??? cite "Reference"

        The scales follow from the variance in Section 3 of Ren, Kornblith, Liao & Hinton, *Scaling
        Forward Gradient with Local Losses*, ICLR 2023
        ([arXiv:2210.03310](https://arxiv.org/abs/2210.03310)), by the inequality of Cauchy and
        Schwarz.

    >>> import forwardgrad as fg, jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (8, 3))
    >>> def losses(w):
    ...     out = jnp.tanh(jnp.tanh(x @ w["first"]) @ w["second"]) @ w["last"]
    ...     return fg.Losses([jnp.mean((out - 1) ** 2, axis=1) / 8], [("example",)])
    >>> w = {"first": jnp.ones((3, 5)), "second": 0.01 * jnp.ones((5, 5)), "last": jnp.ones((5, 2))}
    >>> init, step = fg.estimation(losses, fg.BalancedTangents(fg.ActivityPerturbation()))
    >>> state = init(w)
    >>> value, grads, state = jax.jit(step)(w, key=jax.random.key(1), state=state)
    >>> bool(state.power[0] < 1e-2 * state.power[1])
    True
    """

    estimator: AbstractPerturbedActivities
    rule: Rule = "relative"
    every: int = 4

    def __check_init__(self):
        if not isinstance(self.estimator, AbstractPerturbedActivities):
            raise InputError(
                "estimator must be an ActivityPerturbation or NodePerturbation, got "
                f"{self.estimator!r}"
            )
        if self.rule not in get_args(Rule):
            raise unknown_name("rule", str(self.rule), get_args(Rule))
        if not isinstance(self.every, int) or not 1 <= self.every <= MOST:
            raise InputError(f"every must be an integer of at least 1, got {self.every!r}")

    @property
    def needs_key(self) -> bool:
        """True."""
        return True

    @property
    def needs_state(self) -> bool:
        """True."""
        return True

    def value_and_grad(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        """The estimate by powers that are measured for it."""
        (result, grads, _) = self.estimate(fun, params, key, self.init(fun, params))
        return result, grads

    def init(self, fun: Objective, params: PyTree[Array]) -> Balance:
        """The powers of all layers."""
        program = self._program(fun, params)
        layers = _layers(self.estimator, program)

        @jax.jit
        def measured(leaves):
            def power(i):
                return _power(self.estimator, program, leaves, layers, i, feedback_key(0))

            return jax.lax.map(power, jnp.arange(_count(layers)))

        power = measured(program.leaves) if layers else jnp.zeros(0)
        return Balance(power, jnp.zeros((), jnp.int32), repr(self), _signature(layers))

    def estimate(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None, state: Any
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array], Balance]:
        """The estimate by the powers in `state`, one of which is measured again."""
        assert key is not None
        program = self._program(fun, params)
        layers = _layers(self.estimator, program)
        self._check(state, layers)
        scales = _scales(state.power, layers, self.rule)
        result, grads = self.estimator._by_scales(
            program, key, lambda a: layers[a.number].own(scales, a)
        )
        count = _count(layers)

        def again(power):
            i = (state.steps // self.every) % count
            own = jax.random.fold_in(portable(key), MOST)
            new = _power(self.estimator, program, program.leaves, layers, i, own)
            new = KEPT * power[i] + (1 - KEPT) * new
            return power.at[i].set(jnp.where(jnp.isfinite(new), new, power[i]))

        power = state.power
        if count:
            power = jax.lax.cond(state.steps % self.every == 0, again, lambda p: p, power)
        # It counts on from zero where an integer would end.
        steps = (state.steps + 1) % (max(1, count) * self.every)
        return result, grads, Balance(power, steps, state.estimator, state.layers)

    def _program(self, fun: Objective, params: PyTree[Array]) -> Program:
        program = self.estimator._program(fun, params)
        name = type(self).__name__
        check_one_by_one(program, name)
        check_no_refs(program, name)
        if program.has_effects:
            raise InputError(f"fun must have no effects: {name} evaluates it again to measure")
        if program.collectives:
            raise InputError(
                f"{name} cannot be used where the workers of a shard_map exchange what they "
                f"compute, along {sorted(program.collectives)}"
            )
        return program

    def _check(self, state: Any, layers: dict[int, _Layer]) -> None:
        must = f"state must be the one that init returned for this function and {self!r}"
        if not isinstance(state, Balance):
            raise InputError(f"{must}, got {with_article(type(state).__name__)}")
        if state.estimator != repr(self):
            raise InputError(f"{must}, got that of {state.estimator}")
        if state.layers != _signature(layers) or state.power.shape != (_count(layers),):
            raise InputError(
                f"{must}: it has powers of {state.power.size} layers, where {_count(layers)} are "
                "needed, or of others"
            )


def _count(layers: dict[int, _Layer]) -> int:
    return sum(layer.iterations for layer in layers.values())


def _signature(layers: dict[int, _Layer]) -> tuple[int, ...]:
    return tuple(n for number, layer in layers.items() for n in (number, layer.iterations))


def _layers(estimator: AbstractPerturbedActivities, program: Program) -> dict[int, _Layer]:
    """The activations that are perturbed, by their numbers."""
    not_perturbed = estimator._not_perturbed(program) | _direct(estimator, program)
    hooks = Hooks(activation=lambda a: a.value)
    noted = jax.eval_shape(
        lambda leaves: program.with_hooks(leaves, hooks)[2].activations, program.leaves
    )
    found: dict[int, _Layer] = {}
    first = 0
    for a in noted:
        if a.last or a.variable in not_perturbed:
            continue
        layer = program.plan.layers.get(id(program.plan.outputs[a.variable].eqn))
        lengths = a.value.shape[: a.stacked]
        loops = tuple((i, lengths[i]) for i in (() if layer is None else layer.own_loops))
        own = math.prod(length for _, length in loops)
        entries = a.value.size / own / _apart(a)
        found[a.number] = _Layer(first, max(1.0, entries), a.terms, loops)
        first += own
    return found


def _direct(estimator: AbstractPerturbedActivities, program: Program) -> frozenset[Any]:
    """The activations that have their exact gradient, and no tangent."""
    exact = estimator.exact_direct
    return program.direct(estimator._not_perturbed(program)) if exact else frozenset()


def _apart(activation: Activation) -> int:
    """The number of losses that entries of an activation have for themselves."""
    counts = [1]
    for term in activation.terms:
        names = [name for (t, name), _ in activation.places if t == term and name is not None]
        places = [activation.place(term, name) for name in names]
        parts = [p for place in places if not place.mixed for p in place.parts or ()]
        counts.append(math.prod(p.size for p in parts))
    return max(counts)


def _power(
    estimator: AbstractPerturbedActivities,
    program: Program,
    leaves: Sequence[Array],
    layers: dict[int, _Layer],
    i: Array,
    key: Key[Array, ""],
) -> Array:
    """The power of the losses' change if only the i-th layer is perturbed."""
    direct = _direct(estimator, program)
    chosen = (jnp.arange(_count(layers)) == i).astype(jnp.float32)

    def evaluate(eps, k, held=None, apart=False):
        cut = jax.lax.stop_gradient if held is None else held

        def perturb(a):
            has_tangent = a.number in layers
            if eps is None or not (has_tangent or a.variable in direct):
                return a.value
            z = cut(a.value) if apart else a.value
            if not has_tangent:
                return z
            scale = layers[a.number].own(chosen, a)
            return estimator._moved(eps, z, estimator._tangent(a.site.key(key), a, k, scale))

        return program.with_hooks(leaves, Hooks(activation=perturb, held=held))[0], None

    _, changes = dataclasses.replace(estimator, tangents=1, chunk=None)._changes(evaluate, program)
    return sum([jnp.sum(jnp.square(c.astype(jnp.float32))) for c in changes], start=jnp.zeros(()))


def _scales(power: Array, layers: dict[int, _Layer], rule: Rule) -> Array:
    """How long the tangents of each layer are; one for each of `power`."""
    if not layers:
        return power
    entries = jnp.concatenate([jnp.full(a.iterations, a.entries) for a in layers.values()])
    groups = {terms: i for i, terms in enumerate(dict.fromkeys(a.terms for a in layers.values()))}
    group = jnp.concatenate([jnp.full(a.iterations, groups[a.terms]) for a in layers.values()])
    most = jax.ops.segment_max(power, group, len(groups))[group]
    # What has no gradient yet may get one at any step: its noise must not be what all others hear.
    known = jnp.where(power > SMALLEST * most, power, most)
    known = jnp.where(known > 0, known, 1.0)
    squares = jnp.sqrt(entries) / known if rule == "relative" else jnp.sqrt(entries / known)
    total = jax.ops.segment_sum(entries * squares, group, len(groups))
    count = jax.ops.segment_sum(entries, group, len(groups))
    return jnp.minimum(jnp.sqrt(squares * (count / total)[group]), LONGEST)


@explained.register
def _(estimator: BalancedTangents, fun: Objective, params: PyTree) -> list[ExplainedParameter]:
    return explained(estimator.estimator, fun, params)
