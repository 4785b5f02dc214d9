"""Credit by token on models of other libraries, written as their users write them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from forwardgrad.rewrite import Hooks, Program
from test_activity_perturbation import assert_unbiased, flat
from test_axes import check
from token_models import EXAMPLES, INPUTS, MODELS, TOKENS, of_logits, weights

# Which axes are found


KEPT = {
    "NNX": "[1] out, [1] query, [1] down, [1] up, [1] norm2, norm",
    "NNX, own attention": "[1] project, [1] down, [1] up, [1] gate",
    "Gemma": "[1] query, [1] query_norm, [1] out, [1] after, [1] before_mlp, [1] gate, [1] up, "
    "[1] down, [1] after_mlp, norm",
    "Equinox": "",
    "Mamba": "[1] read, [1] skip, [1] out",
    "recurrence": "out",
}
"""What keeps its token: what no attention, convolution or recurrence comes after."""


@functools.cache
def made(name):
    losses, params = MODELS[name]()
    return losses, params, jax.jit(jax.grad(lambda p: losses(p).total()))(params)


def named(path):
    """`blocks`, `[1]`, `out`, `kernel`: the parts of a parameter's path, without libraries' own."""
    text = path.removesuffix(".value").replace("'", "").replace("]", "").replace("[", ".")
    return [part for part in text.split(".") if part]


@pytest.mark.parametrize("name", KEPT)
def test_queries_and_mlps_keep_their_token_and_what_is_read_later_mixes(name):
    losses, params, _ = made(name)
    kept = set()
    for row in fg.explain(losses, fg.ActivityPerturbation(), params).rows:
        token = [axis for axis in row.axes if axis.startswith("token")]
        if row.how == "exact":
            continue
        assert token, row
        assert any(axis.startswith("example: axis") for axis in row.axes)
        if token != ["token: mixed"]:
            block, *rest = [p for p in named(row.path) if p not in ("blocks", "attention")]
            kept.add(f"[{block}] {rest[0]}" if block.isdigit() else block)
    assert kept == {k for k in KEPT[name].split(", ") if k}


# Without a bias


def placed(losses, params):
    """Where each activation begins in a vector of all of them, and the loops it is in, by number.

    Also how long that vector is.
    """

    def run(leaves):
        program = Program(lambda p: (losses(p), None), params)
        return program.with_hooks(leaves, Hooks(activation=lambda a: a.value))[2].activations

    found, total = {}, 0
    for a in jax.eval_shape(run, jax.tree.leaves(params)):
        found[a.number] = (total, a.value.shape[: a.stacked])
        total += a.value.size
    return found, total


def in_turn(estimator, losses, params):
    """The estimator with all unit vectors as its tangents, one after another.

    Their mean is the mean over random tangents, but for rounding: that is linear in `E[u u']`,
    which is the identity, and unit vectors add up to the same. Parts of the layers have all each.
    """
    where, total = placed(losses, params)

    class InTurn(type(estimator)):
        def _tangent(self, key, activation, k, scale=1.0):
            start, loops = where[activation.number]
            iteration = jnp.zeros((), int)
            for i, length in zip(activation.iterations, loops, strict=True):
                iteration = iteration * length + i
            z = activation.value
            own = jnp.arange(z.size) == k % total - start - iteration * z.size
            u = jnp.where(own, jnp.sqrt(1.0 * total), 0.0).reshape(z.shape)
            return (scale * u).astype(z.dtype)

    fields = {f: getattr(estimator, f) for f in estimator.__dataclass_fields__}
    return InTurn(**{**fields, "tangents": total * estimator.partition, "chunk": 100})


def errors(name, estimator, precision="float32"):
    """The error of the mean estimate by parameter, relative to the gradient's largest entry."""
    losses, params, exact = made(name)
    with jax.enable_x64(precision == "float64"):
        params = jax.tree.map(lambda p: p.astype(precision), params)
        estimate = fg.value_and_grad(losses, in_turn(estimator, losses, params))
        grads = jax.jit(lambda p: estimate(p, key=jax.random.key(0))[1])(params)
    return errors_of(exact, grads)


def errors_of(exact, grads):
    """The same of a gradient. Some exact ones are zero, as that of a bias of keys."""
    least = 1e-3 * max(np.abs(e).max() for e in jax.tree.leaves(exact))
    return {
        jax.tree_util.keystr(path): np.abs(np.subtract(g, e)).max() / max(least, np.abs(e).max())
        for (path, e), g in zip(
            jax.tree_util.tree_leaves_with_path(exact), jax.tree.leaves(grads), strict=True
        )
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_mean_of_the_estimates_is_the_gradient(name):
    found = errors(name, fg.ActivityPerturbation())
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("name", ["NNX, own attention", "Equinox", "Mamba"])
def test_the_mean_of_finite_differences_is_near_the_gradient(name):
    found = errors(name, fg.NodePerturbation(sigma=1e-7), "float64")
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("name", ["NNX", "Equinox", "Mamba"])
def test_random_tangents_have_that_mean(name):
    """Within five standard errors in every entry, and within 1.5 over all entries."""
    losses, params, exact = made(name)
    keys = jax.random.split(jax.random.key(3), 300)
    assert_unbiased(losses, params, fg.ActivityPerturbation(), keys, flat(exact))


@pytest.mark.parametrize("name", MODELS)
def test_claims_about_the_axes_hold(name):
    losses, params, _ = made(name)
    check(losses, params, loops=True)


# Feedback by token


def only_at(losses, token):
    """The losses of one token of the first example."""

    def fun(p):
        (term,) = losses(p).terms
        chosen = jnp.zeros((EXAMPLES, TOKENS)).at[0, token].set(1.0)
        return fg.Losses([term * chosen], [("example", "token")])

    return fun


def test_direct_feedback_sends_an_error_to_its_own_token():
    """The gradient of a hidden layer is then one outer product: what goes in, times the error."""
    losses, params, _ = made("NNX")
    estimate = jax.jit(
        lambda token: fg.value_and_grad(only_at(losses, token), fg.DirectFeedbackAlignment())(
            params
        )[1]
    )
    for token in range(TOKENS):
        block = estimate(token)["blocks"][1]
        for kernel in (block["up"]["kernel"], block["down"]["kernel"]):
            values = jnp.linalg.svd(kernel[...], compute_uv=False)
            assert values[0] > 0
            assert values[1] < 1e-5 * values[0]


# What mixes tokens


@pytest.mark.parametrize("name", MODELS)
def test_credit_from_later_tokens_alone_has_no_bias_in_a_causal_model(name):
    found = errors(name, fg.ActivityPerturbation(mixing="causal"))
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize("name", MODELS)
def test_one_step_of_reverse_mode_has_no_bias(name):
    found = errors(name, fg.ActivityPerturbation(mixing="causal", exact_mixing=True))
    assert max(found.values()) < 1e-4, found


def test_one_step_of_reverse_mode_has_no_bias_by_finite_differences():
    found = errors("Equinox", fg.NodePerturbation(sigma=1e-7, exact_mixing=True), "float64")
    assert max(found.values()) < 1e-4, found


REVERSED = {
    "NNX": "query, key, value, norm1",
    "NNX, own attention": "fused, scale",
    "Gemma": "query, key_value, key_norm, before",
    "Equinox": "query_proj, key_proj, value_proj",
    "Mamba": "in, conv, write, read, step, step bias, decay",
    "recurrence": "in, state",
}


@pytest.mark.parametrize("name", REVERSED)
def test_reverse_mode_takes_one_step(name):
    losses, params, _ = made(name)
    found = set()
    for row in fg.explain(losses, fg.ActivityPerturbation(exact_mixing=True), params).rows:
        skipped = ("blocks", "attention", "0", "1")
        if row.how == "reverse":
            found.add(next(p for p in named(row.path) if p not in skipped))
    assert found == set(REVERSED[name].split(", "))


def encoder_and_decoder(p):
    """All tokens of the encoder go into every later one of the decoder, by its keys and values."""
    x = p["words"][INPUTS]
    encoded = jnp.tanh(jnp.tanh(x @ p["encoder"]) @ p["encoder2"])
    scores = jnp.einsum("btd,bsd->bts", x @ p["query"], encoded @ p["key"])
    mixed = jax.nn.softmax(scores) @ (encoded @ p["value"])
    return of_logits(jnp.tanh((x + mixed @ p["out"]) @ p["up"]) @ p["head"])


SQUARE = ("encoder", "encoder2", "query", "key", "value", "out", "up")
PAIR = weights(words=(7, 6), **dict.fromkeys(SQUARE, (6, 6)), head=(6, 7))


def test_reverse_mode_does_not_go_on_into_an_encoder():
    rows = fg.explain(encoder_and_decoder, fg.ActivityPerturbation(exact_mixing=True), PAIR).rows
    how = {row.path[2:-2]: row.how for row in rows}
    assert {name for name, kind in how.items() if kind == "reverse"} == {"query", "key", "value"}


def query_by_query(p):
    """Attention that a loop computes, one token's at a time."""
    x = p["words"][INPUTS]
    keys, values = x @ p["key"], x @ p["value"]

    def attend(now):
        query, i = now
        scores = jnp.where(jnp.arange(TOKENS) <= i, jnp.einsum("bd,bsd->bs", query, keys), -1e9)
        return jnp.einsum("bs,bsd->bd", jax.nn.softmax(scores), values)

    queries = jnp.swapaxes(x @ p["query"], 0, 1)
    mixed = jnp.swapaxes(jax.lax.map(attend, (queries, jnp.arange(TOKENS))), 0, 1)
    return of_logits(jnp.tanh((x + mixed @ p["out"]) @ p["up"]) @ p["head"])


def test_reverse_mode_goes_through_a_loop_over_queries():
    estimator = fg.ActivityPerturbation(mixing="causal", exact_mixing=True)
    rows = fg.explain(query_by_query, estimator, PAIR).rows
    assert {row.path[2:-2] for row in rows if row.how == "reverse"} == {"query", "key", "value"}
    exact = jax.grad(lambda p: query_by_query(p).total())(PAIR)
    found = errors_of(exact, mean_estimate(query_by_query, PAIR, estimator))
    assert max(found.values()) < 1e-4, found


def running_mean(p, reverse=False):
    """A first layer, the mean over tokens up to each one, or from each one on, and two others."""
    z = p["words"][INPUTS] @ p["in"] + p.get("shift", 0.0)
    mean = jax.lax.cumsum(jnp.tanh(z), axis=1, reverse=reverse)
    return of_logits(jnp.tanh(mean @ p["out"]) @ p["head"])


LAYERS = weights(words=(7, 6), out=(6, 6), head=(6, 7), **{"in": (6, 6)})


def mean_estimate(losses, params, estimator):
    estimate = fg.value_and_grad(losses, in_turn(estimator, losses, params))
    return jax.jit(lambda p: estimate(p, key=jax.random.key(0))[1])(params)


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_discounted_credit_is_the_formula(rate):
    def by_token(shift):
        (losses,) = running_mean({**LAYERS, "shift": shift}).terms
        return losses

    shift = jnp.zeros((EXAMPLES, TOKENS, 6))
    jacobian = np.asarray(jax.jacrev(by_token)(shift))  # [example, token, example, token, unit]
    lag = np.arange(TOKENS)[:, None] - np.arange(TOKENS)
    weight = np.where(lag >= 0, rate ** np.maximum(lag, 0.0), 0)
    credit = np.einsum("ats,atbsd->bsd", np.broadcast_to(weight, (2, *weight.shape)), jacobian)
    expected = np.einsum("bsi,bsd->id", LAYERS["words"][INPUTS], credit)
    found = mean_estimate(running_mean, LAYERS, fg.ActivityPerturbation(mixing=rate))
    np.testing.assert_allclose(found["in"], expected, rtol=1e-3, atol=1e-6)


def test_causal_credit_is_biased_where_the_model_is_not_causal():
    def losses(p):
        return running_mean(p, reverse=True)

    exact = jax.grad(lambda p: losses(p).total())(LAYERS)

    def error(estimator):
        found = mean_estimate(losses, LAYERS, estimator)
        return jnp.linalg.norm(found["in"] - exact["in"]) / jnp.linalg.norm(exact["in"])

    assert error(fg.ActivityPerturbation()) < 1e-3
    assert error(fg.ActivityPerturbation(mixing="causal")) > 0.3


def test_less_variance():
    """Of what a recurrence reads: later tokens' changes alone, and one exact step."""
    exact = jax.grad(lambda p: running_mean(p).total())(LAYERS)["in"]
    keys = jax.random.split(jax.random.key(5), 1000)

    def error(**options):
        estimate = fg.value_and_grad(running_mean, fg.ActivityPerturbation(**options))
        drawn = jax.jit(jax.vmap(lambda key: estimate(LAYERS, key=key)[1]["in"]))(keys)
        return jnp.sum((drawn - exact) ** 2)

    every, later, step = error(), error(mixing="causal"), error(exact_mixing=True)
    assert later < 0.7 * every
    assert step < 0.3 * every


def by_example(p):
    (losses,) = running_mean(p).terms
    return fg.Losses([jnp.sum(losses, axis=1)], [("example",)])


def no_tokens(p):
    (losses,) = running_mean(p).terms
    together = jnp.broadcast_to(jnp.mean(losses, axis=1, keepdims=True), losses.shape)
    return fg.Losses([together], [("example", "token")])


def all_mixed(p):
    """As a stack of convolutions over the tokens."""
    x = p["words"][INPUTS]
    for name in ("in", "out"):
        x = jnp.tanh(jnp.cumsum(x, axis=1) @ p[name])
    return of_logits(jnp.cumsum(x, axis=1) @ p["head"])


def in_a_while_loop(p):
    def mix(z):
        return 0.5 * z + 0.5 * jnp.cumsum(z, axis=1)

    z = jnp.tanh(p["words"][INPUTS] @ p["in"])
    z = jax.lax.while_loop(lambda z: jnp.max(jnp.abs(z)) < 1, mix, z)
    return of_logits(jnp.tanh(z @ p["out"]) @ p["head"])


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        (by_example, {"mixing": "causal"}, "mixing='causal' needs losses with an axis 'token'"),
        (by_example, {"exact_mixing": True}, "exact_mixing=True needs losses with an axis"),
        (no_tokens, {"mixing": 0.5}, "and it is in none of them"),
        (no_tokens, {"exact_mixing": True}, "and it is in none of them"),
        (all_mixed, {"exact_mixing": True}, "exact_mixing=True would be backpropagation here"),
        (in_a_while_loop, {"exact_mixing": True}, "which JAX refuses here"),
    ],
)
def test_refusals(losses, options, message):
    plain = fg.value_and_grad(losses, fg.ActivityPerturbation())
    plain(LAYERS, key=jax.random.key(0))
    refused = fg.value_and_grad(losses, fg.ActivityPerturbation(**options))
    with pytest.raises(fg.InputError, match=message):
        refused(LAYERS, key=jax.random.key(0))


def test_refused_options(unchecked):
    with pytest.raises(fg.InputError, match="mixing 'later' is unknown"):
        fg.ActivityPerturbation(mixing="later")  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        fg.InputError, match=r"mixing must be a name or a number between 0 and 1, got 1\.5"
    ):
        fg.ActivityPerturbation(mixing=1.5)


# What reaches the losses past all other layers


@pytest.mark.parametrize("name", MODELS)
def test_with_the_direct_part_exact_the_mean_is_the_gradient(name):
    mixing = name in ("NNX", "Mamba")
    found = errors(name, fg.ActivityPerturbation(exact_direct=True, exact_mixing=mixing))
    assert max(found.values()) < 1e-4, found


def test_with_the_direct_part_exact_the_mean_of_differences_is_near_the_gradient():
    found = errors("Equinox", fg.NodePerturbation(sigma=1e-7, exact_direct=True), "float64")
    assert max(found.values()) < 1e-4, found


def residual(p):
    """Two layers that add to a stream, and a scale before the head."""
    x = p["words"][INPUTS]
    x = x + jnp.tanh(x @ p["in"])
    x = x + jnp.tanh(x @ p["middle"]) @ p["out"]
    return of_logits(x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True)) * p["scale"] @ p["head"])


STREAM = {**LAYERS, **weights(middle=(6, 6)), "scale": jnp.ones(6)}


@pytest.mark.parametrize("kind", [fg.ActivityPerturbation, fg.NodePerturbation])
def test_what_no_other_layer_comes_after_is_exact(kind):
    """And the layers below have less variance, by what the stream carries past others."""
    exact = jax.grad(lambda p: residual(p).total())(STREAM)
    keys = jax.random.split(jax.random.key(5), 400)

    def drawn(**options):
        estimate = fg.value_and_grad(residual, kind(**options))
        return jax.jit(jax.vmap(lambda key: estimate(STREAM, key=key)[1]))(keys)

    plain, direct = drawn(), drawn(exact_direct=True)
    for name in ("out", "scale", "head"):
        np.testing.assert_allclose(direct[name][0], exact[name], rtol=1e-5, atol=1e-6)
    for name in ("words", "in"):
        before, after = (jnp.sum((d[name] - exact[name]) ** 2) for d in (plain, direct))
        assert after < 0.7 * before


def test_the_direct_part_of_a_function_with_effects():
    def fun(p):
        jax.debug.callback(lambda x: None, p["scale"][0])
        return residual(p)

    with pytest.raises(fg.InputError, match="fun must have no effects with exact_direct"):
        fg.value_and_grad(fun, fg.ActivityPerturbation(exact_direct=True))(
            STREAM, key=jax.random.key(0)
        )


@pytest.mark.parametrize(
    "estimator",
    [
        fg.ActivityPerturbation(exact_direct=True),
        fg.BalancedTangents(fg.ActivityPerturbation()),
        fg.ControlVariate(fg.ActivityPerturbation()),
    ],
)
def test_workers_that_exchange_what_they_compute(estimator):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(p):
        def fun(p):
            (losses,) = residual(p).terms
            return fg.Losses([losses - jax.lax.pmean(losses, "data")], [("example", "token")])

        init, step = fg.estimation(fun, estimator)
        return step(p, key=jax.random.key(0), state=init(p))[1]

    workers = jax.shard_map(
        step, mesh=mesh, in_specs=(jax.P(),), out_specs=jax.P(), check_vma=False
    )
    with pytest.raises(fg.InputError, match=r"exchange what they compute, along \['data'\]"):
        jax.eval_shape(workers, STREAM)
