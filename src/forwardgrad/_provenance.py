"""What every stored result says of its origin."""

import datetime
import importlib.metadata
import os
import platform
from typing import Any

import jax


def provenance() -> dict[str, Any]:
    """Date, versions and machine, for a stored result."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "forwardgrad_version": importlib.metadata.version("forwardgrad"),
        "jax_version": jax.__version__,
        "jaxlib_version": importlib.metadata.version("jaxlib"),
        "python_version": platform.python_version(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }
