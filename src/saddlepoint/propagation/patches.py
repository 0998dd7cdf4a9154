"""Networks whose first neurons see few inputs each, as in small windows: bounds without one relaxation for the whole box."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saddlepoint.propagation.affine import batched, linear_part, spread
from saddlepoint.propagation.bounds import Bounded, sound
from saddlepoint.propagation.nodes import Node
from saddlepoint.propagation.relax import Elementwise, Planes
from saddlepoint.propagation.sets import Box

_CELLS = 512  # that a patch is cut into, at most
_AT_ONCE = 2**20  # neurons in cells that are relaxed at once
_COPIES = 8  # tensors with a number for each input in each cell that are alive at once
_RATE, _DECAY = 0.02, 0.98  # of the ascent; the first as a share of the prices


@dataclass(frozen=True)
class Patches:
    """The neurons of a first layer in G patches, each of up to M neurons that see the same up to S inputs.

    Neurons that see none are in no patch. node: their nonlinearity s. inputs (G, S), neurons (G, M): flat places, -1 for none.
    weights (G, M, S), bias (G, M): what goes into s is weights times inputs + bias; where there is no neuron, a neighbour's.
    size (G, M): how large the sums that these come from are, for inputs of size 1. cells: parts that each input is cut into.
    """

    node: Node
    inputs: Tensor
    neurons: Tensor
    weights: Tensor
    bias: Tensor
    size: Tensor
    cells: int

    @staticmethod
    def of(bounded: Bounded) -> Patches | None:
        """Those of a network over boxes in which one elementwise nonlinearity comes first, whose neurons see few inputs each.

        None for other networks, and where the memory isn't enough.
        """
        graph, box = bounded.graph, bounded.boxes[bounded.graph.input]
        plain = {graph.input}  # affine in the input
        affine: list[Node] = []
        first: list[Node] = []
        for node in graph.nodes:
            if plain.issuperset(node.inputs):
                (affine if node.rule is None else first).append(node)
                plain.update([node.name] if node.rule is None else [])
        if len(first) != 1 or not isinstance(first[0].rule, Elementwise) or len(first[0].inputs) != 1 or type(box) is not Box:
            return None
        (node,), (name,) = first, first[0].inputs
        width, count = math.prod(node.shape), graph.shape.numel()
        one = box.lower.new_zeros(1, 1, width).index_fill_(2, torch.tensor([width // 2], device=box.lower.device), 1)
        sample = int(bounded.linear(name, one.view(1, 1, *node.like[0].shape[1:])).coefficients.count_nonzero())
        held = 2 * count * (width + sum(math.prod(node.shape) for node in affine)) * torch.float64.itemsize
        if 2**sample > _CELLS or held > bounded.memory:
            return None

        # In float64, as the linear part is a difference from which small weights beside large constants vanish.
        exact = graph.double if graph.convert is not None else graph
        named, zero = {node.name: node for node in exact.nodes}, torch.zeros(1, *graph.shape).to(exact.nodes[0].like[0])
        terms = {graph.input: torch.eye(count).to(zero).view(count, *graph.shape)}
        middles, sizes = {graph.input: zero}, {graph.input: torch.ones_like(zero)}
        for step in (named[node.name] for node in affine):
            terms[step.name] = linear_part(step, [terms[one] for one in step.inputs])
            middles[step.name] = batched(step, step.apply, *(middles[one] for one in step.inputs))
            size = spread(step, [sizes[one] for one in step.inputs])
            sizes[step.name] = size if step.constant is None else size + step.constant.abs()
        seen = terms[name].flatten(1).T  # (E, n)
        few = int((seen != 0).sum(1).max())
        if few == 0 or 2**few > _CELLS:
            return None
        neuron, place = seen.nonzero(as_tuple=True)
        table = _table(neuron, place, width)
        seeing = (table[:, 0] >= 0).nonzero()[:, 0]
        inputs, patch = torch.unique(table[seeing], dim=0, return_inverse=True)
        patch, order = patch.sort(stable=True)
        neurons = _table(patch, seeing[order], len(inputs))
        room = bounded.memory // (_COPIES * torch.float64.itemsize)
        cells = int(min(_CELLS, room // max(inputs.numel(), neurons.shape[1])) ** (1 / few) + 1e-9)
        if cells < 2 or neurons.numel() * few > room:
            return None
        filled = torch.where(neurons >= 0, neurons, neurons[:, :1])  # by a neighbour, where the nonlinearity is defined
        weights = seen[filled[:, :, None], inputs.clamp(min=0)[:, None]] * (inputs >= 0)[:, None]
        bias, size = (known[name].flatten()[filled] for known in (middles, sizes))
        weights, bias, size = (value.to(box.lower) for value in (weights, bias, size))
        return Patches(node, inputs, neurons, weights, bias, size, cells)

    def lowest(
        self, bounded: Bounded, rows: Tensor, steps: int, enough: Tensor, late: Callable[[], bool] = lambda: False
    ) -> Tensor:
        """Lower bounds (R,) of rows (1, R, C) times the outputs, over one box.

        All layers but the first are relaxed as in CROWN, which leaves

            e + c x + sum_p f_p(x_p),    f_p(x_p) = the sum of d_j s(w_j x_p + b_j) over the neurons j of patch p

        where patches share inputs. For any prices l_p whose sum at each input is c there (Lagrangian decomposition, Guignard &
        Kim 1987),

            min over x of all that  >=  e + sum_p min over x_p of (f_p(x_p) + l_p x_p)

        The minimum over a patch is that over the cells of a grid of planes below the function there. Prices ascend by Adam from
        those with which all patches lie on CROWN's one plane. What is lost is what planes lose in cells, which shrinks with the
        square of their width, and the difference that agreeing on shared inputs makes. A cell's plane can be below that of the
        whole box, so what CROWN gives can be better and counts too.

        steps: of the ascent. It ends where a bound is above enough (R,), and when late() says so.
        """
        graph, box, name = bounded.graph, bounded.boxes[bounded.graph.input], self.node.name
        ends, zero = bounded.boxes[name], torch.zeros_like(self.node.like[0])
        inside = zero.bool().flatten().index_fill_(0, self.neurons[self.neurons >= 0], True).view_as(zero)
        flat = Planes((zero,), torch.where(inside, 0, ends.lower), (zero,), torch.where(inside, 0, ends.upper))
        line = replace(bounded, _planes={name: flat}).linear(graph.output, rows)
        d = line.inner[name].flatten(2)[0][:, self.neurons.clamp(min=0)] * (self.neurons >= 0)  # (R, G, M)
        c = line.coefficients.flatten(2)[0]  # (R, n)
        present, inputs = self.inputs >= 0, self.inputs.clamp(min=0)
        middle, radius = box.middle.flatten()[inputs] * present, box.radius.flatten()[inputs] * present
        slack = bounded.unit() if bounded.outward else 0.0
        reach = middle.abs() + radius
        rounding = slack * self.size * (1 + float(torch.maximum(box.lower.abs(), box.upper.abs()).sum()))
        whole = self._planes(d, middle[:, None], radius, rounding, slack)[0][:, :, 0]  # (R, G, S)
        grid = _grid(self.cells, inputs.shape[1]).to(middle)
        points, width = middle[:, None] + radius[:, None] * grid, radius / self.cells + slack * reach
        patches, parts = torch.arange(len(inputs), device=inputs.device), []
        room = min(_AT_ONCE, bounded.memory // (2 * _COPIES * torch.float64.itemsize))
        for some in torch.split(patches, max(1, room // (self.neurons.shape[1] * len(grid)))):
            if late():
                return c.new_full((len(c),), -torch.inf)
            part = replace(self, weights=self.weights[some], bias=self.bias[some])
            parts.append(part._planes(d[:, some], points[some], width[some], rounding[some], slack))
        slopes, constants = (torch.cat(part, 1) for part in zip(*parts, strict=True))
        sharing = c.new_zeros(c.shape[1]).index_add(0, inputs.flatten(), present.flatten().to(c))
        alone = torch.where(sharing == 0, c, 0).view(1, *line.coefficients.shape[1:])
        fixed = line.constant[0] + Box(box.lower, box.upper).least(alone)[0]
        if bounded.outward:
            fixed = fixed - bounded.error(graph.output, rows)[0]

        def bound(prices: Tensor) -> Tensor:
            """(R,), for prices (R, G, S), which get what is missing in equal parts."""
            total = torch.zeros_like(c).index_add(1, inputs.flatten(), (prices * present).flatten(1))
            prices = (prices + ((c - total) / sharing.clamp(min=1))[:, inputs]) * present
            a = slopes + prices[:, :, None]
            least = constants + (a * points).sum(-1) - (a.abs() * width[:, None]).sum(-1)  # (R, G, cells)
            return sound(least.amin(2).sum(1) + fixed - slack * (prices.abs() * reach).sum((1, 2)))

        best = bound(-whole)
        if not bool(best.isfinite().all()):
            return best
        scale = float(whole.abs().mean()) or float((d.abs()[..., None, :] @ self.weights.abs()).mean())
        with torch.enable_grad():
            prices = (-whole).requires_grad_()
            optimizer = torch.optim.Adam([prices], lr=_RATE * scale)
            for _ in range(steps):
                if late() or bool((best > enough).any()):
                    break
                found = bound(prices)
                best = torch.maximum(best, found.detach())
                optimizer.zero_grad()
                torch.autograd.backward(-found.sum())
                optimizer.step()
                optimizer.param_groups[0]["lr"] *= _DECAY
        return best

    def _planes(
        self, d: Tensor, points: Tensor, width: Tensor, rounding: Tensor, slack: float
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Below each patch's function in cells (G, Q, S) of width (G, S): coefficients (R, G, Q, S), constants (R, G, Q).

        rounding: of what goes into the neurons, (G, M). slack: that of sums, as a share of their terms.
        """
        at = points @ self.weights.mT + self.bias[:, None]  # (G, Q, M)
        around = ((self.weights.abs() @ width[:, :, None])[..., 0] + rounding)[:, None]
        assert self.node.rule is not None
        found = self.node.rule.planes(Box(at - around, at + around))
        coefficients, constants = [], []
        for row in d:  # (G, M)
            up, down = row.clamp(min=0)[:, None], row.clamp(max=0)[:, None]
            slopes = up * found.low[0] + down * found.high[0]
            constant = (slopes * self.bias[:, None] - 2 * slopes.abs() * rounding[:, None]).sum(-1)
            for part, end in ((up, found.low_offset), (down, found.high_offset)):
                if end is not None:
                    moved = torch.where(part == 0, 0, part * end)
                    constant = constant + (moved - slack * moved.abs()).sum(-1)
            coefficients.append(slopes @ self.weights)
            constants.append(constant)
        return torch.stack(coefficients), torch.stack(constants)


def _table(row: Tensor, value: Tensor, rows: int) -> Tensor:
    """The values of each row, (rows, most), in their order; -1 for none. row (K,) ascending, value (K,)."""
    counts = row.bincount(minlength=rows)
    rank = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    return row.new_full((rows, int(counts.max())), -1).index_put((row, rank), value)


def _grid(cells: int, dimensions: int) -> Tensor:
    """The middles (cells ** dimensions, dimensions) of equal cells of [-1, 1]^dimensions."""
    ticks = (2 * torch.arange(cells, dtype=torch.float64) + 1) / cells - 1
    return torch.cartesian_prod(*[ticks] * dimensions).view(-1, dimensions)
