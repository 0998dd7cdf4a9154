"""Small reference networks by name, and their weights from files that cannot run code."""

from saddlepoint.zoo.registry import ENTRIES, Entry, build, names
from saddlepoint.zoo.weights import load_weights, save_weights

__all__ = ["ENTRIES", "Entry", "build", "load_weights", "names", "save_weights"]
