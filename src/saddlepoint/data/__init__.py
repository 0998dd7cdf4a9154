"""Datasets as plain tensors: embedded, found on this computer, or fetched with checksums when asked to."""

from saddlepoint.data.catalog import fetch, load, names
from saddlepoint.data.dataset import Dataset, Split

__all__ = ["Dataset", "Split", "fetch", "load", "names"]
