"""`forwardgrad report`: what it finds, what it says is missing, and that its pages are sound."""

import html.parser
import importlib.resources
import io
import itertools
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import tyro
from PIL import Image

from forwardgrad import InputError
from forwardgrad.cli import main
from forwardgrad.cli._train import read_options
from forwardgrad.experiments import COMPARE, EXPERIMENTS
from forwardgrad.experiments._tables import ALGORITHMS, TABLE3_COLUMNS
from forwardgrad.report import write_report
from forwardgrad.report._collect import collect
from forwardgrad.report._missing import gaps
from forwardgrad.report._page import html as render_html
from forwardgrad.report._page import read, write
from forwardgrad.report._plots import costs, curves, pareto
from forwardgrad.report._table import HEADS, progress
from forwardgrad.results import Place
from forwardgrad.training import configure
from forwardgrad.training._config import options_of

DATE = "2026-01-02T03:04:05+00:00"
ORIGIN = {
    "date": "2026-01-01T00:00:00+00:00",
    "forwardgrad_version": "0.1.0",
    "jax_version": "0.10.2",
    "backend": "cpu",
    "device": "cpu",
    "cores": 2,
}
HOSTILE = "<script>alert('x')</script> & $\\frac{|`*_x"


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def store(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, default=str))


def cell(column, algorithm, seed, error=2.0, seconds=10.0):
    place = {"column": column, "algorithm": algorithm, "seed": seed}
    return {**place, "test_error": error, "train_error": 0.5, "seconds": seconds, "tangents": 4}


def store_table(folder, cells, experiment="table3", **options):
    defaults = {"columns": ["mnist"], "algorithms": ["bp"], "epochs": 2, "batch_size": 8}
    if experiment == "compare":
        defaults |= {"dataset": "digits", "network": "m/1/16"}
        del defaults["columns"]
    options = {**defaults, "seeds": 1, **options}
    value = {"experiment": experiment, "options": options, **ORIGIN, "cells": cells, "table": []}
    store(folder / f"{experiment}.json", value)


def store_run(folder, *, end="finished", epochs=3, error=5.0, extra=None, **settings):
    settings = {"epochs": epochs, "learning_rate": 0.1, "momentum": 0.9, **settings}
    config = {**options_of(configure(**settings, out=Path("elsewhere"))), **(extra or {})}
    store(folder / "config.json", config)
    done = epochs if end == "finished" else 1
    lines = [
        {"event": "epoch", "epoch": float(i), "step": 10 * i, "seconds": 2.0 * i, "loss": 1 / i,
         "train_error": error, "test_error": error + epochs - i}
        for i in range(1, done + 1)
    ]  # fmt: skip
    if end == "diverged":
        lines.append({"event": "diverged", "epoch": 1.5, "step": 15, "reason": "the loss is nan"})
    store(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if end == "finished":
        names = ("algorithm", "network", "dataset", "seed")
        known = {name: config[name] for name in names}
        result = {"test_error": error, "train_error": error, "seconds": 2.0 * epochs}
        result |= {"epochs": epochs, "steps": 10 * epochs, "parameters": 9, "train_loss": 0.1}
        store(folder / "summary.json", {**known, **result, **ORIGIN})


def table3_places(selectors, algorithms, seeds):
    columns = [column for name in selectors for column in TABLE3_COLUMNS[name]]
    return places(columns, algorithms, range(seeds))


def places(columns, algorithms, seeds):
    return {(Place(c, (a,)), s) for c, a, s in itertools.product(columns, algorithms, seeds)}


def cells_of(table):
    return {(cell.place, cell.seed) for cell in table.grid.cells}


def tables(*folders):
    return collect([Path(folder) for folder in folders]).tables


# What is found


def test_runs_tables_and_experiments_are_found_below_the_folders():
    store_run(Path("all/a/one"), seed=1)
    store_run(Path("all/a/two"), end="unfinished")
    store_run(Path("all/checkpoints/three"))
    store_run(Path("all/.hidden/four"))
    store_table(Path("all/t"), [cell("mnist s/1/1", "bp", 0)])
    store(Path("all/scaling.json"), {"experiment": "scaling", **ORIGIN, "cells": {"a": {}}})
    store(Path("all/step.json"), {"benchmark": "step", "results": {}})
    store(Path("all/package.json"), {"name": "something else's"})
    store(Path("all/list.json"), [1, 2])
    image = io.BytesIO()
    Image.new("RGB", (2, 2)).save(image, "png")
    Path("all/scaling.png").write_bytes(image.getvalue())

    found = collect([Path("all"), Path("all/a")])
    assert [(run.folder, run.state) for run in found.runs] == [
        (Path("all/a/one"), "finished"),
        (Path("all/a/two"), "unfinished"),
    ]
    assert found.runs[0].config.seed == 1
    assert [line.epoch for line in found.runs[0].measurements] == [1.0, 2.0, 3.0]
    assert [t.path for t in found.tables] == [Path("all/t/table3.json")]
    assert found.tables[0].facts["machine"] == "cpu, 2 cores"
    assert [
        (other.header.experiment or other.header.benchmark, other.picture is not None)
        for other in found.others
    ] == [
        ("scaling", True),
        ("step", False),
    ]
    assert found.problems == []


def test_the_folders_by_default():
    with pytest.raises(InputError, match="neither runs nor results"):
        collect([])
    store_run(Path("results/a"))
    assert collect([]).folders == [Path("results")]
    store_run(Path("runs/a"))
    assert collect([]).folders == [Path("runs")]


def test_nothing_is_refused():
    Path("empty").mkdir()
    with pytest.raises(InputError, match="folders: empty hold no results"):
        write_report(["empty"])
    with pytest.raises(InputError, match="folders: absent is not a folder"):
        write_report(["empty", "absent"])
    store_run(Path("runs/a"))
    with pytest.raises(InputError, match=r"out must be .* \.html, got page\.md"):
        write_report(["runs"], "page.md")
    assert sorted(os.listdir()) == ["empty", "runs"]


DAMAGED = {
    "a/config.json": ("{", "a/config.json is damaged"),
    "b/summary.json": ("[]", "b/config.json is missing"),
    "c/config.json": (
        '{"dataset": 3}',
        "of another version: dataset must be str, got 3",
    ),
    "table3.json": ('{"experiment": "table3", "cells": [', "table3.json is damaged"),
    "table4.json": ('{"experiment": "table4", "cells": []}', "missing required field `options`"),
    "compare.json": (
        '{"experiment": "compare", "options": {}, "cells": [{"column": "a", "seed": "0"}]}',
        "compare.json is damaged: expected `int`, got `str` - at `$.cells[0].seed`",
    ),
    "ablation.json": (
        '{"experiment": "ablation", "options": {"seeds": 1000000000000}, "cells": []}',
        "ablation.json is damaged: seeds must be at most 1000",
    ),
    "toy.json": (b"\xff\xfe", "toy.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_said_in_one_sentence(name):
    store_run(Path("runs/good"))
    text, sentence = DAMAGED[name]
    path = Path("runs") / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    report = read(["runs"], DATE)
    assert len(report.problems) == 1
    assert sentence in report.problems[0]
    assert "\n" not in report.problems[0]
    assert len(report.runs) == 1
    assert "What could not be read" in write(report, Path("report.html")).read_text()


def test_a_damaged_line_of_metrics_leaves_those_before():
    store_run(Path("runs/a"))
    path = Path("runs/a/metrics.jsonl")
    path.write_text(path.read_text().replace('{"event": "epoch", "epoch": 2.0', "{"))
    found = collect([Path("runs")])
    assert [line.epoch for line in found.runs[0].measurements] == [1.0]
    assert "line 2 of runs/a/metrics.jsonl is damaged: expected JSON" in found.problems[0]


def test_a_damaged_summary_leaves_the_run_unfinished():
    store_run(Path("runs/a"))
    Path("runs/a/summary.json").write_text('{"test_error": null}')
    report = read(["runs"], DATE)
    assert "summary.json is damaged" in report.problems[0]
    assert [run[6] for run in report.runs] == ["unfinished"]


# Tables


def test_a_table_is_in_the_papers_form():
    cells = [
        cell("mnist s/1/1", "lg-fg-a", 0, 3.0),
        cell("mnist s/1/1", "bp", 0, 1.0),
        cell("mnist s/1/1", "bp", 1, 2.0),
        cell("mnist m/1/16", "bp", 0, 4.0),
    ]
    store_table(Path("t"), cells, seeds=2)
    ((view, found),) = read(["t"], DATE).tables
    assert view.table.columns == ["mnist s/1/1", "mnist m/1/16"]
    assert all(map(view.table.has_paper, view.table.columns))
    assert found
    assert [row for (row,) in view.rows] == list(ALGORITHMS)
    (_, *first), (_, *second) = view.entries(("bp",))
    (_, *last), (_, *none) = view.entries(("lg-fg-a",))
    assert first == [("1.50 ± 0.50", "2.66", True), "2 seeds"]
    assert second == [("4.00", "2.41", True), "1 of 2 seeds"]
    assert last == [("3.00", "3.24", False), "1 of 2 seeds"]
    assert none == [("", "2.55", False), "missing"]
    assert (view.facts["epochs"], view.facts["machine"]) == ("2", "cpu, 2 cores")


def test_the_readouts_of_an_untrained_network_come_first():
    cells = [cell("cifar10 m/8/16", name, 0) for name in ("bp", "untrained")]
    options = {"columns": ["m/8/16"], "algorithms": ["bp", "untrained", "fa"]}
    store_table(Path("t"), cells, "table4", **options)
    ((view, found),) = read(["t"], DATE).tables
    assert [row for (row,) in view.rows][:2] == ["untrained", "bp"]
    assert [view.entries(row)[0][1].paper for row in view.rows][:2] == ["", "24.10"]
    assert "linear readout" in view.cells.error
    (gap,) = found
    assert (Place("cifar10 m/8/16", ("fa",)), 0) in gap.cells
    assert gap.command.startswith("forwardgrad reproduce table4 --columns m/8/16 --algorithms ")


# Missing cells


def parsed(command):
    """The experiment, and its options as the command line reads them."""
    program, *words = shlex.split(command)
    assert program == "forwardgrad"
    if words[0] == "compare":
        return "compare", tyro.cli(COMPARE.options, args=words[1:])
    assert words[0] == "reproduce"
    return words[1], tyro.cli(EXPERIMENTS[words[1]].options, args=words[2:])


def test_commands_fill_just_the_cells_that_are_missing():
    stored = table3_places(["mnist"], ["bp", "lg-bp"], 3) | table3_places(["mnist"], ["fa"], 1)
    stored -= {(Place("mnist m/1/16", ("lg-bp",)), 1)}
    cells = [cell(place.column, place.row[0], seed) for place, seed in sorted(stored)]
    store_table(Path("a folder"), cells, algorithms=["bp", "lg-bp"], seeds=3)
    store_table(Path("cifar"), [cell("cifar10 m/8/16", "bp", 0)], columns=["cifar10"])
    first, second = tables("a folder", "cifar")

    found = gaps(first, (first, second))
    missing = [place for gap in found for place in gap.cells]
    assert len(missing) == len(set(missing))
    assert set(missing) == table3_places(["mnist"], ALGORITHMS, 3) - stored
    for gap in found:
        name, options = parsed(gap.command)
        assert name == "table3"
        filled = table3_places(options.columns, options.algorithms, options.seeds) - stored
        assert filled == set(gap.cells)
        assert (options.epochs, options.batch_size) == (2, 8)
        assert options.out == Path("a folder")
    (cifar,) = gaps(second, (first, second))
    assert cifar.command == (
        f"forwardgrad reproduce table3 --columns cifar10 --algorithms {' '.join(ALGORITHMS[1:])} "
        "--seeds 1 --precision float32 --search-iterations 0 --epochs 2 --batch-size 8 "
        "--settings short --warmup 0 --augment none --out cifar"
    )


def test_a_column_of_the_paper_that_no_table_has_is_missing_once():
    for folder in ("a", "b"):
        cells = [cell(c, a, s) for (c, (a,)), s in table3_places(["mnist"], ALGORITHMS, 1)]
        store_table(Path(folder), cells)
    first, second = tables("a", "b")
    (gap,) = gaps(first, (first, second))
    assert set(gap.cells) == table3_places(["cifar10"], ALGORITHMS, 1)
    assert parsed(gap.command)[1].columns == ("cifar10",)
    assert gap.texts == [f"cifar10 m/8/16: {', '.join(ALGORITHMS)}; seed 0"]
    assert gaps(second, (first, second)) == []


def test_a_later_call_with_less_does_not_hide_what_is_missing():
    """The options are those of the last call; the cells remember the ones before."""
    options = {"columns": ["mnist"], "algorithms": ["fa"], "seeds": 1}
    store_table(Path("t"), [cell("mnist s/1/1", "bp", seed) for seed in (0, 2)], **options)
    (table,) = tables("t")
    missing = {place for gap in gaps(table, (table,)) for place in gap.cells}
    assert missing >= table3_places(["mnist"], ALGORITHMS, 3) - cells_of(table)


def test_missing_cells_of_compare():
    column = f"a set {HOSTILE} m/1/16"
    cells = [cell(column, "bp", 0), cell("digits m/1/16", "l-fg-w", 0)]
    store_table(Path("t"), cells, "compare", algorithms=["bp", "fg-a"], seeds=2)
    (table,) = tables("t")
    stored = cells_of(table)
    found = gaps(table, (table,))
    for gap in found:
        name, options = parsed(gap.command)
        assert name == "compare"
        place = f"{options.dataset} {options.network}"
        every = places([place], options.algorithms, range(options.seeds))
        assert every - stored == set(gap.cells)
    missing = {place for gap in found for place in gap.cells}
    every = places((column, "digits m/1/16"), ("bp", "fg-a", "l-fg-w"), range(2))
    assert missing == every - stored


def ablation_cell(variant, groups, seed):
    place = {"task": "supervised", "setting": "digits", "variant": variant, "groups": groups}
    return {**place, "seed": seed, "test_error": 3.0 + seed, "seconds": 4.0}


def test_an_ablation_lacks_what_its_options_ask_for():
    lists = {
        **{"tasks": ["supervised"], "settings": ["digits", "mnist"]},
        **{"variants": ["not by block"], "groups": [1, 4]},
    }
    cells = [ablation_cell("not by block", 4, seed) for seed in (0, 2)]
    value = {"experiment": "ablation", "options": {**lists, "seeds": 2}, **ORIGIN}
    store(Path("t/ablation.json"), {**value, "cells": cells, "table": []})
    ((view, (gap,)),) = read(["t"], DATE).tables
    assert (view.cells.kind.ROW, view.table.columns) == (
        ("variant", "groups"),
        ["supervised digits"],
    )
    assert view.rows == [("not by block", "4")]
    assert [entry.ours for _, entry, _ in view.entries(view.rows[0])] == ["4.00 ± 1.00"]
    every = itertools.product(["digits", "mnist"], ["1", "4"], [0, 1])
    assert set(gap.cells) == {
        (Place(f"supervised {setting}", ("not by block", groups)), seed)
        for setting, groups, seed in every
    } - {(Place("supervised digits", ("not by block", "4")), 0)}
    name, options = parsed(gap.command)
    assert (name, options.seeds, options.out) == ("ablation", 2, Path("t"))
    assert (options.settings, options.groups) == (("digits", "mnist"), (1, 4))


def test_a_table_of_an_experiment_that_is_not_known():
    store_table(Path("t"), [cell("a b", "bp", 0), cell("a b", "zz", 1)], "novel", depth=[1, 2])
    ((view, found),) = read(["t"], DATE).tables
    assert (view.title, view.rows, found) == ("novel: t", [("bp",), ("zz",)], [])
    assert view.facts["depth"] == "1, 2"


# Runs


RESUMED = {
    "plain": {},
    "none": {"clip": None, "algorithm": "fg-w"},
    "flags": {"normalise": False, "orthogonal": True, "exact_last": False, "tangents": 2},
    "hostile": {"dataset": HOSTILE, "data_dir": Path("my data")},
    "like an option": {"dataset": "--help"},
    "many": {"optimizer": "adam", "momentum": 0.0, "warmup": 3, "weight_decay": 1e-5, "seed": 7},
}


@pytest.mark.parametrize("name", RESUMED)
def test_the_command_continues_the_run(name):
    settings = RESUMED[name]
    store_run(Path("runs/a b"), end="unfinished", **settings)
    (run,) = read(["runs"], DATE).unfinished
    program, verb, *words = shlex.split(run.command)
    assert (program, verb) == ("forwardgrad", "train")
    config = read_options(words).config
    usual = {"epochs": 3, "learning_rate": 0.1, "momentum": 0.9}
    wanted = {**usual, **settings, "out": Path("runs/a b"), "resume": True}
    assert config == configure(**wanted)
    assert "--network" not in words, "a default"
    assert "interrupted, or still running, after 1 of 3 epochs." in progress(run)


def test_a_diverged_run_is_said_so():
    store_run(Path("runs/a"), end="diverged")
    report = read(["runs"], DATE)
    assert [run[6] for run in report.runs] == ["diverged"]
    (run,) = report.unfinished
    assert "diverged after 1.5 of 3 epochs: the loss is nan" in progress(run)
    assert "--resume" not in write(report, Path("report.html")).read_text()


@pytest.mark.parametrize("extra", [{"novelty": 1}, {"version": 2}])
def test_a_run_of_another_version_is_said_so(extra):
    store_run(Path("runs/a"), end="unfinished", extra=extra)
    store_run(Path("runs/b"))
    report = read(["runs"], DATE)
    assert [run[-1] for run in report.runs] == ["runs/b"]
    assert "of another version" in report.problems[0]


def test_all_runs_has_the_cells_that_have_no_folder_of_their_own():
    column = "mnist s/1/1"
    store_table(Path("t"), [cell(column, "bp", seed) for seed in (0, 1)], seeds=2)
    run = {"dataset": "mnist", "network": "s/1/1", "algorithm": "bp", "seed": 1}
    store_run(Path("t/runs/x"), task="contrastive", **run)
    store_run(Path("alone"), **run)
    report = read(["t", "alone"], DATE)
    assert [(run[2], run[-1]) for run in report.runs] == [
        ("1", "t/runs/x"),
        ("1", "alone"),
        ("0", "t/table3.json"),
    ]
    assert all(len(run) == len(HEADS) for run in report.runs)


# Plots


def test_curves_are_grouped_by_task_data_set_and_network():
    for seed in (0, 1):
        store_run(Path(f"runs/bp{seed}"), algorithm="bp", seed=seed, error=2.0 + seed)
    store_run(Path("runs/fg"), algorithm="fg-w", tangents=1)
    store_run(Path("runs/fg2"), algorithm="fg-w", tangents=8)
    store_run(Path("runs/other"), network="cnn")
    store_run(Path("runs/task"), task="contrastive")
    store_run(Path("runs/begun"), end="diverged", network="logreg", epochs=5)
    groups = {group.title: group for group in curves(collect([Path("runs")]))}
    assert set(groups) == {"digits mlp", "digits cnn", "contrastive digits mlp", "digits logreg"}
    test, loss = groups["digits mlp"].plots
    assert test.alt.startswith("test error (%) against epochs, at the end bp: 2.5; ")
    assert loss.alt.startswith("training loss against epochs, ")
    assert [s.label for s in test.series] == ["bp", "fg-w, tangents 1", "fg-w, tangents 8"]
    bp = test.series[0]
    assert bp.points == [(1.0, 4.5), (2.0, 3.5), (3.0, 2.5)]
    assert bp.seeds == [
        [(1.0, 4.0), (2.0, 3.0), (3.0, 2.0)],
        [(1.0, 5.0), (2.0, 4.0), (3.0, 3.0)],
    ]
    assert test.series[1].seeds == []
    assert [s.variant for s in test.series] == [0, 0, 1]


def test_costs_are_means_and_mark_the_front():
    column = "mnist s/1/1"
    cells = [
        cell(column, "bp", 0, 1.0, 10.0),
        cell(column, "bp", 1, 2.0, 20.0),
        cell(column, "fa", 0, 3.0, 5.0),
        cell(column, "dfa", 0, 3.0, 16.0),
        {**cell(column, "fg-w", 0), "seconds": None},
    ]
    store_table(Path("t"), cells, algorithms=["bp", "fa", "dfa"])
    (group,) = costs(collect([Path("t")]))
    points = {"bp": [(15.0, 1.5)], "fa": [(5.0, 3.0)], "dfa": [(16.0, 3.0)]}
    assert {s.label: s.points for s in group.plots[0].series} == points
    assert group.note.endswith(": fa (5 s, 3.00 %); bp (15 s, 1.50 %).")


def test_equal_points_are_both_on_the_front():
    assert pareto([(1.0, 1.0), (1.0, 1.0), (1.0, 2.0)]) == [True, True, False]


# Pages


class Page(html.parser.HTMLParser):
    """The tags of a page, its ids, and whether they are closed in order."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.ids, self.open, self.texts = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def commands(report):
    """All that the page offers, in its order."""
    filling = [gap.command for _, found in report.tables for gap in found]
    found = filling + [run.command for run in report.unfinished if run.state == "unfinished"]
    assert len(found) == 3
    return found


@pytest.fixture(scope="module")
def _everything(tmp_path_factory):
    """A folder with one of everything, with names that are not harmless, and its report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("everything"))
        _store_everything()
        write_report(["runs"], "out/page.html", date=DATE)
        return Path.cwd()


@pytest.fixture
def stored(monkeypatch, _everything):
    monkeypatch.chdir(_everything)
    return Path("out/page.html")


def _store_everything():
    for seed, algorithm in itertools.product((0, 1), ("bp", "lg-fg-a")):
        run = Path(f"runs/{algorithm}{seed}")
        store_run(run, dataset=HOSTILE, network="m/1/16", algorithm=algorithm, seed=seed)
    store_run(Path(f"runs/{HOSTILE.replace('/', '')}"), end="unfinished", dataset=HOSTILE)
    store_run(Path("runs/bad"), end="diverged", network=f"_{HOSTILE}\x00")
    cells = [cell(f"{HOSTILE} m/1/16", name, 0, i + 1.0) for i, name in enumerate(("bp", HOSTILE))]
    store_table(Path("runs/compare"), cells, "compare", dataset=HOSTILE, algorithms=["bp", "fa"])
    store_table(Path("runs/t"), [cell("mnist s/1/1", n, 0, 2.0, 9.0) for n in ("bp", "fa")])
    store(Path("runs/toy.json"), {"experiment": f"toy {HOSTILE}", **ORIGIN})
    image = io.BytesIO()
    Image.new("RGB", (2, 2)).save(image, "png")
    Path("runs/toy.png").write_bytes(image.getvalue())
    store(Path("runs/bad.json"), "{")


def test_the_page_is_whole_and_asks_for_nothing(stored):
    text = stored.read_text()
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert len(page.ids) > 5
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            target = attributes.get(name, "#")
            assert target.startswith("#") or re.match("data:image/(png|svg.xml);base64,", target)
            assert not target.startswith("#") or len(target) == 1 or target[1:] in page.ids
        for value in attributes.values():
            assert all(name in page.ids for name in re.findall(r"url\(#([^)]*)\)", value or ""))
    assert "http" not in re.sub(r"http-equiv|base64,[A-Za-z0-9+/=]*", "", text)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_the_page_is_accessible(stored):
    page = Page(stored.read_text())
    assert ("html", {"lang": "en"}) in page.tags
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")
    figures = [a for tag, a in page.tags if tag == "img" and "svg" in a["src"]]
    assert len(figures) > 3
    assert all("against" in a["alt"] for a in figures)
    assert all(a.get("scope") in ("col", "row") for tag, a in page.tags if tag == "th")


def test_names_are_text_in_the_page(stored):
    text = stored.read_text()
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "<script>alert" not in text
    assert any(HOSTILE in part for part in page.texts)
    report = read(["runs"], DATE)
    assert set(commands(report)) <= set(page.texts)


def test_the_markdown_says_the_same(stored):
    text = stored.with_suffix(".md").read_text()
    prose = re.sub(r"^(`{3,})bash\n.*?^\1$", "", text, flags=re.M | re.S)
    assert "<script" not in prose
    for block in re.findall(r"(?:^\|.*\n)+", prose, re.M):
        head, rule, *rows = block.splitlines()
        assert re.fullmatch(r"\|(:?-+:?\|)+", rule)
        counts = {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in (head, rule, *rows)}
        assert len(counts) == 1
        assert rows
    fenced = [c for _, c in re.findall(r"^(`{3,})bash\n(.*?)\n\1$", text, re.M | re.S)]
    assert fenced == commands(read(["runs"], DATE))
    images = re.findall(r"^!\[.*\]\(<(page_files/[^>]+)>\)$", text, re.M)
    assert len(images) > 4
    assert sorted(images) == sorted(
        f"page_files/{p.name}" for p in Path("out/page_files").iterdir()
    )
    for name in images:
        with Image.open(Path("out") / name) as image:
            image.load()


def test_two_runs_give_the_same_bytes(stored):
    other = write_report(["runs"], "again/page.html", date=DATE)
    files = [p.relative_to("out") for p in Path("out").rglob("*") if p.is_file()]
    assert len(files) > 6
    for name in files:
        assert (Path("out") / name).read_bytes() == (other.parent / name).read_bytes(), name


def test_a_date_is_all_that_differs(stored):
    other = render_html(read(["runs"], None))
    lines = zip(stored.read_text().splitlines(), other.splitlines(), strict=True)
    different = [a for a, b in lines if a != b]
    assert different == [f"<p>Made <time>{DATE}</time></p>"]


def test_files_are_whole_or_absent(monkeypatch):
    store_run(Path("runs/a"))
    page = write_report(["runs"], date="before")
    before = page.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="the disk is full"):
        write_report(["runs"], date="after")
    assert page.read_bytes() == before
    assert not [p for p in Path().rglob(".*") if p.is_file()]


def test_the_templates_are_in_the_package():
    names = {path.name for path in importlib.resources.files("forwardgrad.report").iterdir()}
    assert {"template.html.j2", "template.md.j2", "style.css", "script.js"} <= names


# The command


def test_the_command(capsys):
    store_run(Path("runs/a"))
    assert main(["report"]) == 0
    assert capsys.readouterr().out == "report: report.html, report.md\n"
    assert main(["report", "runs/a", "runs", "--out", "[a]/b.html"]) == 0
    assert "[a]/b.html, [a]/b.md" in capsys.readouterr().out
    assert Path("[a]/b.html").exists()


def test_the_command_refuses_in_one_line(capsys):
    assert main(["report"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: folders: there is neither")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_the_report_of_a_real_run(capsys):
    line = "train --network logreg --algorithm bp --epochs 1 --out runs/real"
    assert main(shlex.split(line)) == 0
    (run,) = read(["runs"], DATE).runs
    assert run[6] == "finished"
    assert run[:3] == ["digits logreg", "bp", "0"]
