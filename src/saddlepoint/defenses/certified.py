"""Certified training: losses of what a network can be proven to do within a box, not of what an attack found there.

The worst case of a sample within a box is bounded by w_j >= max_x z_j(x) - z_y(x), from intervals or linear bounds; the loss is
the cross-entropy of w, which bounds that of every point of the box. Bounds are those of the network in evaluation mode: dropout
is off; batch normalisation takes the mean and variance of the clean batch, and the stored ones outside of training.
"""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from saddlepoint.attacks.ascent import PGD
from saddlepoint.defenses.objectives import Batch, Objective, check_adversary, check_number, craft, radius
from saddlepoint.engine import Attack
from saddlepoint.errors import CapabilityError, InputError
from saddlepoint.models.base import Classifier
from saddlepoint.models.freeze import global_random_state_kept
from saddlepoint.propagation.bounds import Bounded, Box, Slopes
from saddlepoint.propagation.graph import Exported, Graph, export
from saddlepoint.propagation.methods import Method, bounds
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import Region, Threat

Ends = tuple[float, float]
_BEND = 0.25  # share of the ramp after which eps grows linearly
_TIGHT = 0.5  # tau of the regularisers
_TINY = 1e-12
_VALIDATION, _EXAMPLES = PGD(steps=10), PGD(steps=8)


def grown(t: float) -> float:
    """The share of eps at a share t of its ramp: as t^4 for a quarter, then linear with the same slope; 0 before, 1 after.

    Source: Shi, Wang, Zhang, Yi & Hsieh (2021), Fast certified robust training with short warmup, arXiv:2103.17268.

    >>> [round(grown(t), 3) for t in (-1.0, 0.0, 0.25, 0.5, 1.0, 2.0)]
    [0.0, 0.0, 0.077, 0.385, 1.0, 1.0]
    """
    t = min(max(t, 0.0), 1.0)
    curve = t**4 if t < _BEND else _BEND**4 + 4 * _BEND**3 * (t - _BEND)
    return curve / (_BEND**4 + 4 * _BEND**3 * (1 - _BEND))


def interval_initialize(net: nn.Module, seed: int = 0) -> None:
    """Weights, in place, under which intervals grow by no layer: normal, of variance 2 pi / n^2 for n inputs; biases 0.

    As E |w| = 2 / n, a layer doubles a box's width, and ReLU halves it. Call it before training.

    Source: Shi, Wang, Zhang, Yi & Hsieh (2021), Fast certified robust training with short warmup, arXiv:2103.17268, sec. 3.1.

    >>> import saddlepoint as sp
    >>> interval_initialize(sp.zoo.build("digits-cnn"))
    """
    layers = [module for module in net.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    if not layers:
        raise InputError("the network has no linear or convolutional layers")
    with global_random_state_kept(), torch.no_grad():
        torch.manual_seed(seed)
        for layer in layers:
            layer.weight.normal_(std=math.sqrt(2 * math.pi) / layer.weight[0].numel())
            if layer.bias is not None:
                layer.bias.zero_()


def lowest_margins(
    model: Classifier, x: Tensor, y: Tensor, threat: Threat, method: Method = "ibp", *, rigorous: bool = False,
    batch_size: int = 128,
) -> Tensor:  # fmt: skip
    """Lower bounds (N,) of z_y - max_j z_j within an l-infinity ball: where above 0, the answer is proven.

    method, rigorous: see `saddlepoint.propagation.methods.bounds`; without `rigorous` up to rounding. Errors: `InputError`,
    `ModelError`.

    >>> import saddlepoint as sp
    >>> digits, model = sp.data.load("digits").test, sp.Model(sp.zoo.build("digits-cnn"))
    >>> lowest_margins(model, digits.x[:4], digits.y[:4], sp.Linf(0.1)).shape
    torch.Size([4])
    """
    check_box("lowest_margins", threat)
    model.check_inputs(x)
    graph = export(model, x).graph()
    found = []
    for points, labels in zip(torch.split(x, batch_size), torch.split(y, batch_size), strict=True):
        region = threat.around(points, model.bounds)
        rows = differences(labels, graph, points.dtype)
        others = ~one_hot(labels, rows.shape[1]).bool()
        low = bounds(graph, region.lower, region.upper, rows, method, rigorous=rigorous)
        found.append(low[others].view(len(points), -1).amin(1))
    return torch.cat(found)


def check_box(who: str, threat: Threat) -> None:
    """Raise `InputError` unless the threat is an l-infinity ball with one finite eps."""
    if threat.norm is not Norm.LINF or threat.minimizes or isinstance(threat.eps, tuple):
        raise InputError(
            f"{who} needs an l-infinity ball with one eps, such as sp.Linf(0.1); got {threat}. In l2 there are "
            "Lipschitz layers (saddlepoint.defenses.lipschitz) and smoothing"
        )


def differences(y: Tensor, graph: Graph, dtype: torch.dtype) -> Tensor:
    """The rows e_y - e_j (N, C, C) for classes y (N,)."""
    classes = next(node.shape[0] for node in graph.nodes if node.name == graph.output)
    eye = torch.eye(classes, dtype=dtype, device=y.device)
    return eye[y][:, None] - eye


# ---- a batch's bounds


@dataclass(frozen=True)
class _View:
    """What a step sees: the batch, the share of eps that is reached, and the network as a graph, with gradients.

    logits: of the clean inputs, where they were needed already.
    """

    batch: Batch
    share: float
    threat: Threat
    graph: Graph
    logits: Tensor | None

    @property
    def region(self) -> Region:
        """The whole ball."""
        return self.threat.around(self.batch.x, self.batch.model.bounds)

    def clean(self) -> Tensor:
        """The loss of the clean inputs."""
        logits = self.batch.model.forward(self.batch.x) if self.logits is None else self.logits
        return cross_entropy(logits, self.batch.y)

    def rows(self) -> Tensor:
        return differences(self.batch.y, self.graph, self.batch.x.dtype)

    def worst_case(self, lower_bounds: Tensor) -> Tensor:
        """The cross-entropy of the worst logits, from lower bounds (B, C) of z_y - z_j."""
        return cross_entropy(-lower_bounds, self.batch.y)

    def between(self, start_end: Ends) -> float:
        """A weight on its way from start to end, which it reaches with eps."""
        return start_end[0] + self.share * (start_end[1] - start_end[0])


_exports: weakref.WeakKeyDictionary[nn.Module, Exported] = weakref.WeakKeyDictionary()


def _exported(batch: Batch) -> Exported:
    """The network's export, once for a network: its parameters are the network's own."""
    net, known = batch.net, _exports.get(batch.net)
    if known is not None and known.shape == batch.x.shape[1:]:
        tensors = {id(tensor) for tensor in known.program.state_dict.values()}
        if all(id(parameter) in tensors for parameter in net.parameters()):
            return known
    _exports[net] = export(batch.model, batch.x)
    return _exports[net]


@contextmanager
def _statistics(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Gathers the mean and variance of what goes into each batch normalisation, by the names of the stored ones."""
    found: dict[str, Tensor] = {}

    def gather(name: str, x: Tensor) -> None:
        others = [dim for dim in range(x.dim()) if dim != 1]
        found[f"networks.0.{name}.running_mean"] = x.mean(others)
        found[f"networks.0.{name}.running_var"] = x.var(others, correction=0)

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: gather(name, inputs[0])) for name, module in _norms(net)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _norms(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """Batch normalisations that are being trained."""
    kind = nn.modules.batchnorm._BatchNorm
    return [(name, module) for name, module in net.named_modules() if isinstance(module, kind) and module.training]


def tightness(bounded: Bounded) -> Tensor:
    """The regularisers of IBP's warm-up, a scalar: how far boxes have grown, and how one-sided the ReLUs are.

        mean over ReLUs of max(0, tau - E[w_0] / E[w]) / tau
                         + (max(0, tau - balance(mean)) + max(0, tau - balance(variance))) / tau

    w: widths of the boxes before a ReLU, w_0 of the input; balance(q) = min(a / b, b / a), a and b being q of the boxes'
    middles over those that are active for sure, and that are inactive for sure. tau = 0.5.

    Source: Shi, Wang, Zhang, Yi & Hsieh (2021), Fast certified robust training with short warmup, arXiv:2103.17268, sec. 3.3.
    """
    first = _width(bounded.boxes[bounded.graph.input])
    terms = []
    for node in bounded.graph.nodes:
        if node.rule is None or not node.rule.free:
            continue
        box = bounded.boxes[node.inputs[0]]
        mean = box.middle.mean()
        on, off = (_moments(box.middle, sure.to(first), mean) for sure in (box.lower > 0, box.upper < 0))
        grows = first / _width(box).clamp(min=_TINY)
        three = torch.stack([grows, _balance(on[0], -off[0]), _balance(on[1], off[1])])
        terms.append((_TIGHT - three).clamp(min=0).sum() / _TIGHT)
    return torch.stack(terms).mean() if terms else first.new_zeros(())


def _width(box: Box) -> Tensor:
    return 2 * box.radius.mean()


def _moments(values: Tensor, chosen: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of the chosen values, and of their squared distances from the mean; few passes, as values are many."""
    some = (values * chosen).flatten()
    total = some.sum()
    return total, (torch.dot(some, some) - 2 * mean * total + mean.square() * chosen.sum()).clamp(min=0)


def _balance(a: Tensor, b: Tensor) -> Tensor:
    """min(a / b, b / a) for a, b >= 0."""
    return torch.minimum(a, b) / torch.maximum(a, b).clamp(min=_TINY)


# ---- objectives


@dataclass(frozen=True, kw_only=True)
class _Certified(Objective):
    """What certified trainings share.

    threat: an l-infinity ball. warmup: epochs of clean training; ramp: epochs in which eps then grows to its size, as `grown`
    says (1 and 20 of 70 for MNIST in Shi et al. 2021): leave a third of the training for the whole eps. regularizer: lambda
    of their `tightness`, which fades as eps grows. clip: largest norm of the gradient. Validation is under PGD with 10 steps,
    which is no proof: see `lowest_margins`.
    """

    threat: Threat
    warmup: float = 1.0
    ramp: float = 5.0
    regularizer: float = 0.5
    clip: float = 10.0

    def __post_init__(self) -> None:
        check_box(type(self).__name__, self.threat)
        check_number(self, least=0, warmup=self.warmup, ramp=self.ramp, regularizer=self.regularizer)
        check_number(self, above=0, clip=self.clip)

    @property
    def adversary(self) -> tuple[Attack, Threat]:
        return _VALIDATION, self.threat

    @abstractmethod
    def robust(self, view: _View) -> tuple[Tensor, Bounded | None]:
        """The loss once eps is above 0, and the boxes that the regularisers look at."""

    def share(self, progress: float) -> float:
        """The share of eps after so many epochs."""
        since = progress - self.warmup
        return grown(since / self.ramp) if self.ramp else float(since >= 0)

    @final
    def loss(self, batch: Batch) -> Tensor:
        if batch.y.is_floating_point():
            raise InputError(f"{type(self).__name__} needs classes, not soft labels: bounds are of one class against another")
        share = self.share(batch.progress)
        eps = share * radius(self.threat)
        if not eps:
            return cross_entropy(batch.model.forward(batch.x), batch.y)
        with torch.autocast(batch.x.device.type, enabled=False):  # bounds in bfloat16 are none
            exported = _exported(batch)
            logits, measured = None, {}
            if _norms(batch.net):
                with _statistics(batch.net) as measured:
                    logits = batch.model.forward(batch.x)
            graph = exported.graph(gradients=True, replaced=measured)
            loss, bounded = self.robust(_View(batch, share, self.threat.at(eps), graph, logits))
            weight = self.regularizer * (1 - share)
            return loss + weight * tightness(bounded) if weight and bounded is not None else loss

    @final
    def after_backward(self, batch: Batch) -> None:
        given = [parameter for parameter in batch.net.parameters() if parameter.grad is not None]
        nn.utils.clip_grad_norm_(given, self.clip)


def _check_weights(owner: object, **pairs: Ends) -> None:
    for name, pair in pairs.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InputError(f"{type(owner).__name__}: {name} must be (start, end), such as (1.0, 0.5); got {pair!r}")
        check_number(owner, least=0, most=1, **{f"{name}[{place}]": value for place, value in enumerate(pair)})


@final
@dataclass(frozen=True, kw_only=True)
class IBP(_Certified):
    """Interval bound propagation: the cross-entropy of the worst logits by intervals, and that of the clean ones,

        kappa L(z(x), y) + (1 - kappa) L(w, y)

    where the last affine layers are joined with the differences of the logits. kappa: (start, end), moving as eps grows;
    (1, 0.5) in the first paper, (0, 0) in the second, whose weights `interval_initialize` gives. A step costs two to three
    plain ones.
    MNIST is trained at a larger eps than it is tested at: 0.2 for 0.1, 0.4 for 0.3.

    Source: Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann & Kohli (2018), On the effectiveness of interval
    bound propagation for training verifiably robust models, arXiv:1810.12715, eq. 12; Shi et al. (2021), arXiv:2103.17268.

    >>> import saddlepoint as sp
    >>> digits, net = sp.data.load("digits"), sp.zoo.build("digits-cnn")
    >>> interval_initialize(net)
    >>> objective = sp.defenses.IBP(threat=sp.Linf(0.02), warmup=0, ramp=1)
    >>> len(sp.train(net, digits.train.take(128), adversary=objective, epochs=1).epochs)
    1
    """

    kappa: Ends = (0.0, 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weights(self, kappa=self.kappa)

    def robust(self, view: _View) -> tuple[Tensor, Bounded]:
        region = view.region
        bounded = Bounded.of(view.graph, region.lower, region.upper)
        loss = view.worst_case(bounded.by_intervals(view.rows()))
        return _mixed(view, self.kappa, loss), bounded


def _mixed(view: _View, kappa: Ends, worst: Tensor) -> Tensor:
    """kappa times the clean loss, and the rest times the worst case's."""
    share = view.between(kappa)
    return share * view.clean() + (1 - share) * worst if share else worst


@final
@dataclass(frozen=True, kw_only=True)
class CROWNIBP(_Certified):
    """IBP with bounds that start as linear ones, carried back through the network from its interval bounds:

        m = beta m_CROWN-IBP + (1 - beta) m_IBP,   loss kappa L(z(x), y) + (1 - kappa) L(-m, y)

    m: lower bounds of z_y - z_j. beta, kappa: (start, end), moving as eps grows. beta (1, 0) ends as IBP; (1, 1) keeps the
    tighter bounds, which is better where eps is small. While beta > 0 a step costs about four plain ones for each class.

    Source: Zhang, Chen, Xiao, Gowal, Stanforth, Li, Boning & Hsieh (2020), Towards stable and efficient training of verifiably
    robust neural networks, arXiv:1906.06316, eq. 9 to 11.
    """

    beta: Ends = (1.0, 0.0)
    kappa: Ends = (0.0, 0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weights(self, beta=self.beta, kappa=self.kappa)

    def robust(self, view: _View) -> tuple[Tensor, Bounded]:
        region, rows, beta = view.region, view.rows(), view.between(self.beta)
        bounded = Bounded.of(view.graph, region.lower, region.upper)
        margins = torch.zeros_like(rows[..., 0])
        if beta > 0:
            margins = margins + beta * bounded.backward(view.graph.output, rows)
        if beta < 1:
            margins = margins + (1 - beta) * bounded.by_intervals(rows)
        return _mixed(view, self.kappa, view.worst_case(margins)), bounded


@final
@dataclass(frozen=True, kw_only=True)
class SABR(_Certified):
    """IBP on a small box around an adversarial example, a share lambda of the ball's size, that lies inside the ball:

        x' = PGD within (1 - lambda) eps;   box {|x - x'| <= lambda eps};   minimise L(w, y)

    It doesn't bound the loss of the whole ball, so intervals prove little of the result: that is for tighter verifiers. For it
    the network fits much better where eps is small. size: lambda, 0.4 and 0.6 for MNIST at 0.1 and 0.3, 0.1 and 0.7 for
    CIFAR-10 at 2/255 and 8/255; 1 is IBP.

    Source: Mueller, Eckert, Fischer & Vechev (2023), Certified training: small boxes are all you need, arXiv:2210.04871.
    """

    size: float = 0.4
    attack: Attack | str = _EXAMPLES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, above=0, most=1, size=self.size)
        object.__setattr__(self, "attack", _attack(self, self.attack, self.threat))

    def robust(self, view: _View) -> tuple[Tensor, Bounded]:
        region, eps, batch = view.region, radius(view.threat), view.batch
        away = (1 - self.size) * eps
        middle = craft(batch, self.attack, view.threat.at(away)) if away else batch.x
        small = self.size * eps
        lower, upper = torch.maximum(region.lower, middle - small), torch.minimum(region.upper, middle + small)
        bounded = Bounded.of(view.graph, lower, upper)
        return view.worst_case(bounded.by_intervals(view.rows())), bounded


@final
@dataclass(frozen=True, kw_only=True)
class MTLIBP(_Certified):
    """The losses of an attack and of the intervals, side by side:

        alpha L(w, y) + (1 - alpha) L(z(x'), y),   x' of PGD within the ball

    alpha: 0 is adversarial training, 1 is IBP; what lies between is searched for, and small where eps is (a few thousandths for
    CIFAR-10 at 2/255, about one half at 8/255). Tighter verifiers than intervals have to prove the result.

    Source: De Palma, Bunel, Dvijotham, Kumar, Stanforth & Lomuscio (2024), Expressive losses for verified robustness via convex
    combinations, arXiv:2305.13991, section 4.2.
    """

    alpha: float = 0.5
    attack: Attack | str = _EXAMPLES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, least=0, most=1, alpha=self.alpha)
        object.__setattr__(self, "attack", _attack(self, self.attack, self.threat))

    def robust(self, view: _View) -> tuple[Tensor, Bounded]:
        region, batch = view.region, view.batch
        bounded = Bounded.of(view.graph, region.lower, region.upper)
        worst = view.worst_case(bounded.by_intervals(view.rows()))
        if self.alpha == 1:
            return worst, bounded
        attacked = cross_entropy(batch.model.forward(craft(batch, self.attack, view.threat)), batch.y)
        return self.alpha * worst + (1 - self.alpha) * attacked, bounded


def _attack(owner: object, attack: Attack | str, threat: Threat) -> Attack:
    try:
        return check_adversary(attack, threat)
    except CapabilityError as error:
        raise InputError(f"{type(owner).__name__}: {error}") from error


@final
@dataclass(frozen=True, kw_only=True)
class ConvexDual(_Certified):
    """The loss of a feasible point of the dual of the ReLUs' convex hulls, for comparison: see `dual_bounds`.

    Every hidden layer is bounded by as many dual networks as it has neurons, so it is for small networks.

    Source: Wong & Kolter (2018), Provable defenses against adversarial examples via the convex outer adversarial polytope,
    arXiv:1711.00851, theorem 1 and section 3.4.
    """

    regularizer: float = 0.0

    def robust(self, view: _View) -> tuple[Tensor, None]:
        region = view.region
        return view.worst_case(dual_bounds(view.graph, region.lower, region.upper, view.rows())), None


def dual_bounds(graph: Graph, lower: Tensor, upper: Tensor, rows: Tensor) -> Tensor:
    """Lower bounds (N, R) of rows (N, R, C) times the outputs over boxes, by Wong and Kolter's dual; differentiable.

    The dual with alpha = u / (u - l) for the ReLUs whose inputs in [l, u] hold 0 is CROWN with that lower slope in place of 0
    or 1: the line below is parallel to the line above. Bounds of hidden layers are made in the same way, one after another.
    Errors: `InputError` for nonlinearities other than ReLU.
    """
    bounded = Bounded.of(graph, lower, upper)
    slopes: Slopes = {}
    for node in graph.nodes:
        if node.rule is None:
            continue
        if node.op != "relu":
            raise InputError(f"the dual is that of ReLU networks; this one has {node.op} at {node.name}")
        (name,) = node.inputs
        box = bounded.boxes[name]
        if slopes:  # before the first ReLU the intervals are those of one affine layer
            shape = box.lower.shape[1:]
            eye = torch.eye(shape.numel(), dtype=lower.dtype, device=lower.device)
            each = eye.view(1, -1, *shape).expand(len(lower), -1, *shape)
            ends = bounded.ends(name, each, slopes=slopes)
            box = bounded.boxes[name] = Box(ends.lower.view_as(box.lower), ends.upper.view_as(box.upper))
        crossing = (box.lower < 0) & (box.upper > 0)
        slopes[node.name] = torch.where(crossing, box.upper / torch.where(crossing, box.upper - box.lower, 1), 0)[:, None]
    return bounded.backward(graph.output, rows, slopes or None)
