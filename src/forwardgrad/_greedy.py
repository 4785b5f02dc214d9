"""Greedy losses for any stack of blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.core import Tracer
from jaxtyping import Array

from forwardgrad._errors import InputError
from forwardgrad._losses import Losses


def greedy(
    blocks: Sequence[Callable[[Any], Any]],
    heads: Callable[[Any], Any] | Sequence[Callable[[Any], Any]],
    x: Any,
    loss: Callable[[Any], Array],
    *,
    axes: Sequence[str] = ("example",),
) -> tuple[Losses, Any]:
    r"""The losses of a stack of blocks, each of which learns from its own loss alone.

    With $f_i$ the blocks, $h_i$ the heads and $\bar x$ a value that no gradient passes,

    $$x_i = f_i(\bar x_{i-1}), \qquad L = \sum_i \ell(h_i(x_i)).$$

    The first block's input is not cut off, so that an embedding learns from the first block's loss.
    A residual connection belongs into its block, as in `x + mlp(norm(x))`: no gradient passes
    through it to the block before. A head may have weights that it shares with other heads, or
    with the embedding; these learn from all their losses.

    Call it inside of the function whose gradient is estimated. The program is then evaluated block
    by block, and the memory of a step does not grow with their number.

    **Arguments:**

    - `blocks`: functions of an array (or a tree of arrays), such as the layers of a transformer.
    - `heads`: one for each block, or one function for all of them.
    - `x`: the first block's input.
    - `loss`: from a head's output to the losses, not added up. It is scaled as the objective
        should be, for instance divided by the number of examples.
    - `axes`: the names of the losses' axes, as in [`forwardgrad.Losses`][]: `("example",)`, or
        `("example", "token")` for a loss at each token.

    **Returns:**

    The losses, one term for each block, and the last block's output.

    **Raises:**

    `InputError` if there is no block, the heads are not as many as the blocks, two blocks share
    weights, or the axes do not fit the losses.

    ??? cite "Reference"

        Löwe, O'Connor & Veeling, *Putting An End to End-to-End*, NeurIPS 2019
        ([arXiv:1905.11786](https://arxiv.org/abs/1905.11786)); Ren, Kornblith, Liao & Hinton,
        *Scaling Forward Gradient with Local Losses*, ICLR 2023
        ([arXiv:2210.03310](https://arxiv.org/abs/2210.03310)), Section 4.

    >>> import forwardgrad as fg, jax, jax.numpy as jnp
    >>> x, y = jnp.ones((8, 3)), jnp.zeros((8, 3))
    >>> def losses(weights, head):
    ...     blocks = [lambda x, w=w: x + jnp.tanh(x @ w) for w in weights]
    ...     error = lambda out: jnp.mean((out - y) ** 2, axis=1) / len(y)
    ...     return fg.greedy(blocks, lambda x: x @ head, x, error)
    >>> params = [0.1 * jnp.eye(3)] * 2
    >>> step = fg.value_and_grad(losses, fg.ActivityPerturbation(), has_aux=True)
    >>> (value, output), grads = step(params, jnp.eye(3), key=jax.random.key(0))
    >>> output.shape, len(grads)
    ((8, 3), 2)
    """
    each = [heads] * len(blocks) if callable(heads) else list(heads)
    if not blocks or len(each) != len(blocks):
        raise InputError(
            "heads must be one function, or one for each of at least one block, got "
            f"{len(each)} heads for {len(blocks)} blocks"
        )
    _check_apart(blocks)
    terms = []
    for i, (block, head) in enumerate(zip(blocks, each, strict=True)):
        x = block(jax.lax.stop_gradient(x) if i else x)
        terms.append(loss(head(x)))
    return Losses(terms, [axes] * len(terms)), x


def _check_apart(blocks: Sequence[Any]) -> None:
    """Raise an `InputError` for blocks that share weights, so far as it can be seen."""
    owners: dict[int, int] = {}
    for i, block in enumerate(blocks):
        leaves = jax.tree.leaves(block)
        # Constants may be shared; what is being differentiated is traced.
        own = [leaf for leaf in leaves if leaf is block or isinstance(leaf, Tracer)]
        for leaf in {id(leaf): leaf for leaf in own}.values():
            j = owners.setdefault(id(leaf), i)
            if j != i:
                raise InputError(
                    f"blocks {j} and {i} share weights; under greedy losses every block needs "
                    "its own, so put what is shared into one block"
                )
