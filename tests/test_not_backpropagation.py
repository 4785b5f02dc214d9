"""No estimator but `Backpropagation` may be backpropagation, on no program.

Feedback comes through even where backpropagation has nothing to send back, and a perturbation
leaves noise. Where an estimator finds no place for either, it says so by an `InputError`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardgrad as fg
from oracle import jit
from written_twice import NETWORKS

B, T, D = 4, 3, 5
RNG = np.random.default_rng(0)
KEYS = jax.random.split(jax.random.key(5), 2000)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


X, TOKENS, Y = normal(B, D), normal(B, T, D), jnp.array([0, 1, 2, 1])
IDS = jnp.array([[0, 1, 3], [2, 0, 0], [1, 1, 2], [3, 2, 0]])
POSITIONS = normal(T, D)


@dataclasses.dataclass(frozen=True)
class Program:
    """`fun(params)` returns losses; `last` are the parameters of output layers.

    With the parameters in `zeroed` zero, or those in `cancelled` as they are there, the matrix of
    the output layer is zero, and backpropagation has nothing to say to all others.
    """

    fun: Callable[[Any], fg.Losses]
    params: dict[str, jax.Array]
    last: tuple[str, ...] = ("last",)
    zeroed: tuple[str, ...] = ("last",)
    cancelled: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    batched: bool = True

    def hidden(self):
        no_others = (*self.last, *self.zeroed, *self.cancelled)
        return [name for name in self.params if name not in no_others]

    def blind(self):
        """The parameters where backpropagation sends nothing back."""
        zero = {name: jnp.zeros_like(self.params[name]) for name in self.zeroed}
        return {**self.params, **zero, **self.cancelled}


PROGRAMS: dict[str, Program] = {}


def program(**shapes):
    """Adds a function `losses(params)` to the programs, with weights of these shapes."""

    def add(fun):
        fan_ins = {name: shape[-2] if len(shape) > 1 else 4 for name, shape in shapes.items()}
        made = {name: normal(*shape) / fan_ins[name] ** 0.5 for name, shape in shapes.items()}
        PROGRAMS[fun.__name__.replace("_", " ")] = Program(fun, made)
        return fun

    return add


def squares(out):
    """A loss for every example, axis 0."""
    return fg.Losses([jnp.mean((out - 1).reshape(len(out), -1) ** 2, axis=1)], [("example",)])


def nll(logits):
    return fg.Losses([-jax.nn.log_softmax(logits)[jnp.arange(B), Y]], [("example",)])


@program(table=(4, D), w=(D, 6), last=(6, 2))
def embedding(p):
    return squares(jnp.tanh(jnp.mean(p["table"][IDS], axis=1) @ p["w"]) @ p["last"])


@program(w=(D, 6), v=(6, 6), last=(6, 3))
def nll_by_index(p):
    return nll(jnp.tanh(jnp.tanh(X @ p["w"]) @ p["v"]) @ p["last"])


@program(w=(D, 6), v=(6, 6), last=(6, 2))
def map_over_examples(p):
    return squares(jax.lax.map(lambda x: jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"]) @ p["last"], X))


@program(w=(D, 6), v=(6, 6), b=(6,), last=(6, 2))
def time_major_scan(p):
    def step(h, x):
        return jnp.tanh(x @ p["w"] + h @ p["v"] + p["b"]), None

    h, _ = jax.lax.scan(step, jnp.zeros((B, 6)), jnp.swapaxes(TOKENS, 0, 1))
    return squares(h @ p["last"])


@program(w=(2, D, 6), last=(2, 6, 2))
def ragged_dot(p):
    sizes = jnp.array([3, 1], jnp.int32)
    h = jnp.tanh(jax.lax.ragged_dot(X, p["w"], sizes))
    return squares(jax.lax.ragged_dot(h, p["last"], sizes))


@program(w=(D, 6), v=(6, 6), last=(6, 2))
def cond_with_a_layer(p):
    h = jnp.tanh(X @ p["w"])
    h = jax.lax.cond(jnp.sum(X) > -100, lambda w, h: jnp.sin(h @ w), lambda w, h: h, p["v"], h)
    return squares(h @ p["last"])


@jax.custom_jvp
def spike(v):
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _spike_jvp(primals, tangents):
    return spike(*primals), tangents[0] / (1 + jnp.abs(primals[0])) ** 2


@program(w=(D, 6), v=(6, 6), last=(6, 2))
def custom_jvp(p):
    return squares(spike(spike(X @ p["w"]) @ p["v"]) @ p["last"])


@jax.custom_vjp
def soft(x):
    return jnp.logaddexp(x, 0)


soft.defvjp(lambda x: (soft(x), x), lambda x, g: (g * jax.nn.sigmoid(x),))


@program(w=(D, 6), v=(6, 6), last=(6, 2))
def custom_vjp(p):
    return squares(soft(soft(X @ p["w"]) @ p["v"]) @ p["last"])


@program(w=(D, 6), scale=(6,), v=(6, 6), last=(6, 2))
def batch_normalisation(p):
    def normalised(h):
        return (h - jnp.mean(h, axis=0)) / jnp.sqrt(jnp.var(h, axis=0) + 0.1)

    h = jnp.tanh(normalised(X @ p["w"]) * p["scale"])
    return squares(jnp.tanh(normalised(h @ p["v"])) @ p["last"])


@program(q=(D, 4), k=(D, 4), v=(D, 4), o=(4, 6), last=(6, 2))
def attention(p):
    q, k, v = (TOKENS @ p[name] for name in "qkv")
    mixed = jax.nn.softmax(jnp.einsum("btd,bsd->bts", q, k)) @ v
    return squares(jnp.mean(jnp.tanh(mixed @ p["o"]), axis=1) @ p["last"])


@program(w=(D, 6), v=(6, 6), last=(6, 2))
def linear_solve(p):
    h = jnp.tanh(X @ p["w"]).T
    return squares(jnp.tanh(jnp.linalg.solve(2 * jnp.eye(6) + 0.3 * p["v"], h)).T @ p["last"])


@program(table=(4, D), w=(D, D))
def tied_embedding(p):
    h = jnp.tanh((p["table"][IDS] + POSITIONS) @ p["w"])
    logp = jax.nn.log_softmax(h @ p["table"].T)
    chosen = jnp.take_along_axis(logp, IDS[:, ::-1, None], axis=-1)[..., 0]
    return fg.Losses([-jnp.mean(chosen, axis=1)], [("example",)])


def two_layers(p):
    return jnp.tanh(jnp.tanh(X @ p["w"]) @ p["v"])


@program(w=(D, 6), v=(6, 6), last=(6, 2))
def output_layer_divided_by_a_number(p):
    return squares(two_layers(p) @ (p["last"] / jnp.sqrt(6)))


@program(w=(D, 6), v=(6, 6), last=(6, 2))
def masked_output_layer(p):
    return squares(two_layers(p) @ jnp.where(jnp.arange(12).reshape(6, 2) % 3, p["last"], 0))


@program(w=(D, 6), v=(6, 6), A=(6, 2), B=(2, 2))
def merged_adapter_in_the_output_layer(p):
    return squares(two_layers(p) @ (0.5 * jnp.ones((6, 2)) + p["A"] @ p["B"]))


@program(w=(D, 6), v=(6, 6), gain=(2,), last=(6, 2))
def weight_normalised_output_layer(p):
    matrix = p["gain"] * p["last"] / jnp.sqrt(jnp.sum(p["last"] ** 2, axis=0))
    return squares(two_layers(p) @ matrix)


@program(w=(D, 6), v=(6, 6), last=(6, 2), more=(6, 2))
def output_layer_of_a_sum(p):
    return squares(two_layers(p) @ (p["last"] + p["more"]))


def changed(name, **options):
    PROGRAMS[name] = dataclasses.replace(PROGRAMS[name], **options)


changed("tied embedding", last=(), zeroed=("table",))
changed(
    "merged adapter in the output layer",
    last=("A", "B"),
    zeroed=(),
    cancelled={"A": 0.5 * jnp.ones((6, 2)), "B": -0.5 * jnp.ones((2, 2))},
)
changed("weight normalised output layer", last=("gain", "last"), zeroed=("gain",))
changed("output layer of a sum", last=("last", "more"), zeroed=("last", "more"))
# `vmap` of `ragged_dot`'s derivative is not implemented in JAX.
changed("ragged dot", batched=False)
for name, network in NETWORKS.items():
    params, x, y = network.make(0)
    last = network.heads + network.head_biases
    fun = functools.partial(lambda network, x, y, p: network.losses(p, x, y), network, x, y)
    PROGRAMS[name] = Program(fun, params, last, network.heads)

ALL = pytest.mark.parametrize("name", PROGRAMS)
FEEDBACK = {"fa": fg.FeedbackAlignment(), "dfa": fg.DirectFeedbackAlignment()}
RANDOM = {"fg-a": fg.ActivityPerturbation(), "fg-w": fg.WeightPerturbation(exact_last=True)}
BY_RANDOM = pytest.mark.parametrize("estimator", RANDOM)


@functools.partial(jit, static_argnums=0)
def exact(name, params):
    return jax.grad(lambda p: PROGRAMS[name].fun(p).total())(params)


@functools.cache
def estimates(name, estimator):
    """The gradients for all keys, and the exact one. Skips where the estimator refuses."""
    found = PROGRAMS[name]
    gradient = fg.value_and_grad(found.fun, estimator)
    over = jax.vmap if found.batched else lambda f: functools.partial(jax.lax.map, f)
    drawn = jit(over(lambda key: gradient(found.params, key=key)[1]))(KEYS)
    drawn = {parameter: np.asarray(grads, float) for parameter, grads in drawn.items()}
    return drawn, jax.tree.map(np.asarray, exact(name, found.params))


def drawn(name, estimator):
    try:
        return estimates(name, estimator)
    except fg.InputError as error:
        pytest.skip(f"refused: {error}")


@ALL
def test_backpropagation_is_blind_where_the_output_weights_are_zero(name):
    """What the next test needs to mean anything."""
    found = PROGRAMS[name]
    grads = exact(name, found.blind())
    assert found.hidden()
    assert not any(np.any(grads[hidden]) for hidden in found.hidden())


@ALL
@pytest.mark.parametrize("estimator", FEEDBACK)
def test_feedback_reaches_every_hidden_parameter_or_is_refused(name, estimator):
    found = PROGRAMS[name]
    step = jit(fg.value_and_grad(found.fun, FEEDBACK[estimator]))
    try:
        _, grads = step(found.blind())
    except fg.InputError as error:
        pytest.skip(f"refused: {error}")
    assert [n for n in found.hidden() if not np.any(grads[n])] == [], "silently backpropagation"


@ALL
@BY_RANDOM
def test_perturbations_leave_noise_on_every_hidden_parameter_or_are_refused(name, estimator):
    grads, right = drawn(name, RANDOM[estimator])
    silent = [
        n for n in PROGRAMS[name].hidden() if np.min(_cosines(grads[n][:5], right[n])) > 0.999
    ]
    assert silent == [], "silently backpropagation"


def _cosines(rows, right):
    """Of each row with what is right; of a zero row, as no noise, one."""
    rows, right = rows.reshape(len(rows), -1), right.ravel()
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(right)
    return np.where(norms > 0, rows @ right / np.where(norms > 0, norms, 1), 1)


@ALL
@BY_RANDOM
def test_output_layers_are_exact(name, estimator):
    grads, right = drawn(name, RANDOM[estimator])
    for last in PROGRAMS[name].last:
        scale = np.max(np.abs(right[last]))
        expected = np.broadcast_to(right[last] / scale, (5, *right[last].shape))
        np.testing.assert_allclose(grads[last][:5] / scale, expected, atol=1e-4)


@pytest.mark.slow
@ALL
@pytest.mark.parametrize("estimator", [*RANDOM, "fg-w, no layer exact"])
def test_unbiased_or_refused(name, estimator):
    """The mean over keys is the gradient, within five standard errors of every entry."""
    grads, right = drawn(name, RANDOM.get(estimator, fg.WeightPerturbation()))
    for parameter, of_parameter in grads.items():
        error = of_parameter.std(0) / np.sqrt(len(KEYS))
        off = np.abs(of_parameter.mean(0) - right[parameter])
        slack = 1e-5 * np.max(np.abs(right[parameter])) + 1e-7
        assert np.all(off <= 5 * error + slack), f"{parameter}: {np.max(off / (error + slack))}"


@pytest.mark.parametrize("estimator", [RANDOM["fg-a"], FEEDBACK["dfa"]], ids=["fg-a", "dfa"])
def test_the_axis_of_the_examples_is_found_where_losses_are_indexed(estimator):
    found = PROGRAMS["nll by index"]
    fg.value_and_grad(found.fun, estimator)(found.params, key=KEYS[0])


# Rules that do not compute the function by the function


@jax.custom_jvp
def quantised(z):
    return jnp.floor(4 * z) / 4


quantised.defjvp(lambda primals, tangents: (jnp.floor(4 * primals[0]) / 4, tangents[0]))


@jax.custom_vjp
def straight_through(z):
    return jnp.floor(4 * z) / 4


straight_through.defvjp(lambda z: (jnp.floor(4 * z) / 4, None), lambda _, error: (error,))


@pytest.mark.parametrize("rule", [quantised, straight_through])
@pytest.mark.parametrize("estimator", [*RANDOM.values(), FEEDBACK["dfa"]])
def test_an_output_layer_is_exact_by_the_rule_that_comes_after_it(rule, estimator):
    params = PROGRAMS["custom jvp"].params

    def fun(p):
        return squares(rule(two_layers(p) @ p["last"]))

    _, grads = fg.value_and_grad(fun, estimator)(params, key=KEYS[0])
    right = jax.grad(lambda p: fun(p).total())(params)
    np.testing.assert_allclose(grads["last"], right["last"], atol=1e-5)


@jax.custom_vjp
def product_without_a_gradient(x, w):
    return x @ w


product_without_a_gradient.defvjp(
    lambda x, w: (x @ w, w), lambda w, error: (error @ w.T, jnp.zeros_like(w))
)


def test_a_layer_has_the_derivative_of_its_own_rule():
    params = PROGRAMS["custom jvp"].params

    def fun(p):
        z = product_without_a_gradient(jnp.tanh(X @ p["w"]), p["v"])
        return squares(jnp.tanh(z) @ p["last"])

    _, grads = fg.value_and_grad(fun, fg.ActivityPerturbation())(params, key=KEYS[0])
    assert not np.any(grads["v"])


@pytest.mark.parametrize(
    "estimator", [fg.ActivityPerturbation(tangents=3, chunk=2), *RANDOM.values(), FEEDBACK["dfa"]]
)
def test_no_examples(estimator):
    params = PROGRAMS["custom jvp"].params

    def losses(p):
        out = jnp.tanh(X[:0] @ p["w"]) @ p["last"]
        return fg.Losses([jnp.sum(out**2, axis=1)], [("example",)])

    _, grads = fg.value_and_grad(losses, estimator)(params, key=KEYS[0])
    assert not any(np.any(g) for g in grads.values())


def a_solver(w, x, loop):
    """A fixed point of a layer, by a loop, with the derivative of its last iteration."""

    @jax.custom_jvp
    def solve(w, x):
        if loop == "while":
            return jax.lax.while_loop(
                lambda carry: carry[0] < 4,
                lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ w["state"] + x @ w["in"])),
                (0, jnp.zeros((B, D))),
            )[1]
        step = lambda z, _: (jnp.tanh(z @ w["state"] + x @ w["in"]), None)  # noqa: E731
        return jax.lax.scan(step, jnp.zeros((B, D)), None, length=4)[0]

    @solve.defjvp
    def rule(primals, tangents):
        z = solve(*primals)
        return z, jax.jvp(lambda w, x: jnp.tanh(z @ w["state"] + x @ w["in"]), primals, tangents)[1]

    return solve(w, x)


@pytest.mark.parametrize("loop", ["while", "scan"])
@pytest.mark.parametrize(
    "estimator",
    [fg.ActivityPerturbation(), fg.FeedbackAlignment(), fg.DirectFeedbackAlignment()],
    ids=repr,
)
def test_layers_of_a_loop_are_not_taken_for_one(estimator, loop):
    """Inside of a function with a rule of its own, what goes around leads from layer to layer."""
    w = {"state": normal(D, D), "in": normal(D, D)}

    def fun(w):
        return fg.Losses([jnp.sum(a_solver(w, X, loop) ** 2, axis=1)], [("example",)])

    with pytest.raises(fg.InputError, match=r"layer by layer, and .* at .*test_not"):
        fg.value_and_grad(fun, estimator)(w, key=jax.random.key(0))


def test_data_that_are_mixed_before_a_loss_sees_them_are_data():
    """Every loss depends on every example's layers, as it does on what a weight is made with."""
    w = {"first": normal(D, 6), "second": normal(6, 3), "last": normal(3)}

    def fun(w):
        h = jnp.tanh(jnp.sort(X @ w["first"], axis=0))
        h = jnp.tanh(jnp.sort(h @ w["second"], axis=0))
        return fg.Losses([(jnp.sort(h @ w["last"]) - X[:, 0]) ** 2], [("example",)])

    exact = jax.grad(lambda w: fun(w).total())(w)
    estimate = jit(lambda key: fg.value_and_grad(fun, fg.ActivityPerturbation())(w, key=key)[1])
    estimates = jax.vmap(estimate)(KEYS)
    np.testing.assert_allclose(estimates["last"][0], exact["last"], rtol=1e-4, atol=1e-5)
    for name in ("first", "second"):
        error = jnp.mean(estimates[name], 0) - exact[name]
        spread = jnp.std(estimates[name], 0) / len(KEYS) ** 0.5
        assert jnp.all(spread > 0)
        assert jnp.all(abs(error) < 5 * spread)
    fed_back = fg.value_and_grad(fun, fg.FeedbackAlignment())(w)[1]
    assert not jnp.allclose(fed_back["first"], exact["first"], rtol=0.01)
    with pytest.raises(fg.InputError, match="needs the axis of the examples"):
        fg.value_and_grad(fun, fg.DirectFeedbackAlignment())(w)


def test_a_constant_that_a_weight_is_made_with_is_no_data():
    """A projection of a weight is not a layer: what comes of it is a weight of one."""
    w, projection = {"first": normal(D, 6), "last": normal(6)}, normal(D, D)

    def fun(w, project):
        out = jnp.tanh(X @ project(w["first"])) @ w["last"]
        return fg.Losses([(out - X[:, 0]) ** 2], [("example",)])

    for estimator in (fg.ActivityPerturbation(), fg.FeedbackAlignment()):
        step = fg.value_and_grad(lambda w: fun(w, lambda v: projection @ v), estimator)
        made = fg.value_and_grad(lambda w: fun(w, lambda v: v), estimator)
        key = jax.random.key(0)
        there = made({**w, "first": projection @ w["first"]}, key=key)[1]["first"]
        np.testing.assert_allclose(
            step(w, key=key)[1]["first"], projection.T @ there, rtol=1e-4, atol=1e-5
        )


def test_errors_do_not_come_back_by_the_matrix_of_a_linear_system():
    found = PROGRAMS["linear solve"]
    with pytest.raises(fg.InputError, match="no feedback weight for custom_linear_solve"):
        fg.value_and_grad(found.fun, fg.FeedbackAlignment())(found.params)
    for estimator in (fg.ActivityPerturbation(), fg.DirectFeedbackAlignment()):
        fg.value_and_grad(found.fun, estimator)(found.params, key=KEYS[0])


def two_layers_by_refs(p):
    kept, rest = jax.new_ref(jnp.tanh(X @ p["w"])), jax.new_ref(jnp.zeros((B, 6)))

    def step(i, total):
        rest[...] += 0.5 * kept[...]
        return total + jnp.sum(kept[0])

    total = jax.lax.fori_loop(0, 2, step, 0.0)
    return jnp.sum((jnp.tanh(rest[...] @ p["v"]) @ p["last"] - 1) ** 2) + total


@pytest.mark.parametrize("tangents", [1, 3])
def test_what_is_read_from_a_ref_depends_on_what_was_written(tangents):
    w = PROGRAMS["custom jvp"].params

    def plain(p):
        h = jnp.tanh(X @ p["w"])
        out = jnp.tanh(h @ p["v"]) @ p["last"]
        return jnp.sum((out - 1) ** 2) + 2 * jnp.sum(h[0])

    for estimator in (fg.WeightPerturbation(tangents=tangents), fg.FeedbackAlignment()):
        of_both = [
            jax.jit(fg.value_and_grad(fun, estimator))(w, key=KEYS[0])[1]
            for fun in (two_layers_by_refs, plain)
        ]
        for a, b in zip(*map(jax.tree.leaves, of_both), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_bad_input_with_refs():
    w = PROGRAMS["custom jvp"].params
    for estimator in RANDOM.values():
        with pytest.raises(fg.InputError, match=r"does not have where fun uses a jax\.Ref"):
            fg.value_and_grad(two_layers_by_refs, estimator)(w, key=KEYS[0])

    def kept(p):
        return two_layers_by_refs({**p, "v": jax.new_ref(p["v"])[...]})

    with pytest.raises(fg.InputError, match=r"that is written to a jax\.Ref at .*test_"):
        fg.value_and_grad(kept, fg.FeedbackAlignment())(w)


FROZEN, ORDER = normal(6, 6), jnp.array([2, 0, 3, 1])
ADAPTED = {
    "a base among the arguments": lambda p, base: base + p["A"] @ p["B"],
    "a base among the arguments, cast": lambda p, base: 2 * (base + p["A"] @ p["B"]).T,
    "a frozen factor": lambda p, base: FROZEN + base[:, :2] @ p["B"],
    "examples in another order": lambda p, base: FROZEN + p["A"] @ p["B"],
    "the unit matrix": lambda p, base: jnp.eye(6) + p["A"] @ p["B"],
    "a projection": lambda p, base: FROZEN @ p["A"] @ p["B"],
}


@pytest.mark.parametrize("estimator", FEEDBACK.values())
@pytest.mark.parametrize("name", ADAPTED)
def test_what_may_be_a_weight_is_not_taken_for_data(name, estimator):
    """Feedback would come by the real weight, if what a parameter meets were taken for data."""
    w = {"w": normal(D, 6), "A": normal(6, 2), "B": normal(2, 6), "last": normal(6, 2)}
    given = "base" in name or "factor" in name

    def fun(p, base, x):
        h = jnp.tanh(jnp.tanh(x @ p["w"]) @ ADAPTED[name](p, base))
        losses = squares((h if given else h[ORDER]) @ p["last"])
        return losses.total() if given else losses

    with pytest.raises(fg.InputError, match=r"cannot tell whether dot_general|needs (a|the) "):
        fg.value_and_grad(fun, estimator)(w, FROZEN, X)
