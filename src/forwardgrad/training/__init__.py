"""Training: one step, one loop, checkpoints, metrics, readouts."""

from forwardgrad.training._algorithms import ALGORITHMS as ALGORITHMS
from forwardgrad.training._config import ImageSettings as ImageSettings
from forwardgrad.training._config import NetworkSettings as NetworkSettings
from forwardgrad.training._config import OptimizerSettings as OptimizerSettings
from forwardgrad.training._config import TrainConfig as TrainConfig
from forwardgrad.training._config import configure as configure
from forwardgrad.training._folder import Run as Run
from forwardgrad.training._folder import command as command
from forwardgrad.training._folder import read_run as read_run
from forwardgrad.training._interrupt import Interrupted as Interrupted
from forwardgrad.training._loop import fit as fit
from forwardgrad.training._loop import load_run as load_run
from forwardgrad.training._readout import fit_readout as fit_readout
from forwardgrad.training._readout import readout_file as readout_file
from forwardgrad.training._setup import Problem as Problem
from forwardgrad.training._setup import problem as problem

__all__ = [
    "ALGORITHMS",
    "ImageSettings",
    "Interrupted",
    "NetworkSettings",
    "OptimizerSettings",
    "Problem",
    "Run",
    "TrainConfig",
    "command",
    "configure",
    "fit",
    "fit_readout",
    "load_run",
    "problem",
    "read_run",
    "readout_file",
]
