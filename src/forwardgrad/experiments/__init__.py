"""The papers' experiments, each one command."""

from forwardgrad._provenance import provenance as provenance
from forwardgrad.experiments._ablation import ABLATION
from forwardgrad.experiments._diagnose import DiagnoseOptions as DiagnoseOptions
from forwardgrad.experiments._diagnose import run_diagnose as run_diagnose
from forwardgrad.experiments._experiment import Cells as Cells
from forwardgrad.experiments._experiment import Experiment as Experiment
from forwardgrad.experiments._experiment import Job as Job
from forwardgrad.experiments._experiment import as_options as as_options
from forwardgrad.experiments._measure import Step as Step
from forwardgrad.experiments._measure import checkpointed as checkpointed
from forwardgrad.experiments._measure import interleave as interleave
from forwardgrad.experiments._mnist import MNIST
from forwardgrad.experiments._scaling import SCALING
from forwardgrad.experiments._scaling import checkpointed_mlp_loss as checkpointed_mlp_loss
from forwardgrad.experiments._scaling import mlp_loss as mlp_loss
from forwardgrad.experiments._scaling import mlp_problem as mlp_problem
from forwardgrad.experiments._tables import COMPARE as COMPARE
from forwardgrad.experiments._tables import TABLE3, TABLE4
from forwardgrad.experiments._tables import UNTRAINED as UNTRAINED
from forwardgrad.experiments._tables import in_order as in_order
from forwardgrad.experiments._toy import TOY
from forwardgrad.experiments._variance import VARIANCE

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e for e in (TOY, *MNIST, SCALING, TABLE3, TABLE4, ABLATION, VARIANCE)
}
"""Experiments by the name that `forwardgrad reproduce` knows them by."""

__all__ = [
    "COMPARE",
    "EXPERIMENTS",
    "UNTRAINED",
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
    "mlp_loss",
    "mlp_problem",
    "provenance",
    "run_diagnose",
]
