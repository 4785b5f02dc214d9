"""Training on several devices and in several processes."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import faults
from forwardgrad.cli import main
from forwardgrad.training import read_run

SCRIPT = Path(__file__).with_name("processes.py")
TRAIN = "--network mlp --width 16 --algorithm bp --iterations 8 --log-every 1"
ROLES = {1: "1 process", 2: "2 processes, worker"}
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def address() -> str:
    """A free one of this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def is_free(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("localhost", port)) != 0


def port_of_job(number: int) -> int:
    """Where JAX has the coordinator of a Slurm job."""
    return 2**16 - 2**12 + number % 2**12


def done(*processes: subprocess.Popen) -> list[tuple[int, str]]:
    """The exit codes of processes, and what they said."""
    found = []
    try:
        for process in processes:
            said, _ = process.communicate(timeout=500)
            found.append((process.returncode, said))
    finally:
        for process in processes:
            process.kill()
    return found


def start(*words: str | Path, **settings: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *words],
        env={**ENVIRONMENT, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_eight_devices_are_as_good_as_one(tmp_path):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    ((code, said),) = done(start(SCRIPT, tmp_path, XLA_FLAGS=flags))
    assert not code, said


@pytest.mark.slow
@pytest.mark.parametrize("count", [2])
def test_several_processes_are_as_good_as_one(tmp_path, count):
    where = address()
    processes = [start(SCRIPT, tmp_path, where, str(count), str(i)) for i in range(count)]
    for code, said in done(*processes):
        assert not code, said


@pytest.mark.slow
def test_random_kills_of_one_process_of_two(tmp_path, monkeypatch):
    """A short form of the benchmark: the other ends with a sentence, and the run goes on."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    run = faults.Run(tmp_path / "run", 2, 150)
    for victim in (1, 0):
        fault, problem = faults.hit(run, victim, signal.SIGKILL, 0.1)
        assert fault != "ended before"
        assert not problem or problem.startswith("JAX's own message")
    run.finish()
    whole = faults.Run(tmp_path / "whole", 2, 150)
    whole.finish()
    assert run.bits() == whole.bits()


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(tmp_path, monkeypatch, first, then):
    """By the command: to rounding, where as many would go on to the bit."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    run, whole = (faults.Run(tmp_path / name, n, 400) for name, n in (("run", first), ("whole", 1)))
    assert faults.hit(run, first - 1, signal.SIGTERM, 0) == (f"SIGTERM, {ROLES[first]}", "")
    run.processes = then
    run.finish()
    whole.finish()
    found, expected = run.arrays(), whole.arrays()
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        # One example of a batch may be on the other side.
        limits = {"atol": 1, "rtol": 0} if name == ".errors" else {"atol": 1e-4, "rtol": 1e-3}
        np.testing.assert_allclose(found[name], array, err_msg=name, **limits)


@pytest.mark.slow
def test_what_slurm_says(tmp_path):
    """`--coordinator auto`, with the variables that Slurm gives each task of a step."""
    job = next(number for number in range(os.getpid(), 2**22) if is_free(port_of_job(number)))
    step = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}

    def train(count, *options):
        words = ["-m", "forwardgrad", "train", *TRAIN.split(), *options]
        tasks = [{**step, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(count)]
        return done(*[start(*words, **task) for task in tasks])

    for code, said in train(2, "--coordinator", "auto", "--batch-size", "63"):
        assert code == 2
        assert "must be a multiple of the number of devices, which is 2" in said
    for code, said in train(2, "--coordinator", "auto", "--out", str(tmp_path / "two")):
        assert not code, said
    # Without the option, a task trains alone.
    ((code, said),) = train(1, "--out", str(tmp_path / "one"))
    assert not code, said
    two, one = (read_run(tmp_path / name)[0].measurements for name in ("two", "one"))
    np.testing.assert_allclose([m.loss for m in two], [m.loss for m in one], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("--coordinator here --processes 2 --process-id 0", "coordinator must be auto or a host"),
        ("--coordinator here:99999 --processes 2 --process-id 0", "coordinator must be auto or"),
        ("--coordinator here:9 --processes 2 --process-id 2", "process_id must be from 0 to 1"),
        ("--coordinator here:9 --processes 2", "needs the number of processes and a process_id"),
        ("--processes 2", "processes (=2) needs a coordinator as host:port, got None"),
        ("--coordinator auto --process-id 1", "process_id (=1) needs a coordinator as host:port"),
        ("--devices 0", "devices must be at least 1, got 0"),
        ("--devices 99", "devices must be at most"),
        ("--join-seconds 0", "join_seconds must be"),
        ("--coordinator no.such.host.invalid:9 --processes 2 --process-id 1", "cannot be used"),
    ],
)
def test_options_that_cannot_be_used(capsys, tmp_path, monkeypatch, options, match):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *options.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert match in said
    assert said.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_coordinator_that_is_not_there():
    """Nor are there others, where this is process 0."""
    words = [
        "-m",
        "forwardgrad",
        "train",
        "--processes",
        "2",
        "--join-seconds",
        "3",
        "--coordinator",
    ]
    processes = [start(*words, address(), "--process-id", str(i)) for i in (0, 1)]
    for code, said in done(*processes):
        assert code == 2, said
        assert "error: the processes did not find each other in 3 seconds: all 2 must run" in said
        assert "Traceback" not in said
