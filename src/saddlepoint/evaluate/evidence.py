"""What a diagnosis is made from: what the model does at and near some samples, and what attacks of several kinds find."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from saddlepoint.attacks import APGD, FGM, PGD, Restarts, SignNoise, Square, UniformNoise
from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.engine import Attack, AttackResult, Budget, Record
from saddlepoint.engine.source import check_labels
from saddlepoint.errors import InputError, ModelError
from saddlepoint.goals import Loss, Untargeted, cross_entropy, margin
from saddlepoint.models.base import Classifier
from saddlepoint.models.compose import Borrowed
from saddlepoint.precision import full_precision
from saddlepoint.rng import Keys
from saddlepoint.taxonomy import Access, Norm, Status
from saddlepoint.threats import L0, L1, Threat
from saddlepoint.trees import take

SAMPLES = 100  # at most so many are looked at
SCALES = (1e-5, 1e-4)  # steps of finite differences, parts of the input range: above rounding, below what bends deep networks
STEPS, RESTARTS, NOISES, QUERIES = 40, 4, 100, 300
_CALLS = 5
_REPEATED = 1e-5  # differences of outputs above this part of the largest logit are not those of sums in another order
_LIMIT = Budget(passes=330)  # of one attack on one sample, by however many draws the model multiplies them


def passes(model: Classifier) -> tuple[int, int]:
    """Forward and backward passes that the model has counted."""
    return model.queries.forward, model.queries.backward


class Evidence:
    """The samples that the model gets right (K), and what is measured on them: once, when the first check asks for it."""

    def __init__(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        seed: int,
        batch_size: int | None,
        sources: Sequence[Classifier] = (),
    ) -> None:
        """Errors: `InputError`, `CapabilityError` if a model grants no gradients, `ModelError` if one fails on the inputs."""
        if not isinstance(model, Classifier):
            raise InputError(f"model must be a Saddlepoint model: sp.Model(net, ...); got {type(model).__name__}")
        model.require(Access.GRADIENTS, "diagnose()")
        if not isinstance(threat, Threat) or threat.minimizes or not threat.largest_eps > 0:
            raise InputError(f"diagnose needs a ball of positive size, such as sp.Linf(8 / 255); got {threat!r}")
        model.check_inputs(x)
        self.before = passes(model)
        self.model, self.seed, self.batch_size, self.batch = model, seed, batch_size, batch_size or 32
        self.x, self.looked_at = x[:SAMPLES].detach().to(model.device), min(len(x), SAMPLES)
        logits, self.refused = self._first_look()
        labels = check_labels(y, len(x), logits.shape[1])[:SAMPLES].to(model.device)
        right = (logits.argmax(1) == labels) & torch.isfinite(logits).all(1)
        self.ids = right.nonzero()[:, 0]  # names of the samples, and their places in the threat
        self.predicted = logits.argmax(1)
        self.clean, self.x, self.y = logits[self.ids], self.x[self.ids], labels[self.ids]
        self.ends = model.bounds or (float(x.min()), float(x.max())) if len(x) else (0.0, 1.0)
        self.span = self.ends[1] - self.ends[0]
        self.threat = threat.only(self.ids, self.x)
        if isinstance(threat, L0):  # the ball around it in which there are steepest steps
            features = x.shape[1] if threat.per == "pixel" else 1
            self.threat = L1(torch.as_tensor(self.threat.eps) * features * self.span, self.threat.mask, threat.grid)
        self.aim = Untargeted().aim(self.y, torch.full_like(self.y, -1), logits.shape[1])
        if not isinstance(sources, Sequence):
            raise InputError(f"sources must be a list of models; got {type(sources).__name__}")
        self.borrowers = [self._borrower(source, f"sources[{number}]") for number, source in enumerate(sources)]

    def _first_look(self) -> tuple[Tensor, str]:
        """Logits of all samples, and the error if there are some with autograd on only."""
        if not len(self.x):
            return self.x.new_zeros(0, self.model.num_classes or 2), ""
        try:
            return self.logits(self.x), ""
        except Exception as error:  # whatever the user's network raises
            try:
                with torch.enable_grad():
                    return self.forward(self.x).detach(), f"{type(error).__name__}: {error}"
            except Exception:
                shape = tuple(self.x.shape)
                raise ModelError(f"the network fails on inputs of shape {shape}: {type(error).__name__}: {error}") from error

    def _borrower(self, source: Classifier, name: str) -> Borrowed:
        """The model with the gradients of a source, which must fit."""
        if not isinstance(source, Classifier):
            raise InputError(f"{name} must be a Saddlepoint model: sp.Model(net, ...); got {type(source).__name__}")
        source.require(Access.GRADIENTS, f"{name} of diagnose()")
        borrower = Borrowed(self.model, source)
        if self.idle:
            return borrower
        try:
            found = self.gradients(self.x[:8], (margin,), borrower)
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the user's network raises
            shape = tuple(self.x[:8].shape)
            raise ModelError(f"{name} fails on inputs of shape {shape}: {type(error).__name__}: {error}") from error
        if found is None:
            raise ModelError(f"{name} gives no gradients: no path leads from its output back to its input; take another source")
        return borrower

    # why a check cannot be made; empty where it can

    @property
    def idle(self) -> str:
        if self.refused:
            return "the model runs with autograd on only"
        return "" if len(self.x) else "the model gets none of the samples right"

    @property
    def random(self) -> str:
        return self.idle or ("the model is random" if self.apart(self.calls[:1], self.calls) > _REPEATED else "")

    @property
    def cut_off(self) -> str:
        return self.idle or (self.local if isinstance(self.local, str) else "")

    @property
    def restless(self) -> str:
        """Why gradients and outputs of two calls can't be compared."""
        return self.random or self.cut_off

    @cached_property
    def rough(self) -> str:
        """Why outputs at two inputs close by can't be compared."""
        if why := self.idle:
            return why
        if torch.finfo(self.x.dtype).eps > 1e-6:
            return f"{self.x.dtype} is too coarse for small differences"
        return "" if torch.equal(self.logits(self.x), self.logits(self.x)) else "no seed makes the model repeat its outputs"

    @property
    def alone(self) -> str:
        return self.idle or ("" if self.borrowers else "no other models were given (sources=)")

    # looking at the model

    def forward(self, x: Tensor, model: Classifier | None = None) -> Tensor:
        """Logits (Q, C) in eval mode and full precision; counted. A random model makes the same draws every time."""
        model, parts = model or self.model, []
        with model.frozen(), full_precision(model.device.type):
            for part in torch.split(x, self.batch):
                torch.manual_seed(self.seed)
                parts.append(model.forward(part))
        self.model.queries.forward += len(x)
        return torch.cat(parts)

    def logits(self, x: Tensor) -> Tensor:
        """The same without gradients."""
        with torch.no_grad():
            return self.forward(x)

    @cached_property
    def calls(self) -> Tensor:
        """Logits of the same call several times with fresh draws, (calls, K, C): two of few outcomes are often the same."""
        with self.model.frozen(), torch.no_grad():  # the outermost frame gives back the random states, so one for all calls
            torch.manual_seed(self.seed)
            parts = [[self.model.forward(part) for part in torch.split(self.x, self.batch)] for _ in range(_CALLS)]
        self.model.queries.forward += _CALLS * len(self.x)
        return torch.stack([torch.cat(call) for call in parts])

    def margins(self, x: Tensor) -> Tensor:
        """By how much each sample is fooled at the points x (K, ...), in logits."""
        return margin(self.logits(x), self.aim)

    def gradients(self, x: Tensor, losses: Sequence[Loss], model: Classifier | None = None) -> list[Tensor] | None:
        """The gradient (K, ...) of each loss at the points x; None where no path leads from the output to the input."""
        parts = []
        for rows in torch.split(torch.arange(len(x), device=x.device), self.batch):
            leaf = x[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = self.forward(leaf, model)
                values = [loss(logits, take(self.aim, rows)).sum() for loss in losses]
            if not logits.requires_grad:
                return None
            found = [torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True)[0] for value in values]
            self.model.queries.backward += len(rows) * len(losses)
            if any(gradient is None for gradient in found):
                return None
            parts.append(found)
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    @cached_property
    def local(self) -> list[Tensor] | str:
        """Gradients of cross-entropy and margin at the samples, or why there are none."""
        try:
            found = self.gradients(self.x, (cross_entropy, margin))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a network may refuse inputs that require gradients, as numpy does
            return f"the model cannot be differentiated ({type(error).__name__}: {error})"
        return "no path leads from the model's output back to its input" if found is None else found

    @property
    def not_finite(self) -> Tensor:
        """Which samples have a gradient that is NaN or infinite, (K,) bool."""
        assert not isinstance(self.local, str)
        return ~torch.isfinite(self.local[1].flatten(1)).all(1)

    @cached_property
    def vanished(self) -> dict[str, Tensor]:
        """Which samples' gradients are exactly zero, (K,) bool; also in float64 if the model can be copied into it."""
        assert not isinstance(self.local, str)
        gradients = {"float32": self.local}
        try:
            model = copy.deepcopy(self.model)
            for net in model.networks():
                net.double()
            gradients["float64"] = self.gradients(self.x.double(), (cross_entropy, margin), model) or []
        except Exception:  # tensors hidden in a callable stay in float32, and not everything can be copied
            pass
        return {
            f"zero_{loss}_{dtype}": (gradient.flatten(1) == 0).all(1)
            for dtype, pair in gradients.items()
            for loss, gradient in zip(("cross_entropy", "margin"), pair, strict=False)
        }

    @cached_property
    def slopes(self) -> tuple[Tensor, Tensor, Tensor]:
        """How fast the margin changes along three directions, the steepest and two random ones, at a point beside each sample.

        Claimed by the gradient (K, 3), measured by differences of both sizes (2, K, 3), and whether the smaller ones in
        the random directions change no bit of the output (K, 2).
        """
        keys, shape, dtype = Keys.of(self.seed, self.ids), tuple(self.x.shape[1:]), self.x.dtype
        inward = 0.02 * (sum(self.ends) / 2 - self.x)  # off the ends of the range, and off ties between equal features
        base = self.x + inward + 0.01 * self.span * (keys.absorb(0).uniform(shape, dtype) - 0.5)
        found = None if self.cut_off else self.gradients(base, (margin,))
        gradient = torch.zeros_like(base) if found is None else found[0]
        directions = [gradient.sign(), keys.absorb(1).sign(shape, dtype), keys.absorb(2).sign(shape, dtype)]
        claimed = torch.stack([(gradient * way).flatten(1).double().sum(1) for way in directions], 1)
        measured, unchanged = [], []
        for size in (scale * self.span for scale in SCALES):
            pairs = [(self.logits(base + size * way), self.logits(base - size * way)) for way in directions]
            change = [(margin(ahead, self.aim) - margin(behind, self.aim)).double() for ahead, behind in pairs]
            measured.append(torch.stack(change, 1) / (2 * size))
            unchanged.append(torch.stack([(ahead == behind).all(1) for ahead, behind in pairs[1:]], 1))
        return claimed, torch.stack(measured), unchanged[0]

    # attacking it

    def attack(
        self,
        attack: Attack,
        rows: Tensor | None = None,
        *,
        threat: Threat | None = None,
        model: Classifier | None = None,
        **settings: Any,  # Any: of `sp.attack`
    ) -> AttackResult:
        """Attack the samples `rows`, default all; `threat` is one for all K."""
        rows = torch.arange(len(self.x), device=self.x.device) if rows is None else rows
        ball, model = (threat or self.threat).only(rows, self.x), model or self.model
        before = passes(model)
        result = run_attack(
            model, self.x[rows], self.y[rows], attack, ball,
            seed=self.seed, ids=self.ids[rows].cpu(), batch_size=self.batch_size, budget=_LIMIT, **settings,
        )  # fmt: skip
        if model is not self.model:  # a wrapper counts for itself what it spends on this model
            forward, backward = (now - then for now, then in zip(passes(model), before, strict=True))
            self.model.queries.forward += forward
            self.model.queries.backward += backward
        return result

    def fooled(self, attack: Attack, rows: Tensor | None = None, **settings: Any) -> Tensor:
        """Which of the samples the attack fools, bool."""
        return self.attack(attack, rows, **settings).having(Status.FOOLED)

    def ascent(self, steps: int = STEPS, loss: str = "margin") -> Attack:
        """The gradient attack that others are compared with: PGD, and in l1, where its steps move few features, APGD."""
        if self.threat.norm is Norm.L1:
            return APGD(steps=steps, loss=loss, multi_eps=False)
        return PGD(steps=steps, loss=loss)

    @cached_property
    def pgd(self) -> tuple[AttackResult, Tensor]:
        """`ascent`, and by how much the margin rose from its first step to its last (K,), infinite where it succeeded."""
        first: dict[int, Tensor] = {}
        last: dict[int, Tensor] = {}

        def note(record: Record) -> None:
            for name, point in zip(record.ids.tolist(), record.points, strict=True):
                last[name] = point
                if name not in first:
                    first[name] = point

        result = self.attack(self.ascent(), callback=note)
        names = self.ids.tolist()
        begin, end = (torch.stack([way.get(name, x) for name, x in zip(names, self.x, strict=True)]) for way in (first, last))
        rise = self.margins(end) - self.margins(begin)
        return result, rise.masked_fill(~result.having(Status.SURVIVED), torch.inf)

    @cached_property
    def by_pgd(self) -> Tensor:
        """Which samples `ascent` fools, (K,) bool; none where there is no gradient."""
        return torch.zeros_like(self.y, dtype=torch.bool) if self.cut_off else self.pgd[0].having(Status.FOOLED)

    @cached_property
    def one_step(self) -> AttackResult:
        return self.attack(FGM(loss="margin"), keep="last")

    @cached_property
    def by_one_step(self) -> Tensor:
        return torch.zeros_like(self.by_pgd) if self.cut_off else self.one_step.having(Status.FOOLED)

    @cached_property
    def by_square(self) -> Tensor:
        return self.fooled(Square(steps=QUERIES))

    @cached_property
    def by_transfer(self) -> Tensor:
        """Which samples `ascent` fools where the gradients of another model lead it, (K,) bool."""
        found = torch.zeros_like(self.by_pgd)
        for borrower in self.borrowers:
            if len(left := (~found).nonzero()[:, 0]):
                found[left] = self.fooled(self.ascent(), left, model=borrower)
        return found

    @cached_property
    def by_noise(self) -> Tensor:
        """Which samples random points of the ball fool, or in l-infinity random corners."""
        found = self.fooled(Restarts(UniformNoise(), NOISES))
        return found | self.fooled(Restarts(SignNoise(), NOISES)) if self.threat.norm is Norm.LINF else found

    @cached_property
    def beyond(self) -> Tensor:
        """Which samples a cruder or borrowed attack fools and `ascent` doesn't, not even from further starts: (K,) bool."""
        missed = (self.by_square | self.by_noise | self.by_one_step | self.by_transfer) & ~self.by_pgd
        if not self.cut_off and len(rows := missed.nonzero()[:, 0]):
            missed[rows] = ~self.fooled(Restarts(self.ascent(), RESTARTS), rows)
        return missed

    @cached_property
    def known(self) -> Tensor:
        """The classes that some input gets, as far as the samples and some random points show."""
        keys = Keys.of(self.seed, torch.arange(NOISES)).absorb(3)
        points = self.ends[0] + self.span * keys.uniform(tuple(self.x.shape[1:]), self.x.dtype).to(self.x.device)
        return torch.bincount(torch.cat([self.predicted, self.logits(points).argmax(1)])).nonzero()[:, 0]

    # in words

    def of(self, which: Tensor) -> str:
        return f"{int(which.sum())} of {len(self.x)}"

    def many(self, count: Tensor | int, share: float) -> bool:
        """Whether so many samples are this share of all, and more than one, which may be chance."""
        return int(count) >= max(2, share * len(self.x))

    def apart(self, first: Tensor, second: Tensor) -> float:
        """The largest difference of logits, as a part of the largest logit."""
        return float((first - second).abs().max() / self.clean.abs().max().clamp(min=torch.finfo(first.dtype).tiny))
