"""`minimal`: the attacks that we recommend for the smallest perturbation in a norm, fitted to a number of passes."""

from __future__ import annotations

from dataclasses import replace

from saddlepoint.attacks.brendel_bethge import BrendelBethge
from saddlepoint.attacks.dual import DualAveraging
from saddlepoint.attacks.fmn import FMN, SigmaZero
from saddlepoint.attacks.normals import CGBA
from saddlepoint.attacks.rays import RayS
from saddlepoint.attacks.registry import as_attack
from saddlepoint.attacks.wrappers import Fork, Sequence
from saddlepoint.engine import Attack, Budget
from saddlepoint.errors import CapabilityError, InputError, UnknownNameError
from saddlepoint.taxonomy import Access, Norm

MINIMAL = "minimal"  # the name that stands for it
PASSES = 1000  # where no budget says
# what is recommended for models of scores or labels
WITHOUT_GRADIENTS: dict[Norm, Attack] = {Norm.LINF: RayS(), Norm.L2: CGBA()}
# by which factor the gradient at the input may be wrong before another attack goes on
_MISLED = {Norm.L0: 2.0, Norm.L1: 2.0, Norm.L2: 3.0}


def minimal(norm: Norm | str, passes: int = PASSES) -> Attack:
    """The recommended attack for the smallest perturbation in `norm`, for about `passes` passes a sample.

    `sp.attack(model, x, y, "minimal", sp.Minimize(norm), budget=sp.Budget(passes=N))` is the short form. How its settings were
    chosen, and where other attacks come nearer, says benchmarks/README.md.

    Errors: `UnknownNameError` for an unknown norm, `InputError` for passes < 1.

    >>> import saddlepoint as sp
    >>> [type(part).__name__ for part in sp.attacks.minimal("l0", passes=200).attacks]
    ['DualAveraging', 'SigmaZero', 'FMN']
    """
    if norm not in set(Norm):
        raise UnknownNameError("norm", str(norm), [each.value for each in Norm])
    if passes < 1:
        raise InputError(f"passes must be at least 1; got {passes}")
    norm = Norm(norm)
    classes = max(1, min(9, passes // 20))
    steps = max(1, (passes - 2 - classes) // 2 + 1)  # the first ranks the classes, each other one costs two, the last look one
    many = steps >= 300
    walks = DualAveraging(
        steps=steps,
        classes=classes,
        targets=5 if many else 3,
        explore=40 if many else 35 if norm is Norm.L1 else 25,
        again=70 if many else 35,
        pushes=(2.0, 1.0, 1.5, 3.0) if many or norm is Norm.L2 else (1.0, 2.0, 1.5, 3.0),
        hold=3 if norm is Norm.LINF else None,
    )
    if steps < 40 or norm is Norm.LINF or (many and norm is Norm.L2):
        return walks
    first, rest = replace(walks, hand_over=_MISLED[norm]), steps - walks.patience
    if norm is Norm.L0:
        return Fork(first, SigmaZero(steps=rest), FMN(steps=rest))
    far = BrendelBethge(steps=min(100, rest * 3 // 7), fresh=True)
    on = replace(walks, classes=1, again=70 if many else 40, pushes=(1.0, 2.0))  # from the best point: no class to rank
    return Fork(first, Sequence(far, on), FMN(steps=rest, alpha_init=0.3) if norm is Norm.L1 else on)


def for_budget(norm: Norm, budget: Budget | None) -> Attack:
    """`minimal` for a run's budget: its passes, or its queries, of which there are half as many."""
    if budget is not None and budget.passes is not None:
        return minimal(norm, budget.passes)
    if budget is not None and budget.queries is not None:
        return minimal(norm, 2 * budget.queries)
    return minimal(norm)


def resolved(attack: Attack | str, norm: Norm, budget: Budget | None, access: Access = Access.GRADIENTS) -> Attack:
    """The attack, its name looked up; "minimal" is what is recommended for this norm, budget and access."""
    if attack != MINIMAL:
        return as_attack(attack)
    if access >= Access.GRADIENTS:
        return for_budget(norm, budget)
    if norm not in WITHOUT_GRADIENTS:
        raise CapabilityError(f'"minimal" in {norm} needs gradients; see sp.attacks.find(access=..., norm="{norm}")')
    return WITHOUT_GRADIENTS[norm]
