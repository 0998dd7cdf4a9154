"""Fooling what one cannot look into: substitutes, and examples that carry over between techniques, tasks and defenses."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from saddlepoint.attacks import FGSM, PGD, LeafBoxes
from saddlepoint.attacks.facade import attack
from saddlepoint.defenses import Adversarial
from saddlepoint.evaluate.substitute import Round, Substitute, substitute
from saddlepoint.evaluate.transfer import Instead, TransferMatrix, transfer_matrix
from saddlepoint.models import Classifier, Model
from saddlepoint.reproduce.frame import Context, Figure, Recipe, entry
from saddlepoint.reproduce.masking import CNN, EPS, UNIT, undefended_network
from saddlepoint.reproduce.measures import error, fgsm
from saddlepoint.taxonomy import Access
from saddlepoint.threats import Linf, Minimize
from saddlepoint.zoo.networks import mlp

THREAT = Linf(EPS)
SEEDS, ROUNDS, QUERIES, STEP = 150, 6, 6400, 0.1
QUICK_ROUNDS, ORACLE = 3, 6000
TECHNIQUES = ("DNN", "LR", "SVM", "DT", "kNN")
# Rows: crafted on; columns: shown to. Papernot, McDaniel & Goodfellow (2016), figure 3; quoted from memory.
PUBLISHED = (
    (0.3827, 0.2302, 0.6432, 0.7931, 0.0836),
    (0.0631, 0.9164, 0.9143, 0.8742, 0.1129),
    (0.0251, 0.3656, 1.0, 0.8003, 0.0519),
    (0.0082, 0.1222, 0.0885, 0.8929, 0.0331),
    (0.1175, 0.4289, 0.8216, 0.8295, 0.4165),
)
MEMORY = "quoted from memory"
PARITY, LARGE = (0, 1) * 5, (0,) * 5 + (1,) * 5  # even or odd; 0 to 4 or 5 to 9
ONE_STEP = Adversarial(attack=FGSM(), threat=THREAT, form="replace")
SEVERAL_STEPS = Adversarial(attack=PGD(steps=5, step_size=0.1), threat=THREAT, warmup=1)


@entry(
    "R17",
    "A substitute learnt from labels",
    "Papernot et al. 2017, arXiv:1602.02697",
    f"oracle: {CNN}, 5 epochs of {ORACLE} images, which make it about as accurate as the paper's, and once more of all; it"
    " gives labels only; substitute: 200-200 ReLU units, in each round 10 epochs of gradient descent of 0.01 with momentum"
    f" 0.9; {SEEDS} test images, {ROUNDS} rounds of steps of {STEP} (quickly: {QUICK_ROUNDS}), at most {QUERIES} queries; FGSM"
    f" of eps {EPS} on all other test images, clipped to [0, 1]",
)
def learnt_from_labels(context: Context) -> list[Figure]:
    """What a network learns from a few thousand labels is enough to fool the one that gave them, unless that is a good one."""
    known = context.model(Recipe(context.convolutional, epochs=5, bounds=UNIT, samples=ORACLE))
    learnt, errors, matrix = _learnt(context, known)
    better, better_errors, better_matrix = _learnt(context, undefended_network(context))
    fall = max(before - after for before, after in pairwise(errors))
    published = "of an oracle of MetaMind"
    return [
        Figure("oracle's clean error", 1 - float(matrix.right("oracle").double().mean()), paper=0.0503, paper_note=published),
        *(
            Figure(f"round {one.number}, {one.queries} queries: oracle's error", wrong)
            for one, wrong in zip(learnt.rounds[:-1], errors[:-1], strict=True)
        ),
        Figure(
            "oracle's error on the substitute's examples", errors[-1], context.accept((0.5, 1.0), loose=(0.3, 1.0)),
            paper=0.8424, paper_note=published,
        ),
        Figure("less that after the first training", errors[-1] - errors[0], context.accept((0.1, 1.0), loose=(0.1, 1.0))),
        Figure("largest fall from a round to the next", fall, context.accept((-1.0, 0.02), loose=(-1.0, 0.1))),
        Figure("queries", learnt.queries, (0, QUERIES), paper=6400, unit=""),
        Figure("agreement with the oracle", _agreement(learnt), paper=0.812, paper_note="accuracy of the substitute"),
        Figure("of images that both get right, fooled", matrix.rate("substitute", "oracle")),
        Figure("of these, by noise of the same size", matrix.rate("noise", "oracle")),
        Figure("better oracle: clean error", 1 - float(better_matrix.right("oracle").double().mean())),
        Figure("better oracle: error after the first training", better_errors[0]),
        Figure("better oracle: error in the end", better_errors[-1]),
        Figure("better oracle: agreement", _agreement(better)),
        Figure("better oracle: by noise of the same size", better_matrix.rate("noise", "oracle")),
    ]  # fmt: skip


def _learnt(context: Context, known: Model) -> tuple[Substitute, list[float], TransferMatrix]:
    """A substitute, the oracle's error on its examples after each round, and in the end on those that both get right."""
    test = context.test
    chosen = torch.zeros(len(test), dtype=torch.bool)
    chosen[torch.arange(SEEDS) * (len(test) // SEEDS)] = True  # not the first ones, which few people wrote
    x, y = test.x[~chosen], test.y[~chosen]
    errors: list[float] = []

    def look(one: Round, model: Model) -> None:
        errors.append(error(known, fgsm(model, x, y, EPS, UNIT), y))

    learnt = substitute(
        Model(known.net, bounds=UNIT, access=Access.LABELS), test.x[chosen],
        context.network(partial(mlp, widths=(200, 200)), tuple(x.shape[1:]), context.data.num_classes),
        rounds=QUICK_ROUNDS if context.quick else ROUNDS, step=STEP, queries=QUERIES, test=(x, y), seed=context.seed,
        on_round=look,
    )  # fmt: skip
    if not learnt.complete:
        raise KeyboardInterrupt
    both = {"substitute": learnt.model, "oracle": known}
    matrix = transfer_matrix(both, x, y, FGSM(), THREAT, sources=["substitute"], seed=context.seed, keep="last")
    return learnt, errors, matrix


def _agreement(learnt: Substitute) -> float:
    agreement = learnt.rounds[-1].agreement
    assert agreement is not None  # test inputs were given
    return agreement


class SoftNearest(nn.Module):
    """k-nearest neighbours made smooth: log sum exp(-|x - z|^2) over the training points z of each class."""

    points: Tensor
    labels: Tensor

    def __init__(self, points: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.register_buffer("points", points.flatten(1))
        self.register_buffer("labels", labels)
        self.classes = int(labels.max()) + 1

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        near = 2 * flat @ self.points.T - self.points.square().sum(1) - flat.square().sum(1, keepdim=True)
        return torch.stack([near[:, self.labels == label].logsumexp(1) for label in range(self.classes)], 1)


@entry(
    "R18",
    "Between techniques",
    "Papernot, McDaniel & Goodfellow 2016, arXiv:1605.07277",
    f"10,000 training images; DNN: {CNN}, 5 epochs; logistic regression, linear support vector machine, decision tree and 5"
    f" nearest neighbours of scikit-learn; 1,000 test images, eps {EPS}, clipped to [0, 1]; FGSM, for the nearest neighbours"
    " through a smooth version of them; for the tree the nearest leaf of another class",
)
def between_techniques(context: Context) -> list[Figure]:
    """Examples carry over between techniques; decision trees fall to anybody's, nearest neighbours and networks to few."""
    matrix = techniques(context)
    rates = {(s, t): matrix.rate(s, t) for s in TECHNIQUES for t in TECHNIQUES}
    to = {t: sum(rates[s, t] for s in TECHNIQUES if s != t) / (len(TECHNIQUES) - 1) for t in TECHNIQUES}
    easiest, hardest = max(to, key=to.__getitem__), sorted(to, key=to.__getitem__)[:2]
    must = {("LR", "LR"): (0.8, 1.0), ("SVM", "SVM"): (0.8, 1.0), ("DT", "DT"): (0.95, 1.0)}
    return [
        *(
            Figure(
                f"{s} to {t}",
                rates[s, t],
                context.accept(must.get((s, t)), loose=must.get((s, t))),
                paper=PUBLISHED[i][j],
                paper_note=MEMORY,
            )
            for i, s in enumerate(TECHNIQUES)
            for j, t in enumerate(TECHNIQUES)
        ),
        *(Figure(f"noise to {t}", matrix.rate("noise", t)) for t in TECHNIQUES),
        *(Figure(f"others to {t}, mean", to[t]) for t in TECHNIQUES),
        Figure("DT is the easiest target", float(easiest == "DT"), context.accept((1.0, 1.0)), unit=""),
        Figure("kNN and DNN are the hardest", float(set(hardest) == {"kNN", "DNN"}), context.accept((1.0, 1.0)), unit=""),
    ]


def techniques(context: Context) -> TransferMatrix:
    """The matrix between five techniques."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import LinearSVC
    from sklearn.tree import DecisionTreeClassifier

    network = context.model(Recipe(context.convolutional, epochs=5, bounds=UNIT, samples=10_000))
    part, few = context.training(10_000), context.few(context.test, 1000)
    table, labels = part.x.flatten(1).numpy(), part.y.numpy()
    tree = DecisionTreeClassifier(random_state=context.seed).fit(table, labels)
    estimators = {
        "LR": LogisticRegression(max_iter=1000, tol=1e-2),
        "SVM": LinearSVC(dual=False, random_state=context.seed),
        "kNN": KNeighborsClassifier(5),
    }
    models: dict[str, Classifier] = {name: Model(e.fit(table, labels), bounds=UNIT) for name, e in estimators.items()}
    models |= {"DNN": network, "DT": Model(tree, bounds=UNIT)}
    nearest = attack(models["DT"], few.x, few.y, LeafBoxes(tree), Minimize("l2"), seed=context.seed).adversarial
    instead: dict[str, Instead] = {"kNN": Model(SoftNearest(part.x, part.y), bounds=UNIT), "DT": nearest}
    ordered = {name: models[name] for name in TECHNIQUES}
    return transfer_matrix(
        ordered, few.x, few.y, FGSM(), THREAT, instead=instead, seed=context.seed, keep="last", batch_size=100
    )


@entry(
    "G3",
    "Between tasks",
    "this project; the question is that of Papernot, McDaniel & Goodfellow 2016, arXiv:1605.07277",
    f"{CNN}, 5 epochs, trained to tell digits, even from odd ones, and 0 to 4 from 5 to 9; 1,000 images, eps {EPS}, clipped to"
    " [0, 1]; PGD with 40 steps of 0.01",
)
def between_tasks(context: Context) -> list[Figure]:
    """Examples made to be taken for another digit are taken for another parity, too, and the other way round."""
    few = context.few(context.test, 1000)
    tasks = {"parity": PARITY, "size": LARGE}
    models: dict[str, Classifier] = {"digits": undefended_network(context)}
    models |= {
        name: context.model(Recipe(context.convolutional, epochs=5, bounds=UNIT, merged=merged))
        for name, merged in tasks.items()
    }
    labels = {name: torch.tensor(merged)[few.y] for name, merged in tasks.items()}
    matrix = transfer_matrix(models, few.x, few.y, PGD(steps=40, step_size=0.01), THREAT, labels=labels, seed=context.seed)
    pairs = [(s, t) for s in models for t in models if s != t]
    across = sum(matrix.rate(s, t) for s, t in pairs) / len(pairs)
    noise = sum(matrix.rate("noise", t) for t in models) / len(models)
    return [
        *(Figure(f"{s} to {t}", matrix.rate(s, t)) for s in models for t in models),
        *(Figure(f"noise to {t}", matrix.rate("noise", t)) for t in models),
        Figure("between tasks, mean", across),
        Figure("less noise's", across - noise, context.accept((0.1, 1.0), loose=(0.0, 1.0))),
    ]


@entry(
    "G4",
    "Adversarially trained, and open to others' examples",
    "Tramèr et al. 2018, arXiv:1705.07204, section 4",
    f"{CNN}; trained for 4 epochs of 20,000 images on FGSM examples, and for 3 epochs of 20,000 on PGD examples of 5 steps of"
    " 0.1; other sources: the same network undefended, and 240-240 ReLU units, 5 epochs each; FGSM on all test images, eps"
    f" {EPS}, clipped to [0, 1] (quickly: 2 epochs on PGD examples)",
)
def others_examples(context: Context) -> list[Figure]:
    """Trained on one-step examples, a network withstands its own and falls to others'; trained on several steps it does not."""
    x, y = context.test.x, context.test.y
    several = 2 if context.quick else 3
    recipes = {
        name: Recipe(context.convolutional, epochs=epochs, adversary=adversary, bounds=UNIT, samples=20_000)
        for name, epochs, adversary in (("one step", 4, ONE_STEP), ("several steps", several, SEVERAL_STEPS))
    }
    hardened = {name: context.model(recipe) for name, recipe in recipes.items()}
    others: dict[str, Classifier] = {
        "undefended": undefended_network(context), "mlp": context.model(Recipe("mlp", epochs=5, bounds=UNIT))
    }  # fmt: skip
    matrix = transfer_matrix({**hardened, **others}, x, y, FGSM(), THREAT, seed=context.seed, keep="last")
    own = {name: matrix.rate(name, name) for name in hardened}
    worst = {name: max(matrix.rate(other, name) for other in others) for name in hardened}
    imagenet = "of ImageNet, Inception v3, steps to the least likely class, errors of all images"
    return [
        Figure("one step: fooled by its own examples", own["one step"], paper=0.266, paper_note=imagenet),
        Figure("one step: by others', the worst", worst["one step"], paper=0.363, paper_note=imagenet),
        Figure(
            "others' less its own", worst["one step"] - own["one step"], context.accept((0.05, 1.0)),
            paper=0.097, paper_note=imagenet,
        ),
        Figure("several steps: fooled by its own", own["several steps"]),
        Figure("several steps: by others', the worst", worst["several steps"]),
        Figure(
            "its own less others'", own["several steps"] - worst["several steps"], context.accept((0.0, 1.0)),
        ),
        Figure(
            "undefended: fooled by its own", matrix.rate("undefended", "undefended"),
            context.accept((0.5, 1.0), loose=(0.5, 1.0)),
        ),
        Figure("undefended: by mlp's", matrix.rate("mlp", "undefended")),
    ]  # fmt: skip
