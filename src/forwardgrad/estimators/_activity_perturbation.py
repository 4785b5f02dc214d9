"""Forward gradients of activations: perturb what layers compute instead of their weights."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from forwardgrad._errors import InputError, unknown_name
from forwardgrad._losses import Losses
from forwardgrad.estimators._base import AbstractEstimator, Objective
from forwardgrad.estimators._credit import ExplainedParameter, by_layer, explained
from forwardgrad.estimators._distributions import DISTRIBUTIONS, Distribution, draw, portable
from forwardgrad.estimators._steering import (
    check_chunk,
    check_one_by_one,
    influenced,
    not_differentiable,
    over_tangents,
    total_of,
)
from forwardgrad.rewrite import Activation, Hooks, LayerWalk, Program, Stage, after, computed_in


class ActivityPerturbation(AbstractEstimator):
    r"""The activity-perturbed forward gradient (FG-A).

    Every activation $z$ is perturbed along a random tangent $u$ of zero mean and unit covariance,
    in one forward pass. With $d$ the directional derivative of the losses,

    $$\hat g_z = \frac1K \sum_{k=1}^K d_k u_k, \qquad
    \hat g_W = \hat g_z^\top \frac{\partial z}{\partial W},$$

    so that the layer's own product with its input is the only derivative that is taken in reverse.
    The last layer gets its exact gradient. The estimate is unbiased.

    Its variance grows with the number of activations that share a $d$, which is why losses should
    come apart: where `fun` returns [`forwardgrad.Losses`][], an activation of an example is
    multiplied by the change of the losses of this example alone (likewise for any other axis whose
    name a mark shares with the losses), and of those terms alone that it can change. From a plain
    scalar, all examples share one $d$.

    An activation is what parameters make of data, before its nonlinearity: the output of a product,
    convolution or lookup with what is added or scaled by parameters after it. Where a ReLU follows,
    units that it switches off are not perturbed. A network can mark others, and what their axes
    are, by [`forwardgrad.activation`][]; without, the axis of the examples is followed from the
    losses back through the program.

    **Arguments:**

    - `tangents`: K, the number of tangents whose estimates are averaged.
    - `distribution`: of the tangents' entries: `"rademacher"`, `"normal"`, or `"sphere"` (every
        activation's tangent scaled as one vector).
    - `chunk`: how many tangents are pushed through at a time; see `WeightPerturbation`.

    **Raises:**

    `InputError` where an argument is out of range; when called, if losses have an axis of examples
    and it is unclear which axis of an activation is theirs.

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

    def __check_init__(self):
        if self.distribution not in DISTRIBUTIONS:
            raise unknown_name("distribution", str(self.distribution), DISTRIBUTIONS)
        if not isinstance(self.tangents, int) or self.tangents < 1:
            raise InputError(f"tangents must be an integer of at least 1, got {self.tangents!r}")
        check_chunk(self.chunk)

    @property
    def needs_key(self) -> bool:
        """True."""
        return True

    def value_and_grad(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        """The objective's value and a forward gradient."""
        assert key is not None
        program = Program(fun, params, twice=True)
        check_one_by_one(program, "ActivityPerturbation")
        grads = [jnp.zeros_like(leaf) for leaf in program.leaves]
        base = portable(key)

        def run(stage, number, reads):
            del number
            # The signs of a stage are drawn when it begins: all stages' would else be kept at once.
            own = _key_after(reads, base)
            # Every activation is cut off from what uses it: reverse mode sees one layer at a time.
            (total, _), pullback, (changes, noted, writes) = jax.vjp(
                lambda leaves: self._forward(program, stage, reads, own, leaves),
                [program.leaves[i] for i in stage.leaves],
                has_aux=True,
            )
            gradients = [self._gradient(a, changes, own, program) for a in noted]
            return writes, pullback((jnp.ones_like(total), gradients))[0]

        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            terms, aux, results = program.stage_by_stage(run)
            for stage, of_stage in zip(program.stages, results, strict=True):
                for i, grad in zip(stage.leaves, of_stage, strict=True):
                    grads[i] = grads[i] + grad
            value = program.losses(terms).total()
        value, aux, grads = not_differentiable((value, aux, grads), "ActivityPerturbation")
        return (value, program.auxiliary(aux)), program.treedef.unflatten(grads)

    def _forward(
        self,
        program: Program,
        stage: Stage,
        reads: Sequence[Any],
        key: Key[Array, ""],
        leaves: list[Array],
    ):
        """A stage's total and activations, and what is not to be differentiated.

        The latter are the losses' changes along each tangent (their first axis if there are
        several), what is known of the activations, and all that the stage computes.
        """
        places = program.terms_of(stage)

        def along(k, pure=False):
            if pure and program.has_effects:
                raise InputError(
                    "tangents must be 1 for ActivityPerturbation where fun has effects that vmap "
                    f"refuses, got {self.tangents}"
                )

            def at(eps):
                def perturb(activation):
                    if activation.last:
                        return activation.value
                    tangent = self._tangent(activation.site.key(key), activation, k)
                    return _perturbed(eps, activation.value, tangent)

                walk = LayerWalk(program.plan, Hooks(activation=perturb))
                writes = walk.arrays(stage.jaxpr, (), [*leaves, *reads])
                return [writes[i] for i in places.values()], (writes, walk.noted)

            zero, one = jnp.zeros(()), jnp.ones(())
            _, changes, (writes, noted) = jax.jvp(at, (zero,), (one,), has_aux=True)
            return (writes, [a for a in noted.activations if not a.last]), changes

        tangents = jnp.arange(self.tangents)
        (writes, noted), changes = over_tangents(
            along, tangents, self.tangents, program, self.chunk
        )
        if self.tangents == 1:
            changes = [change[0] for change in changes]
        total = sum([total_of(writes[i]) for i in places.values()], start=jnp.zeros(()))
        by_term = [dict(zip(places, changes, strict=True)).get(i) for i in range(program.terms)]
        return (total, [a.value for a in noted]), (program.losses(by_term), noted, writes)

    def _tangent(
        self, key: Key[Array, ""], activation: Activation, k: Array, scale: Any = 1.0
    ) -> Array:
        """The k-th tangent of an activation, times `scale`."""
        z = activation.value
        key = jax.random.fold_in(key, k)
        u = draw(key, z.shape, self.distribution, scale, computed_in(z.dtype)).astype(z.dtype)
        return u if activation.mask is None else jnp.where(activation.mask, u, 0)

    def _gradient(
        self, activation: Activation, changes: Losses, key: Key[Array, ""], program: Program
    ) -> Array:
        """The estimate of the losses' derivative by an activation."""

        def along(k, changes):
            scale = influenced(activation, changes, program)
            loops = activation.value.shape[: activation.stacked]
            scale = jnp.broadcast_to(scale, (*loops, *scale.shape[activation.stacked :]))
            return activation.each(
                lambda a, scale: self._tangent(a.site.key(key), a, k, scale), scale
            )

        if self.distribution == "rademacher":
            # Signs are drawn again when they are needed; XLA would otherwise keep them.
            key = _key_after(changes, key)
        if self.tangents == 1:
            estimate = along(jnp.zeros((), int), changes)
        else:
            estimate = jnp.mean(jax.vmap(along)(jnp.arange(self.tangents), changes), axis=0)
        # A derivative by a complex number has the conjugate of the direction it is found along.
        return jnp.conj(estimate).astype(activation.value.dtype)


def _key_after(results: Any, key: Key[Array, ""]) -> Key[Array, ""]:
    """`key`, but for XLA not to be had before `results`."""
    (data,) = after(results, [jax.random.key_data(key)])
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


@explained.register
def _(estimator: ActivityPerturbation, fun: Objective, params: PyTree) -> list[ExplainedParameter]:
    del estimator
    return by_layer(Program(fun, params, forward=True), params, "activation")


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
