"""The two halves of a weight-perturbed estimate: one measures, the other makes a gradient of it."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Key, PyTree

from forwardgrad._errors import InputError
from forwardgrad._request import Request, checked_key, checked_params
from forwardgrad.estimators import AbstractEstimator, Scalars, WeightPerturbation


def directional_derivatives(
    fun: Callable[..., Any], estimator: AbstractEstimator, *, has_aux: bool = False
) -> Callable[..., Any]:
    """A function that measures, and leaves the gradient to [`forwardgrad.apply_scalars`][].

    Together the two are [`forwardgrad.value_and_grad`][] in two halves. Only a few scalars pass
    from one half to the other, however large the model is. Whoever has the parameters and the key
    can compute the gradient from them, in another place or later.

    **Arguments:**

    - `fun`, `has_aux`: as for [`forwardgrad.value_and_grad`][].
    - `estimator`: a [`forwardgrad.WeightPerturbation`][] without `exact_last`.

    **Returns:**

    A function `(params, *args, key, **kwargs) -> scalars`, or `(scalars, aux)` with `has_aux`.
    `scalars` are [`forwardgrad.Scalars`][], their `value` that of `fun`.

    **Raises:**

    `InputError` if the estimator is another one; when called, as for
    [`forwardgrad.value_and_grad`][].

    >>> import forwardgrad as fg, jax, jax.numpy as jnp
    >>> def loss(params, x):
    ...     return jnp.mean((x @ params["W"] + params["b"] - 1) ** 2)
    >>> params = {"W": jnp.ones((100, 50)), "b": jnp.zeros(50)}
    >>> x, key = jnp.ones((8, 100)), jax.random.key(0)
    >>> estimator = fg.WeightPerturbation(tangents=2)
    >>> scalars = fg.directional_derivatives(loss, estimator)(params, x, key=key)
    >>> print(scalars.value, [d.shape for d in scalars.derivatives])
    9801.0 [(2,)]
    >>> grads = fg.apply_scalars(estimator, params, key, scalars)
    >>> value, same = fg.value_and_grad(loss, estimator)(params, x, key=key)
    >>> bool(value == scalars.value), bool(jnp.all(grads["W"] == same["W"]))
    (True, True)
    """
    request = Request(fun, estimator, 0, has_aux)
    perturbation = _checked_estimator(estimator)

    def measure(*args, key: Key[Array, ""] | None = None, **kwargs):
        objective, params = request.objective(args, kwargs)
        params = request.placed(params, key)
        assert key is not None
        scalars, aux = perturbation.directional_derivatives(objective, params, key)
        return request.result(scalars, aux)

    return measure


def apply_scalars(
    estimator: AbstractEstimator,
    params: PyTree[Array],
    key: Key[Array, "*workers"],
    scalars: Scalars,
) -> PyTree[Array]:
    """The gradient from its scalars: the tangents are drawn again, and multiplied by them.

    **Arguments:**

    - `estimator`, `params`, `key`: those that [`forwardgrad.directional_derivatives`][] had. Of
        `params`, only the shapes and dtypes matter.
    - `scalars`: what it returned.

    With a vector of keys, and scalars stacked in the same way (for instance by
    `jax.lax.all_gather`), the result is the sum of the gradients. It costs little more than one.

    **Returns:**

    What [`forwardgrad.value_and_grad`][] returns for that estimator and key, to the bit.

    **Raises:**

    `InputError` if the scalars are those of another estimator, of parameters of other shapes, of
    another number of keys, or of another key. Where the keys are known only when a compiled
    program runs, another key's gradient is NaN.
    """
    perturbation = _checked_estimator(estimator)
    key = checked_key(estimator, key, stacked=True)
    return perturbation.apply_scalars(checked_params(params), key, scalars)


def _checked_estimator(estimator: Any) -> WeightPerturbation:
    if not isinstance(estimator, WeightPerturbation):
        raise InputError(
            "estimator must be a WeightPerturbation, whose estimates are scalars times tangents, "
            f"got {estimator!r}"
        )
    return estimator
