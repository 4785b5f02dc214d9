"""The processes of a run: how each finds the others."""

import contextlib
import dataclasses
import functools
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import jax

from forwardgrad._errors import InputError
from forwardgrad.cli._surroundings import check_device
from forwardgrad.training import Devices
from forwardgrad.training._devices import leave

AUTO = "auto"

HEARTBEAT_SECONDS, SHUTDOWN_SECONDS = 60, 20
"""When JAX itself gives up a process, later than we do; and what it waits for at the end."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """Devices and processes. They change a run's result by rounding only, and are not stored."""

    coordinator: str | None = None
    """Address of process 0 of several, as host:port; auto: what Slurm, Kubernetes, MPI or a TPU
    pod says of all processes."""
    processes: int | None = None
    """Number of processes; each is started with the same settings."""
    process_id: int | None = None
    """Which one this is, from 0."""
    devices: int | None = None
    """Devices that each process uses. Default: all that it has."""
    join_seconds: float = 120.0
    """How long processes wait for each other at the start."""

    def __post_init__(self):
        if not 0 < self.join_seconds < 1e6:
            raise InputError(f"join_seconds must be from 0 to 1e6, got {self.join_seconds}")
        if self.devices is not None and self.devices < 1:
            raise InputError(f"devices must be at least 1, got {self.devices}")
        if self.coordinator in (None, AUTO):
            for name in ("processes", "process_id"):
                if getattr(self, name) is not None:
                    raise InputError(
                        f"{name} (={getattr(self, name)}) needs a coordinator as host:port, got "
                        f"{self.coordinator}"
                    )
            return
        port = re.fullmatch(r"[^\s:]+:(\d{1,5})", self.coordinator)
        if not (port and 0 < int(port[1]) < 2**16):
            raise InputError(
                f"coordinator must be {AUTO} or a host and a port as host:port, got "
                f"{self.coordinator!r}"
            )
        if self.processes is None or self.process_id is None:
            raise InputError(
                f"coordinator (={self.coordinator}) needs the number of processes and a process_id"
            )
        if not 0 <= self.process_id < self.processes:
            raise InputError(
                f"process_id must be from 0 to {self.processes - 1} with processes "
                f"(={self.processes}), got {self.process_id}"
            )

    def join(self) -> Devices:
        """The devices of all processes, when these have found each other.

        **Raises:**

        `InputError` if there are too few devices, or the processes cannot find each other. Where
        JAX would end the process after a long time, it ends with a sentence when `join_seconds`
        are over.
        """
        if self.coordinator is not None:
            with self._in_time():
                self._initialise()
        check_device()
        local = jax.local_devices()
        if (count := self.devices or len(local)) > len(local):
            raise InputError(f"devices must be at most {len(local)}, which are here, got {count}")
        places = {d: i for p in range(jax.process_count()) for i, d in enumerate(_of_process(p))}
        return Devices([d for d, place in places.items() if place < count])

    def _initialise(self) -> None:
        # It would take SIGTERM away from the run, which stops by itself.
        jax.config.update("jax_enable_preemption_service", False)
        initialise = functools.partial(
            jax.distributed.initialize,
            # Later than ours, since it ends the process with a trace.
            initialization_timeout=int(self.join_seconds) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
        if self.coordinator == AUTO:
            try:
                initialise()
            except ValueError as error:
                raise InputError(
                    f"coordinator {AUTO} finds no cluster here, like Slurm or Kubernetes: name it "
                    "as host:port, with processes and process_id"
                ) from error
            return
        assert self.coordinator is not None
        host, _, port = self.coordinator.rpartition(":")
        try:
            if self.process_id == 0:
                with socket.create_server(("", int(port))):
                    pass
            else:
                socket.getaddrinfo(host, port)
        except OSError as error:
            raise InputError(
                f"coordinator {self.coordinator} cannot be used: {error.strerror or error}"
            ) from error
        initialise(
            self.coordinator, self.processes, self.process_id, cluster_detection_method="deactivate"
        )

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        others = "all" if self.processes is None else f"all {self.processes}"
        late = InputError(
            f"the processes did not find each other in {self.join_seconds:g} seconds: {others} "
            f"must run, and reach the coordinator (={self.coordinator})"
        )
        timer = threading.Timer(self.join_seconds, leave, [late])
        timer.daemon = True
        timer.start()
        try:
            yield
        except RuntimeError as error:
            raise InputError(
                f"coordinator {self.coordinator} cannot be used: {str(error).splitlines()[0][:200]}"
            ) from error
        finally:
            timer.cancel()


def _of_process(process: int) -> list[Any]:
    return sorted(
        (d for d in jax.devices() if d.process_index == process), key=lambda device: device.id
    )
