"""What all tests share: checked annotations, one platform, one precision, quick compilation."""

import os

# Flops, temporary memory and the statistics of fixed keys are asserted for the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# NumPy's small systems of equations take many times as long where threads wait for a core. This
# holds for the workers that are started from here, not for a process that has loaded NumPy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import jax
import jaxlib
import jaxtyping
import pytest
from jaxtyping import install_import_hook

# Most of the time goes into compiling programs that run once. These flags leave XLA's passes over
# a program as they are, with its flops and its memory; only the machine code is plainer. With
# `XLA_FLAGS= pytest` it is what users get.
QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jaxlib.__version__.startswith("0.10."):  # Later versions end at the name.
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_enable_x64", False)

hypothesis.settings.register_profile(
    "forwardgrad", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile("forwardgrad")

with install_import_hook("forwardgrad", "beartype.beartype"):
    import forwardgrad  # noqa: F401


def pytest_configure(config):
    """Keep what is compiled, for this run and the next; `pytest --cache-clear` empties it."""
    if hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def unchecked():
    """The library as those meet it who do not check annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
