"""Identity: each attack against its paper's equations, with the network's derivative written out by hand.

And no other registered attack passes in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.rng import Keys
from saddlepoint.threats import Threat

A = sp.attacks
SEED, COUNT, STEPS = 3, 6, 5
_generator = torch.Generator().manual_seed(0)
W1, B1, W2, B2 = (torch.randn(*shape, generator=_generator, dtype=torch.float64) for shape in ((9, 7), (9,), (4, 9), (4,)))
W1 *= 2
X = 0.35 + 0.3 * torch.rand(COUNT, 7, generator=_generator, dtype=torch.float64)


def logits(x: Tensor) -> Tensor:
    return torch.tanh(x @ W1.T + B1) @ W2.T + B2


Y = logits(X).argmax(1)
LEAST = logits(X).argmin(1)


def gradient(x: Tensor, classes: Tensor = Y) -> Tensor:
    """d(-log p_class)/dx: softmax minus one-hot, through the second layer, tanh' = 1 - tanh^2, and the first layer."""
    hidden = torch.tanh(x @ W1.T + B1)
    scores = hidden @ W2.T + B2
    error = torch.exp(scores) / torch.exp(scores).sum(1, keepdim=True)
    error[torch.arange(len(x)), classes] -= 1
    return ((error @ W2) * (1 - hidden**2)) @ W1


def model() -> sp.Model:
    net = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), (W1, B1, W2, B2), strict=True):
            parameter.copy_(value)
    return sp.Model(net)


def clip(x: Tensor, eps: float) -> Tensor:
    """Clip_{x, eps} of the papers: ball and input range."""
    return torch.minimum(torch.maximum(x, X - eps), X + eps).clamp(0, 1)


def keys() -> Keys:
    """The random numbers of the first restart at iteration 0."""
    return Keys.of(SEED, torch.arange(COUNT)).absorb(0).absorb(0)


def top(gain: Tensor, count: int) -> Tensor:
    return torch.zeros_like(gain).scatter(1, gain.argsort(1, descending=True)[:, :count], 1.0)


# The equations. eps is small enough that nothing below depends on the input range but for l0 and the clips written out.
E = 0.3


def fgsm() -> Tensor:
    return (X + E * gradient(X).sign()).clamp(0, 1)


def fgsm_targeted() -> Tensor:
    return (X - E * gradient(X, (Y + 1) % 4).sign()).clamp(0, 1)


def fgm_l2() -> Tensor:
    g = gradient(X)
    return X + E * g / (g**2).sum(1, keepdim=True).sqrt()


def fgm_l1() -> Tensor:
    g = gradient(X)
    return X + E * g.sign() * top(g.abs(), 1)


def fgm_l0() -> Tensor:
    g = gradient(X)
    end = (g > 0).double()
    return torch.where(top(g.abs() * (end - X).abs(), 2) > 0, end, X)


def gradient_value() -> Tensor:
    g = gradient(X)
    return X + E * g / g.abs().max(1, keepdim=True).values


def gradient_value_raw() -> Tensor:
    return clip(X + 0.02 * gradient(X), E)


def r_fgsm() -> Tensor:
    noisy = X + E / 2 * keys().sign((7,), torch.float64)
    return clip(noisy + (E - E / 2) * gradient(noisy).sign(), E)


def otcm() -> Tensor:
    return (X - E * gradient(X, LEAST).sign()).clamp(0, 1)


def bim() -> Tensor:
    x = X
    for _ in range(STEPS):
        x = clip(x + E / 4 * gradient(x).sign(), E)
    return x


def illc() -> Tensor:
    x = X
    for _ in range(STEPS):
        x = clip(x - E / 4 * gradient(x, LEAST).sign(), E)
    return x


def pgd() -> Tensor:
    x = clip(X + E * (2 * keys().uniform((7,), torch.float64) - 1), E)
    for _ in range(STEPS):
        x = clip(x + E / 4 * gradient(x).sign(), E)
    return x


def pgd_l2() -> Tensor:
    start = sp.L2(E).around(X).random(keys())  # its distribution is tested with the threats
    x = start
    for _ in range(STEPS):
        g = gradient(x)
        x = x + E / 4 * g / g.norm(dim=1, keepdim=True)
        x = X + (x - X) * (E / (x - X).norm(dim=1, keepdim=True)).clamp(max=1)
    return x


def mi_fgsm(mu: float = 0.9) -> Tensor:
    x, velocity = X, torch.zeros_like(X)
    for _ in range(STEPS):
        g = gradient(x)
        velocity = mu * velocity + g / g.abs().sum(1, keepdim=True)
        x = clip(x + E / 4 * velocity.sign(), E)
    return x


def ni_fgsm(mu: float = 0.9) -> Tensor:
    x, velocity = X, torch.zeros_like(X)
    for _ in range(STEPS):
        g = gradient(x + E / 4 * mu * velocity)
        velocity = mu * velocity + g / g.abs().mean(1, keepdim=True)  # the authors' code; printed is the sum
        x = clip(x + E / 4 * velocity.sign(), E)
    return x


def uniform_noise() -> Tensor:
    return clip(X + E * (2 * keys().uniform((7,), torch.float64) - 1), E)


def gaussian_noise() -> Tensor:
    return clip(X + 0.05 * keys().normal((7,), torch.float64), E)


def sign_noise() -> Tensor:
    return clip(X + E * keys().sign((7,), torch.float64), E)


S = {"steps": STEPS, "step_size": E / 4}
Row = tuple[object, Threat, object, Callable[[], Tensor]]


def sprint() -> Tensor:
    x, velocity = clip(X + E * keys().sign((7,), torch.float64), E), torch.zeros_like(X)
    for k in range(STEPS):
        hidden = torch.tanh(x @ W1.T + B1)
        rival = (hidden @ W2.T + B2).scatter(1, Y[:, None], -torch.inf).argmax(1)
        g = ((W2[rival] - W2[Y]) * (1 - hidden**2)) @ W1
        velocity = 0.75 * velocity + g / g.abs().sum(1, keepdim=True)
        x = clip(x + E * (1 + math.cos(math.pi * k / STEPS)) / 2 * velocity.sign(), E)
    return x


ROWS: dict[str, Row] = {
    "Sprint": (A.Sprint(steps=STEPS), sp.Linf(E), None, sprint),
    "FGSM": (A.FGSM(), sp.Linf(E), None, fgsm),
    "FGSM targeted": (A.FGSM(), sp.Linf(E), sp.Targeted("next"), fgsm_targeted),
    "FGM": (A.FGM(), sp.L2(E), None, fgm_l2),
    "FGM l1": (A.FGM(), sp.L1(E), None, fgm_l1),
    "FGM l0": (A.FGM(), sp.L0(2), None, fgm_l0),
    "FastGradientValue": (A.FastGradientValue(), sp.Linf(E), None, gradient_value),
    "FastGradientValue raw": (A.FastGradientValue(step_size=0.02), sp.Linf(E), None, gradient_value_raw),
    "RFGSM": (A.RFGSM(), sp.Linf(E), None, r_fgsm),
    "OTCM": (A.OTCM(), sp.Linf(E), None, otcm),
    "BIM": (A.BIM(**S), sp.Linf(E), None, bim),
    "ILLC": (A.ILLC(**S), sp.Linf(E), None, illc),
    "PGD": (A.PGD(**S), sp.Linf(E), None, pgd),
    "PGD l2": (A.PGD(**S), sp.L2(E), None, pgd_l2),
    "MIFGSM": (A.MIFGSM(**S, momentum=0.9), sp.Linf(E), None, mi_fgsm),
    "NIFGSM": (A.NIFGSM(**S, momentum=0.9), sp.Linf(E), None, ni_fgsm),
    "UniformNoise": (A.UniformNoise(), sp.Linf(E), None, uniform_noise),
    "GaussianNoise": (A.GaussianNoise(std=0.05), sp.Linf(E), None, gaussian_noise),
    "SignNoise": (A.SignNoise(), sp.Linf(E), None, sign_noise),
}


def agrees(attack: object, threat: Threat, goal: object, equations: Callable[[], Tensor]) -> bool:
    result = sp.attack(model(), X, Y, attack, threat, goal, seed=SEED, keep="last")
    return torch.allclose(result.adversarial, equations(), rtol=1e-5, atol=1e-6)


def test_the_hand_written_derivative_is_right() -> None:
    x = X.clone().requires_grad_()
    nn.functional.cross_entropy(logits(x), Y, reduction="sum").backward()
    torch.testing.assert_close(gradient(X), x.grad)


# Where the others are compared with their equations.
ELSEWHERE = {
    "test_attacks_fmn.py": {"DDN", "FMN", "SigmaZero", "DualAveraging"},
    "test_attacks_apgd.py": {"APGD", "APGDT"},
    "test_attacks_autoattack.py": {"AutoAttack"},
    "test_attacks_square.py": {"Square"},
    "test_attacks_penalty.py": {"LBFGS", "EAD", "CarliniWagnerL0", "CarliniWagnerL2", "CarliniWagnerLinf"},
    "test_attacks_deepfool.py": {"DeepFool", "SuperDeepFool", "SparseFool"},
    "test_attacks_saliency.py": {"JSMA"},
    "test_attacks_linear.py": {"LinearClosedForm", "HotCold"},
    "test_attacks_fab.py": {"FAB"},
    "test_attacks_brendel_bethge.py": {"BrendelBethge"},
    "test_attacks_lagrangian.py": {"ALMA", "PDGD", "PDPGD"},
    "test_attacks_noise.py": {"SaltAndPepperNoise"},
    "test_attacks_normals.py": {"HopSkipJump", "QEBA", "GeoDA", "CGBA", "SignOPT"},
    "test_attacks_walks.py": {"BoundaryAttack", "SurFree"},
    "test_attacks_rays.py": {"RayS"},
    "test_attacks_estimation.py": {"NES", "SPSA", "Bandits", "NAttack"},
    "test_attacks_coordinates.py": {"ZOO", "SimBA"},
    "test_attacks_evolution.py": {"FewPixel", "GenAttack", "CMAES"},
    "test_detectors_guarded.py": {"OrthogonalPGD"},
    "test_attacks_transfer.py": {"DIFGSM", "TIFGSM", "SINIFGSM", "VMIFGSM", "VNIFGSM"},
}


def test_every_attack_has_its_equations_tested() -> None:
    elsewhere = [name for names in ELSEWHERE.values() for name in names]
    assert sorted(cls.__name__ for cls in A.find()) == sorted([*{name.split()[0] for name in ROWS}, *elsewhere])
    for file, names in ELSEWHERE.items():
        text = (Path(__file__).parents[1] / file).read_text()
        assert all(name in text for name in names), file


@pytest.mark.parametrize("name", ROWS)
def test_equations(name: str) -> None:
    assert agrees(*ROWS[name])


# FGM in l-infinity is FGSM by definition: its identity is that of its l2, l1 and l0 steps
SYNONYMS = {("FGSM", "FGM"), ("FGSM targeted", "FGM"), ("FGSM targeted", "OTCM")}


@pytest.mark.parametrize("name", ROWS)
def test_no_other_attack_in_its_place(name: str) -> None:
    attack, threat, goal, equations = ROWS[name]
    for other in {type(row[0]): row[0] for row in ROWS.values()}.values():
        can = type(other).declaration
        if type(other) is type(attack) or (name, type(other).__name__) in SYNONYMS or threat.norm not in can.norms:
            continue
        if goal is not None and not can.targeted:
            continue
        assert not agrees(other, threat, goal, equations), f"{type(other).__name__} passes for {name}"


def test_the_tutorial_snippet() -> None:
    """TensorFlow's FGSM: x + 0.005 * sign(d categorical_crossentropy / dx), one input at a time and without clipping."""
    expected = []
    for i in range(COUNT):
        one = X[i : i + 1].clone().requires_grad_()
        label = nn.functional.one_hot(Y[i : i + 1], 4).double()
        loss = -(label * torch.log(torch.softmax(logits(one), 1))).sum()
        (tape,) = torch.autograd.grad(loss, one)
        expected.append(one.detach() + 0.005 * torch.sign(tape))
    unclipped = sp.Model(model().net, bounds=None)
    result = sp.attack(unclipped, X, Y, A.FGSM(), sp.Linf(0.005), keep="last")
    torch.testing.assert_close(result.adversarial, torch.cat(expected), rtol=0, atol=1e-15)
