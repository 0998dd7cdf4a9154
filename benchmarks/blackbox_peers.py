"""Black-box attacks of the libraries beside which we measure, all behind one signature: one image, one network that counts.

The network that they are given sees every query and stops them; so each is set up to go on for at least as long. Settings are
the library's defaults or those of the paper; where that costs a peer nothing, the choice is the one that helps it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from minimal_peers import _art, _foolbox, _seed
from peers import CLASSES, installed
from torch import Tensor, nn

LABELS, SCORES = "labels", "scores"
ORDER = {"l2": 2, "linf": np.inf}
AUTHORS = "its authors"


@dataclass(frozen=True)
class Job:
    """One image x (1, ...) of class y (1,), how much may be asked, and the ball. second: the likeliest wrong class (1,)."""

    net: nn.Module
    x: Tensor
    y: Tensor
    norm: str
    eps: float
    queries: int
    seed: int
    second: Tensor


Attack = Callable[[Job], object]


@dataclass(frozen=True)
class BlackBox:
    """A library's attack. minimizes: it looks for the smallest perturbation, otherwise for one within the ball."""

    who: str
    name: str
    access: str
    minimizes: bool
    attack: Attack


# Foolbox


def fb_hop_skip_jump(job: Job) -> None:
    from foolbox.attacks import HopSkipJumpAttack

    _foolbox(HopSkipJumpAttack(constraint=job.norm), job.net, job.x, job.y)


def fb_boundary(job: Job) -> None:
    from foolbox.attacks import BoundaryAttack

    _foolbox(BoundaryAttack(steps=job.queries), job.net, job.x, job.y)


def fb_gen_attack(job: Job) -> None:
    """Targeted only: it is told the likeliest wrong class, and any wrong class counts."""
    import foolbox as fb

    model = fb.PyTorchModel(job.net, bounds=(0, 1), device="cpu")
    attack = fb.attacks.GenAttack(steps=job.queries // 10 + 1)
    attack.run(model, job.x, fb.criteria.TargetedMisclassification(job.second), epsilon=job.eps)


# ART, with labels as rows


def _generate(attack: Any, job: Job) -> None:
    attack.generate(job.x.numpy(), y=np.eye(CLASSES, dtype=np.float32)[job.y.numpy()])


def art_hop_skip_jump(job: Job) -> None:
    from art.attacks.evasion import HopSkipJump

    _generate(HopSkipJump(_art(job.net, job.x), norm=ORDER[job.norm], max_iter=job.queries // 100 + 1, verbose=False), job)


def art_boundary(job: Job) -> None:
    from art.attacks.evasion import BoundaryAttack

    _generate(BoundaryAttack(_art(job.net, job.x), targeted=False, max_iter=job.queries, verbose=False), job)


def art_geoda(job: Job) -> None:
    """It plans for its number of queries, of which it needs some hundreds. NumPy no longer has a name that it uses."""
    from art.attacks.evasion import GeoDA

    with patch.object(np, "mat", np.asmatrix, create=True):
        attack = GeoDA(_art(job.net, job.x), norm=ORDER[job.norm], max_iter=max(job.queries, 400), verbose=False)
        _generate(attack, job)


def art_sign_opt(job: Job) -> None:
    from art.attacks.evasion import SignOPTAttack

    _generate(SignOPTAttack(_art(job.net, job.x), targeted=False, query_limit=job.queries, verbose=False), job)


def art_square(job: Job) -> None:
    """3 queries a step."""
    from art.attacks.evasion import SquareAttack

    steps = job.queries // 3 + 1
    _generate(SquareAttack(_art(job.net, job.x), norm=ORDER[job.norm], max_iter=steps, eps=job.eps, verbose=False), job)


def art_simba(job: Job, *, kind: str) -> None:
    """2 queries a step. It knows no ball: what it finds counts if it lies inside."""
    from art.attacks.evasion import SimBA

    classifier = _art(nn.Sequential(job.net, nn.Softmax(1)), job.x)
    _generate(SimBA(classifier, attack=kind, max_iter=job.queries // 2 + 1, verbose=False), job)


def art_zoo(job: Job) -> None:
    """257 queries a step. The default constant finds nothing in so few steps, and resizing is for large images."""
    from art.attacks.evasion import ZooAttack

    attack = ZooAttack(
        _art(job.net, job.x), learning_rate=0.1, max_iter=job.queries // 257 + 1, initial_const=10.0, abort_early=False,
        use_resize=False, use_importance=False, verbose=False,
    )  # fmt: skip
    _generate(attack, job)


def art_one_pixel(job: Job) -> None:
    """400 queries a generation."""
    from art.attacks.evasion import PixelAttack

    attack = PixelAttack(_art(job.net, job.x), th=int(job.eps), es=1, max_iter=job.queries // 400 + 1, verbose=False)
    _generate(attack, job)


# torchattacks


def ta_square(job: Job) -> None:
    from torchattacks import Square

    norm = {"linf": "Linf", "l2": "L2"}[job.norm]
    Square(job.net, norm=norm, eps=job.eps, n_queries=job.queries, seed=job.seed)(job.x, job.y)


def ta_spsa(job: Job) -> None:
    """256 queries a step, and one that we add: a look at the iterate, without which it would never know of a success."""
    from torchattacks import SPSA

    class Looking(SPSA):  # type: ignore[misc]
        def linf_clamp_(self, dx: Tensor, x: Tensor, eps: float) -> Tensor:
            moved = super().linf_clamp_(dx, x, eps)
            with torch.no_grad():
                self.get_logits(x + moved)
            return moved  # type: ignore[no-any-return]

    Looking(job.net, eps=job.eps, nb_iter=job.queries // 257 + 1)(job.x, job.y)


def ta_one_pixel(job: Job) -> None:
    """100 queries a generation."""
    from torchattacks import OnePixel

    OnePixel(job.net, pixels=int(job.eps), steps=job.queries // 100 + 1, popsize=100)(job.x, job.y)


# the authors' own Square


@cache
def _published(path: Path) -> ModuleType:
    """attack.py of max-andr/square-attack without what it imports for its own models, and without its own seed."""
    module = ModuleType("square_attack")
    stubs = {name: ModuleType(name) for name in ("data", "models", "utils")}
    source = path.read_text().replace("np.random.seed(0)", "pass")
    with patch.dict(sys.modules, stubs):
        exec(compile(source, path.name, "exec"), module.__dict__)
    module.__dict__["log"] = SimpleNamespace(print=lambda line: None)
    return module


class _Oracle:
    """What that code wants a model to be."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    @torch.no_grad()
    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.net(torch.from_numpy(x.astype(np.float32))).numpy()  # type: ignore[no-any-return]

    def loss(self, y: np.ndarray, logits: np.ndarray, targeted: bool, loss_type: str) -> np.ndarray:
        """The margin of the class marked in y (1, C) over the best other one."""
        return logits[y] - np.where(y, -np.inf, logits).max(1)  # type: ignore[no-any-return]


def authors_square(job: Job, *, path: Path) -> None:
    """p = 0.3 in l-infinity and 0.1 in l2, as they advise for CIFAR-10 and by default; torchattacks' port has 0.8."""
    module = _published(path)
    attack, p = {"linf": (module.square_attack_linf, 0.3), "l2": (module.square_attack_l2, 0.1)}[job.norm]
    marked = np.eye(CLASSES, dtype=bool)[job.y.numpy()]
    nowhere = SimpleNamespace(write=len)  # in place of the file of its statistics
    right = np.ones(1, dtype=bool)
    attack(_Oracle(job.net), job.x.numpy(), marked, right, job.eps, job.queries, p, nowhere, False, "margin_loss")


FB, TA, ART = "Foolbox", "torchattacks", "ART"
BOTH = ("l2", "linf")

# who, name, norms, access, minimizes, attack; names are those of ours where we have the same attack
_ATTACKS: tuple[tuple[str, str, tuple[str, ...], str, bool, Attack], ...] = (
    (TA, "Square", BOTH, SCORES, False, ta_square),
    (ART, "Square", BOTH, SCORES, False, art_square),
    (TA, "SPSA", ("linf",), SCORES, False, ta_spsa),
    (FB, "GenAttack", ("linf",), SCORES, False, fb_gen_attack),
    (ART, "SimBA, DCT", ("l2",), SCORES, False, partial(art_simba, kind="dct")),
    (ART, "SimBA, pixels", ("l2",), SCORES, False, partial(art_simba, kind="px")),
    (ART, "ZOO", ("l2",), SCORES, True, art_zoo),
    (TA, "OnePixel", ("l0",), SCORES, False, ta_one_pixel),
    (ART, "OnePixel", ("l0",), SCORES, False, art_one_pixel),
    (FB, "HopSkipJump", BOTH, LABELS, True, fb_hop_skip_jump),
    (ART, "HopSkipJump", BOTH, LABELS, True, art_hop_skip_jump),
    (ART, "GeoDA", BOTH, LABELS, True, art_geoda),
    (FB, "BoundaryAttack", ("l2",), LABELS, True, fb_boundary),
    (ART, "BoundaryAttack", ("l2",), LABELS, True, art_boundary),
    (ART, "SignOPT", ("l2",), LABELS, True, art_sign_opt),
)


def _seeded(attack: Attack, job: Job) -> None:
    _seed(job.seed)
    attack(job)


def _broken(error: str, job: Job) -> None:
    raise RuntimeError(error)


def attacks(norm: str, square: Path | None) -> Iterator[BlackBox]:
    """What the installed libraries have for this norm. square: where the authors' attack.py is."""
    libraries = {library.name: library for library in installed()}
    for who, name, norms, access, minimizes, attack in _ATTACKS:
        if norm in norms and who in libraries:
            error = libraries[who].error
            yield BlackBox(who, name, access, minimizes, partial(_broken, error) if error else partial(_seeded, attack))
    if square is not None and norm in BOTH:
        yield BlackBox(AUTHORS, "Square", SCORES, False, partial(_seeded, partial(authors_square, path=square)))
