"""The data set that needs no file and no network."""

import numpy as np
import sklearn.datasets
import sklearn.model_selection

from forwardgrad.data._dataset import Dataset, ResidentSplit, channel_statistics

_TEST_SIZE = 360
_SPLIT_SEED = 0


def digits() -> Dataset:
    """Handwritten digits, 8x8, that come with scikit-learn (UCI; 1,437 train, 360 test).

    The split is stratified and always the same; the grey levels 0 to 16 become 0 to 255.

    >>> digits().image_shape
    (8, 8, 1)
    """
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = np.round(np.reshape(pixels, (-1, 8, 8, 1)) * (255 / 16)).astype(np.uint8)
    labels = np.asarray(labels, np.int32)
    train, test = sklearn.model_selection.train_test_split(
        np.arange(len(labels)), test_size=_TEST_SIZE, stratify=labels, random_state=_SPLIT_SEED
    )
    mean, std = channel_statistics(images[train])
    return Dataset(
        name="digits",
        image_shape=images.shape[1:],
        classes=tuple("0123456789"),
        train=ResidentSplit(images[train], labels[train]),
        test=ResidentSplit(images[test], labels[test]),
        mean=mean,
        std=std,
    )
