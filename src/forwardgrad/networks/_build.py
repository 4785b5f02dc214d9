"""Networks by name."""

import math

import equinox as eqx
from jaxtyping import Array, Key

from forwardgrad._errors import InputError, unknown_name
from forwardgrad.networks._cnn import CNN
from forwardgrad.networks._mlp import MLP

NAMES: tuple[str, ...] = ("logreg", "mlp", "cnn")
"""The networks there are."""

WIDTH = 1024
DEPTH = 2


def build(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    classes: int,
    key: Key[Array, ""],
    width: int | None = None,
    depth: int | None = None,
) -> eqx.Module:
    """A network with random weights.

    **Arguments:**

    - `name`: `"logreg"`, `"mlp"` or `"cnn"`.
    - `image_shape`: height, width and channels of an image.
    - `classes`: the number of outputs.
    - `key`: a random key.
    - `width`: units of the hidden linear layers (`mlp`, `cnn`). Default: 1024.
    - `depth`: number of hidden layers (`mlp`). Default: 2.

    **Returns:**

    A module to be called on images [batch, height, width, channels]; it returns logits
    [batch, classes].

    **Raises:**

    `InputError` if the name is unknown, or a size is impossible or not the network's to set.

    >>> import jax
    >>> network = build("mlp", image_shape=(28, 28, 1), classes=10, key=jax.random.key(0))
    >>> network(jax.numpy.zeros((5, 28, 28, 1))).shape
    (5, 10)
    """
    if name not in NAMES:
        raise unknown_name("network", name, NAMES)
    _check_sizes(name, width, depth)
    width = WIDTH if width is None else width
    depth = DEPTH if depth is None else depth
    if name == "cnn":
        return CNN(image_shape, width, classes, key=key)
    return MLP(math.prod(image_shape), width, 0 if name == "logreg" else depth, classes, key=key)


def _check_sizes(name: str, width: int | None, depth: int | None) -> None:
    if width is not None and name == "logreg":
        raise InputError(f"width (={width}) is not a setting of network 'logreg'")
    if depth is not None and name != "mlp":
        raise InputError(f"depth (={depth}) is not a setting of network {name!r}, only of 'mlp'")
    if width is not None and width < 1:
        raise InputError(f"width must be at least 1, got {width}")
    if depth is not None and depth < 0:
        raise InputError(f"depth must be at least 0, got {depth}")
