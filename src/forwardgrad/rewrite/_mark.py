"""What a model says of itself: the names of an activation's axes, rules that may be left out."""

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.extend.source_info_util import register_exclusion
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Inexact

from forwardgrad._errors import InputError

mark_p = Primitive("forwardgrad_mark")
"""`names` has for each axis its name, or None for one that `vmap` has added."""

register_exclusion(__file__)  # a mark is on the line of the user's that makes it


def activation(z: Inexact[Array, "..."], *axes: str) -> Inexact[Array, "..."]:
    """`z`, marked as an activation, with the names of its axes.

    Without marks, every layer's output is an activation. The axes of the losses are then found in
    it by following them back through the program. A mark replaces this, and is trusted: an entry is
    taken to influence only those losses that have the same place along axes of the same name. If
    that is not true, the estimate is biased. Axes of the losses that the mark does not name are
    followed as without a mark.

    **Arguments:**

    - `z`: the activation, before its nonlinearity.
    - `axes`: a name for each axis that `z` has here (under `vmap`, without the mapped one): those
        of [`forwardgrad.Losses`][], or any other.

    **Returns:**

    `z`.

    **Raises:**

    `InputError` if there are not as many names as axes, or one is no string; while it is
    differentiated, if the losses' axis of a name is known to be another one here.
    """
    if len(axes) != jnp.ndim(z) or not all(isinstance(name, str) for name in axes):
        raise InputError(
            f"activation must name every axis by a string, got {len(axes)} names {axes} for a "
            f"shape {jnp.shape(z)}"
        )
    return mark_p.bind(jnp.asarray(z), names=axes)


def _batch(args, dims, *, names):
    (z,), (dim,) = args, dims
    return mark_p.bind(z, names=(*names[:dim], None, *names[dim:])), dim


mark_p.def_impl(lambda z, *, names: z)
mark_p.def_abstract_eval(lambda z, *, names: z)
ad.deflinear2(mark_p, lambda cotangent, z, *, names: [cotangent])
batching.primitive_batchers[mark_p] = _batch
mlir.register_lowering(mark_p, lambda ctx, z, *, names: [z])


transparent_p = Primitive("forwardgrad_transparent")


def transparent(x: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """`x`; the function around, which has a `custom_jvp`, may be differentiated without it.

    Its rule only splits up a derivative that the function has anyway. Feedback alignment has to
    look inside, for the products there.
    """
    return transparent_p.bind(x)


transparent_p.def_impl(lambda x: x)
transparent_p.def_abstract_eval(lambda x: x)
ad.deflinear2(transparent_p, lambda cotangent, x: [cotangent])
batching.primitive_batchers[transparent_p] = lambda args, dims: (transparent_p.bind(*args), dims[0])
mlir.register_lowering(transparent_p, lambda ctx, x: [x])
