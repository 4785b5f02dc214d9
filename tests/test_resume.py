import contextlib
import errno
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import equinox as eqx
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

from data_helpers import write_pair
from forwardgrad import InputError, data
from forwardgrad.training import (
    Interrupted,
    TrainConfig,
    _batches,
    _checkpoint,
    _folder,
    _loop,
    _setup,
    configure,
    fit,
    load_run,
    read_run,
)
from forwardgrad.training._checkpoint import Checkpoints
from forwardgrad.training._config import fitting
from forwardgrad.training._interrupt import StopRequest
from forwardgrad.training._setup import Setup

STEPS = 1437 // 64
SMALL = {
    "network": "mlp", "width": 16, "algorithm": "fg-w", "tangents": 2, "learning_rate": 1e-3,
    "epochs": 3, "log_every": 7,
}  # fmt: skip


def small(out: Path, **settings) -> TrainConfig:
    return fitting(**{**SMALL, "out": out, **settings})


def checkpoints(out: Path) -> list[Path]:
    found = [f for f in (out / "checkpoints").glob("*") if f.name.isdigit()]
    return sorted(found, key=lambda f: int(f.name))


def bits(folder: Path) -> tuple[dict, list[dict]]:
    """The arrays of the last checkpoint, and the metrics without times."""
    arrays = checkpoints(folder)[-1] / "arrays"
    restored = ocp.StandardCheckpointer().restore(arrays.absolute())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return (
        {name: np.asarray(array).tobytes() for name, array in restored.items()},
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows],
    )


@contextlib.contextmanager
def fails(match: str):
    """The block must raise an `InputError`, of one line, with these words."""
    with pytest.raises(InputError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_at(monkeypatch, step: int, how=None):
    """Have the next run killed, or signalled, when it has done `step` steps."""
    report = _loop._Session._report

    def reported(session, losses):
        report(session, losses)
        if session.step >= step:
            monkeypatch.setattr(_loop._Session, "_report", report)
            if how is None:
                raise Killed
            os.kill(os.getpid(), how)

    monkeypatch.setattr(_loop._Session, "_report", reported)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    fit(small(out))
    return out


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of it, made unfinished."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "summary.json").unlink()
    return out


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run killed in its last epoch, with two checkpoints."""
    out = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_at(monkeypatch, 2 * STEPS + 14)
        with pytest.raises(Killed):
            fit(small(out, checkpoint_every=1e-6))
    assert len(checkpoints(out)) == 2
    return out


@pytest.fixture
def halfway(killed, tmp_path):
    """A copy of it."""
    return shutil.copytree(killed, tmp_path / "run")


def finish(out: Path, **settings) -> list[str]:
    """Resume the run, and return what it says."""
    console = Console(record=True, width=1000, quiet=False, file=io.StringIO())
    fit(small(out, resume=True, **settings), console=console)
    console.file.close()
    return console.export_text().splitlines()


# The same bits


@pytest.mark.parametrize(
    ("kills", "checkpoint_every"),
    [([3], 1e6), ([STEPS], 1e-6), ([STEPS + 1, 2 * STEPS + 20], 1e-6), ([3 * STEPS], 1e6)],
)
def test_a_killed_run_ends_with_the_same_bits(
    whole, tmp_path, monkeypatch, kills, checkpoint_every
):
    out = tmp_path / "run"
    for step in kills:
        kill_at(monkeypatch, step)
        with pytest.raises(Killed):
            fit(small(out, resume=True, checkpoint_every=checkpoint_every))
    fit(small(out, resume=True))
    assert bits(out) == bits(whole)


@pytest.mark.parametrize("seconds", [1e-9, 1e9])
def test_the_length_of_chunks_changes_no_bit(whole, tmp_path, monkeypatch, seconds):
    monkeypatch.setattr(_loop, "CHUNK_SECONDS", seconds)
    fit(small(tmp_path / "run"))
    assert bits(tmp_path / "run") == bits(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_a_checkpoint(whole, tmp_path, monkeypatch, number):
    out = tmp_path / "run"
    before = signal.getsignal(number)
    kill_at(monkeypatch, STEPS + 5, number)
    with pytest.raises(Interrupted, match=f"--resume --out {out} continues the run") as stopped:
        fit(small(out))
    assert stopped.value.signum == number
    assert signal.getsignal(number) is before
    assert STEPS + 5 <= int(checkpoints(out)[-1].name) < 3 * STEPS
    fit(small(out, resume=True))
    assert bits(out) == bits(whole)


@pytest.mark.parametrize("options", [{}, {"stream": True, "image_size": 4}])
def test_a_streamed_run_resumes_with_the_same_bits(tmp_path, monkeypatch, options):
    folder = write_pair(tmp_path / "set", train=60, test=20)
    monkeypatch.setattr(_setup, "load", functools.partial(data.load, resident_limit=0))
    monkeypatch.setattr(_batches, "STACK", 3)
    settings = {"dataset": str(folder), "batch_size": 8, "epochs": 4, "log_every": 5, **options}
    fit(small(tmp_path / "whole", **settings))
    for step in (2, 9, 20):
        kill_at(monkeypatch, step)
        with pytest.raises(Killed):
            fit(small(tmp_path / "run", checkpoint_every=1e-6, resume=True, **settings))
    fit(small(tmp_path / "run", resume=True, **settings))
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")


def test_seconds_add_up(halfway):
    def seconds() -> list[tuple[int, float]]:
        rows = (halfway / "metrics.jsonl").read_text().splitlines()
        return [(row["step"], row["seconds"]) for row in map(json.loads, rows)]

    saved = int(checkpoints(halfway)[-1].name)
    kept = [row for row in seconds() if row[0] <= saved]
    finish(halfway)
    after = seconds()
    assert after[: len(kept)] == kept
    # What came after the checkpoint is done again, in less time or more.
    assert after[len(kept)][1] > kept[-1][1]
    assert after == sorted(after, key=lambda row: row[1])
    assert json.loads((halfway / "summary.json").read_text())["seconds"] == after[-1][1]


def test_lines_after_the_checkpoint_are_written_anew(whole, halfway):
    with (halfway / "metrics.jsonl").open("a") as file:
        file.write('{"event": "epoch", "step": 9999}\n{"event": "ep')
    finish(halfway)
    assert bits(halfway) == bits(whole)


# Whose folder it is


def test_a_finished_run_says_so(whole):
    before = {f: f.stat().st_mtime_ns for f in whole.rglob("*")}
    assert finish(whole)[0] == f"The run in {whole} is finished already."
    run = fit(small(whole, resume=True))
    assert run == read_run(whole)[0]
    assert run.result.steps == 3 * STEPS
    assert before == {f: f.stat().st_mtime_ns for f in whole.rglob("*")}


def test_a_run_is_not_overwritten(whole):
    with fails("already holds a run: pass --resume to continue it, or another --out"):
        fit(small(whole))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"epochs": 4}, "epochs .3 there, 4 now."),
        ({"seed": 1, "tangents": 3}, "seed .0 there, 1 now.; tangents .2 there, 3 now."),
        ({"algorithm": "bp"}, "algorithm .'fg-w' there, 'bp' now."),
        ({"momentum": 0.5}, "momentum .0.0 there, 0.5 now."),
    ],
)
def test_other_settings_are_refused(copied, settings, match):
    before = bits(copied)
    with fails("holds a run with other settings: .*" + match):
        fit(small(copied, resume=True, **settings))
    assert bits(copied) == before


def test_settings_that_do_not_change_the_result_may_differ(copied, tmp_path):
    fit(small(copied, resume=True, checkpoint_every=7.0, data_dir=tmp_path))
    assert (copied / "summary.json").exists()


def test_a_setting_that_did_not_exist_yet_had_its_default(copied):
    settings = json.loads((copied / "config.json").read_text())
    del settings["log_every"], settings["warmup"]
    (copied / "config.json").write_text(json.dumps(settings))
    with fails("log_every .None there, 7 now.$"):
        fit(small(copied, resume=True))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    for resume in (False, True):
        with fails("holds files but no config.json: it is not a run's"):
            fit(small(tmp_path, resume=resume))
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_run_killed_before_its_settings_were_written_starts(whole, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.json.x7f").write_text('{"data')
    finish(out)
    assert bits(out) == bits(whole)


# Damage


@pytest.mark.parametrize("content", ["", '{"epochs"', "[1, 2]", '{"epochs": -1}', '{"colour": 1}'])
def test_damaged_settings(copied, content):
    (copied / "config.json").write_text(content)
    with fails("config.json is damaged"):
        fit(small(copied, resume=True))


def test_damaged_metrics(copied):
    for content, match in (("", "expected .* lines, got 0"), ("{\n" * 99, "JSON")):
        (copied / "metrics.jsonl").write_text(content)
        with fails(f"metrics.jsonl is damaged: .*({match})"):
            fit(small(copied, resume=True))


HOLD = """
import sys, time, filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_has_one_process_at_a_time(whole, halfway):
    """The lock of a process that is dead does not hold."""
    before = {f: f.read_bytes() for f in halfway.rglob("*") if f.is_file() and f.name != ".lock"}
    unfinished = halfway / "checkpoints" / "99.orbax-checkpoint-tmp"
    unfinished.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(halfway / ".lock")], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with fails("out folder .* is in use: another process trains this run now"):
        fit(small(halfway, resume=True))
    load_run(halfway)  # may read, and leaves what the other is writing
    assert unfinished.exists()
    assert {f: f.read_bytes() for f in before} == before
    holder.kill()
    holder.communicate()
    fit(small(halfway, resume=True))
    assert bits(halfway) == bits(whole)


def test_two_processes_without_a_name_have_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configure(**SMALL)
    folder = _folder.find_folder(config)[0]
    assert _folder.make_folder(config, folder) == folder
    assert _folder.make_folder(config, folder) == folder.with_name(f"{folder.name}-2")


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signum is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("file", ["manifest.ocdbt", "_METADATA"])
def test_a_damaged_checkpoint_makes_no_noise(halfway, capfd, file):
    (checkpoints(halfway)[-1] / "arrays" / file).unlink()
    assert "is damaged: its contents have changed" in finish(halfway)[1]
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_without_digests_is_read(halfway, whole):
    """A process may have ended between the two."""
    (checkpoints(halfway)[-1] / "digests.json").unlink()
    finish(halfway)
    assert bits(halfway) == bits(whole)


def truncate(folder: Path):
    for file in _files(folder):
        os.truncate(file, file.stat().st_size // 2)


def change(folder: Path, only: str = ""):
    """Change a byte of what the largest file holds."""
    file = max((f for f in _files(folder) if only in f.name), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(bytes(content))


def empty(folder: Path):
    shutil.rmtree(folder / "arrays")


def forget(folder: Path):
    shutil.rmtree(folder / "meta")


def _files(folder: Path) -> list[Path]:
    return [f for f in folder.rglob("*") if f.is_file() and f.stat().st_size]


@pytest.mark.parametrize("damage", [truncate, change, empty, forget])
def test_a_damaged_checkpoint_is_passed_over(whole, halfway, damage):
    newest = checkpoints(halfway)[-1]
    damage(newest)
    said = finish(halfway)
    assert f"checkpoint {newest} is damaged" in said[1]
    assert "continuing from an older one" in said[1]
    assert bits(halfway) == bits(whole)
    assert eqx.tree_equal(load_run(halfway)[1], load_run(whole)[1])


def test_a_damaged_last_checkpoint_is_replaced(whole, tmp_path):
    out = tmp_path / "run"
    fit(small(out, checkpoint_every=1e-6))
    (out / "summary.json").unlink()
    truncate(checkpoints(out)[-1])
    finish(out)
    assert bits(out) == bits(whole)
    assert eqx.tree_equal(load_run(out)[1], load_run(whole)[1])


@pytest.mark.parametrize("damage", [truncate, change, empty, forget])
def test_no_intact_checkpoint(halfway, damage):
    for folder in checkpoints(halfway):
        damage(folder)
    before = (halfway / "metrics.jsonl").read_bytes()
    with fails("no checkpoint in .* can be used .*is damaged.*; start anew with another --out"):
        fit(small(halfway, resume=True))
    assert (halfway / "metrics.jsonl").read_bytes() == before
    with fails("no checkpoint in .* can be used"):
        load_run(halfway)


def test_values_that_orbax_reads_but_the_run_never_wrote(halfway):
    newest = checkpoints(halfway)[-1]
    arrays = ocp.StandardCheckpointer().restore(newest / "arrays")
    arrays[".params.blocks[0].linear.bias"] = arrays[".params.blocks[0].linear.bias"] + 1
    shutil.rmtree(newest / "arrays")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(newest / "arrays", arrays)
    assert "is damaged: its contents have changed" in finish(halfway)[1]


def test_a_checkpoint_of_another_network(copied, tmp_path):
    fit(small(tmp_path / "other", width=8, iterations=2))
    shutil.rmtree(copied / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", copied / "checkpoints")
    with fails("checkpoint .* holds the arrays of another network or optimiser"):
        fit(small(copied, resume=True))


def test_checkpoints_that_are_none(copied):
    shutil.rmtree(copied / "checkpoints")
    (copied / "checkpoints" / "12").mkdir(parents=True)
    (copied / "checkpoints" / "12" / "notes.txt").write_text("mine")
    with fails("checkpoint .*12 is damaged: it cannot be read"):
        fit(small(copied, resume=True))


def test_only_the_last_two_checkpoints_are_kept(tmp_path):
    fit(small(tmp_path / "run", checkpoint_every=1e-6))
    found = [int(f.name) for f in checkpoints(tmp_path / "run")]
    assert len(found) == 2
    assert found[-1] == 3 * STEPS


def test_more_checkpoints_are_kept_on_demand(tmp_path):
    fit(small(tmp_path / "run", checkpoint_every=1e-6, keep_checkpoints=4))
    assert len(checkpoints(tmp_path / "run")) == 4


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(halfway, whole, monkeypatch):
    """In Orbax's thread: the run says it, and the checkpoints before are as they were."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(_checkpoint, "_digests", full)
        patch.setattr(Checkpoints, "_check", lambda *_: None)
        with fails("cannot write .*checkpoints: the disk is full"):
            fit(small(halfway, resume=True, checkpoint_every=1e-6))
    finish(halfway)
    assert bits(halfway) == bits(whole)


def test_a_signal_in_the_middle_of_a_save(whole, tmp_path, monkeypatch):
    """A checkpoint is absent until it is whole, and the run stops with one."""
    out, seen, digests = tmp_path / "run", [], _checkpoint._digests

    def slow(where):
        if not seen:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
            seen.append((where.exists(), checkpoints(out)))
        return digests(where)

    with monkeypatch.context() as patch:
        patch.setattr(_checkpoint, "_digests", slow)
        with pytest.raises(Interrupted):
            fit(small(out, checkpoint_every=1e-6))
    assert seen == [(True, [])]
    assert checkpoints(out)
    assert "is damaged" not in " ".join(finish(out))
    assert bits(out) == bits(whole)


SAVES = """
import json, pathlib, sys, time
from forwardgrad.training import _checkpoint, fit
from forwardgrad.training._config import fitting
digests, calls = _checkpoint._digests, []
def slow(where):
    calls.append(where)
    if len(calls) == 2:
        print("saving", flush=True)
        time.sleep(600)
    return digests(where)
_checkpoint._digests = slow
settings = json.loads(sys.argv[1])
fit(fitting(**{**settings, "out": pathlib.Path(settings["out"])}))
"""


@pytest.mark.slow
def test_a_process_that_ends_in_the_middle_of_a_save(whole, tmp_path):
    """The second signal does not wait for the checkpoint, which is then absent."""
    out = tmp_path / "run"
    settings = json.dumps({**SMALL, "out": str(out), "checkpoint_every": 1e-6})
    process = subprocess.Popen([sys.executable, "-c", SAVES, settings], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert b"saving\n" in iter(process.stdout.readline, b"")
    while process.poll() is None:
        process.terminate()
        time.sleep(0.1)
    process.communicate()
    assert process.returncode == -signal.SIGTERM
    assert len(checkpoints(out)) == 1
    assert len(list((out / "checkpoints").glob("*tmp*"))) == 1
    assert "is damaged" not in " ".join(finish(out))
    assert bits(out) == bits(whole)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "commit_success.txt"])
def test_a_file_of_a_checkpoint_that_is_not_needed(halfway, whole, name):
    """It has no digest, for Orbax writes it after all others."""
    newest = checkpoints(halfway)[-1]
    if any(f.name == name for f in _files(newest)):
        change(newest, only=name)
    else:
        (newest / name).unlink(missing_ok=True)
    assert "is damaged" not in " ".join(finish(halfway))
    assert bits(halfway) == bits(whole)


# Loading


def test_load_run(whole):
    config, network = load_run(str(whole))
    assert config.estimator.tangents == 2
    assert config.out == whole
    assert network.blocks[0].linear.weight.shape == (64, 16)
    with contextlib.closing(Checkpoints(whole / "checkpoints")) as manager:
        state = manager.restore(Setup(config).state).state
    assert eqx.tree_equal(network.blocks[0].linear.weight, state.params.blocks[0].linear.weight)


def test_load_run_of_nothing(tmp_path, copied):
    with fails("folder .* holds no run: .*config.json is missing"):
        load_run(tmp_path / "nowhere")
    shutil.rmtree(copied / "checkpoints")
    with fails("holds no checkpoint yet"):
        load_run(copied)
    assert not (copied / "checkpoints").exists()


# Processes


KILLS = int(os.environ.get("FORWARDGRAD_KILLS", "5"))
"""Of one run; 100 take a quarter of an hour."""


def command(out: Path) -> list[str]:
    options = (
        f"--network mlp --width 64 --tangents 2 --learning-rate 1e-3 --epochs {100 * KILLS} "
        f"--log-every 11 --eval-every 50 --checkpoint-every 0.2 --out {out} --resume"
    )
    return [sys.executable, "-m", "forwardgrad", "train", *options.split()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """An environment in which processes find what others have compiled."""
    folder = tmp_path_factory.mktemp("compiled")
    limits = ("MIN_COMPILE_TIME_SECS", "MIN_ENTRY_SIZE_BYTES")
    settings = {f"JAX_PERSISTENT_CACHE_{name}": "0" for name in limits}
    return {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder), **settings}


def start(out: Path, env: dict[str, str]) -> subprocess.Popen:
    """The command, when it has stored its first checkpoint."""
    before = checkpoints(out)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command(out), env=env, **pipes)
    deadline = time.monotonic() + 120
    while process.poll() is None and set(checkpoints(out)) <= set(before):
        assert time.monotonic() < deadline, "the run does not begin"
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_kills_and_an_uninterrupted_run_end_with_the_same_bits(tmp_path, compiled):
    rng = np.random.default_rng(0)
    steps = set()
    for _ in range(KILLS):
        process = start(tmp_path / "killed", compiled)
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "finished before it could be killed"
        process.communicate()
        steps.add(bits(tmp_path / "killed")[0][".step"])
    assert len(steps) == KILLS
    for out in (tmp_path / "killed", tmp_path / "whole"):
        subprocess.run(command(out), env=compiled, check=True, capture_output=True)
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_stops_at_a_signal(tmp_path, compiled, number):
    process = start(tmp_path / "run", compiled)
    process.send_signal(number)
    out, err = (text.decode() for text in process.communicate(timeout=60))
    assert process.returncode == 128 + number
    assert f"--resume --out {tmp_path / 'run'} continues the run" in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_checkpoint_of_a_version_that_drew_other_tangents(halfway, monkeypatch):
    monkeypatch.setattr(_loop, "DRAWS", 99)
    with fails("earlier version of forwardgrad, which drew other tangents and feedback weights"):
        finish(halfway)
    load_run(halfway)  # its weights can be read all the same
