"""Rubbish images: evolved until the model is sure of a class in which a human sees none (Nguyen, Yosinski & Clune 2015).

MAP-Elites keeps a champion for each class, an archive. In each generation some of them are mutated, and a child takes the place
of the champion of every class in which it is better, its parent's or not: what one class found serves all.

That is a function and no attack: all classes share one search, there is no input to stay near, and what comes out is an
image for each class. The engine would have no sample to admit, keep feasible, stop or hand back.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor

from saddlepoint.attacks.planes import planes
from saddlepoint.errors import CapabilityError, InputError, UnknownNameError
from saddlepoint.models.base import Classifier
from saddlepoint.rng import Keys
from saddlepoint.trees import select, take

Shape = tuple[int, ...]
G = TypeVar("G")  # genomes, individuals first


def polynomial(uniform: Tensor, eta: float) -> Tensor:
    """Deb's polynomial mutation: a step in (-1, 1) of density (eta + 1) / 2 * (1 - |step|)^eta, from a uniform number."""
    power = 1 / (eta + 1)
    return torch.where(uniform < 0.5, (2 * uniform) ** power - 1, 1 - (2 - 2 * uniform).clamp(min=0) ** power)


class Encoding(ABC, Generic[G]):
    """How a genome makes an image."""

    @abstractmethod
    def first(self, keys: Keys, shape: Shape) -> G:
        """Random genomes, one for each key, for images of this shape."""

    @abstractmethod
    def mutated(self, genomes: G, keys: Keys, generation: int) -> G:
        """Their children in this generation, one for each key."""

    @abstractmethod
    def images(self, genomes: G, shape: Shape) -> Tensor:
        """The images (P, *shape), values in [0, 1]."""


@final
@dataclass(frozen=True, kw_only=True)
class Direct(Encoding[Tensor]):
    """A genome is the image itself, which begins as uniform noise.

    A value mutates with probability `rate`, 0.1, which halves every `halving` generations, 1000. eta: 15, of the mutation.
    """

    rate: float = 0.1
    halving: int = 1000
    eta: float = 15.0

    def first(self, keys: Keys, shape: Shape) -> Tensor:
        return keys.uniform(shape)

    def mutated(self, genomes: Tensor, keys: Keys, generation: int) -> Tensor:
        rate = self.rate * 0.5 ** (generation // self.halving)
        draw = keys.uniform(tuple(genomes.shape[1:])) / rate  # where below 1, itself uniform
        return torch.where(draw < 1, genomes + polynomial(draw, self.eta), genomes).clamp(0, 1)

    def images(self, genomes: Tensor, shape: Shape) -> Tensor:
        return genomes


@dataclass(frozen=True)
class Networks:
    """Small networks of N nodes each, in order: inputs, hidden ones, outputs. What connects leads to a later node.

    weights (P, N, N) from column to row, connected (P, N, N) bool, activations (P, N) int64, places in `ACTIVATIONS`.
    """

    weights: Tensor
    connected: Tensor
    activations: Tensor


def gaussian(x: Tensor) -> Tensor:
    """exp(-x^2)."""
    return (-x.square()).exp()


ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (torch.sin, torch.sigmoid, gaussian, torch.clone)
_INPUTS = 4  # column and row in [-1, 1], distance from the middle, 1


@final
@dataclass(frozen=True, kw_only=True)
class CPPN(Encoding[Networks]):
    """A genome is a network from a pixel's place to its colour, which makes regular images.

    Its nodes are sines, sigmoids, Gaussians and linear ones of weighted sums. It begins with inputs connected to outputs;
    mutation adds or removes connections and nodes, and changes weights and activations. One output is a grey value, three are
    hue, saturation and brightness, any other number are the channels.

    hidden: the most hidden nodes. largest: bound of the weights. rate: with which a weight or an activation mutates. add,
    remove: chances of one more connection, one less. add_node, remove_node: the same of nodes, the first in the middle of a
    connection. eta: of the mutation of weights. The values are those of the authors' code.
    """

    hidden: int = 16
    largest: float = 10.0
    rate: float = 0.1
    add: float = 0.5
    remove: float = 0.3
    add_node: float = 0.5
    remove_node: float = 0.2
    eta: float = 15.0

    def first(self, keys: Keys, shape: Shape) -> Networks:
        nodes = _INPUTS + self.hidden + _sides(shape)[0]
        weights = self.largest * (2 * keys.absorb(1).uniform((nodes, nodes)) - 1)
        connected = torch.zeros_like(weights, dtype=torch.bool)
        connected[:, _INPUTS + self.hidden :, :_INPUTS] = True
        return Networks(weights, connected, _any_activation(keys.absorb(2), nodes))

    def mutated(self, genomes: Networks, keys: Keys, generation: int) -> Networks:
        weights, connected, nodes = genomes.weights, genomes.connected, genomes.weights.shape[1]
        draw = keys.absorb(1).uniform((nodes, nodes)) / self.rate
        weights = torch.where(draw < 1, weights + 2 * self.largest * polynomial(draw, self.eta), weights)
        fresh = keys.absorb(2).uniform((nodes,)) < self.rate
        activations = torch.where(fresh, _any_activation(keys.absorb(3), nodes), genomes.activations)
        weights, connected = self._nodes_changed(weights.clamp(-self.largest, self.largest), connected, keys)

        chance = keys.absorb(4).uniform((2,))
        gone = _one_of(connected, keys.absorb(5)) & (chance[:, 0] < self.remove)[:, None, None]
        new = _one_of(self._allowed(connected) & ~connected, keys.absorb(6)) & (chance[:, 1] < self.add)[:, None, None]
        drawn = self.largest * (2 * keys.absorb(7).uniform() - 1)
        return Networks(torch.where(new, drawn[:, None, None], weights), (connected & ~gone) | new, activations)

    def _allowed(self, like: Tensor) -> Tensor:
        """Which nodes (N, N) may be connected: forward, not to inputs and not from outputs."""
        place = torch.arange(like.shape[1], device=like.device)
        return (place < place[:, None]) & (place[:, None] >= _INPUTS) & (place < _INPUTS + self.hidden)

    def _nodes_changed(self, weights: Tensor, connected: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
        """With a node in the middle of one connection, and with all connections of another node removed, by chance."""
        chance, place = keys.absorb(8).uniform((2,)), torch.arange(weights.shape[1], device=weights.device)
        hidden = (place >= _INPUTS) & (place < _INPUTS + self.hidden)
        used = connected.any(1) | connected.any(2)
        split = _one_of(connected, keys.absorb(9)) & (chance[:, 0] < self.add_node)[:, None, None]
        end, begin = split.any(2), split.any(1)
        between = (place > (begin * place).sum(1, keepdim=True)) & (place < (end * place).sum(1, keepdim=True))
        middle = _one_of(hidden & between & ~used, keys.absorb(10))
        split = split & middle.any(1)[:, None, None]
        into, out = middle[:, :, None] & begin[:, None], end[:, :, None] & middle[:, None]
        kept = (weights * split).sum((1, 2))[:, None, None]
        weights = torch.where(into, 1.0, torch.where(out, kept, weights))
        connected = (connected & ~split) | into | out
        gone = _one_of(hidden & used, keys.absorb(11)) & (chance[:, 1] < self.remove_node)[:, None]
        return weights, connected & ~(gone[:, :, None] | gone[:, None])

    def images(self, genomes: Networks, shape: Shape) -> Tensor:
        channels, height, width = _sides(shape)
        weights = genomes.weights * genomes.connected
        count, nodes = weights.shape[:2]
        row, column = torch.meshgrid(
            *(torch.linspace(-1, 1, n, device=weights.device) if n > 1 else weights.new_zeros(1) for n in (height, width)),
            indexing="ij",
        )
        values = weights.new_zeros(count, nodes, height * width)
        inputs = torch.stack([column, row, (column.square() + row.square()).sqrt(), torch.ones_like(row)])
        values[:, :_INPUTS] = inputs.flatten(1)
        used = genomes.connected.any(1) | genomes.connected.any(2)
        used[:, nodes - channels :] = True
        for node in range(_INPUTS, nodes):
            for code, function in enumerate(ACTIVATIONS):
                some = (used[:, node] & (genomes.activations[:, node] == code)).nonzero()[:, 0]
                values[some, node] = function(torch.bmm(weights[some, node, None, :node], values[some, :node])[:, 0])
        outputs = (values[:, nodes - channels :].clamp(-1, 1) + 1) / 2
        outputs = _rgb(outputs) if channels == 3 else outputs
        return outputs.reshape(count, *shape)


def _any_activation(keys: Keys, nodes: int) -> Tensor:
    return (keys.uniform((nodes,)) * len(ACTIVATIONS)).long()


def _one_of(mask: Tensor, keys: Keys) -> Tensor:
    """One of the True of each individual's mask (P, ...), and none where there is none."""
    flat = mask.flatten(1)
    place = (keys.uniform((flat.shape[1],)) * flat).argmax(1, keepdim=True)
    return (torch.zeros_like(flat).scatter(1, place, True) & flat).view_as(mask)


def _rgb(hsb: Tensor) -> Tensor:
    """Red, green and blue (P, 3, ...) of hue, saturation and brightness, all in [0, 1]."""
    hue, saturation, brightness = hsb.unbind(1)
    sectors = torch.stack([(n + 6 * hue) % 6 for n in (5, 3, 1)], 1)
    fade = torch.minimum(sectors, 4 - sectors).clamp(0, 1)
    return brightness[:, None] * (1 - saturation[:, None] * fade)


def _sides(shape: Shape) -> tuple[int, int, int]:
    """Channels, height and width of such an image."""
    return planes(torch.empty(1, *shape, device="meta"))


ENCODINGS: dict[str, type[Encoding[Any]]] = {"direct": Direct, "cppn": CPPN}  # Any: each has its own genomes


@dataclass(frozen=True)
class Rubbish:
    """An image for each of `classes` (K,): images (K, ...), with the probability that the model states for it (K,).

    history: the champions' probabilities after each generation (generations, K). queries: what it cost.
    """

    images: Tensor
    classes: Tensor
    probabilities: Tensor
    history: Tensor
    queries: int


def evolve_rubbish(
    model: Classifier,
    shape: Shape,
    *,
    classes: Sequence[int] | None = None,
    encoding: Encoding[Any] | str = "cppn",
    generations: int = 200,
    population: int = 200,
    probability: float = 0.9999,
    seed: int = 0,
    batch_size: int = 256,
) -> Rubbish:
    """Evolve images that the model takes for each class: what `sp.FalsePositive(target=c, probability=p)` asks for.

    shape: of an image, such as (1, 28, 28). classes: default all. encoding: "cppn", "direct", or one with other settings.
    generations: at most, with `population` children each (200 in the authors' code); it ends when all classes have
    `probability`. seed: with it, the result is always the same, whatever the batch size.

    Every image asked about is a query, counted by the model too. Errors: `InputError`, `CapabilityError` where the model gives
    labels only, or has no bounds to draw images from.

    Source: Nguyen, Yosinski & Clune (2015), Deep neural networks are easily fooled, arXiv:1412.1897, section 2; MAP-Elites:
    Mouret & Clune (2015), arXiv:1504.04909.

    >>> import torch, saddlepoint as sp
    >>> from saddlepoint.attacks.rubbish import evolve_rubbish
    >>> model = sp.Model(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)))
    >>> found = evolve_rubbish(model, (1, 8, 8), generations=5, population=20)
    >>> found.images.shape, found.queries
    (torch.Size([3, 1, 8, 8]), 103)
    """
    for name, value in (("generations", generations), ("population", population)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number >= 1; got {value!r}")
    if not 0 < probability <= 1:
        raise InputError(f"probability must lie in (0, 1]; got {probability!r}")
    if model.bounds is None:
        raise CapabilityError("images are drawn from the model's range: give the model bounds")
    if isinstance(encoding, str) and encoding not in ENCODINGS:
        raise UnknownNameError("encoding", encoding, ENCODINGS)
    genetics = ENCODINGS[encoding]() if isinstance(encoding, str) else encoding
    (low, high), before = model.bounds, model.queries.forward
    keys = Keys.of(seed, torch.arange(population, device=model.device))

    def image(genomes: Any) -> Tensor:  # Any: the encoding's
        return (low + (high - low) * genetics.images(genomes, shape)).to(model.dtype or torch.float32).clamp(low, high)

    def log_probability(images: Tensor) -> Tensor:
        """(P, C); what is no number is no success."""
        return model.logits(images, batch_size=batch_size).double().log_softmax(1).nan_to_num(nan=-math.inf)

    genomes = genetics.first(keys.absorb(0), shape)
    fitness = log_probability(image(genomes))
    wanted = _classes(classes, fitness.shape[1]).to(fitness.device)
    best, which = fitness[:, wanted].max(0)
    archive, history = take(genomes, which), [best]
    for generation in range(1, generations):
        if bool((best >= math.log(probability)).all()):
            break
        fresh = keys.absorb(generation)
        parents = (fresh.absorb(0).uniform((), torch.float64) * len(wanted)).long().clamp(max=len(wanted) - 1)
        genomes = genetics.mutated(take(archive, parents), fresh, generation)
        found, which = log_probability(image(genomes))[:, wanted].max(0)
        archive = select(found > best, take(genomes, which), archive)
        best = torch.maximum(found, best)
        history.append(best)
    images = image(archive)
    stated = log_probability(images)[torch.arange(len(wanted), device=wanted.device), wanted].exp()
    return Rubbish(images, wanted, stated, torch.stack(history).exp(), model.queries.forward - before)


def _classes(classes: Sequence[int] | None, count: int) -> Tensor:
    chosen = list(range(count)) if classes is None else [int(c) for c in classes]
    for unknown in (c for c in chosen if not 0 <= c < count):
        raise InputError(f"class {unknown} is not one of the model's: it has classes 0 to {count - 1}")
    if not chosen:
        raise InputError("classes is empty: name at least one, or leave it out for all")
    return torch.tensor(chosen)
