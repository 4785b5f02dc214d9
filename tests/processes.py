"""Runs on several devices and in several processes, for `test_processes.py`.

    python processes.py FOLDER                      eight devices of one process
    python processes.py FOLDER HOST:PORT COUNT ID   one of several processes

Each scenario is called in all processes, with a folder of its own.
"""

import contextlib
import functools
import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from forwardgrad import InputError, data
from forwardgrad.cli._cluster import Cluster
from forwardgrad.training import Devices, Interrupted, _loop, _setup, configure, fit, load_run
from forwardgrad.training import _devices as devices_module
from forwardgrad.training._setup import Setup

STEPS = int(os.environ.get("FORWARDGRAD_STEPS", "8"))
"""Of each run that is compared; the documentation's numbers are of 200."""

RUNS = {
    "bp": {"algorithm": "bp", "network": "mlp", "width": 16},
    "fg-w": {"algorithm": "fg-w", "network": "mlp", "width": 16, "tangents": 2},
    "fg-a": {"algorithm": "fg-a", "network": "m/1/16", "tangents": 1},
    "lg-fg-a": {"algorithm": "lg-fg-a", "network": "m/1/16", "tangents": 1},
    "balanced": {"algorithm": "lg-fg-a", "network": "m/1/16", "balance": "relative"},
    "fa": {"algorithm": "fa", "network": "mlp", "width": 16},
    "in parts": {"algorithm": "fg-w", "network": "mlp", "width": 16, "accumulate": 4},
    "contrastive": {"task": "contrastive", "algorithm": "fg-a", "network": "mlp", "width": 16},
    "cnn": {"algorithm": "bp", "network": "cnn", "width": 8},
}


def settings(out: Path, name: str, **others):
    common = {"iterations": STEPS, "log_every": 1, "batch_size": 64, "out": out, "resume": True}
    return configure(**{**common, **RUNS[name], **others})


def losses(run) -> np.ndarray:
    return np.array([line.loss for line in run.measurements if line.event == "steps"])


def same_run(run, alone) -> float:
    """The largest relative difference of the losses of two runs, which must be rounding."""
    assert run.result.steps == alone.result.steps
    np.testing.assert_allclose(losses(run), losses(alone), rtol=2e-4)
    for name in ("train_error", "test_error"):
        # One example of 360, which rounding may turn.
        assert abs(getattr(run.result, name) - getattr(alone.result, name)) < 0.3
    return float(np.max(np.abs(losses(run) / losses(alone) - 1)))


@contextlib.contextmanager
def fails(match: str):
    with pytest.raises(InputError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


# One process

COUNTS = (1, 2, 4, 8) if "FORWARDGRAD_STEPS" in os.environ else (1, 8)

MORE = 1.06
"""What a device has with more devices, at most: the exchange of gradients."""


def equals_one_device(folder: Path, devices: Devices) -> None:
    """Every kind of step, on eight devices and on one."""
    found = {}
    for name in RUNS:
        alone = fit(settings(folder / f"{name} alone", name))
        found[name] = same_run(fit(settings(folder / name, name), devices=devices), alone)
    print("largest relative difference of a loss:", json.dumps(found), flush=True)


def streams(folder: Path, devices: Devices) -> None:
    """A set that is read from disk, and what is cut of every batch."""
    from data_helpers import write_pair

    where = write_pair(folder / "set", train=60, test=21) if devices.leads else folder / "set"
    devices.first(lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_setup, "load", functools.partial(data.load, resident_limit=0))
        others = {"dataset": str(where), "batch_size": 8}
        run = fit(settings(folder / "run", "fg-w", **others), devices=devices)
        if devices.leads:
            same_run(run, fit(settings(folder / "alone", "fg-w", **others)))


def divides(folder: Path, devices: Devices) -> None:
    """A batch that cannot be cut."""
    with fails(r"batch_size \(=63\) must be a multiple of the number of devices, which is"):
        fit(settings(folder / "run", "bp", batch_size=63), devices=devices)
    with fails(r"batch_size \(=64\) / accumulate \(=64\) must be a multiple"):
        fit(settings(folder / "run", "bp", accumulate=64), devices=devices)
    assert not (folder / "run").exists()


def weak_scaling(folder: Path, devices: Devices) -> None:
    """With the batch, flops and bytes of a device stay as they are."""
    for name in ("bp", "fg-w", "fg-a", "lg-fg-a"):
        found = {}
        for count in COUNTS:
            config = settings(folder / "run", name, batch_size=64 * count)
            setup = Setup(config, Devices(jax.devices()[:count]))
            feed, start, _ = next(setup.feeds(0, 0))
            program = setup.advance.lower(setup.state, feed, start, start + 1).compile()
            cost, memory = program.cost_analysis(), program.memory_analysis()
            found[count] = (cost["flops"], cost["bytes accessed"], memory.temp_size_in_bytes)
        print("flops, bytes, temporary bytes of a device:", name, json.dumps(found), flush=True)
        for one, *others in zip(*found.values(), strict=True):
            assert all(other < MORE * one for other in others), (name, found)


ONE_PROCESS = [equals_one_device, streams, divides, weak_scaling]


# Several processes


def agrees(folder: Path, devices: Devices) -> None:
    """The runs of several processes are those of one."""
    found = {}
    for name in ("bp", "fg-w", "lg-fg-a", "balanced"):
        run = fit(settings(folder / name, name), devices=devices)
        if devices.leads:
            found[name] = same_run(run, fit(settings(folder / f"{name} alone", name)))
    if devices.leads:
        print("largest relative difference of a loss:", json.dumps(found), flush=True)
        assert load_run(folder / "bp")[0].algorithm == "bp"
    # What is finished is read again by all.
    assert fit(settings(folder / "bp", "bp"), devices=devices).result.steps == STEPS


def disagrees(folder: Path, devices: Devices) -> None:
    """What the processes have to have in common is compared, and all say what differs."""
    last = devices.process == devices.processes - 1
    with fails("processes of the run disagree: learning_rate is '0.5' in process 0 and '0.25' in"):
        rate = 0.25 if last else 0.5
        fit(settings(folder / "run", "bp", learning_rate=rate), devices=devices)
    with pytest.MonkeyPatch.context() as patch, fails("disagree: the version of forwardgrad is"):
        patch.setattr(_loop.importlib.metadata, "version", lambda _: f"0.{last}")
        fit(settings(folder / "run", "bp"), devices=devices)
    load = data.load

    def other(*args, **kwargs):
        found = load(*args, **kwargs)
        found.test.labels[-1] += 1
        return found

    with pytest.MonkeyPatch.context() as patch, fails("disagree: the data set is"):
        patch.setattr(_setup, "load", other if last else load)
        fit(settings(folder / "run", "bp"), devices=devices)
    with pytest.MonkeyPatch.context() as patch, fails("no such file here"):

        def missing(*args, **kwargs):
            raise InputError("no such file here")

        patch.setattr(_setup, "load", missing if last else load)
        fit(settings(folder / "run", "bp"), devices=devices)
    assert not (folder / "run").exists()
    (folder / "other").mkdir(parents=True, exist_ok=True)
    (folder / "other" / "thesis.tex").write_text("")
    with fails("holds files but no config.json"):
        fit(settings(folder / "other", "bp"), devices=devices)


def stops(folder: Path, devices: Devices) -> None:
    """A signal to one process stops all, and any number of processes goes on."""
    report = _loop._Session._report

    def reported(session, losses):
        report(session, losses)
        if session.step == STEPS // 2 and devices.process == devices.processes - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_loop._Session, "_report", reported)
        with pytest.raises(Interrupted, match="continues the run") as stopped:
            fit(settings(folder / "run", "fg-w"), devices=devices)
    assert stopped.value.signum == signal.SIGTERM
    run = fit(settings(folder / "run", "fg-w"), devices=devices)
    if devices.leads:
        same_run(run, fit(settings(folder / "alone", "fg-w")))


def breaks(folder: Path, devices: Devices) -> None:
    """Where the first process cannot write, all say so."""

    def full(*args):
        raise InputError("cannot write here: the disk is full")

    with pytest.MonkeyPatch.context() as patch, fails("the disk is full"):
        patch.setattr(_loop.Checkpoints, "save", full)
        fit(settings(folder / "run", "bp", checkpoint_every=1e-6), devices=devices)
    assert fit(settings(folder / "run", "bp"), devices=devices).result.steps == STEPS


SEVERAL = [agrees, streams, divides, disagrees, stops, breaks]


def main(folder: str, coordinator: str = "", count: str = "1", number: str = "0") -> None:
    if coordinator:
        place = {"coordinator": coordinator, "processes": int(count), "process_id": int(number)}
        devices, scenarios = Cluster(**place).join(), SEVERAL
    else:
        devices, scenarios = Devices(jax.devices()), ONE_PROCESS
        assert devices.count == 8
    for scenario in scenarios:
        scenario(Path(folder) / scenario.__name__, devices)
        print("done:", scenario.__name__, flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except devices_module.LostError as error:
        devices_module.leave(error)
