"""Detectors that fit a statistic: densities with uncertainty, and the variance along the last principal components."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saddlepoint import zoo
from saddlepoint.attacks import BIM, FGSM
from saddlepoint.attacks.facade import attack
from saddlepoint.detectors import Detector, DropoutUncertainty, KernelDensity, TailVariance, roc_auc
from saddlepoint.detectors.regression import logistic_regression
from saddlepoint.engine import Attack, Keep
from saddlepoint.goals import Targeted
from saddlepoint.models import Model
from saddlepoint.reproduce.detection_networks import HIDDEN, aware, halves
from saddlepoint.reproduce.frame import Context, Figure, Recipe, entry
from saddlepoint.reproduce.least import QUICKLY
from saddlepoint.reproduce.masking import CNN, EPS, UNIT, undefended_network
from saddlepoint.reproduce.measures import fgsm, right
from saddlepoint.threats import Linf, Minimize, Threat

STEP = 10 / 255


def with_dropout(in_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The convolutional network with dropout before its last layer, as the paper's has."""
    build = zoo.networks.cnn_s if min(in_shape[1:]) >= 28 else zoo.networks.digits_cnn
    *hidden, last = build(in_shape, num_classes).children()
    return nn.Sequential(*hidden, nn.Dropout(0.5), last)


@entry(
    "R22",
    "Kernel density and dropout uncertainty",
    "Feinman et al. 2017, arXiv:1703.00410, table 4",
    f"{CNN}, 5 epochs, with dropout 0.5 on the hidden units; density of these per predicted class, of 20,000 training images,"
    " bandwidth by leave-one-out likelihood; variance over 50 dropout masks; correctly classified test images, 1,000 for FGSM"
    " and BIM with 30 steps of 0.01 at eps 0.3, 200 for Carlini-Wagner l2 with 6 searches of 50 steps; successful examples"
    " beside their clean images and these with Gaussian noise of the same size; logistic regression fitted on the first half,"
    f" areas under the ROC curve on the second; density {HIDDEN}, 50 images, threshold for 5% false positives",
)
def densities(context: Context) -> list[Figure]:
    """Examples of most attacks lie where there are few samples of the class that they are taken for."""
    model = context.model(Recipe(with_dropout, epochs=5, bounds=UNIT))
    fitting = context.training(20_000)
    found = [KernelDensity(seed=context.seed), DropoutUncertainty(seed=context.seed, passes=10 if context.quick else 50)]
    for detector in found:
        detector.fit(model, fitting)
    figures = []
    iterated = BIM(steps=30, step_size=0.01)
    attacks: tuple[tuple[str, Attack, Threat, Keep, int, float, float], ...] = (
        ("FGSM", FGSM(), Linf(EPS), "first", 1000, 0.75, 0.9057),
        ("BIM up to the first error", iterated, Linf(EPS), "first", 1000, 0.6, 0.9723),
        ("BIM to the last step", iterated, Linf(EPS), "last", 1000, 0.6, 0.8206),
        ("Carlini-Wagner", QUICKLY, Minimize("l2"), "first", 200, 0.75, 0.9794),
    )
    for name, method, threat, keep, count, least, paper in attacks:
        x, y = right(model, context.few(context.test, count))
        result = attack(model, x, y, method, threat, keep=keep, seed=context.seed)
        kinds = _kinds(x[result.success], result.adversarial[result.success], context.seed)
        usual, unusual = _scores(found, kinds)
        half = len(unusual) // 2
        learnt = torch.cat([*usual[:, :half], unusual[:half]])
        regression = logistic_regression(learnt, torch.arange(len(learnt)) >= 2 * half)
        clean, noisy, adversarial = (*usual[:, half:], unusual[half:])
        negative = torch.cat([clean, noisy])
        wanted = context.accept((least, 1.0), loose=(0.5, 1.0))
        figures += [
            Figure(f"{name}: area by density, clean", roc_auc(clean[:, 0], adversarial[:, 0]), wanted),
            Figure(f"{name}: area by density, clean and noisy", roc_auc(negative[:, 0], adversarial[:, 0])),
            Figure(f"{name}: area by uncertainty, clean and noisy", roc_auc(negative[:, 1], adversarial[:, 1])),
            Figure(
                f"{name}: area by both, clean and noisy",
                roc_auc(*(regression.log_odds(scores) for scores in (negative, adversarial))),
                wanted,
                paper=paper,
                paper_note="of a wider network",
            ),
        ]
    judged, others = halves(context)
    return [*figures, *aware(context, found[0].calibrate(others.x), judged)]


def _kinds(clean: Tensor, adversarial: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clean, noisy and adversarial inputs, the last two of one root mean square perturbation before clipping."""
    size = (adversarial - clean).square().mean().sqrt()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    return clean, (clean + size * noise.to(clean)).clamp(*UNIT), adversarial


def _scores(detectors: list[Detector], kinds: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Scores of clean and noisy inputs (2, N, F), and of adversarial ones (N, F)."""
    clean, noisy, adversarial = (torch.stack([d.score(x) for d in detectors], 1).double() for x in kinds)
    return torch.stack([clean, noisy]), adversarial


@entry(
    "R24",
    "Variance along the last principal components",
    "Hendrycks & Gimpel 2017, arXiv:1608.00530, table 1",
    f"{CNN}, 5 epochs; principal components of 60,000 training images, whitened coefficients from entry 700 of 784 on (in the"
    " same ratio for other sizes); FGSM with step 10/255 on all test images; iterative: steps of 1/255 up to eps 0.3 towards a"
    " random class, until it is reached, 500 test images, clipped",
)
def tail_variance(context: Context) -> list[Figure]:
    """Perturbations lie along components along which no clean image varies."""
    trained = undefended_network(context)
    model = Model(trained.net, bounds=None)  # the papers' examples aren't clipped
    training, test, few = context.training(60_000), context.test, context.few(context.test, 500)
    start = round(700 / 784 * training.x[0].numel())
    detector = TailVariance(start=start, seed=context.seed).fit(model, training)
    iterated = attack(trained, few.x, few.y, BIM(steps=77, step_size=1 / 255), Linf(EPS), Targeted("random"), seed=context.seed)
    reached = iterated.success
    noise = torch.randn(test.x.shape, generator=torch.Generator().manual_seed(context.seed)).sign()
    clean = detector.score(test.x)

    def judged(examples: Tensor) -> float:
        return roc_auc(clean, detector.score(examples))

    wanted = context.accept((0.99, 1.0), loose=(0.6, 1.0))
    return [
        Figure("FGSM, not clipped", judged(fgsm(model, test.x, test.y, STEP)), wanted, paper=1.0),
        Figure("FGSM, clipped", judged(fgsm(model, test.x, test.y, STEP, UNIT)), wanted, paper=1.0),
        Figure("iterative: examples that reach their class", float(reached.double().mean())),
        Figure("iterative, clipped", judged(iterated.adversarial[reached]), wanted, paper=1.0),
        Figure("no example: random signs of the same step, clipped", judged((test.x + STEP * noise).clamp(*UNIT))),
    ]
