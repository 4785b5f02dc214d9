"""Programs as jaxprs: traced, inlined once, and evaluated equation by equation.

After inlining, a program is flat but for `scan`, `while`, `cond`, `shard_map` and functions with a
derivative rule of their own, and every variable in it has one meaning: bodies are copied.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from forwardgrad._errors import InputError
from forwardgrad.rewrite._primitives import (
    CONSTANT,
    CUSTOM_JVP,
    CUSTOM_VJP,
    INLINED,
    OPAQUE,
    TRANSPARENT,
    is_lasting,
    line_of,
    names,
    programs,
)

Array: TypeAlias = Any
"""A JAX array, or one of the NumPy arrays and numbers that jaxprs hold as constants."""

INFO = DebugInfo("forwardgrad", "program", None, None)


ASKS_FOR_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def trace(fun: Callable[..., Any], *args: Any) -> ClosedJaxpr:
    """`fun` as a program.

    **Raises:**

    `InputError` if it asks for the values of arrays, which a traced function does not have.
    """
    try:
        return jax.make_jaxpr(fun)(*args)
    except ASKS_FOR_VALUES as error:
        raise InputError(
            "fun must not ask for the values of arrays, because it is traced as under jax.jit; "
            "write an `if` on an array as jax.numpy.where or jax.lax.cond, and x[mask] as a sum "
            f"weighted by the mask (JAX says: {str(error).splitlines()[0]})"
        ) from error


def evaluate(eqn: JaxprEqn, invals: Sequence[Array]) -> list[Array]:
    """The outputs of one equation at `invals`, as the program without us would compute them."""
    # An input that is used twice may have two values here: an array, and a weight without tangent.
    atoms = [atom if isinstance(atom, Literal) else _fresh(atom) for atom in eqn.invars]
    given = {a: v for a, v in zip(atoms, invals, strict=True) if not isinstance(a, Literal)}
    eqn = eqn.replace(invars=atoms)
    jaxpr = Jaxpr((), list(given), list(eqn.outvars), [eqn], eqn.effects, INFO)
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))(*given.values())


def of_moving(eqn: JaxprEqn, args: Sequence[Array]) -> tuple[list[int], Callable]:
    """An equation as a function of the inputs that can have a derivative, after their positions.

    It returns the outputs that can have one, and as auxiliary data all outputs.
    """
    moving = [i for i, arg in enumerate(args) if is_inexact(arg)]

    def function(*values):
        full = list(args)
        for i, value in zip(moving, values, strict=True):
            full[i] = value
        outs = evaluate(eqn, full)
        return [out for out in outs if is_inexact(out)], outs

    return moving, function


def is_inexact(x: Any) -> bool:
    """Whether an array, a variable or a type holds floating-point or complex numbers."""
    aval = getattr(x, "aval", None)
    dtype = getattr(x if aval is None else aval, "dtype", None)
    return jnp.issubdtype(jnp.result_type(x) if dtype is None else dtype, jnp.inexact)


def inline(
    closed: ClosedJaxpr, forward: bool, *, twice: bool = False, pure: bool = False
) -> ClosedJaxpr:
    """A copy of a program, with all programs inlined that only wrap others.

    **Arguments:**

    - `closed`: the program.
    - `forward`: whether forward mode is to go through it, which needs another form of functions
        that have only a reverse rule.
    - `twice`: whether reverse mode is then to go through the derivative.
    - `pure`: leave out what is done for its effect alone, such as callbacks without a result.
    """
    level = _Level(forward, twice, pure)
    invars = [_fresh(v) for v in closed.jaxpr.invars]
    outs = level.run(closed, invars)
    effects = frozenset().union(*(eqn.effects for eqn in level.eqns))
    jaxpr = Jaxpr([*level.consts], invars, outs, level.eqns, effects, INFO)
    return ClosedJaxpr(jaxpr, [*level.consts.values()])


def _fresh(v: Var) -> Var:
    return Var(v.aval)


class _Level:
    """The equations of one program while they are collected, and its constants."""

    def __init__(self, forward: bool, twice: bool, pure: bool):
        self.forward, self.twice, self.pure = forward, twice, pure
        self.eqns: list[JaxprEqn] = []
        self.consts: dict[Var, Any] = {}

    def run(self, closed: ClosedJaxpr, args: Sequence[Any], at: Any = None) -> list[Any]:
        """Add a program's equations; returns its outputs, given its inputs' new names.

        `at` is whence it is called: JAX's own functions have equations of no line of a user's.
        """
        jaxpr = closed.jaxpr
        env: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
        for v, const in zip(jaxpr.constvars, closed.consts, strict=True):
            env[v] = _fresh(v)
            self.consts[env[v]] = const
        read = lambda atom: atom if isinstance(atom, Literal) else env[atom]  # noqa: E731
        used = {a for e in jaxpr.eqns for a in e.invars if isinstance(a, Var)}
        used.update(a for a in jaxpr.outvars if isinstance(a, Var))
        own = {} if at is None or any(map(line_of, jaxpr.eqns[:1])) else {"source_info": at}
        for eqn in jaxpr.eqns:
            eqn = eqn.replace(**own)
            lasts = any(map(is_lasting, eqn.effects))
            if self.pure and lasts and used.isdisjoint(eqn.outvars) and not programs(eqn):
                continue
            outs = self.equation(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
        """Add an equation, or those of the program that it holds."""
        name = eqn.primitive.name
        inner = programs(eqn)
        seen_through = name == CUSTOM_JVP and TRANSPARENT in names(inner[0].jaxpr)
        if name in INLINED or (seen_through and not self.forward):
            return self.run(inner[0], args, eqn.source_info)
        if name == CUSTOM_VJP and self.forward:
            return self.run(pushed_forward(eqn), args, eqn.source_info)
        if name == CUSTOM_JVP and self.twice:
            eqn = differentiable_again(eqn)
        outvars = [_fresh(v) for v in eqn.outvars]
        params, effects = eqn.params, eqn.effects
        if inner and name not in (CUSTOM_JVP, CUSTOM_VJP):
            params = {k: self._inside(p) for k, p in params.items()}
            if self.pure:
                inner = programs(eqn.replace(params=params))
                effects = frozenset().union(*(p.jaxpr.effects for p in inner))
        self.eqns.append(
            eqn.replace(invars=list(args), outvars=outvars, params=params, effects=effects)
        )
        return outvars

    def _inlined(self, program: ClosedJaxpr) -> ClosedJaxpr:
        return inline(program, self.forward, twice=self.twice, pure=self.pure)

    def _inside(self, param: Any) -> Any:
        if isinstance(param, tuple | list):
            return type(param)(map(self._inside, param)) if type(param) in (tuple, list) else param
        if isinstance(param, ClosedJaxpr):
            return self._inlined(param)
        if isinstance(param, Jaxpr):
            inlined = self._inlined(ClosedJaxpr(param, ()))
            return param if inlined.consts else inlined.jaxpr
        return param


# Functions with a derivative rule of their own


def pushed_forward(eqn: JaxprEqn) -> ClosedJaxpr:
    r"""A function with a reverse rule alone, in a form that forward mode can go through.

    The reverse rule maps cotangents of the outputs to those of the inputs, $c \mapsto A^\top c$.
    Where this is linear, forward mode gets its transpose, $\dot x \mapsto A \dot x$, whatever the
    function itself computes. A rule that raises or that cannot be transposed (a kernel, a loop)
    leaves the derivative of the function itself.

    **Raises:**

    `InputError` if that derivative is zero; where the rule is not linear, as soon as a derivative
    is asked for.
    """
    kind = kind_of_rule(eqn)
    if kind == "opaque":
        (primal, *_) = programs(eqn)
        if _is_flat(primal.jaxpr):
            raise InputError(
                f"the function with a custom_vjp at {line_of(eqn)} has the derivative zero but for "
                "its reverse rule, which cannot be transposed; give it a custom_jvp"
            )
        return primal

    @jax.custom_jvp
    def call(*args):
        return tuple(evaluate(eqn, args))

    @call.defjvp
    def rule(primals, tangents):
        if kind == "nonlinear":
            raise InputError(
                f"the function with a custom_vjp at {line_of(eqn)} has a reverse rule that is not "
                "linear, so that no forward derivative says the same; take the rule out, or use an "
                "estimator that works in reverse"
            )
        outs, pullback, changing = _pulled_back(eqn, primals)
        transposed = jax.linear_transpose(pullback, changing)
        moved = tuple(
            jnp.asarray(t) for p, t in zip(primals, tangents, strict=True) if is_inexact(p)
        )
        (changes,) = transposed(moved)
        moved = with_none_for_integers(changes, outs)
        return _known(call, tuple(outs), primals), tuple(moved)

    return jax.make_jaxpr(call)(*[v.aval for v in eqn.invars])


def differentiable_again(eqn: JaxprEqn) -> JaxprEqn:
    """A function with a forward rule, which it keeps when its derivative is differentiated.

    A rule also computes the function's value, and need not do it by the function: `floor(x), dx`.
    What is differentiated by weights after it was by a perturbation would miss the rule.
    """

    @jax.custom_jvp
    def call(*args):
        return tuple(evaluate(eqn, args))

    @call.defjvp
    def rule(primals, tangents):
        moving, function = of_moving(eqn, primals)
        own = [jnp.asarray(tangents[i]) for i in moving]
        _, moved, outs = jax.jvp(function, [primals[i] for i in moving], own, has_aux=True)
        return _known(call, tuple(outs), primals), tuple(with_none_for_integers(moved, outs))

    try:
        (again,) = jax.make_jaxpr(call)(*[v.aval for v in eqn.invars]).jaxpr.eqns
    except NameError:  # a name of a mesh's axis, in a `shard_map`
        return eqn
    return again.replace(source_info=eqn.source_info)


def _known(fun: Callable, outs: Any, args: Any) -> Any:
    """`outs`, known to be `fun(*args)`, with the derivative of this."""

    @jax.custom_jvp
    def known(outs, args):
        del args
        return outs

    @known.defjvp
    def rule(primals, tangents):
        outs, args = primals
        return _known(fun, outs, args), jax.jvp(fun, tuple(args), tuple(tangents[1]))[1]

    return known(outs, args)


def with_none_for_integers(tangents: Sequence[Array], outs: Sequence[Array]) -> list[Any]:
    """The tangents of all outputs, given those of the floating-point ones."""
    rest = iter(tangents)
    return [next(rest) if is_inexact(out) else no_tangent(out) for out in outs]


def no_tangent(x: Array) -> Any:
    """The tangent of an array of integers."""
    return np.zeros(jnp.shape(x), jax.dtypes.float0)


def _pulled_back(eqn: JaxprEqn, args: Sequence[Array]) -> tuple[Sequence[Array], Callable, Any]:
    """An equation's outputs, its reverse rule, and those outputs that have a derivative."""
    moving, function = of_moving(eqn, args)
    changing, pullback, outs = jax.vjp(function, *[args[i] for i in moving], has_aux=True)
    return outs, pullback, changing


def kind_of_rule(eqn: JaxprEqn) -> str:
    """Whether a reverse rule is `linear` (and JAX can transpose it), `nonlinear` or `opaque`."""
    used: set[str] = set(OPAQUE)

    def attempt(*args):
        _, pullback, changing = _pulled_back(eqn, args)
        found = names(jax.make_jaxpr(pullback)(changing).jaxpr)
        used.clear()
        used.update(found)
        transposed = jax.linear_transpose(pullback, changing)
        return transposed(tuple(arg for arg in args if is_inexact(arg)))

    try:
        jax.make_jaxpr(attempt)(*[v.aval for v in eqn.invars])
    except Exception:  # rules are the user's own code, and may raise anything
        return "nonlinear" if used.isdisjoint(OPAQUE) else "opaque"
    return "linear"


def _is_flat(jaxpr: Jaxpr) -> bool:
    """Whether an output depends on the inputs, but has no derivative by them."""
    touched = {v for v in jaxpr.invars if is_inexact(v)}
    moving = set(touched)
    for eqn in jaxpr.eqns:
        if not touched.isdisjoint(a for a in eqn.invars if isinstance(a, Var)):
            touched.update(eqn.outvars)
        if eqn.primitive.name not in CONSTANT and not moving.isdisjoint(
            a for a in eqn.invars if isinstance(a, Var)
        ):
            moving.update(v for v in eqn.outvars if is_inexact(v))
    outs = {v for v in jaxpr.outvars if isinstance(v, Var) and is_inexact(v)}
    return bool(outs & touched - moving)
