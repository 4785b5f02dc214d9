"""Optax optimisers and schedules from the settings."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from forwardgrad.training._config import TrainConfig

SCALE = 256
"""The batch size that a learning rate is for, where it is scaled with the batch."""


def schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step, over a run of `steps`."""
    rate = config.learning_rate
    assert rate is not None
    if config.scale_learning_rate:
        rate = rate * config.batch_size / SCALE
    after = max(1, steps - config.warmup)
    shape = {
        "constant": optax.constant_schedule(rate),
        "cosine": optax.cosine_decay_schedule(rate, after),
        "linear": optax.linear_schedule(rate, 0.0, after),
        # Baydin et al. 2022, Section 5: eta_i = eta_0 exp(-i k).
        "exponential": lambda i: rate * jnp.exp(-config.decay * i),
    }[config.schedule]
    if not config.warmup:
        return shape
    ramp = optax.linear_schedule(0.0, rate, config.warmup)
    return optax.join_schedules([ramp, shape], [config.warmup])


def optimiser(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser with its schedule; `adamw` and `lion` decouple the weight decay.

    `lars` scales each weight matrix's update to its norm (You, Gitman & Ginsburg 2017,
    [arXiv:1708.03888](https://arxiv.org/abs/1708.03888)).
    """
    rate, decay, momentum = schedule(config, steps), config.weight_decay, config.momentum
    if config.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=decay)
    if config.optimizer == "lion":
        return optax.lion(rate, weight_decay=decay)
    if config.optimizer == "lars":
        # Biases are neither decayed nor scaled, as is usual for it.
        return optax.lars(
            rate,
            weight_decay=decay,
            weight_decay_mask=_matrices,
            trust_ratio_mask=_matrices,
            momentum=momentum or 0.0,
        )
    coupled = {
        "sgd": optax.sgd(rate, momentum=momentum or None),
        "adam": optax.adam(rate),
        "rmsprop": optax.rmsprop(rate, momentum=momentum or None),
    }[config.optimizer]
    return optax.chain(optax.add_decayed_weights(decay), coupled) if decay else coupled


def _matrices(params: PyTree) -> PyTree:
    """Which parameters are weight matrices."""
    return jax.tree.map(lambda p: p.ndim > 1, params)
