"""A training run as its scalars, and the run again."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from forwardgrad._errors import InputError
from forwardgrad._files import local, open_file, write_bytes
from forwardgrad._request import checked_params
from forwardgrad._scalars import apply_scalars
from forwardgrad.estimators import Scalars, WeightPerturbation
from forwardgrad.estimators._scalars import Drawn
from forwardgrad.rewrite import FactorShape

MAGIC = b"forwardgrad replay log 1\n"
"""What the files begin with; a digest of the rest follows."""

_STRINGS = ("begun", "ended", "optimiser")


@dataclasses.dataclass(frozen=True, eq=False)
class ReplayLog:
    """A training run: where it began, the scalars of each step, and where it ended.

    [`forwardgrad.ReplayLog.of_run`][] makes it, and [`forwardgrad.replay`][] computes the trained
    parameters from it. A step takes some 16 bytes, and four more for every further derivative,
    whatever the size of the model.

    - `scalars`: those of all steps, stacked.
    - `begun`, `ended`: digests of the parameters before and after.
    - `optimiser`: its description as JSON, or None.
    """

    scalars: Scalars
    begun: str
    ended: str
    optimiser: str | None

    @classmethod
    def of_run(
        cls,
        params0: PyTree[Array],
        steps: Scalars | Sequence[Scalars],
        params: PyTree[Array],
        optimiser: Mapping[str, Any] | None = None,
    ) -> "ReplayLog":
        """The log of a run.

        **Arguments:**

        - `params0`: the parameters before the first step.
        - `steps`: what [`forwardgrad.directional_derivatives`][] returned in each step, one by one
            or stacked; `[log.scalars, *steps]` continues a log.
        - `params`: the parameters after the last step.
        - `optimiser`: an optimiser of Optax by its name and arguments, for instance
            `{"name": "sgd", "learning_rate": 0.1}`; None for any other, which `replay` is given.

        **Raises:**

        `InputError` if there are no steps, they do not belong together, or Optax has no such
        optimiser.
        """
        if optimiser is not None:
            _built(optimiser)
        return cls(
            _joined([steps] if isinstance(steps, Scalars) else list(steps)),
            _digest(checked_params(params0)),
            _digest(checked_params(params)),
            None if optimiser is None else json.dumps(optimiser),
        )

    def __len__(self) -> int:
        """The number of steps."""
        return len(self.scalars.key)

    def save(self, path: str | Path) -> None:
        """Write a file, whole or not at all.

        **Raises:**

        `InputError` if it cannot be written.
        """
        scalars = self.scalars
        header = {
            "estimator": dataclasses.asdict(scalars.estimator),
            "drawn": scalars.drawn,
            **{name: getattr(self, name) for name in _STRINGS},
        }
        text = json.dumps(header, default=dataclasses.asdict).encode()
        arrays: dict[str, Any] = {
            "header": np.frombuffer(text, np.uint8),
            "key": scalars.key,
            "value": scalars.value.astype(jnp.promote_types(scalars.value.dtype, jnp.float32)),
            **{f"d{part}": d for part, d in enumerate(scalars.derivatives)},
            **{f"rows{i}": np.packbits(rows, axis=1) for i, rows in scalars.rows.items()},
        }
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        content = file.getvalue()
        data = MAGIC + hashlib.sha256(content).digest() + content
        write_bytes(local(Path(path), "path"), data)

    @classmethod
    def load(cls, path: str | Path) -> "ReplayLog":
        """Read what `save` has written.

        **Raises:**

        `InputError` if it cannot be read, was cut or changed, or is another file.
        """
        path = local(Path(path), "path")
        with open_file(path) as file:
            start, checked = file.read(len(MAGIC)), file.read(hashlib.sha256().digest_size)
            content = file.read()
        if start != MAGIC:
            raise InputError(f"{path} is no replay log that this version of forwardgrad reads")
        if checked != hashlib.sha256(content).digest():
            raise InputError(f"{path} is damaged: it was cut or changed")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = dict(file)
        header = json.loads(bytes(arrays.pop("header")))
        return cls(_read(header, arrays), *[header[name] for name in _STRINGS])


def replay(
    params0: PyTree[Array],
    log: ReplayLog,
    optimiser: optax.GradientTransformation | None = None,
    *,
    has_state: bool = False,
) -> Any:
    """The parameters that a training run ended with, from those it began with and its log.

    Every step is `apply_scalars`, the optimiser's update and `optax.apply_updates`, compiled as one
    program. The result is the same bit for bit if the run did the same: one program that measures,
    and one that is this step. The log has a digest of the final parameters, so another result is
    an error.

    **Arguments:**

    - `params0`: the parameters before the first step.
    - `log`: the run.
    - `optimiser`: its optimiser; None for the one that the log names.
    - `has_state`: return the optimiser's state as well, to continue the run.

    **Returns:**

    The parameters, or with `has_state` a pair `(params, state)`.

    **Raises:**

    `InputError` if `params0` are not those that the run began with, the log names no optimiser and
    none is given, or the parameters that come out are not those that the run ended with.

    >>> import forwardgrad as fg, jax, jax.numpy as jnp, optax
    >>> def loss(w):
    ...     return jnp.sum((w - jnp.arange(4.0)) ** 2)
    >>> estimator, optimiser = fg.WeightPerturbation(), optax.adam(0.1)
    >>> measure = jax.jit(fg.directional_derivatives(loss, estimator))
    >>> @jax.jit
    ... def update(w, state, key, scalars):
    ...     grads = fg.apply_scalars(estimator, w, key, scalars)
    ...     updates, state = optimiser.update(grads, state, w)
    ...     return optax.apply_updates(w, updates), state
    >>> w0 = w = jnp.zeros(4)
    >>> state, steps = optimiser.init(w), []
    >>> for i in range(20):
    ...     key = jax.random.key(i)
    ...     steps.append(measure(w, key=key))
    ...     w, state = update(w, state, key, steps[-1])
    >>> log = fg.ReplayLog.of_run(w0, steps, w, {"name": "adam", "learning_rate": 0.1})
    >>> bool(jnp.all(fg.replay(w0, log) == w))
    True
    """
    params = checked_params(params0)
    if not isinstance(log, ReplayLog):
        raise InputError(f"log must be a ReplayLog, got a {type(log).__name__}")
    if not isinstance(optimiser, optax.GradientTransformation | None):
        raise InputError(
            f"optimiser must be one of Optax's or None, got a {type(optimiser).__name__}"
        )
    if _digest(params) != log.begun:
        raise InputError(
            "params0 must be the parameters that the run began with, to the bit; got other ones"
        )
    if optimiser is None:
        if log.optimiser is None:
            raise InputError("optimiser must be given, because the log names none")
        optimiser = _built(json.loads(log.optimiser))
    estimator, chosen = log.scalars.estimator, optimiser

    @jax.jit
    def update(params, state, key, scalars):
        grads = apply_scalars(estimator, params, key, scalars)
        updates, state = chosen.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = chosen.init(params)
    keys = jax.random.wrap_key_data(log.scalars.key, impl="threefry2x32")
    for i in range(len(log)):
        scalars = jax.tree.map(lambda array, i=i: array[i], log.scalars)
        params, state = update(params, state, keys[i], scalars)
    if _digest(params) != log.ended:
        raise InputError(
            f"the {len(log)} steps of the log do not end where the run did: optimiser must be that "
            "of the run, its steps one compiled program apart from what measures, and JAX and the "
            "device those it ran on"
        )
    return (params, state) if has_state else params


def _joined(steps: Sequence[Any]) -> Scalars:
    """Scalars of single steps and of several, stacked."""
    odd = [type(step).__name__ for step in steps if not isinstance(step, Scalars)]
    if odd or not steps:
        raise InputError(
            "steps must be what forwardgrad.directional_derivatives returned, got "
            f"{f'a {odd[0]}' if odd else 'none'}"
        )
    stacked = [
        jax.tree.map(lambda a, one=step.key.ndim == 1: np.asarray(a)[None] if one else a, step)
        for step in steps
    ]
    if len({jax.tree.structure(step) for step in stacked}) > 1:
        raise InputError("steps must be those of one estimator and one model, got different ones")
    return jax.tree.map(lambda *arrays: jnp.asarray(np.concatenate(arrays)), *stacked)


def _digest(params: PyTree[Array]) -> str:
    """What no two sets of parameters share."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        array = np.asarray(leaf)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _built(description: Mapping[str, Any]) -> optax.GradientTransformation:
    """The optimiser of Optax that a name and arguments stand for."""
    try:
        arguments = json.loads(json.dumps(dict(description)))
        built = getattr(optax, arguments.pop("name"))(**arguments)
    except Exception as error:
        raise InputError(
            "optimiser must be the name and the arguments of one of Optax's, such as "
            f"{{'name': 'sgd', 'learning_rate': 0.1}}, got {description!r} ({error!r})"
        ) from error
    if not isinstance(built, optax.GradientTransformation):
        raise InputError(f"optimiser must be one of Optax's, got {description!r}")
    return built


def _read(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Scalars:
    """The scalars in a file."""
    drawn = tuple(
        Drawn(
            tuple(shape),
            tuple(FactorShape(tuple(f["stacked"]), tuple(f["own"])) for f in layout),
            tuple(axes),
            part,
            rows,
        )
        for shape, layout, axes, part, rows in header["drawn"]
    )
    parts = len({d.part for d in drawn} - {None})
    rows = {}
    for name in arrays:
        if name.startswith("rows"):
            i = int(name.removeprefix("rows"))
            axis = drawn[i].rows
            assert axis is not None
            bits = np.unpackbits(arrays[name], axis=1)[:, : drawn[i].shape[axis]]
            rows[i] = jnp.asarray(bits.astype(bool))
    return Scalars(
        jnp.asarray(arrays["value"]),
        tuple(jnp.asarray(arrays[f"d{part}"]) for part in range(parts)),
        rows,
        jnp.asarray(arrays["key"]),
        drawn,
        WeightPerturbation(**header["estimator"]),
    )
