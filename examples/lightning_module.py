"""Adversarial training in Lightning: one line in `training_step`.

Run: pip install -e '.[lightning]' && python examples/lightning_module.py
"""

import lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import saddlepoint as sp


class Robust(lightning.LightningModule):
    """A classifier that is trained on PGD examples of every batch."""

    def __init__(self, net: torch.nn.Module, threat: sp.Linf) -> None:
        super().__init__()
        self.net, self.threat, self.attack = net, threat, sp.attacks.PGD(steps=7)

    def training_step(self, batch, batch_index):
        x, y = batch
        # a new seed for every step: random starts should not repeat
        adversarial = sp.perturb(self.net, x, y, self.attack, self.threat, seed=self.global_step)
        return cross_entropy(self.net(adversarial), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), lr=2e-3)


def main(epochs: int = 10) -> float:
    """Train on digits, and return the robust accuracy on the test set."""
    digits = sp.data.load("digits")
    module = Robust(sp.zoo.build("digits-cnn"), sp.Linf(0.1))
    loader = DataLoader(TensorDataset(digits.train.x, digits.train.y), batch_size=128, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(module, loader)
    result = sp.attack(sp.Model(module.net), digits.test.x, digits.test.y, sp.attacks.PGD(steps=40), module.threat)
    print(result.summary())
    return result.robust_accuracy


if __name__ == "__main__":
    main()
