import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from forwardgrad import (
    Backpropagation,
    BalancedTangents,
    ControlVariate,
    InputError,
    WeightPerturbation,
    data,
    objectives,
)
from forwardgrad.augmentation import build as build_augmentation
from forwardgrad.networks import build
from forwardgrad.objectives import GlobalLoss
from forwardgrad.results import Measurement
from forwardgrad.training import TrainConfig, _batches, _setup, configure, fit, load_run
from forwardgrad.training._algorithms import ESTIMATORS
from forwardgrad.training._batches import BATCH, Inputs, make_evaluation, make_feeds
from forwardgrad.training._config import (
    NoiseSettings,
    Optimizer,
    fitting,
    not_default,
    options_of,
)
from forwardgrad.training._metrics import Metrics
from forwardgrad.training._setup import optimiser, schedule
from forwardgrad.training._state import initial_state, make_advance, slow_in_loops

STEPS = 1437 // 64


def small(**settings) -> TrainConfig:
    """A run of the smallest network on digits, a second or two."""
    return configure(**{"network": "logreg", "algorithm": "bp", "epochs": 2, **settings})


def lines(folder: Path, event: str | None = None) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if event in (None, line["event"])]


@contextlib.contextmanager
def fails(match: str):
    """The block must raise an `InputError`, of one line, with these words."""
    with pytest.raises(InputError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


@functools.cache
def digits() -> data.Dataset:
    return data.load("digits")


def split(count: int, *, seed: int = 0) -> data.ResidentSplit:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 4, 3, 1), dtype=np.uint8)
    return data.ResidentSplit(images, rng.integers(0, 5, count, dtype=np.int32))


def same(a, b) -> bool:
    return bool(eqx.tree_equal(a, b))


# Settings


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"seed": -1}, "seed must be from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "seed must be from 0 to 4294967295, got 4294967296"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"tangents": 0}, "tangents must be an integer of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be more than 0.0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be more than 0.0, got nan"),
        ({"clip": 0.0}, "clip must be positive or None, got 0.0"),
        ({"momentum": 1.0}, "momentum must be below 1.0, got 1.0"),
        ({"momentum": 0.9, "optimizer": "adam"}, "momentum .* not a setting of optimizer 'adam'"),
        ({"optimizer": "adm"}, "optimizer 'adm' is unknown; did you mean 'adam'"),
        ({"schedule": "cosin"}, "schedule 'cosin' is unknown; did you mean 'cosine'"),
        ({"distribution": "gauss"}, "distribution 'gauss' is unknown"),
        ({"task": "contrast"}, "task 'contrast' is unknown; did you mean 'contrastive'"),
        ({"task": "contrastive", "temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"accumulate": 3}, r"accumulate \(=3\) must divide batch_size, which is 64"),
        (
            {"task": "contrastive", "accumulate": 2},
            r"accumulate \(=2\) must be 1 with task 'contrastive'",
        ),
        (
            {"task": "contrastive", "batch_size": 1},
            "batch_size must be at least 2 with task 'contrastive', got 1",
        ),
        (
            {"task": "contrastive", "augment": "none"},
            "augment must not be 'none' with task 'contrastive'",
        ),
        (
            {"algorithm": "fg-a", "balance": "both"},
            "balance 'both' is unknown; did you mean 'absolute'",
        ),
        (
            {"algorithm": "fg-w", "control_variate": True},
            "control_variate must be False for algorithm 'fg-w', which perturbs weights",
        ),
        ({"structure": "rank-two"}, "structure 'rank-two' is unknown; did you mean 'rank-one'"),
    ],
)
def test_settings_out_of_range(settings, match):
    with fails(match):
        configure(**settings)


def test_an_algorithm_fills_in_what_is_not_set():
    row = ESTIMATORS["fg-w"]
    assert configure().estimator == row.estimator
    assert configure(tangents=3).estimator == dataclasses.replace(row.estimator, tangents=3)
    assert configure().optimisation.learning_rate == row.defaults["learning_rate"]
    assert configure(learning_rate=0.5).optimisation.learning_rate == 0.5
    assert configure(algorithm="bp").optimisation.momentum == 0.9
    assert configure(algorithm="bp", optimizer="adam").optimisation.momentum == 0.0
    mixer = configure(task="contrastive", algorithm="lg-fg-a", network="m/8/16", temperature=0.1)
    assert mixer.objective == objectives.LocalLoss(objectives.Contrastive(0.1))
    assert (mixer.estimator.tangents, mixer.optimisation.learning_rate) == (1, 0.05)
    assert mixer.data.augmentation.augment == "simclr"


def test_settings_of_another_algorithm():
    with fails("tangents is not a setting of algorithm 'bp' for task 'supervised'"):
        configure(algorithm="bp", tangents=2)
    assert fitting(algorithm="bp", tangents=2) == configure(algorithm="bp")
    with fails("setting 'tangent' is unknown; did you mean 'tangents'"):
        fitting(tangent=2)
    with fails("objective and estimator must be those of algorithm 'fg-w'"):
        dataclasses.replace(configure(algorithm="bp"), algorithm="fg-w")
    with fails("balance is not a setting of algorithm 'fa' for task 'supervised'"):
        configure(algorithm="fa", balance="relative")
    with fails("noise of algorithm 'fa' must be like NoSettings"):
        dataclasses.replace(configure(algorithm="fa"), noise=NoiseSettings())


@pytest.mark.parametrize("rule", ["relative", "absolute"])
@pytest.mark.parametrize("algorithm", ["lg-fg-a", "np", "lg-fg-w"])
def test_balance_is_an_option_of_perturbations(rule, algorithm):
    plain = configure(algorithm=algorithm, tangents=3)
    assert plain.wrapped_estimator is plain.estimator
    config = configure(algorithm=algorithm, tangents=3, balance=rule)
    assert config.estimator == plain.estimator
    assert config.wrapped_estimator == BalancedTangents(plain.estimator, rule)
    assert configure(**options_of(config)) == config
    given = {"algorithm": algorithm, "tangents": 3, "balance": rule}
    assert not_default(config) == given
    assert configure(**given) == config


def test_guesses_go_around_balanced_tangents():
    options = {"algorithm": "lg-fg-a", "control_variate": True, "tangents": 3}
    config, both = configure(**options), configure(**options, balance="relative")
    assert config.wrapped_estimator == ControlVariate(config.estimator)
    assert both.wrapped_estimator == ControlVariate(BalancedTangents(config.estimator))
    assert not_default(config) == options


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("fgw", "algorithm 'fgw' is unknown; did you mean 'fg-w'"),
        ("l-dfa", "algorithm 'l-dfa' is not defined: direct feedback alignment sends"),
    ],
)
def test_unknown_algorithms(name, match):
    with fails(match):
        configure(algorithm=name)


# Optimisers and schedules


def rates(steps: int, at: list[int], **settings) -> np.ndarray:
    rate = schedule(configure(learning_rate=0.5, **settings), steps)
    return np.array([rate(i) for i in at])


def test_schedules():
    at = [0, 50, 100]
    np.testing.assert_allclose(rates(100, at, schedule="constant"), [0.5, 0.5, 0.5])
    np.testing.assert_allclose(rates(100, at, schedule="linear"), [0.5, 0.25, 0], atol=1e-7)
    np.testing.assert_allclose(rates(100, at, schedule="cosine"), [0.5, 0.25, 0], atol=1e-7)
    np.testing.assert_allclose(
        rates(100, at, schedule="exponential", decay=0.01), 0.5 * np.exp([0, -0.5, -1]), rtol=1e-6
    )


def test_warm_up_comes_before_the_schedule():
    found = rates(30, [0, 5, 10, 20, 30], schedule="linear", warmup=10)
    np.testing.assert_allclose(found, [0, 0.25, 0.5, 0.25, 0], atol=1e-7)


@pytest.mark.parametrize("name", Optimizer.__args__)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_every_optimiser_descends(name, weight_decay):
    config = configure(
        optimizer=name, learning_rate=0.05, schedule="constant", weight_decay=weight_decay
    )
    transformation = optimiser(config, 100)
    params = jnp.array([1.0, -2.0])
    state = transformation.init(params)
    for _ in range(100):
        updates, state = transformation.update(2 * params, state, params)
        params = optax.apply_updates(params, updates)
    assert jnp.sum(params**2) < 0.05


def test_sgd_with_momentum_and_weight_decay_by_hand():
    config = configure(learning_rate=0.1, schedule="constant", momentum=0.5, weight_decay=0.01)
    transformation = optimiser(config, 10)
    w, grad, velocity = jnp.array([1.0]), jnp.array([2.0]), 0.0
    state = transformation.init(w)
    for _ in range(3):
        velocity = 0.5 * velocity + grad + 0.01 * w
        expected = w - 0.1 * velocity
        updates, state = transformation.update(grad, state, w)
        w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(w, expected, rtol=1e-6)


# The compiled loop


PLAIN = Inputs(build_augmentation("none"), 1, jnp.zeros(1), jnp.ones(1))


def loop(estimator, compiled_loop=True, parts=1):
    """An advance function with its first state, and a feed of random examples."""
    examples = split(48)

    def loss(params, images, labels):
        logits = images.reshape(len(images), -1) @ params["W"] + params["b"]
        value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return value, {"errors": jnp.sum(jnp.argmax(logits, -1) != labels)}

    params = {"W": jnp.ones((12, 5)) * 0.1, "b": jnp.zeros(5)}
    transformation = optax.adam(0.01)
    key = jax.random.key(7)
    feed, _, steps = next(make_feeds(examples, 8, key, 0)(0, 0))
    state = initial_state(params, transformation, steps)
    advance = make_advance(
        loss, PLAIN, estimator, transformation, (key, key), parts=parts, compiled_loop=compiled_loop
    )
    return advance, state, feed, loss, transformation


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.mark.parametrize("compiled_loop", [True, False])
@pytest.mark.parametrize("estimator", [Backpropagation(), WeightPerturbation(tangents=3)])
def test_cutting_an_epoch_changes_no_bit(estimator, compiled_loop):
    advance, state, feed, *_ = loop(estimator, compiled_loop)
    whole = advance(copy(state), feed, 0, 6)
    parts = copy(state)
    for start, stop in ((0, 0), (0, 1), (1, 4), (4, 6)):
        parts = advance(parts, feed, start, stop)
    assert same(whole, parts)
    assert not same(whole.params, state.params)


def test_one_program_serves_all_lengths():
    advance, state, feed, *_ = loop(WeightPerturbation())
    for start, stop in ((0, 1), (1, 3), (3, 6)):
        state = advance(state, feed, start, stop)
    assert advance._cache_size() == 1


@pytest.mark.parametrize("compiled_loop", [True, False])
def test_steps_are_what_one_would_write_by_hand(compiled_loop):
    advance, state, feed, loss, transformation = loop(Backpropagation(), compiled_loop)
    params, optimiser_state, losses, errors = copy(state.params), state.optimiser, [], []
    for batch in np.asarray(feed.order):
        images, labels = feed.examples[batch] / 255, feed.labels[batch]
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, images, labels)
        updates, optimiser_state = transformation.update(grads, optimiser_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(value)
        errors.append(aux["errors"])
    after = advance(copy(state), feed, 0, 6)
    assert int(after.step) == 6
    np.testing.assert_allclose(after.params["W"], params["W"], rtol=1e-5)
    np.testing.assert_allclose(after.losses, losses, rtol=1e-5)
    np.testing.assert_array_equal(after.errors, errors)


@pytest.mark.parametrize(("network", "slow"), [("mlp", False), ("cnn", True)])
def test_convolutions_leave_the_compiled_loop(network, slow):
    """XLA's CPU backend compiles their gradients well outside of loops only."""
    params, static = eqx.partition(
        build(network, image_shape=(8, 8, 1), classes=3, width=4, key=jax.random.key(0)),
        eqx.is_inexact_array,
    )

    def loss(params, images, labels):
        return GlobalLoss()(eqx.combine(params, static), images / 255, labels)

    images = jnp.zeros((1, 8, 8, 1), jnp.uint8)
    assert slow_in_loops(loss, params, images, jnp.zeros(1, int)) is slow


@pytest.mark.parametrize("compiled_loop", [True, False])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(compiled_loop):
    whole, state, feed, *_ = loop(Backpropagation(), compiled_loop)
    in_parts, *_ = loop(Backpropagation(), compiled_loop, parts=4)
    expected, found = whole(copy(state), feed, 0, 6), in_parts(copy(state), feed, 0, 6)
    np.testing.assert_allclose(found.params["W"], expected.params["W"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    np.testing.assert_array_equal(found.errors, expected.errors)


def test_parts_have_tangents_of_their_own():
    """Averaged, they have less noise than the whole with one tangent, here nearly a fourth."""
    gradients = {}
    for parts in (1, 4):
        advance, state, feed, *_ = loop(WeightPerturbation(), parts=parts)
        one = eqx.tree_at(lambda f: f.order, feed, jnp.tile(feed.order[:1, :2], (6, 4)))
        steps = [eqx.tree_at(lambda s, i=i: s.step, copy(state), jnp.array(i)) for i in range(40)]
        # Adam's first moment after one step is a tenth of the gradient.
        moments = [advance(s, one, 0, 1).optimiser[0].mu["W"] for s in steps]
        gradients[parts] = np.stack(moments).var(0).sum()
    assert 0.15 < gradients[4] / gradients[1] < 0.4


def test_every_step_has_tangents_of_its_own():
    advance, state, feed, *_ = loop(WeightPerturbation())
    first = advance(copy(state), feed, 0, 1)
    later = advance(eqx.tree_at(lambda s: s.step, copy(state), jnp.array(1)), feed, 0, 1)
    assert not same(first.params, later.params)


# Feeds


def test_an_epoch_is_a_permutation_without_its_last_incomplete_batch():
    feeds = make_feeds(split(50), 8, jax.random.key(0), 0)
    orders = [np.asarray(next(feeds(epoch, 0))[0].order) for epoch in (0, 1, 0)]
    assert orders[0].shape == (6, 8)
    assert len(np.unique(orders[0])) == 48
    np.testing.assert_array_equal(orders[0], orders[2])
    assert (orders[0] != orders[1]).any()


def test_an_epoch_can_start_in_the_middle():
    feeds = make_feeds(split(50), 8, jax.random.key(0), 0)
    _, start, stop = next(feeds(1, 4))
    assert (start, stop) == (4, 6)


def test_a_batch_larger_than_the_set():
    with fails(r"batch_size \(=51\) is larger than the training set of 50 examples"):
        make_feeds(split(50), 51, jax.random.key(0), 0)


@pytest.fixture
def streamed(tmp_path):
    from data_helpers import write_pair

    return data.load(str(write_pair(tmp_path / "set", train=50, test=20)), resident_limit=0)


@pytest.mark.parametrize("stack", [2, 4, 32])
def test_a_stream_gives_the_same_batches_however_it_is_stacked(streamed, monkeypatch, stack):
    monkeypatch.setattr(_batches, "STACK_BYTES", stack * 8 * 6 * 5)
    expected = list(streamed.train.batches(8, seed=3, epoch=1, drop_remainder=True))
    found = []
    feeds = make_feeds(streamed.train, 8, jax.random.key(0), 3)
    for feed, start, stop in feeds(1, 1):
        assert feed.labels.shape == (stack, 8)
        found += [feed.batch(i) for i in range(start, stop)]
    assert len(found) == 5
    for (images, labels), (want_images, want_labels) in zip(found, expected[1:], strict=True):
        np.testing.assert_array_equal(images, want_images)
        np.testing.assert_array_equal(labels, want_labels)


# Evaluation


def by_first_pixel(traces: list):
    """A prediction that is the first pixel modulo 5; notes when it is traced."""

    def predict(params, images):
        traces.append(images.shape)
        return jax.nn.one_hot(images[:, 0, 0, 0] % 5 - params, 5)

    return predict


@pytest.mark.parametrize("count", [3, BATCH, BATCH + 1, 2 * BATCH + 77])
def test_the_error_is_that_of_every_example_once(count):
    examples, traces = split(count), []
    wrong = np.mean(examples.images[:, 0, 0, 0] % 5 != examples.labels)
    evaluate = make_evaluation(by_first_pixel(traces), examples)
    # Logits are one for what is predicted, and zero for the four others.
    loss = np.log(np.e + 4) - (1 - wrong)
    assert evaluate(jnp.array(0)) == pytest.approx((100 * wrong, loss))
    evaluate(jnp.array(0))
    assert traces == [(BATCH, 4, 3, 1)]


def test_the_error_of_a_stream(streamed):
    predict = by_first_pixel([])
    images, labels = (np.concatenate(p) for p in zip(*streamed.train.ordered(BATCH), strict=True))
    wrong = np.mean(images[:, 0, 0, 0] % 5 != labels)
    evaluate = make_evaluation(predict, streamed.train)
    assert evaluate(jnp.array(0)).error == pytest.approx(100 * wrong)


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with its summary."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, fit(small(out=out, log_every=5, epochs=3, eval_every=2)).result


def test_a_run_leaves_its_files(run):
    out, summary = run
    stored = json.loads((out / "summary.json").read_text())
    for key in [
        "algorithm",
        "network",
        "dataset",
        "epochs",
        "seed",
        "parameters",
        "test_error",
        "train_error",
        "seconds",
        "backend",
        "jax_version",
    ]:
        assert stored[key] == getattr(summary, key)
    assert (stored["algorithm"], stored["network"], stored["dataset"]) == ("bp", "logreg", "digits")
    assert (stored["epochs"], stored["steps"], stored["parameters"]) == (3, 3 * STEPS, 650)
    assert isinstance(stored["epochs"], int)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((out / "checkpoints").iterdir())) >= 1
    assert [f.name for f in out.iterdir() if f.name.startswith(".")] == [".lock"]


def test_the_stored_settings_are_the_resolved_ones(run):
    stored = json.loads((run[0] / "config.json").read_text())
    assert stored["learning_rate"] == ESTIMATORS["bp"].defaults["learning_rate"]
    assert stored["log_every"] == 5
    assert set(stored) == {*options_of(configure(algorithm="bp")), "version"}


def test_metrics_lines(run):
    out, summary = run
    epochs, steps = lines(out, "epoch"), lines(out, "steps")
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert [line["step"] for line in epochs] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert [line["step"] for line in steps] == list(range(5, 3 * STEPS + 1, 5))
    assert ["test_error" in line for line in epochs] == [False, True, True]
    assert epochs[-1]["test_error"] == summary.test_error
    assert epochs[-1]["loss"] < epochs[0]["loss"]
    assert epochs[-1]["learning_rate"] == pytest.approx(0, abs=1e-9)
    seconds = [line["seconds"] for line in lines(out)]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_lines_between_epochs_average_the_steps_since_the_last(run, tmp_path):
    fit(small(out=tmp_path / "each", log_every=1, epochs=3))
    each = [line["loss"] for line in lines(tmp_path / "each", "steps")]
    for i, line in enumerate(lines(run[0], "steps")):
        assert line["loss"] == pytest.approx(np.mean(each[5 * i : 5 * i + 5]), rel=1e-6)
    for i, line in enumerate(lines(run[0], "epoch")):
        assert line["loss"] == pytest.approx(np.mean(each[STEPS * i : STEPS * (i + 1)]), rel=1e-6)


def test_tensorboard_shows_the_same_numbers(run):
    board = EventAccumulator(str(run[0])).Reload()
    for name in ("loss", "test_error", "learning_rate"):
        expected = [(line["step"], line[name]) for line in lines(run[0]) if name in line]
        shown = [(event.step, event.value) for event in board.Scalars(name)]
        np.testing.assert_allclose(shown, expected, rtol=1e-6, atol=1e-9)


def test_the_error_in_the_summary_is_the_networks(run):
    out, summary = run
    config, network = load_run(out)
    for part, key in ((digits().test, "test_error"), (digits().train, "train_error")):
        x = (part.images.astype(np.float32) / 255 - digits().mean) / digits().std
        wrong = np.mean(np.argmax(network(jnp.asarray(x)), -1) != part.labels)
        assert getattr(summary, key) == pytest.approx(100 * float(wrong), abs=0.2)
    assert config.network == "logreg"


def test_a_seed_decides_every_bit(tmp_path):
    networks = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(small(out=tmp_path / name, seed=seed, algorithm="fg-w", epochs=1))
        networks.append(load_run(tmp_path / name)[1])
    assert same(networks[0], networks[1])
    assert not same(networks[0], networks[2])


def test_a_number_of_steps_instead_of_epochs(tmp_path):
    summary = fit(small(out=tmp_path / "run", iterations=STEPS + 3)).result
    assert summary.steps == STEPS + 3
    assert summary.epochs == pytest.approx(1 + 3 / STEPS)
    assert [line["step"] for line in lines(tmp_path / "run", "epoch")] == [STEPS, STEPS + 3]


def test_images_can_be_left_unnormalised(tmp_path):
    fit(small(out=tmp_path / "run", normalise=False, iterations=1))
    first = lines(tmp_path / "run")[0]["loss"]
    fit(small(out=tmp_path / "other", iterations=1))
    assert first != lines(tmp_path / "other")[0]["loss"]


def test_a_streamed_set_trains_like_a_resident_one(tmp_path, monkeypatch):
    from data_helpers import write_pair

    folder = write_pair(tmp_path / "set", train=60, test=20)
    limit = functools.partial(data.load, resident_limit=0)
    monkeypatch.setattr(_setup, "load", limit)
    monkeypatch.setattr(_batches, "STACK", 4)
    config = small(dataset=str(folder), out=tmp_path / "run", batch_size=8, epochs=40)
    summary = fit(config).result
    assert summary.steps == 40 * (60 // 8)
    assert summary.train_error < 30  # of three classes, random pixels: memorised


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"dataset": "digit"}, "dataset 'digit' is unknown; did you mean 'digits'"),
        ({"network": "mpl"}, "network 'mpl' is unknown; did you mean 'mlp'"),
        ({"algorithm": "bq"}, "algorithm 'bq' is unknown; did you mean 'bp'"),
        ({"batch_size": 2000}, "batch_size .=2000. is larger"),
        ({"width": 8}, "width .=8. is not a setting of network 'logreg'"),
        ({"data_dir": Path("/nowhere")}, "data_dir /nowhere is not a folder"),
        (
            {"algorithm": "fg-w", "structure": "dense", "rank": 2},
            "rank must be 1 for structure 'dense', got 2",
        ),
    ],
)
def test_unusable_settings_leave_nothing_behind(tmp_path, settings, match):
    with fails(match):
        fit(small(out=tmp_path / "run", **settings))
    assert list(tmp_path.iterdir()) == []


def test_the_default_folder_is_named_after_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = fit(small(iterations=1, seed=4))
    assert run.folder == Path("runs/digits-logreg-bp-4")
    assert Path("runs/digits-logreg-bp-4/summary.json").exists()


def test_divergence_is_one_sentence_and_keeps_the_last_finite_checkpoint(tmp_path):
    out = tmp_path / "run"
    config = configure(
        network="mlp", width=16, algorithm="bp", learning_rate=1e3, schedule="linear",
        warmup=STEPS, epochs=8, out=out, checkpoint_every=1e-3,
    )  # fmt: skip
    with fails("the run diverged: try a learning_rate below 1000.0"):
        fit(config)
    last = lines(out)[-1]
    assert last["event"] == "diverged"
    assert "nan" in last["reason"] or "inf" in last["reason"]
    assert not (out / "summary.json").exists()
    network = load_run(out)[1]
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(network))


def test_nan_in_the_loss_of_one_block_stops_the_run(tmp_path, monkeypatch):
    """The other blocks' losses stay finite, because gradients stop between blocks."""
    whole, block = objectives._local.replicated_loss, itertools.count()

    def broken(*args, **settings):
        labels = args[-1]
        unlucky = (next(block) % 4 == 1) & jnp.all(labels[:2] == 7)
        return whole(*args, **settings) + jnp.where(unlucky, jnp.nan, 0.0)

    monkeypatch.setattr(objectives._local, "replicated_loss", broken)
    with fails("the run diverged"):
        fit(
            configure(
                network="s/2/4", algorithm="lg-fg-a", epochs=2, batch_size=8,
                log_every=1, checkpoint_every=1e-3, out=tmp_path / "run",
            )
        )  # fmt: skip
    assert lines(tmp_path / "run")[-1]["event"] == "diverged"
    network = load_run(tmp_path / "run")[1]
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(network))


@pytest.mark.filterwarnings("ignore:overflow")  # the learning rate is inf in float32
def test_parameters_that_are_not_finite_are_not_stored(tmp_path):
    out = tmp_path / "run"
    with fails("the parameters are not finite after step 1, the run diverged"):
        fit(small(out=out, learning_rate=1e39, iterations=1))
    assert lines(out)[-1]["event"] == "diverged"
    with fails("holds no checkpoint yet"):
        load_run(out)


# Full disks


def test_a_line_is_written_wholly_or_not_at_all(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path, [])
    metrics.add(Measurement(event="epoch", epoch=1.0, step=5, loss=0.5))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with fails("metrics.jsonl: the disk is full"):
            metrics.add(Measurement(event="epoch", epoch=2.0, step=10, loss=0.25))
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("left", [4, 40, 330])
def test_a_full_disk_is_one_sentence_and_keeps_what_was_written(small_disk, tmp_path, left):
    settings = {"epochs": 8, "checkpoint_every": 0.01, "resume": True}
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2**21 - 1024 * left))
    with fails("cannot write .*: the disk is full"):
        fit(small(out=small_disk / "run", **settings))
    if (small_disk / "run" / "metrics.jsonl").exists():
        assert all("loss" in line for line in lines(small_disk / "run"))
    filler.unlink()
    fit(small(out=small_disk / "run", **settings))
    fit(small(out=tmp_path / "run", **settings))
    assert same(load_run(small_disk / "run")[1], load_run(tmp_path / "run")[1])


# What is learnt


@pytest.mark.slow
def test_backpropagation_learns_digits(tmp_path):
    summary = fit(configure(algorithm="bp", width=128, epochs=10, out=tmp_path / "run")).result
    assert summary.test_error < 4


@pytest.mark.slow
def test_the_defaults_learn_digits_without_backpropagation(tmp_path):
    """By the command, in half the epochs; compiled well, for its steps are what takes the time."""
    options = ["--epochs", "50", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "forwardgrad", "train", *options]
    subprocess.run(command, env={**os.environ, "XLA_FLAGS": ""}, check=True, capture_output=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["algorithm"] == "fg-w"
    assert summary["test_error"] < 6
