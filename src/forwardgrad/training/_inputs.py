"""What a network gets to see of a batch: normalised floats, augmented, in one view or two."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from forwardgrad.augmentation import AbstractAugmentation, augment, build
from forwardgrad.data import Dataset
from forwardgrad.objectives import two_views
from forwardgrad.training._config import TrainConfig


class Inputs(eqx.Module):
    """From a batch as it is stored to a batch as a network gets it.

    **Arguments:**

    - `augmentation`: random changes of the training images.
    - `views`: how many of each image a step sees: 1, or 2 one after the other.
    - `shift`, `scale`: subtracted from the pixels in [0, 1], and what the rest is divided by.
    """

    augmentation: AbstractAugmentation
    views: int = eqx.field(static=True)
    shift: Float[Array, " channels"]
    scale: Float[Array, " channels"]

    def training(
        self,
        images: UInt8[Array, "batch height width channels"],
        labels: Int[Array, " batch"],
        key: Key[Array, ""],
    ) -> tuple[Float[Array, "examples height width channels"], Int[Array, " examples"]]:
        """Augmented images, and labels, of a step."""
        pixels = _to_unit(images)
        keys = jax.random.split(key, self.views)
        views = [augment(self.augmentation, pixels, k) for k in keys]
        if self.views == 1:
            return self._normalised(views[0]), labels
        return self._normalised(two_views(*views)), two_views(labels, labels)

    def plain(
        self, images: UInt8[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        """Images as they are."""
        return self._normalised(_to_unit(images))

    def _normalised(self, pixels: Array) -> Array:
        return (pixels - self.shift) / self.scale


def _to_unit(images: Array) -> Array:
    return images.astype(jnp.float32) / 255


def make_inputs(config: TrainConfig, data: Dataset) -> Inputs:
    """What the settings make of a data set's images."""
    assert config.augment is not None
    channels = data.image_shape[2]
    return Inputs(
        augmentation=build(
            config.augment, least_area=config.least_area, jitter=config.jitter, blur=config.blur
        ),
        views=2 if config.task == "contrastive" else 1,
        shift=jnp.asarray(data.mean) if config.normalise else jnp.zeros(channels),
        scale=jnp.asarray(data.std) if config.normalise else jnp.ones(channels),
    )
