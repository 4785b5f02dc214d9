"""Data sets of labelled images, by name, from files, folders or the Hugging Face hub."""

from forwardgrad.data._dataset import Dataset as Dataset
from forwardgrad.data._dataset import ResidentSplit as ResidentSplit
from forwardgrad.data._dataset import Split as Split
from forwardgrad.data._load import NAMES as NAMES
from forwardgrad.data._load import RESIDENT_LIMIT as RESIDENT_LIMIT
from forwardgrad.data._load import load as load
from forwardgrad.data._stream import StreamedSplit as StreamedSplit

__all__ = [
    "NAMES",
    "RESIDENT_LIMIT",
    "Dataset",
    "ResidentSplit",
    "Split",
    "StreamedSplit",
    "load",
]
