"""How far samples are from the decision boundary: the smallest perturbations that an attack finds, and their statistics."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.attacks.minimal import MINIMAL, minimal
from saddlepoint.attacks.registry import as_attack, find
from saddlepoint.engine import Attack, AttackResult, Budget, Interrupted
from saddlepoint.engine.result import attack_name
from saddlepoint.errors import CapabilityError, DataError, InputError, UnknownNameError
from saddlepoint.goals import Goal, Targeted
from saddlepoint.models.base import Classifier
from saddlepoint.taxonomy import Norm, Status
from saddlepoint.threats import Minimize
from saddlepoint.threats import distance as length

if TYPE_CHECKING:
    import pandas as pd

PASSES = 200  # what "minimal" spends on a sample where no budget says
LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
_Z = 1.959964  # 95% of a normal distribution lie within so many standard deviations
_INPUTS, _RESULT, _DOCUMENT = "inputs.safetensors", "result", "distances.json"


@dataclass(frozen=True)
class Quantile:
    """The smallest size of change that fools at least a share `level` of the samples; inf where fewer were fooled.

    low, high: between them lies the figure for all samples of the same kind, in at least 95 of 100 draws (order statistics).
    """

    level: float
    value: float
    low: float
    high: float


@dataclass(frozen=True, repr=False)
class Distances:
    """The distance of N samples to the decision boundary, as far as an attack found it: each is an upper bound of the true one.

    x: the inputs (N, ...). result: what the attack found, in the same order. own_decision: distances are from the
    model's own answer, right or wrong, rather than from the true class. complete: False after Ctrl-C; then only the finished
    samples are there.

    Samples are in one of four groups: `wrong` from the start (distance 0), `found`, `missing` (the attack found nothing:
    distance inf, which is no statement about the boundary) and `failed` (NaN). Quantiles are of `found` and `missing`
    together, means of `found`.
    """

    x: Tensor
    result: AttackResult
    own_decision: bool = False
    complete: bool = True

    def __len__(self) -> int:
        return len(self.result)

    def __repr__(self) -> str:
        return f"Distances({self.norm}: median {self.median:.4g}, rho {self.rho:.4g} of {len(self)}; print .summary() for more)"

    @property
    def norm(self) -> Norm:
        """In which distances are measured."""
        return Norm(self.result.config["threat"]["norm"])

    @property
    def attack_name(self) -> str:
        """The attack's class with those that it is made of, and whether it is what "minimal" stands for with this budget."""
        config = self.result.config
        passes, name = config["budget"]["passes"], attack_name(config["attack"])
        is_minimal = passes is not None and _plain(minimal(self.norm, passes).settings()) == config["attack"]
        return f"{MINIMAL}: {name}" if is_minimal else name

    @property
    def values(self) -> Tensor:
        """Distance of each sample, (N,) float64: 0 where it is wrong from the start, inf where nothing was found."""
        return self.result.distance

    @property
    def sizes(self) -> Tensor:
        """||x|| of each sample in the same norm, (N,) float64."""
        return length(self.x, torch.zeros_like(self.x), self.norm).to(self.values.device)

    @property
    def relative(self) -> Tensor:
        """||r|| / ||x|| of each sample, (N,) float64; nan for inputs that are zero."""
        sizes = self.sizes
        return torch.where(sizes > 0, self.values / sizes, torch.nan)

    @property
    def wrong(self) -> Tensor:
        """Samples that the model gets wrong before any attack, (N,) bool; none for targeted goals."""
        return self.result.having(Status.ALREADY_WRONG)

    @property
    def found(self) -> Tensor:
        """Samples for which the attack found a perturbation, (N,) bool."""
        return self.result.having(Status.FOOLED)

    @property
    def missing(self) -> Tensor:
        """Samples for which the attack found none, (N,) bool."""
        return self.result.having(Status.SURVIVED)

    @property
    def failed(self) -> Tensor:
        """Samples for which the model gave NaN or infinite values, (N,) bool."""
        return self.result.having(Status.ERROR)

    @property
    def success_rate(self) -> float:
        """Share of the samples that could be attacked for which a perturbation was found."""
        return self.result.success_rate

    @property
    def mean(self) -> float:
        """Mean distance of the samples for which there is one; nan if there are none."""
        return float(self.values[self.found].mean())

    @property
    def median(self) -> float:
        """`quantile(0.5).value`."""
        return self.quantile(0.5).value

    def quantile(self, level: float) -> Quantile:
        """Of the samples that were attacked; those where nothing was found count as farther than all others.

        Errors: `InputError` for a level that is not between 0 and 1.
        """
        return quantile_of(self.values[self.found | self.missing], level)

    def quantiles(self, levels: Sequence[float] = LEVELS) -> tuple[Quantile, ...]:
        """`quantile` for each level."""
        return tuple(self.quantile(level) for level in levels)

    @property
    def rho(self) -> float:
        """Average robustness, mean ||r|| / ||x|| over the samples for which a perturbation was found; nan if there are none.

        The paper has it in l2, over all samples, and from the model's own decision (`y=None` in `distance`).
        Source: Moosavi-Dezfooli, Fawzi, Frossard 2016, "DeepFool", arXiv:1511.04599, equation 15.
        """
        return float(self._ratios().mean())

    @property
    def rho_interval(self) -> tuple[float, float]:
        """Between which rho of all samples of the same kind lies, in about 95 of 100 draws (normal approximation)."""
        ratios = self._ratios()
        if len(ratios) < 2:
            return math.nan, math.nan
        half = _Z * float(ratios.std()) / math.sqrt(len(ratios))
        return self.rho - half, self.rho + half

    def _ratios(self) -> Tensor:
        return self.relative[self.found & (self.sizes > 0)]

    def robust_accuracy(self, eps: float) -> float:
        """Share of all samples that the model gets right and for which no perturbation of size <= eps was found."""
        return self.curve([eps])[0]

    def curve(self, radii: Sequence[float]) -> list[float]:
        """`robust_accuracy` at each of these eps."""
        right = ~(self.wrong | self.failed)
        if self.result.config["goal"]["targeted"]:
            right &= (self.result.clean_predicted == self.result.labels) | (self.result.labels < 0)
        ordered = self.values[right].cpu().sort().values
        farther = len(ordered) - torch.searchsorted(ordered, torch.tensor(radii, dtype=torch.float64), right=True)
        return (farther.double() / len(self)).tolist() if len(self) else [math.nan] * len(radii)

    def closest(self, count: int) -> Tensor:
        """Rows of the samples with the smallest distances, nearest first; only of those that were `found`."""
        return self._by_distance()[:count]

    def farthest(self, count: int) -> Tensor:
        """Rows of the samples with the largest distances, farthest first; only of those that were `found`."""
        return self._by_distance().flip(0)[:count]

    def _by_distance(self) -> Tensor:
        rows = self.found.nonzero()[:, 0]
        return rows[self.values[rows].argsort(stable=True)]

    def summary(self) -> str:
        """The main figures as a table in plain text."""
        groups = {"wrong from the start": self.wrong, "found": self.found, "not found": self.missing, "failed": self.failed}
        low, high = self.rho_interval
        passes = float(self.result.queries.total.double().mean()) if len(self) else 0.0
        lines = [
            ("samples", f"{len(self)}"),
            *((name, f"{int(mask.sum())}") for name, mask in groups.items()),
            *((f"{q.level:.0%} within", f"{q.value:.4g} ({q.low:.4g} to {q.high:.4g})") for q in self.quantiles()),
            ("mean distance of found", f"{self.mean:.4g}"),
            ("rho = mean ||r||/||x||", f"{self.rho:.4g} ({low:.4g} to {high:.4g})"),
            ("passes per sample", f"{passes:.1f}"),
            ("seconds", f"{self.result.seconds:.2f}"),
        ]
        width = max(len(name) for name, _ in lines)
        title = f"{self.norm} distances found by {self.attack_name}: upper bounds of the true ones"
        notes = [f"  ! {note}" for note in self.result.notes]
        return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in lines), *notes])

    def to_pandas(self) -> pd.DataFrame:
        """One row per sample: the attack's result, with ||x|| and ||r|| / ||x||. Needs pandas."""
        return self.result.to_pandas().assign(size=self.sizes.cpu().numpy(), relative=self.relative.cpu().numpy())

    def save(self, path: str | Path) -> Path:
        """Write a folder with the inputs and the result; it appears complete or not at all."""
        path = Path(path)
        if path.exists():
            raise InputError(f"{path} exists already; remove it or choose another name")
        document = {"format": 1, "own_decision": self.own_decision, "complete": self.complete}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as draft:
                folder = Path(draft) / "distances"
                self.result.save(folder / _RESULT)
                save_file({"x": self.x.cpu().contiguous()}, folder / _INPUTS)
                (folder / _DOCUMENT).write_text(json.dumps(document, indent=1))
                os.replace(folder, path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot write the distances to {path}: {error}") from error
        return path

    @staticmethod
    def load(path: str | Path) -> Distances:
        """Read what `save` wrote. Errors: `DataError` for missing, truncated or foreign files."""
        path = Path(path)
        try:
            document: dict[str, Any] = json.loads((path / _DOCUMENT).read_text())
            x = load_file(path / _INPUTS)["x"]
            return Distances(x, AttackResult.load(path / _RESULT), document["own_decision"], document["complete"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} holds no distances saved by Saddlepoint, or it is damaged: {error!r}") from error


def distance(
    model: Classifier,
    x: Tensor,
    y: Tensor | None,
    norm: Norm | str = Norm.L2,
    attack: Attack | str = MINIMAL,
    *,
    goal: Goal | None = None,
    budget: Budget | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Distances:
    """How far each sample x (N, ...) is from the decision boundary, in `norm`, as far as an attack finds it.

    y: true classes (N,), from which samples are to be moved away; those that are wrong from the start are at distance 0. None
    takes the model's own answers instead (one more forward pass a sample), as the definition of average robustness does.
    attack: one that looks for the smallest perturbation, or its name. budget: default 200 passes a sample for "minimal", and no
    limit for others, which have a length of their own. goal, batch_size, seed, progress: as in `sp.attack`.

    Ctrl-C returns what is finished. Errors: those of `sp.attack`; `CapabilityError` for an attack that needs a ball of stated
    size; `InputError` for several targets a sample.

    >>> import torch, saddlepoint as sp
    >>> net = torch.nn.Linear(2, 2)
    >>> _ = net.load_state_dict({"weight": torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "bias": torch.zeros(2)})
    >>> found = sp.distance(sp.Model(net, bounds=(-5, 5)), torch.tensor([[1.0, 1.0]]), torch.tensor([0]), "l2")
    >>> round(float(found.values), 3)  # |3 + 4| / |(3, 4)|
    1.4
    """
    if norm not in set(Norm):
        raise UnknownNameError("norm", str(norm), [each.value for each in Norm])
    if not isinstance(x, Tensor):
        raise InputError(f"distance needs the samples as one tensor, since it puts them in order; got {type(x).__name__}")
    if isinstance(goal, Targeted) and isinstance(goal.classes, str) and goal.classes == "all":
        raise InputError("a distance needs one target a sample; the smallest over all of them is that of an untargeted goal")
    norm = Norm(norm)
    if attack == MINIMAL:
        budget = budget or Budget(passes=PASSES)
    else:
        attack = as_attack(attack)
        if not attack.declaration.minimizes:
            fitting = ", ".join([MINIMAL, *(cls.__name__ for cls in find(norm=norm, minimizes=True))])
            raise CapabilityError(
                f"{type(attack).__name__} searches a ball of stated size; a distance in {norm} needs one of {fitting} "
                "(or sp.attacks.Bisect around another attack; one of your own declares minimizes=True)"
            )
    own_decision = y is None
    if y is None and isinstance(model, Classifier):
        model.check_inputs(x)
        y = model.predict(x).to(x.device)
    try:
        result = run_attack(
            model, x, y, attack, Minimize(norm), goal, batch_size=batch_size, seed=seed, budget=budget, progress=progress
        )
    except Interrupted as stop:
        return _of(x, stop.result, own_decision, complete=False)
    return _of(x, result, own_decision, complete=True)


def _of(x: Tensor, result: AttackResult, own_decision: bool, *, complete: bool) -> Distances:
    return Distances(x[result.index.to(x.device)], result, own_decision, complete)


def _plain(settings: object) -> object:
    """As a result's configuration has them."""
    return json.loads(json.dumps(settings, default=str))


def quantile_of(values: Tensor, level: float) -> Quantile:
    """Of values (N,), with limits by order statistics; inf counts as larger than all others."""
    if not 0 < level < 1:
        raise InputError(f"level must be between 0 and 1; got {level}")
    ordered = values.sort().values.tolist()
    if not ordered:
        return Quantile(level, math.nan, math.nan, math.nan)
    first, last = _ranks(len(ordered), level)
    low = ordered[first - 1] if first else 0.0
    high = ordered[last - 1] if last <= len(ordered) else math.inf
    return Quantile(level, ordered[math.ceil(level * len(ordered) - 1e-9) - 1], low, high)


def _ranks(count: int, level: float) -> tuple[int, int]:
    """Ranks (from 1) of the order statistics that enclose a quantile in 95 of 100 draws; 0 and count + 1 stand for none.

    The number of samples below the quantile is binomial: P(it < first) <= 2.5% and P(it >= last) <= 2.5%.
    """
    k = torch.arange(count + 1, dtype=torch.float64)
    n = torch.tensor(float(count), dtype=torch.float64)
    log_choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    mass = (log_choose + k * math.log(level) + (n - k) * math.log1p(-level)).exp()
    below = mass.cumsum(0)  # P(number <= k)
    above = mass.flip(0).cumsum(0).flip(0)  # P(number >= k)
    return int((below <= 0.025).sum()), count + 1 - int((above <= 0.025).sum())
