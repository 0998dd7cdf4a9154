"""The engine's evaluator: runs the model on points, counts every pass, and offers every point to the recorder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saddlepoint.engine.budget import Budget
from saddlepoint.engine.problem import Evaluator, Found, Gradient, Jacobian, Weights, input_gradient
from saddlepoint.engine.slots import Recorder, Slots
from saddlepoint.errors import ModelError
from saddlepoint.goals import Aim, Loss, loss_named
from saddlepoint.models.base import Classifier
from saddlepoint.trees import take


@dataclass
class ChunkSize:
    """How many rows go through the model at once; halved when memory runs out."""

    rows: int
    halvings: int = 0

    def halve(self, error: Exception) -> None:
        """Halve, or give up with `ModelError` when a single row doesn't fit."""
        if self.rows == 1:
            raise ModelError("out of memory with a single input in the batch") from error
        self.rows, self.halvings = self.rows // 2, self.halvings + 1


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class Judge(Evaluator):
    """Evaluates for the samples in `slots`."""

    def __init__(
        self, model: Classifier, slots: Slots, recorder: Recorder, budget: Budget, chunk: ChunkSize, *, draws: int
    ) -> None:
        self.model, self.slots, self.recorder, self.budget, self.chunk, self.draws = (
            model, slots, recorder, budget, chunk, draws,
        )  # fmt: skip
        self._trusted: tuple[Tensor, int] | None = None

    @property
    def aim(self) -> Aim:
        return self.slots.aim

    def trust(self, points: Tensor) -> Tensor:
        self._trusted = (points, points._version)
        return points

    def forward(self, points: Tensor, owner: Tensor | None) -> Tensor:
        def run(part: Tensor, rows: Tensor | None, where: slice, trusted: bool) -> Gradient:
            with torch.no_grad():
                logits = self._averaged(self._model(part, rows))
            self.recorder.record(self.slots, part, logits, rows, trusted=trusted)
            return Gradient(logits[:, 0], part, logits)

        return self._in_chunks(points, owner, run).logits

    def bare(self, points: Tensor, owner: Tensor) -> Tensor:
        """Logits (Q, C) of one draw, neither offered nor counted: for confirmations."""

        def run(part: Tensor, rows: Tensor | None, where: slice, trusted: bool) -> Gradient:
            with torch.no_grad():
                logits = self.model.forward(part)
            return Gradient(logits[:, 0], part, logits)

        return self._in_chunks(points, owner, run).logits

    def gradient(self, points: Tensor, owner: Tensor | None, loss: str | Loss, aim: Aim | None) -> Gradient:
        def run(part: Tensor, rows: Tensor | None, where: slice, trusted: bool) -> Gradient:
            with torch.enable_grad():
                leaf, drawn, logits = self._looked_at(part, rows, trusted)
                values = self._averaged(loss_named(loss)(drawn.flatten(0, 1), self._aim(rows, aim)).view(len(part), -1))
            if self._all_decided(rows):
                return Gradient(values.detach(), torch.zeros_like(part), logits)
            gradient = input_gradient(values, leaf)
            self._count_backward(rows, len(part))
            return Gradient(values.detach(), self._checked(gradient[:, None], rows)[:, 0], logits)

        return self._in_chunks(points, owner, run)

    def jacobian(self, points: Tensor, owner: Tensor | None, weights: Weights) -> Jacobian:
        def run(part: Tensor, rows: Tensor | None, where: slice, trusted: bool) -> Gradient:
            with torch.enable_grad():
                leaf, drawn, logits = self._looked_at(part, rows, trusted)
                aim = self.slots.aim if rows is None else take(self.slots.aim, rows)
                chosen = weights[where] if isinstance(weights, Tensor) else weights(logits, aim)
                chosen = chosen.to(drawn.dtype) / self.draws
            count = chosen.shape[1]
            if self._all_decided(rows):
                return Gradient(logits[:, 0], part.new_zeros(len(part), count, *part.shape[1:]), logits)
            columns = []  # m backward passes over one graph: no forward pass is repeated
            for column in range(count):
                cotangents = chosen[:, column, None].expand_as(drawn)
                columns.append(input_gradient(drawn, leaf, cotangents, again=column + 1 < count))
                self._count_backward(rows, len(part))
            return Gradient(logits[:, 0], self._checked(torch.stack(columns, 1), rows), logits)

        found = self._in_chunks(points, owner, run)
        return Jacobian(found.logits, found.gradient)

    def pullback(self, points: Tensor, owner: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        pieces: list[tuple[Tensor, Tensor, Tensor | None]] = []  # the points as a leaf, their logits with the graph, their rows

        def run(part: Tensor, rows: Tensor | None, where: slice, trusted: bool) -> Gradient:
            with torch.enable_grad():
                leaf, drawn, logits = self._looked_at(part, rows, trusted)
                pieces.append((leaf, self._averaged(drawn), rows))
            return Gradient(logits[:, 0], part, logits)

        def pull(cotangents: Tensor) -> Tensor:
            found, start = [torch.zeros_like(points[:0])], 0
            for leaf, values, rows in pieces:
                wanted = cotangents[start : start + len(leaf)].to(values.dtype)
                with torch.enable_grad():
                    gradient = input_gradient((wanted * values).sum(1), leaf, again=True)
                self._count_backward(rows, len(leaf))
                found.append(self._checked(gradient[:, None], rows, wanted.abs().amax(1) > 0)[:, 0])
                start += len(leaf)
            return torch.cat(found)

        return self._in_chunks(points, owner, run).logits, pull

    def _looked_at(self, part: Tensor, rows: Tensor | None, trusted: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The points as a leaf, what the model said of them (Q, draws, C) with its graph, and the mean logits; recorded."""
        leaf = part.detach().requires_grad_()
        drawn = self._model(leaf, rows)
        logits = self._averaged(drawn.detach())
        self.recorder.record(self.slots, part, logits, rows, trusted=trusted)
        return leaf, drawn, logits

    def _all_decided(self, rows: Tensor | None) -> bool:
        decided = self.recorder.decided(self.slots)
        return bool((decided if rows is None else decided[rows]).all())

    def best(self) -> Found:
        best = self.slots.best
        distance = self.slots.region.distance(best.points)
        away = torch.where(best.success, distance, torch.full_like(distance, torch.inf))
        return Found(best.points, away, best.success, best.margin - self.recorder.tau)

    def _in_chunks(
        self, points: Tensor, owner: Tensor | None, run: Callable[[Tensor, Tensor | None, slice, bool], Gradient]
    ) -> Gradient:
        """Run on model-sized pieces of the points. Out of memory halves the pieces and tries that one again."""
        trusted = self._trusted is not None and points is self._trusted[0] and points._version == self._trusted[1]
        points = points.detach()
        if not len(points):
            nothing = points.new_empty(0, self.slots.aim.wanted.shape[1])
            return Gradient(nothing.sum(1), points, nothing)
        if self.slots.region.threat.grid is not None:
            region = self.slots.region if owner is None else take(self.slots.region, owner)
            points, trusted = region.snap(points), False
        parts: list[Gradient] = []
        start = 0
        while start < len(points):
            where = slice(start, start + self.chunk.rows)
            whole = start == 0 and len(points) <= self.chunk.rows
            if owner is None and not whole:
                owner = torch.arange(len(points), device=points.device)
            try:
                parts.append(run(points[where], owner if owner is None else owner[where], where, trusted))
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                self.chunk.halve(error)
                continue
            start = where.stop
        return parts[0] if len(parts) == 1 else Gradient(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _aim(self, rows: Tensor | None, aim: Aim | None) -> Aim:
        """The aim of each row of the model's output, draws included; `aim` (B, C) in place of the goal's."""
        aim = aim if aim is not None else self.slots.aim
        if rows is None and self.draws == 1:
            return aim
        owner = torch.arange(len(self.slots), device=self.slots.index.device) if rows is None else rows
        return take(aim, owner.repeat_interleave(self.draws))

    def _model(self, points: Tensor, rows: Tensor | None) -> Tensor:
        """Logits (Q, draws, C); counted."""
        repeated = points.repeat_interleave(self.draws, 0) if self.draws > 1 else points
        version = repeated._version
        logits = self.model.forward(repeated)
        if repeated._version != version:
            raise ModelError("the model changes its input in place (x -= mean, or a first layer with inplace=True)")
        self._count(self.slots.forward, rows, len(points))
        self.model.queries.forward += len(repeated)
        return logits.view(len(points), self.draws, -1)

    def _averaged(self, drawn: Tensor) -> Tensor:
        """The mean over the draws, of (Q, draws, ...)."""
        return drawn.mean(1) if self.draws > 1 else drawn[:, 0]

    def _count(self, counter: Tensor, rows: Tensor | None, points: int) -> None:
        if rows is None:
            counter += self.draws
        else:
            counter += self.draws * torch.bincount(rows.cpu(), minlength=len(counter))

    def _count_backward(self, rows: Tensor | None, points: int) -> None:
        self._count(self.slots.backward, rows, points)
        self.model.queries.backward += points * self.draws

    def _checked(self, gradient: Tensor, rows: Tensor | None, wanted: Tensor | None = None) -> Tensor:
        """Zero the gradients (Q, m, ...) that are NaN or infinite and mark their samples; count the vanished ones.

        wanted: which of them (Q,) are the gradient of anything.
        """
        peak = gradient.flatten(1).abs().amax(1)  # vector_norm's infinity norm is 18 times slower on the CPU
        bad, zero = ~torch.isfinite(peak), peak == 0
        if wanted is not None:
            zero &= wanted
        if bool(zero.any()):
            self._count_rows(self.slots.zero_gradients, zero, rows)
        if bool(bad.any()):
            marked = bad.nonzero()[:, 0] if rows is None else rows[bad]
            self.slots.blind = self.slots.blind.index_fill(0, marked, True) & ~self.slots.best.success
            gradient = gradient.masked_fill(bad.view(-1, *([1] * (gradient.dim() - 1))), 0.0)
        return gradient

    @staticmethod
    def _count_rows(counter: Tensor, which: Tensor, rows: Tensor | None) -> None:
        owner = which.nonzero()[:, 0] if rows is None else rows[which]
        counter += torch.bincount(owner.cpu(), minlength=len(counter))

    def affords(self, owner: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        more = self.draws * forward, self.draws * backward
        return self.budget.covers(self.slots.forward[owner] + more[0], self.slots.backward[owner] + more[1])

    def allow(self, owner: Tensor, wanted_backward: bool, kept_back: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if not self.budget.counts_passes:
            return torch.ones_like(owner, dtype=torch.bool)
        cpu = owner.cpu()
        order = cpu.argsort(stable=True)
        counts = torch.bincount(cpu, minlength=len(self.slots))
        first = counts.cumsum(0) - counts
        earlier = torch.empty_like(cpu).scatter_(0, order, torch.arange(len(cpu)) - first[cpu[order]])
        asked = earlier + 1
        forward, backward = (0, 0) if kept_back is None else kept_back
        return self.affords(cpu, asked + forward, asked * wanted_backward + backward).to(owner.device)
