"""Proofs: bounds of what a network can answer within a set, complete search, exact distances, votes under noise."""

from saddlepoint.propagation.graph import read
from saddlepoint.propagation.methods import OutputBounds, bounds
from saddlepoint.propagation.sets import Ball, Box
from saddlepoint.verify.cases import Cases
from saddlepoint.verify.certify import Certification, certify
from saddlepoint.verify.exact import Nearest, nearest, proved_radius
from saddlepoint.verify.milp import Programme
from saddlepoint.verify.properties import decide
from saddlepoint.verify.prove import Proof, prove
from saddlepoint.verify.smoothing import Certificates
from saddlepoint.verify.smoothing import certify as certify_smoothed
from saddlepoint.verify.vnnlib import Property, parse_vnnlib, read_vnnlib

__all__ = [
    "Ball", "Box", "Cases", "Certificates", "Certification", "Nearest", "OutputBounds", "Programme", "Proof", "Property",
    "bounds", "certify", "certify_smoothed", "decide", "nearest", "parse_vnnlib", "prove", "proved_radius", "read",
    "read_vnnlib",
]  # fmt: skip
