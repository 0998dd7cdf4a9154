"""Detectors side by side: on attacks that they saw and didn't see, on clean inputs that look odd, and on who knows them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from saddlepoint.attacks import APGD, HopSkipJump, OrthogonalPGD, RayS, Square
from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.attacks.facade import check_combination
from saddlepoint.attacks.registry import as_attack
from saddlepoint.defenses.transforms import Gaussian
from saddlepoint.detectors import Detector, Guarded, Samples, auc_limits, average_precision, make, roc_auc
from saddlepoint.detectors.base import check_rate
from saddlepoint.engine import Attack, AttackResult, Budget, Keep
from saddlepoint.errors import CapabilityError, InputError, ModelError
from saddlepoint.evaluate.evaluation import binomial_limits
from saddlepoint.goals import Goal, Targeted, Untargeted, bind
from saddlepoint.models.base import Classifier
from saddlepoint.models.freeze import global_random_state_kept
from saddlepoint.taxonomy import Access, Status
from saddlepoint.threats import Threat

SUGGESTED: Final = ("feature-squeezing", "kernel-density", "mahalanobis", "layer-network", "reconstruction-error", "energy")
"""What `detect` compares where nothing else is asked for: one of each family."""
RATES: Final = (0.01, 0.05)
"""False-positive rates at which detection is reported."""
_FALLEN = 0.5  # share of samples that an adversary gets through, from which on a detector is no protection
_LOW = 0.9  # an adversary who wants a low AUC aims below the threshold that so many clean inputs exceed
_QUERIES = 500  # of the adaptive attack on detectors without gradients
_LEARN = 2000  # fitting samples that are attacked for detectors that learn from attacks
_NOISE, _BLUR, _DARKER = 0.05, 0.7, 0.8  # of clean inputs that look odd
_TIMED, _TIMED_SAMPLES = 3, 64


@dataclass(frozen=True)
class Examples:
    """What one attack made of the test samples that the model gets right.

    seen: whether detectors that learn from attacks were fitted on such examples.
    """

    name: str
    threat: Threat
    result: AttackResult
    seen: bool

    @property
    def fooling(self) -> Tensor:
        """Successful examples (M, ...)."""
        return self.result.adversarial[self.result.having(Status.FOOLED)]

    @property
    def failed(self) -> Tensor:
        """The best attempts on the other samples (K, ...)."""
        return self.result.adversarial[self.result.having(Status.SURVIVED)]


@dataclass(frozen=True)
class Detected:
    """One detector's scores of one attack's examples: those that fool the model (M,), and failed attempts (K,)."""

    attack: str
    seen: bool
    clean: Tensor
    fooling: Tensor
    failed: Tensor
    thresholds: Mapping[float, float]

    @property
    def auc(self) -> float | None:
        """Area under the ROC curve against clean test samples; None without successful examples."""
        return roc_auc(self.clean, self.fooling) if len(self.fooling) else None

    @property
    def average_precision(self) -> float | None:
        """Area under the precision-recall curve, for as many clean and successful inputs as there are."""
        return average_precision(self.clean, self.fooling) if len(self.fooling) else None

    @property
    def auc_failed(self) -> float | None:
        """The same for attempts that didn't fool the model: who flags them is no worse for it, who doesn't has lost nothing."""
        return roc_auc(self.clean, self.failed) if len(self.failed) else None

    @property
    def limits(self) -> tuple[float, float] | None:
        """95 % limits of the AUC."""
        return None if self.auc is None else auc_limits(self.auc, len(self.clean), len(self.fooling))

    def rate(self, fpr: float) -> float | None:
        """Share of the successful examples above the threshold for this false-positive rate.

        None without such examples, and where there were too few calibration samples to set that threshold.
        """
        cut = self.thresholds[fpr]
        return None if not len(self.fooling) or cut == math.inf else float((self.fooling > cut).double().mean())

    def rate_limits(self, fpr: float) -> tuple[float, float] | None:
        """Its 95 % limits (Clopper-Pearson)."""
        found = self.rate(fpr)
        return None if found is None else binomial_limits(round(found * len(self.fooling)), len(self.fooling))

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            "attack": self.attack, "seen": self.seen, "fooling": len(self.fooling), "failed": len(self.failed),
            "auc": self.auc, "auc_limits": self.limits, "auc_failed": self.auc_failed,
            "average_precision": self.average_precision,
            "detected": [
                {"fpr": fpr, "rate": self.rate(fpr), "limits": self.rate_limits(fpr)} for fpr in self.thresholds
            ],
        }  # fmt: skip


@dataclass(frozen=True)
class Bypass:
    """What an adversary who knows the detector reaches in a ball.

    evaded (N,) bool: of the test samples that are right and accepted, which were made wrong and accepted, at the calibrated
    threshold. scores (M,): of examples that fool the model and were to look as clean as they can, the lowest for each sample.
    attacks: who took part. index (N,): where these samples are among those given; adversarial (N, ...): the example with the
    lowest score that reaches the goal, or the input itself.
    """

    threat: Threat
    attacks: tuple[str, ...]
    evaded: Tensor
    clean: Tensor
    scores: Tensor
    index: Tensor
    adversarial: Tensor

    @property
    def names(self) -> str:
        """The attacks' names."""
        return ", ".join(dict.fromkeys(text.partition("(")[0] for text in self.attacks))

    @property
    def rate(self) -> float:
        """Share of the samples that go through."""
        return float(self.evaded.double().mean()) if len(self.evaded) else math.nan

    @property
    def limits(self) -> tuple[float, float]:
        """Its 95 % limits (Clopper-Pearson)."""
        return binomial_limits(int(self.evaded.sum()), len(self.evaded))

    @property
    def auc(self) -> float | None:
        """AUC of the examples that were to look clean: below 0.5 they look cleaner than clean samples do."""
        return roc_auc(self.clean, self.scores) if len(self.scores) else None

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            "threat": self.threat.settings(), "attacks": list(self.attacks), "evasion_rate": self.rate,
            "evasion_limits": self.limits if len(self.evaded) else None, "auc": self.auc, "fooling": len(self.scores),
        }  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """One detector with all that was found about it.

    clean (N,): scores of the clean test samples; false_positives: by condition ("clean", "noise", ...) the shares of clean
    inputs above the thresholds of `RATES`. fit_seconds, and slowdown: a score's time by that of a prediction.
    """

    name: str
    detector: Detector
    clean: Tensor
    detected: tuple[Detected, ...]
    false_positives: Mapping[str, Mapping[float, float]]
    bypasses: tuple[Bypass, ...]
    fit_seconds: float
    slowdown: float

    @property
    def mean_auc(self) -> float:
        """Mean AUC over attacks that it was not shown in fitting (all of them, if it was), and that fooled the model at all.

        NaN if none did.
        """
        unseen = [one for one in self.detected if not one.seen] or list(self.detected)
        found = [one.auc for one in unseen if one.auc is not None]
        return sum(found) / len(found) if found else math.nan

    @property
    def evasion_rate(self) -> float:
        """The highest of the adaptive adversaries'; NaN if there were none."""
        return max((one.rate for one in self.bypasses), default=math.nan)

    @property
    def bypass_auc(self) -> float | None:
        """The lowest AUC of examples that were made to look clean; None if there were none."""
        return min((one.auc for one in self.bypasses if one.auc is not None), default=None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know about the figures."""
        found = []
        usual = self.false_positives["clean"][RATES[1]]
        odd = {name: rates[RATES[1]] for name, rates in self.false_positives.items() if name != "clean"}
        worst = max(odd, key=lambda name: odd[name], default=None)
        if worst is not None and odd[worst] > max(0.5, 4 * usual):
            found.append(
                f"it flags {odd[worst]:.0%} of clean inputs with {worst}: it sees what is odd, not what is adversarial"
            )
        if self.bypasses and self.evasion_rate >= _FALLEN:
            found.append(f"who knows it gets {self.evasion_rate:.0%} of the samples through")
        if not self.bypasses:
            found.append("nobody who knows it was tried")
        if any(len(one.fooling) < 20 for one in self.detected if len(one.fooling)):
            found.append("fewer than 20 successful examples for an attack: mind the limits")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            "name": self.name, "settings": self.detector.settings(), "mean_auc": self.mean_auc,
            "attacks": [one.to_dict() for one in self.detected], "adaptive": [one.to_dict() for one in self.bypasses],
            "false_positives": [
                {"inputs": name, "fpr": fpr, "rate": rate}
                for name, rates in self.false_positives.items() for fpr, rate in rates.items()
            ],
            "fit_seconds": self.fit_seconds, "slowdown": self.slowdown, "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True, repr=False)
class Detection:
    """Detectors on the same model, samples and attacks, in the order that they were asked for.

    examples: of each attack. failed: (name, why) of detectors that could not be fitted. complete: False after Ctrl-C: then only
    what was finished is there. accuracy: of the model on the test samples.
    """

    samples: Samples
    examples: tuple[Examples, ...]
    rows: tuple[Judged, ...]
    accuracy: float
    seed: int
    failed: tuple[tuple[str, str], ...] = ()
    complete: bool = True

    def __repr__(self) -> str:
        return f"Detection({len(self.rows)} detectors, {len(self.examples)} attacks; print .summary() for more)"

    @cached_property
    def ranking(self) -> tuple[Judged, ...]:
        """Who stands an adversary who knows it first; where that is equal, by the mean AUC."""
        return tuple(sorted(self.rows, key=lambda row: (_last(row.evasion_rate), -_last(row.mean_auc))))

    @property
    def verdict(self) -> str:
        """What came out, in words; names of detectors are in backquotes."""
        if not self.rows:
            return "No detector was fitted."
        if not any(len(one.fooling) for one in self.examples):
            return "No attack fooled the model, so there was nothing to notice: take a larger eps, or other attacks."
        best = max(self.rows, key=lambda row: row.mean_auc if not math.isnan(row.mean_auc) else 0.0)
        words = [f"`{best.name}` tells attacks that don't know it best: a mean AUC of {_figure(best.mean_auc)}."]
        known = [row for row in self.ranking if row.bypasses]
        if known:
            first = known[0]
            words.append(
                f"Who knows the detector gets {first.evasion_rate:.0%} of the samples past `{first.name}`"
                + (", and no fewer past the others." if len(known) > 1 else ".")
            )
        fallen = [f"`{row.name}`" for row in known if row.evasion_rate >= _FALLEN]
        if fallen:
            words.append(f"Don't rely on {', '.join(fallen)} against who knows of it.")
        return " ".join(words)

    def summary(self) -> str:
        """AUC by attack, detection at 5 %, false positives and the adaptive adversary, in plain text."""
        wide = max([len("detector"), *(len(row.name) for row in self.rows)])
        heads = [*(f"{one.name}{'' if one.seen else '*'}" for one in self.examples)]
        widths = [max(len(head), 7) for head in heads]
        calibrate, test = (len(getattr(self.samples, part)[0]) for part in ("calibrate", "test"))
        lines = [
            f"Detectors on {test} test samples, thresholds from {calibrate} others; the model is right on {self.accuracy:.1%}",
            "AUC for each attack's successful examples (* not seen in fitting); false positives where 5 % were asked for;",
            "share of samples that an adversary who knows the detector gets through; AUC of examples made to look clean",
            "  " + f"{'detector':<{wide}}  " + "  ".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True))
            + "    clean    noise   evaded      AUC     cost",
        ]  # fmt: skip
        for row in self.ranking:
            cells = [_figure(one.auc) for one in row.detected]
            rates = [row.false_positives.get(name, {}).get(RATES[1]) for name in ("clean", "noise")]
            evaded = None if math.isnan(row.evasion_rate) else row.evasion_rate
            shares = "  ".join(f"{'-' if rate is None else f'{rate:.1%}':>7}" for rate in (*rates, evaded))
            lines.append(
                f"  {row.name:<{wide}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
                + f"  {shares}  {_figure(row.bypass_auc):>7}  {f'x{row.slowdown:.1f}':>7}"
            )  # fmt: skip
        lines += [f"  note on {row.name}: {note}" for row in self.ranking for note in row.notes]
        lines += [f"  ! {name} could not be fitted: {why}" for name, why in self.failed]
        return "\n".join(lines + ([] if self.complete else ["  ! interrupted: what was not finished is missing"]))

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            "samples": {part: len(getattr(self.samples, part)[0]) for part in ("fit", "calibrate", "test")},
            "accuracy": self.accuracy, "seed": self.seed, "complete": self.complete,
            "attacks": [
                {
                    "name": one.name, "settings": one.result.config["attack"], "threat": one.result.config["threat"],
                    "seen": one.seen, "success_rate": one.result.success_rate,
                }
                for one in self.examples
            ],
            "detectors": [row.to_dict() for row in self.rows],
            "ranking": [row.name for row in self.ranking],
            "failed": [{"name": name, "why": why} for name, why in self.failed],
        }  # fmt: skip


def _last(value: float) -> float:
    """For sorting: NaN counts as the worst share of evaded samples, and as no AUC."""
    return 1.0 if math.isnan(value) else value


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def detect(
    model: Classifier,
    samples: Samples,
    attacks: Mapping[str, tuple[Attack | str, Threat]],
    detectors: Sequence[str | Detector] | Mapping[str, Detector] = SUGGESTED,
    *,
    seen: Sequence[str] | None = None,
    adaptive: bool = True,
    seed: int = 0,
    fpr: float = 0.05,
    budget: Budget | None = None,
    on_row: Callable[[Detection], None] | None = None,
) -> Detection:
    """Fit detectors, and see what they notice: attacks that they learnt from and others, odd clean inputs, who knows them.

    samples: `sp.detectors.Samples.split(data.train, data.test)`. detectors: names with settings, such as
    "kernel-density:bandwidth=1", or detectors. attacks: by name, an attack and its threat. seen: names of the attacks whose
    examples, made of fitting samples, are shown to detectors that learn from attacks; default the first. adaptive: whether to
    attack model and detector together in each ball among the threats, by their joint loss, by selective and by orthogonal
    gradients; where a detector has no gradients, by scores or labels. fpr: of the thresholds that the adaptive adversary must
    stay below. budget: of each attack for each sample. on_row: is called after each detector. Ctrl-C ends early (`complete`
    False).

    Only samples that the model gets right are attacked. Errors: `InputError`, `CapabilityError`, `UnknownNameError`.

    >>> import saddlepoint as sp
    >>> digits = sp.data.load("digits")
    >>> model = sp.train(sp.zoo.build("digits-cnn"), digits.train, epochs=5).model
    >>> parts = sp.detectors.Samples.split(digits.train, digits.test, calibrate=100, most=30)
    >>> found = sp.detect(model, parts, {"fgsm": ("fgsm", sp.Linf(0.1))}, ["max-probability"], adaptive=False)
    >>> found.rows[0].detected[0].attack
    'fgsm'
    """
    if not isinstance(model, Classifier):
        raise InputError(f"model must be a Saddlepoint model: sp.Model(net, ...); got {type(model).__name__}")
    if not isinstance(samples, Samples):
        raise InputError(f"samples must be sp.detectors.Samples.split(data.train, data.test); got {type(samples).__name__}")
    if not isinstance(attacks, Mapping) or not attacks or not all(isinstance(one, tuple) for one in attacks.values()):
        raise InputError('attacks must name at least one, with its threat: {"pgd": ("pgd", sp.Linf(0.1))}')
    check_rate(fpr)
    named = _named(detectors)
    if not len(samples.test[0]):
        raise InputError("there are no test samples")
    chosen = {name: (as_attack(attack), threat) for name, (attack, threat) in attacks.items()}
    for attack, threat in chosen.values():
        check_combination(attack, threat, attack.default_goal())
    learnt = tuple(attacks)[:1] if seen is None else tuple(seen)
    for name in learnt:
        if name not in chosen:
            raise InputError(f"seen names {name!r}, which is not among the attacks: {', '.join(chosen)}")
    x, y = samples.test
    right = (model.predict(x) == y.to(model.device)).cpu()
    accuracy = float(right.double().mean())
    rows: list[Judged] = []
    failed: list[tuple[str, str]] = []
    examples: list[Examples] = []

    def so_far(complete: bool = False) -> Detection:
        return Detection(samples, tuple(examples), tuple(rows), accuracy, seed, tuple(failed), complete)

    try:
        for name, (attack, threat) in chosen.items():
            result = run_attack(model, x[right], y[right], attack, threat, seed=seed, budget=budget)
            examples.append(Examples(name, threat, result, name in learnt))
        bad = None
        if any(detector.learns_attacks for detector in named.values()):
            bad = _to_learn(model, samples, [chosen[name] for name in learnt], seed, budget)
        odd = odd_inputs(model, x, examples, seed)
        plain_seconds = _seconds(model.predict, x)
        for name, detector in named.items():
            started = time.perf_counter()
            try:
                detector.fit(model, samples.fit, bad if detector.learns_attacks else None)
                spent = time.perf_counter() - started
                detector.calibrate(samples.calibrate[0], fpr)
                rows.append(_judged(name, detector, samples, examples, odd, adaptive, seed, budget, spent, plain_seconds))
            except (InputError, ModelError, CapabilityError) as error:
                failed.append((name, str(error)))
            if on_row is not None:
                on_row(so_far())
    except KeyboardInterrupt:
        return so_far()
    found = so_far(complete=True)
    if on_row is not None:
        on_row(found)
    return found


def bypass(
    detector: Detector,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    attacks: Sequence[Attack] | None = None,
    rungs: int = 4,
    goal: Goal | None = None,
    seed: int = 0,
    budget: Budget | None = None,
) -> Bypass | None:
    """Attack a calibrated detector and its model together: x (N, ...), y (N,), in a ball. None where no attack fits.

    Only samples that are right and accepted are attacked. First come examples against the model alone; from there the attacks
    go on against both, at the calibrated threshold. Then the first of them is run `rungs` times more, each time from the
    best examples and under a lower threshold, down to one that rejects 90 % of clean inputs: for the AUC, what fools the
    model with the lowest score counts.

    attacks: default `APGD` on the joint margin and `OrthogonalPGD` with and without projection; where the detector has no
    gradients, `Square`, and of labels alone `RayS` and `HopSkipJump`, with 500 queries each.
    """
    model = detector.model
    clean = detector.score(x).cpu()
    places = (((model.predict(x) == y.to(model.device)).cpu()) & (clean <= detector.threshold)).nonzero()[:, 0]
    _check_gradients(detector, x[:1])
    goal = goal if goal is not None else Untargeted()
    x, y = x[places], y[places]
    guarded = Guarded(model, detector)
    suite, limit = _adaptive(guarded.access, budget)
    suite = [one for one in (suite if attacks is None else attacks) if threat.norm in one.declaration.norms]
    if not suite or threat.minimizes or not len(x):
        return None
    best, everyone = x.clone(), torch.arange(len(x))
    evaded = torch.zeros(len(x), dtype=torch.bool)
    lowest = torch.full((len(x),), math.inf, dtype=torch.float64)

    def run(on: Classifier, attack: Attack, index: Tensor, onwards: bool, keep: Keep | None) -> AttackResult:
        start = best[index] if onwards and attack.takes_start else None
        own = _of(goal, places[index])
        result = run_attack(on, x[index], y[index], attack, threat, own, seed=seed, budget=limit, keep=keep, start=start)
        found = result.adversarial
        predicted = model.predict(found).cpu()
        aim = bind(own, y[index].cpu(), result.targets.cpu(), model.probe(x).num_classes)
        fooled = aim.wanted.gather(1, predicted[:, None])[:, 0]
        scores = torch.where(fooled, detector.score(found).double().cpu(), math.inf)
        lower = scores < lowest[index]
        lowest[index[lower]], best[index[lower]] = scores[lower], found[lower]
        return result

    if guarded.access > Access.LABELS:
        run(model, suite[0], everyone, False, "margin")
    for attack in suite:
        for onwards in (True, False) if attack is suite[0] else (True,):
            index = (~evaded).nonzero()[:, 0]
            if len(index):
                evaded[index] = run(guarded, attack, index, onwards, None).success.cpu()
    if bool(lowest.isfinite().any()) and guarded.access > Access.LABELS:
        first, last = float(lowest[lowest.isfinite()].median()), detector.threshold_at(_LOW)
        for rung in range(1, rungs + 1) if last < first else ():
            lower = Guarded(model, detector, threshold=first + (last - first) * rung / rungs)
            run(lower, suite[0], everyone, True, "margin")
    names = tuple(dict.fromkeys(str(attack) for attack in suite))
    return Bypass(threat, names, evaded, clean, lowest[lowest.isfinite()], places, best)


def _of(goal: Goal, places: Tensor) -> Goal:
    """The goal for some of the samples: targets may be given for each."""
    if isinstance(goal, Targeted) and isinstance(goal.classes, Tensor):
        return replace(goal, classes=goal.classes[places.to(goal.classes.device)])
    return goal


def _check_gradients(detector: Detector, x: Tensor) -> None:
    """Raise `InputError` where a detector that declares gradients has none: attacks would be blind, and the figure too good."""
    if detector.differentiable and detector.model.access >= Access.GRADIENTS and len(x):
        with detector.frozen(), torch.enable_grad():
            scores = detector.forward(x.to(detector.model.device).clone().requires_grad_())
        if not scores.requires_grad:
            raise InputError(f"{type(detector).__name__} has no gradients: declare differentiable = False, or don't detach")


def _adaptive(access: Access, budget: Budget | None) -> tuple[list[Attack], Budget | None]:
    """Who attacks model and detector together, and the budget."""
    if access >= Access.GRADIENTS:
        return [APGD(loss="margin"), OrthogonalPGD(orthogonal=False), OrthogonalPGD()], budget
    if access >= Access.SCORES:
        return [Square()], budget or Budget(queries=_QUERIES)
    return [RayS(), HopSkipJump()], budget or Budget(queries=_QUERIES)


def odd_inputs(model: Classifier, x: Tensor, examples: Sequence[Examples], seed: int) -> dict[str, Tensor]:
    """Clean inputs (N, ...) that look odd: with noise as large as the perturbations; images also blurred, moved and darker.

    The noise has the root mean square of the successful perturbations, 0.05 if there are none, and is clipped to the bounds.
    """
    lengths = [one.result.distances["l2"][one.result.having(Status.FOOLED)] for one in examples]
    found = torch.cat(lengths) if lengths else torch.empty(0)
    size = float(found.median()) / math.sqrt(x[0].numel()) if len(found) else _NOISE
    low, high = model.bounds if model.bounds is not None else (-math.inf, math.inf)
    with global_random_state_kept():
        torch.manual_seed(seed)
        odd = {"noise": (x + size * torch.randn_like(x)).clamp(low, high)}
    if x.dim() == 4 and model.bounds is not None:
        odd["blur"] = Gaussian(sigma=_BLUR)(x, model.bounds).clamp(low, high)
        odd["a shift"] = torch.cat([x[..., 1:], x[..., -1:]], -1)
        odd["less light"] = low + _DARKER * (x - low)
    return odd


def _named(detectors: Sequence[str | Detector] | Mapping[str, Detector]) -> dict[str, Detector]:
    if isinstance(detectors, Mapping):
        return dict(detectors)
    if isinstance(detectors, str) or not detectors:
        raise InputError(f"detectors must be a list of names or detectors, such as ['energy']; got {detectors!r}")
    named: dict[str, Detector] = {}
    for one in detectors:
        detector = make(one) if isinstance(one, str) else one
        name = one if isinstance(one, str) else one.name
        if name in named:
            raise InputError(f"two detectors are called {name!r}: give a mapping from names of your own")
        named[name] = detector
    return named


def _to_learn(
    model: Classifier, samples: Samples, attacks: Sequence[tuple[Attack, Threat]], seed: int, budget: Budget | None
) -> Tensor:
    """Successful examples made of fitting samples (M, ...)."""
    x, y = (column[:_LEARN] for column in samples.fit)
    made = [run_attack(model, x, y, attack, threat, seed=seed, budget=budget) for attack, threat in attacks]
    return torch.cat([result.adversarial[result.having(Status.FOOLED)] for result in made])


def _judged(
    name: str,
    detector: Detector,
    samples: Samples,
    examples: Sequence[Examples],
    odd: Mapping[str, Tensor],
    adaptive: bool,
    seed: int,
    budget: Budget | None,
    fit_seconds: float,
    plain_seconds: float,
) -> Judged:
    """What one fitted and calibrated detector notices."""
    x, y = samples.test
    clean = detector.score(x).cpu()
    thresholds = {rate: detector.threshold_at(rate) for rate in RATES}

    def scores(inputs: Tensor) -> Tensor:
        return detector.score(inputs).cpu()

    detected = tuple(
        Detected(one.name, one.seen and detector.learns_attacks, clean, scores(one.fooling), scores(one.failed), thresholds)
        for one in examples
    )
    conditions = {"clean": clean, **{how: scores(inputs) for how, inputs in odd.items()}}
    alarms = {
        how: {rate: float((values > cut).double().mean()) for rate, cut in thresholds.items()}
        for how, values in conditions.items()
    }
    bypasses = []
    if adaptive:
        balls = {str(threat): threat for threat in (one.threat for one in examples) if not threat.minimizes}
        found = [bypass(detector, x, y, threat, seed=seed, budget=budget) for threat in balls.values()]
        bypasses = [one for one in found if one is not None]
    slowdown = _seconds(detector.score, x) / plain_seconds
    return Judged(name, detector, clean, detected, alarms, tuple(bypasses), fit_seconds, slowdown)


def _seconds(function: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Of a call, the fastest of a few."""
    fastest = math.inf
    for _ in range(_TIMED):
        started = time.perf_counter()
        function(x[:_TIMED_SAMPLES]).cpu()  # until an accelerator has finished
        fastest = min(fastest, time.perf_counter() - started)
    return fastest
