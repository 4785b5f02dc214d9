"""A run made ready: data, network, objective, estimator and optimiser put together."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from forwardgrad.data import Dataset, load
from forwardgrad.networks import build
from forwardgrad.training._algorithms import algorithm
from forwardgrad.training._config import TrainConfig
from forwardgrad.training._evaluate import make_error
from forwardgrad.training._feeds import make_feeds
from forwardgrad.training._optimisers import optimiser, schedule
from forwardgrad.training._state import initial_state, make_advance, slow_in_loops

TRAIN_ERROR_EXAMPLES = 10_000
"""How many examples of the training set its error is measured on at the end of a run."""


class Run:
    """What a training loop needs, made from resolved settings.

    Every random number derives from the seed: the weights from one key, the order of an epoch
    from a second and the epoch's number, the tangents of a step from a third and its number.
    """

    def __init__(self, config: TrainConfig):
        weights_key, order_key, step_key = jax.random.split(jax.random.key(config.seed), 3)
        data = load(config.dataset, config.data_dir)
        row = algorithm(config.algorithm)
        network = build_network(config, data, weights_key)
        params, static = eqx.partition(network, eqx.is_inexact_array)
        loss = _loss(row.objective, static, data, config.normalise)
        estimator = row.estimator(config)

        self.loss, self.estimator = loss, estimator
        self.feeds = make_feeds(data.train, config.batch_size, order_key, config.seed)
        self.steps_per_epoch = len(data.train) // config.batch_size
        self.steps = config.iterations or config.epochs * self.steps_per_epoch
        self.learning_rate = schedule(config, self.steps)
        transformation = optimiser(config, self.steps)
        self.state = initial_state(params, transformation, self.steps_per_epoch)
        example = jnp.zeros((1, *data.image_shape), jnp.uint8), jnp.zeros(1, jnp.int32)
        self.advance = make_advance(
            loss,
            estimator,
            transformation,
            step_key,
            compiled_loop=not slow_in_loops(loss, params, *example),
        )
        self.test_error = make_error(loss, data.test)
        self.train_error = make_error(loss, data.train, TRAIN_ERROR_EXAMPLES)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self._static = static

    def network(self, params: PyTree) -> eqx.Module:
        """The network with these parameters."""
        return eqx.combine(params, self._static)


def build_network(config: TrainConfig, data: Dataset, key: Array) -> eqx.Module:
    """The network of the settings, for the images and classes of a data set."""
    return build(
        config.network,
        image_shape=data.image_shape,
        classes=len(data.classes),
        key=key,
        width=config.width,
        depth=config.depth,
        heads=algorithm(config.algorithm).objective.needs_heads,
    )


def _loss(objective: Any, static: PyTree, data: Dataset, normalise: bool):
    shift, scale = (data.mean, data.std) if normalise else (0.0, 1.0)

    def loss(params: PyTree, images: Array, labels: Array):
        x = (images.astype(jnp.float32) / 255 - shift) / scale
        return objective(eqx.combine(params, static), x, labels)

    return loss
