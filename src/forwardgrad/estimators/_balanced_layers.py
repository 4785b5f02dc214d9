"""What balanced tangents are of, activations or parameters, and what the losses hear of each."""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from forwardgrad._errors import InputError
from forwardgrad.estimators._perturbed_activities import (
    AbstractPerturbedActivities,
    Baseline,
    Steering,
)
from forwardgrad.estimators._steering import at_iterations, check_no_refs, check_one_by_one
from forwardgrad.estimators._weight_perturbation import WeightPerturbation
from forwardgrad.rewrite import Activation, Hooks, Program

COUNTED = 32
"""Over about so many tangents a parameter's power is averaged: each of them gives one number."""


class Layer(NamedTuple):
    """Where a layer's powers are, how many of its entries share a loss, and which losses.

    `slices` are parts with a power of their own, as positions and lengths: the iterations of those
    loops around an activation that change its weights, or the axes of a stack of parameters.
    """

    first: int
    entries: float
    terms: frozenset[int]
    slices: tuple[tuple[int, int], ...]

    @property
    def powers(self) -> int:
        """How many powers it has."""
        return math.prod(length for _, length in self.slices)

    def of(self, array: Float[Array, " powers"]) -> Float[Array, "*slices"]:
        """Its own part of an array with an entry for every power."""
        own = array[self.first : self.first + self.powers]
        return own.reshape([length for _, length in self.slices])


Layers: TypeAlias = dict[int, Layer]
"""Layers by the numbers of activations, or by the positions of parameters."""


def count_of(layers: Layers) -> int:
    """The number of powers."""
    return sum(layer.powers for layer in layers.values())


class AbstractBalanced(abc.ABC):
    """What is different for activations and for weights.

    A power is measured along `first` tangents in the beginning and along `again` tangents later,
    when the share `kept` of the earlier measurement is kept.
    """

    first: int
    again: int
    kept: float

    @abc.abstractmethod
    def program(self, fun: Any, params: PyTree[Array], name: str) -> Program:
        """The function as a program; an `InputError` if the estimator `name` cannot take it."""

    @abc.abstractmethod
    def layers(self, program: Program) -> Layers:
        """What is perturbed."""

    @abc.abstractmethod
    def power(
        self,
        program: Program,
        leaves: Sequence[Array],
        layers: Layers,
        i: Array,
        key: Key[Array, ""],
        tangents: int,
    ) -> Float[Array, ""]:
        """The power of the losses' change if only the i-th layer is perturbed."""

    @abc.abstractmethod
    def estimate(
        self,
        program: Program,
        key: Key[Array, ""],
        layers: Layers,
        scales: Float[Array, " powers"],
        baseline: Baseline | None,
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array], list[Any]]:
        """Value, auxiliary data and gradient, by tangents of these lengths; what is learned."""


def balanced(estimator: Any) -> AbstractBalanced:
    """How the tangents of an estimator are balanced.

    **Raises:**

    `InputError` if there is no way to.
    """
    if isinstance(estimator, AbstractPerturbedActivities):
        return _Activities(estimator)
    if isinstance(estimator, WeightPerturbation):
        return _Weights(estimator)
    raise InputError(
        "estimator must be an ActivityPerturbation, NodePerturbation or WeightPerturbation, got "
        f"{estimator!r}"
    )


class _Activities(AbstractBalanced):
    # Every loss has a change of its own: their squares are many numbers, of one tangent already.
    first, again, kept = 1, 1, 0.5

    def __init__(self, estimator: AbstractPerturbedActivities):
        self._estimator = estimator

    def program(self, fun: Any, params: PyTree[Array], name: str) -> Program:
        program = self._estimator._program(fun, params)
        check_one_by_one(program, name)
        check_no_refs(program, name)
        return program

    def layers(self, program: Program) -> Layers:
        exact = self._estimator._direct(program)
        not_perturbed = self._estimator._not_perturbed(program) | exact
        found: Layers = {}
        for a in program.described():
            if a.last or a.variable in not_perturbed:
                continue
            assert a.variable is not None
            layer = program.plan.layers.get(id(program.plan.outputs[a.variable].eqn))
            lengths = a.value.shape[: a.stacked]
            loops = tuple((i, lengths[i]) for i in (() if layer is None else layer.own_loops))
            count = math.prod(length for _, length in loops)
            entries = max(1.0, a.value.size / count / _apart(a))
            found[a.number] = Layer(count_of(found), entries, a.terms, loops)
        return found

    def power(
        self,
        program: Program,
        leaves: Sequence[Array],
        layers: Layers,
        i: Array,
        key: Key[Array, ""],
        tangents: int,
    ) -> Float[Array, ""]:
        direct, chosen = self._estimator._direct(program), _only(i, layers)

        def evaluate(eps, k, held=None, apart=False):
            cut = jax.lax.stop_gradient if held is None else held

            def perturb(a):
                has_tangent = a.number in layers
                if eps is None or not (has_tangent or a.variable in direct):
                    return a.value
                z = cut(a.value) if apart else a.value
                if not has_tangent:
                    return z
                u = self._estimator._tangent(a.site.key(key), a, k, _own(layers, chosen, a))
                return self._estimator._moved(eps, z, u)

            return program.with_hooks(leaves, Hooks(activation=perturb, held=held))[0], None

        along = dataclasses.replace(self._estimator, chunk=None)
        _, changes = along._changes(evaluate, program, range(tangents))
        squares = [jnp.sum(jnp.square(c.astype(jnp.float32))) for c in changes]
        return sum(squares, start=jnp.zeros(())) / tangents

    def estimate(
        self,
        program: Program,
        key: Key[Array, ""],
        layers: Layers,
        scales: Float[Array, " powers"],
        baseline: Baseline | None,
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array], list[Any]]:
        steering = Steering(lambda a: _own(layers, scales, a), baseline)
        return self._estimator._steered(program, key, steering)


def _only(i: Array, layers: Layers) -> Float[Array, " powers"]:
    return (jnp.arange(count_of(layers)) == i).astype(jnp.float32)


def _own(layers: Layers, array: Array, activation: Activation) -> Array:
    """The entry that belongs to an activation, in one iteration of the loops around it."""
    layer = layers[activation.number]
    iterations = tuple(activation.iterations[i] for i, _ in layer.slices)
    return at_iterations(layer.of(array), activation.site._replace(iterations=iterations))


def _apart(activation: Activation) -> int:
    """The number of losses that entries of an activation have for themselves."""
    counts = [1]
    for term in activation.terms:
        names = [name for (t, name), _ in activation.places if t == term and name is not None]
        places = [activation.place(term, name) for name in names]
        parts = [p for place in places if not place.mixed for p in place.parts or ()]
        counts.append(math.prod(p.size for p in parts))
    return max(counts)


class _Weights(AbstractBalanced):
    first = COUNTED

    def __init__(self, estimator: WeightPerturbation):
        self._estimator = estimator
        self.again = min(COUNTED, estimator.tangents)
        self.kept = (COUNTED - self.again) / (COUNTED + self.again)

    def program(self, fun: Any, params: PyTree[Array], name: str) -> Program:
        del name
        return self._estimator._program(fun, params)

    def layers(self, program: Program) -> Layers:
        exact = program.of_last_layers() if self._estimator.exact_last else []
        influence, found = program.influence(), {}
        for i, layout in enumerate(self._estimator._layouts(program)):
            leaf = program.leaves[i]
            if i in exact or not influence[i] or not leaf.size:
                continue
            slices = tuple((axis, leaf.shape[axis]) for axis in layout[0].stacked)
            entries = leaf.size / math.prod(length for _, length in slices)
            found[i] = Layer(count_of(found), entries, influence[i], slices)
        return found

    def power(
        self,
        program: Program,
        leaves: Sequence[Array],
        layers: Layers,
        i: Array,
        key: Key[Array, ""],
        tangents: int,
    ) -> Float[Array, ""]:
        chosen = _of_each(layers, _only(i, layers))
        return self._estimator._power(program.at(leaves), key, chosen, tangents)

    def estimate(
        self,
        program: Program,
        key: Key[Array, ""],
        layers: Layers,
        scales: Float[Array, " powers"],
        baseline: Baseline | None,
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array], list[Any]]:
        assert baseline is None
        return *self._estimator._by_scales(program, key, _of_each(layers, scales)), []


def _of_each(layers: Layers, array: Float[Array, " powers"]) -> dict[int, Array]:
    return {i: layer.of(array) for i, layer in layers.items()}
