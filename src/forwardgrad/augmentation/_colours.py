"""Other colours."""

from collections.abc import Callable

import dm_pix
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from forwardgrad.augmentation._base import AbstractAugmentation, Image, check_range, sometimes


class ColorJitter(AbstractAugmentation):
    r"""Random brightness, contrast, saturation and hue, in random order.

    With $\beta, \gamma, \sigma, \eta$ for the arguments and a uniform draw for each,

    - brightness adds a number from $[-\beta, \beta]$;
    - contrast multiplies each channel's distance from its mean over the image by a number from
      $[1 - \gamma, 1 + \gamma]$;
    - saturation multiplies the S of HSV by a number from $[1 - \sigma, 1 + \sigma]$;
    - hue adds a number from $[-\eta, \eta]$ to the H of HSV, which goes once around from 0 to 1.

    After each, values are clipped to [0, 1]. Images without colours have no saturation and hue to
    change; their brightness and contrast do change.

    **Arguments:**

    - `brightness`, `contrast`, `saturation`: from 0 to 1.
    - `hue`: from 0 to 0.5.
    - `probability`: of changing anything.

    **Raises:**

    `InputError` if one of them is out of range.

    ??? cite "Reference"

        Howard. *Some Improvements on Deep Convolutional Neural Network Based Image
        Classification*, 2013, arXiv 1312.5402. The ranges, the additive brightness and the
        probability are those of Chen, Kornblith, Norouzi and Hinton, *A Simple Framework for
        Contrastive Learning of Visual Representations*, ICML 2020, arXiv 2002.05709, appendix A,
        for strength 0.5.
    """

    brightness: float = eqx.field(static=True, default=0.4)
    contrast: float = eqx.field(static=True, default=0.4)
    saturation: float = eqx.field(static=True, default=0.4)
    hue: float = eqx.field(static=True, default=0.1)
    probability: float = eqx.field(static=True, default=0.8)

    def __check_init__(self):
        for name in ("brightness", "contrast", "saturation", "probability"):
            check_range(name, getattr(self, name))
        check_range("hue", self.hue, most=0.5)

    def __call__(
        self, image: Float[Array, "height width channels"], *, key: Key[Array, ""]
    ) -> Float[Array, "height width channels"]:
        """The image in other colours."""
        changes = self._changes(image.shape[-1])
        if not changes:
            return image
        return sometimes(
            self.probability, lambda image, key: _in_random_order(changes, image, key), image, key
        )

    def _changes(self, channels: int) -> list[Callable[[Array, Image], Image]]:
        """The changes that there are, each a function of key and image."""
        b, c, s, h = self.brightness, self.contrast, self.saturation, self.hue
        changes = []
        if b > 0:
            changes.append(lambda key, x: dm_pix.random_brightness(key, x, b))
        if c > 0:
            changes.append(lambda key, x: dm_pix.random_contrast(key, x, 1 - c, 1 + c))
        if s > 0 and channels == 3:
            changes.append(lambda key, x: dm_pix.random_saturation(key, x, 1 - s, 1 + s))
        if h > 0 and channels == 3:
            changes.append(lambda key, x: dm_pix.random_hue(key, x, h))
        return changes


def _in_random_order(
    changes: list[Callable[[Array, Image], Image]], image: Image, key: Array
) -> Image:
    for_order, *keys = jax.random.split(key, len(changes) + 1)
    branches = [
        # As arguments, so that each branch has its own.
        lambda x, change=change, key=key: jnp.clip(change(key, x), 0, 1).astype(x.dtype)
        for change, key in zip(changes, keys, strict=True)
    ]
    for which in jax.random.permutation(for_order, len(changes)):
        image = jax.lax.switch(which, branches, image)
    return image


class RandomGrayscale(AbstractAugmentation):
    r"""All three channels replaced by the luma $0.2989\,R + 0.587\,G + 0.114\,B$.

    An image without colours stays as it is.

    **Arguments:**

    - `probability`: of doing so.

    **Raises:**

    `InputError` if it is not from 0 to 1.
    """

    probability: float = eqx.field(static=True, default=0.2)

    def __check_init__(self):
        check_range("probability", self.probability)

    def __call__(
        self, image: Float[Array, "height width channels"], *, key: Key[Array, ""]
    ) -> Float[Array, "height width channels"]:
        """The image, with or without its colours."""
        if image.shape[-1] != 3:
            return image
        return sometimes(self.probability, _grey, image, key)


def _grey(image: Image, key: Array) -> Image:
    return jnp.asarray(dm_pix.rgb_to_grayscale(image, keep_dims=True))
