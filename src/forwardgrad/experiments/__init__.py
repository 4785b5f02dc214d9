"""The papers' experiments, each one command."""

from forwardgrad._provenance import provenance
from forwardgrad.experiments._ablation import ABLATION
from forwardgrad.experiments._diagnose import DiagnoseOptions, run_diagnose
from forwardgrad.experiments._experiment import Cells, Experiment, Job, as_options
from forwardgrad.experiments._measure import Step, checkpointed, interleave
from forwardgrad.experiments._mnist import MNIST
from forwardgrad.experiments._scaling import SCALING, checkpointed_mlp_loss, mlp_loss, mlp_problem
from forwardgrad.experiments._tables import COMPARE, TABLE3, TABLE4, in_order, is_row
from forwardgrad.experiments._token_cosines import TOKENS_COSINE
from forwardgrad.experiments._tokens import TOKENS
from forwardgrad.experiments._toy import TOY
from forwardgrad.experiments._variance import VARIANCE

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (TOY, *MNIST, SCALING, TABLE3, TABLE4, ABLATION, VARIANCE, TOKENS, TOKENS_COSINE)
}
"""Experiments by the name that `forwardgrad reproduce` knows them by."""

__all__ = [
    "COMPARE",
    "EXPERIMENTS",
    "Cells",
    "DiagnoseOptions",
    "Experiment",
    "Job",
    "Step",
    "as_options",
    "checkpointed",
    "checkpointed_mlp_loss",
    "in_order",
    "interleave",
    "is_row",
    "mlp_loss",
    "mlp_problem",
    "provenance",
    "run_diagnose",
]
