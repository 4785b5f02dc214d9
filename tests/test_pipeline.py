"""Stages on devices of their own learn what they learn one after another on one."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import forwardgrad as fg
from forwardgrad.networks import LocalMixer, Size, build
from forwardgrad.objectives import LocalLoss
from helpers import run_on_eight_devices
from pipelines import SCENARIOS, Block, Head, loss, own_stack

X, Y = jnp.ones((4, 3)), jnp.zeros((4, 3))


def linear(params, x, y):
    x = x @ params["w"]
    return jnp.mean((x - y) ** 2), x


def weights():
    return {"w": jnp.eye(3)}


def pipeline_of(*stages, estimator=None, optimiser=None):
    devices = jax.devices()[:1] * len(stages)
    estimator = fg.Backpropagation() if estimator is None else estimator
    optimiser = optax.sgd(0.1) if optimiser is None else optimiser
    return fg.BlockPipeline(stages, estimator, optimiser, devices)


def raises(match):
    return pytest.raises(fg.InputError, match=match)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["on_devices"], ["eight_stages", "moved"]], ids=", ".join)
def test_devices_do_not_matter(names):
    """A plain loop on one device has the same weights bit for bit, with four estimators."""
    assert set(SCENARIOS) == {"on_devices", "eight_stages", "moved"}
    run_on_eight_devices("pipelines.py", *names)


@pytest.mark.slow
def test_example_trains_and_ends_with_equal_weights():
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).parents[1] / "examples" / "side_by_side.py",
            "--steps",
            "150",
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    found = re.findall(r"test error ([\d.]+) %, weights (\w+)", done.stdout)
    assert len(found) == 2
    assert found[0] == found[1]
    assert float(found[0][0]) < 50  # 90 by chance


def test_schedule_of_the_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    pipeline = importlib.import_module("pipeline")
    for stages, micro_batches in ((1, 5), (4, 1), (4, 10), (8, 32)):
        ideal = micro_batches / (micro_batches + stages - 1)
        assert pipeline.utilisation([0.5] * stages, micro_batches) == pytest.approx(ideal)
    # The second stage is the slowest: it starts after 1 and does three steps of 2.
    assert pipeline.makespan([1.0, 2.0, 1.0], 3) == 1 + 3 * 2 + 1


def test_exact_stages_are_the_whole_network():
    """With exact gradients, the pipeline trains as one program of all blocks does, to rounding."""
    network = LocalMixer((8, 8, 1), Size(16, 2, 4, 3), 3, key=jax.random.key(1))
    images = jax.random.normal(jax.random.key(2), (5, 8, 8, 8, 1))
    labels = jnp.argmax(images[..., 0, :3, 0], axis=-1)
    objective, optimiser = LocalLoss(), optax.sgd(0.1, momentum=0.9)
    params, static = eqx.partition(network, eqx.is_inexact_array)
    gradient = fg.value_and_grad(
        lambda p, *batch: objective(eqx.combine(p, static), *batch),
        fg.Backpropagation(),
        has_aux=True,
    )

    @jax.jit
    def step(params, memory, *batch):
        (value, aux), grads = gradient(params, *batch)
        updates, memory = optimiser.update(grads, memory)
        return optax.apply_updates(params, updates), memory, value, aux

    stages, parts = objective.stages(network, 2)
    assert [len(part.blocks) for part in parts] == [2, 1]
    pipeline = pipeline_of(*stages, optimiser=optimiser)
    state, memory = pipeline.init(parts, images[0], labels[0]), optimiser.init(params)
    for batch in zip(images, labels, strict=True):
        params, memory, value, aux = step(params, memory, *batch)
        values, output, state = pipeline.step(state, *batch)
        np.testing.assert_allclose(sum(values), value, rtol=1e-5)
        assert output["errors"] == aux["errors"]
    blocks = [block for part in state.params for block in part.blocks]
    heads = [head for part in state.params for head in part.heads]
    found = (blocks, heads, state.params[-1].classifier)
    right = (params.blocks, params.heads, params.classifier)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_parameters_stay_the_callers_own():
    """`init` copies them, also those that an optimiser's memory begins with."""
    params = [weights(), weights()]
    copying = optax.GradientTransformation(
        lambda params: params, lambda updates, state, params=None: (updates, state)
    )
    pipeline = pipeline_of(linear, linear, optimiser=optax.chain(copying, optax.sgd(0.1)))
    state = pipeline.init(params, X, Y)
    _, _, after = pipeline.step(state, X, Y)
    assert all(jnp.all(tree["w"] == jnp.eye(3)) for tree in params)
    assert jnp.any(after.params[0]["w"] != jnp.eye(3))
    with raises(r"state was used up by an earlier step"):
        pipeline.step(state, X, Y)


def test_nothing_is_waited_for():
    """A step returns while its first stage still computes."""

    def slow(params, x, y):
        # Long only where the input says so, so that everything is compiled before.
        times = (x[0, 0] - 1).astype(int)
        busy = jax.lax.fori_loop(0, times, lambda _, m: jnp.cos(m @ m), jnp.ones((256, 256)))
        losses, x = linear(params, x, y)
        return losses, x + jax.lax.stop_gradient(busy[0, 0])

    pipeline = pipeline_of(slow, linear)
    state = pipeline.init([weights(), weights()], X, Y)
    _, _, state = pipeline.step(state, X, Y)
    for _ in range(2):
        values, output, state = pipeline.step(state, 1000 * X, Y)
        assert not any(a.is_ready() for a in jax.tree.leaves((values, output, state.params)))
    jax.block_until_ready(output)


def test_what_is_no_floating_point_array_is_passed_on():
    def stage(params, x, y):
        w, number, activation, absent = params
        assert absent is None
        x = activation(x @ w) + number
        return jnp.mean((x - y) ** 2), x

    params = [(jnp.eye(3), jnp.arange(3), jnp.tanh, None)]
    pipeline = pipeline_of(stage)
    _, _, state = pipeline.step(pipeline.init(params, X, Y), X, Y)
    w, number, activation, _ = state.params[0]
    assert jnp.any(w != jnp.eye(3))
    assert jnp.all(number == jnp.arange(3))
    assert activation is jnp.tanh


@pytest.mark.parametrize(("blocks", "count"), [(8, 3), (5, 4), (4, 4), (7, 1)])
def test_groups_are_neighbours_of_nearly_equal_size(blocks, count):
    stages, params, _ = own_stack(count, blocks)
    sizes = [len(own) for own, heads in params]
    assert len(stages) == count
    assert sum(sizes) == blocks
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_more_stages_than_blocks():
    network = LocalMixer((8, 8, 1), Size(16, 2, 4, 2), 3, key=jax.random.key(1))
    match = r"number of stages must be from 1 to that of the blocks, which is 2, got {}"
    for count in (0, 3):
        with raises(match.format(count)):
            LocalLoss().stages(network, count)
        with raises(match.format(count)):
            own_stack(count, blocks=2)


def test_objectives_that_are_not_greedy(unchecked):
    network = LocalMixer((8, 8, 1), Size(16, 2, 4, 2), 3, key=jax.random.key(1))
    with raises(r"no gradients between blocks, got greedy=False and blockwise=True"):
        LocalLoss(greedy=False).stages(network, 2)
    with raises(r"a loss at every block .* got greedy=True and blockwise=False"):
        LocalLoss(blockwise=False).stages(network, 2)
    bare = build("mlp", image_shape=(8, 8, 1), classes=3, key=jax.random.key(0), width=8)
    with raises(r"local losses need a network with blocks that have heads"):
        LocalLoss().stages(bare, 2)


def test_stages_that_are_not_greedy():
    def silent(params, x, y):
        return fg.Losses([], []), x @ params["w"]

    def partly(params, x, y):
        losses, x = linear(params, x, y)
        return losses, x * params["scale"]

    def cut(params, x, y):
        losses, x = linear(params, jax.lax.stop_gradient(x), y)
        return jax.lax.stop_gradient(losses), jax.lax.stop_gradient(x)

    with raises(r"stage 0 must be greedy, but params\[0\]\['w'\] changes its output, but none of"):
        pipeline_of(silent, linear).init([weights(), weights()], X, Y)
    params = [weights(), {**weights(), "scale": jnp.ones(3)}, weights()]
    with raises(r"stage 1 must be greedy, but params\[1\]\['scale'\] changes its output"):
        pipeline_of(linear, partly, linear).init(params, X, Y)
    with raises(r"stage 0 must be greedy, but its weights change none of its own losses"):
        pipeline_of(cut, linear).init([weights(), weights()], X, Y)
    # The last output goes to no other stage.
    pipeline_of(linear, partly).init(params[:2], X, Y)


def test_stages_that_share_weights():
    shared = weights()
    pipeline = pipeline_of(linear, linear)
    with raises(r"cannot share weights, but params\[0\]\['w'\] and params\[1\]\['w'\] are the"):
        pipeline.init([shared, shared], X, Y)
    keys = jax.random.split(jax.random.key(0), 3)
    blocks = [Block(eqx.nn.Linear(3, 3, key=key)) for key in keys[:2]]
    stages, params = fg.greedy_stages(blocks, Head(eqx.nn.Linear(3, 3, key=keys[2])), loss, 2)
    with raises(r"params\[0\]\[1\]\[0\].linear.weight and params\[1\]\[1\]\[0\].linear.weight"):
        pipeline_of(*stages).init(params, X, jnp.zeros(4, int))
    # In one stage, a tree of arrays holds them twice too.
    with raises(r"params\[0\]\['v'\] and params\[0\]\['w'\] are the same array"):
        pipeline_of(linear).init([{**shared, "v": shared["w"]}], X, Y)


def test_devices_that_are_not_there(unchecked):
    several = [linear] * (len(jax.devices()) + 1)
    estimator, optimiser = fg.Backpropagation(), optax.sgd(0.1)
    with raises(r"stages \(=2\) must not be more than the devices, of which there are 1 \(cpu\)"):
        fg.BlockPipeline(several, estimator, optimiser)
    with raises(r"devices must be one for each of the 2 stages, got 1"):
        fg.BlockPipeline(several, estimator, optimiser, jax.devices())
    with raises(r"devices must be JAX's, such as those of jax.devices\(\), got 'cpu'"):
        fg.BlockPipeline([linear], estimator, optimiser, ["cpu"])


def test_other_bad_input(unchecked):
    with raises(r"stages must be at least one function, got none"):
        pipeline_of()
    with raises(r"estimator must be an estimator such as"):
        pipeline_of(linear, estimator="bp")
    with raises(r"params must be a pytree for each of the 2 stages, got 1"):
        pipeline_of(linear, linear).init([weights()], X, Y)
    with raises(r"stage 1 must return a pair \(losses, output\), got "):
        pipeline_of(linear, lambda *args: linear(*args)[0]).init([weights(), weights()], X, Y)
    block = Block(eqx.nn.Linear(3, 3, key=jax.random.key(0)))
    with raises(
        r"blocks\[1\] must be a pytree whose floating-point arrays are its weights, .* a f"
    ):
        fg.greedy_stages([block, lambda x: block(x)], jnp.sum, loss, 1)
    with raises(r"heads must be one for each of the 1 blocks, got 2 heads"):
        fg.greedy_stages([block], [block, block], loss, 1)


def test_steps_with_bad_input(unchecked):
    pipeline = pipeline_of(linear, estimator=fg.WeightPerturbation())
    state, key = pipeline.init([weights()], X, Y), jax.random.key(0)
    with raises(r"must have the shapes that init was given, float32\[4, 3\], float32\[4, 3\], got"):
        pipeline.step(state, X[:2], Y[:2], key=key)
    with raises(r"got float32\[4, 3\]; leave out"):
        pipeline.step(state, X, key=key)
    with raises(r"got int32\[4, 3\], float32\[4, 3\]"):
        pipeline.step(state, X.astype(int), Y, key=key)
    with raises(r"key is missing: WeightPerturbation is random"):
        pipeline.step(state, X, Y)
    with raises(r"state must be of 2 stages, got one of 1"):
        pipeline_of(linear, linear).step(state, X, Y)
    pipeline.step(state, X, Y, key=key)  # None of these has used up the state.
