"""How close labels alone lead to the boundary that gradients find."""

from __future__ import annotations

from saddlepoint.attacks import BoundaryAttack, CarliniWagnerL2
from saddlepoint.attacks.facade import attack
from saddlepoint.data import Split
from saddlepoint.engine import Budget
from saddlepoint.models import Model
from saddlepoint.reproduce.frame import Context, Figure, entry
from saddlepoint.reproduce.least import QUICKLY
from saddlepoint.reproduce.masking import CNN, UNIT, undefended_network
from saddlepoint.reproduce.measures import right
from saddlepoint.taxonomy import Access
from saddlepoint.threats import Minimize


@entry(
    "R38",
    "The boundary attack",
    "Brendel, Rauber & Bethge 2018, arXiv:1712.04248, table 1",
    f"{CNN}, 5 epochs; 20 test images, 5,000 labels each (quickly: 300), clipped to [0, 1]; Carlini & Wagner's attack"
    " in 9 searches of 1,000 steps",
)
def boundary(context: Context) -> list[Figure]:
    """A walk along the boundary ends not much farther away than Carlini & Wagner's attack with its gradients."""
    model = undefended_network(context)
    few = context.few(Split(*right(model, context.test)), 20)
    labels = Model(model.net, access=Access.LABELS, bounds=UNIT)
    queries = 300 if context.quick else 5000
    walk = attack(labels, few.x, few.y, BoundaryAttack(), Minimize("l2"), budget=Budget(queries=queries), seed=context.seed)
    search = QUICKLY if context.quick else CarliniWagnerL2()
    gradients = attack(model, few.x, few.y, search, Minimize("l2"), seed=context.seed)
    ours, best = (float(result.distance.median()) for result in (walk, gradients))
    walked, straight = (float((result.distance**2).median()) / few.x[0].numel() for result in (walk, gradients))
    longer = "after up to 1.2 million queries"
    return [
        Figure("success", float(walk.success.double().mean()), context.accept((1.0, 1.0), loose=(0.9, 1.0)), paper=1.0),
        Figure("median of the mean square", walked, paper=3.6e-3, paper_note=longer, unit=""),
        Figure("the same of Carlini & Wagner", straight, paper=2.2e-3, unit=""),
        Figure("ratio of their median l2", ours / best, context.accept((0.0, 2.0)), paper=1.28, paper_note=longer, unit=""),
    ]
