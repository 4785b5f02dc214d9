"""Data sets of labelled images, by name, from files, folders or the Hugging Face hub."""

from forwardgrad.data._dataset import Dataset, ResidentSplit, Split
from forwardgrad.data._load import NAMES, RESIDENT_LIMIT, load
from forwardgrad.data._stream import StreamedSplit

__all__ = [
    "NAMES",
    "RESIDENT_LIMIT",
    "Dataset",
    "ResidentSplit",
    "Split",
    "StreamedSplit",
    "load",
]
