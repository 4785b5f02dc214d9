"""Faults of processes and disks in the middle of a run, and whether the run survives them.

    python benchmarks/faults.py --kills 100 --out results/benchmarks/faults.json

Runs of one process and of two are killed at random moments by SIGKILL, or one of their processes
is, the coordinator among them; they are stopped by SIGTERM, and their newest checkpoint is cut or a
byte of it changed. After each fault the run is started again. A fault counts as survived if the
other process ends within a minute with a sentence, no checkpoint is damaged by it, the run goes on
from where the last checkpoint was, and in the end has the bits of one that nothing interrupted (of
as many processes).
"""

import dataclasses
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tyro

from forwardgrad.experiments import provenance
from forwardgrad.results import write

SECONDS = 60
"""In which the other process has to end."""

STEPS = {1: 1500, 2: 100}
"""Of a run for each of its faults, by the number of processes."""

# Processes are forked from one that has imported everything: a start takes a second.
CONTEXT = multiprocessing.get_context("forkserver")


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    out: Path | None = None
    """File for the results."""
    kills: int = 20
    """Random SIGKILLs, of which two thirds hit runs of two processes."""
    seed: int = 0
    """Seed of the moments."""


def command(words: list[str], log: Path) -> None:
    """What a process does: the command `forwardgrad`."""
    with log.open("ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from forwardgrad.cli import main

    code = main(words)
    sys.stdout.flush()
    sys.exit(code)


class Run:
    """A run of so many processes, in a folder."""

    def __init__(self, folder: Path, processes: int, steps: int):
        self.out, self.logs, self.processes = folder / "run", folder, processes
        folder.mkdir(parents=True)
        self.words = (
            "train --network mlp --width 64 --tangents 2 --learning-rate 1e-3 --eval-every 50 "
            f"--log-every 11 --checkpoint-every 0.2 --iterations {steps} --resume --out {self.out}"
        ).split()

    def start(self) -> list[ForkServerProcess]:
        """Its processes."""
        self.marks = [log.stat().st_size if log.exists() else 0 for log in self.all_logs]
        extra = [[]]
        if self.processes > 1:
            where = ["--coordinator", free_address(), "--processes", str(self.processes)]
            extra = [[*where, "--process-id", str(i)] for i in range(self.processes)]
        found = [
            CONTEXT.Process(target=command, args=([*self.words, *words], log))
            for words, log in zip(extra, self.all_logs, strict=True)
        ]
        for process in found:
            process.start()
        return found

    @property
    def all_logs(self) -> list[Path]:
        """What each process says goes here."""
        return [self.logs / f"{i}.log" for i in range(self.processes)]

    def said(self, process: int) -> str:
        """What a process has said since the last start."""
        return self.all_logs[process].read_bytes()[self.marks[process] :].decode()

    def checkpoints(self) -> list[int]:
        """The steps of its checkpoints."""
        folder = self.out / "checkpoints"
        return sorted(int(f.name) for f in folder.glob("*") if f.name.isdigit())

    @property
    def newest(self) -> Path:
        """Its last checkpoint."""
        return self.out / "checkpoints" / str(self.checkpoints()[-1])

    def arrays(self) -> dict[str, np.ndarray]:
        """Those of its last checkpoint."""
        found = ocp.StandardCheckpointer().restore((self.newest / "arrays").absolute())
        return {name: np.asarray(array) for name, array in found.items()}

    def bits(self) -> dict[str, bytes]:
        """The same as bytes."""
        return {name: array.tobytes() for name, array in self.arrays().items()}

    def under_way(self) -> list[ForkServerProcess]:
        """Its processes, when they have stored a checkpoint."""
        before = set(self.checkpoints())
        processes = self.start()
        deadline = time.monotonic() + 300
        while all(p.is_alive() for p in processes) and set(self.checkpoints()) <= before:
            assert time.monotonic() < deadline, "the run does not begin"
            time.sleep(0.02)
        return processes

    def finish(self) -> str:
        """Take it to its end; what the first process said."""
        processes = self.start()
        for process in processes:
            process.join()
        assert all(p.exitcode == 0 for p in processes), self.said(0)
        return self.said(0)


def free_address() -> str:
    """An address of this machine for a coordinator."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def hit(run: Run, victim: int, number: int, wait: float) -> tuple[str, str]:
    """A fault, and what is wrong with how the run took it: nothing, or some words."""
    processes = run.under_way()
    time.sleep(wait)
    before = run.checkpoints()
    if not all(p.is_alive() for p in processes):
        return "ended before", ""
    pid = processes[victim].pid
    assert pid is not None
    os.kill(pid, number)
    began = time.monotonic()
    for process in processes:
        process.join(SECONDS)
    late = [p for p in processes if p.is_alive()]
    for process in late:
        process.kill()
        process.join()
    name = signal.Signals(number).name
    role = "" if run.processes == 1 else ", coordinator" if victim == 0 else ", worker"
    fault = f"{name}, {run.processes} process{'es' * (run.processes > 1)}{role}"
    if late:
        return fault, f"a process was still there after {SECONDS} s"
    if run.checkpoints()[-1] < before[-1]:
        return fault, "a checkpoint is lost"
    for i, process in enumerate(processes):
        if number == signal.SIGTERM:
            words, code = "continues the run", 128 + number
        elif i == victim:
            continue
        else:
            words, code = "another process of the run has ended", 2
        if process.exitcode != code or words not in run.said(i):
            # JAX may end a process before it can say so in our words.
            own = "another task died" in run.said(i)
            return fault, f"JAX's own message, {time.monotonic() - began:.0f} s" if own else (
                f"process {i} ended with {process.exitcode}: {run.said(i)[-300:]}"
            )
    return fault, ""


def damage(run: Run, kind: str, rng: np.random.Generator) -> str:
    """Cut the newest checkpoint's largest file, or change a byte of it; and go on for a while."""
    file = max((f for f in run.newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    if kind == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 0xFF
        file.write_bytes(bytes(content))
    for process in run.under_way():
        process.kill()
        process.join()
    return "" if "continuing from an older one" in run.said(0) else run.said(0)[-300:]


def main(options: Options) -> None:
    """Try all faults, print and store what came of them."""
    rng, began = np.random.default_rng(options.seed), time.monotonic()
    tried, survived, problems = Counter(), Counter(), []

    def count(fault: str, problem: str) -> None:
        tried[fault] += 1
        survived[fault] += not problem or problem.startswith("JAX's own")
        problems.extend([f"{fault}: {problem}"] * bool(problem))
        print(f"{time.monotonic() - began:5.0f} s  {fault}: {problem or 'survived'}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/compiled"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        CONTEXT.set_forkserver_preload(["forwardgrad.cli", "forwardgrad.cli._train"])
        for processes in (1, 2):
            share = options.kills // 3 if processes == 1 else options.kills - options.kills // 3
            steps = STEPS[processes] * (share + 4)
            run = Run(Path(folder, f"{processes}"), processes, steps)
            for number in [signal.SIGKILL] * share + [signal.SIGTERM] * 2:
                victim = int(rng.integers(processes))
                fault, problem = hit(run, victim, number, rng.uniform(0, 0.6))
                if fault == "ended before":
                    break
                count(fault, problem)
            for kind in ("cut", "changed"):
                if not (run.out / "summary.json").exists():
                    count(f"a checkpoint {kind}, {processes}", damage(run, kind, rng))
            run.finish()
            whole = Run(Path(folder, f"whole{processes}"), processes, steps)
            whole.finish()
            same = run.bits() == whole.bits()
            count(f"the end, {processes}: all bits", "" if same else "other bits")
        result = {"tried": dict(tried), "survived": dict(survived), "problems": problems}
        print(f"faults tried: {tried.total()}, survived: {survived.total()}")
        if options.out is not None:
            seconds = {"seconds": time.monotonic() - began, "seed": options.seed}
            write(options.out, {"benchmark": "faults", **provenance(), **seconds, **result})
    sys.exit(tried != survived)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
