"""Rewriting a function's program so that weights can be perturbed without building tangents."""

from forwardgrad.rewrite._examples import of_examples as of_examples
from forwardgrad.rewrite._layers import Activation as Activation
from forwardgrad.rewrite._layers import Hooks as Hooks
from forwardgrad.rewrite._layers import activation as activation
from forwardgrad.rewrite._layers import parameter as parameter
from forwardgrad.rewrite._program import FactorShape as FactorShape
from forwardgrad.rewrite._program import Layout as Layout
from forwardgrad.rewrite._program import Program as Program
from forwardgrad.rewrite._program import combine_tangents as combine_tangents
from forwardgrad.rewrite._program import dense_layout as dense_layout
from forwardgrad.rewrite._program import factor_shape as factor_shape
from forwardgrad.rewrite._program import named as named
from forwardgrad.rewrite._program import perturbed as perturbed
from forwardgrad.rewrite._stages import Stage as Stage
from forwardgrad.rewrite._stages import after as after
from forwardgrad.rewrite._walk import Walk as Walk
from forwardgrad.rewrite._walk import evaluate as evaluate

__all__ = [
    "Activation",
    "FactorShape",
    "Hooks",
    "Layout",
    "Program",
    "Stage",
    "Walk",
    "activation",
    "after",
    "combine_tangents",
    "dense_layout",
    "evaluate",
    "factor_shape",
    "named",
    "of_examples",
    "parameter",
    "perturbed",
]
