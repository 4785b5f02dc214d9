"""`forwardgrad train`."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Sequence

import equinox as eqx
import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from forwardgrad._console import Console
from forwardgrad.cli._cluster import Cluster
from forwardgrad.cli._surroundings import parse
from forwardgrad.training import Run, TrainConfig, fit
from forwardgrad.training._config import (
    TextSettings,
    check_names,
    known,
    own_and_parts,
    preset,
)
from forwardgrad.training._devices import LostError, leave
from forwardgrad.training._folder import SAMPLE

PROG = "forwardgrad train"

DESCRIPTION = """Train a network, by default without backpropagation.

examples:
  forwardgrad train
      forward gradients on scikit-learn's digits, a minute on two cores
  forwardgrad train --dataset mnist --data-dir data --network cnn --algorithm bp --epochs 10
      backpropagation on data/mnist/{train,test}.parquet
  forwardgrad train --dataset text --network gpt/2/128 --algorithm lg-fg-a
      a transformer on the language reference of this Python
  forwardgrad train --dataset mnist --tangents 16 --epochs 100 --out runs/long --resume
      start runs/long, or continue it after an interruption
  forwardgrad train --batch-size 512 --coordinator host:1234 --processes 2 --process-id 0
      process 0 of two, on the machine "host"; all devices of both share each batch
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command takes: settings of the run, and who computes it."""

    config: TrainConfig
    """What is trained, on what and how."""
    cluster: Cluster
    """Where. The result is the same to rounding, so that --resume may change this."""


def train(arguments: Sequence[str]) -> int:
    """Train with the options given, and say what came of it."""
    options = read_options(arguments)
    devices = options.cluster.join()
    console = Console(quiet=not devices.leads)
    try:
        run = fit(options.config, console=console, devices=devices)
    except LostError as error:
        leave(error)
    else:
        console.facts("forwardgrad train", facts(run))
        sample = run.folder / SAMPLE
        if devices.leads and sample.is_file():
            text = sample.read_bytes().decode(errors="replace")
            console.print(f"a sample:\n\n{text}", markup=False, highlight=False, soft_wrap=True)
    return 0


def read_options(arguments: Sequence[str]) -> Options:
    """What the options are for.

    The first reading is for those that the others, and their defaults, depend on.
    """
    chosen, _ = tyro.cli(
        preset, prog=PROG, args=arguments, add_help=False, return_unknown_args=True
    )
    names = [re.sub("^--(no-)?", "", word.split("=")[0]).replace("-", "_") for word in arguments]
    check_names((name for name in names if name in known()), chosen)
    with OPTIONS:
        return parse(
            Options,
            PROG,
            arguments,
            computes=False,  # not before all processes have found each other
            description=DESCRIPTION,
            default=Options(config=chosen, cluster=Cluster()),
            config=(tyro.conf.OmitArgPrefixes,),
        )


OPTIONS = ConstructorRegistry()


@OPTIONS.struct_rule
def _module(info: StructTypeInfo) -> StructConstructorSpec | None:
    """The options of an objective, or of an estimator, with what its docstring says of them."""
    if not isinstance(module := info.default, eqx.Module):
        return None
    plain, parts = own_and_parts(module)
    outer = {field.name for field in dataclasses.fields(TrainConfig)}
    kinds = typing.get_type_hints(type(module), include_extras=True)
    own = {k: v for k, v in plain.items() if k not in outer}
    fields = (
        *(StructFieldSpec(k, kinds[k], v, _said_of(k, module)) for k, v in own.items()),
        *(StructFieldSpec(k, type(part), part) for k, part in parts.items()),
    )
    return StructConstructorSpec(lambda **given: dataclasses.replace(module, **given), fields)


def _said_of(name: str, module: eqx.Module) -> str:
    """What the docstring's list of arguments has of one: its first sentence, without formulas."""
    text = inspect.getdoc(type(module)) or ""
    found = re.search(rf"- `{name}`: (.*?)\.(\s|$)", text, re.DOTALL)
    said = re.sub(r"`|,? \$[^$]*\$", "", " ".join(found[1].split())) if found else name
    return f"{said[:1].upper()}{said[1:]}."


def facts(run: Run) -> dict[str, str]:
    """What a run did, and where its files are."""
    summary = run.result
    return {
        "task": summary.task,
        "algorithm": summary.algorithm,
        "network": f"{summary.network}, {summary.parameters:,} parameters",
        "data set": summary.dataset,
        "trained for": f"{summary.epochs:g} epochs, {summary.steps} steps, "
        f"{summary.seconds:.0f} s on {summary.backend}",
        "training loss": f"{summary.train_loss:.4f}",
        "training error": f"{summary.train_error:.2f} %",
        "test error": f"{summary.test_error:.2f} %",
        **_of_text(run),
        "files": f"{run.folder}/: summary.json, metrics.jsonl, curves.png, config.json, "
        "checkpoints",
    }


def _of_text(run: Run) -> dict[str, str]:
    summary, settings = run.result, run.config.data
    if not isinstance(settings, TextSettings):
        return {}
    tokens = summary.steps * run.config.batch_size * settings.context
    loss, bits = summary.test_loss, summary.bits_per_character
    return {
        "test loss": "not finite" if loss is None else f"{loss:.4f} nats a token",
        "bits per character": "not finite" if bits is None else f"{bits:.3f}",
        "tokens": f"{tokens:,}, {tokens / max(summary.seconds, 1e-9):,.0f} a second",
    }
