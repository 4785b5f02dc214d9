"""Optax optimisers and schedules from the settings."""

import jax.numpy as jnp
import optax

from forwardgrad.training._config import TrainConfig


def schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step, over a run of `steps`."""
    rate = config.learning_rate
    assert rate is not None
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
    """The optimiser with its schedule; `adamw` and `lion` decouple the weight decay."""
    rate, decay, momentum = schedule(config, steps), config.weight_decay, config.momentum
    if config.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=decay)
    if config.optimizer == "lion":
        return optax.lion(rate, weight_decay=decay)
    coupled = {
        "sgd": optax.sgd(rate, momentum=momentum or None),
        "adam": optax.adam(rate),
        "rmsprop": optax.rmsprop(rate, momentum=momentum or None),
    }[config.optimizer]
    return optax.chain(optax.add_decayed_weights(decay), coupled) if decay else coupled
