"""What networks compute with."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from forwardgrad._errors import InputError
from forwardgrad.training._config import Precision


def products_of(precision: Precision) -> AbstractContextManager[None]:
    """Where products of float32 arrays are as exact as that.

    By itself, JAX rounds the factors on a GPU.

    **Raises:**

    `InputError` if the machine has no products of this kind.
    """
    if precision == "tf32" and jax.default_backend() != "gpu":
        raise InputError(
            f"precision 'tf32' is one of NVIDIA GPUs, and JAX's backend is "
            f"{jax.default_backend()!r} here: choose float32 or bfloat16"
        )
    return jax.default_matmul_precision("tensorfloat32" if precision == "tf32" else "float32")


def rounding(precision: Precision) -> Callable[[PyTree], PyTree]:
    """What parameters become before a network computes with them."""
    if precision != "bfloat16":
        return lambda tree: tree

    def rounded(leaf):
        real = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf, jnp.bfloat16) if real else leaf

    return lambda tree: jax.tree.map(rounded, tree)
