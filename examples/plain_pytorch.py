"""Adversarial training in a plain PyTorch loop: `sp.perturb` makes the examples, the loop is yours.

Run: python examples/plain_pytorch.py
"""

import torch
from torch.nn.functional import cross_entropy

import saddlepoint as sp


def main(epochs: int = 10) -> float:
    """Train on digits against PGD-7, and return the robust accuracy on the test set."""
    digits = sp.data.load("digits")
    net = sp.zoo.build("digits-cnn")
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    attack, threat = sp.attacks.PGD(steps=7), sp.Linf(0.1)
    for epoch in range(epochs):
        for index in torch.randperm(len(digits.train)).split(128):
            x, y = digits.train.x[index], digits.train.y[index]
            adversarial = sp.perturb(net, x, y, attack, threat, seed=epoch, ids=index)
            loss = cross_entropy(net(adversarial), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    result = sp.attack(sp.Model(net), digits.test.x, digits.test.y, sp.attacks.PGD(steps=40), threat)
    print(result.summary())
    return result.robust_accuracy


if __name__ == "__main__":
    main()
