"""Blocks on devices of their own: a pipeline without a backward phase."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from forwardgrad._errors import InputError, with_article
from forwardgrad._estimation import Estimation, estimation
from forwardgrad._explain import explain
from forwardgrad._losses import Losses
from forwardgrad._request import checked_key
from forwardgrad.estimators import AbstractEstimator, Backpropagation

Device: TypeAlias = Any
"""A `jax.Device`, which is no class to a type checker."""

Stage: TypeAlias = Callable[..., tuple[Any, Any]]
"""`stage(params, x, *targets) -> (losses, output)`: some blocks, their losses, and the output."""


class Own(NamedTuple):
    """What a stage has on its device: weights, and what optimiser and estimator remember."""

    params: PyTree
    optimiser: PyTree
    estimator: PyTree


class PipelineState(eqx.Module):
    """What a [`forwardgrad.BlockPipeline`][] has learned; each field has an entry for every stage.

    - `params`: the parameters, each stage's on its own device.
    - `optimiser`, `estimator`: what these remember.
    """

    params: tuple[PyTree, ...]
    optimiser: tuple[PyTree, ...]
    estimator: tuple[PyTree, ...]
    batch: Any = eqx.field(static=True)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockPipeline:
    r"""Stages of a network that train at the same time, each on a device of its own.

    Under greedy losses no gradient passes from one stage to another. So a stage that has computed
    its output has all that it needs to update its weights. It hands the output to the next stage,
    and takes the next micro-batch:

    $$(L_s, x_s) = \text{stage}_s(\theta_s, x_{s-1}), \qquad
    \theta_s \leftarrow \text{update}(\theta_s, \hat\nabla L_s).$$

    At tick t, stage s works on micro-batch t - s. There is no backward phase, and no activation
    waits for one. There is no delay either: stage s has learned from micro-batches 0 to m - 1 when
    it meets the m-th one, wherever it is. So the weights are the same as with all stages one after
    another on one device.

    The pipeline is JAX's asynchronous dispatch. `step` hands one micro-batch to all stages and
    returns before they have finished; call it again at once. A stage waits only for its own last
    update and for the output of the stage before it. Whoever reads a value in every step waits for
    the last stage, and has no pipeline.

    **Arguments:**

    - `stages`: functions `stage(params, x, *targets) -> (losses, output)`. `losses` are
        [`forwardgrad.Losses`][] or a real scalar, as for [`forwardgrad.value_and_grad`][]. `output`
        is the next stage's `x`, and of the last stage anything. [`forwardgrad.greedy_stages`][] and
        [`LocalLoss.stages`][forwardgrad.objectives.LocalLoss.stages] make stages of blocks.
    - `estimator`: any estimator. Stage s gets the key `jax.random.fold_in(key, s)`.
    - `optimiser`: of Optax; each stage has its own. What combines the gradients of all weights,
        such as clipping by a global norm, combines those of one stage.
    - `devices`: one for each stage, where one may appear several times. Default: this process's
        first devices.

    **Raises:**

    `InputError` if there are no stages, or not a device for each of them.

    ??? cite "Reference"

        Löwe, O'Connor & Veeling, *Putting An End to End-to-End*, NeurIPS 2019
        ([arXiv:1905.11786](https://arxiv.org/abs/1905.11786)); Belilovsky, Eickenberg & Oyallon,
        *Decoupled Greedy Learning of CNNs*, ICML 2020
        ([arXiv:1901.08164](https://arxiv.org/abs/1901.08164)).

    >>> import forwardgrad as fg, jax, jax.numpy as jnp, optax
    >>> def stage(params, x, y):
    ...     x = jnp.tanh(x @ params["block"])
    ...     return jnp.mean((x @ params["head"] - y) ** 2), x
    >>> x = jax.random.normal(jax.random.key(0), (32, 8))
    >>> y = jnp.sin(x[:, :1])
    >>> blocks = jax.random.normal(jax.random.key(1), (2, 8, 8)) / 3
    >>> params = [{"block": block, "head": jnp.zeros((8, 1))} for block in blocks]
    >>> devices = jax.devices()[:1] * 2  # one that both stages share
    >>> pipeline = fg.BlockPipeline(
    ...     [stage, stage], fg.WeightPerturbation(), optax.sgd(0.05), devices
    ... )
    >>> state = pipeline.init(params, x, y)
    >>> for i in range(200):
    ...     values, output, state = pipeline.step(state, x, y, key=jax.random.key(i))
    >>> len(values), bool(values[-1] < 0.1)
    (2, True)
    """

    stages: Sequence[Stage]
    estimator: AbstractEstimator
    optimiser: optax.GradientTransformation
    devices: Sequence[Device] | None = None

    def __post_init__(self):
        stages = tuple(self.stages)
        if not stages:
            raise InputError("stages must be at least one function, got none")
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "devices", _checked_devices(self.devices, len(stages)))
        for stage in stages:  # What is wrong with a stage or the estimator is said here.
            estimation(stage, self.estimator, has_aux=True)

    def init(self, params: Sequence[PyTree], x: PyTree, *targets: PyTree) -> PipelineState:
        """Copy the parameters to the stages' devices, and begin.

        **Arguments:**

        - `params`: for each stage any pytree. Its floating-point arrays are trained; everything
            else is passed on as it is, as by [`forwardgrad.filter_value_and_grad`][].
        - `x`, `targets`: a micro-batch, such as the first.

        **Raises:**

        `InputError` if there are not parameters for each stage, an array appears in them twice, or
        a stage is not greedy: it has no losses, or weights that change its output but none of its
        own losses.
        """
        if len(params) != len(self.stages):
            raise InputError(
                f"params must be a pytree for each of the {len(self.stages)} stages, got "
                f"{len(params)}"
            )
        _check_apart(params)
        signature, begun = _signature((x, targets)), []
        for i, (stage, device) in enumerate(self._places()):
            x, here = jax.device_put((x, targets), device)
            own = _copied(params[i], device)
            _check_greedy(stage, i, i == len(self.stages) - 1, own, x, here)
            own, x = _begin((stage, self.estimator, self.optimiser, x, here, own))
            begun.append(_copied(own, device))
        return _state(begun, signature)

    def step(
        self,
        state: PipelineState,
        x: PyTree,
        *targets: PyTree,
        key: Key[Array, ""] | None = None,
    ) -> tuple[tuple[Float[Array, ""], ...], PyTree, PipelineState]:
        """Hand a micro-batch to the stages, which update their weights; nothing is waited for.

        **Arguments:**

        - `state`: from `init` or the last step. Its arrays are updated in place, so it cannot be
            used again. If it is on other devices, it is copied to those of the stages.
        - `x`, `targets`: a micro-batch of the same shapes as in every step.
        - `key`: a new one for every micro-batch, if the estimator needs one.

        **Returns:**

        `(values, output, state)`: the losses of each stage, added up, on its device; the last
        stage's output; the next state.

        **Raises:**

        `InputError` if the micro-batch has other shapes, the state was used before or is another
        pipeline's, or the key is missing.
        """
        key = checked_key(self.estimator, key) if self.estimator.needs_key else None
        owns = self._owned(state, _signature((x, targets)))
        values, after = [], []
        for i, (stage, device) in enumerate(self._places()):
            x, here, own_key = jax.device_put((x, targets, key), device)
            given = (stage, self.estimator, self.optimiser, own_key, np.int32(i), x, here)
            own, value, x = advanced(given, _at(owns[i], device))
            values.append(value)
            after.append(own)
        return tuple(values), x, _state(after, state.batch)

    def _places(self) -> list[tuple[Stage, Device]]:
        assert self.devices is not None
        return list(zip(self.stages, self.devices, strict=True))

    def _owned(self, state: PipelineState, signature: Any) -> list[Own]:
        """Each stage's part of a state that fits the pipeline and the micro-batch."""
        if len(state.params) != len(self.stages):
            raise InputError(
                f"state must be of {len(self.stages)} stages, got one of {len(state.params)}"
            )
        if signature != state.batch:
            raise InputError(
                f"a micro-batch must have the shapes that init was given, {_shapes(state.batch)}, "
                f"got {_shapes(signature)}; leave out a last one that is smaller"
            )
        leaves = jax.tree.leaves((state.params, state.optimiser, state.estimator))
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
            raise InputError("state was used up by an earlier step; use the state that it returned")
        return list(map(Own, state.params, state.optimiser, state.estimator))


def _divided(
    stage: Stage, params: PyTree, estimator: AbstractEstimator
) -> tuple[PyTree, Estimation]:
    """The arrays of a stage that are trained, and an estimation with respect to these."""
    arrays, static = eqx.partition(params, eqx.is_inexact_array)

    def whole(arrays, x, *targets):
        return stage(eqx.combine(arrays, static), x, *targets)

    return arrays, estimation(whole, estimator, has_aux=True)


@eqx.filter_jit
def _begin(given: tuple) -> tuple[Own, Any]:
    """What a stage begins with, and its output for the first micro-batch."""
    stage, estimator, optimiser, x, targets, params = given
    arrays, (init, _) = _divided(stage, params, estimator)
    own = Own(params, optimiser.init(arrays), init(arrays, x, *targets))
    return own, stage(params, x, *targets)[1]


def advanced(given: tuple, own: Own) -> tuple[Own, Float[Array, ""], Any]:
    """One step of a stage on one micro-batch: its next weights, its losses and its output."""
    after, value, output = advance(*arguments(given, own))
    return eqx.combine(after, own), value, output


def arguments(given: tuple, own: Own) -> tuple[tuple, Own, tuple]:
    """The arrays of both, and what else there is as one static argument.

    This is done by hand because `equinox.filter_jit` waits for its result.
    """
    given_arrays, given_rest = eqx.partition(given, eqx.is_array)
    own_arrays, own_rest = eqx.partition(own, eqx.is_array)
    leaves, treedef = jax.tree.flatten((given_rest, own_rest))
    return given_arrays, own_arrays, (treedef, tuple(leaves))


@functools.partial(jax.jit, static_argnums=2, donate_argnums=1)
def advance(given: tuple, own: Own, static: tuple) -> tuple[Own, Float[Array, ""], Any]:
    """`advanced`, of the arrays alone."""
    treedef, leaves = static
    given_rest, own_rest = treedef.unflatten(leaves)
    given, own = eqx.combine(given, given_rest), eqx.combine(own, own_rest)
    stage, estimator, optimiser, key, number, x, targets = given
    arrays, (_, step) = _divided(stage, own.params, estimator)
    key = None if key is None else jax.random.fold_in(key, number)
    (value, output), grads, remembered = step(arrays, x, *targets, key=key, state=own.estimator)
    updates, memory = optimiser.update(grads, own.optimiser, arrays)
    after = Own(eqx.apply_updates(own.params, updates), memory, remembered)
    return eqx.filter(after, eqx.is_array), value, output


def _state(owns: Sequence[Own], batch: Any) -> PipelineState:
    params, optimiser, estimator = map(tuple, zip(*owns, strict=True))
    return PipelineState(params, optimiser, estimator, batch)


def _copied(tree: PyTree, device: Device) -> PyTree:
    """A copy on a device, of which every array is one of its own, to be updated in place."""
    arrays, static = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, device, may_alias=False), static)


def _at(tree: PyTree, device: Device) -> PyTree:
    """`tree` on a device, itself if it is there already."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf)]
    there = all(isinstance(a, jax.Array) and a.devices() == {device} for a in arrays)
    return tree if there else _copied(tree, device)


def _signature(batch: Any) -> Any:
    """Structure, shapes and dtypes of a micro-batch."""
    leaves, treedef = jax.tree.flatten(batch)
    return treedef, tuple((jnp.shape(leaf), jnp.result_type(leaf).name) for leaf in leaves)


def _shapes(signature: Any) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in signature[1])


def _checked_devices(devices: Any, count: int) -> tuple[Device, ...]:
    """A device for each stage.

    **Raises:**

    `InputError` if there are too few or too many, or one is none of this process.
    """
    if devices is None:
        found = jax.local_devices()
        if len(found) < count:
            raise InputError(
                f"stages (={count}) must not be more than the devices, of which there are "
                f"{len(found)} ({found[0].platform}); name them by devices=[...], where one may "
                "appear several times"
            )
        return tuple(found[:count])
    chosen = tuple(devices)
    if len(chosen) != count:
        raise InputError(f"devices must be one for each of the {count} stages, got {len(chosen)}")
    for device in chosen:
        if not isinstance(device, jax.Device):
            raise InputError(
                f"devices must be JAX's, such as those of jax.devices(), got {device!r}"
            )
        if device.process_index != jax.process_index():
            raise InputError(
                f"devices must be those of this process, got {device} of process "
                f"{device.process_index}"
            )
    return chosen


def _check_apart(params: Sequence[PyTree]) -> None:
    """Raise an `InputError` for weights that are shared, so far as it can be seen."""
    found: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(list(params)):
        if eqx.is_inexact_array(leaf) and leaf.size:
            name = f"params{jax.tree_util.keystr(path)}"
            other = found.setdefault(id(leaf), name)
            if other != name:
                raise InputError(
                    f"stages cannot share weights, but {other} and {name} are the same array; keep "
                    "what is shared in one place of one stage, or copy it if the two may differ"
                )


def _check_greedy(
    stage: Stage, number: int, last: bool, params: PyTree, x: Any, targets: Sequence[Any]
) -> None:
    """Raise an `InputError` for a stage whose gradient would have to come from another one."""
    arrays, static = eqx.partition(params, eqx.is_inexact_array)
    own = []

    def with_output(arrays, x, *targets):
        result = stage(eqx.combine(arrays, static), x, *targets)
        if not (isinstance(result, tuple) and len(result) == 2):
            what = with_article(type(result).__name__)
            raise InputError(f"stage {number} must return a pair (losses, output), got {what}")
        losses, output = result
        losses = losses if isinstance(losses, Losses) else Losses([losses], [()])
        own.append(len(losses.terms))
        outs = [] if last else filter(eqx.is_inexact_array, jax.tree.leaves(output))
        sums = [jnp.sum(out) for out in outs]
        return Losses([*losses.terms, *sums], [*losses.axes, *[()] * len(sums)])

    rows = explain(with_output, Backpropagation(), arrays, x, *targets).rows
    learns = [any(term < own[-1] for term in row.terms) for row in rows]
    odd = [row.path for row, own in zip(rows, learns, strict=True) if row.terms and not own]
    if odd or not any(learns):
        what = f"params[{number}]{odd[0]} changes its output, but" if odd else "its weights change"
        raise InputError(
            f"stage {number} must be greedy, but {what} none of its own losses, so its gradient "
            "would have to come from another stage; give each block a loss of its own"
        )
