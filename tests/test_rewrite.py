import random

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import forwardgrad as fg
from helpers import directional, layouts
from programs import OPERATIONS, WRAPPERS, make, parameters

ONE = fg.WeightPerturbation()
ESTIMATORS = (
    ONE,
    fg.WeightPerturbation(tangents=2, rank=2),
    fg.WeightPerturbation(tangents=2, structure="dense"),
)

# Random programs


def check_program(choose, names=None, depth=2):
    """A program's value and derivatives are those that `jax.jvp` finds along the same tangents."""
    program = make(choose, names, depth)
    estimator = choose(ESTIMATORS)
    with jax.enable_x64(True):
        params = [jnp.asarray(w) for w in parameters(program, seed=1)]
        h = jax.random.normal(jax.random.key(0), program.start, jnp.float64)

        @jax.jit
        def both(params):
            found = directional(lambda p: program(p, h), params, estimator, jax.random.key(1))
            plain = lambda p: program(p, h, plain=True)  # noqa: E731
            along = lambda v: jax.jvp(plain, (params,), (v,))[1]  # noqa: E731
            return found, plain(params), jax.vmap(along)(found.tangents)

        found, value, derivatives = both(params)
    np.testing.assert_allclose(found.value, value, rtol=1e-11)
    # Some of the programs round to single precision on the way.
    np.testing.assert_allclose(found.derivatives, derivatives, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operation(name, seed):
    check_program(random.Random(f"{name} {seed}").choice, [name])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_wrapper(name, seed):
    check_program(random.Random(f"{name} {seed}").choice, [name], depth=0)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=60, phases=[Phase.generate])  # shrinking would compile for minutes
def test_random_program(data):
    check_program(lambda options: data.draw(st.sampled_from(options)))


# Layouts


def conv(dimensions, **options):
    def fun(w):
        x = jnp.ones([{"N": 2, "C": 4}.get(axis, 5) for axis in dimensions[0]])
        return jnp.sum(
            jax.lax.conv_general_dilated(
                x, w, (1,) * (w.ndim - 2), "SAME", dimension_numbers=dimensions, **options
            )
        )

    return fun


X = jnp.ones((5, 4))
IDS = jnp.array([[0, 2], [1, 1]])

LAYOUTS = {
    "weight on the right": (lambda w: jnp.sum(X @ w), (4, 3), [((), (0,)), ((), (1,))]),
    "weight on the left": (lambda w: jnp.sum(w @ X.T), (3, 4), [((), (1,)), ((), (0,))]),
    "transposed": (lambda w: jnp.sum(X @ w.T), (3, 4), [((), (1,)), ((), (0,))]),
    "under vmap": (
        lambda w: jnp.sum(jax.vmap(lambda x: w @ x)(X)),
        (3, 4),
        [((), (1,)), ((), (0,))],
    ),
    "heads": (
        lambda w: jnp.sum(jnp.einsum("be,ehd->bhd", X, w)),
        (4, 2, 3),
        [((), (0,)), ((), (1, 2))],
    ),
    "merged heads": (
        lambda w: jnp.sum(jnp.einsum("bhd,hde->be", X.reshape(5, 2, 2), w)),
        (2, 2, 3),
        [((), (0, 1)), ((), (2,))],
    ),
    "heads by reshape": (
        lambda w: jnp.sum(X @ w.reshape(4, 6)),
        (4, 2, 3),
        [((), (0,)), ((), (1, 2))],
    ),
    "batch axis": (
        lambda w: jnp.sum(jnp.einsum("bei,eio->beo", X.reshape(5, 2, 2), w)),
        (2, 2, 3),
        [((0,), (1,)), ((0,), (2,))],
    ),
    "vector as a matrix": (lambda w: jnp.sum(X @ w), (4,), [((), (0,))]),
    "single column": (lambda w: jnp.sum(X @ w), (4, 1), [((), (0,))]),
    "bias": (lambda w: jnp.sum(X + w), (4,), [((), (0,))]),
    "scalar": (lambda w: jnp.sum(X * w), (), [((), ())]),
    "elementwise": (lambda w: jnp.sum(X * w), (5, 4), [((), (0, 1))]),
    "function of it": (lambda w: jnp.sum(X @ jnp.sin(w)), (4, 3), [((), (0, 1))]),
    "unused": (lambda w: jnp.float32(0.0), (4, 3), [((), (0, 1))]),
    "empty": (lambda w: jnp.sum(w), (0, 3), [((), (0, 1))]),
    "scaled and cast": (
        lambda w: jnp.sum(X.astype(jnp.bfloat16) @ (-0.5 * w).astype(jnp.bfloat16)),
        (4, 3),
        [((), (0,)), ((), (1,))],
    ),
    "convolution HWIO": (
        conv(("NHWC", "HWIO", "NHWC")),
        (3, 3, 4, 2),
        [((), (0, 1, 2)), ((), (3,))],
    ),
    "convolution OIH": (conv(("NCH", "OIH", "NCH")), (2, 4, 3), [((), (1, 2)), ((), (0,))]),
    "grouped convolution": (
        conv(("NHC", "HIO", "NHC"), feature_group_count=2),
        (3, 2, 6),
        [((), (0, 1)), ((), (2,))],
    ),
    "depthwise convolution": (
        conv(("NHWC", "HWIO", "NHWC"), feature_group_count=4),
        (3, 3, 1, 4),
        [((), (0, 1)), ((), (3,))],
    ),
    "embedding": (lambda w: jnp.sum(w[IDS]), (6, 3), [((), (0,)), ((), (1,))]),
    "embedding by columns": (lambda w: jnp.sum(w[:, IDS]), (3, 6), [((), (1,)), ((), (0,))]),
    "embedding under vmap": (
        lambda w: jnp.sum(jax.vmap(jax.vmap(lambda i: w[i]))(IDS)),
        (6, 3),
        [((), (0,)), ((), (1,))],
    ),
    "tied embedding": (lambda w: jnp.sum(w[IDS] @ w.T), (6, 3), [((), (0,)), ((), (1,))]),
    "scanned stack": (
        lambda w: jnp.sum(jax.lax.scan(lambda h, w: (h @ w, None), X, w)[0]),
        (3, 4, 4),
        [((0,), (1,)), ((0,), (2,))],
    ),
    "scanned stack of one": (
        lambda w: jnp.sum(jax.lax.scan(lambda h, w: (h @ w, None), X, w)[0]),
        (1, 4, 4),
        [((), (1,)), ((), (2,))],
    ),
    "scan of a scan": (
        lambda w: jnp.sum(
            jax.lax.scan(lambda h, w: jax.lax.scan(lambda h, w: (h @ w, None), h, w), X, w)[0]
        ),
        (3, 2, 4, 4),
        [((0, 1), (2,)), ((0, 1), (3,))],
    ),
    "constant of a scan": (
        lambda w: jnp.sum(jax.lax.scan(lambda h, _: (h @ w, None), X, None, length=2)[0]),
        (4, 4),
        [((), (0,)), ((), (1,))],
    ),
    "indexed stack": (lambda w: jnp.sum(X @ w[1] @ w[-1]), (3, 4, 4), [((0,), (1,)), ((0,), (2,))]),
    "rematerialised": (
        lambda w: jnp.sum(jax.checkpoint(lambda w: X @ w)(w)),
        (4, 3),
        [((), (0,)), ((), (1,))],
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout(case):
    fun, shape, expected = LAYOUTS[case]
    assert layouts(fun, jnp.ones(shape)) == [tuple(expected)]


def arrays_in(jaxpr):
    """The outputs of all equations that hold no programs, inside of programs too."""
    for eqn in jaxpr.eqns:
        params = [p if isinstance(p, tuple | list) else (p,) for p in eqn.params.values()]
        inner = [p for group in params for p in group if hasattr(p, "eqns")]
        for program in inner:
            yield from arrays_in(getattr(program, "jaxpr", program))
        if not inner:
            yield from (v.aval for v in eqn.outvars)


def large(fun, *args):
    """How many arrays of a weight's size or more the function computes."""
    count = 0
    for aval in arrays_in(jax.make_jaxpr(fun)(*args).jaxpr):
        count += getattr(aval, "size", 0) >= 32 * 32
    return count


S = 32
TOKENS = jnp.ones((2, S))

NEVER_BUILT = {
    "product": (lambda w: jnp.sum(TOKENS @ w), (S, S)),
    "transposed product": (lambda w: jnp.sum(w @ TOKENS.T), (S, S)),
    "under vmap": (lambda w: jnp.sum(jax.vmap(lambda x: w @ x)(TOKENS)), (S, S)),
    "heads": (lambda w: jnp.sum(jnp.einsum("be,ehd->bhd", TOKENS, w)), (S, 4, 8)),
    "merged heads": (
        lambda w: jnp.sum(jnp.einsum("bhd,hde->be", TOKENS.reshape(2, 4, 8), w)),
        (4, 8, S),
    ),
    "slices": (lambda w: jnp.sum(TOKENS @ w[:, :S] @ w[:, S:]), (S, 2 * S)),
    "split": (
        lambda w: sum(jnp.sum(TOKENS @ part) for part in jnp.split(w, 3, axis=1)),
        (S, 3 * S),
    ),
    "flip": (lambda w: jnp.sum(TOKENS @ w[::-1]), (S, S)),
    "scale": (lambda w: jnp.sum(TOKENS @ (-w / 3)), (S, S)),
    "scanned stack": (
        lambda w: jnp.sum(jax.lax.scan(lambda h, w: (h @ w, None), TOKENS, w)[0]),
        (3, S, S),
    ),
    "convolution": (
        lambda w: jnp.sum(
            jax.lax.conv_general_dilated(
                TOKENS.reshape(1, 2, S), w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
            )
        ),
        (3, S, S),
    ),
    "embedding": (lambda w: jnp.sum(w[IDS]), (S, S)),
    "embedding under vmap": (lambda w: jnp.sum(jax.vmap(lambda i: w[i])(IDS[0])), (S, S)),
    "tied embedding": (lambda w: jnp.sum(w[IDS] @ w.T), (S, S)),
    "cond": (
        lambda w: jnp.sum(jax.lax.cond(TOKENS[0, 0] > 0, lambda: TOKENS @ w, lambda: TOKENS)),
        (S, S),
    ),
    "while": (
        lambda w: jnp.sum(
            jax.lax.while_loop(lambda h: jnp.sum(h) < 100, lambda h: h + jnp.sin(h @ w), TOKENS)
        ),
        (S, S),
    ),
}


@pytest.mark.parametrize(
    "estimator",
    [ONE, fg.WeightPerturbation(tangents=3), fg.WeightPerturbation(rank=2)],
    ids=["one", "three", "rank two"],
)
@pytest.mark.parametrize("case", NEVER_BUILT)
def test_tangent_is_never_built(case, estimator):
    """Nothing of a weight's size is computed that the function itself does not compute."""
    fun, shape = NEVER_BUILT[case]
    w = jnp.ones(shape)

    def derivatives(w):
        found = directional(fun, w, estimator, jax.random.key(0), tangents=False)
        return found.value, found.derivatives

    assert large(derivatives, w) <= large(fun, w)


def test_temporary_memory():
    """Directional derivatives for a matrix of 16 MiB take a thousandth of that."""
    n = 2048
    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, n), (4, n)))

    def derivatives(w, x):
        fun = lambda w: jnp.mean(jnp.tanh(x @ w) @ w.T)  # noqa: E731
        estimator = fg.WeightPerturbation(tangents=2)
        return directional(fun, w, estimator, jax.random.key(0), tangents=False).derivatives

    memory = jax.jit(derivatives).lower(w, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * n * n / 16


# Precision


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize(
    ("stored", "used"),
    [
        ("bfloat16", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "bfloat16"),
        ("float16", "float32"),
    ],
)
def test_mixed_precision(stored, used, estimator):
    """The derivative is right to the digits of the less precise type, and dtypes are kept."""
    rng = np.random.default_rng(0)
    params = {
        "W": jnp.asarray(rng.standard_normal((8, 16)), stored),
        "V": jnp.asarray(rng.standard_normal((16, 4)), stored),
        "b": jnp.zeros(16, stored),
    }
    x = jnp.asarray(rng.standard_normal((32, 8)), used)

    def loss(p):
        p = jax.tree.map(lambda w: w.astype(used), p)
        return jnp.mean((jnp.tanh(x @ p["W"] + p["b"]) @ p["V"]).astype(jnp.float32) ** 2)

    found = directional(loss, params, estimator, jax.random.key(0))
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), params)
    tangents = jax.tree.map(lambda v: v.astype(jnp.float32), found.tangents)
    x = x.astype(jnp.float32)
    used = jnp.float32
    exact = jax.vmap(lambda v: jax.jvp(loss, (wide,), (v,))[1])(tangents)
    scale = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(wide))))
    assert found.value.dtype == found.derivatives.dtype == jnp.float32
    np.testing.assert_allclose(found.derivatives, exact, atol=0.05 * scale)


@pytest.mark.parametrize(
    "precision", ["highest", ("default", "highest"), jax.lax.DotAlgorithmPreset.F32_F32_F32]
)
@pytest.mark.parametrize("left", [True, False])
def test_precision_is_kept(precision, left):
    def fun(w):
        y = jnp.dot(w.T, X.T, precision=precision) if left else jnp.dot(X, w, precision=precision)
        return jnp.sum(jnp.sin(y))

    w = jax.random.normal(jax.random.key(0), (4, 3))
    found = directional(fun, w, ONE, jax.random.key(1))
    expected = jax.jvp(fun, (w,), (found.tangents[0],))[1]
    np.testing.assert_allclose(found.derivatives[0], expected, rtol=1e-4)


def test_preferred_element_type():
    x = jnp.arange(20, dtype=jnp.int8).reshape(5, 4)
    w = jax.random.normal(jax.random.key(0), (4, 3), jnp.bfloat16)

    def fun(w):
        y = jax.lax.dot(x, w, preferred_element_type=jnp.float32)
        return jnp.mean(jnp.sin(0.1 * y))

    found = directional(fun, w, ONE, jax.random.key(1))
    expected = jax.jvp(fun, (w,), (found.tangents[0],))[1]
    np.testing.assert_allclose(found.derivatives[0], expected, rtol=1e-2)


# What a program may hold besides


def test_effects(capfd):
    """Prints happen once, and say what the function says."""

    def fun(w):
        jax.debug.print("{} {}", w[0, 0], jnp.sum(w))
        return jnp.sum(jnp.sin(X @ w))

    for estimator in ESTIMATORS:
        capfd.readouterr()
        jax.block_until_ready(
            fg.value_and_grad(fun, estimator)(jnp.ones((4, 3)), key=jax.random.key(0))
        )
        jax.effects_barrier()
        assert set(capfd.readouterr().out.split("\n")) == {"1.0 12.0", ""}


def test_random_numbers_and_closures():
    """Dropout with a key that the function closes over."""
    key = jax.random.key(3)

    def fun(w):
        kept = jax.random.bernoulli(key, 0.5, (5, 3))
        return jnp.sum(jnp.where(kept, jnp.tanh(X @ w), 0))

    w = jax.random.normal(jax.random.key(0), (4, 3))
    found = directional(fun, w, ONE, jax.random.key(1))
    np.testing.assert_array_equal(found.value, fun(w))
    expected = jax.jvp(fun, (w,), (found.tangents[0],))[1]
    np.testing.assert_allclose(found.derivatives[0], expected, rtol=1e-5)


def test_inner_derivatives():
    """A function that differentiates inside, as physics-informed losses do."""

    def fun(w):
        u = lambda t: jnp.sum(jnp.tanh(t * w[0]) @ w[1:])  # noqa: E731
        slopes = jax.vmap(jax.grad(u))(jnp.linspace(0, 1, 5))
        return jnp.mean((slopes - 1) ** 2)

    w = jax.random.normal(jax.random.key(0), (4, 3))
    w = w.at[1:].set(jnp.eye(3))
    found = directional(fun, w, fg.WeightPerturbation(tangents=2), jax.random.key(1))
    expected = jax.vmap(lambda v: jax.jvp(fun, (w,), (v,))[1])(found.tangents)
    np.testing.assert_allclose(found.derivatives, expected, rtol=1e-4)


def test_linear_algebra():
    def fun(w):
        factor = jax.scipy.linalg.cho_factor(w @ w.T + jnp.eye(4))
        return jnp.sum(
            jnp.linalg.solve(w + 4 * jnp.eye(4), jax.scipy.linalg.cho_solve(factor, X.T))
        )

    w = jax.random.normal(jax.random.key(0), (4, 4))
    found = directional(fun, w, fg.WeightPerturbation(tangents=2), jax.random.key(1))
    expected = jax.vmap(lambda v: jax.jvp(fun, (w,), (v,))[1])(found.tangents)
    np.testing.assert_allclose(found.derivatives, expected, rtol=1e-3)


# Models nobody wrote for this


def check_model(fun, params, dense=()):
    """Derivatives agree, and no parameter of two axes or more is dense but the named ones."""
    for estimator in (ONE, fg.WeightPerturbation(tangents=2, rank=2)):

        @jax.jit
        def both(params, estimator=estimator):
            found = directional(fun, params, estimator, jax.random.key(1))
            along = lambda v: jax.jvp(fun, (params,), (v,))[1]  # noqa: E731
            return found, fun(params), jax.vmap(along)(found.tangents)

        found, value, derivatives = both(params)
        np.testing.assert_allclose(found.value, value, rtol=1e-5)
        scale = jnp.max(jnp.abs(derivatives))
        np.testing.assert_allclose(found.derivatives, derivatives, rtol=1e-3, atol=1e-3 * scale)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), layout in zip(leaves, layouts(fun, params), strict=True):
        matrix = leaf.ndim > 1 and leaf.size > max(leaf.shape)
        name = jax.tree_util.keystr(path)
        assert (len(layout) == 2) == (matrix and not any(d in name for d in dense)), name


class EquinoxModel(eqx.Module):
    convolution: eqx.nn.Conv2d
    grouped: eqx.nn.Conv1d
    table: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 7)
        self.convolution = eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0])
        self.grouped = eqx.nn.Conv1d(8, 8, 2, groups=4, key=keys[1])
        self.table = eqx.nn.Embedding(11, 8, key=keys[2])
        self.norm = eqx.nn.LayerNorm(8)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[3])
        self.mlp = eqx.nn.MLP(8, 8, 16, 2, key=keys[4])
        self.cell = eqx.nn.GRUCell(8, 8, key=keys[5])
        self.head = eqx.nn.Linear(8, 5, key=keys[6])

    def __call__(self, image, ids):
        h = jax.nn.relu(self.convolution(image)).reshape(8, -1)
        h = jnp.concatenate([self.grouped(h).T, jax.vmap(self.table)(ids)])
        h = jax.vmap(self.norm)(h)
        h = jax.vmap(self.mlp)(h + self.attention(h, h, h))
        state, _ = jax.lax.scan(lambda s, x: (self.cell(x, s), None), jnp.zeros(8), h)
        return self.head(state)


IMAGES = jax.random.normal(jax.random.key(5), (2, 3, 4, 4))
WORDS = jnp.array([[1, 10, 3], [0, 0, 7]])


def test_equinox():
    params, static = eqx.partition(EquinoxModel(jax.random.key(0)), eqx.is_inexact_array)

    def fun(params):
        return jnp.mean(jax.vmap(eqx.combine(params, static))(IMAGES, WORDS) ** 2)

    check_model(fun, params)


def test_equinox_stack():
    """Layers made by `filter_vmap` and applied by `scan`."""
    make_layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, key=key))
    layers = make_layers(jax.random.split(jax.random.key(0), 3))
    params, static = eqx.partition(layers, eqx.is_inexact_array)

    def fun(params):
        def step(h, layer):
            return jnp.tanh(jax.vmap(eqx.combine(layer, static))(h)), None

        return jnp.mean(jax.lax.scan(step, X, params)[0] ** 2)

    check_model(fun, params, dense=["bias"])


def test_flax():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.convolution = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.norms = nnx.List([nnx.BatchNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)])
            self.attention = nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=rngs)
            self.table = nnx.Embed(11, 8, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(8, 5, rngs=rngs)

        def __call__(self, images, ids):
            h = nnx.relu(self.norms[0](self.convolution(images))).reshape(2, -1, 8)
            h = jnp.concatenate([h, self.table(ids)], axis=1)
            h = self.dropout(h + self.attention(self.norms[1](h)))
            return self.head(h), self.table.attend(h)

    model = Model(nnx.Rngs(0))
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fun(params):
        out, logits = nnx.merge(graph, params, rest)(IMAGES.transpose(0, 2, 3, 1), WORDS)
        return jnp.mean(out**2) + jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    check_model(fun, params, dense=["bias"])
    _, grads = fg.value_and_grad(fun, ONE)(params, key=jax.random.key(0))
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
