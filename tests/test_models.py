"""Models: handed back as they were, adapted as stated, probed honestly, and composed as written out by hand."""

from __future__ import annotations

import collections
import json
import math
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import saddlepoint as sp
from saddlepoint.defenses.transforms import BitDepth, GaussianNoise
from saddlepoint.errors import CapabilityError, InputError, ModelError, SaddlepointWarning, UnknownNameError
from saddlepoint.models import Borrowed, Defended, Ensemble, Model, Transform
from saddlepoint.models.freeze import frozen, global_random_state_kept
from saddlepoint.taxonomy import Access


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 6, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, 4, 4, generator=generator(seed))


def tables(count: int = 6, features: int = 5) -> Tensor:
    return torch.rand(count, features, generator=generator(1))


def linear(features: int = 5, classes: int = 3, seed: int = 0) -> nn.Linear:
    net = nn.Linear(features, classes)
    with torch.no_grad():
        net.weight.copy_(torch.randn(classes, features, generator=generator(seed)))
        net.bias.copy_(torch.randn(classes, generator=generator(seed + 1)))
    return net


class Stubborn(nn.Module):
    """Refuses eval mode (as some defenses do), draws random numbers, and writes its buffers in every way there is."""

    count: Tensor
    replaced: Tensor
    hidden: Tensor

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.norm, self.linear, self.fail = nn.BatchNorm2d(3), linear(48, 4), fail
        self.drop = nn.Dropout(0.5)
        for name in ("count", "replaced", "hidden"):
            self.register_buffer(name, torch.zeros(2))
        self.register_buffer("nothing", None)

    def train(self, mode: bool = True) -> Stubborn:
        super().train(mode)
        self.norm.training = True
        self.drop.training = True
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.replaced = self.replaced + 1
        self.hidden.data.add_(1)
        random.random()
        np.random.rand()  # noqa: NPY002
        logits: Tensor = self.linear(self.drop(self.norm(x)).flatten(1))
        if self.fail:
            raise RuntimeError("broken on purpose")
        return logits


def mixed_modes(net: nn.Module) -> nn.Module:
    for index, module in enumerate(net.modules()):
        module.training = index % 2 == 0
    return net


def snapshot(net: nn.Module) -> dict[str, Any]:
    return {
        "modes": [m.training for m in net.modules()],
        "buffers": {k: v.clone() for k, v in net.named_buffers()},
        "identities": {k: id(v) for k, v in net.named_buffers()},
        "parameters": {k: v.detach().clone() for k, v in net.named_parameters()},
        "requires_grad": [p.requires_grad for p in net.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in net.modules()],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),  # noqa: NPY002
        "python": random.getstate(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@contextmanager
def unchanged(*nets: nn.Module) -> Iterator[None]:
    before = [snapshot(net) for net in nets]
    try:
        yield
    finally:
        for net, old in zip(nets, before, strict=True):
            new = snapshot(net)
            assert [key for key in old if not same(old[key], new[key])] == []


def quiet_probe(model: sp.Model | Ensemble | Defended, x: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaddlepointWarning)
        return model.probe(x)


USES: dict[str, Callable[[Model, Tensor], object]] = {
    "logits": lambda model, x: model.logits(x),
    "predict": lambda model, x: model.predict(x, batch_size=2),
    "features": lambda model, x: model.features(x, "linear"),
    "probe": quiet_probe,
    "frozen": lambda model, x: frozen_forward(model, x),
    "noisy features": lambda model, x: Defended(model, [GaussianNoise(0.1)]).features(x, "linear"),
    "ensemble": lambda model, x: Ensemble([model, model]).logits(x),
}


def frozen_forward(model: Model, x: Tensor) -> Tensor:
    with model.frozen():
        return model.forward(x)


class TestSideEffects:
    @pytest.mark.parametrize("use", USES)
    def test_handed_back_as_it_was(self, use: str) -> None:
        net = mixed_modes(Stubborn())
        net.linear.weight.requires_grad_(False)  # type: ignore[union-attr]
        net.linear.bias.grad = torch.ones(4)  # type: ignore[union-attr]
        model = Model(net)
        with unchanged(net):
            USES[use](model, images())

    @pytest.mark.parametrize("use", USES)
    def test_also_after_an_exception(self, use: str) -> None:
        net = mixed_modes(Stubborn(fail=True))
        with unchanged(net), pytest.raises((RuntimeError, ModelError), match="on purpose"):
            USES[use](Model(net), images())
        net.fail = False  # type: ignore[assignment]  # and the next use restores again
        with unchanged(net):
            USES[use](Model(net), images())

    def test_eval_mode_inside(self) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), linear(48, 4))
        assert net.training
        model = Model(net)
        assert torch.equal(model.logits(images()), model.logits(images()))
        with model.frozen():
            assert not any(m.training for m in net.modules())
            with model.frozen():
                pass
            assert not net.training
        assert all(m.training for m in net.modules())

    def test_graphs_outlive_the_frozen_state(self) -> None:
        """What was computed inside can be differentiated outside: untouched buffers must not be written to."""
        net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), linear(48, 4))
        x = images().requires_grad_()
        out = Model(net).features(x, "0")
        (gradient,) = torch.autograd.grad(out.sum(), x)
        scale = 1 / math.sqrt(1 + 1e-5)
        torch.testing.assert_close(gradient, torch.full_like(x, scale))
        assert all(p.grad is None for p in net.parameters())

    def test_random_models_draw_afresh_within_one_hold(self) -> None:
        model = Defended(Model(linear()), [GaussianNoise(0.5)])
        with model.frozen():
            assert not torch.equal(model.logits(tables()), model.logits(tables()))

    def test_random_states_kept(self) -> None:
        @global_random_state_kept()
        def disturb() -> None:
            torch.manual_seed(1)
            np.random.seed(1)  # noqa: NPY002
            random.random()
            raise ValueError("on purpose")

        with unchanged(nn.Module()), pytest.raises(ValueError, match="on purpose"):
            disturb()

    def test_threads_take_turns(self) -> None:
        net = Stubborn()
        other = nn.Sequential(nn.Flatten(), linear(48, 4))
        models = (Ensemble([Model(net), Model(other)]), Ensemble([Model(other), Model(net)]))
        inside, errors = [0], []

        def work(model: Ensemble) -> None:
            try:
                for _ in range(15):
                    with model.frozen():
                        inside[0] += 1
                        assert inside[0] == 1
                        assert not net.training
                        model.logits(images())
                        inside[0] -= 1
            except BaseException as error:
                errors.append(error)

        with unchanged(net, other):
            threads = [threading.Thread(target=work, args=(models[i % 2],), daemon=True) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=20)
            assert not any(thread.is_alive() for thread in threads)
        assert errors == []

    def test_the_same_network_twice(self) -> None:
        net = Stubborn()
        with unchanged(net), frozen([net, net]), frozen([net]):
            assert not net.training


class TestOutputs:
    x = tables()

    @pytest.mark.parametrize("shape", ["(N,)", "(N, 1)"])
    def test_one_logit_becomes_two(self, shape: str) -> None:
        net = linear(5, 1)
        model = Model(lambda x: net(x)[:, 0] if shape == "(N,)" else net(x))
        found = model.logits(self.x)
        assert torch.equal(found, torch.cat([torch.zeros(6, 1), net(self.x)], 1).detach())
        assert torch.equal(model.predict(self.x), (net(self.x)[:, 0] > 0).long())
        assert model.probe(self.x).num_classes == 2
        assert model.forward(self.x).requires_grad

    def test_adapters(self) -> None:
        net = linear()
        logits = net(self.x).detach()
        pair = collections.namedtuple("pair", "loss logits")
        cases: list[tuple[Any, Any]] = [
            (lambda x: net(x), None),
            (lambda x: {"logits": net(x), "other": x}, None),
            (lambda x: SimpleNamespace(logits=net(x)), None),
            (lambda x: pair(x, net(x)), None),
            (lambda x: (net(x), x), None),
            (lambda x: [net(x), x], None),
            (lambda x: {"scores": net(x), "logits": x}, "scores"),
            (lambda x: SimpleNamespace(head=net(x), logits=x), "head"),
            (lambda x: (x, net(x)), 1),
            (lambda x: (x, net(x)), -1),
            (lambda x: {"a": {"b": net(x)}}, lambda raw: raw["a"]["b"]),
        ]
        for function, outputs in cases:
            assert torch.equal(Model(function, outputs=outputs).logits(self.x), logits)

    @pytest.mark.parametrize(
        ("function", "outputs", "text"),
        [
            (lambda x: {"scores": x, 3: x}, None, "scores"),
            (lambda x: {"scores": x}, "logits", r"keys \['scores'\]"),
            (lambda x: SimpleNamespace(head=x), "heads", "SimpleNamespace"),
            (lambda x: (x,), 1, "tuple"),
            (lambda x: 3.0, None, "float"),
            (lambda x: None, None, "NoneType"),
            (lambda x: x, lambda raw: "logits", "outputs="),
            (lambda x: x[:3], None, r"\(6, C\)"),
            (lambda x: x.sum(), None, r"\(6, C\)"),
            (lambda x: x[:, :, None], None, r"\(6, C\)"),
            (lambda x: x.argmax(1), None, "int64"),
        ],
    )
    def test_what_cannot_be_adapted_is_said(self, function: Any, outputs: Any, text: str) -> None:
        with pytest.raises(ModelError, match=text):
            Model(function, outputs=outputs).logits(self.x)

    def test_normalisation_by_channel(self) -> None:
        mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
        x = images()
        found = Model(nn.Flatten(), mean=mean, std=std).logits(x)
        expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1).flatten(1)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(Model(nn.Flatten(), mean=0.5).logits(x), (x - 0.5).flatten(1))
        torch.testing.assert_close(Model(nn.Flatten(), std=torch.tensor([0.5])).logits(x), (x / 0.5).flatten(1))
        table = tables(features=3)
        torch.testing.assert_close(Model(nn.Identity(), mean=mean).logits(table), table - torch.tensor(mean))
        both = Model(nn.Flatten(), mean=mean, std=std)
        assert both.logits(x.double()).dtype == torch.float64
        torch.testing.assert_close(both.logits(x.double()), expected.double())
        torch.testing.assert_close(both.logits(x), expected)

    def test_inference_mode_leaves_nothing_behind(self) -> None:
        model = Model(nn.Sequential(nn.Flatten(), linear(48)), mean=0.5, std=0.25)
        with torch.inference_mode():
            model.predict(images())
        x = images().requires_grad_()
        (gradient,) = torch.autograd.grad(model.forward(x).sum(), x)
        assert torch.isfinite(gradient).all()

    def test_batches_and_counts(self) -> None:
        rows: list[int] = []
        net = linear()
        model = Model(lambda x: (rows.append(len(x)), net(x))[1])
        whole = model.logits(self.x)
        torch.testing.assert_close(model.logits(self.x, batch_size=4), whole)
        assert rows == [6, 4, 2]
        assert model.queries.forward == 12
        model.predict(self.x)
        assert (model.queries.forward, model.queries.backward) == (18, 0)
        model.queries.reset()
        assert model.queries.forward == 0
        assert not whole.requires_grad

    def test_empty_batches(self) -> None:
        model = Model(linear())
        assert model.predict(torch.empty(0, 5)).shape == (0,)
        assert model.predict(torch.empty(0, 5)).dtype == torch.int64
        assert model.logits(torch.empty(0, 5)).shape[0] == 0
        model.probe(self.x)
        assert model.logits(torch.empty(0, 5)).shape == (0, 3)


class TestProbe:
    def test_an_honest_model_is_not_suspected(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for net in (
                nn.Sequential(nn.Flatten(), linear(48)),
                nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(), linear(48)),
                nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)),
                nn.Sequential(nn.Flatten(), linear(48, 1)),
                nn.Sequential(nn.Flatten(), linear(48), nn.LogSoftmax(1)),
            ):
                for dtype in (torch.float32, torch.float64, torch.bfloat16):
                    model = Model(net.to(dtype))
                    probe = model.probe(images(20).to(dtype))
                    assert probe.notes == ()
                    assert not probe.stochastic
                    assert probe.tau >= 1e-5 * float(model.logits(images(8).to(dtype)).abs().max()) * 0.99
                    assert probe.forward == 24

    def test_once_per_state_of_the_weights(self) -> None:
        net = nn.Sequential(linear(), nn.Softmax(1))
        model = Model(net)
        with pytest.warns(SaddlepointWarning, match="probabilities"):
            model.probe(tables())
        assert model.queries.forward == 18
        model.probe(tables())
        assert model.queries.forward == 18
        with torch.no_grad():
            net[0].weight.mul_(2)
        with pytest.warns(SaddlepointWarning):
            model.probe(tables())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_softmax(self, dtype: torch.dtype) -> None:
        model = Model(nn.Sequential(linear(5, 10), nn.Softmax(1)).to(dtype))
        with pytest.warns(SaddlepointWarning, match="look like probabilities"):
            model.probe(tables().to(dtype))

    def test_randomness(self) -> None:
        model = Model(lambda x: x[:, :3] + 0.1 * torch.randn(len(x), 3))
        with pytest.warns(SaddlepointWarning, match="random"):
            assert model.probe(tables()).stochastic
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Defended(Model(linear()), [GaussianNoise(0.1)]).probe(tables()).stochastic
            assert Defended(Model(lambda x: x[:, :3] + 0.1 * torch.randn(len(x), 3)), draws=5).probe(tables()).stochastic

    def test_rounding_in_another_order_is_no_randomness(self) -> None:
        calls: list[int] = []

        def jitter(x: Tensor) -> Tensor:
            calls.append(1)
            return x[:, :3] * (1 + 1e-7 * len(calls))

        probe = Model(jitter).probe(tables())
        assert not probe.stochastic
        assert probe.notes == ()

    def test_nan(self) -> None:
        x = tables()
        with pytest.warns(SaddlepointWarning, match="1 of 6 clean inputs"):
            probe = Model(lambda t: torch.where(t[:, :1] == x[0, 0], float("nan"), t[:, :3])).probe(x)
        assert math.isfinite(probe.tau)
        with pytest.warns(SaddlepointWarning, match="6 of 6"):
            assert Model(lambda t: t[:, :3] * float("inf")).probe(x + 1).tau > 0

    def test_dependence_on_the_batch(self) -> None:
        net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), linear(48))
        with pytest.warns(SaddlepointWarning, match="depends on the batch"):
            quiet = Model(net).probe(images() * torch.linspace(0.1, 1, 6)[:, None, None, None])
        assert not quiet.stochastic

    def test_a_single_input_must_do(self) -> None:
        net = nn.Sequential(linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False))
        with pytest.raises(ModelError, match="not a single one"):
            Model(net).probe(tables())
        with pytest.raises(ModelError, match="squeeze"):
            Model(lambda x: linear(5, 1)(x).squeeze()).probe(tables())

    def test_number_of_classes(self) -> None:
        with pytest.raises(ModelError, match="3 outputs, but num_classes=4"):
            Model(linear(), num_classes=4).probe(tables())
        model = Model(linear())
        assert model.num_classes is None
        model.probe(tables())
        assert model.num_classes == 3

    def test_a_constant_model_has_a_margin_above_nothing(self) -> None:
        assert Model(lambda x: torch.zeros(len(x), 3)).probe(tables()).tau > 0


class TestInputs:
    model = Model(linear())

    @pytest.mark.parametrize(
        ("x", "text"),
        [
            (np.zeros((2, 5)), "torch tensor"),
            (torch.zeros(5), "batch"),
            (torch.zeros(2, 5, dtype=torch.uint8), r"float\(\) / 255"),
            (torch.zeros(2, 5, dtype=torch.float64), r"x is torch.float64.*torch.float32"),
            (torch.tensor([[0.0, 0, 0, 0, 0], [0, 0, 1.5, 0, 0]]), r"x\[1, 2\] = 1.5 .*\(0.0, 1.0\).*largest 1.5"),
            (torch.full((1, 5), -1e-6), r"x\[0, 0\] = -1e-06"),
            (torch.full((1, 5), float("nan")), r"x\[0, 0\] = nan"),
            (torch.full((1, 5), float("inf")), "inf"),
        ],
    )
    def test_refused(self, x: Any, text: str) -> None:
        with pytest.raises(InputError, match=text):
            self.model.check_inputs(x)

    def test_accepted(self) -> None:
        self.model.check_inputs(tables())
        self.model.check_inputs(torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.5]]))
        self.model.check_inputs(torch.empty(0, 5))
        Model(linear(), bounds=None).check_inputs(torch.full((1, 5), 1e9))
        for value in (float("nan"), float("inf"), -float("inf")):
            with pytest.raises(InputError, match=f"= {value}"):
                Model(linear(), bounds=None).check_inputs(torch.full((1, 5), value))
        Model(lambda x: x).check_inputs(torch.zeros(1, 5, dtype=torch.float64))

    def test_constructor(self) -> None:
        for make, text in (
            (lambda: Model(3), "callable"),  # type: ignore[arg-type]
            (lambda: Model(self.model), "already"),  # type: ignore[arg-type]
            (lambda: Model(linear(), bounds=(1, 0)), "bounds"),
            (lambda: Model(linear(), bounds=(0, float("nan"))), "bounds"),
            (lambda: Model(linear(), num_classes=1), "num_classes"),
            (lambda: Model(linear(), std=0.0), "std must be positive"),
            (lambda: Model(linear(), std=[1.0, -1.0]), "std must be positive"),
            (lambda: Model(linear(), mean=float("nan")), "mean"),
            (lambda: Model(linear(), mean=torch.zeros(3, 1, 1)), "one per channel"),
            (lambda: Model(linear(), mean=[0.5, 0.5]).logits(tables()), "2 values.*5 channels"),
            (lambda: Model(linear(), mean=[0.5, 0.5]).logits(tables()[0]), "batch"),
            (lambda: Model(linear(), device="meta"), "net.to"),
        ):
            with pytest.raises(InputError, match=text):
                make()

    def test_access(self) -> None:
        model = Model(linear(), access=Access.LABELS)
        assert model.predict(tables()).shape == (6,)
        with pytest.raises(CapabilityError, match=r"logits\(\) needs scores; this model grants labels only"):
            model.logits(tables())
        with pytest.raises(CapabilityError, match="PGD needs gradients"):
            model.require(Access.GRADIENTS, "PGD")
        model.require(Access.LABELS, "x")
        assert Ensemble([model, Model(linear())]).access is Access.LABELS
        assert Defended(model).access is Access.LABELS

    def test_device_of_a_callable(self) -> None:
        assert Model(lambda x: x).device.type == "cpu"
        remote = Model(lambda x: x, device="meta")
        assert remote.device.type == "meta"
        assert Defended(remote).device.type == "meta"
        assert Ensemble([remote]).device.type == "meta"
        assert remote.logits(tables()).device.type == "meta"
        assert Model(nn.Linear(2, 2, device="meta")).device.type == "meta"

    def test_dtype(self) -> None:
        assert Model(linear().double()).dtype == torch.float64
        assert Model(lambda x: x).dtype is None


class TestFeatures:
    net = nn.Sequential(collections.OrderedDict(flat=nn.Flatten(), one=linear(48, 8), relu=nn.ReLU(), two=linear(8, 3)))

    def test_named_layer(self) -> None:
        model, x = Model(self.net, mean=0.5, std=0.25), images()
        hidden = self.net.one(((x - 0.5) / 0.25).flatten(1))
        torch.testing.assert_close(model.features(x, "one"), hidden)
        torch.testing.assert_close(model.features(x, "relu"), hidden.relu())
        assert model.queries.forward == 12

    def test_differentiable(self) -> None:
        x = images().requires_grad_()
        (gradient,) = torch.autograd.grad(Model(self.net).features(x, "one").sum(), x)
        torch.testing.assert_close(gradient.flatten(1), self.net.one.weight.sum(0).expand(6, -1))

    def test_refused(self) -> None:
        with pytest.raises(UnknownNameError, match="'relu'"):
            Model(self.net).features(images(), "rely")
        with pytest.raises(UnknownNameError):
            Model(self.net).features(images(), "")
        with pytest.raises(InputError, match="callable"):
            Model(lambda x: x).features(images(), "one")
        with pytest.raises(InputError, match="member"):
            Ensemble([Model(self.net)]).features(images(), "one")
        unused = nn.Sequential(nn.Flatten(), linear(48))
        unused.register_module("idle", nn.Module())
        unused.forward = lambda x: unused[1](unused[0](x))  # type: ignore[method-assign]
        with pytest.raises(ModelError, match="did not run"):
            Model(unused).features(images(), "idle")
        recurrent = nn.ModuleDict({"gru": nn.GRU(5, 3, batch_first=True)})
        recurrent.forward = lambda x: recurrent["gru"](x)[0][:, -1]  # type: ignore[method-assign, assignment]
        with pytest.raises(ModelError, match="tuple"):
            Model(recurrent).features(torch.rand(2, 4, 5), "gru")


class TestEnsemble:
    x = tables()

    def members(self, count: int = 3) -> list[Model]:
        return [Model(linear(seed=10 * i)) for i in range(count)]

    def test_logits(self) -> None:
        models = self.members()
        parts = [m.logits(self.x) for m in models]
        torch.testing.assert_close(Ensemble(models).logits(self.x), sum(parts) / 3)
        weighted = Ensemble(models, weights=[1, 0, 3]).logits(self.x)
        torch.testing.assert_close(weighted, (parts[0] + 3 * parts[2]) / 4)

    def test_probabilities(self) -> None:
        models = [Model(linear(seed=10 * i).double()) for i in range(3)]
        x = self.x.double().requires_grad_()
        p = [m.forward(x).softmax(1) for m in models]
        for weights, expected in ((None, (p[0] + p[1] + p[2]) / 3), ([1, 0, 3], (p[0] + 3 * p[2]) / 4)):
            found = Ensemble(models, "probabilities", weights).forward(x)
            torch.testing.assert_close(found, expected.log(), rtol=1e-12, atol=1e-12)
            (ours,) = torch.autograd.grad(found.sum(), x, retain_graph=True)
            (theirs,) = torch.autograd.grad(expected.log().sum(), x, retain_graph=True)
            torch.testing.assert_close(ours, theirs)

    def test_confident_members_do_not_underflow(self) -> None:
        sure = Model(lambda x: torch.tensor([[1e4, 0.0, -1e4]]).expand(len(x), 3))
        assert torch.isfinite(Ensemble([sure, sure], "probabilities").logits(self.x)).all()

    def test_refused(self) -> None:
        models = self.members(2)
        for make, text in (
            (lambda: Ensemble([]), "at least one"),
            (lambda: Ensemble(models, "votes"), "fuse"),  # type: ignore[arg-type]
            (lambda: Ensemble([models[0], Model(linear(), bounds=None)]), "bounds differ"),
            (lambda: Ensemble(models, weights=[1.0]), "2 numbers"),
            (lambda: Ensemble(models, weights=[1.0, -1.0]), "2 numbers"),
            (lambda: Ensemble(models, weights=[0.0, 0.0]), "not all 0"),
            (lambda: Ensemble(models, weights=[1.0, float("nan")]), "2 numbers"),
            (lambda: Ensemble(models, weights=[1.0, float("inf")]), "2 numbers"),
            (lambda: Ensemble([models[0], Model(linear(5, 4))]).logits(self.x), "differ in shape"),
        ):
            with pytest.raises(InputError, match=text):
                make()

    def test_counts_and_probe(self) -> None:
        ensemble = Ensemble(self.members())
        ensemble.logits(self.x)
        assert ensemble.queries.forward == 6
        assert ensemble.probe(self.x).num_classes == 3


class TestDefended:
    x = tables()
    net = linear()

    def gradient(self, model: Defended) -> tuple[Tensor, Tensor]:
        x = self.x.clone().requires_grad_()
        out = model.forward(x)
        (gradient,) = torch.autograd.grad((out**2).sum(), x)
        return out.detach(), gradient

    def by_hand(self, value: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor]:
        out = self.net(value).detach()
        return out, ((2 * out) @ self.net.weight.detach()) * jacobian

    def check(self, transforms: list[Transform], value: Tensor, jacobian: Tensor) -> None:
        out, gradient = self.gradient(Defended(Model(self.net), transforms))
        expected, wanted = self.by_hand(value, jacobian)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradient, wanted)

    def test_exact(self) -> None:
        square = Transform(name="square", apply=lambda x: x**2)
        self.check([square], self.x**2, 2 * self.x)

    def test_identity(self) -> None:
        steps = Transform(name="round", apply=torch.round, backward="identity")
        self.check([steps], self.x.round(), torch.ones_like(self.x))

    def test_given_substitute(self) -> None:
        steps = Transform(name="round", apply=torch.round, backward=lambda x: x**3)
        self.check([steps], self.x.round(), 3 * self.x**2)

    def test_chained_and_nested(self) -> None:
        square = Transform(name="square", apply=lambda x: x**2)
        steps = Transform(name="round", apply=lambda x: (x * 4).round() / 4, backward="identity")
        value = (self.x**2 * 4).round() / 4
        self.check([square, steps], value, 2 * self.x)
        out, gradient = self.gradient(Defended(Defended(Model(self.net), [steps]), [square]))
        expected, wanted = self.by_hand(value, 2 * self.x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(gradient, wanted)

    def test_transforms_without_gradients_of_their_own(self) -> None:
        numpy = Transform(name="numpy", apply=lambda x: torch.from_numpy(x.numpy().copy()), backward="identity")
        self.check([numpy], self.x, torch.ones_like(self.x))
        with torch.no_grad():
            assert torch.equal(numpy(self.x), self.x)

    def test_bit_depth(self) -> None:
        reduced = BitDepth(2)(self.x)
        torch.testing.assert_close(reduced, (self.x * 3).round() / 3)
        assert len(BitDepth(1)(self.x).unique()) == 2
        torch.testing.assert_close(BitDepth(3)(2 * self.x - 1, (-1, 1)), ((self.x * 7).round() / 7) * 2 - 1)
        self.check([BitDepth(2)], reduced, torch.ones_like(self.x))
        for bits in (0, 17):
            with pytest.raises(InputError, match="bits"):
                BitDepth(bits)

    def test_gaussian_noise(self) -> None:
        torch.manual_seed(0)
        noisy = GaussianNoise(0.25)(torch.zeros(200, 200))
        assert abs(float(noisy.std()) - 0.25) < 0.005
        assert abs(float(noisy.mean())) < 0.01
        for sigma in (0.0, -1.0, float("nan")):
            with pytest.raises(InputError, match="sigma"):
                GaussianNoise(sigma)

    def test_draws(self) -> None:
        model = Model(self.net)
        assert Defended(model).draws == 1
        assert Defended(model, [BitDepth(3)]).draws == 1
        assert Defended(model, [BitDepth(3), GaussianNoise(0.1)]).draws == 10
        assert Defended(model, [GaussianNoise(0.1)], draws=3).draws == 3
        assert Defended(Defended(model, draws=30), [GaussianNoise(0.1)]).draws == 30
        assert Defended(Defended(model, draws=30)).draws == 30
        assert Ensemble([model, Defended(model, draws=7)]).draws == 7
        with pytest.raises(InputError, match="draws"):
            Defended(model, draws=0)

    def test_features_go_through_the_transforms(self) -> None:
        net = nn.Sequential(linear(), nn.ReLU())
        square = Transform(name="square", apply=lambda x: x**2)
        torch.testing.assert_close(Defended(Model(net), [square]).features(self.x, "0"), net[0](self.x**2))

    def test_networks_in_transforms_are_frozen_too(self) -> None:
        denoiser = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(5))
        model = Defended(Model(self.net), [Transform(name="denoise", apply=denoiser)])
        with unchanged(denoiser):
            assert torch.equal(model.logits(self.x), model.logits(self.x))
        assert denoiser in model.networks()

    def test_refused(self) -> None:
        with pytest.raises(InputError, match="backward"):
            Transform(name="x", apply=torch.round, backward="bpda")  # type: ignore[arg-type]
        shrink = Transform(name="crop", apply=lambda x: x[:, :3], backward="identity")
        with pytest.raises(InputError, match=r"crop.*\(6, 5\).*\(6, 3\)"):
            shrink(self.x.clone().requires_grad_())

    def test_is_a_model_again(self) -> None:
        model = Defended(Model(self.net, bounds=(-1, 1), num_classes=3), [BitDepth(4)])
        assert model.bounds == (-1.0, 1.0)
        assert model.num_classes == 3
        assert model.device.type == "cpu"
        assert model.probe(self.x).notes == ()
        assert model.queries.forward == 18


def test_descriptions_are_json() -> None:
    model = Model(linear(), mean=[0.1] * 5, std=0.5)
    described = json.loads(json.dumps(model.describe()))
    assert described["parameters"] == 18
    assert described["mean"] == [0.1] * 5
    assert described["access"] == "parameters"
    whole = Ensemble([Defended(model, [BitDepth(3), GaussianNoise(0.1)]), Model(lambda x: x)], weights=[1, 3])
    nested = json.loads(json.dumps(whole.describe()))
    assert nested["weights"] == [0.25, 0.75]
    assert nested["models"][0]["transforms"] == ["BitDepth(bits=3)", "GaussianNoise(sigma=0.1)"]
    assert nested["models"][0]["draws"] == 10


def test_check_against_a_stated_accuracy() -> None:
    model, x = Model(linear()), tables(200)
    y = model.predict(x)
    y[:50] = (y[:50] + 1) % 3
    assert model.check((x, y), 0.75) == 0.75
    assert model.check((x, y), 0.755) == 0.75
    with pytest.raises(ModelError, match=r"75.00%.*90.00%"):
        model.check((x, y), 0.9)
    assert model.check((x, y), 0.9, tolerance=0.2) == 0.75
    with pytest.raises(InputError, match="share"):
        model.check((x, y), 75.0)
    with pytest.raises(InputError, match="label"):
        model.check((x, y[:, None]), 0.75)
    with pytest.raises(InputError, match="inputs"):
        model.check((x[:0], y[:0]), 0.75)


def test_the_functional_reference() -> None:
    """A network in float64 gives torch's own figures through every wrapper that should change nothing."""
    net, x = linear().double(), tables().double()
    for model in (Model(net), Defended(Model(net)), Ensemble([Model(net)])):
        assert torch.equal(model.logits(x), functional.linear(x, net.weight, net.bias).detach())


def test_borrowed_gradients_lead_and_own_outputs_decide() -> None:
    own, other = linear(), linear(seed=4)
    borrowed = Borrowed(Model(own), Model(other))
    x = tables()
    assert torch.equal(borrowed.logits(x), Model(own).logits(x))
    leaf = x.clone().requires_grad_()
    outputs = borrowed.forward(leaf)
    assert torch.equal(outputs, own(x))
    (gradient,) = torch.autograd.grad(outputs[:, 0].sum(), leaf)
    torch.testing.assert_close(gradient, other.weight[0].expand_as(x))
    assert borrowed.describe()["name"] == "Borrowed"
    with pytest.raises(InputError, match="bounds"):
        Borrowed(Model(own), Model(other, bounds=(0, 2)))
    with pytest.raises(InputError, match="differ in their outputs"):
        Borrowed(Model(own), Model(nn.Linear(x.shape[1], 7))).forward(x.clone().requires_grad_())
