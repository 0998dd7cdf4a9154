"""What a figure of robustness depends on: the labels trained with, the attacks tried, and gradients that lead somewhere."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saddlepoint.attacks import FGSM, PGD, AutoAttack, Square
from saddlepoint.attacks.facade import attack, perturb
from saddlepoint.defenses import Adversarial
from saddlepoint.defenses.objectives import Objective
from saddlepoint.defenses.transforms import BitDepth
from saddlepoint.engine import Attack
from saddlepoint.evaluate import Evaluation, diagnose, evaluate
from saddlepoint.evaluate.evidence import passes
from saddlepoint.models import Classifier, Defended, Model
from saddlepoint.reproduce.frame import Context, Figure, Recipe, entry
from saddlepoint.reproduce.masking import CNN, EPS, UNIT, undefended_network
from saddlepoint.threats import Linf

THREAT = Linf(EPS)
FORTY = PGD(steps=40, step_size=0.01)
ONE_STEP = Adversarial(attack=FGSM(), threat=THREAT, form="add")
CURES = {
    "predicted labels": replace(ONE_STEP, labels="predicted"),
    "least likely labels": replace(ONE_STEP, labels="least_likely"),
}
SEVERAL_STEPS = Adversarial(attack=PGD(steps=5, step_size=0.1), threat=THREAT, warmup=1)


def _left(context: Context, model: Classifier, method: Attack, x: Tensor, y: Tensor) -> float:
    """Accuracy under an attack."""
    return attack(model, x, y, method, THREAT, seed=context.seed).robust_accuracy


def _accuracy(model: Classifier, x: Tensor, y: Tensor) -> float:
    return float((model.predict(x) == y).double().mean())


def _evaluated(context: Context, model: Classifier, x: Tensor, y: Tensor) -> Evaluation:
    """What `sp.evaluate` finds. Errors: `KeyboardInterrupt` where Ctrl-C left it unfinished."""
    evaluation = evaluate(model, x, y, THREAT, seed=context.seed)
    if not evaluation.complete:
        raise KeyboardInterrupt
    return evaluation


def autoattack(context: Context) -> AutoAttack:
    """AutoAttack, or less of it where the context is quick."""
    return AutoAttack(steps=10, queries=200) if context.quick else AutoAttack()


@entry(
    "R13",
    "Label leaking",
    "Kurakin et al. 2017, arXiv:1611.01236; figures: Madry et al. 2018, arXiv:1706.06083, figure 6",
    f"{CNN}, 10 epochs (quickly: 3), images and their FGSM examples for the true label in equal parts (and once more each for"
    " the predicted one and towards the least likely one); eps 0.3, clipped to [0, 1]; PGD with 40 steps of 0.01 on 1,000"
    " images",
)
def label_leaking(context: Context) -> list[Figure]:
    """The network learns to read the true label off FGSM examples: these are no harder than clean inputs, PGD's are.

    Trained on examples that don't know the label it can't, so that for it FGSM's are harder; PGD's remain so.
    """
    clean, one_step, iterated = _accuracies(context, ONE_STEP)
    cured = {name: _accuracies(context, adversary) for name, adversary in CURES.items()}
    other = "of CIFAR-10, wide network"
    fooled = context.accept((0.0, 0.4), loose=(0.0, 0.5))
    return [
        Figure("clean accuracy", clean, paper=0.903, paper_note=other),
        Figure("FGSM accuracy", one_step, paper=0.951, paper_note=other),
        Figure("FGSM less clean accuracy", one_step - clean, context.accept((-0.03, 1.0)), paper=0.048, paper_note=other),
        Figure("PGD-40 accuracy", iterated, fooled, paper=0.0, paper_note=other),
        *(
            figure
            for name, (own_clean, own_one_step, own_iterated) in cured.items()
            for figure in (
                Figure(f"{name}: clean accuracy", own_clean),
                Figure(f"{name}: FGSM accuracy", own_one_step),
                Figure(f"{name}: FGSM less clean accuracy", own_one_step - own_clean, context.accept((-1.0, -0.03))),
                Figure(f"{name}: PGD-40 accuracy", own_iterated),
            )
        ),
    ]


def _accuracies(context: Context, adversary: Objective) -> tuple[float, float, float]:
    """Of a network trained so: clean, under FGSM, under PGD-40."""
    model = context.model(Recipe(context.convolutional, epochs=3 if context.quick else 10, adversary=adversary, bounds=UNIT))
    test, few = context.test, context.few(context.test, 1000)
    one_step = attack(model, test.x, test.y, FGSM(), THREAT, seed=context.seed)
    return one_step.clean_accuracy, one_step.robust_accuracy, _left(context, model, FORTY, few.x, few.y)


@entry(
    "R34",
    "The order of attacks",
    "Croce & Hein 2020, arXiv:2003.01690; Madry et al. 2018, arXiv:1706.06083",
    f"{CNN}, 3 epochs of 20,000 images, each replaced by its PGD example of 5 steps of 0.1, eps growing in the first epoch;"
    " 200 images, AutoAttack's parts alone on the first 50, eps 0.3, clipped to [0, 1]; PGD with steps of 2.5 eps / steps"
    " (quickly: 2 epochs, AutoAttack with 10 steps and 200 queries)",
)
def order_of_attacks(context: Context) -> list[Figure]:
    """More steps leave less, and AutoAttack at most what the best of its parts leaves."""
    epochs = 2 if context.quick else 3
    recipe = Recipe(context.convolutional, epochs=epochs, adversary=SEVERAL_STEPS, bounds=UNIT, samples=20_000)
    model, few = context.model(recipe), context.few(context.test, 200)
    whole = autoattack(context)
    one, twenty, hundred = (_left(context, model, method, few.x, few.y) for method in (FGSM(), PGD(steps=20), PGD(steps=100)))
    auto = attack(model, few.x, few.y, whole, THREAT, seed=context.seed)
    first = few.take(50)
    parts = [_left(context, model, part, first.x, first.y) for part in whole.stages("linf").attacks]
    auto_first = float(auto.robust[: len(first)].double().mean())
    found = _evaluated(context, model, few.x, few.y).robust_accuracy
    madry, no_less, no_more = "of a wider network, trained longer", (0.0, 1.0), (-1.0, 0.0)
    return [
        Figure("clean accuracy", _accuracy(model, few.x, few.y), paper=0.9853, paper_note=madry),
        Figure("FGSM accuracy", one, paper=0.9636, paper_note=madry),
        Figure("PGD-20 accuracy", twenty),
        Figure("PGD-100 accuracy", hundred, paper=0.9252, paper_note=madry),
        Figure("AutoAttack's accuracy", auto.robust_accuracy, paper=0.885, paper_note=madry),
        *(
            Figure(f"{name} accuracy, 50 images", part)
            for name, part in zip(("APGD", "APGD-T", "FAB-T", "Square"), parts, strict=True)
        ),
        Figure("sp.evaluate's accuracy", found),
        Figure("FGSM's less PGD-20's", one - twenty, context.accept(no_less)),
        Figure("PGD-20's less PGD-100's", twenty - hundred, context.accept(no_less)),
        Figure(
            "PGD-100's less AutoAttack's", hundred - auto.robust_accuracy, context.accept(no_less),
            paper=0.0402, paper_note=madry,
        ),
        Figure("AutoAttack's less the smallest of its parts', 50 images", auto_first - min(parts), no_more),
        Figure("samples that sp.evaluate leaves more", round((found - auto.robust_accuracy) * len(few)), (-200, 1), unit=""),
    ]  # fmt: skip


@entry(
    "R35",
    "Masked gradients",
    "Athalye et al. 2018, arXiv:1802.00420; Papernot et al. 2017, arXiv:1602.02697",
    f"{CNN}, 5 epochs, as it is and behind rounding to 8 levels or before a factor of 1000 on its logits; 200 images, eps 0.3,"
    " clipped to [0, 1]; FGSM on cross-entropy, Square with 1,000 queries, PGD with 40 steps of 0.01 on the plain network",
)
def masked_gradients(context: Context) -> list[Figure]:
    """Where the gradient is zero FGSM finds nothing; queries and another network's examples show that nothing was gained."""
    plain, few = undefended_network(context), context.few(context.test, 200)
    x, y = few.x, few.y
    examples = perturb(plain, x, y, FORTY, THREAT, seed=context.seed)
    fallen, hidden = context.accept((0.0, 0.2), loose=(0.0, 0.5)), context.accept((0.8, 1.0), loose=(0.5, 1.0))
    figures = [Figure("plain: FGSM accuracy", _left(context, plain, FGSM(), x, y))]
    for name, model in masked(plain).items():
        figures += [
            Figure(f"{name}: clean accuracy", _accuracy(model, x, y)),
            Figure(f"{name}: FGSM accuracy", _left(context, model, FGSM(), x, y), hidden),
            Figure(f"{name}: Square accuracy", _left(context, model, Square(steps=1000), x, y), fallen),
            Figure(f"{name}: accuracy on the plain network's examples", _accuracy(model, examples, y), fallen),
            Figure(
                f"{name}: diagnose says masked",
                float(diagnose(model, x, y, THREAT, seed=context.seed).masked),
                (1.0, 1.0),
                unit="",
            ),
        ]
    return figures


class _Saturated(torch.nn.Module):
    """A network's logits times 1000: in float32, the cross-entropy of nearly every right answer is flat."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return 1000 * logits


def masked(plain: Model) -> dict[str, Classifier]:
    """Two defenses that only hide the gradient."""
    assert isinstance(plain.net, torch.nn.Module)
    levels = replace(BitDepth(3).transform(plain.bounds), backward="exact")  # rounding's own gradient, zero, not BPDA
    return {"8 levels": Defended(plain, [levels]), "logits x 1000": Model(_Saturated(plain.net), bounds=plain.bounds)}


@entry(
    "R53",
    "AutoAttack's row for TRADES on MNIST",
    "Croce & Hein 2020, arXiv:2003.01690; the network: Zhang et al. 2019, arXiv:1901.08573",
    "the network of TRADES' authors with their weights, from models/ beside the data; eps 0.3, clipped to [0, 1]; sp.evaluate"
    " on the first 1,000 images, AutoAttack on the first 50 (quickly: AutoAttack with 10 steps and 200 queries)",
)
def published_row(context: Context) -> list[Figure]:
    """`sp.evaluate` leaves at most what AutoAttack leaves."""
    address = "checkpoints/model_mnist_smallcnn.pt in commit f94f414 of github.com/yaodongyu/TRADES"
    model = context.published("smallcnn", "mnist_smallcnn_trades_eps0.3.pt", address)
    test, few = context.test, context.few(context.test, 1000)
    before = sum(passes(model))
    evaluation = _evaluated(context, model, few.x, few.y)
    spent = (sum(passes(model)) - before) / len(few)
    first = few.take(50)
    auto = _left(context, model, autoattack(context), first.x, first.y)
    ours = float(evaluation.stands[: len(first)].double().mean())
    clean = context.accept((0.9943, 0.9953), loose=(0.97, 1.0))
    left = context.accept((0.897, 0.9281), loose=(0.6, 1.0))
    whole = "AutoAttack's on all 10,000 images"
    first_thousand = f"{whole}; the goal is what AutoAttack left of the first 1,000 in benchmarks/README.md"
    return [
        Figure("clean accuracy", _accuracy(model, test.x, test.y), clean, paper=0.9948, goal=0.9948),
        Figure("sp.evaluate's accuracy", evaluation.robust_accuracy, left, paper=0.9281, paper_note=first_thousand, goal=0.907),
        Figure("sp.evaluate's passes an image", spent, unit=""),
        Figure("AutoAttack's accuracy, 50 images", auto, paper=0.9281, paper_note=whole),
        Figure("sp.evaluate's less AutoAttack's, 50 images", ours - auto, (-1.0, 0.0)),
    ]
