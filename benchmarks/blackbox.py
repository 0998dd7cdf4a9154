"""Black box: ours beside other libraries' attacks after the same number of queries.

    SADDLEPOINT_DATA=... python benchmarks/blackbox.py --cache FILE [--networks NAME ...] [--norms NORM ...] [--images N]
    SADDLEPOINT_DATA=... python benchmarks/blackbox.py --cache FILE --table [--plot FOLDER] [--json FILE]

Images are the first `--images` of the test set, from `--offset` on, that the network gets right. A query is a row that the
network is given. Attacks by scores search a ball, and what counts is the share of images that were fooled inside it; attacks
by labels look for the smallest perturbation, and what counts is the median distance of the nearest adversarial point, inf
where there is none. Both after 100, 500, 1000 and 5000 queries.

Peers get one image at a time, and a network that judges every row they ask about (bare prediction, in [0, 1] up to 1e-6), keeps
the nearest adversarial one, and stops them after the last query or, in a ball, at the first success. So what a peer returns
doesn't matter, and searches that it makes beyond a success cost it nothing. Ours are run over all images at once; their curves
are what the engine tells a callback after each round, and its count of queries, which has the clean prediction in it.

Seconds are CPU seconds of one thread without this script's own work. "network" is the share that was spent inside the
network, in the batches in which it was asked.

The cache is a file of JSON lines, one for each attack and image; what it holds is not measured again. Caches can be joined.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blackbox_peers import AUTHORS, LABELS, SCORES, BlackBox, Job, attacks
from minimal import OURS, ROUNDING, SLACK, Case, Row, Store, TooLongError, case, limited, number, our_attack
from minimal_peers import P
from peers import installed
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.engine import Record
from saddlepoint.taxonomy import Access

BALLS = {
    "mnist_lenet_standard": {"linf": 0.15, "l2": 2.0, "l0": 5},
    "mnist_cnnA_pgd_eps0.3": {"linf": 0.32, "l2": 2.0, "l0": 5},
    "cifar10_resnet20_standard": {"linf": 2 / 255, "l2": 0.5, "l0": 1},
    "cifar10_cnnA_adv": {"linf": 8 / 255, "l2": 1.0, "l0": 1},
}
"""Networks, and the radius in each norm, such that Square fools some images soon and others not at all; l0 counts pixels."""
KEY = ("model", "norm", "eps", "who", "attack", "limit", "seed", "offset", "image")
MORE = ("#5b6b00", "#7a3e2e", "#4b3fa0", "#0f6e84", "#8c2d2d", "#777777")  # colours, where the report's don't suffice
ASKED = ("model", "norm", "limit", "seed", "offset")
OVERHEAD, FASTER = 1.3, 5  # what we set out for: at most so many times the network's own time, so many times faster than ART
THREATS = {"l0": lambda eps: sp.L0(eps, per="pixel"), "l2": sp.L2, "linf": sp.Linf}


class Enough(BaseException):
    """A peer has asked all that it may. No `Exception`: some peers catch these."""


class Timed(nn.Module):
    """`net`, and the CPU seconds spent in it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.seconds = 0.0

    def forward(self, points: Tensor) -> Tensor:
        start = time.process_time()
        logits: Tensor = self.net(points)
        self.seconds += time.process_time() - start
        return logits


class Watching(Timed):
    """Sees what is asked about one image x (1, ...) of class y, row by row, and ends it after `limit` rows.

    curve: [query, distance] whenever a nearer adversarial point was asked about. within: what is further away doesn't count,
    and the first point that does is the end; None to go on. own: CPU seconds that the watching took.
    """

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, norm: str, limit: int, within: float | None) -> None:
        super().__init__(net)
        self.x, self.y, self.norm, self.limit, self.within = x, y, norm, limit, within
        self.asked, self.own = 0, 0.0
        self.curve: list[tuple[int, float]] = []

    def forward(self, points: Tensor) -> Tensor:
        points = points[: self.limit - self.asked].to(self.x.dtype)
        logits = super().forward(points)
        start = time.process_time()
        self._judge(points.detach(), logits.detach())
        self.own += time.process_time() - start
        if self.asked >= self.limit or (self.within is not None and self.curve):
            raise Enough
        return logits

    def _judge(self, points: Tensor, logits: Tensor) -> None:
        fooled = (logits.argmax(1) != self.y).nonzero()[:, 0]
        away = distances(points[fooled], self.x, self.norm)
        nearest = self.curve[-1][1] if self.curve else math.inf
        for row, distance in zip(fooled.tolist(), away.tolist(), strict=True):
            if distance < nearest and (self.within is None or distance <= self.within + SLACK):
                self.curve.append((self.asked + row + 1, distance))
                nearest = distance
                if self.within is not None:
                    self.asked = self.curve[-1][0]
                    return
        self.asked += len(points)


def distances(points: Tensor, x: Tensor, norm: str) -> Tensor:
    """How far points (N, ...) are from x (1, ...), (N,) float64; inf outside of [0, 1]. l0 counts pixels."""
    change = points.clamp(0, 1).double() - x.double()
    if norm == "l0":
        away = (change.abs().amax(1) > SLACK).flatten(1).sum(1).double()
    else:
        away = torch.linalg.vector_norm(change.flatten(1), P[norm], dim=1)
    inside = ((points >= -SLACK) & (points <= 1 + SLACK)).flatten(1).all(1)
    return torch.where(inside, away, torch.inf)


@dataclass(frozen=True)
class Task:
    """What everybody is asked for: images that the network gets right, the norm, the radius, the queries for each, the seed."""

    case: Case
    norm: str
    eps: float
    limit: int
    seed: int
    offset: int

    @property
    def facts(self) -> Row:
        return {
            "model": self.case.name, "norm": self.norm, "eps": self.eps, "limit": self.limit, "seed": self.seed,
            "offset": self.offset,
        }  # fmt: skip


def theirs(task: Task, peer: BlackBox, at: int, seconds: float, rows: int) -> Row:
    """A peer on one image, stopped after so many rows. An exception is a result too: what was found by then counts."""
    case = task.case
    x, y = case.x[at : at + 1], case.y[at : at + 1]
    with torch.no_grad():
        logits = case.net(x)
    second = logits.scatter(1, y[:, None], -math.inf).argmax(1)
    watching = Watching(case.net, x, y, task.norm, rows, None if peer.minimizes else task.eps).eval()
    seed = task.seed * 10**6 + case.index[at]
    job = Job(watching, x.clone(), y.clone(), task.norm, task.eps, task.limit, seed, second)
    row: Row = {}
    torch.set_grad_enabled(True)  # a run that was stopped can leave it off
    start = time.process_time()
    try:
        with limited(seconds):
            peer.attack(job)
    except Enough:
        pass
    except (Exception, TooLongError) as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
    spent = time.process_time() - start - watching.own
    return row | {"curve": watching.curve, "asked": watching.asked, "seconds": spent, "network": watching.seconds, "batch": 1}


class Curves:
    """A callback that keeps the curve of each sample: [queries, distance] whenever it has come nearer."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.found: dict[int, list[tuple[int, float]]] = {}

    def __call__(self, record: Record) -> None:
        start = time.process_time()
        for name, queries, distance in zip(record.ids.tolist(), record.queries.tolist(), record.distance.tolist(), strict=True):
            self.add(name, queries, distance)
        self.seconds += time.process_time() - start

    def add(self, name: int, queries: int, distance: float) -> None:
        curve = self.found.setdefault(name, [])
        if distance < (curve[-1][1] if curve else math.inf):
            curve.append((queries, distance))


def declared(spec: str) -> sp.engine.Declaration:
    return type(our_attack(spec, 2)).declaration


def access_of(declaration: sp.engine.Declaration) -> str:
    return LABELS if declaration.access <= Access.LABELS else SCORES


def ours(task: Task, spec: str, rows: Sequence[int]) -> list[Row]:
    """One of ours on these images at once: what became of each."""
    case, limit = task.case, task.limit
    ids = [case.index[at] for at in rows]
    attack = our_attack(spec, 2 * limit)  # steps, where it has them, for the whole budget
    minimizes = declared(spec).minimizes
    timed, curves = Timed(case.net).eval(), Curves()
    model = sp.Model(timed, access=declared(spec).access)
    threat = sp.Minimize(task.norm) if minimizes else THREATS[task.norm](task.eps)
    start = time.process_time()
    result = sp.attack(
        model, case.x[rows], case.y[rows], attack, threat, seed=task.seed, ids=torch.tensor(ids),
        budget=sp.Budget(queries=limit), callback=curves if minimizes else None,
    )  # fmt: skip
    spent = time.process_time() - start - curves.seconds
    asked, away = result.queries.forward.tolist(), result.distance.tolist()
    if max(asked) > limit:
        raise AssertionError(f"{spec}: the budget of {limit} queries was exceeded by {max(asked) - limit}")
    for name, queries, distance, fooled in zip(ids, asked, away, result.success.tolist(), strict=True):
        curves.add(name, queries, distance if fooled else math.inf)
    share = {"seconds": spent / len(ids), "network": timed.seconds / len(ids), "batch": len(ids)}
    return [{"curve": curves.found[name], "asked": queries} | share for name, queries in zip(ids, asked, strict=True)]


class Runs(Store):
    """All that was measured; see `Store`."""

    @staticmethod
    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in KEY)


def run(store: Runs, options: argparse.Namespace) -> None:
    """Measure what is asked for and not known yet."""
    versions = {OURS: sp.__version__, AUTHORS: ""} | {peer.name: peer.version for peer in installed()}
    limit, today = max(options.queries), date.today().isoformat()

    def measure(task: Task, facts: Row, attack: Callable[[Sequence[int]], Iterable[Row]]) -> None:
        facts = task.facts | facts | {"version": versions[facts["who"]], "date": today}
        facts |= {"eps": None} if facts["minimizes"] else {}
        again = options.again and facts["who"] == OURS
        names = task.case.index
        rows = [at for at, name in enumerate(names) if again or Runs.key(facts | {"image": name}) not in store.rows]
        found = []
        for at, row in zip(rows, attack(rows) if rows else (), strict=True):
            found.append(row)
            store.add(facts | row | {"image": names[at]})
        if found:
            tell(facts, found)

    for network in options.networks:
        for norm in options.norms:
            images = case(network, options.offset, options.images)
            task = Task(images, norm, BALLS[network][norm], limit, options.seed, options.offset)
            for spec in options.attacks:
                if norm in (can := declared(spec)).norms:
                    facts = {"who": OURS, "attack": spec, "access": access_of(can), "minimizes": can.minimizes}
                    measure(task, facts, partial(ours, task, spec))
            for peer in attacks(norm, options.square) if options.peers else ():
                if not options.match or re.search(options.match, f"{peer.who} {peer.name}"):
                    facts = {"who": peer.who, "attack": peer.name, "access": peer.access, "minimizes": peer.minimizes}
                    measure(task, facts, partial(each, task, peer, options.limit))


def each(task: Task, peer: BlackBox, seconds: float, rows: Sequence[int]) -> Iterator[Row]:
    theirs(task, peer, rows[0], seconds, 2)  # what it imports isn't its work
    for at in rows:
        yield theirs(task, peer, at, seconds, task.limit)


def tell(facts: Row, found: list[Row]) -> None:
    fooled, errors = sum(bool(row["curve"]) for row in found), [row["error"] for row in found if "error" in row]
    seconds = sum(row["seconds"] for row in found)
    line = (
        f"{facts['model']} {facts['norm']}: {facts['who']} {facts['attack']}: fooled {fooled} of {len(found)}, {seconds:.1f} s"
    )
    print(line + (f"; {len(errors)} errors, such as {errors[0]}" if errors else ""), flush=True)


# tables


def at(curve: Sequence[Sequence[float]], queries: int) -> float:
    """The smallest distance that was found by then."""
    known = bisect_right(curve, queries, key=lambda point: point[0])
    return curve[known - 1][1] if known else math.inf


class Line:
    """An attack in a table: its rows by image."""

    def __init__(self, rows: Sequence[Row], eps: float) -> None:
        self.rows = {row["image"]: row for row in rows}
        first = rows[0]
        self.who, self.attack, self.access, self.minimizes = (first[name] for name in ("who", "attack", "access", "minimizes"))
        self.eps = eps
        self.ours = self.who == OURS

    @property
    def title(self) -> str:
        return self.name if self.ours else f"{self.name} ({self.who})"

    @property
    def name(self) -> str:
        """Ours by their class's name."""
        kind, colon, settings = self.attack.partition(":")
        return f"{sp.attacks.get(kind).__name__}{colon}{settings}" if self.ours else self.attack

    @property
    def family(self) -> str:
        """The attack's name without its settings."""
        name = re.split("[:,]", self.name)[0]
        return {"OnePixel": "FewPixel"}.get(name, name)

    def like(self, other: Line) -> bool:
        """Whether both are the same attack."""
        return self.family.lower() == other.family.lower()

    def found(self, queries: int, images: Iterable[int]) -> np.ndarray:
        return np.array([at(self.rows[image]["curve"], queries) for image in images])

    def value(self, measure: str, queries: int, images: Iterable[int] | None = None) -> float:
        """The share of images fooled within the ball, or their median distance."""
        found = self.found(queries, self.rows if images is None else images)
        return float((found <= self.eps + SLACK).mean()) if measure == "success" else float(np.median(found))

    def no_worse(self, other: Line, measure: str, queries: int) -> bool:
        """Whether this is on or above the other's curve, on the images that both were run on."""
        common = sorted(self.rows.keys() & other.rows.keys())
        mine, yours = (line.value(measure, queries, common) for line in (self, other))
        return mine >= yours if measure == "success" else mine <= yours * (1 + ROUNDING)

    def per_thousand(self, what: str) -> float:
        """CPU seconds for 1000 queries about one image. Ours: of the largest batch that was run."""
        rows = [row for row in self.rows.values() if row["batch"] == max(row["batch"] for row in self.rows.values())]
        return 1000 * sum(row[what] for row in rows) / max(sum(row["asked"] for row in rows), 1)


def lines_of(store: Runs, network: str, norm: str, options: argparse.Namespace) -> list[Line]:
    """What is known of what is asked for."""
    asked = (network, norm, max(options.queries), options.seed, options.offset)
    rows = [row for row in store.rows.values() if tuple(row[name] for name in ASKED) == asked]
    rows = [row for row in rows if row["eps"] in (None, BALLS[network][norm])]
    wanted = set(sorted({row["image"] for row in rows})[: options.images])
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["image"] in wanted and (row["who"] != OURS or row["attack"] in options.attacks):
            groups.setdefault((row["who"], row["attack"]), []).append(row)
    return [Line(rows, BALLS[network][norm]) for rows in groups.values()]


def groups_of(lines: Sequence[Line]) -> Iterator[tuple[str, str, list[Line]]]:
    """(access, measure, attacks): all attacks by scores by their success, those that minimise by their distance."""
    for access, measure in ((SCORES, "success"), (SCORES, "distance"), (LABELS, "distance")):
        chosen = [line for line in lines if line.access == access and (measure == "success" or line.minimizes)]
        if chosen:
            yield access, measure, chosen


def show(value: float, measure: str, norm: str) -> str:
    return f"{value:.0%}" if measure == "success" else number(value, norm)


def table(network: str, norm: str, access: str, measure: str, lines: list[Line], checkpoints: Sequence[int]) -> Row:
    """Print a group of attacks, and say at which checkpoints ours are on or above the peers."""
    what = f"fooled within {lines[0].eps:.4g}" if measure == "success" else f"median {norm} distance"
    print(f"\n### {network}, {norm}, {access}: {what}\n")
    print("| attack | images | " + " | ".join(f"{q} queries" for q in checkpoints) + " | no worse than its like | than all |")
    print("| --- | ---: |" + " ---: |" * len(checkpoints) + " --- | --- |")
    peers = [line for line in lines if not line.ours]
    sign = -1 if measure == "success" else 1
    ranked = sorted(lines, key=lambda line: [sign * line.value(measure, q) for q in reversed(checkpoints)])
    report = []
    for line in sorted(ranked, key=lambda line: not line.ours):
        values = [line.value(measure, q) for q in checkpoints]
        cells = [show(value, measure, norm) for value in values]
        verdicts = ["", ""]
        if line.ours:
            for place, others in enumerate(([peer for peer in peers if line.like(peer)], peers)):
                good = [q for q in checkpoints if all(line.no_worse(other, measure, q) for other in others)]
                verdicts[place] = (
                    "-" if not others else "all" if len(good) == len(checkpoints) else ", ".join(map(str, good)) or "none"
                )
        else:
            best = [min(sign * peer.value(measure, q) for peer in peers) for q in checkpoints]
            marked = (sign * value == least and 0 < value < math.inf for value, least in zip(values, best, strict=True))
            cells = [f"**{cell}**" if mark else cell for cell, mark in zip(cells, marked, strict=True)]
        print(f"| {line.title} | {len(line.rows)} | " + " | ".join(cells + verdicts) + " |")
        report.append({"who": line.who, "attack": line.attack, "images": len(line.rows), "values": values})
    mine = [line for line in lines if line.ours]
    good = [q for q in checkpoints if any(all(line.no_worse(peer, measure, q) for peer in peers) for line in mine)]
    if mine and peers:
        where = ", ".join(map(str, good)) or "none of these numbers of"
        print(f"\nOne of ours is on or above every peer after {where} queries.")
    return {"network": network, "norm": norm, "access": access, "measure": measure, "rows": report, "best_no_worse": good}


def best(groups: Sequence[tuple[str, str, str, str, list[Line]]], checkpoints: Sequence[int]) -> None:
    """Print the best of ours and the best of the peers in each group, on the images that all of both were run on."""
    print("\n### The best of each\n")
    print("| network | norm | asked | measure | images | of | " + " | ".join(f"{q} queries" for q in checkpoints) + " |")
    print("| --- | --- | --- | --- | ---: | --- |" + " ---: |" * len(checkpoints))
    for network, norm, access, measure, lines in groups:
        sides = [[line for line in lines if line.ours == own] for own in (True, False)]
        common = sorted(set.intersection(*(set(line.rows) for line in lines)))
        if not all(sides) or not common:
            continue
        head = [network, norm, access, "fooled" if measure == "success" else "median distance", str(len(common))]
        for name, side in zip(("ours", "peers"), sides, strict=True):
            cells = []
            for queries in checkpoints:
                values = {line.title: line.value(measure, queries, common) for line in side}
                top = (max if measure == "success" else min)(values.values())
                who = "" if top in (0, math.inf) else f" {next(title for title, value in values.items() if value == top)}"
                cells.append(show(top, measure, norm) + who)
            print("| " + " | ".join([*head, name, *cells]) + " |")
            head = [""] * len(head)


def costs(groups: Sequence[tuple[str, str, list[Line]]]) -> list[Row]:
    """Print CPU seconds for 1000 queries about one image, ours beside ART's."""
    print("\n### CPU seconds for 1000 queries about one image\n")
    head = "| network | norm | attack | images at once | seconds | inside the network | seconds / inside, asked:"
    print(f"{head} {OVERHEAD} | ART's / ours, asked: {FASTER} |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    report = []
    for network, norm, lines in groups:
        art = [line for line in lines if line.who == "ART"]
        for line in sorted(lines, key=lambda line: (not line.ours, line.title)):
            seconds, inside = line.per_thousand("seconds"), line.per_thousand("network")
            row: Row = {
                "network": network,
                "norm": norm,
                "who": line.who,
                "attack": line.attack,
                "seconds": seconds,
                "inside": inside,
            }
            alike = [other.per_thousand("seconds") for other in art if line.like(other)]
            ratio = min(alike) / seconds if line.ours and alike else math.nan
            row |= {"batch": max(r["batch"] for r in line.rows.values()), "art_over_ours": None if math.isnan(ratio) else ratio}
            report.append(row)
            cells = [f"{row['batch']}", f"{seconds:.3f}", f"{inside:.3f}", f"{seconds / inside:.2f}" if inside else "-"]
            print(
                f"| {network} | {norm} | {line.title} | "
                + " | ".join([*cells, "" if math.isnan(ratio) else f"{ratio:.1f}"])
                + " |"
            )
    print("\nOurs, median over attacks (least to most) of seconds / inside; ART's / ours, attack by attack and norm by norm:\n")
    for network in dict.fromkeys(row["network"] for row in report):
        mine = [row for row in report if row["network"] == network and row["who"] == OURS and row["inside"]]
        over = sorted(row["seconds"] / row["inside"] for row in mine)
        art = sorted(f"{row['attack']} {row['art_over_ours']:.1f}" for row in mine if row["art_over_ours"] is not None)
        if over:
            spread = f"{statistics.median(over):.1f} ({over[0]:.2f} to {over[-1]:.1f})"
            print(f"- {network}: {spread}; {', '.join(art) or 'no attack of ART'}")
    return report


def plot(network: str, groups: Sequence[tuple[str, str, str, list[Line]]], checkpoints: Sequence[int], path: Path) -> None:
    """Query curves of a network, a panel for each group: ours solid, peers dashed, the same attack in the same colour."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    from saddlepoint.report.figures import _DASHES, _STYLE, SERIES

    queries = np.unique(np.geomspace(10, max(checkpoints), 200).round().astype(int))
    groups = [group for group in groups if any(math.isfinite(line.value(group[2], max(checkpoints))) for line in group[3])]
    families = {
        kind: sorted({line.family for _, of, _, lines in groups if of == kind for line in lines}) for kind in (SCORES, LABELS)
    }
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    columns = min(len(groups), 2)
    shape = math.ceil(len(groups) / columns), columns
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.6 * shape[1], 4.6 * shape[0]))
        axes = figure.subplots(*shape, squeeze=False).ravel()
        for axis, (norm, access, measure, lines) in zip(axes, groups, strict=False):
            for line in sorted(lines, key=lambda line: (not line.ours, line.title)):
                values = np.array([line.value(measure, int(q)) for q in queries])
                values[~np.isfinite(values)] = np.nan
                alike = [other.title for other in lines if not other.ours and line.like(other)]
                axis.plot(
                    queries, values, label=line.title, color=(*SERIES, *MORE)[families[access].index(line.family) % 12],
                    linestyle="solid" if line.ours else _DASHES[sorted(alike).index(line.title)],
                    linewidth=2.2 if line.ours else 1.4,
                )  # fmt: skip
            axis.set_xscale("log")
            axis.set_xticks(checkpoints)
            if measure == "distance":
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axis.yaxis.set_major_formatter(plain if measure == "distance" else PercentFormatter(1, decimals=0))
            axis.xaxis.set_major_formatter(plain)
            for one in (axis.xaxis, axis.yaxis):
                one.set_minor_locator(NullLocator())
            axis.set_xlabel("queries")
            what = f"fooled within {lines[0].eps:.3g}" if measure == "success" else "median distance"
            axis.set_title(f"{norm}, {access}: {what}")
            axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        for axis in axes[len(groups) :]:
            axis.set_visible(False)
        figure.suptitle(f"{network}: ours solid, peers dashed")
        figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    found = [cls for cls in sp.attacks.find(access=Access.SCORES) if cls.declaration.access >= Access.LABELS]
    known = [cls.__name__.lower() for cls in found if cls.declaration.iterative and cls.declaration.untargeted]
    parser = argparse.ArgumentParser(description="Black-box attacks, beside other libraries' after the same number of queries.")
    parser.add_argument(
        "--attacks",
        nargs="*",
        default=known,
        metavar="SPEC",
        help=f"ours, such as square:p_init=0.3; default: {' '.join(known)}",
    )
    parser.add_argument(
        "--networks", nargs="+", default=tuple(BALLS), choices=tuple(BALLS), metavar="NAME", help=f"default: {', '.join(BALLS)}"
    )
    parser.add_argument("--norms", nargs="+", default=("linf", "l2"), choices=tuple(THREATS), help="default: linf l2")
    parser.add_argument("--images", type=int, default=50, help="that the network gets right; default 50")
    parser.add_argument(
        "--offset", type=int, default=0, help="the first test image; default 0; settings are chosen from 5000 on"
    )
    parser.add_argument(
        "--queries", nargs="+", type=int, default=(100, 500, 1000, 5000), help="where to look; the last is the budget"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="default: those that are installed"
    )
    parser.add_argument("--match", metavar="REGEX", help='run only peers whose "library attack" has it')
    parser.add_argument("--square", type=Path, metavar="FILE", help="attack.py of max-andr/square-attack, to be run as well")
    parser.add_argument(
        "--limit", type=float, default=3600.0, help="seconds after which a peer is stopped on an image; default 3600"
    )
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep every run there, and don't repeat what it holds")
    parser.add_argument("--again", action="store_true", help="measure ours anew, although the cache holds them")
    parser.add_argument("--table", action="store_true", help="print what the cache holds, run nothing")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the query curves there, a picture for each network")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables and the curve of each image there")
    options = parser.parse_args(arguments)
    if min(*options.queries, options.images, options.limit) <= 0 or options.offset < 0:
        parser.error("--queries, --images and --limit must be positive, --offset not negative")
    if options.square is not None and not options.square.is_file():
        parser.error(f"--square: {options.square} is no file")
    if not options.table and "SADDLEPOINT_DATA" not in os.environ:
        parser.error("set SADDLEPOINT_DATA to the folder that holds models/, mnist/, cifar10/")
    try:
        for spec in options.attacks:
            declared(spec)
    except sp.errors.SaddlepointError as error:
        parser.error(f"--attacks: {error}")

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # peers have much to say
    options.queries = sorted(options.queries)
    for name in ("square", "cache", "plot", "json"):
        if (path := getattr(options, name)) is not None:
            setattr(options, name, path.resolve())
    store = Runs(options.cache)
    if not options.table:
        os.environ["SADDLEPOINT_DATA"] = str(Path(os.environ["SADDLEPOINT_DATA"]).resolve())
        with tempfile.TemporaryDirectory() as scratch, chdir(scratch):  # ART leaves files where it is
            run(store, options)

    tables, timed, curves, grouped = [], [], [], []
    for network in options.networks:
        pictures = []
        for norm in options.norms:
            lines = lines_of(store, network, norm, options)
            for access, measure, group in groups_of(lines):
                tables.append(table(network, norm, access, measure, group, options.queries))
                pictures.append((norm, access, measure, group))
                grouped.append((network, norm, access, measure, group))
            timed.append((network, norm, lines))
            curves += [row for line in lines for row in line.rows.values()]
        if options.plot and pictures:
            options.plot.mkdir(parents=True, exist_ok=True)
            plot(network, pictures, options.queries, options.plot / f"{network}.png")
    best(grouped, options.queries)
    seconds = costs(timed)
    if options.json:
        facts = {
            "date": date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__,
            "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.machine()},
        }  # fmt: skip
        options.json.write_text(json.dumps(facts | {"tables": tables, "costs": seconds, "curves": curves}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
