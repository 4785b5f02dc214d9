"""Inside of a `shard_map`: workers that exchange what they compute, or share what they learn."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workers import SCENARIOS


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_workers_have_the_gradient_of_one_device(name):
    """Each scenario in a process of its own, which has four devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("workers.py"), name],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
