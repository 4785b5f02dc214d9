"""Checkpoints that XLA does not see through: less memory for more operations."""

from collections.abc import Callable

import jax

from forwardgrad.rewrite import after


def checkpointed(fun: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`fun`, of which backpropagation keeps the arguments and computes the rest again.

    `jax.checkpoint` is for this, and holds on a CPU with JAX 0.12. With JAX 0.10, XLA removes the
    barrier that it relies on there, finds everything computed already, and keeps it. Here the
    second computation cannot begin before the gradient of the result is there, because a zero
    computed from it is added to the arguments. Arguments larger than the result are taken as they
    are: a copy of a weight matrix would need more memory than it saves.

    **Arguments:**

    - `fun`: a function of pytrees of arrays that returns an array, and closes over nothing that is
        differentiated.

    **Returns:**

    The same function, for reverse mode alone.

    >>> import jax, jax.numpy as jnp
    >>> from forwardgrad.experiments import checkpointed
    >>> layer = checkpointed(lambda w, x: w * x**2)
    >>> print(jax.grad(layer)(jnp.array(3.0), jnp.array(2.0)))
    4.0
    """

    @jax.custom_vjp
    def call(*args):
        return fun(*args)

    def forward(*args):
        return fun(*args), args

    def backward(args, gradient):
        leaves, tree = jax.tree.flatten(args)
        delayed = after(gradient, leaves)
        args = tree.unflatten(
            late if leaf.size <= gradient.size else leaf
            for leaf, late in zip(leaves, delayed, strict=True)
        )
        return jax.vjp(fun, *args)[1](gradient)

    call.defvjp(forward, backward)
    return call
