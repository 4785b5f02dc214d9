"""Damaged files: whatever is wrong with one, a command says it in one sentence and ends."""

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest

from forwardgrad.cli import main
from forwardgrad.training import configure, fit

RESULTS = Path(__file__).parents[1] / "results"
SECONDS = 60

TRAIN = "--task contrastive --network mlp --width 8 --algorithm bp --iterations 1 --batch-size 8"


def _changed(value, change):
    if isinstance(value, dict):
        return {name: _changed(inner, change) for name, inner in value.items()}
    if isinstance(value, list):
        return [_changed(inner, change) for inner in value]
    return change(value)


def _of_lines(text, change):
    """The same change in every line of metrics, or in the whole of a file."""
    try:
        values = [json.loads(text)]
    except ValueError:
        values = [json.loads(line) for line in text.splitlines()]
    return "\n".join(json.dumps(_changed(value, change)) for value in values) + "\n"


def _numbers(change):
    return lambda v: change(v) if isinstance(v, int | float) and not isinstance(v, bool) else v


DAMAGES = {
    "truncated": lambda text: text[: len(text) // 2].rstrip("\n}"),
    "empty": lambda text: "",
    "no text": lambda text: b"\xff\xfe\x00{",
    "null": lambda text: "null\n",
    "a list": lambda text: "[1, 2]\n",
    "without fields": lambda text: '{"experiment": "table3"}\n',
    "lists for texts": lambda text: _of_lines(text, lambda v: [v] if isinstance(v, str) else v),
    "texts for numbers": lambda text: _of_lines(text, _numbers(str)),
    "below zero": lambda text: _of_lines(text, _numbers(lambda v: -1 - v)),
    "infinite": lambda text: _of_lines(text, _numbers(lambda v: 1e308)).replace("1e+308", "1e999"),
    "astronomical": lambda text: _of_lines(text, _numbers(lambda v: 10**400)),
    "endless digits": lambda text: "9" * 10_000,
    "nested deeply": lambda text: "[" * 100_000,
    "nested in objects": lambda text: '{"a":' * 50_000 + "1" + "}" * 50_000,
}


def damage(path: Path, kind: str) -> None:
    """Put something else in the place of a file."""
    text = path.read_text()
    path.unlink()
    match kind:
        case "a folder":
            path.mkdir()
        case "a pipe":
            os.mkfifo(path)
        case "a link to itself":
            path.symlink_to(path.name)
        case "huge":
            path.touch()
            os.truncate(path, 2**40)
        case _:
            new = DAMAGES[kind](text)
            path.write_bytes(new if isinstance(new, bytes) else new.encode())


KINDS = (*DAMAGES, "a folder", "a pipe", "a link to itself", "huge")

OF_A_RUN = {
    "train": (f"train {TRAIN} --out run --resume", ("config.json", "summary.json")),
    "resume": (f"train {TRAIN} --out run --resume", ("config.json", "metrics.jsonl")),
    "readout": ("readout run --examples 100", ("config.json", "summary.json")),
    "diagnose": ("diagnose --run run --samples 4", ("config.json",)),
}

GRIDS = {
    "table3": "reproduce table3 --algorithms bp --seeds 1 --out table3",
    "table4": "reproduce table4 --algorithms bp --epochs 1 --batch-size 32 --examples 10000 "
    "--out table4",
    "compare": "compare --algorithms bp --seeds 1 --out compare",
    "ablation": "reproduce ablation --settings mnist --groups 4 --iterations 300 --batch-size 64 "
    "--seeds 1 --variants 'global loss' --out ablation",
    "mnist-logreg": "reproduce mnist-logreg --seeds 1 --learning-rates 2e-5 --out mnist-logreg",
    "scaling": "reproduce scaling --depths 1 --batch-sizes 64 --out scaling",
}
"""Commands for which all cells are stored."""

READ_BY_REPORT = ("config.json", "metrics.jsonl", "summary.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    settings = {"task": "contrastive", "network": "mlp", "width": 8, "algorithm": "bp"}
    fit(configure(**settings, iterations=1, batch_size=8, out=out))
    return out


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Run a command, which must not hang: its exit code and what it says on standard error."""
    monkeypatch.chdir(tmp_path)

    def hangs(*_):
        raise AssertionError("the command hangs")

    def run(line):
        before = signal.signal(signal.SIGALRM, hangs)
        signal.alarm(SECONDS)
        try:
            return main(shlex.split(line)), capsys.readouterr().err
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    return run


def refuses(code, said, name):
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert len(said) < 1000
    assert name in said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("verb", "name"), [(verb, name) for verb, (_, names) in OF_A_RUN.items() for name in names]
)
def test_a_file_of_a_run(whole, command, verb, name, kind):
    shutil.copytree(whole, "run")
    if verb == "resume":
        Path("run/summary.json").unlink()
    damage(Path("run", name), kind)
    refuses(*command(OF_A_RUN[verb][0]), name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GRIDS)
def test_a_file_of_cells(command, name, kind):
    shutil.copytree(RESULTS / name, name)
    damage(Path(name, f"{name}.json"), kind)
    refuses(*command(GRIDS[name]), f"{name}.json")


@pytest.mark.parametrize("kind", KINDS[::2])
@pytest.mark.parametrize("name", [*READ_BY_REPORT, *GRIDS])
def test_the_report_says_what_it_could_not_read(whole, command, name, kind):
    """And reports the rest."""
    Path("all").mkdir()
    Path("all/step.json").write_text('{"benchmark": "step"}')
    if name in GRIDS:
        name = f"{name}.json"
        shutil.copy(RESULTS / name.removesuffix(".json") / name, "all")
    else:
        shutil.copytree(whole, "all/run")
    path = Path("all", name) if name in os.listdir("all") else Path("all/run", name)
    damage(path, kind)
    code, said = command("report all")
    assert (code, said) == (0, "")
    problems = Path("report.md").read_text().partition("## Tables")[0].count("\n- ")
    # What is empty or anybody's is no result; files of cells that are not tables are only listed.
    assert (
        problems == 1
        or kind in ("a list", "null", "empty", "without fields", "a folder")
        or (name in ("mnist-logreg.json", "scaling.json"))
    )


@pytest.mark.parametrize("name", GRIDS)
def test_what_is_stored_is_not_done_again(command, name):
    shutil.copytree(RESULTS / name, name)
    path = Path(name, f"{name}.json")
    if name in ("table4", "ablation"):
        # Their networks are of before features were normalised, which is refused: as if they were.
        assert command(GRIDS[name])[1].count("for normalise_features False, not True") == 1
        stored = json.loads(path.read_text())
        for cell in stored["cells"]:
            cell["normalise_features"] = True
        path.write_text(json.dumps(stored))
    assert command(GRIDS[name]) == (0, "")


@pytest.mark.parametrize("kind", ["a pipe", "a folder"])
def test_a_checkpoint_that_holds_something_else(whole, command, kind):
    shutil.copytree(whole, "run")
    Path("run/summary.json").unlink()
    for path in [p for p in Path("run/checkpoints").rglob("*") if p.is_file()]:
        path.unlink()
        (os.mkfifo if kind == "a pipe" else os.mkdir)(path)
    refuses(*command(OF_A_RUN["resume"][0]), "checkpoint")


@pytest.mark.parametrize(
    "name", ["curves.png", "metrics.jsonl", "summary.json", "checkpoints", "config.json"]
)
def test_a_folder_in_the_place_of_what_is_written(command, name):
    Path("run", name, "inner").mkdir(parents=True)
    refuses(*command("train --network logreg --algorithm bp --iterations 1 --out run"), "run")
