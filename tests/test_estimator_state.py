"""What an estimator remembers, in a training run: kept from step to step, stored, found again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from forwardgrad import (
    ActivityPerturbation,
    BalancedTangents,
    DirectFeedbackAlignment,
    FeedbackAlignment,
    InputError,
    Losses,
    data,
)
from forwardgrad.cli import main
from forwardgrad.estimators import AbstractEstimator
from forwardgrad.training import _batches, _setup, configure, fit, load_run, read_run
from forwardgrad.training._batches import Feed
from forwardgrad.training._checkpoint import Checkpoints
from forwardgrad.training._state import initial_state, make_advance, make_begin
from test_resume import Killed, bits, checkpoints, kill_at
from test_training import PLAIN, copy, same, split

BALANCED = BalancedTangents(ActivityPerturbation(tangents=2), every=3)
KEYS = (jax.random.key(8), jax.random.key(9))
STEPS = 6


class Drawn(AbstractEstimator):
    """An estimator with feedback weights, which are drawn in every step."""

    inner: AbstractEstimator

    @property
    def needs_key(self) -> bool:
        return False

    def value_and_grad(self, fun, params, key):
        return self.inner.value_and_grad(fun, params, key)


def loss(params, images, labels):
    logits = jnp.tanh(images.reshape(len(images), -1) @ params["W"]) @ params["V"]
    values = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    wrong = jnp.sum(jnp.argmax(logits, -1) != labels)
    return Losses([values / len(values)], [("example",)]), {"errors": wrong}


def feed_of(batch=8):
    images, labels = next(split(48).ordered(48))
    order = jnp.arange(48).reshape(STEPS, 8)[:, :batch]
    return Feed(jnp.asarray(images), jnp.asarray(labels), order)


def loop(estimator, compiled_loop=True, parts=1, batch=8):
    """An advance function, with the state before the first step."""
    keys = jax.random.split(jax.random.key(10))
    params = {"W": jax.random.normal(keys[0], (12, 7)), "V": jax.random.normal(keys[1], (7, 5))}
    optimiser = optax.adam(0.01)
    begin = make_begin(loss, PLAIN, estimator, KEYS, parts=parts)
    advance = make_advance(
        loss, PLAIN, estimator, optimiser, KEYS, parts=parts, compiled_loop=compiled_loop
    )
    return advance, begin(initial_state(params, optimiser, STEPS), feed_of(batch), 0)


# Steps


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("compiled_loop", [True, False])
@pytest.mark.parametrize("estimator", [BALANCED, DirectFeedbackAlignment()])
def test_it_goes_from_step_to_step(estimator, compiled_loop, parts):
    """However the steps are cut into calls, and through the parts of a batch."""
    advance, state = loop(estimator, compiled_loop, parts)
    whole, cut = advance(copy(state), feed_of(), 0, STEPS), copy(state)
    for start, stop in ((0, 0), (0, 1), (1, 4), (4, STEPS)):
        cut = advance(cut, feed_of(), start, stop)
    assert same(whole, cut)
    assert same(whole.estimator, state.estimator) is (estimator != BALANCED)
    if estimator == BALANCED:
        assert int(whole.estimator.steps) == STEPS * parts % 3


def test_the_first_part_of_a_batch_is_what_is_seen_first():
    """As big as all others, and so with losses as large."""
    power = [
        loop(BALANCED, parts=parts, batch=n)[1].estimator.power for parts, n in ((2, 8), (1, 4))
    ]
    np.testing.assert_allclose(*power, rtol=1e-6)
    assert power[0].shape == (1,)


@pytest.mark.parametrize("compiled_loop", [True, False])
@pytest.mark.parametrize("inner", [FeedbackAlignment(), DirectFeedbackAlignment()])
def test_feedback_weights_that_are_kept_are_those_that_were_drawn(inner, compiled_loop):
    """To the bit: earlier versions drew them in every step."""
    found = []
    for estimator in (inner, Drawn(inner)):
        advance, state = loop(estimator, compiled_loop)
        found.append(advance(state, feed_of(), 0, STEPS))
    assert same(found[0].params, found[1].params)
    assert len(jax.tree.leaves(found[0].estimator)) == 1
    assert found[1].estimator == ()


# Runs

RUNS = {
    "balanced": {"algorithm": "fg-a", "balance": "relative"},
    "guided": {"algorithm": "lg-fg-a", "balance": "relative", "control_variate": True},
    "greedy, in parts": {"algorithm": "lg-fg-a", "balance": "absolute", "accumulate": 2},
    "weights": {"algorithm": "fg-w", "balance": "absolute", "tangents": 2},
    "two views": {"task": "contrastive", "algorithm": "fg-a", "balance": "relative"},
    "step by step": {"network": "cnn", "algorithm": "fg-a", "balance": "relative"},
    "feedback": {"algorithm": "lg-fa"},
    "direct": {"algorithm": "dfa"},
}


def settings(name, out, **others):
    common = {"network": "mlp", "width": 8, "batch_size": 32, "iterations": 24, "log_every": 1}
    return configure(**{**common, **RUNS[name], "out": out, **others})


def cut_short(monkeypatch, config, step=10):
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            fit(dataclasses.replace(config, checkpoint_every=1e-9))


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, monkeypatch, name):
    fit(settings(name, tmp_path / "whole"))
    cut_short(monkeypatch, settings(name, tmp_path / "cut"))
    fit(settings(name, tmp_path / "cut", resume=True))
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")
    assert any(key.startswith(".estimator") for key in bits(tmp_path / "whole")[0])


def test_a_stream_is_resumed_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(_setup, "load", functools.partial(data.load, resident_limit=0))
    monkeypatch.setattr(_batches, "STACK", 3)
    fit(settings("balanced", tmp_path / "whole"))
    cut_short(monkeypatch, settings("balanced", tmp_path / "cut"))
    fit(settings("balanced", tmp_path / "cut", resume=True))
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")


@pytest.mark.parametrize("name", ["feedback", "direct"])
def test_a_checkpoint_from_before_there_was_a_state(tmp_path, monkeypatch, name):
    """The run goes on with the bits that it would have had, and can be loaded."""
    fit(settings(name, tmp_path / "whole"))
    save = Checkpoints.save

    def without(self, state, progress):
        save(self, dataclasses.replace(state, estimator=()), progress)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", without)
        cut_short(patch, settings(name, tmp_path / "cut"))
    load_run(tmp_path / "cut")
    fit(settings(name, tmp_path / "cut", resume=True))
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")


def test_another_balance_is_another_run(tmp_path, monkeypatch):
    cut_short(monkeypatch, settings("balanced", tmp_path / "run"))
    with pytest.raises(InputError, match="balance \\('relative' there, 'none' now\\)"):
        fit(settings("balanced", tmp_path / "run", balance="none", resume=True))
    assert checkpoints(tmp_path / "run")


def test_one_command_on_a_text(tmp_path, monkeypatch, capsys):
    """A balanced transformer from the command line, killed and continued."""
    (tmp_path / "book.txt").write_text("The cat sat on the mat. " * 200)
    words = "train --network gpt/2/16 --context 16 --batch-size 4 --iterations 12 --tangents 2 "
    words += "--algorithm lg-fg-a --balance relative --exact-mixing --checkpoint-every 1e-9"
    command = [*words.split(), "--dataset", str(tmp_path / "book.txt")]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            main([*command, "--out", str(tmp_path / "cut")])
    assert main([*command, "--out", str(tmp_path / "cut"), "--resume"]) == 0
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")
    config = read_run(tmp_path / "cut")[0].config
    assert config.wrapped_estimator == BalancedTangents(
        ActivityPerturbation(tangents=2, exact_mixing=True)
    )
    assert main(["train", "--algorithm", "bp", "--balance", "relative"]) == 2
    assert "balance is not a setting of algorithm 'bp'" in capsys.readouterr().err
    run = ["diagnose", "--run", str(tmp_path / "cut"), "--samples", "4"]
    assert main([*run, "--out", str(tmp_path / "found")]) == 0
    assert "lg-fg-a, 4 samples" in capsys.readouterr().out
