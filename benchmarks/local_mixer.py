"""What a step of every algorithm costs on LocalMixer, m/8/16 on 128 images of CIFAR-10's shape.

    python benchmarks/local_mixer.py --out results/benchmarks/local_mixer.json

As `benchmarks/step.py`: loss, gradient and SGD update in one compiled program, medians of
interleaved runs. The second and third network have more blocks, to show what grows with them; the
fourth is the first with contrastive losses, where the batch is 64 images in two views. "of the
rate" is the step's flops, as XLA counts them, divided by its time, over those of a product of
two matrices of 4096 x 4096: how near the step comes to what the machine can do.
"""

import functools

import equinox as eqx
import jax
import tyro

from forwardgrad.experiments import Step
from forwardgrad.networks import LocalMixer, Size
from forwardgrad.training import ALGORITHMS
from forwardgrad.training._config import fitting
from measure import Options, run

GROWING = ("bp", "lg-bp", "lg-fg-w", "lg-fg-a")
CASES: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "m/8/16, 4 blocks": (4, "supervised", ALGORITHMS),
    "m/8/16, 8 blocks": (8, "supervised", GROWING),
    "m/8/16, 16 blocks": (16, "supervised", GROWING),
    "m/8/16, contrastive": (4, "contrastive", ALGORITHMS),
}
"""Blocks, task, and what to measure."""


def steps_of(blocks: int, task: str, algorithms: tuple[str, ...]) -> dict[str, Step]:
    """The forward pass and the step of each algorithm, with one tangent where there are any."""
    size = Size(units=512, patches=8, groups=16, blocks=blocks)
    projection = 128 if task == "contrastive" else None
    network = LocalMixer((32, 32, 3), size, 10, key=jax.random.key(0), projection=projection)
    params, static = eqx.partition(network, eqx.is_inexact_array)
    images = jax.random.normal(jax.random.key(1), (128, 32, 32, 3))
    labels = jax.random.randint(jax.random.key(2), (128,), 0, 10)

    def step(name: str, forward_only: bool = False) -> Step:
        config = fitting(task=task, algorithm=name, tangents=1)
        objective, estimator = config.objective, config.estimator

        def loss(params, images, labels):
            losses, _ = objective(eqx.combine(params, static), images, labels)
            return losses.total() if forward_only else losses

        return Step(loss, params, None if forward_only else estimator, (images, labels))

    steps = {name.upper(): step(name) for name in algorithms}
    return {"forward only": step("bp", forward_only=True), **steps}


if __name__ == "__main__":
    names = {name: functools.partial(steps_of, *case) for name, case in CASES.items()}
    run("local_mixer", names, tyro.cli(Options, description=__doc__))
