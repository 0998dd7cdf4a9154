"""Ensemble adversarial training: examples of other networks, which the trained one can't spoil."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor
from torch.nn.functional import cross_entropy

from saddlepoint.attacks.ascent import FGSM
from saddlepoint.attacks.registry import as_attack
from saddlepoint.defenses.objectives import Batch, MinMax, check_adversary, check_number, craft, drawn
from saddlepoint.engine import Attack
from saddlepoint.errors import InputError
from saddlepoint.models.base import Classifier
from saddlepoint.threats import Threat

_FGSM = FGSM()


@final
@dataclass(frozen=True, kw_only=True)
class EnsembleAdversarial(MinMax):
    """For each batch one of several networks is drawn, and the examples are made on it:

        alpha * L(x) + (1 - alpha) * L(x'_s),   s drawn from the pre-trained sources and, with own=True, the network itself

    A network that is trained with its own single steps learns to bend its gradients; the sources' stay as they are, so what it
    learns holds against transferred examples. Against an attack on the network itself it gives little.
    sources: 1 to 5 pre-trained static models with the same inputs and classes; the paper has 3 or 4 on MNIST, of other
    architectures than the transfers that are tested. alpha = 0.5, FGSM with eps 0.3 there.

    Source: Tramèr, Kurakin, Papernot, Goodfellow, Boneh & McDaniel (2018), Ensemble adversarial training: attacks and defenses,
    arXiv:1705.07204, section 3.4.
    """

    sources: tuple[Classifier, ...]
    threat: Threat
    attack: Attack | str = _FGSM
    alpha: float = 0.5
    own: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "attack", check_adversary(self.attack, self.threat))
        object.__setattr__(self, "sources", tuple(self.sources))
        check_number(self, least=0, most=1, alpha=self.alpha)
        if not self.sources or not all(isinstance(source, Classifier) for source in self.sources):
            raise InputError("EnsembleAdversarial: sources must be one or more trained models, such as (sp.Model(net),)")
        for source in self.sources:
            source.require(as_attack(self.attack).declaration.access, "EnsembleAdversarial's attack on a source")

    @property
    def adversary(self) -> tuple[Attack, Threat]:
        return as_attack(self.attack), self.threat

    def examples(self, batch: Batch) -> Tensor:
        if any(source.networks() == batch.model.networks() for source in self.sources):
            raise InputError("EnsembleAdversarial: sources are static; own=True adds the trained network")
        choice = drawn(batch, len(self.sources) + self.own)
        return craft(batch, self.attack, self.threat, source=self.sources[choice] if choice < len(self.sources) else None)

    def loss_at(self, batch: Batch, examples: Tensor) -> Tensor:
        clean, moved = (cross_entropy(batch.model.forward(x), batch.y) for x in (batch.x, examples))
        return self.alpha * clean + (1 - self.alpha) * moved
