"""JAX, imported before all else: the command says in words which variable JAX refuses."""

import os
import sys
from pathlib import Path

try:
    import jax  # noqa: F401
except ValueError as error:
    if Path(sys.argv[0]).stem != "forwardgrad" and sys.orig_argv[1:3] != ["-m", "forwardgrad"]:
        raise
    refused = [
        name for name in os.environ if name.startswith("JAX_") and name in str(error).upper()
    ]
    where = ", ".join(f"{name}={os.environ[name]}" for name in refused)
    print(f"error: JAX refuses the environment's {where or 'variables'}: {error}", file=sys.stderr)
    sys.exit(2)
