"""Contrastive learning: two views of an image against all other images."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from forwardgrad._errors import InputError
from forwardgrad.networks._normalise import widened
from forwardgrad.objectives._task import AbstractTask, Labels, Outputs, PerExample

EPSILON = 1e-6
"""Added to the square of an output's length: one of length zero has no direction."""


class Contrastive(AbstractTask):
    r"""The normalised-temperature cross-entropy between two views of each image (NT-Xent).

    The batch holds the first views of B images, then the second ones
    ([`forwardgrad.objectives.two_views`][]). With $u_i$ an output of length one, $j(i)$ the other
    view of the same image and $\tau$ the temperature,

    $$\ell_i = -\frac1{2B} \log
    \frac{\exp(u_i \cdot u_{j(i)} / \tau)}{\sum_{k \ne i} \exp(u_i \cdot u_k / \tau)}.$$

    Labels are not used. A network's classifier is a readout: the features do not learn from it.

    **Arguments:**

    - `temperature`: the temperature $\tau$ of the loss.

    **Raises:**

    `InputError` if the temperature is not positive; when called, if the batch does not hold two
    views of at least two images.

    ??? cite "Reference"

        Chen, Kornblith, Norouzi & Hinton, *A Simple Framework for Contrastive Learning of Visual
        Representations*, ICML 2020 ([arXiv:2002.05709](https://arxiv.org/abs/2002.05709)),
        Equation 1.

    >>> views = two_views(jnp.eye(3), jnp.eye(3))
    >>> print(Contrastive(temperature=0.1).losses(views, jnp.zeros(6, int)).sum().round(4))
    0.0002
    """

    temperature: float = eqx.field(static=True, default=0.5)
    uses_labels: ClassVar[bool] = False

    def __check_init__(self):
        if not self.temperature > 0:
            raise InputError(f"temperature must be positive, got {self.temperature!r}")

    def losses(self, outputs: Outputs, labels: Labels) -> PerExample:
        """The formula above."""
        scores = self._scores(directions(outputs)[0])
        matching = jnp.take_along_axis(scores, partners(len(scores))[:, None], axis=1)[:, 0]
        return (jax.nn.logsumexp(scores, axis=1) - matching) / len(scores)

    def error(self, outputs: Outputs, labels: Labels) -> Outputs:
        r"""The derivative of the sum of all losses.

        With $P$ the softmax of the scores, row by row, and $M$ one where two views match,

        $$\frac{\partial L}{\partial u} = \frac1{2B\tau} (P + P^\top - 2M)\, u.$$

        An output gets the component of this that is orthogonal to it, divided by its length.
        """
        u, scale = directions(outputs)
        probabilities = jax.nn.softmax(self._scores(u), axis=1)
        both = probabilities + probabilities.T
        pull = (both @ u - 2 * u[partners(len(u))]) / (len(u) * self.temperature)
        return (pull - u * jnp.sum(pull * u, axis=1, keepdims=True)) * scale

    def _scores(self, u: Array) -> Array:
        """Cosines over the temperature; none of a view with itself."""
        scores = u @ u.T / self.temperature
        return jnp.where(jnp.eye(len(u), dtype=bool), -jnp.inf, scores)


def directions(z: Outputs) -> tuple[Array, Array]:
    """Rows of length one, and what they were multiplied with."""
    z = widened(z)
    scale = jax.lax.rsqrt(jnp.sum(z**2, axis=1, keepdims=True) + EPSILON)
    return z * scale, scale


def partners(count: int) -> Int[Array, " views"]:
    """Where in a batch of two views the other view of each image is."""
    if count % 2 or count < 4:
        raise InputError(
            "a contrastive loss needs two views of at least two images, first all first views, "
            f"then all second ones; got a batch of {count}"
        )
    return jnp.roll(jnp.arange(count), count // 2)


def two_views(first: Array, second: Array) -> Array:
    """One batch of two views of each image: all first ones, then all second ones.

    **Arguments:**

    - `first`, `second`: images, or what belongs to them, [batch, ...].

    **Returns:**

    An array of twice the length.

    **Raises:**

    `InputError` if the shapes differ.
    """
    if first.shape != second.shape:
        raise InputError(
            "first and second view must have one shape, got "
            f"{list(first.shape)} and {list(second.shape)}"
        )
    return jnp.concatenate([first, second])
