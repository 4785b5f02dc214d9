"""Forward gradients of activations: perturb what layers compute instead of their weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, PyTree

from forwardgrad._errors import InputError
from forwardgrad.estimators._base import Objective
from forwardgrad.estimators._distributions import Distribution
from forwardgrad.estimators._mixing import Mixing
from forwardgrad.estimators._perturbed_activities import AbstractPerturbedActivities, Evaluate
from forwardgrad.estimators._steering import over_tangents
from forwardgrad.rewrite import Program


class ActivityPerturbation(AbstractPerturbedActivities):
    r"""The activity-perturbed forward gradient (FG-A).

    In one forward pass, every activation $z$ is perturbed along a random tangent $u$ of zero mean
    and unit covariance. With $d$ the directional derivative of the losses,

    $$\hat g_z = \frac1K \sum_{k=1}^K d_k u_k, \qquad
    \hat g_W = \hat g_z^\top \frac{\partial z}{\partial W},$$

    The layer's own product with its input is the only derivative that is taken in reverse. The last
    layer gets its exact gradient. The estimate is unbiased.

    The variance grows with the number of activations that share a $d$. So return the losses as
    [`forwardgrad.Losses`][], not as one scalar. An activation of an example is then multiplied by
    the change of only this example's losses, and of only those terms that it can change. The same
    holds for any other axis whose name appears both in the losses and in a mark of the activation.
    If `fun` returns a plain scalar, all examples share one $d$.

    An activation is what parameters make of data, before the nonlinearity: the output of a product,
    convolution or lookup, with what parameters add to it or scale it by. If a ReLU follows, the
    units that it switches off are not perturbed. A network can mark other values as activations,
    with names for their axes, by [`forwardgrad.activation`][]. Without a mark, the axis of the
    examples is found by following it from the losses back through the program.

    **Arguments:**

    - `tangents`: K, the number of tangents whose estimates are averaged.
    - `distribution`: of the tangents' entries: `"rademacher"`, `"normal"`, or `"sphere"` (every
        activation's tangent scaled as one vector).
    - `chunk`: how many tangents are computed at a time; see `WeightPerturbation`. What they share
        is always kept, because reverse mode keeps most of it in any case.
    - `mixing`: what an activation is credited with that changes other tokens' losses too, where
        losses have an axis `"token"`: the change of `"all"` tokens' losses, of its own and later
        ones with `"causal"`, or of later ones times a number's power of the lag. `"causal"` has no
        bias if an activation changes no earlier token's loss, as in a causal decoder; this is not
        checked. A number $\gamma$ below one, $\gamma^{t-s}$ for the loss of token t and an
        activation at token s, has less variance, and a bias: 0 is the own token's loss alone.
    - `exact_mixing`: do not perturb what attention or a recurrence mixes, such as queries, keys and
        values. The estimate for the next layer's activation is taken back to them through this
        one step, by reverse mode. It has no bias, and much less variance.
    - `exact_direct`: take the part of the derivative exactly that reaches the losses past all other
        perturbed activations, as over a residual stream; only the rest is estimated. This is a
        control variate: with $b$ the exact part, $d - \langle b, u \rangle$ takes the place of
        $d$, and $b$ is added. No bias. A layer that no other one comes after, such as the last
        block's output, gets its exact gradient.
    - `partition`: cut the layers of the program, or of each greedy block of it, into so many parts
        in their order, or as many as there are layers or tangents. Each tangent is in one part, and
        credits that alone. It is not pushed through what comes before. No bias: a part has a share
        of the tangents, and none of the others' noise. If all parts change the losses as much, the
        total variance is the same.

    **Raises:**

    `InputError` where an argument is out of range; when called, if losses have an axis of examples
    and it is unclear which axis of an activation is theirs; if `mixing` or `exact_mixing` is set
    and losses have no axis `"token"`, or no activation has one; with `exact_mixing`, if what mixes
    tokens has no reverse mode, or nothing is left to perturb; with `exact_direct`, if `fun` has
    effects, or workers of a `shard_map` exchange what they compute.

    ??? cite "Reference"

        Ren, Kornblith, Liao & Hinton, *Scaling Forward Gradient with Local Losses*, ICLR 2023
        ([arXiv:2210.03310](https://arxiv.org/abs/2210.03310)), Section 3.

    >>> import forwardgrad as fg, jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (8, 3))
    >>> def losses(w):
    ...     out = jnp.tanh(x @ w["first"]) @ w["last"]
    ...     return fg.Losses([jnp.mean(out**2, axis=1) / 8], [("example",)])
    >>> step = fg.value_and_grad(losses, fg.ActivityPerturbation())
    >>> value, grads = step(
    ...     {"first": jnp.ones((3, 5)), "last": jnp.ones((5, 2))}, key=jax.random.key(1)
    ... )
    >>> grads["first"].shape
    (3, 5)
    """

    tangents: int = 1
    distribution: Distribution = "rademacher"
    chunk: int | None = None
    mixing: Mixing = "all"
    exact_mixing: bool = False
    exact_direct: bool = False
    partition: int = 1

    def _program(self, fun: Objective, params: PyTree[Array]) -> Program:
        return Program(fun, params, twice=True)

    def _moved(self, eps: Array, z: Array, tangent: Array) -> Array:
        return _perturbed(eps, z, tangent)

    def _cut(self, eps: Array, z: Array) -> Array:
        return _carried(eps, z)

    def _changes(
        self, evaluate: Evaluate, program: Program, tangents: range
    ) -> tuple[Any, list[Array]]:
        def along(k, pure=False):
            if pure and program.has_effects:
                raise InputError(
                    "tangents must be 1 for ActivityPerturbation where fun has effects that vmap "
                    f"refuses, got {self.tangents}"
                )

            def derivative(**options):
                one = jnp.ones(())
                fun = functools.partial(evaluate, k=k, **options)
                return jax.jvp(fun, (jnp.zeros_like(one),), (one,), has_aux=True)[1:]

            changes, rest = derivative()
            if self.exact_direct:
                direct, _ = derivative(apart=True)
                changes = [a - b for a, b in zip(changes, direct, strict=True)]
            return rest, changes

        numbers = jnp.arange(tangents.start, tangents.stop)
        return over_tangents(along, numbers, len(tangents), program, self.chunk, reverse=True)


@jax.custom_jvp
def _perturbed(eps: Array, z: Array, tangent: Array) -> Array:
    """`z`, with the derivative `tangent` by `eps` beside its own, and none by anything else."""
    del eps, tangent
    return z


@_perturbed.defjvp
def _perturbed_jvp(primals, tangents):
    # Forward mode goes on from here; the reverse mode that is taken of it all must not come back.
    _, z, tangent = jax.lax.stop_gradient(primals)
    d_eps, d_z, _ = jax.lax.stop_gradient(tangents)
    return z, d_z + d_eps.astype(z.dtype) * tangent


@jax.custom_jvp
def _carried(eps: Array, z: Array) -> Array:
    """`z`, with its derivative by `eps`, and none by anything else."""
    del eps
    return z


def _carried_jvp(primals: Any, tangents: Any) -> Any:
    # Called because `eps` has a tangent; `z` has none where nothing was perturbed before it.
    z = jax.lax.stop_gradient(primals[1])
    d_z = tangents[1]
    return z, d_z if isinstance(d_z, SymbolicZero) else jax.lax.stop_gradient(d_z)


_carried.defjvp(_carried_jvp, symbolic_zeros=True)
