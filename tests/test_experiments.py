"""The papers' experiments, small; the benchmark's models."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from PIL import Image

import forwardgrad as fg
from data_helpers import write_parquet
from forwardgrad import data
from forwardgrad._errors import DivergedError, InputError
from forwardgrad.experiments import (
    COMPARE,
    EXPERIMENTS,
    Step,
    as_options,
    checkpointed_mlp_loss,
    interleave,
    mlp_loss,
    mlp_problem,
    provenance,
)
from forwardgrad.experiments import _ablation as ablation
from forwardgrad.experiments import _mnist as mnist
from forwardgrad.experiments import _scaling as scaling
from forwardgrad.experiments import _toy as toy
from forwardgrad.experiments._experiment import read_out
from forwardgrad.networks import SIZES
from forwardgrad.results import CurveCell, Grid, Summary, TableCell, csv, read, without_none
from forwardgrad.training import _batches
from forwardgrad.training._config import options_of


def options(name, **settings):
    return EXPERIMENTS[name].options(**settings)


def run(name, chosen):
    """The experiment's JSON, once its folder has been checked to hold a figure that opens."""
    out = EXPERIMENTS[name].run(chosen)
    with Image.open(out / f"{name}.png") as figure:
        assert min(figure.size) > 300
        assert len(figure.convert("RGB").resize((64, 64)).getcolors(4096)) > 10
    stored = json.loads((out / f"{name}.json").read_text())
    assert stored["experiment"] == name
    assert set(provenance()) <= set(stored)
    settings = [v if isinstance(v, list) else [v] for v in stored["options"].values()]
    # Networks have slashes in their names, and no option is a path.
    assert not any("/" in str(v) and v not in SIZES for group in settings for v in group)
    return stored


@pytest.mark.parametrize(("name", "minimum"), [("beale", (3.0, 0.5)), ("rosenbrock", (1.0, 1.0))])
def test_toy_functions_have_their_minimum(name, minimum):
    function = toy.PROBLEMS[name].function
    assert function(jnp.array(minimum)) == 0
    assert not np.any(jax.grad(function)(jnp.array(minimum)))
    assert function(jnp.array(minimum) + 0.1) > 0


def test_toy(tmp_path, monkeypatch):
    chosen = options("toy", out=tmp_path, iterations=300, runs=3, repeats=1)
    stored = run("toy", chosen)
    results = {cell["function"]: cell["methods"] for cell in stored["cells"]}
    assert set(results) == {"beale", "rosenbrock"}
    for name, methods in results.items():
        problem = toy.PROBLEMS[name]
        assert {method: len(r["losses"]) for method, r in methods.items()} == {
            "forward gradient": 3,
            "gradient descent": 1,
        }
        point, points = np.array(problem.start), methods["gradient descent"]["points"][0]
        for step in range(3):
            np.testing.assert_allclose(points[step], point, atol=1e-5)
            point = point - problem.learning_rate * jax.grad(problem.function)(point)
        for method in methods.values():
            assert method["seconds_per_step"] > 0
            assert all(losses[-1] < 0.5 * losses[0] for losses in method["losses"])
    monkeypatch.setattr(toy, "interleave", None)
    assert run("toy", chosen)["cells"] == stored["cells"], "it is not done again"


def test_scaling(tmp_path, monkeypatch):
    small = {"out": tmp_path, "width": 16, "repeats": 2, "batch_sizes": (4,)}
    first = run("scaling", options("scaling", depths=(1, 3), **small))
    for cell in first["cells"]:
        assert set(cell["methods"]) == set(scaling.METHODS)
        for row in cell["methods"].values():
            assert len(row["seconds"]) == 2
            assert row["temp_bytes"] > 0

    measured = []
    monkeypatch.setattr(
        scaling, "mlp_problem", lambda *args: measured.append(args) or mlp_problem(*args)
    )
    second = run("scaling", options("scaling", depths=(1, 2, 3), **small))
    assert measured == [(2, 4, 16)]
    assert [cell["depth"] for cell in second["cells"]] == [1, 3, 2]
    assert second["cells"][:2] == first["cells"]


@pytest.mark.parametrize(("name", "value"), [("width", 32), ("repeats", 3)])
def test_scaling_refuses_the_results_of_other_settings(tmp_path, name, value):
    chosen = options("scaling", out=tmp_path, width=16, repeats=2, depths=(1,), batch_sizes=(4,))
    EXPERIMENTS["scaling"].run(chosen)
    before = (tmp_path / "scaling.json").read_bytes()
    with pytest.raises(InputError, match=f"holds results for {name} .* pass another --out"):
        EXPERIMENTS["scaling"].run(dataclasses.replace(chosen, **{name: value}))
    assert (tmp_path / "scaling.json").read_bytes() == before


def assert_same_gradients(loss, checkpointed, params, batch):
    expected = jax.jit(jax.value_and_grad(loss))(params, *batch)
    actual = jax.jit(jax.value_and_grad(checkpointed))(params, *batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), actual, expected)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 9])
def test_checkpoints_leave_the_scaling_gradients_alone(depth):
    assert_same_gradients(mlp_loss, checkpointed_mlp_loss, *mlp_problem(depth, 8, 16))


def test_checkpoints_of_scaling_save_memory():
    """More than two thirds of it at 30 layers; the second forward pass is a third of the work."""
    params, batch = jax.eval_shape(lambda: mlp_problem(30, 128, 128))
    bp = Step(mlp_loss, params, fg.Backpropagation(), batch)
    checkpointed = Step(checkpointed_mlp_loss, params, fg.Backpropagation(), batch)
    assert checkpointed.temp_bytes < 0.33 * bp.temp_bytes
    assert 1.2 * bp.flops < checkpointed.flops < 1.34 * bp.flops


def test_step_updates_its_own_parameters():
    params, batch = mlp_problem(2, 8, 16)
    before = jax.tree.map(np.array, params)
    step = Step(mlp_loss, params, fg.Backpropagation(), batch)
    step()
    step()
    assert jax.tree.all(jax.tree.map(np.array_equal, before, params))
    assert not np.array_equal(step._own[0][0]["W"], before[0]["W"])
    assert step.flops > 0


def test_interleave_takes_turns_and_leaves_out_the_first_round():
    calls = []
    seconds = interleave({name: lambda n=name: calls.append(n) for name in "abc"}, 5)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, 18, 3)]
    assert len(rounds) == 6
    assert all(sorted(r) == list("abc") for r in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 5)


def digits(count, side):
    """The first images of each split of digits, smaller where asked, with their labels."""
    found = data.load("digits")
    for name in ("train", "test"):
        split, step = getattr(found, name), 8 // side
        yield name, split.images[:count, ::step, ::step], split.labels[:count]


@pytest.mark.slow
@pytest.mark.parametrize("network", ["logreg", "mlp", "cnn"])
def test_mnist(tmp_path, monkeypatch, network):
    iterations = {"logreg": 200, "mlp": 60, "cnn": 10}[network]
    # Sixty thousand images would take long to decode, and the third network long to evaluate.
    for split, images, labels in digits(128, side=4 if network == "cnn" else 8):
        path = tmp_path / "data" / "mnist" / f"{split}.parquet"
        write_parquet(path, list(images), list(labels), classes=[str(i) for i in range(10)])
    monkeypatch.setattr(_batches, "BATCH", 64)
    chosen = options(
        f"mnist-{network}",
        out=tmp_path / "out",
        data_dir=tmp_path / "data",
        iterations=iterations,
        seeds=1,
        log_every=iterations // 10,
        learning_rates=(2e-3,),
    )
    first = run(f"mnist-{network}", chosen)
    assert [cell["algorithm"] for cell in first["cells"]] == ["bp", "fg-w"]
    for cell in first["cells"]:
        assert cell["steps"] == list(range(iterations // 10, iterations + 1, iterations // 10))
        assert cell["times"] == sorted(cell["times"])
        assert all(np.isfinite(cell["losses"]))
    assert [row["seeds"] for row in first["table"]] == [1, 1]
    bp, fg_w = first["cells"]
    if network != "cnn":  # Ten steps are too few to see.
        assert bp["losses"][-1] < bp["losses"][0]
    if network == "logreg":
        assert fg_w["losses"][-1] < fg_w["losses"][0]
    monkeypatch.setattr("forwardgrad.training._setup.make_advance", None)
    second = run(f"mnist-{network}", chosen)
    assert second["cells"] == first["cells"]


def test_mnist_table_is_mean_and_deviation_over_seeds():
    cells = [
        CurveCell(
            **{"algorithm": "bp", "learning_rate": 0.1, "seed": seed, "test_error": error},
            **{"seconds": seconds, "steps": (1, 2), "losses": (9.0, loss), "times": (0.0, 0.1)},
        )
        for seed, (error, loss, seconds) in enumerate(
            ((1.0, 0.1, 5.0), (3.0, 0.3, 7.0), (5.0, 0.5, 60.0))
        )
    ]
    (row,) = mnist._present("mnist-mlp", cells).rows
    assert row["test_error_mean"] == 3.0
    assert row["test_error_std"] == pytest.approx((8 / 3) ** 0.5, abs=1e-4)
    assert row["loss_mean"] == pytest.approx(0.3)
    assert row["seconds_median"] == 7.0


@pytest.mark.slow
def test_compare(tmp_path):
    settings = {"network": "s/1/1", "epochs": 1, "out": tmp_path}
    COMPARE.run(COMPARE.options(**settings, algorithms=("bp", "lg-fg-a"), seeds=1))
    first = json.loads((tmp_path / "compare.json").read_text())
    COMPARE.run(COMPARE.options(**settings, algorithms=("fa", "bp"), seeds=2))
    stored = json.loads((tmp_path / "compare.json").read_text())
    # What there was is still there, finished runs are not repeated.
    assert stored["cells"][:2] == first["cells"]
    ran = {(cell["algorithm"], cell["seed"]) for cell in stored["cells"]}
    assert ran == {("bp", 0), ("lg-fg-a", 0), ("fa", 0), ("fa", 1), ("bp", 1)}
    assert [row["algorithm"] for row in stored["table"]] == ["bp", "fa", "lg-fg-a"]
    assert [row["seeds"] for row in stored["table"]] == [2, 2, 1]
    markdown = (tmp_path / "compare.md").read_text().splitlines()
    assert markdown[0] == "| algorithm | digits s/1/1 |"
    assert [line.split(" | ")[0] for line in markdown[2:]] == ["| bp", "| fa", "| lg-fg-a"]
    assert len((tmp_path / "compare.csv").read_text().splitlines()) == 4
    with Image.open(tmp_path / "compare.png") as figure:
        assert min(figure.size) > 300
    with pytest.raises(InputError, match="holds results for epochs 1, not 2: pass another --out"):
        COMPARE.run(COMPARE.options(**{**settings, "epochs": 2}))

    # Of networks as they once were: not to be mixed with those of today, nor lost.
    assert all(cell.pop("normalise_features") for cell in stored["cells"])
    (tmp_path / "compare.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="digits s/1/1 for normalise_features False, not True"):
        COMPARE.run(COMPARE.options(**settings, algorithms=("dfa",)))
    assert json.loads((tmp_path / "compare.json").read_text()) == stored
    COMPARE.run(COMPARE.options(**{**settings, "network": "logreg"}, algorithms=("bp",), seeds=1))
    assert len(json.loads((tmp_path / "compare.json").read_text())["cells"]) == 6


@pytest.mark.slow
def test_rows_of_algorithms_with_options(tmp_path):
    rows = ("lg-fg-a+adamw+crop@2", "bp", "fg-a")
    settings = {"network": "s/1/1", "epochs": 2, "seeds": 1, "out": tmp_path}
    COMPARE.run(COMPARE.options(**settings, iterations=2, algorithms=rows))
    stored = json.loads((tmp_path / "compare.json").read_text())
    assert [cell["algorithm"] for cell in stored["cells"]] == list(rows)
    assert [cell["tangents"] for cell in stored["cells"] if "tangents" in cell] == [2, 4]
    assert [row["algorithm"] for row in stored["table"]] == ["bp", "fg-a", rows[0]]
    (folder,) = (tmp_path / "runs").glob("*adamw*")
    run = json.loads((folder / "config.json").read_text())
    options = {"optimizer": "adamw", "augment": "crop-flip", "iterations": 2}
    assert {name: run[name] for name in options} == options


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("bp@2", "tangents is not a setting of algorithm 'bp'"),
        ("lg-bp+exact", "exact_mixing is not a setting of algorithm 'lg-bp'"),
        ("fg-a+crp", "option of method 'fg-a\\+crp' 'crp' is unknown"),
        ("untrained", "algorithm 'untrained' is unknown"),
    ],
)
def test_rows_that_no_table_has(row, message, tmp_path):
    with pytest.raises(InputError, match=message):
        COMPARE.run(COMPARE.options(algorithms=(row,), out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_table_whose_learning_rates_are_searched(tmp_path):
    settings = {"network": "s/1/1", "epochs": 1, "out": tmp_path, "seeds": 2}
    chosen = COMPARE.options(
        **settings, algorithms=("bp",), search_iterations=5, rates=(1e-12, 3e-2)
    )
    COMPARE.run(chosen)
    first, second = json.loads((tmp_path / "compare.json").read_text())["cells"]
    assert first["rates"] == [1e-12, 3e-2]
    assert "rates" not in second
    assert first["rate_losses"][0] > first["rate_losses"][1]
    assert first["learning_rate"] == second["learning_rate"] == 3e-2
    searched = [path for path in (tmp_path / "runs").iterdir() if "5" in path.name.split("-")]
    summaries = [read(path / "summary.json", Summary) for path in searched]
    # A tenth of 1,437 images is held out in the search, and none after it.
    assert [summary.steps for summary in summaries] == [5, 5]
    assert [s.validation_loss for s in sorted(summaries, key=lambda s: s.train_loss)] == sorted(
        first["rate_losses"]
    )
    cells = [path for path in (tmp_path / "runs").iterdir() if path not in searched]
    assert [read(path / "summary.json", Summary).validation_loss for path in cells] == [None] * 2
    with pytest.raises(InputError, match=r"rates must have 0\.03, the learning rate of the other"):
        COMPARE.run(dataclasses.replace(chosen, rates=(1e-3,), seeds=3))
    with pytest.raises(InputError, match="results for search_iterations 5, not 0"):
        COMPARE.run(COMPARE.options(**settings))
    with pytest.raises(InputError, match="results for precision float32, not bfloat16"):
        COMPARE.run(dataclasses.replace(chosen, precision="bfloat16"))


@pytest.mark.slow
def test_rates_that_diverge_are_left_out(tmp_path):
    """Also one whose last loss is finite, and whose parameters are not."""
    settings = {"network": "logreg", "epochs": 1, "out": tmp_path, "seeds": 1}
    chosen = COMPARE.options(
        **settings, algorithms=("bp",), search_iterations=1, rates=(1e12, 1e-2)
    )
    chosen = dataclasses.replace(chosen, search_iterations=3)
    COMPARE.run(chosen)
    COMPARE.run(chosen)
    (cell,) = json.loads((tmp_path / "compare.json").read_text())["cells"]
    assert cell["learning_rate"] == 1e-2
    assert all(np.isfinite(cell["rate_losses"]))


@pytest.mark.parametrize("diverging", [("fa",), ("bp", "fa", "dfa")])
def test_cells_that_diverge_do_not_end_a_table(diverging, tmp_path, capsys):
    def make(job, options, console):
        if job.place["algorithm"] in diverging:
            raise DivergedError(f"{job.place['algorithm']} is not finite")
        return {"test_error": 1.0}

    table = dataclasses.replace(COMPARE, cells=dataclasses.replace(COMPARE.cells, make=make))
    rows, seeds = ("bp", "fa", "dfa"), 2
    with pytest.raises(
        DivergedError, match=f"of 6 cells, these diverged: .*{diverging[0]}, seed 0"
    ):
        table.run(COMPARE.options(algorithms=rows, seeds=seeds, out=tmp_path))
    assert capsys.readouterr().out.count("is not finite") == len(diverging) * seeds
    path = tmp_path / "compare.json"
    stored = json.loads(path.read_text())["cells"] if path.exists() else []
    left = [(row, seed) for seed in range(seeds) for row in rows if row not in diverging]
    assert [(cell["algorithm"], cell["seed"]) for cell in stored] == left


def test_a_readout_is_no_judge_of_learning_rates(tmp_path):
    chosen = options("table4", out=tmp_path / "out", search_iterations=3)
    with pytest.raises(InputError, match="search_iterations must be 0 in contrastive learning"):
        EXPERIMENTS["table4"].run(chosen)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_table4(tmp_path, monkeypatch):
    """Readouts of trained and untrained features; what is stored is not done again."""
    monkeypatch.setattr(_batches, "BATCH", 24)
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 12)):
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        path = tmp_path / "data" / "cifar10" / f"{split}.parquet"
        write_parquet(path, list(images), [i % 3 for i in range(count)])
    settings = {
        **{"out": tmp_path / "out", "data_dir": tmp_path / "data", "iterations": 1},
        **{"batch_size": 4, "examples": 20},
    }
    stored = run("table4", options("table4", **settings, algorithms=("untrained", "bp")))
    bp, untrained = stored["cells"]
    assert (bp["algorithm"], untrained["algorithm"]) == ("bp", "untrained")
    assert {"online_error", "test_error", "learning_rate"} <= set(bp)
    assert [row["algorithm"] for row in stored["table"]] == ["untrained", "bp"]
    assert [row["paper"] for row in stored["table"]] == [None, 24.1]
    markdown = (tmp_path / "out" / "table4.md").read_text().splitlines()
    assert markdown[0] == "| algorithm | cifar10 m/8/16 | paper |"
    assert markdown[2].startswith("| untrained | ")
    for folder in (tmp_path / "out" / "runs").iterdir():
        assert (folder / "readout.json").exists()
        assert json.loads((folder / "readout-untrained.json").read_text())["examples"] == 20
        # A readout on fewer images is not taken for one on all of them.
        read_out(folder, options("table4", data_dir=settings["data_dir"]))
        assert json.loads((folder / "readout.json").read_text())["examples"] == 24
        (folder / "summary.json").unlink()
    again = run("table4", options("table4", **settings, algorithms=("bp",)))
    assert again["cells"] == stored["cells"]
    with pytest.raises(InputError, match="holds results for iterations 1, not 2"):
        run("table4", options("table4", **{**settings, "iterations": 2}))
    with pytest.raises(InputError, match="column 'm/8/1' is unknown"):
        run("table4", options("table4", **settings, columns=("m/8/1",)))
    alone = {**settings, "out": tmp_path / "other"}
    with pytest.raises(InputError, match="'untrained' needs a finished run of cifar10 m/8/16"):
        run("table4", options("table4", **alone, algorithms=("untrained",)))


@pytest.mark.slow
def test_ablation(tmp_path, monkeypatch):
    monkeypatch.setitem(ablation.SETTINGS, "digits", ("digits", "s/1"))
    chosen = options(
        "ablation",
        **{"out": tmp_path, "settings": ("digits",), "groups": (1, 4), "iterations": 2},
        **{"variants": ("all local losses", "not by group", "global loss"), "seeds": 1},
    )
    stored = run("ablation", chosen)
    assert len(stored["cells"]) == 6
    places = {(cell["variant"], cell["groups"]) for cell in stored["cells"]}
    assert len(places) == 6
    configs = [json.loads(p.read_text()) for p in (tmp_path / "runs").glob("*/config.json")]
    assert {(c["algorithm"], c.get("groupwise")) for c in configs} == {
        ("lg-fg-a", True),
        ("lg-fg-a", False),
        ("fg-a", None),
    }
    assert {c["network"] for c in configs} == {"s/1/1", "s/1/4"}
    markdown = (tmp_path / "ablation.md").read_text().splitlines()
    assert markdown[:3] == ["**digits, s/1/groups, supervised**", "", "| groups | 1 | 4 |"]
    assert len(markdown) == 7
    # One group: its loss is that of all.
    by = {(c["variant"], c["groups"]): c["test_error"] for c in stored["cells"]}
    assert by["all local losses", 1] == by["not by group", 1]
    # What is stored is not done again.
    monkeypatch.setattr("forwardgrad.experiments._experiment.fit", None)
    assert run("ablation", chosen)["cells"] == stored["cells"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"settings": ("mnst",)}, "setting 'mnst' is unknown; did you mean 'mnist'"),
        ({"variants": ("no groups",)}, "variant 'no groups' is unknown"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
    ],
)
def test_ablation_refuses(tmp_path, settings, match):
    with pytest.raises(InputError, match=match):
        EXPERIMENTS["ablation"].run(options("ablation", out=tmp_path, **settings))
    assert not list(tmp_path.iterdir())


def test_table3_rows_are_means_beside_the_papers_numbers():
    cells = [
        TableCell(
            **{"column": "mnist m/1/16", "algorithm": name, "seed": i},
            **{"test_error": error, "seconds": 9.0},
        )
        for name, errors in (("lg-fg-a", (2.0,)), ("bp", (1.0, 3.0)))
        for i, error in enumerate(errors)
    ]
    presented = EXPERIMENTS["table3"].cells.present(cells)
    bp, fg_a = presented.rows
    assert (bp["test_error_mean"], bp["test_error_std"], bp["paper"]) == (2.0, 1.0, 2.41)
    assert (fg_a["seeds"], fg_a["test_error_mean"], fg_a["paper"]) == (1, 2.0, 2.55)
    assert presented.text.splitlines()[2:] == [
        "| bp | 2.00 ± 1.00 | 2.41 |",
        "| lg-fg-a | 2.00 | 2.55 |",
    ]


RESULTS = Path(__file__).parents[1] / "results"


@pytest.mark.parametrize(
    "name",
    [
        *("table3", "table3-cifar10", "table3-small", "table3-small-plain"),
        *("table4", "compare", "ablation", "tokens", "tokens-cosine"),
    ],
)
def test_stored_results_are_presented_as_they_were(name, tmp_path):
    """Cells, their means, and the files that were made of them, by the version that made them."""
    experiment = {**EXPERIMENTS, "compare": COMPARE}[
        re.sub("-(cifar10|small|small-plain)$", "", name)
    ]
    path = RESULTS / name / f"{experiment.name}.json"
    grid = read(path, Grid[experiment.cells.kind, experiment.options])
    stored = json.loads(path.read_text())
    cells = msgspec.to_builtins([without_none(cell) for cell in grid.cells])
    assert json.loads(json.dumps(cells)) == stored["cells"]
    assert as_options(grid.options).items() >= stored["options"].items()
    presented = experiment.cells.present(grid.cells)
    assert presented.rows == stored["table"]
    assert presented.text == path.with_suffix(".md").read_text()
    if name != "ablation":
        assert csv(presented.rows) == path.with_suffix(".csv").read_text()


@pytest.mark.parametrize("network", ["logreg", "mlp", "cnn"])
def test_stored_curves_are_read(network):
    experiment = EXPERIMENTS[f"mnist-{network}"]
    path = RESULTS / experiment.name / f"{experiment.name}.json"
    grid = read(path, Grid[experiment.cells.kind, experiment.options])
    assert experiment.cells.present(grid.cells).rows[0]["seeds"] == 5


@pytest.mark.parametrize(("name", "count"), [("toy", 2), ("scaling", 18), ("variance", 4)])
def test_stored_measurements_are_read(name, count):
    experiment, path = EXPERIMENTS[name], RESULTS / name / f"{name}.json"
    grid, stored = read(path, Grid[experiment.cells.kind, experiment.options]), path.read_text()
    assert len(grid.cells) == count
    assert (
        json.loads(json.dumps(list(map(dataclasses.asdict, grid.cells))))
        == (json.loads(stored)["cells"])
    )
    presented = experiment.cells.present(grid.cells)
    assert list(presented.rows) == json.loads(stored)["table"]
    if presented.text:
        assert presented.text == path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("toy", '"function": "beale"', '"function": "bale"'),
        ("toy", '"gradient descent": {', '"descent": {}, "gradient descent": {'),
        ("scaling", '"BP": {', '"backpropagation": {'),
        ("variance", '"norm": 0.6006199465355018', '"norm": 0'),
        ("ablation", '"setting": "mnist"', '"setting": "fashion"'),
    ],
)
def test_cells_that_no_figure_can_be_made_of(tmp_path, name, old, new):
    """Each has its type, but not what belongs together: a sentence, and nothing is changed."""
    experiment, path = EXPERIMENTS[name], tmp_path / f"{name}.json"
    stored = (RESULTS / name / f"{name}.json").read_text()
    assert old in stored
    path.write_text(stored.replace(old, new))
    before = path.read_bytes()
    given = json.loads(stored)["options"]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    with pytest.raises(InputError, match=f"{name}.json is damaged: "):
        experiment.run(options(name, **given, out=tmp_path))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "settings"), [("scaling", {"depths": ()}), ("table3", {"algorithms": ()})]
)
def test_options_that_ask_for_nothing(tmp_path, name, settings):
    with pytest.raises(InputError, match=f"the options of {name} ask for no cells"):
        EXPERIMENTS[name].run(options(name, out=tmp_path, **settings))
    assert not list(tmp_path.iterdir())


def test_the_folders_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"width": 4, "repeats": 1, "depths": (1,), "batch_sizes": (4,)}
    out = EXPERIMENTS["scaling"].run(options("scaling", **small))
    assert out == Path("runs/reproduce/scaling")
    assert (out / "scaling.json").exists()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"columns": ("cifar",)}, "column 'cifar' is unknown; did you mean 'cifar10'"),
        ({"algorithms": ("fgw",)}, "algorithm 'fgw' is unknown; did you mean 'fg-w'"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"settings": "paper"}, "settings 'paper' are for images in colour"),
    ],
)
def test_table3_refuses(tmp_path, settings, match):
    with pytest.raises(InputError, match=match):
        EXPERIMENTS["table3"].run(options("table3", out=tmp_path, **settings))
    assert not list(tmp_path.iterdir())


def test_the_papers_settings():
    """Those of the published configurations, of which an option that is given replaces one."""
    chosen = options("table3", settings="paper", columns=("cifar10", "imagenet"), epochs=2)
    configs = [job.config for job in EXPERIMENTS["table3"].cells.jobs(chosen)]
    assert {c.network for c in configs} == {"m/8/16", "l/32/64"}
    for config in configs:
        images, rates = config.data.augmentation, config.optimisation
        assert (config.epochs, config.batch_size, rates.warmup) == (2, 256, 1950)
        assert (images.augment, images.least_area) == ("simclr", 0.3)
        assert (rates.optimizer, rates.momentum, rates.weight_decay) == ("sgd", 0.9, 1e-4)
        assert (rates.learning_rate, rates.schedule) == (0.05, "cosine")
        assert options_of(config).get("tangents", 1) == 1
    chosen = options("table4", settings="paper", algorithms=("lg-fg-a",))
    (job,) = EXPERIMENTS["table4"].cells.jobs(chosen)
    found = options_of(job.config)
    assert (found["optimizer"], found["learning_rate"], found["scale_learning_rate"]) == (
        *("lars", 0.1, True),
    )
    assert (found["batch_size"], found["epochs"], found["least_area"]) == (2048, 800, 0.08)


@pytest.mark.slow
def test_variance(tmp_path):
    """Predictions are within five standard errors; those of other tests are within less."""
    chosen = options(
        "variance",
        **{"dataset": "digits", "network": "s/1/1", "algorithms": ("fg-w", "fg-a")},
        **{"samples": 40, "batch_size": 8, "out": tmp_path},
    )
    rows = run("variance", chosen)["table"]
    assert [row["algorithm"] for row in rows] == ["fg-w"] * 5 + ["fg-a"] * 5
    assert [row["layer"] for row in rows[4::5]] == ["all", "all"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["measured"] / row["predicted"])
        assert row["ratio"] == pytest.approx(1, abs=5 * row["ratio_error"])
    for start in (0, 5):
        parts = [row["predicted"] for row in rows[start : start + 5]]
        assert sum(parts[:4]) == pytest.approx(parts[4])
    relative = [row["predicted"] / row["norm"] ** 2 for row in rows[4::5]]
    # 64 x 256 and 256 x 256 weights, and biases.
    assert relative[0] == pytest.approx(64 * 256 + 256 * 256 + 512 - 1, rel=1e-4)
    assert relative[1] < 0.02 * relative[0]
    assert f"| {relative[0] / relative[1]:.4g} |" in (tmp_path / "variance.md").read_text()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"network": "m/8/16"}, "network must be a LocalMixer with one patch, .* got 'm/8/16'"),
        ({"network": "mlp"}, "network must be a LocalMixer with one patch, .* got 'mlp'"),
        ({"algorithms": ("bp",)}, "algorithm 'bp' is unknown"),
    ],
)
def test_variance_refuses(tmp_path, settings, match):
    with pytest.raises(InputError, match=match):
        EXPERIMENTS["variance"].run(options("variance", out=tmp_path, **settings))


MODELS = Path(__file__).parents[1] / "benchmarks" / "models.py"


@pytest.fixture(scope="module")
def models():
    spec = importlib.util.spec_from_file_location("models", MODELS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["MLP 10x1024, batch 64", "CNN, batch 64", "Equinox MLP 17x1024, batch 256",
     "NNX transformer 6x256, 8x128 tokens"],
)  # fmt: skip
def test_benchmark_models(models, name):
    loss, params, batch, checkpointed = models.PROBLEMS[name]()
    value, grads = jax.jit(fg.value_and_grad(loss, fg.WeightPerturbation()))(
        params, *batch, key=jax.random.key(0)
    )
    np.testing.assert_allclose(value, jax.jit(loss)(params, *batch), rtol=1e-4)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert len(jax.tree.leaves(grads)) == len(jax.tree.leaves(params))
    if checkpointed is not None:
        assert_same_gradients(loss, checkpointed, params, batch)


@pytest.mark.slow
def test_checkpoints_of_the_transformer_save_memory(models):
    loss, params, batch, checkpointed = models.nnx_transformer(128)
    steps = [Step(f, params, fg.Backpropagation(), batch) for f in (loss, checkpointed)]
    assert steps[1].temp_bytes < 0.4 * steps[0].temp_bytes
    assert steps[1].flops < 1.34 * steps[0].flops
