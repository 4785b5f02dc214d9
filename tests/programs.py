"""Random programs that use weights in every way that we could think of.

A program is a few operations in a row on activations of shape [batch, width]. An operation
`op(weights, h, plain)` maps them to another width. With `plain`, functions with a custom reverse
rule are called without it, so that `jax.jvp` can differentiate the program.

`OPERATIONS` use weights; `WRAPPERS` put other operations inside of JAX's transformations.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Op: TypeAlias = Callable[[Sequence[Any], jax.Array, bool], jax.Array]

WIDTHS = (2, 4, 6, 8)


@dataclasses.dataclass
class Maker:
    """Collects the weights of one program, and makes its random choices with `choose`."""

    choose: Callable[[Sequence[Any]], Any]
    batch: int
    shapes: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    stacks: tuple[int, ...] = ()

    def weight(self, *shape: int) -> int:
        """The position of a new weight."""
        self.shapes.append((*self.stacks, *shape))
        return len(self.shapes) - 1

    def permuted(self, **sizes: int) -> tuple[int, str]:
        """A new weight with the named axes in any order, and that order."""
        letters = list(sizes)
        order = ""
        while letters:
            order += letters.pop(letters.index(self.choose(letters)))
        return self.weight(*(sizes[c] for c in order)), order

    def divisor(self, n: int) -> int:
        return self.choose([d for d in range(1, n + 1) if n % d == 0])

    def operation(self, n: int, depth: int) -> tuple[Op, int]:
        """An operation on activations of width n, of wrappers at most `depth` deep."""
        if depth and self.choose((True, False)):
            return WRAPPERS[self.choose(sorted(WRAPPERS))](self, n, depth - 1)
        return OPERATIONS[self.choose(sorted(OPERATIONS))](self, n)


@dataclasses.dataclass(frozen=True)
class RandomProgram:
    """`loss(params, h)`; `shapes` are those of the parameters, a list of arrays."""

    ops: tuple[Op, ...]
    shapes: tuple[tuple[int, ...], ...]
    start: tuple[int, int]
    decay: float

    def __call__(self, params: Sequence[Any], h: jax.Array, plain: bool = False) -> jax.Array:
        for op in self.ops:
            h = jnp.sin(op(params, h, plain))
        return jnp.mean(h**2 + h) + self.decay * sum(jnp.sum(w**2) for w in params)


def make(
    choose: Callable[[Sequence[Any]], Any],
    names: Sequence[str] | None = None,
    depth: int = 2,
) -> RandomProgram:
    """A random program, of the named operations or wrappers or of up to three of any."""
    m = Maker(choose, batch=choose((3, 1)))
    start = n = choose(WIDTHS)
    ops = []
    for name in names or [None] * choose((1, 2, 3)):
        if name is None:
            op, n = m.operation(n, depth)
        elif name in OPERATIONS:
            op, n = OPERATIONS[name](m, n)
        else:
            op, n = WRAPPERS[name](m, n, depth)
        ops.append(op)
    return RandomProgram(tuple(ops), tuple(m.shapes), (m.batch, start), choose((0.0, 0.01)))


def fit(y: jax.Array, width: int) -> jax.Array:
    """Activations of any shape as [batch, width]; every entry counts."""
    y = jnp.sin(y.reshape(y.shape[0], -1))
    terms = max(1, -(-y.shape[1] // width))
    y = jnp.pad(y, ((0, 0), (0, terms * width - y.shape[1])))
    scale = jnp.asarray(1.0 + np.arange(terms)[:, None], y.dtype)
    return jnp.sum(y.reshape(-1, terms, width) / scale, axis=1)


# Operations

OPERATIONS: dict[str, Callable[[Maker, int], tuple[Op, int]]] = {}


def operation(fn):
    OPERATIONS[fn.__name__] = fn
    return fn


@operation
def dot_general(m: Maker, n: int):
    """A product with the weight on either side and either axis contracted."""
    k, left = m.choose(WIDTHS), m.choose((True, False))
    i, order = m.permuted(n=n, k=k)
    axis = order.index("n")

    def op(ws, h, plain):
        if left:
            return jax.lax.dot_general(ws[i], h, (((axis,), (1,)), ((), ()))).T
        return jax.lax.dot_general(h, ws[i], (((1,), (axis,)), ((), ())))

    return op, k


@operation
def several_axes(m: Maker, n: int):
    """Several contracted and several free axes, as in an attention layer."""
    p, a, d = m.divisor(n), m.choose((1, 2, 3)), m.choose((1, 2))
    i, order = m.permuted(p=p, q=n // p, a=a, d=d)
    out = m.choose(("bad", "bda", "abd"))
    spec = m.choose((f"bpq,{order}->{out}", f"{order},bpq->{out}"))

    def op(ws, h, plain):
        x = h.reshape(-1, p, n // p)
        y = jnp.einsum(spec, *((x, ws[i]) if spec.startswith("b") else (ws[i], x)))
        return jnp.moveaxis(y, out.index("b"), 0).reshape(-1, a * d)

    return op, a * d


@operation
def batch_axes(m: Maker, n: int):
    """A weight for each group of features: a batch axis of the product."""
    e, k = m.divisor(n), m.choose((1, 2, 3))
    i, order = m.permuted(e=e, i=n // e, k=k)
    spec = m.choose((f"bei,{order}->bek", f"{order},bei->bke"))

    def op(ws, h, plain):
        x = h.reshape(-1, e, n // e)
        y = jnp.einsum(spec, *((x, ws[i]) if spec.startswith("b") else (ws[i], x)))
        return y.reshape(-1, e * k)

    return op, e * k


@operation
def per_example(m: Maker, n: int):
    """A weight for each example, under `vmap`."""
    k = m.choose(WIDTHS)
    i = m.weight(m.batch, n, k)
    return lambda ws, h, plain: jax.vmap(jnp.dot)(h, ws[i]), k


@operation
def matrix_vector(m: Maker, n: int):
    """A matrix times a vector, under `vmap`."""
    k = m.choose(WIDTHS)
    i = m.weight(k, n)
    return lambda ws, h, plain: jax.vmap(lambda x: ws[i] @ x)(h), k


@operation
def reshaped(m: Maker, n: int):
    """Axes merged and split, whether or not they split as the factors do."""
    k = m.choose(WIDTHS)
    p, q = m.divisor(n), m.divisor(k)
    stored = m.choose(
        ((n * k,), (1, n, 1, k), (p, n // p, k), (n, k // q, q), (n // p, p * k), (k, n))
    )
    i = m.weight(*stored)
    return lambda ws, h, plain: h @ ws[i].reshape(n, k), k


@operation
def transposed(m: Maker, n: int):
    """Axes permuted, then merged, as heads are; or split, then permuted."""
    a, d = m.choose((1, 2, 3)), m.choose((1, 2))
    late = m.choose((True, False))
    i = m.weight(n, a * d) if late else m.weight(a, n, d)

    def op(ws, h, plain):
        if late:
            parts = ws[i].reshape(n, a, d).transpose(1, 0, 2)
            return jnp.einsum("bn,and->bad", h, parts).reshape(-1, a * d)
        return h @ ws[i].transpose(1, 0, 2).reshape(n, a * d)

    return op, a * d


@operation
def cut(m: Maker, n: int):
    """Slices, by constants and by values."""
    k = m.choose(WIDTHS)
    how = m.choose(("slice", "strided", "dynamic", "out of bounds", "negative", "split", "middle"))
    i = m.weight(n + 2, 3 * k) if how != "middle" else m.weight(n, 3, k)

    def op(ws, h, plain):
        w, start = ws[i], jnp.argmax(h[0])
        if how == "slice":
            return h @ w[1:-1, k : 2 * k]
        if how == "strided":
            return h @ w[2:, 1 : 3 * k : 3]
        if how == "dynamic":
            return h @ jax.lax.dynamic_slice(w, (1, start), (n, k))
        if how == "out of bounds":
            return h @ jax.lax.dynamic_slice(w, (start + 5, 3 * k), (n, k))
        if how == "negative":
            return h @ jax.lax.dynamic_slice(w, (-1, -100 * k), (n, k))
        if how == "split":
            a, b, c = jnp.split(w[:n], 3, axis=1)
            return h @ a + jnp.tanh(h @ c) * b[0]
        return h @ w[:, start % 3] + h @ w[:, 1]

    return op, k


@operation
def turned(m: Maker, n: int):
    """Flips and rolls."""
    k = m.choose(WIDTHS)
    turn = m.choose(
        (
            lambda w: w[::-1],
            lambda w: jnp.flip(w),
            lambda w: jnp.roll(w, 1, axis=1),
            lambda w: jnp.rot90(w.T),
        )
    )
    i = m.weight(n, k)
    return lambda ws, h, plain: h @ turn(ws[i]), k


@operation
def scaled(m: Maker, n: int):
    """Scalar multiples, constant and computed."""
    k = m.choose(WIDTHS)
    scale = m.choose(
        (
            lambda w, h: -w,
            lambda w, h: 0.5 * w,
            lambda w, h: w / 3,
            lambda w, h: 2 / (3.0 + w**2),
            lambda w, h: w * h[0, 0],
            lambda w, h: (-0.1 * w.T / 7).T * 3,
            lambda w, h: w / jnp.linalg.norm(w),
            lambda w, h: w * n,
        )
    )
    i = m.weight(n, k)
    return lambda ws, h, plain: h @ scale(ws[i], h), k


@operation
def casts(m: Maker, n: int):
    """There and back to another precision."""
    k, other = m.choose(WIDTHS), m.choose((jnp.float32, jnp.complex128))
    i = m.weight(n, k)

    def op(ws, h, plain):
        # Half the digits would do for the tangents, but not for the primal.
        w = ws[i] if other is not jnp.float32 else ws[i].astype(jnp.float32)
        return jnp.real(h.astype(other) @ w.astype(other)).astype(h.dtype)

    return op, k


@operation
def lookup(m: Maker, n: int):
    """Rows and columns by indices: constant or computed, one or many, inside or outside."""
    k, rows = m.choose(WIDTHS), m.choose((1, 3, 5))
    how = m.choose(
        (
            lambda w, ids: w[ids],
            lambda w, ids: w[jnp.stack([ids, ids + 1])].sum(0),
            lambda w, ids: w.T[:, ids].T,
            lambda w, ids: w[ids[0]][None],
            lambda w, ids: w[-1][None] + w[:1][0],
            lambda w, ids: jnp.take(w, ids - 1, axis=0, mode="fill", fill_value=0.5),
            lambda w, ids: jnp.take(w, ids + 2, axis=0, mode="clip"),
            lambda w, ids: jnp.take(w, 3 * ids, axis=0, mode="wrap"),
            lambda w, ids: w.at[ids + 1].get(mode="drop", fill_value=0),
            lambda w, ids: jax.vmap(lambda i: w[i])(ids),
            lambda w, ids: jax.vmap(lambda i: w.T[:, i])(ids - 1),
            lambda w, ids: jax.vmap(lambda i: jax.lax.dynamic_slice(w, (i, 1), (1, k - 1)))(ids),
            lambda w, ids: jnp.take_along_axis(w, ids[:, None] % k, axis=1)[: len(ids)],
        )
    )
    constant = m.choose((True, False))
    i = m.weight(rows, k)

    def op(ws, h, plain):
        ids = jnp.arange(len(h)) if constant else jnp.argmax(h, axis=1)
        y = fit(how(ws[i], ids % rows), k)
        return fit(h, k) * y[:1] + (y if len(y) == len(h) else y[-1:])

    return op, k


@operation
def tied(m: Maker, n: int):
    """A table that is looked up and multiplied with."""
    rows = m.choose((3, 5))
    i = m.weight(rows, n)

    def op(ws, h, plain):
        ids = jnp.argmin(h, axis=1) % rows
        return jnp.tanh(h + ws[i][ids]) @ ws[i].T

    return op, rows


@operation
def convolution(m: Maker, n: int):
    """One and two spatial axes, groups, strides, dilations, and any order of axes."""
    two = m.choose((False, True))
    space = "HW" if two else "H"
    groups, channels = m.choose(((1, 2), (1, 1), (2, 4), (2, 2), (3, 3)))
    sizes = {"I": channels // groups, "O": groups * m.choose((1, 2)), "H": m.choose((1, 2, 3))}
    i, kernel = m.permuted(**sizes, **({"W": 2} if two else {}))
    lhs = m.choose((f"N{space}C", f"NC{space}", f"C{space}N"))
    out = m.choose((f"N{space}C", f"NC{space}", f"C{space}N"))
    each = lambda options: tuple(m.choose(options) for _ in space)  # noqa: E731
    options = {
        "window_strides": each((1, 2)),
        "padding": m.choose(("SAME", "VALID", ((1, 0),) * len(space))),
        "lhs_dilation": each((1, 1, 2)),
        "rhs_dilation": each((1, 1, 2)),
    }
    if any(d > 1 for d in options["lhs_dilation"]):
        options["padding"] = ((2, 1),) * len(space)

    def op(ws, h, plain):
        x = fit(h, channels * 4 ** len(space)).reshape(-1, *[4] * len(space), channels)
        x = jnp.transpose(x, [f"N{space}C".index(c) for c in lhs])
        y = jax.lax.conv_general_dilated(
            x, ws[i], dimension_numbers=(lhs, kernel, out), feature_group_count=groups, **options
        )
        return fit(jnp.moveaxis(y, out.index("N"), 0), 6)

    return op, 6


@operation
def transposed_convolution(m: Maker, n: int):
    """`conv_transpose`, with the kernel flipped or not."""
    flip, stride = m.choose((True, False)), m.choose((1, 2))
    padding = m.choose(("SAME", "VALID"))
    i = m.weight(3, 2, 2)

    def op(ws, h, plain):
        x = fit(h, 8).reshape(-1, 4, 2)
        y = jax.lax.conv_transpose(
            x,
            ws[i],
            (stride,),
            padding,
            dimension_numbers=("NHC", "HIO", "NHC"),
            transpose_kernel=flip,
        )
        return fit(y, 4)

    return op, 4


@operation
def vmapped_convolution(m: Maker, n: int):
    """A convolution with a kernel for each example."""
    i = m.weight(m.batch, 2, 2, 3)

    def op(ws, h, plain):
        def one(x, w):
            return jax.lax.conv_general_dilated(
                x[None], w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
            )[0]

        return fit(jax.vmap(one)(fit(h, 8).reshape(-1, 4, 2), ws[i]), 4)

    return op, 4


@operation
def elementwise(m: Maker, n: int):
    """Scales, shifts and a scalar."""
    scale, shift, scalar = m.weight(n), m.weight(1, n), m.weight()
    return lambda ws, h, plain: h * ws[scale] + ws[shift] - ws[scalar] * h**2, n


@operation
def functions(m: Maker, n: int):
    """Functions of a weight that are not linear, or that mix its entries."""
    k = m.choose(WIDTHS)
    apply = m.choose(
        (
            jnp.sin,
            lambda w: jax.nn.softmax(w, axis=0),
            lambda w: jnp.where(jnp.arange(k) > 0, w, 0),
            lambda w: jnp.cumsum(w, axis=1),
            lambda w: jnp.pad(w[1:], ((1, 0), (0, 0))),
            lambda w: jnp.broadcast_to(w, (2, n, k)).mean(0),
            lambda w: jnp.concatenate([w[1:], 2 * w[:1]]),
            lambda w: w + w[:, ::-1],
            lambda w: jax.lax.stop_gradient(w) + w[0],
            lambda w: w - jax.lax.stop_gradient(w),
            lambda w: w[:0].sum() + w,
            lambda w: w[:, :0].reshape(0, n).sum() + w,
        )
    )
    i = m.weight(n, k)
    return lambda ws, h, plain: h @ apply(ws[i]), k


@operation
def two_weights(m: Maker, n: int):
    """Weights that meet other weights, or themselves."""
    k = m.choose(WIDTHS)
    i, j = m.weight(n, k), m.weight(k, n)
    use = m.choose(
        (
            lambda h, v, w: h @ (v @ w),
            lambda h, v, w: h @ (w.T @ v.T),
            lambda h, v, w: h @ (v * w.T) @ w,
            lambda h, v, w: h @ jnp.concatenate([v, w.T]).T[:, :n].T @ v.T,
            lambda h, v, w: h @ v @ v.T + h @ w.T @ w,
            lambda h, v, w: h @ jnp.einsum("ij,jk,kl->il", v, v.T, v) @ w,
            lambda h, v, w: jnp.vdot(v, w.T) * h + jnp.vdot(v, v),
        )
    )
    return lambda ws, h, plain: use(h, ws[i], ws[j]), n


@operation
def masked(m: Maker, n: int):
    """Weights that meet constants or one another before their product."""
    k = m.choose(WIDTHS)
    mask = jnp.arange(n * k).reshape(n, k) % 3 > 0
    base = jnp.cos(jnp.arange(n * k, dtype=float)).reshape(n, k)
    use = m.choose(
        (
            lambda w, a, b: w * mask,
            lambda w, a, b: w * mask[:, :1] / (1 + mask),
            lambda w, a, b: jnp.where(mask, w, 0),
            lambda w, a, b: jnp.where(mask, base, -w),
            lambda w, a, b: jnp.where(mask, w, 2 * w + a @ b),
            lambda w, a, b: jax.lax.select_n(mask.astype(int), w, a @ b),
            lambda w, a, b: base + 0.5 * (a @ b),
            lambda w, a, b: w - base * (a @ b) * mask,
            lambda w, a, b: w * (n > 1) - a * b,
            lambda w, a, b: jnp.where(n > 1, w, a + b),
        )
    )
    i, j, r = m.weight(n, k), m.weight(n, 1), m.weight(1, k)
    return lambda ws, h, plain: h @ use(ws[i], ws[j], ws[r]), k


@operation
def meets_itself(m: Maker, n: int):
    """A weight on both sides of a product, entry by entry or as matrices."""
    use = m.choose(
        (
            lambda w: w @ w,
            lambda w: w.T @ w,
            lambda w: jnp.linalg.matrix_power(w, 3),
            lambda w: w * w,
            lambda w: w / w[0, 0] + jnp.dot(w[0], w[0]),
            lambda w: jax.scipy.linalg.expm(0.3 * w),
            lambda w: jax.lax.cond(w[0, 0] > 0, lambda w: w @ w, lambda w: 2 * w, w),
        )
    )
    i = m.weight(n, n)
    return lambda ws, h, plain: h @ use(ws[i]), n


@operation
def stopped(m: Maker, n: int):
    """What meets a weight, and is then a constant: vector quantisation, straight-through."""
    use = m.choose(
        (
            lambda h, e: h + jax.lax.stop_gradient(e - h),
            lambda h, e: jax.lax.stop_gradient(h * e) + h - e,
            lambda h, e: e + jax.lax.stop_gradient(e + h - e),
        )
    )
    i = m.weight(3, n)
    return lambda ws, h, plain: use(h, ws[i][jnp.argmax(h, axis=1) % 3]), n


@operation
def complex_numbers(m: Maker, n: int):
    """Complex weights, activations and transforms."""
    k = m.choose(WIDTHS)
    use = m.choose(
        (
            lambda h, w: (h @ w).real + (h @ w).imag,
            lambda h, w: jnp.abs(h @ w) ** 2,
            lambda h, w: (1j * h @ jnp.conj(w)).real,
            lambda h, w: jnp.fft.ifft(jnp.fft.fft(h @ w) * jnp.exp(1j)).real,
            lambda h, w: jnp.fft.irfft(jnp.fft.rfft(h) @ w[: n // 2 + 1], n=k),
            lambda h, w: (jnp.tanh(h @ w) * w[0]).imag,
            lambda h, w: (h @ (w * (2 - 1j) / jnp.abs(w[0]))).real,
        )
    )
    i, j = m.weight(n, k), m.weight(n, k)
    return lambda ws, h, plain: use(h, jax.lax.complex(ws[i], ws[j])), k


@jax.custom_jvp
def rounded(w):
    return jnp.round(w)


rounded.defjvp(lambda primals, tangents: (jnp.round(*primals), tangents[0]))

rounded_backwards = jax.custom_vjp(lambda w: jnp.round(w))
rounded_backwards.defvjp(lambda w: (jnp.round(w), None), lambda _, error: (error,))


@operation
def rules_of_weights(m: Maker, n: int):
    """Functions of weights with a rule of their own, forwards or backwards."""
    k = m.choose(WIDTHS)
    use = m.choose(
        (
            lambda w, plain: rounded(3 * w),
            lambda w, plain: rounded(3 * w) * 2 + w,
            lambda w, plain: (rounded if plain else rounded_backwards)(3 * w),
            lambda w, plain: (rounded if plain else rounded_backwards)(w.T).T + w,
            lambda w, plain: jax.nn.relu(w),
            lambda w, plain: jnp.where(jax.nn.relu(w) > 0, w, rounded(w)),
        )
    )
    i = m.weight(n, k)
    return lambda ws, h, plain: h @ use(ws[i], plain), k


@operation
def merged_axes(m: Maker, n: int):
    """Examples together with another axis, one after another, or in groups."""
    k = m.choose(WIDTHS)
    twice = lambda h: jnp.stack([h, -0.5 * h], 1)  # noqa: E731
    use = m.choose(
        (
            lambda h, w: jnp.tanh(twice(h).reshape(-1, n) @ w).reshape(-1, 2, k).sum(1),
            lambda h, w: jnp.tanh(twice(h).transpose(1, 0, 2).reshape(-1, n) @ w)[: len(h)],
            lambda h, w: jax.lax.map(lambda x: jnp.tanh(x @ w), h),
            lambda h, w: jax.lax.map(lambda x: x @ w, h, batch_size=2),
            lambda h, w: jax.ops.segment_sum(h @ w, jnp.arange(len(h)) // 2, len(h)),
            lambda h, w: (h @ w)[jnp.arange(len(h))[::-1]],
            lambda h, w: jnp.concatenate([h @ w, h[:1] @ w])[1:],
        )
    )
    i = m.weight(n, k)
    return lambda ws, h, plain: use(h, ws[i]), k


# Wrappers

WRAPPERS: dict[str, Callable[[Maker, int, int], tuple[Op, int]]] = {}


def wrapper(fn):
    WRAPPERS[fn.__name__] = fn
    return fn


@wrapper
def jit(m: Maker, n: int, depth: int):
    op, k = m.operation(n, depth)
    return lambda ws, h, plain: jax.jit(lambda ws, h: op(ws, h, plain))(ws, h), k


@wrapper
def remat(m: Maker, n: int, depth: int):
    op, k = m.operation(n, depth)
    return lambda ws, h, plain: jax.checkpoint(lambda ws, h: op(ws, h, plain))(ws, h), k


@wrapper
def custom_jvp(m: Maker, n: int, depth: int):
    """A forward rule that is not the function's derivative, to see that it is honoured."""
    op, k = m.operation(n, depth)

    def wrapped(ws, h, plain):
        fn = jax.custom_jvp(lambda ws, h: op(ws, h, plain))

        @fn.defjvp
        def rule(primals, tangents):
            out, tangent = jax.jvp(lambda ws, h: op(ws, h, True), primals, tangents)
            return out, -3 * tangent

        return fn(list(ws), h)

    return wrapped, k


@wrapper
def custom_vjp(m: Maker, n: int, depth: int):
    """A function that has a reverse rule only, and one that raises."""
    op, k = m.operation(n, depth)

    def wrapped(ws, h, plain):
        if plain:
            return op(ws, h, plain)
        fn = jax.custom_vjp(lambda ws, h: op(ws, h, plain))
        fn.defvjp(reverse_rule_called, reverse_rule_called)
        return fn(list(ws), h)

    return wrapped, k


def reverse_rule_called(*args):
    raise AssertionError("a reverse rule was called")


@wrapper
def vmap_rows(m: Maker, n: int, depth: int):
    batch, m.batch = m.batch, 1
    op, k = m.operation(n, depth)
    m.batch = batch
    return lambda ws, h, plain: jax.vmap(lambda row: op(ws, row[None], plain)[0])(h), k


def stacked(m: Maker, n: int, depth: int, length: int):
    """An operation on slices of stacked weights: it takes those slices alone."""
    start, stacks = len(m.shapes), m.stacks
    m.stacks = (length, *stacks)
    op, k = m.operation(n, depth)
    m.stacks = stacks
    # Under several stacks the innermost is the first axis, as whoever slices last sees it.
    mine = slice(start, len(m.shapes))
    return mine, lambda parts, h, plain: op([None] * start + list(parts), h, plain), k


@wrapper
def vmap_ensemble(m: Maker, n: int, depth: int):
    mine, op, k = stacked(m, n, depth, 2)

    def wrapped(ws, h, plain):
        out = jax.vmap(lambda parts: op(parts, h, plain))(list(ws[mine]))
        return out[0] - jnp.tanh(out[1])

    return wrapped, k


@wrapper
def scan_stack(m: Maker, n: int, depth: int):
    length = m.choose((3, 1, 2))
    mine, op, _ = stacked(m, n, depth, length)
    reverse, again = m.choose((True, False)), m.choose((True, False))

    def wrapped(ws, h, plain):
        def step(h, parts):
            body = jax.checkpoint(lambda parts, h: op(parts, h, plain)) if again else op
            out = body(parts, h) if again else op(parts, h, plain)
            h = fit(out, n)
            return h, jnp.sum(h)

        h, sums = jax.lax.scan(step, h, list(ws[mine]), reverse=reverse)
        return h * jnp.mean(sums)

    return wrapped, n


@wrapper
def scan_constant(m: Maker, n: int, depth: int):
    op, _ = m.operation(n, depth)

    def wrapped(ws, h, plain):
        xs = jnp.arange(2, dtype=h.dtype)
        return jax.lax.scan(lambda h, x: (fit(op(ws, h + x, plain), n), None), h, xs)[0]

    return wrapped, n


@wrapper
def scan_carry(m: Maker, n: int, depth: int):
    op, _ = m.operation(n, depth)

    def wrapped(ws, h, plain):
        ws, rest = [w for w in ws if w is not None], [w is None for w in ws]

        def step(carry, _):
            h, ws = carry
            parts = iter(ws)
            h = fit(op([None if absent else next(parts) for absent in rest], h, plain), n)
            return (h, [0.9 * w for w in ws]), None

        (h, _), _ = jax.lax.scan(step, (h, ws), None, length=2)
        return h

    return wrapped, n


@wrapper
def cond(m: Maker, n: int, depth: int):
    (yes, _), (no, _) = m.operation(n, depth), m.operation(n, depth)
    sign = m.choose((1, -1))

    def wrapped(ws, h, plain):
        first = next(w for w in ws if w is not None)
        return jax.lax.cond(
            jnp.sum(h) + jnp.sum(first) > 0 * sign,
            lambda h: fit((yes, no)[sign < 0](ws, h, plain), 4),
            lambda h: fit((no, yes)[sign < 0](ws, h, plain), 4),
            h,
        )

    return wrapped, 4


@wrapper
def switch(m: Maker, n: int, depth: int):
    op, k = m.operation(n, depth)
    index = m.choose((0, 1, 2))

    def wrapped(ws, h, plain):
        branches = (
            lambda ws, h: jnp.zeros((len(h), k), h.dtype),
            lambda ws, h: op(ws, h, plain),
            lambda ws, h: fit(h, k),
        )
        chosen = (index + jnp.argmax(h[0])) % 3
        present = [w for w in ws if w is not None]
        absent = [w is None for w in ws]

        def on_list(branch):
            def call(present, h):
                parts = iter(present)
                return branch([None if gone else next(parts) for gone in absent], h)

            return call

        return jax.lax.switch(chosen, [on_list(b) for b in branches], present, h)

    return wrapped, k


@wrapper
def while_loop(m: Maker, n: int, depth: int):
    """The number of rounds depends on the activations and on the weights."""
    op, _ = m.operation(n, depth)

    def wrapped(ws, h, plain):
        last = next(w for w in reversed(ws) if w is not None)

        def unfinished(carry):
            i, h = carry
            return i < 2 + (jnp.sum(h) > jnp.sum(last)).astype(int)

        def body(carry):
            i, h = carry
            return i + 1, fit(op(ws, h, plain), n)

        return jax.lax.while_loop(unfinished, body, (0, h))[1]

    return wrapped, n


@wrapper
def fori_loop(m: Maker, n: int, depth: int):
    op, _ = m.operation(n, depth)
    return (
        lambda ws, h, plain: jax.lax.fori_loop(0, 2, lambda i, h: fit(op(ws, h, plain), n) + i, h),
        n,
    )


def parameters(program: RandomProgram, seed: int, dtype: Any = np.float64) -> list[np.ndarray]:
    """Weights for a random program."""
    rng = np.random.default_rng(seed)
    scale = lambda shape: 1 / math.sqrt(max(1, shape[-1] if shape else 1))  # noqa: E731
    return [(rng.standard_normal(s) * scale(s)).astype(dtype) for s in program.shapes]
