"""AutoAttack: four attacks without a step size to choose, one after another on the samples that still stand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, final, get_args

from torch import Tensor

from saddlepoint.attacks.apgd import APGD, APGDT
from saddlepoint.attacks.fab import FAB
from saddlepoint.attacks.registry import register
from saddlepoint.attacks.square import Square
from saddlepoint.attacks.wrappers import Restarts, Sequence, Sequential
from saddlepoint.engine import Attack, Declaration, Problem
from saddlepoint.errors import InputError, UnknownNameError
from saddlepoint.goals import Loss
from saddlepoint.taxonomy import Norm

Version = Literal["standard", "plus", "rand"]


@lru_cache(maxsize=64)
def _stages(version: Version, steps: int, queries: int, l1: bool) -> Sequence:
    """The authors' set_version(), github.com/fra31/auto-attack (2023), in its order."""

    def apgd(loss: str, runs: int) -> Restarts:  # in l1 only the standard version has the larger balls
        return Restarts(APGD(steps=steps, loss=loss, multi_eps=version == "standard"), runs)

    square, fab_t = Square(steps=queries, p_init=0.8), FAB(steps=steps, targets=9, search=0)
    match version:
        case "standard":
            return Sequence(apgd("cross_entropy", 5 if l1 else 1), APGDT(steps=steps, targets=5 if l1 else 9), fab_t, square)
        case "plus":
            five = apgd("cross_entropy", 5), apgd("dlr", 5), FAB(steps=steps, restarts=5, search=0)
            return Sequence(*five, square, APGDT(steps=steps, targets=9, multi_eps=False), fab_t)
        case "rand":
            return Sequence(apgd("cross_entropy", 1), apgd("dlr", 1))


@register(
    Declaration(
        summary="Auto-PGD on two losses, FAB towards classes, and Square, one after another",
        reference="Croce & Hein 2020, arXiv:2003.01690; l1: 2021, arXiv:2103.01208",
        norms=APGD.declaration.norms & FAB.declaration.norms & Square.declaration.norms,
        spatial=True,
        no_oracle="its parts are held to theirs; the whole takes up to 9,000 passes",
    )
)
@final
@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """AutoAttack, the field's reference for robust accuracy. A sample leaves at its first success.

    version:
        "standard": APGD on cross-entropy (l1: 5 runs), APGD-T (9 targets; l1: 5), FAB-T (9 targets), Square.
        "plus": APGD on cross-entropy and on DLR, 5 runs each, FAB with 5 starts, Square, APGD-T and FAB-T with 9 targets.
        "rand", for random models: APGD on cross-entropy and on DLR. The paper averages each gradient over 20 draws. Here the
        model says how many it is: `sp.Defended(model, [], draws=20)`.
    steps: of each run of APGD and FAB. queries: of Square.

    With 10 classes a survivor of "standard" costs 7,814 forward and 1,900 backward passes. Fewer classes have fewer targets,
    and the losses that need three or four logits their fallbacks. In l1 the larger balls of multi-eps-APGD belong to "standard"
    alone, as in the authors' code. What differs from that code: a sample leaves in the middle of a run; on the l2 ball and the
    input range our parts project at once, not one after the other; FAB's further starts lie anywhere in their ball; a goal with
    a target leads every stage to it; and a success is predicted again, on a random model several times.

    Source: Croce & Hein (2020), Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks, arXiv:2003.01690, section 5; l1: Croce & Hein (2021), Mind the box, arXiv:2103.01208. Settings are those of the
    authors' code, github.com/fra31/auto-attack.

    >>> import saddlepoint as sp
    >>> [type(part).__name__ for part in sp.attacks.AutoAttack().stages("linf").attacks]
    ['Restarts', 'APGDT', 'FAB', 'Square']
    """

    version: Version = "standard"
    steps: int = 100
    queries: int = 5000

    def __post_init__(self) -> None:
        if self.version not in get_args(Version):
            raise UnknownNameError("version of AutoAttack", str(self.version), get_args(Version))
        for name in ("steps", "queries"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise InputError(f"{name} must be a whole number >= 1; got {value}")

    def stages(self, norm: Norm | str) -> Sequence:
        """What it consists of in this norm. The kinds of attacks, and so their states, are the same in all."""
        return _stages(self.version, self.steps, self.queries, Norm(norm) is Norm.L1)

    def _at(self, problem: Problem) -> Sequence:
        return self.stages(problem.region.threat.norm)

    @property
    def iterations(self) -> int:
        return max(self.stages(norm).iterations for norm in self.declaration.norms)

    @property
    def randomized(self) -> bool:
        return True

    @property
    def objective(self) -> str | Loss:
        return self.stages(Norm.LINF).objective

    def cost(self, classes: int) -> tuple[int, int]:
        return self.stages(Norm.LINF).cost(classes)

    def opening(self, classes: int) -> tuple[int, int]:
        return self.stages(Norm.LINF).opening(classes)

    def init(self, problem: Problem) -> Sequential:
        return self._at(problem).init(problem)

    def step(self, problem: Problem, state: Sequential) -> Sequential:
        return self._at(problem).step(problem, state)

    def done(self, state: Sequential) -> Tensor:
        return self.stages(Norm.LINF).done(state)

    def current(self, state: Sequential) -> Tensor:
        return self.stages(Norm.LINF).current(state)
