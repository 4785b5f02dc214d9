"""Perturbation with tangents as long as each layer needs them."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from forwardgrad._errors import MOST, InputError, unknown_name, with_article
from forwardgrad.estimators._balanced_layers import Layers, balanced, count_of
from forwardgrad.estimators._base import AbstractStatefulEstimator, Objective
from forwardgrad.estimators._credit import ExplainedParameter, explained
from forwardgrad.estimators._distributions import feedback_key, portable
from forwardgrad.estimators._perturbed_activities import AbstractPerturbedActivities, Baseline
from forwardgrad.estimators._steering import check_no_exchange
from forwardgrad.estimators._weight_perturbation import WeightPerturbation
from forwardgrad.rewrite import Program

Rule: TypeAlias = Literal["relative", "absolute"]

SMALLEST = 1e-16
"""A layer with a smaller share of the power is taken for one that has no gradient yet."""

LONGEST = 2.0**15
"""No entry's tangent is longer, so that half precision holds it."""


class Balance(eqx.Module):
    """What [`forwardgrad.BalancedTangents`][] remembers.

    - `power`: of each layer, the sum of squares of the losses' changes along its tangent alone, or
        of a parameter the square of their sum.
    - `steps`: the number of steps so far.
    - `estimator`, `layers`: whose they are.
    """

    power: Float[Array, "layers"]
    steps: Int[Array, ""]
    estimator: str = eqx.field(static=True)
    layers: tuple[int, ...] = eqx.field(static=True)


class BalancedTangents(AbstractStatefulEstimator):
    r"""Perturbed activities or weights, with longer tangents where the losses hear less of them.

    One directional derivative $d$ is shared by all layers, and so is its noise. If one layer's
    gradient is much larger than another's, the other's estimate is all noise. Here layer m gets the
    tangent $s_m u_m$ and the estimate

    $$\hat g_m = \frac1K \sum_{k=1}^K \frac{d_k u_{m,k}}{s_m},$$

    which is unbiased for any $s$. Let $N_m$ be the number of the layer's entries that share a loss,
    and $P_m$ the power of the losses' change if only this layer is perturbed, which is the sum of
    squares of the derivatives of each loss. The relative error, summed over layers, is least for

    $$s_m^2 = \sqrt{N_m} / P_m,$$

    and the absolute error for $s_m^2 = \sqrt{N_m / P_m}$. Scales are divided by a common factor, so
    that an entry is perturbed as much as without them on average. Blocks with greedy losses, which
    hear nothing of each other, have a factor each.

    With [`forwardgrad.WeightPerturbation`][] a layer is a parameter, or a slice of a stack of them.
    $N_m$ is the number of its entries, and $P_m = \lVert g_m \rVert^2$ with $g_m$ the gradient by
    it. A scale multiplies one factor of a rank-one tangent. By the absolute rule, the total
    variance of one tangent of signs is

    $$\Bigl(\sum_m \sqrt{N_m}\, \lVert g_m \rVert\Bigr)^2 - \lVert g \rVert^2,$$

    which is never more than the $(\sum_m N_m - 1) \lVert g \rVert^2$ of tangents that are not
    balanced. This is for exact powers; measured ones cost a few per cent.

    The powers are the state. `init` measures all of them; then one layer in turn is measured every
    few steps, along a tangent in this layer alone. In a loop over layers, each of them has its own.
    An activation's power is found from one tangent, because every loss has a change of its own. A
    parameter's is the average over some 32 of them: those of `init`, then K each time.

    **Arguments:**

    - `estimator`: an [`forwardgrad.ActivityPerturbation`][], [`forwardgrad.NodePerturbation`][] or
        [`forwardgrad.WeightPerturbation`][].
    - `rule`: which error is least, the `"relative"` one or the `"absolute"` one.
    - `every`: the number of steps from one measurement to the next. One costs as much as a step
        with one tangent, and of weights as much as a step.

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

    estimator: AbstractPerturbedActivities | WeightPerturbation
    rule: Rule = "relative"
    every: int = 4

    def __check_init__(self):
        balanced(self.estimator)
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
        how, program = balanced(self.estimator), self._program(fun, params)
        layers = how.layers(program)

        @jax.jit
        def measured(leaves):
            def power(i):
                return how.power(program, leaves, layers, i, feedback_key(0), how.first)

            return jax.lax.map(power, jnp.arange(count_of(layers)))

        power = measured(program.leaves) if layers else jnp.zeros(0)
        return Balance(power, jnp.zeros((), jnp.int32), repr(self), _signature(layers))

    def estimate(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None, state: Any
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array], Balance]:
        """The estimate by the powers in `state`, one of which is measured again."""
        assert key is not None
        return self._guided(self._program(fun, params), key, state)[:3]

    def _guided(
        self, program: Program, key: Key[Array, ""], state: Any, baseline: Baseline | None = None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array], Balance, list[Any]]:
        """The same with guesses of activations' derivatives, and what is learned about these."""
        how = balanced(self.estimator)
        layers = how.layers(program)
        self._check(state, layers)
        scales = _scales(state.power, layers, self.rule)
        result, grads, learned = how.estimate(program, key, layers, scales, baseline)
        count = count_of(layers)

        def again(power):
            i = (state.steps // self.every) % count
            own = jax.random.fold_in(portable(key), MOST)
            new = how.power(program, program.leaves, layers, i, own, how.again)
            new = how.kept * power[i] + (1 - how.kept) * new
            return power.at[i].set(jnp.where(jnp.isfinite(new), new, power[i]))

        power = state.power
        if count:
            power = jax.lax.cond(state.steps % self.every == 0, again, lambda p: p, power)
        # It counts on from zero where an integer would end.
        steps = (state.steps + 1) % (max(1, count) * self.every)
        return result, grads, Balance(power, steps, state.estimator, state.layers), learned

    def _program(self, fun: Objective, params: PyTree[Array]) -> Program:
        name = type(self).__name__
        program = balanced(self.estimator).program(fun, params, name)
        if program.has_effects:
            raise InputError(f"fun must have no effects: {name} evaluates it again to measure")
        check_no_exchange(program, name)
        return program

    def _check(self, state: Any, layers: Layers) -> None:
        must = f"state must be the one that init returned for this function and {self!r}"
        if not isinstance(state, Balance):
            raise InputError(f"{must}, got {with_article(type(state).__name__)}")
        if state.estimator != repr(self):
            raise InputError(f"{must}, got that of {state.estimator}")
        if state.layers != _signature(layers) or state.power.shape != (count_of(layers),):
            raise InputError(
                f"{must}: it has powers of {state.power.size} layers, where {count_of(layers)} are "
                "needed, or of others"
            )


def _signature(layers: Layers) -> tuple[int, ...]:
    return tuple(n for number, layer in layers.items() for n in (number, layer.powers))


def _scales(power: Array, layers: Layers, rule: Rule) -> Array:
    """How long the tangents of each layer are; one for each of `power`."""
    if not layers:
        return power
    entries = jnp.concatenate([jnp.full(a.powers, a.entries) for a in layers.values()])
    groups = _groups([a.terms for a in layers.values()])
    group = jnp.concatenate(
        [jnp.full(a.powers, g) for a, g in zip(layers.values(), groups, strict=True)]
    )
    most = jax.ops.segment_max(power, group, 1 + max(groups))[group]
    # What has no gradient yet may get one at any step: its noise must not be what all others hear.
    known = jnp.where(power > SMALLEST * most, power, most)
    known = jnp.where(known > 0, known, 1.0)
    squares = jnp.sqrt(entries) / known if rule == "relative" else jnp.sqrt(entries / known)
    total = jax.ops.segment_sum(entries * squares, group, 1 + max(groups))
    count = jax.ops.segment_sum(entries, group, 1 + max(groups))
    return jnp.minimum(jnp.sqrt(squares * (count / total)[group]), LONGEST)


def _groups(terms: Sequence[frozenset[int]]) -> list[int]:
    """The numbers of groups whose layers hear each other's noise, directly or through others."""
    merged: list[frozenset[int]] = []
    for own in terms:
        touched = [other for other in merged if other & own]
        merged = [other for other in merged if not other & own] + [own.union(*touched)]
    # What changes no loss is apart.
    return [
        next((i for i, other in enumerate(merged) if other & own), len(merged)) for own in terms
    ]


@explained.register
def _(estimator: BalancedTangents, fun: Objective, params: PyTree) -> list[ExplainedParameter]:
    return explained(estimator.estimator, fun, params)
