"""`HttpModel`: a classifier behind an HTTP endpoint, where every question costs time and perhaps money."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal, Self, final
from urllib.parse import urljoin, urlsplit

import numpy as np
import torch
from torch import Tensor, nn

from saddlepoint.errors import InputError, MissingExtraError, ModelError, Unavailable, UnknownNameError
from saddlepoint.models.adapt import GIVES, Gives
from saddlepoint.models.base import Classifier
from saddlepoint.models.torch_model import Model
from saddlepoint.taxonomy import Access

if TYPE_CHECKING:
    import httpx2

Encode = Callable[[Tensor], object]
Decode = Callable[[bytes], Any]  # Any: whatever the endpoint says, which is checked
Bounds = tuple[float, float] | None

_LONGEST_WAIT = 120.0  # seconds between two attempts; who asks for more is unavailable
_QUOTED = 200  # characters of an answer in an error
_REMEMBERED = 100_000  # rows in the cache
_TRY_AGAIN = (408, 425, 429)  # statuses, beside all from 500 on
_HINTS = {
    401: "is a header missing, such as headers={'Authorization': ...}?",
    403: "is a header missing, such as headers={'Authorization': ...}?",
    413: "make batch_rows smaller",
}


@dataclass
class Traffic:
    """What went over the wire since the model was made.

    answered: rows whose answers arrived, each counted once. sent: rows sent, attempts that failed included. requests: sent, of
    which `retried` repeated one that failed. cached: rows that were answered from memory.
    """

    answered: int = 0
    sent: int = 0
    requests: int = 0
    retried: int = 0
    cached: int = 0

    def __str__(self) -> str:
        text = f"{self.answered:,} rows answered, {self.sent:,} sent in {self.requests:,} requests"
        text += f", {self.retried:,} of them repeated" if self.retried else ""
        return text + (f"; {self.cached:,} rows from the cache" if self.cached else "")


@final
class HttpModel(Classifier):
    """A classifier that is asked over HTTP: POST with inputs, answered by scores or labels.

    url: http or https. Redirects are not followed. Proxies and certificates are those of the environment.
    encode: rows (n, ...) -> the request's body as bytes, or something that JSON can say. Or a name: "json" is
        {"instances": nested lists}, "npy" an array as `np.save` writes it, "png" {"instances": [{"b64": ...}]} of images
        (n, 1 or 3, H, W), rounded to 8 bits: attack it with `grid=1 / 255`.
    decode: the answer's body -> scores (n, C), scores of one logit or probability (n,), or labels (n,). Or a name: "json" is
        {"predictions": ...} or the bare list, "npy" an array.
    num_classes: checked if given, otherwise found out; needed for labels without names. bounds: range of the inputs.
    gives: "logits", "probabilities" (their logarithms serve as logits) or "labels". labels: names of the classes in their
        order, where the endpoint answers by name. Access is scores or labels accordingly; there are no gradients.
    batch_rows: rows in a request. concurrency: requests at the same time. `sp.attack(batch_size=)` should be their product at
        least, as its default mostly is.
    timeout: seconds without a byte after which an attempt has failed. retries: attempts after the first, when the connection
        fails or the status is 408, 425, 429 or 5xx. backoff: seconds before the first of them, doubled each time and shortened
        by up to a half at random; Retry-After is honoured, for all requests, up to two minutes.
    rate: requests a second at most, retries included. limit: rows sent at most in this model's life, retries included.
    cache: remember the answers of the last 100,000 different rows (or as many as stated).
    headers: sent along, such as Authorization. They appear nowhere else; nor do the url's password and query string, except in
        httpx2's own log at level INFO.

    `traffic` counts what went over the wire. The engine's own counts (`result.queries`) are of the rows that the attack asked
    about, those from the cache included: the budget is the adversary's. Without a cache both agree to the row, with
    `queries.probe` (8 inputs, three times) and `queries.verify` (one for each success), as long as no call fails. Where an
    answer is lost on its way, the endpoint has answered rows that are asked about again, and counted once here. With a cache
    a resumed run pays for nothing twice, but confirmations and most of the probe come from memory too: it is for endpoints
    that are not random.

    Errors: `Unavailable` (in a run with the finished samples as its `.result`) where the attempts, the limit or the endpoint's
    patience are used up, or it refuses; `ModelError` for answers that are none; `InputError`; `MissingExtraError`.
    Close it, or use it in a `with` statement. Threads may share it.

    >>> import saddlepoint as sp
    >>> from saddlepoint.models.http_model import HttpModel
    >>> with HttpModel("https://example.org/predict?key=secret", gives="labels", labels=("cat", "dog")) as model:
    ...     print(model.access.name, model.num_classes, model.describe()["url"])
    LABELS 2 https://example.org/predict
    """

    def __init__(
        self,
        url: str,
        encode: Encode | Literal["json", "npy", "png"] = "json",
        decode: Decode | Literal["json", "npy"] = "json",
        *,
        num_classes: int | None = None,
        bounds: Bounds = (0.0, 1.0),
        gives: Gives = "logits",
        labels: Sequence[str | int] | None = None,
        batch_rows: int = 32,
        concurrency: int = 4,
        timeout: float = 30.0,
        retries: int = 5,
        backoff: float = 0.5,
        rate: float | None = None,
        limit: int | None = None,
        cache: bool | int = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        try:
            import httpx2
        except ImportError:
            raise MissingExtraError("HttpModel", "httpx2", "http") from None
        if gives not in GIVES:
            raise UnknownNameError("kind of output", gives, GIVES)
        for name, value, least in (("batch_rows", batch_rows, 1), ("concurrency", concurrency, 1), ("retries", retries, 0),
                                   ("limit", limit, 1), ("cache", cache, 0)):  # fmt: skip
            if value is not None and (not isinstance(value, int) or value < least):
                raise InputError(f"{name} must be a whole number >= {least}; got {value!r}")
        for name, seconds in (("timeout", timeout), ("rate", rate)):
            if seconds is not None and not 0 < seconds < float("inf"):
                raise InputError(f"{name} must be positive; got {seconds!r}")
        if not 0 <= backoff < float("inf"):
            raise InputError(f"backoff must be seconds >= 0; got {backoff!r}")
        self._places = _places(labels, gives, num_classes)
        classes = len(self._places) if self._places is not None else num_classes
        super().__init__(bounds, Access.LABELS if gives == "labels" else Access.SCORES, classes)
        self._address, self.url = _checked(url)
        self.gives, self.traffic = gives, Traffic()
        self._encode, self._encode_name = _named("encode", encode, _encoders(self.bounds))
        self._decode, self._decode_name = _named("decode", decode, {"json": _from_json, "npy": _from_npy})
        self._model = Model(self._ask, self.bounds, num_classes=classes, gives=gives)  # reads logits out of answers
        self._batch_rows, self._retries, self._backoff, self._limit = batch_rows, retries, backoff, limit
        self._cache = _Cache(_REMEMBERED if cache is True else cache) if cache else None
        self._width: int | None = None  # of the answers
        self._pace, self._random, self._lock = Pace(rate), random.Random(), threading.Lock()
        self._sleep: Callable[[threading.Event, float], bool] = threading.Event.wait
        limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        for name, text in (headers or {}).items():
            if not (isinstance(text, str) and text.isascii() and text.isprintable()):  # a value is not for messages
                raise InputError(f"headers[{name!r}] must be text of printable ASCII characters")
        self._client = httpx2.Client(headers=dict(headers or {}), timeout=timeout, limits=limits)
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="saddlepoint-http")
        self._closing = weakref.finalize(self, _close, self._pool, self._client)

    def close(self) -> None:
        """Close the connections. The model can't be asked any more."""
        self._closing()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def networks(self) -> tuple[nn.Module, ...]:
        return ()

    def features(self, x: Tensor, layer: str) -> Tensor:
        raise InputError("a model behind HTTP shows no layers")

    def describe(self) -> dict[str, object]:
        return {
            "name": "HttpModel", "url": self.url, "bounds": self.bounds, "num_classes": self.num_classes,
            "access": self.access.name.lower(), "gives": self.gives, "encode": self._encode_name, "decode": self._decode_name,
            "labels": None if self._places is None else list(self._places),
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self._model.forward(x)

    def _ask(self, x: Tensor) -> Tensor:
        """The answers (N,) or (N, C) for inputs (N, ...): float32, of float64 inputs float64."""
        rows = x.detach().cpu()
        answers = self._fetch(rows) if self._cache is None else self._remembered(rows, self._cache)
        return answers.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)

    def _remembered(self, rows: Tensor, cache: _Cache) -> Tensor:
        keys = cache.keys(rows)
        known = cache.get(keys)
        first: dict[bytes, int] = {}
        for place, key in enumerate(keys):
            if key not in known:
                first.setdefault(key, place)
        if first:
            known.update(zip(first, self._fetch(rows[list(first.values())]), strict=True))
        with self._lock:
            self.traffic.cached += len(keys) - len(first)
        return torch.stack([known[key] for key in keys])

    def _fetch(self, rows: Tensor) -> Tensor:
        """Ask about all rows; answers in their order. When a request fails for good, the others make no further attempts."""
        if not self._closing.alive:
            raise InputError("this HttpModel is closed: make another")
        with self._lock:
            self._within_limit(len(rows))  # all or nothing: half a call is of no use to the engine
        stop = threading.Event()
        futures = [self._pool.submit(self._request, part, stop) for part in torch.split(rows, self._batch_rows)]
        try:
            while wait(futures, timeout=0.5).not_done:
                pass  # a wait without end doesn't hear Ctrl-C everywhere
        finally:
            stop.set()  # then the threads end by themselves
        for future in futures:
            error = future.exception()
            if error is not None and not isinstance(error, _Stopped):
                raise error
        return torch.cat([future.result() for future in futures])

    def _request(self, rows: Tensor, stop: threading.Event) -> Tensor:
        try:
            return self._attempts(rows, stop)
        except BaseException:
            stop.set()
            raise

    def _attempts(self, rows: Tensor, stop: threading.Event) -> Tensor:
        """The answers for the rows of one request, by as many attempts as it takes."""
        import httpx2

        body, kind = self._body(rows)
        for attempt in range(self._retries + 1):
            if attempt:
                longest = min(_LONGEST_WAIT, self._backoff * 2.0 ** min(attempt - 1, 30))
                self._wait(stop, longest * self._random.uniform(0.5, 1))
            self._wait(stop, self._pace.turn())
            with self._lock:
                self._within_limit(len(rows))
                self.traffic.sent += len(rows)
                self.traffic.requests += 1
                self.traffic.retried += attempt > 0
            try:
                response = self._client.post(self._address, content=body, headers=kind)
            except httpx2.LocalProtocolError as error:
                raise ModelError(f"{self.url} can't be asked: {error}") from None
            except httpx2.RequestError as error:
                trouble = f"{type(error).__name__}: {error}"
                continue
            if response.is_success:
                answers = self._read(response.content, len(rows))
                with self._lock:
                    self.traffic.answered += len(rows)
                if self._cache is not None:
                    self._cache.put(self._cache.keys(rows), answers)
                return answers
            trouble = self._refusal(response)
            pause = _retry_after(response.headers.get("retry-after"))
            if pause > _LONGEST_WAIT:
                raise Unavailable(f"{self.url} asks for a pause of {pause:.0f} seconds: go on after it ({trouble})")
            self._pace.pause(pause)
        tries = f"{self._retries + 1} attempts" if self._retries else "its only attempt"
        raise Unavailable(f"{self.url} gave no answer in {tries}; the last trouble: {trouble}")

    def _wait(self, stop: threading.Event, seconds: float) -> None:
        if self._sleep(stop, seconds):
            raise _Stopped

    def _within_limit(self, rows: int) -> None:
        sent = self.traffic.sent
        if self._limit is not None and sent + rows > self._limit:
            raise Unavailable(f"limit={self._limit}: {sent} rows were sent to {self.url}, and {rows} more are asked for")

    def _body(self, rows: Tensor) -> tuple[bytes, dict[str, str]]:
        """The request's body, and the header that says what it is unless the caller's headers do."""
        made = self._encode(rows)
        kind = "application/octet-stream"
        if not isinstance(made, bytes):
            try:
                made, kind = json.dumps(made, allow_nan=False, separators=(",", ":")).encode(), "application/json"
            except (TypeError, ValueError) as error:
                raise ModelError(f"encode must make bytes, or what JSON can say: {error}") from error
        return made, {} if "content-type" in self._client.headers else {"content-type": kind}

    def _refusal(self, response: httpx2.Response) -> str:
        """What an answer with another status than 2xx says. Errors: `Unavailable` if asking again is of no use."""
        status = response.status_code
        if 300 <= status < 400:
            target = _shown(urljoin(str(self._address), response.headers.get("location", "")))
            raise Unavailable(
                f"{self.url} redirects to {target} (status {status}), which is not followed: give that url if you trust it"
            )
        trouble = f"status {status} {response.reason_phrase}: {response.text[:_QUOTED]!r}"
        if status in _TRY_AGAIN or status >= 500:
            return trouble
        hint = f"; {_HINTS[status]}" if status in _HINTS else ""
        raise Unavailable(f"{self.url} refuses with {trouble}{hint}")

    def _read(self, body: bytes, count: int) -> Tensor:
        """The answers (n,) or (n, C) in a body. Errors: `ModelError` where they are none."""
        try:
            found = np.asarray(self._placed(self._decode(body)), dtype=np.float64)
        except Exception as error:  # whatever the user's function raises
            told = error if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
            raise ModelError(f"{self._said(body)} can't be read as {self.gives}: {told}; decode= says how to") from error
        dimensions = (1,) if self.gives == "labels" else (1, 2)
        if found.ndim not in dimensions or len(found) != count:
            raise ModelError(f"{self._said(body)} has {self.gives} of shape {found.shape} for {count} rows")
        if not np.isfinite(found).all():
            raise ModelError(f"{self._said(body)} has NaN or infinite values")
        width = found.shape[1] if found.ndim == 2 else 1
        with self._lock:
            self._width = self._width or width
        if width != self._width:
            raise ModelError(f"{self._said(body)} has {width} scores a row; earlier ones had {self._width}")
        classes = max(width, 2)  # a single one is the second class's logit or probability
        if self.gives != "labels" and self.num_classes not in (None, classes):
            raise ModelError(f"{self._said(body)} has {width} scores a row, but num_classes={self.num_classes} was stated")
        return torch.from_numpy(found)

    def _placed(self, raw: Any) -> Any:  # Any: see Decode
        """Class numbers, where the answers are names."""
        if self._places is None:
            return raw
        answers = raw.tolist() if isinstance(raw, np.ndarray | Tensor) else raw
        for answer in answers:
            if answer not in self._places:
                raise ModelError(f"{answer!r} is not among labels={list(self._places)}")
        return [self._places[answer] for answer in answers]

    def _said(self, body: bytes) -> str:
        return f"the answer of {self.url}, {body[:_QUOTED].decode(errors='replace')!r},"


class _Stopped(Exception):  # noqa: N818  # no error: another request of the same call failed
    """This request is given up."""


class Pace:
    """When requests may start: `rate` a second at most, and none before the end of a pause. Threads share it."""

    def __init__(self, rate: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._gap, self._clock, self._lock = 1 / rate if rate else 0.0, clock, threading.Lock()
        self._free = clock()

    def turn(self) -> float:
        """Take the next turn: seconds until it comes."""
        with self._lock:
            now = self._clock()
            at = max(now, self._free)
            self._free = at + self._gap
        return at - now

    def pause(self, seconds: float) -> None:
        """No turn begins within so many seconds, except those that are taken."""
        with self._lock:
            self._free = max(self._free, self._clock() + seconds)


class _Cache:
    """The last answers, by a digest of the row's dtype, shape and bytes. Threads share it."""

    def __init__(self, size: int) -> None:
        self._size, self._lock = size, threading.Lock()
        self._answers: OrderedDict[bytes, Tensor] = OrderedDict()

    @staticmethod
    def keys(rows: Tensor) -> list[bytes]:
        """One for each row."""
        kind = f"{rows.dtype} {tuple(rows.shape[1:])}".encode()
        flat = rows.contiguous().view(torch.uint8).flatten(1).numpy()
        return [hashlib.blake2b(kind + row.tobytes(), digest_size=16).digest() for row in flat]

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        """The answers that are known."""
        with self._lock:
            found = {key: self._answers[key] for key in keys if key in self._answers}
            for key in found:
                self._answers.move_to_end(key)
        return found

    def put(self, keys: Sequence[bytes], answers: Tensor) -> None:
        """Remember, and forget the oldest beyond the size."""
        with self._lock:
            for key, answer in zip(keys, answers, strict=True):
                self._answers[key] = answer.clone()
                self._answers.move_to_end(key)
            while len(self._answers) > self._size:
                self._answers.popitem(last=False)


def _close(pool: ThreadPoolExecutor, client: httpx2.Client) -> None:
    pool.shutdown(wait=False)
    client.close()


def _checked(url: str) -> tuple[httpx2.URL, str]:
    """The url, and as it may be shown. Errors: `InputError`, which shows nothing: where would the password be?"""
    import httpx2

    try:
        found, shown = httpx2.URL(url), _shown(url)
    except (httpx2.InvalidURL, AttributeError, TypeError, ValueError):
        found, shown = httpx2.URL(), ""
    if found.scheme not in ("http", "https") or not found.host:
        raise InputError("url must be such as https://host/path or http://127.0.0.1:8000/predict")
    return found, shown


def _shown(url: str) -> str:
    """Without user, password, query string and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _places(labels: Sequence[str | int] | None, gives: Gives, num_classes: int | None) -> dict[str | int, int] | None:
    """Class numbers by the endpoint's names."""
    if labels is None:
        if gives == "labels" and num_classes is None:
            raise InputError(
                "labels alone don't tell how many classes there are: give num_classes=, or labels= with their names"
            )
        return None
    places = {label: place for place, label in enumerate(labels)}
    if gives != "labels":
        raise InputError(f'labels= are the names that an endpoint with gives="labels" answers; gives={gives!r}')
    if isinstance(labels, str) or len(places) != len(labels) or num_classes not in (None, len(labels)):
        raise InputError(f"labels must be a name for each of the {num_classes or ''} classes, all different; got {labels!r}")
    return places


def _named(what: str, given: Any, known: Mapping[str, Any]) -> tuple[Any, str]:  # Any: functions of two kinds
    """The function that is given or named, and how `describe` calls it."""
    if callable(given):
        return given, str(getattr(given, "__qualname__", type(given).__name__))
    if given not in known:
        raise UnknownNameError(what, str(given), known)
    return known[given], given


def _encoders(bounds: Bounds) -> dict[str, Encode]:
    def to_png(rows: Tensor) -> object:
        if bounds is None:
            raise InputError('encode="png" needs bounds: black and white are their ends')
        if rows.dim() != 4 or rows.shape[1] not in (1, 3):
            raise InputError(f'encode="png" is for images (n, 1 or 3, H, W); the shape is {tuple(rows.shape)}')
        from PIL import Image

        low, high = bounds
        levels = ((rows.double() - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
        said = []
        for image in levels.permute(0, 2, 3, 1).numpy():
            file = io.BytesIO()
            Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(file, "PNG")
            said.append({"b64": base64.b64encode(file.getvalue()).decode()})
        return {"instances": said}

    return {"json": _to_json, "npy": _to_npy, "png": to_png}


def _to_json(rows: Tensor) -> object:
    return {"instances": rows.tolist()}


def _to_npy(rows: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy(), allow_pickle=False)
    return file.getvalue()


def _from_json(body: bytes) -> Any:  # Any: JSON
    found = json.loads(body)
    if not isinstance(found, dict):
        return found
    if "predictions" not in found:
        raise ValueError(f"it has no 'predictions', but {sorted(found)}")
    return found["predictions"]


def _from_npy(body: bytes) -> Any:  # Any: np.load's
    return np.load(io.BytesIO(body), allow_pickle=False)


def _retry_after(text: str | None) -> float:
    """Seconds to wait by a Retry-After header, which says them or a date; 0 without one that can be read."""
    if not text:
        return 0.0
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return 0.0
