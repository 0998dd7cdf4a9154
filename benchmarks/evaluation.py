"""Robust accuracy: `sp.evaluate` beside AutoAttack, verdicts and passes on the same images.

    SADDLEPOINT_DATA=... python benchmarks/evaluation.py --cache FILE [--rows NAME ...] [--count N] [--only {ours,autoattack}]
    SADDLEPOINT_DATA=... python benchmarks/evaluation.py --cache FILE --rows NAME --count N --batch SIZE     # how it grows
    SADDLEPOINT_DATA=... python benchmarks/evaluation.py --cache FILE --table

AutoAttack is our `sp.attacks.AutoAttack()`: 60 images each of mnist_lenet_adv_eps0.3 and cifar10_cnnA_adv got the verdicts of
the authors' code, for 1 to 2 % fewer passes. Passes are rows per image that a counting module saw, forward and backward, over
all images, those included that were wrong or fell early; confirmations, the probe and the diagnosis are in them. Each run has
a process of its own, one thread; its peak memory is what it took beyond the loaded model and data. The cache is a file of JSON
lines, one for each finished run; beside it the weights of the network that we train, mnist_fgsm, are kept.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from minimal import network
from overhead import Counting
from torch import nn

import saddlepoint as sp
from saddlepoint.data.dataset import Split

ROWS = {
    "mnist_smallcnn_trades_eps0.3": (sp.Linf(0.3), 10), "mnist_cnnA_pgd_eps0.3": (sp.Linf(0.3), 10),
    "cifar10_cnnA_adv": (sp.Linf(2 / 255), 40), "cifar10_resnet2b_adv": (sp.Linf(2 / 255), 40),
    "cifar10_convsmall_pgd": (sp.Linf(2 / 255), 40), "cifar10_cnnA_adv l2": (sp.L2(0.25), 40),
    "mnist_lenet_adv_eps0.3 l2": (sp.L2(1.5), 10), "mnist_fgsm": (sp.Linf(0.3), 10),
    "cifar10_resnet20_standard": (sp.Linf(2 / 255), 5),
}  # fmt: skip
"""Network (and norm, where it has two rows): the threat, and by how much we want to be cheaper."""
OURS, AUTOATTACK = "sp.evaluate", "AutoAttack"


def trained_with_fgsm(weights: Path) -> tuple[nn.Module, Split]:
    """MNIST's cnn-s, trained with one step from a random point of the ball (Wong et al. 2020, arXiv:2001.03994); 2 minutes."""
    data = sp.data.load("mnist")
    net = sp.zoo.build("cnn-s", in_shape=(1, 28, 28))
    if weights.is_file():
        sp.zoo.load_weights(net, weights)
    else:
        one_step = sp.attacks.PGD(steps=1, step_size=0.375)
        sp.train(
            net, data.train, adversary=sp.Adversarial(attack=one_step, threat=sp.Linf(0.3), warmup=2), epochs=8, progress=True
        )
        sp.zoo.save_weights(net, weights)
    return net.eval().requires_grad_(False), data.test


def measure(name: str, who: str, count: int, batch: int | None, seed: int, weights: Path) -> dict[str, object]:
    torch.set_num_threads(1)
    threat, _ = ROWS[name]
    net, split = trained_with_fgsm(weights) if name == "mnist_fgsm" else network(name.split()[0])
    x, y = split.x[:count].contiguous(), split.y[:count].contiguous()
    counting = Counting(net).eval()
    model = sp.Model(counting)
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak of what was loaded
    began, before = time.perf_counter(), _kib("VmRSS")
    if who == OURS:
        found = sp.evaluate(model, x, y, threat, batch_size=batch, seed=seed)
        stands, notes = found.stands, list(found.notes)
    else:
        result = sp.attack(model, x, y, sp.attacks.AutoAttack(), threat, batch_size=batch, seed=seed)
        stands, notes = result.robust, list(result.notes)
    return {
        "row": name, "who": who, "count": count, "batch": batch, "seed": seed,
        "stands": stands.nonzero()[:, 0].tolist(), "notes": notes,
        "forward": sum(counting.forward_calls) / count, "backward": sum(counting.backward_calls) / count,
        "seconds": time.perf_counter() - began, "kib": _kib("VmHWM") - before,
    }  # fmt: skip


def _kib(name: str) -> int:
    """Memory of this process, as Linux counts it."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0])


def table(runs: list[dict[str, object]]) -> None:
    head = "network and threat | images | AutoAttack | passes | ours | passes | cheaper by | asked | only ours broke"
    print(f"| {head} | only AutoAttack broke |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, (threat, asked) in ROWS.items():
        mine = [run for run in runs if run["row"] == name and run.get("batch") is None and not run.get("seed")]
        for count in sorted({run["count"] for run in mine}):
            latest = {run["who"]: run for run in mine if run["count"] == count}
            if OURS not in latest:
                continue
            cells = [f"{name.split()[0]}, {threat.norm} {threat.largest_eps:.4g}", str(count)]
            both = [latest.get(who) for who in (AUTOATTACK, OURS)]
            for run in both:
                price = "-" if run is None else f"{run['forward'] + run['backward']:.0f}"
                cells += ["-" if run is None else f"{len(run['stands']) / count:.2%}", price]
            if (theirs := both[0]) is not None:
                first, second = (set(run["stands"]) for run in both)
                ratio = (theirs["forward"] + theirs["backward"]) / (both[1]["forward"] + both[1]["backward"])
                cells += [f"{ratio:.0f}", str(asked), str(len(first - second)), str(len(second - first))]
            else:
                cells += ["-", str(asked), "-", "-"]
            print("| " + " | ".join(cells) + " |")


def costs(runs: list[dict[str, object]]) -> None:
    """Time and memory, of the runs that were measured with them."""
    print("\n| network and threat | images | batch | who | passes | seconds | peak memory, MiB |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: |")
    for run in sorted((run for run in runs if "kib" in run), key=lambda run: (run["row"], run["count"], run["batch"] or 0)):
        threat, _ = ROWS[run["row"]]
        where = (
            f"{run['row'].split()[0]}, {threat.norm} {threat.largest_eps:.4g} | {run['count']} | {run['batch'] or 'default'}"
        )
        price = f"{run['forward'] + run['backward']:.0f} | {run['seconds']:.1f} | {run['kib'] / 1024:.0f}"
        print(f"| {where} | {run['who']} | {price} |")


def main() -> int:
    parser = argparse.ArgumentParser(description="sp.evaluate beside AutoAttack.")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="NAME")
    parser.add_argument("--count", type=int, default=1000, help="the first so many test images; default 1000")
    parser.add_argument("--batch", type=int, metavar="SIZE", help="samples under attack at once; default chosen by size")
    parser.add_argument("--seed", type=int, default=0, help="default 0, which the first table is made of")
    parser.add_argument("--only", choices=["ours", "autoattack"])
    parser.add_argument("--again", action="store_true", help="measure anew what the cache holds")
    parser.add_argument("--cache", type=Path, required=True, metavar="FILE")
    parser.add_argument("--table", action="store_true", help="print what the cache holds, run nothing")
    options = parser.parse_args()
    weights = options.cache.with_suffix(".safetensors")
    runs = [json.loads(line) for line in options.cache.read_text().splitlines()] if options.cache.is_file() else []
    for name in [] if options.table else options.rows:
        for who in {"ours": (OURS,), "autoattack": (AUTOATTACK,), None: (OURS, AUTOATTACK)}[options.only]:
            what = (name, who, options.count, options.batch, options.seed)
            known = [(run["row"], run["who"], run["count"], run.get("batch"), run.get("seed", 0)) for run in runs]
            if options.again or what not in known:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                    runs.append(alone.submit(measure, *what, weights).result())
                with options.cache.open("a") as file:
                    file.write(json.dumps(runs[-1]) + "\n")
                print(f"{name}, {who}: {len(runs[-1]['stands']) / options.count:.2%}, {runs[-1]['seconds']:.0f} s", flush=True)
    table(runs)
    costs(runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
