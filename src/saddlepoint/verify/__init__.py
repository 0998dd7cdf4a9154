"""Proofs: bounds of what a network can answer within a set, complete search, properties in files."""

from saddlepoint.propagation.bounds import OutputBounds, bounds
from saddlepoint.propagation.graph import read
from saddlepoint.propagation.sets import Ball, Box
from saddlepoint.verify.cases import Cases
from saddlepoint.verify.certify import Certification, certify
from saddlepoint.verify.prove import Proof, prove
from saddlepoint.verify.vnnlib import Property, read_vnnlib

__all__ = [
    "Ball", "Box", "Cases", "Certification", "OutputBounds", "Proof", "Property", "bounds", "certify", "prove", "read",
    "read_vnnlib",
]  # fmt: skip
