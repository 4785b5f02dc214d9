"""Random changes of training images, on the device and under `jit`."""

import abc
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import dm_pix
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from forwardgrad._errors import InputError, unknown_name

__all__ = [
    "AUGMENTATIONS",
    "AbstractAugmentation",
    "Chain",
    "ColorJitter",
    "GaussianBlur",
    "RandomCrop",
    "RandomFlip",
    "RandomGrayscale",
    "RandomResizedCrop",
    "augment",
    "build",
]

Image = Float[Array, "height width channels"]
Images = Float[Array, "batch height width channels"]
Change = Callable[[Array, Array], Any]
"""Of an image, and a key."""

_LARGE = 64
_ASPECT = 4 / 3
_static = partial(eqx.field, static=True)


class AbstractAugmentation(eqx.Module):
    """A random change of one image.

    Its settings are static. So, under `jit`, a transformation of probability zero leaves nothing in
    the program: it returns the image that it is given.
    """

    def __check_init__(self):
        _check_range("probability", getattr(self, "probability", None))

    @abc.abstractmethod
    def __call__(self, image: Image, *, key: Key[Array, ""]) -> Image:
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

    def __call__(self, image: Image, *, key: Key[Array, ""]) -> Image:
        """The image after all of them."""
        for i, augmentation in enumerate(self.augmentations):
            image = augmentation(image, key=jax.random.fold_in(key, i))
        return image


def augment(augmentation: AbstractAugmentation, images: Images, key: Key[Array, ""]) -> Images:
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


def _sometimes(probability: float, change: Change, image: Image, key: Array) -> Image:
    """`change(image, key)` with a probability, else the image.

    Under `vmap` both are computed and one is selected, so the cases 0 and 1 are told apart before.
    """
    if probability == 0:
        return image
    if probability == 1:
        return change(image, key)
    chosen = jax.random.bernoulli(jax.random.fold_in(key, 1), probability)
    return jnp.where(chosen, change(image, key), image)


def _check_range(name: str, value: float | None, most: float = 1.0) -> None:
    if value is not None and not 0 <= value <= most:
        raise InputError(f"{name} must be from 0 to {most:g}, got {value!r}")


class RandomCrop(AbstractAugmentation):
    """A window of the image's own size, anywhere in the image with a black border.

    **Arguments:**

    - `padding`: pixels of border on each side. Default: an eighth of the height above and below,
        of the width left and right, rounded up; 4 for images of 32x32.

    **Raises:**

    `InputError` if `padding` is negative.
    """

    padding: int | None = _static(default=None)

    def __check_init__(self):
        if self.padding is not None and self.padding < 0:
            raise InputError(f"padding must be at least 0, got {self.padding}")

    def __call__(self, image: Image, *, key: Key[Array, ""]) -> Image:
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

    probability: float = _static(default=0.5)

    def __call__(self, image: Image, *, key: Key[Array, ""]) -> Image:
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

    least_area: float = _static(default=0.2)

    def __check_init__(self):
        if not 0 < self.least_area <= 1:
            raise InputError(f"least_area must be above 0 and at most 1, got {self.least_area!r}")

    def __call__(self, image: Image, *, key: Key[Array, ""]) -> Image:
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

    brightness: float = _static(default=0.4)
    contrast: float = _static(default=0.4)
    saturation: float = _static(default=0.4)
    hue: float = _static(default=0.1)
    probability: float = _static(default=0.8)

    def __check_init__(self):
        for name in ("brightness", "contrast", "saturation"):
            _check_range(name, getattr(self, name))
        _check_range("hue", self.hue, most=0.5)

    def __call__(self, image: Image, *, key: Key[Array, ""]) -> Image:
        """The image in other colours."""
        changes = self._changes(image.shape[-1])
        if not changes:
            return image
        return _sometimes(self.probability, partial(_in_random_order, changes), image, key)

    def _changes(self, channels: int) -> list[Change]:
        b, c, s, h = self.brightness, self.contrast, self.saturation, self.hue
        colours, first = channels == 3, {"channel_axis": -3}
        changes: list[tuple[float, Change]] = [
            (b, lambda x, key: dm_pix.random_brightness(key, x, b)),
            (c, lambda x, key: dm_pix.random_contrast(key, x, 1 - c, 1 + c, **first)),
            (colours * s, lambda x, key: dm_pix.random_saturation(key, x, 1 - s, 1 + s, **first)),
            (colours * h, lambda x, key: dm_pix.random_hue(key, x, h, **first)),
        ]
        return [change for strength, change in changes if strength > 0]


def _in_random_order(changes: list[Change], image: Image, key: Array) -> Image:
    """Each of the changes once, in an order of this image's own.

    Under `vmap` all of them are computed at every turn, and one is taken. With channels first,
    `where` and a loop, that takes 6 ms for 256 images of 32x32x3 on two CPU cores; 16 ms with the
    loop unrolled; 48 ms with channels last, or with `switch`.
    """
    for_order, *keys = jax.random.split(key, len(changes) + 1)

    def turn(planes, which):
        changed = planes
        for i, change in enumerate(changes):
            changed = jnp.where(which == i, change(planes, keys[i]), changed)
        return jnp.clip(changed, 0, 1).astype(planes.dtype), None

    order = jax.random.permutation(for_order, len(changes))
    planes, _ = jax.lax.scan(turn, jnp.moveaxis(image, -1, 0), order)
    return jnp.moveaxis(planes, 0, -1)


class RandomGrayscale(AbstractAugmentation):
    r"""All three channels replaced by the luma $0.2989\,R + 0.587\,G + 0.114\,B$.

    An image without colours stays as it is.

    **Arguments:**

    - `probability`: of doing so.

    **Raises:**

    `InputError` if it is not from 0 to 1.
    """

    probability: float = _static(default=0.2)

    def __call__(self, image: Image, *, key: Key[Array, ""]) -> Image:
        """The image, with or without its colours."""
        if image.shape[-1] != 3:
            return image
        return _sometimes(self.probability, _grey, image, key)


def _grey(image: Image, key: Array) -> Image:
    return jnp.asarray(dm_pix.rgb_to_grayscale(image, keep_dims=True))


class GaussianBlur(AbstractAugmentation):
    r"""Each pixel replaced by a weighted mean of those around it.

    The weight of a pixel that is $(d_1, d_2)$ away is proportional to
    $\exp(-(d_1^2 + d_2^2) / 2 \sigma^2)$ for $|d_i| \le r_i$, with $r_i$ a twentieth of the side
    and at least 1, so that the kernel spans a tenth of the side. The weights of the pixels inside
    the image sum to 1, so the border does not become darker. $\sigma$ is uniform between
    `least_sigma` and `most_sigma` pixels.

    The blur is computed as two products with banded matrices. dm-pix computes a convolution with a
    kernel for each image. For 256 images of 32x32x3 that takes twenty times as long on two CPU
    cores (31 ms against 1.6 ms), and treats pixels outside of the image as zeros.

    **Arguments:**

    - `probability`: of blurring. Default: 1/2 for images whose shorter side has at least 64
        pixels, else 0.
    - `least_sigma`, `most_sigma`: in pixels.

    **Raises:**

    `InputError` if `probability` is not from 0 to 1, or not `0 < least_sigma <= most_sigma`.

    ??? cite "Reference"

        Chen, Kornblith, Norouzi, Hinton. *A Simple Framework for Contrastive Learning of Visual
        Representations*, ICML 2020, arXiv 2002.05709, appendix A; without blur on small images,
        appendix B.9.
    """

    probability: float | None = _static(default=None)
    least_sigma: float = _static(default=0.1)
    most_sigma: float = _static(default=2.0)

    def __check_init__(self):
        if not 0 < self.least_sigma <= self.most_sigma:
            raise InputError(
                f"least_sigma (={self.least_sigma}) must be above 0 and at most most_sigma "
                f"(={self.most_sigma})"
            )

    def __call__(self, image: Image, *, key: Key[Array, ""]) -> Image:
        """The image, blurred or not."""
        probability = self.probability
        if probability is None:
            probability = 0.5 if min(image.shape[:2]) >= _LARGE else 0.0
        return _sometimes(probability, self._blur, image, key)

    def _blur(self, image: Image, key: Array) -> Image:
        sigma = jax.random.uniform(key, (), image.dtype, self.least_sigma, self.most_sigma)
        rows, columns = (_means(side, sigma) for side in image.shape[:2])
        out = jnp.einsum("ih,hwc,jw->ijc", rows, image, columns, precision="highest")
        return jnp.clip(out, 0, 1)


def _means(side: int, sigma: Float[Array, ""]) -> Float[Array, "side side"]:
    """The matrix that takes the weighted means along an axis; its rows sum to 1."""
    distance = jnp.arange(side)[:, None] - jnp.arange(side)
    near = jnp.abs(distance) <= max(1, side // 20)
    weights = jnp.where(near, jnp.exp(-0.5 * (distance / sigma) ** 2), 0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _simclr(
    *, least_area: float = 0.2, jitter: float = 0.5, blur: float | None = None
) -> AbstractAugmentation:
    _check_range("jitter", jitter)
    _check_range("blur", blur)
    strong, weak = 0.8 * jitter, 0.2 * jitter
    colours = (ColorJitter(strong, strong, strong, weak), RandomGrayscale())
    return Chain((RandomResizedCrop(least_area), RandomFlip(), *colours, GaussianBlur(blur)))


AUGMENTATIONS: dict[str, Callable[..., AbstractAugmentation]] = {
    "none": lambda: Chain(),
    "crop-flip": lambda: Chain((RandomCrop(), RandomFlip())),
    "simclr": _simclr,
}
"""What makes each augmentation that has a name, given those of `build`'s settings that it has."""

_DEFAULTS = inspect.getfullargspec(_simclr).kwonlydefaults or {}


def build(
    name: str, *, least_area: float = 0.2, jitter: float = 0.5, blur: float | None = None
) -> AbstractAugmentation:
    """An augmentation by name.

    `"none"` leaves images as they are. `"crop-flip"` is the usual one of supervised training:
    [`forwardgrad.augmentation.RandomCrop`][], [`forwardgrad.augmentation.RandomFlip`][].
    `"simclr"` is that of contrastive learning: [`forwardgrad.augmentation.RandomResizedCrop`][],
    [`forwardgrad.augmentation.RandomFlip`][], [`forwardgrad.augmentation.ColorJitter`][],
    [`forwardgrad.augmentation.RandomGrayscale`][], [`forwardgrad.augmentation.GaussianBlur`][].

    **Arguments:**

    - `name`: one of [`forwardgrad.augmentation.AUGMENTATIONS`][].
    - `least_area`: the least area of SimCLR's crop, as a share of the image's. Chen et al. have
        0.08, for ImageNet; 0.2 is usual for small images.
    - `jitter`: SimCLR's strength $s$ of the changes of colour: brightness, contrast and saturation
        by up to $0.8 s$, hue by up to $0.2 s$. Chen et al. have 1 for ImageNet, 0.5 for CIFAR-10.
    - `blur`: SimCLR's probability of a blur. Default: 1/2 for images whose shorter side has at
        least 64 pixels, else 0.

    **Returns:**

    What to call on an image with values in [0, 1], or to give to
    [`forwardgrad.augmentation.augment`][].

    **Raises:**

    `InputError` if the name is unknown, or a setting is out of range or not the augmentation's to
    set.

    ??? cite "Reference"

        Chen, Kornblith, Norouzi, Hinton. *A Simple Framework for Contrastive Learning of Visual
        Representations*, ICML 2020, arXiv 2002.05709, appendices A and B.9.

    >>> build("crop-flip")
    Chain(augmentations=(RandomCrop(), RandomFlip()))
    """
    if name not in AUGMENTATIONS:
        raise unknown_name("augmentation", name, AUGMENTATIONS)
    settings = {"least_area": least_area, "jitter": jitter, "blur": blur}
    own = inspect.signature(AUGMENTATIONS[name]).parameters
    for setting, value in settings.items():
        if setting not in own and value != _DEFAULTS[setting]:
            raise InputError(f"{setting} (={value}) is not a setting of augmentation {name!r}")
    return AUGMENTATIONS[name](**{k: v for k, v in settings.items() if k in own})
