"""Models of other people's libraries: is a forward gradient right on them, and what does it cost?

    pip install -e '.[train]' 'flax>=0.12' 'transformers<5' 'datasets<5' equimo jax-resnet \
        mamba2-jax dm-haiku diffrax optimistix flowjax jraph nequip-eqx numpyro brax mujoco-mjx
    pip install --no-deps --ignore-requires-python discretax
    python benchmarks/third_party.py --out results/benchmarks/third_party.json

Transformers has no Flax from version 5 on, and its version 4 and datasets 5 ask for different
versions of the hub's client. discretax asks for Python 3.12, and runs on 3.11. nequip-eqx brings
JAX's plugin for CUDA: set JAX_PLATFORMS=cpu where there is no GPU. A model whose package is missing
is reported as not installed, and the rest goes on.

For every model and method (losses by example, where there are examples) the results have

- `flops` and `temp_bytes`, XLA's numbers for value and gradient as one compiled program; XLA counts
  the body of a loop once;
- `trace_seconds`, the median processor time of several traces to a jaxpr, and `compile_seconds`;
- for FG-A, FA and DFA, how many `leaves` have a gradient, and how many of these have the exact one;
- or what it was `refused` with (an `InputError`), or another `error`.

`identity` is right if it is 1. With one tangent v of entries plus and minus one, d the derivative
along v and e the exact gradient, an estimate g = d v has <e, g> = d^2 and |g|^2 = d^2 N, with N the
number of entries that are not zero: it is |g|^2 / (N <e, g>), the worst of several keys.
`<e, g>` is by reverse mode, or by forward mode where the function has no other.
"""

import dataclasses
import functools
import importlib.metadata
import math
import re
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich.table import Table

import forwardgrad as fg
import measure
from third_party_models import MODELS, Model

SEED = 0
KEYS = 4
"""Estimates that the identity is checked on."""
METHODS: dict[str, fg.AbstractEstimator] = {
    "BP": fg.Backpropagation(),
    "FG-W": fg.WeightPerturbation(),
    "FG-A": fg.ActivityPerturbation(),
    "FA": fg.FeedbackAlignment(),
    "DFA": fg.DirectFeedbackAlignment(),
}
BY_EXAMPLE = ("FG-A", "DFA")
"""Methods that are given a loss for each example, where there is one."""
ALIKE = ("FG-A", "FA", "DFA")
"""Methods that have found no place in a model if all they return is the exact gradient."""


@dataclasses.dataclass(frozen=True)
class Options(measure.Options):
    """Settings of the benchmark."""

    repeats: int = 5
    """Traces of each method."""


def examine(model: Model, repeats: int) -> dict[str, Any]:
    """All that is to be known of one model, ready for JSON."""
    try:
        package = f"{model.package} {importlib.metadata.version(model.package)}"
    except importlib.metadata.PackageNotFoundError:
        return {"package": model.package, "error": f"{model.package} is not installed"}
    try:
        losses, params, args = model.make()
        by_example = jax.eval_shape(losses, params, *args).ndim == 1
    except Exception as error:
        return {"package": package, **_failure(error)}

    def mean(params, *args):
        return jnp.mean(losses(params, *args))

    def terms(params, *args):
        of_examples = losses(params, *args)
        return fg.Losses([of_examples / len(of_examples)], [("example",)])

    gradients = {
        name: fg.value_and_grad(terms if by_example and name in BY_EXAMPLE else mean, estimator)
        for name, estimator in METHODS.items()
    }
    # What everything is compared with takes no detour by this library.
    gradients["BP"] = jax.value_and_grad(mean)
    key = {"key": jax.random.key(SEED)}
    measured = {
        "forward only": _measured(mean, params, args, {}, repeats),
        **{
            name: _measured(gradient, params, args, {} if name == "BP" else key, repeats)
            for name, gradient in gradients.items()
        },
    }
    programs = {name: program for name, (_, program) in measured.items()}
    rows = {name: row for name, (row, _) in measured.items()}
    if programs["BP"] is not None:
        exact = programs["BP"](params, *args)[1]
        for name in ALIKE:
            if programs[name] is not None:
                rows[name] |= _alike(programs[name](params, *args, **key)[1], exact)
    return {
        "package": package,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "loss_by_example": by_example,
        "methods": rows,
        **_attempt(_identity, mean, programs["FG-W"], programs["BP"], params, args),
        **_attempt(_built, mean, params, args),
    }


def _attempt(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    try:
        return function(*args)
    except Exception as error:
        return {f"{function.__name__.strip('_')}_{k}": v for k, v in _failure(error).items()}


def _failure(error: Exception) -> dict[str, str]:
    if isinstance(error, fg.InputError):
        return {"refused": str(error)}
    lines = str(error).strip().splitlines() or [""]
    return {"error": f"{type(error).__name__}: {lines[0]}"}


def _measured(
    function: Callable, params: Any, args: tuple, key: Mapping[str, Any], repeats: int
) -> tuple[dict[str, Any], Callable | None]:
    """What a function costs to trace, compile and run; and the compiled function."""
    try:
        # The first trace fills caches that all later ones find.
        traced = _traced(function, params, args, key)
        compile_seconds, compiled = _seconds(lambda: traced.lower().compile())
        again = (_traced, function, params, args, key)
        seconds = [_seconds(*again, clock=time.process_time)[0] for _ in range(repeats)]
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        results = jax.tree.leaves(compiled(params, *args, **key))
    except Exception as error:
        return _failure(error), None
    row = {
        "flops": cost.get("flops"),
        "temp_bytes": memory.temp_size_in_bytes,
        "trace_seconds": median(seconds),
        "compile_seconds": compile_seconds,
        "finite": bool(jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in results]))),
    }
    return row, compiled


def _traced(function, params, args, key):
    # A new function each time: JAX remembers what it has traced.
    return jax.jit(lambda *a, **k: function(*a, **k)).trace(params, *args, **key)


def _seconds(
    function: Callable, *args: Any, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, Any]:
    began = clock()
    result = function(*args)
    return clock() - began, result


def _identity(
    loss: Callable,
    estimate: Callable | None,
    exact: Callable | None,
    params: Any,
    args: tuple,
) -> dict[str, Any]:
    """The one-tangent identity, and how <e, g> was found."""
    if estimate is None:
        return {"identity": None, "right": False}
    estimates = [estimate(params, *args, key=jax.random.key(SEED + i))[1] for i in range(KEYS)]
    if exact is not None:
        gradient = exact(params, *args)[1]
        products = [_sum(jnp.vdot, gradient, g) for g in estimates]
    else:
        along = jax.jit(lambda p, g: jax.jvp(lambda p: loss(p, *args), (p,), (g,))[1])
        products = [float(along(params, g)) for g in estimates]
    ratios = [
        _sum(jnp.vdot, g, g) / (product * _sum(lambda a, _: jnp.count_nonzero(a), g, g) or math.nan)
        for g, product in zip(estimates, products, strict=True)
    ]
    # The worst: errors of several keys may cancel each other. JSON has no nan.
    worst = max(ratios, key=lambda r: abs(r - 1) if math.isfinite(r) else math.inf)
    return {
        "identity": worst if math.isfinite(worst) else None,
        "right": abs(worst - 1) < 0.01,
        "exact_by": "forward mode" if exact is None else "reverse mode",
    }


def _alike(grads: Any, exact: Any) -> dict[str, int]:
    """The parameters with a gradient, and those of them whose gradient is the exact one."""
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True)
    near = [jnp.linalg.norm(g - e) <= 1e-3 * jnp.linalg.norm(e) for g, e in pairs if jnp.any(e)]
    return {"leaves": len(near), "exact_leaves": int(sum(near))}


def _sum(function: Callable, a: Any, b: Any) -> float:
    """The sum of `function` over the leaves of two trees."""
    return float(sum(jax.tree.leaves(jax.tree.map(function, a, b))))


SITE = re.compile(r"\S*/(?=site-packages/|benchmarks/)")
"""Where a machine keeps its packages."""


def _built(loss: Callable, params: Any, args: tuple) -> dict[str, Any]:
    """How each parameter's gradient comes about in FG-W, and why a tangent had to be an array."""
    rows = [
        {
            "path": row.path,
            "shape": list(row.shape),
            "how": row.how,
            "where": [SITE.sub("", where) for where in row.where],
        }
        for row in fg.explain(loss, METHODS["FG-W"], params, *args).rows
    ]
    return {"rows": rows, "dense_matrices": [r["path"] for r in rows if _dense_matrix(r)]}


def _dense_matrix(row: Mapping[str, Any]) -> bool:
    """Whether a parameter of more than one axis has a tangent that is built."""
    return row["how"] == "dense" and sum(n > 1 for n in row["shape"]) > 1


def _note(row: Mapping[str, Any]) -> str:
    if row.get("leaves") and row["leaves"] == row["exact_leaves"]:
        return "returns the exact gradient"
    return row.get("refused") or row.get("error") or ("" if row["finite"] else "not finite")


def table(name: str, result: Mapping[str, Any]) -> Table | str:
    """The results of one model, relative to backpropagation and to the forward pass."""
    if "methods" not in result:
        return f"{name}: {result.get('refused') or result['error']}"
    methods = result["methods"]
    identity = result.get("identity")
    dense = result.get("dense_matrices", [])
    title = f"{name} ({result['package']}, {result['parameters']} parameters)"
    shown = Table(title=title, caption_justify="left")
    shown.caption = "\n".join(
        [
            f"identity: {'unknown' if identity is None else f'{identity:.4f}'}"
            f" ({'right' if result.get('right') else 'WRONG'})",
            f"dense: {', '.join(dense) or 'no matrix'}",
            *[f"{m}: {note}" for m, row in methods.items() if (note := _note(row))],
            *[f"{k}: {v}" for k, v in result.items() if re.search("_(refused|error)$", k)],
        ]
    )
    columns = ("", "flops / BP", "/ forward", "temp / BP", "/ forward", "trace / BP", "compile s")
    for column in columns:
        shown.add_column(column, justify="left" if column == "" else "right", no_wrap=True)

    def ratio(row, of, quantity):
        a, b = row.get(quantity), methods[of].get(quantity)
        return f"{a / b:.2f}" if a and b else ""

    for method, row in methods.items():
        shown.add_row(
            method,
            ratio(row, "BP", "flops"),
            ratio(row, "forward only", "flops"),
            ratio(row, "BP", "temp_bytes"),
            ratio(row, "forward only", "temp_bytes"),
            ratio(row, "BP", "trace_seconds"),
            f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "",
        )
    return shown


if __name__ == "__main__":
    cases = {name: functools.partial(lambda m: m, m) for name, m in MODELS.items()}
    options = tyro.cli(Options, description=__doc__)
    measure.run("third_party", cases, options, examine, table, seed=SEED)
