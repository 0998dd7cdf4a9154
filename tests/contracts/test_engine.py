"""What the engine promises to every attack: batching, budgets, resuming, streams, memory, randomness."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_support import Counting, Failing, same
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import saddlepoint as sp
from saddlepoint.defenses.transforms import GaussianNoise
from saddlepoint.engine import Attack, Declaration, Problem
from saddlepoint.trees import rows

A = sp.attacks
Samples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Walk:
    x: Tensor
    size: Tensor


@dataclass(frozen=True, kw_only=True)
class ShrinkingSteps(Attack):
    """A small minimal-norm attack in the manner of DDN: the radius grows while x is right and shrinks when it is fooled."""

    steps: int = 60
    declaration = Declaration(
        summary="test", reference="test", norms=frozenset({sp.Norm.L2}), minimizes=True, linear_oracle=1.1
    )

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def starts_at_origin(self) -> bool:
        return True

    def init(self, problem: Problem) -> Walk:
        return Walk(problem.origin, torch.full((len(problem.origin),), 0.2, dtype=torch.float64))

    def step(self, problem: Problem, state: Walk) -> Walk:
        found = problem.loss_and_grad(state.x, "margin")
        reached = problem.aim.margin(found.logits) > 0
        size = torch.where(reached, 0.9 * state.size, 1.1 * state.size)
        x = state.x + problem.steepest(found.gradient, size, state.x) - problem.origin
        norm = x.flatten(1).norm(dim=1).double().clamp(min=1e-9)
        return Walk(problem.project(problem.origin + x * rows((size / norm).float(), x)), size)


@dataclass(frozen=True, kw_only=True)
class SeveralPoints(Attack):
    """Asks about one, two or three random points per sample, as far as the budget goes."""

    steps: int = 4
    declaration = Declaration(summary="test", reference="test", access=sp.Access.SCORES, no_oracle="random")

    @property
    def iterations(self) -> int:
        return self.steps

    def cost(self, classes: int) -> tuple[int, int]:
        return (0, 0)  # it asks by itself

    def init(self, problem: Problem) -> Walk:
        return Walk(problem.origin, problem.eps)

    def step(self, problem: Problem, state: Walk) -> Walk:
        owner = torch.arange(len(problem.origin)).repeat_interleave(torch.arange(len(problem.origin)) % 3 + 1)
        owner = owner[problem.allow(owner)]
        points = problem.origin[owner] + 0.3 * (torch.rand(problem.origin[owner].shape) - 0.5)
        margin = problem.margin(problem.project(points, owner), owner)
        assert margin.shape == owner.shape
        return state


def test_minimal_norm(model: sp.Model, samples: Samples) -> None:
    x, y = samples
    result = sp.attack(model, x, y, ShrinkingSteps(), sp.Minimize("l2"))
    assert result.config["keep"] == "smallest"
    fooled = result.having("fooled")
    assert fooled.sum() >= 18
    inside = sp.attack(model, x, y, A.PGD(), sp.L2((result.distance.clamp(max=9) * 0.8).tolist()))
    assert (inside.having("fooled") & fooled).sum() <= 2, "little is found well inside"
    longer = sp.attack(model, x, y, ShrinkingSteps(steps=90), sp.Minimize("l2"))
    assert (longer.distance <= result.distance).all(), "the smallest success ever seen counts"
    failed = sp.attack(model, x, y, ShrinkingSteps(steps=1), sp.Minimize("l2"))
    survived = failed.having("survived")
    assert survived.any()
    assert (failed.distance[survived] == math.inf).all()
    assert torch.isfinite(failed.distances["l2"]).all()


def test_several_points_per_sample(mlp: nn.Module, samples: Samples) -> None:
    for limit in (1, 2, 5, 100):
        counting = Counting(mlp)
        budget = sp.Budget(queries=limit)
        result = sp.attack(sp.Model(counting), *samples, SeveralPoints(), sp.Linf(0.3), batch_size=7, budget=budget)
        assert (result.queries.forward <= limit).all()
        spent = result.queries.forward.sum() + result.queries.verify.sum()
        assert counting.forward_rows == int(spent) + result.queries.probe


class Countdown(nn.Module):
    """Gives way to class 1 when the first feature has moved far enough, which differs between samples."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, 1] * 10, x[:, 0] * 10], 1)


@pytest.mark.parametrize("attack", [A.BIM(steps=20), A.PGD(steps=20)], ids=repr)
def test_occupancy(attack: Attack) -> None:
    """Samples finish at different steps, some never; the model's batches stay full while others wait."""
    count, size = 320, 32
    x = torch.full((count, 2), 0.2)
    x[:, 1] += torch.linspace(0.01, 0.55, count)[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    counting = Counting(Countdown())
    model = sp.Model(counting)
    model.probe(x)
    counting.calls.clear()
    source = iter([(x[i : i + 40], torch.zeros(min(40, count - i), dtype=torch.int64)) for i in range(0, count, 40)])
    waiting: list[int] = []

    def batches() -> object:
        yield from source
        waiting.append(len(counting.calls))  # the queue is empty from here on

    result = sp.attack(model, batches(), None, attack, sp.Linf(0.25), batch_size=size)
    assert result.iterations.unique().numel() > 5
    assert result.having("survived").any()
    busy = counting.calls[: waiting[0]]
    assert len(busy) > 20
    assert sum(busy) / len(busy) >= 0.9 * size
    assert sum(counting.calls) == int(result.queries.forward.sum() + result.queries.verify.sum())


@pytest.mark.parametrize("after", [1, 3, 4, 7, 12, 30])
def test_resume(after: int, mlp: nn.Module, samples: Samples) -> None:
    attack, threat = A.Restarts(A.PGD(steps=3), 2), sp.Linf(0.1)
    whole = sp.attack(sp.Model(mlp), *samples, attack, threat, batch_size=4)
    failing = Failing(mlp, KeyboardInterrupt(), after)
    model = sp.Model(failing)
    with pytest.raises(sp.Interrupted) as interrupted:
        sp.attack(model, *samples, attack, threat, batch_size=4)
    partial = interrupted.value.result
    assert len(partial) < len(whole)
    resumed = sp.attack(model, *samples, attack, threat, batch_size=4, resume=partial)
    same(whole, resumed)
    if len(partial):
        with pytest.raises(sp.InputError, match=r"differs.*seed"):
            sp.attack(model, *samples, attack, threat, batch_size=4, resume=partial, seed=1)
        shuffled = partial.index.tolist()
        assert shuffled == sorted(shuffled)


def test_streams(model: sp.Model, samples: Samples) -> None:
    x, y = samples
    whole = sp.attack(model, x, y, A.PGD(steps=3), sp.Linf(0.1))
    same(whole, sp.attack(model, DataLoader(TensorDataset(x, y), batch_size=5), None, A.PGD(steps=3), sp.Linf(0.1)))
    generator = ((x[i : i + 7], y[i : i + 7]) for i in range(0, 24, 7))
    same(whole, sp.attack(model, generator, None, A.PGD(steps=3), sp.Linf(0.1), batch_size=6), exact=False)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ((torch.full((2, 1, 8, 8), 2.0), torch.zeros(2, dtype=torch.int64)), r"batch 3: .*bounds"),
        ((torch.zeros(2, 1, 8, 8), torch.tensor([0, 10])), r"batch 3: .*classes 0 to 9"),
        ((torch.zeros(2, 1, 4, 16), torch.zeros(2, dtype=torch.int64)), r"batch 3: .*follow inputs of shape"),
        (torch.zeros(2, 1, 8, 8), r"batch 3: .*labels"),
    ],
)
def test_errors_in_streams_name_the_batch(model: sp.Model, samples: Samples, broken: object, message: str) -> None:
    batches = [(samples[0][:2], samples[1][:2])] * 3 + [broken]
    with pytest.raises(sp.InputError, match=message):
        sp.attack(model, iter(batches), None, A.FGSM(), sp.Linf(0.1))


class Small(nn.Module):
    """Runs out of memory above eight rows."""

    def __init__(self, net: nn.Module, limit: int = 8) -> None:
        super().__init__()
        self.net, self.limit = net, limit

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("no memory")
        return self.net(x)


@pytest.mark.parametrize("attack", [A.BIM(steps=3), A.PGD(steps=3), A.UniformNoise(), A.ILLC(steps=3)], ids=repr)
def test_out_of_memory(attack: Attack, mlp: nn.Module, samples: Samples) -> None:
    whole = sp.attack(sp.Model(mlp), *samples, attack, sp.Linf(0.1))
    found = sp.attack(sp.Model(Small(mlp)), *samples, attack, sp.Linf(0.1), batch_size=24)
    same(whole, found, exact=False)
    assert any("memory" in note for note in found.notes)
    model = sp.Model(Small(mlp))
    model.probe(samples[0])
    model.net.limit = 0
    with pytest.raises(sp.ModelError, match="memory"):
        sp.attack(model, *samples, attack, sp.Linf(0.1))


class Poisoned(nn.Module):
    """NaN for inputs whose first pixel is 0.5."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + torch.where(x[:, 0, 0, :1] == 0.5, torch.nan, 0.0)


@pytest.mark.filterwarnings("ignore::saddlepoint.SaddlepointWarning")
@pytest.mark.parametrize("attack", [A.BIM(steps=3), A.PGD(steps=3), A.UniformNoise(), A.ILLC(steps=3)], ids=repr)
def test_nan_touches_its_samples_only(attack: Attack, mlp: nn.Module, samples: Samples) -> None:
    x = samples[0].clone()
    whole = sp.attack(sp.Model(mlp), x, samples[1], attack, sp.Linf(0.1))
    bad = torch.zeros(24, dtype=torch.bool)
    bad[[1, 6, 12, 23]] = True
    x[bad, 0, 0, 0] = 0.5
    result = sp.attack(sp.Model(Poisoned(mlp)), x, samples[1], attack, sp.Linf(0.1))
    assert torch.equal(result.having("error"), bad)
    assert (result.status == whole.status)[~bad.numpy()].all()
    assert torch.isfinite(result.adversarial).all()
    assert not result.success[bad].any()


@pytest.mark.filterwarnings("ignore::saddlepoint.SaddlepointWarning")
def test_nan_gradients_are_told_from_nan_outputs(mlp: nn.Module, samples: Samples) -> None:
    def rooted(x: Tensor) -> Tensor:  # the outputs are those of the network, the gradient is 0 * infinity
        return mlp(x) + torch.sqrt((x - x).flatten(1).abs().sum(1, keepdim=True))

    x, y = samples[0], mlp(samples[0]).argmax(1)
    result = sp.attack(sp.Model(rooted), x, y, A.BIM(steps=3), sp.Linf(0.1))
    assert (result.status == "error").all()
    assert torch.equal(result.predicted, y)
    poisoned = sp.attack(sp.Model(lambda x: mlp(x) * torch.nan), x, y, A.BIM(steps=3), sp.Linf(0.1))
    assert (poisoned.status == "error").all()
    assert (poisoned.predicted == -2).all()


def test_detached_model(mlp: nn.Module, samples: Samples) -> None:
    model = sp.Model(lambda x: mlp(x).detach())
    with pytest.raises(sp.ModelError, match="differentiab"):
        sp.attack(model, *samples, A.PGD(steps=2), sp.Linf(0.1))
    assert len(sp.attack(model, *samples, A.UniformNoise(), sp.Linf(0.1))) == 24


@pytest.mark.filterwarnings("ignore::saddlepoint.SaddlepointWarning")
def test_input_changed_in_place(mlp: nn.Module, samples: Samples) -> None:
    class Greedy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return mlp(x.mul_(0.5))

    model = sp.Model(Greedy(), num_classes=10)
    model.probe(samples[0].clone())
    with pytest.raises(sp.ModelError, match="in place"):
        sp.attack(model, *samples, A.UniformNoise(), sp.Linf(0.1))


def test_stochastic_model(mlp: nn.Module, samples: Samples) -> None:
    model = sp.Defended(sp.Model(mlp), [GaussianNoise(0.05)], draws=4)
    result = sp.attack(model, *samples, A.PGD(steps=4), sp.Linf(0.2))
    assert result.having("fooled").sum() >= 10
    votes = torch.zeros(24, dtype=torch.int64)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for _ in range(40):
            votes += model.forward(result.adversarial).argmax(1) != samples[1]
    assert (votes[result.having("fooled")] >= 14).all()
    assert (result.queries.verify[result.having("fooled")] % 11 == 0).all()
    assert (result.queries.forward % 4 == 0).all()
    with pytest.raises(sp.InputError, match="draws"):
        sp.attack(model, *samples, A.PGD(steps=4), sp.Linf(0.2), budget=sp.Budget(passes=3))


@pytest.mark.parametrize(("attack", "norm"), [("minimal", "linf"), (A.DDN(steps=40), "l2"), (A.FMN(steps=40), "l0")])
def test_the_smallest_success_is_not_the_luckiest(attack: str | A.Attack, norm: str, mlp: nn.Module, samples: Samples) -> None:
    """Near a random model's boundary every second claim is luck: it must not cost what was found further away."""
    model = sp.Defended(sp.Model(mlp), [GaussianNoise(0.05)], draws=4)
    result = sp.attack(model, *samples, attack, sp.Minimize(norm), budget=sp.Budget(passes=4 * 80))
    fooled = result.having("fooled")
    assert fooled.sum() >= 0.9 * (~result.having("already_wrong")).sum()
    errs = torch.zeros(24)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for _ in range(100):
            errs += model.forward(result.adversarial).argmax(1) != samples[1]
    assert (errs[fooled] >= 25).all()
    assert (errs[fooled] >= 45).double().mean() >= 0.7
    assert (result.queries.verify[fooled] >= 9).all()
    wrong = result.having("already_wrong")
    assert wrong.any()
    assert (result.queries.verify[wrong] == 0).all()


@pytest.mark.parametrize("keep", ["first", "smallest"])
def test_luck_is_no_success(keep: str) -> None:
    """A model that errs on one call in a hundred at random is not broken by asking often."""

    class Lucky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            wrong = torch.rand(len(x), 1) < 0.05
            return torch.where(wrong, torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])) + 1e-3 * torch.randn(len(x), 2)

    x, y = torch.full((20, 3), 0.5), torch.zeros(20, dtype=torch.int64)
    model = sp.Defended(sp.Model(Lucky()), [], draws=1)
    with pytest.warns(sp.SaddlepointWarning, match="random"):
        model.probe(x)
    result = sp.attack(model, x, y, A.Restarts(A.UniformNoise(), 60), sp.Linf(0.1), keep=keep)
    assert result.having("fooled").sum() == 0
    refuted = sum(int(note.split()[0]) for note in result.notes if "refuted" in note)
    assert refuted > 0
    # a claim is given up at its third draw that errs not, where 9 of 11 must err; a majority is asked for all 11
    least, most = (3, 4) if keep == "smallest" else (11, 11)
    assert least * refuted <= int(result.queries.verify.sum()) <= most * refuted


@pytest.mark.parametrize("keep", ["first", "margin", "last", "loss"])
def test_keep(keep: str, mlp: nn.Module, samples: Samples) -> None:
    x, y = samples[0][1:6], samples[1][1:6]
    threat, attack = sp.Linf(0.25), A.PGD(steps=6, loss="cross_entropy")
    records: list[Tensor] = []
    result = sp.attack(sp.Model(mlp), x, y, attack, threat, keep=keep, callback=lambda r: records.append(r.points))
    assert len(records) <= 6
    if keep == "first":
        return
    states = torch.stack([sp.Linf(0.25).around(x).random(sp.rng.Keys.of(0, torch.arange(5)).absorb(0).absorb(0)), *records])
    losses = torch.stack([nn.functional.cross_entropy(mlp(p), y, reduction="none").detach() for p in states])
    logits = torch.stack([mlp(p).detach() for p in states])
    others = logits.scatter(2, y.expand(7, 5)[..., None], -torch.inf).max(2).values
    margins = others - logits.gather(2, y.expand(7, 5)[..., None])[..., 0]
    pick = {"last": torch.full((5,), 6), "loss": losses.argmax(0), "margin": margins.argmax(0)}[keep]
    torch.testing.assert_close(result.adversarial, states[pick, torch.arange(5)])


def test_callback_and_progress(model: sp.Model, samples: Samples) -> None:
    seen = []
    result = sp.attack(model, *samples, A.BIM(steps=3), sp.Linf(0.05), callback=seen.append, progress=True, batch_size=8)
    assert {int(i) for record in seen for i in record.ids} == set(range(24))
    assert max(int(record.iteration.max()) for record in seen) == 3
    assert all(record.points.shape[1:] == (1, 8, 8) for record in seen)
    assert all(len(record.ids) == len(record.best_margin) == len(record.success) for record in seen)
    assert len(result) == 24


def test_seconds(model: sp.Model, samples: Samples) -> None:
    result = sp.attack(model, *samples, A.PGD(steps=10**6), sp.Linf(0.001), budget=sp.Budget(seconds=0.2), batch_size=8)
    assert result.seconds < 5
    assert torch.equal(result.clean_predicted, model.predict(samples[0]))


def test_result_round_trip(model: sp.Model, samples: Samples, tmp_path: Path) -> None:
    result = sp.attack(model, *samples, A.PGD(steps=2), sp.Linf(0.1), goal=sp.Untargeted(confidence=0.5))
    loaded = sp.AttackResult.load(result.save(tmp_path / "result"))
    same(result, loaded)
    assert loaded.config == result.config
    assert loaded.notes == result.notes
    assert loaded.tau == result.tau
    assert torch.equal(loaded.queries.verify, result.queries.verify)
    assert "robust accuracy" in result.summary()
    with pytest.raises(sp.InputError, match="exists"):
        result.save(tmp_path / "result")
    frame = pytest.importorskip("pandas") and result.to_pandas()
    assert list(frame["status"]) == result.status.tolist()
    tensors = tmp_path / "result" / "tensors.safetensors"
    whole = tensors.read_bytes()
    for damaged in (whole[:100], whole[:-50], b"", b"\xff" * 64):
        tensors.write_bytes(damaged)
        with pytest.raises(sp.DataError):
            sp.AttackResult.load(tmp_path / "result")
    tensors.write_bytes(whole)
    for text in ("", "{}", "[1]", "7", '{"notes": null}'):
        (tmp_path / "result" / "result.json").write_text(text)
        with pytest.raises(sp.DataError):
            sp.AttackResult.load(tmp_path / "result")


def test_restarts(mlp: nn.Module, samples: Samples) -> None:
    for once, often in ((A.Restarts(A.UniformNoise(), 1), A.Restarts(A.UniformNoise(), 20)),):
        few = sp.attack(sp.Model(mlp), *samples, once, sp.Linf(0.4))
        many = sp.attack(sp.Model(mlp), *samples, often, sp.Linf(0.4))
        assert (many.success | ~few.success).all()
        assert many.success.sum() > few.success.sum()
    for attack in (A.FGSM(), A.NIFGSM(), A.PGD(random_start=False)):
        with pytest.raises(sp.InputError, match="random start"):
            A.Restarts(attack, 3)
    starts: list[Tensor] = []
    attack = A.Restarts(A.UniformNoise(), 5)
    sp.attack(
        sp.Model(mlp), samples[0][1:2], samples[1][1:2], attack, sp.Linf(1e-3), callback=lambda r: starts.append(r.points)
    )
    assert len(torch.cat(starts).unique(dim=0)) == 4


def test_goals_given_per_sample(model: sp.Model, samples: Samples) -> None:
    x, y = samples
    targets = (y + 4) % 10
    result = sp.attack(model, x, y, A.PGD(steps=5), sp.Linf(0.3), sp.Targeted(targets))
    assert torch.equal(result.targets, targets)
    assert (result.predicted[result.success] == targets[result.success]).all()
    every = sp.attack(model, x[:5], y[:5], A.PGD(steps=3), sp.Linf(0.3), sp.Targeted("all"), batch_size=7)
    assert len(every) == 5 * 9
    assert every.index.tolist() == [i for i in range(5) for _ in range(9)]
    for i in range(5):
        assert sorted([int(y[i]), *every.targets[9 * i : 9 * i + 9].tolist()]) == list(range(10))


def test_perturb_is_the_engines_trajectory(cnn: nn.Module, samples: Samples) -> None:
    x, y = samples
    for attack in (A.PGD(steps=4), A.FGSM(), A.NIFGSM(steps=3), A.RFGSM()):
        engine = sp.attack(sp.Model(cnn), x, y, attack, sp.Linf(0.1), seed=5, keep="last")
        light = sp.perturb(cnn, x, y, attack, sp.Linf(0.1), seed=5)
        right = ~engine.having("already_wrong")
        torch.testing.assert_close(light[right], engine.adversarial[right], rtol=0, atol=1e-6)
        assert not light.requires_grad
        assert all(p.grad is None for p in cnn.parameters())


def test_perturb_in_training_mode(cnn: nn.Module, samples: Samples) -> None:
    x, y = samples
    cnn.train()
    try:
        buffers = {name: b.clone() for name, b in cnn.named_buffers()}
        trained = sp.perturb(cnn, x, y, A.PGD(steps=2), sp.Linf(0.1), mode="train")
        assert cnn.training
        assert all(torch.equal(b, buffers[name]) for name, b in cnn.named_buffers())
        assert not torch.equal(trained, sp.perturb(cnn, x, y, A.PGD(steps=2), sp.Linf(0.1)))
        assert cnn.training
    finally:
        cnn.eval()


def test_perturb_with_soft_labels(mlp: nn.Module, samples: Samples) -> None:
    x, y = samples
    soft = nn.functional.one_hot(y, 10).float()

    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        return -(wanted * logits.log_softmax(1)).sum(1)

    soft_result = sp.perturb(mlp, x, soft, A.PGD(steps=3), sp.Linf(0.1), loss)
    torch.testing.assert_close(soft_result, sp.perturb(mlp, x, y, A.PGD(steps=3), sp.Linf(0.1)))
    with pytest.raises(sp.InputError, match="soft labels"):
        sp.perturb(mlp, x, soft, A.PGD(), sp.Linf(0.1))
    targets = sp.Targeted((y + 1) % 10)
    torch.testing.assert_close(
        sp.perturb(mlp, x, y, A.BIM(), sp.Linf(0.1), goal=targets),
        sp.perturb(mlp, x, y, A.BIM(), sp.Linf(0.1), goal=sp.Targeted("next")),
    )


# Attacks that ask


@dataclass(frozen=True)
class Asked:
    x: Tensor


@dataclass(frozen=True, kw_only=True)
class Asking(Attack):
    """Asks about three points a step, of which the last is not wanted for even samples."""

    steps: int = 4
    declaration = Declaration(summary="", reference="", access=sp.Access.SCORES, no_oracle="a test")

    @property
    def iterations(self) -> int:
        return self.steps

    @property
    def looks_last(self) -> bool:
        return False

    def cost(self, classes: int) -> tuple[int, int]:
        return (1, 0)

    def init(self, problem: Problem) -> Asked:
        return Asked(problem.origin)

    def step(self, problem: Problem, state: Asked) -> Asked:
        noise = problem.random().uniform((3, *state.x.shape[1:]), state.x.dtype) * 1e-3
        points = problem.origin[:, None] + noise * problem.origin[:, None]
        points = torch.stack([problem.project(points[:, i]) for i in range(3)], 1)
        wanted = torch.ones(len(points), 3, dtype=torch.bool)
        wanted[problem.labels % 2 == 0, 2] = False
        said = problem.ask(points, wanted)
        assert torch.equal(said.answered & wanted, said.answered)
        for row, column in said.answered.nonzero().tolist():
            torch.testing.assert_close(said.logits[row, column], problem_net(points[row, column][None])[0])
        assert bool((said.surplus[~said.answered] == -torch.inf).all())
        losses = problem.losses(said, "margin")
        torch.testing.assert_close(losses[said.answered], said.surplus[said.answered] + problem.needed)
        return state


problem_net: nn.Module = nn.Identity()


@pytest.mark.parametrize("queries", [1, 2, 3, 5, 100])
def test_ask_keeps_budgets_to_the_query(queries: int, mlp: nn.Module, samples: Samples) -> None:
    global problem_net
    problem_net = mlp
    x, _ = samples
    y = mlp(x).argmax(1)
    result = sp.attack(sp.Model(mlp), x, y, Asking(), sp.Linf(0.01), budget=sp.Budget(queries=queries))
    survived = result.having("survived")
    wanted = torch.where(y % 2 == 0, 1 + 4 * 2, 1 + 4 * 3)
    assert bool(survived.any())
    assert torch.equal(result.queries.forward[survived], wanted.clamp(max=queries)[survived])


@pytest.mark.parametrize("draws", [1, 3])
def test_affords_knows_what_each_sample_has_left(draws: int, mlp: nn.Module, samples: Samples) -> None:
    """Of some samples of a batch too, with draws of a stochastic model, and without what is kept back."""
    checked: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class Afford(Asking):
        declaration = Declaration(summary="", reference="", access=sp.Access.GRADIENTS, no_oracle="a test")

        def step(self, problem: Problem, state: Asked) -> Asked:
            spends = problem.labels % 2 == 0  # the others keep what they have
            rows = spends.nonzero()[:, 0]
            problem.loss_and_grad(problem.origin[rows], "margin", owner=rows)
            spent = draws * (1 + (problem.k + 1) * spends.long()), draws * (problem.k + 1) * spends.long()
            some = torch.arange(len(spends)).flip(0)[::2]
            one = torch.ones_like(problem.k)
            for kept in (0, 1):
                ahead = problem.keeping_back((one, one)) if kept else problem
                for forward, backward in ((0, 0), (1, 0), (0, 1), (2, 3), (5, 5)):
                    more = one * forward, one * backward
                    fits = spent[0] + spent[1] + draws * (forward + backward + 2 * kept) <= 8 * draws
                    assert ahead.affords(*more).tolist() == fits.tolist()
                    assert ahead.only(some).affords(more[0][some], more[1][some]).tolist() == fits[some].tolist()
                    checked.append(int(fits.sum()))
            return state

    wrong = mlp(samples[0]).argmax(1) != samples[1]
    x, y = samples[0][~wrong], samples[1][~wrong]
    model = sp.Model(mlp) if draws == 1 else sp.Defended(sp.Model(mlp), [GaussianNoise(1e-3)], draws=draws)
    sp.attack(model, x, y, Afford(steps=2), sp.Linf(1e-4), budget=sp.Budget(passes=8 * draws))
    assert 0 in checked
    assert len(y) in checked


def test_labels_only_means_verdicts_only(mlp: nn.Module, samples: Samples) -> None:
    seen: list[Any] = []

    @dataclass(frozen=True, kw_only=True)
    class Curious(Asking):
        declaration = Declaration(summary="", reference="", access=sp.Access.LABELS, no_oracle="a test")

        def step(self, problem: Problem, state: Asked) -> Asked:
            said = problem.ask(state.x[:, None])
            seen.append((said.logits, said.surplus.unique().tolist()))
            for forbidden in (problem.logits, problem.margin, problem.scores, problem.loss_and_grad):
                with pytest.raises(sp.CapabilityError, match="labels"):
                    forbidden(state.x)
            return state

    sp.attack(sp.Model(mlp), *samples, Curious(steps=1), sp.Linf(0.01))
    assert seen
    assert all(logits is None and set(values) <= {-1.0, 1.0} for logits, values in seen)


def test_what_an_attack_declares_is_all_it_gets(mlp: nn.Module, samples: Samples) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Greedy(Asking):
        def step(self, problem: Problem, state: Asked) -> Asked:
            problem.loss_and_grad(state.x)
            return state

    with pytest.raises(sp.CapabilityError, match="scores"):
        sp.attack(sp.Model(mlp), *samples, Greedy(steps=1), sp.Linf(0.01))


def test_an_error_of_the_model_keeps_what_is_finished(mlp: nn.Module, samples: Samples) -> None:
    x, y = samples
    attack, threat = sp.attacks.PGD(steps=3), sp.Linf(0.01)
    failing = Failing(mlp, sp.Unavailable("gone"), after=30)
    with pytest.raises(sp.ModelError) as caught:
        sp.attack(sp.Model(failing), x, y, attack, threat, batch_size=4)
    part = caught.value.result
    assert isinstance(part, sp.AttackResult)
    assert 0 < len(part) < len(x)
    whole = sp.attack(sp.Model(failing), x, y, attack, threat, batch_size=4, resume=part)  # it answers again
    same(whole, sp.attack(sp.Model(mlp), x, y, attack, threat, batch_size=4))
