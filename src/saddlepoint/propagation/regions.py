"""The feasible sets of a threat as sets that bounds hold over."""

from __future__ import annotations

import torch

from saddlepoint.errors import CapabilityError
from saddlepoint.propagation.sets import Ball, Box
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import Region


def inputs_of(region: Region) -> Box:
    """The inputs of a bound threat: for l-infinity its box; for l2 and l1 a ball cut with the range and the mask.

    Errors: `CapabilityError` for other norms.
    """
    norm = region.threat.norm
    if norm is Norm.LINF:
        return Box(region.lower, region.upper)
    if norm not in (Norm.L2, Norm.L1):
        raise CapabilityError(f"bounds are known for l-infinity, l2 and l1; the threat is {region.threat}")
    radius = region.eps.to(region.origin.dtype)
    wide = radius.view(-1, *[1] * (region.origin.dim() - 1))
    lower = torch.maximum(region.lower, region.origin - wide)
    upper = torch.minimum(region.upper, region.origin + wide)
    ends = torch.minimum(lower, region.origin), torch.maximum(upper, region.origin)
    return Ball(*ends, region.origin, radius, "l2" if norm is Norm.L2 else "l1")
