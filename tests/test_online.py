"""Tangents that go along with the state of a recurrence."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg

STEPS, EXAMPLES, INPUTS, UNITS, WORDS = 5, 3, 2, 3, 4
X = jax.random.normal(jax.random.key(0), (STEPS, EXAMPLES, INPUTS))
Y = jax.random.normal(jax.random.key(1), (STEPS, EXAMPLES, 1))
IDS = jnp.array([[0, 1, 1], [2, 2, 0], [1, 0, 0], [0, 0, 1], [2, 1, 0]])


def weights(**shapes):
    return {
        name: 0.7 * jax.random.normal(jax.random.key(i), shape)
        for i, (name, shape) in enumerate(shapes.items(), 2)
    }


def error(out, y):
    return jnp.mean((out - y) ** 2)


def plain(w, h, now):
    """A head that nothing of the recurrence hears of."""
    x, y, _ = now
    h = jnp.tanh(h @ w["h"] + x @ w["x"] + w["bias"])
    return h, error(h @ w["out"], y)


def fed_back(w, carry, now):
    """What the head computes goes into the next step; a table, and a step's number."""
    h, out, number = carry
    _, y, ids = now
    h = jnp.tanh(h @ w["h"] + out @ w["back"] + w["table"][ids] + 0.1 * number)
    out = h @ w["out"]
    return (h, out, number + 1), error(out, y)


def greedy(w, carry, now):
    """Two recurrences with losses of their own, no gradient between them; one is of no use."""
    x, y, _ = now
    h = jnp.tanh(carry["first"] @ w["h"] + x @ w["x"])
    first = jnp.mean((h @ w["out"] - y) ** 2, axis=1)
    g = jnp.tanh(carry["second"] @ w["g"] + jax.lax.stop_gradient(h) @ w["between"])
    second = jnp.mean((g @ w["last"] - y) ** 2, axis=1)
    idle = jnp.tanh(carry["idle"] @ w["idle"] + x @ w["to idle"])
    losses = fg.Losses([first, second], [("example",)] * 2)
    return {"first": h, "second": g, "idle": idle}, losses


class Cell(eqx.Module):
    cell: eqx.nn.LSTMCell
    head: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(jax.random.key(2))
        self.cell = eqx.nn.LSTMCell(INPUTS, UNITS, key=keys[0])
        self.head = eqx.nn.Linear(UNITS, 1, key=keys[1])


PARAMS, STATIC = eqx.partition(Cell(), eqx.is_inexact_array)


def lstm(params, carry, now):
    """Equinox's, one example at a time."""
    x, y, _ = now
    model = eqx.combine(params, STATIC)
    carry = jax.vmap(model.cell)(x, carry)
    return carry, error(jax.vmap(model.head)(carry[0]), y)


SQUARE = (UNITS, UNITS)
ZEROS = jnp.zeros((EXAMPLES, UNITS))
CELLS = {
    "plain": (plain, weights(h=SQUARE, x=(INPUTS, UNITS), bias=(UNITS,), out=(UNITS, 1)), ZEROS),
    "fed back": (
        fed_back,
        weights(h=SQUARE, back=(1, UNITS), table=(WORDS, UNITS), out=(UNITS, 1)),
        (ZEROS, jnp.zeros((EXAMPLES, 1)), jnp.int32(0)),
    ),
    "greedy": (
        greedy,
        weights(
            h=SQUARE, x=(INPUTS, UNITS), out=(UNITS, 1), g=SQUARE, between=SQUARE, last=(UNITS, 1)
        )
        | {"idle": jnp.eye(UNITS), "to idle": jnp.ones((INPUTS, UNITS))},
        {"first": ZEROS, "second": ZEROS, "idle": ZEROS},
    ),
    "LSTM": (lstm, PARAMS, (ZEROS, ZEROS)),
}
SEQUENCE = (X, Y, IDS)


def unrolled(cell, carry):
    """The losses of a whole sequence."""

    def losses(params):
        found = jax.lax.scan(functools.partial(cell, params), carry, SEQUENCE)[1]
        if isinstance(found, fg.Losses):
            return fg.Losses([jnp.sum(t) for t in found.terms], [()] * len(found.terms))
        return jnp.sum(found)

    return losses


def along(cell, params, carry, estimator, key):
    """Values and estimates of all steps, stacked, and the last state."""
    init, step = fg.online(cell, estimator)

    def one(state, now):
        value, grads, state = step(params, now, state=state)
        return state, (value, grads)

    state, found = jax.lax.scan(one, init(params, carry, key=key), SEQUENCE)
    return (*found, state)


def summed(grads):
    return jax.tree.map(lambda g: jnp.sum(g, axis=0), grads)


def assert_near(a, b, rtol=1e-4, atol=1e-5):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


ESTIMATORS = {
    "one": fg.WeightPerturbation(),
    "three": fg.WeightPerturbation(tangents=3, distribution="normal"),
    "dense": fg.WeightPerturbation(tangents=2, structure="dense", distribution="sphere"),
    "rank two, in chunks": fg.WeightPerturbation(tangents=5, rank=2, chunk=2),
    "last exact": fg.WeightPerturbation(tangents=2, exact_last=True),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", CELLS)
def test_the_sum_over_a_sequence_is_the_estimate_for_the_sequence(name, estimator):
    """The same tangents and the same losses, by an unrolled program that carries nothing."""
    cell, params, carry = CELLS[name]
    chosen, key = ESTIMATORS[estimator], jax.random.key(9)
    run = jax.jit(functools.partial(along, cell, params, carry, chosen))
    values, grads, _ = run(key)
    whole = fg.WeightPerturbation(
        **{f: getattr(chosen, f) for f in chosen.__dataclass_fields__} | {"mask_rows": False}
    )
    value, expected = fg.value_and_grad(unrolled(cell, carry), whole)(params, key=key)
    np.testing.assert_allclose(jnp.sum(values), value, rtol=1e-5)
    assert_near(summed(grads), expected)


def size(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


class InTurn(fg.WeightPerturbation):
    """All unit vectors as tangents, one after another: their mean is the gradient."""

    def _factors(self, key, leaves, layouts):
        del key, layouts
        ends = np.cumsum([leaf.size for leaf in leaves])
        rows = np.eye(self.tangents, dtype=np.float32) * self.tangents**0.5
        return [
            [jnp.asarray(rows[:, end - leaf.size : end]).reshape(self.tangents, *axes)]
            for leaf, end in zip(leaves, ends, strict=True)
            for axes in [[n for n in leaf.shape if n > 1]]
        ]


def in_turn(params):
    return InTurn(tangents=size(params), structure="dense")


def loss_of_step(cell, carry, t):
    """One step's loss as a function of the weights of all steps until then."""

    def loss(params):
        found = jax.lax.scan(functools.partial(cell, params), carry, SEQUENCE)[1]
        terms = found.terms if isinstance(found, fg.Losses) else (found,)
        return sum(jnp.sum(term[t]) for term in terms)

    return loss


@pytest.mark.parametrize("name", ["plain", "fed back", "LSTM"])
def test_with_tangents_in_all_directions_each_step_has_the_gradient(name):
    """As real-time recurrent learning, and as backpropagation through time."""
    cell, params, carry = CELLS[name]
    run = jax.jit(functools.partial(along, cell, params, carry, in_turn(params)))
    _, grads, _ = run(jax.random.key(3))
    for t in range(STEPS):
        exact = jax.jit(jax.grad(loss_of_step(cell, carry, t)))(params)
        assert_near(jax.tree.map(lambda g, t=t: g[t], grads), exact)


@pytest.mark.parametrize("name", ["fed back", "LSTM"])
def test_the_mean_of_the_estimates_is_the_gradient(name):
    """Of a sequence, within five standard errors in every entry, and within 1.3 over all."""
    cell, params, carry = CELLS[name]
    one = functools.partial(along, cell, params, carry, fg.WeightPerturbation(tangents=2))
    keys = jax.random.split(jax.random.key(4), 2000)
    drawn = jax.jit(jax.vmap(lambda key: summed(one(key)[1])))(keys)
    exact = jax.grad(unrolled(cell, carry))(params)
    scores = []
    for samples, expected in zip(*map(jax.tree.leaves, (drawn, exact)), strict=True):
        error = jnp.std(samples, axis=0) / len(keys) ** 0.5
        used = error > 0  # a row that is never looked up
        scores.append(((jnp.mean(samples, axis=0) - expected) / jnp.where(used, error, 1))[used])
        np.testing.assert_allclose(expected[~used], 0, atol=1e-6)
    found = jnp.concatenate(scores)
    assert jnp.max(jnp.abs(found)) < 5
    assert jnp.sqrt(jnp.mean(found**2)) < 1.3


def test_a_head_that_is_fed_back_is_no_last_layer():
    cell, params, carry = CELLS["fed back"]
    init, step = fg.online(cell, fg.WeightPerturbation(exact_last=True))
    state, now = init(params, carry, key=jax.random.key(0)), jax.tree.map(lambda a: a[0], SEQUENCE)
    _, grads, _ = step(params, now, state=state)
    exact = jax.grad(lambda p: cell(p, carry, now)[1])(params)
    assert not jnp.allclose(grads["out"], exact["out"], rtol=1e-3)


def test_what_changes_no_loss_has_no_gradient():
    cell, params, carry = CELLS["greedy"]
    _, grads, _ = along(cell, params, carry, fg.WeightPerturbation(), jax.random.key(0))
    assert not jnp.any(grads["idle"])
    assert not jnp.any(grads["to idle"])
    assert jnp.all(grads["g"][0])


def test_memory_does_not_grow_with_the_sequence():
    cell, params, carry = CELLS["LSTM"]
    init, step = fg.online(cell, fg.WeightPerturbation(tangents=4))

    @jax.jit
    def run(sequence):
        def one(held, now):
            state, total = held
            _, grads, state = step(params, now, state=state)
            return (state, jax.tree.map(jnp.add, total, grads)), None

        start = init(params, carry, key=jax.random.key(0)), jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(one, start, sequence)[0][1]

    def temporary(length):
        sequence = jax.tree.map(lambda a: jnp.resize(a, (length, *a.shape[1:])), SEQUENCE)
        return run.lower(sequence).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1000) == temporary(10)


def test_where_there_is_no_reverse_mode():
    @jax.custom_vjp
    def guarded(x):
        return jnp.tanh(x)

    def refuse(*args):
        raise AssertionError("reverse mode")

    guarded.defvjp(lambda x: (guarded(x), None), refuse)

    def cell(w, h, x):
        h = guarded(h @ w)
        h = jax.lax.while_loop(lambda h: jnp.max(jnp.abs(h)) > 0.2, lambda h: 0.5 * (h @ w), h)
        return h + x, jnp.sum(h**2)

    w = 0.5 * jnp.eye(UNITS) + 0.1
    init, step = fg.online(cell, fg.WeightPerturbation(tangents=3))
    state = init(w, jnp.ones(UNITS), key=jax.random.key(0))
    for _ in range(3):
        _, grads, state = jax.jit(step)(w, jnp.ones(UNITS), state=state)
    assert jnp.all(jnp.isfinite(grads))
    assert jnp.any(grads)


def test_a_new_start_keeps_the_carry_and_forgets_what_led_to_it():
    cell, params, carry = CELLS["plain"]
    estimator = in_turn(params)
    *_, state = along(cell, params, carry, estimator, jax.random.key(0))
    init, step = fg.online(cell, estimator)
    fresh = init(params, state.carry, key=jax.random.key(1))
    now = jax.tree.map(lambda a: a[0], SEQUENCE)
    value, grads, _ = step(params, now, state=fresh)
    expected, exact = jax.value_and_grad(lambda p: cell(p, state.carry, now)[1])(params)
    assert value == pytest.approx(expected)
    assert_near(grads, exact)


def test_auxiliary_data():
    def cell(w, h, x):
        h = jnp.tanh(w * h + x)
        return h, (h**2, {"out": h, "kind": "number"})

    init, step = fg.online(cell, fg.WeightPerturbation(), has_aux=True)
    state = init(1.0, 0.5, key=jax.random.key(0))
    (value, aux), _, state = step(1.0, 0.1, state=state)
    assert value == aux["out"] ** 2 == state.carry**2
    assert aux["kind"] == "number"


@pytest.mark.parametrize("chunk", [None, 1])
def test_effects_happen_once_a_step(chunk):
    seen = []

    def cell(w, h, x):
        jax.debug.callback(lambda h: seen.append(float(h)), h)
        return jnp.tanh(w * h + x), (w * h) ** 2

    init, step = fg.online(cell, fg.WeightPerturbation(tangents=3, chunk=chunk))
    state = init(1.0, 0.5, key=jax.random.key(0))
    for _ in range(2):
        _, grads, state = jax.jit(step)(1.0, 0.1, state=state)
    jax.block_until_ready(grads)
    jax.effects_barrier()
    assert seen == [0.5, pytest.approx(np.tanh(0.6))]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision(dtype):
    """The types stay as they are, and the estimate is near the one in single precision."""
    cell, params, carry = CELLS["plain"]
    found = []
    for kind in (dtype, "float32"):
        own, start, sequence = jax.tree.map(
            lambda a, kind=kind: a.astype(kind) if eqx.is_inexact_array(a) else a,
            (params, carry, SEQUENCE),
        )
        init, step = fg.online(cell, fg.WeightPerturbation(tangents=2))
        state = init(own, start, key=jax.random.key(0))
        for t in range(2):
            now = jax.tree.map(lambda a, t=t: a[t], sequence)
            _, grads, state = jax.jit(step)(own, now, state=state)
        assert {leaf.dtype for leaf in jax.tree.leaves((grads, state.carry))} == {jnp.dtype(kind)}
        found.append(grads)
    assert_near(*jax.tree.map(lambda g: g.astype("float32"), found), rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (lambda w, h: h, r"cell must return a pair \(carry, loss\), got an? "),
        (lambda w, h: (jnp.ones(3), h * w), r"like the one that it gets, float32\[\], got float3"),
        (lambda w, h: ((h, h), h * w), r"like the one that it gets, float32\[\], got \(float32"),
        (lambda w, h: (h, jnp.ones(3) * w), "fun must return a real floating-point scalar"),
        (lambda w, h: (object(), h * w), "carry must hold arrays, got an object"),
    ],
)
def test_cells_that_are_none(cell, message):
    init, step = fg.online(cell, fg.WeightPerturbation())
    state = init(1.0, 0.5, key=jax.random.key(0))
    with pytest.raises(fg.InputError, match=message):
        step(1.0, state=state)


def test_refusals(unchecked):
    def cell(w, h):
        return w * h, w * h

    with pytest.raises(fg.InputError, match="estimator must be a WeightPerturbation, whose tang"):
        fg.online(cell, fg.ActivityPerturbation())
    init, step = fg.online(cell, fg.WeightPerturbation(tangents=2))
    with pytest.raises(fg.InputError, match="key is missing"):
        init(1.0, 1.0)
    with pytest.raises(fg.InputError, match="state must be what init returns, got a tuple"):
        step(1.0, state=())
    other = fg.online(cell, fg.WeightPerturbation())[0](1.0, 1.0, key=jax.random.key(0))
    with pytest.raises(fg.InputError, match=r"state must have 2 tangents of each .* got 1"):
        step(1.0, state=other)


def test_workers_that_exchange_what_they_compute():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    init, step = fg.online(
        lambda w, h: (jax.lax.psum(w * h, "data"), w * h), fg.WeightPerturbation()
    )

    def worker(w):
        return step(w, state=init(w, jnp.float32(1.0), key=jax.random.key(0)))[1]

    workers = jax.shard_map(worker, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
    with pytest.raises(fg.InputError, match=r"must not exchange what it computes, along \['data"):
        jax.eval_shape(workers, jnp.float32(1.0))
