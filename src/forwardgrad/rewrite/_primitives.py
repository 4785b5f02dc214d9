"""Names of JAX's primitives, and what their parameters are called: all that knows them is here."""

from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.extend.source_info_util import summarize

ELEMENTWISE = frozenset(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    bitcast_convert_type cbrt ceil clamp complex conj convert_element_type copy copy_p cos cosh
    digamma div eq erf erf_inv erfc exp exp2 expm1 floor forwardgrad_mark forwardgrad_settled
    forwardgrad_transparent ge gt igamma igamma_grad_a igammac imag integer_pow is_finite
    layout_constraint le lgamma log log1p logistic lt max min mul name ne neg nextafter not or
    polygamma pow pvary real reduce_precision regularized_incomplete_beta rem reshard round
    rsqrt select_n sharding_constraint sign sin sinh sqrt square stop_gradient sub tan tanh xor
    zeta
    """.split()  # noqa: SIM905
)
"""An output's entry depends on the inputs' entries at the same place, or on scalars."""

CONSTANT = frozenset(("stop_gradient", "sign", "round", "floor", "ceil"))
"""Their derivative is zero, or they let none through."""

INLINED = ("jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")
"""They hold one program, and add nothing to it that an evaluation needs."""

TRANSPARENT = "forwardgrad_transparent"

CUSTOM_JVP, CUSTOM_VJP, SHARD_MAP = "custom_jvp_call", "custom_vjp_call", "shard_map"

LINEAR_SOLVE = "custom_linear_solve"

BRANCHES = ("cond", "while")

NO_COLLECTIVES = ("axis_index", "pvary")
"""They name an axis of workers, but exchange nothing along it."""

SCATTERS = ("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max")

OF_ENTRIES = ("reduce", "reduce_window", *SCATTERS)
"""They hold a program for two entries, and are known as they stand."""

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
"""Linear in each of two operands, and sums over entries of them."""

MATRICES = (*PRODUCTS, LINEAR_SOLVE, "triangular_solve")
"""Errors come back through them by a matrix, which may be made of either operand."""

MERGED = ("add", "add_any", "sub", "mul", "div")
"""With a weight, they make one layer with the layer before them."""

MOVES = ("transpose", "reshape", "squeeze", "expand_dims", "convert_element_type", "copy", "pvary")
"""They only rearrange what a layer computes, such as `vmap` leaves behind."""

SENT_BACK = ELEMENTWISE | frozenset(
    """
    broadcast_in_dim concatenate dynamic_slice dynamic_update_slice expand_dims gather pad
    reduce_max reduce_min reduce_sum reshape rev scatter scatter-add slice split squeeze transpose
    """.split()  # noqa: SIM905
)
"""Errors pass through them without a matrix, whatever weights enter."""

CALLBACKS = ("pure_callback", "io_callback", "debug_callback", "debug_print", "ffi_call")

OPAQUE = (*CALLBACKS, "while", "pallas_call", "custom_call", "custom_partitioning")
"""Primitives that cannot be transposed, though they may be linear."""

UNBATCHABLE = (
    *CALLBACKS,
    "ragged_dot_general",
    "pallas_call",
    "custom_call",
    "new_ref",
    "get",
    "swap",
)
"""Primitives that `vmap` may refuse, or may call again for each entry of the batch."""


def programs(eqn: JaxprEqn) -> list[ClosedJaxpr]:
    """The jaxprs among an equation's parameters."""
    found = []
    for param in eqn.params.values():
        for item in param if isinstance(param, tuple | list) else (param,):
            if isinstance(item, ClosedJaxpr):
                found.append(item)
            elif isinstance(item, Jaxpr):
                found.append(ClosedJaxpr(item, ()))
    return found


def names(jaxpr: Jaxpr) -> set[str]:
    """The primitives of a program and of those inside it."""
    found = {eqn.primitive.name for eqn in jaxpr.eqns}
    return found.union(*(names(p.jaxpr) for eqn in jaxpr.eqns for p in programs(eqn)))


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many constants a `scan` has, and how many carried values."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = eqn.params["ft_in"].unpack()  # JAX 0.12
    return len(consts), len(carry)


def while_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many constants the condition of a `while_loop` has, and how many its body."""
    return eqn.params["cond_nconsts"], eqn.params["body_nconsts"]


def line_of(eqn: JaxprEqn) -> str:
    """Where the user's code asked for an equation: `file:line (function)`."""
    return summarize(eqn.source_info)


def is_ref(atom: Any) -> bool:
    """Whether a variable is a `jax.Ref`: an array that equations change, and whose aliases are."""
    return hasattr(atom.aval, "inner_aval")


def is_lasting(effect: object) -> bool:
    """Whether an effect is on anything but an array of the program's own, or a mesh's axis."""
    kind = type(effect)
    own = ("NamedAxisEffect", "InternalMutableArrayEffect")
    return not (kind.__module__.endswith("state.types") or kind.__name__ in own)


def shape_of(atom: Any) -> tuple[int, ...]:
    """The shape of a variable or literal; () of what has none."""
    return getattr(atom.aval, "shape", ())
