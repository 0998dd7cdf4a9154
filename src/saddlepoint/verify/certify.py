"""Which inputs are proved robust: `certify`, sample by sample, from attacks to complete search."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from saddlepoint.attacks.ascent import Sprint
from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.engine.budget import Budget
from saddlepoint.engine.source import check_labels
from saddlepoint.engine.source import fingerprint as data_fingerprint
from saddlepoint.errors import CapabilityError, DataError, InputError, SoundnessError
from saddlepoint.files import write_file
from saddlepoint.models.base import Classifier
from saddlepoint.models.fingerprint import fingerprint
from saddlepoint.precision import full_precision
from saddlepoint.progress import bar
from saddlepoint.propagation.bounds import Bounded
from saddlepoint.propagation.graph import read
from saddlepoint.propagation.methods import check_model
from saddlepoint.propagation.nodes import Graph
from saddlepoint.propagation.regions import inputs_of
from saddlepoint.propagation.sets import Box
from saddlepoint.taxonomy import Access, Norm, Status
from saddlepoint.threats import Region, Threat
from saddlepoint.verify.cases import Cases, margins
from saddlepoint.verify.prove import Proof, prove
from saddlepoint.verify.search import Verdict

STAGES = ("prediction", "attack", "crown-ibp", "corners", "crown", "patches", "alpha-crown", "inputs", "search", "none")
_SECONDS = 60.0
_TOGETHER = 32  # samples whose linear bounds are found at once
_FORMAT = 2


@dataclass(frozen=True, repr=False)
class Certification:
    """What is proved of N samples, in their order: `proofs`, each a `Proof`.

    A sample that the model gets wrong is falsified in the stage "prediction". complete: False after Ctrl-C, where the rest is
    unknown. Proofs hold for the network in real arithmetic, see `Proof`.
    """

    x: Tensor
    y: Tensor
    threat: Threat
    proofs: tuple[Proof, ...]
    complete: bool = True

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return f"Certification({len(self)} samples, {int(self.robust.sum())} proved robust; print .summary() for more)"

    def _having(self, verdict: str) -> Tensor:
        return torch.tensor([proof.verdict == verdict for proof in self.proofs], dtype=torch.bool)

    @property
    def robust(self) -> Tensor:
        """Samples that the model gets right at every input of the threat, (N,) bool."""
        return self._having("robust")

    @property
    def falsified(self) -> Tensor:
        """Samples with a counterexample, (N,) bool, with those that the model gets wrong anyway."""
        return self._having("falsified")

    @property
    def unknown(self) -> Tensor:
        """Samples for which neither was found in time, (N,) bool."""
        return self._having("unknown")

    @property
    def right(self) -> Tensor:
        """Samples that the model gets right, (N,) bool."""
        return torch.tensor([proof.stage != "prediction" for proof in self.proofs], dtype=torch.bool)

    @property
    def certified_accuracy(self) -> float:
        """Share of the samples that are proved robust; what is unknown isn't."""
        return _mean(self.robust)

    @property
    def attacked_accuracy(self) -> float:
        """Share of the samples without a counterexample: robust accuracy lies between the certified one and this."""
        return _mean(~self.falsified)

    @property
    def bound(self) -> Tensor:
        """The least lower bound of each sample's margins, (N,) float64: positive where it is robust."""
        return torch.tensor([proof.bound for proof in self.proofs], dtype=torch.float64)

    @property
    def seconds(self) -> Tensor:
        """Spent on each sample, (N,) float64."""
        return torch.tensor([proof.seconds for proof in self.proofs], dtype=torch.float64)

    @property
    def counterexamples(self) -> Tensor:
        """Inputs that the model gets wrong where there are some, the samples themselves elsewhere, (N, ...)."""
        points = self.x.clone()
        for place, proof in enumerate(self.proofs):
            if proof.counterexample is not None:
                points[place] = proof.counterexample.to(points)
        return points

    def stages(self) -> dict[str, dict[str, int]]:
        """How many samples each stage decided, or was the last to try: {stage: {verdict: count}}, in their order."""
        counts = Counter((proof.stage, str(proof.verdict)) for proof in self.proofs)
        found: dict[str, dict[str, int]] = {}
        for stage, verdict in sorted(counts, key=lambda key: STAGES.index(key[0])):
            found.setdefault(stage, {})[verdict] = counts[stage, verdict]
        return found

    def summary(self) -> str:
        """The interval of robust accuracy, and what each stage did, in plain text."""
        if not len(self):
            return f"Verification of 0 samples within {self.threat}"
        sure = all(proof.rigorous for proof in self.proofs if proof.verdict == "robust")
        lines = [
            f"Verification of {len(self)} samples within {self.threat}",
            f"  clean accuracy   {_mean(self.right):.2%}",
            f"  robust accuracy  between {self.certified_accuracy:.2%} (proved) and {self.attacked_accuracy:.2%} (attacked)",
            f"  unknown          {int(self.unknown.sum())}",
            f"  seconds          {float(self.seconds.sum()):.1f}, {float(self.seconds.max()):.1f} at most",
            "  stage          robust  falsified  unknown",
        ]
        for stage, counts in self.stages().items():
            numbers = "".join(f"{counts.get(verdict, 0):>{width}}" for verdict, width in _COLUMNS)
            lines.append(f"  {stage:<13}{numbers}")
        lines += [] if sure else ["  ! proofs hold up to rounding in the network's dtype; rigorous=True allows for it"]
        for reason, count in Counter(proof.reason for proof in self.proofs if proof.reason).most_common(3):
            lines.append(f"  ! {count}: {reason}")
        return "\n".join(lines if self.complete else [*lines, "  ! interrupted: later samples are missing"])

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON: shares between 0 and 1, `stages`, and a list of the proofs without inputs.

        None stands for shares of no samples, and for bounds that aren't finite.
        """
        return {
            "samples": len(self), "threat": self.threat.settings(), "clean_accuracy": _known(_mean(self.right)),
            "certified_accuracy": _known(self.certified_accuracy), "attacked_accuracy": _known(self.attacked_accuracy),
            "unknown": int(self.unknown.sum()), "seconds": float(self.seconds.sum()), "complete": self.complete,
            "stages": self.stages(),
            "proofs": [_document(proof) for proof in self.proofs],
        }  # fmt: skip


_COLUMNS = (("robust", 8), ("falsified", 11), ("unknown", 9))


def certify(
    model: Classifier, x: Tensor, y: Tensor, threat: Threat, budget: Budget | None = None, *, seed: int = 0,
    rigorous: bool = False, progress: bool = False, folder: str | Path | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Certification:  # fmt: skip
    """Prove or refute, for each sample, that every input of the threat is classified as it should be.

    x (N, ...), y (N,): samples inside the model's bounds and their true classes. threat: `Linf`, `L2` or `L1` of stated size.
    budget: `Budget(seconds=...)` for each sample, default 60. The cascade, each stage for what is left:

    - prediction: is the sample itself right?
    - attack: a short one by gradients
    - crown-ibp, crown: bounds, of many samples at once
    - corners, patches, alpha-crown, search or inputs: see `prove`

    Complete for ReLU networks up to time and rounding; other nonlinearities are proved by bounds, or by halving where there are
    at most 16 inputs. A proof is of each sample alone: networks whose answer depends on the rest of the batch aren't covered.
    rigorous: allow for rounding, see `prove`; otherwise bounds are computed in the network's dtype, which float16 and bfloat16
    are too coarse for. seed: of the attack; all else is deterministic, but for where time ends. folder: keeps what is finished,
    a file for each sample; the same call goes on there. clock: what `seconds` means; `time.process_time` is the processor's.

    Ctrl-C returns what is finished. Errors: `InputError` for bad inputs and threats without a size, `CapabilityError` for
    other norms, random models, models whose weights aren't known and float16 without rigorous, `ModelError` for operators
    without known bounds, `DataError` for a folder of another run, damaged or not to be written, `SoundnessError` should a
    confirmed counterexample turn out to be none.

    >>> import torch, saddlepoint as sp
    >>> model = sp.Model(torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
    >>> x = torch.rand(4, 2)
    >>> found = sp.verify.certify(model, x, model.predict(x), sp.Linf(0.01), sp.Budget(seconds=5))
    >>> bool((found.robust | found.falsified).all())
    True
    """
    seconds, y = seconds_of(budget), _checked(model, x, y, threat, rigorous)
    x, y = x.detach().cpu(), y.detach().cpu()
    ledger = _Ledger(folder, model, x, y, threat, seconds, seed, rigorous) if folder is not None else None
    proofs: dict[int, Proof] = dict(ledger.read(x)) if ledger is not None else {}

    def keep(place: int, proof: Proof) -> None:
        proofs[place] = proof
        if ledger is not None:
            ledger.write(place, proof)
        tick(len(proofs))

    complete = True
    with bar("verifying", len(y), show=progress) as tick, model.frozen():
        try:
            rest = [place for place in range(len(y)) if place not in proofs]
            if rest:
                _through(model, x, y, threat, torch.tensor(rest), seconds, seed, rigorous, clock, keep)
        except KeyboardInterrupt:
            complete = False
    nothing = Proof("unknown", "none", -math.inf, None, 0, 0.0, "interrupted")
    return Certification(x, y, threat, tuple(proofs.get(place, nothing) for place in range(len(y))), complete)


def seconds_of(budget: Budget | None) -> float:
    """For each proof. Errors: `InputError` for budgets of passes or queries, which proofs don't count."""
    if not (budget is None or isinstance(budget, Budget)) or (budget and (budget.passes or budget.queries)):
        raise InputError(f"budget must be sp.Budget(seconds=...), the only limit that a proof has; got {budget!r}")
    return _SECONDS if budget is None or budget.seconds is None else budget.seconds


def check_precision(model: Classifier, rigorous: bool) -> None:
    """Errors: `CapabilityError` where bounds in the network's dtype would mean little."""
    if model.dtype in (torch.float16, torch.bfloat16) and not rigorous:
        raise CapabilityError(f"bounds would be computed in {model.dtype}, which rounds too much: take rigorous=True")


def _checked(model: Classifier, x: Tensor, y: Tensor, threat: Threat, rigorous: bool) -> Tensor:
    """The labels."""
    if not isinstance(model, Classifier):
        raise InputError(f"model must be a Saddlepoint model: sp.Model(net, ...); got {type(model).__name__}")
    if not isinstance(threat, Threat) or threat.minimizes:
        raise InputError(f"certify needs a ball of stated size, such as sp.Linf(8 / 255); got {threat!r}")
    if threat.norm not in (Norm.LINF, Norm.L2, Norm.L1):
        raise CapabilityError(f"bounds are known for l-infinity, l2 and l1; the threat is {threat}")
    model.require(Access.PARAMETERS, "certify")
    if model.rejects:
        raise CapabilityError("certify is about classes; this model can also refuse to answer")
    check_precision(model, rigorous)
    model.check_inputs(x)
    return check_labels(y, len(x), check_model(model, x) if len(x) else 2)


def _through(
    model: Classifier, x: Tensor, y: Tensor, threat: Threat, rows: Tensor, seconds: float, seed: int,
    rigorous: bool, clock: Callable[[], float], keep: Callable[[int, Proof], None],
) -> None:  # fmt: skip
    started = clock()
    result = run_attack(model, x[rows], y[rows], Sprint(steps=20), threat.only(rows, x), seed=seed, ids=rows)
    spent = (clock() - started) / len(rows)
    left = []
    for place, row in enumerate(rows.tolist()):
        if bool(result.having(Status.ALREADY_WRONG)[place]):
            keep(row, Proof("falsified", "prediction", -math.inf, x[row], 0, spent))
        elif bool(result.having(Status.FOOLED)[place]):
            keep(row, Proof("falsified", "attack", -float(result.margin[place]), result.adversarial[place].cpu(), 0, spent))
        else:
            left.append(row)
    if not left:
        return
    classes, device = model.probe(x).num_classes, model.device
    graph = read(model, x[left[:1]].to(device))

    def around(some: Tensor) -> Region:
        return threat.only(some, x).around(x[some].to(device), model.bounds)

    for some in torch.split(torch.tensor(left), _TOGETHER):
        started = clock()
        stages, least = [""] * len(some), [-math.inf] * len(some)
        if spent < seconds:
            with suppress(MemoryError, torch.OutOfMemoryError):  # one by one there may be enough
                stages, least = _screened(graph, inputs_of(around(some)), y[some].to(device), classes, rigorous)
        each = spent + (clock() - started) / len(some)
        for row, stage, bound in zip(some.tolist(), stages, least, strict=True):
            if stage:
                keep(row, Proof("robust", stage, bound, None, classes - 1, each, rigorous=rigorous))
                continue
            one, rest = torch.tensor([row]), max(seconds - each, 0.0)
            keep(row, _proved(model, graph, around(one), y[one].to(device), classes, rest, each, rigorous, clock))


@torch.no_grad()
def _screened(graph: Graph, inputs: Box, y: Tensor, classes: int, rigorous: bool) -> tuple[list[str], list[float]]:
    """What needs no search, for many samples at once: the stage that proved each, "" for none, and the least margins."""
    if rigorous:
        graph, inputs = graph.double, inputs.to(torch.float64)
    rows = margins(y, classes, inputs.lower.dtype)
    with full_precision(y.device.type):
        bounded = Bounded.of(graph, inputs, outward=rigorous)
        least = torch.maximum(bounded.backward(graph.output, rows), bounded.by_intervals(rows)).amin(1)
        stages = ["crown-ibp" if bound > 0 else "" for bound in least.tolist()]
        open_ = (~(least > 0)).nonzero()[:, 0]
        if len(open_):
            few = bounded.take(open_)
            few.refine()
            least[open_] = torch.maximum(least[open_], few.backward(graph.output, rows[open_]).amin(1))
    return [
        stage or ("crown" if bound > 0 else "") for stage, bound in zip(stages, least.tolist(), strict=True)
    ], least.tolist()


def _proved(
    model: Classifier, graph: Graph, region: Region, y: Tensor, classes: int, seconds: float, spent: float,
    rigorous: bool, clock: Callable[[], float],
) -> Proof:  # fmt: skip
    """One sample; where memory runs out that is the reason why it stays unknown."""
    cases = Cases.of_classes(inputs_of(region), y, classes)

    def replay(point: Tensor, case: int) -> bool:
        inside = region.snap(region.project(point[None].to(region.origin)))
        return bool(region.contains(inside)[0]) and int(model.predict(inside)[0]) != int(y[0])

    started = clock()
    try:
        proof = prove(graph, cases, replay, seconds=seconds, clock=clock, rigorous=rigorous)
    except (MemoryError, torch.OutOfMemoryError) as error:
        proof = Proof("unknown", "none", -math.inf, None, 0, clock() - started, f"out of memory: {str(error)[:80]}")
    if proof.counterexample is not None:
        point = region.snap(region.project(proof.counterexample[None].to(region.origin)))[0]
        if int(model.predict(point[None])[0]) == int(y[0]):
            raise SoundnessError(
                "a counterexample was confirmed, and then was none: does the model change while it is verified?"
            )
        proof = replace(proof, counterexample=point.cpu())
    return replace(proof, seconds=proof.seconds + spent)


class _Ledger:
    """A folder with a file for each finished sample."""

    def __init__(
        self, folder: str | Path, model: Classifier, x: Tensor, y: Tensor, threat: Threat, seconds: float, seed: int,
        rigorous: bool,
    ) -> None:  # fmt: skip
        self.path = Path(folder).expanduser()
        wanted = {
            "format": _FORMAT, "model": fingerprint(model), "data": data_fingerprint(x, y), "threat": threat.settings(),
            "seconds": seconds, "seed": seed, "rigorous": rigorous,
        }  # fmt: skip
        wanted = json.loads(json.dumps(wanted, default=str))
        self.run = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
        manifest = self.path / "certification.json"
        if manifest.exists():
            begun = _json(manifest, "take another folder")
            other = [key for key, value in wanted.items() if begun.get(key) != value]
            if other:
                raise DataError(f"{self.path} holds another run: {', '.join(other)} differ; take another folder")
        elif self._files():
            raise DataError(f"{self.path} holds proofs, but no certification.json that says of what: take another folder")
        else:
            self._write(manifest, wanted)

    def _files(self) -> list[Path]:
        return sorted(self.path.glob("[0-9]*.json"))

    def _write(self, path: Path, document: Mapping[str, Any]) -> None:
        try:
            write_file(path, json.dumps(document, indent=1).encode())
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror or error}") from error

    def write(self, place: int, proof: Proof) -> None:
        point = None if proof.counterexample is None else proof.counterexample.flatten().tolist()
        self._write(self.path / f"{place:06}.json", _document(proof) | {"counterexample": point, "run": self.run})

    def read(self, x: Tensor) -> dict[int, Proof]:
        found = {}
        for path in self._files():
            known = _json(path, "remove it, and the sample is done again")
            if not path.stem.isdecimal() or int(path.stem) >= len(x) or known.pop("run", None) != self.run:
                raise DataError(f"{path} is no proof of this run: remove it, or take another folder")
            try:
                found[int(path.stem)] = _proof(known, x)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise DataError(f"{path} is damaged ({error}): remove it, and the sample is done again") from error
        return found


def _document(proof: Proof) -> dict[str, Any]:
    """A proof for JSON, without its input; what isn't finite is None."""
    found = asdict(replace(proof, counterexample=None)) | {"bound": _known(proof.bound)}
    del found["counterexample"]
    return found


def _proof(known: dict[str, Any], x: Tensor) -> Proof:
    """A proof of one of x (N, ...) from its document. Errors: `ValueError` and others where it can't be one."""
    point, robust = known.pop("counterexample"), known["verdict"] == "robust"
    if known["bound"] is None:
        known["bound"] = math.inf if robust else -math.inf
    proof = Proof(**known, counterexample=None if point is None else torch.tensor(point).to(x).view(x.shape[1:]))
    numbers = (proof.bound, proof.parts, proof.seconds)
    sound = (
        proof.verdict in get_args(Verdict), proof.stage in STAGES, proof.bound > 0 or not robust, proof.seconds >= 0,
        all(isinstance(number, int | float) and not math.isnan(number) for number in numbers), isinstance(proof.parts, int),
        isinstance(proof.reason, str), isinstance(proof.rigorous, bool), (point is not None) == (proof.verdict == "falsified"),
        proof.counterexample is None or bool(proof.counterexample.isfinite().all()),
    )  # fmt: skip
    if not all(sound):
        raise ValueError(f"{proof.verdict} in stage {proof.stage} with bound {proof.bound}")
    return proof


def _json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or cannot be read ({error}): {remedy}") from error
    if not isinstance(found, Mapping):
        raise DataError(f"{path} is damaged: {remedy}")
    return dict(found)


def _mean(mask: Tensor) -> float:
    return float(mask.double().mean()) if len(mask) else math.nan


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
