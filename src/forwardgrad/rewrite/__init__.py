"""Rewriting a function's program so that weights can be perturbed without building tangents."""

from forwardgrad.rewrite._flow import MIXED as MIXED
from forwardgrad.rewrite._flow import UNKNOWN as UNKNOWN
from forwardgrad.rewrite._flow import Part as Part
from forwardgrad.rewrite._flow import Place as Place
from forwardgrad.rewrite._layers import Activation as Activation
from forwardgrad.rewrite._layers import Hooks as Hooks
from forwardgrad.rewrite._layers import LayerWalk as LayerWalk
from forwardgrad.rewrite._layers import Site as Site
from forwardgrad.rewrite._mark import activation as activation
from forwardgrad.rewrite._mark import transparent as transparent
from forwardgrad.rewrite._perturbed import placed_like as placed_like
from forwardgrad.rewrite._plan import Layer as Layer
from forwardgrad.rewrite._primitives import SENT_BACK as SENT_BACK
from forwardgrad.rewrite._primitives import line_of as line_of
from forwardgrad.rewrite._program import FactorShape as FactorShape
from forwardgrad.rewrite._program import Layout as Layout
from forwardgrad.rewrite._program import Program as Program
from forwardgrad.rewrite._program import combine_tangents as combine_tangents
from forwardgrad.rewrite._program import computed_in as computed_in
from forwardgrad.rewrite._program import dense_layout as dense_layout
from forwardgrad.rewrite._program import factor_shape as factor_shape
from forwardgrad.rewrite._program import masked_rows as masked_rows
from forwardgrad.rewrite._program import named as named
from forwardgrad.rewrite._program import perturbed as perturbed
from forwardgrad.rewrite._rows import Lookup as Lookup
from forwardgrad.rewrite._shared import shared as shared
from forwardgrad.rewrite._stages import Stage as Stage
from forwardgrad.rewrite._stages import after as after
from forwardgrad.rewrite._trace import evaluate as evaluate
from forwardgrad.rewrite._trace import is_inexact as is_inexact
from forwardgrad.rewrite._walk import Walk as Walk
from forwardgrad.rewrite._workers import check_typed as check_typed
from forwardgrad.rewrite._workers import gathered as gathered
from forwardgrad.rewrite._workers import key_of_worker as key_of_worker
from forwardgrad.rewrite._workers import summed_change as summed_change
from forwardgrad.rewrite._workers import summed_changes as summed_changes
from forwardgrad.rewrite._workers import varying as varying
from forwardgrad.rewrite._workers import varying_alike as varying_alike
from forwardgrad.rewrite._workers import varying_like as varying_like

__all__ = [
    "MIXED",
    "SENT_BACK",
    "UNKNOWN",
    "Activation",
    "FactorShape",
    "Hooks",
    "Layer",
    "LayerWalk",
    "Layout",
    "Lookup",
    "Part",
    "Place",
    "Program",
    "Site",
    "Stage",
    "Walk",
    "activation",
    "after",
    "check_typed",
    "combine_tangents",
    "computed_in",
    "dense_layout",
    "evaluate",
    "factor_shape",
    "gathered",
    "is_inexact",
    "key_of_worker",
    "line_of",
    "masked_rows",
    "named",
    "perturbed",
    "placed_like",
    "shared",
    "summed_change",
    "summed_changes",
    "transparent",
    "varying",
    "varying_alike",
    "varying_like",
]
