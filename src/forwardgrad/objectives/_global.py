"""One loss at the network's end."""

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int


class GlobalLoss(eqx.Module):
    r"""Mean softmax cross-entropy of the network's output.

    $$L = -\frac1B \sum_b \log \operatorname{softmax}(z_b)_{y_b}$$

    Called as `objective(network, images, labels)`.
    """

    def __call__(
        self,
        network: eqx.Module,
        images: Float[Array, "batch height width channels"],
        labels: Int[Array, " batch"],
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss, and `{"errors": the number of wrong predictions}`."""
        logits = network(images)  # pyright: ignore[reportCallIssue]
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        return loss, {"errors": jnp.sum(jnp.argmax(logits, axis=-1) != labels)}
