"""A run made ready: data, network, objective, estimator and optimiser put together."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from forwardgrad._errors import InputError
from forwardgrad._losses import Losses
from forwardgrad.data import Dataset, load
from forwardgrad.networks import AbstractNetwork, build
from forwardgrad.training._algorithms import algorithm
from forwardgrad.training._config import MOST, TrainConfig
from forwardgrad.training._evaluate import make_error
from forwardgrad.training._feeds import make_feeds
from forwardgrad.training._inputs import make_inputs
from forwardgrad.training._optimisers import optimiser, schedule
from forwardgrad.training._state import initial_state, make_advance, slow_in_loops

TRAIN_ERROR_EXAMPLES = 10_000
"""How many examples of the training set its error is measured on at the end of a run."""


class Run:
    """What a training loop needs, made from resolved settings.

    Every random number derives from the seed: the weights from one key, the order of an epoch
    from a second and the epoch's number, the tangents of a step from a third and its number, and
    its images' augmentation from a fourth.
    """

    def __init__(self, config: TrainConfig):
        seed = jax.random.key(config.seed)
        weights_key, order_key, step_key = jax.random.split(seed, 3)
        self.data = load(config.dataset, config.data_dir, label_column=config.label_column)
        row = algorithm(config.algorithm)
        network = build_network(config, self.data, weights_key)
        params, self._static = eqx.partition(network, eqx.is_inexact_array)
        self.estimator = row.estimator(config)
        self.objective, self.inputs = row.objective(config), make_inputs(config, self.data)

        self.feeds = make_feeds(self.data.train, config.batch_size, order_key, config.seed)
        self.steps_per_epoch = len(self.data.train) // config.batch_size
        self.examples_per_step = config.batch_size * self.inputs.views
        self.keys = (jax.random.fold_in(seed, 0), step_key)
        self.steps = config.iterations or config.epochs * self.steps_per_epoch
        if self.steps > MOST:
            raise InputError(
                f"epochs (={config.epochs}) must make at most {MOST} steps, got {self.steps}"
            )
        self.learning_rate = schedule(config, self.steps)
        transformation = optimiser(config, self.steps)
        self.state = initial_state(params, transformation, self.steps_per_epoch)
        self.advance = make_advance(
            self.loss,
            self.inputs,
            self.estimator,
            transformation,
            self.keys,
            parts=config.accumulate,
            compiled_loop=not slow_in_loops(self._on_batch, params, step_key),
        )
        self.test_error = make_error(self.predict, self.data.test)
        self.train_error = make_error(self.predict, self.data.train, TRAIN_ERROR_EXAMPLES)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))

    def network(self, params: PyTree) -> AbstractNetwork:
        """The network with these parameters."""
        return eqx.combine(params, self._static)

    def loss(self, params: PyTree, x: Array, labels: Array) -> tuple[Losses, dict[str, Array]]:
        """What is learned, of images as a network gets them."""
        return self.objective(self.network(params), x, labels)

    def predict(self, params: PyTree, images: Array) -> Array:
        """The logits of images as they are stored."""
        return self.network(params)(self.inputs.plain(images))

    def _on_batch(self, params: PyTree, key: Array) -> tuple[Losses, dict[str, Array]]:
        """The loss of a batch of two black images."""
        images = jnp.zeros((2, *self.data.image_shape), jnp.uint8)
        return self.loss(params, *self.inputs.training(images, jnp.zeros(2, jnp.int32), key))


def build_network(config: TrainConfig, data: Dataset, key: Array) -> AbstractNetwork:
    """The network of the settings, for the images and classes of a data set."""
    objective = algorithm(config.algorithm).objective(config)
    return build(
        config.network,
        image_shape=data.image_shape,
        classes=len(data.classes),
        key=key,
        width=config.width,
        depth=config.depth,
        heads=objective.needs_heads,
        projection=None if objective.task.uses_labels else config.projection,
    )
