"""Defenses side by side: each network trained, protected, and attacked by who knows it, on the same samples."""

from __future__ import annotations

import copy
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from saddlepoint.attacks import PGD
from saddlepoint.attacks.facade import attack as run_attack
from saddlepoint.defenses.loop import EpochRecord
from saddlepoint.defenses.recipes import Defense, defense
from saddlepoint.defenses.training import check_scale, labelled
from saddlepoint.defenses.training import train as run_train
from saddlepoint.engine import Budget
from saddlepoint.errors import DataError, InputError, ModelError
from saddlepoint.evaluate.cascade import Effort, evaluate
from saddlepoint.evaluate.defended import prediction_seconds
from saddlepoint.evaluate.evaluation import Evaluation, binomial_limits
from saddlepoint.evaluate.naive import averaged_predictions, naive_examples
from saddlepoint.evaluate.paired import mcnemar
from saddlepoint.files import write_file
from saddlepoint.models.base import Classifier
from saddlepoint.models.fingerprint import fingerprint
from saddlepoint.models.freeze import global_random_state_kept
from saddlepoint.models.torch_model import Labelled, Model
from saddlepoint.taxonomy import Norm
from saddlepoint.threats import Threat
from saddlepoint.zoo import save_weights

UNDEFENDED, INDEPENDENT = "undefended", "independent"
SUGGESTED: Final = ("pgd-training", "trades", "fast", "distillation", "feature-squeezing")
"""What `defend` compares where nothing else is asked for: the usual trainings, one cheap one, and two that fell."""
WEIGHTS = "weights.safetensors"
GAP = 0.05  # by which a naive figure misleads
LEVEL = 0.05  # above this p-value two defenses are said to be tied
_OTHER = 0x51DE  # added to the seed of the independent network


@dataclass(frozen=True)
class Cost:
    """Of a training: seconds, and forward and backward passes through the network (of one sample each)."""

    seconds: float = 0.0
    forward: int = 0
    backward: int = 0

    @property
    def passes(self) -> int:
        """Forward and backward ones."""
        return self.forward + self.backward


@dataclass(frozen=True, repr=False)
class Entry:
    """One defense with what became of the samples.

    model: the defended classifier; network: the one inside that has the weights. evaluation: of the adaptive attacks. naive
    (N,) bool: samples that the model gets right under an attack that doesn't know the defense: for what stands before a
    network, APGD on the network inside; otherwise 20 steps of PGD on the cross-entropy. transferred: the same
    for examples made on other networks, "undefended" and "independent". training: what the network cost; where it is another
    entry's too, it is paid once. slowdown: time of a prediction by that of the undefended network. parameters: how many
    numbers it has.
    """

    name: str
    defense: Defense | None
    model: Classifier
    network: Model
    evaluation: Evaluation
    naive: Tensor
    transferred: Mapping[str, Tensor]
    training: Cost
    slowdown: float
    parameters: int

    def __repr__(self) -> str:
        return f"Entry({self.name}: clean {self.clean_accuracy:.2%}, robust {self.robust_accuracy:.2%})"

    @property
    def stands(self) -> Tensor:
        """Samples that stand all attacks, (N,) bool: who knows more can do what who knows less does."""
        return torch.stack([self.evaluation.stands, self.naive, *self.transferred.values()]).all(0)

    @property
    def clean_accuracy(self) -> float:
        """Share of samples that the model gets right."""
        return self.evaluation.clean_accuracy

    @property
    def naive_accuracy(self) -> float:
        """Share that the naive attack leaves: no measure of robustness."""
        return _share(self.naive & self.evaluation.right)

    @property
    def adaptive_accuracy(self) -> float:
        """Share that the adaptive attacks leave."""
        return self.evaluation.robust_accuracy

    @property
    def robust_accuracy(self) -> float:
        """Share that stands all attacks: the figure to go by, at most."""
        return _share(self.stands)

    @property
    def limits(self) -> tuple[float, float]:
        """95 % limits of the robust accuracy under these attacks for all such samples (Clopper-Pearson)."""
        return binomial_limits(int(self.stands.sum()), len(self.stands))

    def transfer_accuracy(self, source: str) -> float | None:
        """Share that the examples made on `source` leave; None where there are none."""
        found = self.transferred.get(source)
        return None if found is None else _share(found & self.evaluation.right)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why the figure may be too high, beside that no attack is the last one."""
        found, missed = [], int((self.evaluation.stands & ~self.stands).sum())
        if missed:
            found.append(
                f"the naive or the transferred examples break {missed} samples that the adaptive attacks leave: its gradients "
                "mislead, and other attacks may break more"
            )
        looked = self.evaluation.diagnosis
        if looked is not None and looked.masked:
            signs = ", ".join(finding.name for finding in looked.suspicious)
            found.append(f"there are signs of masked gradients ({signs}), and the figure may be too high")
        return tuple(found)

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know about the figures, doubts first."""
        return tuple(dict.fromkeys((*self.doubts, *self.evaluation.notes)))

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        return {
            "name": self.name, "settings": self.model.describe(), "clean_accuracy": self.clean_accuracy,
            "naive_accuracy": self.naive_accuracy, "adaptive_accuracy": self.adaptive_accuracy,
            "transfer_accuracy": {source: self.transfer_accuracy(source) for source in self.transferred},
            "robust_accuracy": self.robust_accuracy, "low": self.limits[0], "high": self.limits[1],
            "training": asdict(self.training), "slowdown": self.slowdown, "parameters": self.parameters,
            "notes": list(self.notes), "evaluation": self.evaluation.to_dict(),
        }  # fmt: skip


@dataclass(frozen=True, repr=False)
class Tournament:
    """Defenses on the same samples x (N, ...), in the order that they were asked for; the first is the undefended network.

    failed: (name, why) of those that could not be made. complete: False after Ctrl-C: then only the finished ones are there.
    """

    x: Tensor
    threat: Threat
    rows: tuple[Entry, ...]
    seed: int
    failed: tuple[tuple[str, str], ...] = ()
    complete: bool = True

    def __repr__(self) -> str:
        return f"Tournament({len(self.rows)} models, {len(self.x)} samples, {self.threat}; print .summary() for more)"

    @cached_property
    def ranking(self) -> tuple[Entry, ...]:
        """The most robust first; where that is equal the more accurate, then what trains cheaper."""
        return tuple(sorted(self.rows, key=lambda row: (-row.robust_accuracy, -row.clean_accuracy, row.training.passes)))

    @property
    def winner(self) -> Entry:
        """The first of the ranking."""
        return self.ranking[0]

    def p_value(self, row: Entry) -> float:
        """Of McNemar's exact test between the winner and another row, on the samples that only one of them keeps."""
        best, other = self.winner.stands, row.stands
        return mcnemar(int((best & ~other).sum()), int((other & ~best).sum()))

    @property
    def tied(self) -> tuple[Entry, ...]:
        """Those that these samples can't tell from the winner, which is not among them."""
        return tuple(row for row in self.ranking[1:] if self.p_value(row) > LEVEL)

    @property
    def front(self) -> tuple[Entry, ...]:
        """The Pareto front: rows than which no other is as accurate and as robust, and better in one of the two."""

        def figures(row: Entry) -> tuple[float, float]:
            return row.clean_accuracy, row.robust_accuracy

        def beaten(row: Entry) -> bool:
            own = figures(row)
            return any(figures(o) != own and all(a >= b for a, b in zip(figures(o), own, strict=True)) for o in self.rows)

        return tuple(row for row in self.rows if not beaten(row))

    @property
    def verdict(self) -> str:
        """What came out, in words; names of defenses are in backquotes."""
        best, tied = self.winner, [f"`{row.name}`" for row in self.tied]
        words = [
            f"`{best.name}` keeps the most: {best.robust_accuracy:.1%} of the samples within {self.threat}, "
            f"{best.clean_accuracy:.1%} without an attack."
        ]
        if tied:
            words.append(f"These samples can't tell it from {', '.join(tied)}: take that as a tie.")
        undefended = next((row for row in self.rows if row.defense is None), None)
        if best is undefended and len(self.rows) > 1:
            words.append("No defense did better than none.")
        elif undefended is not None and best is not undefended:
            words.append(f"Without a defense, {undefended.robust_accuracy:.1%} stand.")
        promise = [row for row in self.rows if row.defense is not None and row.naive_accuracy - row.robust_accuracy >= GAP]
        if promise:
            shown = "; ".join(f"`{r.name}` {r.naive_accuracy:.1%} instead of {r.robust_accuracy:.1%}" for r in promise)
            words.append(f"The naive attack alone would have left more than there is: {shown}.")
        doubtful = [f"`{row.name}`" for row in self.ranking if row.doubts]
        if doubtful:
            words.append(f"Doubt the figures of {', '.join(doubtful)}; the reasons are below.")
        if not self.complete:
            words.append("Defenses that were not finished are missing.")
        return " ".join(words)

    def summary(self) -> str:
        """The ranking with its figures, in plain text."""
        wide = max([len("defense"), *(len(row.name) for row in self.rows)])
        sources = self.sources
        heads = ["clean", "naive", "adaptive", *(f"from {s}" for s in sources), "robust", "95 % limits", "training", "predicts"]
        widths = [max(len(head), 8) for head in heads]
        lines = [
            f"Defenses on {len(self.x)} samples within {self.threat}: accuracy under each attack, the most robust first",
            f"  {'':<1} {'defense':<{wide}}  " + "  ".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True)),
        ]
        tied = {row.name for row in self.tied}
        for row in self.ranking:
            cells = [
                row.clean_accuracy, row.naive_accuracy, row.adaptive_accuracy,
                *(row.transfer_accuracy(source) for source in sources), row.robust_accuracy,
            ]  # fmt: skip
            texts = ["-" if value is None else f"{value:.2%}" for value in cells]
            texts += [f"{row.limits[0]:.0%} to {row.limits[1]:.0%}", f"{row.training.seconds:.1f} s", f"x{row.slowdown:.1f}"]
            mark = "*" if row is self.winner else "=" if row.name in tied else " "
            lines.append(f"  {mark} {row.name:<{wide}}  " + "  ".join(f"{t:>{w}}" for t, w in zip(texts, widths, strict=True)))
        lines.append("  * keeps the most" + (", = tied with it (McNemar's exact test, p > 0.05)" if tied else ""))
        lines += [f"  note on {row.name}: {note}" for row in self.ranking for note in row.notes]
        lines += [f"  ! {name} could not be made: {why}" for name, why in self.failed]
        return "\n".join(lines + ([] if self.complete else ["  ! interrupted: what was not finished is missing"]))

    @property
    def sources(self) -> tuple[str, ...]:
        """The networks whose examples were shown to others."""
        return tuple(source for source in (UNDEFENDED, INDEPENDENT) if any(source in row.transferred for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """The figures, ready for JSON."""
        tied = self.tied
        return {
            "threat": self.threat.settings(), "samples": len(self.x), "seed": self.seed, "complete": self.complete,
            "verdict": self.verdict, "winner": self.winner.name, "tied": [row.name for row in tied],
            "front": [row.name for row in self.front], "failed": [{"name": n, "why": w} for n, w in self.failed],
            "models": [row.to_dict() | {"p_value": self.p_value(row)} for row in self.rows],
        }  # fmt: skip


def defend(
    model: Model | Callable[[int], Model],
    train: Labelled | tuple[Tensor, Tensor],
    test: Labelled | tuple[Tensor, Tensor],
    threat: Threat,
    defenses: Sequence[Defense | str] = SUGGESTED,
    effort: Effort = "standard",
    *,
    epochs: int = 20,
    from_weights: bool = False,
    independent: bool = True,
    folder: str | Path | None = None,
    seed: int = 0,
    eval_batch_size: int | None = None,
    progress: bool = False,
    on_row: Callable[[Tournament], None] | None = None,
    **settings: Any,
) -> Tournament:
    """Train and protect a network in several ways, attack every result, and rank them by what the strongest attacks leave.

    model: the architecture. It is trained anew from weights that depend on `seed`: those that a function of the seed gives, or
    every layer's own `reset_parameters`. from_weights: begin every training with the model's weights instead; the undefended
    network is then the model as it is. All trainings begin with the same weights; the model itself stays as it was.
    train, test: (x, y), or what has x and y; all of `test` is attacked. threat: what is trained against, and evaluated.
    defenses: as text ("trades:beta=1", "pgd-training+jpeg", see `saddlepoint.defenses.defense`). effort: of `sp.evaluate`.
    independent: train a second undefended network from other weights, whose examples are shown to all as well.
    folder: keeps checkpoints and evaluations; the same call goes on where an earlier one was stopped.
    on_row: called with the tournament so far after each row. settings: of `sp.train` (Any since they are passed on).

    One training each: another seed may change the order of what is close. Each figure is an upper bound, as in `sp.evaluate`.
    Ctrl-C returns what is finished. A defense that doesn't fit the network or diverges is in `failed`. Errors: `InputError`
    (also for names and settings, before any training), those of `sp.train` for the undefended network, `DataError`.

    >>> import saddlepoint as sp
    >>> digits, model = sp.data.load("digits"), sp.Model(sp.zoo.build("digits-cnn"))
    >>> small = digits.train.take(200), digits.test.take(20)
    >>> found = defend(model, *small, sp.Linf(0.1), ["bit-depth"], "quick", epochs=1, independent=False)
    >>> [row.name for row in found.rows]
    ['undefended', 'bit-depth']
    """
    begin = (lambda number: _anew(model, number)) if isinstance(model, Model) else model
    start = model if from_weights and isinstance(model, Model) else _network(begin(seed))
    if not isinstance(threat, Threat) or threat.minimizes:
        raise InputError(f"defend needs a ball of stated size, such as sp.Linf(8 / 255); got {threat!r}")
    pairs, (x, y) = labelled(train, start, "train"), labelled(test, start, "test")
    check_scale(threat, start, x)
    asked = [defense(one) if isinstance(one, str) else one for one in defenses]
    asked = list({one.name: one for one in asked}.values())
    for one in asked:
        if one.name in (UNDEFENDED, INDEPENDENT):
            raise InputError(f"a defense can't be called {one.name!r}, which is what it is compared with")
        one.objective(threat, start)
        one.protect(start, x.shape[1:])
    settings = {"schedule": "linear", **settings, "epochs": epochs, "seed": seed, "progress": progress}
    run = _Run(start, pairs, x, y, threat, effort, settings, None if folder is None else Path(folder), eval_batch_size)
    rows: list[Entry] = []
    failed: list[tuple[str, str]] = []

    def so_far(complete: bool = False) -> Tournament:
        return Tournament(x, threat, tuple(rows), seed, tuple(failed), complete)

    try:
        plain = defense("standard")
        given = copy.deepcopy(start), Cost()
        bare = given if from_weights else run.trained(plain, start, None)
        run.undefended = bare[0]
        if independent:
            other = _network(begin(seed + _OTHER))
            run.sources[INDEPENDENT] = run.trained(plain, other, None, INDEPENDENT)[0]
        rows.append(run.entry(UNDEFENDED, None, bare))
        run.sources[UNDEFENDED] = run.undefended
        networks = {"": bare} if from_weights else {"": bare, plain.network: bare}
        for one in asked:
            if on_row is not None:
                on_row(so_far())
            try:
                if one.network not in networks:
                    networks[one.network] = run.trained(one, start, run.undefended)
                rows.append(run.entry(one.name, one, networks[one.network]))
            except (InputError, ModelError) as error:
                failed.append((one.name, str(error)))
    except KeyboardInterrupt:
        return so_far()
    found = so_far(complete=True)
    if on_row is not None:
        on_row(found)
    return found


@dataclass
class _Run:
    """What all rows share. undefended, sources: networks, as soon as they are trained."""

    start: Model
    data: tuple[Tensor, Tensor]
    x: Tensor
    y: Tensor
    threat: Threat
    effort: Effort
    settings: dict[str, Any]  # Any: of `sp.train`
    folder: Path | None
    eval_batch_size: int | None

    def __post_init__(self) -> None:
        self.undefended: Model | None = None
        self.warm = False
        self.sources: dict[str, Model] = {}
        self.examples: dict[str, Tensor] = {}

    @property
    def _common(self) -> dict[str, Any]:
        return {"seed": self.settings["seed"], "batch_size": self.eval_batch_size}

    def trained(self, how: Defense, start: Model, undefended: Model | None, name: str | None = None) -> tuple[Model, Cost]:
        """A copy of `start`, trained, and what that cost; from where it was stopped, if it was."""
        begun = fingerprint(start)[:8]  # a checkpoint doesn't know with which weights it began
        net, folder = copy.deepcopy(start), self._folder("networks", f"{name or how.network}-{begun}")
        more: dict[str, Any] = {} if folder is None else {"checkpoint": folder / "checkpoint.pt"}
        if folder is None or not (folder / WEIGHTS).exists():
            self._warm_up()
        with _metered(net, folder) as (spent, finished):
            done = how.train(
                net, self.data, self.threat, undefended=undefended or start, on_epoch=spent, **more, **self.settings
            )
            if not done.complete:
                raise KeyboardInterrupt
            cost = finished()
        if folder is not None:
            save_weights(net.networks()[0], folder / WEIGHTS)
        return net, cost

    def _warm_up(self) -> None:
        """The first training of a process takes seconds to import what optimisers need, which is nobody's cost."""
        if not self.warm:
            x, y = (column[:2] for column in self.data)
            run_train(copy.deepcopy(self.start), (torch.cat([x, x]), torch.cat([y, y])), epochs=1)
            self.warm = True

    def entry(self, name: str, how: Defense | None, made: tuple[Model, Cost]) -> Entry:
        """Protect, attack, measure."""
        assert self.undefended is not None
        net, cost = made
        model = net if how is None else how.protect(net, self.x.shape[1:])
        folder = self._folder("evaluations", name)
        others = [source for source in self.sources.values() if source is not net]
        found = evaluate(
            model, self.x, self.y, self.threat, self.effort, sources=others, progress=self.settings["progress"],
            campaign=folder, **self._common,
        )  # fmt: skip
        if not found.complete:
            raise KeyboardInterrupt
        shown = {source: self._stands(model, self._made_on(source)) for source, of in self.sources.items() if of is not net}
        if UNDEFENDED in self.sources and net is self.undefended:
            shown[UNDEFENDED] = self._stands(model, self._made_on(UNDEFENDED))
        slowdown = 1.0 if how is None else prediction_seconds(model, self.x) / prediction_seconds(self.undefended, self.x)
        parameters = {id(p): p.numel() for part in model.networks() for p in part.parameters()}
        naive = self._naive(model, net) if found.naive is None else found.naive
        return Entry(name, how, model, net, found, naive, shown, cost, slowdown, sum(parameters.values()))

    def _naive(self, model: Classifier, net: Model) -> Tensor:
        if model is not net:
            return self._stands(model, naive_examples(net, self.x, self.y, self.threat, **self._common))
        if self.threat.norm is Norm.L0:
            return self._stands(model, naive_examples(model, self.x, self.y, self.threat, **self._common))
        plain = PGD(steps=20, loss="cross_entropy")
        return run_attack(model, self.x, self.y, plain, self.threat, budget=Budget(), **self._common).robust.cpu()

    def _made_on(self, source: str) -> Tensor:
        if source not in self.examples:
            self.examples[source] = naive_examples(self.sources[source], self.x, self.y, self.threat, **self._common)
        return self.examples[source]

    def _stands(self, model: Classifier, examples: Tensor) -> Tensor:
        return averaged_predictions(model, examples, **self._common) == self.y.cpu()

    def _folder(self, kind: str, name: str) -> Path | None:
        if self.folder is None:
            return None
        path = self.folder / kind / re.sub(r"[^A-Za-z0-9.=-]+", "_", name)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror or error}") from error
        return path


@contextmanager
def _metered(model: Model, folder: Path | None) -> Iterator[tuple[Callable[[EpochRecord], None], Callable[[], Cost]]]:
    """Counts what a training costs: a function to call after each epoch, and one for the end, which gives the whole.

    The figures are kept beside the checkpoint, so that those of an interrupted training go on. What lies between its last epoch
    and the interruption is counted only if that was no longer ago than the checkpoint.
    """
    path = None if folder is None else folder / "cost.json"
    before, finished = Cost(), False
    if path is not None and path.exists():
        try:
            known = json.loads(path.read_text())
            finished = bool(known.pop("finished"))
            before = Cost(**known)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is damaged: {error}; remove it, and the cost counts from here") from None
    counted = {"forward": 0, "backward": 0}
    started = time.monotonic()

    def passed(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # a function: copies of the network share it
        counted["forward"] += len(inputs[0])
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(back)  # type: ignore[no-untyped-call]  # untyped in torch

    def back(gradient: Tensor) -> None:
        counted["backward"] += len(gradient)

    def cost() -> Cost:
        if finished:
            return before
        seconds = before.seconds + time.monotonic() - started
        return Cost(seconds, before.forward + counted["forward"], before.backward + counted["backward"])

    def keep(done: bool) -> Cost:
        found = cost()
        if path is not None and not finished:
            write_file(path, json.dumps(asdict(found) | {"finished": done}).encode())
        return found

    def after_epoch(record: EpochRecord) -> None:
        keep(False)

    (net,) = model.networks()
    handle = net.register_forward_hook(passed)
    try:
        yield after_epoch, lambda: keep(True)
    finally:
        handle.remove()


def _network(model: object) -> Model:
    if not isinstance(model, Model) or not isinstance(model.net, nn.Module):
        raise InputError(f"defend trains a network: give an sp.Model with an nn.Module inside; got {type(model).__name__}")
    return model


def _anew(model: Model, seed: int) -> Model:
    """A copy with other weights, drawn as its layers draw them when they are made."""
    fresh = copy.deepcopy(_network(model))
    (net,) = fresh.networks()
    with global_random_state_kept():
        torch.manual_seed(seed)
        for name, module in net.named_modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if callable(reset):
                reset()
            elif own:
                raise InputError(
                    f"{name or type(module).__name__} has weights of its own and no reset_parameters, so the network can't be "
                    "trained anew: give from_weights=True (--from-weights), or a function that makes the network from a seed"
                )
    return fresh


def _share(mask: Tensor) -> float:
    return float(mask.double().mean()) if mask.numel() else math.nan
