"""What all tests share: checked annotations, one platform, one precision."""

import os

# Flops, temporary memory and the statistics of fixed keys are asserted for the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_enable_x64", False)

hypothesis.settings.register_profile(
    "forwardgrad", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile("forwardgrad")

with install_import_hook("forwardgrad", "beartype.beartype"):
    import forwardgrad  # noqa: F401


@pytest.fixture
def unchecked():
    """The library as those meet it who do not check annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
