import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad.estimators._distributions import (
    axis_of_words,
    draw_dense,
    draw_small,
    rademacher,
)
from forwardgrad.rewrite import Program
from helpers import build, directional, dot, size

DISTRIBUTIONS = ("rademacher", "normal", "sphere")
STRUCTURES = ("rank-one", "dense")

SHAPES = {
    "matrix": (4, 3),
    "bias": (3,),
    "kernel": (2, 1, 3),
    "table": (5, 3),
    "blocks": (2, 3, 3),
}
PARAMS = {
    name: 0.7 * jax.random.normal(jax.random.key(i), shape)
    for i, (name, shape) in enumerate(SHAPES.items())
}
D = size(PARAMS)
X = jax.random.normal(jax.random.key(9), (6, 4))
IDS = jnp.array([0, 3, 1, 4, 4, 2])


def loss(params):
    """A product, a shift, a lookup, a grouped convolution and a scan over stacked weights."""
    h = jnp.tanh(X @ params["matrix"] + params["bias"]) + params["table"][IDS]
    h = jax.lax.conv_general_dilated(
        h[None],
        params["kernel"],
        (1,),
        "SAME",
        dimension_numbers=("NHC", "HIO", "NHC"),
        feature_group_count=3,
    )[0]
    h, _ = jax.lax.scan(lambda h, w: (h + jnp.sin(h @ w), None), h, params["blocks"])
    return jnp.mean(h**2)


VALUE, GRADIENT = jax.value_and_grad(loss)(PARAMS)
NORM = dot(GRADIENT, GRADIENT)


def flat(tree) -> np.ndarray:
    """A tree with K stacked entries a leaf as a matrix of K rows."""
    return np.concatenate([np.asarray(a).reshape(len(a), -1) for a in jax.tree.leaves(tree)], 1)


def row(tree) -> np.ndarray:
    """A tree as a vector."""
    return flat(jax.tree.map(lambda g: g[None], tree))[0]


TRUE = row(GRADIENT)


@functools.cache
def estimates(estimator: fg.WeightPerturbation, count: int) -> np.ndarray:
    """Independent gradient estimates, one a row."""
    step = fg.value_and_grad(loss, estimator)
    keys = jax.random.split(jax.random.key(0), count)
    values, grads = jax.jit(jax.vmap(lambda key: step(PARAMS, key=key)))(keys)
    np.testing.assert_allclose(values, VALUE, rtol=1e-5)
    return flat(grads)


def at_once(estimator: fg.WeightPerturbation):
    """From a key to the value, the gradient, and the derivatives with their tangents; compiled."""

    @jax.jit
    def found(key):
        value, grads = fg.value_and_grad(loss, estimator)(PARAMS, key=key)
        return value, grads, directional(loss, PARAMS, estimator, key)

    return found


def test_layouts():
    """The model has a parameter of every kind."""
    program = Program(lambda p: (loss(p), None), PARAMS)
    shapes = dict(zip(sorted(PARAMS), program.layouts(), strict=True))
    factors = {name: [(f.stacked, f.own) for f in layout] for name, layout in shapes.items()}
    assert factors == {
        "matrix": [((), (0,)), ((), (1,))],
        "bias": [((), (0,))],
        "kernel": [((), (0,)), ((), (2,))],
        "table": [((), (0,)), ((), (1,))],
        "blocks": [((0,), (1,)), ((0,), (2,))],
    }


# One tangent: no statistics


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("distribution", ["rademacher", "sphere"])
def test_identities_of_one_tangent(distribution, structure):
    r"""$\langle\nabla f, \hat g\rangle = d^2$ and $\lVert\hat g\rVert^2 = d^2 D$."""
    found = at_once(fg.WeightPerturbation(distribution=distribution, structure=structure))
    for seed in range(5):
        value, grads, along = found(jax.random.key(seed))
        d = along.derivatives[0]
        np.testing.assert_allclose(value, VALUE, rtol=1e-6)
        np.testing.assert_allclose(dot(GRADIENT, grads), d**2, rtol=1e-3)
        np.testing.assert_allclose(dot(grads, grads), d**2 * D, rtol=1e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_clip(structure):
    clipped = 0
    steps = [
        jax.jit(fg.value_and_grad(loss, fg.WeightPerturbation(structure=structure, clip=clip)))
        for clip in (None, 4.0)
    ]
    for seed in range(8):
        free, bounded = (row(step(PARAMS, key=jax.random.key(seed))[1]) for step in steps)
        factor = min(1.0, 4.0 / math.sqrt(np.sum(free**2) / D))
        clipped += factor < 1
        np.testing.assert_allclose(bounded, factor * free, rtol=1e-4, atol=1e-6)
    assert 0 < clipped < 8


def test_clip_bounds_each_tangent():
    _, grads, found = at_once(fg.WeightPerturbation(tangents=5, clip=7.5))(jax.random.key(0))
    d = np.clip(found.derivatives, -7.5, 7.5)
    assert 0 < np.sum(np.abs(found.derivatives) > 7.5) < 5
    np.testing.assert_allclose(row(grads), d @ flat(found.tangents) / 5, rtol=1e-4)


# Several tangents


@pytest.mark.parametrize(
    "estimator",
    [
        fg.WeightPerturbation(tangents=3),
        fg.WeightPerturbation(tangents=20),
        fg.WeightPerturbation(tangents=3, rank=3),
        fg.WeightPerturbation(tangents=7, rank=4, distribution="sphere"),
        fg.WeightPerturbation(tangents=3, structure="dense", distribution="normal"),
        fg.WeightPerturbation(rank=5),
        fg.WeightPerturbation(rank=40),
    ],
    ids=repr,
)
def test_mean_of_single_tangents(estimator):
    r"""$\hat g = K^{-1} \sum_k d_k v_k$, whether the sum is unrolled or a product."""
    key, count = jax.random.key(3), estimator.tangents
    _, grads, found = at_once(estimator)(key)
    for k in range(min(count, 3)):
        single = jax.jit(lambda key, k=k: directional(loss, PARAMS, estimator, key, keep=[k]))(key)
        np.testing.assert_allclose(
            single.derivatives[0], found.derivatives[k], rtol=1e-3, atol=1e-5
        )
        np.testing.assert_allclose(flat(single.tangents)[0], flat(found.tangents)[k], rtol=1e-6)
    tangents = flat(found.tangents)
    np.testing.assert_allclose(found.derivatives, tangents @ TRUE, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        row(grads),
        np.asarray(found.derivatives) @ tangents / count,
        rtol=1e-4,
        atol=1e-5,
    )


ORTHOGONAL = [
    fg.WeightPerturbation(tangents=8, orthogonal=True),
    fg.WeightPerturbation(tangents=8, orthogonal=True, rank=2),
    fg.WeightPerturbation(tangents=8, orthogonal=True, distribution="normal"),
    fg.WeightPerturbation(tangents=8, orthogonal=True, structure="dense", distribution="sphere"),
    fg.WeightPerturbation(tangents=24, orthogonal=True),
]


@pytest.mark.parametrize("estimator", ORTHOGONAL, ids=repr)
def test_orthogonal_is_the_projection(estimator):
    """The gradient projected on the span of the tangents, times D/K."""
    _, grads, along = at_once(estimator)(jax.random.key(5))
    tangents = flat(along.tangents).astype(np.float64)
    basis, _ = np.linalg.qr(tangents.T)
    expected = D / estimator.tangents * basis @ (basis.T @ TRUE)
    found = row(grads)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.max(np.abs(expected)))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_as_many_orthogonal_tangents_as_parameters(structure):
    """They span everything: the gradient is exact."""
    fun = lambda w: jnp.sum(jnp.sin(jnp.arange(12.0).reshape(4, 3) @ w) ** 2)  # noqa: E731
    w = jax.random.normal(jax.random.key(0), (3, 4))
    estimator = fg.WeightPerturbation(
        tangents=12, orthogonal=True, structure=structure, distribution="normal"
    )
    with jax.enable_x64(True):
        _, grads = jax.jit(fg.value_and_grad(fun, estimator))(w, key=jax.random.key(1))
    expected = jax.grad(fun)(w)
    np.testing.assert_allclose(grads, expected, rtol=0.02, atol=0.02 * jnp.max(jnp.abs(expected)))


def test_repeated_tangents():
    """Signs repeat in a tiny model; the span is then smaller, and nothing is divided by zero."""
    estimator = fg.WeightPerturbation(tangents=2, orthogonal=True)
    step = fg.value_and_grad(lambda w: jnp.sum(w * jnp.array([1.0, 3.0])), estimator)
    keys = jax.random.split(jax.random.key(0), 32)
    grads = jax.jit(jax.vmap(lambda key: step(jnp.ones(2), key=key)[1]))(keys)
    exact = jnp.all(jnp.abs(grads - jnp.array([1.0, 3.0])) < 1e-4, axis=1)
    # Parallel tangents: the mean of one.
    one = jnp.isclose(jnp.abs(grads[:, 0]), jnp.abs(grads[:, 1]), rtol=1e-4)
    assert jnp.all(exact | one)
    assert 0 < jnp.sum(exact) < 32


# Many keys

CASES = [
    fg.WeightPerturbation(distribution=distribution, structure=structure, rank=rank)
    for distribution in DISTRIBUTIONS
    for structure, rank in (("rank-one", 1), ("rank-one", 3), ("dense", 1))
] + [
    fg.WeightPerturbation(tangents=5),
    fg.WeightPerturbation(tangents=20, orthogonal=True),
    fg.WeightPerturbation(tangents=20, orthogonal=True, structure="dense"),
]

COUNT = 8192


@pytest.mark.slow
@pytest.mark.parametrize("estimator", CASES, ids=repr)
def test_unbiased(estimator):
    """The mean of 8192 estimates is the gradient within five standard errors everywhere.

    Along the gradient, where the error is some 2 % of its length, within four.
    """
    g = estimates(estimator, COUNT)
    z = (g.mean(0) - TRUE) / (g.std(0) / math.sqrt(COUNT))
    assert np.max(np.abs(z)) < 5
    along = g @ TRUE / np.sum(TRUE**2)
    error = along.std() / math.sqrt(COUNT)
    assert error < 0.025
    assert abs(along.mean() - 1) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        *(
            (fg.WeightPerturbation(distribution=distribution, structure=structure), D - 1)
            for distribution in ("rademacher", "sphere")
            for structure in STRUCTURES
        ),
        (fg.WeightPerturbation(distribution="normal", structure="dense"), D + 1),
        (fg.WeightPerturbation(tangents=5), (D - 1) / 5),
        (fg.WeightPerturbation(tangents=20, orthogonal=True, structure="dense"), D / 20 - 1),
        (fg.WeightPerturbation(tangents=20, orthogonal=True), D / 20 - 1),
    ],
    ids=repr,
)
def test_variance(estimator, expected):
    """In units of the gradient's squared norm, within 10 %."""
    g = estimates(estimator, COUNT)
    variance = np.mean(np.sum((g - TRUE) ** 2, axis=1)) / np.sum(TRUE**2)
    np.testing.assert_allclose(variance, expected, rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", CASES[:9], ids=repr)
def test_tangents_have_unit_covariance(estimator):
    """Over all pairs of entries, of one parameter or of two, within six standard errors."""
    many = fg.WeightPerturbation(
        tangents=COUNT,
        distribution=estimator.distribution,
        structure=estimator.structure,
        rank=estimator.rank,
    )
    program = Program(lambda p: (loss(p), None), PARAMS)
    layouts = many._layouts(program)
    factors = many._factors(jax.random.key(8), program.leaves, layouts)
    v = flat(
        [
            build(*each, leaf.shape)
            for *each, leaf in zip(layouts, factors, program.leaves, strict=True)
        ]
    )
    pairs = v.T @ v / COUNT
    errors = np.sqrt(np.maximum((v**2).T @ v**2 / COUNT - pairs**2, 1e-12) / COUNT)
    deviation = np.abs(pairs - np.eye(D))
    assert np.all(deviation < 6 * errors + 1e-3)
    assert np.max(np.abs(v.mean(0)) / (v.std(0) / math.sqrt(COUNT))) < 5


# The draws


@pytest.mark.parametrize("shape", [(), (1,), (31,), (32,), (33,), (3, 5, 7), (0,), (2, 0)])
def test_rademacher(shape):
    signs = rademacher(jax.random.key(0), shape)
    assert (signs.shape, signs.dtype) == (shape, jnp.float32)
    assert jnp.all(jnp.abs(signs) == 1)


@pytest.mark.parametrize("shape", [(5, 7), (5, 32, 2), (2, 65), (0, 3), (3, 0)])
@pytest.mark.parametrize("axis", [0, 1])
def test_rademacher_along_an_axis(shape, axis):
    """The signs along the axis are those of words, one for each place along the others."""
    words = list(shape)
    words[axis] = -(-shape[axis] // 32)
    drawn = np.asarray(jax.random.bits(jax.random.key(0), words, jnp.uint32))
    expected = np.empty(shape, np.float32)
    for place in np.ndindex(shape):
        word = list(place)
        word[axis], bit = divmod(place[axis], 32)
        expected[place] = -2.0 if drawn[tuple(word)] >> bit & 1 else 2.0
    signs = rademacher(jax.random.key(0), shape, 2.0, axis)
    assert signs.dtype == jnp.float32
    np.testing.assert_array_equal(signs, expected)


@pytest.mark.parametrize(
    ("shape", "cut", "axis"),
    [
        ((64, 32), {0}, 1), ((32, 64), {1}, 0), ((16, 32, 64, 1), {0, 2, 3}, 1), ((8, 16), {0}, 1),
        ((64, 33), {0}, 1), ((64, 4), {0}, None), ((64,), {0}, None), ((), set(), None),
        ((64, 15), set(), 0), ((8, 40, 64), {0}, 2),
    ],
)  # fmt: skip
def test_axis_of_words(shape, cut, axis):
    assert axis_of_words(shape, cut) == axis


@pytest.mark.parametrize("axis", [None, 1])
def test_rademacher_uses_every_bit(axis):
    signs = np.asarray(rademacher(jax.random.key(0), (1000, 32), axis=axis))
    assert np.max(np.abs(signs.mean(0))) < 5 / math.sqrt(1000)
    assert np.max(np.abs(signs.T @ signs / 1000 - np.eye(32))) < 5 / math.sqrt(1000)


@pytest.mark.parametrize("draw", [draw_small, draw_dense])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_draws(draw, distribution):
    shapes = [(3, 4), (), (5,), (1, 1), (0, 2)]
    drawn = draw(jax.random.key(0), 6, shapes, distribution)
    assert [a.shape for a in drawn] == [(6, *shape) for shape in shapes]
    assert {a.dtype for a in drawn} == {jnp.dtype("float32")}
    flattened = np.concatenate([np.ravel(a) for a in drawn])
    if distribution != "rademacher":
        assert len(np.unique(flattened)) == len(flattened)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_sphere(structure):
    """Dense tangents have the squared norm D, factors that of their size."""
    estimator = fg.WeightPerturbation(tangents=4, distribution="sphere", structure=structure)
    tangents = flat(at_once(estimator)(jax.random.key(0))[2].tangents)
    np.testing.assert_allclose(np.sum(tangents**2, axis=1), D, rtol=1e-5)
    norms = np.sum(tangents[:, 3:21].reshape(4, 2, 9) ** 2, axis=2)
    if structure == "rank-one":
        np.testing.assert_allclose(norms, 9, rtol=1e-5)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tangents": 0}, "tangents must be an integer of at least 1, got 0"),
        ({"tangents": -2}, "tangents must be .*-2"),
        ({"tangents": 2.0}, r"tangents must be an integer.*2\.0"),
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": 2, "structure": "dense"}, "rank must be 1 for structure 'dense', got 2"),
        ({"clip": 0.0}, r"clip must be positive or None, got 0\.0"),
        ({"clip": -1}, "clip must be positive or None, got -1"),
        ({"clip": math.nan}, "clip must be positive or None, got nan"),
        ({"distribution": "gaussian"}, "distribution 'gaussian' is unknown.*normal"),
        ({"distribution": "Rademacher"}, "did you mean 'rademacher'"),
        ({"structure": "rank one"}, "structure 'rank one' is unknown; did you mean 'rank-one'"),
        ({"structure": None}, "structure 'None' is unknown"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(arguments, words):
    with pytest.raises(fg.InputError, match=words):
        fg.WeightPerturbation(**arguments)


def test_more_orthogonal_tangents_than_parameters():
    step = fg.value_and_grad(
        lambda w: jnp.sum(w), fg.WeightPerturbation(tangents=5, orthogonal=True)
    )
    with pytest.raises(fg.InputError, match=r"tangents must be at most .*\(4\).* got 5"):
        step(jnp.ones((2, 2)), key=jax.random.key(0))


def test_frozen():
    estimator = fg.WeightPerturbation()
    with pytest.raises(AttributeError):
        estimator.tangents = 3
    assert estimator.needs_key
    assert estimator == fg.WeightPerturbation()
    assert hash(estimator) == hash(fg.WeightPerturbation())
    assert not eqx.filter(estimator, eqx.is_array).tangents
