"""The command in its surroundings: variables, streams, paths, devices, other processes."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import rich.progress
from rich.console import Console

from forwardgrad import InputError
from forwardgrad.cli import _surroundings, main
from forwardgrad.training import Interrupted, _progress, configure, fit

QUICK = ["train", "--network", "mlp", "--width", "8", "--algorithm", "fg-a", "--iterations", "3"]


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORWARDGRAD_DATA", raising=False)


def forwardgrad(*arguments: str, stdout=subprocess.PIPE, **variables: str):
    """The command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "forwardgrad", *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **variables},
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
    )


@pytest.fixture
def refused(capsys):
    """The command must end with code 2 and one sentence on standard error."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return run


# Variables of the environment


def test_a_run_does_not_depend_on_the_environment():
    """Nor does it fail by another program's backend, or for letters that ASCII lacks."""
    done = forwardgrad(
        *QUICK,
        "--out",
        "out-é",
        MPLBACKEND="module://nowhere.backend",
        PYTHONIOENCODING="ascii",
        JAX_ENABLE_X64="1",
        JAX_NUMPY_RANK_PROMOTION="raise",
        JAX_NUMPY_DTYPE_PROMOTION="strict",
        JAX_DEFAULT_PRNG_IMPL="rbg",
        JAX_THREEFRY_PARTITIONABLE="0",
        JAX_TRANSFER_GUARD="disallow",
        JAX_DISABLE_JIT="1",
        JAX_DEBUG_NANS="1",
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"out-?/: summary.json" in done.stdout
    there = json.loads(Path("out-é/summary.json").read_text())
    with jax.default_matmul_precision("default"):
        config = {"network": "mlp", "width": 8, "algorithm": "fg-a", "iterations": 3}
        here = fit(configure(**config, out=Path("here")))
    assert {k: there[k] for k in ("train_loss", "test_error")} == {
        k: getattr(here.result, k) for k in ("train_loss", "test_error")
    }


def test_settings_are_those_of_before_again():
    with jax.numpy_rank_promotion("raise"):
        with _surroundings.settled():
            assert jax.config.jax_numpy_rank_promotion == "allow"
        assert jax.config.jax_numpy_rank_promotion == "raise"


def test_a_platform_that_is_none():
    done = forwardgrad(*QUICK, JAX_PLATFORMS="nonsense")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: JAX finds no device with JAX_PLATFORMS=nonsense; ")
    assert done.stderr.count(b"\n") == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("setting", ["JAX_ENABLE_X64=maybe", "JAX_TRANSFER_GUARD=perhaps"])
def test_a_variable_that_jax_refuses(setting):
    done = forwardgrad("--version", **dict([setting.split("=")]))
    assert done.returncode == 2
    said = done.stderr.decode()
    assert said.startswith(f"error: JAX refuses the environment's {setting}: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no cuda")])
def test_no_device(monkeypatch, refused, error):
    def zeros(_):
        raise error

    monkeypatch.setattr(jax.numpy, "zeros", zeros)
    assert "JAX finds no device with JAX_PLATFORMS=" in refused(*QUICK)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (FloatingPointError("invalid value (nan)\nmore"), "JAX_DEBUG_NANS .*invalid value \\(nan"),
        (MemoryError(), "the memory does not suffice: MemoryError"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 TB"), "does not suffice: RESOURCE_EXH"),
        (jax.errors.JaxRuntimeError("INTERNAL: Out of memory: 9 TB"), "does not suffice: INTERNAL"),
    ],
)
def test_errors_of_the_machine(error, match):
    with pytest.raises(InputError, match=match), _surroundings.settled():
        raise error


def test_errors_that_are_the_librarys_own_stay():
    with pytest.raises(jax.errors.JaxRuntimeError), _surroundings.settled():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")


# Streams


def test_a_reader_that_has_gone():
    """Of a help: silence. Of a run: it is done to its end, in silence."""
    reading, writing = os.pipe()
    os.close(reading)
    for arguments, code in ((["--help"], 141), (["train", "--help"], 141), (QUICK, 0)):
        done = forwardgrad(*arguments, stdout=writing, PYTHONUNBUFFERED="1")
        assert (done.returncode, done.stderr) == (code, b"")
    os.close(writing)
    assert len(list(Path("runs").glob("*/summary.json"))) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_cannot_be_written():
    with open("/dev/full", "wb") as full:
        done = forwardgrad("--help", stdout=full)
    assert (done.returncode, done.stderr) == (2, b"error: No space left on device\n")


# Seeds, sizes and paths


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
@pytest.mark.parametrize(
    "command", [["diagnose"], ["data", "show"], ["reproduce", "toy"], ["reproduce", "variance"]]
)
def test_seeds_that_would_be_those_of_others(refused, command, seed):
    assert f"seed must be from 0 to 4294967295, got {seed}" in refused(*command, f"--seed={seed}")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", ["epochs", "iterations", "warmup", "tangents", "width"])
def test_sizes_that_jax_cannot_count(name):
    with pytest.raises(InputError, match=f"{name} must be at most 2147483647, got 10000000000"):
        configure(**{name: 10**10})


def test_more_steps_than_jax_can_count(refused):
    assert "epochs (=100000000) must make at most" in refused("train", "--epochs", "100000000")


def test_a_tilde_is_the_home(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert main(["data", "show", "--images", "2", "--out=~/sheet.png"]) == 0
    assert configure(out=Path("~/run")).out == tmp_path / "home" / "run"
    assert [f.name for f in tmp_path.iterdir()] == ["home"]
    assert f"picture: {tmp_path}/home/sheet.png" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ("data show --out=s3://b/x.png", "out must be a local path, got the address s3:/b/x.png"),
        ("diagnose --out=gs://b/x", "out must be a local path, got the address gs:/b/x"),
        ("diagnose --run=hf://b/x", "run must be a local path, got the address hf:/b/x"),
        ("readout file:///x", "run must be a local path, got the address file:/x"),
        ("report https://b.c/x", "folders must be a local path, got the address https:/b.c/x"),
        ("compare --data-dir=az://b", "data_dir must be a local path, got the address az:/b"),
        ("diagnose --out=~nobody-here/x", "out (=~nobody-here/x) begins with the home of a user"),
    ],
)
def test_paths_that_are_none(refused, arguments, match):
    assert match in refused(*arguments.split())
    assert list(Path().iterdir()) == []


def test_out_of_train_is_checked_for_all_callers():
    for out in ("gs://b/x", "~nobody-here/x", os.fsdecode(b"\xff"), "a\nb"):
        with pytest.raises(InputError, match="out "):
            configure(out=Path(out))


# The progress line


def test_the_progress_is_one_line_of_a_narrow_terminal(monkeypatch):
    monkeypatch.setattr(rich.progress.Task, "speed", property(lambda _: 1234.0))
    console = Console(width=60, file=io.StringIO(), force_terminal=True)
    progress = _progress.Progress(console)
    progress.measured = " error 100.00 %"
    progress.start(0, 22_000, 22)
    progress.update(21_990, 12.345678)
    (line,) = console.render_lines(progress._bar.get_renderable(), pad=False)
    text = "".join(segment.text for segment in line)
    assert "epoch 1000/1000 loss 12.35 error 100.00 % 1234/s" in text
    assert re.search(r" \d:\d\d:\d\d", text)


@pytest.mark.parametrize(("seconds", "count"), [(0.0, 4), (1e9, 1)])
def test_without_a_terminal_there_are_plain_lines(monkeypatch, seconds, count):
    monkeypatch.setattr(_progress, "PLAIN_SECONDS", seconds)
    console = Console(width=20, file=io.StringIO(), force_terminal=False)
    with _progress.Progress(console) as progress:
        progress.start(0, 40, 10)
        for step in (10, 20, 30, 40):
            progress.update(step, 1.5)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == count
    assert lines[-1].startswith("epoch 4/4 loss 1.5")


def test_a_terminal_that_is_gone_does_not_hide_why_a_run_ends(monkeypatch):
    def stop():
        raise OSError(5, "Input/output error")

    progress = _progress.Progress(None)
    monkeypatch.setattr(progress._bar, "stop", stop)
    with pytest.raises(Interrupted, match="stopped"), progress:
        raise Interrupted("stopped", 1)
