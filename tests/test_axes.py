"""The claims of `NamedAxes`, held against the sparsity of the Jacobian.

A place that is claimed and not mixed says that a loss has no derivative by entries elsewhere. An
axis that is claimed and does not hold would be a bias, without a word.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import forwardgrad as fg
from forwardgrad.rewrite import Hooks, Place
from forwardgrad.rewrite import Program as Rewritten
from forwardgrad.rewrite._trace import evaluate, is_inexact

Claims = dict[tuple[str, int, str], Place]


# Claims and what they say


def allowed(place: Place, size: int, shape: Sequence[int], value: Callable) -> np.ndarray:
    """Which entries of an array may have a derivative of which loss: `[size, *shape]`."""
    if place.mixed or place.parts is None:
        return np.ones((size, *shape), bool)
    grid = np.indices(tuple(shape))
    index = np.zeros(tuple(shape), int)
    for part in place.parts:
        digit = grid[part.axis] // part.inner % part.size
        if part.through is not None:
            digit = np.asarray(value(part.through)).reshape(-1)[grid[part.axis]]
        index = index * part.size + digit
    return np.arange(size).reshape(-1, *[1] * len(shape)) == index


def jacobian_by_reverse_mode(fun):
    """As `jax.jacrev`, without `vmap`, which some primitives refuse."""

    def jacobian(shifts):
        outs, pullback = jax.vjp(fun, shifts)
        entries, unravel = ravel_pytree(outs)
        rows = jax.lax.map(
            lambda entry: pullback(unravel(entry))[0], jnp.eye(entries.size, dtype=entries.dtype)
        )
        ends = np.cumsum([out.size for out in outs])
        return [
            [row[end - out.size : end].reshape(*out.shape, *row.shape[1:]) for row in rows]
            for out, end in zip(outs, ends, strict=True)
        ]

    return jacobian


def check(fun: Callable, params: Any, forward: bool = True, loops: bool = False) -> Claims:
    """Hold all claims about a function's program against its Jacobian; returns them.

    Everything that a program computes outside of loops is made an input, by a shift that is added;
    the activations in loops are as well.
    """
    program = Rewritten(lambda p: (fun(p), None), params, forward=forward)
    plan = program.plan
    jaxpr, consts = program._closed.jaxpr, program._closed.consts
    variables = [v for v in jaxpr.invars if v.aval.size]
    variables += [v for eqn in jaxpr.eqns for v in eqn.outvars if is_inexact(v) and v.aval.size]
    activations = [v for v in plan.outputs if is_inexact(v) and v not in variables]
    numbers = {plan.outputs[v].number: i for i, v in enumerate(activations)}

    def run(shifts):
        shifts = dict(zip(variables, shifts, strict=True))
        env = dict(zip(jaxpr.constvars, consts, strict=True))

        def write(names, values):
            for v, value in zip(names, values, strict=True):
                env[v] = value + shifts[v] if v in shifts else value

        write(jaxpr.invars, program.leaves)
        for eqn in jaxpr.eqns:
            ins = [a.val if isinstance(a, Literal) else env[a] for a in eqn.invars]
            write(eqn.outvars, evaluate(eqn, ins))
        return [a.val if isinstance(a, Literal) else env[a] for a in jaxpr.outvars][: program.terms]

    def in_loops(shifts):
        noted = []

        def shifted(a):
            noted.append(a)
            if a.number not in numbers:
                return a.value
            own = shifts[numbers[a.number]]
            for i in a.iterations:
                own = jax.lax.dynamic_index_in_dim(own, i, keepdims=False)
            return a.value + own

        terms, _, _ = program.with_hooks(program.leaves, Hooks(activation=shifted))
        places.update({a.number: a.places for a in noted})
        return terms

    places: dict[int, Any] = {}
    losses = program.losses([None] * program.terms)
    axes = losses.axes if isinstance(losses, fg.Losses) else ((),)
    shapes = [(*plan.outputs[v].loops, *v.aval.shape) for v in activations]
    jacobian = jax.jacfwd if loops else jacobian_by_reverse_mode

    def zeros(shapes, of):
        return [np.zeros(s, jnp.finfo(v.aval.dtype).dtype) for s, v in zip(shapes, of, strict=True)]

    found = jax.jit(jacobian(run))(zeros([v.aval.shape for v in variables], variables))
    claims: Claims = {}
    failures = []

    def hold(name, known, of_terms, shape):
        for term, names in enumerate(axes):
            derivative = np.abs(np.asarray(of_terms[term]))
            entries = derivative.shape[: len(names)]
            slack = 1e-6 * max(1.0, float(derivative.max(initial=0)))
            if not any(t == term for t, _ in known):
                if np.any(derivative > slack):
                    failures.append(f"{name} changes term {term}")
                continue
            for axis, label in enumerate(names):
                place = known[term, label]
                claims[name, term, label] = place
                others = tuple(i for i in range(len(names)) if i != axis)
                own = derivative.max(axis=others, initial=0)
                may = allowed(place, entries[axis], shape, plan.flow.value)
                if names.count(label) == 1 and np.any(own[~may] > slack):
                    failures.append(f"{name}: {label} of term {term} is not at {place}")

    for i, v in enumerate(variables):
        made = next((e.primitive.name for e in jaxpr.eqns if v in e.outvars), "input")
        name = f"{i} {made}{list(v.aval.shape)}"
        hold(name, plan.places(v), [t[i] for t in found], v.aval.shape)
    if activations:
        found = jax.jit(jacobian(in_loops))(zeros(shapes, activations))
        for i, (v, shape) in enumerate(zip(activations, shapes, strict=True)):
            known = places.get(plan.outputs[v].number)
            if known is None:
                continue
            depth = len(plan.outputs[v].loops)
            known = {
                key: Place(
                    place.parts and tuple(p._replace(axis=p.axis + depth) for p in place.parts),
                    place.mixed,
                )
                for key, place in known
            }
            hold(f"in a loop {i} {list(shape)}", known, [t[i] for t in found], shape)
    assert not failures, "\n".join(failures)
    return claims


# Operations on h of shape [example, token, unit], with a weight of shape [unit, unit]

B, T, D = 2, 3, 4
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


OPERATIONS: dict[str, Callable] = {}


def operation(fun):
    """Add `fun(h, w)`, which keeps the shape, to the operations."""
    OPERATIONS[fun.__name__.replace("_", " ").strip()] = fun
    return fun


def operations(**named):
    OPERATIONS.update({name.replace("_", " "): fun for name, fun in named.items()})


def conv(h, kernel, spec=("NTC", "TIO", "NTC"), padding="SAME", **options):
    return jax.lax.conv_general_dilated(h, kernel, (1,), padding, dimension_numbers=spec, **options)


def window(h, computation, init, size, padding="SAME", **options):
    return jax.lax.reduce_window(h, init, computation, size, (1, 1, 1), padding, **options)


def flat(fun):
    return lambda h, w: fun(h.reshape(-1, D), w).reshape(h.shape)


def by_segments(ids, n):
    def fun(h, w):
        total = jax.ops.segment_sum(h @ w, jnp.asarray(ids)[: len(h)], num_segments=len(h))
        return total + 0.1 * h

    return fun


def spd(h):
    return jnp.einsum("btd,bsd->bts", h, h) + 3 * jnp.eye(h.shape[1])


operations(
    product=lambda h, w: jnp.tanh(h @ w),
    merged=flat(lambda h, w: jnp.tanh(h @ w)),
    merged_tokens_first=lambda h, w: (
        jnp.tanh(h.transpose(1, 0, 2).reshape(-1, D) @ w)
        .reshape(h.shape[1], -1, D)
        .transpose(1, 0, 2)
    ),
    wrongly_split=lambda h, w: jnp.tanh(h.transpose(1, 0, 2).reshape(h.shape) @ w),
    merged_with_units=lambda h, w: jnp.sin(h.reshape(len(h), -1)).reshape(h.shape) @ w,
    all_merged=lambda h, w: jnp.sin(h.ravel()).reshape(h.shape) @ w,
    split_units=lambda h, w: jnp.einsum(
        "btkj,kj->btkj", h.reshape(*h.shape[:2], 2, -1), w[:2, : D // 2]
    ).reshape(h.shape),
    heads=lambda h, w: jnp.einsum(
        "bkts,bskj->btkj",
        jax.nn.softmax(jnp.einsum("btkj,bskj->bkts", *[h.reshape(*h.shape[:2], 2, -1)] * 2)),
        (h @ w).reshape(*h.shape[:2], 2, -1),
    ).reshape(h.shape),
    broadcast=lambda h, w: h + jnp.mean(h, axis=1, keepdims=True) @ w,
    broadcast_examples=lambda h, w: h + jnp.mean(h, axis=0, keepdims=True) @ w,
    broadcast_one=lambda h, w: h + jnp.broadcast_to(h[:, :1], h.shape) @ w,
    layer_norm=lambda h, w: (
        (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-2) * w[0] + w[1]
    ),
    batch_norm=lambda h, w: (h - h.mean((0, 1))) / jnp.sqrt(h.var((0, 1)) + 1e-2) * w[0],
    rows=lambda h, w: h[jnp.arange(len(h))] @ w,
    rows_reversed=lambda h, w: h[jnp.arange(len(h))[::-1]] @ w,
    all_but_one=lambda h, w: h.at[0].set(0.0) @ w,
    pairs=lambda h, w: h @ w + h[jnp.arange(len(h)), jnp.zeros(len(h), int)][:, None],
    crossed_pairs=lambda h, w: h @ w + h[jnp.arange(len(h)) * 0, jnp.zeros(len(h), int)][:, None],
    token_pairs=lambda h, w: (
        h @ w + h[jnp.arange(len(h))[:, None], jnp.arange(h.shape[1])[None], 1][..., None]
    ),
    swapped_pairs=lambda h, w: (
        h @ w + h[jnp.arange(len(h))[:, None] * 0, jnp.arange(h.shape[1])[None], 1][..., None]
    ),
    along_axis=lambda h, w: (
        jnp.take_along_axis(h @ w, jnp.zeros((len(h), h.shape[1], 1), int), axis=-1) + h
    ),
    along_tokens=lambda h, w: (
        jnp.take_along_axis(h @ w, jnp.ones((len(h), 1, D), int) * (h.shape[1] > 1), axis=1) + h
    ),
    along_examples=lambda h, w: (
        jnp.take_along_axis(h @ w, jnp.zeros((1, h.shape[1], D), int), axis=0) + h
    ),
    data_rows=lambda h, w: h @ w + h[jnp.argmax(h[:, 0, 0])],
    segments=by_segments([0, 1, 1, 0], 2),
    segments_of_ones=by_segments([1, 1, 1, 1], 2),
    segments_in_order=by_segments(np.arange(9), 9),
    cumsum_tokens=lambda h, w: jnp.cumsum(h @ w, axis=1),
    cumsum_examples=lambda h, w: jnp.cumsum(h @ w, axis=0),
    cumsum_back=lambda h, w: jax.lax.cumsum(h @ w, axis=1, reverse=True),
    cummax=lambda h, w: jax.lax.cummax(h @ w, axis=1),
    cumlogsumexp=lambda h, w: jax.lax.cumlogsumexp(h @ w, axis=0),
    cumprod=lambda h, w: jnp.cumprod(h @ w, axis=2),
    sort_tokens=lambda h, w: jnp.sort(h @ w, axis=1),
    sort_examples=lambda h, w: jnp.sort(h @ w, axis=0),
    sort_units=lambda h, w: jnp.sort(h @ w, axis=2),
    sort_pairs=lambda h, w: sum(jax.lax.sort((h @ w, h), dimension=1)),
    top_k=lambda h, w: h @ w + jax.lax.top_k(h, 1)[0],
    flip_examples=lambda h, w: jnp.flip(h, 0) @ w,
    flip_tokens=lambda h, w: jnp.flip(h, 1) @ w,
    flip_units=lambda h, w: jnp.flip(h, 2) @ w,
    roll_examples=lambda h, w: jnp.roll(h, 1, 0) @ w,
    roll_tokens=lambda h, w: jnp.roll(h, 1, 1) @ w,
    fft_units=lambda h, w: jnp.fft.ifft(jnp.fft.fft(h) * w[0]).real,
    fft_tokens=lambda h, w: jnp.fft.irfft(
        jnp.fft.rfft(h, axis=1) * (w[0] + 1j), n=h.shape[1], axis=1
    ),
    fft_examples=lambda h, w: jnp.fft.fft(h @ w, axis=0).real,
    fft_of_two=lambda h, w: jnp.fft.fft2(h @ w).imag,
    fft_of_three=lambda h, w: jnp.fft.fftn(h @ w).real,
    cholesky=lambda h, w: jnp.linalg.cholesky(spd(h)) @ h @ w,
    solve=lambda h, w: jnp.linalg.solve(spd(h), h @ w),
    solve_by_a_weight=lambda h, w: jnp.linalg.solve(
        3 * jnp.eye(D) + w, h.reshape(-1, D).T
    ).T.reshape(h.shape),
    solve_by_iterations=lambda h, w: jax.vmap(
        lambda x: jax.scipy.sparse.linalg.cg(lambda z: z @ w @ w.T + 9 * z, x)[0]
    )(h),
    triangular=lambda h, w: jax.lax.linalg.triangular_solve(
        jnp.linalg.cholesky(spd(h)), h @ w, left_side=True, lower=True
    ),
    inverse=lambda h, w: jnp.linalg.inv(spd(h)) @ (h @ w),
    eigenvalues=lambda h, w: (
        (h @ w) * jnp.linalg.eigvalsh(spd(h) + jnp.diag(jnp.arange(h.shape[1])))[..., None]
    ),
    determinant=lambda h, w: h @ w * jnp.linalg.det(spd(h))[:, None, None] / 100,
    qr=lambda h, w: (
        jnp.linalg.qr(h.swapaxes(1, 2) + jnp.eye(D)[:, : h.shape[1]])[0].swapaxes(1, 2) @ w
    ),
    conv_one=lambda h, w: conv(h, w[None]),
    conv_three=lambda h, w: conv(h, jnp.stack([w, w.T, 2 * w])),
    conv_by_channel=lambda h, w: conv(h, w[:3, None], feature_group_count=D),
    conv_tokens_first=lambda h, w: conv(h, w[None], ("TNC", "TIO", "TNC")),
    conv_strided_one=lambda h, w: conv(h, w[None], padding=[(1, -1)]),
    conv_dilated=lambda h, w: conv(h, jnp.stack([w, w]), padding=[(2, 0)], rhs_dilation=(2,)),
    max_pool=lambda h, w: window(h @ w, jax.lax.max, -jnp.inf, (1, 2, 1)),
    sum_pool_examples=lambda h, w: window(h @ w, jax.lax.add, 0.0, (2, 1, 1)),
    pool_units=lambda h, w: window(h @ w, jax.lax.add, 0.0, (1, 1, 3)),
    dilated_pool=lambda h, w: window(
        h @ w, jax.lax.add, 0.0, (1, 2, 1), ((0, 0), (2, 0), (0, 0)), window_dilation=(1, 2, 1)
    ),
    shifted_window=lambda h, w: window(
        h @ w, jax.lax.add, 0.0, (1, 1, 1), ((0, 0), (1, -1), (0, 0))
    ),
    odd_reducer=lambda h, w: (
        h @ w + jax.lax.reduce(h, np.float32(0), lambda a, b: a + b + 0.1 * a * b, (2,))[..., None]
    ),
    odd_reducer_over_examples=lambda h, w: (
        h @ w + jax.lax.reduce(h, np.float32(0), lambda a, b: a + b + 0.1 * a * b, (0,))
    ),
    product_over_tokens=lambda h, w: h @ w + jnp.prod(h, axis=1, keepdims=True),
    maximum_over_examples=lambda h, w: h @ w + jnp.max(h, axis=0),
    log_sum_exp=lambda h, w: h @ w + jax.nn.logsumexp(h, axis=1, keepdims=True),
    sliced_and_joined=lambda h, w: jnp.concatenate([h[:, :1] @ w, h[:, 1:]], axis=1),
    joined_units=lambda h, w: jnp.concatenate([h[..., :1], (h @ w)[..., 1:]], axis=2),
    joined_examples=lambda h, w: jnp.concatenate([h[:1] @ w, h[1:]], axis=0),
    joined_and_cut=lambda h, w: jnp.concatenate([h @ w, h], axis=0)[len(h) :],
    joined_and_summed=lambda h, w: jnp.concatenate([h @ w, h], axis=0).reshape(2, *h.shape).sum(0),
    joined_wrongly=lambda h, w: jnp.concatenate([h @ w, h], axis=0).reshape(*h.shape, 2).sum(-1),
    stacked=lambda h, w: jnp.stack([h @ w, h], axis=0).prod(0),
    stacked_last=lambda h, w: jnp.stack([h @ w, h], axis=-1).prod(-1),
    padded=lambda h, w: jnp.pad(h, ((0, 0), (1, 0), (0, 0)))[:, :-1] @ w,
    padded_inside=lambda h, w: jax.lax.pad(h, 0.0, ((0, 0, 0), (0, 0, 1), (0, 0, 0)))[:, ::2] @ w,
    padded_negative=lambda h, w: jax.lax.pad(h, 0.0, ((1, -1, 0), (0, 0, 0), (0, 0, 0))) @ w,
    padded_by=lambda h, w: jax.lax.pad(h @ w, h.sum(), ((0, 0, 0), (1, -1, 0), (0, 0, 0))),
    dynamic=lambda h, w: (
        jax.lax.dynamic_slice_in_dim(jnp.concatenate([h, h], 1), 1, h.shape[1], 1) @ w
    ),
    dynamic_whole=lambda h, w: jax.lax.dynamic_slice_in_dim(h, 0, h.shape[1], 1) @ w,
    updated=lambda h, w: jax.lax.dynamic_update_slice(h @ w, h[:, :1], (0, h.shape[1] - 1, 0)),
    updated_examples=lambda h, w: jax.lax.dynamic_update_slice(h @ w, h[:1], (len(h) - 1, 0, 0)),
    split=lambda h, w: sum(jnp.split(h @ w, 2, axis=2)).repeat(2, axis=2),
    split_whole=lambda h, w: jax.lax.split(h @ w, [h.shape[1]], axis=1)[0],
    set_at=lambda h, w: (h @ w).at[:, 0].set(h[:, -1]),
    set_an_example=lambda h, w: (h @ w).at[0].set(h[-1]),
    added_at=lambda h, w: (h @ w).at[:, jnp.zeros(h.shape[1], int)].add(h),
    multiplied_at=lambda h, w: (h @ w).at[jnp.arange(len(h))].multiply(h, unique_indices=True),
    least_at=lambda h, w: (h @ w).at[::-1].min(h),
    one_hot=lambda h, w: jnp.einsum("bs,stu->btu", jnp.eye(len(h))[::-1], h @ w),
    outer=lambda h, w: jnp.einsum("btd,bsd->bts", h @ w, h) @ h,
    examples_by_examples=lambda h, w: h @ w + jnp.einsum("btd,ctd,cse->bse", h, h, h),
    kron=lambda h, w: h * jnp.kron(h[..., :2], jnp.ones(2)) @ w,
    repeated=lambda h, w: jnp.repeat(h[:, :1], h.shape[1], axis=1) * h @ w,
    repeated_examples=lambda h, w: jnp.repeat(h[:1], len(h), axis=0) * h @ w,
    tiled=lambda h, w: jnp.tile(h, (2, 1, 1))[: len(h)] @ w,
    rounded=lambda h, w: h @ w + jnp.round(jnp.flip(h, 0)),
    stopped=lambda h, w: h @ w + jax.lax.stop_gradient(jnp.flip(h, 0)),
    detour=lambda h, w: h @ w * jax.lax.stop_gradient(jnp.mean(h)),
    where=lambda h, w: jnp.where(h > 0, h @ w, jnp.mean(h)),
    clamped=lambda h, w: jnp.clip(h @ w, jnp.min(h), 3.0),
    barrier=lambda h, w: jax.lax.optimization_barrier((h @ w, jnp.flip(h, 0)))[0],
    rng=lambda h, w: h @ w * jax.random.bernoulli(jax.random.key(0), 0.7, h.shape),
    checkpoint=lambda h, w: jax.checkpoint(lambda h: jnp.sin(h @ w))(h),
    jit=lambda h, w: jax.jit(lambda h: jnp.sin(h[::-1] @ w))(h),
    vmapped=lambda h, w: jax.vmap(lambda x: jnp.tanh(x @ w) + x.mean(0))(h),
    vmapped_inside=lambda h, w: jax.vmap(lambda x: jnp.tanh(x @ w) + x.mean(0), 1, 1)(h),
    vmapped_out_elsewhere=lambda h, w: jax.vmap(lambda x: jnp.tanh(x @ w), 0, 1)(h).swapaxes(0, 1),
    mapped=lambda h, w: jax.lax.map(lambda x: jnp.tanh(x @ w) + x.mean(0), h),
    mapped_in_batches=lambda h, w: jax.lax.map(lambda x: jnp.tanh(x @ w), h, batch_size=2),
    mapped_tokens=lambda h, w: jax.lax.map(
        lambda x: jnp.tanh(x @ w) + x.mean(0), h.swapaxes(0, 1)
    ).swapaxes(0, 1),
    mapped_twice=lambda h, w: jax.lax.map(
        lambda x: jax.lax.map(lambda y: jnp.tanh(y @ w) + y[0], x), h
    ),
    associative=lambda h, w: jax.lax.associative_scan(lambda a, b: 0.5 * a + b, h @ w, axis=1),
    associative_examples=lambda h, w: jax.lax.associative_scan(jnp.add, h @ w, axis=0),
)


@operation
def causal(h, w):
    scores = jnp.einsum("btd,bsd->bts", h @ w, h)
    mask = jnp.tril(jnp.ones(scores.shape[1:], bool))
    return jax.nn.softmax(jnp.where(mask, scores, -1e9)) @ h


@operation
def layers_in_a_loop(h, w):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, jnp.stack([w, 2 * w]))[0]


@operation
def moving_layers(h, w):
    step = lambda h, w: (jnp.tanh(jnp.flip(h, 1) @ w), jnp.sum(h, axis=2))  # noqa: E731
    h, sums = jax.lax.scan(step, h, jnp.stack([w, 2 * w]))
    return h + jnp.sum(sums, axis=0)[..., None]


@operation
def mixing_in_the_second_iteration(h, w):
    def step(carry, w):
        a, b = carry
        return (jnp.tanh(a @ w) + b, jnp.flip(a, 0)), None

    return jax.lax.scan(step, (h, 0 * h), jnp.stack([w, w, w]))[0][0]


@operation
def over_time(h, w):
    def step(s, x):
        s = jnp.tanh(s @ w + x)
        return s, s

    return jnp.swapaxes(jax.lax.scan(step, h[:, 0], jnp.swapaxes(h, 0, 1))[1], 0, 1)


@operation
def backwards_over_time(h, w):
    def step(s, x):
        s = jnp.tanh(s @ w + x)
        return s, s

    return jnp.swapaxes(jax.lax.scan(step, h[:, 0], jnp.swapaxes(h, 0, 1), reverse=True)[1], 0, 1)


@operation
def over_examples_with_a_memory(h, w):
    def step(s, x):
        return s + jnp.mean(x), jnp.tanh(x @ w) + s

    return jax.lax.scan(step, jnp.mean(h), h)[1]


@operation
def memory_of_examples_only(h, w):
    def step(s, x):
        return s + jnp.mean(x), jnp.tanh(x @ w)

    s, out = jax.lax.scan(step, jnp.mean(h), h)
    return out + s


@operation
def layers_over_examples(h, w):
    def layer(h, w):
        return jax.lax.map(lambda x: jnp.tanh(x @ w), h), None

    return jax.lax.scan(layer, h, jnp.stack([w, 2 * w]))[0]


@operation
def examples_over_layers(h, w):
    def one(x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, jnp.stack([w, 2 * w]))[1].sum(0)

    return jax.lax.map(one, h)


@operation
def loop_that_uses_all_examples(h, w):
    return jax.lax.map(lambda i: jnp.tanh(h[i] @ w) + h[-1], jnp.arange(len(h)))


@operation
def loop_by_number(h, w):
    return jax.lax.map(lambda i: jnp.tanh(h[i] @ w), jnp.arange(len(h)))


@operation
def while_loop(h, w):
    return jax.lax.fori_loop(0, jnp.int32(h[0, 0, 0] > -9) + 1, lambda i, h: jnp.tanh(h @ w), h)


@operation
def while_loop_that_mixes(h, w):
    body = lambda i, h: jnp.tanh(jnp.roll(h, 1, 0) @ w)  # noqa: E731
    return jax.lax.fori_loop(0, jnp.int32(h[0, 0, 0] > -9) + 1, body, h)


@operation
def branches(h, w):
    return jax.lax.cond(h[0, 0, 0] > 0, lambda: jnp.tanh(h @ w), lambda: jnp.flip(h, 1))


@operation
def branches_for_each_example(h, w):
    one = lambda x: jax.lax.cond(x[0, 0] > 0, lambda: jnp.tanh(x @ w), lambda: x)  # noqa: E731
    return jax.vmap(one)(h)


@jax.custom_jvp
def plainly(h):
    return jnp.tanh(h)


plainly.defjvp(lambda p, t: (plainly(*p), t[0] * (1 - plainly(*p) ** 2)))


@jax.custom_jvp
def mixing_rule(h):
    return jnp.tanh(h)


mixing_rule.defjvp(lambda p, t: (mixing_rule(*p), t[0] - jnp.mean(t[0], axis=0)))


@jax.custom_jvp
def unmixing_rule(h):
    return h + jnp.mean(h, axis=0)


unmixing_rule.defjvp(lambda p, t: (unmixing_rule(*p), t[0]))


@jax.custom_vjp
def mixing_reverse(h):
    return jnp.tanh(h)


mixing_reverse.defvjp(lambda h: (jnp.tanh(h), None), lambda _, g: (g + jnp.flip(g, 1),))


@jax.custom_vjp
def reversed_gradient(h):
    return jnp.sin(h)


reversed_gradient.defvjp(lambda h: (jnp.sin(h), None), lambda _, g: (-g,))


@jax.custom_vjp
def normalised_gradient(h):
    return h


normalised_gradient.defvjp(lambda h: (h, None), lambda _, g: (g / jnp.sqrt(1e-3 + jnp.sum(g**2)),))

operations(
    custom_jvp=lambda h, w: plainly(h @ w),
    custom_jvp_that_mixes=lambda h, w: mixing_rule(h @ w),
    custom_jvp_that_does_not=lambda h, w: unmixing_rule(h @ w),
    custom_vjp=lambda h, w: reversed_gradient(h @ w),
    custom_vjp_that_mixes=lambda h, w: mixing_reverse(h @ w),
    custom_jvp_of_one=lambda h, w: jax.vmap(mixing_rule)(h @ w),
    custom_vjp_of_one=lambda h, w: jax.vmap(mixing_reverse, 1, 1)(h[..., None] * h[..., None, :])[
        ..., 0
    ],
    custom_in_a_loop=lambda h, w: jax.lax.map(mixing_rule, h @ w),
    relu=lambda h, w: jax.nn.relu(h @ w),
    max_pool_there_and_back=lambda h, w: jax.vjp(
        lambda h: window(h, jax.lax.max, -jnp.inf, (1, 2, 1)), h
    )[1](h @ w)[0],
    max_pool_of_examples_back=lambda h, w: jax.vjp(
        lambda h: window(h, jax.lax.max, -jnp.inf, (2, 1, 1)), h
    )[1](h @ w)[0],
    max_pool_forwards=lambda h, w: jax.jvp(
        lambda h: window(h, jax.lax.max, -jnp.inf, (1, 2, 1)), (h,), (h @ w,)
    )[1],
    least_pool=lambda h, w: window(h @ w, jax.lax.min, jnp.inf, (2, 1, 1)),
    unstacked=lambda h, w: sum(jnp.unstack(h, axis=1))[:, None] * h @ w,
    unstacked_examples=lambda h, w: sum(jnp.unstack(h, axis=0)) * h @ w,
    tiled_tokens=lambda h, w: h @ w + jnp.tile(h[:, :1], (1, h.shape[1], 1)),
    tiled_in_front=lambda h, w: h @ w + jnp.sum(jnp.tile(h, (2, 1, 1, 1)), axis=0),
    subtracted_at=lambda h, w: (h @ w).at[:, 0].subtract(h[:, -1]),
    greatest_at=lambda h, w: (h @ w).at[:, 0].max(h[:, -1]),
    set_segments=lambda h, w: (h @ w).at[jnp.arange(len(h))[::-1]].set(h),
    lu=lambda h, w: jax.lax.linalg.lu(spd(h))[0] @ h @ w,
    singular_values=lambda h, w: h @ w * jnp.linalg.svd(h, compute_uv=False)[:, :1, None],
    reshaped_by_two=lambda h, w: jax.lax.reshape(jax.lax.reshape(h @ w, (h.size // 2, 2)), h.shape),
    ragged=lambda h, w: jax.lax.ragged_dot(
        h.reshape(-1, D), jnp.stack([w, -w]), jnp.array([2, h.size // D - 2], jnp.int32)
    ).reshape(h.shape),
    ragged_by_data=lambda h, w: (
        h @ w
        + jax.lax.ragged_dot(
            jnp.ones((len(h), D)), h[:2, 0, :, None] * w, jnp.array([1, len(h) - 1], jnp.int32)
        )[:, None]
    ),
)


@operation
def sharded(h, w):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    one = lambda h, w: jnp.tanh(h @ w) + h.mean(1, keepdims=True)  # noqa: E731
    specs = (P("data"), P())
    return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=P("data"))(h, w)


@operation
def sharded_and_mixed(h, w):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    one = lambda h, w: jnp.tanh(h @ w) + jax.lax.pmean(h.mean(0), "data")  # noqa: E731
    specs = (P("data"), P())
    return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=P("data"))(h, w)


REVERSE = {"normalised gradient": lambda h, w: normalised_gradient(h @ w)}
FORWARD = ("while loop", "while loop that mixes")


def losses(h, ending):
    """Terms of several shapes."""
    if ending == "example":
        return fg.Losses([jnp.mean(h**2, axis=(1, 2))], [("example",)])
    if ending == "token":
        return fg.Losses([jnp.sum(h**2, axis=2)], [("example", "token")])
    if ending == "group":
        return fg.Losses([jnp.sum(h**2, axis=1).T], [("group", "example")])
    if ending == "chosen":
        logp = jax.nn.log_softmax(h.mean(1))
        return fg.Losses([-logp[jnp.arange(len(h)), jnp.ones(len(h), int)]], [("example",)])
    return fg.Losses(
        [jnp.sum(h**2, axis=2), jnp.mean(h, axis=(1, 2)) ** 2, jnp.sum(h[0] ** 3)],
        [("example", "token"), ("example",), ()],
    )


ENDINGS = ("example", "token", "group", "chosen", "several")


def compose(names, ending, shape, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "h": jnp.asarray(rng.standard_normal(shape), jnp.float32),
        "w": jnp.asarray(rng.standard_normal((len(names), D, D)) / 2, jnp.float32),
    }
    everything = {**OPERATIONS, **REVERSE}

    def fun(p):
        h = p["h"]
        for name, w in zip(names, p["w"], strict=True):
            h = everything[name](h, w)
        return losses(h, ending)

    return fun, params


@pytest.mark.parametrize("shape", [(2, 3, D), (4, 4, D)], ids=str)
@pytest.mark.parametrize("name", [*OPERATIONS, *REVERSE])
def test_claims_of_an_operation_hold(name, shape):
    check(*compose([name], "several", shape), forward=name not in REVERSE, loops=name in FORWARD)


def random_program(seed):
    choose = random.Random(seed)
    names = choose.choices([n for n in OPERATIONS if n not in FORWARD], k=choose.choice((2, 3, 4)))
    return (
        names,
        choose.choice(ENDINGS),
        choose.choice([(2, 3, D), (4, 4, D), (1, 3, D), (2, 1, D)]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_claims_of_random_programs_hold(seed):
    names, ending, shape = random_program(seed)
    check(*compose(names, ending, shape, seed), forward=seed % 3 != 0)


def test_every_rule_is_tested():
    from forwardgrad.rewrite._axes import RULES
    from forwardgrad.rewrite._primitives import names as primitives

    used = set()
    for name in OPERATIONS:
        fun, params = compose([name], "several", (2, 3, D))
        used |= primitives(Rewritten(lambda p, fun=fun: (fun(p), None), params)._closed.jaxpr)
    elsewhere = {"expand_dims", "forwardgrad_summed", "householder_product", "reduce_window"}
    assert set(RULES) - used == {*elsewhere, "cummin"}


# Where axes should be found

FOUND = """
product; merged; merged tokens first; merged with units; all merged; split units; heads; broadcast
layer norm; rows; pairs; along axis; cumsum tokens; sort tokens; sort units; top k; flip tokens
fft units; fft tokens; cholesky; triangular; solve; solve by a weight; conv one; conv three
conv by channel; conv tokens first; max pool; pool units; odd reducer; product over tokens
log sum exp; sliced and joined; joined units; padded; padded inside; dynamic; updated
split; outer; stacked; stacked last; set at; unstacked; tiled tokens; tiled in front
subtracted at; greatest at; barrier; rng; checkpoint; vmapped; mapped
mapped twice; associative; causal; layers in a loop; moving layers; over time
layers over examples; examples over layers; while loop; branches; branches for each example
custom jvp; custom jvp that does not; custom vjp; custom vjp that mixes; custom jvp of one
custom in a loop; relu; sharded; stopped; rounded; max pool there and back
"""
TOKENS = """
product; merged; merged tokens first; split units; layer norm; rows; along axis; sort units
fft units; conv one; conv tokens first; pool units; odd reducer; joined units
layers in a loop; custom jvp; custom vjp; relu; rounded; stopped; branches for each example
"""


def listed(names):
    return [name.strip() for name in names.replace("\n", ";").split(";") if name.strip()]


def claimed(name, label, term=0, ending="token"):
    """The place in a program's input."""
    fun, params = compose([name], ending, (4, 4, D))
    program = Rewritten(lambda p: (fun(p), None), params)
    return program.plan.places(program._closed.jaxpr.invars[0])[term, label]


@pytest.mark.parametrize("name", listed(FOUND))
def test_the_examples_are_found(name):
    place = claimed(name, "example")
    assert place.parts is not None
    assert not place.mixed


@pytest.mark.parametrize("name", listed(TOKENS))
def test_the_tokens_are_found(name):
    place = claimed(name, "token")
    assert place.parts is not None
    assert not place.mixed
