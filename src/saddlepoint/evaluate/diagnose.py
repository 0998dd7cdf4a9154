"""Are the model's gradients to be trusted? Signs of masking, each with the measurement behind it.

A network can survive every gradient attack because it is robust, or because its gradients lead nowhere. The checks are
those of Athalye, Carlini & Wagner (2018, arXiv:1802.00420, section 3) and Carlini et al. (2019, arXiv:1902.06705), of label
leaking (Kurakin et al. 2017, arXiv:1611.01236) and of one-step training (Tramèr et al. 2018, arXiv:1705.07204), plus a look at
the function itself: does it change as its gradient says? Only the model's outputs are looked at, never what it is made of.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saddlepoint.attacks import APGD, PGD, BrendelBethge, Restarts
from saddlepoint.engine import Attack
from saddlepoint.evaluate.evidence import NOISES, QUERIES, RESTARTS, SCALES, STEPS, Evidence, passes
from saddlepoint.goals import Targeted, margin
from saddlepoint.models.base import Classifier
from saddlepoint.models.compose import Defended
from saddlepoint.progress import bar
from saddlepoint.taxonomy import Norm, Status
from saddlepoint.threats import Linf, Threat

_HARMLESS = frozenset({"train-mode"})  # worth knowing, but no masking: Saddlepoint evaluates in eval mode

# From which share of the samples on a measurement is a finding. Behind each the largest seen on 15 published networks for
# MNIST, Fashion-MNIST and CIFAR-10 (clean, PGD, TRADES and certified training; images 5000 to 5099). One more is a finding by
# these, TRADES for MNIST at l-infinity 0.3 looked at in l2: Square breaks what no gradient attack here does.
_BEYOND = 0.02  # a crude attack fools it and gradients don't, or it withstands an unbounded attack: 1 sample, and none
_ZERO = 0.1  # the gradient is zero or not finite: 0.04, where certified training left a dead network
_DISAGREEING = 0.1  # the gradient disagrees with finite differences: none
_NOT_RISING = 0.1  # the loss doesn't rise in one step, or in forty: 0.06
_BEATEN = 0.15  # an attack fools fewer samples than a cruder one, by so many: 0.08
_RUGGED = 0.05  # steps that adapt find what fixed ones with restarts miss: 0.02
_UNCHANGED = 0.25  # tiny changes of the input change no bit of the output: 0.04, in that dead network

_APART = 0.5  # |measured - claimed| / (|measured| + |claimed|) of a slope, from which on the two disagree
_CHANGED = 1e-2  # differences of outputs above this part of the largest logit are no rounding
_TOWARDS = 5  # classes that samples which withstand everything are led to
_DRAWS = 10  # to average over where the model is random


@dataclass(frozen=True)
class Finding:
    """One check.

    name: short, always the same. found: whether it is a reason for suspicion. measured: its figures by name; empty if it could
    not be made. says: the same in words. next: what was run because of it and what that changed, or what to do; empty
    unless found.
    """

    name: str
    found: bool
    measured: dict[str, float]
    says: str
    next: str = ""


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What the checks found, in the order in which they were made, also those that found nothing.

    samples: how many were looked at. attacked: those among them that the model gets right.
    forward, backward: passes for each of the samples, on average, confirmations and probe included.
    """

    findings: tuple[Finding, ...]
    samples: int
    attacked: int
    forward: float
    backward: float
    seconds: float

    def __repr__(self) -> str:
        found = ", ".join(finding.name for finding in self.suspicious) or "nothing"
        return f"Diagnosis({self.attacked} samples, found: {found}; print .summary() for more)"

    @property
    def suspicious(self) -> tuple[Finding, ...]:
        """The checks that found something."""
        return tuple(finding for finding in self.findings if finding.found)

    @property
    def masked(self) -> bool:
        """Whether surviving gradient attacks proves little about this model."""
        return any(finding.name not in _HARMLESS for finding in self.suspicious)

    def summary(self) -> str:
        """The findings in plain text."""
        verdict = "signs that its gradients mislead" if self.masked else "no sign of masked gradients"
        lines = [
            f"Diagnosis: {verdict}",
            f"  {self.attacked} samples that the model gets right, of {self.samples}; {self.forward:.0f} forward and "
            f"{self.backward:.0f} backward passes a sample, {self.seconds:.1f} s",
        ]
        for finding in self.suspicious:
            lines.append(f"  ! {finding.name}: {finding.says}")
            if (then := f"    -> {finding.next}") not in lines:
                lines.append(then)
        others = [finding for finding in self.findings if not finding.found]
        for result in dict.fromkeys("nothing found" if finding.measured else finding.says for finding in others):
            names = [f.name for f in others if ("nothing found" if f.measured else f.says) == result]
            lines.append(f"  {result}: {', '.join(names)}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self) | {"masked": self.masked, "findings": [asdict(finding) for finding in self.findings]}

    @staticmethod
    def from_dict(document: dict[str, Any]) -> Diagnosis:
        """What `to_dict` gave."""
        given = {name: document[name] for name in ("samples", "attacked", "forward", "backward", "seconds")}
        return Diagnosis(tuple(Finding(**finding) for finding in document["findings"]), **given)


def diagnose(
    model: Classifier,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    sources: Sequence[Classifier] = (),
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> Diagnosis:
    """Look for signs that the model masks its gradients, so that surviving gradient attacks proves little.

    x (N, ...) inside the model's bounds, y (N,) classes: the first 100 are used, and of those the ones that the model gets
    right. threat: a ball of the size that the model shall withstand; for l0 the l1 ball around it is used. Where a finding says
    PGD, that is APGD in l1.
    sources: other models of the same classes and bounds, at best trained without this one's defense. Does PGD that follows
    their gradients fool what PGD on the model's own doesn't?
    seed: of all random draws. batch_size: samples in the model at once. progress: show a bar.

    It costs some 800 passes a sample, and at most about 1,500; each source adds some 10 to 90. What it finds is a reason to
    run other attacks. Silence is no proof: masking that no check knows of goes unnoticed, and where the model is random some
    checks cannot be made.

    Errors: `InputError` for bad inputs, a threat without a size, or a source of other classes or bounds; `CapabilityError` if
    the model or a source grants no gradients; `ModelError` if one fails on the inputs, or a source cannot be differentiated.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Linear(4, 3), bounds=(0, 1))
    >>> x = torch.rand(8, 4)
    >>> sp.diagnose(model, x, model.predict(x), sp.Linf(0.1)).masked
    False
    """
    started = time.perf_counter()
    case = Evidence(model, x, y, threat, seed, batch_size, sources)
    findings = []
    with bar("diagnose", len(_CHECKS), show=progress) as report:
        for check in _CHECKS:
            findings.append(check(case))
            report(len(findings))
    count = max(case.looked_at, 1)
    forward, backward = ((now - then) / count for now, then in zip(passes(model), case.before, strict=True))
    return Diagnosis(tuple(findings), case.looked_at, len(case.x), forward, backward, time.perf_counter() - started)


def _mean(which: Tensor) -> float:
    return float(which.double().mean())


Look = tuple[bool, dict[str, float], str]


def _randomness(case: Evidence) -> Look:
    calls = case.calls
    flipped = (calls.argmax(2) != calls[0].argmax(1)).any(0)
    measured = {"largest_difference": case.apart(calls[:1], calls), "changed_predictions": _mean(flipped)}
    return bool(case.random), measured, (
        f"the outputs of {len(calls)} identical calls differ by up to {measured['largest_difference']:.2g} of the largest "
        f"logit, and {case.of(flipped)} predictions change"
    )  # fmt: skip


def _average(case: Evidence, measured: dict[str, float]) -> str:
    if case.model.draws > 1:
        return f"gradients are averaged over {case.model.draws} draws, as the model declares"
    advice = f"attack sp.Defended(model, [], draws={_DRAWS}) in its place"
    if case.cut_off:
        return f"{advice}, and without gradients"
    averaged = case.fooled(case.ascent(15), model=Defended(case.model, [], draws=_DRAWS))
    measured |= {"fooled_by_pgd": float(case.by_pgd.sum()), "fooled_by_averaged_pgd": float(averaged.sum())}
    return f"PGD fools {case.of(case.by_pgd)}, {case.of(averaged)} with gradients averaged over {_DRAWS} draws: {advice}"


def _train_mode(case: Evidence) -> Look:
    training = [module for net in case.model.networks() for module in net.modules() if module.training]
    if not training:
        return False, {"modules_in_training": 0.0}, "no module was handed over in training mode"
    with case.model.frozen():  # which gives back the buffers that training mode changes
        usual = case.logits(case.x)
        for module in training:
            module.training = True
        try:
            other = case.logits(case.x)
        except ValueError:  # batch normalisation refuses a single value in training mode
            other = torch.full_like(usual, torch.nan)
        for module in training:
            module.training = False
    flipped = other.argmax(1) != usual.argmax(1)
    measured = {"modules_in_training": float(len(training)), "changed_predictions": _mean(flipped)}
    same = case.apart(other, usual) <= _CHANGED  # NaN is not
    says = f"{len(training)} modules were handed over in training mode, which changes {case.of(flipped)} predictions"
    return not same, measured, says


def _batch_dependence(case: Evidence) -> Look:
    some = case.x[:8]
    alone = torch.cat([case.logits(one) for one in torch.split(some, 1)])
    apart = case.apart(alone, case.logits(case.x)[:8])
    says = f"an input's outputs alone and in a batch differ by up to {apart:.2g} of the largest logit"
    return apart > max(_CHANGED, 16 * torch.finfo(alone.dtype).eps), {"largest_difference": apart}, says


def _test_time_optimisation(case: Evidence) -> Look:
    """Does the model use autograd by itself? Without it, PyTorch keeps nothing for a backward pass."""
    if case.refused:
        return True, {"refuses_no_grad": 1.0}, f"the model runs with autograd on only (otherwise {case.refused})"
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 1
        return tensor

    some = case.x[:8]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            off = case.logits(some)
    except RuntimeError:  # the transforms of torch.func refuse these hooks, and are what they look for
        kept, off = 1, case.logits(some)
    measured = {"kept_for_backward": float(kept), "difference_with_autograd": 0.0}
    if not case.cut_off and not case.rough:
        with torch.enable_grad():
            measured["difference_with_autograd"] = case.apart(case.forward(some.clone().requires_grad_()).detach(), off)
    return kept > 0 or measured["difference_with_autograd"] > _CHANGED, measured, (
        f"with autograd off, the model kept {kept} tensors for backward passes of its own; with autograd on, its outputs "
        f"differ by up to {measured['difference_with_autograd']:.2g} of the largest logit"
    )  # fmt: skip


def _no_gradient(case: Evidence) -> Look:
    says = case.cut_off or "a path leads from the model's output back to its input"
    return bool(case.cut_off), {"differentiable": float(not case.cut_off)}, says


def _exploding(case: Evidence) -> Look:
    bad = case.not_finite
    later = case.pgd[0].having(Status.ERROR)
    measured = {"not_finite": _mean(bad), "not_finite_in_pgd": _mean(later)}
    says = f"gradients are NaN or infinite at {case.of(bad)} inputs, and on PGD's way from {case.of(later)}"
    return case.many(bad.sum(), _ZERO) or case.many(later.sum(), _ZERO), measured, says


def _vanished(case: Evidence) -> Look:
    result = case.pgd[0]
    lost = 2 * result.zero_gradients > result.iterations
    measured = {name: _mean(zero) for name, zero in case.vanished.items() if "margin" in name} | {"zero_in_pgd": _mean(lost)}
    found = case.many(case.vanished["zero_margin_float32"].sum(), _ZERO) or case.many(lost.sum(), _ZERO)
    return found, measured, (
        f"the gradient of the logit margin is exactly zero at {_in_words(measured, 'zero_margin')} of the inputs, and in most "
        f"of PGD's steps from {case.of(lost)}"
    )  # fmt: skip


def _saturated(case: Evidence) -> Look:
    measured = {name: _mean(zero) for name, zero in case.vanished.items()}
    only = case.vanished["zero_cross_entropy_float32"] & ~case.vanished["zero_margin_float32"]
    return case.many(only.sum(), _ZERO), measured, (
        f"the gradient of the cross-entropy is exactly zero at {_in_words(measured, 'zero_cross_entropy')} of the inputs, that "
        f"of the logit margin at {_in_words(measured, 'zero_margin')}"
    )  # fmt: skip


def _in_words(measured: dict[str, float], name: str) -> str:
    double = measured.get(f"{name}_float64")
    return f"{measured[f'{name}_float32']:.0%}" + ("" if double is None else f" ({double:.0%} in float64)")


def _take_logits(case: Evidence, measured: dict[str, float]) -> str:
    fooled = case.fooled(case.ascent(loss="cross_entropy"))
    measured |= {"fooled_by_pgd_on_cross_entropy": float(fooled.sum()), "fooled_by_pgd_on_margin": float(case.by_pgd.sum())}
    return (
        f"PGD on the cross-entropy fools {case.of(fooled)}, on the logit margin {case.of(case.by_pgd)}: take a loss of logits, "
        '"margin" or "dlr"'
    )


def _piecewise_constant(case: Evidence) -> Look:
    unchanged = _mean(case.slopes[2])
    return unchanged >= _UNCHANGED, {"unchanged": unchanged}, (
        f"a change of every feature by {SCALES[0]:g} of the input range, in random directions, changes no bit of the output "
        f"in {unchanged:.0%} of the trials"
    )  # fmt: skip


def _wrong_gradients(case: Evidence) -> Look:
    claimed, measured, _ = case.slopes
    size = claimed.abs() + measured.abs()
    apart = torch.where(size > 0, ((measured - claimed).abs() / size).nan_to_num(1.0), 0.0)
    # the steepest direction's slope dwarfs the random ones', so each kind counts for half; the better of both sizes counts
    apart = ((apart[..., 0] + apart[..., 1:].mean(-1)) / 2).amin(0)
    judged = claimed[:, 0] > 0  # gradients that are zero or not finite are for other checks
    wrong = judged & (apart > _APART)
    typical = float(apart[judged].median()) if bool(judged.any()) else 0.0
    return case.many(wrong.sum(), _DISAGREEING), {"disagreeing": _mean(wrong), "median_disagreement": typical}, (
        f"the gradient and how the model really changes, over {SCALES[0]:g} and {SCALES[1]:g} of the input range, disagree "
        f"at {case.of(wrong)} inputs (median disagreement {typical:.2g}, where 0 is none and 1 is nothing in common)"
    )  # fmt: skip


def _not_rising(case: Evidence) -> Look:
    flat = case.pgd[1] <= 0
    says = f"from the first of PGD's {STEPS} steps to the last, the margin does not rise for {case.of(flat)} samples"
    return case.many(flat.sum(), _NOT_RISING), {"not_rising": _mean(flat)}, says


def _rugged(case: Evidence) -> Look:
    """Where the result hangs on the step size or the side from which one comes, the loss has bumps that hold attacks up."""
    left = (~case.by_pgd).nonzero()[:, 0]
    other: tuple[Attack, str] = (APGD(steps=100, loss="margin"), "APGD, whose steps adapt,")
    if case.threat.norm is not Norm.LINF:
        other = (BrendelBethge(steps=50), "a walk along the boundary, from outside,")
    attack, what = other
    fell = left[case.fooled(attack, left)] if len(left) else left
    only = fell[~case.fooled(Restarts(case.ascent(), RESTARTS), fell)] if len(fell) else fell
    measured = {"fooled_by_pgd": float(case.by_pgd.sum()), "fooled_by_another_way_only": float(len(only))}
    return case.many(len(only), _RUGGED), measured, (
        f"PGD's {STEPS} steps fool {case.of(case.by_pgd)}; {what} {len(fell)} of the others, {len(only)} of which PGD with "
        f"{RESTARTS} restarts doesn't"
    )  # fmt: skip


def _one_step(case: Evidence) -> Look:
    """One step beats forty; or it is misled by the gradient at the input, as after training on such steps (label leaking)."""
    only = case.by_one_step & case.beyond
    nearby = case.fooled(PGD(steps=1, loss="margin"), keep="last")
    falling = case.one_step.margin < margin(case.clean, case.aim)
    measured = {
        "fooled_by_one_step": float(case.by_one_step.sum()), "fooled_by_one_step_only": float(only.sum()),
        "fooled_from_random_points": float(nearby.sum()), "falling": _mean(falling),
    }  # fmt: skip
    found = (
        case.many(only.sum(), _BEYOND)
        or case.many(nearby.sum() - case.by_one_step.sum(), _BEATEN)
        or case.many(falling.sum(), _NOT_RISING)
    )
    return found, measured, (
        f"one step along the input's gradient fools {case.of(case.by_one_step)}, {int(only.sum())} of which PGD with restarts "
        f"doesn't; along the gradient of a random point nearby {case.of(nearby)}; it lowers the margin of {case.of(falling)}"
    )  # fmt: skip


def _random_search(case: Evidence) -> Look:
    only = case.by_noise & case.beyond
    measured = {
        "fooled_by_noise": float(case.by_noise.sum()), "fooled_by_noise_only": float(only.sum()),
        "fooled_by_one_step": float(case.by_one_step.sum()),
    }  # fmt: skip
    misled = not case.restless and case.many(case.by_noise.sum() - case.by_one_step.sum(), _BEATEN)
    return misled or case.many(only.sum(), _BEYOND), measured, (
        f"{NOISES} random points of the ball{' and as many corners' if case.threat.norm is Norm.LINF else ''} fool "
        f"{case.of(case.by_noise)}, {int(only.sum())} of which PGD with restarts doesn't; one gradient step fools "
        f"{case.of(case.by_one_step)}"
    )  # fmt: skip


def _black_box(case: Evidence) -> Look:
    only = case.by_square & case.beyond
    measured = {
        "fooled_by_square": float(case.by_square.sum()), "fooled_by_square_only": float(only.sum()),
        "fooled_by_pgd": float(case.by_pgd.sum()),
    }  # fmt: skip
    return case.many(only.sum(), _BEYOND), measured, (
        f"Square with {QUERIES} queries fools {case.of(case.by_square)}, {int(only.sum())} of which PGD with {RESTARTS} "
        f"restarts doesn't; PGD fools {case.of(case.by_pgd)}"
    )  # fmt: skip


def _transfer(case: Evidence) -> Look:
    only = case.by_transfer & case.beyond
    measured = {
        "fooled_by_transfer": float(case.by_transfer.sum()), "fooled_by_transfer_only": float(only.sum()),
        "fooled_by_pgd": float(case.by_pgd.sum()), "sources": float(len(case.borrowers)),
    }  # fmt: skip
    return case.many(only.sum(), _BEYOND), measured, (
        f"PGD led by the gradients of other models fools {case.of(case.by_transfer)}, {int(only.sum())} of which PGD with "
        f"{RESTARTS} restarts on the model's own doesn't; PGD fools {case.of(case.by_pgd)}"
    )  # fmt: skip


def _unbounded(case: Evidence) -> Look:
    """In balls four times as large each, up to one that holds every input: what falls in a smaller one falls in all.

    A sample withstands rightly where the model gives all inputs the same class, so one of another class must be known.
    """
    features = case.x[0].numel()
    reach = case.span * (1 if case.model.bounds is not None else 10)  # the samples' own range is no limit without bounds
    whole = reach * {Norm.LINF: 1.0, Norm.L2: features**0.5}.get(case.threat.norm, float(features))
    left, eps = (~case.by_pgd).nonzero()[:, 0], case.threat.eps_for(torch.arange(len(case.x)))
    while len(left) and bool((eps < whole).any()):
        eps = (4 * eps).clamp(max=whole)
        ball = replace(case.threat, eps=eps, mask=None)
        left = left[~case.fooled(case.ascent(STEPS // 2), left, threat=ball)]
    standing = len(left)
    ball = Linf(reach, grid=case.threat.grid)  # the same set as every norm's ball that holds all inputs
    left = left[(case.known != case.y[left, None]).any(1)]
    for label in case.known[:_TOWARDS]:  # from the sample itself, since random points of a ball so large fool by chance
        others = left[case.y[left] != label]
        attack = PGD(steps=STEPS // 2, loss="margin", random_start=False)
        fell = others[case.fooled(attack, others, threat=ball, goal=Targeted(int(label)))] if len(others) else others
        left = left[~torch.isin(left, fell)]
    return case.many(len(left), _BEYOND), {"standing": standing / len(case.x), "eps": whole}, (
        f"{standing} of {len(case.x)} withstand PGD in balls that grow until they hold every input (eps = {whole:g}), though "
        f"for {len(left)} of them an input of another class is known"
    )  # fmt: skip


Then = Callable[[Evidence, dict[str, float]], str]


def _say(advice: str) -> Then:
    return lambda case, measured: advice


def _compare(advice: str) -> Then:
    """What attacks without gradients find, before the advice."""

    def then(case: Evidence, measured: dict[str, float]) -> str:
        return (
            f"without gradients, Square fools {case.of(case.by_square)} in {QUERIES} queries and random points "
            f"{case.of(case.by_noise)}; PGD fools {case.of(case.by_pgd)}: {advice}"
        )

    return then


@dataclass(frozen=True)
class _Check:
    """unfit: why it cannot be made, empty if it can. look: the measurement. then: what follows if it found something."""

    name: str
    unfit: Callable[[Evidence], str]
    look: Callable[[Evidence], Look]
    then: Then

    def __call__(self, case: Evidence) -> Finding:
        if why := self.unfit(case):
            return Finding(self.name, False, {}, f"not measured: {why}")
        found, measured, says = self.look(case)
        return Finding(self.name, found, measured, says, self.then(case, measured) if found else "")


_BPDA = (
    'take what rounds or cuts out of the network, into sp.Defended(model, [sp.Transform("rounding", f, backward="identity")]) '
    "(BPDA)"
)
_SEARCH = "run Square with thousands of queries too; what it breaks is broken"

_CHECKS = (
    _Check("randomness", lambda c: c.idle, _randomness, _average),
    _Check("train-mode", lambda c: c.idle, _train_mode, _say("evaluations use eval mode; call net.eval() for your own")),
    _Check(
        "batch-dependence", lambda c: c.random, _batch_dependence,
        _say("normalisation by the batch, or adaptation to it? Attack with batch_size=1, or give it fixed statistics"),
    ),
    _Check(
        "test-time-optimisation", lambda c: "" if c.refused else c.idle, _test_time_optimisation,
        _say("attack the network inside and transfer what is found, and run Square on the whole; nothing runs on a model that "
             "needs autograd on, so let it switch that on by itself"),
    ),
    _Check("no-gradient", lambda c: c.idle, _no_gradient, _compare(_BPDA)),
    _Check("exploding-gradients", lambda c: c.cut_off, _exploding, _compare("mend the derivative (sqrt or log at 0?)")),
    _Check("vanished-gradients", lambda c: c.cut_off, _vanished, _compare(_SEARCH)),
    _Check("saturated-softmax", lambda c: c.cut_off, _saturated, _take_logits),
    _Check("piecewise-constant", lambda c: c.rough, _piecewise_constant, _compare(_BPDA)),
    _Check("wrong-gradients", lambda c: c.cut_off or c.rough, _wrong_gradients,
           _compare("the backward pass is a substitute, or derivatives explode; look for better substitutes")),
    _Check("loss-not-rising", lambda c: c.restless, _not_rising, _compare(_SEARCH)),
    _Check("rugged-loss", lambda c: c.cut_off, _rugged,
           _say("no single step size will do: run APGD, boundary attacks and restarts; `evaluate` does")),
    _Check("one-step", lambda c: c.restless, _one_step,
           _compare("count no one-step attack, and start others at random points")),
    _Check("random-search", lambda c: c.idle, _random_search, _compare(_SEARCH)),
    _Check("black-box", lambda c: c.idle, _black_box, _say(_SEARCH)),
    _Check("transfer", lambda c: c.alone, _transfer,
           _say("attack sp.models.Borrowed(model, source) in its place; `evaluate(..., sources=...)` does, on all that stand")),
    _Check("unbounded", lambda c: c.cut_off, _unbounded, _compare(_SEARCH)),
)  # fmt: skip
