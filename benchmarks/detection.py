"""What detectors cost: seconds to fit and to score 10,000 images, beside plain prediction, and passes through the network.

    SADDLEPOINT_DATA=... python benchmarks/detection.py [--quick] [--repeats N] [--json FILE] [DETECTOR ...]

DETECTOR: names with settings, such as kernel-density:bandwidth=1.2; without, the statistical ones. With SADDLEPOINT_DATA it
takes MNIST and mnist_lenet_standard (for dropout mnist_smallcnn_trades_eps0.3, whose prediction is then the base), otherwise
random images and weights. Detectors that learn from adversarial examples get 1,000 FGSM examples, made beforehand.
forward: rows through the network, over the images. One thread; the median over the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint import detectors
from saddlepoint.data import Split

STATISTICAL = (
    "max-probability", "logit-margin", "entropy", "energy", "kernel-density", "mahalanobis", "local-intrinsic-dimensionality",
    "tail-variance", "subset-scan", "dropout-uncertainty",
)  # fmt: skip
NETS = {"lenet": "mnist_lenet_standard.pt", "smallcnn": "mnist_smallcnn_trades_eps0.3.pt"}
EXAMPLES = 1000


def images(count: int) -> tuple[Split, Tensor, str]:
    """Samples to fit on, images to score, and which they are."""
    if "SADDLEPOINT_DATA" in os.environ:
        mnist = sp.data.load("mnist")
        assert mnist.train is not None
        return mnist.train.take(count), mnist.test.x[:count], "MNIST"
    generator = torch.Generator().manual_seed(0)
    x, new = torch.rand(2, count, 1, 28, 28, generator=generator)
    return Split(x, torch.randint(0, 10, (count,), generator=generator)), new, "random images"


def network(name: str) -> nn.Module:
    net = sp.zoo.build(name)
    folder = os.environ.get("SADDLEPOINT_DATA")
    return net if folder is None else sp.zoo.load_weights(net, Path(folder) / "models" / NETS[name])


class Counted:
    """A model, and how many rows went through its network."""

    def __init__(self, name: str) -> None:
        self.name, net, self.rows = name, network(name), 0
        net.register_forward_pre_hook(self._seen)
        self.model = sp.Model(net)

    def _seen(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.rows += len(inputs[0])

    def timed(self, run: Callable[[], object], repeats: int) -> tuple[float, float]:
        """Median seconds, and rows of one run."""
        seconds = []
        self.rows = 0
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds), self.rows / repeats


def table(names: list[str], count: int, repeats: int) -> tuple[list[dict[str, Any]], str]:
    fitting, new, which = images(count)
    models: dict[str, Counted] = {}
    plain: dict[str, float] = {}
    rows = []
    for text in names:
        detector = detectors.make(text)
        wanted = "smallcnn" if isinstance(detector, detectors.DropoutUncertainty) else "lenet"
        if wanted not in models:
            models[wanted] = Counted(wanted)
            plain[wanted], _ = models[wanted].timed(lambda: models[wanted].model.predict(new), repeats)  # noqa: B023
        counted = models[wanted]
        bad = None
        if detector.learns_attacks:
            some = fitting.take(EXAMPLES)
            bad = sp.attack(counted.model, some.x, some.y, "fgsm", sp.Linf(0.3)).adversarial
        fit, fit_rows = counted.timed(lambda: detector.fit(counted.model, fitting, bad), repeats)  # noqa: B023
        score, score_rows = counted.timed(lambda: detector.score(new), repeats)  # noqa: B023
        rows.append({
            "detector": text, "network": wanted, "prediction": plain[wanted], "fit": fit, "score": score,
            "fit_ratio": fit / plain[wanted], "score_ratio": score / plain[wanted],
            "fit_forward": fit_rows / count, "score_forward": score_rows / count,
        })  # fmt: skip
    return rows, which


def show(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n" + "| --- " * len(names) + "|")
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description="What detectors cost.")
    parser.add_argument("names", nargs="*", metavar="DETECTOR", default=STATISTICAL)
    parser.add_argument("--quick", action="store_true", help="100 images: whether it runs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    torch.set_num_threads(1)
    count, repeats = (100, 1) if options.quick else (10_000, options.repeats)
    rows, which = table(list(options.names), count, repeats)
    print(f"{count:,} images to fit on and {count:,} to score, {which}; seconds\n")
    show(rows)
    if options.json is not None:
        report = {"torch": torch.__version__, "threads": 1, "images": which, "count": count, "table": rows}
        options.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
