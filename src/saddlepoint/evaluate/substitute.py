"""Substitutes: networks trained on a model's answers to chosen inputs, whose gradients then stand in for the model's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saddlepoint.defenses.training import OptimizerFactory, train
from saddlepoint.errors import InputError
from saddlepoint.models.base import Classifier
from saddlepoint.models.torch_model import Labelled, Model
from saddlepoint.progress import bar
from saddlepoint.taxonomy import Access

_BATCH = 256
_MOMENTUM = 0.9


@dataclass(frozen=True)
class Round:
    """How the substitute stood after training round `number`, 0 for the one on the seeds alone.

    samples: trained on. queries: asked of the oracle so far. fit: accuracy on what it was trained on. agreement: share of the
    test inputs to which both give the same class; accuracy: share to which the substitute gives the right one. None without
    test inputs.
    """

    number: int
    samples: int
    queries: int
    fit: float
    agreement: float | None
    accuracy: float | None


@dataclass(frozen=True, repr=False)
class Substitute:
    """What was learnt of an oracle: the trained network as a model, which grants gradients, and the rounds on the way.

    x, y: what was asked (Q, ...), and the oracle's answers (Q,). queries: Q. The oracle's answers to the test inputs, which no
    adversary needs, are not among them. complete: False after Ctrl-C.
    """

    model: Model
    rounds: tuple[Round, ...]
    x: Tensor
    y: Tensor
    complete: bool
    config: dict[str, Any]

    def __repr__(self) -> str:
        return f"Substitute({len(self.rounds)} rounds, {self.queries} queries; print .summary() for more)"

    @property
    def queries(self) -> int:
        """Inputs that the oracle was asked about."""
        return len(self.x)

    def summary(self) -> str:
        """The rounds as a table in plain text."""

        def share(value: float | None) -> str:
            return "–" if value is None else f"{value:.1%}"

        head = ("round", "samples", "queries", "fit", "agreement", "accuracy")
        rows = [
            (f"{r.number}", f"{r.samples:,}", f"{r.queries:,}", share(r.fit), share(r.agreement), share(r.accuracy))
            for r in self.rounds
        ]
        lines = ["  ".join(f"{cell:>{max(9, len(head[i]))}}" for i, cell in enumerate(row)) for row in (head, *rows)]
        return "\n".join([f"Substitute after {self.queries:,} queries for labels", *lines])

    def to_dict(self) -> dict[str, Any]:
        """The rounds and the settings, ready for JSON."""
        return {
            "queries": self.queries, "complete": self.complete, "config": self.config,
            "rounds": [asdict(one) for one in self.rounds],
        }  # fmt: skip


def substitute(
    oracle: Classifier,
    x: Tensor,
    network: nn.Module | Model,
    *,
    rounds: int = 6,
    step: float = 0.1,
    alternate: int | None = None,
    full: int | None = None,
    fresh: int = 400,
    queries: int | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float = 1e-2,
    optimizer: OptimizerFactory | None = None,
    test: Labelled | tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    progress: bool = False,
    on_round: Callable[[Round, Model], None] | None = None,
) -> Substitute:
    """Train `network` in place to answer as the oracle does, asking it for labels only, at inputs that tell most.

    Each round trains on all that was asked so far, and then adds inputs a step away, in the direction in which the substitute
    changes its answer most:

        S_0 = x,    S_(r+1) = S_r  +  { x + step_r * sign(grad_x F_y(x)) : x in S_r },    y: the oracle's label of x

    clipped to the oracle's bounds. F_y is the substitute's probability of y. The sign is taken from the gradient of the
    log-odds, which is the same and doesn't vanish where the probability is 1.

    oracle: any model; of what it grants only labels are used. x: the first inputs (N, ...), a few of each class.
    network: gives as many logits as the oracle has classes. rounds: how often the set grows; there is one training more.
    step: lambda, in input units. alternate: tau, after so many rounds the step turns its sign, and back again; None: never.
    full: sigma, after so many rounds no longer all inputs but `fresh` (kappa) random ones are stepped from; None: never.
    queries: the most to ask in all; the last step is from as many random inputs as it leaves. epochs, batch_size: of each
    training. optimizer: from parameters; default the paper's, gradient descent with `learning_rate` and momentum 0.9.
    test: inputs and classes for `Round`; what they ask isn't counted. on_round: is given each round and the model after it.

    Errors: `InputError`; those of `sp.train`.
    Source: Papernot, McDaniel, Goodfellow, Jha, Celik & Swami (2017), Practical black-box attacks against machine learning,
    arXiv:1602.02697, algorithm 1; lambda's sign and reservoir sampling as in the same group's arXiv:1605.07277, section 4.

    >>> import saddlepoint as sp
    >>> digits, net = sp.data.load("digits"), sp.zoo.build("digits-cnn")
    >>> oracle = sp.Model(lambda x: x.flatten(1) @ digits.train.x[:10].flatten(1).T, access=sp.Access.LABELS)
    >>> learnt = substitute(oracle, digits.test.x[:20], net, rounds=2, queries=50, epochs=1)
    >>> learnt.queries, [one.samples for one in learnt.rounds]
    (50, [20, 40, 50])
    """
    model = _substitute_of(oracle, x, network)
    whole = {"rounds": rounds, "full": full, "fresh": fresh, "alternate": alternate, "queries": queries}
    for name, value in whole.items():
        least = 0 if name in ("rounds", "full") else 1
        if value is not None and (not isinstance(value, int) or value < least):
            raise InputError(f"{name} must be a whole number >= {least}; got {value}")
    if not step > 0:
        raise InputError(f"step must be positive, in input units; got {step}")
    if queries is not None and queries < len(x):
        raise InputError(f"queries={queries} don't pay for the labels of the {len(x)} first inputs: give fewer of those")
    judged = _judged(oracle, test)
    generator = torch.Generator().manual_seed(seed)
    config = {
        "oracle": oracle.describe(), "network": model.describe(), "seeds": len(x), "step": step, "epochs": epochs,
        "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed, **whole,
    }  # fmt: skip
    chosen = optimizer or (lambda parameters: torch.optim.SGD(parameters, learning_rate, _MOMENTUM))
    asked, answers = x.detach(), oracle.predict(x).to(x.device)
    history: list[Round] = []
    complete = True
    with bar("substitute", rounds + 1, show=progress) as report:
        for number in range(rounds + 1):
            if number:
                rows = _stepped_from(number - 1, len(asked), full, fresh, queries, generator)
                if not len(rows):
                    break
                sign = -1 if alternate is not None and (number - 1) // alternate % 2 else 1
                new = stepped(model, asked[rows], answers[rows], sign * step)
                asked, answers = torch.cat([asked, new]), torch.cat([answers, oracle.predict(new).to(x.device)])
            training = train(
                model, (asked, answers), epochs=epochs, batch_size=batch_size, optimizer=chosen, seed=seed + number
            )
            history.append(_round(number, model, asked, answers, judged))
            if on_round is not None:
                on_round(history[-1], model)
            report(number + 1)
            if not training.complete:
                complete = False
                break
    return Substitute(model, tuple(history), asked, answers, complete, config)


def _substitute_of(oracle: Classifier, x: Tensor, network: nn.Module | Model) -> Model:
    if not isinstance(oracle, Classifier):
        raise InputError(f"oracle must be a Saddlepoint model: sp.Model(anything that classifies); got {type(oracle).__name__}")
    oracle.check_inputs(x)
    if not len(x):
        raise InputError("there are no inputs to begin with: a substitute needs a few of each class")
    model = network if isinstance(network, Model) else Model(network, bounds=oracle.bounds)
    if model.bounds != oracle.bounds:
        raise InputError(f"the bounds of oracle and network differ: {oracle.bounds} and {model.bounds}")
    model.require(Access.GRADIENTS, "a substitute")
    return model


def _stepped_from(
    number: int, count: int, full: int | None, fresh: int, queries: int | None, generator: torch.Generator
) -> Tensor:
    """Which of the `count` inputs to step from in round `number`: all, `fresh` of them, or what the queries pay for."""
    wanted = count if full is None or number < full else min(fresh, count)
    if queries is not None:
        wanted = min(wanted, queries - count)
    if wanted == count:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:wanted].sort().values


def stepped(model: Model, x: Tensor, labels: Tensor, step: float) -> Tensor:
    """x + step * sign(grad of the model's probability of the labels), inside the bounds."""
    parts = []
    with model.frozen():
        for point, label in zip(torch.split(x, _BATCH), torch.split(labels, _BATCH), strict=True):
            leaf = point.to(model.device).detach().requires_grad_()
            with torch.enable_grad():
                logits = model.forward(leaf)
                own = label.to(logits.device)[:, None]
                odds = logits.gather(1, own)[:, 0] - logits.scatter(1, own, -torch.inf).logsumexp(1)
            (gradient,) = torch.autograd.grad(odds.sum(), leaf)
            moved = point + step * gradient.sign().to(point.device)
            parts.append(moved if model.bounds is None else moved.clamp(*model.bounds))
    return torch.cat(parts)


def _judged(oracle: Classifier, test: Labelled | tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Test inputs, their classes, and the oracle's answers."""
    if test is None:
        return None
    x, y = test if isinstance(test, tuple) else (test.x, test.y)
    oracle.check_inputs(x)
    if y.shape != (len(x),):
        raise InputError(f"test needs one class for each input; the shapes are {tuple(x.shape)} and {tuple(y.shape)}")
    return x, y, oracle.predict(x).to(y.device)


def _round(number: int, model: Model, asked: Tensor, answers: Tensor, judged: tuple[Tensor, Tensor, Tensor] | None) -> Round:
    fit = float((model.predict(asked).to(answers.device) == answers).double().mean())
    agreement = accuracy = None
    if judged is not None:
        x, y, theirs = judged
        ours = model.predict(x).to(y.device)
        agreement, accuracy = (float((ours == other).double().mean()) for other in (theirs, y))
    return Round(number, len(asked), len(asked), fit, agreement, accuracy)
