"""`minimal`: the attacks that we recommend for the smallest perturbation in a norm, fitted to a number of passes."""

from __future__ import annotations

from dataclasses import replace

from saddlepoint.attacks.brendel_bethge import BrendelBethge
from saddlepoint.attacks.dual import DualAveraging
from saddlepoint.attacks.fmn import FMN, SigmaZero
from saddlepoint.attacks.lagrangian import ALMA, PDPGD
from saddlepoint.attacks.normals import CGBA
from saddlepoint.attacks.rays import RayS
from saddlepoint.attacks.registry import as_attack
from saddlepoint.attacks.trim import Trim
from saddlepoint.attacks.wrappers import Finally, Fork, Restarts, Sequence
from saddlepoint.engine import Attack, Budget
from saddlepoint.errors import CapabilityError, InputError, UnknownNameError
from saddlepoint.taxonomy import Access, Norm

MINIMAL = "minimal"  # the name that stands for it
PASSES = 1000  # where no budget says
# what is recommended for models of scores or labels
WITHOUT_GRADIENTS: dict[Norm, Attack] = {Norm.LINF: RayS(), Norm.L2: CGBA()}
_MANY = 300  # steps, from which on more classes are tried, and searches begin more than once
# by which factor the gradient at the input may be wrong before another attack goes on
_MISLED = {Norm.L0: 2.0, Norm.L1: 2.0, Norm.L2: 4.0}
_PATIENCE = {Norm.L0: 3, Norm.L1: 5, Norm.L2: 4}  # steps until this is asked
_MISLED_LONG = 1.5  # the same with many steps, which are enough for both
_ASTRAY = 1.2  # how many times as far as the linearised boundary may be what a search from afar finds
_AS_LINEAR = 0.6  # the same with many passes in l2: nearer points mean masked gradients
_TO_BEGIN = 6  # steps: what such a search needs for its way to the boundary
_TRIES = 30  # points from which to begin, of each of many searches; where none is adversarial, passes must be left for walks


def minimal(norm: Norm | str, passes: int = PASSES) -> Attack:
    """The recommended attack for the smallest perturbation in `norm`, for about `passes` passes a sample.

    `sp.attack(model, x, y, "minimal", sp.Minimize(norm), budget=sp.Budget(passes=N))` is the short form. How its settings were
    chosen, and where other attacks come nearer, says benchmarks/README.md.

    Errors: `UnknownNameError` for an unknown norm, `InputError` for passes < 1.

    >>> import saddlepoint as sp
    >>> [type(part).__name__ for part in sp.attacks.minimal("l0", passes=200).attacks]
    ['Fork', 'Trim']
    """
    if norm not in set(Norm):
        raise UnknownNameError("norm", str(norm), [each.value for each in Norm])
    if passes < 1:
        raise InputError(f"passes must be at least 1; got {passes}")
    norm = Norm(norm)
    classes = max(1, min(4 if norm is Norm.L0 else 5, passes // 20), min(9, passes // 100))
    steps = max(1, (passes - 2 - classes) // 2 + 1)  # the first ranks the classes, each other one costs two, the last look one
    many = steps >= _MANY
    walks = DualAveraging(
        steps=steps,
        classes=classes,
        targets=5 if many else 3,
        explore=40 if many else 35 if norm is Norm.L1 else 25,
        again=70 if many else 25 if norm is Norm.L2 else 35,
        pushes=(2.0, 1.0, 1.5, 3.0) if many or norm is Norm.L2 else (1.0, 2.0, 1.5, 3.0),
        hold=3 if norm is Norm.LINF else None,
    )
    if steps < 40:
        return walks
    if norm is Norm.LINF:
        return Finally(walks if many else replace(walks, averaging=0.1), Trim(steps=3))
    asked = walks if many else replace(walks, patience=_PATIENCE[norm])
    asked = replace(asked, hand_over=_MISLED_LONG if many else _MISLED[norm])
    masked = _where_masked(norm, walks, steps - asked.patience, many)
    if many and norm is Norm.L2:
        first, later = steps // 3, _and_elsewhere(replace(walks, steps=steps - steps // 3))
        curved = Sequence(_where_curved(norm, walks, first - asked.patience), later)
        return Finally(Fork(replace(asked, steps=first), curved, masked, otherwise=later), Trim(steps=3))
    last = {Norm.L0: Trim(steps=16 if many else 12), Norm.L1: Trim(steps=5, cut=0.03), Norm.L2: Trim(steps=3)}[norm]
    left = steps - asked.patience - (last.steps + 1) // 2  # what shrinks its steps on a schedule must come to its end
    return Finally(Fork(asked, _where_curved(norm, walks, left), masked), last)


def _and_elsewhere(walks: DualAveraging) -> Attack:
    """Walks on from the best point. They don't leave its place, so half of the steps are first for a search from the input.

    Where gradients are masked, the walks have them all: the search would be misled. There, the boundary is much nearer than
    where it is linearised.
    """
    search = ALMA(steps=walks.steps // 2)
    return Fork(replace(walks, far=_AS_LINEAR), Sequence(search, replace(walks, steps=walks.steps - search.steps)))


def _where_curved(norm: Norm, walks: DualAveraging, steps: int) -> Attack:
    """Where the margin gains far less than its gradient at the input promises: smaller steps."""
    if norm is not Norm.L2:
        return FMN(steps=steps)
    return replace(walks, steps=steps, classes=1, again=max(walks.again, 40), pushes=(1.0, 2.0))


def _where_masked(norm: Norm, walks: DualAveraging, steps: int, many: bool) -> Attack:
    """Where the gradient at the input misleads: searches that begin far from it, then walks on from the best point.

    Such networks have many local minima; with many steps it pays to search anew from noise, and to push walks by many lengths.
    """
    search: tuple[Attack, ...]
    if norm is Norm.L0:
        if many:
            search, spent = (SigmaZero(steps=60), PDPGD(steps=steps // 2), Trim(steps=16)), 60 + steps // 2 + 8
        else:
            search, spent = (SigmaZero(steps=steps * 3 // 5), Trim(steps=8)), steps * 3 // 5 + 4
    elif many:
        times = steps // (60 if norm is Norm.L1 else 80)
        from_noise = BrendelBethge(steps=40, start="noise", starts=_TRIES, fresh=True)
        search, spent = (Restarts(from_noise, times),), times * (from_noise.steps + _TO_BEGIN)
    else:
        following = min(100, steps * 3 // 7)
        search, spent = (BrendelBethge(steps=following, fresh=True),), following + _TO_BEGIN
    left = max(1, steps - spent)
    again = {Norm.L0: 25 if many else 20, Norm.L1: 70 if many else 40, Norm.L2: 40}[norm]
    # no class is to be ranked any more
    on = replace(walks, steps=left, classes=1, again=again, pushes=(1.0, 2.0, 0.5, 4.0, 1.5, 3.0))
    if many and norm is Norm.L2:
        return Sequence(*search, _and_elsewhere(on))
    if many or norm is not Norm.L1:
        return Sequence(*search, on)
    # a single search from afar may end in a poor place; the few steps that are left to another are short ones
    return Sequence(*search, Fork(replace(on, far=_ASTRAY), FMN(steps=left, alpha_init=0.3)))


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
