"""Workers of a `shard_map`, and sharded weights, for `test_workers.py`: with eight devices.

Gradients of different workers are added up as those of `jax.grad` have to be: along the axes that
they vary along. The sum is compared with the gradient that one device has.
"""

import contextlib
import math
import re
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as S

import forwardgrad as fg

X, Y = (jax.random.normal(jax.random.key(i), (8, n)) for i, n in enumerate((3, 2)))
IDS = jnp.array([0, 1, 1, 2, 0, 3, 3, 2])
SHAPES = {"a": (3, 8), "b": (8, 4), "bias": (4,), "c": (4, 2), "table": (6, 3)}
WEIGHTS = {
    name: 0.5 * jax.random.normal(jax.random.key(7 + i), shape)
    for i, (name, shape) in enumerate(SHAPES.items())
}
RANDOM = {
    "weight": fg.WeightPerturbation(tangents=2),
    "last exact": fg.WeightPerturbation(exact_last=True, structure="dense"),
    "orthogonal": fg.WeightPerturbation(tangents=3, orthogonal=True),
    "activity": fg.ActivityPerturbation(),
    "activity, in chunks": fg.ActivityPerturbation(tangents=4, chunk=2),
}


def network(w, x, ids, before=lambda h: h, product=jnp.matmul):
    h = jnp.tanh(before((x + w["table"][ids]) @ w["a"]))
    return jnp.tanh(product(h, w["b"]) + w["bias"]) @ w["c"]


def squares(out, y):
    return fg.Losses([jnp.sum((out - y) ** 2, axis=1)], [("example",)])


def mean_of(axis):
    return (lambda h: jax.lax.pmean(h, axis)) if axis else (lambda h: h)


# Losses by examples, all of which one device or each worker along `axis` has its share of.


def alone(w, x, y, ids, axis=None):
    del axis
    return squares(network(w, x, ids), y)


def mean_of_all(w, x, y, ids, axis=None):
    return mean_of(axis)(squares(network(w, x, ids), y).total())


def normalised_together(w, x, y, ids, axis=None):
    def normalised(h):
        centred = h - mean_of(axis)(jnp.mean(h, axis=0))
        return centred / jnp.sqrt(0.1 + mean_of(axis)(jnp.mean(centred**2, axis=0)))

    return squares(network(w, x, ids, before=normalised), y)


def contrasted(w, x, y, ids, axis=None):
    z = network(w, x, ids)
    everybody = jax.lax.all_gather(z, axis, tiled=True) if axis else z
    losses = jax.nn.logsumexp(z @ everybody.T, axis=1) - jnp.sum(z * y, axis=1)
    return fg.Losses([losses], [("example",)])


def block_by_block(w, x, y, ids, axis=None):
    h = jnp.tanh((x + w["table"][ids]) @ w["a"])
    first = squares(h[:, :2], y)
    h = jax.lax.stop_gradient(h - mean_of(axis)(jnp.mean(h, axis=0)))
    second = squares(jnp.tanh(h @ w["b"] + w["bias"]) @ w["c"], y)
    return fg.Losses([*first.terms, *second.terms], [("example",)] * 2)


def value(losses):
    return losses.total() if isinstance(losses, fg.Losses) else losses


def total(tree, like=None):
    """The sum of all workers' gradients; those of sharded weights are whole by themselves."""

    def of(grad, spec):
        names = jax.typeof(grad).manual_axis_type.varying - {n for n in spec if n}
        return jax.lax.psum(grad, tuple(names)) if names else grad

    return jax.tree.map(of, tree, like or jax.tree.map(lambda _: S(), tree))


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def assert_unbiased(gradient, expected, name):
    """Within five standard errors in every entry."""
    keys = jax.random.split(jax.random.key(3), 400)
    each = jax.jit(lambda keys: jax.lax.map(lambda k: flat(gradient(k)), keys, batch_size=200))
    drawn = np.asarray(each(keys), float)
    error = drawn.std(0) / np.sqrt(len(drawn)) + 1e-4 * np.abs(expected).max()
    worst = np.max(np.abs(drawn.mean(0) - expected) / error)
    assert worst < 5, f"{name}: {worst:.1f} standard errors"


def data_parallel(fun):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    exact = flat(jax.grad(lambda w: value(fun(w, X, Y, IDS)))(WEIGHTS))
    # Of a mean of what workers have the sum of, a quarter.
    exact = np.asarray(exact / 4 if fun is mean_of_all else exact)
    names = ("weight", "last exact", "activity", "activity, in chunks")
    for own in (False, True):
        for name in names if own else names[:3]:
            estimator = RANDOM[name]

            def step(key, w, x, y, ids, own=own, estimator=estimator):
                key = jax.random.fold_in(key, jax.lax.axis_index("data")) if own else key
                gradient = fg.value_and_grad(lambda w: fun(w, x, y, ids, axis="data"), estimator)
                return total(gradient(w, key=key)[1])

            specs = (S(), S(), S("data"), S("data"), S("data"))
            of_all = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=S())
            of = lambda key, f=of_all: f(key, WEIGHTS, X, Y, IDS)  # noqa: E731
            assert_unbiased(of, exact, f"{fun.__name__}, {name}, {own}")


def sharded_weights():
    """Shards of one weight, by one key for all workers, have tangents of their own."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    places = {**dict.fromkeys(WEIGHTS, S()), "a": S(None, "model"), "b": S("model", None)}
    exact = np.asarray(flat(jax.grad(lambda w: value(alone(w, X, Y, IDS)))(WEIGHTS)))
    product = lambda h, w: jax.lax.psum(h @ w, "model")  # noqa: E731
    for name, estimator in RANDOM.items():

        def step(key, w, x, y, ids, estimator=estimator):
            fun = lambda w: squares(network(w, x, ids, product=product), y).total()  # noqa: E731
            return total(fg.value_and_grad(fun, estimator)(w, key=key)[1], places)

        specs = (S(), places, S("data"), S("data"), S("data"))
        of_all = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=places)
        assert_unbiased(lambda key, f=of_all: f(key, WEIGHTS, X, Y, IDS), exact, name)


def heads_of_workers():
    """Each worker has a head of its own on the same features, before a block that all share."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    weights = {**WEIGHTS, "heads": jax.random.normal(jax.random.key(2), (2, 8, 2))}
    places = {**dict.fromkeys(WEIGHTS, S()), "heads": S("model")}

    def fun(w, x, y, ids, heads):
        h = jnp.tanh((x + w["table"][ids]) @ w["a"])
        first = jnp.sum((jnp.einsum("bi,mio->mbo", h, heads) - y) ** 2, axis=(0, 2))
        h = jax.lax.stop_gradient(h)
        second = jnp.sum((jnp.tanh(h @ w["b"] + w["bias"]) @ w["c"] - y) ** 2, axis=1)
        return fg.Losses([first, second], [("example",)] * 2)

    def of_all_workers(w):
        first, second = fun(w, X, Y, IDS, w["heads"]).terms
        return jnp.sum(first) + 2 * jnp.sum(second)

    exact = jax.grad(of_all_workers)(weights)
    for name, estimator in RANDOM.items():

        def step(key, w, x, y, ids, estimator=estimator):
            losses = lambda w: fun(w, x, y, ids, w["heads"])  # noqa: E731
            return total(fg.value_and_grad(losses, estimator)(w, key=key)[1], places)

        specs = (S(), places, S("data"), S("data"), S("data"))
        of_all = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=places)
        of = lambda key, f=of_all: f(key, weights, X, Y, IDS)  # noqa: E731
        assert_unbiased(of, np.asarray(flat(exact)), name)


def feedback():
    """What has no noise has the same gradient as on one device, with types and without."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    for estimator in (fg.FeedbackAlignment(), fg.DirectFeedbackAlignment()):
        for fun in (alone, block_by_block, normalised_together):
            right = fg.value_and_grad(fun, estimator)(WEIGHTS, X, Y, IDS)[1]
            for typed in (True, False):

                def step(w, x, y, ids, fun=fun, typed=typed, estimator=estimator):
                    gradient = fg.value_and_grad(lambda w: fun(w, x, y, ids, "data"), estimator)
                    grads = gradient(w)[1]
                    return total(grads) if typed else jax.lax.psum(grads, "data")

                specs = (S(), S("data"), S("data"), S("data"))
                of_all = jax.shard_map(
                    step, mesh=mesh, in_specs=specs, out_specs=S(), check_vma=typed
                )
                found = jax.jit(of_all)(WEIGHTS, X, Y, IDS)
                for leaf, own in zip(*map(jax.tree.leaves, (right, found)), strict=True):
                    np.testing.assert_allclose(own, leaf, rtol=1e-3, atol=1e-3)


def feedback_by_shards():
    """Shards of a weight have feedback weights of their own, which together are one weight's."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    places = {**dict.fromkeys(WEIGHTS, S()), "a": S(None, "model"), "b": S("model", None)}

    def step(w, x, y, ids):
        product = lambda h, w: jax.lax.psum(h @ w, "model")  # noqa: E731
        fun = lambda w: squares(network(w, x, ids, product=product), y)  # noqa: E731
        init, gradient = fg.estimation(fun, fg.FeedbackAlignment())
        kept, drawn = (
            gradient(w, state=init(w))[1],
            fg.value_and_grad(fun, fg.FeedbackAlignment())(w)[1],
        )
        arrays = jax.tree.map(lambda a: a[None, None], init(w).arrays)
        return total(kept, places), total(drawn, places), arrays

    specs, outs = (places, S("data"), S("data"), S("data")), (places, places, S("data", "model"))
    of_all = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=outs))
    kept, drawn, shards = of_all(WEIGHTS, X, Y, IDS)
    init, gradient = fg.estimation(alone, fg.FeedbackAlignment())
    state, whole = init(WEIGHTS, X, Y, IDS), {}
    for number, own in state.arrays.items():
        (first, second), others = np.asarray(shards[number])
        np.testing.assert_array_equal([first, second], others)
        cut = [i for i, n in enumerate(own.shape) if n != first.shape[i]]
        assert np.array_equal(first, second) != bool(cut)
        whole[number] = np.concatenate([first, second], axis=cut[0]) if cut else first
    assert sum(whole[n].size for n in whole) == sum(a.size for a in state.arrays.values())
    state = eqx.tree_at(lambda s: s.arrays, state, whole)
    right = gradient(WEIGHTS, X, Y, IDS, state=state)[1]
    for found in (kept, drawn):
        np.testing.assert_allclose(flat(found), flat(right), rtol=1e-3, atol=1e-3)


def feedback_of_workers():
    """Workers with networks of their own have feedback matrices of their own, in DFA too."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    weights = jax.tree.map(lambda a: jnp.stack([a, a]), WEIGHTS)
    for estimator in (fg.FeedbackAlignment(), fg.DirectFeedbackAlignment()):

        def step(w, x, y, ids, estimator=estimator):
            fun = lambda w: alone(jax.tree.map(lambda a: a[0], w), x, y, ids)  # noqa: E731
            arrays = fg.estimation(fun, estimator).init(w).arrays
            return jax.tree.map(lambda a: a[None, None], arrays)

        specs = (S("model"), S("data"), S("data"), S("data"))
        of_all = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=S("data", "model"))
        for of_workers in map(np.asarray, of_all(weights, X, Y, IDS).values()):
            np.testing.assert_array_equal(of_workers[0], of_workers[1])
            assert not np.array_equal(of_workers[0, 0], of_workers[0, 1])


def untyped():
    """Without types activities are still right; that weights may be shared cannot be known."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    exact = jax.grad(lambda w: value(normalised_together(w, X, Y, IDS)))(WEIGHTS)

    def by(estimator, fun):
        def step(key, w, x, y, ids):
            gradient = fg.value_and_grad(lambda w: fun(w, x, y, ids, "data"), estimator)
            return jax.lax.psum(gradient(w, key=key)[1], "data")

        specs = (S(), S(), S("data"), S("data"), S("data"))
        of_all = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=S(), check_vma=False)
        return lambda key: of_all(key, WEIGHTS, X, Y, IDS)

    of = by(fg.ActivityPerturbation(), normalised_together)
    assert_unbiased(of, np.asarray(flat(exact)), "activity")
    exact = jax.grad(lambda w: value(alone(w, X, Y, IDS)))(WEIGHTS)
    assert_unbiased(by(fg.WeightPerturbation(), alone), np.asarray(flat(exact)), "weight")
    with pytest.raises(fg.InputError, match="check_vma"):
        by(fg.WeightPerturbation(), normalised_together)(jax.random.key(0))


def own_tangents():
    """Workers with tangents of their own have one gradient, that of all, with types and without."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    specs = (S(), S(), S("data"), S("data"), S("data"))

    def greedy(w, x, y, ids):
        h = jnp.tanh((x + w["table"][ids]) @ w["a"])
        first = squares(h[:, :2], y)
        second = squares(jnp.tanh(jax.lax.stop_gradient(h) @ w["b"] + w["bias"]) @ w["c"], y)
        return fg.Losses([*first.terms, *second.terms], [("example",)] * 2)

    one, three = fg.WeightPerturbation(), fg.WeightPerturbation(tangents=3, mask_rows=False)
    for inner, fun, typed in ((one, alone, True), (three, greedy, True), (one, greedy, False)):
        estimator = fg.WorkerTangents(inner, "data")

        def step(key, w, x, y, ids, fun=fun, estimator=estimator):
            gradient = fg.value_and_grad(lambda w: fun(w, x, y, ids), estimator)
            return gradient(w, key=key)[1]

        of_all = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=S(), check_vma=typed)
        of = lambda key, f=of_all: f(key, WEIGHTS, X, Y, IDS)  # noqa: E731
        exact = np.asarray(flat(jax.grad(lambda w, f=fun: value(f(w, X, Y, IDS)))(WEIGHTS)))
        assert_unbiased(of, exact, f"{fun.__name__}, {typed}")
        # It is the sum of what each worker would have by itself.
        key, total = jax.random.key(5), jax.tree.map(jnp.zeros_like, WEIGHTS)
        for i in range(4):
            part = [a[2 * i : 2 * i + 2] for a in (X, Y, IDS)]
            alone_with = fg.value_and_grad(lambda w: fun(w, *part), inner)  # noqa: B023
            grads = jax.jit(alone_with)(WEIGHTS, key=jax.random.fold_in(key, i))[1]
            total = jax.tree.map(jnp.add, total, grads)
        np.testing.assert_allclose(flat(jax.jit(of)(key)), flat(total), rtol=1e-3, atol=1e-3)


def halves():
    """The first half of an estimate by workers, the second by one device alone."""
    key = jax.random.key(3)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    for name in ("weight", "orthogonal"):
        estimator = RANDOM[name]
        for fun in (alone, normalised_together):

            def whole(w, x, y, ids, estimator=estimator, fun=fun):
                return fg.value_and_grad(fun, estimator)(w, x, y, ids, "data", key=key)[1]

            def measured(w, x, y, ids, estimator=estimator, fun=fun):
                found = fg.directional_derivatives(fun, estimator)(w, x, y, ids, "data", key=key)
                return eqx.tree_at(lambda s: s.value, found, jax.lax.psum(found.value, "data"))

            specs = (S(), S("data"), S("data"), S("data"))
            given = (WEIGHTS, X, Y, IDS)
            grads = jax.jit(jax.shard_map(whole, mesh=mesh, in_specs=specs, out_specs=S()))(*given)
            measure = jax.shard_map(measured, mesh=mesh, in_specs=specs, out_specs=S())
            scalars = jax.device_get(jax.jit(measure)(*given))
            found = jax.jit(lambda s: fg.apply_scalars(estimator, WEIGHTS, key, s))(scalars)  # noqa: B023
            for a, b in zip(*map(jax.tree.leaves, (grads, found)), strict=True):
                np.testing.assert_array_equal(a, b)


def refused():
    """What workers with own tangents cannot do, in a sentence."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def by(axis, fun):
        def step(w, x, y, ids):
            estimator = fg.WorkerTangents(fg.WeightPerturbation(), axis)
            gradient = fg.value_and_grad(lambda w: fun(w, x, y, ids, "data"), estimator)
            return gradient(w, key=jax.random.key(0))[1]

        specs = (S(), S("data"), S("data"), S("data"))
        jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=S())(WEIGHTS, X, Y, IDS)

    with pytest.raises(fg.InputError, match="must not exchange anything along 'data'"):
        by("data", normalised_together)
    with pytest.raises(fg.InputError, match="axis_name must be an axis"):
        by("model", alone)
    with pytest.raises(fg.InputError, match="without exact_last"):
        fg.WorkerTangents(RANDOM["last exact"], "data")


def on_the_wire():
    """Backpropagation's step exchanges its gradient, ours four bytes a derivative and the loss."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import wire

    wire.WORKERS = 4
    found = wire.bytes_of(wire.mlp(), 0)
    assert found["BP"]["bytes"] == 4 * (found["BP"]["parameters"] + 1)
    assert found["FG-W"]["bytes"] == found["FG-W, a tangent for each worker"]["bytes"] == 8
    assert found["FG-W"]["messages"] <= 2
    masked = wire.Problem(alone, WEIGHTS, (X[:2], Y[:2], IDS[:2]), {"": fg.WeightPerturbation()})
    assert wire.bytes_of(masked, 0)[""]["bytes"] == 8 + 4 * len(WEIGHTS["table"])


SHARDS = {"a": S(None, "model"), "bias": S("model"), "b": S("model", None), "c": S(None, "model")}
LARGE = {"a": (32, 256), "bias": (256,), "b": (256, 64), "c": (64, 128)}
EVERY = {
    "backpropagation": fg.Backpropagation(),
    "feedback": fg.FeedbackAlignment(),
    "direct feedback": fg.DirectFeedbackAlignment(),
    "dense": fg.WeightPerturbation(structure="dense"),
    "several": fg.WeightPerturbation(tangents=4),
    **{name: RANDOM[name] for name in ("last exact", "orthogonal", "activity")},
}
MOVED = re.compile(r" = (.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(")


def placed(mesh, trees, specs):
    def place(array, spec):
        return jax.device_put(array, NamedSharding(mesh, spec))

    return jax.tree.map(place, trees, specs)


def moved(text):
    """The shapes that a compiled program gathers, permutes or transposes among devices."""
    found = [s for m in MOVED.findall(text) for s in re.findall(r"\[([\d,]+)\]", m)]
    return [tuple(map(int, s.split(","))) for s in found]


def assert_stays_where_it_is(step, params, batch, mesh, specs, alone):
    """Sharded weights give what those of one device give, stay as they are, and nobody has all."""
    args = (placed(mesh, params, specs), *batch, jax.random.key(0))
    compiled = jax.jit(step).lower(*args).compile()
    # Activations may: one axis is that of the examples.
    shapes = [s for s in moved(compiled.as_text()) if len(batch[0]) // 2 not in s]
    weights = [p.size for p in jax.tree.leaves(params) if p.ndim == 2]
    assert max(map(math.prod, shapes), default=0) < min(weights), shapes
    found = compiled(*args)
    for leaf, before in zip(*map(jax.tree.leaves, (found, args[0])), strict=True):
        # What all devices have, XLA may leave to some of them.
        alike = leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)
        assert alike or before.sharding.is_fully_replicated, (leaf.sharding, before.sharding)
    for leaf, right in zip(*map(jax.tree.leaves, (found, alone)), strict=True):
        np.testing.assert_allclose(leaf, right, rtol=1e-4, atol=1e-4)
    return compiled


def sharded_by_the_compiler(kind=AxisType.Auto):
    """Weights of a plain `jit` that are sharded over a mesh, with every estimator."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    keys = [jax.random.key(i) for i in range(6)]
    pairs = zip(keys, LARGE.items(), strict=False)
    params = {name: 0.1 * jax.random.normal(k, shape) for k, (name, shape) in pairs}
    x, y = jax.random.normal(keys[4], (24, 32)), jax.random.normal(keys[5], (24, 128))
    explicit = kind is AxisType.Explicit
    sums = {"out_sharding": S("data")} if explicit else {}

    def loss(w, x, y, **sums):
        h = jnp.tanh(x @ w["a"] + w["bias"])
        h = jnp.einsum("bi,ij->bj", h, w["b"], **sums)
        return fg.Losses([jnp.sum((jnp.tanh(h) @ w["c"] - y) ** 2, axis=1)], [("example",)])

    def step_of(estimator, **sums):
        def step(w, x, y, key):
            gradient = fg.value_and_grad(lambda w: loss(w, x, y, **sums), estimator)
            return jax.tree.map(lambda w, g: w - 0.01 * g, w, gradient(w, key=key)[1])

        return step

    for name, estimator in EVERY.items():
        alone = jax.jit(step_of(estimator))(params, x, y, jax.random.key(0))
        batch = placed(mesh, (x, y), (S("data"), S("data", "model" if explicit else None)))
        with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
            step = step_of(estimator, **sums)
            compiled = assert_stays_where_it_is(step, params, batch, mesh, SHARDS, alone)
        if name == "dense" and not explicit:
            tangents = 4 * sum(math.prod(shape) for shape in LARGE.values())
            assert compiled.memory_analysis().temp_size_in_bytes < tangents / 4


def sharded_by_types():
    sharded_by_the_compiler(AxisType.Explicit)


def sharded_modules():
    """An Equinox and a Flax NNX model whose weights are sharded over a mesh."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x, y = jax.random.normal(jax.random.key(1), (24, 32)), jnp.ones((24, 8))
    batch = placed(mesh, (x, y), (S("data"), S("data")))
    model = eqx.nn.MLP(32, 8, 256, 2, key=jax.random.key(2))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    specs = jax.tree.map(lambda p: S("model") if p.shape[0] == 256 else S(), params)

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(32, 256, rngs=rngs)
            self.last = nnx.Linear(256, 8, rngs=rngs)

        def __call__(self, x):
            return self.last(jax.nn.relu(self.first(x)))

    graph, state = nnx.split(Network(nnx.Rngs(0)))
    places = {"first": {"kernel": S(None, "model"), "bias": S("model")}}
    places |= {"last": {"kernel": S("model", None), "bias": S()}}
    flax_specs = jax.tree.map(lambda p: S(), state)
    nnx.replace_by_pure_dict(flax_specs, places)

    def of_equinox(p, x):
        return jax.vmap(eqx.combine(p, static))(x)

    def of_flax(p, x):
        return nnx.merge(graph, p)(x)

    for estimator in (EVERY["several"], EVERY["activity"], EVERY["feedback"]):
        for weights, own, call in ((params, specs, of_equinox), (state, flax_specs, of_flax)):

            def step(w, x, y, key, call=call, estimator=estimator):
                def losses(w):
                    return squares(call(w, x), y)

                grads = fg.value_and_grad(losses, estimator)(w, key=key)[1]
                return jax.tree.map(lambda w, g: w - 0.01 * g, w, grads)

            alone = jax.jit(step)(weights, x, y, jax.random.key(0))
            assert_stays_where_it_is(step, weights, batch, mesh, own, alone)


PARALLEL = (alone, mean_of_all, normalised_together, contrasted, block_by_block)
SCENARIOS = {f.__name__: (lambda f=f: data_parallel(f)) for f in PARALLEL}
OTHERS = (sharded_weights, heads_of_workers, feedback, untyped)
OTHERS += (feedback_by_shards, feedback_of_workers, own_tangents, halves, refused, on_the_wire)
OTHERS += (sharded_by_the_compiler, sharded_by_types, sharded_modules)
SCENARIOS |= {f.__name__: f for f in OTHERS}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, file=sys.stderr)
        SCENARIOS[name]()
