"""The report of robust-accuracy evaluations: the figure and its limits, what fell to what at which cost, and what to trust."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saddlepoint.errors import InputError
from saddlepoint.evaluate import Evaluation, Finding, WorstCase
from saddlepoint.evaluate.evaluation import CONFIDENCE, FAILED, STANDS, WRONG, binomial_limits
from saddlepoint.models.base import Classifier
from saddlepoint.report.document import frame, plain
from saddlepoint.report.folder import drawing, environment, publish
from saddlepoint.report.gallery import Gallery, album, in_turns
from saddlepoint.report.words import class_name, distinct, file_name, listed, percent, visible
from saddlepoint.taxonomy import Access, Status

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

_CLOSEST = 10  # samples named in results.json
_CLASSES = 60  # that a figure shows, the weakest ones
_TRUST = {
    "masked": "Signs of masked gradients were found, so that surviving attacks by gradients proves little: the true figure may "
    "be far lower.",
    "checked": "Signs of masked gradients were looked into: the diagnosis found none, but the true figure may still be lower.",
    "noted": "The run noticed something that may speak against the figure, and made no diagnosis.",
    "scores": "The model gives no gradients, and searches by scores are weaker: the true figure may be lower.",
    "unknown": "It was stopped before gradients could be judged.",
    "quiet": "No sign of masked gradients was seen.",
}


@dataclass(frozen=True)
class Step:
    """A stage as the report shows it.

    attacked: samples that it was run on; fell: those that it was the first to break. stand: those that neither it nor a stage
    before it in the list broke; held: those among them that it attacked. passes: forward and backward, of all samples together.
    """

    name: str
    attacked: int
    fell: int
    held: int
    stand: int
    passes: int
    heavy: bool


@dataclass(frozen=True)
class ByClass:
    """A class or subgroup by number, with the shares of its samples that are right without an attack and that stand."""

    label: int
    samples: int
    clean_accuracy: float
    robust_accuracy: float


@dataclass(frozen=True)
class _Entry:
    """One evaluation, of the samples that at least one attack has seen: `found` has the positions `rows` of all of them.

    metadata: by field, one value for each of all samples.
    """

    model: str
    whole: Evaluation
    access: Access
    metadata: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Tensor:
        seen = torch.zeros(len(self.whole), dtype=torch.bool)
        for stage in self.whole.stages:
            seen[stage.rows] = True
        return seen.nonzero()[:, 0]

    @cached_property
    def found(self) -> Evaluation:
        return self.whole if len(self.rows) == len(self.whole) else self.whole.group(self.rows)

    @property
    def within(self) -> str:
        return str(self.whole.threat)

    @property
    def trust(self) -> str:
        """A key of `_TRUST`."""
        if self.found.diagnosis is not None:
            return "masked" if self.found.diagnosis.masked else "checked"
        if self.access < Access.GRADIENTS:
            return "scores"
        if self.found.notes:
            return "noted"
        return "quiet" if self.found.complete else "unknown"

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        found, steps = self.found, []
        standing = int(found.right.sum())
        for number, stage in enumerate(found.stages):
            stood = found.right & ((found.broken_by == STANDS) | (found.broken_by >= number))
            fell = int((found.broken_by == number).sum())
            standing -= fell
            passes = int(stage.result.queries.total.sum())
            held = int(stood[stage.rows].sum()) - fell
            steps.append(Step(stage.name, len(stage.rows), fell, held, standing, passes, stage.heavy))
        return tuple(steps)

    @property
    def last(self) -> int | None:
        """Number of the stage furthest down the list that broke something. Heavy ones take turns, so this is no time."""
        return max((number for number, step in enumerate(self.steps) if step.fell), default=None)

    @cached_property
    def classes(self) -> list[ByClass]:
        """The weakest first."""
        rows = [ByClass(label, *figures) for label, figures in self.found.per_class().items()]
        return sorted(rows, key=lambda row: (row.robust_accuracy, row.clean_accuracy, row.label))

    @cached_property
    def groups(self) -> dict[str, dict[str, dict[str, Any]]]:
        """As `by_group`."""
        rows = self.rows.tolist()
        return by_group(self.found, {name: [values[row] for row in rows] for name, values in self.metadata.items()})

    @property
    def closest(self) -> Tensor:
        """Positions of the samples that stand and were attacked, by the least margin."""
        found = self.found
        rows = found.closest(len(found))
        return rows[torch.isfinite(found.margin[rows])]

    @property
    def predicted(self) -> Tensor:
        """The model's answer to the adversarial inputs and best attempts, (N,), from the stage whose point was kept."""
        found = self.found
        best, predicted = torch.full_like(found.margin, -math.inf), found.clean_predicted.clone()
        for number, stage in enumerate(found.stages):
            margin, by = stage.result.margin.double(), found.broken_by[stage.rows]
            closer = (by == number) | ((by == STANDS) & (margin > best[stage.rows]))
            best[stage.rows[closer]], predicted[stage.rows[closer]] = margin[closer], stage.result.predicted[closer]
        return predicted


def by_group(found: Evaluation, metadata: Mapping[str, Sequence[str]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{field: {value: {samples, clean_accuracy, robust_accuracy, interval}}}, the weakest group of each field first.

    metadata: by field, one value for each sample.
    """
    fields = {}
    slim = replace(found, x=found.x[..., :0], adversarial=found.adversarial[..., :0], stages=())  # groups copy what they hold
    for name, values in metadata.items():
        groups = sorted(slim.groups(values).items(), key=lambda one: (one[1].robust_accuracy, one[1].clean_accuracy))
        fields[name] = {
            value: {
                "samples": len(group),
                "clean_accuracy": group.clean_accuracy,
                "robust_accuracy": group.robust_accuracy,
                "interval": asdict(group.interval),
            }
            for value, group in groups
        }
    return fields


def write_evaluations(
    found: Sequence[tuple[str, Evaluation]],
    models: Mapping[str, Classifier],
    folder: str | Path,
    *,
    title: str,
    data_name: str,
    config: Mapping[str, object],
    seed: int,
    data_fingerprint: str = "",
    class_names: Sequence[str] = (),
    command: str = "",
    groups: Mapping[str, Sequence[str]] | None = None,
    examples: int = 6,
) -> Path:
    """Write the report of evaluations of the same samples, and return the path of its report.html.

    The folder gets `report.html` (one file, needs nothing else), `results.json` (see `evaluation_results`) and `figures/`.
    Every file appears complete or not at all, report.html last; what an earlier report left under the same names is replaced.

    found: (name of the model, evaluation), one for each model and threat. models: the models by those names; they are shown
    the few examples once more, for their confidences. groups: metadata that make subgroups, by field ("hospital"), one value
    for each sample. examples: how many samples to show that stand, and as many that fell. The others: as in `write`.

    Errors: `DataError` where the folder can't be written; `InputError` for no evaluations, or such of different samples, and
    for metadata of another number of samples.
    """
    if examples < 0:
        raise InputError(f"examples must be at least 0; got {examples}")
    entries = _entries(found, models, groups)
    document = evaluation_results(
        found, models, title=title, data_name=data_name, data_fingerprint=data_fingerprint, class_names=class_names,
        config=config, command=command, groups=groups, seed=seed,
    )  # fmt: skip
    page, pictures = _page(entries, models, document, class_names, examples, seed)
    return publish(Path(folder), page, document, pictures)


def evaluation_results(
    found: Sequence[tuple[str, Evaluation]],
    models: Mapping[str, Classifier],
    *,
    title: str,
    data_name: str,
    config: Mapping[str, object],
    seed: int,
    data_fingerprint: str = "",
    class_names: Sequence[str] = (),
    command: str = "",
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The content of results.json. What is not a number in JSON (nan, infinity) is null.

    schema, title, command, seed, created, complete, data, versions, config, verdict: as in `saddlepoint.report.results`.
    models: a list of {name, settings, worst}: what `Classifier.describe` says, and, with several threats, the worst case over
    them, {robust_accuracy, interval} or null. evaluations: a list, in the order given, with for each:

    | key | content |
    | --- | --- |
    | model, within | whose it is, and the threat in words |
    | verdict | in words |
    | unreached | samples that no attack had seen when the run was interrupted; all other figures leave them out |
    | counts | samples: {wrong (without an attack), failed (NaN or infinite values), broken, stands, proven} |
    | trust | masked, checked (suspicious, but the diagnosis found no masking), noted (see notes), scores (the model gives no gradients), unknown (stopped before), or quiet (nothing suspicious) |
    | last_to_break | number of the stage furthest down the list that broke something, from 0; null if none did |
    | closest | [[number of the sample, class, margin, distance of the best attempt], ...], the closest call first |
    | samples, threat, clean_accuracy, robust_accuracy | robust accuracy is an upper bound |
    | naive_accuracy | under an attack that doesn't know the transformations of a defended model; null without any |
    | interval | {certified, attacked, low, high}: see `Interval` |
    | proofs | numbers of samples and time, {certified, undecided, seconds}; null where no proof was looked for |
    | passes | {forward, backward} of a sample, on average |
    | totals | passes of all samples: {forward, backward, verify, probe, looked, diagnosis}; verify confirmed successes; looked, a part of forward and backward: at gradients, for signs of masking |
    | seconds, complete, notes | wall time of the stages; false after Ctrl-C; what to know about the figure |
    | stages | a list of {name, why, heavy, attacked, broke, alone, after, passes, seconds, fell, held, stand, settings, notes} |
    | curve | [[eps, robust accuracy], ...], an upper bound, or null if it was not asked for |
    | per_class | {class: [samples, clean accuracy, robust accuracy]} |
    | groups | {field: {value: {samples, clean_accuracy, robust_accuracy, interval}}} from the metadata that were given, the weakest first |
    | diagnosis | null, or {findings, samples, attacked, forward, backward, seconds, masked}: see `Diagnosis` |

    Of stages, which are in the order of their first attack: why it was run; heavy: a ladder, see `Stage`; passes: forward and
    backward, of all samples; fell: samples that it was the first to break; alone: such that others had tried in vain. stand: all
    that neither it nor one before it in the list broke; held: such that it attacked; after: stand as a share. Heavy stages take
    turns, so these three count down the list, not in time.
    A search for the smallest perturbations attacks samples again that fell before, so its broke may be more than fell.
    """  # noqa: E501  # a row of a table is a line
    entries = _entries(found, models, groups)
    names = list(dict.fromkeys(entry.model for entry in entries))
    worst = {name: _worst([entry for entry in entries if entry.model == name]) for name in names}
    document: dict[str, Any] = plain({
        **frame(
            entries[0].whole.x, title=title, complete=all(entry.whole.complete for entry in entries), command=command,
            seed=seed, data_name=data_name, data_fingerprint=data_fingerprint, class_names=class_names,
        ),
        "config": config,
        "verdict": _verdict(entries, worst),
        "models": [
            {
                "name": name,
                "settings": models[name].describe(),
                "worst": None if case is None else {"robust_accuracy": case.robust_accuracy, "interval": asdict(case.interval)},
            }
            for name, case in worst.items()
        ],
        "evaluations": [_document(entry) for entry in entries],
    })  # fmt: skip
    return document


def _entries(
    found: Sequence[tuple[str, Evaluation]], models: Mapping[str, Classifier], metadata: Mapping[str, Sequence[str]] | None
) -> list[_Entry]:
    if not found:
        raise InputError("there are no evaluations to report")
    for name, evaluation in found:
        if not isinstance(evaluation, Evaluation):
            hint = "; a WorstCase goes in part by part" if isinstance(evaluation, WorstCase) else ""
            raise InputError(f"{name!r} comes with a {type(evaluation).__name__}, which is no Evaluation{hint}")
        if name not in models:
            raise InputError(f"there is an evaluation of {name!r}, but the models are {', '.join(models)}")
        first = found[0][1]
        if not (torch.equal(first.x, evaluation.x) and torch.equal(first.y, evaluation.y)):
            raise InputError(f"the evaluation of {name!r} within {evaluation.threat} is of other samples than the first one")
    for name, values in (metadata or {}).items():
        if len(values) != len(found[0][1]):
            raise InputError(
                f"groups must have one value for each of the {len(found[0][1])} samples; {name!r} has {len(values)}"
            )
    return [_Entry(name, evaluation, models[name].access, metadata or {}) for name, evaluation in found]


def _worst(entries: Sequence[_Entry]) -> WorstCase | None:
    """Over several threats, where all samples were seen within each."""
    whole = all(len(entry.rows) == len(entry.whole) and entry.whole.stages for entry in entries)
    return WorstCase(tuple(entry.whole for entry in entries)) if len(entries) > 1 and whole else None


def _document(entry: _Entry) -> dict[str, Any]:
    found, document = entry.found, entry.found.to_dict()
    away = found.threat.distance(found.adversarial, found.x)
    stages = [
        given | {"fell": step.fell, "held": step.held, "stand": step.stand, "settings": stage.result.config["attack"],
                 "notes": list(stage.result.notes)}
        for given, step, stage in zip(document["stages"], entry.steps, found.stages, strict=True)
    ]  # fmt: skip
    passes = {kind: int(getattr(found.queries, kind).sum()) for kind in ("forward", "backward", "verify")}
    passes["looked"] = 2 * int(found.looked.sum())
    looked = found.diagnosis
    return {
        "model": entry.model,
        "within": entry.within,
        "verdict": _sentences(entry),
        "unreached": len(entry.whole) - len(found),
        "counts": {
            "wrong": int((found.broken_by == WRONG).sum()),
            "failed": int((found.broken_by == FAILED).sum()),
            "broken": int(found.broken.sum()),
            "stands": int(found.stands.sum()),
            "proven": int(found.certified.sum()),
        },
        "trust": entry.trust,
        "last_to_break": entry.last,
        "closest": [
            (int(entry.rows[row]), int(found.y[row]), float(found.margin[row]), float(away[row]))
            for row in entry.closest[:_CLOSEST].tolist()
        ],
        **document,
        "groups": entry.groups,
        "stages": stages,
        "totals": passes | {
            "probe": found.queries.probe,
            "diagnosis": 0 if looked is None else round((looked.forward + looked.backward) * looked.samples),
        },
    }  # fmt: skip


def _verdict(entries: Sequence[_Entry], worst: Mapping[str, WorstCase | None]) -> str:
    """A paragraph; names of models are in backquotes."""
    if len(entries) == 1:
        return _sentences(entries[0])
    sentences = []
    if not all(entry.whole.complete for entry in entries):
        sentences.append("Not everything was finished, so that attacks are missing: figures can only be too high.")
    for name, case in worst.items():
        own = [entry for entry in entries if entry.model == name and len(entry.found)]
        if not own:
            sentences.append(f"There are no figures for `{name}`.")
            continue
        within = listed(f"{percent(entry.found.robust_accuracy)} within {entry.within}" for entry in own)
        clean = max(entry.found.clean_accuracy for entry in own)
        text = f"`{name}` gets {percent(clean)} of the samples right, and under attack at most {within}"
        sentences.append(text + ("." if case is None else f"; in the worst case over them {percent(case.robust_accuracy)}."))
    if not any(bool(entry.found.certified.any()) for entry in entries):
        sentences.append("Nothing was proved: these are upper bounds.")
    masked: dict[str, list[str]] = {}
    for entry in entries:
        if entry.trust == "masked":
            masked.setdefault(entry.model, []).append(entry.within)
    if masked:
        where = listed(f"`{name}` within {listed(threats)}" for name, threats in masked.items())
        sentences.append(f"Signs of masked gradients were found in {where}: the truth may be far lower.")
    elif (trusts := {entry.trust for entry in entries}) <= {"quiet", "checked"}:
        sentences.append(_TRUST["checked" if "checked" in trusts else "quiet"])
    return " ".join(sentences)


def _sentences(entry: _Entry) -> str:
    """How robust one model is within one threat."""
    found, name = entry.found, f"`{entry.model}`"
    if not len(entry.whole):
        return f"There were no samples to evaluate {name} on."
    if not found.stages:
        return (
            f"{name} within {entry.within}: the run was stopped before the first attack had finished, so there are no figures."
        )
    total, right, stands, proven = (int(n) for n in (len(found), found.right.sum(), found.stands.sum(), found.certified.sum()))
    between, sure = found.interval, f"{100 - 50 * (1 - CONFIDENCE):g}% sure"
    sentences = []
    if not found.complete:
        left = f", and {len(entry.whole) - total} of {len(entry.whole)} samples were not reached and are left out"
        sentences.append(
            f"This evaluation was interrupted: attacks are missing{left if total < len(entry.whole) else ''}. The figures can "
            "only be too high."
        )
    clean = f"gets {right} of {total} samples right ({percent(found.clean_accuracy)})"
    if not right:
        sentences.append(f"Without an attack, {name} {clean}, so there was nothing to break.")
    else:
        holds = f"at most {percent(between.attacked)}" if proven < stands else percent(between.attacked)
        broke = "none of those" if stands == right else f"{right - stands} of those" if stands else "all of those"
        sentences.append(f"Within {entry.within}, the robust accuracy of {name} is {holds}.")
        sentences.append(f"Without an attack it {clean}; attacks broke {broke}.")
    if not proven:
        bounds = f"lies between {percent(0)} and {percent(between.attacked)}"
        nothing = "Nothing was proved" if found.proving is None else "Of those that stand none could be proved in time"
        if stands:
            sentences.append(
                f"{nothing}, so that for these samples the truth {bounds}; for all such inputs it is at most "
                f"{percent(between.high)} ({sure})."
            )
        elif right:
            sentences.append(f"For all such inputs it is at most {percent(between.high)} ({sure}).")
    else:
        some = f"{proven} samples have" if proven > 1 else "1 sample has"
        truth = f"lies between {percent(between.certified)} and {percent(between.attacked)}"
        known = f"{some} a proof, so that for these samples the truth {truth}"
        if proven == stands:
            known = f"All that stand, {proven}, have a proof, so that for these samples the figure is the truth"
        limits = f"for all such inputs between {percent(between.low)} and {percent(between.high)} ({sure} of each)"
        sentences.append(f"{known}; {limits}.")
    if right and not 0 < proven == stands:  # gradients don't matter to what is proved
        sentences.append(_TRUST[entry.trust])
    return " ".join(sentences)


def _course(entry: _Entry) -> list[str]:
    """What the cascade shows, in words."""
    steps, last = entry.steps, entry.last
    reached = entry.found.reached
    tried = [f"Each heavy stage was tried on {reached}."] if reached else []
    if last is None:
        return ["No attack broke anything.", *tried] if int(entry.found.right.sum()) else []
    broken, passes = sum(step.fell for step in steps), sum(step.passes for step in steps)
    sentences = []
    heavy = [step for step in steps if step.heavy]
    if heavy and len(heavy) < len(steps):
        late, spent = sum(step.fell for step in heavy), sum(step.passes for step in heavy)
        early = f"{broken - late} of the {broken} samples that fell" if late else f"all {broken} samples that fell"
        sentences.append(
            f"The stages meant for all samples broke {early}, for {percent(1 - spent / passes)} of the passes; the heavy ones "
            f"{late or 'none'}, for {percent(spent / passes)}."
        )
    lowest, below = steps[last], steps[last + 1 :]
    sentences.append(
        f"The furthest down to break anything is {lowest.name} (number {last + 1} of {len(steps)}), with {lowest.fell}."
    )
    if below:
        sentences.append(
            f"Those below it broke nothing, for {percent(sum(step.passes for step in below) / passes)} of the passes."
        )
    elif 0 < lowest.stand == lowest.held:  # a ladder that stopped before had broken nothing more
        sentences.append("So the search had not run dry when it ended: a longer one would probably break more.")
    return sentences + tried


def _advice(entry: _Entry) -> list[tuple[list[Finding], str]]:
    """What follows from the diagnosis, each once, with the findings that it follows from.

    Many say the same figures before a colon: these too are said once.
    """
    found = entry.found.diagnosis.suspicious if entry.found.diagnosis is not None else ()
    groups: dict[str, list[Finding]] = {}
    for finding in found:
        whole = max((other.next for other in found if finding.next and other.next.endswith(finding.next)), key=len, default="")
        groups.setdefault(whole, []).append(finding)
    figures: set[str] = set()
    said = []
    for whole, findings in groups.items():
        head, _, advice = whole.rpartition(": ")
        said.append((findings, advice if head in figures else whole))
        figures.add(head)
    return said


def _rows(groups: Mapping[str, Mapping[str, Any]]) -> tuple[list[ByClass], list[str]]:
    """The groups of a field as rows, and what they are called."""
    shares = ("samples", "clean_accuracy", "robust_accuracy")
    return [ByClass(row, *(group[key] for key in shares)) for row, group in enumerate(groups.values())], list(groups)


def _extremes(rows: Sequence[ByClass], names: Sequence[str], robust_accuracy: float, what: str) -> list[str]:
    """The weakest of the classes or groups in words, and whether chance could have made it.

    rows: the weakest first. robust_accuracy: of all samples. what: "class" or "group".
    """
    weak, strong = rows[0], rows[-1]
    if weak.robust_accuracy == strong.robust_accuracy:
        return [f"All are equally robust: {percent(weak.robust_accuracy)}." if len(rows) > 1 else f"There is one {what} only."]
    standing = round(weak.robust_accuracy * weak.samples)
    # the lowest of many shares is low anyway, so each gets its part of the doubt (Bonferroni)
    chance = binomial_limits(standing, weak.samples, 1 - (1 - CONFIDENCE) / len(rows))[1] >= robust_accuracy
    return [
        f"The weakest {what} is {class_name(weak.label, names)}: {standing} of its {weak.samples} samples stand "
        f"({percent(weak.robust_accuracy)}; without an attack {percent(weak.clean_accuracy)} are right).",
        "That it lies below the average may well be chance." if chance
        else "That is further below the average than chance would make it.",
        f"The strongest is {class_name(strong.label, names)}, with {percent(strong.robust_accuracy)}.",
    ]  # fmt: skip


def _page(
    entries: Sequence[_Entry],
    models: Mapping[str, Classifier],
    document: dict[str, Any],
    class_names: Sequence[str],
    examples: int,
    seed: int,
) -> tuple[str, dict[str, bytes]]:
    """The HTML page, and the figures as PNG by file name."""
    from markupsafe import Markup

    from saddlepoint.report import figures

    pictures: dict[str, bytes] = {}

    def draw(figure: Figure, name: str) -> Markup:
        pictures[f"{name}.png"] = figures.to_png(figure)
        return Markup(figures.to_svg(figure, name))

    places = {model["name"]: place for place, model in enumerate(document["models"])}
    several = len({entry.within for entry in entries}) > 1
    shown = [
        (visible(entry.model, 24) + (f"\n{visible(entry.within, 30)}" if several else ""), entry.found)
        for entry in entries if len(entry.found)
    ]  # fmt: skip

    def shares(rows: Sequence[ByClass], labels: Sequence[str], entry: _Entry, name: str, what: str) -> dict[str, Any]:
        overall = entry.found.robust_accuracy
        return {
            "said": _extremes(rows, labels, overall, what),
            "drawn": draw(figures.classes(rows[:_CLASSES], overall, labels), name),
            "left_out": len(rows[_CLASSES:]),
        }

    parts = []
    names = distinct(file_name(entry.model, entry.within) for entry in entries)
    for place, (entry, figures_of, name) in enumerate(zip(entries, document["evaluations"], names, strict=True), 1):
        part: dict[str, Any] = {"place": f"evaluation-{place}", "found": figures_of, "shown": bool(len(entry.found))}
        if part["shown"]:
            found, counts = entry.found, figures_of["counts"]
            cascade = figures.cascade(entry.steps, int(found.right.sum()), counts["wrong"], counts["failed"])
            part |= {
                "course": _course(entry),
                "trust": _TRUST[entry.trust],
                "findings": _advice(entry),
                "follows": found.advice if entry.trust in ("masked", "checked", "noted") else "",
                "looked": int(found.looked.sum()),
                "cascade": draw(cascade, f"cascade-{name}"),
                "classes": shares(entry.classes, class_names, entry, f"classes-{name}", "class"),
                "groups": [
                    (title, groups, shares(*_rows(groups), entry, f"groups-{number}-{file_name(title)}-{name}", "group"))
                    for number, (title, groups) in enumerate(entry.groups.items(), 1)
                ],
                "curve": None,
                "albums": _albums(entry, models[entry.model], examples, seed),
            }
            if found.nearest is not None and not isinstance(found.threat.eps, tuple):
                part["curve"] = draw(figures.decline(found, places[entry.model]), f"curve-{name}")
        parts.append(part)
    page = environment().get_template("evaluation.html.j2").render(
        document=document,
        parts=parts,
        intervals=draw(figures.intervals(shown), "intervals") if shown else None,
        **drawing(places, class_names),
        notes=_notes(entries),
        bounds=models[entries[0].model].bounds,
        sure=f"{100 - 50 * (1 - CONFIDENCE):g}%",
    )  # fmt: skip
    return page, pictures


def _albums(entry: _Entry, model: Classifier, examples: int, seed: int) -> list[tuple[str, Gallery, dict[int, str]]]:
    """The closest calls, and some samples that fell, the classes in turns; with a title for each sample."""
    found = entry.found
    fell = list(in_turns(found.broken.nonzero()[:, 0].tolist(), found.y))[:examples]
    groups = (
        ("stands", Status.SURVIVED, entry.closest[:examples]),
        ("broken", Status.FOOLED, torch.tensor(fell, dtype=torch.int64)),
    )
    return [
        (
            word,
            album(
                entry.model, model, found.x, found.adversarial, rows, numbers=entry.rows, labels=found.y,
                clean_predicted=found.clean_predicted, predicted=entry.predicted, status=status, attack="cascade",
                distance=found.threat.distance(found.adversarial, found.x), threat=entry.within, seed=seed,
            ),
            {
                int(entry.rows[row]): f"margin {found.margin[row]:.3g}".replace("-", "−") if status is Status.SURVIVED
                else found.stages[int(found.broken_by[row])].name
                for row in rows.tolist()
            },
        )
        for word, status, rows in groups
    ]  # fmt: skip


def _notes(entries: Sequence[_Entry]) -> list[tuple[str, str]]:
    """The engine's notes, each once, with where it came up."""
    where: dict[str, dict[str, None]] = {}
    for entry in entries:
        for stage in entry.found.stages:
            for note in stage.result.notes:
                where.setdefault(note, {})[f"`{entry.model}` within {entry.within}: {stage.name}"] = None
    return [(note, "; ".join(runs)) for note, runs in where.items()]
