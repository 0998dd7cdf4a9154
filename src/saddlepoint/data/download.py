"""Fetching one published file: resumable, checked against its SHA-256, in place only when complete."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import shutil
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from saddlepoint.errors import DataError

TIMEOUT = 30.0  # seconds without a single byte
CHUNK = 1 << 18


@dataclass(frozen=True)
class RemoteFile:
    """A published file: its address, size in bytes, and SHA-256 in hexadecimal."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rpartition("/")[2]


def download(remote: RemoteFile, folder: Path, *, progress: bool = True) -> Path:
    """Bring `remote` into `folder` and return its path; a file that is already there and intact is left alone.

    An interrupted download stays beside it as `<name>.part` and is continued by the next call.
    Raises `DataError` on network errors, a full disk, or content that isn't the published one.
    """
    target = folder / remote.name
    part = folder / f"{remote.name}.part"
    try:
        if target.is_file() and _sha256(target) == remote.sha256:
            return target
        folder.mkdir(parents=True, exist_ok=True)
        _receive(remote, part, progress)
        found = _sha256(part)
        if found != remote.sha256:
            part.unlink()  # continuing it could never succeed
            raise DataError(
                f"{remote.url}: expected the SHA-256 {remote.sha256}, received {found}; "
                "the file was discarded: try again, and don't trust that address if this repeats"
            )
        os.replace(part, target)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as e:
        if isinstance(e, urllib.error.HTTPError) and e.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)  # longer than what the server has: it can't be continued
        raise DataError(f"{remote.url}: download failed ({e}); {_kept(part)}") from e
    except OSError as e:
        reason = "the disk is full" if e.errno == errno.ENOSPC else str(e)
        raise DataError(
            f"{folder}: cannot write {remote.name} ({reason}); name another folder with root=... or SADDLEPOINT_DATA"
        ) from e
    return target


def _receive(remote: RemoteFile, part: Path, progress: bool) -> None:
    """Fill `part` up to the published size, after what it already holds where the server can do that."""
    start = part.stat().st_size if part.exists() else 0
    if start > remote.size:
        start = 0
    if start == remote.size:
        return
    free = shutil.disk_usage(part.parent).free
    if free < remote.size - start:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    headers = {"User-Agent": "saddlepoint", **({"Range": f"bytes={start}-"} if start else {})}
    with urllib.request.urlopen(urllib.request.Request(remote.url, headers=headers), timeout=TIMEOUT) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0  # the server doesn't continue files: this is the whole of it
        offered = response.headers.get("Content-Length")
        if offered is not None and int(offered) != remote.size - start:
            raise DataError(
                f"{remote.url}: expected {remote.size - start} bytes, the server offers {offered}: "
                "not the published file (a login page of the network, perhaps)"
            )
        received = _copy(response, part, remote, start, progress)
    if received < remote.size:
        raise DataError(f"{remote.url}: the connection ended after {received} of {remote.size} bytes; {_kept(part)}")


def _copy(response: http.client.HTTPResponse, part: Path, remote: RemoteFile, start: int, progress: bool) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with (
        Progress(
            *columns,
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not progress,
        ) as bar,
        part.open("ab" if start else "wb") as file,
    ):
        task = bar.add_task(remote.name, total=remote.size, completed=start)
        received = start
        # At most one chunk too many is taken from a server that never stops; the checksum then tells.
        while received <= remote.size and (chunk := response.read(CHUNK)):
            file.write(chunk)
            received += len(chunk)
            bar.update(task, completed=received)
    return received


def _kept(part: Path) -> str:
    kept = part.stat().st_size if part.exists() else 0
    return f"{kept} bytes are kept in {part}: try again to continue" if kept else "check the network and try again"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
