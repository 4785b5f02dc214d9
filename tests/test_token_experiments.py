"""`forwardgrad reproduce tokens` and `tokens-cosine`."""

import json
import math

import jax
import pytest

import forwardgrad as fg
from forwardgrad.cli import main
from forwardgrad.experiments._methods import method_of
from forwardgrad.experiments._search import RATES, chosen, climb
from forwardgrad.experiments._token_cosines import _levels, _measured
from forwardgrad.training import configure, problem

SMALL = ["--networks", "gpt/1/8", "--context", "8", "--iterations", "4", "--eval-steps", "2"]


@pytest.mark.parametrize(
    ("best", "first", "tried"),
    [(3, 3, [3, 4, 2]), (5, 3, [3, 4, 5, 6]), (1, 3, [3, 4, 2, 1, 0]), (8, 7, [7, 8])],
)
def test_the_search_stops_where_the_loss_rises(best, first, tried):
    found = []

    def loss(rate):
        found.append(RATES.index(rate))
        return abs(RATES.index(rate) - best)

    climb(loss, first)
    assert found == tried


@pytest.mark.parametrize("diverge", [1, 2, 3])
def test_the_search_goes_down_to_what_does_not_diverge(diverge):
    first, tried = RATES.index(3e-3), []

    def loss(rate):
        tried.append(RATES.index(rate))
        return math.inf if RATES.index(rate) > first - diverge else 1.0

    climb(loss, first)
    assert min(tried) <= first - diverge
    assert max(tried) == first


def test_the_search_goes_down_from_what_diverges():
    found = []

    def loss(rate):
        found.append(rate)
        return math.inf if rate > 1e-3 else 1.0

    climb(loss, RATES.index(3e-3))
    assert found[-1] == 3e-4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lg-fg-b", "algorithm 'lg-fg-b' is unknown"),
        ("lg-fg-a+exct", "'exct' is unknown"),
        ("fg-a@0", "must end in a number of tangents"),
        ("fg-a@", "must end in a number of tangents"),
        ("fg-a@" + 5000 * "9", "must end in a number of tangents below 1e9"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(fg.InputError, match=message):
        method_of(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokens", "--methods", "bp@3"], "tangents is not a setting of algorithm 'bp'"),
        (["tokens", "--methods", "bp+exact"], "exact_mixing is not a setting of algorithm 'bp'"),
        (
            ["tokens", "--search-iterations", "0", "--rates", "0.1", "0.2"],
            "rates must be a single one where search_iterations is 0, got (0.1, 0.2)",
        ),
        (["tokens", "--rates", "0", "0.1"], "rates must be above 0 and at most 1e+12, got (0.0,"),
        (["tokens", "--precision", "bfloat16", "--methods", "np"], "precision must be float32 for"),
        (["tokens", "--search-iterations", "-1"], "search_iterations must be at least 0, got -1"),
        (["tokens", "--networks", "mlp"], "network 'mlp' must be called gpt/LAYERS/WIDTH"),
        (["tokens-cosine", "--network", "cnn"], "network 'cnn' must be called gpt/LAYERS/WIDTH"),
        (["tokens-cosine", "--methods", "bp"], "method 'bp' must be one that perturbs"),
        (["tokens-cosine", "--methods", "fg-a@4"], "method 'fg-a@4' must be one that perturbs"),
        (["tokens-cosine", "--largest", "0"], "largest and repeats must be at least 1, got 0, 2"),
    ],
)
def test_bad_options(arguments, message, tmp_path, capsys):
    assert main(["reproduce", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_tokens(tmp_path, capsys):
    """Cells have the rate of the best short run; what is stored is not made again."""
    out = tmp_path / "out"
    what = ["reproduce", "tokens", *SMALL, "--out", str(out), "--methods", "bp", "lg-fg-a+exact@2"]
    assert main([*what, "--seeds", "1", "--rates", "1e-3", "1e-1", "--search-iterations", "3"]) == 0
    cells = {
        cell["method"]: cell for cell in json.loads((out / "tokens.json").read_text())["cells"]
    }
    bp, ours = cells["bp"], cells["lg-fg-a+exact@2"]
    for cell in (bp, ours):
        tried = dict(zip(cell["rates"], cell["rate_losses"], strict=True))
        assert cell["learning_rate"] == chosen(tried)
        assert cell["steps"] == [2, 4]
        assert len(cell["losses"]) == 2
        assert cell["tokens"] == 8 * 8
    assert ours["tangents"] == 2
    assert ours["operations"] > bp["operations"]
    short = json.loads((out / "runs/gpt-1-8-bp-0.1-3-0/summary.json").read_text())
    assert bp["rate_losses"][1] == short["validation_loss"]
    before = (out / "tokens.json").stat().st_mtime_ns
    capsys.readouterr()
    table = "| gpt/1/8 | lg-fg-a+exact@2 |"
    assert main([*what, "--seeds", "1", "--rates", "1e-3", "1e-1", "--search-iterations", "3"]) == 0
    printed = capsys.readouterr().out
    assert table in printed
    assert "loading" not in printed
    assert (out / "tokens.json").stat().st_mtime_ns > before
    assert main([*what, "--seeds", "1", "--search-iterations", "4"]) == 2
    assert "holds results for search_iterations 3, not 4" in " ".join(
        capsys.readouterr().err.split()
    )


def test_levels_end_at_the_largest():
    assert _levels(1024) == [1, 4, 16, 64, 256, 1024]
    assert _levels(3) == [3]
    assert _levels(8) == [2, 8]


@pytest.mark.parametrize("algorithm", ["lg-fg-a", "fg-w"])
def test_cosines_are_as_predicted(algorithm):
    """Within four standard errors, for every kind of layer; and they grow with K."""
    options = {"network": "gpt/1/8", "dataset": "text", "context": 8, "batch_size": 4}
    step = problem(configure(algorithm=algorithm, tangents=1, **options))
    if algorithm == "fg-w":
        step = step._replace(estimator=fg.WeightPerturbation())
    for kind in _measured(step, [1, 4, 16], 32, jax.random.key(0)):
        for cosine, error, predicted in zip(kind.cosines, kind.errors, kind.predicted, strict=True):
            assert abs(cosine - predicted) < 4 * error + 0.01
        assert kind.predicted[0] < kind.predicted[1] < kind.predicted[2]
        assert kind.of_mean > kind.predicted[1]


def test_rates_without_a_search(tmp_path):
    what = ["--methods", "bp", "--search-iterations", "0", "--seeds", "1", "--out", str(tmp_path)]
    assert main(["reproduce", "tokens", *SMALL, *what]) == 0
    (cell,) = json.loads((tmp_path / "tokens.json").read_text())["cells"]
    usual = configure(network="gpt/1/8", algorithm="bp", optimizer="adamw")
    assert cell["learning_rate"] == usual.optimisation.learning_rate
    assert "rates" not in cell
