"""Which part of the image is seen, and which way round."""

import math

import dm_pix
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from forwardgrad._errors import InputError
from forwardgrad.augmentation._base import AbstractAugmentation, check_range

_ASPECT = 4 / 3


class RandomCrop(AbstractAugmentation):
    """A window of the image's own size, anywhere in the image with a black border.

    **Arguments:**

    - `padding`: pixels of border on each side. Default: an eighth of the height above and below,
        of the width left and right, rounded up; 4 for images of 32x32.

    **Raises:**

    `InputError` if `padding` is negative.
    """

    padding: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.padding is not None and self.padding < 0:
            raise InputError(f"padding must be at least 0, got {self.padding}")

    def __call__(
        self, image: Float[Array, "height width channels"], *, key: Key[Array, ""]
    ) -> Float[Array, "height width channels"]:
        """The window."""
        if self.padding == 0:
            return image
        border = [
            math.ceil(side / 8) if self.padding is None else self.padding
            for side in image.shape[:2]
        ]
        padded = jnp.pad(image, [*((n, n) for n in border), (0, 0)])
        return jnp.asarray(dm_pix.random_crop(key, padded, image.shape))


class RandomFlip(AbstractAugmentation):
    """Left and right exchanged.

    **Arguments:**

    - `probability`: of doing so.

    **Raises:**

    `InputError` if it is not from 0 to 1.
    """

    probability: float = eqx.field(static=True, default=0.5)

    def __check_init__(self):
        check_range("probability", self.probability)

    def __call__(
        self, image: Float[Array, "height width channels"], *, key: Key[Array, ""]
    ) -> Float[Array, "height width channels"]:
        """The image or its mirror image."""
        if self.probability == 0:
            return image
        flipped = dm_pix.random_flip_left_right(key, image, probability=self.probability)
        return jnp.asarray(flipped)


class RandomResizedCrop(AbstractAugmentation):
    r"""A random part of the image, linearly interpolated to the size of the whole.

    The part is a box of height $\sqrt{a / r}$ and width $\sqrt{a r}$, as shares of the image's,
    at a uniformly random place. Its area $a$ is uniform between `least_area` and 1. Its aspect
    ratio $r$, relative to the image's, is log-uniform between 3/4 and 4/3, as far as the box then
    fits into the image: between $\max(3/4, a)$ and $\min(4/3, 1/a)$.

    **Arguments:**

    - `least_area`: the least share of the image's area that is kept.

    **Raises:**

    `InputError` if it is not above 0 and at most 1.
    """

    least_area: float = eqx.field(static=True, default=0.2)

    def __check_init__(self):
        if not 0 < self.least_area <= 1:
            raise InputError(f"least_area must be above 0 and at most 1, got {self.least_area!r}")

    def __call__(
        self, image: Float[Array, "height width channels"], *, key: Key[Array, ""]
    ) -> Float[Array, "height width channels"]:
        """The part, enlarged."""
        if self.least_area == 1:
            return image
        start, share = self._box(key)
        sides = jnp.array(image.shape[:2], share.dtype)
        # No box is larger than the image, so there is nothing to smooth before sampling.
        out = jax.image.scale_and_translate(
            image, image.shape, (0, 1), 1 / share, -start * sides / share, "linear", antialias=False
        )
        return jnp.clip(out, 0, 1).astype(image.dtype)

    def _box(self, key: Array) -> tuple[Float[Array, "2"], Float[Array, "2"]]:
        """Where the box starts and how large it is, as shares of height and width."""
        for_area, for_aspect, for_start = jax.random.split(key, 3)
        area = jax.random.uniform(for_area, minval=self.least_area)
        widest = jnp.minimum(math.log(_ASPECT), -jnp.log(area))
        aspect = jnp.exp(jax.random.uniform(for_aspect, minval=-widest, maxval=widest))
        share = jnp.sqrt(area * jnp.stack([1 / aspect, aspect]))
        return jax.random.uniform(for_start, (2,)) * (1 - share), share
