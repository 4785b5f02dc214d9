"""Workers that exchange what they compute, or share what they learn; weights that are sharded."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import run_on_eight_devices
from workers import SCENARIOS


@pytest.mark.slow
@pytest.mark.parametrize("names", [[*SCENARIOS][i::3] for i in range(3)], ids=", ".join)
def test_workers_have_the_gradient_of_one_device(names):
    """In processes that have eight devices; a few scenarios each, for a start takes seconds."""
    run_on_eight_devices("workers.py", *names)


@pytest.mark.slow
def test_two_processes_that_share_scalars():
    """The example ends with equal weights, and has learned."""
    script = Path(__file__).parents[1] / "examples" / "far_apart.py"
    done = subprocess.run(
        [sys.executable, script, "--steps", "40"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not done.returncode, done.stderr
    weights = set(re.findall(r"process \d: weights (\w+)", done.stdout))
    assert len(weights) == 1, done.stdout
    values = re.findall(r"process \d: loss ([\d.]+) to ([\d.]+)", done.stdout)
    assert len(values) == 2
    assert all(float(last) < float(first) - 0.1 for first, last in values)
