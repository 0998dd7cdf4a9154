"""What our training loop costs: `sp.train` beside PGD training written by hand, and each recipe beside clean training.

    python benchmarks/training.py [--quick] [--only {loop,recipes}] [--case NAME ...] [--repeats N] [--steps N] [--json FILE]

loop: a whole epoch, of the same batches in both: order, attack, step, and for `sp.train` its checks, its seeds and its history.
The two take turns, and the ratio is the median over the turns. Limits: 1.05 where a step takes 50 ms or more, 1.15 below.
recipes: seconds and passes (rows through the network, forward and backward, over the batch size) of one step of each recipe,
and the factor over a clean one. One thread, random images and weights: what is learned doesn't matter here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from overhead import DEEP, LONG_STEP, SHALLOW
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import saddlepoint as sp
from saddlepoint import defenses

Case = tuple[str, tuple[int, int, int], int, int, float]  # network, shape, batch, steps of PGD, eps
CASES: dict[str, Case] = {
    "digits-cnn, 8x8": ("digits-cnn", (1, 8, 8), 128, 10, 0.1),
    "cnn-a, 28x28": ("cnn-a", (1, 28, 28), 128, 7, 0.3),
    "lenet, 28x28": ("lenet", (1, 28, 28), 64, 7, 0.3),
    "resnet20, 3x32x32": ("resnet20", (3, 32, 32), 16, 7, 8 / 255),
}


def by_hand(net: nn.Module, x: Tensor, y: Tensor, batch: int, steps: int, eps: float) -> None:
    """One epoch of PGD training (Madry et al. 2018), as one would write it in a script."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    alpha = 2.5 * eps / steps
    for index in torch.randperm(len(x)).split(batch):
        clean, label = x[index], y[index]
        net.eval()
        moved = (clean + torch.empty_like(clean).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(steps):
            moved = moved.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(net(moved), label), moved)
            moved = moved.detach() + alpha * gradient.sign()
            moved = torch.clamp(torch.min(torch.max(moved, clean - eps), clean + eps), 0, 1)
        net.train()
        loss = cross_entropy(net(moved.detach()), label)
        loss.item()  # both look at the loss of each step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def ours(net: nn.Module, x: Tensor, y: Tensor, batch: int, objective: defenses.Objective, **settings: Any) -> None:
    sp.train(net, (x, y), adversary=objective, epochs=1, batch_size=batch, **settings)


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and seconds of the processor, which other work on the machine changes less."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def images(count: int, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, *shape, generator=generator), torch.randint(0, 10, (count,), generator=generator)


class Counting(nn.Module):
    """Counts rows, forward, and backward from the logits: the attack's gradients and the training step's own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.rows = net, [0, 0]

    def forward(self, x: Tensor) -> Tensor:
        self.rows[0] += len(x)
        logits: Tensor = self.net(x)
        if logits.requires_grad:
            logits.register_hook(self._seen)
        return logits

    def _seen(self, gradient: Tensor) -> None:
        self.rows[1] += len(gradient)


def passes(run: Callable[[nn.Module], None], net: nn.Module) -> list[int]:
    """Rows that went through the network, forward and backward."""
    counting = Counting(net)
    run(counting)
    return counting.rows


def loop_table(cases: dict[str, Case], count: int, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, (network, shape, batch, steps, eps) in cases.items():
        x, y = images(count * batch, shape)
        nets = [sp.zoo.build(network, in_shape=shape) for _ in range(2)]
        objective = sp.Adversarial(attack=sp.attacks.PGD(steps=steps), threat=sp.Linf(eps))
        hand = lambda net: by_hand(net, x, y, batch, steps, eps)  # noqa: B023, E731  # called at once
        mine = lambda net: ours(net, x, y, batch, objective)  # noqa: B023, E731
        turns = [(timed(lambda: hand(nets[0])), timed(lambda: mine(nets[1]))) for _ in range(repeats + 1)][1:]  # noqa: B023
        step = statistics.median(first[0] for first, _ in turns) / count
        rows.append({
            "case": name, "steps": steps, "batch": batch, "by_hand_ms": 1000 * step,
            "ours_ms": 1000 * statistics.median(second[0] for _, second in turns) / count,
            "ratio": statistics.median(second[0] / first[0] for first, second in turns),
            "cpu_ratio": statistics.median(second[1] / first[1] for first, second in turns),
            "limit": DEEP if step >= LONG_STEP else SHALLOW,
            "passes_by_hand": passes(hand, nets[0]), "passes_ours": passes(mine, nets[1]),
        })  # fmt: skip
    return rows


def recipe_table(names: list[str], count: int, repeats: int) -> list[dict[str, Any]]:
    network, shape, batch, _, eps = CASES["digits-cnn, 8x8"]
    x, y = images(count * batch, shape)
    helper = sp.Model(sp.zoo.build(network, in_shape=shape))
    given: dict[str, dict[str, Any]] = {"hat": {"helper": helper}, "ensemble": {"sources": (helper,)}, "cutout": {"size": 3}}
    rows: list[dict[str, Any]] = []
    for name in names:
        recipe = defenses.recipe(name, sp.Linf(eps), **given.get(name, {}))
        net = sp.zoo.build(network, in_shape=shape)
        run = lambda net: ours(net, x, y, batch, recipe.objective)  # noqa: B023, E731
        seconds = statistics.median([timed(lambda: run(net))[0] for _ in range(repeats + 1)][1:])  # noqa: B023
        forward, backward = passes(run, net)
        updates = recipe.objective.replays * count
        rows.append({
            "recipe": name, "ms": 1000 * seconds / updates, "forward": forward / updates / batch,
            "backward": backward / updates / batch,
        })  # fmt: skip
        rows[-1]["factor"] = rows[-1]["ms"] / rows[0]["ms"]
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n" + "| --- " * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    print()


def main() -> int:
    parser = argparse.ArgumentParser(description="What our training loop costs.")
    parser.add_argument("--quick", action="store_true", help="one small case, two steps: whether it runs")
    parser.add_argument("--only", choices=["loop", "recipes"])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), help="rows of the first table")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="batches in an epoch; default 20")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.repeats < 1 or options.steps < 1:
        parser.error("--repeats and --steps must be at least 1")
    torch.set_num_threads(1)
    cases, names, count, repeats = (
        {name: CASES[name] for name in options.case},
        list(defenses.RECIPES),
        options.steps,
        options.repeats,
    )
    if options.quick:
        cases, names, count, repeats = {"digits-cnn, 8x8": ("digits-cnn", (1, 8, 8), 8, 3, 0.1)}, ["standard", "fast"], 2, 1
    tables = {}
    if options.only != "recipes":
        tables["loop"] = loop_table(cases, count, repeats)
    if options.only != "loop":
        tables["recipes"] = recipe_table(names, count, repeats)
    for rows in tables.values():
        show(rows)
    if options.json is not None:
        options.json.write_text(json.dumps({"torch": torch.__version__, "threads": 1, "tables": tables}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
