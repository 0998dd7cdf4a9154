"""Detectors that squeeze, decode, restore or are trained: who finds what, and what an adversary who knows them hides."""

from __future__ import annotations

import math

from torch import Tensor, nn

from saddlepoint.attacks import APGD, BIM, FGSM
from saddlepoint.attacks.facade import attack
from saddlepoint.data import Split
from saddlepoint.defenses.transforms import BitDepth
from saddlepoint.detectors import (
    ClassReconstruction,
    Detector,
    FeatureSqueezing,
    LayerNetwork,
    LogitsDecoder,
    ReconstructionError,
)
from saddlepoint.detectors.metrics import roc_auc
from saddlepoint.engine import Attack
from saddlepoint.evaluate.detection import bypass
from saddlepoint.goals import Goal, Targeted
from saddlepoint.models import Defended, Model
from saddlepoint.models.base import Classifier
from saddlepoint.reproduce.frame import Context, Figure, Recipe, entry
from saddlepoint.reproduce.least import QUICKLY
from saddlepoint.reproduce.masking import CNN, EPS, UNIT, undefended_network
from saddlepoint.threats import Linf, Minimize, Threat

_FPR = 0.05
HIDDEN = "adaptive: `sp.bypass` at eps 0.3, of each image's examples that fool the classifier the one with the lowest score"


def halves(context: Context) -> tuple[Split, Split]:
    """Test images to judge on, and others to calibrate on: every second one, for MNIST's first half is harder than its last."""
    x, y = context.test.x, context.test.y
    return Split(x[::2], y[::2]), Split(x[1::2], y[1::2])


def _examples(context: Context, model: Model, split: Split, made: Attack, threat: Threat, goal: Goal | None = None) -> Tensor:
    """Inputs that fool the model; images that were wrong before are none."""
    kept = model.predict(split.x) == split.y
    result = attack(model, split.x[kept], split.y[kept], made, threat, goal, seed=context.seed)
    return result.adversarial[result.success]


def _accuracy(model: Classifier, x: Tensor, y: Tensor) -> float:
    return float((model.predict(x) == y).double().mean())


def _found(detector: Detector, x: Tensor) -> float:
    return float(detector.predict(x).double().mean())


def aware(context: Context, detector: Detector, split: Split) -> list[Figure]:
    """What an adversary who knows the detector makes of it."""
    strong = APGD(steps=20, loss="margin")
    few = context.few(split, 50)
    suite, rungs = ([strong], 1) if context.quick else (None, 4)
    past = bypass(detector, few.x, few.y, Linf(EPS), attacks=suite, rungs=rungs, seed=context.seed)
    assert past is not None  # some images are right and accepted, and APGD works in l-infinity
    return [
        Figure("adaptive: fool the classifier", len(past.scores) / len(past.evaded)),
        Figure("adaptive: fool it unnoticed", past.rate, context.accept(None, loose=(0.2, 1.0))),
        Figure("adaptive: area under the ROC curve", roc_auc(detector.score(split.x), past.scores), goal=0.5),
    ]


@entry(
    "R21",
    "Feature squeezing",
    "Xu, Evans & Qi 2018, arXiv:1704.01155; He et al. 2017, arXiv:1706.04701",
    f"{CNN}, 5 epochs; 1 bit and the 2x2 median, threshold for 5% false positives on half of the test images, judged on the"
    " others; 500 images by FGSM at eps 0.3 and by BIM with 10 steps of 0.06, 100 by Carlini-Wagner l2 with 6 searches of 50"
    f" steps; {HIDDEN}, 50 images",
)
def squeezing(context: Context) -> list[Figure]:
    """One bit and a median betray every example, and eps 0.3 is too little to get round both."""
    model, (judged, others) = undefended_network(context), halves(context)
    detector = FeatureSqueezing(seed=context.seed).fit(model, context.training(1000)).calibrate(others, fpr=_FPR)
    one_bit = Defended(model, [BitDepth(1)])
    many, few = context.few(judged, 500), context.few(judged, 100)
    one_step = attack(model, many.x, many.y, FGSM(), Linf(EPS), seed=context.seed).adversarial
    found = {
        "FGSM": _found(detector, _examples(context, model, many, FGSM(), Linf(EPS))),
        "BIM": _found(detector, _examples(context, model, many, BIM(steps=10, step_size=0.06), Linf(EPS))),
        "Carlini-Wagner l2": _found(detector, _examples(context, model, few, QUICKLY, Minimize("l2"))),
    }
    before, after = (_accuracy(m, one_step, many.y) for m in (model, one_bit))
    least = {"FGSM": (0.6, 1.0), "BIM": (0.6, 1.0), "Carlini-Wagner l2": (0.85, 1.0)}
    clean_range = context.accept((0.98, 1.0))
    joint = "of all attacks"
    return [
        Figure("clean accuracy, 1 bit", _accuracy(one_bit, judged.x, judged.y), clean_range, paper=0.9933),
        Figure("FGSM accuracy", before, paper=0.54),
        Figure("FGSM accuracy, 1 bit", after, paper=0.92),
        Figure("gained by 1 bit", after - before, context.accept((0.2, 1.0)), paper=0.38),
        Figure("clean images detected", _found(detector, judged.x), context.accept((0.0, 0.06)), paper=0.04),
        *(
            Figure(f"{name} detected", share, context.accept(least[name]), paper=0.982, paper_note=joint)
            for name, share in found.items()
        ),
        *aware(context, detector, judged),
    ]


def _papers(shape: tuple[int, ...], classes: int) -> nn.Module:
    """The paper's classifier: two hidden layers of 256 GELU units."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(shape), 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, classes)
    )


@entry(
    "R23",
    "An input decoded from its logits",
    "Hendrycks & Gimpel 2017, arXiv:1608.00530; Frosst, Sabour & Hinton 2018, arXiv:1811.06969",
    "two hidden layers of 256 GELU units, Adam 1e-3, 5 epochs in batches of 128; after it, a decoder of 256 GELU units from"
    " logits and last hidden layer through a bottleneck of 10, 30 epochs of 20,000 images, Adam 1e-3; by class: 16 numbers"
    " each, 512 and 1024 units, 4 epochs; 200 images, each towards a random class by Carlini-Wagner l2 with 6 searches of 50"
    f" steps, or by BIM with 100 steps of 1/255 at eps 0.3; {HIDDEN}, 50 images",
)
def decoded_logits(context: Context) -> list[Figure]:
    """What the logits stand for is another digit, which the decoder draws."""
    model, (judged, others) = context.model(Recipe(_papers, epochs=5, bounds=UNIT)), halves(context)
    part, few = context.training(20_000), context.few(judged, 200)
    epochs = (10, 2) if context.quick else (30, 4)
    detector = LogitsDecoder(epochs=epochs[0], seed=context.seed).fit(model, part).calibrate(others, fpr=_FPR)
    by_class = ClassReconstruction(epochs=epochs[1], batch_size=128, seed=context.seed).fit(model, part)
    shortest = _examples(context, model, few, QUICKLY, Minimize("l2"), Targeted("random"))
    iterated = _examples(context, model, few, BIM(steps=100, step_size=1 / 255), Linf(EPS), Targeted("random"))

    def told(by: Detector, examples: Tensor) -> float:
        return roc_auc(by.score(judged.x), by.score(examples))

    together = "decoder and classifier trained together, steps of 1/255 to a random class until it has half of the probability"
    return [
        Figure("clean accuracy", _accuracy(model, judged.x, judged.y)),
        Figure("clean images detected", _found(detector, judged.x), context.accept((0.0, 0.07))),
        Figure(
            "BIM: area under the ROC curve", told(detector, iterated), context.accept((0.8, 1.0)),
            paper=0.962, paper_note=together, goal=0.9,
        ),
        Figure("Carlini-Wagner l2: area under the ROC curve", told(detector, shortest)),
        Figure("by class, Carlini-Wagner l2: area under the ROC curve", told(by_class, shortest)),
        *aware(context, detector, judged),
    ]  # fmt: skip


@entry(
    "R25",
    "A network on an inner layer",
    "Metzen et al. 2017, arXiv:1702.04267; Carlini & Wagner 2017, arXiv:1705.07263",
    f"{CNN}, 5 epochs; three convolutions of 16, 32 and 32 channels on the second convolution's map, 5 epochs of 4,000 training"
    " images and of their examples, Adam 1e-3; FGSM at eps 0.3 and BIM with 10 steps of 0.06; detectability is the mean of the"
    f" shares of examples and of clean images that are told right, 500 test images; {HIDDEN}, 50 images",
)
def inner_network(context: Context) -> list[Figure]:
    """It knows the attack that it was shown, and the weaker one less; who attacks both passes."""
    model, (judged, others) = undefended_network(context), halves(context)
    attacks: dict[str, Attack] = {"FGSM": FGSM(), "BIM": BIM(steps=10, step_size=0.06)}
    shown, many = context.training(4000), context.few(judged, 500)
    unseen = {name: _examples(context, model, many, made, Linf(EPS)) for name, made in attacks.items()}
    left = {name: 1 - len(examples) / len(many) for name, examples in unseen.items()}
    figures, detectors = [Figure(f"{name} accuracy", share) for name, share in left.items()], {}
    for name, made in attacks.items():
        examples = _examples(context, model, shown, made, Linf(EPS))
        detector = LayerNetwork(width=16, epochs=5, seed=context.seed).fit(model, shown, examples)
        detectors[name] = detector.calibrate(others, fpr=_FPR)
        for other in attacks:
            right = (_above(detector, unseen[other]) + 1 - _above(detector, many.x)) / 2
            same = other == name
            figures.append(
                Figure(
                    f"shown {name}, detectability of {other}", right, context.accept((0.9, 1.0) if same else (0.7, 1.0)),
                    paper=0.9 if same else None, paper_note="of CIFAR-10, where 10% are left right",
                )
            )  # fmt: skip
    return [*figures, *aware(context, detectors["BIM"], judged)]


def _above(detector: Detector, x: Tensor) -> float:
    """How many the network calls adversarial by itself: its logit is above 0."""
    return float((detector.score(x) > 0).double().mean())


@entry(
    "D26",
    "MagNet's detector and reformer",
    "Meng & Chen 2017, arXiv:1705.09064; Carlini & Wagner 2017, arXiv:1711.08478",
    f"{CNN}, 5 epochs; the paper's autoencoder for MNIST, 12 epochs of 20,000 images in batches of 128, Adam 1e-2, as detector"
    " by its mean absolute error and as reformer; threshold for 5% false positives on half of the test images; 100 others by"
    f" Carlini-Wagner l2 with 6 searches of 50 steps, against the classifier, and against all three; {HIDDEN}, 50 images",
)
def magnet_detector(context: Context) -> list[Figure]:
    """What was made for the bare classifier is detected or put right; what was made for all three passes."""
    model, part, (judged, others) = undefended_network(context), context.training(20_000), halves(context)
    epochs = max(1, round((48_000 if context.quick else 240_000) / len(part)))
    detector = _restoring(context, epochs).fit(model, part).calibrate(others, fpr=_FPR)
    defended = Defended(model, [detector.autoencoder.transform()])
    guarded = _restoring(context, epochs).fit(defended, part).calibrate(others, fpr=_FPR).guard(defended)  # the same weights
    few = context.few(judged, 100)
    naive, adaptive = (attack(m, few.x, few.y, QUICKLY, Minimize("l2"), seed=context.seed) for m in (model, guarded))
    withstood = detector.predict(naive.adversarial) | (defended.predict(naive.adversarial) == few.y)
    return [
        Figure("clean accuracy, reformed", _accuracy(defended, judged.x, judged.y), paper=0.991),
        Figure("clean images detected", _found(detector, judged.x), context.accept((0.0, 0.07))),
        Figure("Carlini-Wagner, undefended", naive.robust_accuracy, context.accept((0.0, 0.1)), paper=0.0),
        Figure(
            "Carlini-Wagner, detected or put right", float(withstood.double().mean()), context.accept((0.9, 1.0)), paper=0.995
        ),
        Figure("Carlini-Wagner against all three", adaptive.robust_accuracy, context.accept((0.0, 0.2)), paper=0.01),
        *aware(context, detector, judged),
    ]


def _restoring(context: Context, epochs: int) -> ReconstructionError:
    return ReconstructionError(epochs=epochs, batch_size=128, seed=context.seed)
