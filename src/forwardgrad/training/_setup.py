"""A run made ready: data, network, objective, estimator and optimiser put together."""

import dataclasses
import functools
import hashlib
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from forwardgrad._errors import MOST, InputError
from forwardgrad._losses import Losses
from forwardgrad.data import Dataset, ResidentSplit, Text, load, load_text
from forwardgrad.data._dataset import held_out
from forwardgrad.data._text import holds_text
from forwardgrad.estimators import AbstractEstimator
from forwardgrad.networks import AbstractNetwork, build, continuation
from forwardgrad.training._batches import (
    BATCH,
    MOST_OUTPUTS,
    Feed,
    make_evaluation,
    make_feeds,
    make_inputs,
)
from forwardgrad.training._config import (
    DecoderSettings,
    ImageSettings,
    NetworkSettings,
    TextSettings,
    TrainConfig,
)
from forwardgrad.training._devices import ONE, Devices
from forwardgrad.training._precision import products_of, rounding
from forwardgrad.training._state import (
    Loss,
    TrainState,
    initial_state,
    make_advance,
    make_begin,
    slow_in_loops,
)

SCALE = 256
"""The batch size that a learning rate is for, where it is scaled with the batch."""


def schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step, over a run of `steps`."""
    settings = config.optimisation
    rate, warmup = settings.learning_rate, settings.warmup
    if settings.scale_learning_rate:
        rate = rate * config.batch_size / SCALE
    after = max(1, steps - warmup)
    shape = {
        "constant": optax.constant_schedule(rate),
        "cosine": optax.cosine_decay_schedule(rate, after),
        "linear": optax.linear_schedule(rate, 0.0, after),
        # Baydin et al. 2022, Section 5: eta_i = eta_0 exp(-i k).
        "exponential": lambda i: rate * jnp.exp(-settings.decay * i),
    }[settings.schedule]
    if not warmup:
        return shape
    ramp = optax.linear_schedule(0.0, rate, warmup)
    return optax.join_schedules([ramp, shape], [warmup])


def optimiser(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser with its schedule; `adamw` and `lion` decouple the weight decay.

    `lars` scales each weight matrix's update to its norm (You, Gitman & Ginsburg 2017,
    [arXiv:1708.03888](https://arxiv.org/abs/1708.03888)).
    """
    settings, rate = config.optimisation, schedule(config, steps)
    decay, momentum = settings.weight_decay, settings.momentum
    if settings.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=decay)
    if settings.optimizer == "lion":
        return optax.lion(rate, weight_decay=decay)
    if settings.optimizer == "lars":
        # Biases are neither decayed nor scaled, as is usual for it.
        return optax.lars(
            rate,
            weight_decay=decay,
            weight_decay_mask=_matrices,
            trust_ratio_mask=_matrices,
            momentum=momentum,
        )
    coupled = {
        "sgd": optax.sgd(rate, momentum=momentum or None),
        "adam": optax.adam(rate),
        "rmsprop": optax.rmsprop(rate, momentum=momentum or None),
    }[settings.optimizer]
    return optax.chain(optax.add_decayed_weights(decay), coupled) if decay else coupled


def _matrices(params: PyTree) -> PyTree:
    """Which parameters are weight matrices."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


SAMPLE_TOKENS = 300
"""How far a network of texts goes on in a sample."""

TRAIN_ERROR_EXAMPLES = 10_000
"""How many examples of the training set its error is measured on at the end of a run."""

TRAIN_ERROR_TOKENS = 100_000
"""The same for a text."""


class Setup:
    """What a training loop needs, made from settings.

    Every random number derives from the seed: the weights from one key, the order of an epoch
    from a second and the epoch's number, the tangents of a step from a third and its number, and
    its images' augmentation from a fourth. None depends on how many `devices` there are.
    """

    def __init__(self, config: TrainConfig, devices: Devices = ONE):
        self.devices = devices
        _check_divides(config, devices)
        self._rounded = rounding(config.precision)
        self.products = functools.partial(products_of, config.precision)
        self.products()  # refuses what this machine does not have
        seed = jax.random.key(config.seed)
        weights_key, order_key, step_key = jax.random.split(seed, 3)
        self.data = load_data(config)
        network = build_network(config, self.data, weights_key)
        params, self._static = eqx.partition(network, eqx.is_inexact_array)
        self.objective, self.estimator = config.objective, config.wrapped_estimator
        self.inputs = make_inputs(config, self.data)

        self.feeds = make_feeds(self.data.train, config.batch_size, order_key, config.seed, devices)
        self.steps_per_epoch = len(self.data.train) // config.batch_size
        self.predictions_per_step = config.batch_size * self.inputs.views
        self.tokens_per_step = None
        batch, limit = BATCH, TRAIN_ERROR_EXAMPLES
        if isinstance(self.data, Text):
            context = self.data.context
            self.tokens_per_step = self.predictions_per_step = config.batch_size * context
            batch = max(1, min(BATCH, MOST_OUTPUTS // (context * len(self.data.vocabulary))))
            limit = -(-TRAIN_ERROR_TOKENS // context)
        self.keys = (jax.random.fold_in(seed, 0), step_key)
        self.steps = config.iterations or config.epochs * self.steps_per_epoch
        if self.steps > MOST:
            raise InputError(
                f"epochs (={config.epochs}) must make at most {MOST} steps, got {self.steps}"
            )
        self.learning_rate = schedule(config, self.steps)
        transformation = optimiser(config, self.steps)
        split = {"parts": config.accumulate, "devices": devices}
        self.begin = make_begin(self.loss, self.inputs, self.estimator, self.keys, **split)
        state = initial_state(params, transformation, self.steps_per_epoch)
        self.state = devices.whole(self._with_room(state, config.batch_size))
        self.advance = make_advance(
            self.loss,
            self.inputs,
            self.estimator,
            transformation,
            self.keys,
            compiled_loop=not slow_in_loops(self._on_batch, params, step_key),
            **split,
        )
        self.on_test = make_evaluation(self.predict, self.data.test, batch=batch, devices=devices)
        self.on_train = make_evaluation(
            self.predict, self.data.train, limit, batch, devices=devices
        )
        self.on_validation = None
        if (validation := self.data.validation) is not None:
            self.on_validation = make_evaluation(
                self.predict, validation, batch=batch, devices=devices
            )
        self._sample_key = jax.random.fold_in(seed, 1)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))

    def network(self, params: PyTree) -> AbstractNetwork:
        """The network with these parameters."""
        return eqx.combine(params, self._static)

    def computing(self, params: PyTree) -> AbstractNetwork:
        """The network, as exact as it computes."""
        return self.network(self._rounded(params))

    def loss(self, params: PyTree, x: Array, labels: Array) -> tuple[Losses, dict[str, Array]]:
        """What is learned, of examples as a network gets them."""
        with self.products():
            return self.objective(self.computing(params), x, labels)

    def predict(self, params: PyTree, examples: Array) -> Array:
        """The logits of examples as they are stored."""
        with self.products():
            network = self.computing(params)
            return network(self.inputs.plain(examples)).astype(jnp.float32)

    def sample(self, params: PyTree) -> str:
        """The beginning of the test text, and how a network of texts goes on from there."""
        assert isinstance(self.data, Text)
        (prompt,), _ = self.data.test.take(np.zeros(1, int))
        # Of this process alone, where there are several.
        params = jax.tree.map(np.asarray, params)
        drawn = jax.jit(
            lambda params, prompt: continuation(
                self.computing(params), prompt, SAMPLE_TOKENS, self._sample_key
            )
        )(params, prompt)
        return self.data.vocabulary.decode(np.append(prompt, drawn))

    def _with_room(self, state: TrainState, batch_size: int) -> TrainState:
        """The state with zeros for what the estimator is to remember."""
        example = self.data.train.take(np.zeros(1, int))

        def remembered(state, *example):
            batch = [jnp.broadcast_to(a, (1, batch_size, *a.shape[1:])) for a in example]
            return self.begin(state, Feed(*batch), 0).estimator

        like = jax.eval_shape(remembered, state, *example)
        room = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
        return dataclasses.replace(state, estimator=room)

    def _on_batch(self, params: PyTree, key: Array) -> tuple[Losses, dict[str, Array]]:
        """The loss of a batch of two examples."""
        examples, labels = map(jnp.asarray, self.data.train.take(np.zeros(2, int)))
        return self.loss(params, *self.inputs.training(examples, labels, key))


def _check_divides(config: TrainConfig, devices: Devices) -> None:
    parts = config.batch_size // config.accumulate
    if parts % devices.count:
        of_part = "" if config.accumulate == 1 else f" / accumulate (={config.accumulate})"
        raise InputError(
            f"batch_size (={config.batch_size}){of_part} must be a multiple of the number of "
            f"devices, which is {devices.count}: choose another, or fewer devices with --devices"
        )


def load_data(config: TrainConfig) -> Dataset | Text:
    """The data set of the settings, of the kind that the network is for."""
    where, settings = (config.dataset, config.data_dir), config.data
    if isinstance(settings, TextSettings):
        return load_text(
            *where,
            text_column=settings.text_column,
            tokenizer=settings.tokenizer,
            context=settings.context,
            documents=settings.documents,
        )
    if holds_text(config.dataset):
        raise InputError(
            f"dataset {config.dataset!r} is text, and network {config.network!r} takes images; "
            "networks of text are called gpt/LAYERS/WIDTH"
        )
    assert isinstance(settings, ImageSettings)
    data = load(
        *where,
        label_column=settings.label_column,
        image_size=settings.image_size,
        stream=settings.stream,
    )
    return held_out(data, settings.hold_out) if settings.hold_out else data


def build_network(config: TrainConfig, data: Dataset | Text, key: Array) -> AbstractNetwork:
    """The network of the settings, for the images and classes of a data set, or for a text."""
    objective, sizes = config.objective, config.sizes
    named = functools.partial(build, config.network, key=key, heads=objective.needs_heads)
    if isinstance(data, Text):
        assert isinstance(sizes, DecoderSettings)
        classes, positions, tied = len(data.vocabulary), sizes.positions, sizes.tied
        return named(classes=classes, context=data.context, positions=positions, tied=tied)
    assert isinstance(sizes, NetworkSettings)
    return named(
        image_shape=data.image_shape,
        classes=len(data.classes),
        width=sizes.width,
        depth=sizes.depth,
        normalise_features=sizes.normalise_features,
        projection=None if objective.task.uses_labels else sizes.projection,
    )


class Problem(NamedTuple):
    """What a training step differentiates, and how.

    **Arguments:**

    - `loss`: `loss(params, *batch) -> (losses, aux)`, the run's objective.
    - `params`: the arrays among the network's fields.
    - `batch`: images [batch, height, width, channels] as the network gets them, augmented, in two
        views in contrastive learning; and labels. Or tokens [batch, context], and what follows.
    - `estimator`: what estimates the loss's gradient.
    """

    loss: Loss
    params: PyTree[Array]
    batch: tuple[Array, Array]
    estimator: AbstractEstimator


def problem(config: TrainConfig, network: eqx.Module | None = None) -> Problem:
    """The first step of the run that has these settings, before it is made.

    **Arguments:**

    - `config`: the settings.
    - `network`: one to take the place of the initial network, such as
        [`forwardgrad.training.load_run`][] returns.

    **Returns:**

    Objective, parameters, the first batch of the seed's order, and the estimator.

    **Raises:**

    `InputError` if a setting or a file cannot be used, or `network` does not fit the settings.

    >>> from forwardgrad.training import configure
    >>> step = problem(configure(network="logreg", algorithm="bp", batch_size=32))
    >>> losses, aux = step.loss(step.params, *step.batch)
    >>> losses.terms[0].shape
    (32,)
    """
    setup = Setup(config)
    feed, start, _ = next(setup.feeds(0, 0))
    params = setup.state.params
    if network is not None:
        params = _fitting(eqx.filter(network, eqx.is_inexact_array), params, config)
    key = jax.random.fold_in(setup.keys[0], 0)
    batch = setup.inputs.training(*feed.batch(start), key)
    return Problem(setup.loss, params, batch, setup.estimator)


def _fitting(params: PyTree, like: PyTree, config: TrainConfig) -> PyTree:
    def shapes(tree):
        return [leaf.shape for leaf in jax.tree.leaves(tree)], jax.tree.structure(tree)

    if shapes(params) != shapes(like):
        raise InputError(
            f"network does not have the parameters that network {config.network!r} has for "
            f"algorithm {config.algorithm!r}: heads of local losses, or other sizes"
        )
    return params


DIGEST_EXAMPLES = 256
"""How many examples of a streamed split stand for all."""


def digest(data: Dataset | Text) -> str:
    """A number of a data set's contents: all of a split in memory, a sample of one on disk."""
    if isinstance(data, Text):
        return data.digest
    found = hashlib.blake2b(digest_size=8)
    found.update(repr((data.image_shape, data.classes, data.mean.tolist())).encode())
    for split in filter(None, (data.train, data.test, data.validation)):
        found.update(str(len(split)).encode())
        if isinstance(split, ResidentSplit):
            images, labels = split.images, split.labels
        else:
            rows = np.linspace(0, len(split) - 1, DIGEST_EXAMPLES).astype(np.int64)
            images, labels = split.take(np.unique(rows))
        found.update(np.ascontiguousarray(images).data)
        found.update(np.ascontiguousarray(labels).data)
    return found.hexdigest()
