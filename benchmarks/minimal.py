"""Smallest perturbations: ours beside other libraries' attacks at the same number of passes per sample.

    SADDLEPOINT_DATA=... python benchmarks/minimal.py --cache FILE [--models NAME ...] [--norms NORM ...] [--passes N ...]
    SADDLEPOINT_DATA=... python benchmarks/minimal.py --cache FILE --table

Samples are the first `--count` test images from `--start` on that the network gets right, all in one batch. Everyone gets the
same frozen network in eval mode. A returned point counts if it lies in [0, 1], up to 1e-6, which is clamped, and the bare
network gives it another class; its distance is measured here, in float64, and is inf otherwise. In l0 differences up to 1e-6
are undone first. `forward` and `backward` are rows per sample that a counting module saw; ours include the confirmation of
successes, which is outside our budget.

The cache is a file of JSON lines, one for each run, written as soon as it is over; what it holds is not measured again.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from minimal_peers import Minimal, P, attacks
from overhead import Counting, Normalised, predict, probed
from peers import installed
from torch import Tensor, nn
from zoo import REFERENCES, reference, test_split  # benchmarks/zoo.py

import saddlepoint as sp
from saddlepoint.data.dataset import Split

MODELS = (
    "mnist_lenet_standard", "mnist_smallcnn_trades_eps0.3", "mnist_cnnA_pgd_eps0.3", "cifar10_cnnA_adv",
    "cifar10_resnet2b_adv", "cifar10_resnet20_standard",
)  # fmt: skip
OURS = "saddlepoint"
SLACK = 1e-6  # in input units: what is clamped to the box, and in l0 what counts as no change
ROUNDING = 1e-5  # relative: medians that differ by less are equal
RESAMPLES = 2000
WITHIN = 1.01  # "as near as": at most 1 % further away

Row = dict[str, Any]
KEY = ("model", "norm", "who", "attack", "variant", "passes", "seed", "start", "count")


@dataclass(frozen=True)
class Case:
    """A frozen network, the inputs it gets right, and their positions in the test set."""

    name: str
    net: nn.Module
    x: Tensor
    y: Tensor
    index: list[int]


def network(name: str) -> tuple[nn.Module, Split]:
    """A published network with its normalisation, frozen, and the test images that belong to it."""
    root = Path(os.environ["SADDLEPOINT_DATA"])
    bare, mean, std, _ = reference(name, root)
    net = Normalised(bare, mean, std).eval().requires_grad_(False)
    return net, test_split(REFERENCES[name].dataset, root)


@cache
def case(name: str, start: int, count: int) -> Case:
    net, split = network(name)
    index: list[int] = []
    for at in range(start, len(split), 100):
        right = predict(net, split.x[at : at + 100]) == split.y[at : at + 100]
        index += (at + right.nonzero()[:, 0]).tolist()
        if len(index) >= count:
            break
    index = index[:count]
    return Case(name, net, split.x[index].contiguous(), split.y[index].contiguous(), index)


def distances(case: Case, points: Tensor, norm: str, slack: float = SLACK) -> list[float | None]:
    """How far each point is from its input; None where it is no adversarial example or further out of the box than `slack`."""
    inside = ((points >= -slack) & (points <= 1 + slack)).flatten(1).all(1)  # false where NaN
    points = points.clamp(0, 1)
    if norm == "l0":
        points = torch.where((points - case.x).abs() <= SLACK, case.x, points)
    fooled = inside & (predict(case.net, points) != case.y)
    change = (points.double() - case.x.double()).flatten(1)
    found = torch.linalg.vector_norm(change, P[norm], dim=1)
    return [value if ok else None for value, ok in zip(found.tolist(), fooled.tolist(), strict=True)]


class TooLongError(BaseException):
    """A run took more than its limit. No `Exception`: some peers catch these."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooLongError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def our_attack(spec: str, passes: int) -> Any:
    """ "minimal", or an attack's name with settings: fmn:step=0.3. Steps fill the budget where none are given."""
    name, _, text = spec.partition(":")
    settings = {key: ast.literal_eval(value) for key, _, value in (part.partition("=") for part in text.split(",") if part)}
    if name == "minimal" and not settings:
        return name
    chosen = sp.attacks.get(name)
    if any(field.name == "steps" for field in fields(chosen)):
        settings = {"steps": passes // 2} | settings
    return chosen(**settings)


def ours(spec: str, norm: str) -> Minimal:
    def run(net: nn.Module, x: Tensor, y: Tensor, passes: int, seed: int) -> Tensor:
        model = probed(net, x)
        budget = sp.Budget(passes=passes)
        result = sp.attack(model, x, y, our_attack(spec, passes), sp.Minimize(norm), budget=budget, seed=seed)
        over = int(result.queries.total.max()) - passes
        if over > 0:
            raise AssertionError(f"the budget of {passes} passes was exceeded by {over}")
        return result.adversarial

    return Minimal(OURS, spec, norm, "default", run, True, lambda: None)


def measure(case: Case, attack: Minimal, passes: int, seed: int, limit: float) -> Row:
    """One run. An exception is a result too."""
    counting = Counting(case.net).eval()
    predict(case.net, case.x)  # warm up
    torch.set_grad_enabled(True)  # a run that was stopped can leave it off
    wall, cpu = time.perf_counter(), time.process_time()
    row: Row = {}
    try:
        attack.prepare()
        wall, cpu = time.perf_counter(), time.process_time()
        with limited(limit):
            points = attack.attack(counting, case.x, case.y, passes, seed).detach().to(case.x.dtype)
        row["distance"] = distances(case, points, attack.norm)
        row["outside"] = max(0.0, -float(points.min()), float(points.max()) - 1)
        if row["outside"] > SLACK:
            row["clamped"] = distances(case, points, attack.norm, math.inf)
    except (Exception, TooLongError) as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    row |= {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    count = len(case.x)
    return row | {"forward": sum(counting.forward_calls) / count, "backward": sum(counting.backward_calls) / count}


class Store:
    """All runs so far, by what was asked; a later one of the same replaces an earlier one."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines: list[Row] = []
        if path is not None and path.is_file():
            for line in path.read_text().splitlines():
                try:
                    self.lines.append(json.loads(line))
                except json.JSONDecodeError:
                    print("a line of the cache is cut off: left out", file=sys.stderr)
        self.rows = {self.key(row): row for row in self.lines}

    @staticmethod
    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in KEY)

    def add(self, row: Row) -> None:
        self.lines.append(row)
        self.rows[self.key(row)] = row
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def best(self, model: str, norm: str) -> dict[int, float]:
        """The smallest distance that anything in the cache ever reached, by position in the test set."""
        found: dict[int, float] = {}
        for row in self.lines:
            if row["model"] == model and row["norm"] == norm and "distance" in row:
                for index, value in zip(row["index"], row["distance"], strict=True):
                    if value is not None:
                        found[index] = min(value, found.get(index, math.inf))
        return found

    def seconds(self, case: Case, attack: Minimal, passes: int) -> float | None:
        """What this run takes, judging by the same attack at another budget."""
        same = [
            row["seconds"] * passes / row["passes"] * len(case.x) / row["count"]
            for row in self.lines
            if (row["model"], row["norm"], row["who"], row["attack"]) == (case.name, attack.norm, attack.who, attack.name)
            and "distance" in row
        ]
        return min(same) if same else None


@cache
def pass_seconds(name: str, start: int, count: int) -> float:
    """Seconds of a pass of one sample, forward or backward, in a batch of this size."""
    this = case(name, start, count)
    begin = time.perf_counter()
    for _ in range(3):
        x = this.x.clone().requires_grad_()
        this.net(x).sum().backward()
    return (time.perf_counter() - begin) / 6 / count


def finite(row: Row, which: str = "distance") -> np.ndarray:
    return np.array([math.inf if value is None else value for value in row[which]])


def optimality(found: np.ndarray, best: np.ndarray) -> float:
    """Local optimality (Cinà et al. 2024, arXiv:2404.19460): 1 - (A - A*) / (A0 - A*), for one attack on one network.

    A and A* are the areas under the curves of robust accuracy over the distance, of the attack and of the envelope, up to the
    envelope's largest distance, and A0 that of an attack that finds nothing. 1: as good as the best known; 0: finds nothing.
    A curve that falls by 1/n at each distance has the mean of these distances as its area, which is taken here as it is; the
    paper's code takes the trapezoidal rule.
    """
    known = best[np.isfinite(best)]
    if not len(known):
        return math.nan
    top = known.max()
    nothing, least = float(top), float(np.minimum(best, top).mean())
    return max(0.0, nothing - float(np.minimum(found, top).mean())) / (nothing - least) if nothing > least else math.nan


def near(found: np.ndarray, others: np.ndarray) -> float:
    """Share of samples where `found`, (seeds, samples), is at most 1 % further away than `others`; where both failed, it is."""
    return float((found <= WITHIN * others).mean())


def share_near(row: Row, rows: Sequence[Row]) -> float:
    """`near` for one attack beside the best that the others found for each sample."""
    others = [r["found"].min(0) for r in rows if (r["who"], r["attack"]) != (row["who"], row["attack"])]
    return near(row["found"], np.minimum.reduce(others))


def ratio(found: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Of the medians, and its 95 % interval (percentile bootstrap): the same samples are drawn of both, with replacement.

    found, other: (seeds, samples). A median that is inf makes the ratio inf, 0 or, where both are, NaN; such draws say nothing
    and are left out of the interval.
    """

    def of_medians(drawn: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.median(found[:, drawn], (0, -1)) / np.median(other[:, drawn], (0, -1)))

    count = found.shape[1]
    resampled = of_medians(np.random.default_rng(0).integers(count, size=(RESAMPLES, count)))
    known = resampled[~np.isnan(resampled)]
    # the method that doesn't interpolate, since between infinite ends there is nothing
    ends = np.quantile(known, [0.025, 0.975], method="inverted_cdf") if len(known) else (math.nan, math.nan)
    return float(of_medians(np.arange(count))), float(ends[0]), float(ends[1])


def rows_of(store: Store, model: str, norm: str, passes: int, start: int, count: int, seeds: Sequence[int]) -> list[Row]:
    """The runs of one table: [who, attack, variant] with all seeds put together."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in store.rows.values():
        asked = (row["model"], row["norm"], row["passes"], row["start"], row["count"])
        if asked == (model, norm, passes, start, count) and row["seed"] in seeds:
            groups.setdefault((row["who"], row["attack"], row["variant"]), []).append(row)
    best = store.best(model, norm)
    table = []
    for (who, attack, variant), runs in groups.items():
        line: Row = {"model": model, "norm": norm, "passes": passes, "who": who, "attack": attack, "variant": variant}
        done = [run for run in runs if "distance" in run]
        if not done:
            table.append(line | {"error": runs[-1]["error"]})
            continue
        found = np.stack([finite(run) for run in done])  # (seeds, samples)
        envelope = np.array([best.get(index, math.inf) for index in done[0]["index"]])
        hit = found[np.isfinite(found)]
        line |= {
            "median": float(np.median(found)), "mean": float(hit.mean()) if len(hit) else math.nan,
            "success": float(np.isfinite(found).mean()), "optimality": float(np.mean([optimality(f, envelope) for f in found])),
            "seeds": len(done), "found": found, "outside": max(run["outside"] for run in done),
            "clamped": float(np.median([finite(run, "clamped" if "clamped" in run else "distance") for run in done])),
        }  # fmt: skip
        line |= {key: float(np.mean([run[key] for run in done])) for key in ("forward", "backward", "seconds", "cpu")}
        table.append(line)
    return table


def with_best_steps(rows: list[Row]) -> list[Row]:
    """For each attack that ran with several step sizes, a row more: the one with the smallest median."""
    table = []
    for row in rows:
        if row["variant"] != "default":
            continue
        table.append(row)
        tried = [r for r in rows if (r["who"], r["attack"]) == (row["who"], row["attack"]) and "found" in r]
        if len(tried) > 1:
            table.append(min(tried, key=lambda r: (r["median"], r["mean"])) | {"best_of": len(tried)})
    return sorted(table, key=lambda r: (r.get("median", math.inf), r.get("mean", math.inf)))


def joint(rows: Sequence[Row], steps: bool) -> np.ndarray | None:
    """The smallest distance of each sample over these peers' runs; steps: with every step size, not the default alone."""
    found = [r["found"].min(0) for r in rows if r["who"] != OURS and "found" in r and (steps or r["variant"] == "default")]
    return np.minimum.reduce(found) if found else None


def summary(store: Store, rows: list[Row], up_to: Sequence[list[Row]]) -> list[Row]:
    """Ours beside the best peer, and beside the best that any peer found for each sample: at this budget, and up to it."""
    lines = []
    for mine in (row for row in rows if row["who"] == OURS and "found" in row):
        for steps in (False, True):
            others = [r for r in rows if r["who"] != OURS and "found" in r and (steps or r["variant"] == "default")]
            if not others or (steps and all(r["variant"] == "default" for r in others)):
                continue
            first = min(others, key=lambda r: (r["median"], r["mean"]))
            same = joint(rows, steps)
            any_budget = joint([row for table in up_to for row in table], steps)
            assert same is not None
            assert any_budget is not None
            shares = [(share_near(row, [*others, mine]), f"{row['who']} {row['attack']}") for row in others]
            nearest_near, nearest_peer = max(shares)
            lines.append(
                {
                    "attack": mine["attack"], "median": mine["median"],
                    "peers": "every step size" if steps else "default settings",
                    "best_peer": f"{first['who']} {first['attack']}" + (f", {first['variant']}" if steps else ""),
                    "best_median": first["median"], "ratio": ratio(mine["found"], first["found"]),
                    "won": bool(mine["median"] <= first["median"] * (1 + ROUNDING)),
                    "near": near(mine["found"], same),
                    "nearest_peer": nearest_peer, "nearest_near": nearest_near,  # beside the other peers and ours
                    "near_any": near(mine["found"], any_budget),
                }
            )  # fmt: skip
    return lines


def number(value: float, norm: str) -> str:
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "inf"
    return f"{value:.1f}" if norm == "l0" else f"{value:.4f}" if norm == "linf" else f"{value:.3f}"


def interval(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.3f} ({found[1]:.3f} to {found[2]:.3f})"


def show(rows: list[Row], lines: list[Row], norm: str, title: str) -> None:
    print(f"\n### {title}\n")
    print("| who | attack | median | mean | success | forward | backward | seconds | LO |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in with_best_steps(rows):
        name = row["attack"] + (f", best of {row['best_of']} ({row['variant']})" if "best_of" in row else "")
        if "error" in row:
            print(f"| {row['who']} | {name} | error: {row['error'][:100]} | | | | | | |")
            continue
        cells = [number(row["median"], norm), number(row["mean"], norm), f"{row['success']:.0%}"]
        cells += [f"{row['forward']:.0f}", f"{row['backward']:.0f}", f"{row['seconds']:.1f}", f"{row['optimality']:.3f}"]
        print(f"| {row['who']} | {name} | " + " | ".join(cells) + " |")
    for row in rows:
        if row.get("outside", 0) > SLACK:
            print(
                f"\n{row['who']} {row['attack']} ({row['variant']}) left the box, by up to {row['outside']:.2g}: failures.",
                end="",
            )
            print(f" Clamped to it, its points would have the median {number(row['clamped'], norm)}.")
    if lines:
        head = "ours | median | peers with | best peer | its median | ratio (95 %) | no worse | within 1 % of all peers"
        print(f"\n| {head} | up to this budget |")
        print("| --- | ---: | --- | --- | ---: | --- | --- | ---: | ---: |")
    for line in lines:
        print(
            f"| {line['attack']} | {number(line['median'], norm)} | {line['peers']} | {line['best_peer']}"
            f" | {number(line['best_median'], norm)} | {interval(line['ratio'])} | {'yes' if line['won'] else 'no'}"
            f" | {line['near']:.0%} | {line['near_any']:.0%} |"
        )


def short(report: list[Row], passes: int) -> None:
    """One line for each network and norm: "minimal", the best of all ours, and the best peer, all at default settings."""
    print(f"\n### {passes} passes\n")
    head = "network | norm | minimal | within 1 % of all peers | the nearest peer, likewise | LO | best of ours | best peer"
    print(f"| {head} | minimal by it (95 %) | minimal no worse | ours no worse |")
    print("| --- | --- | ---: | ---: | --- | ---: | --- | --- | --- | --- | --- |")
    for part in report:
        lines = [line for line in part["summary"] if line["peers"] == "default settings"]
        mine = next((line for line in lines if line["attack"] == "minimal"), None)
        if part["passes"] != passes or mine is None:
            continue
        norm, best = part["norm"], min(lines, key=lambda line: line["median"])
        row = next(row for row in part["rows"] if row["who"] == OURS and row["attack"] == "minimal")
        cells = [part["model"], norm, number(mine["median"], norm), f"{mine['near']:.0%}"]
        cells += [f"{mine['nearest_near']:.0%} {mine['nearest_peer']}", f"{row['optimality']:.3f}"]
        cells.append(f"{number(best['median'], norm)} {best['attack']}")
        cells += [f"{number(mine['best_median'], norm)} {mine['best_peer']}", interval(mine["ratio"])]
        print("| " + " | ".join([*cells, *("yes" if line["won"] else "no" for line in (mine, best))]) + " |")


def tables(store: Store, options: argparse.Namespace) -> list[Row]:
    """Print what the cache holds of what is asked for."""
    report = []
    for model in options.models:
        for norm in options.norms:
            chosen = {
                passes: rows_of(store, model, norm, passes, options.start, options.count, options.seeds)
                for passes in sorted({row["passes"] for row in store.lines} | set(options.passes))
            }
            for passes in options.passes:
                rows = chosen[passes]
                if not rows:
                    continue
                lines = summary(store, rows, [chosen[other] for other in chosen if other <= passes])
                where = f"{options.count} samples from {options.start}"
                if not options.short:
                    show(rows, lines, norm, f"{model}, {norm}, {passes} passes ({where})")
                kept = [{key: value for key, value in row.items() if key != "found"} for row in rows]
                report.append({"model": model, "norm": norm, "passes": passes, "rows": kept, "summary": lines})
    return report


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, Minimal, int, int]]:
    """What is to be run: (model, attack, passes, seed), in this order of loops."""
    for passes in options.passes:
        for model in options.models:
            for norm in options.norms:
                chosen = [] if options.only_ours else list(attacks(norm, sweep=options.sweep))
                chosen = [attack for attack in chosen if attack.main or options.peers == "all"]
                if options.match:
                    chosen = [a for a in chosen if re.search(options.match, f"{a.who} {a.name} {a.variant}")]
                if not options.only_peers:
                    chosen += [ours(spec, norm) for spec in options.ours]
                for attack in chosen:
                    for seed in options.seeds:
                        yield model, attack, passes, seed


def run(store: Store, options: argparse.Namespace) -> None:
    todo = []
    versions = {OURS: sp.__version__} | {peer.name: peer.version for peer in installed()}
    for model, attack, passes, seed in wanted(options):
        key = {
            "model": model, "norm": attack.norm, "who": attack.who, "attack": attack.name, "variant": attack.variant,
            "passes": passes, "seed": seed, "start": options.start, "count": options.count,
        }  # fmt: skip
        if options.again or Store.key(key) not in store.rows:
            todo.append((key, attack))

    def expected(key: Row, attack: Minimal) -> float:
        this = case(key["model"], options.start, options.count)
        known = store.seconds(this, attack, key["passes"])
        return (
            known if known is not None else pass_seconds(this.name, options.start, options.count) * key["passes"] * len(this.x)
        )

    total = sum(expected(*task) for task in todo)
    print(f"{len(todo)} runs to go, about {total / 60:.0f} minutes, if every attack cost no more than its passes", flush=True)
    if options.plan:
        for key, attack in todo:
            print(f"{expected(key, attack):8.0f} s  " + "  ".join(str(value) for value in key.values()))
        return
    for done, (key, attack) in enumerate(todo, 1):
        this = case(key["model"], options.start, options.count)
        known = store.seconds(this, attack, key["passes"])
        if known is not None and known > 1.5 * options.limit:
            row = {"error": f"not run: would take about {known:.0f} s", "seconds": 0.0, "cpu": 0.0, "forward": 0, "backward": 0}
        else:
            row = measure(this, attack, key["passes"], key["seed"], options.limit)
        facts = {"index": this.index, "version": versions[attack.who], "date": date.today().isoformat()}
        store.add(key | row | facts)
        what = row.get("error") or f"median {np.median(finite(row)):.4f}, {row['forward']:.0f} + {row['backward']:.0f} passes"
        where = f"{key['model']} {key['norm']} {key['passes']}"
        print(
            f"{done}/{len(todo)} {where}: {attack.who} {attack.name}, {attack.variant}: {what}, {row['seconds']:.1f} s",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Smallest perturbations, beside other libraries at the same passes.")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--norms", nargs="+", default=tuple(P), choices=tuple(P))
    parser.add_argument("--passes", nargs="+", type=int, default=(200, 1000, 2000), help="forward plus backward, per sample")
    parser.add_argument("--count", type=int, default=100, help="samples that the network gets right; default 100")
    parser.add_argument("--start", type=int, default=0, help="the first test image; default 0")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--ours", nargs="+", default=("minimal",), metavar="SPEC", help='"minimal", or such as fmn:steps=100')
    parser.add_argument("--peers", choices=("main", "all"), default="all", help="main: the strong ones; default all")
    parser.add_argument("--sweep", action="store_true", help="peers with a step size also at 0.3 and 3 times it")
    parser.add_argument("--match", metavar="REGEX", help='only peers whose "library attack variant" has it')
    parser.add_argument("--only-peers", action="store_true")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep every run there, and don't repeat what it holds")
    parser.add_argument("--again", action="store_true", help="measure anew what the cache holds")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which a run is stopped; default 600")
    parser.add_argument("--plan", action="store_true", help="list what would run, and how long")
    parser.add_argument("--table", action="store_true", help="print the cache's tables, run nothing")
    parser.add_argument("--short", action="store_true", help="of the tables, one line for each network and norm")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there too")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.models if name not in REFERENCES]:
        parser.error(f"unknown: {', '.join(unknown)}")
    if min(*options.passes, options.count, options.limit) <= 0 or options.start < 0:
        parser.error("--passes, --count and --limit must be positive, --start not negative")
    if not options.table and "SADDLEPOINT_DATA" not in os.environ:
        parser.error("set SADDLEPOINT_DATA to the folder that holds models/, mnist/, cifar10/")

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # peers have much to say
    store = Store(options.cache)
    if not options.table:
        run(store, options)
        if options.plan:
            return 0
    report = tables(store, options)
    if options.short:
        for passes in options.passes:
            short(report, passes)
    if options.json:
        facts = {
            "date": date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__,
            "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.machine()},
        }  # fmt: skip
        options.json.write_text(json.dumps(facts | {"tables": report}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
