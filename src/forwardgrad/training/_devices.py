"""The devices and processes that a run is spread over, and what the processes agree on."""

import contextlib
import functools
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from forwardgrad._errors import InputError
from forwardgrad.results import fields

T = TypeVar("T")

AXIS = "examples"
"""The only axis of the mesh: examples are spread along it, and everything else is whole."""

BEAT_SECONDS, SILENCE_SECONDS = 10.0, 25
"""How often processes ask for each other, and how long they wait for an answer."""


class LostError(InputError):
    """Another process of the run is gone, so that this one cannot go on."""

    def __init__(self, what: str):
        super().__init__(
            f"another process of the run has ended or cannot be reached ({what}), so this one ends "
            "too: start all processes again with --resume to continue from the last checkpoint"
        )


class Devices:
    """The devices of a run, in one mesh over all processes.

    A batch is cut along its examples; parameters, optimiser and a data set in memory are whole on
    every device. XLA then makes each device compute its part of a step, and adds up. Random numbers
    do not depend on where they are drawn, so that the result is that of one device to rounding.

    **Arguments:**

    - `devices`: JAX's, those of all processes, equally many of each. Default: one, without a mesh.
    """

    def __init__(self, devices: Sequence[Any] = ()):
        self.processes = len({d.process_index for d in devices} or {0})
        self.process = jax.process_index() if self.processes > 1 else 0
        self.count = max(1, len(devices))
        self._mesh = None
        if self.count > 1:
            # By process, so that each has consecutive rows of a batch.
            ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
            self._mesh = Mesh(np.array(ordered), (AXIS,), axis_types=(AxisType.Auto,))

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.process == 0

    @property
    def share(self) -> tuple[int, int]:
        """Which part of every batch this process reads, and how many parts there are."""
        return self.process, self.processes

    # Arrays

    def whole(self, tree: PyTree) -> PyTree:
        """Arrays that are the same in every process, put on every device."""
        if self._mesh is None:
            return tree
        sharding = NamedSharding(self._mesh, PartitionSpec())
        return jax.tree.map(functools.partial(_place, sharding), tree)

    def cut(self, tree: PyTree, axis: int = 0) -> PyTree:
        """Arrays of this process's share, as parts of global ones that are cut along an axis."""
        if self._mesh is None:
            return jax.tree.map(jax.numpy.asarray, tree)
        sharding = self._along(axis)
        return jax.tree.map(
            lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), tree
        )

    def keep_whole(self, tree: PyTree) -> PyTree:
        """Inside of a program: these arrays are to be whole on every device."""
        if self._mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self._mesh, PartitionSpec()))

    def keep_cut(self, tree: PyTree, axis: int = 0) -> PyTree:
        """Inside of a program: these arrays are to be cut along an axis."""
        return (
            tree
            if self._mesh is None
            else jax.lax.with_sharding_constraint(tree, self._along(axis))
        )

    def _along(self, axis: int) -> NamedSharding:
        assert self._mesh is not None
        return NamedSharding(self._mesh, PartitionSpec(*[None] * axis, AXIS))

    # Agreement

    def first(self, function: Callable[[], T], kind: Any = None) -> T:
        """What `function` returns in process 0, in all of them; it is called there only.

        **Raises:**

        `InputError` in all processes if it raises one.
        """
        if self.processes == 1:
            return function()
        answer: dict[str, Any] = {}
        if self.leads:
            try:
                answer["value"] = function()
            except (InputError, OSError) as error:
                answer["error"] = str(error)
        text = self.sent(json.dumps(answer, default=_plain).encode())
        answer = json.loads(text)
        if "error" in answer:
            raise InputError(answer["error"])
        return msgspec.convert(answer["value"], kind, dec_hook=lambda kind, value: kind(value))

    def together(self, function: Callable[[], T]) -> T:
        """Call `function` in every process.

        **Raises:**

        `InputError` in all processes if it raises one in any.
        """
        if self.processes == 1:
            return function()
        value, said = None, ""
        try:
            value = function()
        except InputError as error:
            said = str(error)
        problems = self.gathered(said)
        if said:
            raise InputError(said)
        for process, problem in enumerate(problems):
            if problem:
                raise InputError(f"process {process} cannot go on: {problem}")
        return value  # pyright: ignore[reportReturnType]

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Compare named facts between the processes.

        **Raises:**

        `InputError` in all processes where they differ.
        """
        everybody = self.gathered(json.dumps(dict(facts), default=str))
        own, *others = map(json.loads, everybody)
        for process, other in enumerate(others, start=1):
            for name in {**own, **other}:
                if own.get(name) != other.get(name):
                    raise InputError(
                        f"the processes of the run disagree: {name} is {own.get(name)!r} in "
                        f"process 0 and {other.get(name)!r} in process {process}"
                    )

    def most(self, *numbers: float) -> tuple[float, ...]:
        """The largest of each number over the processes."""
        if self.processes == 1:
            return numbers
        every = multihost_utils.process_allgather(np.array(numbers, np.float32))
        return tuple(map(float, np.max(every, axis=0)))

    def sent(self, data: bytes) -> bytes:
        """The bytes that process 0 has."""
        if self.processes == 1:
            return data
        send = multihost_utils.broadcast_one_to_all
        size = int(send(np.int32(len(data))))
        padded = np.zeros(_room(size), np.uint8)
        if self.leads:
            padded[:size] = np.frombuffer(data, np.uint8)
        return np.asarray(send(padded))[:size].tobytes()

    def gathered(self, text: str) -> list[str]:
        """The texts of all processes."""
        if self.processes == 1:
            return [text]
        data = np.frombuffer(text.encode(), np.uint8)
        sizes = multihost_utils.process_allgather(np.int32(len(data)))
        padded = np.zeros(_room(int(max(sizes))), np.uint8)
        padded[: len(data)] = data
        rows = multihost_utils.process_allgather(padded)
        return [row[:n].tobytes().decode() for row, n in zip(rows, sizes, strict=True)]

    # Faults

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While entered, the end of another process ends this one, within a minute.

        **Raises:**

        `LostError` where a collective fails. Where one would wait forever, the process is ended.
        """
        if self.processes == 1:
            yield
            return
        done = threading.Event()
        threading.Thread(target=self._watch, args=(done,), daemon=True).start()
        try:
            yield
            self.gathered("")  # nobody leaves before all are done
        except Exception as error:
            # JAX raises a ValueError where Gloo finds the connection closed.
            lost = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
            if lost and "RESOURCE_EXHAUSTED" not in str(error):
                raise LostError(str(error).splitlines()[0][:200]) from error
            raise
        finally:
            done.set()

    def _watch(self, done: threading.Event) -> None:
        number, silence = 0, LostError(f"no answer for {SILENCE_SECONDS} seconds")
        while not done.wait(BEAT_SECONDS):
            # The barrier does not return where it cannot reach the coordinator.
            timer = threading.Timer(SILENCE_SECONDS + 5, lambda: done.is_set() or leave(silence))
            timer.daemon = True
            timer.start()
            try:
                ocp.multihost.sync_global_processes(
                    f"forwardgrad {number}",
                    timeout=SILENCE_SECONDS,
                    processes=set(range(self.processes)),
                )
            except Exception:
                if not done.is_set():
                    leave(silence)
            finally:
                timer.cancel()
            number += 1


ONE = Devices()
"""One device."""


def leave(error: InputError) -> NoReturn:
    """End the process: JAX's own way out would wait for those that are gone."""
    with contextlib.suppress(OSError):
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(2)


def _place(sharding: NamedSharding, array: Any) -> jax.Array:
    # Unlike device_put, this does not send everything to compare it.
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _room(size: int) -> int:
    """A size that few programs have to be compiled for."""
    return 2 ** max(6, math.ceil(math.log2(size + 1)))


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else fields(value)
