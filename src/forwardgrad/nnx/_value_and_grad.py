"""Functions of modules as functions of arrays, and what they change in the modules."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
from flax import nnx
from jaxtyping import Array, Key, PyTree

from forwardgrad import _value_and_grad as core
from forwardgrad._errors import InputError
from forwardgrad._request import as_pair, called, within
from forwardgrad.estimators import AbstractEstimator

TAG = "forwardgrad"
"""By which Flax tells our splits and merges from those of its own transformations."""


def value_and_grad(
    fun: Callable[..., Any],
    estimator: AbstractEstimator,
    *,
    argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, PyTree[Array]]]:
    """A function that evaluates `fun` and a gradient of it, for functions of Flax NNX modules.

    It takes the place of `flax.nnx.value_and_grad`. `fun` may change the modules that it is given:
    the statistics of `BatchNorm`, the counts of `Rngs`, a cache. After the call, the caller's
    modules have changed in the same way. Use it under `flax.nnx.jit`.

    **Arguments:**

    - `fun`: a function `fun(model, *args, **kwargs)` that returns a real scalar, or
        [`forwardgrad.Losses`][] that add up to one, or with `has_aux` a pair of either and anything
        else. Every argument may be or hold modules.
    - `estimator`: for instance [`forwardgrad.WeightPerturbation`][].
    - `argnums`: the argument to differentiate with respect to, or a sequence of several. In a
        module, an integer means every `nnx.Param`, and `nnx.DiffState(argnum, filter)` means the
        variables that the filter selects. Plain arrays in a chosen argument are always
        differentiated. For estimators that make a difference, the arrays in all other arguments
        are data, and the variables of modules are not.
    - `has_aux`: whether `fun` returns auxiliary data beside its value.

    **Returns:**

    A function `(model, *args, key=None, **kwargs) -> (value, grads)`, or `((value, aux), grads)`
    with `has_aux`. `grads` is an `nnx.State`, as `nnx.Optimizer.update(model, grads)` takes it; a
    tuple where `argnums` is a sequence. `key` is a `jax.random.key` for the estimator, and has
    nothing to do with the modules' `nnx.Rngs`.

    **Raises:**

    `InputError` as for [`forwardgrad.value_and_grad`][]; when called, also if a variable that
    several arguments share is to be differentiated in one of them and not in another.

    >>> import forwardgrad as fg, jax, jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> class Net(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.inner, self.outer = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
    ...         self.norm, self.drop = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.outer(self.drop(nnx.relu(self.norm(self.inner(x)))))
    >>> def loss(model, x, y):
    ...     return jnp.mean((model(x) - y) ** 2)
    >>> @nnx.jit
    ... def step(model, optimiser, x, y, key):
    ...     gradient = fg.nnx.value_and_grad(loss, fg.WeightPerturbation(tangents=4))
    ...     value, grads = gradient(model, x, y, key=key)
    ...     optimiser.update(model, grads)
    ...     return value
    >>> model = Net(nnx.Rngs(0))
    >>> optimiser = nnx.Optimizer(model, optax.sgd(0.02), wrt=nnx.Param)
    >>> x = jax.random.normal(jax.random.key(0), (32, 4)) + 3
    >>> for key in jax.random.split(jax.random.key(1), 50):
    ...     value = step(model, optimiser, x, x[:, :1], key)
    >>> print(model.drop.rngs.count[...], bool(jnp.all(model.norm.mean[...] != 0)))
    50 True
    """
    numbers, filters = _selection(argnums)
    # What is wrong with the function or the estimator is said here, not at the first call.
    core.value_and_grad(fun, estimator, argnums=numbers, has_aux=has_aux)

    @nnx.update_context(TAG)
    def evaluate(*args, key: Key[Array, ""] | None = None, **kwargs):
        chosen = dict(zip(within(numbers, len(args)), filters, strict=True))
        trees = (*args, kwargs)
        _check_shared(trees, chosen)
        with nnx.split_context(TAG) as context:
            nodes = [_split(tree, context, chosen.get(i)) for i, tree in enumerate(trees)]
        arrays = [_arrays(tree) for tree in nodes]

        def of_arrays(*arrays):
            own = [_with_arrays(*pair) for pair in zip(nodes, arrays, strict=True)]
            with nnx.merge_context(TAG, inner=True) as context:
                *args, kwargs = _merge(own, context)
            value, aux = as_pair(called(fun, args, kwargs), has_aux)
            # What is no module in the arguments cannot have been changed.
            modules = list(filter(_is_module, _leaves((args, kwargs))))
            with nnx.split_context(TAG) as context:
                out = _split((modules, aux), context)
            return value, _Changes.since(jax.tree.leaves((arrays, nodes)), out)

        gradient = core.value_and_grad(of_arrays, estimator, argnums=numbers, has_aux=True)
        (value, changes), grads = gradient(*arrays, key=key)
        with nnx.merge_context(TAG, inner=False) as context:
            _, aux = _merge(changes.applied_to(jax.tree.leaves((arrays, nodes))), context)
        return ((value, aux) if has_aux else value), grads

    return evaluate


class _Node(eqx.Module):
    """A module, or a single variable, as arrays: those to be differentiated and the others."""

    graphdef: Any = eqx.field(static=True)
    differentiated: Any
    rest: Any


class _Changes(eqx.Module):
    """A tree of which some leaves are among a function's inputs, and need not be computed."""

    structure: Any = eqx.field(static=True)
    inputs: tuple[int | None, ...] = eqx.field(static=True)
    others: list[Any]

    @classmethod
    def since(cls, inputs: Sequence[Any], tree: PyTree) -> "_Changes":
        """What of a tree is not among the inputs."""
        known = {id(leaf): i for i, leaf in enumerate(inputs)}
        leaves, structure = jax.tree.flatten(tree)
        found = tuple(known.get(id(leaf)) for leaf in leaves)
        others = [leaf for leaf, i in zip(leaves, found, strict=True) if i is None]
        return cls(structure, found, others)

    def applied_to(self, inputs: Sequence[Any]) -> PyTree:
        """The tree."""
        others = iter(self.others)
        leaves = [next(others) if i is None else inputs[i] for i in self.inputs]
        return jax.tree.unflatten(self.structure, leaves)


def _selection(argnums: Any) -> tuple[Any, list[Any]]:
    """`argnums` as numbers, and the filter of each."""
    several = isinstance(argnums, Iterable)
    each = list(argnums) if several else [argnums]
    numbers = [a.argnum if isinstance(a, nnx.DiffState) else a for a in each]
    filters = [a.filter if isinstance(a, nnx.DiffState) else nnx.Param for a in each]
    return (numbers if several else numbers[0]), filters


def _check_shared(trees: Sequence[PyTree], chosen: Mapping[int, Any]) -> None:
    """Raise an `InputError` for a variable that is to be differentiated here and not there."""
    seen: dict[int, tuple[int, bool]] = {}
    for i, tree in enumerate(trees):
        selects = nnx.filterlib.to_predicate(chosen[i]) if i in chosen else None
        for module in filter(_is_module, _leaves(tree)):
            alone = isinstance(module, nnx.Variable)
            for path, value in [((), module)] if alone else nnx.iter_graph(module):
                if not isinstance(value, nnx.Variable):
                    continue
                here = selects is not None and (alone or selects(path, value))
                first, there = seen.setdefault(id(value), (i, here))
                if here != there:
                    where = f" at {'/'.join(map(str, path))}" if path else ""
                    raise InputError(
                        "argnums must choose all or none of what arguments share: arguments "
                        f"{first} and {i} share a {type(value).__name__}{where}, which is to be "
                        "differentiated in one of them alone; pass it once, or a copy by "
                        "flax.nnx.clone"
                    )


def _is_module(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Pytree | nnx.Variable)


def _leaves(tree: PyTree) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_module)


def _split(tree: PyTree, context: Any, chosen: Any = None) -> PyTree:
    """A tree with the modules in it as `_Node`s."""

    def split(leaf):
        if not _is_module(leaf):
            return leaf
        if chosen is None:
            graphdef, rest = context.split(leaf)
            return _Node(graphdef, None, rest)
        if isinstance(leaf, nnx.Variable):
            graphdef, own = context.split(leaf)
            return _Node(graphdef, own, None)
        return _Node(*context.split(leaf, chosen, ...))

    return jax.tree.map(split, tree, is_leaf=_is_module)


def _arrays(tree: PyTree) -> PyTree:
    """What there is to differentiate: leaves, and of each module the chosen variables."""
    return jax.tree.map(
        lambda leaf: leaf.differentiated if isinstance(leaf, _Node) else leaf,
        tree,
        is_leaf=_is_node,
    )


def _with_arrays(tree: PyTree, arrays: PyTree) -> PyTree:
    """`tree` with other arrays to differentiate."""
    return jax.tree.map(
        lambda leaf, own: _Node(leaf.graphdef, own, leaf.rest) if isinstance(leaf, _Node) else own,
        tree,
        arrays,
        is_leaf=_is_node,
    )


def _merge(tree: PyTree, context: Any) -> PyTree:
    """A tree with modules again, whose variables belong to the trace that is going on."""

    def merge(leaf):
        if not isinstance(leaf, _Node):
            return leaf
        # Flax makes a variable part of the trace in which the tree that holds it is made.
        states = jax.tree.map(lambda array: array, (leaf.differentiated, leaf.rest))
        return context.merge(leaf.graphdef, *[s for s in states if s is not None])

    return jax.tree.map(merge, tree, is_leaf=_is_node)


def _is_node(leaf: Any) -> bool:
    return isinstance(leaf, _Node)
