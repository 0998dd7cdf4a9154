"""Campaigns: evaluations on disk, which can be killed at any instant and go on as if nothing had happened."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, final
from urllib.parse import quote, unquote

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from saddlepoint.engine import AttackResult
from saddlepoint.engine.result import merge
from saddlepoint.engine.source import fingerprint as data_fingerprint
from saddlepoint.errors import CapabilityError, DataError, InputError, MissingExtraError, SaddlepointWarning
from saddlepoint.files import sync_folder, write_file
from saddlepoint.models.base import Classifier
from saddlepoint.models.fingerprint import fingerprint, without_classes
from saddlepoint.threats import Threat

if TYPE_CHECKING:
    import pyarrow as pa

_FORMAT = 1
_MANIFEST, _LOCK = "manifest.json", "lock"
_TABLES, _SHARDS, _DOCUMENTS = "tables", "shards", "documents"
_COMPLETE = "complete"
_KEY = b"saddlepoint"  # of what a table's footer says about the part
_NAME = re.compile(r"(\d{6,})-(.+)")
_SHOWN = 60  # characters of a value in a message
# What nobody can read off the values, in words.
_IN_WORDS = {
    "model.fingerprint": "the model's weights or layers differ",
    "data.fingerprint": "the samples or labels differ",
    "configuration.sources": "the models whose gradients may be borrowed differ",
    "configuration.plans": "the cascade's attacks differ",
}


@dataclass(frozen=True)
class Difference:
    """A setting that differs between two runs; None where a run doesn't have it."""

    key: str
    before: Any  # Any: JSON
    now: Any

    def __str__(self) -> str:
        return _IN_WORDS.get(self.key) or f"{self.key}: {_short(self.before)} before, {_short(self.now)} now"


@dataclass(frozen=True)
class Part:
    """Samples of one stage that were finished together, with their files. The part exists once its table does."""

    number: int
    stage: str
    table: Path
    shard: Path


@final
class Campaign:
    """A folder in which an evaluation keeps what is finished.

        manifest.json          what is evaluated: model, data, threat, configuration, seed, versions
        tables/*.parquet       a row for each sample and stage
        shards/*.safetensors   the tensors of the `AttackResult`s, adversarial inputs among them
        documents/*.json       what was found or decided on the way
        lock                   held by the process that writes

    Reading (`manifest`, `finished`, `table`, `document`) needs no lock and sees what is finished, also while a run goes on.
    To write, `open` it. Every file is written under another name, synchronised with the disk and renamed; a part counts from
    the instant when its table has its name, so what is there after SIGKILL, power loss or a full disk is whole.

    What it guards against: damaged files (checksums), another process (an operating system's lock), and going on with another
    model, other data or another configuration. It does not guard against someone who forges files on purpose.

    Errors: `MissingExtraError` without pyarrow, `DataError` where files are damaged or cannot be read or written.
    """

    def __init__(self, path: str | Path) -> None:
        _arrow()
        self.path = Path(path)
        self._release: weakref.finalize[[int], Self] | None = None
        self._done: dict[str, set[int]] = {}

    def __repr__(self) -> str:
        return f"Campaign({str(self.path)!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # writing

    def open(self, manifest: Mapping[str, Any]) -> None:
        """Begin the campaign, or go on with it; it is this process's until `close`, or until the process ends.

        manifest: what makes it the same run, JSON values; `manifest(...)` of this module makes one. All of it must agree with
        what the campaign was begun with. The versions of Python, PyTorch and Saddlepoint are added; if they differ there is
        a warning.

        Errors: `InputError` with every difference shown, or with the process that has the campaign open.
        """
        wanted = _plain(manifest)
        with self._writing(self.path):
            for name in (_TABLES, _SHARDS, _DOCUMENTS):
                (self.path / name).mkdir(parents=True, exist_ok=True)
            sync_folder(self.path)
            sync_folder(self.path.parent)
            self._lock()
        try:
            self._begin_or_resume(wanted)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes have it."""
        if self._release is not None:
            self._release()
            self._release = None

    def add(self, stage: str, result: AttackResult, rows: Tensor) -> None:
        """Keep what a stage found for some samples, all of them or none.

        rows (K,): the positions of the K samples in the evaluation's input; they become `result.index` and `result.order`.

        Errors: `InputError` for samples that the stage has already. `DataError` where the disk is full: what was added before
        is kept.
        """
        self._require_open()
        if not stage:
            raise InputError("a stage needs a name")
        rows = rows.detach().cpu().long()
        given, done = set(rows.flatten().tolist()), self._done.setdefault(stage, set())
        if rows.shape != (len(result),) or len(given) != len(rows):
            raise InputError(
                f"rows must be {len(result)} different positions, one for each sample of the result; got {len(given)} "
                f"different ones of shape {tuple(rows.shape)}"
            )
        if again := sorted(given & done):
            raise InputError(
                f"{self.path}: {len(again)} samples of {stage!r} were added before, the first at position {again[0]}"
            )
        if not len(rows):
            return
        part = self._part(max((part.number for part in self.parts()), default=0) + 1, stage)
        result = replace(result, index=rows, order=rows)
        shard = safetensors.torch.save(
            # copies, because safetensors refuses tensors that share memory
            {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in result.columns().items()}
        )
        try:
            with self._writing(part.table):
                write_file(part.shard, shard)
                write_file(part.table, _encoded(stage, result, hashlib.sha256(shard).hexdigest()))
        finally:
            if part.table.exists():
                done |= given
            else:
                with suppress(OSError):
                    part.shard.unlink()

    def record(self, name: str, document: Mapping[str, Any]) -> None:
        """Keep a small document of JSON values, in place of an older one of that name."""
        self._require_open()
        path = self._document(name)
        content = json.dumps(document, indent=1).encode()
        with self._writing(path):
            write_file(path, content)

    def finish(self) -> None:
        """Say that all is done (`complete`)."""
        self.record(_COMPLETE, {"complete": True})

    # reading

    @property
    def manifest(self) -> dict[str, Any]:
        """What is evaluated. Errors: `DataError` where there is no campaign, a damaged one, or one of a later format."""
        path = self.path / _MANIFEST
        try:
            found = json.loads(path.read_bytes())
            known = found["format"]
        except FileNotFoundError:
            raise DataError(f"{self.path} is no campaign: it has no {_MANIFEST}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged or cannot be read ({error!r}): put it back from a copy") from error
        if known != _FORMAT:
            raise DataError(f"{path} has format {known}, this version of Saddlepoint reads {_FORMAT}: update it")
        return dict(found)

    @property
    def complete(self) -> bool:
        """Whether the evaluation came to its end."""
        return self.document(_COMPLETE) is not None

    @property
    def stages(self) -> tuple[str, ...]:
        """In the order in which they were begun."""
        return tuple(dict.fromkeys(part.stage for part in self.parts()))

    def finished(self, stage: str) -> AttackResult | None:
        """What is kept of a stage, in the order of the evaluation's input and on the CPU; `index` says which samples.

        None where there is nothing. Errors: `DataError` that names a damaged file and says what to do.
        """
        parts = [self.restore(part) for part in self.parts() if part.stage == stage]
        return merge(parts) if parts else None

    def document(self, name: str) -> dict[str, Any] | None:
        """What was recorded under this name, None if nothing was."""
        path = self._document(name)
        try:
            return dict(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} is damaged or cannot be read ({error!r}): delete it, and run the same again") from error

    def table(self) -> pa.Table:
        """A row for each sample and stage: stages in the order in which they were begun, samples in the order of the input.

        `sample` is its id, `row` its position in the input, `distance` in the threat's norm, `forward`, `backward` and
        `verify` passes, `seconds` its share of the time of those that were attacked with it.
        """
        pyarrow, _ = _arrow()
        by_stage: dict[str, list[pa.Table]] = {}
        for part in self.parts():
            by_stage.setdefault(part.stage, []).append(self.read(part).replace_schema_metadata(None))
        tables = [pyarrow.concat_tables(tables).sort_by("row") for tables in by_stage.values()]
        return pyarrow.concat_tables([_schema().empty_table(), *tables])

    def parts(self) -> list[Part]:
        """What is finished, in the order in which it was."""
        try:
            names = os.listdir(self.path / _TABLES)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error
        found = [_NAME.fullmatch(name.removesuffix(".parquet")) for name in names if name.endswith(".parquet")]
        parts = [self._part(int(match[1]), unquote(match[2])) for match in found if match is not None]
        return sorted(parts, key=lambda part: part.number)

    def read(self, part: Part) -> pa.Table:
        """A part's rows."""
        pyarrow, parquet = _arrow()
        try:
            # from memory: reading by path would take words of the form key=value in the path for columns
            content = pyarrow.BufferReader(part.table.read_bytes())
            table = parquet.ParquetFile(content, page_checksum_verification=True).read(use_threads=False)
            if not table.schema.equals(_schema()):
                raise ValueError(f"its columns are {table.column_names}")
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise _damaged(part.table, part, repr(error)) from error
        return table

    def restore(self, part: Part) -> AttackResult:
        """A part's result."""
        table = self.read(part)
        try:
            document = json.loads(table.schema.metadata[_KEY])
            digest = document.pop("shard")
            content = part.shard.read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:
                raise _damaged(
                    part.shard, part, f"its checksum is not the one that its table states; it has {len(content)} bytes"
                )
            return AttackResult.from_columns(safetensors.torch.load(content), notes=tuple(document.pop("notes")), **document)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise _damaged(part.shard, part, repr(error)) from error

    # inside

    def _part(self, number: int, stage: str) -> Part:
        name = f"{number:06d}-{quote(stage, safe='')}"
        return Part(number, stage, self.path / _TABLES / f"{name}.parquet", self.path / _SHARDS / f"{name}.safetensors")

    def _document(self, name: str) -> Path:
        if not name:
            raise InputError("a document needs a name")
        return self.path / _DOCUMENTS / f"{quote(name, safe='')}.json"

    def _require_open(self) -> None:
        if self._release is None:
            raise InputError(f"{self!r} is open for reading only: call open(manifest) first")

    def _lock(self) -> None:
        """Take the lock, or say who has it. The file stays: who deleted it could let two in."""
        try:
            import fcntl
        except ImportError:
            raise CapabilityError("campaigns need the file locks of Linux, macOS or another POSIX system") from None
        handle = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
        except BlockingIOError:
            owner = os.read(handle, 20).decode(errors="replace").strip() or "of unknown number"
            os.close(handle)
            raise InputError(f"{self.path} is in use by process {owner}: wait for its end, or take another folder") from None
        except BaseException:
            os.close(handle)
            raise
        # closing, not unlocking: a forked child that closes its copy must not let go of what its parent holds
        self._release = weakref.finalize(self, os.close, handle)

    def _begin_or_resume(self, wanted: dict[str, Any]) -> None:
        versions, path = _versions(), self.path / _MANIFEST
        whole, begun = {"format": _FORMAT, **wanted}, path.exists()
        if not begun and self.parts():
            raise DataError(f"{self.path} has results but no {_MANIFEST}: put it back from a copy, or take another folder")
        known = self.manifest if begun else {}
        before = known.pop("versions", {})
        if begun and (found := differences(known, whole)):
            begun = bool(self.parts() or any((self.path / _DOCUMENTS).iterdir()))  # where nothing is kept, nothing is lost
            if begun:
                lines = "".join(f"\n  {each}" for each in found)
                raise InputError(
                    f"{self.path} was begun with something else; take another folder, delete it, or undo what changed:{lines}"
                )
        if not begun:
            before = versions
            with self._writing(path):
                write_file(path, json.dumps({**whole, "versions": versions}, indent=1).encode())
        if other := differences(before, versions):
            warnings.warn(
                f"{self.path} goes on with other versions, which may round differently: {'; '.join(map(str, other))}",
                SaddlepointWarning,
                stacklevel=3,
            )
        with self._writing(self.path):
            self._clean()
        self._done = {}
        for part in self.parts():
            self._done.setdefault(part.stage, set()).update(self.read(part)["row"].to_pylist())

    def _clean(self) -> None:
        """Remove what a killed run left: drafts, and shards whose table never came."""
        drafts = [self.path.glob(f".{_MANIFEST}-*.tmp")]
        drafts += [(self.path / name).glob(".*.tmp") for name in (_TABLES, _SHARDS, _DOCUMENTS)]
        for draft in chain.from_iterable(drafts):
            draft.unlink()
        whole = {part.shard for part in self.parts()}
        for shard in (self.path / _SHARDS).glob("*.safetensors"):
            if shard not in whole and _NAME.fullmatch(shard.stem):
                shard.unlink()

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Turn what the operating system says into what was lost (nothing that was finished) and what to do."""
        try:
            yield
        except OSError as error:
            kept = ", ".join(f"{stage} {len(rows)}" for stage, rows in self._done.items() if rows) or "none so far"
            remedy = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
            raise DataError(
                f"cannot write {path}: {error.strerror or error}. What was finished before is kept (samples: {kept}); "
                f"{remedy} and run the same again: it goes on from there"
            ) from error


def manifest(
    model: Classifier, x: Tensor, y: Tensor, threat: Threat, *, seed: int, configuration: Mapping[str, Any]
) -> dict[str, Any]:
    """What makes a campaign the same campaign, for `Campaign.open`: whatever changes its outcome.

    x (N, ...), y (N,): the samples. configuration: the rest, JSON values.
    """
    return {
        "model": {"fingerprint": fingerprint(model), **without_classes(model.describe())},
        "data": {"samples": len(x), "fingerprint": data_fingerprint(x, y)},
        "threat": threat.settings(),
        "seed": seed,
        "configuration": dict(configuration),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Which settings differ, key by key (`model.mean`)."""
    old, new = _leaves(before), _leaves(now)
    return tuple(
        Difference(key, old.get(key), new.get(key))
        for key in dict.fromkeys((*old, *new))
        if json.dumps(old.get(key)) != json.dumps(new.get(key))
    )


def _arrow() -> tuple[Any, Any]:  # Any: modules that ship no types
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("a campaign", "pyarrow", "campaigns") from None
    return pyarrow, pyarrow.parquet


def _schema() -> pa.Schema:
    pyarrow, _ = _arrow()
    whole, number, text = pyarrow.int64(), pyarrow.float64(), pyarrow.string()
    columns = {
        "sample": whole, "row": whole, "stage": text, "status": text, "label": whole, "clean_predicted": whole,
        "predicted": whole, "margin": number, "distance": number, "l0": number, "l1": number, "l2": number, "linf": number,
        "forward": whole, "backward": whole, "verify": whole, "iterations": whole, "seconds": number,
    }  # fmt: skip
    return pyarrow.schema(list(columns.items()))


def _encoded(stage: str, result: AttackResult, shard: str) -> bytes:
    """A part's table; its footer has what else its result consists of, and the checksum of its shard."""
    pyarrow, parquet = _arrow()
    count = len(result)
    columns: dict[str, Any] = {
        "sample": result.ids, "row": result.index, "stage": [stage] * count, "status": result.status.tolist(),
        "label": result.labels, "clean_predicted": result.clean_predicted, "predicted": result.predicted,
        "margin": result.margin.double(), "distance": result.distance, **result.distances,
        "forward": result.queries.forward, "backward": result.queries.backward, "verify": result.queries.verify,
        "iterations": result.iterations, "seconds": [result.seconds / count] * count,
    }  # fmt: skip
    plain = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in columns.items()}
    footer = {
        "shard": shard, "seconds": result.seconds, "tau": result.tau, "notes": result.notes, "probe": result.queries.probe,
        "config": result.config,
    }  # fmt: skip
    table = pyarrow.table(plain, schema=_schema().with_metadata({_KEY: json.dumps(footer).encode()}))
    stream = pyarrow.BufferOutputStream()
    parquet.write_table(table, stream, write_page_checksum=True)
    content: bytes = stream.getvalue().to_pybytes()
    return content


def _damaged(path: Path, part: Part, reason: str) -> DataError:
    return DataError(
        f"{path} is damaged or missing ({reason}): put it back from a copy, or delete {part.table}, and the next run does its "
        f"samples of {part.stage!r} again"
    )


def _versions() -> dict[str, str]:
    from saddlepoint import __version__

    return {"python": platform.python_version(), "torch": str(torch.__version__), "saddlepoint": __version__}


def _plain(document: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a file."""
    try:
        return dict(json.loads(json.dumps(document)))
    except (TypeError, ValueError) as error:
        raise InputError(f"a campaign's manifest must consist of JSON values: {error}") from error


def _leaves(value: Any, path: str = "") -> dict[str, Any]:  # Any: JSON
    if not isinstance(value, Mapping):
        return {path: value}
    return {
        key: leaf for name, inner in value.items() for key, leaf in _leaves(inner, f"{path}.{name}" if path else name).items()
    }


def _short(value: Any) -> str:  # Any: JSON
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
