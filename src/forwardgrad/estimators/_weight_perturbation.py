"""Forward gradients: perturb the weights, keep what the directional derivative says."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from forwardgrad._errors import InputError, unknown_name
from forwardgrad.estimators._base import AbstractEstimator, Objective
from forwardgrad.estimators._credit import ExplainedParameter, explained, of_parameters
from forwardgrad.estimators._distributions import (
    DISTRIBUTIONS,
    Distribution,
    draw_dense,
    draw_small,
    portable,
    to_sphere,
)
from forwardgrad.estimators._scalars import Drawn, Scalars, checked
from forwardgrad.estimators._steering import check_counts, check_no_refs, over_tangents, total_of
from forwardgrad.rewrite import (
    Layout,
    Lookup,
    Program,
    Stage,
    Walk,
    check_typed,
    combine_tangents,
    computed_in,
    dense_layout,
    factor_shape,
    key_of_worker,
    masked_rows,
    perturbed,
    summed_change,
    summed_changes,
    varying,
)

Structure = Literal["rank-one", "dense"]

Scales: TypeAlias = Mapping[int, Float[Array, "*slices"]]
"""How long tangents are, by the position of a parameter: a number for each slice of a stack."""


class WeightPerturbation(AbstractEstimator):
    r"""The forward gradient (FG-W): an unbiased gradient from forward passes alone.

    $$\hat g = \frac1K \sum_{k=1}^K d_k v_k, \qquad d_k = \nabla f(\theta) \cdot v_k,$$

    The random tangents $v_k$ have zero mean and unit covariance, so $E[\hat g] = \nabla f$. The
    directional derivatives $d_k$ come from forward mode. There is no tape and no backward pass, and
    the memory does not grow with depth. All K tangents share one pass over the primal.

    With `structure="rank-one"` the tangent of a weight matrix is an outer product $V = a b^\top$ of
    two independent vectors. The estimate stays unbiased, and the tangent is never built: for a
    batch of B, $x V = (x a) b^\top$ costs $O(B(m + n))$, where a dense tangent costs a second
    matrix product. The function is rewritten for this (see "How the rewrite works"). If the rewrite
    has no formula for a use of a weight, the tangent is built as an array. This is exact, only
    slower.

    If `fun` returns [`forwardgrad.Losses`][], the tangent of a parameter is multiplied by the
    derivative of only those terms that the parameter can change. With greedy local losses, these
    are the terms of its own block.

    Let D be the number of parameters. One tangent of signs or on the sphere, dense or rank-one, has
    $\lVert v \rVert^2 = D$, hence $\lVert\hat g\rVert^2 = d^2 D$. The total variance of the
    estimate is $(D - 1) \lVert\nabla f\rVert^2$, and K tangents divide it by K.

    **Arguments:**

    - `tangents`: K, the number of tangents whose estimates are averaged.
    - `distribution`: of the entries of the tangent (or of its factors): `"rademacher"` (signs, the
        least variance), `"normal"` (the paper's), or `"sphere"` (uniform on the sphere; dense
        tangents are scaled as one vector, factors one by one).
    - `structure`: `"rank-one"` or `"dense"`.
    - `rank`: the number R of outer products in a rank-one tangent,
        $V = R^{-1/2} \sum_r a_r b_r^\top$. With more of them, large $d$ are less frequent, and the
        step costs more.
    - `orthogonal`: return what K orthogonalised tangents would give: the exact gradient projected
        on the span of the K tangents, and scaled by D/K. This is unbiased for dense tangents. For
        rank-one ones it is unbiased up to relative terms of order $D^{-3/2}$.
    - `clip`: a bound on every directional derivative $|d_k|$, so that a rare large one cannot end a
        run. This introduces a bias wherever it is active. None: no bound.
    - `exact_last`: give the last layers their exact gradient. These are the layers that no other
        layer comes after: an output layer, the heads of local losses. Their gradient is local to
        the layer. The variance of the perturbed parameters then no longer contains the squared
        gradients of the last layers, which are often most of it.
    - `chunk`: how many tangents are computed at a time. What does not depend on them is computed
        once and kept, if that needs less memory than all tangents at once, and otherwise computed
        again for each chunk. None: on a CPU so many as fit into its cache, if what they share can
        be kept, and else all of them; one at a time if the function cannot be batched (a callback,
        an ordered effect).
    - `mask_rows`: do not perturb rows of a table that the function does not look up; their gradient
        is zero. Which rows these are depends on the data, so workers and
        [`forwardgrad.apply_scalars`][] have to be told. With False they need only scalars, and the
        estimate has more noise.

    **Raises:**

    `InputError` where an argument is out of range, or `tangents` exceeds the number of parameters
    and `orthogonal` is set.

    ??? cite "Reference"

        Baydin, Pearlmutter, Syme, Wood & Torr, *Gradients without Backpropagation*, 2022
        ([arXiv:2202.08587](https://arxiv.org/abs/2202.08587)), Algorithm 1.

    >>> import forwardgrad as fg, jax, jax.numpy as jnp
    >>> step = fg.value_and_grad(lambda w: jnp.sum(w**2), fg.WeightPerturbation())
    >>> value, grad = step(jnp.array([1.0, 2.0]), key=jax.random.key(0))
    >>> print(value, jnp.linalg.norm(grad) in (2 * 2**0.5, 6 * 2**0.5))
    5.0 True
    """

    tangents: int = 1
    distribution: Distribution = "rademacher"
    structure: Structure = "rank-one"
    rank: int = 1
    orthogonal: bool = False
    clip: float | None = None
    exact_last: bool = False
    chunk: int | None = None
    mask_rows: bool = True

    def __check_init__(self):
        if self.distribution not in DISTRIBUTIONS:
            raise unknown_name("distribution", str(self.distribution), DISTRIBUTIONS)
        if self.structure not in get_args(Structure):
            raise unknown_name("structure", str(self.structure), get_args(Structure))
        check_counts(self, "tangents", "rank", "chunk")
        if self.structure == "dense" and self.rank != 1:
            raise InputError(f"rank must be 1 for structure 'dense', got {self.rank}")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip must be positive or None, got {self.clip!r}")

    @property
    def needs_key(self) -> bool:
        """True."""
        return True

    def value_and_grad(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""] | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        """The objective's value and a forward gradient."""
        assert key is not None
        return self._by_scales(self._program(fun, params), key, None)

    def _program(self, fun: Objective, params: PyTree[Array]) -> Program:
        return Program(fun, params, twice=self.exact_last)

    def _by_scales(
        self, program: Program, key: Key[Array, ""], scales: Scales | None
    ) -> tuple[tuple[Float[Array, ""], Any], PyTree[Array]]:
        """The same, with tangents `s v` and the estimate `d v / s`."""
        # A stricter setting is for the caller's function, which is traced by now.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            found = self._measured(program, portable(key), scales)
            grads = self._combined(program.leaves, found.scalars, found.factors, scales)
        grads = [found.exact.get(i, grad) for i, grad in enumerate(grads)]
        return (found.scalars.value, found.aux), program.treedef.unflatten(grads)

    def directional_derivatives(
        self, fun: Objective, params: PyTree[Array], key: Key[Array, ""]
    ) -> tuple[Scalars, Any]:
        """The first half of `value_and_grad`: what it measures, and the auxiliary data.

        **Raises:**

        `InputError` with `exact_last`: an exact gradient is no scalar.
        """
        if self.exact_last:
            raise InputError(
                "exact_last must be False for scalars: the exact gradient of the last layers is as "
                "large as these, and follows from no key"
            )
        program = Program(fun, params)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            found = self._measured(program, portable(key))
        return found.scalars, found.aux

    def apply_scalars(
        self, params: PyTree[Array], key: Key[Array, "*workers"], scalars: Scalars
    ) -> PyTree[Array]:
        """The second half of `value_and_grad`: the gradient, which needs no function.

        With a key for each of several workers, and their scalars stacked, it is the sum.
        """
        leaves, treedef = jax.tree.flatten(params)
        scalars = checked(scalars, self, leaves, key)

        def factors_of(key):
            return self._drawn(leaves, scalars.drawn, range(len(leaves)), portable(key))

        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            factors = factors_of(key) if key.ndim == 0 else jax.vmap(factors_of)(key)
            return treedef.unflatten(self._combined(leaves, scalars, factors))

    def unchunked(self) -> "WeightPerturbation":
        """The same estimator, whatever memory it may use."""
        return dataclasses.replace(self, chunk=None)

    def _power(
        self, program: Program, key: Key[Array, ""], scales: Scales, tangents: int
    ) -> Float[Array, ""]:
        """The mean square of the losses' change along tangents of these lengths, or of none."""
        scales = {i: scales.get(i, jnp.zeros(())) for i in range(len(program.leaves))}
        plain = dataclasses.replace(self, tangents=tangents, exact_last=False)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            found = plain._along(program, portable(key), scales).found
        return jnp.mean(jnp.square(jnp.sum(found.changes, axis=1)))

    def _measured(
        self, program: Program, key: Key[Array, ""], scales: Scales | None = None
    ) -> "_Measured":
        parts, drawn, factors, found = self._along(program, key, scales)
        changes = [jnp.sum(found.changes[:, sorted(terms)], axis=1) for terms, _ in parts]
        first = [program.leaves[members[0]] for _, members in parts]
        scalars = Scalars(
            program.losses(found.losses).total(),
            tuple(summed_changes(changes, first, program.collectives)),
            {i: rows for i, rows in found.rows.items() if i in factors},
            jax.random.key_data(key),
            drawn,
            self.unchunked(),
        )
        return _Measured(scalars, factors, program.auxiliary(found.aux), found.exact)

    def _along(self, program: Program, key: Key[Array, ""], scales: Scales | None) -> "_Along":
        check_typed(program.collectives, "WeightPerturbation")
        exact = program.of_last_layers() if self.exact_last else []
        if exact:
            check_no_refs(program, "exact_last")
        perturbed = [i for i in range(len(program.leaves)) if i not in exact]
        parts = _partition(program, perturbed)
        drawn = self._to_draw(program, parts)
        factors = self._drawn(program.leaves, drawn, perturbed, key)
        lookups = program.lookups if self.mask_rows else {}
        layouts = [d.layout for d in drawn]
        moved = factors if scales is None else _scaled(layouts, factors, scales)
        found = directional_derivatives(program, layouts, moved, self.chunk, lookups)
        return _Along(parts, drawn, factors, found)

    def _combined(
        self,
        leaves: Sequence[Array],
        scalars: Scalars,
        factors: dict[int, list[Array]],
        scales: Scales | None = None,
    ) -> list[Array]:
        """The gradient that scalars and factors stand for; that of several workers, stacked."""
        stacked = scalars.key.ndim > 1
        weights = functools.partial(self._weights, leaves, scalars.drawn)
        weights = jax.vmap(weights) if stacked else weights
        factors, coefficients = weights(scalars.derivatives, scalars.rows, factors)
        if stacked:
            merged = lambda a: a.reshape(-1, *a.shape[2:])  # noqa: E731
            factors, coefficients = jax.tree.map(merged, (factors, coefficients))
        if scales is not None:
            inverse = {i: 1 / s for i, s in scales.items()}
            factors = _scaled([d.layout for d in scalars.drawn], factors, inverse)
        return [
            jnp.zeros_like(leaf)
            if d.part is None
            else combine_tangents(i, leaf, d.layout, factors[i], coefficients[d.part])
            for i, (leaf, d) in enumerate(zip(leaves, scalars.drawn, strict=True))
        ]

    def _weights(
        self,
        leaves: Sequence[Array],
        drawn: Sequence[Drawn],
        derivatives: Sequence[Array],
        rows: Mapping[int, Array],
        factors: Mapping[int, list[Array]],
    ) -> tuple[dict[int, list[Array]], list[Array]]:
        """The factors without rows that were not looked up, and what each part is multiplied by."""
        factors = dict(factors)
        for i, used in rows.items():
            axis = drawn[i].rows
            assert axis is not None
            factors[i] = masked_rows(drawn[i].layout, factors[i], axis, used)
        coefficients = []
        for part, change in enumerate(derivatives):
            members = [i for i, d in enumerate(drawn) if d.part == part]
            size = sum(_active_size(leaves[i], drawn[i].rows, rows.get(i)) for i in members)
            own = [(drawn[i].layout, factors[i], leaves[i]) for i in members]
            coefficients.append(self._coefficients(change, size, *zip(*own, strict=True)))
        return factors, coefficients

    def _to_draw(
        self, program: Program, parts: Sequence[tuple[frozenset[int], list[int]]]
    ) -> tuple[Drawn, ...]:
        """How the tangents of each parameter are drawn."""
        part_of = {i: part for part, (_, members) in enumerate(parts) for i in members}
        rows, layouts = dict(program.lookups.values()), self._layouts(program)
        return tuple(
            Drawn(
                leaf.shape,
                layouts[i],
                tuple(sorted(varying(leaf) & program.collectives)),
                part_of.get(i),
                rows.get(i),
            )
            for i, leaf in enumerate(program.leaves)
        )

    def _layouts(self, program: Program) -> list[Layout]:
        if self.structure == "dense":
            return [dense_layout(leaf.shape) for leaf in program.leaves]
        return program.layouts()

    def _drawn(
        self,
        leaves: Sequence[Array],
        drawn: Sequence[Drawn],
        perturbed: Sequence[int],
        key: Key[Array, ""],
    ) -> dict[int, list[Array]]:
        """The factors of the parameters at the positions `perturbed`.

        Workers that exchange what they compute draw for themselves what each has of its own.
        """
        groups: dict[tuple[str, ...], list[int]] = {}
        for i in perturbed:
            groups.setdefault(drawn[i].axes, []).append(i)
        factors = {}
        for axes, members in groups.items():
            arrays, chosen = zip(*[(leaves[i], drawn[i].layout) for i in members], strict=True)
            found = self._factors(key_of_worker(key, axes), arrays, chosen)
            factors.update(zip(members, found, strict=True))
        return factors

    def _factors(
        self, key: Key[Array, ""], leaves: Sequence[Array], layouts: Sequence[Layout]
    ) -> list[list[Array]]:
        """The factors of K tangents, one list a parameter; K is the first axis of each."""
        terms = [(self.rank,) if self.rank > 1 and len(layout) > 1 else () for layout in layouts]
        shapes = [
            [(*r, *factor_shape(leaf.shape, f)) for f in layout]
            for leaf, layout, r in zip(leaves, layouts, terms, strict=True)
        ]
        draw = draw_dense if self.structure == "dense" else draw_small
        flat = draw(key, self.tangents, [s for group in shapes for s in group], self.distribution)
        if self.distribution == "sphere":
            flat = self._on_sphere(flat, [f.own for layout in layouts for f in layout])
        remaining = iter(flat)
        factors = []
        for leaf, layout, r in zip(leaves, layouts, terms, strict=True):
            arrays = [next(remaining) for _ in layout]
            if r:
                arrays[0] = arrays[0] * self.rank**-0.5
            factors.append([a.astype(computed_in(leaf.dtype)) for a in arrays])
        return factors

    def _on_sphere(self, flat: list[Array], own: list[tuple[int, ...]]) -> list[Array]:
        if self.structure == "rank-one":
            return [
                to_sphere(z, range(z.ndim - len(o), z.ndim)) for z, o in zip(flat, own, strict=True)
            ]
        squares = sum(jnp.sum(z.reshape(self.tangents, -1) ** 2, axis=1) for z in flat)
        size = sum(z[0].size for z in flat)
        return [jnp.einsum("k,k...->k...", jnp.sqrt(size / squares), z) for z in flat]

    def _coefficients(
        self,
        derivatives: Float[Array, " tangents"],
        active: Any,
        layouts: Sequence[Layout],
        factors: Sequence[Sequence[Array]],
        leaves: Sequence[Array],
    ) -> Float[Array, " tangents"]:
        """What each tangent is multiplied with in the estimate."""
        if self.clip is not None:
            derivatives = jnp.clip(derivatives, -self.clip, self.clip)
        if not self.orthogonal:
            return derivatives / self.tangents
        size = sum(leaf.size for leaf in leaves)
        if self.tangents > size:
            raise InputError(
                f"tangents must be at most the number of parameters ({size}) for orthogonal "
                f"tangents, got {self.tangents}"
            )
        gram = gram_matrix(layouts, factors)
        # Linear algebra knows no half precision.
        derivatives = derivatives.astype(jnp.promote_types(derivatives.dtype, gram.dtype))
        # The pseudo-inverse, because random signs may repeat a tangent of a tiny model.
        projected = jnp.linalg.pinv(gram, hermitian=True) @ derivatives
        return projected * (active / self.tangents)


@explained.register
def _(estimator: WeightPerturbation, fun: Objective, params: PyTree) -> list[ExplainedParameter]:
    program = Program(fun, params)
    layouts = estimator._layouts(program)
    exact = program.of_last_layers() if estimator.exact_last else []
    kinds = ["rank-one" if len(layout) > 1 else "dense" for layout in layouts]
    how = ["exact" if i in exact else kind for i, kind in enumerate(kinds)]
    built = program.built(layouts)
    rows = of_parameters(program, params, how)
    return [
        dataclasses.replace(row, where=tuple(built.get(i, ()))) if row.how == how[i] else row
        for i, row in enumerate(rows)
    ]


def _partition(program: Program, leaves: Sequence[int]) -> list[tuple[frozenset[int], list[int]]]:
    """The sets of terms that the parameters `leaves` influence, each with its parameters.

    Parameters that different workers share are apart.
    """
    influence = program.influence()
    members: dict[Any, list[int]] = {}
    for i in leaves:
        members.setdefault((influence[i], varying(program.leaves[i])), []).append(i)
    return [(terms, leaves) for (terms, _), leaves in members.items() if terms]


def _scaled(
    layouts: Sequence[Layout], factors: Mapping[int, list[Array]], scales: Scales
) -> dict[int, list[Array]]:
    """The factors of tangents that are longer by `scales`, 1 where there is none."""
    found = dict(factors)
    for i in scales.keys() & factors.keys():
        first, *others = factors[i]
        shape = (*scales[i].shape, *[1] * len(layouts[i][0].own))
        found[i] = [first * scales[i].reshape(shape).astype(first.dtype), *others]
    return found


class _Along(NamedTuple):
    """Which parameters are perturbed together, how their tangents are drawn, what comes of them.

    The factors are those of tangents as they are drawn, whatever their lengths.
    """

    parts: list[tuple[frozenset[int], list[int]]]
    drawn: tuple[Drawn, ...]
    factors: dict[int, list[Array]]
    found: "Directional"


class _Measured(NamedTuple):
    """The scalars, the factors they were measured with, auxiliary data, and exact gradients."""

    scalars: Scalars
    factors: dict[int, list[Array]]
    aux: Any
    exact: dict[int, Array]


class Directional(NamedTuple):
    """What a program computes, and how it changes along tangents.

    `changes[k, t]` is the derivative of the sum of term t along tangent k. `exact` has the exact
    gradient by the parameters that are not perturbed, and `rows`, for parameters that are looked up
    in, which rows are used.
    """

    losses: list[Array]
    changes: Float[Array, "tangents terms"]
    aux: list[Array]
    exact: dict[int, Array]
    rows: dict[int, Array]


def directional_derivatives(
    program: Program,
    layouts: Sequence[Layout],
    factors: Mapping[int, Sequence[Array]],
    chunk: int | None = None,
    lookups: Mapping[int, Lookup] | None = None,
) -> Directional:
    """What a program computes, and how it changes along K tangents of some of its parameters.

    `factors` are those of the perturbed parameters by their position; rows are noted at `lookups`
    (None: at all of the program's).
    """
    noted = program.lookups if lookups is None else lookups
    count = len(jax.tree.leaves(factors)[0]) if factors else 1

    def run(stage, number, reads):
        del number
        exact = {i: program.leaves[i] for i in stage.leaves if i not in factors}
        if exact:
            total, pullback, (writes, derivatives, rows) = jax.vjp(
                lambda exact: _along_all(
                    program, layouts, factors, count, stage, exact, reads, chunk, noted
                ),
                exact,
                has_aux=True,
            )
            return writes, (derivatives, pullback(jnp.ones_like(total))[0], rows)
        _, (writes, derivatives, rows) = _along_all(
            program, layouts, factors, count, stage, {}, reads, chunk, noted
        )
        return writes, (derivatives, {}, rows)

    terms, aux, results = program.stage_by_stage(run)
    found = {i: d for derivatives, _, _ in results for i, d in derivatives.items()}
    columns = [found.get(i, jnp.zeros(count)) for i in range(program.terms)]
    grads = {i: g for _, of_stage, _ in results for i, g in of_stage.items()}
    rows: dict[int, Array] = {}
    for _, _, of_stage in results:
        for i, of_worker in of_stage.items():
            used = summed_change(of_worker.astype(int), program.leaves[i], frozenset()) > 0
            rows[i] = used | rows[i] if i in rows else used
    return Directional(terms, jnp.stack(columns, axis=1), aux, grads, rows)


def _active_size(leaf: Array, axis: int | None, used: Array | None) -> Any:
    """The number of a parameter's entries that the losses can depend on."""
    if axis is None or used is None:
        return leaf.size
    return jnp.sum(used) * (leaf.size // leaf.shape[axis])


def _along_all(
    program: Program,
    layouts: Sequence[Layout],
    factors: Mapping[int, Sequence[Array]],
    count: int,
    stage: Stage,
    exact: Mapping[int, Array],
    reads: Sequence[Any],
    chunk: int | None,
    lookups: Mapping[int, Lookup],
) -> tuple[Array, tuple[list[Array], dict[int, Array], dict[int, Array]]]:
    """The sum of a stage's losses; all that it computes, its terms' derivatives, and rows used."""
    places = program.terms_of(stage)

    def along(factors, pure=False):
        jaxpr = stage.without_effects() if pure else stage.jaxpr

        def at(eps):
            weights = [
                perturbed(i, program.leaves[i], layouts[i], factors[i])
                if i in factors
                else exact[i]
                for i in stage.leaves
            ]
            walk = Walk(eps, single=count == 1, lookups=lookups)
            writes = walk.arrays(jaxpr, (), [*weights, *reads])
            sums = {i: total_of(writes[place]) for i, place in places.items()}
            return sums, (writes, walk.rows)

        zero, one = jnp.zeros(()), jnp.ones(())
        sums, derivatives, (writes, rows) = jax.jvp(at, (zero,), (one,), has_aux=True)
        return (sum(sums.values(), start=jnp.zeros(())), writes, rows), derivatives

    (total, writes, rows), derivatives = over_tangents(along, dict(factors), count, program, chunk)
    return total, (writes, derivatives, rows)


def gram_matrix(
    layouts: Sequence[Layout], factors: Sequence[Sequence[Array]]
) -> Float[Array, "tangents tangents"]:
    """The scalar products of K tangents over all parameters, from their factors."""
    grams = [_gram(layout, arrays) for layout, arrays in zip(layouts, factors, strict=True)]
    return jnp.sum(jnp.stack(grams), axis=0)


def _gram(layout: Layout, arrays: Sequence[Array]) -> Float[Array, "tangents tangents"]:
    product: Any = 1.0
    for shape, a in zip(layout, arrays, strict=True):
        own = a.ndim - len(shape.own)
        bounds = (1, own - len(shape.stacked), own, a.ndim)
        # Axes: tangents, terms of the tangent, slices of a stack, entries.
        sizes = [math.prod(a.shape[i:j]) for i, j in itertools.pairwise(bounds)]
        a = a.reshape(a.shape[0], *sizes).astype(jnp.float32)
        product = product * jnp.einsum("krsi,lqsi->klrqs", a, a)
    return jnp.sum(product, axis=(2, 3, 4))
