"""Perturbed activities with guesses of their derivatives, which are learned along."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from forwardgrad._errors import InputError, with_article
from forwardgrad.estimators._balanced_tangents import BalancedTangents
from forwardgrad.estimators._base import AbstractStatefulEstimator, Objective
from forwardgrad.estimators._credit import ExplainedParameter, explained
from forwardgrad.estimators._digits import Digits
from forwardgrad.estimators._distributions import portable
from forwardgrad.estimators._perturbed_activities import (
    AbstractPerturbedActivities,
    Guess,
    Steering,
)
from forwardgrad.estimators._steering import check_no_exchange, check_no_refs, check_one_by_one
from forwardgrad.rewrite import Activation, Program


class Variate(eqx.Module):
    """What [`forwardgrad.ControlVariate`][] remembers.

    - `weights`: by a term of the losses and an activation's number, from errors to the activation.
    - `grams`: likewise, the decayed sums of products of the errors, with a ridge.
    - `steps`: the number of steps so far.
    - `inner`: what the estimator remembers that is guided.
    - `estimator`: whose they are.
    """

    weights: dict[tuple[int, int], Float[Array, "errors units"]]
    grams: dict[tuple[int, int], Float[Array, "errors errors"]]
    steps: Int[Array, ""]
    inner: PyTree
    estimator: str = eqx.field(static=True)


class ControlVariate(AbstractStatefulEstimator):
    r"""Perturbed activities with guesses of their derivatives, which are learned along. No bias.

    Let $b_m$ be a guess of the derivative by layer m's activation that does not depend on the
    tangents. Along tangents $u$, the losses of one example and token are then expected to change by
    $p = \sum_m \langle b_m, u_m \rangle$. Only what they change by beyond that is multiplied by the
    tangent:

    $$\hat g_m = b_m + \frac1K \sum_{k=1}^K (d_k - p_k)\, u_{m,k}.$$

    The mean is the gradient for any $b$, and the variance is that of $g - b$ in the place of g. A
    guess is feedback from the error $e$ of the same example and token:

    $$b_m = e B_m.$$

    The error is a derivative that is known exactly. With `exact_direct` it is that by activations
    that no other one comes after, such as the output of a decoder's last block; then only what
    `exact_direct` leaves is guessed. Else it is the derivative by what the last layers compute.
    With greedy losses, each block has errors of its own.

    $B_m$ is the state, and zero at first. After each step it is fitted to the estimates of all
    steps so far by least squares. An earlier step counts `decay` times as much as the next, and a
    large error has less weight, because its noise is larger. A ridge keeps the noise of the
    estimates out of the guesses.

    A layer has a guess where the places of the losses' axes in it are known, as those of examples
    and tokens are. Other layers have none, but less noise comes to them from those that have one.

    With V errors for each loss, a step costs two more products with V times a layer's units, a
    linear system of size V for each layer, and each tangent is drawn once more. The state has V
    times V and V times the units for each layer.

    **Arguments:**

    - `estimator`: an [`forwardgrad.ActivityPerturbation`][] or [`forwardgrad.NodePerturbation`][],
        or [`forwardgrad.BalancedTangents`][] of one.
    - `decay`: how much less an earlier step counts.

    **Raises:**

    `InputError` where an argument is out of range; when called, where the estimator raises it, if
    the state is not one of this estimator and this function, if no layer can have a guess, as where
    losses have no named axes, or if the workers of a `shard_map` exchange what they compute.

    ??? cite "Reference"

        Feedback that is learned from perturbed activities: Lansdell, Prakash & Kording, *Learning
        to Solve the Credit Assignment Problem*, ICLR 2020
        ([arXiv:1906.00889](https://arxiv.org/abs/1906.00889)). There the feedback takes the place
        of the estimate, which is a bias.

    >>> import forwardgrad as fg, jax, jax.numpy as jnp
    >>> keys = jax.random.split(jax.random.key(0), 60)
    >>> w = {"first": jnp.ones((3, 5)), "second": jnp.eye(5), "last": jnp.ones((5, 1))}
    >>> def losses(w, x):
    ...     out = x @ w["first"] @ w["second"] @ w["last"]
    ...     return fg.Losses([jnp.mean((out - 1) ** 2, axis=1) / 8], [("example",)])
    >>> init, step = fg.estimation(losses, fg.ControlVariate(fg.ActivityPerturbation()))
    >>> step, state = jax.jit(step), init(w, jnp.ones((8, 3)))
    >>> for key in keys:
    ...     x = jax.random.normal(key, (8, 3))
    ...     value, grads, state = step(w, x, key=key, state=state)
    >>> exact = jax.grad(lambda w: losses(w, x).total())(w)
    >>> error = jnp.linalg.norm(grads["first"] - exact["first"])
    >>> bool(error < 0.2 * jnp.linalg.norm(exact["first"]))
    True
    """

    estimator: AbstractPerturbedActivities | BalancedTangents
    decay: float = 0.99

    def __check_init__(self):
        if not isinstance(self._perturbed, AbstractPerturbedActivities):
            raise InputError(
                "estimator must be an ActivityPerturbation or NodePerturbation, or one of these in "
                f"BalancedTangents, got {self.estimator!r}"
            )
        if not 0 <= self.decay < 1:
            raise InputError(f"decay must be at least 0 and below 1, got {self.decay!r}")

    @property
    def needs_key(self) -> bool:
        """True."""
        return True

    @property
    def needs_state(self) -> bool:
        """True."""
        return True

    @property
    def _perturbed(self) -> Any:
        own = self.estimator
        return own.estimator if isinstance(own, BalancedTangents) else own

    def value_and_grad(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        """The estimate with nothing learned."""
        (result, grads, _) = self.estimate(fun, params, key, self.init(fun, params))
        return result, grads

    def init(self, fun: Objective, params: PyTree[Array]) -> Variate:
        """Weights of zero."""
        program = self._program(fun, params)
        weights, grams = self._zeros(program)
        own = self.estimator
        inner = own.init(fun, params) if isinstance(own, BalancedTangents) else ()
        return Variate(weights, grams, jnp.zeros((), jnp.int32), inner, repr(self))

    def estimate(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None, state: Any
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array], Variate]:
        """The estimate by the weights in `state`, which learn from it."""
        assert key is not None
        program = self._program(fun, params)
        self._check(state, program)
        # Guesses must not know the tangents, also where each step is given the same key.
        key = jax.random.fold_in(portable(key), state.steps)
        stages = _Baseline(self, program, state)
        if isinstance(self.estimator, BalancedTangents):
            found = self.estimator._guided(program, key, state.inner, stages)
            result, grads, inner, learned = found
        else:
            steering, inner = Steering(baseline=stages), ()
            result, grads, learned = self.estimator._steered(program, key, steering)
        weights, grams = dict(state.weights), dict(state.grams)
        for key, (weight, gram) in itertools.chain(*[of_stage.items() for of_stage in learned]):
            weights[key], grams[key] = weight, gram
        return result, grads, Variate(weights, grams, state.steps + 1, inner, state.estimator)

    def _program(self, fun: Objective, params: PyTree[Array]) -> Program:
        program = self._perturbed._program(fun, params)
        name = type(self).__name__
        check_one_by_one(program, name)
        check_no_refs(program, name)
        check_no_exchange(program, name)
        return program

    def _zeros(self, program: Program) -> tuple[Any, Any]:
        """Weights and Gram matrices of zero."""
        pairs = _Baseline(self, program, None).pairs(program.described())
        if not pairs:
            raise InputError(
                "ControlVariate finds no perturbed activation of which each entry has losses of "
                "its own: return forwardgrad.Losses([losses], [('example',)]), or leave it out"
            )
        shapes = {pair.key: pair.shape for pair in pairs}
        weights = {key: jnp.zeros(shape, jnp.float32) for key, shape in shapes.items()}
        grams = {key: jnp.zeros((n, n), jnp.float32) for key, (n, _) in shapes.items()}
        return weights, grams

    def _check(self, state: Any, program: Program) -> None:
        must = f"state must be the one that init returned for this function and {self!r}"
        if not isinstance(state, Variate):
            raise InputError(f"{must}, got {with_article(type(state).__name__)}")
        if state.estimator != repr(self):
            raise InputError(f"{must}, got that of {state.estimator}")
        wanted = jax.eval_shape(lambda: self._zeros(program)[0])
        own, shapes = ({k: a.shape for k, a in of.items()} for of in (state.weights, wanted))
        if own != shapes:
            raise InputError(
                f"{must}: it has weights of shapes {sorted(own.values())}, where "
                f"{sorted(shapes.values())} are needed, or those of other layers"
            )


class _Pair(NamedTuple):
    """A layer that has a guess for a term, and what the guess is made from.

    `noise` is the power of an estimate's noise as a multiple of the signal's, if all entries that
    are perturbed are alike.
    """

    term: int
    activation: Activation
    digits: Digits
    sources: list[tuple[Activation, Digits]]
    noise: float

    @property
    def key(self) -> tuple[int, int]:
        """Whose weights they are."""
        return self.term, self.activation.number

    @property
    def shape(self) -> tuple[int, int]:
        """That of its weights."""
        return sum(digits.units for _, digits in self.sources), self.digits.units


class _Baseline:
    """Guesses of a step, by weights."""

    def __init__(self, estimator: ControlVariate, program: Program, state: Variate | None):
        perturbed = estimator._perturbed
        self._program, self._state, self._decay = program, state, estimator.decay
        self._tangents, self._passed = perturbed.tangents, perturbed._not_perturbed(program)
        self._direct = perturbed._direct(program)

    def pairs(self, noted: Sequence[Activation]) -> list[_Pair]:
        """All of them among some activations."""
        found = []
        for term in range(self._program.terms):
            own = [a for a in noted if term in a.terms and a.variable not in self._passed]
            placed = {a.number: self._digits(a, term) for a in own}
            kinds = ([a for a in own if a.variable in self._direct], [a for a in own if a.last])
            sources = [
                [(a, d) for a in kind if (d := placed[a.number]) is not None] for kind in kinds
            ]
            moved = [a for a in own if not a.last and a.variable not in self._direct]
            each = sum(a.value.size * self._mixed(a, term) for a in moved)
            size = max(1, math.prod(self._program.shapes[term]))
            for a in moved:
                digits = placed[a.number]
                if digits is not None and any(sources):
                    noise = self._mixed(a, term) * each / (size * self._tangents)
                    found.append(_Pair(term, a, digits, sources[0] or sources[1], noise))
        return found

    def _mixed(self, a: Activation, term: int) -> int:
        """How many entries of a term each entry of an activation changes."""
        names, shape = self._program.axes[term], self._program.shapes[term]
        axes = zip(names, shape, strict=True)
        return math.prod(size for name, size in axes if a.place(term, name).mixed)

    def _digits(self, a: Activation, term: int) -> Digits | None:
        """Where in an activation each entry of a term has entries of its own."""
        names, shape = self._program.axes[term], self._program.shapes[term]
        # Where an axis of one entry is does not matter, and may not be known.
        long = [name for name, size in zip(names, shape, strict=True) if size > 1]
        places = [a.place(term, name).parts for name in long]
        parts = tuple(p for place in places for p in place or ())
        real = jnp.issubdtype(a.value.dtype, jnp.floating)
        if not (names and a.value.size and real) or any(place is None for place in places):
            return None
        if any(p.through is not None for p in parts):
            return None
        digits = Digits(a.value.shape, parts)
        whole = digits.places == math.prod(shape)
        return digits if digits.are_apart and whole else None

    def __call__(
        self,
        hidden: Sequence[Activation],
        last: Sequence[Activation],
        exact: dict[int, Array],
    ) -> tuple[list[Guess], Any]:
        """Guesses for a stage, and how the weights learn."""
        assert self._state is not None
        pairs = self.pairs([*hidden, *last])
        position = {a.number: i for i, a in enumerate(hidden)}
        errors, guesses = [], []
        for pair in pairs:
            parts = [digits.in_front(exact[a.number]) for a, digits in pair.sources]
            errors.append(jnp.concatenate(parts, axis=1).astype(jnp.float32))
            value = errors[-1] @ self._state.weights[pair.key]
            if pair.activation.mask is not None:
                value = jnp.where(pair.digits.in_front(pair.activation.mask), value, 0)
            own = position[pair.activation.number]
            guesses.append(Guess(own, pair.term, pair.digits, value))

        def learn(residuals):
            return {
                pair.key: self._learned(pair, e, r)
                for pair, e, r in zip(pairs, errors, residuals, strict=True)
            }

        return guesses, learn

    def _learned(self, pair: _Pair, errors: Array, residual: Array) -> tuple[Array, Array]:
        """Weights and Gram matrix after one more step of least squares."""
        assert self._state is not None
        old, known = self._state.weights[pair.key], self._state.grams[pair.key]
        # Noise grows with the error: weighted, a few large ones do not outweigh all others.
        size = jnp.sum(errors**2, axis=1, keepdims=True)
        weight = jax.lax.rsqrt(size + jnp.mean(size))
        errors, residual = weight * errors, weight * residual.astype(errors.dtype)
        # A ridge as large as the noise asks for; below rounding, the system could not be solved.
        noise = max(pair.noise / len(errors), len(old) * float(jnp.finfo(known.dtype).eps))
        ridge = noise * jnp.sum(errors**2)
        ridge = ridge * jnp.where(jnp.any(known != 0), 1 - self._decay, 1.0)
        gram = self._decay * known + errors.T @ errors + ridge * jnp.eye(len(old))
        wanted = errors.T @ residual - ridge * old
        new = old + jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(gram), wanted)
        fine = jnp.all(jnp.isfinite(new))  # else too large a step, or no errors at all
        return jnp.where(fine, new, old), jnp.where(fine, gram, known)


@explained.register
def _(estimator: ControlVariate, fun: Objective, params: PyTree) -> list[ExplainedParameter]:
    return explained(estimator.estimator, fun, params)
