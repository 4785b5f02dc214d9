"""The front door for estimators that remember something."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array, Key, PyTree

from forwardgrad._errors import InputError, with_article
from forwardgrad._request import Request
from forwardgrad.estimators import AbstractEstimator, AbstractStatefulEstimator


class Estimation(NamedTuple):
    """What [`forwardgrad.estimation`][] returns, and [`forwardgrad.online`][].

    **Arguments:**

    - `init`: `(params, *args, **kwargs) -> state`; of `online`, `(params, carry, *, key) -> state`.
    - `step`: `(params, *args, key=None, state, **kwargs) -> (value, grads, state)`, the value a
        pair `(value, aux)` with `has_aux`.
    """

    init: Callable[..., PyTree]
    step: Callable[..., tuple[Any, PyTree[Array], PyTree]]


def estimation(
    fun: Callable[..., Any],
    estimator: AbstractEstimator,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Estimation:
    """[`forwardgrad.value_and_grad`][] with a state: what the estimator remembers between steps.

    For example, [`forwardgrad.FeedbackAlignment`][] and [`forwardgrad.DirectFeedbackAlignment`][]
    keep their feedback weights in the state. `init` draws them once. The steps then give the same
    gradients as `value_and_grad`, which draws them in every step. An estimator that remembers
    nothing has the state `()`. Both functions work under `jax.jit`, and `step` works in
    `jax.lax.scan` with the state in the carry.

    **Arguments:**

    - `fun`, `estimator`, `argnums`, `has_aux`: as for [`forwardgrad.value_and_grad`][].

    **Returns:**

    [`forwardgrad.Estimation`][], a pair `(init, step)`:

    - `state = init(params, *args, **kwargs)`, with the arguments of the first step;
    - `value, grads, state = step(params, *args, key=key, state=state, **kwargs)`, or
        `(value, aux), grads, state` with `has_aux`.

    **Raises:**

    `InputError` as for [`forwardgrad.value_and_grad`][]; when called, also if `state` was made for
    another estimator or function.

    >>> import forwardgrad as fg, jax, jax.numpy as jnp
    >>> def loss(params, x):
    ...     return jnp.mean((jnp.tanh(x @ params["first"]) @ params["last"] - x[:, :1]) ** 2)
    >>> x = jax.random.normal(jax.random.key(0), (16, 3))
    >>> first = jax.random.normal(jax.random.key(1), (3, 8))
    >>> params = {"first": first, "last": jnp.zeros((8, 1))}
    >>> init, step = fg.estimation(loss, fg.FeedbackAlignment())
    >>> step = jax.jit(step)
    >>> state = init(params, x)
    >>> for _ in range(200):
    ...     value, grads, state = step(params, x, state=state)
    ...     params = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
    >>> bool(value < 0.1)
    True
    """
    request = Request(fun, estimator, argnums, has_aux)

    def init(*args, **kwargs):
        if not isinstance(estimator, AbstractStatefulEstimator):
            return ()
        return estimator.init(*request.objective(args, kwargs))

    def step(*args, state: PyTree, key: Key[Array, ""] | None = None, **kwargs):
        objective, params = request.objective(args, kwargs)
        params = request.placed(params, key)
        if isinstance(estimator, AbstractStatefulEstimator):
            (value, aux), grads, state = estimator.estimate(objective, params, key, state)
        elif isinstance(state, tuple) and not state:
            (value, aux), grads = estimator.value_and_grad(objective, params, key)
        else:
            raise InputError(
                f"state must be (), because {type(estimator).__name__} remembers nothing, got "
                f"{with_article(type(state).__name__)}"
            )
        return request.result(value, aux), grads, state

    return Estimation(init, step)
