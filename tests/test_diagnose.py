"""What a diagnosis says, against what is known exactly."""

import dataclasses
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad import _diagnose
from forwardgrad._diagnosis import HEADS
from forwardgrad._moments import products_of_samples
from forwardgrad._moments import row as row_of
from forwardgrad.experiments._theory import activity_variances, weight_variances
from forwardgrad.networks import LocalMixer, Size
from forwardgrad.objectives import GlobalLoss, LocalLoss
from forwardgrad.training import Problem, configure, problem
from forwardgrad.training._config import options_of

KEY = jax.random.key(7)
TARGET = {"a": jnp.arange(1.0, 7.0).reshape(2, 3), "b": jnp.array([-2.0, 3.0])}
ZEROS = jax.tree.map(jnp.zeros_like, TARGET)
X = jax.random.normal(jax.random.key(0), (16, 4))
LAYERS = {
    "first": jax.random.normal(jax.random.key(1), (4, 8)),
    "last": jax.random.normal(jax.random.key(2), (8, 2)),
}


def quadratic(params):
    parts = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2) / 2, params, TARGET)
    return parts["a"] + parts["b"]


def two_layers(params, x=X):
    out = jnp.tanh(x @ params["first"]) @ params["last"]
    return fg.Losses([jnp.mean(out**2, axis=1) / len(x)], [("example",)])


def found(estimator, fun=quadratic, params=ZEROS, key=KEY, **settings):
    return fg.diagnose(fun, estimator, params, key=key, **settings)


class Fixed(fg.AbstractEstimator):
    """Estimates of the exact gradient plus a bias, with independent noise."""

    bias: float = 0.0
    noise: float = 0.0

    @property
    def needs_key(self):
        return True

    def value_and_grad(self, fun, params, key):
        out, grads = fg.Backpropagation().value_and_grad(fun, params, None)
        leaves, treedef = jax.tree.flatten(grads)
        keys = jax.random.split(key, len(leaves))
        return out, treedef.unflatten(
            g + self.bias + self.noise * jax.random.normal(k, g.shape)
            for g, k in zip(leaves, keys, strict=True)
        )


# Statistics


@pytest.mark.parametrize("structure", ["dense", "rank-one"])
def test_variance_of_weight_perturbation(structure):
    """V = n |g|^2 - |g_l|^2 for a layer of n parameters, within five standard errors."""
    diagnosis = found(fg.WeightPerturbation(structure=structure), samples=2000)
    square = sum(float(jnp.sum(t**2)) for t in TARGET.values())
    for row in diagnosis.rows:
        own = square if row.name == "all" else float(jnp.sum(TARGET[row.name[2]] ** 2))
        assert row.norm**2 == pytest.approx(own, rel=1e-5)
        expected = row.parameters * square - own
        assert row.variance == pytest.approx(expected, abs=5 * row.variance_error)
        assert row.variance_error < 0.05 * expected
    assert diagnosis.total.relative_variance == pytest.approx(7, rel=0.15)


def test_every_number_of_known_noise():
    """Gaussian noise of known size on a known gradient: mean, variance, errors, derived ones."""
    row = found(Fixed(bias=0.5, noise=2.0), samples=4000).total
    square = sum(float(jnp.sum(t**2)) for t in TARGET.values())
    assert row.variance == pytest.approx(8 * 4, rel=0.04)
    # The variance of a pair's |difference|^2 / 2 is 2 * 8 * 2^4.
    assert row.variance_error == pytest.approx((256 / 2000) ** 0.5, rel=0.1)
    assert row.bias_squared == pytest.approx(8 * 0.25, abs=0.3)
    # tr Sigma^2 = 8 * 2^4, whatever the bias.
    assert row.bias_squared_error == pytest.approx((2 * 128) ** 0.5 / 4000, rel=0.1)
    assert row.bias == pytest.approx((row.bias_squared / square) ** 0.5)
    assert row.bias_z == row.bias_squared / row.bias_squared_error > 40
    assert row.relative_variance == pytest.approx(row.variance / square)
    assert row.variance_per_parameter == row.variance / 8
    assert row.signal_to_noise == pytest.approx((square / row.variance) ** 0.5)
    mean = jnp.concatenate([t.ravel() for t in TARGET.values()]) * -1 + 0.5
    exact = mean - 0.5
    cosine = float(mean @ exact / jnp.linalg.norm(mean) / jnp.linalg.norm(exact))
    assert row.cosine_of_mean == pytest.approx(cosine, abs=0.01)
    assert 0 < row.cosine < cosine


def test_cosine_is_the_mean_over_samples():
    keys = jax.random.split(KEY, 10)
    gradient = fg.value_and_grad(quadratic, Fixed(noise=3.0))
    exact = -TARGET["a"].ravel()
    drawn = [gradient(ZEROS, key=k)[1]["a"].ravel() for k in keys]
    cosines = [g @ exact / jnp.linalg.norm(g) / jnp.linalg.norm(exact) for g in drawn]
    row = found(Fixed(noise=3.0), samples=10).layers[0]
    assert row.cosine == pytest.approx(np.mean(cosines), rel=1e-5)
    assert row.cosine_error == pytest.approx(np.std(cosines) / 10**0.5, rel=1e-4)


UNBIASED = {
    "weights": fg.WeightPerturbation(),
    "weights, dense, normal": fg.WeightPerturbation(structure="dense", distribution="normal"),
    "activities": fg.ActivityPerturbation(),
    "activities, four tangents": fg.ActivityPerturbation(tangents=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNBIASED)
def test_no_bias_where_there_is_none(name):
    """z of five keys and three rows: mean 0, variance 1, skewed to the right."""
    z = [
        row.bias_z
        for i in range(5)
        for row in found(UNBIASED[name], two_layers, LAYERS, jax.random.key(i)).rows
        if row.variance
    ]
    assert len(z) >= 5
    assert max(np.abs(z)) < 5
    assert abs(np.mean(z)) < 1


def gaussian(shape, samples, seed):
    """The row of estimates that are noise alone, around an exact gradient of ones."""
    keys = jax.random.split(jax.random.key(seed), samples)
    exact = [jnp.ones(shape)]
    products = products_of_samples(lambda k: [1 + jax.random.normal(k, shape)], exact, keys)
    return row_of("w", exact[0].size, products.of([0]), 1e-7)


@pytest.mark.parametrize("shape", [(), (8,)])
def test_z_has_mean_zero_and_variance_one(shape):
    """Noise in one direction, and in eight."""
    z = [gaussian(shape, 32, seed).bias_z for seed in range(100)]
    # The standard error of the mean is 0.1, that of the variance at most 0.4.
    assert abs(np.mean(z)) < 0.35
    assert 0.4 < np.var(z) < 2.2


def test_a_small_bias_is_found_below_the_noise_of_a_sample():
    row = found(Fixed(bias=0.3, noise=3.0), samples=2000).total
    assert row.bias_z > 5
    assert row.cosine_of_mean > 0.99
    row = found(Fixed(bias=0.3, noise=3.0), samples=4).total
    assert abs(row.bias_z) < 5


def test_clipping_is_a_bias():
    assert found(fg.WeightPerturbation(clip=0.1)).total.bias_z > 50


def test_feedback_alignment_is_biased_and_has_no_variance():
    first, last, total = found(fg.FeedbackAlignment(), two_layers, LAYERS).rows
    for row in (first, total):
        assert row.bias_z > 1000
        assert row.bias > 0.1
        assert row.cosine < 0.99
    # The last layer's gradient is exact, up to rounding.
    assert abs(last.bias_z) < 1
    assert last.cosine == pytest.approx(1, abs=1e-5)
    for row in (first, last, total):
        assert row.variance == row.variance_error == row.relative_variance == 0
        assert row.signal_to_noise is None


def test_the_exact_estimator_is_exact():
    diagnosis = found(fg.Backpropagation(), two_layers, LAYERS)
    assert diagnosis.samples == 2
    assert diagnosis.flops_ratio == diagnosis.temp_bytes_ratio == 1
    for row in diagnosis.rows:
        assert row.bias == row.bias_z == row.variance == 0
        assert row.cosine == row.cosine_of_mean == pytest.approx(1)


def test_noise_that_happens_to_be_none():
    """A random estimator without noise: variance is zero, not what rounding leaves."""
    row = found(Fixed(bias=0.1)).total
    assert row.variance == 0
    assert row.bias_z > 1000


# Rows, JSON, text


def test_names_sizes_and_json():
    diagnosis = found(fg.WeightPerturbation())
    assert [row.name for row in diagnosis.rows] == ["['a']", "['b']", "all"]
    assert [row.parameters for row in diagnosis.rows] == [6, 2, 8]
    assert diagnosis.samples == 256
    stored = json.loads(json.dumps(diagnosis.as_json(), allow_nan=False))
    assert stored == diagnosis.as_json()
    rebuilt = [
        fg.DiagnosisRow(**{f.name: row[f.name] for f in dataclasses.fields(fg.DiagnosisRow)})
        for row in (*stored["layers"], stored["total"])
    ]
    assert rebuilt == list(diagnosis.rows)
    assert stored["total"]["relative_variance"] == diagnosis.total.relative_variance
    assert stored["flops_ratio"] == diagnosis.flops / diagnosis.exact_flops


def test_an_array_alone_is_a_layer():
    diagnosis = fg.diagnose(lambda w: jnp.sum(w**2), fg.WeightPerturbation(), jnp.ones(3), key=KEY)
    assert [row.name for row in diagnosis.rows] == ["params", "all"]


def test_text_has_a_line_a_layer():
    lines = str(found(fg.FeedbackAlignment(), two_layers, LAYERS)).splitlines()
    assert "FeedbackAlignment" in lines[0]
    assert lines[1].split()[:2] == list(HEADS[:2])
    assert [line.split()[0] for line in lines[2:5]] == ["['first']", "['last']", "all"]
    assert len({len(line) for line in lines[1:5]}) == 1
    assert "times backpropagation's" in lines[5]
    assert len(lines) == 6


def test_an_unused_layer_has_no_direction():
    def fun(params):
        return jnp.sum(params["used"] ** 2)

    params = {"unused": jnp.ones(2), "used": jnp.ones(3), "empty": jnp.ones((0, 2))}
    diagnosis = found(fg.WeightPerturbation(), fun, params)
    empty, unused, used, total = diagnosis.rows
    for row in (empty, unused):
        assert row.norm == row.variance == row.bias_squared == 0
        assert row.cosine is row.bias is row.bias_z is row.relative_variance is None
    assert used.norm == total.norm
    json.dumps(diagnosis.as_json(), allow_nan=False)
    str(diagnosis)


def test_a_gradient_of_zero_that_is_estimated_as_another_is_biased():
    row = found(Fixed(bias=1.0), lambda p: 0 * p["w"].sum(), {"w": jnp.ones(3)}).total
    assert row.norm == 0
    assert row.bias is None
    assert row.bias_squared == pytest.approx(3)
    assert row.bias_z > 1000


# Any function


def test_other_arguments_and_auxiliary_data():
    def fun(params, x, scale, flag, *, power):
        assert flag == "a string"
        return scale * jnp.sum((x @ params) ** power), {"seen": x}

    arguments = (np.ones((5, 3), np.float32), 2.0, "a string")
    diagnosis = fg.diagnose(
        *(fun, fg.WeightPerturbation(), jnp.ones(3), *arguments),
        **{"key": KEY, "has_aux": True, "power": 2, "samples": 4},
    )
    assert diagnosis.total.norm == pytest.approx(2 * 5 * 2 * 3 * 3**0.5)


def test_half_precision():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), LAYERS)
    diagnosis = found(fg.ActivityPerturbation(), two_layers, params, samples=64)
    assert diagnosis.total.cosine_of_mean > 0.9
    assert abs(diagnosis.total.bias_z) < 5


def looping(w):
    return jax.lax.while_loop(lambda h: jnp.sum(h) < 50, lambda h: h * w, jnp.ones(3)).sum()


def test_a_while_loop_has_its_gradient_from_forward_mode():
    w = jnp.array([1.5, 2.0, 1.2])
    diagnosis = fg.diagnose(looping, fg.WeightPerturbation(), w, key=KEY, samples=1000)
    exact = np.linalg.norm(jax.jacfwd(looping)(w))
    assert diagnosis.total.norm == pytest.approx(exact, rel=1e-5)
    assert diagnosis.total.variance == pytest.approx(
        2 * exact**2, abs=5 * diagnosis.total.variance_error
    )
    assert abs(diagnosis.total.bias_z) < 5
    assert diagnosis.exact_flops is diagnosis.flops_ratio is diagnosis.temp_bytes_ratio is None
    assert diagnosis.flops > 0
    assert "operations;" in str(diagnosis)


def test_more_parameters_than_forward_passes():
    w = jnp.ones(_diagnose.FORWARD_LIMIT // 2 + 1)
    with pytest.raises(fg.InputError, match=r"params \(=10,002 numbers\) must be no more than"):
        found(fg.WeightPerturbation(), lambda p: looping(p[0][:3]) + p[1][0], [w, w])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("samples", [0, 2, 5, 4.0])
def test_samples_come_in_pairs(samples):
    with pytest.raises(fg.InputError, match="samples must be an even number of at least 4, got"):
        found(fg.WeightPerturbation(), samples=samples)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("fun", "params", "match"),
    [
        (quadratic, {}, "params holds no arrays"),
        (quadratic, {"a": jnp.arange(3)}, "must be a floating-point array, got an int32 array"),
        (lambda p: p["a"], ZEROS, "fun must return a real floating-point scalar"),
    ],
)
def test_what_value_and_grad_refuses(fun, params, match):
    with pytest.raises(fg.InputError, match=match):
        found(fg.WeightPerturbation(), fun, params)


def test_an_error_of_the_function_is_its_own():
    def fun(params):
        raise ValueError("a shape does not fit")

    with pytest.raises(ValueError, match="a shape does not fit"):
        found(fg.Backpropagation(), fun)


# Cost


def big(params):
    h = X @ params["first"]
    return jnp.mean(jnp.tanh(h @ params["second"]) ** 2)


BIG = {"first": jnp.full((4, 512), 0.1), "second": jnp.full((512, 512), 0.01)}


def test_memory_does_not_grow_with_samples(monkeypatch):
    """Arrays alive while samples are drawn: a handful of gradients, after 4 as after 200."""
    one, peaks = sum(leaf.nbytes for leaf in BIG.values()), []
    drawn = _diagnose._Gradient.__call__

    def measured(self, key):
        grads = drawn(self, key)
        peaks[-1] = max(peaks[-1], sum(a.nbytes for a in jax.live_arrays()) - before)
        return grads

    monkeypatch.setattr(_diagnose._Gradient, "__call__", measured)
    for samples in (4, 200):
        before = sum(a.nbytes for a in jax.live_arrays())
        peaks.append(0)
        found(fg.WeightPerturbation(), big, BIG, samples=samples)
    assert 3 * one < peaks[0] < 8 * one
    assert peaks[1] < peaks[0] + 0.1 * one


def test_cost_is_that_of_the_compiled_gradients():
    diagnosis = found(fg.WeightPerturbation(), big, BIG, samples=4)
    compiled = jax.jit(jax.grad(big)).lower(BIG).compile()
    assert diagnosis.exact_flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.01)
    assert diagnosis.exact_temp_bytes == compiled.memory_analysis().temp_size_in_bytes
    assert diagnosis.flops_ratio == diagnosis.flops / diagnosis.exact_flops


# A training step, and theory


def test_problem_is_the_first_step_of_a_run():
    config = configure(network="logreg", algorithm="bp", batch_size=32, seed=3)
    step = problem(config)
    assert step.batch[0].shape == (32, 8, 8, 1)
    assert isinstance(step.estimator, fg.Backpropagation)
    other = problem(configure(**{**options_of(config), "algorithm": "fg-w"}))
    assert other.estimator.tangents == 16
    for a, b in zip(
        jax.tree.leaves((step.params, step.batch)),
        jax.tree.leaves((other.params, other.batch)),
        strict=True,
    ):
        assert jnp.array_equal(a, b)


def mixer(groups, objective, estimator):
    network = LocalMixer((4, 4, 1), Size(16, 1, groups, 1), 3, key=jax.random.key(0))
    # The heads' small weights at the start would leave the gradient to rounding.
    network = eqx.tree_at(
        lambda n: [n.classifier.weight, n.heads[0].weight, n.blocks[0].channel_bias],
        network,
        [
            jax.random.normal(jax.random.key(i), shape)
            for i, shape in enumerate([(16, 3), (16, 3), (16,)])
        ],
    )
    params, static = eqx.partition(network, eqx.is_inexact_array)
    images = jax.random.normal(jax.random.key(1), (4, 4, 4, 1))

    def loss(params, images, labels):
        return objective(eqx.combine(params, static), images, labels)

    return Problem(loss, params, (images, jnp.array([0, 1, 2, 0])), estimator)


def predicted_by(predict, step):
    """The variances by layer, as NumPy arrays; compiled as one program."""
    return {name: np.asarray(v) for name, v in jax.jit(lambda: predict(step))().items()}


THEORY = {
    "fg-w": (GlobalLoss(), fg.WeightPerturbation(exact_last=True), weight_variances),
    "lg-fg-w": (LocalLoss(), fg.WeightPerturbation(exact_last=True), weight_variances),
    "fg-a": (GlobalLoss(), fg.ActivityPerturbation(), activity_variances),
    "lg-fg-a": (LocalLoss(), fg.ActivityPerturbation(), activity_variances),
}


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", THEORY)
def test_theory_of_every_entry(name, groups):
    """Every entry within five standard errors, every layer's total within four."""
    objective, estimator, predict = THEORY[name]
    step = mixer(groups, objective, estimator)
    gradient = fg.value_and_grad(step.loss, estimator, has_aux=True)
    keys = jax.random.split(KEY, 6_000)
    drawn = jax.jit(lambda k: jax.lax.map(
        lambda k: gradient(step.params, *step.batch, key=k)[1], k, batch_size=100
    ))(keys)  # fmt: skip
    by_name = {
        jax.tree_util.keystr(path): np.asarray(leaf, float)
        for path, leaf in jax.tree_util.tree_flatten_with_path(drawn)[0]
    }
    predicted = predicted_by(predict, step)
    assert len(predicted) == 4
    for layer, expected in predicted.items():
        squares = (by_name[layer] - by_name[layer].mean(0)) ** 2
        error = squares.std(0) / np.sqrt(len(keys))
        assert np.all(np.abs(squares.mean(0) - expected) <= 5 * error + 1e-5 * squares.max())
        total = squares.reshape(len(keys), -1).sum(1)
        error = total.std() / np.sqrt(len(keys))
        assert abs(total.mean() - expected.sum()) < 4 * error < 0.2 * expected.sum()
    # All other layers are exact.
    others = [by_name[layer] for layer in by_name if layer not in predicted]
    assert max(np.ptp(leaf, axis=0).max() for leaf in others) < 1e-6


@pytest.mark.parametrize("name", THEORY)
def test_diagnosis_and_theory_agree(name):
    objective, estimator, predict = THEORY[name]
    step = mixer(2, objective, estimator)
    predicted = predicted_by(predict, step)
    arguments = {"key": KEY, "has_aux": True, "samples": 1000}
    diagnosis = fg.diagnose(step.loss, estimator, step.params, *step.batch, **arguments)
    rows = {row.name: row for row in diagnosis.layers}
    for layer, expected in predicted.items():
        row = rows[layer]
        assert row.variance == pytest.approx(float(expected.sum()), abs=5 * row.variance_error)
        assert row.variance_error < 0.1 * row.variance


# The identity of one tangent


def masked_layers(w, x):
    hidden = jnp.tanh(x @ jnp.where(jnp.tril(jnp.ones((4, 4))) > 0, w["in"], 0))
    return jnp.mean((hidden @ w["out"]) ** 2)


def test_the_identity_of_one_tangent():
    w = {"in": jnp.ones((4, 4)), "out": jnp.ones((4, 2)), "unused": jnp.ones(3)}
    x = jax.random.normal(jax.random.key(0), (8, 4))
    for estimator in (fg.WeightPerturbation(tangents=4, clip=0.1), fg.WeightPerturbation(rank=2)):
        found = fg.diagnose(
            masked_layers, estimator, w, x, key=jax.random.key(1), samples=4, check=True
        )
        assert found.identity_error < 1e-4
        assert "identity of one tangent off by" in str(found)
        assert found.as_json()["identity_error"] == found.identity_error


def test_the_identity_finds_a_gradient_of_something_else():
    """A function whose reverse rule is not its derivative, and cannot be transposed."""

    @jax.custom_vjp
    def off(x):
        return jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, 2 * c[1]), (0, x))[1]

    def backward(_, g):
        return (jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, 3 * c[1]), (0, g))[1],)

    off.defvjp(lambda x: (off(x), None), backward)
    found = fg.diagnose(
        lambda w: jnp.sum(off(w) ** 2),
        *(fg.WeightPerturbation(), jnp.ones(5)),
        key=jax.random.key(1),
        samples=4,
        check=True,
    )
    assert 0.4 < found.identity_error < 0.6


def test_the_identity_is_that_of_perturbed_weights():
    with pytest.raises(fg.InputError, match="check must be False but for WeightPerturbation"):
        fg.diagnose(
            lambda w: jnp.sum(w**2),
            *(fg.ActivityPerturbation(), jnp.ones(5)),
            key=jax.random.key(1),
            samples=4,
            check=True,
        )
