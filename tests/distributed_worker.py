"""What test_distributed.py trains, in one process and in two. As a program, under a launcher: PROGRAM FOLDER."""

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import saddlepoint as sp
from saddlepoint.defenses import loop
from saddlepoint.defenses.distributed import processes

DIGITS = sp.data.load("digits")
THREAT = sp.Linf(0.1)
PGD = sp.Adversarial(attack=sp.attacks.PGD(steps=3), threat=THREAT)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def make_net(*layers: nn.Module, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), *layers, nn.ReLU(), nn.Linear(32, 10))


def trained(adversary: object, samples: int = 129, *, net: nn.Module | None = None, **settings: object) -> sp.defenses.Training:
    """Two epochs of five batches, of which the last one holds one sample, or 22."""
    usual = {"epochs": 2, "batch_size": 32, "optimizer": SGD}
    return sp.train(net or make_net(), DIGITS.train.take(samples), adversary=adversary, **(usual | settings))


# What comes out as in one process, but for rounding. `several` has a choice for each batch, `awp` a gradient before the step,
# `free` a perturbation that goes on from batch to batch; `ema` has averages, `steps` the optimiser's own state.
SAME: dict[str, Callable[[], sp.defenses.Training]] = {
    "plain": partial(trained, None),
    "pgd": partial(trained, PGD),
    "several": partial(trained, sp.Adversarial(attack=(sp.attacks.PGD(steps=2), sp.attacks.FGSM()), threat=THREAT), 150),
    "trades": partial(trained, sp.defenses.TRADES(threat=THREAT), 150),
    "awp": partial(trained, sp.defenses.AWP(PGD, gamma=0.05)),
    "free": partial(trained, sp.defenses.Free(threat=THREAT, repeats=2), 150),
    "parseval": partial(trained, sp.defenses.Parseval(sp.defenses.Standard(), share=0.5)),
    "ema": partial(trained, PGD, average="ema", decay=0.5),
    "validated": partial(trained, PGD, validation=DIGITS.test.take(31), restore_best=True),
}


def everywhere_alike() -> dict[str, Callable[[], sp.defenses.Training]]:
    """What differs from one process, but not between the two: each share has its own batch statistics and dropout."""
    noisy = [nn.BatchNorm1d(32), nn.Dropout(0.3)]
    found = {f"recipe {name}": partial(recipe, name) for name in sorted(sp.defenses.RECIPES)}
    found["swa"] = lambda: trained(None, 150, net=make_net(*noisy), average="swa", average_from=0.1)
    found["seeds"] = lambda: trained(None, net=make_net(seed=processes().rank))
    return found


def recipe(name: str) -> sp.defenses.Training:
    """An epoch of a recipe, on a network with normalisation and dropout."""
    other = sp.Model(make_net(seed=1))
    more = {"hat": {"helper": other}, "ensemble": {"sources": (other,)}}.get(name, {})
    chosen = sp.defenses.recipe(name, THREAT, **more)
    net = make_net(nn.BatchNorm1d(32), nn.Dropout(0.3))
    return sp.train(net, DIGITS.train.take(40), adversary=chosen.objective, epochs=1, batch_size=32, **chosen.train)


def resumed(folder: Path) -> tuple[sp.defenses.Training, sp.defenses.Training]:
    """An uninterrupted run, and one that goes on from its checkpoint within the second epoch."""
    loop._CHECKPOINT_SECONDS, calls = -1.0, 0

    def augment(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 8 and processes().main:
            shutil.copy(folder / "run.pt", folder / "copy.pt")
        return x + 0.1 * torch.randn_like(x)

    settings = {"augment": augment, "validation": DIGITS.test.take(31)}
    free = sp.defenses.Free(threat=THREAT, repeats=2)
    nets = [make_net(nn.Dropout(0.3)) for _ in range(2)]
    whole = trained(free, net=nets[0], checkpoint=folder / "run.pt", **settings)
    processes().gather(None)  # the copy is there
    return whole, trained(free, net=nets[1], checkpoint=folder / "copy.pt", **settings)


def message(run: Callable[[], object]) -> str:
    """The error's text."""
    try:
        run()
    except sp.errors.SaddlepointError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(folder: Path) -> None:
    """Write what this process found to a file of its own."""
    state = processes(torch.device("cpu"))
    shown: list[int] = []
    found: dict[str, object] = {}
    for name, run in (SAME | everywhere_alike()).items():
        training = run()
        found[name] = training.model.networks()[0].state_dict()
        found[f"{name}: epochs"] = [(e.loss, e.clean_accuracy, e.robust_accuracy) for e in training.epochs]
    for name, training in zip(("whole", "resumed"), resumed(folder), strict=True):
        found[name] = training.model.networks()[0].state_dict()
    trained(None, on_epoch=lambda record: shown.append(record.epoch))
    found["shown"] = shown
    found["other data"] = message(lambda: trained(None, 129 + state.rank))
    found["nan"] = message(lambda: trained(None, optimizer=partial(torch.optim.SGD, lr=1e30)))
    torch.save(found, folder / f"{state.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
