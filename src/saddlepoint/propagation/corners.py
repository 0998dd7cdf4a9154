"""Where linear bounds are least: the corners of the input set from which a search for counterexamples starts best."""

from __future__ import annotations

import torch
from torch import Tensor

from saddlepoint.propagation.bounds import Bounded


def corners(bounded: Bounded, rows: Tensor) -> Tensor:
    """Minimisers (N, S, R, ...) of the linear lower bounds of rows (N, R, C) times the outputs, for S choices of lower slopes.

    The choices: CROWN's, 0, 1, and parallel to the upper line. Each bound errs elsewhere, so that one of the corners is often
    on the right side of a wall that gradients at random points don't see.
    """
    graph, box = bounded.graph, bounded.boxes[bounded.graph.input]
    slopes: dict[str, Tensor] = {}
    first = bounded.linear(graph.output, rows, slopes)
    found = [first.lowest_at(box)]
    for choice in ("zero", "one", "parallel") if slopes else ():
        table = {}
        for node in graph.nodes:
            if node.name in slopes:
                ends, like = bounded.boxes[node.inputs[0]], slopes[node.name]
                share = {"zero": torch.zeros_like(ends.lower), "one": torch.ones_like(ends.lower)}.get(choice)
                if share is None:
                    wide = (ends.upper - ends.lower).clamp(min=torch.finfo(like.dtype).tiny)
                    share = (ends.upper / wide).clamp(0, 1)
                table[node.name] = share[:, None].expand_as(like)
        found.append(bounded.linear(graph.output, rows, table).lowest_at(box))
    return torch.stack(found, 1)
