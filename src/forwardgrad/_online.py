"""The gradient of a recurrence while it runs, by tangents that go along with its state."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from forwardgrad._errors import InputError, with_article
from forwardgrad._estimation import Estimation
from forwardgrad._losses import Losses
from forwardgrad._request import Request, as_losses, as_pair, called, checked_key, checked_params
from forwardgrad.estimators import AbstractEstimator, Scalars, WeightPerturbation
from forwardgrad.estimators._distributions import portable
from forwardgrad.estimators._scalars import Drawn, words_of
from forwardgrad.estimators._steering import over_tangents, total_of
from forwardgrad.rewrite import Program, Walk, perturbed


class OnlineState(eqx.Module):
    """Where a recurrence is, and how that would differ along each tangent of its weights.

    - `carry`: the recurrence's state.
    - `tangents`: K derivatives of each array of `carry`; None for integers and keys.
    - `key`: what the tangents of the weights are drawn from.
    """

    carry: PyTree[Array]
    tangents: PyTree[Array]
    key: Key[Array, ""]


def online(
    cell: Callable[..., tuple[Any, Any]],
    estimator: AbstractEstimator,
    *,
    has_aux: bool = False,
) -> Estimation:
    r"""Forward gradients of a recurrence with a loss at every step, while it runs.

    Let $h_t = F(\theta, h_{t-1}, x_t)$ with losses $L_t = \ell(\theta, h_{t-1}, x_t)$. K tangents
    $v_k$ of the weights are drawn at the start and kept. The derivative $s_k$ of the state along
    each of them goes along with the state:

    $$s_{k,t} = \frac{\partial F}{\partial h} s_{k,t-1} + \frac{\partial F}{\partial\theta} v_k,
    \qquad d_{k,t} = \frac{\partial\ell}{\partial h} s_{k,t-1}
    + \frac{\partial\ell}{\partial\theta} v_k,
    \qquad \hat g_t = \frac1K \sum_k d_{k,t} v_k.$$

    Nothing is unrolled and there is no tape. A step costs what a weight-perturbed one does, and the
    memory is that of K + 1 states, however long the sequence is. If the weights stay as they are
    from the start, $E[\hat g_t]$ is the derivative of $L_t$ with respect to the weights of all
    steps until then, as backpropagation through time has it. The sum of a sequence's estimates is
    then [`forwardgrad.WeightPerturbation`][]'s estimate for the whole sequence, with its variance.
    If they are updated on the way, the $s_k$ belong in part to older weights. The estimate is then
    biased by a term that is proportional to the updates, which small learning rates make small.

    All estimates from one start are along the same K tangents. So start again from time to time:
    at each new sequence, or in a stream with the carry as it is,
    `state = init(params, state.carry, key=new)`. What happened before a start gets no credit.

    **Arguments:**

    - `cell`: `(params, carry, *args, **kwargs) -> (carry, loss)`, as a body of `jax.lax.scan`. The
        loss is a scalar, or [`forwardgrad.Losses`][]; a parameter's tangent is then multiplied by
        the change of only those terms that it can influence, now or later.
    - `estimator`: a [`forwardgrad.WeightPerturbation`][]. With `exact_last`, layers that no other
        layer comes after and that change no carry get their exact gradient. `mask_rows` has no
        effect, because other rows may have been looked up before.
    - `has_aux`: whether `cell` returns `(carry, (loss, aux))`.

    **Returns:**

    [`forwardgrad.Estimation`][], a pair `(init, step)`:

    - `state = init(params, carry, key=key)` at a start, [`forwardgrad.OnlineState`][], whose
        tangents are zero;
    - `value, grads, state = step(params, *args, state=state, **kwargs)`, or
        `(value, aux), grads, state` with `has_aux`. The new carry is `state.carry`.

    **Raises:**

    `InputError` if the estimator is another one; when called, if the carry changes its shape or
    type, the state is not one of `init`, or workers exchange what they compute.

    ??? cite "Reference"

        Baydin, Pearlmutter, Syme, Wood & Torr, *Gradients without Backpropagation*, 2022
        ([arXiv:2202.08587](https://arxiv.org/abs/2202.08587)), for the estimate. Williams & Zipser,
        *A Learning Algorithm for Continually Running Fully Recurrent Neural Networks*, 1989, carry
        all tangents; Tallec & Ollivier, *Unbiased Online Recurrent Optimization*, ICLR 2018
        ([arXiv:1702.05043](https://arxiv.org/abs/1702.05043)), a random one that is drawn anew in
        every step.

    >>> import forwardgrad as fg, jax, jax.numpy as jnp
    >>> def cell(w, h, x, y):
    ...     h = jnp.tanh(w["h"] * h + w["x"] * x)
    ...     return h, (h - y) ** 2
    >>> init, step = fg.online(cell, fg.WeightPerturbation(tangents=2, orthogonal=True))
    >>> w = {"h": jnp.float32(0.5), "x": jnp.float32(1.0)}
    >>> state = init(w, jnp.float32(0.0), key=jax.random.key(0))
    >>> for x, y in [(1.0, 0.0), (0.0, 1.0)]:
    ...     value, grads, state = step(w, x, y, state=state)
    >>> value.shape, state.carry.shape, state.tangents.shape
    ((), (), (2,))
    """
    Request(cell, estimator, 0, has_aux)
    if not isinstance(estimator, WeightPerturbation):
        raise InputError(
            "estimator must be a WeightPerturbation, whose tangents can go along with a carry, got "
            f"{estimator!r}"
        )
    own = dataclasses.replace(estimator, mask_rows=False)

    def init(params: PyTree, carry: PyTree, *, key: Key[Array, ""] | None = None) -> OnlineState:
        checked_params(params)
        carry = jax.tree.map(_as_array, carry)
        moving = eqx.filter(carry, eqx.is_inexact_array)
        none_yet = jax.tree.map(lambda a: jnp.zeros((own.tangents, *a.shape), a.dtype), moving)
        return OnlineState(carry, none_yet, portable(checked_key(own, key)))

    def step(params: PyTree, *args, state: OnlineState, **kwargs):
        params = checked_params(params)
        _check_state(state, own)
        now = _Step(cell, has_aux, state.carry, args, kwargs)
        weights, program = now.of_weights(params), now.of_everything(params)
        # A stricter setting is for the caller's function, which is traced by now.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            value, aux, grads, state = _estimated(weights, program, own, state)
        return (value, aux) if has_aux else value, grads, state

    return Estimation(init, step)


class _Measured(NamedTuple):
    """Sums of the losses, arrays of the carry, auxiliary data, and exact gradients.

    `changes` and `tangents` are the derivatives of the first two along K tangents.
    """

    sums: list[Array]
    carry: list[Array]
    aux: list[Array]
    changes: list[Array]
    tangents: list[Array]
    exact: dict[int, Array]


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step of a recurrence from a carry."""

    cell: Callable[..., tuple[Any, Any]]
    has_aux: bool
    carry: PyTree[Array]
    args: Sequence[Any]
    kwargs: dict[str, Any]

    def called(self, params: PyTree, carry: PyTree) -> tuple[Losses, Any, Any]:
        """The losses, the next carry and the auxiliary data."""
        new, loss = _as_two(called(self.cell, (params, carry, *self.args), self.kwargs))
        loss, aux = as_pair(loss, self.has_aux)
        new = jax.tree.map(_as_array, new)
        _check_alike(new, carry)
        return as_losses(loss), new, aux

    def of_weights(self, params: PyTree) -> Program:
        """The losses as a function of the weights, which says what their layers are."""

        def fun(params):
            losses, *rest = self.called(params, self.carry)
            return losses, rest

        fun.given = jax.tree.leaves((self.carry, self.args, self.kwargs))  # pyright: ignore[reportFunctionMemberAccess]
        return Program(fun, params)

    def of_everything(self, params: PyTree) -> Program:
        """The losses and the next carry as functions of weights and carry."""
        moving, still = eqx.partition(self.carry, eqx.is_inexact_array)

        def fun(both):
            params, moving = both
            losses, new, aux = self.called(params, eqx.combine(moving, still))
            moved, stayed = eqx.partition(new, eqx.is_inexact_array)
            return (losses.terms, moved), (stayed, aux)

        return Program(fun, (params, moving), twice=True)


def _estimated(
    weights: Program, program: Program, estimator: WeightPerturbation, state: OnlineState
) -> tuple[Array, Any, PyTree, OnlineState]:
    """The value, the auxiliary data, the gradient and the next state.

    `weights` are the losses as a function of the weights, `program` losses and the next carry as
    functions of weights and carry.
    """
    if program.collectives:
        raise InputError(
            f"cell must not exchange what it computes, along {sorted(program.collectives)}"
        )
    leaves = weights.leaves
    reach = _reach(program, len(leaves))
    last = weights.of_last_layers() if estimator.exact_last else []
    exact = {i: leaves[i] for i in last if not reach[i].carry}
    parts = list(dict.fromkeys(r.terms for i, r in enumerate(reach) if r.terms and i not in exact))
    part_of = [parts.index(r.terms) if r.terms in parts else None for r in reach]
    layouts = estimator._layouts(weights)
    drawn = tuple(
        Drawn(leaf.shape, layouts[i], (), None if i in exact else part_of[i], None)
        for i, leaf in enumerate(leaves)
    )
    perturbed = [i for i in range(len(leaves)) if i not in exact]
    factors = estimator._drawn(leaves, drawn, perturbed, state.key)
    tangents, structure = jax.tree.flatten(state.tangents)
    found = _measured(program, estimator, drawn, factors, exact, tangents)
    changes = tuple(_total([found.changes[t] for t in sorted(part)]) for part in parts)
    value = _total(found.sums)
    scalars = Scalars(value, changes, {}, words_of(state.key), drawn, estimator)
    grads = estimator._combined(leaves, scalars, factors)
    grads = [found.exact.get(i, grad) for i, grad in enumerate(grads)]
    stayed, aux = program.auxiliary(found.aux)
    carry = eqx.combine(structure.unflatten(found.carry), stayed)
    state = OnlineState(carry, structure.unflatten(found.tangents), state.key)
    return value, aux, weights.treedef.unflatten(grads), state


def _count(program: Program) -> int:
    """The number of losses, which come before the arrays of the next carry."""
    return len(program.losses([None] * program.terms)[0])


def _total(arrays: Sequence[Array]) -> Array:
    return sum(arrays, start=jnp.zeros(()))


class _Reach(NamedTuple):
    """The terms of the losses that a weight influences now or later, and whether it can later."""

    terms: frozenset[int]
    carry: bool


def _reach(program: Program, weights: int) -> list[_Reach]:
    """What each of the first so many arrays of a program reaches, of losses and through a carry."""
    influence = program.influence()
    count = _count(program)
    terms, outputs = range(count), range(count, program.terms)
    reached = []
    for term in terms:
        before, now = set(), {term}
        while before != now:
            before = set(now)
            now |= {
                out for out, own in zip(outputs, influence[weights:], strict=True) if own & before
            }
        reached.append(now)
    return [
        _Reach(
            frozenset(t for t, now in zip(terms, reached, strict=True) if own & now),
            any(own & now & {*outputs} for now in reached),
        )
        for own in influence[:weights]
    ]


def _measured(
    program: Program,
    estimator: WeightPerturbation,
    drawn: Sequence[Drawn],
    factors: Mapping[int, Sequence[Array]],
    exact: Mapping[int, Array],
    moving: Sequence[Array],
) -> _Measured:
    """One evaluation of a program of weights and a carry, and its derivatives along K tangents."""
    stage, reads = program.whole()
    terms, count = _count(program), estimator.tangents
    weights, carry = len(drawn), program.leaves[len(drawn) :]

    def along(tangents, chosen, pure=False):
        factors, moving = tangents
        jaxpr = stage.without_effects() if pure else stage.jaxpr

        def at(eps, carry):
            values = [
                perturbed(i, program.leaves[i], drawn[i].layout, factors[i])
                if i in factors
                else chosen.get(i, program.leaves[i])
                for i in range(weights)
            ]
            outs = Walk(eps, single=count == 1).arrays(jaxpr, (), [*values, *carry, *reads])
            sums = [total_of(outs[i]) for i in range(terms)]
            return (sums, outs[terms : program.terms]), outs[program.terms :]

        zero, one = jnp.zeros(()), jnp.ones(())
        found, changes, aux = jax.jvp(at, (zero, carry), (one, moving), has_aux=True)
        return (*found, aux), changes

    def all_along(chosen):
        def one(tangents, pure=False):
            return along(tangents, chosen, pure)

        once, each = over_tangents(
            one, (dict(factors), list(moving)), count, program, estimator.chunk
        )
        return _total(once[0]), (once, each)

    if exact:
        total, pullback, ((sums, new, aux), each) = jax.vjp(all_along, dict(exact), has_aux=True)
        grads = pullback(jnp.ones_like(total))[0]
    else:
        (sums, new, aux), each = all_along({})[1]
        grads = {}
    changes, tangents = each
    return _Measured(sums, new, aux, changes, tangents, grads)


def _as_array(leaf: Any) -> Array:
    if not eqx.is_array_like(leaf):
        raise InputError(f"carry must hold arrays, got {with_article(type(leaf).__name__)}")
    return leaf if eqx.is_array(leaf) else jnp.asarray(leaf)


def _as_two(out: Any) -> tuple[Any, Any]:
    if not (isinstance(out, tuple) and len(out) == 2):
        what = with_article(type(out).__name__)
        raise InputError(f"cell must return a pair (carry, loss), got {what}")
    return out


def _check_alike(new: PyTree[Array], old: PyTree[Array]) -> None:
    """Raise an `InputError` if a carry's arrays are not like the last one's."""
    structures = jax.tree.structure(new), jax.tree.structure(old)
    shapes = [[f"{a.dtype}{list(a.shape)}" for a in jax.tree.leaves(tree)] for tree in (new, old)]
    if structures[0] != structures[1] or shapes[0] != shapes[1]:
        raise InputError(
            f"cell must return a carry like the one that it gets, {_described(old)}, got "
            f"{_described(new)}"
        )


def _described(tree: PyTree[Array]) -> str:
    return str(jax.tree.map(lambda a: f"{a.dtype}{list(a.shape)}", tree)).replace("'", "")


def _check_state(state: Any, estimator: WeightPerturbation) -> None:
    if not isinstance(state, OnlineState):
        raise InputError(
            f"state must be what init returns, got {with_article(type(state).__name__)}"
        )
    counts = {a.shape[0] for a in jax.tree.leaves(state.tangents)}
    if counts - {estimator.tangents}:
        raise InputError(
            f"state must have {estimator.tangents} tangents of each array of the carry, as the "
            f"estimator has, got {counts.pop()}"
        )
