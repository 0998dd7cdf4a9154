"""The minimal-norm attacks of the libraries beside which we measure, all behind one signature.

Each is given a budget of forward plus backward passes per sample, and takes as many steps as surely fit. What a step costs
stands at each attack as f + b; where a constant is searched, SEARCHES searches share the budget. Settings are the library's
defaults or those of the paper; where that costs a peer nothing, the choice is the one that helps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from peers import CLASSES, installed
from torch import Tensor, nn

SEARCHES = 4  # for the constant of C&W and EAD, each from 1: nine from 0.001 leave too few steps at these budgets
P = {"l0": 0.0, "l1": 1.0, "l2": 2.0, "linf": float("inf")}
NONE: tuple[float, ...] = ()
# further step sizes, for the best of three; C&W's own is meant for 10,000 steps, FMN's for l2
USUAL, LARGE = (0.3, 3.0), (3.0, 10.0)

Attack = Callable[[nn.Module, Tensor, Tensor, int, int], Tensor]
"""(network, x, y, passes, seed) -> points, one batch; those that aren't adversarial are failures."""


@dataclass(frozen=True)
class Minimal:
    """A library's attack in one norm. main: one of the strong ones. prepare: what isn't to be timed (compilation)."""

    who: str
    name: str
    norm: str
    variant: str
    attack: Attack
    main: bool
    prepare: Callable[[], None]


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # ART and Foolbox draw from the global state


def _steps(passes: int, each: int, besides: int = 0) -> int:
    """How many steps of `each` passes fit, at least one."""
    return max(1, (passes - besides) // each)


# adversarial-library


def al_fmn(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """1 + 1 a step."""
    from adv_lib.attacks import fmn

    return fmn(net, x, y, P[norm], steps=_steps(passes, 2), α_init=scale)


def al_ddn(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """1 + 1 a step. levels=None: the default rounds to 256 grey levels, which costs distance."""
    from adv_lib.attacks import ddn

    return ddn(net, x, y, steps=_steps(passes, 2), levels=None)


def al_alma(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """1 + 1 a step. First distance and smoothing as in the authors' experiments of 100 and 1,000 steps."""
    from adv_lib.attacks import alma

    steps = _steps(passes, 2)
    first = scale * {"l1": 0.5, "l2": 0.1}[norm]
    return alma(net, x, y, num_steps=steps, distance=norm, init_lr_distance=first, α=0.5 if steps <= 100 else 0.9)


def al_pdgd(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """1 + 1 a step."""
    from adv_lib.attacks import pdgd

    return pdgd(net, x, y, num_steps=_steps(passes, 2), primal_lr=0.1 * scale)


def al_pdpgd(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """1 + 1 a step. In l0 with the proximal operator of l2/3, which the library prefers there."""
    from adv_lib.attacks import pdpgd

    proximal = 23 if norm == "l0" else None
    return pdpgd(net, x, y, P[norm], num_steps=_steps(passes, 2), primal_lr=0.1 * scale, proximal_operator=proximal)


def al_sigma_zero(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """1 + 1 a step."""
    from adv_lib.attacks import sigma_zero

    return sigma_zero(net, x, y, num_steps=_steps(passes, 2), η_0=scale)


def al_fab(
    net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float, targets: int = 0
) -> Tensor:
    """2 + (classes - 1) a step; with targets 2 + 1 a step for each of them."""
    from adv_lib.attacks import fab

    if not targets:
        return fab(net, x, y, P[norm], n_iter=_steps(passes, CLASSES + 1, 1))
    steps = _steps(passes, 3 * targets, 1 + targets)
    return fab(net, x, y, P[norm], n_iter=steps, restarts=targets, targeted_restarts=True)


def al_cw(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """1 + 1 a step, SEARCHES searches."""
    from adv_lib.attacks import carlini_wagner_l2

    return carlini_wagner_l2(
        net, x, y, learning_rate=0.01 * scale, initial_const=1.0, binary_search_steps=SEARCHES,
        max_iterations=_steps(passes, 2 * SEARCHES), abort_early=False,
    )  # fmt: skip


def al_vfga(
    net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float, samples: int = 10
) -> Tensor:
    """1 + 1 a changed feature, and 2 forward for each sample drawn."""
    from adv_lib.attacks import vfga

    return vfga(net, x, y, False, max_iter=_steps(passes, 2 + 2 * samples), n_samples=samples)


def al_deepfool(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """1 + (classes - 1) a step."""
    from adv_lib.attacks import df

    return df(net, x, y, steps=_steps(passes, CLASSES), norm=P[norm])


def al_superdeepfool(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """3 + classes a step, each with one step of DeepFool (SDF(inf, 1) of the paper), and 10 for the line search."""
    from adv_lib.attacks import sdf

    return sdf(net, x, y, steps=_steps(passes, CLASSES + 3, 10), df_steps=1)


def al_trust_region(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """3 + 1 a step with the adaptive radius, from the top of its range, and 1 + classes to choose the target."""
    from adv_lib.attacks import tr

    radius = {"l2": 0.05, "linf": 0.01}[norm]
    return tr(net, x, y, iter=_steps(passes, 4, 1 + CLASSES), adaptive=True, eps=radius, p=P[norm])


def al_apgd(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """8 searches for eps, in each 1 + 1 a step and 3 besides."""
    from adv_lib.attacks.auto_pgd import minimal_apgd

    features = x[0].numel()
    largest = {"l1": 0.05 * features, "l2": 0.2 * features**0.5, "linf": 0.5}[norm]
    steps = _steps(passes // 8, 2, 4)
    return minimal_apgd(net, x, y, P[norm], largest, binary_search_steps=8, n_iter=steps)


# Foolbox, by `run`: `__call__` makes one more pass


def _foolbox(attack: Any, net: nn.Module, x: Tensor, y: Tensor, **arguments: Any) -> Tensor:
    import foolbox as fb

    model = fb.PyTorchModel(net, bounds=(0, 1), device="cpu")
    return attack.run(model, x, fb.criteria.Misclassification(y), **arguments)  # type: ignore[no-any-return]


def fb_fmn(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """1 + 1 a step."""
    from foolbox import attacks as fa

    attack = {"l0": fa.L0FMNAttack, "l1": fa.L1FMNAttack, "l2": fa.L2FMNAttack, "linf": fa.LInfFMNAttack}[norm]
    return _foolbox(attack(steps=_steps(passes, 2), max_stepsize=scale), net, x, y)


def fb_ddn(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """1 + 1 a step."""
    from foolbox.attacks import DDNAttack

    return _foolbox(DDNAttack(steps=_steps(passes, 2)), net, x, y)


def fb_cw(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """1 + 1 a step, SEARCHES searches."""
    from foolbox.attacks import L2CarliniWagnerAttack

    attack = L2CarliniWagnerAttack(
        binary_search_steps=SEARCHES, steps=_steps(passes, 2 * SEARCHES), stepsize=0.01 * scale, initial_const=1.0,
        abort_early=False,
    )  # fmt: skip
    return _foolbox(attack, net, x, y)


def fb_ead(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """2 + 1 a step, SEARCHES searches; the point with the smallest l1 distance is returned."""
    from foolbox.attacks import EADAttack

    attack = EADAttack(
        binary_search_steps=SEARCHES, steps=_steps(passes, 3 * SEARCHES), initial_stepsize=0.01 * scale, initial_const=1.0,
        decision_rule="L1", abort_early=False,
    )  # fmt: skip
    return _foolbox(attack, net, x, y)


def fb_deepfool(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """(classes - 1) + (classes - 1) a step, and 1 to rank the classes."""
    from foolbox import attacks as fa

    attack = {"l2": fa.L2DeepFoolAttack, "linf": fa.LinfDeepFoolAttack}[norm]
    return _foolbox(attack(steps=_steps(passes, 2 * (CLASSES - 1), 1)), net, x, y)


def fb_brendel_bethge(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """1 + 1 a step, and 11 to find the boundary on the way to the nearest input of another class in the batch.

    The start of its own draws uniform noise, for up to 2,000 passes. The radius of a step is `lr` times the number of values in
    the whole batch, so it grows with the batch; with the radius of a single sample it finds far larger perturbations.
    """
    from foolbox import attacks as fa

    attack = {
        "l0": fa.L0BrendelBethgeAttack, "l1": fa.L1BrendelBethgeAttack, "l2": fa.L2BrendelBethgeAttack,
        "linf": fa.LinfinityBrendelBethgeAttack,
    }[norm]  # fmt: skip
    apart = torch.cdist(x.flatten(1), x.flatten(1), p=P[norm])
    start = x[apart.masked_fill(y[:, None] == y[None], torch.inf).argmin(1)]
    return _foolbox(attack(steps=_steps(passes, 2, 11), lr=1e-3 * scale), net, x, y, starting_points=start)


@cache
def _compile(norm: str) -> None:
    """Brendel & Bethge's solver is compiled on first use."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval().requires_grad_(False)
    x = torch.rand(64, 3, 2, 2)
    y = net(x).argmax(1)
    chosen = torch.cat([(y == c).nonzero()[:2, 0] for c in (0, 1)])
    fb_brendel_bethge(net, x[chosen], y[chosen], 40, 0, norm=norm, scale=1.0)


# torchattacks


def ta_fab(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """2 + classes a step, and 3. Its targeted form keeps the first target that succeeds, not the nearest: left out."""
    from torchattacks import FAB

    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    attack = FAB(net, norm=name, eps=1e10, steps=_steps(passes, CLASSES + 2, 3), seed=seed, n_classes=CLASSES)
    return attack(x, y)


def ta_cw(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """1 + 1 a step; it does not search its constant."""
    from torchattacks import CW

    return CW(net, c=1, steps=_steps(passes, 2), lr=0.01 * scale)(x, y)


def ta_ead(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """2 + 1 a step, SEARCHES searches, and 1."""
    from torchattacks import EADL1

    attack = EADL1(
        net, lr=0.01 * scale, binary_search_steps=SEARCHES, max_iterations=_steps(passes, 3 * SEARCHES, 1), abort_early=False,
        initial_const=1.0,
    )  # fmt: skip
    return attack(x, y)


def ta_deepfool(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """1 + classes a step."""
    from torchattacks import DeepFool

    return DeepFool(net, steps=_steps(passes, CLASSES + 1))(x, y)


def ta_sparsefool(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """2 + 1 a step and three steps of DeepFool in it, at 1 + classes each."""
    from torchattacks import SparseFool

    attack = SparseFool(net, steps=_steps(passes, 3 * (CLASSES + 1) + 3))
    attack.deepfool.steps = 3
    return attack(x, y)


def ta_jsma(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """1 + classes a step, which changes two features, and 1; aims at the class after the true one."""
    from torchattacks import JSMA

    steps = _steps(passes, CLASSES + 1, 1)
    return JSMA(net, theta=1.0, gamma=(2 * steps - 1) / x[0].numel())(x, y)


# ART


def _art(net: nn.Module, x: Tensor) -> Any:
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        net, loss=nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]), nb_classes=CLASSES, clip_values=(0, 1),
        device_type="cpu",
    )  # fmt: skip


def art_deepfool(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """2 + classes a step, and 4 + classes."""
    from art.attacks.evasion import DeepFool

    steps = _steps(passes, CLASSES + 2, CLASSES + 4)
    attack = DeepFool(_art(net, x), max_iter=steps, nb_grads=CLASSES, batch_size=len(x), verbose=False)
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def art_cw(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """Up to 12 + 2 classes a step (a line search, and gradients for all classes of the batch), SEARCHES searches, and 6."""
    from art.attacks.evasion import CarliniL2Method

    steps = _steps(passes, (12 + 2 * CLASSES) * SEARCHES, 6)
    attack = CarliniL2Method(
        _art(net, x), learning_rate=0.01 * scale, binary_search_steps=SEARCHES, max_iter=steps, initial_const=1.0,
        batch_size=len(x), verbose=False,
    )  # fmt: skip
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


def art_ead(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int, *, norm: str, scale: float) -> Tensor:
    """Up to 4 + 2 classes a step (gradients for all classes of the batch), SEARCHES searches, and 2."""
    from art.attacks.evasion import ElasticNet

    steps = _steps(passes, (4 + 2 * CLASSES) * SEARCHES, 2)
    attack = ElasticNet(
        _art(net, x), learning_rate=0.01 * scale, binary_search_steps=SEARCHES, max_iter=steps, initial_const=1.0,
        batch_size=len(x), decision_rule="L1", verbose=False,
    )  # fmt: skip
    return torch.from_numpy(attack.generate(x.numpy(), y.numpy()))


AL, FB, TA, ART = "adversarial-library", "Foolbox", "torchattacks", "ART"
ALL, NOT_L0 = ("l0", "l1", "l2", "linf"), ("l1", "l2", "linf")

# who, name, norms, attack, further step sizes, whether it is among the main ones; cheap ones first
_ATTACKS: tuple[tuple[str, str, tuple[str, ...], Callable[..., Tensor], tuple[float, ...], bool], ...] = (
    (AL, "FMN", ("l0", "l1", "l2"), al_fmn, USUAL, True),
    (AL, "FMN", ("linf",), al_fmn, LARGE, True),
    (AL, "DDN", ("l2",), al_ddn, NONE, True),
    (AL, "sigma-zero", ("l0",), al_sigma_zero, USUAL, True),
    (AL, "ALMA", ("l1", "l2"), al_alma, USUAL, True),
    (AL, "PDGD", ("l2",), al_pdgd, USUAL, True),
    (AL, "PDPGD", ALL, al_pdpgd, USUAL, True),
    (FB, "FMN", ("l0", "l1", "l2"), fb_fmn, USUAL, True),
    (FB, "FMN", ("linf",), fb_fmn, LARGE, True),
    (FB, "DDN", ("l2",), fb_ddn, NONE, True),
    (FB, "EAD", ("l1",), fb_ead, USUAL, True),
    (AL, "C&W", ("l2",), al_cw, LARGE, True),
    (FB, "C&W", ("l2",), fb_cw, LARGE, True),
    (FB, "Brendel & Bethge", ALL, fb_brendel_bethge, USUAL, True),
    (AL, "FAB", NOT_L0, al_fab, NONE, True),
    (AL, "FAB, 3 targets", NOT_L0, partial(al_fab, targets=3), NONE, True),
    (AL, "FAB, 9 targets", NOT_L0, partial(al_fab, targets=9), NONE, True),
    (TA, "FAB", NOT_L0, ta_fab, NONE, True),
    (AL, "VFGA", ("l0",), al_vfga, NONE, False),
    (AL, "VFGA, 2 samples", ("l0",), partial(al_vfga, samples=2), NONE, False),
    (AL, "DeepFool", ("l2", "linf"), al_deepfool, NONE, False),
    (AL, "SuperDeepFool", ("l2",), al_superdeepfool, NONE, False),
    (AL, "trust region", ("l2", "linf"), al_trust_region, NONE, False),
    (AL, "APGD, searched", NOT_L0, al_apgd, NONE, False),
    (FB, "DeepFool", ("l2", "linf"), fb_deepfool, NONE, False),
    (TA, "C&W", ("l2",), ta_cw, LARGE, False),
    (TA, "EAD", ("l1",), ta_ead, USUAL, False),
    (TA, "DeepFool", ("l2",), ta_deepfool, NONE, False),
    (TA, "SparseFool", ("l0",), ta_sparsefool, NONE, False),
    (TA, "JSMA", ("l0",), ta_jsma, NONE, False),
    (ART, "DeepFool", ("l2",), art_deepfool, NONE, False),
    (ART, "C&W", ("l2",), art_cw, LARGE, False),
    (ART, "EAD", ("l1",), art_ead, USUAL, False),
)


def _seeded(attack: Callable[..., Tensor], norm: str, scale: float) -> Attack:
    def run(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int) -> Tensor:
        _seed(seed)
        return attack(net, x.clone(), y.clone(), passes, seed, norm=norm, scale=scale)

    return run


def _broken(error: str) -> Attack:
    def run(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int) -> Tensor:
        raise RuntimeError(error)

    return run


def attacks(norm: str, *, sweep: bool = False) -> Iterator[Minimal]:
    """What the installed libraries have for this norm. sweep: with two more step sizes each."""
    libraries = {library.name: library for library in installed()}
    for who, name, norms, attack, steps, main in _ATTACKS:
        if norm not in norms or who not in libraries:
            continue
        prepare = partial(_compile, norm) if attack is fb_brendel_bethge else lambda: None
        for scale in (1.0, *steps) if sweep else (1.0,):
            variant = "default" if scale == 1 else f"step x{scale:g}"
            bound = _broken(error) if (error := libraries[who].error) else _seeded(attack, norm, scale)
            yield Minimal(who, name, norm, variant, bound, main, prepare)
