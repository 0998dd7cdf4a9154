"""Classifiers that were meant to be robust by their form: radial units, prototypes, neighbours, Gaussian processes, votes.

Heads are modules that `sp.train` trains; what holds a data set or votes is a `Classifier` made from a model. None is robust by
itself: attack them like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from saddlepoint.defenses.loop import Precision
from saddlepoint.defenses.objectives import Batch, Objective
from saddlepoint.errors import InputError, UnknownNameError
from saddlepoint.models.base import Classifier
from saddlepoint.models.transforms import Transform
from saddlepoint.rng import Keys

__all__ = [
    "ABSTAINS", "RBF", "GaussianProcessHead", "GradientMasked", "NearestNeighbours", "PrototypeLoss", "Prototypes", "Smoothed",
]  # fmt: skip

ABSTAINS = -1  # in place of a class


@final
class RBF(nn.Module):
    """The shallow network of one radial unit for each class, which states little confidence away from what it knows.

    p_c(x) = exp(-d_c(x)),  d_c(x) = sum_i beta_ci (x_i - mu_ci)^2;  logit_c = log p_c / (1 - p_c)

    So the probabilities are sigmoid(logits), one for each class, and may all be small: `probabilities`. beta = exp(rates).
    Inputs (N, ...) are flattened. `begin` puts the centres where the data are.
    Source: Goodfellow, Shlens & Szegedy 2015, arXiv:1412.6572, section 7.
    """

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        if features < 1 or num_classes < 2:
            raise InputError(f"features must be at least 1 and num_classes at least 2; got {features} and {num_classes}")
        self.centres = nn.Parameter(torch.full((num_classes, features), 0.5))
        self.rates = nn.Parameter(torch.full((num_classes, features), -math.log(features)))

    @torch.no_grad()
    def begin(self, x: Tensor, y: Tensor) -> RBF:
        """Centres at the class means; widths so that d is log 2 for a class's samples on average. Gives itself back."""
        for label in range(len(self.centres)):
            own = x[y == label].flatten(1).to(self.centres)
            if not len(own):
                raise InputError(f"class {label} has no sample to begin with")
            self.centres[label] = own.mean(0)
            spread = (own - self.centres[label]).square().sum(1).mean().clamp(min=1e-6)
            self.rates[label] = torch.log(math.log(2) / spread)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C)."""
        beta = self.rates.exp()
        flat = x.flatten(1)
        away = flat.square() @ beta.T - 2 * flat @ (beta * self.centres).T + (beta * self.centres.square()).sum(1)
        away = away.clamp(min=1e-6)  # by rounding it can be below 0
        return -away - torch.log(-torch.expm1(-away))

    def probabilities(self, x: Tensor) -> Tensor:
        """exp(-d_c), (N, C), which needn't sum to 1."""
        return self.forward(x).sigmoid()


@final
class Prototypes(nn.Module):
    """Classes by the distance of features to learnt prototypes, some for each class.

    p(c | x) = sum_j exp(-gamma |f(x) - m_cj|^2) / sum_kj exp(-gamma |f(x) - m_kj|^2);  logit_c = log of the numerator

    With these logits the usual cross-entropy is the paper's distance-based one; `PrototypeLoss` adds its regulariser.
    features: the module f, (N, ...) -> (N, width), also of higher rank, which is flattened.
    Source: Yang et al. 2018, "Robust classification with convolutional prototype learning", arXiv:1805.03438, eq. 7.
    """

    def __init__(
        self, features: nn.Module, width: int, num_classes: int, *, per_class: int = 1, gamma: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__()
        if width < 1 or num_classes < 2 or per_class < 1 or not gamma > 0:
            raise InputError(
                "width and per_class must be at least 1, num_classes at least 2 and gamma positive; "
                f"got {width}, {per_class}, {num_classes} and {gamma}"
            )
        self.features, self.gamma = features, gamma
        drawn = torch.randn(num_classes, per_class, width, generator=torch.Generator().manual_seed(seed))
        self.prototypes = nn.Parameter(drawn / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C)."""
        found = self.features(x).flatten(1)
        away = (found[:, None, None] - self.prototypes).square().sum(3)  # (N, C, per_class)
        return torch.logsumexp(-self.gamma * away, 2)

    def extra_repr(self) -> str:
        """Its setting that is no parameter."""
        return f"gamma={self.gamma}"


@final
@dataclass(frozen=True, kw_only=True)
class PrototypeLoss(Objective):
    """Cross-entropy + weight * |f(x) - m_y|^2, which draws features to their prototype, for `Prototypes`.

    The distance is read off the logit, -logit_y / gamma; with several prototypes it is the soft minimum. gamma: the network's.
    Source: Yang et al. 2018, arXiv:1805.03438, eq. 13 (weight 0.001 to 0.1).
    """

    weight: float = 0.01
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not self.weight >= 0 or not self.gamma > 0:
            raise InputError(f"weight must be >= 0 and gamma positive; got {self.weight} and {self.gamma}")

    def loss(self, batch: Batch) -> Tensor:
        logits = batch.model.forward(batch.x)
        own = logits.gather(1, batch.y[:, None])
        return functional.cross_entropy(logits, batch.y) - self.weight * own.mean() / self.gamma

    def settings(self) -> dict[str, object]:
        return {"name": "PrototypeLoss", "weight": self.weight, "gamma": self.gamma}


@final
class GaussianProcessHead(nn.Module):
    """A Gaussian process on features, by random Fourier features and a Laplace approximation of the weights' posterior.

    phi(h) = sqrt(2 / D) cos(W h / scale + b), W ~ N(0, I), b ~ U(0, 2 pi): phi(h) . phi(h') ~ exp(-|h - h'|^2 / (2 scale^2))
    logits m = beta phi + bias;  after `fit`: variance v_c = phi^T (ridge I + sum_i p_ic (1 - p_ic) phi_i phi_i^T)^-1 phi,
    and the logits become m_c / sqrt(1 + pi v_c / 8), which fade where there was no data.

    features: the module that gives h, (N, ...) -> (N, width). `sp.train` trains beta and the features by cross-entropy before
    `fit`, which they need anew after another training; in train mode the logits are m. fourier: D, 1024 in the paper. ridge: 1.
    SNGP also bounds the features' spectral norms: torch.nn.utils.parametrizations.spectral_norm.
    Sources: Liu et al. 2020, "Simple and principled uncertainty estimation" (SNGP), arXiv:2006.10108, eq. 7 to 9; Rahimi &
    Recht 2007; as a defense Bradshaw, Matthews & Ghahramani 2017, arXiv:1707.02476.
    """

    covariance: Tensor
    weight: Tensor
    phase: Tensor

    def __init__(
        self, features: nn.Module, width: int, num_classes: int, *,
        fourier: int = 1024, scale: float = 1.0, ridge: float = 1.0, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if width < 1 or num_classes < 2 or fourier < 1 or not scale > 0 or not ridge > 0:
            raise InputError(
                "width and fourier must be at least 1, num_classes at least 2, scale and ridge positive; "
                f"got {width}, {fourier}, {num_classes}, {scale} and {ridge}"
            )
        generator = torch.Generator().manual_seed(seed)
        self.features, self.scale, self.ridge = features, scale, ridge
        self.register_buffer("weight", torch.randn(fourier, width, generator=generator))
        self.register_buffer("phase", 2 * math.pi * torch.rand(fourier, generator=generator))
        self.register_buffer("covariance", torch.zeros(num_classes, 0, 0))  # empty before `fit`
        self.beta, self.bias = nn.Parameter(torch.zeros(num_classes, fourier)), nn.Parameter(torch.zeros(num_classes))

    def fourier(self, x: Tensor) -> Tensor:
        """phi of the features of x, (N, D)."""
        angles = functional.linear(self.features(x).flatten(1) / self.scale, self.weight, self.phase)
        return math.sqrt(2 / len(self.phase)) * torch.cos(angles)

    def variance(self, x: Tensor) -> Tensor:
        """The posterior variance of each logit, (N, C). Errors: `InputError` before `fit`."""
        if not self.covariance.numel():
            raise InputError("there is no variance yet: call fit(x) with the training inputs")
        return self._variance(self.fourier(x))

    def _variance(self, phi: Tensor) -> Tensor:
        return torch.einsum("nd,cde,ne->nc", phi, self.covariance, phi)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C)."""
        phi = self.fourier(x)
        logits = functional.linear(phi, self.beta, self.bias)
        if self.training or not self.covariance.numel():
            return logits
        return logits / torch.sqrt(1 + math.pi / 8 * self._variance(phi))

    @torch.no_grad()
    def fit(self, x: Tensor, *, batch_size: int = 256) -> GaussianProcessHead:
        """The covariance from the training inputs (N, ...), in the mode that the network is in. Gives itself back."""
        size = len(self.phase)
        precision = self.ridge * torch.eye(size, dtype=torch.float64, device=self.beta.device).repeat(len(self.beta), 1, 1)
        for part in torch.split(x.to(self.beta), batch_size):
            phi = self.fourier(part)
            shares = functional.linear(phi, self.beta, self.bias).softmax(1)
            precision += torch.einsum("nc,nd,ne->cde", (shares * (1 - shares)).double(), phi.double(), phi.double())
        self.covariance = torch.linalg.inv(precision).to(self.beta.dtype)
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:  # Any: as torch has it
        """A covariance is of another shape before `fit` and after it."""
        if (kept := state.get(f"{prefix}covariance")) is not None:
            self.covariance = torch.empty_like(kept, dtype=self.covariance.dtype, device=self.covariance.device)
        super()._load_from_state_dict(state, prefix, *rest)

    def extra_repr(self) -> str:
        """Its settings that are no parameters."""
        return f"scale={self.scale}, ridge={self.ridge}"


class _Bank(nn.Module):
    """Representations (M, D) of labelled samples, centred and of length 1, with the votes of those nearest to others.

    temper: of the soft votes exp(-|f - f_i|^2 / (temper r^2)), r the distance of the k-th neighbour.
    """

    centre: Tensor
    known: Tensor
    labels: Tensor

    def __init__(self, known: Tensor, labels: Tensor, k: int, temper: float) -> None:
        super().__init__()
        self.k, self.temper = k, temper
        self.register_buffer("centre", known.mean(0))
        self.register_buffer("known", functional.normalize(known - known.mean(0)))
        self.register_buffer("labels", labels)  # (M, C) of 0 and 1

    def _away(self, found: Tensor) -> Tensor:
        """Squared distances (N, M)."""
        return 2 - 2 * functional.normalize(found - self.centre) @ self.known.T

    def hard(self, found: Tensor) -> Tensor:
        """Shares of the k nearest, (N, C)."""
        return self.labels[self._away(found).topk(self.k, largest=False).indices].mean(1)

    def soft(self, found: Tensor) -> Tensor:
        """The same where every known sample votes, with a weight that falls smoothly with the distance."""
        away = self._away(found)
        reach = away.detach().kthvalue(self.k).values.clamp(min=1e-6)[:, None]
        return (-away / (self.temper * reach)).softmax(1) @ self.labels

    def extra_repr(self) -> str:
        """Its settings."""
        return f"k={self.k}"


@final
class NearestNeighbours(Classifier):
    """Deep k-nearest neighbours: the classes of the training samples whose inner representations are nearest, layer by layer.

    Representations are centred and brought to length 1, so that nearest means the largest cosine; each layer has k votes.
    logit_c = log of the share of votes (a half vote where there is none). Votes have no gradient: BPDA with soft votes
    exp(-|f - f_i|^2 / (temper r^2)), r the distance of the k-th neighbour: on digits (k = 15) PGD broke most at a temper of 1/4
    to 1, among 0.02 to 4.

    layers: names of modules in the model, as in `Model.features`. x (M, ...), y (M,): the training samples. k: 75 in the paper.
    `calibrate` and `credibility` are its conformal part.
    Sources: Papernot & McDaniel 2018, "Deep k-nearest neighbors", arXiv:1803.04765, algorithm 1; soft neighbours for attacks:
    Sitawarin & Wagner 2020, "Minimum-norm adversarial examples on kNN", arXiv:2003.06559.
    """

    def __init__(
        self, model: Classifier, layers: Sequence[str], x: Tensor, y: Tensor, *, k: int = 75, temper: float = 0.25,
        batch_size: int = 256,
    ) -> None:  # fmt: skip
        if not layers or isinstance(layers, str):
            raise InputError(f'layers must name at least one module, ["features.3"]; got {layers!r}')
        if not 1 <= k <= len(x) or not temper > 0:
            raise InputError(f"k must be 1 to the {len(x)} known samples, and temper positive; got k={k}, temper={temper}")
        if y.shape != (len(x),) or y.dtype != torch.int64 or int(y.min()) < 0:
            raise InputError(f"y must have one class for each of the {len(x)} known samples; its shape is {tuple(y.shape)}")
        model.check_inputs(x)
        classes = model.num_classes or model.probe(x).num_classes
        super().__init__(model.bounds, model.access, classes, model.draws, model.device)
        self.model, self.layers = model, tuple(layers)
        votes = functional.one_hot(y, classes).to(model.device, x.dtype)
        banks = []
        with torch.no_grad():
            for layer in layers:
                found = [model.features(part.to(model.device), layer).flatten(1) for part in torch.split(x, batch_size)]
                banks.append(_Bank(torch.cat(found), votes, k, temper))
        self.banks = tuple(banks)
        self._calibration: Tensor | None = None

    def networks(self) -> tuple[nn.Module, ...]:
        return (*self.model.networks(), *self.banks)

    def forward(self, x: Tensor) -> Tensor:
        shares = [
            Transform(name="votes", apply=bank.hard, backward=bank.soft)(self.model.features(x, layer).flatten(1))
            for layer, bank in zip(self.layers, self.banks, strict=True)
        ]
        least = 0.5 / (self.banks[0].k * len(shares))
        mean = torch.stack(shares).mean(0)  # its gradient is wanted also where there is no vote: how to win the first one
        return (mean + (mean.clamp(min=least) - mean).detach()).log()

    def features(self, x: Tensor, layer: str) -> Tensor:
        return self.model.features(x, layer)

    def describe(self) -> dict[str, object]:
        known = len(self.banks[0].known)
        return {
            "name": "NearestNeighbours", "layers": self.layers, "k": self.banks[0].k, "temper": self.banks[0].temper,
            "known": known, "model": self.model.describe(),
        }  # fmt: skip

    def calibrate(self, x: Tensor, y: Tensor) -> None:
        """Keep the nonconformity, the share of votes for other classes, of samples (M, ...) that were not known before."""
        own = self.logits(x).exp().gather(1, y.to(self.device)[:, None])[:, 0]
        self._calibration = (1 - own).sort().values

    def credibility(self, x: Tensor) -> Tensor:
        """For each class, the share of the calibration's samples that were at least as strange as this one would be, (N, C)."""
        if self._calibration is None:
            raise InputError("credibility needs calibrate(x, y) with samples that were not among the known ones")
        strange = 1 - self.logits(x).exp()
        below = torch.searchsorted(self._calibration, strange.contiguous() - 1e-6)
        return 1 - below / len(self._calibration)


@final
class Smoothed(Classifier):
    """Randomised smoothing: the class that a model most often gives under Gaussian noise.

    g(x) = argmax_c P(f(x + sigma e) = c),  e ~ N(0, I);   logit_c = log of the share of `votes`

    sigma is in the units of x, those of `bounds` and of the certified radius. The noisy inputs are not clipped. The mean
    probabilities are half a vote besides, which breaks ties. Votes have no gradient: BPDA with the log of the mean
    probabilities (Salman et al. 2019, arXiv:1906.04584, eq. 6). As a model under attack it is random; draws: how many such
    logits an attack averages over, each of `votes` passes, which count as one.

    `vote` and `predict_or_abstain` draw their own noise for each image, the same whatever the batches are. The certificate is
    `saddlepoint.verify.smoothing.certify`; what trains a model for noise is in `saddlepoint.defenses.noise`.
    Source: Cohen, Rosenfeld & Kolter 2019, "Certified adversarial robustness via randomized smoothing", arXiv:1902.02918.

    >>> import torch, saddlepoint as sp
    >>> linear = torch.nn.Linear(1, 2)
    >>> _ = linear.load_state_dict({"weight": torch.tensor([[-1.0], [1.0]]), "bias": torch.zeros(2)})
    >>> smoothed = sp.defenses.Smoothed(sp.Model(linear, bounds=None), sigma=0.5)
    >>> smoothed.predict_or_abstain(torch.tensor([[1.0], [0.0], [-1.0]])).tolist()
    [1, -1, 0]
    """

    def __init__(self, model: Classifier, sigma: float, votes: int = 100, draws: int = 2) -> None:
        if not 0 < sigma < math.inf:
            raise InputError(f"sigma must be positive and finite; got {sigma}")
        if votes < 1:
            raise InputError(f"votes must be at least 1; got {votes}")
        super().__init__(model.bounds, model.access, model.num_classes, draws, model.device)
        self.model, self.sigma, self.votes, self.rejects = model, sigma, votes, model.rejects

    def networks(self) -> tuple[nn.Module, ...]:
        return self.model.networks()

    def forward(self, x: Tensor) -> Tensor:
        repeated = x.repeat_interleave(self.votes, 0)
        logits = self.model.forward(repeated + self.sigma * torch.randn_like(repeated))
        logits = logits.view(len(x), self.votes, logits.shape[1])
        soft = logits.softmax(2).mean(1)
        counts = functional.one_hot(logits.argmax(2), logits.shape[2]).sum(1)
        shares = ((counts + soft / 2) / (self.votes + 0.5)).log()
        soft = torch.logsumexp(logits.log_softmax(2), 1)  # the log of the mean, up to a constant, also where that rounds to 0
        return soft + (shares - soft).detach()

    def features(self, x: Tensor, layer: str) -> Tensor:
        raise InputError("votes have no layers: ask the model inside, smoothed.model.features(x, layer)")

    def describe(self) -> dict[str, object]:
        return {
            "name": "Smoothed", "sigma": self.sigma, "votes": self.votes, "draws": self.draws, "model": self.model.describe(),
        }  # fmt: skip

    def tally(
        self, x: Tensor, counts: Tensor, stages: Sequence[int], *, seed: int = 0, ids: Tensor | None = None, start: int = 0,
        batch_size: int = 256, precision: Precision = "float32",
    ) -> Iterator[int]:  # fmt: skip
        """Add the votes of noisy copies to `counts`, batch by batch; yields how many copies are done.

        Each image has stages[s] copies for counts[:, s], image after image, so that batches are full whether there are many
        images or one. The noise of a copy is a function of (seed, the image's id, its number) alone. Where a logit is not a
        number, nobody gets the vote. Counts as queries.

        counts: (N, S, C) int64 on the model's device. ids: (N,), default positions. start: copies done before, to go on from.
        precision: "bfloat16" runs the network in mixed precision; that is another base classifier than the one in float32.
        """
        each, total = sum(stages), sum(stages) * len(x)
        if min(stages) < 0 or each < 1 or batch_size < 1:
            raise InputError(f"numbers of samples and batch_size must be positive; got {tuple(stages)} and {batch_size}")
        if precision not in get_args(Precision):
            raise UnknownNameError("precision", str(precision), get_args(Precision))
        if ids is not None and ids.shape != (len(x),):
            raise InputError(f"ids must have shape ({len(x)},), one per input; its shape is {tuple(ids.shape)}")
        self.check_inputs(x)
        device = self.device
        names = (torch.arange(len(x)) if ids is None else ids).to(device)
        ends = torch.tensor(stages, device=device).cumsum(0)
        mixed = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
        with self.frozen(), torch.no_grad():
            torch.manual_seed(int(Keys.of(seed, torch.tensor([start])).first))  # a model inside that is random itself
            for first in range(start, total, batch_size):
                done = min(first + batch_size, total)
                copy = torch.arange(first, done, device=device)
                image, draw = copy // each, copy % each
                rows = x[first // each : (done - 1) // each + 1].to(device)[image - first // each]
                noise = _gaussian(Keys.of(seed, names[image]).absorb(draw), tuple(x.shape[1:]), x.dtype)
                with mixed:
                    logits = self.model.forward(rows.add_(noise, alpha=self.sigma))
                stage = torch.bucketize(draw, ends, right=True)
                answers = (image * len(stages) + stage) * counts.shape[2] + logits.argmax(1)
                counts.view(-1).index_add_(0, answers, (~logits.isnan().any(1)).to(counts.dtype))
                self.queries.forward += done - first
                yield done

    def vote(
        self, x: Tensor, samples: int, *, seed: int = 0, ids: Tensor | None = None, batch_size: int = 256,
        precision: Precision = "float32",
    ) -> Tensor:  # fmt: skip
        """How often each class was given under noise, (N, C) int64; see `tally`."""
        counts = self.no_votes(x, 1)
        for _ in self.tally(x, counts, (samples,), seed=seed, ids=ids, batch_size=batch_size, precision=precision):
            pass
        return counts[:, 0]

    def no_votes(self, x: Tensor, stages: int) -> Tensor:
        """The counts before any vote, (N, stages, C)."""
        classes = self.num_classes or self.model.num_classes or self.model.probe(x).num_classes
        return torch.zeros(len(x), stages, classes, dtype=torch.int64, device=self.device)

    def predict_or_abstain(
        self, x: Tensor, samples: int = 1000, alpha: float = 0.001, *, seed: int = 0, ids: Tensor | None = None,
        batch_size: int = 256, precision: Precision = "float32",
    ) -> Tensor:  # fmt: skip
        """The paper's PREDICT: g(x) with error probability alpha at most for each image, or `ABSTAINS` (-1); (N,) int64.

        The most frequent class counts if a fair coin between it and the second would do as well with probability alpha at most.
        """
        if samples < 1 or not 0 < alpha < 1:
            raise InputError(f"samples must be at least 1 and alpha in (0, 1); got {samples} and {alpha}")
        from scipy.stats import binom

        top = self.vote(x, samples, seed=seed, ids=ids, batch_size=batch_size, precision=precision).topk(2)
        first, second = top.values.cpu().numpy().T
        chance = torch.from_numpy(2 * binom.sf(first - 1, first + second, 0.5)).to(top.indices.device)
        return torch.where(chance <= alpha, self.answered(top.indices[:, 0]), ABSTAINS)

    def answered(self, classes: Tensor) -> Tensor:
        """`ABSTAINS` in place of the last column where that is no class, but the model's refusal (`rejects`)."""
        refused = classes == (self.num_classes or self.model.num_classes or 0) - 1
        return torch.where(refused, ABSTAINS, classes) if self.rejects else classes


_TAIL = 2.0**-14  # the probability above which `Keys.normal`'s 23 bits are too coarse


def _gaussian(keys: Keys, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`keys.normal` with its tails drawn anew: beyond t = -Phi^-1(2^-14), about 3.8, |z| becomes -Phi^-1(2^-14 U).

    An image has so many numbers that what 23 bits never give, |z| > 5.3, would be missed: 2% of the noise for ImageNet's. These
    reach 6.9.
    """
    noise, size = keys.normal(shape, dtype).view(-1), math.prod(shape)
    bound = -float(torch.special.ndtri(torch.tensor(_TAIL, dtype=torch.float64)))
    far = (noise.abs() > bound).nonzero()[:, 0]
    row = far // size
    share = Keys(keys.first[row], keys.second[row]).absorb(far % size + 1).uniform((), torch.float64)
    noise[far] = torch.copysign(-torch.special.ndtri(_TAIL * share), noise[far]).to(dtype)
    return noise.view(-1, *shape)


@final
class GradientMasked(nn.Module):
    """An exhibit: a network that attacks by its gradients find robust, though it is as weak as the one inside.

    kind="vanished": inputs are rounded to 2^5 levels, so every derivative is 0. kind="shattered": a ripple of amplitude 1/500
    is added whose slope is up to 4 times that of its input, so that the gradient's signs are arbitrary; `evaluate` with the
    effort "quick" is misled by it, "standard" isn't.
    Source of the names: Papernot et al. 2017, arXiv:1602.02697; Athalye, Carlini & Wagner 2018, arXiv:1802.00420.
    """

    def __init__(self, net: nn.Module, kind: Literal["vanished", "shattered"] = "vanished") -> None:
        super().__init__()
        if kind not in ("vanished", "shattered"):
            raise InputError(f'kind must be "vanished" or "shattered"; got {kind!r}')
        self.net, self.kind = net, kind

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, C) of inputs in [0, 1]."""
        if self.kind == "vanished":
            return self.net(torch.round(x * 31) / 31)  # type: ignore[no-any-return]
        return self.net(x + torch.sin(2000 * x) / 500)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Its setting."""
        return f"kind={self.kind!r}"
