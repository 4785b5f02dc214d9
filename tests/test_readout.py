"""Contrastive runs, and the readout that is fitted on their features."""

import json

import equinox as eqx
import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from data_helpers import write_pair
from forwardgrad import InputError
from forwardgrad.cli import main
from forwardgrad.training import configure, fit, fit_readout, load_run
from forwardgrad.training._readout import REGULARISATION

SETTINGS = {
    "seed": 1,
    "task": "contrastive",
    "network": "s/2/4",
    "algorithm": "lg-fg-a",
    "epochs": 1,
    "batch_size": 128,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished contrastive run with its summary."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, fit(configure(**SETTINGS, out=out)).result


def test_a_contrastive_run_leaves_what_any_run_does(run):
    out, summary = run
    assert summary.task == "contrastive"
    config = json.loads((out / "config.json").read_text())
    assert (config["task"], config["augment"], config["tangents"]) == ("contrastive", "simclr", 1)
    (line,) = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert 0 < line["train_error"] <= 100
    _, network = load_run(out)
    assert network.heads[0].weight.shape == (256, config["projection"])
    assert network.classifier.weight.shape == (256, 10)


@pytest.mark.slow
def test_a_contrastive_run_in_pieces_ends_with_the_same_bits(run, tmp_path, monkeypatch):
    from forwardgrad.training import Interrupted, _loop

    whole, _ = run
    monkeypatch.setattr(_loop, "CHUNK_SECONDS", 1e-9)
    report, steps = _loop._Session._report, []

    def stop(session, losses):
        report(session, losses)
        steps.append(session.step)
        if len(steps) in (2, 5):
            session._stop(2)

    monkeypatch.setattr(_loop._Session, "_report", stop)
    config = configure(**SETTINGS, out=tmp_path / "run", resume=True)
    for _ in range(2):
        with pytest.raises(Interrupted):
            fit(config)
    fit(config)
    assert eqx.tree_equal(load_run(whole)[1], load_run(tmp_path / "run")[1])


def test_the_readout_is_logistic_regression_on_standardised_features(run):
    out, _ = run
    result = fit_readout(out, examples=600)
    stored = json.loads((out / "readout.json").read_text())
    assert stored == {**vars(result), "version": 1}
    assert (stored["examples"], stored["features"], stored["task"]) == (600, 256, "contrastive")
    config, network = load_run(out)
    from forwardgrad.data import load

    digits = load(config.dataset)

    def features(split):
        x = (np.asarray(split.images, np.float32) / 255 - digits.mean) / digits.std
        return np.asarray(network.pooled(network.blocks_output(jax.numpy.asarray(x))))

    train, test = features(digits.train)[:600], features(digits.test)
    mean, std = train.mean(0), train.std(0) + (train.std(0) == 0)
    readout = LogisticRegression(C=REGULARISATION, max_iter=1000)
    readout.fit((train - mean) / std, digits.train.labels[:600])
    error = 100 * np.mean(readout.predict((test - mean) / std) != digits.test.labels)
    assert result.test_error == pytest.approx(error, abs=1.2)
    assert result.test_error < 40


def test_a_readout_leaves_the_run_as_it_is(run):
    out, _ = run
    before, network = (out / "summary.json").read_bytes(), load_run(out)[1]
    fit_readout(out, examples=200)
    assert (out / "summary.json").read_bytes() == before
    assert eqx.tree_equal(network, load_run(out)[1])


def test_untrained_features_are_those_of_the_seed(run, tmp_path):
    """Another run of the same seed had the same network before its training."""
    out, _ = run
    other = tmp_path / "other"
    fit(configure(**{**SETTINGS, "algorithm": "bp", "iterations": 1}, out=other))
    first, second = (fit_readout(x, examples=300, untrained=True) for x in (out, other))
    assert first.test_error == second.test_error
    assert first.algorithm == "untrained"
    assert (out / "readout-untrained.json").exists()


def test_runs_that_have_no_readout(run, tmp_path, capsys):
    supervised = tmp_path / "supervised"
    fit(configure(network="logreg", algorithm="bp", iterations=1, out=supervised))
    with pytest.raises(InputError, match=r"has task .supervised.*for runs of task .contrastive."):
        fit_readout(supervised)
    with pytest.raises(InputError, match="holds no run"):
        fit_readout(tmp_path / "nothing")
    with pytest.raises(InputError, match="examples must be at least 1, got 0"):
        fit_readout(run[0], examples=0)
    with pytest.raises(InputError, match="examples of at least two classes, got 1 of one"):
        fit_readout(run[0], examples=1)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_bytes((run[0] / "config.json").read_bytes())
    with pytest.raises(InputError, match="is not finished: continue it"):
        fit_readout(unfinished)
    assert main(["readout", str(supervised)]) == 2
    assert capsys.readouterr().err.startswith("error: the run in")


def test_readout_command(run, capsys):
    out, _ = run
    assert main(["readout", str(out), "--examples", "300"]) == 0
    printed = capsys.readouterr().out
    assert "300 images of digits" in printed
    assert "test error" in printed


def test_too_few_examples_for_a_batch(tmp_path):
    folder = write_pair(tmp_path / "set", train=12, test=6, channels=3)
    settings = {**SETTINGS, "dataset": str(folder), "network": "mlp", "out": tmp_path / "run"}
    with pytest.raises(InputError, match=r"batch_size \(=128\) is larger than the training set"):
        fit(configure(**settings))
    # Colours and odd sizes are no hindrance.
    summary = fit(configure(**{**settings, "batch_size": 6, "width": 8})).result
    assert summary.steps == 2


def test_learning_rate_scales_with_the_batch():
    from forwardgrad.training._setup import schedule

    config = configure(**SETTINGS, learning_rate=0.2, schedule="constant")
    assert float(schedule(config, 10)(0)) == pytest.approx(0.2)
    scaled = configure(**SETTINGS, learning_rate=0.2, schedule="constant", scale_learning_rate=True)
    assert float(schedule(scaled, 10)(0)) == pytest.approx(0.1)


def test_lars_scales_matrices_to_their_norm_and_leaves_biases():
    from forwardgrad.training._setup import optimiser

    config = configure(optimizer="lars", learning_rate=0.5, schedule="constant", momentum=0.0)
    transformation = optimiser(config, 10)
    params = {"W": np.full((2, 2), 3.0, np.float32), "b": np.ones(2, np.float32)}
    grads = {"W": np.full((2, 2), 0.01, np.float32), "b": np.full(2, 0.01, np.float32)}
    updates, _ = transformation.update(grads, transformation.init(params), params)
    # Trust ratio: 0.001 |W| / |g| = 0.3, times the gradient and the rate.
    np.testing.assert_allclose(updates["W"], -0.5 * 0.3 * grads["W"], rtol=1e-4)
    np.testing.assert_allclose(updates["b"], -0.5 * grads["b"], rtol=1e-6)
