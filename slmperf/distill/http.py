"""JSON over HTTP from many threads: connections that are kept, pauses, and errors of one line.

The standard library only. No proxies and no redirects: a server is where its URL says.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from slmperf.check import InputError

BACKOFF_S = 0.5  # before the first repetition; twice as long before each further one
LONGEST_BACKOFF_S = 30.0

Item = TypeVar("Item")
Found = TypeVar("Found")


class _Failed(Exception):
    """A request without an answer. `again`: whether the next one may do better."""

    def __init__(self, reason: str, again: bool, after_s: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.after_s = again, after_s


class JsonServer:
    """A server that answers JSON with JSON.

    url        http(s)://HOST[:PORT], with or without a path that all requests begin with
    api_key    sent as bearer token
    parallel   requests under way at once
    timeout_s  how long the server may be silent within one request
    retries    how often a request is repeated, after a pause, that met a connection's error,
               silence, or status 429 or 5xx

    Threads may share it. Whatever a server does wrong is an InputError with its URL.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        parallel: int = 8,
        timeout_s: float = 120.0,
        retries: int = 2,
    ) -> None:
        wanted = "expected http://HOST:PORT or https://HOST"
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise InputError(f"server is {url!r}, {wanted}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"server is {url!r}, {wanted}")
        if parallel < 1 or retries < 0 or not timeout_s > 0:
            raise InputError(
                f"server {url}: parallel is {parallel}, retries {retries} and timeout_s "
                f"{timeout_s}, expected at least 1, at least 0 and more than 0"
            )
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, port
        self._base = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{self._base}"
        self.parallel, self.timeout_s, self.retries = parallel, timeout_s, retries
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []

    def each(
        self, work: Callable[[Item, threading.Event], Found], items: Sequence[Item]
    ) -> list[Found]:
        """work(item, abandoned) of all items, `parallel` at once; results in the items' order.

        The first failure is raised; the others' requests are then not repeated.
        """
        if not items:
            return []
        abandoned = threading.Event()
        pool = ThreadPoolExecutor(min(self.parallel, len(items)), "requests")
        try:
            futures = [pool.submit(work, item, abandoned) for item in items]
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()  # raises what it met
            return [future.result() for future in futures]
        finally:
            abandoned.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        abandoned: threading.Event | None = None,
    ) -> dict[str, Any]:
        """The object that answers a request (a GET without `body`), repeated where that may help.

        abandoned: set once the answer is not wanted any more.
        """
        content = None if body is None else json.dumps(body).encode()
        abandoned = abandoned or threading.Event()
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._once(path, content)
            except _Failed as failure:
                # Spread, or all that a server turned away would come back at the same moment.
                pause = BACKOFF_S * 2 ** (attempt - 1) * random.SystemRandom().uniform(1.0, 1.5)
                last = not failure.again or attempt > self.retries
                if last or abandoned.wait(min(failure.after_s or pause, LONGEST_BACKOFF_S)):
                    times = f" ({attempt} times)" if attempt > 1 else ""
                    raise InputError(f"server {self.url}{path}: {failure}{times}") from None

    def refuse(self, found: str, wanted: str) -> NoReturn:
        """Raise what an answer is and what it should be."""
        raise InputError(f"server {self.url}: {found}, expected {wanted}")

    def _once(self, path: str, content: bytes | None) -> dict[str, Any]:
        method = "GET" if content is None else "POST"
        while True:
            connection, used = self._borrow()
            try:
                connection.request(method, self._base + path, content, self._headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                # A server may drop an idle connection just as a request leaves on it.
                if used and isinstance(error, ConnectionError):
                    continue
                raise _Failed(self._reason(error), again=True) from None
            try:
                answer = response.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                raise _Failed(self._reason(error), again=True) from None
            if response.will_close:
                connection.close()
            else:
                with self._lock:
                    self._idle.append(connection)
            return _object(response, answer)

    def _borrow(self) -> tuple[http.client.HTTPConnection, bool]:
        """A connection, and whether it was used before."""
        with self._lock:
            if self._idle:
                return self._idle.pop(), True
        where = self._host, self._port
        if self._tls is None:
            return http.client.HTTPConnection(*where, timeout=self.timeout_s), False
        secure = http.client.HTTPSConnection(*where, timeout=self.timeout_s, context=self._tls)
        return secure, False

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"silent for {self.timeout_s:g} s"
        if isinstance(error, ConnectionRefusedError):
            return "connection refused"
        if isinstance(error, ConnectionError | http.client.IncompleteRead):
            return "the server hung up"
        if isinstance(error, socket.gaierror):
            return f"no such host: {error.strerror}"
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _object(response: http.client.HTTPResponse, answer: bytes) -> dict[str, Any]:
    excerpt = " ".join(answer[:200].decode(errors="replace").split())
    if response.status != 200:
        after = response.headers.get("Retry-After") or ""
        raise _Failed(
            f"status {response.status} {response.reason}: {excerpt}".rstrip(": "),
            again=response.status == 429 or response.status >= 500,
            after_s=float(after) if after.isdigit() else None,
        )
    try:
        found = json.loads(answer)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _Failed(f"answers {excerpt!r:.120}, expected a JSON object", again=False)
    return found
