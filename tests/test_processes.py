"""Training on several devices and in several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("processes.py")
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def address() -> str:
    """A free one of this machine."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


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
