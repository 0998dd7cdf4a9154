"""The competition's benchmarks, bounds beside auto_LiRPA's, and certified accuracy of trained networks.

    SADDLEPOINT_DATA=... python benchmarks/verification.py search NAME [--seconds 60] [--only 0,1,...] [--out FILE.jsonl]
    SADDLEPOINT_DATA=... python benchmarks/verification.py bounds [NAME ...] [--peer] [--turns N] [--out FILE.jsonl]
                                                                [--json FILE]
    SADDLEPOINT_DATA=... python benchmarks/verification.py accuracy [--network NAME] [--samples N] [--seconds 20] [--out FOLDER]

search: every instance of a benchmark of `verification/` within so many processor seconds of one thread, without reading the
files. A verdict against a checked counterexample of ground_truth.csv, or a claimed counterexample that isn't one, ends the run
with an error. Beside ours: the published verdicts (counts.csv).
bounds: the least margin of each instance in peer_bounds.csv by our methods, with processor seconds; theirs were measured when
the folder was made, or with --peer are by auto_LiRPA here, both taking turns after one that isn't
timed (--turns, of which the fastest counts).
--out keeps each instance as it comes; the same call goes on there.
accuracy: the interval [certified, attacked] of the networks in `models/`.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

import saddlepoint as sp
from saddlepoint.propagation.methods import Method
from saddlepoint.propagation.nodes import Graph
from saddlepoint.verify import Proof, Property, bounds, decide, read, read_vnnlib
from saddlepoint.verify.cases import Cases

ANSWERS = {"robust": "unsat", "falsified": "sat"}
METHODS: dict[str, Method] = {
    "ibp": "ibp", "forward": "forward", "crown_ibp": "crown-ibp", "crown": "crown", "alpha_crown_20": "alpha-crown",
}  # fmt: skip
SAME = 1e-4  # bounds that differ by less, relatively, count as equal
ACCURACY = (("mnist_cnnA_provable_eps0.1", "mnist", 0.1), ("cifar10_cnnA_provable_oval_wide", "cifar10", 2 / 255))


def rows(path: Path) -> list[dict[str, str]]:
    """A table with a header."""
    return list(csv.DictReader(path.read_text().splitlines()))


def kept(file: Path | None) -> list[dict[str, Any]]:
    """What an earlier run left in --out."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file and file.exists() else []


def keep(file: Path | None, row: dict[str, Any]) -> None:
    """One more of them."""
    if file:
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")


class Instances:
    """A benchmark's networks and properties; each network is read once."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder / name, name
        self.listed = [line.split(",") for line in (self.folder / "instances.csv").read_text().split()]
        truth = rows(folder / "ground_truth.csv")
        self.truth = {(row["onnx"], row["vnnlib"]): row for row in truth if row["benchmark"] == name}
        self.models: dict[str, sp.Model] = {}

    def load(self, onnx: str, vnnlib: str) -> tuple[sp.Model, Property]:
        """A network and a property by their files' names."""
        if onnx not in self.models:
            self.models = {onnx: sp.Model(sp.models.read_graph(self.folder / "onnx" / f"{onnx}.gz"), bounds=None)}
        return self.models[onnx], read_vnnlib(self.folder / "vnnlib" / f"{vnnlib}.gz")

    def all(self) -> Iterator[tuple[int, str, str]]:
        """Number, network and property of each."""
        for number, (onnx, vnnlib, _) in enumerate(self.listed):
            yield number, onnx.split("/")[-1], vnnlib.split("/")[-1]


def search(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Decide each instance; what is in --out is not done again."""
    instances = Instances(folder, options.names[0])
    only = {int(part) for part in options.only.split(",")} if options.only else None
    done = {row["number"]: row for row in kept(options.out)}
    for number, onnx, vnnlib in instances.all():
        if number in done or (only is not None and number not in only):
            continue
        model, property_ = instances.load(onnx, vnnlib)
        proof = decide(model, property_, sp.Budget(seconds=options.seconds), clock=time.process_time)
        truth = instances.truth.get((onnx, vnnlib), {})
        _check(model, property_, proof, truth, vnnlib)
        row = {"number": number, "onnx": onnx, "vnnlib": vnnlib, "truth": truth.get("truth", "unknown")}
        row |= {key: value for key, value in asdict(proof).items() if key != "counterexample"}
        done[number] = row
        keep(options.out, row)
        print(
            f"{number:>4} {onnx} {vnnlib}: {proof.verdict} by {proof.stage} in {proof.seconds:.2f} s {proof.reason}", flush=True
        )
    found = [done[number] for number in sorted(done)]
    counts = Counter(row["verdict"] for row in found)
    spent = [row["seconds"] for row in found if row["verdict"] != "unknown"]
    middle, most = (statistics.median(spent), max(spent)) if spent else (0, 0)
    print(
        f"{options.names[0]}: {counts['robust']} unsat, {counts['falsified']} sat, {counts['unknown']} open of {len(found)} "
        f"within {options.seconds:g} s; median {middle:.2f} s, most {most:.2f} s"
    )
    for row in rows(folder / "counts.csv"):
        if row["benchmark"] == options.names[0]:
            print("  published:", ", ".join(f"{key} {value}" for key, value in row.items() if key != "benchmark"))
    return found


def _check(model: sp.Model, property_: Property, proof: Proof, truth: dict[str, str], name: str) -> None:
    """Stop at a wrong verdict."""
    if proof.verdict == "robust" and truth.get("basis") == "counterexample_checked" and truth["truth"] == "sat":
        sys.exit(f"{name}: proved, but there is a checked counterexample")
    if proof.counterexample is not None:
        point = proof.counterexample[None].double()
        output = model.raw(proof.counterexample[None])[0].detach().double()
        flat = point.flatten()
        inside = [
            bool(((case.lower - 1e-6 <= flat) & (flat <= case.upper + 1e-6)).all())
            and bool((case.rows @ output + case.constants <= 0).all())
            for case in property_.cases
        ]
        if not any(inside):
            sys.exit(f"{name}: the counterexample is none")


@dataclass(frozen=True)
class Task:
    """A row of peer_bounds.csv: lower bounds of rows (N, R, C) times the outputs over boxes, and the least plus constants."""

    row: dict[str, str]
    net: torch.nn.Module
    graph: Graph
    cases: Cases

    @property
    def specification(self) -> torch.Tensor:
        return self.cases.rows[:, 0][None].expand(len(self.cases.inputs.lower), -1, -1)

    def margin(self, low: torch.Tensor) -> float:
        return float((low[0] + self.cases.constants[:, 0]).min())


def tasks(folder: Path, names: set[str], done: set[tuple[str, str, str]]) -> Iterator[Task]:
    """Those of some benchmarks, all if none is named, that are not done and that we have a method for."""
    table = rows(folder / "peer_bounds.csv")
    listed = {row["benchmark"] for row in table}
    for name in sorted(listed & names if names else listed):
        instances = Instances(folder, name)
        graphs: dict[str, Graph] = {}
        for row in table:
            if row["benchmark"] != name or row["method"] not in METHODS or _which(row) in done:
                continue
            model, property_ = instances.load(row["onnx"], row["vnnlib"])
            (net,) = model.networks()
            shape = getattr(net, "shape", None) or (property_.inputs,)
            cases = property_.to_cases(shape, torch.zeros(1))
            graph = graphs.get(row["onnx"]) or graphs.setdefault(row["onnx"], read(model, cases.inputs.lower[:1]))
            yield Task(row, net, graph, cases)


def _which(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["onnx"], row["vnnlib"], row["method"]


class Peer:
    """auto_LiRPA in this process. To import it changes what torch.export can read: read all graphs before."""

    METHODS: ClassVar = {
        "ibp": "IBP", "forward": "Forward", "crown_ibp": "CROWN-IBP", "crown": "CROWN", "alpha_crown_20": "CROWN-Optimized",
    }  # fmt: skip

    def __init__(self) -> None:
        self.library = importlib.import_module("auto_LiRPA")

    def prepared(self, task: Task) -> Callable[[], torch.Tensor]:
        """What bounds a task; the network is read before."""
        box, method = task.cases.inputs, self.METHODS[task.row["method"]]
        options = {"optimize_bound_args": {"iteration": 20}} if method == "CROWN-Optimized" else {}
        middle = (box.lower + box.upper) / 2
        net = self.library.BoundedModule(task.net, middle[:1], device="cpu", verbose=False, bound_opts=options)
        near = self.library.PerturbationLpNorm(norm=torch.inf, x_L=box.lower, x_U=box.upper)

        def work() -> torch.Tensor:
            given = self.library.BoundedTensor(middle, near)
            with torch.set_grad_enabled(bool(options)):
                lower, _ = net.compute_bounds(x=(given,), C=task.specification, method=method, bound_upper=False)
            return lower.detach()

        return work


def spent(work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """What it returns, and processor seconds."""
    began = time.process_time()
    found = work()
    return found, time.process_time() - began


def beside(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Our margins and seconds beside those of peer_bounds.csv, or of the peer here and now."""
    found = kept(options.out)
    if any(row["peer"] != options.peer for row in found):
        sys.exit(f"{options.out} was begun {'without' if options.peer else 'with'} --peer: take another file")
    todo: Iterable[Task] = tasks(folder, set(options.names), {_which(row) for row in found})
    peer = None
    if options.peer:
        todo = list(todo)  # reads all graphs
        peer = Peer()
    for task in todo:
        row = task.row
        work = partial(bounds, task.graph, task.cases.inputs, None, task.specification, METHODS[row["method"]])
        other = peer.prepared(task) if peer else None
        if other:  # the first turn of each isn't timed
            work(), other()
        turns = [(spent(work), spent(other) if other else (None, float(row["cpu_seconds"]))) for _ in range(options.turns)]
        (ours, _), (theirs, _) = turns[-1]
        found.append({
            "benchmark": row["benchmark"], "onnx": row["onnx"], "vnnlib": row["vnnlib"], "method": row["method"],
            "peer": options.peer, "ours": task.margin(ours),
            "theirs": float(row["margin"]) if theirs is None else task.margin(theirs),
            "our_seconds": min(seconds for (_, seconds), _ in turns),
            "their_seconds": min(seconds for _, (_, seconds) in turns),
        })  # fmt: skip
        keep(options.out, found[-1])
    for name, method in dict.fromkeys((row["benchmark"], row["method"]) for row in found):
        part = [row for row in found if (row["benchmark"], row["method"]) == (name, method)]
        differ = [(row["ours"] - row["theirs"]) / max(abs(row["theirs"]), 1e-3) for row in part]
        ours, theirs = (sum(row[key] for row in part) for key in ("our_seconds", "their_seconds"))
        print(
            f"{name:<16} {method:<15} {len(part):>3} instances: "
            f"{sum(one < -SAME for one in differ)} looser, by {max(0, -min(differ)):.1e} at most, "
            f"{sum(one > SAME for one in differ)} tighter, by {max(0, max(differ)):.1e} at most; "
            f"{ours:.2f} s, theirs {theirs:.2f} s"
        )
    return found


def accuracy(data: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Certified and attacked accuracy of trained networks."""
    from zoo import reference, test_split

    found = []
    for name, dataset, eps in ACCURACY:
        if options.network and options.network != name:
            continue
        net, mean, std, _ = reference(name, data)
        model = sp.Model(net, mean=mean, std=std)
        split = test_split(dataset, data).take(options.samples)
        proved = sp.verify.certify(
            model, split.x, split.y, sp.Linf(eps), sp.Budget(seconds=options.seconds), clock=time.process_time,
            folder=options.out / name if options.out else None, progress=True,
        )  # fmt: skip
        print(f"{name}: {proved.summary()}", flush=True)
        found.append({"network": name, "eps": eps} | proved.to_dict())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Verification.")
    parser.add_argument("what", choices=("search", "bounds", "accuracy"))
    parser.add_argument("names", nargs="*", help="benchmarks")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--only", help="numbers of instances")
    parser.add_argument("--network")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = Path(os.environ["SADDLEPOINT_DATA"])
    if options.turns < 1:
        parser.error("--turns must be at least 1")
    if options.what == "search" and len(options.names) != 1:
        parser.error("search takes the name of one benchmark")
    folder = data / "verification"
    found = {
        "search": lambda: search(folder, options), "bounds": lambda: beside(folder, options),
        "accuracy": lambda: accuracy(data, options),
    }[options.what]()  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
