"""Estimates of a gradient held against the exact one: direction, bias, variance, cost."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key, PyTree

from forwardgrad._diagnosis import Diagnosis
from forwardgrad._errors import InputError
from forwardgrad._estimation import estimation
from forwardgrad._moments import products_of_samples, row
from forwardgrad._request import checked_params
from forwardgrad._value_and_grad import value_and_grad
from forwardgrad.estimators import (
    AbstractEstimator,
    AbstractStatefulEstimator,
    Backpropagation,
    WeightPerturbation,
)
from forwardgrad.estimators._base import Objective

FORWARD_LIMIT = 10_000
"""Up to so many parameters the exact gradient may come from forward mode, a pass for each."""

FORWARD_BATCH = 64
"""Forward passes at once."""


def diagnose(
    fun: Callable[..., Any],
    estimator: AbstractEstimator,
    params: PyTree,
    *args: Any,
    key: Key[Array, ""],
    samples: int = 256,
    has_aux: bool = False,
    check: bool = False,
    **kwargs: Any,
) -> Diagnosis:
    r"""Compare an estimator's gradients of `fun` with the exact one, layer by layer.

    Estimates are drawn in pairs, one pair after another, and only sums are kept. So the memory
    needed is that of a few gradients, for any number of samples. The exact gradient comes from
    backpropagation. If `fun` has no reverse mode (a `while_loop`), it comes from forward mode, with
    one pass for each of at most 10,000 parameters.

    Nothing is timed. The cost is what XLA counts in the compiled gradients.

    **Arguments:**

    - `fun`, `has_aux`: as for [`forwardgrad.value_and_grad`][].
    - `estimator`: for instance [`forwardgrad.WeightPerturbation`][]. One that needs a state
        ([`forwardgrad.estimation`][]) has that of its first step in all samples.
    - `params`, `args`, `kwargs`: what `fun` is called with.
    - `key`: a random key, from which one for each sample is split.
    - `samples`: the number of estimates, even and at least 4. An estimator that draws no random
        numbers is called only twice.
    - `check`: also check an identity of [`forwardgrad.WeightPerturbation`][], which holds for every
        single estimate with one tangent of signs. Let d be the directional derivative, and N the
        number of perturbed entries. Then $g \cdot \hat g = d^2$ and
        $\lVert \hat g \rVert^2 = N d^2$, hence
        $N\, g \cdot \hat g / \lVert \hat g \rVert^2 = 1$. This needs no statistics, and finds
        errors as small as rounding, while a small bias is hidden by the noise. The diagnosis'
        `identity_error` is the largest deviation of 8 estimates.

    **Returns:**

    The diagnosis: cosine, bias, variance of every array of parameters and of all together, as
    [`forwardgrad.DiagnosisRow`][] defines them, and the cost. `print` it for a table.

    **Raises:**

    `InputError` if `samples` is odd or less than 4, if there are too many parameters for forward
    mode where it is needed, and where `value_and_grad` raises it.

    >>> import forwardgrad as fg, jax, jax.numpy as jnp
    >>> found = fg.diagnose(
    ...     lambda w: jnp.sum(w**2),
    ...     fg.WeightPerturbation(),
    ...     jnp.array([1.0, 2.0, 3.0]),
    ...     key=jax.random.key(0),
    ...     samples=1000,
    ... )
    >>> round(found.total.relative_variance, 1)  # one less than the number of parameters
    2.0
    """
    if not isinstance(samples, int) or samples < 4 or samples % 2:
        raise InputError(f"samples must be an even number of at least 4, got {samples!r}")
    params = checked_params(params)
    gradient = _gradient_of(fun, estimator, has_aux, params, args, kwargs, key)
    exact, reverse = _exact(fun, has_aux, params, args, kwargs, key)
    identity = None
    if check:
        one = value_and_grad(fun, _one_tangent(estimator), has_aux=has_aux)
        single = _Gradient(one, params, args, kwargs, key)
        identity = max(_identity_error(exact, single(k)) for k in jax.random.split(key, 8))
    drawn = samples if estimator.needs_key else 2
    sums = products_of_samples(gradient, exact, jax.random.split(key, drawn))
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path) or "params" for path, _ in leaves]
    sizes = [leaf.size for _, leaf in leaves]
    unit = max(float(jnp.finfo(leaf.dtype).eps) for _, leaf in leaves)
    return Diagnosis(
        estimator=repr(estimator),
        samples=drawn,
        layers=tuple(
            row(name, size, sums.of([i]), unit)
            for i, (name, size) in enumerate(zip(names, sizes, strict=True))
        ),
        total=row("all", sum(sizes), sums.of(range(len(sizes))), unit),
        flops=gradient.flops,
        exact_flops=reverse.flops if reverse else None,
        temp_bytes=gradient.temp_bytes,
        exact_temp_bytes=reverse.temp_bytes if reverse else None,
        identity_error=identity,
    )


def _one_tangent(estimator: AbstractEstimator) -> WeightPerturbation:
    if not isinstance(estimator, WeightPerturbation):
        raise InputError(
            f"check must be False but for WeightPerturbation, whose identity it checks, got "
            f"{estimator!r}"
        )
    return WeightPerturbation(structure=estimator.structure, chunk=estimator.chunk)


def _identity_error(exact: list[Array], estimate: list[Array]) -> float:
    """How far N (g . e) / (e . e) is from 1, for the perturbed entries' gradient g and estimate e.

    It is infinite where one of them is zero and the other is not.
    """
    entries = sum(int(jnp.sum(e != 0)) for e in estimate)
    product = sum(float(jnp.vdot(g, e)) for g, e in zip(exact, estimate, strict=True))
    square = sum(float(jnp.vdot(e, e)) for e in estimate)
    if not square:
        return 0.0 if not any(bool(jnp.any(g != 0)) for g in exact) else math.inf
    return abs(entries * product / square - 1)


class _Gradient:
    """A compiled gradient: its leaves for a key, in single precision at least, and its cost."""

    def __init__(self, gradient: Callable, params: PyTree, args: tuple, kwargs: dict, key: Array):
        # What is no array stays as it is, a flag or a function.
        arrays, static = eqx.partition((args, kwargs), _is_array)

        def leaves(params, arrays, key):
            args, kwargs = eqx.combine(arrays, static)
            _, grads, *_ = gradient(params, *args, key=key, **kwargs)
            return [_widened(leaf) for leaf in jax.tree.leaves(grads)]

        self._inputs = params, arrays
        self._compiled = jax.jit(leaves).lower(params, arrays, key).compile()

    def __call__(self, key: Array) -> list[Array]:
        return self._compiled(*self._inputs, key)

    @property
    def flops(self) -> float | None:
        analysis = self._compiled.cost_analysis()
        return None if analysis is None else analysis.get("flops")

    @property
    def temp_bytes(self) -> int | None:
        analysis = self._compiled.memory_analysis()
        return None if analysis is None else analysis.temp_size_in_bytes


def _gradient_of(
    fun: Callable,
    estimator: AbstractEstimator,
    has_aux: bool,
    params: PyTree,
    args: tuple,
    kwargs: dict,
    key: Array,
) -> _Gradient:
    """The estimator's gradient, by the state of its first step if it needs one."""
    if not (isinstance(estimator, AbstractStatefulEstimator) and estimator.needs_state):
        gradient = value_and_grad(fun, estimator, has_aux=has_aux)
        return _Gradient(gradient, params, args, kwargs, key)
    init, step = estimation(fun, estimator, has_aux=has_aux)
    kwargs = {**kwargs, "state": init(params, *args, **kwargs)}
    return _Gradient(step, params, args, kwargs, key)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _widened(leaf: Array) -> Array:
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _exact(
    fun: Callable, has_aux: bool, params: PyTree, args: tuple, kwargs: dict, key: Array
) -> tuple[list[Array], _Gradient | None]:
    """The exact gradient, and backpropagation where that is what it comes from."""

    def by(estimator):
        return _Gradient(value_and_grad(fun, estimator, has_aux=has_aux), params, args, kwargs, key)

    try:
        reverse = by(Backpropagation())
    except ValueError as error:
        if "everse-mode" not in str(error):
            raise
    else:
        return reverse(key), reverse
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    if size > FORWARD_LIMIT:
        raise InputError(
            f"params (={size:,} numbers) must be no more than {FORWARD_LIMIT:,} where fun has no "
            "reverse mode: its exact gradient then takes a forward pass for each"
        )
    return by(_ExactForward())(key), None


class _ExactForward(AbstractEstimator):
    """The exact gradient by forward mode, a pass for each parameter."""

    @property
    def needs_key(self) -> bool:
        """False."""
        return False

    def value_and_grad(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        """The objective's value and its exact gradient."""
        del key
        flat, unravel = ravel_pytree(params)

        def total(flat):
            losses, aux = fun(unravel(flat))
            return losses.total(), aux

        def along(i):
            basis = jnp.zeros_like(flat).at[i].set(1)
            return jax.jvp(total, (flat,), (basis,), has_aux=True)[1]

        grads = jax.lax.map(along, jnp.arange(flat.size), batch_size=FORWARD_BATCH)
        return total(flat), unravel(grads)
