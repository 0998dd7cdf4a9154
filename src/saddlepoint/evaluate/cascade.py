"""Robust accuracy from the cheapest attack to the strongest: each sample leaves at its first success.

The heavier attacks climb ladders. Each begins with the samples of largest margin, which the earlier ones came closest to
breaking; then the one that broke most for its passes goes on, in rungs as large as the last one's successes pay for, as long
as any breaks something. So where gradients are honest, few samples pay for them. Some begin at the best point that is known.
Signs of masked gradients add other ladders, among them searches that gradients do not lead. Where the network can be read,
bounds of its outputs say where one more attack begins, and proofs decide on what still stands, if they are asked for.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from saddlepoint.attacks import (
    APGD,
    APGDT,
    FAB,
    PGD,
    BoundGuided,
    BrendelBethge,
    DualAveraging,
    Restarts,
    SaltAndPepperNoise,
    SignNoise,
    Sprint,
    Square,
    UniformNoise,
    minimal,
)
from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.attacks.minimal import MINIMAL, WITHOUT_GRADIENTS, resolved
from saddlepoint.engine import Attack, AttackResult, Budget, Interrupted
from saddlepoint.engine.problem import input_gradient
from saddlepoint.engine.result import STATUSES, merge
from saddlepoint.engine.slots import NO_CLASS
from saddlepoint.errors import CapabilityError, InputError, ModelError, UnknownNameError
from saddlepoint.evaluate.campaign import Campaign, manifest
from saddlepoint.evaluate.diagnose import Diagnosis, diagnose
from saddlepoint.evaluate.evaluation import FAILED, STANDS, WRONG, Evaluation, Stage, WorstCase
from saddlepoint.evaluate.naive import stands_naive
from saddlepoint.goals import Untargeted
from saddlepoint.models.base import Classifier, Probe
from saddlepoint.models.compose import Borrowed, Defended
from saddlepoint.models.fingerprint import fingerprint
from saddlepoint.propagation.bounds import Bounded
from saddlepoint.propagation.graph import read
from saddlepoint.propagation.nodes import Graph
from saddlepoint.taxonomy import Access, Norm, Status
from saddlepoint.threats import Threat
from saddlepoint.verify.certify import certify as verify

Effort = Literal["quick", "standard", "thorough"]
PART = 500  # samples of a stage that are finished, and kept by a campaign, together
NEAREST = 100  # passes a sample for the curve
_FEWEST = 8  # samples of a rung at least
_PRICE = 4000  # passes that a sample which fell pays for in the next rung
_LOOKED = 100  # samples whose gradients at the input are looked at
# Signs of masking: above this share of samples whose margin gained more than twice, or less than a quarter, of what the
# gradient at the input promised; above this share of vanished gradients; above this share of all samples that only a ladder
# broke.
_MISLED, _VANISHED, _LATE = 0.2, 0.05, 0.01
_FEW = 4  # so many at least
_HARDLY = 0.01  # of the samples at most, to be tried once more
_TOGETHER = 32  # of these in the model, unless the caller says how many
_DIAGNOSED = 40  # samples at least, and every twentieth
_DRAWS = 10  # to average over where the model is random
_SAME = 8  # samples for which a campaign's model must say the same again
_READ = 2**26  # coefficients of a sample's linear bounds at most: they take about a second of a processor's core
_CONFIRM = PGD(steps=10, loss="margin", schedule="cosine", random_start=False)  # begins at what it is given
_ROUNDING = 100  # within so many times the margin that numerical noise is allowed


@dataclass(frozen=True)
class Plan:
    """A stage to come.

    share: None for all that stand; for heavy attacks the share of all samples of a ladder's first rung, 1 for all that stand at
    once. seeded: begins at the best point that is known. model: to be attacked in place of the one that is
    evaluated; it predicts the same, with other gradients. queries: of a sample at most.
    """

    name: str
    why: str
    attack: Attack
    share: float | None = None
    seeded: bool = False
    model: Classifier | None = None
    queries: int | None = None


def plans(norm: Norm, effort: Effort, access: Access = Access.GRADIENTS) -> tuple[Plan, ...]:
    """What `evaluate` runs if nothing looks suspicious; beside these `guided`."""
    queries = {"quick": 300, "standard": 1000, "thorough": 5000}[effort]
    if access < Access.SCORES:
        noise = SaltAndPepperNoise() if norm is Norm.L0 else SignNoise() if norm is Norm.LINF else UniformNoise()
        if norm not in WITHOUT_GRADIENTS:
            return (Plan("noise", "random points: there is no search in this norm by labels", Restarts(noise, queries)),)
        return (Plan("noise", "the model gives labels only", Restarts(noise, 10)),
                Plan("labels", "search by labels", WITHOUT_GRADIENTS[norm], queries=queries))  # fmt: skip
    if access < Access.GRADIENTS:
        if norm is Norm.L0:
            return (
                Plan("noise", "random points: there is no search of few features by scores", Restarts(UniformNoise(), queries)),
            )
        noise = SignNoise() if norm is Norm.LINF else UniformNoise()
        return (Plan("noise", "the model gives no gradients", Restarts(noise, 10)),
                Plan("square", "search by scores", Square(steps=queries)))  # fmt: skip
    if norm is Norm.L0:
        return (
            Plan("minimal-100", "the cheapest search for few features", minimal(norm, 100)),
            Plan("minimal-400", "more walks for those that came closest", minimal(norm, 400), _share(effort, 0.1)),
            Plan("minimal-1000", "more walks for those that came closest", minimal(norm, 1000), _share(effort, 0.05)),
        )[: 1 if effort == "quick" else 3]
    closer = PGD(steps=20, loss="margin", schedule="cosine")
    base = (
        Plan("sprint", "the cheapest that breaks most", Sprint(steps=10)),
        Plan("apgd", "another loss, and steps that adapt", APGD(steps=20)),
        Plan("closer", "on from the best point", closer, _share(effort, 0.05), seeded=True),
        Plan("apgd-long", "more steps", APGD(steps=100), _share(effort, 0.03)),
    )
    if effort == "quick":
        return base
    walks: tuple[Plan, ...] = (
        Plan("boundary", "from outside, along the boundary", BrendelBethge(steps=50), _share(effort, 0.05)),
        Plan("fab-t", "to the boundaries with the two likeliest classes", FAB(steps=60, targets=2), _share(effort, 0.02)),
    )
    if norm is Norm.LINF:
        walks = (Plan("walks", "no step size to choose", DualAveraging(steps=50, hold=3), _share(effort, 0.05)),)
    return (
        *base,
        *walks,
        Plan("restarts", "other corners", Restarts(Sprint(steps=40), 6), _share(effort, 0.01)),
        Plan("apgd-t", "towards each class, the nearest first", APGDT(steps=50, order="linear"), _share(effort, 0.01)),
        Plan(
            "square", "search without gradients, from the best point", Square(steps=5000 if effort == "thorough" else 500),
            _share(effort, 0.02), seeded=True,
        ),
    )  # fmt: skip


def guided(model: Classifier, norm: Norm, effort: Effort) -> tuple[Plan, ...]:
    """What follows `plans`, but for "quick", where the model grants its parameters: a ladder that bounds of its outputs guide.

    It is left out where `unbounded` says why; with "thorough" that is noted.
    """
    if effort == "quick" or norm is Norm.L0 or model.access < Access.PARAMETERS:
        return ()
    why = "from where bounds of the margins are least"
    return (Plan("guided", why, BoundGuided(model), _share(effort, 0.02)),)


def unbounded(plan: Plan, x: Tensor) -> str:
    """Why a plan of `guided` is left out for inputs like x (1, ...); empty if it isn't.

    It is for random models, operators without known bounds, and networks whose linear bounds take more than 2**26 coefficients
    a sample: of each value that goes into a nonlinearity, its size times that of all values before it.
    """
    attack = plan.attack
    assert isinstance(attack, BoundGuided)
    if attack.model.probe(x).stochastic:
        return "the model is random"
    try:
        graph = attack.graph(x)
        if (count := _coefficients(graph)) > _READ:
            return f"its bounds take {count:.1e} coefficients a sample, more than {_READ:.1e}"
        point = x[:1].to(attack.model.device)
        with torch.no_grad():
            bounded = Bounded.of(graph, point, point)
            bounded.backward(graph.output, torch.ones_like(bounded.boxes[graph.output].lower)[:, None])
    except ModelError as error:
        return str(error)
    except Exception as error:  # one attack more or less must not end an evaluation
        return f"its outputs can't be bounded ({type(error).__name__}: {error})"
    return ""


def _coefficients(graph: Graph) -> int:
    sizes = {node.name: node.shape.numel() for node in graph.nodes} | {graph.input: graph.shape.numel()}
    bounded = {name for node in graph.nodes if node.rule is not None for name in node.inputs}
    return sum(sizes[name] * sum(sizes[before] for before in graph.before(name)) for name in bounded)


def nearest(norm: Norm, access: Access) -> tuple[Attack, int | None]:
    """The attack for the curve, and the queries of a sample where there are no gradients."""
    if access >= Access.GRADIENTS:
        return minimal(norm, NEAREST), None
    return resolved(MINIMAL, norm, None, access), 10 * NEAREST


def finishing(norm: Norm, effort: Effort) -> tuple[Plan, ...]:
    """What is added where hardly any sample stands, and those few cost little."""
    if norm is Norm.L0 or effort == "quick":
        return ()
    return (
        Plan("last-restarts", "hardly any stands: other corners", Restarts(APGD(steps=100), 3)),
        Plan("last-targets", "hardly any stands: longer, towards each class", APGDT(steps=100, order="linear")),
    )


def escalation(norm: Norm, effort: Effort) -> tuple[Plan, ...]:
    """What is added where gradients mislead."""
    if norm is Norm.L0:
        return ()
    if effort == "quick":
        return (Plan("square", "signs of masking: search without gradients", Square(steps=300), 0.2),)
    boundary = Plan("fab-t-wide", "signs of masking: to more boundaries", FAB(steps=100, targets=4), _share(effort, 0.02))
    search = "signs of masking: no gradients"
    return (
        *(() if norm is Norm.LINF else (boundary,)),
        Plan("apgd-restarts", "signs of masking: other corners", Restarts(APGD(steps=100), 3), _share(effort, 0.04)),
        Plan("apgd-t-wide", "signs of masking: each class", APGDT(steps=50), _share(effort, 0.02)),
        Plan("square-near", f"{search}, from the best point", Square(steps=2000), _share(effort, 0.02), seeded=True),
        Plan("square-long", search, Square(steps=5000), _share(effort, 0.01)),
    )


def groping(norm: Norm, effort: Effort) -> tuple[Plan, ...]:
    """What is added for samples without gradients."""
    found, why = plans(norm, effort, Access.SCORES), "gradients are NaN or infinite: scores alone"
    return tuple(replace(plan, name=f"{plan.name}-blind", why=why) for plan in found)


def borrowing(model: Classifier, sources: Sequence[Classifier], norm: Norm) -> tuple[Plan, ...]:
    """What is added where gradients mislead and other models are at hand."""
    attack, why = _follow(norm), "signs of masking: gradients of another model"
    borrowers = [Borrowed(model, source) for source in sources]
    return tuple(Plan(f"transfer-{number}", why, attack, model=one) for number, one in enumerate(borrowers, 1))


def averaging(model: Classifier, norm: Norm) -> Plan:
    """What is added where the model is random and doesn't say so."""
    averaged = Defended(model, [], draws=_DRAWS)
    return Plan("expectation", f"the model is random: gradients averaged over {_DRAWS} draws", _follow(norm), model=averaged)


def _follow(norm: Norm) -> Attack:
    """For gradients that can be trusted."""
    return minimal(norm, 100) if norm is Norm.L0 else Sprint(steps=40)


def _share(effort: Effort, share: float) -> float:
    """Of a ladder's first rung: whoever wants to be thorough doesn't trust the order, and attacks all."""
    return 1.0 if effort == "thorough" else share


@dataclass
class _Ladder:
    """A heavy attack that is going on. size: of its next rung, 0 at the end. tried: (N,) bool. rate: broken a pass."""

    plan: Plan
    size: int
    tried: Tensor
    rate: float = 0.0


@dataclass
class _Cascade:
    """An evaluation that is going on. adversarial, margin, broken_by and the like: as in `Evaluation`."""

    model: Classifier
    x: Tensor
    y: Tensor
    threat: Threat
    seed: int
    batch_size: int | None
    progress: bool
    campaign: Campaign | None
    probe: int = 0
    stages: dict[str, Stage] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    diagnosis: Diagnosis | None = None
    nearest: Tensor | None = None
    naive: Tensor | None = None
    proving: float | None = None

    def __post_init__(self) -> None:
        count = len(self.y)
        self.certified = torch.zeros(count, dtype=torch.bool)
        self.broken_by = torch.full((count,), STANDS)
        self.clean_predicted = torch.full((count,), -1)
        self.adversarial = self.x.clone()
        self.margin = torch.full((count,), -math.inf, dtype=torch.float64)
        self.looked = torch.zeros(count, dtype=torch.bool)
        self.blind = torch.zeros(count, dtype=torch.bool)  # a gradient was NaN or infinite

    def run(self, plans: Sequence[Plan]) -> None:
        """These stages: first those for all samples that stand, then the ladders."""
        for plan in plans:
            if plan.share is None:  # the first one of all also tells which samples are wrong
                self._stage(plan, self.threat, self._open(plan))
        nobody = torch.zeros(len(self.y), dtype=torch.bool)
        ladders = [
            _Ladder(plan, max(_FEWEST, math.ceil(plan.share * len(self.y))), nobody) for plan in plans if plan.share is not None
        ]
        for ladder in ladders:
            self._rung(ladder)
        while open_ := [ladder for ladder in ladders if ladder.size]:
            self._rung(max(open_, key=lambda ladder: ladder.rate))

    def search(self, plan: Plan) -> None:
        """A stage for the samples that stand and have no gradients."""
        self._stage(plan, self.threat, self._open(plan) & self.blind)

    def guide(self, effort: Effort) -> None:
        """The ladder that bounds guide, where there are some and anything stands."""
        for plan in guided(self.model, self.threat.norm, effort):
            if not bool((self.broken_by == STANDS).any()):
                continue
            before = self.model.queries.forward
            why = unbounded(plan, self.x[:1])
            self.probe += self.model.queries.forward - before
            if not why:
                self.run([plan])
            elif effort == "thorough":
                self.notes.append(f"{plan.name}: left out, since {why}")

    def prove(self, budget: Budget) -> bool:
        """Proofs for what stands; what the verifier refutes is for the engine to confirm. False after Ctrl-C."""
        self.proving = 0.0
        rows = (self.broken_by == STANDS).nonzero()[:, 0]
        if not len(rows):
            return True
        folder = self.campaign.path / f"proofs-{budget.seconds:g}s" if self.campaign is not None else None
        found = verify(
            self.model, self.x[rows], self.y[rows], self.threat.only(rows, self.x), budget,
            seed=self.seed, progress=self.progress, folder=folder,
        )  # fmt: skip
        self.proving = float(found.seconds.sum())
        self.certified[rows[found.robust]] = True
        refuted = rows[found.falsified]
        self.adversarial[refuted] = found.counterexamples[found.falsified]
        plan = Plan("verifier", "counterexamples that proofs ran into", _CONFIRM, seeded=True)
        if len(refuted):
            self._stage(plan, self.threat, torch.zeros_like(self.certified).index_fill(0, refuted, True))
        return found.complete

    def _rung(self, ladder: _Ladder) -> None:
        """The next samples by margin; how many come after them."""
        left = (self._open(ladder.plan) & ~ladder.tried).nonzero()[:, 0]
        rows = left[self.margin[left].argsort(descending=True, stable=True)][: ladder.size]
        chosen = torch.zeros_like(ladder.tried).index_fill(0, rows, True)
        ladder.tried = ladder.tried | chosen
        broke, passes = self._stage(ladder.plan, self.threat, chosen)
        ladder.rate = broke / max(passes, 1)
        ladder.size = min(2 * ladder.size, max(_FEWEST, int(_PRICE * ladder.rate * ladder.size))) if broke else 0

    def _open(self, plan: Plan) -> Tensor:
        """Which samples stand, (N,) bool; for attacks by the model's own gradients only those that have some."""
        led = plan.model is None and plan.attack.declaration.access >= Access.GRADIENTS
        return (self.broken_by == STANDS) & ~(self.blind & led)

    def measure(self) -> None:
        """The smallest perturbation of each sample that the model gets right, which answers for every size."""
        attack, queries = nearest(self.threat.norm, self.model.access)
        plan = Plan("nearest", "the smallest perturbations, for the curve", attack, queries=queries)
        self.nearest = torch.full((len(self.y),), math.inf, dtype=torch.float64)
        self._stage(plan, self.threat.at(math.inf), (self.broken_by != WRONG) & (self.broken_by != FAILED))

    def _stage(self, plan: Plan, threat: Threat, chosen: Tensor) -> tuple[int, int]:
        """Attack these samples, (N,) bool; how many fell, and what it cost in passes."""
        done: list[AttackResult] = []
        try:
            if bool(chosen.any()):
                self._attack(plan, chosen.nonzero()[:, 0], threat, done)
        finally:  # also after Ctrl-C
            if done:
                self._take(plan, merge(done))
        each = sum(plan.attack.cost(self.model.probe(self.x).num_classes)) if done else 0
        # by steps, since the passes that were made can hang on who shared a batch, and a resumed run must decide the same
        return sum(int(one.having(Status.FOOLED).sum()) for one in done), sum(int(one.iterations.sum()) for one in done) * each

    def _take(self, plan: Plan, result: AttackResult) -> None:
        """Keep what was found, with what the stage has found before."""
        if self.nearest is not None:
            self.nearest[result.index] = result.distance
            result = _inside(result, self.x, self.threat)
        earlier = [self.stages[plan.name].result] if plan.name in self.stages else []
        whole = merge([*earlier, result])
        self.stages[plan.name] = Stage(plan.name, plan.why, whole.index, whole, plan.share is not None)
        self._learn(list(self.stages).index(plan.name), result)

    def _attack(self, plan: Plan, rows: Tensor, threat: Threat, done: list[AttackResult]) -> None:
        """Attack these samples part by part."""
        model = plan.model or self.model
        seed = zlib.crc32(f"{self.seed} {plan.name}".encode())  # each stage has corners of its own
        kept = self.campaign.finished(plan.name) if self.campaign is not None else None
        if kept is not None:
            done.append(kept.select(torch.isin(kept.index, rows).nonzero()[:, 0]))
            rows = rows[~torch.isin(rows, kept.index)]
        for part in torch.split(rows, PART) if len(rows) else ():
            try:
                result = run_attack(
                    model, self.x[part], self.y[part], plan.attack, threat.only(part, self.x),
                    batch_size=self.batch_size, seed=seed, ids=part, progress=self.progress,
                    start=self.adversarial[part] if plan.seeded else None, budget=Budget(queries=plan.queries),
                )  # fmt: skip
            except Interrupted as stop:
                self._keep(plan, stop.result, part, done)
                raise
            finally:
                if plan.model is not None:  # which counts for itself
                    self.model.queries.forward += plan.model.queries.forward
                    self.model.queries.backward += plan.model.queries.backward
                    plan.model.queries.reset()
            self._keep(plan, result, part, done)

    def _keep(self, plan: Plan, result: AttackResult, part: Tensor, done: list[AttackResult]) -> None:
        if len(result):
            result = result.at(part[result.index])
            if self.campaign is not None:
                self.campaign.add(plan.name, result, result.index)
            done.append(result)

    def _learn(self, number: int, result: AttackResult) -> None:
        """Take over what stage `number` found of the samples that stood: of two attempts the clearer one counts."""
        rows = result.index
        if number == 0:
            self.clean_predicted[rows] = result.clean_predicted
            wrong = result.having(Status.ALREADY_WRONG)
            if self.model.rejects:  # what is refused isn't answered rightly
                wrong |= result.clean_predicted == self.model.probe(self.x).num_classes - 1
            self.broken_by[rows[wrong]] = WRONG
        stood = self.broken_by[rows] == STANDS
        fooled, error = stood & result.having(Status.FOOLED), stood & result.having(Status.ERROR)
        failed = error & (result.predicted == NO_CLASS)
        clearer = fooled | (stood & (result.margin.double() > self.margin[rows]))
        self.margin[rows[clearer]] = result.margin[clearer].double()
        self.adversarial[rows[clearer]] = result.adversarial[clearer]
        self.broken_by[rows[fooled]] = number
        self.broken_by[rows[failed]] = FAILED
        self.blind[rows[error & ~failed]] = True

    def no_gradients(self) -> str:
        """Why the model can't be differentiated; empty if it can."""
        before = self.model.queries.forward + self.model.queries.backward
        why = no_gradients(self.model, self.x[:1]) if len(self.y) else ""
        self.probe += self.model.queries.forward + self.model.queries.backward - before
        return why

    def signs(self) -> list[str]:
        """Reasons to distrust the gradients, from what was seen so far."""
        found, count = [], max(len(self.y), 1)
        if not self.threat.largest_eps > 0:  # no way that could mislead
            return []
        if blind := int(self.blind.sum()):
            found.append(f"gradients were NaN or infinite for {blind} samples")
        led = [stage.result for stage in self.stages.values() if stage.result.config["access"] == Access.GRADIENTS.name.lower()]
        of_logits = [result for result in led if not _saturates(result.config["attack"])]
        steps = sum(int(result.iterations.sum()) for result in of_logits)
        vanished = sum(int(result.zero_gradients.sum()) for result in of_logits) / max(steps, 1)
        if vanished > _VANISHED:
            found.append(f"{vanished:.0%} of the gradients vanished")
        late = [number for number, stage in enumerate(self.stages.values()) if stage.heavy]
        fell = sum(int((self.broken_by == number).sum()) for number in late)
        if self.threat.norm is not Norm.L0 and fell >= _FEW and fell > _LATE * count:  # l0's cheap search is meant to be crude
            found.append(f"{fell / count:.1%} of the samples fell to heavier attacks only")
        if (misled := self._misled()) is not None and misled > _MISLED:
            found.append(
                f"for {misled:.0%} of the samples that stand, the margin does not change as its gradient at the input says"
            )
        return found

    def _misled(self) -> float | None:
        """Share of those that stand whose margin gained something else than promised, on the way to the best attempt."""
        rows = (self.broken_by == STANDS).nonzero()[:, 0]
        rows = rows[self.margin[rows].argsort(descending=True, stable=True)][:_LOOKED]
        if len(rows) < _FEW:
            return None
        self.looked[rows] = True
        parts = [self._promise(part) for part in torch.split(rows, self.batch_size or _TOGETHER)]
        promised, gained = (torch.cat(each) for each in zip(*parts, strict=True))
        return float(((gained > 2 * promised) | (promised > 4 * gained)).double().mean())

    def _promise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the margin was to gain on the way to the best attempt, by its gradient at the input, and what it gained."""
        x, device = self.x[rows], self.model.device
        with self.model.frozen(), torch.enable_grad():
            torch.manual_seed(self.seed)  # of a random model
            leaf = x.to(device).requires_grad_()
            logits = self.model.forward(leaf)
            aim = Untargeted().aim(self.y[rows].to(device), torch.full_like(rows, -1).to(device), logits.shape[1])
            before = aim.margin(logits)
            gradient = input_gradient(before, leaf).cpu().double()
        self.model.queries.forward += len(rows)
        self.model.queries.backward += len(rows)
        promised = (gradient * (self.adversarial[rows] - x).double()).flatten(1).sum(1)
        return promised, (self.margin[rows] - before.detach().cpu().double()).clamp(min=0)

    def diagnose(self, sources: Sequence[Classifier]) -> None:
        """Take what the campaign holds, or look."""
        if self.campaign is not None and (kept := self.campaign.document("diagnosis")) is not None:
            self.diagnosis = Diagnosis.from_dict(kept)
            return
        some = torch.arange(max(_DIAGNOSED, len(self.y) // 20))[: len(self.y)]  # so that it doesn't cost more than the attacks
        self.diagnosis = diagnose(
            self.model, self.x[some], self.y[some], self.threat.only(some, self.x),
            sources=sources, seed=self.seed, batch_size=self.batch_size, progress=self.progress,
        )  # fmt: skip
        if self.campaign is not None:
            self.campaign.record("diagnosis", self.diagnosis.to_dict())

    def unaware(self) -> None:
        """Of a model behind transformations: attacks by the gradients of the model inside, blind to the answers, then not."""
        model = self.model
        if not isinstance(model, Defended) or not model.transforms:
            return
        kept = self.campaign.document("naive") if self.campaign is not None else None
        before = model.queries.forward
        if kept is not None:
            self.naive = torch.tensor(kept["stands"]) if kept["stands"] is not None else None
        else:
            self.naive = stands_naive(model, self.x, self.y, self.threat, seed=self.seed, batch_size=self.batch_size)
        self.probe += model.queries.forward - before
        if self.campaign is not None and kept is None:
            self.campaign.record("naive", {"stands": self.naive.tolist() if self.naive is not None else None})
        if self.naive is not None:
            borrower = Borrowed(model, model.model)
            self.run([Plan("inside", "gradients of the model inside", _follow(self.threat.norm), model=borrower)])

    def evaluation(self, complete: bool) -> Evaluation:
        for stage in self.stages.values():
            if count := int((stage.result.having(Status.ERROR) & (stage.result.predicted == NO_CLASS)).sum()):
                self.notes.append(f"{stage.name}: the model gave NaN or infinite values for {count} samples")
        return Evaluation(
            self.x, self.y, self.threat, self.clean_predicted, tuple(self.stages.values()), self.broken_by, self.adversarial,
            self.margin, self.certified, self.looked, self.diagnosis, tuple(self.notes), self.nearest,
            self.probe, complete, self.naive, self.proving,
        )  # fmt: skip


def no_gradients(model: Classifier, x: Tensor) -> str:
    """Why no gradient at inputs (Q, ...) can be had; empty if it can. A forward and a backward pass each, which count."""
    try:
        with model.frozen(), torch.enable_grad():
            leaf = x.detach().to(model.device).requires_grad_()
            logits = model.forward(leaf)
            model.queries.forward += len(x)
            path = logits.requires_grad and torch.autograd.grad(logits.sum(), leaf, allow_unused=True)[0] is not None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a network raises that can't take inputs which require gradients
        return f"the model cannot be differentiated ({type(error).__name__}: {error})"
    model.queries.backward += len(x) if logits.requires_grad else 0
    return "" if path else "no path leads from the model's output back to its input"


def _saturates(attack: dict[str, Any]) -> bool:
    """Whether an attack with these settings ascends a loss of probabilities, whose gradients vanish on honest models too."""
    inner = [attack["attack"]] if isinstance(attack.get("attack"), dict) else []
    return attack.get("loss") in ("cross_entropy", "probability_margin") or any(_saturates(each) for each in inner)


def _inside(result: AttackResult, x: Tensor, threat: Threat) -> AttackResult:
    """What a search for the smallest perturbations says about the ball: a point beyond it is none, nor is NaN on the way."""
    beyond = result.distance > threat.eps_for(result.index)
    away = (beyond & result.having(Status.FOOLED)) | result.having(Status.ERROR)
    survived = torch.full_like(result.codes, STATUSES.index(Status.SURVIVED))
    points = torch.where(beyond.view(-1, *[1] * (x.dim() - 1)), x[result.index], result.adversarial)
    margin = torch.where(beyond, torch.full_like(result.margin, -math.inf), result.margin)
    return replace(result, codes=torch.where(away, survived, result.codes), adversarial=points, margin=margin)


@overload
def evaluate(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    effort: Effort = ...,
    *,
    curve: bool = ...,
    sources: Sequence[Classifier] = ...,
    seed: int = ...,
    batch_size: int | None = ...,
    progress: bool = ...,
    campaign: Campaign | str | Path | None = ...,
    certify: Budget | None = ...,
) -> Evaluation: ...
@overload
def evaluate(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Sequence[Threat],
    effort: Effort = ...,
    *,
    curve: bool = ...,
    sources: Sequence[Classifier] = ...,
    seed: int = ...,
    batch_size: int | None = ...,
    progress: bool = ...,
    certify: Budget | None = ...,
) -> WorstCase: ...
def evaluate(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Threat | Sequence[Threat],
    effort: Effort = "standard",
    *,
    curve: bool = False,
    sources: Sequence[Classifier] = (),
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
    campaign: Campaign | str | Path | None = None,
    certify: Budget | None = None,
) -> Evaluation | WorstCase:
    """Robust accuracy within a threat, with the evidence: a cascade of attacks from cheap to strong.

    x (N, ...), y (N,): samples inside the model's bounds and their true classes. threat: a ball of stated size; several for
    the worst case over them. effort: "quick" for a first look; "standard", where heavy attacks begin with the samples closest
    to falling and go on only while some do; "thorough", where they attack all that stand.
    curve: look for the smallest perturbations too, so that `Evaluation.curve` answers for every size. sources: other models of
    the same classes, whose gradients are tried where this one's mislead.
    campaign: a folder that keeps what is finished; the same call goes on where an earlier one was stopped.
    certify: `Budget(seconds=...)` for a proof of each sample that stands, see `sp.verify.certify`: then `Evaluation.interval`
    has the share that is proved. Counterexamples are a stage of their own. A campaign can be given proofs later.

    Where there are signs of masked gradients, more and other attacks run, and `diagnose` says what is wrong. Ctrl-C returns
    what is finished. Errors: `InputError` for bad inputs, `CapabilityError` for a model that gives labels only, those of
    `Campaign`; with certify also `CapabilityError` and `ModelError` for models without known bounds, before any attack, and
    `SoundnessError` should a sample be both proved and broken.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Linear(4, 3), bounds=(0, 1))
    >>> x = torch.rand(20, 4)
    >>> sp.evaluate(model, x, model.predict(x), sp.Linf(0.0)).robust_accuracy
    1.0
    """
    _check(model, threat, effort, sources)
    if certify is not None:
        for one in [threat] if isinstance(threat, Threat) else threat:
            _check_provable(model, x, one, certify)
    if not isinstance(threat, Threat):
        if campaign is not None:
            raise InputError("a campaign holds one threat: evaluate one after another, each in its own folder")
        parts: list[Evaluation] = []
        for one in threat:
            part = evaluate(
                model, x, y, one, effort, curve=curve, sources=sources, seed=seed, batch_size=batch_size, progress=progress,
                certify=certify,
            )  # fmt: skip
            parts.append(part)
            if not part.complete:
                break
        return WorstCase(tuple(parts))
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        kinds = f"{type(x).__name__} and {type(y).__name__}"
        raise InputError(f"evaluate needs the samples as tensors, since each attack sees all of them; got {kinds}")
    if y.shape != (len(x),):
        raise InputError(f"y must have shape ({len(x)},), one class per input; its shape is {tuple(y.shape)}")
    model.check_inputs(x)
    x, y = x.detach().cpu(), y.detach().cpu()
    before = model.queries.forward
    for number, source in enumerate(sources):
        _check_source(model, source, x[:1], f"sources[{number}]")
    campaign = Campaign(campaign) if isinstance(campaign, str | Path) else campaign
    if campaign is not None:
        todo = [*plans(threat.norm, effort, model.access), *guided(model, threat.norm, effort)]
        todo += [*finishing(threat.norm, effort), *escalation(threat.norm, effort)]
        settings = {
            "effort": effort, "plans": [plan.attack.settings() | {"share": plan.share, "seeded": plan.seeded} for plan in todo],
            "sources": [fingerprint(source) for source in sources], "curve": curve,
        }  # fmt: skip
        campaign.open(manifest(model, x, y, threat, seed=seed, configuration=settings))
    try:
        run = _Cascade(model, x, y, threat, seed, batch_size, progress, campaign)
        if len(x):
            probe = model.probe(x)  # here, so that a resumed run has the same margin of success
            if campaign is not None:
                _check_outputs(campaign, model, x, probe)
        run.probe = model.queries.forward - before
        evaluation = _through(run, effort, sources, curve, certify)
        if campaign is not None and evaluation.complete:
            campaign.record("evaluation", evaluation.to_dict())
            campaign.finish()
    finally:
        if campaign is not None:
            campaign.close()
    return evaluation


def _check(model: Classifier, threat: Threat | Sequence[Threat], effort: str, sources: Sequence[Classifier]) -> None:
    if not isinstance(sources, Sequence):
        raise InputError(f"sources must be a list of models; got {type(sources).__name__}")
    for one in (model, *sources):
        if not isinstance(one, Classifier):
            raise InputError(f"model must be a Saddlepoint model: sp.Model(net, ...); got {type(one).__name__}")
    threats = threat if isinstance(threat, Sequence) else [threat]
    if not all(isinstance(one, Threat) for one in threats):
        raise InputError(f"threat must be such as sp.Linf(8 / 255), or a list of them; got {threat!r}")
    if not threats:
        raise InputError("evaluate needs at least one threat")
    if any(one.minimizes for one in threats):
        raise InputError("evaluate needs a ball of stated size, such as sp.Linf(8 / 255); for distances there is sp.distance")
    if effort not in get_args(Effort):
        raise UnknownNameError("effort", str(effort), get_args(Effort))


def _check_source(model: Classifier, source: Classifier, x: Tensor, name: str) -> None:
    """Here, and not after hours when it is needed."""
    source.require(Access.GRADIENTS, name)
    borrowed = Borrowed(model, source)
    if len(x) and (why := no_gradients(borrowed, x)):
        raise InputError(f"{name} can't lead attacks on this model: {why}")
    model.queries.forward += borrowed.queries.forward


def _check_provable(model: Classifier, x: Tensor, threat: Threat, certify: Budget) -> None:
    """Here, and not after hours when it is needed."""
    if not isinstance(certify, Budget) or certify.seconds is None or certify.passes or certify.queries:
        raise InputError(f"certify must be Budget(seconds=...), for each sample that stands; got {certify!r}")
    if isinstance(x, Tensor) and len(x):
        if model.probe(x).stochastic:
            raise CapabilityError("the model is random: no bound holds for it; sp.defenses.Smoothed certifies by votes")
        none = torch.zeros(0, dtype=torch.int64)
        verify(model, x[:0], none, threat.only(none, x), certify)  # refuses what can't be
        read(model, x[:1].to(model.device))


def _check_outputs(campaign: Campaign, model: Classifier, x: Tensor, probe: Probe) -> None:
    """A fingerprint knows the weights, not the code around them: what the model says must be the same too."""
    if probe.stochastic:
        return
    now = (model.logits if model.access >= Access.SCORES else model.predict)(x[:_SAME]).cpu().double()
    if (kept := campaign.document("outputs")) is None:
        campaign.record("outputs", {"logits": now.tolist()})
        return
    before = torch.tensor(kept["logits"], dtype=torch.float64)
    if before.shape == now.shape and torch.allclose(now, before, rtol=0, atol=_ROUNDING * probe.tau, equal_nan=True):
        return
    raise InputError(
        f"{campaign.path} was begun with a model of the same weights that gave other outputs for the first {len(now)} samples: "
        "has its forward() changed, or what stands around it? Undo that, or take another folder"
    )


def _through(run: _Cascade, effort: Effort, sources: Sequence[Classifier], curve: bool, certify: Budget | None) -> Evaluation:
    """All stages; after Ctrl-C what is finished."""
    model, norm = run.model, run.threat.norm
    if len(run.y):
        run.notes += model.probe(run.x).notes
    if oversized := run.threat.oversized(model.bounds):
        run.notes.append(oversized)
    try:
        access, gradients = model.access, model.access >= Access.GRADIENTS
        if gradients and (why := run.no_gradients()):
            access, gradients = Access.SCORES, False
            run.notes.append(
                f"{why}; searched by scores alone" + (" and with the gradients of other models" if sources else "")
            )
            if effort != "quick":
                run.diagnose(sources)
        if not gradients:
            run.run(borrowing(model, sources, norm))
        run.run(plans(norm, effort, access))
        if gradients:
            run.guide(effort)
            if int((run.broken_by == STANDS).sum()) <= _HARDLY * len(run.y):
                run.run(finishing(norm, effort))
            if len(run.y) and model.probe(run.x).stochastic and model.draws == 1:
                run.run([averaging(model, norm)])
            if signs := run.signs():
                run.notes += signs
                if effort != "quick":
                    run.diagnose(sources)
                run.run([*borrowing(model, sources, norm), *escalation(norm, effort)])
                for plan in groping(norm, effort):
                    run.search(plan)
        run.unaware()
        if certify is not None and not run.prove(certify):
            return run.evaluation(complete=False)
        if curve:
            run.measure()
    except KeyboardInterrupt:
        return run.evaluation(complete=False)
    return run.evaluation(complete=True)
