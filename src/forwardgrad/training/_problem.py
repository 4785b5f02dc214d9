"""A run's first gradient, as a function to be looked at."""

from typing import NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

from forwardgrad._errors import InputError
from forwardgrad.estimators import AbstractEstimator
from forwardgrad.training._algorithms import resolve
from forwardgrad.training._config import TrainConfig
from forwardgrad.training._run import Run
from forwardgrad.training._state import Loss


class Problem(NamedTuple):
    """What a training step differentiates, and how.

    **Arguments:**

    - `loss`: `loss(params, *batch) -> (losses, aux)`, the run's objective.
    - `params`: the arrays among the network's fields.
    - `batch`: images [batch, height, width, channels] as the network gets them, augmented, in two
        views in contrastive learning; and labels.
    - `estimator`: what estimates the loss's gradient.
    """

    loss: Loss
    params: PyTree[Array]
    batch: tuple[Array, Array]
    estimator: AbstractEstimator


def problem(config: TrainConfig, network: eqx.Module | None = None) -> Problem:
    """The first step of the run that has these settings, before it is made.

    **Arguments:**

    - `config`: the settings; the algorithm's defaults are filled in.
    - `network`: one to take the place of the initial network, such as
        [`forwardgrad.training.load_run`][] returns.

    **Returns:**

    Objective, parameters, the first batch of the seed's order, and the estimator.

    **Raises:**

    `InputError` if a setting or a file cannot be used, or `network` does not fit the settings.

    >>> step = problem(TrainConfig(network="logreg", algorithm="bp", batch_size=32))
    >>> losses, aux = step.loss(step.params, *step.batch)
    >>> losses.terms[0].shape
    (32,)
    """
    run = Run(resolve(config))
    feed, start, _ = next(run.feeds.epoch(0, 0))
    chosen = feed.order[start]
    params = run.state.params
    if network is not None:
        params = _fitting(eqx.filter(network, eqx.is_inexact_array), params, config)
    key = jax.random.fold_in(run.keys[0], 0)
    batch = run.inputs.training(feed.images[chosen], feed.labels[chosen], key)
    return Problem(run.loss, params, batch, run.estimator)


def _fitting(params: PyTree, like: PyTree, config: TrainConfig) -> PyTree:
    def shapes(tree):
        return [leaf.shape for leaf in jax.tree.leaves(tree)], jax.tree.structure(tree)

    if shapes(params) != shapes(like):
        raise InputError(
            f"network does not have the parameters that network {config.network!r} has for "
            f"algorithm {config.algorithm!r}: heads of local losses, or other sizes"
        )
    return params
