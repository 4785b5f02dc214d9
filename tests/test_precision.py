"""What networks compute with."""

import functools
import itertools
import operator

import jax
import jax.extend
import jax.numpy as jnp
import pytest

import forwardgrad as fg
from forwardgrad.training import configure, fit, problem
from forwardgrad.training._config import fitting

KEYS = 32

CASES = [
    ("s/2/4", "digits", "supervised"),
    ("m/4/4", "digits", "contrastive"),
    ("cnn", "digits", "supervised"),
    ("mlp", "digits", "supervised"),
    ("gpt/2/32", "text", "supervised"),
]


def in_half(network, dataset, task, algorithm, **settings):
    """The same step in float32 and in bfloat16."""
    what = {"network": network, "dataset": dataset, "task": task, "algorithm": algorithm}
    given = {"batch_size": 16, **what, **settings}
    return [problem(fitting(precision=p, **given)) for p in ("float32", "bfloat16")]


def gradients(step, count):
    """Of so many keys, as vectors."""
    fun = fg.value_and_grad(step.loss, step.estimator, has_aux=True)

    def one(key):
        (value, _), grads = fun(step.params, *step.batch, key=key)
        assert value.dtype == jnp.float32
        assert {g.dtype for g in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
        return jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])

    return jax.lax.map(one, jax.random.split(jax.random.key(5), count))


@functools.cache
def exact_gradients(case, algorithm):
    return [gradients(step, 1)[0] for step in in_half(*case, algorithm)]


def products(jaxpr, found):
    """The types of what products and convolutions in a program are made of."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append(eqn.invars[0].aval.dtype.name)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            products(inner, found)
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case[2] == "supervised"])
def test_products_are_in_half(case):
    _, step = in_half(*case, "bp")
    jaxpr = jax.make_jaxpr(step.loss)(step.params, *step.batch)
    found = products(jaxpr.jaxpr, [])
    assert set(found) == {"bfloat16"}
    assert {a.dtype.name for a in jaxpr.out_avals[:-1]} == {"float32"}


@pytest.mark.parametrize(
    ("case", "algorithm"),
    [
        *itertools.product(CASES, ["bp", "fg-w", "fg-a"]),
        *[(case, "lg-fg-a") for case in CASES if case[0] not in ("cnn", "mlp")],
    ],
)
def test_gradients_are_nearly_those_of_float32(case, algorithm):
    """The mean estimate is as far from that of float32 as the exact gradients are, or noise.

    Its part along the exact gradient, which has far less noise, shows a bias that this hides.
    """
    steps = in_half(*case, algorithm, **({} if algorithm == "bp" else {"tangents": 2}))
    exact, near = exact_gradients(case, "lg-bp" if algorithm.startswith("lg") else "bp")
    rounding = jnp.linalg.norm(near - exact)
    # The classifier's gradient is less of it in contrastive learning, and the blocks' less exact.
    share = 0.05 if case[2] == "supervised" else 0.15
    assert rounding < share * jnp.linalg.norm(exact)
    if algorithm != "bp":
        change = jnp.subtract(*[gradients(step, KEYS) for step in steps])
        noise = jnp.linalg.norm(change) / KEYS
        assert jnp.linalg.norm(jnp.mean(change, axis=0)) < 1.5 * (rounding + noise)
        along = change @ exact / (exact @ exact)
        assert abs(jnp.mean(along)) < share + 4 * jnp.std(along) / KEYS**0.5


def test_nearly_blank_patches_are_normalised_before_they_are_rounded():
    """Their pixels differ by less than rounding; rounded first, nothing of a gradient is left."""
    steps = in_half("s/2/4", "digits", "contrastive", "bp")
    exact, near = (
        jax.grad(lambda p, s=s: s.loss(p, *s.batch)[0].total())(s.params).blocks for s in steps
    )
    sizes = [
        sum(jnp.sum(x**2) for x in jax.tree.leaves(tree)) ** 0.5
        for tree in (exact, jax.tree.map(jnp.subtract, near, exact))
    ]
    assert sizes[1] < 0.3 * sizes[0]


def test_tf32_is_of_gpus():
    with pytest.raises(fg.InputError, match="precision 'tf32' is one of NVIDIA GPUs, and JAX's"):
        fit(configure(precision="tf32"))


def test_a_run_in_half_learns_and_keeps_its_precision(tmp_path):
    given = {"network": "m/1/16", "algorithm": "lg-fg-a", "epochs": 2, "out": tmp_path / "run"}
    run = fit(configure(**given, precision="bfloat16"))
    assert run.result.test_error < 20
    assert fit(configure(**given, precision="bfloat16", resume=True)).result == run.result
    with pytest.raises(fg.InputError, match=r"precision \('bfloat16' there, 'float32' now\)"):
        fit(configure(**given, resume=True))


def test_steps_that_would_be_rounded_away_are_refused():
    """Around 1, the numbers of bfloat16 are 0.0078 apart: steps of 0.01 would be of that size."""
    _, step = in_half("gpt/2/32", "text", "supervised", "fg-a")
    with pytest.raises(fg.InputError, match=r"size sigma \(=0.01\).* bfloat16 would round"):
        gradients(step._replace(estimator=fg.NodePerturbation()), 1)
    with pytest.raises(fg.InputError, match="precision must be float32 for algorithm 'lg-np'"):
        configure(network="m/1/4", algorithm="lg-np", precision="tf32")


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_rows_do_not_stop_growing(tied):
    """A row's gradient is a sum over its tokens, hundreds of them."""
    steps = in_half("gpt/1/16", "text", "supervised", "bp", tied=tied, batch_size=256)
    exact, half = (
        jax.jit(jax.grad(lambda params, s=s: s.loss(params, *s.batch)[0].total()))(s.params)
        for s in steps
    )
    name = "classifier.weight" if tied else "embedding"
    expected, found = (operator.attrgetter(name)(g) for g in (exact, half))
    assert jnp.linalg.norm(found - expected) < 0.05 * jnp.linalg.norm(expected)
