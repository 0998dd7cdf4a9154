"""CERTIFY of randomised smoothing: l2 balls in which the most frequent class under noise can't change.

g(x) = argmax_c P(f(x + sigma e) = c) is c_A within |delta|_2 < R = sigma Phi^-1(p_A) where class c_A has probability p_A > 1/2
at least: by the Neyman-Pearson lemma the worst f is a half space. p_A is known only by sampling, so that each certificate is
false with probability alpha at most, for each image by itself: of 1,000 images at alpha = 0.001 one may be.

Source: Cohen, Rosenfeld & Kolter 2019, "Certified adversarial robustness via randomized smoothing", arXiv:1902.02918, theorem 1
and section 3.2.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from saddlepoint.defenses.classifiers import ABSTAINS, Smoothed
from saddlepoint.defenses.loop import Precision
from saddlepoint.engine.source import check_labels
from saddlepoint.engine.source import fingerprint as data_fingerprint
from saddlepoint.errors import DataError, InputError
from saddlepoint.files import write_file
from saddlepoint.models.fingerprint import fingerprint
from saddlepoint.progress import bar

_SAVE_SECONDS = 60.0


def lower_confidence_bound(successes: Tensor, samples: int, alpha: float) -> Tensor:
    """The p that a binomial probability exceeds with confidence 1 - alpha (one-sided, Clopper & Pearson 1934), float64.

    P(Binomial(samples, p) >= successes) = alpha, which is the alpha quantile of Beta(successes, samples - successes + 1).

    >>> import torch
    >>> round(float(lower_confidence_bound(torch.tensor([100_000]), 100_000, 0.001)[0]), 7)
    0.9999309
    """
    from scipy.stats import beta

    counted = successes.cpu().double().numpy()
    found = torch.from_numpy(beta.ppf(alpha, counted, samples - counted + 1))
    return torch.where(successes.cpu() > 0, found, 0.0)


def certified_radius(p: Tensor, sigma: float) -> Tensor:
    """R = sigma Phi^-1(p) where p > 1/2, otherwise 0; float64. p: a lower bound of the top class's probability."""
    quantile: Tensor = torch.special.ndtri(p.double().clamp(min=0.5))
    return sigma * quantile


@final
@dataclass(frozen=True, eq=False)
class Certificates:
    """What `certify` found for each of N images.

    prediction: the class, or `ABSTAINS` (-1). radius: in l2, in the units of x; 0 where it abstains. p: lower bound of the
    class's probability under noise. selection, estimation: votes (N, C) of the n0 samples that chose the class and of the n
    others that bounded p. labels: what was given as y. seconds: in all. complete: False if Ctrl-C cut it short; then the first
    images are here.
    """

    prediction: Tensor
    radius: Tensor
    p: Tensor
    selection: Tensor
    estimation: Tensor
    labels: Tensor | None
    sigma: float
    n0: int
    n: int
    alpha: float
    seed: int
    seconds: float
    complete: bool = True

    def __len__(self) -> int:
        return len(self.prediction)

    @property
    def abstained(self) -> Tensor:
        """Where there is no answer, (N,)."""
        return self.prediction == ABSTAINS

    def certified(self, radius: float) -> Tensor:
        """Where the answer is right and stays so within this l2 radius, (N,); an abstention never is. Needs labels."""
        return certified_at(radius, self.prediction, self.radius, self._labels)

    def certified_accuracy(self, radii: Sequence[float]) -> list[float]:
        """The share of images that are `certified`, at each radius. Needs labels."""
        return [float(self.certified(radius).double().mean()) for radius in radii]

    def curve(self) -> tuple[Tensor, Tensor]:
        """Certified accuracy as the step function that it is: the radii where it falls, ascending, and its value up to each."""
        right = self.radius[self.certified(0.0)].sort().values
        return right, torch.arange(len(right), 0, -1, dtype=torch.float64) / len(self)

    @property
    def mean_radius(self) -> float:
        """The mean radius, 0 where the answer is wrong: the area under the curve. Needs labels."""
        return float(torch.where(self.certified(0.0), self.radius, 0.0).mean())

    @property
    def _labels(self) -> Tensor:
        if self.labels is None:
            raise InputError("whether an answer is right takes labels: certify(smoothed, x, y)")
        return self.labels

    def summary(self, radii: Sequence[float] | None = None) -> str:
        """Certified accuracy at some radii, by default quarters of the largest that is possible, in plain text."""
        if not len(self):
            return f"smoothing of 0 samples: sigma {self.sigma:g}"
        if radii is None:
            all_votes = torch.tensor([self.n])
            most = float(certified_radius(lower_confidence_bound(all_votes, self.n, self.alpha), self.sigma)[0])
            radii = [most * quarter / 4 for quarter in range(4)]
        lines = [
            f"smoothing of {len(self)} samples: sigma {self.sigma:g}; for each {self.n:,} votes, alpha {self.alpha:g}",
            f"  abstained            {float(self.abstained.double().mean()):.2%}, which counts as wrong",
            *(f"  within l2 {radius:<9.4g}  {share:.2%} proved" for radius, share in
              zip(radii, self.certified_accuracy(radii), strict=True)),
            f"  mean radius          {self.mean_radius:.4g}",
            f"  seconds              {self.seconds:.1f}",
        ]  # fmt: skip
        return "\n".join(lines if self.complete else [*lines, "  ! interrupted: later samples are missing"])

    def document(self) -> dict[str, object]:
        """Ready for JSON."""
        tensors = {"prediction": self.prediction, "radius": self.radius, "p": self.p, "label": self.labels}
        numbers = {name: getattr(self, name) for name in ("sigma", "n0", "n", "alpha", "seed", "seconds", "complete")}
        return {**numbers, **{name: value.tolist() for name, value in tensors.items() if value is not None}}


def certified_at(least: float, prediction: Tensor, radius: Tensor, y: Tensor) -> Tensor:
    """Where the prediction is y and the radius at least `least`, (N,). Abstaining (-1) is never right."""
    return (prediction == y) & (prediction != ABSTAINS) & (radius >= least)


def certify(
    model: Smoothed,
    x: Tensor,
    y: Tensor | None = None,
    *,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int = 256,
    precision: Precision = "float32",
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Certificates:
    """The class of a smoothed model for each image, and the l2 radius within which it is proved; or an abstention.

        c = the most frequent class among n0 samples;  k = how often c is given among n others, independent of them
        p = the Clopper-Pearson lower bound of k / n at confidence 1 - alpha;  p > 1/2: (c, sigma Phi^-1(p)), otherwise ABSTAINS

    What is proved is proved of g, which can only be sampled: use `predict_or_abstain` with it, not single votes of `forward`.
    The guarantee is for exact Gaussians and real arithmetic, as everybody's (Voracek & Hein 2023, arXiv:2207.07209, on what
    floats can do to it); noise here has 23 random bits a number, 37 in the tails, and is within 6.9 sigma.

    x (N, ...), y (N,): images within the model's bounds, and their classes. n0, n, alpha: the paper's. alpha is for each image.
    seed, ids (N,): of the noise, which is the same whatever the batches are; ids are positions by default. batch_size: passes
    at a time. precision: "bfloat16" is faster on GPUs and certifies the model in that precision; predict in it too.
    checkpoint: a file that is written every minute and at the end; if it exists, the run goes on from there. n can't be raised
    by it: to look at the result and draw more would be another test.

    Ctrl-C gives back the images that are finished (`complete` False). Errors: `InputError`; `DataError` for a checkpoint of
    another run or a damaged one.

    >>> import torch, saddlepoint as sp
    >>> from saddlepoint.verify.smoothing import certify
    >>> linear = torch.nn.Linear(1, 2)
    >>> _ = linear.load_state_dict({"weight": torch.tensor([[-1.0], [1.0]]), "bias": torch.zeros(2)})
    >>> smoothed = sp.defenses.Smoothed(sp.Model(linear, bounds=None), sigma=0.5)
    >>> found = certify(smoothed, torch.tensor([[0.5], [0.0]]), torch.tensor([1, 1]), n=10_000)
    >>> found.prediction.tolist(), 0.45 < float(found.radius[0]) < 0.5, found.certified_accuracy([0, 0.45, 0.5])
    ([1, -1], True, [0.5, 0.5, 0.0])
    """
    if not isinstance(model, Smoothed):
        raise InputError(f"certify is for a smoothed model, sp.defenses.Smoothed(model, sigma); got {type(model).__name__}")
    if n0 < 1 or n < 1 or not 0 < alpha < 1:
        raise InputError(f"n0 and n must be at least 1 and alpha in (0, 1); got {n0}, {n} and {alpha}")
    model.check_inputs(x)
    counts = model.no_votes(x, 2)
    labels = None if y is None else check_labels(y, len(x), counts.shape[2]).cpu()
    done, seconds, complete = 0, 0.0, True
    file = None
    if checkpoint is not None:
        named = None if ids is None else ids.tolist()
        settings = {"sigma": model.sigma, "n0": n0, "n": n, "alpha": alpha, "seed": seed, "ids": named, "precision": precision}
        file = _Checkpoint(Path(checkpoint), {"model": fingerprint(model), "data": data_fingerprint(x, labels), **settings})
        done, seconds = file.load(counts)
    began = saved = time.monotonic()
    copies = model.tally(x, counts, (n0, n), seed=seed, ids=ids, start=done, batch_size=batch_size, precision=precision)
    try:
        with bar("certify", len(x) * (n0 + n), show=progress) as report:
            for done in copies:
                report(done)
                if file is not None and time.monotonic() - saved > _SAVE_SECONDS:
                    saved = time.monotonic()
                    file.save(counts, done, seconds + saved - began)
    except KeyboardInterrupt:  # the file stays as it was: votes of a batch that was cut off may be counted already
        complete = False
    seconds += time.monotonic() - began
    if file is not None and complete:
        file.save(counts, done, seconds)
    finished = done // (n0 + n)
    selection, estimation = counts[:finished].cpu().unbind(1)
    chosen = selection.argmax(1)
    p = lower_confidence_bound(estimation.gather(1, chosen[:, None])[:, 0], n, alpha)
    prediction = torch.where(p > 0.5, model.answered(chosen), ABSTAINS)
    radius = torch.where(prediction == ABSTAINS, 0.0, certified_radius(p, model.sigma))
    return Certificates(
        prediction=prediction, radius=radius, p=p, selection=selection, estimation=estimation,
        labels=None if labels is None else labels[:finished],
        sigma=model.sigma, n0=n0, n=n, alpha=alpha, seed=seed, seconds=seconds, complete=complete,
    )  # fmt: skip


@final
class _Checkpoint:
    """Votes in a file, of a run that is known by its settings."""

    def __init__(self, path: Path, settings: dict[str, object]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))

    def load(self, counts: Tensor) -> tuple[int, float]:
        """Put the votes into `counts`; how many copies are done, and in how many seconds. (0, 0) where there is no file."""
        if not self.path.exists():
            return 0, 0.0
        try:
            found = json.loads(self.path.read_bytes())
            if differing := [name for name, value in self.settings.items() if found["settings"].get(name) != value]:
                raise DataError(f"{self.path} is of another run, which differs in {', '.join(differing)}: take another file")
            votes = torch.tensor(found["counts"], dtype=counts.dtype).view_as(counts)
            done, seconds = int(found["done"]), float(found["seconds"])
            n0, n = self.settings["n0"], self.settings["n"]
            copies = (done - torch.arange(len(votes)) * (n0 + n)).clamp(0, n0 + n)  # of each image
            most = torch.stack([copies.clamp(max=n0), (copies - n0).clamp(min=0)], 1)
            if not 0 <= done <= len(votes) * (n0 + n) or bool((votes < 0).any() or (votes.sum(2).cpu() > most).any()):
                raise ValueError(f"no such votes can be there after {done} copies")
        except DataError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise DataError(f"{self.path} is damaged or no checkpoint of certify ({error!r}): delete it") from error
        counts.copy_(votes)
        return done, seconds

    def save(self, counts: Tensor, done: int, seconds: float) -> None:
        """Replace the file."""
        document = {"settings": self.settings, "done": done, "seconds": seconds, "counts": counts.tolist()}
        try:
            write_file(self.path, json.dumps(document).encode())
        except OSError as error:
            raise DataError(f"cannot write the checkpoint {self.path}: {error}") from error
