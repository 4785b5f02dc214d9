"""Gradients layer by layer, from what the losses do when activations are perturbed."""

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from forwardgrad._errors import InputError, unknown_name
from forwardgrad._losses import Losses
from forwardgrad.estimators._base import AbstractEstimator, Objective
from forwardgrad.estimators._credit import ExplainedParameter, by_layer, explained
from forwardgrad.estimators._distributions import DISTRIBUTIONS, Distribution, draw, portable
from forwardgrad.estimators._mixing import TOKEN, Mixing, check_mixing, check_tokens
from forwardgrad.estimators._steering import (
    check_counts,
    check_no_refs,
    check_one_by_one,
    influenced,
    not_differentiable,
    total_of,
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
"""`evaluate(eps, k, held=None)`: a stage with its activations moved by `eps` along tangents k.

It returns the losses; then what is not to be differentiated: all that the stage computes, and the
activations. `eps` is None where nothing moves; `held` is that of `Hooks`.
"""


Scales: TypeAlias = Callable[[Activation], Array]
"""How long an activation's tangents are, in one iteration of the loops around it."""


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

    def __check_init__(self):
        check_mixing(self)
        if self.distribution not in DISTRIBUTIONS:
            raise unknown_name("distribution", str(self.distribution), DISTRIBUTIONS)
        check_counts(self, "tangents", "chunk")

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
    def _changes(self, evaluate: Evaluate, program: Program) -> tuple[Any, list[Array]]:
        """What is not to be differentiated where nothing moves, and the losses' changes.

        The first axis of a change is that of the tangents.
        """

    def value_and_grad(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        """The objective's value and an estimate of its gradient."""
        assert key is not None
        return self._by_scales(self._program(fun, params), key, None)

    def _by_scales(
        self, program: Program, key: Key[Array, ""], scales: Scales | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        """The same, with activations whose tangents are scaled: `d u / s` for a tangent `s u`."""
        check_one_by_one(program, type(self).__name__)
        check_no_refs(program, type(self).__name__)
        if self.mixing != "all":
            check_tokens(program, f"mixing={self.mixing!r}")
        grads = [jnp.zeros_like(leaf) for leaf in program.leaves]
        base = portable(key)

        def run(stage, number, reads):
            del number
            # The signs of a stage are drawn when it begins: all stages' would else be kept at once.
            own = _key_after(reads, base)
            # Every activation is cut off from what uses it: reverse mode sees one layer at a time.
            (total, _), pullback, (changes, noted, writes) = jax.vjp(
                lambda leaves: self._forward(program, stage, reads, own, leaves, scales),
                [program.leaves[i] for i in stage.leaves],
                has_aux=True,
            )
            gradients = [self._gradient(a, changes, own, program, scales) for a in noted]
            return writes, pullback((jnp.ones_like(total), gradients))[0]

        with (
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            _refusing_reverse(self.exact_mixing),
        ):
            terms, aux, results = program.stage_by_stage(run)
            for stage, of_stage in zip(program.stages, results, strict=True):
                for i, grad in zip(stage.leaves, of_stage, strict=True):
                    grads[i] = grads[i] + grad
            value = program.losses(terms).total()
        value, aux, grads = not_differentiable((value, aux, grads), type(self).__name__)
        return (value, program.auxiliary(aux)), program.treedef.unflatten(grads)

    def _forward(
        self,
        program: Program,
        stage: Stage,
        reads: Sequence[Any],
        key: Key[Array, ""],
        leaves: list[Array],
        scales: Scales | None,
    ):
        """A stage's total and activations, and what is not to be differentiated.

        The latter are the losses' changes along each tangent (their first axis if there are
        several), what is known of the activations, and all that the stage computes.
        """
        places = program.terms_of(stage)
        not_perturbed = self._not_perturbed(program)

        def evaluate(eps, k, held=None):
            def perturb(activation):
                if activation.last or activation.variable in not_perturbed:
                    return activation.value
                if eps is None:
                    return jax.lax.stop_gradient(activation.value)
                scale = 1.0 if scales is None else scales(activation)
                tangent = self._tangent(activation.site.key(key), activation, k, scale)
                return self._moved(eps, activation.value, tangent)

            walk = LayerWalk(program.plan, Hooks(activation=perturb, held=held))
            writes = walk.arrays(stage.jaxpr, (), [*leaves, *reads])
            noted = [a for a in walk.noted.activations if a.variable not in not_perturbed]
            inner = [a for a in noted if not a.last]
            return [writes[i] for i in places.values()], (writes, inner)

        (writes, noted), changes = self._changes(evaluate, program)
        if self.tangents == 1:
            changes = [change[0] for change in changes]
        total = sum([total_of(writes[i]) for i in places.values()], start=jnp.zeros(()))
        by_term = [dict(zip(places, changes, strict=True)).get(i) for i in range(program.terms)]
        return (total, [a.value for a in noted]), (program.losses(by_term), noted, writes)

    def _not_perturbed(self, program: Program) -> frozenset[Any]:
        """The activations that reverse mode goes through, from the next ones that are perturbed."""
        if not self.exact_mixing:
            return frozenset()
        check_tokens(program, "exact_mixing=True")
        plan, found = program.plan, program.mixing_steps(TOKEN)
        hidden = [v for v in plan.outputs if plan.terms(v) and not plan.is_last(v)]
        if hidden and found.issuperset(hidden):
            raise InputError(
                "exact_mixing=True would be backpropagation here: all activations below the last "
                "layers are mixed with those of other tokens at once; leave it out, or use "
                "Backpropagation()"
            )
        return found

    def _tangent(
        self, key: Key[Array, ""], activation: Activation, k: Array, scale: Any = 1.0
    ) -> Array:
        """The k-th tangent of an activation, times `scale`."""
        z = activation.value
        key = jax.random.fold_in(key, k)
        u = draw(key, z.shape, self.distribution, scale, computed_in(z.dtype)).astype(z.dtype)
        return u if activation.mask is None else jnp.where(activation.mask, u, 0)

    def _gradient(
        self,
        activation: Activation,
        changes: Losses,
        key: Key[Array, ""],
        program: Program,
        scales: Scales | None,
    ) -> Array:
        """The estimate of the losses' derivative by an activation."""

        def of_one(a, k, scale):
            return self._tangent(
                a.site.key(key), a, k, scale if scales is None else scale / scales(a)
            )

        def along(k, changes):
            scale = influenced(activation, changes, program, self.mixing)
            loops = activation.value.shape[: activation.stacked]
            scale = jnp.broadcast_to(scale, (*loops, *scale.shape[activation.stacked :]))
            return activation.each(lambda a, scale: of_one(a, k, scale), scale)

        if self.distribution == "rademacher":
            # Signs are drawn again when they are needed; XLA would otherwise keep them.
            key = _key_after(changes, key)
        if self.tangents == 1:
            estimate = along(jnp.zeros((), int), changes)
        else:
            estimate = jnp.mean(jax.vmap(along)(jnp.arange(self.tangents), changes), axis=0)
        # A derivative by a complex number has the conjugate of the direction it is found along.
        estimate = jnp.conj(estimate).astype(activation.value.dtype)
        return placed_like(estimate, activation.value)


@contextlib.contextmanager
def _refusing_reverse(exact_mixing: bool) -> Iterator[None]:
    """A sentence for what mixes tokens and has no reverse mode."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # what a derivative rule raises can be anything
        if not exact_mixing:
            raise
        raise InputError(
            "exact_mixing=True needs the reverse mode of what mixes tokens, which JAX refuses here "
            f"({str(error).splitlines()[0]}); leave it out"
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
