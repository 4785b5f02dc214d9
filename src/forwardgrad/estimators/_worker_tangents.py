"""Data parallel training with a tangent for each worker, and scalars on the wire."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from forwardgrad._errors import InputError
from forwardgrad.estimators._base import AbstractEstimator, Objective
from forwardgrad.estimators._scalars import words_of
from forwardgrad.estimators._weight_perturbation import WeightPerturbation
from forwardgrad.rewrite import gathered, varying_like


class WorkerTangents(AbstractEstimator):
    r"""Weight perturbation with a tangent for each worker of a `shard_map`.

    The W workers along an axis have the same parameters, and each has a share of the data. Each
    worker measures its own losses $f_w$ along its own tangents. It sends only the directional
    derivatives to the others, and every worker applies all of them:

    $$\hat g = \sum_{w=1}^W d_w v_w, \qquad d_w = \nabla f_w(\theta) \cdot v_w,
    \qquad E[\hat g] = \sum_w \nabla f_w.$$

    So there are W tangents for the price of one. Compare [`forwardgrad.WeightPerturbation`][] with
    one key for all workers, which sums the derivatives along one tangent,
    $\hat g = (\sum_w \nabla f_w \cdot v)\, v$. If the $\nabla f_w$ are equal, the variance here
    is a W-th of that. In both cases a message has K derivatives for each part of the parameters,
    and with `mask_rows` also a byte for each row of a table.

    The value is the worker's own; `jax.lax.pmean` gives the mean over workers. The gradient is that
    of the losses of all workers, and the same everywhere.

    **Arguments:**

    - `estimator`: a [`forwardgrad.WeightPerturbation`][] without `exact_last`.
    - `axis_name`: the axis that the workers are along. The key is to be the same for all of them.

    **Raises:**

    `InputError` if the estimator is another one; when called, if there is no such axis, or `fun`
    exchanges anything along it.

    >>> import forwardgrad as fg, jax, jax.numpy as jnp
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> estimator = fg.WorkerTangents(fg.WeightPerturbation(), "data")
    >>> def step(w, x, key):
    ...     loss = lambda w: jnp.mean((x @ w - 1) ** 2)
    ...     value, grads = fg.value_and_grad(loss, estimator)(w, key=key)
    ...     return w - 0.01 * grads, jax.lax.pmean(value, "data")
    >>> workers = jax.shard_map(
    ...     step, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=(P(), P())
    ... )
    >>> w, value = jax.jit(workers)(jnp.ones(3), jnp.ones((8, 3)), jax.random.key(0))
    >>> print(value)
    4.0
    """

    estimator: WeightPerturbation
    axis_name: str

    def __check_init__(self):
        if not isinstance(self.estimator, WeightPerturbation) or self.estimator.exact_last:
            raise InputError(
                f"estimator must be a WeightPerturbation without exact_last, got {self.estimator!r}"
            )

    @property
    def needs_key(self) -> bool:
        """True."""
        return True

    def value_and_grad(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        """The value of this worker's objective, and a forward gradient of that of all workers."""
        assert key is not None
        try:
            workers = jnp.arange(jax.lax.axis_size(self.axis_name))
        except NameError as error:
            raise InputError(
                f"axis_name must be an axis that a jax.shard_map around is over, got "
                f"{self.axis_name!r}"
            ) from error
        own = jax.random.fold_in(key, jax.lax.axis_index(self.axis_name))
        # Each has a copy to perturb; what is one for all would have its changes added up.
        copies = jax.tree.map(lambda leaf: varying_like(leaf, own), params)
        scalars, aux = self.estimator.directional_derivatives(fun, copies, own)
        if any(self.axis_name in drawn.axes for drawn in scalars.drawn):
            raise InputError(
                f"fun must not exchange anything along {self.axis_name!r}, where each worker is to "
                "have tangents of its own; use WeightPerturbation() there, with one key for all"
            )
        keys = jax.vmap(lambda worker: jax.random.fold_in(key, worker))(workers)
        sent, tree = jax.tree.flatten((scalars.derivatives, scalars.rows))
        derivatives, rows = tree.unflatten(gathered(sent, self.axis_name))
        value = jnp.broadcast_to(scalars.value, workers.shape)
        words = jax.vmap(words_of)(keys)
        everyones = dataclasses.replace(
            scalars, value=value, derivatives=derivatives, rows=rows, key=words
        )
        return (scalars.value, aux), self.estimator.apply_scalars(params, keys, everyones)
