"""All estimators against an oracle that shares no code with the library.

The oracle knows neither the signs nor the feedback weights that the library draws. It solves for
them, and predicts what the library says then.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import forwardgrad as fg
import oracle
from written_twice import NETWORKS

ALL = pytest.mark.parametrize("name", NETWORKS)
ONE_BLOCK = pytest.mark.parametrize("name", [n for n in NETWORKS if len(NETWORKS[n].blocks) == 1])
FEEDBACK = pytest.mark.parametrize("kind", [fg.FeedbackAlignment, fg.DirectFeedbackAlignment])
TOGETHER = pytest.mark.parametrize("together", [False, True], ids=["by example", "scalar"])
KEYS = jax.random.split(jax.random.key(3), 3000)


def objective(name, together=False):
    return NETWORKS[name].total if together else NETWORKS[name].losses


@functools.cache
def compiled(name, estimator, together=False):
    return oracle.jit(fg.value_and_grad(objective(name, together), estimator))


def gradients(name, estimator, made, key=None, together=False):
    return compiled(name, estimator, together)(*made, key=key)[1]


def assert_close(found, expected, tolerance=1e-3):
    """Every parameter's gradient, up to a share of its largest entry."""
    for name, right in expected.items():
        scale = jnp.max(jnp.abs(right)) + 1e-6
        np.testing.assert_allclose(found[name] / scale, right / scale, atol=tolerance, err_msg=name)


@functools.partial(oracle.jit, static_argnums=0)
def exact_credit(name, made):
    params, x, y = made
    found = oracle.forward(NETWORKS[name].blocks, params, x)
    return oracle.backpropagation(NETWORKS[name].blocks, params, found, y)


@functools.partial(oracle.jit, static_argnums=0)
def from_credit(name, made, credit):
    found = oracle.forward(NETWORKS[name].blocks, *made[:2])
    return oracle.gradients(NETWORKS[name].blocks, made[0], found, credit)


def exact(name, made):
    return from_credit(name, made, exact_credit(name, made))


@ALL
def test_both_writings_are_the_same_network(name):
    network, made = NETWORKS[name], NETWORKS[name].make(0)
    found = oracle.forward(network.blocks, *made[:2])
    for steps, output in zip(found, network.outputs(*made[:2]), strict=True):
        np.testing.assert_allclose(steps[-1].output, output, rtol=1e-4, atol=1e-5)
    assert_close(exact(name, made), jax.grad(network.total)(*made), 1e-5)


@ALL
def test_credit_can_be_told_from_gradients(name):
    """Without this the oracle could not contradict an estimator."""
    made = NETWORKS[name].make(0)
    credit = exact_credit(name, made)
    solved = oracle.credit_of(NETWORKS[name].blocks, *made[:2], exact(name, made))
    for a, b in zip(jax.tree.leaves(solved), jax.tree.leaves(credit), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


@ALL
def test_backpropagation_is_exact(name):
    made = NETWORKS[name].make(0)
    assert_close(gradients(name, fg.Backpropagation(), made), exact(name, made), 1e-5)


def test_greedy_losses_are_differentiated_block_by_block():
    """By `jax.grad` of each block on its own, with what goes into it a constant."""
    p, x, y = NETWORKS["greedy blocks"].make(0)
    h = jnp.tanh(jnp.tanh(x @ p["first"] + p["a"]) @ p["second"])

    def one(p):
        h = jnp.tanh(jnp.tanh(x @ p["first"] + p["a"]) @ p["second"])
        return 0.5 * jnp.sum((h @ p["early"] + p["c"] - y) ** 2)

    def two(p):
        return 0.5 * jnp.sum((jnp.tanh(h @ p["third"] + p["b"]) @ p["last"] - y) ** 2)

    expected = jax.tree.map(jnp.add, jax.grad(one)(p), jax.grad(two)(p))
    assert_close(exact("greedy blocks", (p, x, y)), expected, 1e-5)


@ALL
@TOGETHER
def test_fg_a_credits_a_sign_with_the_change_of_its_own_loss(name, together):
    """Whatever the signs on the products' outputs are; the heads are exact."""
    network, made = NETWORKS[name], NETWORKS[name].make(0)
    grads = gradients(name, fg.ActivityPerturbation(), made, KEYS[0], together)
    signs = _signs(oracle.credit_of(network.blocks, *made[:2], grads))
    credit = oracle.activity_perturbation(exact_credit(name, made), signs, together)
    assert_close(grads, from_credit(name, made, credit), 5e-3)


def _signs(credit):
    """The signs of credit, zero where it is zero but for rounding."""
    scale = max(jnp.max(jnp.abs(c)) for c in jax.tree.leaves(credit))
    return jax.tree.map(lambda c: jnp.where(jnp.abs(c) > 1e-4 * scale, jnp.sign(c), 0), credit)


@ALL
def test_fg_a_credit_has_one_size_within_an_example_and_block(name):
    """In all hidden layers, tokens and positions of it; zero where a unit is switched off."""
    network, made = NETWORKS[name], NETWORKS[name].make(1)
    grads = gradients(name, fg.ActivityPerturbation(), made, KEYS[2])
    for block in oracle.credit_of(network.blocks, *made[:2], grads):
        for example in range(3):
            sizes = np.concatenate([np.abs(np.ravel(layer[example])) for layer in block[:-1]])
            np.testing.assert_allclose(sizes[sizes > 1e-2 * sizes.max()], sizes.max(), rtol=2e-2)
            assert np.mean(sizes > 1e-2 * sizes.max()) > 0.2


@pytest.mark.slow
@ALL
@TOGETHER
def test_fg_a_is_unbiased(name, together):
    """The mean over keys is the exact gradient, within five standard errors of every entry."""
    made = NETWORKS[name].make(0)
    gradient = fg.value_and_grad(objective(name, together), fg.ActivityPerturbation())
    drawn = oracle.jit(jax.vmap(lambda key: ravel_pytree(gradient(*made, key=key)[1])[0]))(KEYS)
    drawn, expected = np.asarray(drawn, float), ravel_pytree(exact(name, made))[0]
    error = drawn.std(0) / np.sqrt(len(KEYS))
    slack = 1e-5 * np.abs(expected).max()
    assert np.all(np.abs(drawn.mean(0) - expected) <= 5 * error + slack)
    assert np.mean(error > slack) > 0.3


@ALL
def test_fg_w_is_a_sign_times_the_change_of_the_losses_that_a_parameter_reaches(name):
    """With greedy losses, those of its own block."""
    network, made = NETWORKS[name], NETWORKS[name].make(0)
    grads, right = gradients(name, fg.WeightPerturbation(), made, KEYS[0]), exact(name, made)
    for number in range(len(network.blocks)):
        reached = _parameters_of(network, number, made)
        change = sum(jnp.vdot(jnp.sign(grads[p]), right[p]) for p in reached)
        assert_close(grads, {p: change * jnp.sign(grads[p]) for p in reached})
        assert reached


def _parameters_of(network, number, made):
    terms = lambda p: jnp.sum(network.losses(p, *made[1:]).terms[number])  # noqa: E731
    return [name for name, grad in jax.grad(terms)(made[0]).items() if jnp.any(grad)]


@functools.cache
def solved(name, kind, seed=0):
    """The feedback matrices, from the gradients of 16 draws of weights and data."""
    return solved_from(name, kind, lambda made: gradients(name, kind(seed=seed), made))


def solved_from(name, kind, gradients_at):
    made = [NETWORKS[name].make(draw) for draw in range(16)]
    cases = [(*m, gradients_at(m)) for m in made]
    return oracle.solved(NETWORKS[name].blocks, cases, kind is fg.DirectFeedbackAlignment)


@functools.partial(oracle.jit, static_argnums=(0, 1))
def predicted(name, kind, made, feedback):
    params, x, y = made
    rule = {
        fg.FeedbackAlignment: oracle.feedback_alignment,
        fg.DirectFeedbackAlignment: oracle.direct_feedback_alignment,
    }[kind]
    blocks = NETWORKS[name].blocks
    found = oracle.forward(blocks, params, x)
    return oracle.gradients(blocks, params, found, rule(found, y, feedback))


def random_feedback(name, kind):
    """Matrices for every layer that has something to send back."""
    rng, feedback = np.random.default_rng(7), []
    for steps in oracle.forward(NETWORKS[name].blocks, *NETWORKS[name].make(0)[:2]):
        outputs = steps[-1].output.shape[-1]
        shapes = [(step.rows.shape[-1], step.output.shape[-1]) for step in steps[1:]]
        if kind is fg.DirectFeedbackAlignment:
            shapes = [(step.input[0].size, outputs) for step in steps[1:]]
        feedback.append([jnp.asarray(rng.standard_normal(s) / 2, jnp.float32) for s in shapes])
    return feedback


@pytest.mark.slow
@ALL
@FEEDBACK
def test_feedback_can_be_told_from_gradients(name, kind):
    """Without this the oracle could reject an estimator that is right."""
    right = random_feedback(name, kind)
    found = solved_from(name, kind, lambda made: predicted(name, kind, made, right))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-2)


@ALL
@TOGETHER
def test_signs_can_be_told_from_gradients(name, together):
    """Without this the oracle could reject an estimator that is right."""
    network, made = NETWORKS[name], NETWORKS[name].make(0)
    rng, of_exact = np.random.default_rng(8), exact_credit(name, made)
    signs = jax.tree.map(lambda c: jnp.asarray(rng.choice([-1.0, 1.0], c.shape)), of_exact)
    credit = oracle.activity_perturbation(of_exact, signs, together)
    solved = oracle.credit_of(network.blocks, *made[:2], from_credit(name, made, credit))
    for a, b in zip(jax.tree.leaves(_signs(solved)), jax.tree.leaves(credit), strict=True):
        np.testing.assert_array_equal(a, jnp.sign(b))


def check_prediction(name, kind):
    feedback = solved(name, kind)
    assert all(jnp.any(matrix) for matrix in jax.tree.leaves(feedback))
    for draw in (100, 101):
        made = NETWORKS[name].make(draw)
        expected = predicted(name, kind, made, feedback)
        assert_close(gradients(name, kind(), made, jax.random.key(draw)), expected, 1e-2)


@pytest.mark.slow
@ALL
def test_fa_is_predicted_at_other_weights_inputs_and_keys(name):
    """One matrix of the shape of each product's effective weight explains all gradients."""
    check_prediction(name, fg.FeedbackAlignment)


@pytest.mark.slow
@ONE_BLOCK
def test_dfa_is_predicted_at_other_weights_inputs_and_keys(name):
    """One matrix from an example's error to each layer's input explains all gradients."""
    check_prediction(name, fg.DirectFeedbackAlignment)


@pytest.mark.slow
@ONE_BLOCK
@FEEDBACK
def test_feedback_does_not_depend_on_the_number_of_examples(name, kind):
    made = NETWORKS[name].make(200, batch=7)
    expected = predicted(name, kind, made, solved(name, kind))
    assert_close(gradients(name, kind(), made), expected, 1e-2)


@ALL
def test_fa_is_no_backpropagation(name):
    """The feedback weights are not the weights."""
    made = NETWORKS[name].make(0)
    grads, right = gradients(name, fg.FeedbackAlignment(), made), exact(name, made)
    first = next(iter(right))
    assert _cosine(grads[first], right[first]) < 0.99


@FEEDBACK
def test_the_seed_decides_the_feedback(kind):
    zero, one = (solved("mlp with biases and relu", kind, seed) for seed in (0, 1))
    for a, b in zip(jax.tree.leaves(zero), jax.tree.leaves(one), strict=True):
        assert abs(_cosine(a, b)) < 0.6


def test_layers_of_a_stack_have_feedback_of_their_own():
    (matrices,) = solved("scan over a stack", fg.FeedbackAlignment)
    stack = matrices[:3]
    for i in range(3):
        assert all(abs(_cosine(stack[i], other)) < 0.6 for other in stack[:i])


@pytest.mark.parametrize("seed", [0, 1])
def test_feedback_weights_are_not_those_that_a_user_draws_from_the_same_seed(seed):
    """Weights from `jax.random.split(jax.random.key(seed))` would make it backpropagation."""
    root = jax.random.key(seed)
    keys = [root, *[jax.random.fold_in(root, i) for i in range(8)]]
    keys += [key for n in range(2, 9) for key in jax.random.split(root, n)]
    (matrices,) = solved("mlp with biases and relu", fg.FeedbackAlignment, seed)
    for matrix in matrices:
        for key in keys:
            assert abs(_cosine(matrix, jax.random.normal(key, matrix.shape))) < 0.75


def _cosine(a, b):
    return float(jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b))
