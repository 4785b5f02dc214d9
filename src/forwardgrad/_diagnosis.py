"""What a diagnosis says: rows of numbers, as JSON and as a table."""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class DiagnosisRow:
    r"""How estimates of a layer's gradient, or of the whole one, compare with the exact gradient.

    With S estimates $\hat g_s$ in pairs, their mean m and the exact gradient g:

    $$V = \frac1S \sum_{i=1}^{S/2} \lVert \hat g_{2i-1} - \hat g_{2i} \rVert^2, \qquad
    \beta^2 = \lVert m - g \rVert^2 - \frac VS, \qquad
    z = \frac{\beta^2}{\sigma}.$$

    V is the total variance of one estimate, the trace of its covariance Σ. The mean of S unbiased
    estimates still differs from g, by $V / S$ in expected squared norm. This is subtracted, so that
    $\beta^2$ is an unbiased estimate of the squared norm of the bias. Noise may make it negative.

    σ is its standard error if there is no bias,
    $\sigma^2 = 2 \frac{S + 2}{S^3} \operatorname{tr} \Sigma^2
    + \epsilon^4 (\lVert g \rVert^2 + \lVert m \rVert^2)^2$.
    For the differences $\delta_i$ of the pairs, $E (\delta_i \cdot \delta_{i+1})^2 =
    4 \operatorname{tr} \Sigma^2$, whatever the bias, and $\operatorname{tr} \Sigma^2$ is never less
    than $V^2$ divided by the number of parameters. The term with ε, 32 units of rounding, serves
    estimators without noise: their z is either close to 0 or very large.

    If there is no bias, z has mean 0 and variance 1. Its distribution lies between the normal one
    (noise in many directions) and that of $(\chi^2_1 - 1) / \sqrt 2$ (noise in one direction). It
    is above 5 with a probability of at most half a per cent.

    **Arguments:**

    - `name`: the layer's path in `params` (`jax.tree_util.keystr`), or `"all"`.
    - `parameters`: how many it has.
    - `norm`: of the exact gradient.
    - `cosine`, `cosine_error`: between one estimate and the exact gradient, the mean over samples
        and its standard error. None where the exact gradient is zero.
    - `cosine_of_mean`: between the mean estimate and the exact gradient.
    - `bias_squared`, `bias_squared_error`: $\beta^2$ and σ.
    - `variance`, `variance_error`: V and its standard error.
    """

    name: str
    parameters: int
    norm: float
    cosine: float | None
    cosine_error: float | None
    cosine_of_mean: float | None
    bias_squared: float
    bias_squared_error: float
    variance: float
    variance_error: float

    @property
    def bias(self) -> float | None:
        """The bias relative to the exact gradient: β / ‖g‖, or 0 where noise explains it all."""
        return ratio(math.sqrt(max(self.bias_squared, 0.0)), self.norm)

    @property
    def bias_error(self) -> float | None:
        """The relative bias that is one standard error away from none: √σ / ‖g‖."""
        return ratio(math.sqrt(self.bias_squared_error), self.norm)

    @property
    def bias_z(self) -> float | None:
        """z; None where the gradient and all its estimates are zero."""
        return ratio(self.bias_squared, self.bias_squared_error)

    @property
    def variance_per_parameter(self) -> float | None:
        """V divided by the number of parameters."""
        return ratio(self.variance, self.parameters)

    @property
    def relative_variance(self) -> float | None:
        """V / ‖g‖²."""
        return ratio(self.variance, self.norm**2)

    @property
    def signal_to_noise(self) -> float | None:
        """‖g‖ / √V; None where there is no noise."""
        return ratio(self.norm, math.sqrt(self.variance))

    def as_json(self) -> dict[str, Any]:
        """All of its numbers."""
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in _DERIVED}}


_DERIVED = (
    *("bias", "bias_error", "bias_z"),
    *("variance_per_parameter", "relative_variance", "signal_to_noise"),
)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What [`forwardgrad.diagnose`][] finds. Printed, it is a table.

    **Arguments:**

    - `estimator`: as it was given, in words.
    - `samples`: S, the number of estimates.
    - `layers`: a row for every array of parameters.
    - `total`: a row for all of them together.
    - `flops`, `exact_flops`: XLA's count of floating-point operations of one estimate, and of the
        gradient by backpropagation. The body of a loop counts once. None where XLA does not say,
        or there is no reverse mode.
    - `temp_bytes`, `exact_temp_bytes`: XLA's temporary memory of each.
    - `identity_error`: the relative deviation from the identity of one tangent, or None if it was
        not checked.
    """

    estimator: str
    samples: int
    layers: tuple[DiagnosisRow, ...]
    total: DiagnosisRow
    flops: float | None
    exact_flops: float | None
    temp_bytes: int | None
    exact_temp_bytes: int | None
    identity_error: float | None = None

    @property
    def rows(self) -> tuple[DiagnosisRow, ...]:
        """Those of the layers, and the one of all of them last."""
        return (*self.layers, self.total)

    @property
    def flops_ratio(self) -> float | None:
        """Operations of an estimate by those of backpropagation."""
        return ratio(self.flops, self.exact_flops)

    @property
    def temp_bytes_ratio(self) -> float | None:
        """Temporary memory of an estimate by that of backpropagation."""
        return ratio(self.temp_bytes, self.exact_temp_bytes)

    def as_json(self) -> dict[str, Any]:
        """All of its numbers as JSON values, None for what is undefined."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **fields,
            "flops_ratio": self.flops_ratio,
            "temp_bytes_ratio": self.temp_bytes_ratio,
            "layers": [row.as_json() for row in self.layers],
            "total": self.total.as_json(),
        }

    def __str__(self) -> str:
        lines = [HEADS, *(cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [
            [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines
        ]
        title = f"{self.estimator}, {self.samples} samples"
        lines = [title, *("  ".join(line) for line in padded), cost_in_words(self)]
        if self.identity_error is not None:
            lines.append(f"identity of one tangent off by {self.identity_error:.1g}")
        return "\n".join(lines)


HEADS = ("layer", "parameters", "cosine", "of mean", "bias", "error", "z", "variance/|g|^2", "SNR")
"""What the columns of a table are called."""


def cells(row: DiagnosisRow) -> tuple[str, ...]:
    """A row of the table."""
    numbers = (
        (row.cosine, ".3f"),
        (row.cosine_of_mean, ".3f"),
        (row.bias, ".2g"),
        (row.bias_error, ".2g"),
        (row.bias_z, ".2g" if abs(row.bias_z or 0) >= 1000 else ".1f"),
        (row.relative_variance, ".3g"),
        (row.signal_to_noise, ".2g"),
    )
    texts = ("-" if x is None else format(x, spec) for x, spec in numbers)
    return (row.name, f"{row.parameters:,}", *texts)


def cost_in_words(diagnosis: Diagnosis) -> str:
    """Operations and memory, beside those of backpropagation."""
    flops = _beside(diagnosis.flops, "operations", diagnosis.flops_ratio)
    memory = _beside(diagnosis.temp_bytes, "temporary bytes", diagnosis.temp_bytes_ratio)
    return f"{flops}; {memory}"


def _beside(count: float | int | None, what: str, times: float | None) -> str:
    if count is None:
        return f"{what} unknown"
    beside = "" if times is None else f", {times:.2f} times backpropagation's"
    return f"{count:,.0f} {what}{beside}"


def ratio(numerator: float | int | None, denominator: float | int | None) -> float | None:
    """The quotient, None where it is undefined."""
    if numerator is None or not denominator:
        return None
    return numerator / denominator
