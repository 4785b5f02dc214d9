"""Two processes that train one network, and send each other scalars.

    python examples/far_apart.py

Each process has half of the digits and a copy of the network. In a step, each measures its own loss
along a random direction of its own, from forward passes alone; the directional derivatives and the
losses go over the network (JAX's collectives over sockets, here of this machine), and both make the
same update of them, whose directions they draw from a key. At the end the weights are equal to the
bit, and a table says what a step would take with the two far apart.

To run it on two machines, start it on each with `--process 0` and `--process 1`, and the address of
the first as `--coordinator host:port`.
"""

import dataclasses
import functools
import hashlib
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import forwardgrad as fg

LATENCIES = (0.0, 0.010, 0.100, 1.000)
"""Seconds of a message from one process to the other."""

BITS = 10e6
"""Bits a second of the line between them."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of the example."""

    steps: int = 300
    """Steps of training."""
    tangents: int = 16
    """Directions of each process in a step."""
    coordinator: str = ""
    """Address of process 0; empty: both processes run on this machine."""
    process: int = -1
    """Which process this is; -1: start both."""


def loss(params, images, labels):
    """The cross-entropy of a network with one hidden layer."""
    hidden = jax.nn.relu(images @ params["first"] + params["bias"])
    logits = hidden @ params["last"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def initial():
    """The weights that both begin with."""
    keys = jax.random.split(jax.random.key(0))
    first = jax.random.normal(keys[0], (64, 256)) / 8
    last = jax.random.normal(keys[1], (256, 10)) / 16
    return {"first": first, "bias": jnp.zeros(256), "last": last}


def train(options: Options) -> None:
    """What each process does."""
    jax.distributed.initialize(options.coordinator, 2, options.process)
    mesh = jax.make_mesh((2,), ("process",), axis_types=(AxisType.Auto,))
    digits = load_digits()
    mine = slice(options.process, None, 2)
    images = (digits.data[mine][:896] / 16).astype(np.float32)
    labels = digits.target[mine][:896].astype(np.int32)
    images, labels = (
        multihost_utils.host_local_array_to_global_array(a, mesh, P("process"))
        for a in (images, labels)
    )
    estimator = fg.WorkerTangents(fg.WeightPerturbation(tangents=options.tangents), "process")
    gradient = fg.value_and_grad(loss, estimator)
    optimiser = optax.adam(2e-3)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(), P("process"), P("process"), P()),
        out_specs=(P(), P(), P()),
    )
    def step(params, state, images, labels, number):
        key = jax.random.fold_in(jax.random.key(1), number)
        value, grads = gradient(params, images, labels, key=key)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, jax.lax.pmean(value, "process")

    params, state = initial(), optimiser.init(initial())
    values, began = [], 0.0
    for number in range(options.steps):
        params, state, value = step(params, state, images, labels, jnp.int32(number))
        values.append(float(value))
        if number == 0:
            began = time.perf_counter()
    seconds = (time.perf_counter() - began) / max(options.steps - 1, 1)
    weights = [np.asarray(leaf.addressable_data(0)) for leaf in jax.tree.leaves(params)]
    digest = hashlib.sha256(b"".join(w.tobytes() for w in weights)).hexdigest()
    print(f"process {options.process}: loss {values[0]:.3f} to {values[-1]:.3f}", flush=True)
    print(f"process {options.process}: weights {digest[:16]}", flush=True)
    if options.process == 0:
        report(options, seconds, sum(w.size for w in weights))


def report(options: Options, seconds: float, parameters: int) -> None:
    """What a step takes with a line between the processes, computed."""
    print(f"\nA step takes {seconds * 1e3:.1f} ms here. With a line of {BITS / 1e6:.0f} Mbit/s:")
    # Two collectives, one after the other: the derivatives and the loss.
    scalars, gradient = 4 * options.tangents + 4, 4 * parameters + 4
    print("latency ms | scalars: step ms | a gradient: step ms")
    for latency in LATENCIES:
        times = [seconds + 2 * latency + 8 * sent / BITS for sent in (scalars, gradient)]
        print(f"{latency * 1e3:10.0f} | {times[0] * 1e3:16.1f} | {times[1] * 1e3:19.1f}")


def start_both(options: Options) -> int:
    """Run both processes here; returns the exit code."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    settings = ["--steps", str(options.steps), "--tangents", str(options.tangents)]
    settings += ["--coordinator", address]
    processes = [
        subprocess.Popen([sys.executable, __file__, *settings, "--process", str(i)])
        for i in range(2)
    ]
    return max(process.wait() for process in processes)


if __name__ == "__main__":
    given = tyro.cli(Options, description=__doc__)
    if given.process < 0:
        sys.exit(start_both(given))
    train(given)
