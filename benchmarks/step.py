"""What a training step costs: FG-W against backpropagation, in one process, interleaved.

    python benchmarks/step.py --out results/benchmarks/step.json
    python benchmarks/step.py --torch --only MLP # with PyTorch beside it: pip install '.[bench]'

Every step is loss, gradient and SGD update in one compiled program that updates the parameters in
place. Times are medians of interleaved runs; read the ratios. "BP, checkpointed" computes segments
of layers, or blocks of the transformer, again instead of keeping their activations. PyTorch's
threads slow JAX down in the same process, which is why it is no part of the first command.
"""

import dataclasses
import functools
from collections.abc import Callable

import tyro

import forwardgrad as fg
import measure
from forwardgrad.experiments import Step
from models import PROBLEMS

METHODS = {
    "forward only": None,
    "BP": fg.Backpropagation(),
    "FG-W": fg.WeightPerturbation(),
    "FG-W, 4 tangents": fg.WeightPerturbation(tangents=4),
    "FG-W, dense": fg.WeightPerturbation(structure="dense"),
}


@dataclasses.dataclass(frozen=True)
class Options(measure.Options):
    """Settings of the benchmark."""

    torch: bool = False
    """Also measure PyTorch's torch.func.jvp and .backward() on the scaling MLPs."""


def steps_of(name: str, options: Options) -> dict[str, Callable[[], None]]:
    """The step of each method on one model."""
    loss, params, batch, checkpointed = PROBLEMS[name]()
    steps = {method: Step(loss, params, e, batch) for method, e in METHODS.items()}
    if checkpointed is not None:
        steps["BP, checkpointed"] = Step(checkpointed, params, METHODS["BP"], batch)
    if options.torch and name.startswith("MLP"):
        from torch_steps import torch_steps

        steps |= torch_steps(params, batch)
    return steps


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    cases = {name: functools.partial(steps_of, name, options) for name in PROBLEMS}
    measure.run("step", cases, options)
