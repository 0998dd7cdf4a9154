"""A model behind HTTP, asked over real sockets: every answered row is counted once, whatever happens on the way."""

from __future__ import annotations

import base64
import copy
import gc
import io
import itertools
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import numpy as np
import pytest
import torch
from http_server import Server, instances, predictions, row_by_row
from PIL import Image
from torch import Tensor, nn

import saddlepoint as sp
from saddlepoint.cli import remote
from saddlepoint.errors import CapabilityError, InputError, MissingExtraError, ModelError, Unavailable
from saddlepoint.models.http_model import HttpModel, Pace

pytest.importorskip("httpx2")
Samples = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def served(mlp: nn.Module) -> Iterator[Server]:
    with Server(predictions(mlp)) as server:
        yield server


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, event: threading.Event, seconds: float) -> bool:
        self.now += seconds
        self.slept.append(seconds)
        return event.is_set()


def clocked(url: str, clock: Clock, rate: float | None = None, **settings: Any) -> HttpModel:
    """A model that asks one request after the other, by this clock."""
    model = HttpModel(url, concurrency=1, rate=rate, **settings)
    model._sleep, model._pace = clock.sleep, Pace(rate, clock)
    return model


def answering(said: Any) -> Server:
    """A server that always says the same."""
    return Server(lambda rows: said)


def first_time(fault: str) -> Callable[[int, int], str | None]:
    """Every body meets this fault when it comes first."""
    return lambda number, seen: None if seen else fault


def square(model: sp.Classifier, samples: Samples, **settings: Any) -> sp.AttackResult:
    budget = sp.Budget(queries=40)
    return sp.attack(model, *samples, sp.attacks.Square(steps=50, p_init=0.8), sp.Linf(0.1), budget=budget, **settings)


def rows_of(result: sp.AttackResult) -> int:
    """All rows that a run says it asked about."""
    return int((result.queries.forward + result.queries.verify).sum()) + result.queries.probe


def assert_same(one: sp.AttackResult, other: sp.AttackResult) -> None:
    assert one.tau == other.tau
    for name in ("adversarial", "codes", "predicted", "margin", "iterations"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("forward", "backward", "verify"):
        assert torch.equal(getattr(one.queries, name), getattr(other.queries, name)), name


TROUBLES = ("429", "500", "drop", "slow", "503", None)


@pytest.mark.parametrize("gives", ["logits", "probabilities"])
def test_budgets_hold_and_every_row_is_counted_once_whatever_happens(mlp, samples, gives):
    net = mlp if gives == "logits" else lambda x: mlp(x).softmax(1)
    local = square(sp.Model(row_by_row(net), access=sp.Access.SCORES, gives=gives), samples)
    assert 0 < local.success_rate < 1

    def trouble(number: int, seen: int) -> str | None:
        return None if seen else TROUBLES[number % len(TROUBLES)]

    with (
        Server(predictions(net), trouble, headers={"Retry-After": "0"}) as server,
        HttpModel(server.url, gives=gives, batch_rows=5, backoff=0) as model,
    ):
        result = square(model, samples)
    assert_same(result, local)
    assert int(result.queries.forward.max()) == 40
    assert result.queries.probe == 24
    assert rows_of(result) == server.computed == model.traffic.answered == model.queries.forward
    assert max(server.sizes) == 5
    assert model.traffic.retried > 10
    assert model.traffic.requests == server.requests == len(server.sizes) + model.traffic.retried
    assert model.traffic.sent > model.traffic.answered


def test_answers_that_get_lost_are_asked_for_again_and_counted_once_here(mlp, samples):
    """The server has computed them twice. That is the server's own knowledge."""
    lost: list[int] = []

    def trouble(number: int, seen: int) -> str | None:
        fault = (None, "lost", "half")[number % 3]
        if seen or fault is None:
            return None
        lost.append(number)
        return fault

    with Server(predictions(mlp), trouble) as server, HttpModel(server.url, batch_rows=4, backoff=0) as model:
        result = square(model, samples)
    assert rows_of(result) == model.traffic.answered
    assert len(lost) == model.traffic.retried > 10
    assert server.computed == model.traffic.sent > model.traffic.answered
    assert_same(result, square(sp.Model(row_by_row(mlp), access=sp.Access.SCORES), samples))


@pytest.mark.parametrize("cache", [False, True])
def test_a_server_dies_and_the_run_resumes_to_the_same_result(mlp, samples, cache):
    whole = square(sp.Model(row_by_row(mlp), access=sp.Access.SCORES), samples)
    first = Server(predictions(mlp))

    def kill(record: sp.engine.Record) -> None:
        if int(record.ids.max()) >= 12 and int(record.iteration.max()) > 5:
            first.stop()

    with first, HttpModel(first.url, batch_rows=3, retries=1, backoff=0, cache=cache) as model:
        with pytest.raises(Unavailable, match="2 attempts") as stopped:
            square(model, samples, batch_size=4, callback=kill)
        partial = stopped.value.result
        assert isinstance(partial, sp.AttackResult)
        assert 0 < len(partial) < len(whole)
        assert rows_of(partial) < model.traffic.answered + model.traffic.cached  # what was asked of unfinished samples is lost
        with Server(predictions(mlp), port=first.port) as second:
            result = square(model, samples, batch_size=4, resume=partial)
        assert_same(result, whole)
        assert first.computed + second.computed == model.traffic.answered
        bodies = first.bodies + second.bodies
        asked = torch.cat([instances(body).repeat(times, 1, 1, 1) for body, times in bodies.items()])
        if cache:  # with it even the lost ones aren't paid for twice
            assert len(asked.unique(dim=0)) == len(asked) == model.traffic.answered
            assert rows_of(whole) > len(asked)


def test_a_call_that_fails_keeps_what_was_answered_in_the_cache(mlp, samples):
    with (
        Server(predictions(mlp), lambda number, seen: "400" if number == 3 else None) as server,
        HttpModel(server.url, batch_rows=4, concurrency=1, cache=True) as model,
    ):
        with pytest.raises(Unavailable, match="400"):
            model.predict(samples[0])
        assert model.traffic.answered == 12
        assert server.requests == 4
        model.predict(samples[0])
        assert model.traffic.answered == server.computed == len(samples[0])
        assert model.traffic.cached == 12


def test_the_cache_saves_rows_and_changes_no_count_of_the_engine(mlp, samples):
    x = samples[0]
    with Server(predictions(mlp)) as server, HttpModel(server.url, cache=True) as model:
        twice = model.logits(torch.cat([x, x]))
        assert torch.equal(twice[: len(x)], twice[len(x) :])
        assert server.computed == model.traffic.answered == model.traffic.cached == len(x)
        cached = square(model, samples)
        asked = server.computed
        assert_same(square(model, samples), cached)
        assert server.computed == asked
    assert_same(cached, square(sp.Model(row_by_row(mlp), access=sp.Access.SCORES), samples))
    with Server(predictions(mlp)) as server, HttpModel(server.url, cache=4, batch_rows=4) as model:
        for part in (x[:4], x[:4], x[4:8], x[:4]):
            model.predict(part)
        assert server.sizes == [4, 4, 4]
        assert model.predict(x[:8]).tolist() == mlp(x[:8]).argmax(1).tolist()  # more than it holds
        assert model.logits(x[:4].double()).dtype == torch.float64
        assert server.sizes == [4, 4, 4, 4, 4]  # rows of another dtype are others


def test_without_a_cache_every_repetition_is_asked(served, samples):
    with HttpModel(served.url) as model:
        model.predict(samples[0])
        model.predict(samples[0])
        assert served.computed == 2 * len(samples[0])
        assert model.traffic.cached == 0


def test_requests_run_at_the_same_time_and_answers_keep_their_order(mlp, samples):
    together = threading.Barrier(3, timeout=10)

    def answer(rows: Tensor) -> Any:
        together.wait()  # three requests at once, or none gets through
        return predictions(mlp)(rows)

    with Server(answer) as server, HttpModel(server.url, batch_rows=2, concurrency=3, retries=0) as model:
        assert torch.equal(model.logits(samples[0]), row_by_row(mlp)(samples[0]))
        assert server.most == 3
        assert model.traffic.requests == len(samples[0]) / 2


def test_threads_share_a_model(served, samples, mlp):
    x, said = samples[0], {}
    with HttpModel(served.url, batch_rows=3, concurrency=2) as model:
        threads = [threading.Thread(target=lambda i=i: said.update({i: model.forward(x[i::4])})) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i in range(4):
        assert torch.equal(said[i], row_by_row(mlp)(x[i::4]))
    assert model.traffic.answered == served.computed == len(x)


def test_an_answer_that_takes_too_long_is_asked_for_again(mlp, samples):
    with Server(predictions(mlp), first_time("hang")) as server, HttpModel(server.url, timeout=0.1, backoff=0) as model:
        assert torch.equal(model.logits(samples[0]), row_by_row(mlp)(samples[0]))
        assert (model.traffic.requests, model.traffic.retried) == (2, 1)
    with (
        Server(predictions(mlp), first_time("hang")) as server,
        HttpModel(server.url, timeout=0.1, retries=0) as model,
        pytest.raises(Unavailable, match=r"its only attempt.*ReadTimeout"),
    ):
        model.predict(samples[0])


def test_requests_keep_to_the_rate(mlp, samples):
    clock = Clock()
    starts: list[float] = []

    def trouble(number: int, seen: int) -> str | None:
        starts.append(clock.now)
        return "500" if number % 4 == 0 and not seen else None

    with Server(predictions(mlp), trouble) as server, clocked(server.url, clock, rate=8, batch_rows=2, backoff=0) as model:
        model.predict(samples[0])
        assert len(starts) == model.traffic.requests == 12 + model.traffic.retried
        assert model.traffic.retried > 0
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert min(gaps) >= 1 / 8
    assert sum(gaps) == (len(starts) - 1) / 8  # and are no slower than they must be


def test_threads_take_turns():
    pace, turns = Pace(4.0, lambda: 7.0), []
    threads = [threading.Thread(target=lambda: turns.append(pace.turn())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(turns) == [i / 4 for i in range(8)]
    pace.pause(10)
    assert pace.turn() == 10
    pace.pause(1)  # a shorter pause doesn't end a longer one
    assert pace.turn() == 10.25


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [("17", 17, 17), (timedelta(seconds=100), 60, 100), (timedelta(seconds=-100), 0, 4), ("soon", 0, 4), ("-5", 0, 4)],
)
def test_retry_after_is_honoured(mlp, samples, said, least, most):
    if isinstance(said, timedelta):
        said = format_datetime(datetime.now(UTC) + said, usegmt=True)
    clock = Clock()
    with (
        Server(predictions(mlp), first_time("429"), headers={"Retry-After": said}) as server,
        clocked(server.url, clock, backoff=4.0) as model,
    ):
        model.predict(samples[0])
    assert least - 1e-6 <= sum(clock.slept) <= most + 1e-6
    assert sum(clock.slept) >= 2  # the back-off


def test_a_pause_holds_all_requests(mlp, samples):
    clock = Clock()
    starts: list[float] = []

    def trouble(number: int, seen: int) -> str | None:
        starts.append(clock.now)
        return "429" if number == 1 else None

    with (
        Server(predictions(mlp), trouble, headers={"Retry-After": "50"}) as server,
        clocked(server.url, clock, backoff=0, batch_rows=8) as model,
    ):
        model.predict(samples[0])
    assert [start - starts[0] for start in starts] == [0, 0, 50, 50]


def test_nobody_waits_for_hours(mlp, samples):
    clock = Clock()
    with Server(predictions(mlp), lambda *_: "429", headers={"Retry-After": "86400"}) as server:
        with clocked(server.url, clock) as model, pytest.raises(Unavailable, match=r"86400 seconds.*429"):
            model.predict(samples[0])
        assert server.requests == 1
        assert sum(clock.slept) == 0


def test_back_off_doubles_up_to_two_minutes(mlp, samples):
    clock = Clock()
    with Server(predictions(mlp), lambda *_: "503") as server:
        with clocked(server.url, clock, backoff=4.0, retries=8) as model, pytest.raises(Unavailable, match=r"9 attempts.*503"):
            model.predict(samples[0])
        assert server.requests == model.traffic.sent / len(samples[0]) == 9
        assert model.traffic.answered == 0
    waits = [seconds for seconds in clock.slept if seconds]
    assert len(waits) == 8
    for wait, longest in zip(waits, (4, 8, 16, 32, 64, 120, 120, 120), strict=True):
        assert longest / 2 <= wait <= longest


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 413, 422])
def test_refusals_are_final(mlp, samples, status):
    with Server(predictions(mlp), lambda *_: str(status)) as server, HttpModel(server.url) as model:
        with pytest.raises(Unavailable, match=rf"status {status}.*no luck: {status}"):
            model.predict(samples[0])
        assert server.requests == 1


def test_long_refusals_are_cut(mlp, samples):
    with answering(b"x" * 1000) as server, HttpModel(server.url) as model, pytest.raises(ModelError) as told:
        model.predict(samples[0])
    assert "x" * 200 in str(told.value)
    assert "x" * 201 not in str(told.value)


def test_redirects_are_told_not_followed(mlp, samples):
    with (
        Server(predictions(mlp)) as other,
        Server(predictions(mlp), lambda *_: "307", headers={"Location": f"{other.url}?token=hush"}) as server,
        HttpModel(server.url) as model,
    ):
        with pytest.raises(Unavailable, match=rf"redirects to {other.url} ") as told:
            model.predict(samples[0])
        assert (server.requests, other.requests) == (1, 0)
    assert "hush" not in str(told.value)


@pytest.mark.parametrize(
    ("settings", "said", "text"),
    [
        ({}, {"predictions": [[0.0, 1.0]]}, r"shape \(1, 2\) for 2 rows"),
        ({}, {"predictions": [[[1.0]], [[1.0]]]}, r"shape \(2, 1, 1\)"),
        ({}, {"predictions": [[0.0, 1.0], [0.0]]}, "ValueError"),
        ({}, {"predictions": [[0.0, float("nan")], [0.0, 1.0]]}, "NaN or infinite"),
        ({}, {"predictions": [[0.0, None], [0.0, 1.0]]}, "NaN or infinite"),
        ({}, {"predictions": None}, r"shape \(\)"),
        ({}, {"predictions": [{"label": "cat"}, {"label": "dog"}]}, "TypeError"),
        ({}, {"outputs": [[0.0, 1.0]] * 2}, r"no 'predictions', but \['outputs'\]"),
        ({}, b"<html>welcome</html>", r"welcome.*JSONDecodeError"),
        ({}, b"", "JSONDecodeError"),
        ({"decode": "npy"}, b"no array", "ValueError"),
        ({"decode": lambda body: 1 / 0}, [], "ZeroDivisionError"),
        ({"num_classes": 3}, [[0.0, 1.0]] * 2, "2 scores a row, but num_classes=3"),
        ({"num_classes": 3}, [0.0, 1.0], "1 scores a row, but num_classes=3"),
        ({"gives": "probabilities"}, [[0.0, 100.0]] * 2, r"\[0, 1\]"),
        ({"gives": "labels", "num_classes": 2}, [0, 2], "from 0 to 1"),
        ({"gives": "labels", "num_classes": 2}, [0, 0.5], "whole numbers"),
        ({"gives": "labels", "num_classes": 2}, [[0.0, 1.0]] * 2, r"shape \(2, 2\)"),
        ({"gives": "labels", "labels": ("cat", "dog")}, ["dog", "cow"], "'cow' is not among"),
    ],
)
def test_answers_that_are_none(settings, said, text):
    with answering(said) as server, HttpModel(server.url, **settings) as model:
        with pytest.raises(ModelError, match=text):
            model.predict(torch.zeros(2, 3))
        assert server.requests == 1


def test_answers_of_different_widths(samples):
    wide = lambda rows: [[0.0] * (2 + len(rows) % 2)] * len(rows)  # noqa: E731
    with Server(wide) as server, HttpModel(server.url) as model:
        model.predict(samples[0][:2])
        with pytest.raises(ModelError, match="3 scores a row; earlier ones had 2"):
            model.predict(samples[0][:3])


def test_scores_of_one_column_are_the_second_class():
    x = torch.tensor([[-2.0], [3.0]])
    for said in ([-2.0, 3.0], [[-2.0], [3.0]]):
        with answering(said) as server, HttpModel(server.url, bounds=None) as model:
            assert model.logits(x).tolist() == [[0.0, -2.0], [0.0, 3.0]]
    with answering([0.25, 1.0]) as server, HttpModel(server.url, gives="probabilities", bounds=None) as model:
        assert torch.allclose(model.logits(x).exp(), torch.tensor([[0.75, 0.25], [0.0, 1.0]]), atol=1e-6)


def test_labels_by_number_and_by_name(mlp, samples):
    x = samples[0]
    wanted = mlp(x).argmax(1)
    names = [f"digit {i}" for i in range(10)]
    for settings, answer in (
        ({"num_classes": 10}, lambda rows: mlp(rows).argmax(1).tolist()),
        ({"labels": names}, lambda rows: {"predictions": [names[i] for i in mlp(rows).argmax(1)]}),
        ({"labels": range(10)}, lambda rows: mlp(rows).argmax(1).tolist()),
    ):
        with Server(answer) as server, HttpModel(server.url, gives="labels", batch_rows=7, **settings) as model:
            assert model.access is sp.Access.LABELS
            assert model.predict(x).tolist() == wanted.tolist()
            assert model.forward(x).tolist() == nn.functional.one_hot(wanted, 10).tolist()
            with pytest.raises(CapabilityError, match="labels only"):
                model.logits(x)
            before = server.requests
            with pytest.raises(CapabilityError, match="labels only"):
                square(model, samples)
            assert server.requests == before


def test_a_probe_of_labels_sees_no_softmax(mlp, samples):
    with (
        Server(lambda rows: mlp(rows).argmax(1).tolist()) as server,
        HttpModel(server.url, gives="labels", num_classes=10) as model,
    ):
        assert model.probe(samples[0]).notes == ()


def test_there_are_no_gradients_and_no_layers(served, samples):
    with HttpModel(served.url) as model:
        with pytest.raises(CapabilityError, match="scores only"):
            sp.attack(model, *samples, "pgd", sp.Linf(0.1))
        with pytest.raises(InputError, match="no layers"):
            model.features(samples[0], "0")
        assert model.networks() == ()
        assert not model.forward(samples[0].clone().requires_grad_()).requires_grad
    assert served.computed == len(samples[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("encode", ["json", "npy"])
def test_dtypes(mlp, samples, dtype, encode):
    x = samples[0].to(dtype)
    parse = instances if encode == "json" else lambda body: torch.from_numpy(np.load(io.BytesIO(body)))
    wide = dtype == torch.float64
    net = copy.deepcopy(mlp).to(torch.float64 if wide else torch.float32)
    answer = predictions(lambda rows: net(rows.to(torch.float64 if wide else torch.float32)))
    with Server(answer, parse=parse) as server, HttpModel(server.url, encode) as model:
        logits = model.logits(x)
    assert logits.dtype == (torch.float64 if wide else torch.float32)
    assert torch.allclose(logits.float(), mlp(x.float()), atol=1e-4)


def test_arrays_there_and_back(mlp, samples):
    def answer(rows: Tensor) -> bytes:
        file = io.BytesIO()
        np.save(file, mlp(rows).detach().numpy())
        return file.getvalue()

    with Server(answer, parse=lambda body: torch.from_numpy(np.load(io.BytesIO(body)))) as server:
        with HttpModel(server.url, "npy", "npy") as model:
            assert torch.equal(model.logits(samples[0]), mlp(samples[0]))
        assert server.asked[0][1]["content-type"] == "application/octet-stream"


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures(channels):
    levels = torch.randint(256, (4, channels, 5, 6), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def parse(body: bytes) -> Tensor:
        files = [io.BytesIO(base64.b64decode(each["b64"])) for each in json.loads(body)["instances"]]
        images = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])
        seen.append(images if images.dim() == 3 else images.permute(0, 3, 1, 2))
        return images

    with (
        Server(lambda rows: [[0.0, 1.0]] * len(rows), parse=parse) as server,
        HttpModel(server.url, "png", bounds=(-1, 1)) as model,
    ):
        model.predict(levels / 255 * 2 - 1)
        with pytest.raises(InputError, match="images"):
            model.predict(torch.zeros(2, 5))
    assert torch.equal(seen[0].reshape(levels.shape), levels.to(torch.uint8))
    with pytest.raises(InputError, match="bounds"), HttpModel(server.url, "png", bounds=None) as model:
        model.predict(torch.zeros(1, 1, 2, 2))


def test_bodies_of_ones_own(mlp, samples):
    def encode(x: Tensor) -> bytes:
        return x.numpy().tobytes()

    def decode(body: bytes) -> np.ndarray:
        return np.frombuffer(body, np.float32).reshape(-1, 10)

    parse = lambda body: torch.frombuffer(bytearray(body), dtype=torch.float32).view(-1, 1, 8, 8)  # noqa: E731
    with Server(lambda rows: mlp(rows).detach().numpy().tobytes(), parse=parse) as server:
        with HttpModel(server.url, encode, decode, headers={"Content-Type": "image/raw"}) as model:
            assert torch.equal(model.logits(samples[0]), mlp(samples[0]))
            assert "encode" in str(model.describe()["encode"])
        assert server.asked[0][1]["content-type"] == "image/raw"
        with HttpModel(server.url, lambda x: {"x": x}) as model, pytest.raises(ModelError, match="encode must make bytes"):
            model.predict(samples[0])


def test_a_limit_for_the_endpoint_as_a_whole(mlp, samples):
    with (
        Server(predictions(mlp), first_time("500")) as server,
        HttpModel(server.url, limit=100, batch_rows=4, backoff=0) as model,
    ):
        with pytest.raises(Unavailable, match="limit=100") as told:
            square(model, samples)
        assert isinstance(told.value.result, sp.AttackResult)
        assert model.traffic.answered < model.traffic.sent <= 100
    with Server(predictions(mlp)) as server, HttpModel(server.url, limit=30) as model:
        model.predict(samples[0])  # 24 rows
        with pytest.raises(Unavailable, match=r"24 rows were sent .* 8 more"):
            model.predict(samples[0][:8])
        assert server.computed == 24
        model.predict(samples[0][:6])


def test_secrets_stay_secret(mlp, samples, tmp_path, monkeypatch, capsys):
    with Server(predictions(mlp), lambda number, seen: "400" if number > 20 else None) as server:
        url = f"http://anne:hush1@127.0.0.1:{server.port}/predict?key=hush2#hush3"
        with HttpModel(url, headers={"X-Token": "hush4"}) as model:
            shown = [repr(model), json.dumps(model.describe()), str(model.traffic)]
            with pytest.raises(Unavailable) as told:
                square(model, samples)
            assert model.describe()["url"] == f"http://127.0.0.1:{server.port}/predict"
        path, headers = server.asked[0]
        assert path == "/predict?key=hush2"
        assert headers["x-token"] == "hush4"
        assert base64.b64decode(headers["authorization"].removeprefix("Basic ")) == b"anne:hush1"
        told.value.result.save(tmp_path / "result")
        shown += [str(told.value), (tmp_path / "result" / "result.json").read_text(), *capsys.readouterr()]
    assert "hush" not in "".join(shown)
    assert "anne" not in "".join(shown)
    for wrong in ("ftp://anne:hush@host/", "hush", "http://", "http://a:hush/x", "http://[hush/", "", None):
        with pytest.raises(InputError, match="url must be such as") as refused:
            HttpModel(wrong)
        assert "hush" not in str(refused.value)
    for value in ("hüsh", "hush\nhush", 3):
        with pytest.raises(InputError, match=r"headers\['X-Token'\]") as refused:
            HttpModel("http://localhost", headers={"X-Token": value})
        assert "sh" not in str(refused.value)


def test_what_http_cannot_say_is_told_at_once(served, samples):
    with HttpModel(served.url, headers={"No Name": "1"}) as model, pytest.raises(ModelError, match="can't be asked"):
        model.predict(samples[0])
    assert served.requests == 0


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"batch_rows": 0}, "batch_rows"),
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": 1.5}, "concurrency"),
        ({"retries": -1}, "retries"),
        ({"limit": 0}, "limit"),
        ({"cache": -1}, "cache"),
        ({"timeout": 0}, "timeout"),
        ({"rate": 0.0}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"backoff": -1}, "backoff"),
        ({"gives": "scores"}, "unknown kind of output"),
        ({"gives": "labels"}, "num_classes"),
        ({"gives": "labels", "labels": "abc"}, "labels must be"),
        ({"gives": "labels", "labels": ("a", "a")}, "all different"),
        ({"gives": "labels", "labels": ("a", "b"), "num_classes": 3}, "each of the 3 classes"),
        ({"labels": ("a", "b")}, 'gives="labels"'),
        ({"encode": "jpeg"}, "unknown encode 'jpeg'"),
        ({"decode": "png"}, "unknown decode 'png'"),
        ({"bounds": (1, 0)}, "bounds"),
        ({"num_classes": 1}, "num_classes"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(InputError, match=text):
        HttpModel("http://localhost", **settings)


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MissingExtraError, match=r"saddlepoint\[http\]"):
        HttpModel("http://localhost")


def test_connections_are_closed(served, samples):
    with HttpModel(served.url) as model:
        model.predict(samples[0])
        client = model._client
    assert client.is_closed
    with pytest.raises(InputError, match="closed"):
        model.predict(samples[0])
    model.close()
    forgotten = HttpModel(served.url)
    forgotten.predict(samples[0])
    client = forgotten._client
    del forgotten
    gc.collect()
    assert client.is_closed


@pytest.fixture
def _interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="there is no other way to press Ctrl-C here")
@pytest.mark.usefixtures("_interruptible")
def test_ctrl_c_keeps_what_is_finished(mlp, samples):
    def trouble(number: int, seen: int) -> str | None:
        if number < 150:
            return None
        if number == 150:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return "hang"

    with Server(predictions(mlp), trouble) as server, HttpModel(server.url) as model:
        with pytest.raises(sp.Interrupted) as stopped:
            square(model, samples, batch_size=4)
        assert 0 < len(stopped.value.result) < len(samples[0])
        assert server.requests == 151
    with Server(predictions(mlp), port=server.port), HttpModel(server.url) as model:
        result = square(model, samples, resume=stopped.value.result)
    assert_same(result, square(sp.Model(row_by_row(mlp), access=sp.Access.SCORES), samples))


def test_the_environments_proxy_is_used(mlp, samples, monkeypatch):
    with Server(predictions(mlp)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        with HttpModel("http://classifier.example/predict") as model:
            model.predict(samples[0])
        assert proxy.asked[0][0] == "http://classifier.example/predict"


def test_an_endpoint_that_is_not_there(samples):
    with Server(predictions(lambda rows: rows)) as server:
        url = server.url
    with HttpModel(url, retries=2, backoff=0) as model:
        with pytest.raises(Unavailable, match=r"3 attempts.*ConnectError") as told:
            square(model, samples)
        assert len(told.value.result) == 0
        assert model.traffic.requests == 3


def test_an_endpoint_on_the_command_line(mlp, monkeypatch):
    found = sp.data.load("digits")
    monkeypatch.setenv("TOKEN", "hush")
    with Server(predictions(mlp)) as server:
        url = f"{server.url}?key=${{TOKEN}}&price=$$1"
        header = ["Authorization: Bearer $TOKEN", "X-Team: red"]
        name, model = remote.model(url, found, header=header, batch_rows=8, rate=None)
        with model:
            assert name == "127.0.0.1"
            assert torch.equal(model.predict(found.test.x[:20]), mlp(found.test.x[:20]).argmax(1))
        assert sorted(server.sizes) == [4, 8, 8]
        path, headers = server.asked[0]
        assert path == "/predict?key=hush&price=$1"
        assert (headers["authorization"], headers["x-team"]) == ("Bearer hush", "red")
    with remote.model(url, found, gives="labels")[1] as model:
        assert model.num_classes == 10
    with remote.model(url, found, gives="labels", labels="cat, dog")[1] as model:
        assert model.describe()["labels"] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("url", "header", "text"),
    [
        ("http://localhost", "Authorization: hush", r"put the value into a variable, and write 'Authorization: \$VARIABLE'"),
        ("http://localhost", "X-Api-Key: hush", "put the value into a variable"),
        ("http://localhost", "Authorization hush", "NAME: VALUE"),
        ("http://localhost", "Authorization: $NOBODY_SET_THIS", "no variable 'NOBODY_SET_THIS'"),
        ("http://anne:hush@localhost", "X-Team: red", "password"),
        ("http://localhost?price=$1", "X-Team: red", r"written \$\$"),
    ],
)
def test_passwords_do_not_belong_on_the_command_line(url, header, text):
    with pytest.raises(InputError, match=text) as told:
        remote.model(url, sp.data.load("digits"), header=[header])
    assert "hush" not in str(told.value)


def test_one_model_on_the_command_line():
    remote.one_of("net.py:net", None, classes=None, header=[], cache=False)
    remote.one_of(None, "http://localhost", classes=3)
    for model, url in ((None, None), ("net.py:net", "http://localhost")):
        with pytest.raises(InputError, match="either --model or --url"):
            remote.one_of(model, url)
    with pytest.raises(InputError, match="--batch-rows is for models behind --url"):
        remote.one_of("net.py:net", None, batch_rows=3)
