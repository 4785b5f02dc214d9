"""A linear readout of the classes from the features of a finished run."""

import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from forwardgrad._errors import InputError
from forwardgrad.data import Split
from forwardgrad.results import Readout, write
from forwardgrad.training._batches import batches
from forwardgrad.training._folder import read_run
from forwardgrad.training._loop import restored
from forwardgrad.training._setup import Setup

TOLERANCE = 1e-3
ITERATIONS = 300
REGULARISATION = 1.0


def fit_readout(
    folder: Path | str,
    *,
    data_dir: Path | str | None = None,
    examples: int | None = None,
    untrained: bool = False,
) -> Readout:
    """Fit a linear readout on the features of a finished contrastive run.

    The features are those of the last block, averaged over patches, of images as they are, scaled
    to mean zero and variance one over the training set. The readout is logistic regression by
    L-BFGS (scikit-learn's, with its default penalty), and does not depend on how long or by what
    the run's own readout was trained. The network stays as it is.

    **Arguments:**

    - `folder`: the run's. It gets `readout.json`, or `readout-untrained.json`.
    - `data_dir`: as in `TrainConfig`, if the data are no longer where the run had them.
    - `examples`: fit on so many training images; default: all.
    - `untrained`: take the features that the network had before its training.

    **Returns:**

    What the file holds: the errors, what they were measured on, date and versions.

    **Raises:**

    `InputError` if the folder holds no run, one that is not finished, or one of another task.
    """
    folder, began = Path(folder), time.monotonic()
    _check(folder, examples)
    config, setup, params = restored(folder, data_dir)
    params = setup.state.params if untrained else params
    features, labels = _features(setup, params, setup.data.train, examples)
    readout, converged = _fit(features, labels)
    train_error = _error(readout, features, labels)
    result = Readout.here(
        task=config.task,
        algorithm="untrained" if untrained else config.algorithm,
        network=config.network,
        dataset=config.dataset,
        seed=config.seed,
        features=features.shape[1],
        examples=len(features),
        limit=examples,
        converged=converged,
        train_error=train_error,
        test_error=_error(readout, *_features(setup, params, setup.data.test)),
        seconds=time.monotonic() - began,
    )
    write(folder / readout_file(untrained), result)
    return result


def readout_file(untrained: bool) -> str:
    """The name of the file with a readout's result."""
    return "readout-untrained.json" if untrained else "readout.json"


def _check(folder: Path, examples: int | None) -> None:
    if examples is not None and examples < 1:
        raise InputError(f"examples must be at least 1, got {examples}")
    run, problems = read_run(folder)
    if run.config.task != "contrastive":
        raise InputError(
            f"the run in {folder} has task {run.config.task!r}: its features learned from the "
            "labels, with its classifier; a readout is for runs of task 'contrastive'"
        )
    for problem in problems:
        raise problem
    _ = run.result


def _features(
    setup: Setup, params: PyTree, split: Split, limit: int | None = None
) -> tuple[Float[np.ndarray, "examples units"], np.ndarray]:
    """Pooled features and labels of a split, or of its first examples."""
    limit = len(split) if limit is None else min(limit, len(split))

    @jax.jit
    def features(params: PyTree, images: Array) -> Array:
        with setup.products():
            network = setup.computing(params)
            x = setup.inputs.plain(images)
            return network.pooled(network.blocks_output(x)).astype(jnp.float32)

    parts = [
        (np.asarray(features(params, images))[: len(images) - padding], labels[labels >= 0])
        for images, labels, padding in batches(split, limit)
    ]
    x, y = (np.concatenate(part)[:limit] for part in zip(*parts, strict=True))
    return x, y


def _fit(features: np.ndarray, labels: np.ndarray) -> tuple[Pipeline, bool]:
    """The readout, and whether it got as far as asked."""
    if len(np.unique(labels)) < 2:
        raise InputError(
            f"a readout needs examples of at least two classes, got {len(labels)} of one: pass "
            "more examples"
        )
    readout = make_pipeline(
        StandardScaler(), LogisticRegression(C=REGULARISATION, tol=TOLERANCE, max_iter=ITERATIONS)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        readout.fit(features, labels)
    return readout, not caught


def _error(readout: Pipeline, features: np.ndarray, labels: np.ndarray) -> float:
    return 100.0 * float(np.mean(readout.predict(features) != labels))
