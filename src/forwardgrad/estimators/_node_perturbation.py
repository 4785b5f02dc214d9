"""Node perturbation: activities perturbed by steps of a finite size."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from forwardgrad._errors import InputError
from forwardgrad.estimators._base import Objective
from forwardgrad.estimators._distributions import Distribution
from forwardgrad.estimators._mixing import Mixing
from forwardgrad.estimators._perturbed_activities import AbstractPerturbedActivities, Evaluate
from forwardgrad.rewrite import Program

LANES = "forwardgrad_lanes"
"""The axis of the evaluations that are made at a time, the one without noise first."""


class NodePerturbation(AbstractPerturbedActivities):
    r"""Node perturbation: activity perturbation by finite differences.

    Noise is added to every activation $z$, and multiplied by the change of the losses:

    $$\hat g_z = \frac1K \sum_{k=1}^K \frac{L(z + \sigma u_k) - L(z)}{\sigma}\, u_k, \qquad
    \hat g_W = \hat g_z^\top \frac{\partial z}{\partial W}.$$

    As $\sigma$ goes to zero this becomes `ActivityPerturbation`, with the same activations, the
    same steering by the losses that an activation can change, and the same variance. The bias is of
    order $\sigma^2$ where the losses are smooth, and of order $\sigma$ near a kink. The error by
    rounding is of order $\varepsilon L / \sigma$, with $\varepsilon$ the precision of the losses'
    type.

    Only each layer's product with its input is differentiated, and the last layer. But derivatives
    still say which losses an activation can change, and the last layer gets its exact gradient. So
    a loss whose derivative is zero everywhere, such as an accuracy, has an estimate of zero, and a
    loss that JAX cannot differentiate is refused.

    A step costs K + 2 forward passes and one product more for each layer.

    Values behind `jax.lax.stop_gradient` stay the same in the evaluations with noise. If a ReLU
    follows, units that it switches off get no noise. Apart from that, differences see what the
    function computes, and ignore a derivative rule of its own (`custom_jvp`).

    **Arguments:**

    - `tangents`: K, the number of evaluations with noise.
    - `sigma`: the size of the noise, in the activations' own units.
    - `distribution`: of the noise's entries: `"rademacher"`, `"normal"`, or `"sphere"`.
    - `chunk`: how many of them are evaluated at a time; all by default. Each chunk has one
        evaluation more, without noise.
    - `mixing`, `exact_mixing`, `exact_direct`, `partition`: as for `ActivityPerturbation`.

    **Raises:**

    `InputError` where an argument is out of range; when called, where `ActivityPerturbation` does,
    where `vmap` refuses the function or it has effects, and where activations have less precision
    than float32, which would round the noise.

    ??? cite "Reference"

        Werfel, Xie & Seung, *Learning Curves for Stochastic Gradient Descent in Linear Feedforward
        Networks*, Neural Computation 17, 2005.

    >>> import forwardgrad as fg, jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (8, 3))
    >>> def losses(w):
    ...     out = jnp.tanh(x @ w["first"]) @ w["last"]
    ...     return fg.Losses([jnp.mean(out**2, axis=1) / 8], [("example",)])
    >>> step = fg.value_and_grad(losses, fg.NodePerturbation(tangents=4))
    >>> value, grads = step(
    ...     {"first": jnp.ones((3, 5)), "last": jnp.ones((5, 2))}, key=jax.random.key(1)
    ... )
    >>> grads["first"].shape
    (3, 5)
    """

    tangents: int = 1
    sigma: float = 1e-2
    distribution: Distribution = "rademacher"
    chunk: int | None = None
    mixing: Mixing = "all"
    exact_mixing: bool = False
    exact_direct: bool = False
    partition: int = 1

    def __check_init__(self):
        if not 0 < self.sigma < float("inf"):
            raise InputError(f"sigma must be positive and finite, got {self.sigma!r}")

    def _program(self, fun: Objective, params: PyTree[Array]) -> Program:
        # Values alone count: a loss that splits up its derivative is seen through.
        return Program(fun, params, forward=False)

    def _moved(self, eps: Array, z: Array, tangent: Array) -> Array:
        if jnp.finfo(z.dtype).bits < 32:
            raise InputError(
                f"NodePerturbation adds noise of size sigma (={self.sigma}) to activations, which "
                f"{z.dtype.name} would round to another size or to nothing: compute them in "
                "float32, or use ActivityPerturbation"
            )
        return jax.lax.stop_gradient(z + eps.astype(tangent.dtype) * tangent)

    def _cut(self, eps: Array, z: Array) -> Array:
        del eps
        return jax.lax.stop_gradient(z)

    def _changes(
        self, evaluate: Evaluate, program: Program, tangents: range
    ) -> tuple[Any, list[Array]]:
        def lane(k):
            eps, k = jnp.where(k < 0, 0.0, self.sigma), jnp.maximum(k, 0)
            losses, _ = evaluate(eps, k, _first)
            if self.exact_direct:
                direct, _ = evaluate(eps, k, _first, apart=True)
                losses = [a - b for a, b in zip(losses, direct, strict=True)]
            return [v.astype(jnp.promote_types(v.dtype, jnp.float32)) for v in losses]

        def differences(numbers):
            lanes = jnp.concatenate([jnp.array([-1]), numbers])
            values = _at_once(lane, lanes, program)
            return [(v[1:] - v[0]) / self.sigma for v in values]

        _, rest = evaluate(None, 0)
        chunk = min(self.chunk or len(tangents), len(tangents))
        first, numbers = len(tangents) % chunk, jnp.arange(tangents.start, tangents.stop)
        parts = jax.lax.map(differences, numbers[first:].reshape(-1, chunk))
        changes = [v.reshape(-1, *v.shape[2:]) for v in parts]
        if first:
            head = differences(numbers[:first])
            changes = [jnp.concatenate(pair) for pair in zip(head, changes, strict=True)]
        return rest, changes


def _first(x: Array) -> Array:
    """A value as it is without noise."""
    return jax.lax.all_gather(x, LANES)[0]


def _at_once(lane: Any, lanes: Array, program: Program) -> Any:
    refusal = (
        "fun must be one that vmap takes and have no effects: NodePerturbation evaluates it "
        "several times at once"
    )
    if program.has_effects:
        raise InputError(f"{refusal}; it has effects")
    try:
        return jax.vmap(lane, axis_name=LANES)(lanes)
    except InputError:
        raise
    except Exception as error:
        if not program.may_refuse_vmap:
            raise
        raise InputError(f"{refusal} ({str(error).splitlines()[0]})") from error
