"""What CERTIFY costs beside plain forward passes, and Cohen et al.'s table from the certificates that they published.

    SADDLEPOINT_DATA=... python benchmarks/smoothing.py [--quick] [--only {throughput,table}] [--net NAME ...] [--batch N]
                                                        [--repeats N] [--device D] [--precision P] [--threads N] [--json FILE]

throughput: samples a second of `certify`, of one image with many draws and of many images with few, and of the network alone
on as many inputs of the same noise, drawn beforehand, in batches of the same size and in the same precision. The two take
turns, and the ratio is the median over the turns; processor seconds where the device is the CPU, which other programs on the
machine disturb less. Target: 0.9. Random weights: what is certified doesn't matter here.
table: certified accuracy at radii, recounted from `verification/smoothing_cohen` of the data folder.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import saddlepoint as sp
from saddlepoint.defenses import Smoothed
from saddlepoint.verify.smoothing import certified_at, certify

TARGET = 0.9
SHAPES = {"digits-cnn": (1, 8, 8), "cnn-a": (1, 28, 28), "cnn-s": (1, 28, 28), "resnet20": (3, 32, 32), "resnet56": (3, 32, 32)}
RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long it takes."""
    if device.type == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - began


def throughput(name: str, images: int, options: argparse.Namespace) -> dict[str, object]:
    """One network and one number of images; `options.batches` batches in all."""
    device = torch.device(options.device)
    model = sp.Model(sp.zoo.build(name).to(device))
    smoothed = Smoothed(model, 0.5)
    x = torch.rand(images, *SHAPES[name], device=device)
    each = options.batches * options.batch // images
    shape = (options.batches, options.batch, *SHAPES[name])
    noisy = torch.rand(shape, device=device) + 0.5 * torch.randn(shape, device=device)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16")

    def plain() -> None:
        with model.frozen(), torch.no_grad(), mixed:
            for batch in noisy:
                model.forward(batch)

    def certified() -> None:
        certify(smoothed, x, n0=1, n=each - 1, batch_size=options.batch, precision=options.precision)

    plain(), certified()  # to warm up
    turns = [(seconds(plain, device), seconds(certified, device)) for _ in range(options.repeats)]
    rows = images * each
    return {
        "net": name, "images": images, "draws": each, "batch": options.batch,
        "plain": rows / statistics.median(a for a, _ in turns), "certify": rows / statistics.median(b for _, b in turns),
        "ratio": statistics.median(a / b for a, b in turns),
    }  # fmt: skip


def table(folder: Path) -> list[dict[str, object]]:
    """Certified accuracy of each file at `RADII`."""
    found: list[dict[str, object]] = []
    for path in sorted(folder.glob("*.tsv.gz")):
        head, *lines = gzip.decompress(path.read_bytes()).decode().strip().split("\n")
        column = dict(zip(head.split("\t"), zip(*(line.split("\t") for line in lines), strict=True), strict=True))
        prediction, y = (torch.tensor([int(value) for value in column[key]]) for key in ("predict", "label"))
        radius = torch.tensor([float(value) for value in column["radius"]], dtype=torch.float64)
        right: list[Tensor] = [certified_at(each, prediction, radius, y) for each in RADII]
        found.append({"file": path.name, "images": len(y), "certified": [int(each.sum()) for each in right]})
    return found


def main() -> int:
    """Print both tables; 1 if a ratio is below the target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="whether it runs, not how fast")
    parser.add_argument("--only", choices=("throughput", "table"))
    parser.add_argument("--net", nargs="+", choices=tuple(SHAPES), default=["cnn-s", "resnet20"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=16, help="in each turn")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.net, options.batch, options.batches, options.repeats = ["digits-cnn"], 128, 4, 2
    torch.set_num_threads(options.threads)
    rows, counted = [], []
    if options.only != "table":
        print(f"{'network':12} {'images':>6} {'draws':>7} {'plain/s':>10} {'certify/s':>10} {'ratio':>6}")
        for name in options.net:
            for images in (1, 64):
                row = throughput(name, images, options)
                rows.append(row)
                print("{net:12} {images:6} {draws:7} {plain:10.0f} {certify:10.0f} {ratio:6.2f}".format(**row), flush=True)
    if options.only != "throughput":
        folder = Path(os.environ.get("SADDLEPOINT_DATA", "")) / "verification" / "smoothing_cohen"
        counted = table(folder)
        print(f"\n{'certified accuracy, %, at radius':32}" + "".join(f"{radius:7g}" for radius in RADII))
        for one in counted:
            shares = "".join(f"{100 * right / one['images']:7.1f}" for right in one["certified"])  # type: ignore[attr-defined,operator]
            print(f"{one['file']:32}{shares}")
        if not counted:
            print(f"none: there is no {folder}")
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "throughput": rows, "table": counted}, indent=1))
    return int(not options.quick and any(float(str(row["ratio"])) < TARGET for row in rows))


if __name__ == "__main__":
    sys.exit(main())
