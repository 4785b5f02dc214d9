"""The store of results: what is written is read back, and what is read is of its type."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest

from forwardgrad import InputError
from forwardgrad.results import (
    VERSION,
    Measurement,
    Origin,
    Place,
    Readout,
    Summary,
    Table,
    TableCell,
    as_line,
    look,
    over_seeds,
    read,
    read_lines,
    without_none,
    write,
)
from forwardgrad.training import configure, read_run
from forwardgrad.training._config import options_of
from forwardgrad.training._folder import load_config

RESULTS = Path(__file__).parents[1] / "results"
WHAT = {"task": "contrastive", "algorithm": "bp", "network": "mlp", "dataset": "digits", "seed": 1}
ERRORS = {"train_error": 1.0, "test_error": 2.5, "seconds": 3.0}

RECORDS = [
    Summary.here(**WHAT, **ERRORS, epochs=2, steps=9, parameters=4, train_loss=0.5),
    Readout.here(**WHAT, **ERRORS, features=8, examples=9, limit=None, converged=True),
    Measurement(event="epoch", epoch=1.5, step=3, loss=0.25),
    TableCell(column="a b", algorithm="bp", seed=0, test_error=2.0),
    Origin.here(),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_what_is_written_is_read_back(tmp_path, record):
    path = tmp_path / "a.json"
    write(path, record)
    assert json.loads(path.read_text())["version"] == VERSION
    assert read(path, type(record)) == record
    if isinstance(record, Measurement | TableCell):  # of the others, None may not be left out
        path.write_text(as_line(record))
        assert read_lines(path, type(record)) == ((record,), None)


def test_what_is_not_finite_becomes_null(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(as_line(Measurement(event="epoch", epoch=1.0, step=3, loss=math.nan)))
    ((line,), problem) = read_lines(path, Measurement)
    assert (line.loss, problem) == (None, None)
    # Earlier versions of Python's writer had a word for it.
    path.write_text('{"event": "epoch", "epoch": 1, "step": 3, "loss": NaN}')
    assert read_lines(path, Measurement) == ((line,), None)


def test_a_newer_version_is_refused_and_an_older_one_read(tmp_path):
    path = tmp_path / "a.json"
    write(path, RECORDS[0])
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "version": VERSION + 1}))
    with pytest.raises(InputError, match="another version of forwardgrad: its format is 2"):
        read(path, Summary)
    del stored["version"], stored["task"]
    path.write_text(json.dumps(stored))
    assert read(path, Summary) == dataclasses.replace(RECORDS[0], task="supervised")


def test_settings_are_read_back(tmp_path):
    config = configure(clip=None, width=3, out=Path("a/b"), data_dir=Path("c"))
    write(tmp_path / "config.json", options_of(config))
    assert load_config(tmp_path) == config


@pytest.mark.parametrize("network", ["m/1/16", "mlp", "gpt/1/16"])
def test_mixers_did_not_normalise_features_at_first(tmp_path, network):
    """A run's folder from then is of the network that it was."""
    config = configure(network=network)
    options = options_of(config)
    normalised = options.pop("normalise_features", None)
    assert normalised == {"m/1/16": True, "mlp": False}.get(network)
    write(tmp_path / "config.json", options)
    found = options_of(load_config(tmp_path))
    assert found == options | ({} if normalised is None else {"normalise_features": False})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        # One that is not known is not passed over: settings decide what is done.
        ('{"dataset": "digits", "colour": "red"}', "another version: setting 'colour' is unknown"),
        ('{"epochs": 0}', "config.json is damaged or of another version: epochs must be at least"),
        ('{"epochs": "3"}', "epochs must be int, got '3'"),
        ('{"algorithm": "fg-a", "tangents": 2.5}', "tangents must be int, got 2.5"),
        ('{"algorithm": ["bp"]}', "algorithm must be str, got "),
        ("[]", "config.json is damaged: expected `object`, got `array`"),
    ],
)
def test_settings_that_are_damaged(tmp_path, text, match):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=match):
        load_config(tmp_path)


def test_lines_before_the_first_that_is_damaged(tmp_path):
    path = tmp_path / "a.jsonl"
    good = as_line(RECORDS[2])
    path.write_text(good + '{"event": "epoch", "epoch": -1, "step": 3}\n' + good)
    lines, problem = read_lines(path, Measurement)
    assert lines == (RECORDS[2],)
    assert "line 2 of" in str(problem)
    assert "expected `float` >= 0.0 - at `$.epoch`" in str(problem)


@pytest.mark.parametrize("name", ["bp", "fg-w", "lg-fg-a"])
def test_runs_of_the_first_versions_are_read(name):
    run, problems = read_run(RESULTS / "mnist" / name)
    assert problems == ()
    assert (run.state, run.config.algorithm, run.result.task) == ("finished", name, "supervised")
    assert run.measurements[-1].test_error == run.result.test_error


def test_means_and_the_best_of_a_column():
    cells = [
        TableCell(column="a", algorithm=name, seed=i, test_error=error, seconds=float(i))
        for name, errors in (("bp", (1.0, 3.0)), ("fa", (4.0,)))
        for i, error in enumerate(errors)
    ]
    means = over_seeds(cells)
    assert [(place.row, mean.text) for place, mean in means.items()] == [
        (("bp",), "2.00 ± 1.00"),
        (("fa",), "4.00"),
    ]
    assert means["a", ("bp",)].seconds == 0.5
    table = Table(means, {Place("a", ("fa",)): 9.0})
    assert table.entry("a", ("bp",)) == ("2.00 ± 1.00", "", True)
    assert table.entry("a", ("fa",)) == ("4.00", "9.00", False)
    assert table.entry("a", ("dfa",)) == ("", "", False)
    assert "momentum" not in without_none(cells[0])


def test_an_algorithm_has_one_look():
    assert look("lg-fg-a")[0] == look("fg-a")[0] != look("fg-w")[0]
    assert look("lg-bp")[1:] != look("bp")[1:]
    assert look("anything")[0] == look("untrained")[0]


def test_a_folder_whose_name_is_no_text():
    with pytest.raises(InputError, match="out must be a printable name in UTF-8, got "):
        configure(out=Path(os.fsdecode(b"run-\xff")))
