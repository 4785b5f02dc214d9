"""Training: one step, one loop, checkpoints, metrics, readouts."""

from forwardgrad.training._algorithms import ALGORITHMS
from forwardgrad.training._config import (
    AugmentationSettings,
    DecoderSettings,
    ImageSettings,
    NetworkSettings,
    NoiseSettings,
    NoSettings,
    OptimizerSettings,
    TextSettings,
    TrainConfig,
    configure,
)
from forwardgrad.training._devices import Devices
from forwardgrad.training._folder import Run, command, read_run
from forwardgrad.training._interrupt import Interrupted
from forwardgrad.training._loop import fit, load_run
from forwardgrad.training._readout import fit_readout, readout_file
from forwardgrad.training._setup import Problem, problem

__all__ = [
    "ALGORITHMS",
    "AugmentationSettings",
    "DecoderSettings",
    "Devices",
    "ImageSettings",
    "Interrupted",
    "NetworkSettings",
    "NoSettings",
    "NoiseSettings",
    "OptimizerSettings",
    "Problem",
    "Run",
    "TextSettings",
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
