"""What happens to a weight before its product: its tangent stays a product of factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad.rewrite._perturbed import Factor
from helpers import directional, dot, size

X = jax.random.normal(jax.random.key(0), (6, 12))
MASK = jnp.tril(jnp.ones((12, 12)))
FROZEN = jax.random.normal(jax.random.key(1), (12, 12)) / 4
KEYS = jax.random.split(jax.random.key(2), 4000)


def square(n, scale=0.3, key=3):
    return scale * jax.random.normal(jax.random.key(key), (n, n))


def adapter():
    a, b = (jax.random.normal(jax.random.key(i), s) / 3 for i, s in ((4, (12, 2)), (5, (2, 12))))
    return {"A": a, "B": b}


WEIGHTS = {
    "masked": (lambda w: w * MASK, square(12)),
    "selected": (lambda w: jnp.where(MASK > 0, w, 0), square(12)),
    "selected from two": (
        lambda w: jnp.where(MASK > 0, w["v"], w["w"]),
        {"v": square(12), "w": square(12, key=9)},
    ),
    "divided": (lambda w: w / jnp.arange(1.0, 13), square(12)),
    "shifted": (lambda w: FROZEN + w, square(12)),
    "taken away": (lambda w: FROZEN - w, square(12)),
    "sum of two": (
        lambda w: w["v"] + w["w"] - w["v"].T,
        {"v": square(12), "w": square(12, key=9)},
    ),
    "adapter": (lambda w: FROZEN + w["A"] @ w["B"], adapter()),
    "product with itself": (lambda w: w @ w.T, square(12)),
    "complex scale": (lambda w: ((1 + 2j) * w).real * 0.5 + (1j * w).imag, square(12)),
    "complex phases": (lambda w: (w * jnp.exp(1j * jnp.arange(12.0))).real, square(12)),
}


@pytest.mark.parametrize("estimator", [fg.WeightPerturbation(), fg.WeightPerturbation(rank=2)])
@pytest.mark.parametrize("case", WEIGHTS)
def test_derivatives_along_the_tangents(case, estimator):
    make, w = WEIGHTS[case]

    def fun(w):
        return jnp.mean(jnp.tanh(X @ make(w)) ** 2)

    @jax.jit
    def both(w):
        found = directional(fun, w, estimator, jax.random.key(6))
        along = jax.tree.map(lambda v: v[0], found.tangents)
        return found.derivatives[0], jax.jvp(fun, (w,), (along,))[1]

    np.testing.assert_allclose(*both(w), rtol=1e-4)


def test_an_adapter_is_perturbed_by_its_own_factors():
    make, w = WEIGHTS["adapter"]
    rows = fg.explain(lambda w: jnp.sum(X @ make(w)), fg.WeightPerturbation(), w).rows
    assert [(row.path, row.how, row.where) for row in rows] == [
        ("['A']", "rank-one", ()),
        ("['B']", "rank-one", ()),
    ]


def flops(fun, *args):
    return jax.jit(fun).lower(*args).compile().cost_analysis()["flops"]


def test_a_function_with_its_own_rule_takes_the_factors():
    """A layer solved for, with the derivative of the solution: no product with a dense tangent."""
    x = jax.random.normal(jax.random.key(0), (64, 128))
    w = jax.random.normal(jax.random.key(1), (128, 128)) / 40

    @jax.custom_jvp
    def fixed_point(x, w):
        return jax.lax.fori_loop(0, 30, lambda _, z: jnp.tanh(z @ w + x), jnp.zeros_like(x))

    @fixed_point.defjvp
    def rule(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        z = fixed_point(x, w)
        slope = 1 - jnp.tanh(z @ w + x) ** 2
        change = slope * (z @ dw + dx)
        return z, jax.lax.fori_loop(0, 30, lambda _, d: change + slope * (d @ w), change)

    def loss(w):
        return jnp.mean(fixed_point(x, w) ** 2)

    @jax.jit
    def derivatives(w):
        found = directional(loss, w, fg.WeightPerturbation(), jax.random.key(6))
        return found.derivatives[0], jax.jvp(loss, (w,), (found.tangents[0],))[1]

    np.testing.assert_allclose(*derivatives(w), rtol=1e-4)
    (row,) = fg.explain(loss, fg.WeightPerturbation(), w).rows
    assert row.how == "rank-one"
    both = [
        flops(lambda w, e=e: fg.value_and_grad(loss, e)(w, key=jax.random.key(0)), w)
        for e in (fg.WeightPerturbation(), fg.WeightPerturbation(structure="dense"))
    ]
    # XLA counts a loop's body once: of four products, the dense tangent's own is left out.
    assert both[0] < 0.78 * both[1]


IDS = jnp.array([[1, 5, 9], [2, 5, 7]])


def looked_up(p):
    return jnp.sum(((p["tokens"][IDS] + p["places"][:3]).mean(1) @ p["out"]) ** 2)


TABLES = {
    "tokens": jax.random.normal(jax.random.key(0), (40, 4)),
    "places": jax.random.normal(jax.random.key(1), (20, 4)),
    "out": jax.random.normal(jax.random.key(2), (4, 2)),
}


@pytest.mark.parametrize(
    "estimator",
    [
        fg.WeightPerturbation(),
        fg.WeightPerturbation(tangents=3, rank=2),
        fg.WeightPerturbation(structure="dense"),
        fg.WeightPerturbation(tangents=4, orthogonal=True),
    ],
    ids=["one", "three of rank two", "dense", "orthogonal"],
)
def test_rows_that_are_not_looked_up_get_no_noise(estimator):
    gradient = jax.jit(
        jax.vmap(lambda k: fg.value_and_grad(looked_up, estimator)(TABLES, key=k)[1])
    )
    drawn, exact = jax.tree.map(np.asarray, (gradient(KEYS), jax.grad(looked_up)(TABLES)))
    for name in ("tokens", "places"):
        unused = np.all(exact[name] == 0, axis=1)
        assert unused.sum() > 10
        assert not np.any(drawn[name][:, unused])
    for name, leaf in drawn.items():
        mean, error = leaf.mean(0), leaf.std(0) / len(KEYS) ** 0.5
        assert np.all(np.abs(mean - exact[name]) <= 5 * error + 1e-5)


def test_one_tangent_s_identity_counts_the_rows_that_are_used():
    value, g = fg.value_and_grad(looked_up, fg.WeightPerturbation())(TABLES, key=KEYS[0])
    del value
    used = (5 + 3 + 2) * 4  # five tokens, three places, and the output layer
    assert used < size(TABLES)
    np.testing.assert_allclose(used * dot(jax.grad(looked_up)(TABLES), g), dot(g, g), rtol=1e-4)


@pytest.mark.parametrize(
    "use",
    [
        lambda t: jnp.sum((t[IDS] @ t.T) ** 2),
        lambda t: jnp.sum(t[IDS]) + jnp.sum(t**2),
        lambda t: jnp.sum(jax.lax.scan(lambda h, i: (h + t[i], None), jnp.zeros(4), IDS[0])[0]),
        lambda t: jnp.sum(t[IDS, 1]),
    ],
    ids=["tied", "decayed", "in a loop", "entries"],
)
def test_a_table_that_is_used_otherwise_is_perturbed_whole(use):
    table = TABLES["tokens"]
    fun = lambda t: jnp.sin(0.01 * use(t))  # noqa: E731
    _, g = jax.jit(fg.value_and_grad(fun, fg.WeightPerturbation()))(table, key=KEYS[0])
    assert np.all(np.asarray(g) != 0)
    exact = jax.jit(jax.grad(fun))(table)
    np.testing.assert_allclose(table.size * dot(exact, g), dot(g, g), rtol=1e-3)


# Tangents in chunks, and one after another


def two_layers(w):
    return jnp.mean(jnp.tanh(X @ w["v"]) @ w["w"])


PAIR = {"v": square(12), "w": square(12, key=9)}


@pytest.mark.parametrize(
    ("kind", "chunk"),
    [(kind, c) for kind in (fg.WeightPerturbation, fg.ActivityPerturbation) for c in (1, 2, 3, 9)],
)
def test_chunks_change_nothing(kind, chunk):
    whole, parts = kind(tangents=5), kind(tangents=5, chunk=chunk)
    expected = jax.jit(fg.value_and_grad(two_layers, whole))(PAIR, key=KEYS[0])
    found = jax.jit(fg.value_and_grad(two_layers, parts))(PAIR, key=KEYS[0])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_chunk_that_vmap_refuses_is_taken_one_by_one():
    def experts(w):
        return jnp.sum(jnp.tanh(jax.lax.ragged_dot(X, w, jnp.array([5, len(X) - 5], jnp.int32))))

    w = jnp.stack([PAIR["v"], PAIR["w"]])
    expected, found = (
        fg.value_and_grad(experts, fg.WeightPerturbation(tangents=5, chunk=c))(w, key=KEYS[0])[1]
        for c in (1, 2)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def largest(jaxpr):
    """The number of entries of the largest array that a program computes."""
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "size")]
    for eqn in jaxpr.eqns:
        for param in eqn.params.values():
            if hasattr(param, "jaxpr"):
                sizes.append(largest(param.jaxpr))
    return max(sizes, default=0)


@pytest.mark.parametrize(("chunk", "at_once"), [(None, 32), (4, 4), (1, 1)])
def test_chunks_bound_what_is_computed_at_once(chunk, at_once):
    def loss(w):
        return jnp.mean(jnp.tanh(jnp.tanh(jnp.ones((500, 8)) @ w) @ w) ** 2)

    step = fg.value_and_grad(loss, fg.WeightPerturbation(tangents=32, chunk=chunk))
    program = jax.make_jaxpr(lambda w: step(w, key=KEYS[0]))(jnp.ones((8, 8))).jaxpr
    assert largest(program) == at_once * 500 * 8


def test_tracing_takes_as_long_for_many_tangents_as_for_some(monkeypatch):
    """No factor is taken apart tangent by tangent but for the few that are added one by one."""
    taken, at = [], Factor.at
    monkeypatch.setattr(Factor, "at", lambda *args: (taken.append(args), at(*args))[1])
    step = fg.value_and_grad(lambda w: jnp.sum(w**2), fg.WeightPerturbation(tangents=10**9))
    jax.eval_shape(lambda w, key: step(w, key=key), jnp.ones((3, 2)), jax.random.key(0))
    assert not taken


@pytest.mark.parametrize("chunk", [0, -1, 1.5])
@pytest.mark.usefixtures("unchecked")
def test_a_chunk_that_holds_no_tangents(chunk):
    for kind in (fg.WeightPerturbation, fg.ActivityPerturbation):
        with pytest.raises(fg.InputError, match="chunk must be an integer of at least 1"):
            kind(tangents=2, chunk=chunk)


def test_effects_that_would_be_repeated_are_refused():
    from jax.experimental import io_callback

    def fun(w):
        kept = io_callback(
            lambda a: np.asarray(a), jax.ShapeDtypeStruct((), jnp.float32), X[0, 0], ordered=True
        )

        def body(c):
            return c[0] + 1, jnp.tanh(c[1] @ w) + kept

        return jnp.mean(jax.lax.while_loop(lambda c: c[0] < 3, body, (0, X))[1])

    with pytest.raises(fg.InputError, match="would happen once for each tangent"):
        fg.value_and_grad(fun, fg.WeightPerturbation(tangents=3, chunk=1))(PAIR["v"], key=KEYS[0])
