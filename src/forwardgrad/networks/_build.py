"""Networks by name."""

import math

from jaxtyping import Array, Key

from forwardgrad._errors import InputError, unknown_name
from forwardgrad.networks._base import AbstractNetwork
from forwardgrad.networks._cnn import CNN
from forwardgrad.networks._gpt import GPT, Positions, gpt_size_of
from forwardgrad.networks._local_mixer import SIZES, LocalMixer, size_of
from forwardgrad.networks._mlp import MLP

NAMES: tuple[str, ...] = ("logreg", "mlp", "cnn", *SIZES)
"""The networks there are."""

WIDTH = 1024
DEPTH = 2


def build(
    name: str,
    *,
    image_shape: tuple[int, int, int] | None = None,
    context: int | None = None,
    classes: int,
    key: Key[Array, ""],
    width: int | None = None,
    depth: int | None = None,
    heads: bool = False,
    projection: int | None = None,
    normalise_features: bool | None = None,
    positions: Positions = "rotary",
    tied: bool = False,
) -> AbstractNetwork:
    """A network with random weights.

    **Arguments:**

    - `name`: `"logreg"`, `"mlp"`, `"cnn"`, or a LocalMixer by its size, patches along a side and
        groups, such as `"m/8/16"`: the paper's, or any other of its three numbers of units. Of
        texts, a decoder by its layers, width and, if they are given, attention heads, such as
        `"gpt/2/128"`.
    - `image_shape`: height, width and channels of an image.
    - `context`: tokens of a text, for a decoder.
    - `classes`: the number of outputs.
    - `key`: a random key.
    - `width`: units of the hidden linear layers (`mlp`, `cnn`). Default: 1024.
    - `depth`: number of hidden layers (`mlp`). Default: 2.
    - `heads`: whether blocks get heads for losses of their own. A LocalMixer always has them.
    - `projection`: the number of the heads' outputs, where they project features for contrastive
        learning. Default: that of the classes.
    - `normalise_features`: whether heads and classifier see normalised features, which those of a
        decoder always are. Default: of a LocalMixer yes, of other networks of images no.
    - `positions`, `tied`: of a decoder: see [`forwardgrad.networks.GPT`][].

    **Returns:**

    A module to be called on images [batch, height, width, channels]; it returns logits
    [batch, classes]. A decoder is called on tokens [batch, context]; it returns logits
    [batch, context, classes].

    **Raises:**

    `InputError` if the name is unknown, a size is impossible or not the network's to set, or the
    network is for images and `context` is given, or for texts and `image_shape` is.

    >>> import jax
    >>> network = build("mlp", image_shape=(28, 28, 1), classes=10, key=jax.random.key(0))
    >>> network(jax.numpy.zeros((5, 28, 28, 1))).shape
    (5, 10)
    """
    size, gpt_size = size_of(name), gpt_size_of(name)
    if size is None and gpt_size is None and name not in NAMES:
        raise unknown_name("network", name, (*NAMES, "gpt/LAYERS/WIDTH"))
    _check_sizes(name, width, depth)
    if gpt_size is not None:
        if context is None or image_shape is not None or projection is not None:
            raise InputError(
                f"network {name!r} reads text: expected a context and no image_shape or "
                f"projection, got {context}, {image_shape} and {projection}"
            )
        made = {"key": key, "heads": heads, "positions": positions, "tied": tied}
        return GPT(classes, context, gpt_size, **made)
    if image_shape is None or context is not None or positions != "rotary" or tied:
        raise InputError(
            f"network {name!r} takes images: expected an image_shape, and no settings of a decoder"
        )
    normalised = size is not None if normalise_features is None else normalise_features
    seen = {"projection": projection, "normalise_features": normalised}
    if size is not None:
        return LocalMixer(image_shape, size, classes, key=key, **seen)
    with_heads = {"heads": heads, **seen}
    width = WIDTH if width is None else width
    depth = DEPTH if depth is None else depth
    if name == "cnn":
        return CNN(image_shape, width, classes, key=key, **with_heads)
    depth = 0 if name == "logreg" else depth
    return MLP(math.prod(image_shape), width, depth, classes, key=key, **with_heads)


def _check_sizes(name: str, width: int | None, depth: int | None) -> None:
    if width is not None and name not in ("mlp", "cnn"):
        raise InputError(f"width (={width}) is not a setting of network {name!r}")
    if depth is not None and name != "mlp":
        raise InputError(f"depth (={depth}) is not a setting of network {name!r}, only of 'mlp'")
    if width is not None and width < 1:
        raise InputError(f"width must be at least 1, got {width}")
    if depth is not None and depth < 0:
        raise InputError(f"depth must be at least 0, got {depth}")
