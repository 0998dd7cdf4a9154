"""`saddlepoint evaluate --effort`: the cascade, kept in a campaign for each model and size, and the gate for CI."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from saddlepoint.cli.options import console, make_way, write_json, writing
from saddlepoint.data.dataset import Split
from saddlepoint.engine import Budget
from saddlepoint.evaluate import AdversarialSet, Campaign, Effort, Evaluation, estimate, evaluate, export
from saddlepoint.evaluate.export import Kind
from saddlepoint.files import write_file
from saddlepoint.gates import Gate, check_share, gate, junit
from saddlepoint.models.base import Classifier
from saddlepoint.report.evaluations import by_group
from saddlepoint.report.words import percent, visible
from saddlepoint.threats import Threat


@dataclass(frozen=True)
class Cascade:
    """What is asked for: each of the models within each of the threats. certify, at_least, junit, json, kind: None where not
    wanted. certify: seconds for the proof of each sample that stands.

    groups: metadata by field, one value for each sample. write: keeps the configuration in a folder. report: writes the page
    and says where it is. kind: of the adversarial set.
    """

    models: Mapping[str, Classifier]
    split: Split
    threats: Sequence[Threat]
    effort: Effort
    out: Path
    curve: bool
    sources: Sequence[Classifier]
    seed: int
    batch_size: int | None
    groups: Mapping[str, Sequence[str]]
    certify: float | None
    at_least: float | None
    junit: Path | None
    json: Path | None
    kind: Kind | None
    write: Callable[[Path], object]
    report: Callable[[list[tuple[str, Evaluation]]], Path]

    def run(self) -> None:
        """Evaluate; what is finished is kept in `out`, and the same command goes on with it.

        Exit status 1 if `at_least` is given and not reached, 130 after Ctrl-C.
        """
        if self.at_least is not None:
            check_share(self.at_least)
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
        for path in (self.junit, self.json):
            make_way(path)
        found: list[dict[str, Any]] = []
        reported: list[tuple[str, Evaluation]] = []
        gates: list[tuple[str, Gate]] = []
        stopped = False
        for name, model, threat in self._each():
            folder = self.out / f"{name}-{threat.norm.value}-{threat.largest_eps:.6g}"
            evaluation = self._evaluate(model, threat, folder)
            fields = by_group(evaluation, self.groups)
            _show_groups(fields)
            found.append({"model": name, "campaign": str(folder)} | evaluation.to_dict() | {"groups": fields})
            reported.append((name, evaluation))
            if self.at_least is not None:
                gates.append((name, self._judge(evaluation, self.at_least, folder)))
            if self.kind is not None:
                _export(evaluation, model, folder / f"adversarial-set-{self.kind}", self.kind)
            if stopped := not evaluation.complete:
                break
        write_json(self.json, {"format": 1, "evaluations": found})
        if self.junit is not None:
            with writing(self.junit):
                write_file(self.junit, junit(gates).encode())
        console.print(f"\nreport: [bold]{escape(str(self.report(reported)))}[/]   (open it in a browser)", soft_wrap=True)
        if stopped or not all(one.passed for _, one in gates):
            raise typer.Exit(130 if stopped else 1)

    def estimate(self) -> None:
        """Say what `run` would cost, and attack nothing."""
        found = []
        for name, model, threat in self._each():
            expected = estimate(
                model, self.split.x, threat, self.effort, curve=self.curve, sources=self.sources, batch_size=self.batch_size
            )
            found.append({"model": name, "threat": threat.settings()} | expected.to_dict())
            if self.certify is not None:
                console.print(f"proofs: at most about {self.certify:g} s more for each sample that stands", markup=False)
            console.print(f"within {threat}, {self.effort}: {expected.summary()}", markup=False, soft_wrap=True)
        write_json(self.json, {"format": 1, "estimates": found})
        console.print("nothing was attacked: leave out --dry-run for that")

    def _each(self) -> Iterator[tuple[str, Classifier, Threat]]:
        for name, model in self.models.items():
            for threat in self.threats:
                console.print(f"\n[bold]{escape(name)}[/]")
                yield name, model, threat

    def _evaluate(self, model: Classifier, threat: Threat, folder: Path) -> Evaluation:
        campaign = Campaign(folder)
        known = campaign.complete and self.certify is None  # there may be proofs that it didn't have
        found = evaluate(
            model, self.split.x, self.split.y, threat, self.effort, curve=self.curve, sources=self.sources, seed=self.seed,
            batch_size=self.batch_size, progress=True, campaign=campaign,
            certify=None if self.certify is None else Budget(seconds=self.certify),
        )  # fmt: skip
        with writing(folder):
            self.write(folder)
        console.print(found.summary(), markup=False)
        after = "it was complete before: these figures were read from it, and nothing was attacked"
        stopped = "interrupted: the same command goes on where it stopped"
        more = after if known else "sp.Campaign" if found.complete else stopped
        console.print(f"campaign: [bold]{escape(str(folder))}[/]   ({more})", soft_wrap=True)
        return found

    @staticmethod
    def _judge(found: Evaluation, at_least: float, folder: Path) -> Gate:
        result = gate(found, at_least)
        console.print(result.message, markup=False)
        write_json(folder / "gate.json", result.to_dict())
        return result


def _show_groups(fields: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """A table for each metadata field, as `by_group` has them."""
    for field, groups in fields.items():
        name = escape(visible(field))
        table = Table(title=f"subgroups by {name}, the weakest first; each limit is 97.5% sure")
        table.add_column(name, overflow="fold")
        for title in ("samples", "clean accuracy", "robust, at most", "for all such inputs"):
            table.add_column(title, justify="right")
        for value, figures in groups.items():
            limits = f"{percent(figures['interval']['low'])} to {percent(figures['interval']['high'])}"
            shares = (percent(figures["clean_accuracy"]), percent(figures["robust_accuracy"]))
            table.add_row(escape(visible(value)), f"{figures['samples']:,}", *shares, limits)
        console.print(table)


def _export(found: Evaluation, model: Classifier, folder: Path, kind: Kind) -> None:
    """Write the broken samples, in place of those that an earlier run of the campaign wrote."""
    replaced = ""
    if folder.exists():
        AdversarialSet(folder)  # refuses what isn't one: it isn't ours to delete
        with writing(folder):
            shutil.rmtree(folder)
        replaced = ", in place of the older one"
    rows = found.broken.nonzero()[:, 0]
    if not len(rows):
        console.print("adversarial set: none, since no sample was broken")
        return
    bounds = model.bounds or (0.0, 1.0)
    done = export(found.x[rows], found.adversarial[rows], found.y[rows], folder, kind, bounds=bounds, samples=rows)
    console.print(f"adversarial set{replaced}: {done.summary()}", markup=False, soft_wrap=True)
