"""Four blocks on four devices, which train side by side.

    python examples/side_by_side.py

Each block has a loss of its own, and no gradient passes between blocks. So each device updates its
block as soon as it has computed the block's output, hands the output to the next device, and takes
the next micro-batch. Here the devices are simulated on this machine's cores, and the blocks are
trained by activity perturbation, without backpropagation. The same is then done on one device, and
the weights are equal to the bit.
"""

import dataclasses
import hashlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from sklearn.datasets import load_digits

import forwardgrad as fg


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of the example."""

    steps: int = 600
    """Micro-batches, of 64 digits."""
    stages: int = 4
    """Devices, up to the number of blocks."""
    blocks: int = 4
    """Blocks, each a layer with a head."""
    width: int = 128
    """Units of a block."""


class Dense(eqx.Module):
    """A layer of a whole batch."""

    linear: eqx.nn.Linear

    def __call__(self, x):
        """The layer's outputs [batch, units]."""
        return jax.vmap(self.linear)(x)


class Block(Dense):
    """A layer, normalised, and a ReLU."""

    def __call__(self, x):
        """The block's outputs [batch, units]."""
        return jax.nn.relu(jax.nn.standardize(super().__call__(x)))


def loss(logits, labels):
    """Cross-entropies that add up to the batch's mean."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels) / len(labels)


def stages_of(options: Options) -> tuple[list, list]:
    """The stages, and the weights that they begin with."""
    keys = jax.random.split(jax.random.key(0), 2 * options.blocks)
    inputs = [64, *[options.width] * (options.blocks - 1)]
    blocks = [
        Block(eqx.nn.Linear(n, options.width, key=key))
        for n, key in zip(inputs, keys, strict=False)
    ]
    heads = [Dense(eqx.nn.Linear(options.width, 10, key=key)) for key in keys[options.blocks :]]
    return fg.greedy_stages(blocks, heads, loss, options.stages)


def train(options: Options, devices: list) -> tuple[float, str]:
    """Train on these devices; returns the test error in per cent, and a digest of the weights."""
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    batches = np.random.default_rng(0).integers(0, 1500, (options.steps, 64))
    stages, params = stages_of(options)
    estimator, optimiser = fg.ActivityPerturbation(tangents=4), optax.sgd(0.01, momentum=0.9)
    pipeline = fg.BlockPipeline(stages, estimator, optimiser, devices)
    state = pipeline.init(params, images[batches[0]], labels[batches[0]])
    for i, rows in enumerate(batches):
        # Returns at once; all devices are busy as long as nothing is read.
        _, _, state = pipeline.step(state, images[rows], labels[rows], key=jax.random.key(i))
    params = jax.device_get(state.params)
    x = jnp.asarray(images[1500:])
    for blocks, heads in params:
        for block, head in zip(blocks, heads, strict=True):
            x = block(x)
            logits = head(x)
    error = 100 * float(np.mean(np.argmax(logits, axis=1) != labels[1500:]))
    return error, hashlib.sha256(b"".join(a.tobytes() for a in jax.tree.leaves(params))).hexdigest()


def main(options: Options) -> None:
    """Train in a pipeline, and on one device."""
    jax.config.update("jax_num_cpu_devices", options.stages)
    devices = jax.devices("cpu")[: options.stages]
    for name, chosen in (("pipeline", devices), ("one device", devices[:1] * options.stages)):
        error, digest = train(options, chosen)
        print(f"{name}: test error {error:.1f} %, weights {digest[:16]}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
