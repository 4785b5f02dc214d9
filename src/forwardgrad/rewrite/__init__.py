"""Rewriting a function's program so that weights can be perturbed without building tangents."""

from forwardgrad.rewrite._program import FactorShape as FactorShape
from forwardgrad.rewrite._program import Layout as Layout
from forwardgrad.rewrite._program import Program as Program
from forwardgrad.rewrite._program import combine_tangents as combine_tangents
from forwardgrad.rewrite._program import dense_layout as dense_layout
from forwardgrad.rewrite._program import factor_shape as factor_shape
from forwardgrad.rewrite._program import named as named
from forwardgrad.rewrite._walk import Walk as Walk

__all__ = [
    "FactorShape",
    "Layout",
    "Program",
    "Walk",
    "combine_tangents",
    "dense_layout",
    "factor_shape",
    "named",
]
