"""How fast images are read and decoded, against what a training step takes in.

    python benchmarks/input.py --data-dir data --out results/benchmarks/input.json

Every case has a process of its own. "images/s" is the rate of shuffled batches of 64 with nothing
else to do, the median of timings of a second each; "peak MiB" the most memory that was resident
until then, the libraries' included. "step" is the rate of LG-FG-A on m/8/16 with 64 images of
64 x 64 a step, measured afterwards, "ratio" how many times as many images come as it takes, and
"with step" the peak of the memory after that.
The images of mixed sizes are parts of two photographs, as JPEG, of the sizes that ImageNet's have.
"""

import concurrent.futures
import dataclasses
import functools
import io
import itertools
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import datasets
import equinox as eqx
import jax
import numpy as np
import PIL.Image
import sklearn.datasets
import tyro
from rich.table import Table

import measure
from forwardgrad.data import StreamedSplit, load
from forwardgrad.experiments import Step, interleave
from forwardgrad.networks import build
from forwardgrad.training import configure

BATCH = 64
STEP_SHAPE = (64, 64, 3)
SECONDS = 1.0
STEPS = 5


class Case(NamedTuple):
    """A data set, none for that of mixed sizes, and how it is loaded."""

    dataset: str | None
    options: dict[str, Any]


CASES = {
    "Tiny ImageNet, parquet in place": Case("tiny-imagenet", {"stream": True}),
    "Tiny ImageNet, copy in the cache": Case("tiny-imagenet", {"resident_limit": 0}),
    "CIFAR-10 (JPEG), parquet in place": Case("cifar10", {"stream": True}),
    "mixed sizes to 64 x 64": Case(None, {"stream": True, "image_size": 64}),
    "mixed sizes to 224 x 224": Case(None, {"stream": True, "image_size": 224}),
}


@dataclasses.dataclass(frozen=True)
class Options(measure.Options):
    """Settings of the benchmark."""

    data_dir: Path | None = None
    """Folder with tiny-imagenet and cifar10. Default: $FORWARDGRAD_DATA, or the hub is asked."""


def measured(case: Case, data_dir: Path | None, repeats: int) -> dict[str, float]:
    """The rates of one case, in images a second, and its memory, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        if case.dataset is None:
            write_mixed(Path(folder))
            split = load(folder, **case.options).train
        else:
            split = load(case.dataset, data_dir, **case.options).train
        rates = rates_of(split, repeats)
    peak = peak_bytes()
    seconds = interleave({"": step()}, min(repeats, STEPS))[""]
    rate = BATCH / median(seconds)
    return {
        "images": len(split),
        "median": median(rates),
        "minimum": min(rates),
        "maximum": max(rates),
        "peak_bytes": peak,
        "peak_bytes_with_step": peak_bytes(),
        "step": rate,
        "ratio": median(rates) / rate,
    }


def peak_bytes() -> int:
    """The most memory that this process has had resident (Linux counts in KiB)."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def rates_of(split: StreamedSplit, repeats: int) -> list[float]:
    """Images a second, measured again and again over epochs one after another."""
    epochs = (split.batches(BATCH, seed=0, epoch=epoch) for epoch in itertools.count())
    batches = itertools.chain.from_iterable(epochs)
    next(batches)
    rates = []
    for _ in range(repeats):
        images, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < SECONDS:
            images += len(next(batches)[1])
        rates.append(images / passed)
    return rates


def write_mixed(folder: Path) -> None:
    """A data set of JPEGs of many sizes."""
    datasets.disable_progress_bars()
    rng = np.random.default_rng(0)
    photographs = sklearn.datasets.load_sample_images().images
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["temple", "flower"])}
    )
    for split, count in (("train", 512), ("test", 16)):
        rows = {"image": [], "label": []}
        for i in range(count):
            height, width = rng.integers(300, 427), rng.integers(300, 640)
            top, left = rng.integers(427 - height), rng.integers(640 - width)
            part = photographs[i % 2][top : top + height, left : left + width]
            PIL.Image.fromarray(part).save(content := io.BytesIO(), "JPEG", quality=90)
            rows["image"].append({"bytes": content.getvalue(), "path": None})
            rows["label"].append(i % 2)
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(folder / f"{split}.parquet", batch_size=100)


def step() -> Step:
    """LG-FG-A on m/8/16, with one tangent."""
    config = configure(network="m/8/16", algorithm="lg-fg-a")
    network = build(
        config.network,
        image_shape=STEP_SHAPE,
        classes=200,
        key=jax.random.key(0),
        heads=config.objective.needs_heads,
    )
    params, static = eqx.partition(network, eqx.is_inexact_array)
    images = jax.random.normal(jax.random.key(1), (BATCH, *STEP_SHAPE))
    labels = jax.random.randint(jax.random.key(2), (BATCH,), 0, 200)

    def loss(params, images, labels):
        return config.objective(eqx.combine(params, static), images, labels)[0]

    return Step(loss, params, config.estimator, (images, labels))


def apart(call: functools.partial, repeats: int) -> dict[str, float]:
    """What a function returns in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        return process.submit(call, repeats=repeats).result()


def table_of(name: str, row: Mapping[str, float]) -> Table:
    """The results of one case."""
    result = Table(title=name)
    for column in ("images/s", "peak MiB", "with step", "step, images/s", "ratio"):
        result.add_column(column, justify="right")
    result.add_row(
        f"{row['median']:,.0f}",
        f"{row['peak_bytes'] / 2**20:,.0f}",
        f"{row['peak_bytes_with_step'] / 2**20:,.0f}",
        f"{row['step']:.0f}",
        f"{row['ratio']:.0f}",
    )
    return result


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    calls = {
        name: functools.partial(functools.partial, measured, case, options.data_dir)
        for name, case in CASES.items()
    }
    measure.run("input", calls, options, apart, table_of, batch=BATCH)
