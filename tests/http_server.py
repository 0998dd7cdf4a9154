"""A real HTTP server on the loopback interface, with a network behind it and the troubles of the real world."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

Answer = Callable[[Tensor], Any]  # what the endpoint says of rows (n, ...): JSON values, or the body as bytes
Parse = Callable[[bytes], Tensor]
# By the request's number and how often its body came before. A status ("429"); "drop": the connection is cut before an answer
# is made, "lost": after that, "half": in the middle of it; "slow"; "hang": until the server stops. None: an answer.
Faults = Callable[[int, int], str | None]


def row_by_row(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function whose results don't depend on how rows are grouped, not in the last bit."""
    return lambda rows: torch.cat([network(row[None]) for row in rows])


def predictions(network: Callable[[Tensor], Tensor]) -> Answer:
    """{"predictions": ...} as most endpoints say it."""
    return lambda rows: {"predictions": row_by_row(network)(rows).tolist()}


def instances(body: bytes) -> Tensor:
    return torch.tensor(json.loads(body)["instances"])


def never(number: int, seen: int) -> str | None:
    return None


class Server(ThreadingHTTPServer):
    """Runs in a `with` statement, on a free port unless one is given.

    computed: rows of all answers that were made, whether or not they arrived. requests: received. sizes: rows of each request
    that was answered. asked: target and headers of each request. most: requests under way at the same time, at most.
    """

    daemon_threads = True

    def __init__(
        self,
        answer: Answer,
        faults: Faults = never,
        *,
        parse: Parse = instances,
        headers: dict[str, str] | None = None,
        port: int = 0,
    ) -> None:
        self.answer, self.faults, self.parse, self.headers = answer, faults, parse, headers or {}
        self.computed = self.requests = self.busy = self.most = 0
        self.bodies: Counter[bytes] = Counter()
        self.sizes: list[int] = []
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.lock, self.connections, self.stopped = threading.Lock(), set[socket.socket](), threading.Event()
        super().__init__(("127.0.0.1", port), Handler)
        self.port = self.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/predict"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Die: open connections are cut."""
        if self.stopped.is_set():
            return
        self.stopped.set()
        self.shutdown()
        self.server_close()
        self.thread.join()
        with self.lock:
            for connection in self.connections:
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are what this server is for."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections.add(self.connection)

    def finish(self) -> None:
        with self.server.lock:
            self.server.connections.discard(self.connection)
        super().finish()

    def do_POST(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with server.lock:
            number, seen = server.requests, server.bodies[body]
            server.requests += 1
            server.bodies[body] += 1
            server.busy += 1
            server.most = max(server.most, server.busy)
            server.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        try:
            self.respond(body, server.faults(number, seen))
        finally:
            with server.lock:
                server.busy -= 1

    def respond(self, body: bytes, fault: str | None) -> None:
        server = self.server
        if fault is not None and fault.isdigit():
            self.reply(int(fault), f"no luck: {fault}".encode(), server.headers)
            return
        if fault == "slow":
            time.sleep(0.005)
        if fault == "hang":
            server.stopped.wait()
        if fault in ("drop", "hang"):
            self.close_connection = True
            return
        rows = server.parse(body)
        said = server.answer(rows)
        with server.lock:
            server.computed += len(rows)
            server.sizes.append(len(rows))
        if fault == "lost":
            self.close_connection = True
            return
        content = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.reply(200, content, {}, half=fault == "half")

    def reply(self, status: int, content: bytes, headers: dict[str, str], half: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if half else content)
        self.close_connection = half

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""
