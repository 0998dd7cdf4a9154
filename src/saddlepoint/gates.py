"""Gates: is a model robust enough to be released?

    from saddlepoint.gates import gate

    found = gate(sp.evaluate(model, x, y, sp.Linf(4 / 255)), at_least=0.6)
    Path("robustness.xml").write_text(found.junit())
    sys.exit(found.exit_code)

In tests `pytest --saddlepoint` with the fixture `assert_robust` does the same (`pytest_saddlepoint`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from saddlepoint.errors import DataError, InputError
from saddlepoint.evaluate.evaluation import CONFIDENCE, STANDS, WRONG, Evaluation, WorstCase, binomial_limits
from saddlepoint.files import write_file
from saddlepoint.report.gallery import Example, Gallery, Shot, kind_of, magnification
from saddlepoint.report.words import length, listed, percent
from saddlepoint.taxonomy import Status

_SHOWN = 5  # counterexamples


@dataclass(frozen=True)
class Fallen:
    """How many samples that stood a stage attacked, how many of them it broke, and why it was run. within: the threat."""

    within: str
    stage: str
    why: str
    attacked: int
    broken: int


@dataclass(frozen=True)
class Counterexample:
    """A sample that an attack broke.

    sample: its position among the evaluated ones. distance: in the threat's norm. margin: by how much the goal is reached.
    within, stage: the threat and the stage that broke it.
    """

    sample: int
    label: int
    predicted: int
    distance: float
    margin: float
    within: str
    stage: str


@dataclass(frozen=True, repr=False, eq=False)
class Gate:
    """Whether enough samples stand: at least the share `at_least` of all, those that were wrong before counting as fallen.

    parts: the evaluation of the same samples within each threat; a sample stands if it does in all of them.
    folder: where `save` put the pictures, None if it did not.
    """

    parts: tuple[Evaluation, ...]
    at_least: float
    folder: Path | None = None

    def __repr__(self) -> str:
        return f"Gate({'passed' if self.passed else 'failed'}, {self._figure}; print .message for more)"

    @property
    def samples(self) -> int:
        """How many were evaluated."""
        return len(self.parts[0])

    @cached_property
    def standing(self) -> int:
        """How many the model gets right and no attack broke."""
        return int(torch.stack([part.broken_by == STANDS for part in self.parts]).all(0).sum())

    @property
    def needed(self) -> int:
        """How many have to stand."""
        return math.ceil(self.at_least * self.samples - 1e-9)

    @property
    def reached(self) -> float:
        """The robust accuracy."""
        return self.standing / self.samples

    @property
    def limits(self) -> tuple[float, float]:
        """Confidence limits of the robust accuracy on all inputs of this kind, against these attacks."""
        return binomial_limits(self.standing, self.samples)

    @property
    def complete(self) -> bool:
        """Whether all attacks were run."""
        return all(part.complete for part in self.parts)

    @property
    def passed(self) -> bool:
        """Whether it is met. An evaluation that was cut short meets nothing."""
        return self.standing >= self.needed and self.complete

    @property
    def exit_code(self) -> int:
        """0 if it is met, 1 if not."""
        return 0 if self.passed else 1

    @cached_property
    def fallen(self) -> tuple[Fallen, ...]:
        """What fell to which stage, in the order in which they were run."""
        found = []
        for part in self.parts:
            for number, stage in enumerate(part.stages):
                attacked = int((part.broken_by[stage.rows] != WRONG).sum())  # the first stage also tells which are wrong
                found.append(Fallen(str(part.threat), stage.name, stage.why, attacked, int((part.broken_by == number).sum())))
        return tuple(found)

    @cached_property
    def counterexamples(self) -> tuple[Counterexample, ...]:
        """Up to five of the broken samples, those with the largest margin first."""
        return tuple(_counterexample(part, sample) for part, sample in self._shown)

    @cached_property
    def _shown(self) -> list[tuple[Evaluation, int]]:
        """The same as evaluation and position; a sample that fell within several threats is there once."""
        broken = [(part, row) for part in self.parts for row in (part.broken_by >= 0).nonzero()[:, 0].tolist()]
        clearest: dict[int, tuple[Evaluation, int]] = {}
        for part, row in sorted(broken, key=lambda one: -float(one[0].margin[one[1]])):
            clearest.setdefault(row, (part, row))
        return list(clearest.values())[:_SHOWN]

    @property
    def _threats(self) -> str:
        return listed(str(part.threat) for part in self.parts)

    @property
    def _figure(self) -> str:
        return f"robust accuracy {percent(self.reached)} within {self._threats}"

    @property
    def message(self) -> str:
        """What was asked, what was found, what fell to which attack, and where it failed the counterexamples."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        low, high = self.limits
        yield f"{self._figure}; asked for at least {percent(self.at_least)}"
        yield (
            f"  {self.standing} of {self.samples} samples stand, {self.needed} are needed; {100 * CONFIDENCE:g}% confidence "
            f"limits {percent(low)} and {percent(high)}"
        )
        if low < self.at_least <= high:
            yield "  what was asked lies between these limits: other samples could decide otherwise, so take more of them"
        if not self.complete:
            yield "  the evaluation was cut short: not everything was tried on the samples that stand"
        yield f"  wrong without an attack: {int((self.parts[0].broken_by == WRONG).sum())}"
        several = len(self.parts) > 1
        for each in self.fallen:
            where = f"{each.within}: " if several else ""
            yield f"  {where}{each.stage} broke {each.broken} of {each.attacked} ({each.why})"
        for note in dict.fromkeys(note for part in self.parts for note in part.notes):
            yield f"  ! {note}"
        if any(part.diagnosis is not None and part.diagnosis.masked for part in self.parts):
            yield "  ! the diagnosis found masked gradients: the model may be less robust than this"
        if not self.passed and self.counterexamples:
            yield "counterexamples, the clearest first (distance in the threat's norm, margin of the wrong class):"
            yield f"  {'sample':>6}  {'label':>5}  {'predicted':>9}  {'distance':>8}  {'margin':>8}  broken by"
            for one in self.counterexamples:
                figures = f"{one.predicted:>9}  {length(one.distance):>8}  {one.margin:>8.3g}"
                by = f"{one.stage} within {one.within}" if several else one.stage
                yield f"  {one.sample:>6}  {one.label:>5}  {figures}  {by}"
        if self.folder is not None:
            yield f"pictures and figures: {self.folder}"

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "format": 1,
            "passed": self.passed,
            "complete": self.complete,
            "threats": [part.threat.settings() for part in self.parts],
            "at_least": self.at_least,
            "robust_accuracy": self.reached,
            "limits": {"confidence": CONFIDENCE, "low": self.limits[0], "high": self.limits[1]},
            "samples": self.samples,
            "standing": self.standing,
            "needed": self.needed,
            "clean_accuracy": self.parts[0].clean_accuracy,
            "seconds": self._seconds,
            "attacks": [asdict(each) for each in self.fallen],
            "counterexamples": [asdict(each) for each in self.counterexamples],
            "notes": [note for part in self.parts for note in part.notes],
            "message": self.message,
        }

    @property
    def _seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    def junit(self) -> str:
        """A JUnit XML document with one test: failed if too few samples stand, in error if too few attacks were run to say."""
        return junit([("", self)])

    def _case(self, suite: ElementTree.Element, subject: str) -> str:
        """Put the test into the suite; what it came to: "" if it passed, "failures" or "errors"."""
        name = f"robust accuracy of at least {percent(self.at_least)} within {self._threats}"
        case = ElementTree.SubElement(
            suite, "testcase", classname="saddlepoint.gate", name=f"{subject}: {name}" if subject else name,
            time=f"{self._seconds:.3f}",
        )  # fmt: skip
        if self.passed:
            ElementTree.SubElement(case, "system-out").text = self.message
            return ""
        kind, (first, *_) = "failure" if self.standing < self.needed else "error", self._lines()
        ElementTree.SubElement(case, kind, message=first, type="Gate").text = self.message
        return f"{kind}s"

    def save(self, folder: str | Path) -> Gate:
        """Write gate.json and, of images and short tables, counterexamples.png; returns this gate with its `folder`.

        Errors: `DataError` where it can't be written.
        """
        folder = Path(folder)
        saved, picture = replace(self, folder=folder), self._picture()
        try:
            write_file(folder / "gate.json", json.dumps(saved.to_dict(), indent=1).encode())
            if picture is not None:
                write_file(folder / "counterexamples.png", picture)
            else:
                (folder / "counterexamples.png").unlink(missing_ok=True)  # of an earlier run
        except OSError as error:
            raise DataError(f"cannot write to {folder}: {error}") from error
        return saved

    def _picture(self) -> bytes | None:
        """Originals, changes and adversarial inputs of the counterexamples as PNG; None if that can't be drawn."""
        kind, x = kind_of(self.parts[0].x), self.parts[0].x
        if not self._shown or kind == "none":
            return None
        points = [part.adversarial[row].cpu() for part, row in self._shown]
        low = min(float(one.min()) for one in (x, *points))
        high = max(float(one.max()) for one in (x, *points))
        examples = []
        for one, point in zip(self.counterexamples, points, strict=True):
            original = x[one.sample].cpu()
            shot = Shot(
                model="the model", status=Status.FOOLED, clean_predicted=one.label, clean_confidence=None,
                predicted=one.predicted, confidence=None, adversarial=point, delta=(point - original) / ((high - low) or 1.0),
                distance=one.distance, smallest=None,
            )  # fmt: skip
            examples.append(Example(one.sample, one.label, original, (shot,)))
        factor = magnification(max(float(example.shots[0].delta.abs().max()) for example in examples))
        from saddlepoint.report import figures  # matplotlib

        gallery = Gallery(kind, "", self._threats, low, high, factor, ("the model",), tuple(examples))
        return figures.to_png(figures.examples(gallery))


def gate(evaluation: Evaluation | WorstCase, at_least: float) -> Gate:
    """Check what `sp.evaluate` returned: does at least this share of all samples stand?

    at_least: 0.6 for 60 %. Errors: `InputError` unless it lies in (0, 1], and where there are no samples.
    """
    check_share(at_least)
    parts = evaluation.parts if isinstance(evaluation, WorstCase) else (evaluation,)
    if not parts or not len(parts[0]):
        raise InputError("the evaluation has no samples: there is nothing to check")
    return Gate(parts, at_least)


def junit(gates: Iterable[tuple[str, Gate]]) -> str:
    """A JUnit XML document with a test for each gate, as `Gate.junit`; each comes with the name of what it is about."""
    root = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(root, "testsuite", name="saddlepoint")
    pairs = list(gates)
    came_to = [one._case(suite, subject) for subject, one in pairs]
    counts = {"tests": len(pairs), "failures": came_to.count("failures"), "errors": came_to.count("errors"), "skipped": 0}
    for key, value in counts.items():
        suite.set(key, str(value))
    suite.set("time", f"{sum(one._seconds for _, one in pairs):.3f}")
    text: bytes = ElementTree.tostring(root, encoding="us-ascii", xml_declaration=True)
    return text.decode()


def check_share(at_least: float) -> None:
    """Raise `InputError` unless it is a share of the samples, above 0 and at most 1."""
    if not 0 < at_least <= 1:
        raise InputError(f"at_least must lie in (0, 1], such as 0.6 for 60 %; got {at_least}")


def _counterexample(part: Evaluation, sample: int) -> Counterexample:
    stage = part.stages[int(part.broken_by[sample])]
    predicted = int(stage.result.predicted[(stage.rows == sample).nonzero()[0, 0]])
    (distance,) = part.threat.distance(part.adversarial[sample, None], part.x[sample, None]).tolist()
    label, margin = int(part.y[sample]), float(part.margin[sample])
    return Counterexample(sample, label, predicted, distance, margin, str(part.threat), stage.name)
