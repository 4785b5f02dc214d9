"""Data sets of labelled images and of text, by name, from files, folders or the hub."""

from forwardgrad.data._dataset import Dataset, ResidentSplit, Split
from forwardgrad.data._load import NAMES, RESIDENT_LIMIT, load
from forwardgrad.data._stream import StreamedSplit
from forwardgrad.data._text import ResidentText, Text, load_text
from forwardgrad.data._vocabulary import Bytes, Characters, Pieces, Vocabulary

__all__ = [
    "NAMES",
    "RESIDENT_LIMIT",
    "Bytes",
    "Characters",
    "Dataset",
    "Pieces",
    "ResidentSplit",
    "ResidentText",
    "Split",
    "StreamedSplit",
    "Text",
    "Vocabulary",
    "load",
    "load_text",
]
