"""What our engine costs beside a bare loop and beside other libraries: wall time, passes, occupancy.

    SADDLEPOINT_DATA=... python benchmarks/overhead.py [--quick] [--only TABLE] [--repeats N] [--json FILE]

See benchmarks/README.md for what each table measures. Trained networks and real images are used where SADDLEPOINT_DATA
has them, otherwise random weights and images, and the tables say so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peers import Attack, Peer, Setting, installed
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import saddlepoint as sp
from saddlepoint import data, zoo

TABLES = ("attack", "stopping", "training", "occupancy")
DEEP, SHALLOW = 1.05, 1.15  # limits: on ResNet-20 or where a training step takes 50 ms; on CNN-A or below that
LONG_STEP = 0.050  # seconds


class Counting(nn.Module):
    """Counts the rows of each call of `net`, forward and backward."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.forward_calls: list[int] = []
        self.backward_calls: list[int] = []

    def reset(self) -> None:
        self.forward_calls.clear()
        self.backward_calls.clear()

    def forward(self, x: Tensor) -> Tensor:
        self.forward_calls.append(len(x))
        return self.net(_Seen.apply(x, self.backward_calls))  # type: ignore[no-any-return]


class _Seen(torch.autograd.Function):
    """Identity; notes the rows of its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, calls: list[int]) -> Tensor:
        ctx.calls = calls
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.calls.append(len(gradient))
        return gradient, None


class Normalised(nn.Module):
    """`net` behind its normalisation, so that everybody attacks the same module on inputs in [0, 1]."""

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x - self.mean) / self.std)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """A network in eval mode with inputs and labels. origin: where weights and inputs come from, in words."""

    name: str
    origin: str
    net: nn.Module
    x: Tensor
    y: Tensor

    def predicted_right(self, count: int) -> Case:
        """The first `count` samples that the network gets right."""
        right = (predict(self.net, self.x) == self.y).nonzero()[:count, 0]
        return Case(self.name, self.origin, self.net, self.x[right], self.y[right])


def predict(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(part).argmax(1) for part in torch.split(x, 128)])


def random_case(name: str, network: str, shape: tuple[int, int, int], count: int) -> Case:
    """Initial weights; labels are what they predict."""
    net = zoo.build(network, in_shape=shape).eval()
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0))
    return Case(name, "random weights and inputs, labels as predicted", net, x, predict(net, x))


def trained_case(name: str, weights: str, network: str, shape: tuple[int, int, int], count: int) -> Case:
    """The network and data of that weight file, or a random stand-in."""
    root = Path(os.environ.get("SADDLEPOINT_DATA", ""))
    if "SADDLEPOINT_DATA" not in os.environ or not (root / "models" / f"{weights}.pt").is_file():
        return random_case(name, network, shape, count)
    from zoo import REFERENCES, reference  # benchmarks/zoo.py

    net, mean, std, _ = reference(weights, root)
    dataset = REFERENCES[weights].dataset
    try:
        split = data.load(dataset, root=root).test.take(count)
    except sp.DataError:
        return random_case(name, network, shape, count)
    return Case(name, f"{weights}, {dataset} test images", Normalised(net, mean, std).eval(), split.x, split.y)


def tiny_case() -> Case:
    """For --quick: an untrained network on the embedded digits."""
    net = zoo.build("digits-cnn").eval()
    x = data.load("digits").test.x[:40]
    return Case("digits-cnn", "random weights, digits, labels as predicted", net, x, predict(net, x))


def bare_pgd(
    net: nn.Module, x: Tensor, y: Tensor, setting: Setting, seed: int, *, extra: bool = True, confirm: bool = True
) -> Tensor:
    """What one writes by hand. extra: look at the clean and the final inputs, as we do; confirm: and at the successes again."""
    eps = setting.eps
    generator = torch.Generator().manual_seed(seed)
    lower, upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    with torch.no_grad():
        if extra:
            net(x)
        noise = torch.rand(x.shape, generator=generator)
        adversarial = torch.clamp(x + eps * (2 * noise - 1), lower, upper)
    for _ in range(setting.steps):
        adversarial.requires_grad_()
        loss = functional.cross_entropy(net(adversarial), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, adversarial)
        with torch.no_grad():
            adversarial = torch.clamp(adversarial + setting.step * gradient.sign(), lower, upper)
    if extra:
        with torch.no_grad():
            fooled = net(adversarial).argmax(1) != y
            if confirm and bool(fooled.any()):
                net(adversarial[fooled])
    return adversarial


def bare_textbook(net: nn.Module, x: Tensor, y: Tensor, setting: Setting, seed: int) -> Tensor:
    """K forward and K backward passes, and nothing else."""
    return bare_pgd(net, x, y, setting, seed, extra=False)


def probed(net: nn.Module, x: Tensor) -> sp.Model:
    """Our model, already looked at: that happens once per model, not per attack, and isn't counted or timed here."""
    model = sp.Model(net)
    model.probe(x)
    if isinstance(net, Counting):
        net.reset()
    return model


def ours(model: sp.Model, keep: Any, loss: str = "cross_entropy") -> Attack:
    """Our PGD on a model that is probed already."""

    def attack(net: nn.Module, x: Tensor, y: Tensor, setting: Setting, seed: int) -> Tensor:
        pgd = sp.attacks.PGD(steps=setting.steps, step_size=setting.step, loss=loss)
        target = model if model.net is net else probed(net, x)
        result = sp.attack(target, x, y, pgd, sp.Linf(setting.eps), keep=keep, seed=seed, batch_size=setting.batch)
        return result.adversarial

    return attack


def in_batches(attack: Attack) -> Attack:
    """For those that take one batch at a time."""

    def run(net: nn.Module, x: Tensor, y: Tensor, setting: Setting, seed: int) -> Tensor:
        cut = (torch.split(t, setting.batch) for t in (x, y))
        return torch.cat([attack(net, px, py, setting, seed + 1000 * i) for i, (px, py) in enumerate(zip(*cut, strict=True))])

    return run


@dataclass
class Timing:
    """Seconds of one contender in each round."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleaved(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time each contender once a round, in turn, so that what slows the machine down for a while meets all of them."""
    timings = {name: Timing() for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            timings[name].wall.append(time.perf_counter() - wall)
            timings[name].cpu.append(time.process_time() - cpu)
    return timings


def against(timing: Timing, base: Timing) -> dict[str, float]:
    """Ratios round by round: the median with the extremes, in wall time, and the median in processor time."""
    ratios = sorted(a / b for a, b in zip(timing.wall, base.wall, strict=True))
    cpu = statistics.median(a / b for a, b in zip(timing.cpu, base.cpu, strict=True))
    return {
        "seconds": statistics.median(timing.wall), "ratio": statistics.median(ratios), "lowest": ratios[0],
        "highest": ratios[-1], "cpu_ratio": cpu,
    }  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What an attack cost and reached: rows a sample, and the share of all samples that stays right."""

    forward: float
    backward: float
    robust: float
    outside: float

    def row(self) -> dict[str, float]:
        return {"forward": self.forward, "backward": self.backward, "robust": self.robust, "outside": self.outside}


def outcome(attack: Attack, case: Case, setting: Setting, seed: int) -> Outcome:
    counting = Counting(case.net).eval()
    adversarial = attack(counting, case.x, case.y, setting, seed)
    away = float((adversarial - case.x).abs().max()) - setting.eps
    beyond = max(away, -float(adversarial.min()), float(adversarial.max()) - 1)
    robust = float((predict(case.net, adversarial) == case.y).double().mean())
    count = len(case.x)
    return Outcome(sum(counting.forward_calls) / count, sum(counting.backward_calls) / count, robust, beyond)


def attack_table(cases: Sequence[tuple[Case, Setting, float]], peers: Sequence[Peer], repeats: int) -> list[dict[str, Any]]:
    """PGD without early stop beside the bare loop of the same passes."""
    rows = []
    for case, setting, limit in cases:
        model = probed(case.net, case.x)
        attacks: dict[str, Attack] = {
            "bare loop, same passes": bare_pgd,
            'ours, keep="margin"': ours(model, "margin"),
            'ours, keep="last"': ours(model, "last"),
            "bare loop, K + K passes": bare_textbook,
        }
        failed = {peer.name: peer.error for peer in peers if peer.attack is None}
        attacks |= {peer.name: peer.attack for peer in peers if peer.attack is not None}
        for name, attack in list(attacks.items()):
            try:
                attack(case.net, case.x, case.y, replace(setting, steps=1), 0)  # warm up
            except Exception as error:
                if name not in {peer.name for peer in peers}:
                    raise
                failed[name] = f"{type(error).__name__}: {error}"  # a peer's error is a result
                del attacks[name]
        calls = {name: _bound(attack, case, setting) for name, attack in attacks.items()}
        timings = interleaved(calls, repeats)
        base = timings["bare loop, same passes"]
        for name, attack in attacks.items():
            row = {"case": case.name, "origin": case.origin, "who": name} | against(timings[name], base)
            row |= outcome(attack, case, setting, 0).row()
            if name.startswith("ours"):
                row |= {"limit": limit, "met": row["ratio"] <= limit}
            rows.append(row)
        rows += [{"case": case.name, "origin": case.origin, "who": name, "error": text} for name, text in failed.items()]
    return rows


def _bound(attack: Attack, case: Case, setting: Setting) -> Callable[[], object]:
    return lambda: attack(case.net, case.x, case.y, setting, 0)


def stopping_table(cases: Sequence[tuple[Case, Setting]], peers: Sequence[Peer], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Passes and robust accuracy with early stopping, at the same eps, steps and step size."""
    rows = []
    for case, setting in cases:
        model = probed(case.net, case.x)
        attacks = {
            'ours, keep="first"': ours(model, "first"),
            'ours, the same with loss="margin"': ours(model, "first", "margin"),
            "bare loop": in_batches(bare_textbook),
        }
        attacks |= {peer.name: in_batches(peer.attack) for peer in peers if peer.attack is not None}
        failed = {peer.name: peer.error for peer in peers if peer.attack is None}
        for name, attack in attacks.items():
            try:
                found = [outcome(attack, case, setting, seed) for seed in seeds]
            except Exception as error:
                if name.startswith(("ours", "bare")):
                    raise
                failed[name] = f"{type(error).__name__}: {error}"
                continue
            forward, backward = (statistics.mean(getattr(o, way) for o in found) for way in ("forward", "backward"))
            robust = [o.robust for o in found]
            rows.append(
                {
                    "case": case.name,
                    "origin": case.origin,
                    "who": name,
                    "forward": forward,
                    "backward": backward,
                    "passes": forward + backward,
                    "robust_worst": max(robust),
                    "robust_best": min(robust),
                    "outside": max(o.outside for o in found),
                }
            )  # fmt: skip
        here = [row for row in rows if row["case"] == case.name]
        others = [row for row in here if not row["who"].startswith("ours")]
        for mine in (row for row in here if row["who"].startswith("ours")):
            mine["met"] = all(mine["passes"] < o["passes"] and mine["robust_worst"] <= o["robust_worst"] for o in others)
        rows += [{"case": case.name, "origin": case.origin, "who": name, "error": text} for name, text in failed.items()]
    return rows


def training_table(cases: Sequence[tuple[Case, Setting]], repeats: int) -> list[dict[str, Any]]:
    """A step of adversarial training with `sp.perturb` beside one by hand."""
    rows = []
    for case, setting in cases:
        net, x, y = case.net, case.x, case.y
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)
        attack, threat = sp.attacks.PGD(steps=setting.steps, step_size=setting.step), sp.Linf(setting.eps)

        def by_hand(net: nn.Module = net, x: Tensor = x, y: Tensor = y, setting: Setting = setting) -> Tensor:
            net.eval()
            return bare_textbook(net, x, y, setting, 0)

        def by_us(net: nn.Module = net, x: Tensor = x, y: Tensor = y, attack: Any = attack, threat: Any = threat) -> Tensor:
            return sp.perturb(net, x, y, attack, threat)

        def step(
            perturb: Callable[[], Tensor],
            net: nn.Module = net,
            y: Tensor = y,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> None:
            adversarial = perturb()
            net.train()
            optimizer.zero_grad()
            functional.cross_entropy(net(adversarial), y).backward()
            optimizer.step()

        def bare_step(step: Callable[..., None] = step, by_hand: Callable[[], Tensor] = by_hand) -> None:
            step(by_hand)

        def our_step(step: Callable[..., None] = step, by_us: Callable[[], Tensor] = by_us) -> None:
            step(by_us)

        bare_step()
        our_step()  # warm up
        timings = interleaved({"by hand": bare_step, "sp.perturb": our_step}, repeats)
        base = timings["by hand"]
        limit = DEEP if statistics.median(base.wall) >= LONG_STEP else SHALLOW
        for name, timing in timings.items():
            row: dict[str, Any] = {"case": case.name, "origin": case.origin, "who": name} | against(timing, base)
            if name == "sp.perturb":
                row |= {"limit": limit, "met": row["ratio"] <= limit}
            rows.append(row)
        net.eval()
    return rows


def occupancy_table(cases: Sequence[tuple[Case, Setting]]) -> list[dict[str, Any]]:
    """How full the model's batches are while samples finish at different steps."""
    rows = []
    for case, setting in cases:
        counting = Counting(case.net).eval()
        result = sp.attack(
            probed(counting, case.x), case.x, case.y, sp.attacks.PGD(steps=setting.steps, step_size=setting.step),
            sp.Linf(setting.eps), batch_size=setting.batch,
        )  # fmt: skip
        queries = result.queries
        forward, backward = counting.forward_calls, counting.backward_calls
        wanted = int(queries.forward.sum() + queries.verify.sum())
        rows.append(
            {
                "case": case.name,
                "origin": case.origin,
                "who": 'ours, keep="first"',
                "samples": len(case.x),
                "batch": setting.batch,
                "calls": len(forward),
                "rows": sum(forward),
                "occupancy": sum(forward) / len(forward) / setting.batch,
                "gradient_calls": len(backward),
                "gradient_occupancy": sum(backward) / len(backward) / setting.batch,
                "least_calls": math.ceil(wanted / setting.batch),
                "sum_of_costs": wanted,
            }
        )  # fmt: skip
    return rows


def settings_for(
    quick: bool, names: Sequence[str], repeats: int, seeds: Sequence[int], peers: Sequence[Peer]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Run the tables of these names."""
    if quick:
        tiny = tiny_case()
        setting = Setting(0.1, 0.02, 3, 16)
        batch = Case(tiny.name, tiny.origin, tiny.net, tiny.x[:16], tiny.y[:16])
        runs: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "attack": lambda: attack_table([(batch, setting, SHALLOW)], peers, repeats),
            "stopping": lambda: stopping_table([(tiny, setting)], peers, seeds),
            "training": lambda: training_table([(batch, setting)], repeats),
            "occupancy": lambda: occupancy_table([(tiny, setting)]),
        }
    else:
        rgb, grey = (3, 32, 32), (1, 28, 28)
        of_cifar, of_mnist = Setting(8 / 255, 2 / 255, 40, 128), Setting(0.3, 0.01, 40, 128)

        def resnet() -> Case:
            return trained_case("ResNet-20, 32x32x3", "cifar10_resnet20_standard", "resnet20", rgb, 200).predicted_right(128)

        def cnn_rgb(count: int = 128) -> Case:
            case = trained_case("CNN-A, 32x32x3", "cifar10_cnnA_adv", "cnn-a", rgb, max(count, 400))
            return case.predicted_right(count) if count == 128 else case

        def cnn_grey() -> Case:
            return trained_case("CNN-A, 28x28x1", "mnist_cnnA_pgd_eps0.3", "cnn-a", grey, 400).predicted_right(128)

        def lenet() -> Case:
            return trained_case("LeNet, 28x28x1", "mnist_lenet_adv_eps0.3", "lenet", grey, 500)

        gentle = Setting(2 / 255, 0.5 / 255, 40, 128)
        seven_cifar, seven_mnist = Setting(8 / 255, 2 / 255, 7, 128), Setting(0.3, 0.1, 7, 128)
        runs = {
            "attack": lambda: (
                attack_table([(cnn_rgb(), of_cifar, SHALLOW), (cnn_grey(), of_mnist, SHALLOW)], peers, 5 * repeats)
                + attack_table([(resnet(), of_cifar, DEEP)], peers, repeats)
            ),
            "stopping": lambda: stopping_table([(cnn_rgb(1000), gentle), (lenet(), of_mnist)], peers, seeds),
            "training": lambda: (
                training_table([(cnn_grey(), seven_mnist), (cnn_rgb(), seven_cifar)], 20 * repeats)
                + training_table([(resnet(), seven_cifar)], repeats)
            ),
            "occupancy": lambda: occupancy_table([(cnn_rgb(1000), gentle), (lenet(), of_mnist)]),
        }
    for name in names:
        yield name, runs[name]()


COLUMNS: dict[str, tuple[str, tuple[tuple[str, str, str], ...]]] = {
    "attack": (
        "PGD without early stop, one batch; ratio = wall time over the bare loop of the same passes",
        (
            ("seconds", "seconds", ".3f"), ("ratio", "ratio", ".3f"), ("lowest", "lowest", ".3f"),
            ("highest", "highest", ".3f"), ("cpu_ratio", "cpu ratio", ".3f"), ("forward", "forward / sample", ".2f"),
            ("backward", "backward / sample", ".2f"), ("robust", "robust", ".1%"),
            ("limit", "limit", ".2f"), ("met", "met", ""),
        ),
    ),
    "stopping": (
        "Early stop: passes a sample and robust accuracy (highest and lowest of the seeds), same eps, steps and step size",
        (
            ("forward", "forward", ".1f"), ("backward", "backward", ".1f"), ("passes", "passes", ".1f"),
            ("robust_worst", "robust, highest", ".1%"), ("robust_best", "robust, lowest", ".1%"), ("met", "fewest, lowest", ""),
        ),
    ),
    "training": (
        "One step of PGD-7 training, sp.perturb beside a loop by hand",
        (
            ("seconds", "seconds", ".4f"), ("ratio", "ratio", ".3f"), ("lowest", "lowest", ".3f"),
            ("highest", "highest", ".3f"), ("cpu_ratio", "cpu ratio", ".3f"), ("limit", "limit", ".2f"), ("met", "met", ""),
        ),
    ),
    "occupancy": (
        "Rows of each model call over the batch size, with early stop",
        (
            ("samples", "samples", "d"), ("batch", "batch", "d"), ("calls", "calls", "d"), ("least_calls", "fewest calls", "d"),
            ("rows", "rows", "d"), ("sum_of_costs", "sum of costs", "d"), ("occupancy", "occupancy", ".3f"),
            ("gradient_calls", "gradient calls", "d"), ("gradient_occupancy", "their occupancy", ".3f"),
        ),
    ),
}  # fmt: skip


def show(console: Console, name: str, rows: Sequence[dict[str, Any]]) -> None:
    title, columns = COLUMNS[name]
    table = Table(title=title, title_justify="left")
    table.add_column("network")
    table.add_column("who")
    for _, heading, _ in columns:
        table.add_column(heading, justify="right")
    previous = None
    for row in rows:
        if previous is not None and row["case"] != previous:
            table.add_section()
        cells = [_cell(row.get(key), spec) for key, _, spec in columns]
        if "error" in row:
            cells[0] = f"error: {row['error'][:60]}"
        table.add_row(row["case"] if row["case"] != previous else "", row["who"], *cells)
        previous = row["case"]
    console.print(table)
    for origin in dict.fromkeys((row["case"], row["origin"]) for row in rows):
        console.print(f"  {origin[0]}: {origin[1]}")
    for row in rows:
        if row.get("outside", 0) > 1e-6:
            console.print(f"  {row['who']} left the ball or the box by {row['outside']:.2g} on {row['case']}")
    console.print()


def _cell(value: Any, spec: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, spec)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Overhead of the engine beside a bare loop and other libraries.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, not how fast")
    parser.add_argument("--only", choices=TABLES, action="append", help="this table; may be repeated; default all")
    parser.add_argument("--repeats", type=int, help="rounds on ResNet-20; the small networks get more; default 5 (quick: 1)")
    parser.add_argument("--seeds", type=int, help="seeds of the table with early stop; default 3 (quick: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    parser.add_argument("--no-peers", action="store_true", help="leave the other libraries out")
    options = parser.parse_args(arguments)
    repeats = options.repeats if options.repeats is not None else (1 if options.quick else 5)
    seeds = options.seeds if options.seeds is not None else (1 if options.quick else 3)
    if min(repeats, seeds) < 1:
        parser.error("--repeats and --seeds must be at least 1")

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # random weights and peers have much to say
    peers = [] if options.no_peers else installed()
    console = Console(width=None if sys.stdout.isatty() else 180)
    versions = {"saddlepoint": sp.__version__, "torch": torch.__version__, "python": platform.python_version()}
    versions |= {peer.name: peer.version for peer in peers}
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.machine()},
        "versions": versions, "quick": options.quick, "repeats": repeats, "seeds": seeds, "tables": {},
    }  # fmt: skip
    console.print(f"{os.cpu_count()} cores, one thread used; " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    for name, rows in settings_for(options.quick, options.only or TABLES, repeats, range(seeds), peers):
        report["tables"][name] = rows
        show(console, name, rows)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
