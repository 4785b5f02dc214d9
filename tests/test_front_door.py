"""The other ways in: `argnums`, Equinox's and Flax NNX's models, estimators with a state."""

import os
import subprocess
import sys
import textwrap
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import forwardgrad as fg
from helpers import ESTIMATORS, PROBLEMS

EXACT = fg.Backpropagation()
FG_W = fg.WeightPerturbation()
FEEDBACK = [fg.FeedbackAlignment(seed=3), fg.DirectFeedbackAlignment(seed=3)]
FEW = [
    EXACT,
    FG_W,
    fg.WeightPerturbation(tangents=3),
    fg.ActivityPerturbation(),
    fg.FeedbackAlignment(),
    fg.DirectFeedbackAlignment(),
]


@pytest.fixture(params=FEW, ids=repr)
def estimator(request):
    return request.param


@pytest.fixture
def key():
    return jax.random.key(0)


def fails(*words: str):
    """A context that must raise an `InputError`, of one line that has these words."""
    return pytest.raises(fg.InputError, match=".*".join(words))


def raw(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def same(found, expected):
    """Trees with the same bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(raw(a), raw(b))


def close(found, expected):
    """Trees with the same numbers, up to rounding."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(raw(a), raw(b), rtol=1e-5, atol=1e-6)


def squares(errors):
    """The mean of squares, by examples."""
    return fg.Losses([jnp.mean(errors**2, axis=1) / len(errors)], [("example",)])


# argnums


def three(a, x, b):
    return jnp.mean((jnp.tanh(x @ a["W"]) @ b["W"] + b["c"]) ** 2)


A = {"W": 0.5 * jax.random.normal(jax.random.key(1), (4, 3))}
B = {"W": jax.random.normal(jax.random.key(2), (3, 2)), "c": jnp.ones(2)}
X = jax.random.normal(jax.random.key(3), (5, 4))


@pytest.mark.parametrize("argnums", [0, 2, -1, -3, (0,), [2], (0, 2), (2, 0), [-1, 0], (2, 1, 0)])
def test_argnums_are_those_of_jax(argnums):
    jaxs = argnums if isinstance(argnums, int) else tuple(argnums)
    found = fg.value_and_grad(three, EXACT, argnums=argnums)(A, X, B)
    close(found, jax.value_and_grad(three, argnums=jaxs)(A, X, B))


def test_argnums_are_one_tree(estimator, key):
    """Several arguments are perturbed as one pytree of them is."""

    def fun(a, x, b):
        return squares(jnp.tanh(x @ a["W"]) @ b["W"] + b["c"])

    found = fg.value_and_grad(fun, estimator, argnums=(2, 0))(A, X, B, key=key)
    one = fg.value_and_grad(lambda p, x: fun(p[1], x, p[0]), estimator)((B, A), X, key=key)
    same(found, one)


def test_other_arguments_are_data():
    """What is differentiated may come last: feedback finds the same layers."""

    def two(x, p):
        return squares(jnp.tanh(x @ p[0]) @ p[1])

    for estimator in FEEDBACK:
        expected = fg.value_and_grad(lambda p, x: two(x, p), estimator)((A["W"], B["W"]), X)
        last = fg.value_and_grad(two, estimator, argnums=1)
        same(last(X, (A["W"], B["W"])), expected)


def test_argnums_with_aux_and_keywords(key):
    def fun(a, x, *, b):
        return three(a, x, b), {"x": x, "b": b}

    step = fg.value_and_grad(fun, FG_W, argnums=(1,), has_aux=True)
    (value, aux), grads = jax.jit(step)(A, X, b=B, key=key)
    np.testing.assert_allclose(value, three(A, X, B), rtol=1e-6)
    assert (len(grads), grads[0].shape) == (1, X.shape)
    same(aux, {"x": X, "b": B})


@pytest.mark.parametrize("argnums", ["0", 0.0, None, (), [0, 0], (0, 1.5), {"a": 1}])
@pytest.mark.parametrize("door", ["value_and_grad", "filter_value_and_grad", "estimation", "nnx"])
@pytest.mark.usefixtures("unchecked")
def test_argnums_that_are_none(argnums, door):
    function = fg.nnx.value_and_grad if door == "nnx" else getattr(fg, door)
    with fails("argnums must be an integer or a sequence"):
        function(three, EXACT, argnums=argnums)


@pytest.mark.parametrize("argnums", [3, -4, (0, 3), (0, -3)])
def test_argnums_out_of_range(argnums):
    with fails("argnums .*positions of different arguments", "called with 3"):
        fg.value_and_grad(three, EXACT, argnums=argnums)(A, X, B)
    with fails("argnums .*positions of different arguments", "called with 3"):
        fg.nnx.value_and_grad(three, EXACT, argnums=argnums)(A, X, B)
    with fails("argnums .*positions of different arguments", "called with 3"):
        fg.filter_value_and_grad(three, EXACT, argnums=argnums)(A, X, B)


def test_errors_name_the_argument():
    with fails(r"argument 1\['n'\] must be a floating-point array, got an int32"):
        fg.value_and_grad(lambda a, b: 0.0, EXACT, argnums=(0, 1))(1.0, {"n": jnp.arange(2)})
    with fails("params and argument 1 hold no arrays"):
        fg.value_and_grad(lambda a, b: 0.0, EXACT, argnums=(0, 1))(None, {})


# Equinox


class Model(eqx.Module):
    network: eqx.nn.MLP
    scale: jax.Array
    steps: jax.Array
    name: str
    table: np.ndarray

    def __init__(self, key):
        self.network = eqx.nn.MLP(4, 2, 8, 1, key=key)
        self.scale, self.steps, self.name = jnp.float32(2.0), jnp.arange(3), "model"
        self.table = np.ones(2, np.float32)

    def __call__(self, x):
        return self.scale * self.network(x) + self.table + self.steps[0]


def model_loss(model, x):
    return squares(jax.vmap(model)(x))


def test_filtered_is_that_of_equinox(key):
    model = Model(key)
    found = fg.filter_value_and_grad(model_loss, EXACT)(model, X)
    close(found, eqx.filter_value_and_grad(lambda *args: model_loss(*args).total())(model, X))
    grads = found[1]
    assert (grads.network.activation, grads.steps, grads.name) == (None, None, None)


def test_filtered_is_partitioned(estimator, key):
    """It does what the split by hand does, bit for bit."""
    model = Model(key)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    by_hand = fg.value_and_grad(lambda p, x: model_loss(eqx.combine(p, static), x), estimator)
    found = fg.filter_value_and_grad(model_loss, estimator)(model, X, key=key)
    same(found, by_hand(params, X, key=key))


def test_filtered_training():
    model = Model(jax.random.key(0))
    optimiser = optax.adam(0.02)
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, key):
        gradient = fg.filter_value_and_grad(model_loss, fg.WeightPerturbation(tangents=4))
        value, grads = gradient(model, X, key=key)
        updates, state = optimiser.update(grads, state)
        return value, eqx.apply_updates(model, updates), state

    first = model_loss(model, X).total()
    for key in jax.random.split(jax.random.key(1), 200):
        _, model, state = step(model, state, key)
    assert model_loss(model, X).total() < 0.3 * first
    assert model.name == "model"


def test_filtered_arguments_and_aux(key):
    """Chosen arguments are filtered, the other ones may be anything."""

    def fun(word, model, other, *, x):
        assert (word, model.name) == ("word", "model")
        return model_loss(model, x).total() + model_loss(other, x).total(), (word, x)

    step = fg.filter_value_and_grad(fun, FG_W, argnums=(1, 2), has_aux=True)
    (_, aux), grads = step("word", Model(key), Model(key), x=X, key=key)
    assert aux[0] == "word"
    structure = jax.tree.structure(eqx.filter(Model(key), eqx.is_inexact_array))
    assert [jax.tree.structure(g) for g in grads] == [structure] * 2


def test_filtered_refuses(key):
    with fails("key is missing"):
        fg.filter_value_and_grad(model_loss, FG_W)(Model(key), X)
    with fails("params holds no arrays"):
        fg.filter_value_and_grad(lambda m: 0.0, EXACT)({"n": 3, "f": jnp.sin})
    with fails("argument called `key`"):
        fg.filter_value_and_grad(lambda model, key=None: 0.0, EXACT)
    with fails("pair", "has_aux"):
        fg.filter_value_and_grad(model_loss, EXACT, has_aux=True)(Model(key), X)


# Flax NNX


class Net(nnx.Module):
    """A linear layer, then everything that changes in a call."""

    def __init__(self, seed=0, norm=nnx.BatchNorm):
        rngs = nnx.Rngs(seed)
        self.inner, self.outer = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
        self.norm, self.drop = norm(8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.drop(nnx.relu(self.norm(self.inner(x)))))


def net_losses(net, x):
    return squares(net(x) - 1)


def net_loss(net, x):
    return net_losses(net, x).total()


@pytest.mark.parametrize("jit", [nnx.jit, lambda f: f], ids=["jit", "eager"])
def test_nnx_state_comes_back(estimator, jit):
    """Value, statistics and counts are those of `nnx.value_and_grad`, call after call."""
    net, reference = Net(), Net()
    before = nnx.clone(net)
    step = jit(fg.nnx.value_and_grad(net_losses, estimator))
    exact = jit(nnx.value_and_grad(net_loss))
    for i in range(3):
        value, grads = step(net, X, key=jax.random.key(i))
        expected, gradient = exact(reference, X)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert jax.tree.structure(grads) == jax.tree.structure(gradient)
        assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads))
        close(nnx.state(net), nnx.state(reference))
        if estimator == EXACT:
            close(grads, gradient)
    assert net.drop.rngs.count[...] == before.drop.rngs.count[...] + 3
    assert not jnp.allclose(net.norm.mean[...], before.norm.mean[...])
    same(nnx.state(net, nnx.Param), nnx.state(before, nnx.Param))


def test_nnx_is_split_and_merged(estimator, key):
    """It does what the split by hand does, bit for bit."""
    net = Net(norm=nnx.LayerNorm)
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def by_hand(params, x):
        return net_losses(nnx.merge(graph, params, rest, copy=True), x)

    expected = fg.value_and_grad(by_hand, estimator)(params, X, key=key)
    same(fg.nnx.value_and_grad(net_losses, estimator)(net, X, key=key), expected)


def test_nnx_training():
    net = Net()
    optimiser = nnx.Optimizer(net, optax.adam(0.02), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimiser, key):
        gradient = fg.nnx.value_and_grad(net_losses, fg.ActivityPerturbation(tangents=4))
        value, grads = gradient(net, X, key=key)
        optimiser.update(net, grads)
        return value

    values = [step(net, optimiser, key) for key in jax.random.split(jax.random.key(0), 200)]
    assert np.mean(values[-20:]) < 0.5 * np.mean(values[:20])


@pytest.mark.parametrize(
    "argnums",
    [
        nnx.DiffState(0, nnx.PathContains("kernel")),
        nnx.DiffState(0, nnx.All(nnx.Param, nnx.PathContains("inner"))),
        [0],
        (0, 1),
        (nnx.DiffState(1, nnx.PathContains("bias")), 0),
        (0, 2),
        2,
    ],
)
def test_nnx_argnums(argnums):
    def fun(one, two, x):
        return net_loss(one, x) + net_loss(two, x) ** 2

    found = fg.nnx.value_and_grad(fun, EXACT, argnums=argnums)(Net(0), Net(1), X)
    close(found, nnx.value_and_grad(fun, argnums=argnums)(Net(0), Net(1), X))


def test_nnx_containers_keywords_and_aux(key):
    """Modules anywhere in arguments and auxiliary data; who comes back is who went in."""
    one, two, rngs = Net(0), Net(1), nnx.Rngs(5)

    def fun(nets, word, *, rngs, x):
        assert word == "word"
        out = nets["one"](x) + nets["rest"][0](x)
        noise = jax.random.normal(rngs(), out.shape)
        aux = {"net": nets["one"], "x": x, "noise": noise, "text": word, "new": nnx.Param(out)}
        return jnp.mean((out + noise) ** 2), aux

    step = fg.nnx.value_and_grad(fun, FG_W, has_aux=True)
    nets = {"one": one, "rest": [two, jnp.ones(2)]}
    (_, aux), grads = step(nets, "word", rngs=rngs, x=X, key=key)
    assert aux["net"] is one
    assert aux["x"] is X
    assert aux["text"] == "word"
    assert aux["new"][...].shape == aux["noise"].shape
    assert (rngs.default.count[...], two.drop.rngs.count[...]) == (1, 1)
    assert jax.tree.structure(grads["one"]) == jax.tree.structure(nnx.state(one, nnx.Param))
    np.testing.assert_array_equal(grads["rest"][1], np.zeros(2))


def test_nnx_structure_may_change(key):
    """What a call adds to a module is there afterwards, as without us."""

    class Grows(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
            self.calls = 0

        def __call__(self, x):
            self.calls += 1
            y = self.linear(x)
            self.extra = nnx.Variable(jnp.sum(y))
            return y

    net, reference = Grows(), Grows()
    fg.nnx.value_and_grad(net_loss, FG_W)(net, X, key=key)
    nnx.value_and_grad(net_loss)(reference, X)
    close(nnx.state(net), nnx.state(reference))
    assert net.calls == reference.calls == 1


def test_nnx_changed_and_differentiated(estimator, key):
    """A parameter that the function changes itself: the gradient is by what it was before."""

    def fun(net, x):
        loss = net_losses(net, x)
        net.outer.bias[...] = net.outer.bias * 0 + 7.0
        return loss

    net, reference = Net(), Net()
    step = fg.nnx.value_and_grad(fun, estimator)
    grads = step(net, X, key=key)[1]
    np.testing.assert_array_equal(net.outer.bias[...], [7.0, 7.0])
    np.testing.assert_array_equal(net.outer.kernel[...], reference.outer.kernel[...])
    unchanged = fg.nnx.value_and_grad(net_losses, estimator)(reference, X, key=key)[1]
    close(grads, unchanged)


def test_nnx_shared_modules(key):
    one, two = Net(0, nnx.LayerNorm), Net(1, nnx.LayerNorm)
    two.inner = one.inner

    def fun(one, two, x):
        return net_loss(one, x) + net_loss(two, x)

    both = fg.nnx.value_and_grad(fun, EXACT, argnums=(0, 1))(one, two, X)
    one, two = Net(0, nnx.LayerNorm), Net(1, nnx.LayerNorm)
    two.inner = one.inner
    close(both, nnx.value_and_grad(fun, argnums=(0, 1))(one, two, X))
    assert two.inner is one.inner
    for argnums in (0, 1, (0, nnx.DiffState(1, nnx.PathContains("outer")))):
        with fails("arguments 0 and 1 share a Param at inner/bias|kernel"):
            fg.nnx.value_and_grad(fun, EXACT, argnums=argnums)(one, two, X)
    # What is not differentiated may be shared.
    two.inner, two.drop = Net(1).inner, one.drop
    fg.nnx.value_and_grad(fun, FG_W)(one, two, X, key=key)
    assert two.drop is one.drop
    assert one.drop.rngs.count[...] == 3  # of its own calls, two of them for both


def test_nnx_variable(key):
    """A variable by itself, and arrays, as arguments."""
    fun = lambda v, w: jnp.sum(v[...] * w)  # noqa: E731
    v, w = nnx.Param(jnp.ones(3)), jnp.arange(3.0)
    found = fg.nnx.value_and_grad(fun, EXACT, argnums=(0, 1))(v, w)
    close(found, nnx.value_and_grad(fun, argnums=(0, 1))(v, w))


def test_nnx_vmap():
    """Over models and keys, as ensembles are trained."""

    @nnx.vmap
    def make(key):
        return Net(key)

    @nnx.jit
    @nnx.vmap
    def step(net, key):
        return fg.nnx.value_and_grad(lambda net: net_losses(net, X), FG_W)(net, key=key)

    nets = make(jax.random.split(jax.random.key(1), 3))
    values, grads = step(nets, jax.random.split(jax.random.key(0), 3))
    assert (values.shape, grads["inner"]["kernel"].shape) == ((3,), (3, 4, 8))
    np.testing.assert_array_equal(nets.drop.rngs.count[...], [1, 1, 1])


def test_nnx_refuses(key):
    with fails("key is missing"):
        fg.nnx.value_and_grad(net_losses, FG_W)(Net(), X)
    with fails("must be a floating-point array, got a uint32 array", "nnx.DiffState"):
        fg.nnx.value_and_grad(net_losses, EXACT, argnums=nnx.DiffState(0, ...))(Net(), X)
    with fails("params holds no arrays"):
        fg.nnx.value_and_grad(net_losses, EXACT, argnums=nnx.DiffState(0, nnx.Cache))(Net(), X)
    with fails("argnums must be an integer or a sequence of different"):
        fg.nnx.value_and_grad(net_losses, EXACT, argnums=(0, nnx.DiffState(0, nnx.Param)))
    with fails("argument called `key`"):
        fg.nnx.value_and_grad(lambda net, key=None: 0.0, EXACT)
    with fails("pair", "has_aux"):
        fg.nnx.value_and_grad(net_losses, EXACT, has_aux=True)(Net(), X)


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_nnx_variables_from_outside(estimator, key, jit, copy):
    """A sentence in the place of Flax's error says what to do, and that works."""
    graph, params, rest = nnx.split(Net(), nnx.Param, ...)

    def fun(params):
        net = nnx.merge(graph, params, rest, copy=copy)
        return net_losses(net, X), nnx.state(net, nnx.BatchStat)

    step = jit(fg.value_and_grad(fun, estimator, has_aux=True))
    if copy:
        (_, stats), _ = step(params, key=key)
        assert jnp.all(stats["norm"]["mean"][...] != 0)
    else:
        with fails("Flax variable", "forwardgrad.nnx.value_and_grad", "copy=True"):
            step(params, key=key)


def run(code, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=True,
        capture_output=True,
        text=True,
        **kwargs,
    ).stdout


@pytest.mark.slow
def test_flax_is_not_imported():
    code = """
        import sys, forwardgrad as fg
        assert not any(name.split(".")[0] == "flax" for name in sys.modules)
        print(callable(fg.nnx.value_and_grad), "flax.nnx" in sys.modules, hasattr(fg, "other"))
    """
    assert run(code) == "True True False\n"


@pytest.mark.slow
def test_flax_is_missing():
    code = """
        import sys
        sys.modules["flax"] = None
        import forwardgrad as fg
        from forwardgrad import *
        try:
            fg.nnx.value_and_grad
        except ImportError as error:
            print(error)
    """
    expected = "forwardgrad.nnx needs Flax, which is not installed: pip install flax\n"
    assert run(code) == expected


# Estimators with a state


def stacked_losses(params, x):
    """Layers one by one, and in a scan."""
    h = jnp.tanh(x @ params["first"])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["stack"])
    return squares(h @ params["last"] - 1)


def stacked_params(width=6):
    keys = jax.random.split(jax.random.key(7), 3)
    shapes = {"first": (4, width), "stack": (3, width, width), "last": (width, 2)}
    made = zip(keys, shapes.items(), strict=True)
    return {name: 0.5 * jax.random.normal(key, shape) for key, (name, shape) in made}


@pytest.mark.parametrize("estimator", FEEDBACK, ids=repr)
@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_kept_feedback_is_drawn_feedback(estimator, jit):
    """The same bits with a state as without, which stays as it is."""
    params = stacked_params()
    without = jit(fg.value_and_grad(stacked_losses, estimator))
    init, step = map(jit, fg.estimation(stacked_losses, estimator))
    state = first = init(params, X)
    for _ in range(3):
        value, grads, state = step(params, X, state=state)
        same((value, grads), without(params, X))
        same(state, first)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) >= 48


def test_step_in_scan(estimator):
    """Training in one compiled `scan`, the state carried, takes the steps without a state."""
    keys = jax.random.split(jax.random.key(0), 5)
    init, step = fg.estimation(stacked_losses, estimator)

    def update(carry, key):
        params, state = carry
        value, grads, state = step(params, X, key=key, state=state)
        return (jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state), value

    params = stacked_params()
    _, values = jax.lax.scan(update, (params, init(params, X)), keys)
    without = jax.jit(fg.value_and_grad(stacked_losses, estimator))
    for key, found in zip(keys, values, strict=True):
        value, grads = without(params, X, key=key)
        np.testing.assert_allclose(found, value, rtol=1e-4)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_a_state(estimator, problem, key):
    problem, estimator = PROBLEMS[problem](), ESTIMATORS[estimator]
    init, step = fg.estimation(problem.fun, estimator)
    state = init(problem.params, *problem.args)
    if not isinstance(estimator, fg.AbstractStatefulEstimator):
        assert state == ()
    *found, after = jax.jit(step)(problem.params, *problem.args, key=key, state=state)
    same(after, state)
    without = jax.jit(fg.value_and_grad(problem.fun, estimator))
    # Programs that are given a state are compiled otherwise than those that make it.
    alike = close if jax.tree.leaves(state) else same
    alike(tuple(found), without(problem.params, *problem.args, key=key))


@pytest.mark.parametrize("estimator", FEEDBACK, ids=repr)
def test_estimation_arguments(estimator):
    def fun(x, params, *, scale):
        return stacked_losses(params, scale * x), {"x": x}

    init, step = fg.estimation(fun, estimator, argnums=(1,), has_aux=True)
    state = init(X, stacked_params(), scale=2.0)
    (value, aux), grads, state = step(X, stacked_params(), scale=2.0, state=state)
    expected = fg.value_and_grad(stacked_losses, estimator)(stacked_params(), 2.0 * X)
    same((value, grads[0]), expected)
    assert aux["x"] is X


@pytest.mark.parametrize("estimator", FEEDBACK, ids=repr)
def test_states_of_others(estimator):
    init, step = fg.estimation(stacked_losses, estimator)
    params = stacked_params()
    kind = type(estimator).__name__
    must = f"state must be the one that init returned for this function and {kind}"
    others = [kind(seed=3) for kind in (fg.FeedbackAlignment, fg.DirectFeedbackAlignment)]
    others += [type(estimator)(seed=4), type(estimator)(seed=3, gain=1.0)]
    for other in others:
        state = fg.estimation(stacked_losses, other).init(params, X)
        if other == estimator:
            step(params, X, state=state)
            continue
        with fails(must, "got that of"):
            step(params, X, state=state)
    for state in ((), None, {}):
        with fails(must, f"got a {type(state).__name__}"):
            step(params, X, state=state)
    with fails(must, "shapes", "are needed"):
        step(params, X, state=init(stacked_params(5), X))
    with fails(must, "shapes", "are needed"):
        fewer = {**params, "stack": params["stack"][:2]}
        step(fewer, X, state=init(params, X))


def test_state_of_what_remembers_nothing(key):
    step = fg.estimation(three, FG_W).step
    for state in (None, [], jnp.ones(2), (1,)):
        with fails(r"state must be \(\)", "WeightPerturbation remembers nothing"):
            step(A, X, B, key=key, state=state)
    with fails("key is missing"):
        step(A, X, B, state=())


class Averaged(fg.AbstractStatefulEstimator):
    """The mean of the gradients so far."""

    @property
    def needs_key(self) -> bool:
        return False

    @property
    def needs_state(self) -> bool:
        return True

    def value_and_grad(self, fun, params, key):
        raise NotImplementedError

    def init(self, fun: Any, params: Any):
        return 0, jax.tree.map(jnp.zeros_like, params)

    def estimate(self, fun, params, key, state):
        (count, total), (result, grads) = state, EXACT.value_and_grad(fun, params, key)
        count, total = count + 1, jax.tree.map(jnp.add, total, grads)
        return result, jax.tree.map(lambda t: t / count, total), (count, total)


def test_state_that_is_needed():
    """It changes from step to step; the doors without one send to the one with it."""
    fun = lambda w, x: jnp.sum(w * x)  # noqa: E731
    init, step = fg.estimation(fun, Averaged())
    w, state = jnp.ones(2), init(jnp.ones(2), 1.0)
    for x, mean in ((1.0, 1.0), (3.0, 2.0), (5.0, 3.0)):
        _, grads, state = jax.jit(step)(w, x, state=state)
        np.testing.assert_array_equal(grads, [mean, mean])
    for door in (fg.value_and_grad, fg.filter_value_and_grad, fg.nnx.value_and_grad):
        with fails("Averaged needs its state", "forwardgrad.estimation"):
            door(fun, Averaged())


@pytest.mark.usefixtures("unchecked")
def test_estimation_refuses(key):
    with fails("estimator must be"):
        fg.estimation(three, "fa")
    with fails("argument called `key`"):
        fg.estimation(lambda w, *, key: 0.0, FG_W)
    with fails("needs an output layer|a loss for every example"):
        fg.estimation(three, FEEDBACK[1]).init(A, X, B)
