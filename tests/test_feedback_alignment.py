"""FA and DFA, against formulas written by hand; the feedback weights are solved for."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad.networks import LocalMixer, Size
from forwardgrad.objectives import LocalLoss

HIDDEN, CLASSES, BATCH = 40, 3, 12


def data(seed):
    x = jax.random.normal(jax.random.key(seed), (BATCH, 6))
    return np.asarray(x), np.asarray(jax.random.normal(jax.random.key(seed + 1), (BATCH, CLASSES)))


def weights(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    shapes = {"first": (6, HIDDEN), "last": (HIDDEN, CLASSES)}
    made = {
        name: 0.4 * jax.random.normal(k, s)
        for k, (name, s) in zip(keys, shapes.items(), strict=True)
    }
    return {**made, "bias": 0.1 * jnp.arange(HIDDEN, dtype=jnp.float32)}


def losses(w, x, y):
    out = jnp.tanh(x @ w["first"] + w["bias"]) @ w["last"]
    return fg.Losses([0.5 * jnp.sum((out - y) ** 2, axis=1)], [("example",)])


@functools.partial(jax.jit, static_argnums=0)
def step(estimator, w, x, y):
    return fg.value_and_grad(losses, estimator)(w, x, y), losses(w, x, y).total()


def gradients(estimator, w, x, y):
    (value, grads), expected = step(estimator, w, x, y)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    return {k: np.asarray(g, float) for k, g in grads.items()}


def by_hand(w, x, y, feedback):
    """Two layers, with `feedback` [hidden, classes] in the place of the last weight."""
    h = np.tanh(x @ w["first"] + w["bias"])
    error = h @ w["last"] - y
    delta = (error @ feedback.T) * (1 - h**2)
    return {"first": x.T @ delta, "bias": delta.sum(0), "last": h.T @ error}


def solved(estimator):
    """The feedback weights, from the gradients that they explain."""
    rows, targets = [], []
    for seed in range(4):
        (x, y), w = data(seed), weights(seed)
        h = np.tanh(x @ w["first"] + w["bias"])
        error = h @ w["last"] - y
        rows.append(np.einsum("bi,bc,bh->hic", x, error, 1 - h**2))
        targets.append(gradients(estimator, w, x, y)["first"].T)
    rows, targets = np.concatenate(rows, 1), np.concatenate(targets, 1)
    return np.stack(
        [np.linalg.lstsq(r, t, rcond=None)[0] for r, t in zip(rows, targets, strict=True)]
    )


@pytest.mark.parametrize("kind", [fg.FeedbackAlignment, fg.DirectFeedbackAlignment])
def test_the_gradient_is_its_formula(kind):
    feedback = solved(kind())
    for seed in (10, 11):
        (x, y), w = data(seed), weights(seed)
        expected = by_hand(w, x, y, feedback)
        for name, grad in gradients(kind(), w, x, y).items():
            np.testing.assert_allclose(grad, expected[name], rtol=1e-3, atol=1e-4)


def test_feedback_weights_have_the_scale_of_initial_ones():
    feedback = solved(fg.FeedbackAlignment())
    # A relative standard error of a variance of n normal numbers is sqrt(2 / n).
    assert abs(feedback.var() * HIDDEN / 2 - 1) < 4 * np.sqrt(2 / feedback.size)
    np.testing.assert_allclose(
        solved(fg.FeedbackAlignment(gain=8.0)), 2 * feedback, rtol=1e-3, atol=1e-3
    )


def test_direct_feedback_is_of_signs():
    feedback = solved(fg.DirectFeedbackAlignment())
    np.testing.assert_allclose(abs(feedback), np.sqrt(2 / HIDDEN), rtol=1e-3)
    assert 0.3 < np.mean(feedback > 0) < 0.7


@pytest.mark.parametrize("kind", [fg.FeedbackAlignment, fg.DirectFeedbackAlignment])
def test_the_seed_decides_the_feedback(kind):
    (x, y), w = data(0), weights(0)
    one, same, other = (gradients(kind(seed=s), w, x, y)["first"] for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)


def test_the_output_weights_do_not_matter_for_what_comes_back():
    """With zero output weights backpropagation has nothing for the first layer."""
    (x, y), w = data(0), {**weights(0), "last": jnp.zeros((HIDDEN, CLASSES))}
    assert not np.any(gradients(fg.Backpropagation(), w, x, y)["first"])
    assert np.all(gradients(fg.FeedbackAlignment(), w, x, y)["first"])
    assert np.all(gradients(fg.DirectFeedbackAlignment(), w, x, y)["first"])


def test_direct_feedback_goes_past_scales():
    """A normalisation's scale and bias send errors back entry by entry, for no matrix more."""
    (x, y), w = data(0), {**weights(0), "scale": 1 + 0.1 * jnp.arange(HIDDEN, dtype=jnp.float32)}

    def normalised(z):
        return (z - jnp.mean(z, 1, keepdims=True)) * jax.lax.rsqrt(jnp.var(z, 1, keepdims=True))

    def hidden(w):
        return jnp.tanh(normalised(x @ w["first"]) * w["scale"] + w["bias"])

    def fun(w):
        error = hidden(w) @ w["last"] - y
        return fg.Losses([0.5 * jnp.sum(error**2, axis=1)], [("example",)])

    init, step = fg.estimation(fun, fg.DirectFeedbackAlignment())
    state = init(w)
    (signs,) = jax.tree.leaves(state)
    _, grads, _ = step(w, state=state)
    sent = np.sqrt(2 / HIDDEN) * (hidden(w) @ w["last"] - y) @ signs.T
    (expected,) = jax.vjp(hidden, w)[1](sent)
    for name in ("first", "scale", "bias"):
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-4, atol=1e-5)


def test_direct_feedback_reaches_a_network_of_scales_alone():
    """Where no product comes after a scale, what it is multiplied with gets feedback."""
    x = jax.random.normal(jax.random.key(0), (BATCH, HIDDEN))
    w = {name: 1 + 0.1 * jnp.arange(HIDDEN, dtype=jnp.float32) for name in ("first", "last")}

    def fun(w):
        out = jnp.tanh(x * w["first"]) * w["last"]
        return fg.Losses([0.5 * jnp.sum((out - 1) ** 2, axis=1)], [("example",)])

    grads = fg.value_and_grad(fun, fg.DirectFeedbackAlignment())(w)[1]
    exact = jax.grad(lambda w: fun(w).total())(w)
    np.testing.assert_allclose(grads["last"], exact["last"], rtol=1e-5)
    assert not np.any(np.isclose(grads["first"], exact["first"], rtol=0.01))


def test_convolutions_have_feedback_too():
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 2))
    w = {
        "kernels": [jax.random.normal(jax.random.key(i), (3, 3, 2, 2)) for i in (1, 2)],
        "last": jnp.ones((72, 2)),
    }

    def fun(w):
        h = x
        for kernel in w["kernels"]:
            h = jax.lax.conv_general_dilated(
                h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            h = jnp.tanh(h)
        return jnp.sum((h.reshape(4, -1) @ w["last"]) ** 2)

    _, exact = fg.value_and_grad(fun, fg.Backpropagation())(w)
    _, grads = fg.value_and_grad(fun, fg.FeedbackAlignment())(w)
    np.testing.assert_allclose(grads["last"], exact["last"], rtol=1e-4)
    assert not np.allclose(grads["kernels"][1], exact["kernels"][1], rtol=0.1)


def test_greedy_blocks_learn_from_their_own_head_alone():
    """FA with a loss in every block: the last layers stay exact."""
    network = LocalMixer((4, 4, 1), Size(8, 2, 2, 2), 3, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    images = jax.random.normal(jax.random.key(1), (5, 4, 4, 1))
    labels = jnp.array([0, 1, 2, 0, 1])

    def fun(params):
        return LocalLoss()(eqx.combine(params, static), images, labels)[0]

    _, exact = jax.jit(fg.value_and_grad(fun, fg.Backpropagation()))(params)
    _, grads = jax.jit(fg.value_and_grad(fun, fg.FeedbackAlignment()))(params)
    for name in ("heads", "classifier"):
        same = jax.tree.map(
            lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-6),
            getattr(exact, name),
            getattr(grads, name),
        )
        assert all(jax.tree.leaves(same))
    assert not np.allclose(exact.blocks[0].channel_weight, grads.blocks[0].channel_weight)


def test_bad_input():
    def fails(match):
        return pytest.raises(fg.InputError, match=match)

    (x, _), w = data(0), weights(0)
    for kind in (fg.FeedbackAlignment, fg.DirectFeedbackAlignment):
        with fails("gain must be positive, got 0"):
            kind(gain=0.0)
    direct = fg.DirectFeedbackAlignment()
    with fails("DirectFeedbackAlignment needs a loss for every example"):
        fg.value_and_grad(lambda w: jnp.sum(jnp.tanh(x @ w["first"]) @ w["last"]), direct)(w)
    with fails("DirectFeedbackAlignment needs an output layer, got none"):
        fg.value_and_grad(lambda w: jnp.sum(w["last"] ** 2), direct)(w)


def test_local_losses_send_their_errors_to_their_own_blocks():
    """DFA with a head on each block: the heads stay exact, and every block learns."""
    network = LocalMixer((4, 4, 1), Size(8, 2, 2, 2), 3, key=jax.random.key(0))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    images = jax.random.normal(jax.random.key(1), (5, 4, 4, 1))

    def fun(params):
        labels = jnp.array([0, 1, 2, 0, 1])
        return LocalLoss()(eqx.combine(params, static), images, labels)[0]

    _, exact = jax.jit(fg.value_and_grad(fun, fg.Backpropagation()))(params)
    _, grads = jax.jit(fg.value_and_grad(fun, fg.DirectFeedbackAlignment()))(params)
    for head, expected in zip(grads.heads, exact.heads, strict=True):
        np.testing.assert_allclose(head.weight, expected.weight, rtol=1e-4, atol=1e-7)
    for block, expected in zip(grads.blocks, exact.blocks, strict=True):
        assert np.any(block.channel_weight != 0)
        assert not np.allclose(block.channel_weight, expected.channel_weight, rtol=1e-2)


def test_batch_normalisation_is_differentiated_as_usual():
    """DFA sends errors to products; the scale of a normalisation over the batch is none."""
    (x, y), w = data(0), weights(0)
    w = {"first": w["first"], "last": w["last"], "scale": jnp.linspace(0.5, 2.0, HIDDEN)}

    def hidden(w):
        z = x @ w["first"]
        scale = jax.lax.rsqrt(jnp.var(z, axis=0, keepdims=True) + 1e-5) * w["scale"]
        return jnp.tanh((z - jnp.mean(z, axis=0)) * scale)

    def fun(w):
        out = hidden(w) @ w["last"]
        return fg.Losses([0.5 * jnp.sum((out - y) ** 2, axis=1)], [("example",)])

    estimator = fg.DirectFeedbackAlignment()
    (feedback,) = fg.estimation(fun, estimator).init(w).arrays.values()
    h, pullback = jax.vjp(hidden, w)
    error = h @ w["last"] - y
    (expected,) = pullback(error @ feedback.T * np.sqrt(2.0 / HIDDEN))
    _, grads = fg.value_and_grad(fun, estimator)(w)
    np.testing.assert_allclose(grads["last"], h.T @ error, rtol=1e-4, atol=1e-5)
    for name in ("first", "scale"):
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "estimator",
    [fg.ActivityPerturbation(), fg.FeedbackAlignment(), fg.DirectFeedbackAlignment()],
    ids=repr,
)
def test_a_function_may_refuse_to_be_differentiated(estimator):
    """As solvers do for their step sizes: nothing flows there, and nothing asks for it."""
    (x, y), w = data(0), weights(0)

    @jax.custom_jvp
    def fixed(size):
        return size

    def refuse(primals, tangents):
        if not isinstance(tangents[0], jax.custom_derivatives.SymbolicZero):
            raise RuntimeError("not differentiable")
        return primals[0], tangents[0]

    fixed.defjvp(refuse, symbolic_zeros=True)

    def fun(w, size=lambda a: a):
        steps = size(1 + jax.lax.stop_gradient(jnp.mean(jnp.tanh(x @ w["first"]))))
        out = jnp.tanh(x @ w["first"] + w["bias"]) @ w["last"]
        return fg.Losses([steps * jnp.sum((out - y) ** 2, axis=1)], [("example",)])

    step = fg.value_and_grad(lambda w: fun(w, fixed), estimator)
    plain = fg.value_and_grad(fun, estimator)
    key = {"key": jax.random.key(1)} if estimator.needs_key else {}
    for a, b in zip(*map(jax.tree.leaves, (step(w, **key), plain(w, **key))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("estimator", [fg.DirectFeedbackAlignment(), fg.FeedbackAlignment()])
def test_both_parts_of_complex_activations_get_an_error(estimator):
    """A real error that comes by a real matrix would say nothing to the imaginary part."""
    x = jax.random.normal(jax.random.key(0), (5, 3))

    def fun(w):
        h = jax.lax.complex(x @ w["real"], x @ w["imaginary"])
        out = jnp.abs(h @ w["middle"].astype(complex)) @ w["out"]
        return fg.Losses([jnp.sum((out - 1) ** 2, axis=1)], [("example",)])

    keys = jax.random.split(jax.random.key(1), 4)
    shapes = {"real": (3, 4), "imaginary": (3, 4), "middle": (4, 5), "out": (5, 2)}
    w = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
    grads = fg.value_and_grad(fun, estimator)(w)[1]
    sizes = [float(jnp.linalg.norm(grads[name])) for name in ("real", "imaginary")]
    assert 0.2 < sizes[0] / sizes[1] < 5
    right = fg.value_and_grad(fun, fg.Backpropagation())(w)[1]["out"]
    np.testing.assert_allclose(grads["out"], right, rtol=1e-4)
    init, step = fg.estimation(fun, estimator)
    kept = step(w, state=init(w))[1]
    for name, grad in grads.items():
        assert jnp.array_equal(kept[name], grad)


def test_direct_feedback_to_a_loop_whose_outputs_are_read_out():
    (x, y), w = data(0), {**weights(0), "state": 0.1 * jnp.eye(HIDDEN)}

    def fun(w):
        def step(h, x):
            h = jnp.tanh(x @ w["first"] + h @ w["state"] + w["bias"])
            return h, h

        _, states = jax.lax.scan(step, jnp.zeros((BATCH, HIDDEN)), jnp.stack([x, -x, x]))
        error = states @ w["last"] - y
        return fg.Losses([0.5 * jnp.sum(error**2, axis=(0, 2))], [("example",)])

    grads = fg.value_and_grad(fun, fg.DirectFeedbackAlignment())(w)[1]
    exact = jax.grad(lambda w: fun(w).total())(w)
    np.testing.assert_allclose(grads["last"], exact["last"], rtol=1e-4, atol=1e-5)
    for name in ("first", "state", "bias"):
        assert np.all(np.isfinite(grads[name]))
        assert np.any(grads[name])
        assert not np.allclose(grads[name], exact[name], rtol=0.01)


@jax.custom_vjp
def fed_back(x, w, feedback):
    del feedback
    return x @ w


fed_back.defvjp(
    lambda x, w, feedback: (x @ w, (x, feedback)),
    lambda saved, error: (error @ saved[1].T, saved[0].T @ error, None),
)


def test_a_weight_has_one_feedback_weight_in_all_iterations_of_a_loop():
    """And those of a stack, which a loop inside of the loop goes through, one each."""
    steps, (x, y) = 6, data(0)
    shapes = {"in": (6, HIDDEN), "state": (HIDDEN, HIDDEN), "stack": (2, HIDDEN, HIDDEN)}
    w = {n: 0.1 * jax.random.normal(jax.random.key(3), s) for n, s in shapes.items()}
    w["last"] = weights(0)["last"]

    def fun(w, feedback=None):
        mine = feedback or {name: w[name] for name in ("state", "stack", "last")}
        product = fed_back if feedback else lambda x, w, feedback: x @ w

        def layer(h, of_layer):
            return jnp.tanh(product(h, *of_layer)), None

        def step(h, x):
            h = jnp.tanh(x @ w["in"] + product(h, w["state"], mine["state"]))
            return jax.lax.scan(layer, h, (w["stack"], mine["stack"]))[0], None

        inputs = jnp.stack([x * i for i in range(steps)])
        h, _ = jax.lax.scan(step, jnp.zeros((BATCH, HIDDEN)), inputs)
        return jnp.sum((product(h, w["last"], mine["last"]) - y) ** 2)

    init, gradient = fg.estimation(fun, fg.FeedbackAlignment())
    state = init(w)
    by_shape = {a.shape: a for a in state.arrays.values()}
    feedback = {name: by_shape.pop(w[name].shape) for name in ("state", "stack", "last")}
    assert not by_shape
    assert not np.allclose(*feedback["stack"])
    expected = jax.jit(jax.grad(fun))(w, feedback)
    kept = jax.jit(lambda w, state: gradient(w, state=state)[1]).lower(w, state).compile()
    drawn = jax.jit(lambda w: fg.value_and_grad(fun, fg.FeedbackAlignment())(w)[1])
    drawn = drawn.lower(w).compile()
    for name, grad in expected.items():
        np.testing.assert_allclose(kept(w, state)[name], grad, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(drawn(w)[name], kept(w, state)[name])
    # Nothing of the feedback weights is kept from the way forwards to the way back.
    plain = jax.jit(jax.grad(fun)).lower(w).compile().memory_analysis().temp_size_in_bytes
    assert kept.memory_analysis().temp_size_in_bytes < 1.1 * plain
    own = sum(a.nbytes for a in state.arrays.values())
    assert drawn.memory_analysis().temp_size_in_bytes < 1.1 * plain + 3 * own
