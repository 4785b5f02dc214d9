"""What an augmentation is, several in a row, and a batch of images."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from forwardgrad._errors import InputError

Image = Float[Array, "height width channels"]


class AbstractAugmentation(eqx.Module):
    """A random change of one image.

    Its settings are static, so that under `jit` a transformation of probability zero leaves nothing
    in the program: called on an image of a shape that it never changes, it returns that very
    object.
    """

    @abc.abstractmethod
    def __call__(
        self, image: Float[Array, "height width channels"], *, key: Key[Array, ""]
    ) -> Float[Array, "height width channels"]:
        """The changed image.

        **Arguments:**

        - `image`: values in [0, 1]; one channel is grey, three are red, green and blue.
        - `key`: a random key; the same key makes the same change.

        **Returns:**

        An image of the same shape and type, with values in [0, 1].
        """


class Chain(AbstractAugmentation):
    r"""Augmentations one after another, the $i$-th with the $i$-th key folded from the given one.

    **Arguments:**

    - `augmentations`: in the order in which they are applied; with none of them, images stay as
        they are.
    """

    augmentations: tuple[AbstractAugmentation, ...] = ()

    def __call__(
        self, image: Float[Array, "height width channels"], *, key: Key[Array, ""]
    ) -> Float[Array, "height width channels"]:
        """The image after all of them."""
        for i, augmentation in enumerate(self.augmentations):
            image = augmentation(image, key=jax.random.fold_in(key, i))
        return image


def augment(
    augmentation: AbstractAugmentation,
    images: Float[Array, "batch height width channels"],
    key: Key[Array, ""],
) -> Float[Array, "batch height width channels"]:
    """Change every image of a batch, each with a key of its own.

    **Arguments:**

    - `augmentation`: what to do with one image.
    - `images`: values in [0, 1].
    - `key`: a random key; image $i$ gets the $i$-th of `jax.random.split(key, batch)`.

    **Returns:**

    Images of the same shape and type, with values in [0, 1].

    >>> images = jnp.linspace(0, 1, 2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    >>> from forwardgrad.augmentation import RandomFlip
    >>> flipped = augment(RandomFlip(probability=1.0), images, jax.random.key(0))
    >>> bool((flipped == images[:, :, ::-1]).all())
    True
    """
    keys = jax.random.split(key, len(images))
    return jax.vmap(lambda image, key: augmentation(image, key=key))(images, keys)


def sometimes(
    probability: float, change: Callable[[Image, Array], Image], image: Image, key: Array
) -> Image:
    """`change(image, key)` with a probability, else the image.

    Under `vmap` both are computed and one is selected, so the cases 0 and 1 are told apart before.
    """
    if probability == 0:
        return image
    if probability == 1:
        return change(image, key)
    chosen = jax.random.bernoulli(jax.random.fold_in(key, 1), probability)
    return jnp.where(chosen, change(image, key), image)


def check_range(name: str, value: float, most: float = 1.0) -> None:
    """Refuse a setting that is not from 0 to `most`.

    **Raises:**

    `InputError` that names it.
    """
    if not 0 <= value <= most:
        raise InputError(f"{name} must be from 0 to {most:g}, got {value!r}")
