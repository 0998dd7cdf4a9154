"""`Detector`: is this input adversarial? Fitted on clean samples, calibrated on others, and saved without running code."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, final

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from saddlepoint.defenses.recipes import named_settings
from saddlepoint.engine.source import check_labels
from saddlepoint.errors import DataError, InputError, ModelError, SaddlepointError, UnknownNameError
from saddlepoint.files import write_file
from saddlepoint.models.base import Classifier
from saddlepoint.models.fingerprint import fingerprint
from saddlepoint.models.freeze import frozen, global_random_state_kept
from saddlepoint.models.torch_model import Labelled
from saddlepoint.models.transforms import InputTransform
from saddlepoint.taxonomy import Access

Given = Tensor | Labelled | tuple[Tensor, Tensor]
DETECTORS: dict[str, type[Detector]] = {}
"""Every detector by its name, such as "kernel-density"."""

_KEY = "saddlepoint detector"


@dataclass(eq=False, kw_only=True)
class Detector(ABC):
    """Scores inputs by how adversarial they look to one model: settings, what was learnt, and a threshold.

    A subclass is a dataclass of settings with two methods, `learn` and `forward`; all else is here. It declares

    learns_attacks: whether it is fitted on adversarial examples as well; others ignore them.
    differentiable: whether attacks get gradients of its score; if not, they ask for scores.
    random: whether two calls differ. access: what it uses of the model.
    summary, reference: what it is, in a line, and where it is from.

    seed: of everything random in fitting and scoring.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str]
    reference: ClassVar[str]
    learns_attacks: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    random: ClassVar[bool] = False
    access: ClassVar[Access] = Access.GRADIENTS

    seed: int = 0

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "summary" in vars(cls):  # a base in between has none
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()
            DETECTORS[cls.name] = cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_number(type(self).__name__, field.name, str(field.type), getattr(self, field.name))
        self._model: Classifier | None = None
        self._shape = torch.Size()
        self._arrays: dict[str, Tensor] = {}
        self._seen = torch.empty(0, dtype=torch.int64)
        self._calibration: _Calibration | None = None

    # ---- what a subclass implements

    @abstractmethod
    def learn(self, clean: Tensor, labels: Tensor, adversarial: Tensor | None) -> Mapping[str, Tensor]:
        """All that is learnt, as named arrays, the weights of networks among them.

        clean: (N, ...) with labels (N,); adversarial: (M, ...), not in pairs. The model is `self.model`, in eval mode. torch's
        global random numbers are seeded.
        """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Scores (N,) of inputs (N, ...), higher for what looks more adversarial, from `self.model` and `self.arrays`."""

    def restore(self) -> None:  # noqa: B027  # most have nothing to make
        """Make what `forward` needs besides the arrays, such as networks; after fitting and loading."""

    def networks(self) -> tuple[nn.Module, ...]:
        """The detector's own networks, which runs freeze."""
        return ()

    def check_access(self, model: Classifier) -> None:
        """Raise `CapabilityError` where the model doesn't grant what the detector uses."""
        model.require(self.access, type(self).__name__)

    # ---- what it knows

    @property
    @final
    def model(self) -> Classifier:
        """The model that it was fitted for. Errors: `InputError` before."""
        if self._model is None:
            raise InputError(f"this {type(self).__name__} is not fitted: call fit(model, clean) first")
        return self._model

    @property
    @final
    def arrays(self) -> Mapping[str, Tensor]:
        """What was learnt, on the model's device."""
        return self._arrays

    @property
    @final
    def fitted(self) -> bool:
        """Whether it can score."""
        return self._model is not None

    @property
    @final
    def calibrated(self) -> bool:
        """Whether it can decide."""
        return self._calibration is not None

    @final
    def settings(self) -> dict[str, Any]:
        """Name and settings, ready for JSON."""
        return _plain(self)  # type: ignore[no-any-return]  # a dataclass gives a dictionary

    # ---- fitting

    @final
    def fit(self, model: Classifier, clean: Given, adversarial: Given | None = None) -> Self:
        """Learn what clean inputs of this model look like, and what adversarial ones do if it `learns_attacks`.

        clean: inputs (N, ...), or samples with labels such as `data.train`; without labels the model's predictions serve.
        adversarial: (M, ...), such as `result.adversarial[result.success]`. Returns the detector itself.
        Errors: `InputError`, `CapabilityError` where the model doesn't grant what is needed.
        """
        if not isinstance(model, Classifier):
            raise InputError(f"model must be a Saddlepoint model: sp.Model(net, ...); got {type(model).__name__}")
        self.check_access(model)
        x, y = inputs_and_labels(clean, "clean")
        model.check_inputs(x)
        if len(x) < 2:
            raise InputError(f"fitting needs at least two clean samples; got {len(x)}")
        if model.rejects:
            raise InputError("the model has a detector already: fit on guarded.model, or combine detectors, AnyOf(parts=...)")
        try:
            classes = model.probe(x).num_classes
            model.predict(x[:1])  # the probe may be of other inputs
        except (SaddlepointError, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever the user's network raises
            raise ModelError(f"the network fails on inputs of shape {tuple(x.shape)}: {error}") from error
        bad = None
        if adversarial is not None:
            bad = inputs_and_labels(adversarial, "adversarial")[0]
            model.check_inputs(bad)
            if bad.shape[1:] != x.shape[1:]:
                raise InputError(f"adversarial inputs have shape {tuple(bad.shape[1:])}, clean ones {tuple(x.shape[1:])}")
        if self.learns_attacks and (bad is None or len(bad) < 2):
            raise InputError(
                f"{type(self).__name__} learns from adversarial examples too, at least two: fit(model, clean, "
                "result.adversarial[result.success])"
            )
        before = self._model, self._arrays
        y = model.predict(x) if y is None else check_labels(y, len(x), classes).to(model.device)
        try:
            self._model, self._arrays = model, {}
            with model.frozen(), global_random_state_kept():
                torch.manual_seed(self.seed)
                bad = bad.to(model.device) if bad is not None and self.learns_attacks else None
                learnt = self.learn(x.to(model.device), y, bad)
            self.attach(model, learnt)
        except BaseException:
            self._model, self._arrays = before
            raise
        self._shape = x.shape[1:]
        self._seen = torch.cat([row_fingerprints(part) for part in (x, bad) if part is not None])
        self._calibration = None
        return self

    @final
    def attach(self, model: Classifier, learnt: Mapping[str, Tensor]) -> None:
        """Take on what `learn` gave for this model, now or earlier."""
        self._model = model
        # contiguous, as files give them: another layout is multiplied with other rounding
        for name, array in learnt.items():
            if not isinstance(array, Tensor):
                raise ModelError(f"{type(self).__name__}.learn must give tensors; {name!r} is {type(array).__name__}")
        self._arrays = {name: array.detach().to(model.device).contiguous() for name, array in learnt.items()}
        with global_random_state_kept():  # new networks draw weights, before they get the learnt ones
            self.restore()

    @final
    def over(self, function: Callable[[Tensor], Tensor], x: Tensor, batch_size: int = 256) -> Tensor:
        """function(x) in batches, without gradients, joined."""
        with torch.no_grad():
            return torch.cat([function(part.to(self.model.device)) for part in torch.split(x, batch_size)])

    # ---- scoring

    @final
    def frozen(self) -> Any:  # Any: contextlib's own type
        """The model's and the detector's networks in eval mode."""
        return frozen((*self.model.networks(), *self.networks()))

    @final
    def score(self, x: Tensor, *, batch_size: int = 256) -> Tensor:
        """Scores (N,) of inputs (N, ...): the higher, the more adversarial they look. No gradients; `forward` has them.

        Errors: `InputError` for inputs that the model doesn't take, `ModelError` where a score is NaN.
        """
        self.model.check_inputs(x)
        if x.shape[1:] != self._shape:
            raise InputError(f"inputs have shape {tuple(x.shape[1:])}; this detector was fitted on {tuple(self._shape)}")
        if not len(x):
            return torch.empty(0, device=self.model.device)
        with self.frozen(), global_random_state_kept():
            torch.manual_seed(self.seed)
            scores = self.over(self._scored, x, batch_size)
        if bool(scores.isnan().any()):
            raise ModelError(f"{type(self).__name__} gives NaN for {int(scores.isnan().sum())} of {len(x)} inputs")
        return scores

    @final
    def _scored(self, x: Tensor) -> Tensor:
        scores = self.forward(x)
        if not isinstance(scores, Tensor) or scores.shape != (len(x),):
            found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ModelError(f"{type(self).__name__}.forward must give one score an input, ({len(x)},); got {found}")
        return scores

    @final
    def calibrate(self, clean: Given, fpr: float = 0.05) -> Self:
        """Choose the threshold on clean inputs that were not fitted on: of new ones, at most `fpr` are then called adversarial.

        It is the ceil((n + 1) (1 - fpr))-th smallest of the n scores, with which that holds on average for any distribution
        (split conformal prediction, Vovk et al. 2005). Returns the detector itself.
        Errors: `InputError` for samples that it was fitted on, and where n + 1 < 1 / fpr, for then no threshold would do.
        """
        check_rate(fpr)
        x, _ = inputs_and_labels(clean, "clean")
        self.check_unseen(x, "calibration")
        rank = math.ceil((len(x) + 1) * (1 - fpr))
        if rank > len(x):
            raise InputError(f"a false-positive rate of {fpr:g} takes at least {math.ceil(1 / fpr) - 1} samples; got {len(x)}")
        scores = self.score(x).double().sort().values.cpu()
        typical = 1.0
        if self.model.access >= Access.SCORES:
            best = self.model.logits(x).topk(2, dim=1).values
            typical = max(float((best[:, 0] - best[:, 1]).double().median()), torch.finfo(torch.float32).tiny)
        self._calibration = _Calibration(scores, fpr, typical)
        return self

    @final
    def check_unseen(self, x: Tensor, what: str) -> None:
        """Raise `InputError` if a row of x was fitted on: figures on such samples would flatter."""
        again = int(torch.isin(row_fingerprints(x), self._seen).sum())
        if self.fitted and again:
            raise InputError(
                f"{again} of the {len(x)} {what} samples are among those that this {type(self).__name__} was fitted on: "
                "take other ones"
            )

    @property
    @final
    def _calibrated(self) -> _Calibration:
        if self._calibration is None:
            raise InputError(f"this {type(self).__name__} has no threshold yet: call calibrate(clean, fpr=0.05) first")
        return self._calibration

    @property
    @final
    def threshold(self) -> float:
        """Above it, an input is called adversarial. Errors: `InputError` before `calibrate`."""
        return self.threshold_at(self._calibrated.fpr)

    @final
    def threshold_at(self, fpr: float) -> float:
        """The threshold for another false-positive rate, from the same calibration samples."""
        scores = self._calibrated.scores
        rank = math.ceil((len(scores) + 1) * (1 - fpr))
        return float(scores[rank - 1]) if rank <= len(scores) else math.inf

    @property
    @final
    def spread(self) -> float:
        """The clean scores' 95th percentile less their median: the unit in which combinations and attacks measure."""
        scores = self._calibrated.scores
        wide = float(scores.quantile(0.95) - scores.median())
        return wide if wide > 0 else max(float(scores.std(correction=0)), 1e-6)

    @property
    @final
    def typical_margin(self) -> float:
        """Median margin in logits between the model's first and second class on the calibration samples."""
        return self._calibrated.margin

    @final
    def predict(self, x: Tensor) -> Tensor:
        """Which inputs (N, ...) look adversarial: score > threshold, (N,) bool."""
        return self.score(x) > self.threshold

    @final
    def p_value(self, x: Tensor) -> Tensor:
        """How usual scores as high are among clean inputs: (1 + how many calibration scores are as high) / (n + 1), (N,)."""
        scores = self._calibrated.scores
        found = self.score(x).double().cpu()
        lower = torch.searchsorted(scores, found, right=False)
        return (1 + len(scores) - lower).double() / (len(scores) + 1)

    @final
    def guard(self, model: Classifier) -> Classifier:
        """The model, which rejects what this detector calls adversarial: `Guarded(model, self)`."""
        from saddlepoint.detectors.guarded import Guarded

        return Guarded(model, self)

    # ---- files

    @final
    def save(self, path: str | Path) -> None:
        """Write settings, arrays, calibration and fingerprints of the fitting samples as safetensors, atomically.

        Errors: `DataError` if that can't be done, `InputError` before `fit`.
        """
        path = Path(path).expanduser()
        if path.suffix != ".safetensors":
            raise DataError(f"{path}: detectors are written as safetensors; end the name in .safetensors")
        head: dict[str, Any] = {"settings": self.settings(), "model": self.model.describe(), "version": 1}
        head |= {"fingerprint": fingerprint(self.model), "shape": list(self._shape)}
        content = {f"learnt.{name}": array.cpu().clone().contiguous() for name, array in self.arrays.items()}
        content["seen"] = self._seen
        if self._calibration is not None:
            content["calibration"] = self._calibration.scores
            head |= {"fpr": self._calibration.fpr, "margin": self._calibration.margin}
        try:
            write_file(path, safetensors.torch.save(content, {_KEY: json.dumps(head, default=str)}))
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error})") from error


@dataclass(frozen=True)
class _Calibration:
    """Sorted scores of clean samples (n,) float64, the rate that was asked for, and the model's typical margin on them."""

    scores: Tensor
    fpr: float
    margin: float


def load(path: str | Path, model: Classifier) -> Detector:
    """A detector from its file, for the model that it was fitted for. No code is run.

    Errors: `DataError` for files that are missing, truncated or something else, and for models of another description.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            head = json.loads((file.metadata() or {})[_KEY])
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
        detector = _revived(head["settings"])
        if not isinstance(detector, Detector):
            raise TypeError("no detector's settings")
        seen = content["seen"]
    except SaddlepointError:
        raise
    except Exception as error:  # corrupt bytes make the reader raise whatever it stumbles over
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{path}: not a saved detector, or truncated ({reason})") from error
    if not isinstance(model, Classifier):
        raise InputError(f"model must be the Saddlepoint model that the detector was fitted for; got {type(model).__name__}")
    if fingerprint(model) != head["fingerprint"]:
        raise DataError(
            f"{path}: fitted for another model, or before its weights changed: {json.dumps(head['model'])[:160]}; fit it again"
        )
    detector._seen, detector._shape = seen, torch.Size(head["shape"])
    detector.attach(
        model, {name.removeprefix("learnt."): array for name, array in content.items() if name.startswith("learnt.")}
    )
    if "calibration" in content:
        detector._calibration = _Calibration(content["calibration"], head["fpr"], head["margin"])
    return detector


def check_rate(fpr: float) -> None:
    """Raise `InputError` unless it is a rate between 0 and 1."""
    if not isinstance(fpr, int | float) or not 0 < fpr < 1:
        raise InputError(f"fpr must be a number in (0, 1); got {fpr!r}")


def make(text: str) -> Detector:
    """A detector by name, with settings: `kernel-density:bandwidth=1.2`, lists with plus signs: `any-of:parts=energy+entropy`.

    Errors: `UnknownNameError`, `InputError`.

    >>> import saddlepoint as sp
    >>> sp.detectors.make("kernel-density:bandwidth=0.5").bandwidth
    0.5
    """
    name, settings = named_settings(text)
    if name not in DETECTORS:
        raise UnknownNameError("detector", name, DETECTORS)
    known = [field.name for field in dataclasses.fields(DETECTORS[name])]
    for key in settings:
        if key not in known:
            raise UnknownNameError(f"setting of {name}", key, known)
    hints = {field.name: str(field.type) for field in dataclasses.fields(DETECTORS[name])}
    lists = {key: tuple(str(value).split("+")) for key, value in settings.items() if "tuple" in hints[key]}
    return DETECTORS[name](**settings | lists)


def _check_number(owner: str, name: str, hint: str, value: object) -> None:
    """Raise `InputError` for a setting that must be a number (or None, where the hint says so), and isn't."""
    kinds = {kind.strip() for kind in hint.split("|")}
    if not kinds <= {"int", "float", "None"}:
        return
    number = isinstance(value, int if kinds <= {"int", "None"} else int | float) and not isinstance(value, bool)
    if not number and not (value is None and "None" in kinds):
        what = "a whole number" if kinds <= {"int", "None"} else "a number"
        raise InputError(f"{owner}'s {name} must be {what}{' or None' if 'None' in kinds else ''}; got {value!r}")


def row_fingerprints(x: Tensor) -> Tensor:
    """A number for each row's contents (N,) int64; equal rows have equal ones, others differ but for one pair in 2^63."""
    bits = x.detach().cpu().float().flatten(1).contiguous().view(torch.int32).long()
    factors = torch.randint(-(2**62), 2**62, (bits.shape[1],), generator=torch.Generator().manual_seed(0)) | 1
    mixed = torch.zeros(len(bits), dtype=torch.int64)
    for start in range(0, bits.shape[1], 4096):
        part = bits[:, start : start + 4096] * factors[start : start + 4096]
        mixed += (part ^ (part >> 29)).sum(1)
    return mixed


def inputs_and_labels(given: Given, name: str) -> tuple[Tensor, Tensor | None]:
    """Inputs, and labels if there are some."""
    if isinstance(given, Tensor):
        return given, None
    pair = tuple(given) if isinstance(given, tuple | list) else (getattr(given, "x", None), getattr(given, "y", None))
    x, y = pair if len(pair) == 2 else (None, None)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise InputError(
            f"{name} must be inputs (N, ...), a pair of inputs and labels, or have .x and .y; got {type(given).__name__}"
        )
    if y.shape != (len(x),):
        raise InputError(f"{name} has {len(x)} inputs, and labels of shape {tuple(y.shape)}: one is needed for each")
    return x, y


def _plain(value: Any) -> Any:  # Any: JSON
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"is": type(value).__name__} | {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _revived(value: Any) -> Any:  # Any: JSON, and settings
    if isinstance(value, dict):
        found = {cls.__name__: cls for cls in (*DETECTORS.values(), *_subclasses(InputTransform))}
        if value.get("is") not in found:
            raise UnknownNameError("detector or transformation", str(value.get("is")), found)
        return found[value["is"]](**{key: _revived(item) for key, item in value.items() if key != "is"})
    return tuple(_revived(item) for item in value) if isinstance(value, list) else value


def _subclasses(cls: type) -> list[type]:
    own: list[type] = cls.__subclasses__()
    return own + [found for sub in own for found in _subclasses(sub)]
