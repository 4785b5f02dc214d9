"""The front door for Flax NNX, which has to be installed; `import forwardgrad` does without."""

try:
    import flax.nnx  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "flax":
        raise
    raise ModuleNotFoundError(
        "forwardgrad.nnx needs Flax, which is not installed: pip install flax", name=error.name
    ) from error

from forwardgrad.nnx._value_and_grad import value_and_grad as value_and_grad

__all__ = ["value_and_grad"]
