import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from PIL import Image

import forwardgrad
from data_helpers import encode, pixels, write_pair, write_parquet
from forwardgrad import InputError, experiments
from forwardgrad.augmentation import build
from forwardgrad.cli import _data, _diagnose, _main, _sheet, _train, main
from forwardgrad.cli._data import DESCRIPTION, ShowOptions
from forwardgrad.data import load
from forwardgrad.experiments import DiagnoseOptions
from forwardgrad.training._config import Settings, options_of, preset

QUICK = "--network logreg --algorithm bp --iterations 3"


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORWARDGRAD_DATA", raising=False)


@pytest.fixture
def command(capsys):
    """Run the command: exit code, standard output, standard error."""

    def run(line: str):
        code = main(shlex.split(line))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return code, captured.out, captured.err

    return run


@pytest.fixture
def refused(command):
    """The command must end with code 2 and one sentence on standard error."""

    def run(line: str) -> str:
        code, _, err = command(line)
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return run


# Help


@pytest.mark.parametrize("line", ["", "-h", "--help"])
def test_help(command, line):
    code, out, err = command(line)
    assert (code, err) == (0, "")
    assert "forwardgrad train --dataset mnist" in out
    assert "reproduce" in out


def test_version(command):
    assert command("--version") == (0, f"forwardgrad {forwardgrad.__version__}\n", "")


@pytest.mark.parametrize("algorithm", ["bp", "fa", "lg-fg-w", "fg-a"])
def test_the_options_of_train_are_explained(command, algorithm):
    """Those that the algorithm has, each with a text and with its own default."""
    code, out, _ = command(f"train --algorithm {algorithm} --help")
    assert code == 0
    text = " ".join(out.partition("show this help")[2].replace("│", "").split())
    for name, value in options_of(preset(algorithm=algorithm)).items():
        flag = name.replace("_", "-")
        said = re.search(rf" --{flag}[ ,].*?\(default: (.*?)\)", text)
        assert said is not None, name
        assert said[1] == str(value), name
    assert "examples:" in out
    assert "--greedy" not in out


def test_every_setting_has_a_help_text():
    text = Path(sys.modules[Settings.__module__].__file__).read_text()
    for kind in Settings.__subclasses__():
        for field in dataclasses.fields(kind):
            if not isinstance(field.type, type) or not dataclasses.is_dataclass(field.type):
                assert re.search(rf'\n    {field.name}: [^\n]*\n    """\w', text), field.name


def test_the_examples_of_the_help_are_valid():
    examples = re.findall(r"^  forwardgrad train(.*)$", _train.DESCRIPTION, re.M)
    assert len(examples) >= 3
    for example in examples:
        _train.read_options(shlex.split(example))


def test_help_imports_none_of_the_libraries_for_training():
    code = (
        "import sys; from forwardgrad.cli import main; main(['--help']); "
        "print([m for m in ('orbax', 'datasets', 'grain', 'matplotlib', 'tyro', 'rich') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "forwardgrad", "train", "--network", "mpl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: network 'mpl' is unknown; did you mean 'mlp'? " \
        "(known: cnn, gpt/LAYERS/WIDTH, l/32/64, l/8/64, logreg, m/1/16, m/8/16, mlp, " \
        "s/1/1)\n"  # fmt: skip


# Bad input


def test_an_unknown_command(refused):
    assert "command 'trian' is unknown; did you mean 'train'?" in refused("trian")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("train --epochs many", "many"),
        ("train --epochs 0", "epochs must be at least 1, got 0"),
        ("train --learning-rate -1", "learning_rate must be more than 0.0, got -1.0"),
        ("train --optimizer adm", "adm"),
        ("data show --augment simcl", "invalid choice 'simcl' for argument '--augment'"),
        ("train --colour red", "--colour"),
        ("train extra", "extra"),
        ("train --algorithm bp --tangents 4", "tangents is not a setting of algorithm 'bp'"),
        ("train --no-groupwise", "groupwise is not a setting of algorithm 'fg-w'"),
    ],
)
def test_options_that_cannot_be_read(command, line, match):
    code, out, err = command(line)
    assert (code, out) == (2, "")
    assert match in err


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("--dataset digit", "dataset 'digit' is unknown; did you mean 'digits'"),
        ("--network cn", "network 'cn' is unknown; did you mean 'cnn'"),
        ("--algorithm fgw", "algorithm 'fgw' is unknown; did you mean 'fg-w'"),
        ("--algorithm lg-dfa", "algorithm 'lg-dfa' is not defined: "),
        ("--algorithm lg-fg-a --network logreg", "local losses need a network with blocks"),
        ("--batch-size 5000", "batch_size (=5000) is larger than the training set"),
        ("--data-dir nowhere --dataset mnist", "data_dir nowhere is not a folder"),
        ("--algorithm fg-w --structure dense --rank 2", "rank must be 1 for structure 'dense'"),
    ],
)
def test_settings_that_cannot_be_used(refused, options, match):
    assert match in refused(f"train {QUICK} {options}")
    assert not Path("runs").exists()


def test_patches_must_divide_the_image(refused):
    write_pair(Path("data/set"))
    line = "train --dataset set --data-dir data --network m/8/16 --algorithm lg-fg-a --batch-size 2"
    assert "patches (=8 along a side) must divide the images' height and width" in refused(line)
    assert not Path("runs").exists()


def broken(folder: Path, kind: str):
    train = write_pair(folder) / "train.parquet"
    whole = train.read_bytes()
    if kind == "missing":
        train.unlink()
    elif kind == "empty":
        train.write_bytes(b"")
    elif kind == "truncated":
        train.write_bytes(whole[: len(whole) // 2])
    elif kind == "label":
        write_parquet(train, list(pixels(4)), [0, 1, 2, 3])
    elif kind == "sizes":
        write_parquet(train, [encode(pixels(1, size=(n, 5))[0]) for n in (6, 7)], [0, 1])
    elif kind == "image":
        write_parquet(train, [b"no image", b"no image"], [0, 1])


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "label", "sizes", "image"])
def test_files_that_cannot_be_used(refused, kind):
    broken(Path("data/set"), kind)
    assert "train.parquet" in refused(f"train {QUICK} --dataset set --data-dir data --batch-size 2")
    assert not Path("runs").exists()


def test_a_folder_that_cannot_be_written(refused):
    Path("file").write_text("")
    message = refused(f"train {QUICK} --out file/run")
    assert "cannot write" in message or "not" in message


def test_without_the_extra(command, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'tyro'", name="tyro")

    monkeypatch.setattr(_main, "_command", missing)
    code, _, err = command("train")
    assert code == 2
    assert err == (
        "error: module 'tyro' is missing; the commands need the extra 'train': "
        "pip install 'forwardgrad[train]'\n"
    )


# Training


def test_train_says_what_it_did_and_where_the_files_are(command):
    code, out, err = command(f"train {QUICK} --out run")
    assert (code, err) == (0, "")
    for text in ("bp", "logreg, 650 parameters", "digits", "3 steps", "test error", "run/:"):
        assert text in out
    assert Path("run/summary.json").exists()


def test_resuming_a_finished_run_says_so(command, refused):
    command(f"train {QUICK} --out run")
    assert "already holds a run" in refused(f"train {QUICK} --out run")
    code, out, _ = command(f"train {QUICK} --out run --resume")
    assert code == 0
    assert "The run in run is finished already." in out
    assert "seed (0 there, 3 now)" in refused(f"train {QUICK} --out run --resume --seed 3")


# Diagnosing

SMALL = "diagnose --samples 4 --batch-size 8 --out out"


def test_diagnose_prints_a_block_for_each_algorithm(command):
    code, out, err = command(f"{SMALL} --network logreg --algorithms fg-w bp --tangents 2")
    assert (code, err) == (0, "")
    for text in ("fg-w, 4 samples", "bp, 2 samples", ".classifier.weight", "all", "650"):
        assert text in out
    assert out.count("backpropagation's;") == 2
    assert "files: out/: diagnosis.json, diagnosis.png" in out
    stored = json.loads(Path("out/diagnosis.json").read_text())
    assert stored["options"] == {
        **{"task": "supervised", "dataset": "digits", "network": "logreg"},
        **{"batch_size": 8, "seed": 0},
        "weights": "initial",
    }
    assert set(experiments.provenance()) <= set(stored)
    first, second = stored["diagnoses"]
    assert (first["algorithm"], first["samples"]) == ("fg-w", 4)
    assert re.match(r"WeightPerturbation\(\s*tangents=2\b", first["estimator"])
    assert (second["algorithm"], second["total"]["bias"]) == ("bp", 0)
    assert [row["name"] for row in first["layers"]] == [".classifier.weight", ".classifier.bias"]
    with Image.open("out/diagnosis.png") as figure:
        assert min(figure.size) > 200
        assert len(figure.convert("RGB").resize((64, 64)).getcolors(4096)) > 10


def test_diagnose_the_weights_of_a_run(command, refused):
    command("train --network mlp --width 8 --algorithm fg-w --iterations 3 --seed 5 --out run")
    code, out, _ = command(f"{SMALL} --run run")
    assert code == 0
    assert "fg-w, 4 samples" in out
    trained = json.loads(Path("out/diagnosis.json").read_text())
    assert trained["options"]["weights"] == "of run run"
    assert (trained["options"]["seed"], trained["options"]["network"]) == (5, "mlp")
    assert trained["diagnoses"][0]["layers"][0]["parameters"] == 64 * 8
    assert "tangents=16" in trained["diagnoses"][0]["estimator"]
    # Settings that suit the run's algorithm are not those of another.
    command(f"{SMALL} --run run --algorithms fg-a")
    other = json.loads(Path("out/diagnosis.json").read_text())["diagnoses"][0]
    assert other["algorithm"] == "fg-a"
    assert "tangents=4" in other["estimator"]
    # The gradient is that of the run's weights.
    assert other["total"]["norm"] == trained["diagnoses"][0]["total"]["norm"]
    message = refused(f"{SMALL} --run run --algorithms lg-fg-w")
    assert "network does not have the parameters that network 'mlp' has" in message
    assert "seed (=3) is set by the run in run" in refused(f"{SMALL} --run run --seed 3")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("--network logreg --samples 3", "samples must be an even number of at least 4, got 3"),
        ("--algorithms fgw", "algorithm 'fgw' is unknown; did you mean 'fg-w'"),
        ("--network cn", "network 'cn' is unknown; did you mean 'cnn'"),
        ("--run nowhere", "folder nowhere holds no run"),
        ("--network logreg --batch-size 5000", "batch_size (=5000) is larger than the training"),
        ("--tangents 0", "tangents must be an integer of at least 1, got 0"),
    ],
)
def test_what_cannot_be_diagnosed(refused, options, match):
    assert match in refused(f"diagnose {options}")
    assert not Path("runs").exists()


def test_the_options_of_diagnose_are_explained(command):
    code, out, _ = command("diagnose --help")
    assert code == 0
    for field in dataclasses.fields(DiagnoseOptions):
        assert f"--{field.name.replace('_', '-')}" in out
    for example in re.findall(r"^  forwardgrad diagnose(.*)$", _diagnose.DESCRIPTION, re.M):
        tyro.cli(DiagnoseOptions, args=shlex.split(example))


# Pictures of augmented images


def test_the_data_commands_are_listed(command):
    for line in ("data", "data --help"):
        code, out, err = command(line)
        assert (code, err) == (0, "")
        assert re.search(r"\n  show +what an augmentation makes of images", out)


def test_the_options_of_data_show_are_explained(command):
    code, out, _ = command("data show --help")
    assert code == 0
    for name in options_of(ShowOptions()):
        assert f"--{name.replace('_', '-')}" in out
    for example in re.findall(r"^  forwardgrad data show(.*)$", DESCRIPTION, re.M):
        tyro.cli(ShowOptions, args=shlex.split(example))


def picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_data_show_draws_a_sheet(command):
    """The rows and columns that there are, with the images in their places."""
    line = "data show --augment crop-flip --images 3 --seed 5"
    code, out, err = command(f"{line} --out new/one.png")
    assert (code, out, err) == (0, "picture: new/one.png\n", "")
    one = picture("new/one.png")
    assert command(f"{line} --out two.png")[0] == 0
    np.testing.assert_array_equal(one, picture("two.png"))
    assert command(f"{line.replace('5', '6')} --out two.png")[0] == 0
    assert not np.array_equal(one, picture("two.png"))
    assert sorted(path.name for path in Path().iterdir()) == ["new", "two.png"]

    images, _ = _data._choose(load("digits"), 3, seed=5)
    made = _sheet.rows(build("crop-flip"), images, seed=5)
    assert [row.label for row in made] == [
        "as they are",
        "random crop",
        "random flip,\nprobability 0.5",
        "all of it,\nfirst draw",
        "all of it,\nsecond draw",
    ]
    np.testing.assert_allclose(made[0].images, images / 255, atol=1e-7)
    np.testing.assert_array_equal(made[2].images, made[0].images[:, :, ::-1])
    assert not np.array_equal(made[3].images, made[4].images)
    figure = _sheet.contact_sheet(build("crop-flip"), images, ["a", "b" * 20, "c"], "t", seed=5)
    drawn = [axes.images[0].get_array() for axes in figure.axes]
    shown = np.reshape(np.asarray(drawn), (5, 3, 8, 8, 3))
    np.testing.assert_array_equal(shown, np.stack([row.images for row in made]).repeat(3, -1))
    assert [axes.get_title() for axes in figure.axes[:3]] == ["a", "b" * 11 + "…", "c"]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == [row.label for row in made]


@pytest.mark.parametrize(
    ("options", "shape", "labels"),
    [
        ({"name": "none"}, (8, 8, 1), ["as they are"]),
        (
            {"name": "simclr", "blur": 0.25},
            (8, 8, 3),
            [
                "resized crop",
                "flip",
                "jitter",
                "grayscale",
                "blur,\nprobability 0.25",
                "all",
                "all",
            ],
        ),
        ({"name": "simclr"}, (8, 8, 1), ["resized crop", "flip", "jitter", "all", "all"]),
        (
            {"name": "simclr", "jitter": 0, "least_area": 1},
            (64, 64, 3),
            ["flip", "grayscale", "gaussian blur,\nsometimes", "all", "all"],
        ),
    ],
)
def test_what_changes_nothing_has_no_row(options, shape, labels):
    images = np.random.default_rng(0).integers(0, 255, (2, *shape), np.uint8)
    made = [row.label for row in _sheet.rows(build(**options), images, seed=0)]
    labels = labels if labels[0] == "as they are" else ["as they are", *labels]
    assert len(made) == len(labels)
    assert all(part in label for part, label in zip(labels, made, strict=True))


def test_images_are_chosen_from_files_as_well():
    write_pair(Path("data/set"))
    for limit in (0, 2**20):
        dataset = load("set", "data", resident_limit=limit)
        images, labels = _data._choose(dataset, 4, seed=1)
        assert images.shape == (4, *dataset.image_shape)
        assert labels.shape == (4,)
        assert len(np.unique(images, axis=0)) == 4
        np.testing.assert_array_equal(images, _data._choose(dataset, 4, seed=1)[0])


def test_data_show_reads_files(command):
    write_pair(Path("data/set"))
    code, _, _ = command("data show --dataset set --data-dir data --augment none --images 2")
    assert code == 0
    assert picture("sheet.png").shape[1] > 2 * 96


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ("show --dataset digit", "dataset 'digit' is unknown; did you mean 'digits'"),
        ("show --augment none --blur 1", "blur (=1.0) is not a setting of augmentation 'none'"),
        ("show --jitter 2", "jitter must be from 0 to 1, got 2.0"),
        ("show --images 0", "images must be from 1 to 32, got 0"),
        ("show --seed -1", "seed must be from 0 to 4294967295, got -1"),
        ("show --out sheet.jpg", "out must be a file with the ending .png, got sheet.jpg"),
        ("shwo", "data command 'shwo' is unknown; did you mean 'show'"),
    ],
)
def test_pictures_that_cannot_be_drawn(refused, options, match):
    assert match in refused(f"data {options}")
    assert list(Path().iterdir()) == []


def test_a_picture_in_a_place_that_is_none(refused):
    Path("file").write_text("")
    assert "cannot write file/sheet.png: a part of the path is a file" in refused(
        "data show --augment none --out file/sheet.png"
    )


def test_more_images_than_there_are(refused):
    write_pair(Path("data/set"))
    line = "data show --dataset set --data-dir data --augment none --images 30"
    assert "images (=30) must be at most the number of training images, " in refused(line)


# Experiments


@dataclasses.dataclass(frozen=True)
class Options:
    size: int = 3
    """Size."""
    out: Path = Path("out")
    """Folder."""


@pytest.fixture
def experiment(monkeypatch):
    """A registered experiment, and the options that it was run with."""
    called = []

    class Probe(experiments.Experiment):
        def run(self, options: Options) -> Path:
            if options.size < 0:
                raise InputError(f"size must not be negative, got {options.size}")
            called.append(options)
            return options.out

    entry = Probe("probe", "a probe of the command", Options, experiments.COMPARE.cells)
    monkeypatch.setitem(experiments.EXPERIMENTS, "probe", entry)
    return called


@pytest.mark.parametrize("line", ["reproduce", "reproduce --help"])
def test_experiments_are_listed(command, experiment, line):
    code, out, _ = command(line)
    assert code == 0
    assert re.search(r"probe +a probe of the command", out)


def test_an_experiment_is_run_with_its_options(command, experiment):
    code, out, _ = command("reproduce probe --size 5")
    assert code == 0
    assert experiment == [Options(size=5)]
    assert "results and figure: out" in out


def test_an_experiment_explains_its_options(command, experiment):
    code, out, _ = command("reproduce probe --help")
    assert code == 0
    assert "--size" in out
    assert experiment == []


def test_experiments_that_cannot_be_run(refused, experiment):
    assert "experiment 'prob' is unknown; did you mean 'probe'" in refused("reproduce prob")
    assert "size must not be negative, got -1" in refused("reproduce probe --size -1")
