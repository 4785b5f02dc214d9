"""A weight-perturbed estimate in two halves, and training runs that are played again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import forwardgrad as fg
from helpers import PROBLEMS, Problem

ESTIMATORS = {
    "one": fg.WeightPerturbation(),
    "three": fg.WeightPerturbation(tangents=3),
    "orthogonal": fg.WeightPerturbation(tangents=3, orthogonal=True),
    "rank, normal": fg.WeightPerturbation(tangents=2, rank=3, distribution="normal"),
    "many terms": fg.WeightPerturbation(tangents=6, rank=3, distribution="sphere"),
    "dense": fg.WeightPerturbation(structure="dense", distribution="sphere", tangents=2),
    "clipped": fg.WeightPerturbation(tangents=2, clip=0.5),
    "in chunks": fg.WeightPerturbation(tangents=5, chunk=2),
}

SHAPES = {"table": (9, 6), "a": (6, 16), "bias": (16,), "b": (16, 16), "c": (16, 3), "d": (16, 3)}
WEIGHTS = {
    name: 0.4 * jax.random.normal(jax.random.key(i), shape)
    for i, (name, shape) in enumerate(SHAPES.items())
}
WEIGHTS["idle"] = jnp.ones((2, 2))
IDS = jnp.array([0, 3, 1, 4, 4, 2])
Y = jax.random.normal(jax.random.key(33), (6, 3))


def greedy(w, ids, y):
    """Two blocks with losses of their own, the first on rows of a table."""
    h = jnp.tanh(w["table"][ids] @ w["a"] + w["bias"])
    first = jnp.sum((h @ w["c"] - y) ** 2, axis=1)
    h = jnp.tanh(jax.lax.stop_gradient(h) @ w["b"])
    second = jnp.sum((h @ w["d"] - y) ** 2, axis=1)
    return fg.Losses([first, second], [("example",)] * 2)


MODELS = {
    **{name: PROBLEMS[name] for name in ("Equinox classifier", "convolutions and scan")},
    "greedy": lambda: Problem(greedy, WEIGHTS, (IDS, Y)),
}


def assert_same(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def halves(estimator, fun):
    """Both halves, each compiled."""
    apply = jax.jit(lambda params, key, s: fg.apply_scalars(estimator, params, key, s))
    return jax.jit(fg.directional_derivatives(fun, estimator)), apply


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_two_halves_are_the_estimate(name, model):
    problem, estimator = MODELS[model](), ESTIMATORS[name]
    whole = jax.jit(fg.value_and_grad(problem.fun, estimator))
    measure, apply = halves(estimator, problem.fun)
    for seed in range(3):
        key = jax.random.key(seed)
        value, grads = whole(problem.params, *problem.args, key=key)
        scalars = measure(problem.params, *problem.args, key=key)
        assert scalars.value == value
        assert_same(apply(problem.params, key, scalars), grads)
        # As one program, and on its way to elsewhere.
        both = jax.jit(lambda p, *a, key: apply(p, key, measure(p, *a, key=key)))
        assert_same(both(problem.params, *problem.args, key=key), grads)


@pytest.mark.parametrize("name", ["one", "orthogonal", "in chunks"])
def test_without_jit(name):
    estimator, key = ESTIMATORS[name], jax.random.key(3)
    value, grads = fg.value_and_grad(greedy, estimator)(WEIGHTS, IDS, Y, key=key)
    scalars = fg.directional_derivatives(greedy, estimator)(WEIGHTS, IDS, Y, key=key)
    assert scalars.value == value
    assert_same(fg.apply_scalars(estimator, WEIGHTS, key, scalars), grads)


def test_what_scalars_hold():
    measure = fg.directional_derivatives(greedy, ESTIMATORS["three"])
    scalars = measure(WEIGHTS, IDS, Y, key=jax.random.key(0))
    assert [d.shape for d in scalars.derivatives] == [(3,), (3,)]
    (rows,) = scalars.rows.values()
    np.testing.assert_array_equal(jnp.flatnonzero(rows), jnp.unique(IDS))
    unmasked = fg.WeightPerturbation(mask_rows=False)
    scalars = fg.directional_derivatives(greedy, unmasked)(WEIGHTS, IDS, Y, key=jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(scalars)) == 1 + 2 + 2


def test_unmasked_rows_get_noise_and_no_bias():
    """Every row of the table is perturbed; the mean is within five standard errors."""
    step = fg.value_and_grad(greedy, fg.WeightPerturbation(mask_rows=False))
    keys = jax.random.split(jax.random.key(1), 20_000)
    of_table = lambda key: step(WEIGHTS, IDS, Y, key=key)[1]["table"]  # noqa: E731
    drawn = np.asarray(jax.jit(lambda k: jax.lax.map(of_table, k, batch_size=500))(keys), float)
    exact = jax.grad(lambda w: greedy(w, IDS, Y).total())(WEIGHTS)["table"]
    assert np.all(np.abs(drawn).max(axis=0) > 0)
    error = drawn.std(axis=0) / np.sqrt(len(drawn))
    assert np.max(np.abs(drawn.mean(axis=0) - exact) / error) < 5


@pytest.mark.parametrize("name", ["one", "orthogonal", "dense"])
def test_scalars_of_several_add_up(name):
    estimator, keys = ESTIMATORS[name], jax.random.split(jax.random.key(5), 4)
    measure, apply = halves(estimator, greedy)
    each = [measure(WEIGHTS, IDS, Y, key=key) for key in keys]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)
    total = fg.apply_scalars(estimator, WEIGHTS, keys, stacked)
    grads = [apply(WEIGHTS, key, scalars) for key, scalars in zip(keys, each, strict=True)]
    expected = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), grads)
    for x, y in zip(*map(jax.tree.leaves, (total, expected)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def test_auxiliary_data():
    measure = fg.directional_derivatives(
        lambda w, x: (jnp.sum(w * x), {"twice": 2 * x}), fg.WeightPerturbation(), has_aux=True
    )
    scalars, aux = measure(jnp.ones(3), jnp.arange(3.0), key=jax.random.key(0))
    assert scalars.value == 3
    np.testing.assert_array_equal(aux["twice"], [0, 2, 4])


# Refused


def test_estimators_without_scalars():
    for estimator in (fg.ActivityPerturbation(), fg.Backpropagation()):
        with pytest.raises(fg.InputError, match="estimator must be a WeightPerturbation"):
            fg.directional_derivatives(greedy, estimator)
    measure = fg.directional_derivatives(greedy, fg.WeightPerturbation(exact_last=True))
    with pytest.raises(fg.InputError, match="exact_last must be False"):
        measure(WEIGHTS, IDS, Y, key=jax.random.key(0))


def test_scalars_of_others(unchecked):
    del unchecked
    estimator, key = fg.WeightPerturbation(), jax.random.key(0)
    scalars = fg.directional_derivatives(greedy, estimator)(WEIGHTS, IDS, Y, key=key)
    other = fg.WeightPerturbation(distribution="normal")
    refused = [
        ("estimator must be the one", (other, WEIGHTS, key, scalars)),
        ("key must be the one", (estimator, WEIGHTS, jax.random.key(1), scalars)),
        ("key must be a single", (estimator, WEIGHTS, 0, scalars)),
        ("key is missing", (estimator, WEIGHTS, None, scalars)),
        ("array number 1", (estimator, WEIGHTS | {"b": jnp.ones((16, 15))}, key, scalars)),
        ("array number 7", (estimator, WEIGHTS | {"z": jnp.ones(1)}, key, scalars)),
        ("derivatives of shape", (estimator, WEIGHTS, jax.random.split(key, 2), scalars)),
        ("scalars must be", (estimator, WEIGHTS, key, scalars.derivatives)),
    ]
    for message, arguments in refused:
        with pytest.raises(fg.InputError, match=message):
            fg.apply_scalars(*arguments)
    grads = jax.jit(lambda key: fg.apply_scalars(estimator, WEIGHTS, key, scalars))
    assert not np.any(np.isnan(grads(key)["a"]))
    assert np.all(np.isnan(grads(jax.random.key(1))["a"]))


# Replay

OPTIMISERS = {
    "sgd": {"name": "sgd", "learning_rate": 0.002},
    "momentum": {"name": "sgd", "learning_rate": 0.001, "momentum": 0.9},
    "adam": {"name": "adam", "learning_rate": 0.003},
}


def trained(optimiser, steps, estimator=ESTIMATORS["clipped"], one_program=False):
    """Weights, the optimiser's state, and the scalars of each step."""
    measure, _ = halves(estimator, greedy)

    def update(params, state, key, scalars):
        grads = fg.apply_scalars(estimator, params, key, scalars)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step(params, state, key, ids):
        scalars = measure(params, ids, Y, key=key)
        return update(params, state, key, scalars), scalars

    update, step = jax.jit(update), jax.jit(step)
    params, state, found = WEIGHTS, optimiser.init(WEIGHTS), []
    for i in range(steps):
        key, ids = jax.random.fold_in(jax.random.key(7), i), (IDS + i) % 9
        if one_program:
            (params, state), scalars = step(params, state, key, ids)
        else:
            scalars = measure(params, ids, Y, key=key)
            params, state = update(params, state, key, scalars)
        found.append(jax.tree.map(np.asarray, scalars))
    return params, state, found


def made(description):
    arguments = dict(description)
    return getattr(optax, arguments.pop("name"))(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("one_program", [False, True])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_thousand_steps_are_replayed(tmp_path, name, one_program):
    optimiser = made(OPTIMISERS[name])
    params, state, steps = trained(optimiser, 1000, one_program=one_program)
    assert steps[-1].value < 0.7 * steps[0].value
    path = tmp_path / "run.npz"
    fg.ReplayLog.of_run(WEIGHTS, steps, params, OPTIMISERS[name]).save(path)
    log = fg.ReplayLog.load(path)
    assert len(log) == 1000
    # Twice two derivatives, the value, the key, and bits for the nine rows, of each step.
    assert path.stat().st_size < 1000 * (4 * 4 + 4 + 8 + 2) + 3000
    assert_same(fg.replay(WEIGHTS, log, has_state=True), (params, state))


@pytest.fixture(scope="module")
def short():
    optimiser = optax.chain(optax.clip(1.0), optax.sgd(optax.cosine_decay_schedule(0.01, 9)))
    params, _, steps = trained(optimiser, 9)
    return optimiser, params, steps, fg.ReplayLog.of_run(WEIGHTS, steps, params)


def test_any_optimiser_and_stacked_steps(short):
    optimiser, params, steps, log = short
    assert_same(fg.replay(WEIGHTS, log, optimiser), params)
    first = fg.ReplayLog.of_run(WEIGHTS, steps[:4], WEIGHTS)
    again = fg.ReplayLog.of_run(WEIGHTS, [first.scalars, *steps[4:]], params)
    assert_same(fg.replay(WEIGHTS, again, optimiser), params)


def test_replay_refuses(short, unchecked):
    del unchecked
    optimiser, params, steps, log = short
    for given, message in (((steps,), "log must be"), ((log, "adam"), "optimiser must be one of")):
        with pytest.raises(fg.InputError, match=message):
            fg.replay(WEIGHTS, *given)
    with pytest.raises(fg.InputError, match="optimiser must be given"):
        fg.replay(WEIGHTS, log)
    with pytest.raises(fg.InputError, match="params0 must be"):
        fg.replay(WEIGHTS | {"bias": WEIGHTS["bias"] + 1e-7}, log, optimiser)
    shorter = fg.ReplayLog.of_run(WEIGHTS, steps[:-1], params)
    for given, chosen in ((log, optax.sgd(0.01)), (shorter, optimiser)):
        with pytest.raises(fg.InputError, match="do not end where the run did"):
            fg.replay(WEIGHTS, given, chosen)
    other = fg.directional_derivatives(greedy, ESTIMATORS["one"])
    foreign = other(WEIGHTS, IDS, Y, key=jax.random.key(0))
    for wrong, message in (([], "got none"), ([*steps, foreign], "one estimator and one model")):
        with pytest.raises(fg.InputError, match=message):
            fg.ReplayLog.of_run(WEIGHTS, wrong, params)
    for wrong in ({"name": "adam"}, {"name": "nothing"}, {"name": "sgd", "learning_rate": made}):
        with pytest.raises(fg.InputError, match="optimiser must be the name"):
            fg.ReplayLog.of_run(WEIGHTS, steps, params, wrong)


def test_damaged_logs(tmp_path, short):
    *_, log = short
    path = tmp_path / "run.npz"
    log.save(path)
    assert_same(fg.ReplayLog.load(path).scalars, log.scalars)
    data = path.read_bytes()
    cut = [data[:length] for length in range(0, len(data), 97)]
    flipped = [data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :] for i in range(0, len(data), 31)]
    for changed in (*cut, *flipped, data + b"0"):
        path.write_bytes(changed)
        with pytest.raises(fg.InputError, match=r"is damaged|is no replay log"):
            fg.ReplayLog.load(path)
    with pytest.raises(fg.InputError, match=r"cannot be read|No such"):
        fg.ReplayLog.load(tmp_path / "absent")
    np.savez(path, other=np.zeros(3))
    with pytest.raises(fg.InputError, match="is no replay log"):
        fg.ReplayLog.load(tmp_path / "run.npz")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_and_steps_in_one_scan(tmp_path, dtype):
    """The steps of a `scan` come stacked; a parameter may be empty, and a key of another kind."""
    estimator, optimiser = fg.WeightPerturbation(tangents=2), optax.sgd(0.1)
    params = {"a": jnp.full((4, 8), 0.1, dtype), "b": jnp.ones((8, 2), dtype)}
    params["empty"] = jnp.zeros((0, 3), dtype)

    def loss(p):
        return jnp.mean((jnp.tanh(jnp.ones((3, 4), dtype) @ p["a"]) @ p["b"]) ** 2)

    def step(carry, i):
        params, state = carry
        key = jax.random.fold_in(jax.random.key(1, impl="rbg"), i)
        scalars = fg.directional_derivatives(loss, estimator)(params, key=key)
        grads = fg.apply_scalars(estimator, params, key, scalars)
        updates, state = optimiser.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), scalars

    start = (params, optimiser.init(params))
    (trained, _), steps = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(30)))(start)
    log = fg.ReplayLog.of_run(params, steps, trained, {"name": "sgd", "learning_rate": 0.1})
    log.save(tmp_path / "run")
    assert_same(fg.replay(params, fg.ReplayLog.load(tmp_path / "run")), trained)


def test_workers_of_a_vmap():
    """Along a named axis of `vmap`, too, everybody has the sum of all workers' estimates."""
    x, w, key = jax.random.normal(jax.random.key(0), (4, 6, 3)), jnp.ones((3, 2)), jax.random.key(1)
    inner = fg.WeightPerturbation()

    def loss(w, x):
        return jnp.mean((x @ w - 1) ** 2)

    step = fg.value_and_grad(loss, fg.WorkerTangents(inner, "worker"))
    grads = jax.vmap(lambda x: step(w, x, key=key)[1], axis_name="worker")(x)
    alone = fg.value_and_grad(loss, inner)
    each = [alone(w, x[i], key=jax.random.fold_in(key, i))[1] for i in range(4)]
    for own in grads:
        np.testing.assert_allclose(own, sum(each), rtol=1e-5)
