import colorsys
import functools
import math

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from forwardgrad import InputError
from forwardgrad.augmentation import (
    AUGMENTATIONS,
    Chain,
    ColorJitter,
    GaussianBlur,
    RandomCrop,
    RandomFlip,
    RandomGrayscale,
    RandomResizedCrop,
    augment,
    build,
)

KEYS = jax.random.split(jax.random.key(7), 1000)
# Far enough from 0 and 1 that the default jitter of one kind does not clip.
MILD = jax.random.uniform(jax.random.key(1), (12, 10, 3), minval=0.45, maxval=0.55)
IMAGE = jax.random.uniform(jax.random.key(2), (12, 10, 3))
IMAGES = jnp.stack([IMAGE] * 8)
GREY = jax.random.uniform(jax.random.key(3), (9, 9, 1))

ALL = {
    "none": build("none"),
    "crop-flip": build("crop-flip"),
    "simclr": build("simclr", blur=0.5),
    "simclr, all of it": build("simclr", least_area=0.01, jitter=1, blur=1),
}


@functools.cache
def jitted(name):
    return jax.jit(lambda images, key: augment(ALL[name], images, key))


def over_keys(augmentation, image=IMAGE, keys=KEYS):
    """What the augmentation makes of one image with each key."""
    return np.asarray(jax.jit(jax.vmap(lambda key: augmentation(image, key=key)))(keys))


def mean_is(samples, mean, std):
    """Within four standard errors."""
    return abs(np.mean(samples) - mean) < 4 * std / math.sqrt(len(samples))


# What all have in common


@pytest.mark.parametrize("name", ["crop-flip", "simclr, all of it"])
@pytest.mark.parametrize("shape", [(16, 12, 3), (9, 9, 1), (64, 64, 3)])
def test_images_keep_shape_type_and_range(name, shape):
    images = jax.random.bernoulli(KEYS[0], 0.5, (8, *shape)).astype(jnp.float32)
    out = jitted(name)(images, KEYS[1])
    assert out.shape == images.shape
    assert out.dtype == jnp.float32
    assert 0 <= out.min() <= out.max() <= 1


@pytest.mark.parametrize("name", ["crop-flip", "simclr"])
def test_the_key_decides(name):
    one, again, other = (jitted(name)(IMAGES, KEYS[i]) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("name", ["crop-flip", "simclr"])
def test_every_image_has_a_key_of_its_own(name):
    out = jitted(name)(IMAGES, KEYS[0])
    each = over_keys(ALL[name], IMAGE, jax.random.split(KEYS[0], len(IMAGES)))
    np.testing.assert_allclose(out, each, atol=1e-6)
    assert len(np.unique(out, axis=0)) > len(IMAGES) / 2


@pytest.mark.parametrize("name", ["crop-flip", "simclr"])
def test_a_loop_on_the_device_makes_the_same_images(name):
    def body(i, total):
        return total + augment(ALL[name], IMAGES, jax.random.fold_in(KEYS[0], i))

    looped = jax.jit(lambda: jax.lax.fori_loop(0, 3, body, jnp.zeros_like(IMAGES)))()
    single = sum(jitted(name)(IMAGES, jax.random.fold_in(KEYS[0], i)) for i in range(3))
    np.testing.assert_allclose(looped, single, atol=1e-5)


def test_a_batch_may_be_empty():
    assert jitted("none")(IMAGES[:0], KEYS[0]).shape == (0, *IMAGE.shape)


@pytest.mark.parametrize("name", ALL)
def test_there_is_no_convolution(name):
    """The CPU is slow at them within a loop."""
    images = jnp.zeros((2, 64, 64, 3))
    program = jax.make_jaxpr(lambda key: augment(ALL[name], images, key))(KEYS[0])
    assert "conv_general_dilated" not in str(program)


def test_settings_are_no_parameters():
    """So `jit` takes an augmentation as an argument, and compiles again for another one."""
    assert all(not jax.tree.leaves(augmentation) for augmentation in ALL.values())
    as_argument = jax.jit(augment)
    for name in ("none", "crop-flip"):
        out = as_argument(ALL[name], IMAGES, KEYS[0])
        np.testing.assert_array_equal(out, jitted(name)(IMAGES, KEYS[0]))


@pytest.mark.parametrize(
    "augmentation",
    [
        Chain(),
        RandomCrop(padding=0),
        RandomFlip(0.0),
        RandomResizedCrop(1.0),
        ColorJitter(probability=0.0),
        ColorJitter(0, 0, 0, 0),
        RandomGrayscale(0.0),
        GaussianBlur(0.0),
        GaussianBlur(),
    ],
)
def test_what_never_changes_anything_is_not_in_the_program(augmentation):
    assert augmentation(IMAGE, key=KEYS[0]) is IMAGE


@pytest.mark.parametrize(
    ("always", "probability"),
    [
        (RandomFlip(1.0), 0.5),
        (ColorJitter(probability=1.0), 0.8),
        (RandomGrayscale(1.0), 0.2),
        (GaussianBlur(1.0, least_sigma=1.0), 0.3),
    ],
)
def test_probabilities(always, probability):
    """How often, within four standard errors; and if so, as with probability 1."""
    fields = {f: getattr(always, f) for f in always.__dataclass_fields__}
    some = over_keys(type(always)(**{**fields, "probability": probability}))
    each = over_keys(always)
    unchanged = np.all(some == np.asarray(IMAGE), axis=(1, 2, 3))
    np.testing.assert_array_equal(some[~unchanged], each[~unchanged])
    assert not np.any(np.all(each == np.asarray(IMAGE), axis=(1, 2, 3)))
    assert mean_is(~unchanged, probability, math.sqrt(probability * (1 - probability)))


# Crops and flips


def test_a_flip_exchanges_left_and_right():
    np.testing.assert_array_equal(RandomFlip(1.0)(IMAGE, key=KEYS[0]), IMAGE[:, ::-1])


@pytest.mark.parametrize(
    ("shape", "padding", "border"),
    [
        ((32, 32, 3), None, (4, 4)),
        ((20, 10, 1), None, (3, 2)),
        ((8, 8, 1), None, (1, 1)),
        ((6, 5, 3), 2, (2, 2)),
    ],
)
def test_a_crop_is_a_window_of_the_padded_image(shape, padding, border):
    """Found at exactly one place; the places are uniform within four standard errors."""
    image = jax.random.uniform(jax.random.key(0), shape)
    padded = np.pad(image, [*((n, n) for n in border), (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, shape)[:, :, 0]
    assert windows.shape[:2] == (2 * border[0] + 1, 2 * border[1] + 1)
    out = over_keys(RandomCrop(padding), image, KEYS[:500])
    places = [np.argwhere(np.all(windows == crop, axis=(2, 3, 4))) for crop in out]
    assert all(len(place) == 1 for place in places)
    for axis, n in enumerate(border):
        std = math.sqrt(((2 * n + 1) ** 2 - 1) / 12)
        assert mean_is([place[0, axis] for place in places], n, std)


def boxes(least_area, keys=KEYS):
    start, share = jax.jit(jax.vmap(RandomResizedCrop(least_area)._box))(keys)
    return np.asarray(start, np.float64), np.asarray(share, np.float64)


def interpolated(image, start, share):
    """Linear interpolation at the centres of the box's pixels, along one axis, then the other."""
    for axis in (0, 1):
        side = image.shape[axis]
        at = start[axis] * side + (np.arange(side) + 0.5) * share[axis] - 0.5
        image = np.apply_along_axis(
            lambda line, at=at: np.interp(at, np.arange(len(line)), line), axis, image
        )
    return image


@pytest.mark.parametrize("image", [IMAGE, GREY], ids=["colours", "grey"])
def test_a_resized_crop_enlarges_a_box(image):
    out = over_keys(RandomResizedCrop(0.2), image, KEYS[:50])
    for crop, start, share in zip(out, *boxes(0.2, KEYS[:50]), strict=True):
        np.testing.assert_allclose(crop, interpolated(np.asarray(image), start, share), atol=1e-5)


def test_a_resized_crop_of_everything_is_the_image():
    out = over_keys(RandomResizedCrop(1 - 1e-6), keys=KEYS[:20])
    np.testing.assert_allclose(out, np.broadcast_to(IMAGE, out.shape), atol=1e-5)


@pytest.mark.parametrize("least_area", [0.08, 0.2, 0.9])
def test_boxes_are_distributed_as_described(least_area):
    start, share = boxes(least_area)
    area, aspect = share.prod(axis=1), share[:, 1] / share[:, 0]
    assert share.max() <= 1 + 1e-6
    assert start.min() >= 0
    assert (start + share).max() <= 1 + 1e-6
    assert area.min() >= least_area - 1e-6
    assert mean_is(area, (1 + least_area) / 2, (1 - least_area) / math.sqrt(12))
    widest = np.minimum(np.log(4 / 3), -np.log(area))
    relative = np.log(aspect) / widest
    assert abs(relative).max() <= 1 + 1e-3
    assert mean_is(relative, 0, 1 / math.sqrt(3))
    assert mean_is(relative**2, 1 / 3, math.sqrt(1 / 5 - 1 / 9))
    for axis in (0, 1):
        assert mean_is((start / (1 - share))[:, axis], 0.5, 1 / math.sqrt(12))


# Colours


def always(**kind):
    """A jitter of these kinds alone, of every image."""
    return ColorJitter(
        **{"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "probability": 1, **kind}
    )


def hsv(images):
    return np.apply_along_axis(lambda rgb: colorsys.rgb_to_hsv(*rgb), -1, images)


@pytest.mark.parametrize("image", [MILD, MILD[..., :1]], ids=["colours", "grey"])
def test_brightness_is_added(image):
    out = over_keys(always(brightness=0.4), image)
    added = (out - np.asarray(image)).reshape(len(out), -1)
    assert np.ptp(added, axis=1).max() < 1e-6
    assert abs(added).max() < 0.4
    assert mean_is(added[:, 0], 0, 0.4 / math.sqrt(3))
    assert mean_is(added[:, 0] ** 2, 0.16 / 3, 0.16 * math.sqrt(1 / 5 - 1 / 9))


@pytest.mark.parametrize("image", [MILD, MILD[..., :1]], ids=["colours", "grey"])
def test_contrast_multiplies_the_distance_from_the_mean_of_each_channel(image):
    out = over_keys(always(contrast=0.4), image).astype(np.float64)
    image = np.asarray(image, np.float64)
    mean = image.mean(axis=(0, 1))
    factor = np.sum((out - mean) * (image - mean), axis=(1, 2, 3)) / np.sum((image - mean) ** 2)
    expected = factor[:, None, None, None] * (image - mean) + mean
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert np.all((factor > 0.6 - 1e-4) & (factor < 1.4 + 1e-4))
    assert mean_is(factor, 1, 0.4 / math.sqrt(3))


def test_saturation_multiplies_that_of_hsv():
    keys = KEYS[:100]
    before, after = hsv(np.asarray(MILD)), hsv(over_keys(always(saturation=0.4), MILD, keys))
    factor = after[..., 1] / before[..., 1]
    np.testing.assert_allclose(after[..., 2], np.broadcast_to(before[..., 2], factor.shape), 1e-5)
    assert np.ptp(factor, axis=(1, 2)).max() < 1e-2
    np.testing.assert_allclose(
        np.exp(2j * np.pi * after[..., 0]),
        np.exp(2j * np.pi * np.broadcast_to(before[..., 0], factor.shape)),
        atol=1e-2,
    )
    factor = factor.mean(axis=(1, 2))
    assert np.all((factor > 0.6) & (factor < 1.4))
    assert mean_is(factor, 1, 0.4 / math.sqrt(3))


def test_hue_is_turned():
    keys = KEYS[:100]
    before, after = hsv(np.asarray(MILD)), hsv(over_keys(always(hue=0.1), MILD, keys))
    turned = (after[..., 0] - before[..., 0] + 0.5) % 1 - 0.5
    shape = turned.shape
    np.testing.assert_allclose(after[..., 1], np.broadcast_to(before[..., 1], shape), atol=1e-5)
    np.testing.assert_allclose(after[..., 2], np.broadcast_to(before[..., 2], shape), atol=1e-5)
    assert np.ptp(turned, axis=(1, 2)).max() < 1e-2
    turned = turned.mean(axis=(1, 2))
    assert abs(turned).max() < 0.1
    assert mean_is(turned, 0, 0.1 / math.sqrt(3))


def test_the_order_of_the_changes_is_random():
    """Contrast and hue do not commute; each order has probability 1/2."""
    out = over_keys(always(contrast=0.8, hue=0.2))

    def in_order(key, first):
        _, *keys = jax.random.split(key, 3)
        changes = [
            lambda x: dm_pix.random_contrast(keys[0], x, 0.2, 1.8),
            lambda x: dm_pix.random_hue(keys[1], x, 0.2),
        ]
        image = jnp.clip(changes[first](IMAGE), 0, 1)
        return jnp.clip(changes[1 - first](image), 0, 1)

    near = [
        np.abs(jax.vmap(lambda key, f=first: in_order(key, f))(KEYS) - out).max(axis=(1, 2, 3))
        < 1e-4
        for first in (0, 1)
    ]
    assert np.all(near[0] | near[1])
    different = near[0] != near[1]
    assert different.sum() > 900
    assert mean_is(near[0][different], 0.5, 0.5)


def test_grey_images_change_brightness_and_contrast_alone():
    jitter, without = ColorJitter(), ColorJitter(saturation=0, hue=0)
    np.testing.assert_array_equal(over_keys(jitter, GREY), over_keys(without, GREY))
    assert always(saturation=0.4, hue=0.1)(GREY, key=KEYS[0]) is GREY
    assert RandomGrayscale(1.0)(GREY, key=KEYS[0]) is GREY


def test_greyscale_is_the_luma():
    out = np.asarray(RandomGrayscale(1.0)(IMAGE, key=KEYS[0]))
    luma = np.asarray(IMAGE) @ np.array([0.2989, 0.5870, 0.1140])
    np.testing.assert_allclose(out, np.stack([luma] * 3, axis=-1), atol=1e-6)


# Blur


@pytest.mark.parametrize(("sides", "radii"), [((10, 12), (1, 1)), ((64, 40), (3, 2))])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_a_truncated_gaussian_mean_of_the_pixels_there_are(sides, radii, sigma):
    image = jax.random.uniform(jax.random.key(0), (*sides, 3))
    out = GaussianBlur(1.0, sigma, sigma)(image, key=KEYS[0])

    def filtered(x):
        for axis, radius in enumerate(radii):
            weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
            x = scipy.ndimage.correlate1d(x, weights, axis, mode="constant")
        return x

    expected = filtered(np.asarray(image)) / filtered(np.ones(image.shape))
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_blur_agrees_with_dm_pix_away_from_the_border():
    image = jax.random.uniform(jax.random.key(0), (40, 40, 3))
    out = GaussianBlur(1.0, 1.3, 1.3)(image, key=KEYS[0])
    theirs = dm_pix.gaussian_blur(image, 1.3, 40 / 10)
    np.testing.assert_allclose(out[2:-2, 2:-2], theirs[2:-2, 2:-2], atol=1e-5)


def test_blur_leaves_a_constant_image():
    image = jnp.full((20, 12, 3), 0.3)
    out = GaussianBlur(1.0)(image, key=KEYS[0])
    np.testing.assert_allclose(out, image, atol=1e-6)


def test_by_default_small_images_are_not_blurred():
    small, large = jnp.ones((63, 80, 1)), jax.random.uniform(KEYS[0], (64, 80, 1))
    assert GaussianBlur()(small, key=KEYS[0]) is small
    changed = np.any(over_keys(GaussianBlur(), large, KEYS[:400]) != large, axis=(1, 2, 3))
    assert mean_is(changed, 0.5, 0.5)


# Chains and names


def test_a_chain_applies_its_parts_in_order():
    parts = RandomResizedCrop(0.3), ColorJitter()
    expected = IMAGE
    for i, part in enumerate(parts):
        expected = part(expected, key=jax.random.fold_in(KEYS[0], i))
    np.testing.assert_array_equal(Chain(parts)(IMAGE, key=KEYS[0]), expected)


def test_names():
    assert list(AUGMENTATIONS) == ["none", "crop-flip", "simclr"]
    assert build("none") == Chain()
    assert build("crop-flip") == Chain((RandomCrop(), RandomFlip()))
    assert build("simclr", least_area=0.08, jitter=1.0, blur=0.25) == Chain(
        (
            RandomResizedCrop(0.08),
            RandomFlip(0.5),
            ColorJitter(0.8, 0.8, 0.8, 0.2, probability=0.8),
            RandomGrayscale(0.2),
            GaussianBlur(0.25, 0.1, 2.0),
        )
    )


def test_by_default_simclr_is_that_for_small_images():
    crop, _, jitter, _, blur = build("simclr").augmentations
    assert (crop, jitter, blur) == (RandomResizedCrop(0.2), ColorJitter(), GaussianBlur(None))


def test_the_defaults_suit_every_name():
    for name in AUGMENTATIONS:
        assert build(name) == build(name, least_area=0.2, jitter=0.5, blur=None)


def test_a_new_name_has_the_settings_that_it_asks_for(monkeypatch):
    monkeypatch.setitem(AUGMENTATIONS, "mine", lambda blur=None: GaussianBlur(blur))
    assert build("mine", blur=0.25) == GaussianBlur(0.25)
    with pytest.raises(InputError, match=r"jitter \(=1\) is not a setting of augmentation 'mine'"):
        build("mine", jitter=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("simclrr"), "augmentation 'simclrr' is unknown; did you mean 'simclr'?"),
        (lambda: build("simclr", least_area=0), "least_area must be above 0 and at most 1, got 0"),
        (lambda: build("simclr", least_area=1.5), "least_area must be above 0 and at most 1"),
        (lambda: build("simclr", jitter=-1), "jitter must be from 0 to 1, got -1"),
        (lambda: build("simclr", jitter=math.nan), "jitter must be from 0 to 1, got nan"),
        (lambda: build("simclr", blur=2), "blur must be from 0 to 1, got 2"),
        (lambda: build("none", blur=0.5), "is not a setting of augmentation 'none'"),
        (lambda: build("crop-flip", least_area=0.5), r"least_area \(=0.5\) is not a setting"),
        (lambda: RandomCrop(-1), "padding must be at least 0, got -1"),
        (lambda: RandomFlip(1.1), "probability must be from 0 to 1, got 1.1"),
        (lambda: ColorJitter(contrast=1.2), "contrast must be from 0 to 1, got 1.2"),
        (lambda: ColorJitter(hue=0.6), "hue must be from 0 to 0.5, got 0.6"),
        (lambda: GaussianBlur(0.5, 0.0), r"least_sigma \(=0.0\) must be above 0"),
        (lambda: GaussianBlur(0.5, 3.0), r"at most most_sigma \(=2.0\)"),
    ],
)
def test_what_cannot_be_used(make, message):
    with pytest.raises(InputError, match=message):
        make()
