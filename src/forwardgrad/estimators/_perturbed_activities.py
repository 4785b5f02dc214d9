"""Gradients layer by layer, from what the losses do when activations are perturbed."""

import abc
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from forwardgrad._errors import InputError, unknown_name
from forwardgrad._losses import Losses
from forwardgrad.estimators._base import AbstractEstimator, Objective
from forwardgrad.estimators._credit import ExplainedParameter, by_layer, explained
from forwardgrad.estimators._digits import Digits
from forwardgrad.estimators._distributions import (
    DISTRIBUTIONS,
    Distribution,
    axis_of_words,
    draw,
    portable,
)
from forwardgrad.estimators._mixing import TOKEN, Mixing, check_mixing, check_tokens
from forwardgrad.estimators._steering import (
    at_iterations,
    check_counts,
    check_no_exchange,
    check_no_refs,
    check_one_by_one,
    influenced,
    not_differentiable,
    pulled_back,
    total_of,
    zero,
)
from forwardgrad.rewrite import (
    Activation,
    Hooks,
    LayerWalk,
    Program,
    Stage,
    after,
    computed_in,
    placed_like,
)

Evaluate: TypeAlias = Callable[..., tuple[list[Array], Any]]
"""`evaluate(eps, k, held=None, apart=False)`: a stage, its activations moved along tangents k.

They are moved by `eps`, which is None where nothing moves. With `apart`, none moves because another
one does. `held` is that of `Hooks`. It returns the losses; then what is not to be differentiated:
all that the stage computes, and the activations.
"""


Scales: TypeAlias = Callable[[Activation], Array]
"""How long an activation's tangents are, in one iteration of the loops around it."""


class Guess(NamedTuple):
    """A part of one term's derivative by an activation, known before any tangent is drawn.

    `position` is the activation's among those that are perturbed. `value` has an axis for the
    term's entries, each of which has its own entries of the activation, at `digits`.
    """

    position: int
    term: int
    digits: Digits
    value: Float[Array, "entries units"]


Learn: TypeAlias = Callable[[Sequence[Array]], Any]
"""From estimates of what each guess leaves, in the guesses' shapes, to what is remembered."""

Baseline: TypeAlias = Callable[
    [Sequence[Activation], Sequence[Activation], dict[int, Array]], tuple[list[Guess], Learn]
]
"""Guesses for a stage, from its hidden activations, those of its last layers, and what is exact.

The latter are gradients by the activations' numbers: those of the last layers, and with
`exact_direct` the direct parts of the others. Guesses must not depend on the tangents.
"""


class Steering(NamedTuple):
    """How long tangents are, and what is known of the derivatives."""

    scales: Scales | None = None
    baseline: Baseline | None = None


class AbstractPerturbedActivities(AbstractEstimator):
    """What estimators have in common that perturb activations.

    With d the change of the losses along a tangent u, the derivative by an activation is estimated
    by the mean of d u over K tangents, and each layer's own product is differentiated in reverse.
    A subclass says how an activation is moved, and how the change is found.
    """

    tangents: eqx.AbstractVar[int]
    distribution: eqx.AbstractVar[Distribution]
    chunk: eqx.AbstractVar[int | None]
    mixing: eqx.AbstractVar[Mixing]
    exact_mixing: eqx.AbstractVar[bool]
    exact_direct: eqx.AbstractVar[bool]
    partition: eqx.AbstractVar[int]

    def __check_init__(self):
        check_mixing(self)
        if self.distribution not in DISTRIBUTIONS:
            raise unknown_name("distribution", str(self.distribution), DISTRIBUTIONS)
        check_counts(self, "tangents", "chunk", "partition")

    @property
    def needs_key(self) -> bool:
        """True."""
        return True

    @abc.abstractmethod
    def _program(self, fun: Objective, params: PyTree[Array]) -> Program:
        """The function as a program."""

    @abc.abstractmethod
    def _moved(self, eps: Array, z: Array, tangent: Array) -> Array:
        """An activation moved by `eps` along its tangent, and cut off from it in reverse mode."""

    @abc.abstractmethod
    def _changes(
        self, evaluate: Evaluate, program: Program, tangents: range
    ) -> tuple[Any, list[Array]]:
        """What is not to be differentiated where nothing moves, and the losses' changes.

        The first axis of a change is that of the tangents, which have these numbers.
        """

    @abc.abstractmethod
    def _cut(self, eps: Array, z: Array) -> Array:
        """An activation that moves with those before it, and is cut off in reverse mode."""

    def value_and_grad(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        """The objective's value and an estimate of its gradient."""
        assert key is not None
        return self._steered(self._program(fun, params), key, Steering())[:2]

    def _steered(
        self, program: Program, key: Key[Array, ""], steering: Steering
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array], list[Any]]:
        """The same with tangents `s u`, and with guesses b of the derivatives.

        The estimate is the mean of `b + (d - p) u / s`, where p is what the guesses expect of d:
        the sum of `b s u` over all activations, entry by entry of the losses. What each stage
        learns about the guesses comes with it.
        """
        check_one_by_one(program, type(self).__name__)
        check_no_refs(program, type(self).__name__)
        if self.mixing != "all":
            check_tokens(program, f"mixing={self.mixing!r}")
        if self.exact_direct and program.has_effects:
            raise InputError("fun must have no effects with exact_direct=True, evaluated once more")
        if self.exact_direct:
            check_no_exchange(program, "exact_direct=True")
        grads = [jnp.zeros_like(leaf) for leaf in program.leaves]
        base, passed = portable(key), self._not_perturbed(program)
        direct = self._direct(program)

        def run(stage, number, reads):
            del number
            # The signs of a stage are drawn when it begins: all stages' would else be kept at once.
            given = _Given(program, _key_after(reads, base), steering.scales, passed, direct)
            shifted = program.hidden(passed) if self.exact_direct else frozenset()
            shifted |= program.last() if steering.baseline else frozenset()
            # Every activation is cut off from what uses it: reverse mode sees one layer at a time.
            (total, z), pullback, (changes, (noted, ends), writes) = jax.vjp(
                lambda leaves, shifts: self._forward(given, stage, reads, leaves, shifts),
                [program.leaves[i] for i in stage.leaves],
                program.no_shifts(stage, shifted),
                has_aux=True,
            )
            one = jnp.ones_like(total)
            if not shifted:
                gradients = self._gradients(noted, changes, given)
                return writes, (pullback((one, gradients))[0], None)
            last, known = pulled_back(pullback, (one, [zero(a) for a in z]))
            guesses, learn = [], lambda _: None
            if steering.baseline is not None:
                guesses, learn = steering.baseline(noted, ends, known)
            gradients, learned = self._guided(given, noted, guesses, learn, changes)
            if self.exact_direct:
                gradients = [
                    g + placed_like(known[a.number], g)
                    for a, g in zip(noted, gradients, strict=True)
                ]
            hidden, _ = pulled_back(pullback, (zero(total), gradients))
            return writes, (jax.tree.map(jnp.add, last, hidden), learned)

        with (
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            _refusing_reverse(self.exact_mixing or self.exact_direct),
        ):
            terms, aux, results = program.stage_by_stage(run)
            for stage, (of_stage, _) in zip(program.stages, results, strict=True):
                for i, grad in zip(stage.leaves, of_stage, strict=True):
                    grads[i] = grads[i] + grad
            value = program.losses(terms).total()
        value, aux, grads = not_differentiable((value, aux, grads), type(self).__name__)
        found = (value, program.auxiliary(aux)), program.treedef.unflatten(grads)
        return *found, [learned for _, learned in results]

    def _guided(
        self,
        given: "_Given",
        noted: Sequence[Activation],
        guesses: Sequence[Guess],
        learn: Learn,
        changes: Losses,
    ) -> tuple[list[Array], Any]:
        """The estimates for a stage's activations, and what is learned about the guesses."""
        changes = self._unexpected(given, noted, guesses, changes)
        gradients, tangents = self._gradients(noted, changes, given), self._shared_out(noted, given)

        def left(guess):
            a, gradient = noted[guess.position], gradients[guess.position]
            if len(a.terms) > 1:
                own = tuple(item for item in a.places if item[0][0] == guess.term)
                a = dataclasses.replace(a, places=own)
                gradient = self._gradient(a, changes, given, tangents[a.number])
            return guess.digits.in_front(gradient)

        learned = learn([left(guess) for guess in guesses])
        for guess in guesses:
            gradient = gradients[guess.position]
            known = guess.digits.back(guess.value).astype(gradient.dtype)
            gradients[guess.position] = gradient + placed_like(known, gradient)
        return gradients, learned

    def _unexpected(
        self,
        given: "_Given",
        noted: Sequence[Activation],
        guesses: Sequence[Guess],
        changes: Losses,
    ) -> Losses:
        """The losses' changes, less those that the guesses expect."""
        if not guesses:
            return changes
        # See `_gradient`; to draw tangents once more costs less than to carry `u B'` along.
        given = given._replace(key=_key_after(changes, given.key))
        tangents = self._shared_out(noted, given)

        def expected(k):
            found: dict[int, Array] = {}
            for guess in guesses:
                a = noted[guess.position]
                u = a.each(lambda a: given.tangent(self, a, k))
                own = jnp.sum(guess.digits.in_front(u) * guess.value, axis=1)
                if self.partition > 1:
                    theirs = tangents[a.number]
                    own = jnp.where((k >= theirs.start) & (k < theirs.stop), own, 0)
                found[guess.term] = found[guess.term] + own if guess.term in found else own
            return found

        sums = jax.lax.map(expected, jnp.arange(self.tangents))
        terms = [
            d - sums[i].reshape(d.shape) if i in sums else d for i, d in enumerate(changes.terms)
        ]
        return given.program.losses(terms)

    def _forward(
        self,
        given: "_Given",
        stage: Stage,
        reads: Sequence[Any],
        leaves: list[Array],
        shifts: dict[int, Array],
    ):
        """A stage's total and activations, and what is not to be differentiated.

        The latter are the losses' changes along each tangent (their first axis if there are
        several), what is known of the activations and of the last layers', and all that the stage
        computes. `shifts` are zeros that are added to the activations, once these are cut off.
        """
        program = given.program
        places = program.terms_of(stage)

        def evaluate(eps, k, held=None, apart=False, only=None):
            cut = jax.lax.stop_gradient if held is None else held

            def moved(activation):
                z = activation.value
                if eps is None:
                    return jax.lax.stop_gradient(z)
                if only is not None and activation.number not in only:
                    return jax.lax.stop_gradient(cut(z)) if apart else self._cut(eps, z)
                return self._moved(eps, cut(z) if apart else z, given.tangent(self, activation, k))

            def perturb(activation):
                kept = activation.last or activation.variable in given.passed
                z = activation.value if kept else moved(activation)
                if activation.number not in shifts:
                    return z
                return z + at_iterations(shifts[activation.number], activation.site)

            walk = LayerWalk(program.plan, Hooks(activation=perturb, held=held))
            writes = walk.arrays(stage.jaxpr, (), [*leaves, *reads])
            noted = [a for a in walk.noted.activations if a.variable not in given.passed]
            inner, last = ([a for a in noted if a.last is kind] for kind in (False, True))
            return [writes[i] for i in places.values()], (writes, inner, last)

        (writes, noted, last), changes = self._changes_in_parts(evaluate, given)
        total = sum([total_of(writes[i]) for i in places.values()], start=jnp.zeros(()))
        by_term = [dict(zip(places, changes, strict=True)).get(i) for i in range(program.terms)]
        z = [a.value for a in noted]
        return (total, z), (program.losses(by_term), (noted, last), writes)

    def _changes_in_parts(self, evaluate: Evaluate, given: "_Given") -> tuple[Any, list[Array]]:
        """As `_changes`, along tangents each of which is in one part of the activations."""
        if self.partition == 1:
            return self._changes(evaluate, given.program, range(self.tangents))
        noted = jax.eval_shape(lambda: evaluate(None, 0)[1][1])
        found = [
            self._changes(
                functools.partial(evaluate, only=part.numbers), given.program, part.tangents
            )
            for part in self._parts(noted, given)
        ]
        rest, changes = zip(*found, strict=True)
        return rest[0], [jnp.concatenate(parts) for parts in zip(*changes, strict=True)]

    def _parts(self, noted: Sequence[Activation], given: "_Given") -> list["_Part"]:
        """Which activations are perturbed together, and along which tangents."""
        numbers = sorted({a.number for a in noted if a.variable not in given.direct})
        count = max(1, min(self.partition, self.tangents, len(numbers)))
        ends = [
            [i * size // count for i in range(count + 1)] for size in (len(numbers), self.tangents)
        ]
        return [
            _Part(frozenset(numbers[slice(*own)]), range(*tangents))
            for own, tangents in zip(*map(itertools.pairwise, ends), strict=True)
        ]

    def _not_perturbed(self, program: Program) -> frozenset[Any]:
        """The activations that reverse mode goes through, from the next ones that are perturbed.

        With `exact_direct` there are scales among them that only last layers come after, such as
        those of a normalisation in front of the head, which all layers' direct parts go through.
        """
        found: frozenset[Any] = frozenset()
        if self.exact_mixing:
            check_tokens(program, "exact_mixing=True")
            found = program.mixing_steps(TOKEN)
            if found and not program.hidden(found):
                raise InputError(
                    "exact_mixing=True would be backpropagation here: all activations below the "
                    "last layers are mixed with those of other tokens at once; leave it out, or "
                    "use Backpropagation()"
                )
        return program.with_direct_scales(found) if self.exact_direct else found

    def _direct(self, program: Program) -> frozenset[Any]:
        """The activations that have their exact gradient, and no tangent."""
        return program.direct(self._not_perturbed(program)) if self.exact_direct else frozenset()

    def _tangent(
        self, key: Key[Array, ""], activation: Activation, k: Array, scale: Any = 1.0
    ) -> Array:
        """The k-th tangent of an activation, times `scale`."""
        z = activation.value
        key = jax.random.fold_in(key, k)
        # Examples, which devices share, are drawn apart.
        axis = axis_of_words(z.shape, activation.kept)
        u = draw(key, z.shape, self.distribution, scale, computed_in(z.dtype), axis)
        u = u.astype(z.dtype)
        return u if activation.mask is None else jnp.where(activation.mask, u, 0)

    def _gradients(
        self, noted: Sequence[Activation], changes: Losses, given: "_Given"
    ) -> list[Array]:
        """The estimates of the losses' derivatives by activations."""
        own = self._shared_out(noted, given)
        return [self._gradient(a, changes, given, own.get(a.number, range(1))) for a in noted]

    def _shared_out(self, noted: Sequence[Activation], given: "_Given") -> dict[int, range]:
        """The tangents of each perturbed activation, by its number."""
        return {n: part.tangents for part in self._parts(noted, given) for n in part.numbers}

    def _gradient(
        self, activation: Activation, changes: Losses, given: "_Given", tangents: range
    ) -> Array:
        """The estimate of the losses' derivative by an activation, from its own tangents."""
        if activation.variable in given.direct:
            return jnp.zeros_like(activation.value)
        if self.distribution == "rademacher":
            # Signs are drawn again when they are needed; XLA would otherwise keep them.
            given = given._replace(key=_key_after(changes, given.key))

        def along(k):
            own = jax.tree.map(lambda d: d[k], changes)
            scale = influenced(activation, own, given.program, self.mixing)
            loops = activation.value.shape[: activation.stacked]
            scale = jnp.broadcast_to(scale, (*loops, *scale.shape[activation.stacked :]))
            estimate = activation.each(lambda a, scale: given.tangent(self, a, k, scale), scale)
            return estimate.astype(jnp.promote_types(estimate.dtype, jnp.float32))

        # One after another: together, the tangents would be K times as large as the activation.
        estimate = jax.lax.fori_loop(
            tangents.start + 1,
            tangents.stop,
            lambda k, total: total + along(k),
            along(jnp.full((), tangents.start)),
        )
        # A derivative by a complex number has the conjugate of the direction it is found along.
        estimate = jnp.conj(estimate / len(tangents)).astype(activation.value.dtype)
        return placed_like(estimate, activation.value)


class _Part(NamedTuple):
    """Activations by their numbers, and the tangents that are theirs."""

    numbers: frozenset[int]
    tangents: range


class _Given(NamedTuple):
    """What an estimate of a stage is made with.

    `passed` are the activations that reverse mode goes through, and `direct` those that no other
    perturbed one comes after, which have no tangent.
    """

    program: Program
    key: Key[Array, ""]
    scales: Scales | None
    passed: frozenset[Any]
    direct: frozenset[Any]

    def tangent(
        self, estimator: AbstractPerturbedActivities, a: Activation, k: Array, by: Any = None
    ) -> Array:
        """What an activation is moved along, or with `by`, what it is credited with."""
        if a.variable in self.direct:
            return jnp.zeros_like(a.value)
        scale = 1.0 if self.scales is None else self.scales(a)
        scale = scale if by is None else by / scale
        return estimator._tangent(a.site.key(self.key), a, k, scale)


@contextlib.contextmanager
def _refusing_reverse(asked: bool) -> Iterator[None]:
    """A sentence for what has no reverse mode, where a part of the derivative is taken by it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # what a derivative rule raises can be anything
        if not asked:
            raise
        raise InputError(
            "exact_mixing=True and exact_direct=True take a part of the derivative in reverse, "
            f"which JAX refuses here ({str(error).splitlines()[0]}); leave them out"
        ) from error


def _key_after(results: Any, key: Key[Array, ""]) -> Key[Array, ""]:
    """`key`, but for XLA not to be had before `results`."""
    (data,) = after(results, [jax.random.key_data(key)])
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


@explained.register
def _(
    estimator: AbstractPerturbedActivities, fun: Objective, params: PyTree
) -> list[ExplainedParameter]:
    program = estimator._program(fun, params)
    return by_layer(program, params, "activation", estimator._not_perturbed(program))
