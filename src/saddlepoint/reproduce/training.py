"""What training does against adversarial examples: min-max, ensembles, distillation, a penalty, more data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from saddlepoint.attacks import FGSM, JSMA, PGD, RFGSM, CarliniWagnerL2, DeepFool, Restarts
from saddlepoint.attacks.facade import attack
from saddlepoint.defenses import Adversarial, Dropout, EnsembleAdversarial, Standard, Tempered, WeightPenalty
from saddlepoint.engine import Attack, AttackResult
from saddlepoint.goals import Targeted
from saddlepoint.models import Model
from saddlepoint.reproduce.evaluation import FORTY, THREAT, autoattack
from saddlepoint.reproduce.frame import Context, Figure, Recipe, Static, entry
from saddlepoint.reproduce.least import QUICKLY
from saddlepoint.reproduce.masking import CNN, EPS, UNIT, undefended_network
from saddlepoint.reproduce.measures import error, fgsm, right
from saddlepoint.threats import Linf, Minimize

MADRY = "Madry et al. 2018, arXiv:1706.06083"
LARGER = "of a wider network, trained longer"
MIN_MAX = Adversarial(attack=PGD(steps=7, step_size=EPS / 4), threat=THREAT, warmup=1)
FULL_SIZE = replace(MIN_MAX, warmup=0.0)  # as in the paper; with small eps first, even the smallest network learns something
HELD_OUT = Recipe("cnn-a", epochs=3, bounds=UNIT)
SINGLE_STEP = Adversarial(attack=FGSM(), threat=THREAT, form="regularize", alpha=0.5)
TEMPERATURE = 100.0
STRENGTHS = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
SMALL_EPS = 0.25


@entry(
    "R11",
    "Min-max training on MNIST",
    f"{MADRY}, table 1; AutoAttack: Croce & Hein 2020, arXiv:2003.01690",
    f"{CNN}, 3 epochs, each image replaced by its PGD example of 7 steps of eps / 4, eps growing to 0.3 in the first epoch,"
    " clipped to [0, 1]; PGD with 40 steps of 0.01 on all test images, with 100 steps from 3 starts on 1,000, AutoAttack on 200"
    " (quickly: with 10 steps and 200 queries)",
)
def min_max(context: Context) -> list[Figure]:
    """A network trained on the examples of several steps keeps most of its accuracy whatever it is attacked by."""
    model = context.model(Recipe(context.convolutional, epochs=3, adversary=MIN_MAX, bounds=UNIT))
    test, some, few = context.test, context.few(context.test, 1000), context.few(context.test, 200)
    one, forty = (_attacked(context, model, test.x, test.y, method) for method in (FGSM(), FORTY))
    hundred = _attacked(context, model, some.x, some.y, Restarts(PGD(steps=100), 3))
    auto = _attacked(context, model, few.x, few.y, autoattack(context))
    no_less = context.accept((0.0, 1.0), loose=(-0.05, 1.0))
    stands = context.accept((0.8, 1.0), loose=(0.05, 1.0))
    return [
        Figure("clean accuracy", one.clean_accuracy, context.accept((0.96, 1.0)), paper=0.988, paper_note=LARGER),
        Figure("FGSM accuracy", one.robust_accuracy, context.accept((0.88, 1.0)), paper=0.956, paper_note=LARGER),
        Figure("PGD-40 accuracy", forty.robust_accuracy, stands, paper=0.932, paper_note=LARGER),
        Figure("PGD-100 accuracy, 1,000 images", hundred.robust_accuracy, paper=0.893, paper_note=f"2,000 steps, {LARGER}"),
        Figure("AutoAttack's accuracy, 200 images", auto.robust_accuracy, paper=0.885, paper_note=LARGER),
        Figure("FGSM's less PGD-40's", one.robust_accuracy - forty.robust_accuracy, no_less),
        Figure("PGD-40's less PGD-100's, 1,000 images", _lead(forty, hundred), no_less),
        Figure("PGD-100's less AutoAttack's, 200 images", _lead(hundred, auto), no_less),
    ]


def _attacked(context: Context, model: Model, x: Tensor, y: Tensor, method: Attack) -> AttackResult:
    return attack(model, x, y, method, THREAT, seed=context.seed)


def _lead(first: AttackResult, second: AttackResult) -> float:
    """How much more accuracy the first attack leaves, on the images that both had."""
    count = min(len(first.robust), len(second.robust))
    return float(first.robust[:count].double().mean() - second.robust[:count].double().mean())


def simple_network(in_shape: tuple[int, ...], num_classes: int, scale: int) -> nn.Module:
    """Madry et al.'s series: convolutions of 2 and 4 channels, each with pooling, then 64 hidden units, all times `scale`."""
    features = nn.Sequential(
        nn.Conv2d(in_shape[0], 2 * scale, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * scale, 4 * scale, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    size = 4 * scale * (in_shape[1] // 4) * (in_shape[2] // 4)
    return nn.Sequential(*features, nn.Linear(size, 64 * scale), nn.ReLU(), nn.Linear(64 * scale, num_classes))


SCALES = {scale: partial(simple_network, scale=scale) for scale in (1, 2, 4, 8)}


@entry(
    "R14",
    "Robustness takes capacity",
    f"{MADRY}, section 4, figure 4",
    "convolutions of 2 and 4 channels, 5x5, each with pooling, then 64 hidden units, all times 1, 2, 4 and 8; Adam 1e-3,"
    " 3 epochs in batches of 128, each image replaced by its PGD example as in R11, but of the whole eps from the start;"
    " PGD with 40 steps of 0.01 on 1,000 images (quickly: 1 epoch of 20,000 images)",
)
def capacity(context: Context) -> list[Figure]:
    """A network that is large enough for clean images is too small for the examples."""
    some, epochs, samples = context.test.take(1000), 1 if context.quick else 3, 20_000 if context.quick else None
    plain = context.model(Recipe(SCALES[1], epochs=epochs, bounds=UNIT, samples=samples))
    results = {}
    for scale, net in SCALES.items():
        model = context.model(Recipe(net, epochs=epochs, adversary=FULL_SIZE, bounds=UNIT, samples=samples))
        results[scale] = _attacked(context, model, some.x, some.y, FORTY)
    rises = [after.robust_accuracy - before.robust_accuracy for before, after in pairwise(results.values())]
    return [
        Figure("times 1, trained on clean images: clean accuracy", 1 - error(plain, some.x, some.y)),
        *(
            Figure(f"times {scale}: clean accuracy", result.clean_accuracy, context.accept((0.0, 0.4)) if scale == 1 else None)
            for scale, result in results.items()
        ),
        *(Figure(f"times {scale}: PGD-40 accuracy", result.robust_accuracy) for scale, result in results.items()),
        Figure("least rise of PGD-40 accuracy from a scale to the next", min(rises), context.accept((0.0, 1.0))),
        Figure(
            "PGD-40 accuracy of times 8 less that of times 1", sum(rises), context.accept((0.0, 1.0), loose=(-0.05, 1.0)),
        ),
    ]  # fmt: skip


@entry(
    "R16",
    "Ensemble adversarial training against black-box examples",
    "Tramèr et al. 2018, arXiv:1705.07204; figures: its first version of 2017",
    f"{CNN}, 6 epochs of 20,000 images and their FGSM examples, made for the network itself or for one drawn from four: itself,"
    " the same network, 32 and 64 channels of 3x3, and 240-240 hidden units, the last three trained on clean images before; eps"
    " 0.3, clipped to [0, 1]; black-box examples are those of a fifth network, with strided convolutions"
    " (quickly: 2 epochs)",
)
def ensemble(context: Context) -> list[Figure]:
    """Examples of other networks teach what transfers; its own single steps teach a network to bend its gradient."""
    sources = (
        undefended_network(context),
        context.model(Recipe("lenet", epochs=2, bounds=UNIT, samples=20_000)),
        context.model(Recipe("mlp", epochs=3, bounds=UNIT)),
    )
    recipe = partial(Recipe, context.convolutional, epochs=2 if context.quick else 6, bounds=UNIT, samples=20_000)
    single = context.model(recipe(adversary=SINGLE_STEP))
    several = context.model(recipe(adversary=EnsembleAdversarial(sources=sources, threat=THREAT)))
    held_out, x, y = context.model(HELD_OUT), context.test.x, context.test.y
    foreign = fgsm(held_out, x, y, EPS, UNIT)
    before, after = error(single, foreign, y), error(several, foreign, y)
    (own, random_first), (own_after, random_first_after) = (
        [1 - _attacked(context, model, x, y, method).robust_accuracy for method in (FGSM(), RFGSM(random_share=0.5))]
        for model in (single, several)
    )
    longer = "of larger networks, 12 epochs of 60,000 images"
    lower = context.accept((0.0, 0.7), loose=(0.0, 0.95))
    return [
        Figure("undefended: black-box error", error(sources[0], foreign, y), goal=0.939),
        Figure("own examples: clean error", error(single, x, y), goal=0.028),
        Figure("own examples: FGSM error", own, goal=0.118),
        Figure("own examples: R+FGSM error", random_first, goal=0.792),
        Figure("own examples: black-box error", before, paper=0.155, paper_note=longer, goal=0.482),
        Figure("ensemble: clean error", error(several, x, y), goal=0.028),
        Figure("ensemble: FGSM error", own_after, goal=0.382),
        Figure("ensemble: R+FGSM error", random_first_after, goal=0.746),
        Figure("ensemble: black-box error", after, paper=0.039, paper_note=longer, goal=0.27),
        Figure("the latter over the former", after / before, lower, paper=0.252, paper_note=longer, goal=0.56, unit=""),
    ]


@entry(
    "R20",
    "Defensive distillation falls to Carlini & Wagner",
    "Papernot et al. 2016, arXiv:1511.04508; Carlini & Wagner 2017, arXiv:1608.04644, section 8",
    f"{CNN}, 5 epochs for teacher and for student, both at temperature 100; JSMA on the probabilities, 100 images to random"
    " targets; FGSM eps 0.3, clipped to [0, 1], on cross-entropy and on the logits' margin; C&W with 9 searches of 200 steps"
    " (quickly: 3 epochs, 6 searches of 50), 100 images to random targets",
)
def distillation(context: Context) -> list[Figure]:
    """Large logits round the gradient of the probabilities to zero; an attack on the logits doesn't look at those."""
    recipe = partial(Recipe, context.convolutional, epochs=3 if context.quick else 5, bounds=UNIT)
    teacher = context.model(recipe(adversary=Tempered(temperature=TEMPERATURE)))
    learnt = Tempered(temperature=TEMPERATURE, teacher=teacher)
    student = context.model(recipe(adversary=learnt))
    plain = undefended_network(context)
    before, after = (_fooled(context, model) for model in (plain, student))
    few_fooled = context.accept((0.0, 0.2), loose=(0.0, 0.5))
    test, larger = context.test, "of a larger network"
    return [
        Figure("undefended: clean error", error(plain, test.x, test.y), paper=0.0049, paper_note=larger),
        Figure("distilled: clean error", error(student, test.x, test.y), paper=0.0095, paper_note=larger, goal=0.022),
        Figure("undefended: images whose gradient is zero", before["zero"], goal=0.013),
        Figure("distilled: images whose gradient is zero", after["zero"], goal=0.965),
        Figure("undefended: JSMA's success", before["jsma"], paper=0.9589, paper_note=larger, goal=1.0),
        Figure("distilled: JSMA's success", after["jsma"], few_fooled, paper=0.0045, paper_note=larger, goal=0.067),
        Figure("undefended: FGSM's success", before["fgsm"]),
        Figure("distilled: FGSM's success", after["fgsm"], few_fooled),
        Figure("undefended: FGSM's success on the margin", before["margin"]),
        Figure("distilled: FGSM's success on the margin", after["margin"]),
        Figure(
            "distilled: C&W's success", after["success"], context.accept((1.0, 1.0), loose=(0.9, 1.0)), paper=1.0, goal=1.0,
        ),
        Figure("undefended: C&W's distance", before["distance"], paper=1.76, paper_note=larger, goal=2.43, unit=""),
        Figure("distilled: C&W's distance", after["distance"], paper=2.2, paper_note=larger, goal=2.32, unit=""),
        Figure(
            "the latter over the former", after["distance"] / before["distance"], context.accept((0.0, 2.0), loose=(0.0, 2.0)),
            paper=1.25, paper_note=larger, goal=0.95, unit="",
        ),
    ]  # fmt: skip


def _fooled(context: Context, model: Model) -> dict[str, float]:
    """Successes on images that the network gets right, C&W's mean distance, and how many gradients are zero."""
    x, y = right(model, context.test)
    first, labels = right(model, context.few(context.test, 100))
    targets, search = Targeted("random"), QUICKLY if context.quick else CarliniWagnerL2(steps=200)
    pixels = attack(model, first, labels, JSMA(jacobian="softmax"), Minimize("l0"), targets, seed=context.seed)
    nearest = attack(model, first, labels, search, Minimize("l2"), targets, seed=context.seed)
    found = slopes(model, x, lambda logits, own: cross_entropy(logits, own, reduction="sum"), y)
    return {
        "zero": float((found == 0).double().mean()),
        "jsma": float(pixels.success.double().mean()),
        "fgsm": 1 - _attacked(context, model, x, y, FGSM()).robust_accuracy,
        "margin": 1 - _attacked(context, model, x, y, FGSM(loss="margin")).robust_accuracy,
        "success": float(nearest.success.double().mean()),
        "distance": float(nearest.distances["l2"][nearest.success].mean()),
    }


def slopes(model: Model, x: Tensor, value: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
    """Euclidean norms (N,) of the gradients with respect to the inputs of a sum over samples, `value(logits, y)`."""
    found = []
    for points, labels in zip(torch.split(x, 500), torch.split(y, 500), strict=True):
        moving = points.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(value(model.forward(moving), labels), moving)
        found.append(gradient.flatten(1).norm(dim=1))
    return torch.cat(found)


@entry(
    "R52",
    "A penalty on the weights",
    "Goodfellow et al. 2015, arXiv:1412.6572, section 5; Szegedy et al. 2014, arXiv:1312.6199, section 4.1",
    "784-240-240-10 ReLU network, Adam 1e-3, 5 epochs of batches of 128, lambda times the sum of the squared weights added to"
    " the loss, lambda 0, 1e-5, 1e-4, 1e-3, 1e-2; 200 images, DeepFool in [0, 1]; steepness is the mean l2 norm of the gradient"
    " of the two largest logits' difference; underfit is 5 points more error than without",
)
def weight_penalty(context: Context) -> list[Figure]:
    """It makes the network less steep and moves its boundary away, until it no longer fits; it doesn't make it robust."""
    few = context.few(context.test, 200)
    rows = [
        _measured(context, context.model(Recipe("mlp", 5, WeightPenalty(Standard(), strength), bounds=UNIT)), few.x, few.y)
        for strength in STRENGTHS
    ]
    errors, steep, distances, accuracies = (list(column) for column in zip(*rows, strict=True))
    fitting = [distance for wrong, distance in zip(errors, distances, strict=True) if wrong <= errors[0] + 0.05]
    falls, rises = context.accept((0.0, 1.0), loose=(0.0, 1.2)), context.accept((1.0, 100.0), loose=(0.8, 100.0))
    return [
        *_row("clean error", errors),
        *_row("steepness", steep, unit=False),
        *_row("DeepFool's distance", distances, unit=False),
        *_row("PGD-40 accuracy, eps 0.3", accuracies),
        Figure("largest quotient of steepness, of a lambda to the one before", max(_quotients(steep)), falls, unit=""),
        Figure("least quotient of distance, until it underfits", min(_quotients(fitting)), rises, unit=""),
    ]


def _measured(context: Context, model: Model, x: Tensor, y: Tensor) -> tuple[float, float, float, float]:
    """Clean error on the test set; on some images steepness, distance to the boundary, and accuracy under PGD-40."""
    kept = model.predict(x) == y
    nearest = attack(model, x[kept], y[kept], DeepFool(), Minimize("l2"), seed=context.seed)
    return (
        error(model, context.test.x, context.test.y),
        float(slopes(model, x, first_less_second, y).double().mean()),
        float(nearest.distances["l2"][nearest.success].mean()),
        _attacked(context, model, x, y, FORTY).robust_accuracy,
    )


def first_less_second(logits: Tensor, y: Tensor) -> Tensor:
    """The two largest logits' difference, summed over the samples; labels don't matter."""
    first, second = logits.topk(2).values.unbind(1)
    return (first - second).sum()


def _row(name: str, values: Sequence[float], *, unit: bool = True) -> list[Figure]:
    return [
        Figure(f"lambda {strength:g}: {name}", value, unit="share" if unit else "")
        for strength, value in zip(STRENGTHS, values, strict=True)
    ]


def _quotients(values: Sequence[float]) -> list[float]:
    return [after / before for before, after in pairwise(values)]


FIXED = Static(Recipe("mlp", epochs=10, bounds=UNIT), FGSM(), Linf(SMALL_EPS))


@entry(
    "H4",
    "Static examples are no better than dropout",
    "Szegedy et al. 2014, arXiv:1312.6199, section 4.3; Goodfellow et al. 2015, arXiv:1412.6572, section 6",
    "784-240-240-10 ReLU network, Adam 1e-3, 10 epochs of batches of 128: as it is, with dropout 0.5, and 5 epochs of the data"
    " and the first network's FGSM examples, which make as many steps; also with examples made anew for each batch; eps 0.25,"
    " clipped to [0, 1]; PGD with 40 steps of 0.01 on 1,000 images",
)
def static_examples(context: Context) -> list[Figure]:
    """Examples that are made once and added to the data regularise a little, and resist no attack that looks at the network."""
    anew = Adversarial(attack=FGSM(), threat=FIXED.threat, form="add")
    recipes = {
        "plain": FIXED.source,
        "dropout": Recipe("mlp", 10, Dropout(Standard()), bounds=UNIT),
        "static": Recipe("mlp", 5, bounds=UNIT, static=FIXED),
        "anew": Recipe("mlp", 5, anew, bounds=UNIT),
    }
    test, few = context.test, context.few(context.test, 1000)
    models = {name: context.model(recipe) for name, recipe in recipes.items()}
    errors = {name: error(model, test.x, test.y) for name, model in models.items()}
    given = fgsm(models["plain"], test.x, test.y, SMALL_EPS, UNIT)
    left = {
        name: [
            attack(model, few.x, few.y, method, FIXED.threat, seed=context.seed).robust_accuracy for method in (FGSM(), FORTY)
        ]
        for name, model in models.items()
    }
    nothing: tuple[None, str] = (None, "")
    published = {"dropout": (0.013, "of another network"), "anew": (0.012, "of sigmoid units, examples of every layer")}
    no_lower = context.accept((-0.0035, 1.0), loose=(-0.05, 1.0))
    no_higher = context.accept((-1.0, 0.02))
    return [
        *(
            Figure(f"{name}: clean error", wrong, paper=paper, paper_note=note)
            for name, wrong in errors.items()
            for paper, note in [published.get(name, nothing)]
        ),
        *(
            Figure(f"{name}: error on the plain network's examples", error(model, given, test.y))
            for name, model in models.items()
        ),
        *(Figure(f"{name}: FGSM accuracy", one) for name, (one, _) in left.items()),
        *(Figure(f"{name}: PGD-40 accuracy", forty) for name, (_, forty) in left.items()),
        Figure("clean error, static less dropout", errors["static"] - errors["dropout"], no_lower),
        Figure("PGD-40 accuracy, static less dropout", left["static"][1] - left["dropout"][1], no_higher),
    ]
