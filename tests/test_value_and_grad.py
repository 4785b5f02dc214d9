import gc
import os
import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import forwardgrad as fg
from helpers import ESTIMATORS, PROBLEMS

FG_W = fg.WeightPerturbation()


@pytest.fixture(params=ESTIMATORS)
def estimator(request):
    return ESTIMATORS[request.param]


@pytest.fixture
def key():
    return jax.random.key(0)


def quadratic(w, x=1.0):
    return sum(jnp.sum((x * leaf).astype(jnp.float32) ** 2) for leaf in jax.tree.leaves(w))


def fails(*words: str):
    """A context that must raise an `InputError`, of one line that has these words."""
    return pytest.raises(fg.InputError, match=".*".join(words))


# Every estimator


@pytest.mark.parametrize("problem", PROBLEMS)
def test_conformance(estimator, problem, key):
    """The gradient looks like the parameters, is compiled once, and leads downhill."""
    problem = PROBLEMS[problem]()
    traces = 0

    def fun(*args):
        nonlocal traces
        traces += 1
        return problem.fun(*args)

    optimiser = optax.adam(0.02)

    @jax.jit
    def step(params, state, key):
        value, grads = fg.value_and_grad(fun, estimator)(params, *problem.args, key=key)
        updates, state = optimiser.update(grads, state, params)
        return value, grads, optax.apply_updates(params, updates), state

    params, state = problem.params, optimiser.init(problem.params)
    first = problem.fun(params, *problem.args)
    for i in range(300):
        value, grads, params, state = step(params, state, jax.random.fold_in(key, i))
        if i == 0:
            np.testing.assert_allclose(value, first, rtol=1e-6)
            assert jax.tree.structure(grads) == jax.tree.structure(params)
            for g, p in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
                assert (g.shape, g.dtype) == (p.shape, p.dtype)
    assert traces == 1
    assert step._cache_size() <= 1  # none where JAX takes the slower path to it
    assert problem.fun(params, *problem.args) < 0.5 * first


def test_precisions_and_shapes(estimator, key):
    params = {
        "half": jnp.ones((3, 2), jnp.bfloat16),
        "short": [jnp.ones((2, 2, 1), jnp.float16)],
        "none": None,
        "row": jnp.ones((1, 4)),
        "scalar": jnp.float32(2.0),
        "empty": jnp.zeros((0, 3)),
    }

    def fun(p):
        x = jnp.ones((5, 3), jnp.bfloat16) @ p["half"]
        return jnp.mean(x.astype(jnp.float32)) + quadratic(p)

    value, grads = jax.jit(fg.value_and_grad(fun, estimator))(params, key=key)
    assert value.dtype == jnp.float32
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for g, p in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert (g.shape, g.dtype) == (p.shape, p.dtype)
        assert jnp.all(jnp.isfinite(g))


def test_double_precision(estimator, key):
    with jax.enable_x64(True):
        params = {"W": jnp.ones((3, 2), jnp.float64), "b": jnp.ones(2, jnp.float32)}
        fun = lambda p: jnp.sum(jnp.sin(p["W"] * p["b"]))  # noqa: E731
        value, grads = jax.jit(fg.value_and_grad(fun, estimator))(params, key=key)
        np.testing.assert_allclose(value, 6 * np.sin(1.0), rtol=1e-14)
        assert (grads["W"].dtype, grads["b"].dtype) == (jnp.float64, jnp.float32)


def test_half_precision_loss(estimator, key):
    params = jnp.ones((3, 2), jnp.bfloat16)
    fun = lambda w: jnp.mean((jnp.ones((4, 3), jnp.bfloat16) @ w) ** 2)  # noqa: E731
    value, grads = jax.jit(fg.value_and_grad(fun, estimator))(params, key=key)
    assert value.dtype == grads.dtype == jnp.bfloat16
    assert jnp.all(jnp.isfinite(grads))


def test_strict_promotion(estimator, key):
    """It asks no more of JAX's settings than the function does."""
    problem = PROBLEMS["convolutions and scan"]()
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), problem.params)

    def fun(params, x, y):
        return problem.fun(jax.tree.map(lambda w: w.astype(jnp.float32), params), x, y)

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        _, grads = jax.jit(fg.value_and_grad(fun, estimator))(half, *problem.args, key=key)
    assert jax.tree.all(jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)), grads))


# The contract of `jax.value_and_grad`


def test_backpropagation_is_exact():
    problem = PROBLEMS["regression"]()
    found = fg.value_and_grad(problem.fun, fg.Backpropagation())(problem.params, *problem.args)
    expected = jax.value_and_grad(problem.fun)(problem.params, *problem.args)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_aux(estimator, key):
    table = np.arange(3)

    def fun(w, x):
        aux = {
            "twice": 2 * w,
            "index": jnp.argmax(w),
            "key": jax.random.key(7),
            "python": 3,
            "text": "words",
            "nothing": None,
            "function": jnp.sin,
            "numpy": table,
        }
        return quadratic(w, x), aux

    w = jnp.array([1.0, 5.0, 2.0])
    (value, aux), grads = fg.value_and_grad(fun, estimator, has_aux=True)(w, 2.0, key=key)
    assert value == 120.0
    assert grads.shape == (3,)
    np.testing.assert_array_equal(aux["twice"], 2 * w)
    assert aux["index"] == 1
    assert aux["index"].dtype == jnp.int32
    assert jnp.all(jax.random.key_data(aux["key"]) == jax.random.key_data(jax.random.key(7)))
    assert (aux["python"], aux["text"], aux["nothing"]) == (3, "words", None)
    assert aux["function"] is jnp.sin
    assert aux["numpy"] is table


def test_aux_under_jit(key):
    fun = lambda w: (quadratic(w), {"w": w, "mean": jnp.mean(w)})  # noqa: E731
    w = jnp.arange(4.0)
    step = jax.jit(fg.value_and_grad(fun, fg.WeightPerturbation(tangents=3), has_aux=True))
    (_, aux), _ = step(w, key=key)
    np.testing.assert_array_equal(aux["w"], w)
    assert aux["mean"] == 1.5


def test_keyword_arguments(estimator, key):
    step = jax.jit(fg.value_and_grad(lambda w, *, scale: quadratic(w, scale), estimator))
    value, _ = step(jnp.ones(3), scale=2.0, key=key)
    assert value == 12.0


def test_numpy_and_python_leaves(estimator, key):
    params = {"numpy": np.ones((2, 3), np.float32), "python": 2.0, "scalar": np.float32(1.0)}
    value, grads = jax.jit(fg.value_and_grad(quadratic, estimator))(params, key=key)
    again, _ = fg.value_and_grad(quadratic, estimator)(params, key=key)
    assert value == again == 11.0
    assert [g.shape for g in jax.tree.leaves(grads)] == [(2, 3), (), ()]
    assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_jit_agrees(estimator, key):
    problem = PROBLEMS["convolutions and scan"]()
    step = fg.value_and_grad(problem.fun, estimator)
    eager = step(problem.params, *problem.args, key=key)
    compiled = jax.jit(step)(problem.params, *problem.args, key=key)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), eager, compiled
    )


def test_vmap(estimator):
    """Over parameters, data and keys, one or all of them."""
    W = jax.random.normal(jax.random.key(1), (3, 4, 2))
    x = jax.random.normal(jax.random.key(2), (3, 5, 4))
    keys = jax.random.split(jax.random.key(3), 3)
    step = fg.value_and_grad(lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2), estimator)

    @jax.jit
    def one(w, x, key):
        return step(w, x, key=key)

    cases = ((0, 0, 0), (None, 0, 0), (0, None, 0), (None, None, 0), (0, 0, None))
    given = [
        [a if axis == 0 else a[0] for a, axis in zip((W, x, keys), axes, strict=True)]
        for axes in cases
    ]

    @jax.jit
    def mapped(given):
        return [jax.vmap(one, axes)(*args) for axes, args in zip(cases, given, strict=True)]

    for axes, args, (values, grads) in zip(cases, given, mapped(given), strict=True):
        for i in range(3):
            single = one(*[a[i] if axis == 0 else a for a, axis in zip(args, axes, strict=True)])
            np.testing.assert_allclose(values[i], single[0], rtol=1e-5)
            np.testing.assert_allclose(grads[i], single[1], rtol=1e-4, atol=1e-5)


def test_scan(estimator):
    """Training in one compiled `scan` takes the steps that a loop takes."""
    keys = jax.random.split(jax.random.key(0), 5)
    step = fg.value_and_grad(quadratic, estimator)

    @jax.jit
    def update(w, key):
        value, grads = step(w, key=key)
        return w - 0.01 * grads, value

    w = jnp.arange(6.0).reshape(2, 3)
    last, values = jax.lax.scan(update, w, keys)
    for key, value in zip(keys, values, strict=True):
        w, expected = update(w, key)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(last, w, rtol=1e-4)


@pytest.mark.parametrize(
    "estimator",
    [fg.Backpropagation(), FG_W, fg.WeightPerturbation(tangents=3, orthogonal=True)],
    ids=repr,
)
def test_no_leaked_tracers(estimator, key):
    problem = PROBLEMS["convolutions and scan"]()
    step = fg.value_and_grad(lambda *args: (problem.fun(*args), args[1]), estimator, has_aux=True)
    gc.freeze()  # Tracers are looked for among all objects: among those made from here on.
    try:
        with jax.checking_leaks():
            jax.jit(step)(problem.params, *problem.args, key=key)
    finally:
        gc.unfreeze()


@pytest.mark.slow
def test_sharding():
    """Sharded parameters and data give the numbers of a single device."""
    code = """
        import jax, jax.numpy as jnp, numpy as np, forwardgrad as fg
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        assert jax.device_count() == 4
        W, x = jnp.ones((8, 4)) * jnp.arange(4) * 0.1, jax.random.normal(jax.random.key(1), (16, 8))
        loss = lambda p, x: jnp.mean(jnp.tanh(x @ p["W"] + p["b"]) ** 2)
        step = jax.jit(fg.value_and_grad(loss, fg.WeightPerturbation(tangents=2)))
        plain = step({"W": W, "b": jnp.zeros(4)}, x, key=jax.random.key(0))
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind))
            put = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, P(*axes)))
            params = {"W": put(W, None, "model"), "b": put(jnp.zeros(4), "model")}
            with jax.set_mesh(mesh):
                sharded = step(params, put(x, "data"), key=jax.random.key(0))
            if kind == AxisType.Explicit:
                assert sharded[1]["W"].sharding.spec == P(None, "model")
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                         plain, sharded)
    """
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        check=True,
    )


@pytest.mark.parametrize(
    "optimiser",
    [
        optax.sgd(0.02),
        optax.sgd(0.005, momentum=0.9, nesterov=True),
        optax.adam(0.02),
        optax.adamw(0.02),
        optax.lion(0.01),
        optax.rmsprop(0.01),
        optax.adafactor(0.05),
        optax.chain(
            optax.clip_by_global_norm(5.0), optax.sgd(optax.cosine_decay_schedule(0.1, 400))
        ),
        optax.MultiSteps(optax.adam(0.05), every_k_schedule=2),
    ],
    ids=lambda _: "",
)
def test_optimisers(optimiser):
    problem = PROBLEMS["regression"]()

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            value, grads = fg.value_and_grad(problem.fun, fg.WeightPerturbation(tangents=4))(
                params, *problem.args, key=key
            )
            updates, state = optimiser.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(jax.random.key(0), 400)
        return jax.lax.scan(step, (params, optimiser.init(params)), keys)[1]

    values = train(problem.params)
    assert jnp.mean(values[-20:]) < 0.5 * values[0]


# What is refused


def test_key_is_missing():
    with fails("key is missing", "WeightPerturbation", "jax.random.key"):
        fg.value_and_grad(quadratic, FG_W)(jnp.ones(2))


def test_key_is_ignored_by_exact_estimators(key):
    step = fg.value_and_grad(quadratic, fg.Backpropagation())
    np.testing.assert_array_equal(step(jnp.ones(2))[1], step(jnp.ones(2), key=key)[1])


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (jnp.arange(3), "int32"),
        (np.arange(3, dtype=np.uint8), "uint8"),
        (3, "3"),
        (True, "True"),
        (jnp.array([True]), "bool"),
        (jnp.ones(2, jnp.complex64), "complex64"),
        (jax.nn.relu, "relu"),
        ("text", "text"),
        (jax.random.key(0), "key"),
    ],
)
def test_leaves_that_are_no_floats(estimator, key, leaf, words):
    with fails(r"params\['a'\]\[1\]", "floating-point", words, "equinox.partition"):
        fg.value_and_grad(lambda p: 0.0, estimator)({"a": [jnp.ones(2), leaf]}, key=key)


def test_parameter_itself_is_no_float(key):
    with fails("params itself", "floating-point", "int32"):
        fg.value_and_grad(lambda p: 0.0, FG_W)(jnp.arange(3), key=key)


def test_whole_equinox_model(key):
    """The commonest mistake: a model with its functions still in it."""
    model = eqx.nn.MLP(2, 1, 4, 1, key=key)
    with fails("params.*activation", "equinox.partition"):
        fg.value_and_grad(lambda m: jnp.sum(m(jnp.ones(2))), FG_W)(model, key=key)


@pytest.mark.parametrize("params", [{}, [], None, ()])
def test_no_parameters(estimator, key, params):
    with fails("params holds no arrays"):
        fg.value_and_grad(lambda p: 0.0, estimator)(params, key=key)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda w: w, r"shape \(2,\)"),
        (lambda w: w[:1], r"shape \(1,\)"),
        (lambda w: jnp.argmax(w), "int32"),
        (lambda w: w[0] > 0, "bool"),
        (lambda w: w[0] * 1j, "complex64"),
        (lambda w: 3, "int32"),
        (lambda w: (w[0], {}), "tuple"),
        (lambda w: None, "None"),
    ],
)
def test_value_is_no_real_scalar(estimator, key, result, words):
    with fails("fun must return a real floating-point scalar", words):
        fg.value_and_grad(result, estimator)(jnp.ones(2), key=key)


@pytest.mark.parametrize("result", [lambda w: w[0], lambda w: (w[0], 1, 2), lambda w: [w[0], 1]])
def test_aux_is_no_pair(estimator, key, result):
    with fails("pair", "has_aux"):
        fg.value_and_grad(result, estimator, has_aux=True)(jnp.ones(2), key=key)


@pytest.mark.parametrize("estimator", [fg.WeightPerturbation, "fg-w", None, optax.sgd(0.1)])
@pytest.mark.usefixtures("unchecked")
def test_not_an_estimator(estimator):
    with fails("estimator must be"):
        fg.value_and_grad(quadratic, estimator)


def test_errors_are_value_errors(key):
    """Who catches `ValueError` catches these."""
    with pytest.raises(ValueError, match="scalar"):
        fg.value_and_grad(lambda w: w, FG_W)(jnp.ones(2), key=key)


def test_constant_function(key):
    """A value that does not depend on the parameters has the gradient zero."""
    for fun in (lambda w: 1.0, lambda w: jnp.float32(2.0), lambda w: jax.lax.stop_gradient(w)[0]):
        value, grads = fg.value_and_grad(fun, fg.WeightPerturbation(tangents=2))(
            jnp.ones(3), key=key
        )
        assert value == fun(jnp.ones(3))
        np.testing.assert_array_equal(grads, np.zeros(3))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bad", [0, "key", jnp.ones(2), jax.random.split(jax.random.key(0), 3)])
@pytest.mark.parametrize("estimator", [fg.WeightPerturbation(), fg.ActivityPerturbation()])
def test_key_is_none(estimator, bad):
    with pytest.raises(fg.InputError, match=r"key must be a single jax\.random\.key"):
        fg.value_and_grad(lambda w: jnp.sum(w**2), estimator)(jnp.ones(3), key=bad)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("terms", "axes", "words"),
    [([], [], "at least one"), ([None], [()], "a NoneType"), (["a"], [()], "a str")],
)
def test_losses_that_are_none(estimator, key, terms, axes, words):
    with pytest.raises(fg.InputError, match=words):
        fg.value_and_grad(lambda w: fg.Losses(terms, axes), estimator)(jnp.ones(3), key=key)


def test_strict_promotion_of_terms(estimator, key):
    """Losses of several types are added up, though arrays of the caller must not be."""

    def fun(w):
        losses = jnp.sum((jnp.tanh(w["a"]) @ w["b"]) ** 2, axis=1)
        terms = [losses, losses.astype(jnp.bfloat16)]
        return fg.Losses(terms, [("example",)] * 2)

    w = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}
    with jax.numpy_dtype_promotion("strict"):
        value, grads = jax.jit(fg.value_and_grad(fun, estimator))(w, key=key)
    assert value.dtype == jnp.float32
    assert all(jnp.all(jnp.isfinite(g)) for g in grads.values())


def test_layers_without_inputs(estimator, key):
    """A width of zero: nothing comes of it, and nothing comes back."""

    def fun(w):
        out = jnp.tanh(jnp.ones((4, 3)) @ w["none"]) @ w["nothing"]
        return jnp.sum((jnp.tanh(jnp.ones((4, 3)) @ w["a"]) @ w["b"] + out) ** 2)

    shapes = {"none": (3, 0), "nothing": (0, 2), "a": (3, 2), "b": (2, 2)}
    w = {name: jnp.ones(shape) for name, shape in shapes.items()}
    grads = jax.jit(fg.value_and_grad(fun, estimator))(w, key=key)[1]
    assert {name: g.shape for name, g in grads.items()} == shapes
    assert all(jnp.all(jnp.isfinite(g)) for g in grads.values())
    assert jnp.any(grads["b"] != 0)
