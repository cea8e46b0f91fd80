"""Servers as endpoints of a load: OpenAI's /v1/completions, streamed, and SGLang's /v1/score.

One asyncio loop holds all connections: requests of one release leave in the order of its prompts,
the cold one first, and a thousand outstanding answers need no thousand threads. Connections are
kept and reused; bodies are encoded before the load begins. Imports no torch.
"""

from __future__ import annotations

import asyncio
import errno
import http.client
import io
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from slmperf.bench.serving.load import Failure, Token, Usage
from slmperf.bench.serving.workloads import Prompt
from slmperf.check import InputError

PATHS = ("/v1/completions", "/v1/score")
PROBE_S = 20.0  # a server that takes longer for eight tokens is not ready for a load
# Yes and no of a score request: the time does not depend on which ids they are.
LABEL_IDS = (1, 2)


class Address(NamedTuple):
    """Where a server listens, and what is asked of it."""

    url: str
    host: str
    port: int
    path: str
    encrypted: bool


def address(url: str) -> Address:
    """http(s)://HOST[:PORT] with /v1/completions (the default) or /v1/score; InputError if not."""
    wanted = "expected http://HOST:PORT, followed by /v1/completions (the default) or /v1/score"
    try:
        parts = urlsplit(url)
        port = parts.port
        (parts.hostname or "").encode("idna")  # as it goes to the resolver: no empty label
    except ValueError:
        raise InputError(f"endpoint is {url!r}, {wanted}") from None
    path = parts.path.rstrip("/")
    if path in ("", "/v1"):
        path = PATHS[0]
    if parts.scheme not in ("http", "https") or not parts.hostname or path not in PATHS:
        raise InputError(f"endpoint is {url!r}, {wanted}")
    encrypted = parts.scheme == "https"
    port = port or (443 if encrypted else 80)
    return Address(f"{parts.scheme}://{parts.netloc}{path}", parts.hostname, port, path, encrypted)


class _Connection:
    """One HTTP/1.1 connection; one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.reusable = True
        self.used = False

    @property
    def open(self) -> bool:
        """False once the server has hung up, which it may do between two requests."""
        return self.reusable and not self.reader.at_eof() and not self.writer.is_closing()

    async def ask(self, request: bytes) -> tuple[int, http.client.HTTPMessage]:
        """Send a request; status and headers of the answer."""
        # What the system does not take at once goes out while the answer is awaited.
        self.writer.write(request)
        raw = await self.reader.readuntil(b"\r\n\r\n")
        first, _, rest = raw.partition(b"\r\n")
        version, _, status = first.partition(b" ")
        if not version.startswith(b"HTTP/1.") or not status[:3].isdigit():
            raise Failure(f"no HTTP answer, found {first[:40]!r}")
        headers = http.client.parse_headers(io.BytesIO(rest))
        self.reusable = (headers.get("Connection") or "").lower() != "close"
        return int(status[:3]), headers

    async def body(self, headers: http.client.HTTPMessage) -> AsyncIterator[bytes]:
        """The body, in pieces as they come (RFC 9112, section 6)."""
        if (headers.get("Transfer-Encoding") or "").lower() == "chunked":
            while size := await self._chunk_size():
                piece = await self.reader.readexactly(size + 2)  # with its line end
                yield piece[:-2]
            while (await self.reader.readuntil(b"\n")).strip():
                pass  # trailers
            return
        if "Content-Length" in headers:
            yield await self.reader.readexactly(int(headers["Content-Length"]))
            return
        self.reusable = False  # such a body ends where the connection does
        while piece := await self.reader.read(65536):
            yield piece

    async def _chunk_size(self) -> int:
        line = await self.reader.readuntil(b"\n")
        try:
            return int(line.split(b";")[0], 16)
        except ValueError:
            raise Failure(f"expected the size of a chunk, found {line[:40]!r}") from None

    def close(self) -> None:
        """Hang up."""
        self.reusable = False
        self.writer.close()


class _Server:
    """What both kinds of request share: connections, the probe, bodies, failures."""

    together = False

    def __init__(
        self, where: Address, *, model: str | None, api_key: str | None, timeout_s: float
    ) -> None:
        self.where = where
        self.model = model
        self.timeout_s = timeout_s
        host = f"[{where.host}]" if ":" in where.host else where.host
        self._fixed = f"Host: {host}:{where.port}\r\nAccept: */*\r\n"
        if api_key:
            self._fixed += f"Authorization: Bearer {api_key}\r\n"
        self._tls = ssl.create_default_context() if where.encrypted else None
        self._idle: list[_Connection] = []
        self._encoded: dict[int, bytes] = {}  # by the identity of a part of a prompt

    async def start(self, prompts: Sequence[Prompt]) -> None:
        """Encode all prompts, ask the server for its model's name and for one small answer."""
        for part in (part for prompt in prompts for part in (prompt.prefix, prompt.suffix)):
            if id(part) not in self._encoded:
                self._encoded[id(part)] = _encode(part)
        try:
            async with asyncio.timeout(PROBE_S):
                await self._probe(prompts)
        except TimeoutError:
            raise InputError(f"endpoint {self.where.url}: no answer within {PROBE_S:g} s") from None
        except (OSError, EOFError, ValueError, Failure, asyncio.LimitOverrunError) as error:
            raise InputError(f"endpoint {self.where.url}: {_reason(error)}") from None

    async def _probe(self, prompts: Sequence[Prompt]) -> None:
        # As many connections as two releases need, so that hardly any is opened under load.
        most = 2 * max((prompt.place + 1 for prompt in prompts), default=1)
        self._idle = [await self._connect() for _ in range(min(most, 64))]
        if self.model is None:
            async with self._answer("GET", "/v1/models", b"") as (status, _, pieces):
                content = b"".join([piece async for piece in pieces])
            if status == 200:
                self.model = _first_model(content)
        if prompts:
            # Words or ids from the middle of a prompt: no prefix of anything that follows.
            first = prompts[0]
            one = Prompt(-1, 0, first.prefix[-8:], first.suffix[-8:], 16, 1)
            # The end of a text that is no longer is that text itself: it stays encoded.
            own = {id(part): _encode(part) for part in (one.prefix, one.suffix)}
            own = {key: encoded for key, encoded in own.items() if key not in self._encoded}
            self._encoded |= own
            seen: list[None] = []
            await self.send([one], lambda *_: seen.append(None))
            for key in own:
                del self._encoded[key]
            if not seen:
                raise Failure("the answer held no token")

    async def send(self, prompts: Sequence[Prompt], token: Token) -> Usage:
        """One request and its answer; Failure where there is none within the time limit."""
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._ask(prompts, token)
        except TimeoutError:
            raise Failure(f"no answer within {self.timeout_s:g} s") from None
        except (OSError, EOFError, asyncio.LimitOverrunError) as error:
            raise Failure(_reason(error)) from None

    async def _ask(self, prompts: Sequence[Prompt], token: Token) -> Usage:
        raise NotImplementedError

    async def stop(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        self._encoded.clear()

    def _answer(self, method: str, path: str, body: bytes) -> _Answer:
        head = f"{method} {path} HTTP/1.1\r\n{self._fixed}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return _Answer(self, f"{head}\r\n".encode() + body)

    async def _connect(self) -> _Connection:
        return _Connection(
            *await asyncio.open_connection(self.where.host, self.where.port, ssl=self._tls)
        )

    async def borrow(self) -> _Connection:
        """An idle connection, or a new one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
            connection.close()
        return await self._connect()

    def give_back(self, connection: _Connection) -> None:
        """Keep a connection for the next request, if it can take one."""
        if connection.open:
            self._idle.append(connection)
        else:
            connection.close()

    def _body(self, fields: dict[str, Any], **encoded: bytes) -> bytes:
        """A JSON object of plain fields and of fields that are encoded already."""
        parts = [
            json.dumps(name).encode() + b":" + json.dumps(value).encode()
            for name, value in fields.items()
            if value is not None
        ]
        parts += [json.dumps(name).encode() + b":" + value for name, value in encoded.items()]
        return b"{" + b",".join(parts) + b"}"

    def _whole(self, prompt: Prompt) -> bytes:
        """Prefix and suffix as one JSON value."""
        prefix, suffix = self._encoded[id(prompt.prefix)], self._encoded[id(prompt.suffix)]
        return prefix[:-1] + (b"" if prefix[:1] == b'"' else b",") + suffix[1:]


class _Answer:
    """The context in which an answer is read; afterwards its connection is free or closed."""

    def __init__(self, server: _Server, request: bytes) -> None:
        self._server, self._request = server, request
        self._connection: _Connection | None = None

    async def __aenter__(self) -> tuple[int, http.client.HTTPMessage, AsyncIterator[bytes]]:
        while True:
            self._connection = connection = await self._server.borrow()
            again, connection.used = connection.used, True
            try:
                status, headers = await connection.ask(self._request)
                return status, headers, connection.body(headers)
            except (ConnectionError, asyncio.IncompleteReadError):
                connection.close()
                # A server may drop an idle connection just as a request leaves on it.
                if not again:
                    raise
            except BaseException:
                connection.close()
                raise

    async def __aexit__(self, kind: object, *_: object) -> None:
        assert self._connection is not None
        if kind is None:
            self._server.give_back(self._connection)
        else:  # something of the answer may be unread
            self._connection.close()


class Completions(_Server):
    """/v1/completions, streamed: one request per prompt, its first event is the first token."""

    async def _ask(self, prompts: Sequence[Prompt], token: Token) -> Usage:
        (prompt,) = prompts
        body = self._body(
            {
                "model": self.model,
                "max_tokens": prompt.output_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            prompt=self._whole(prompt),
        )
        usage = Usage()
        async with self._answer("POST", self.where.path, body) as (status, headers, pieces):
            await _refuse(status, headers, pieces, "text/event-stream")
            async for data in _events(pieces):
                if data == b"[DONE]":
                    continue
                event = _object(data)
                if event.get("error"):
                    raise Failure(f"error in the stream: {event['error']}")
                if event.get("choices"):
                    token()
                usage = _usage(event) or usage
        return usage


class Score(_Server):
    """/v1/score as SGLang has it: all prompts of a release in one request, the prefix sent once."""

    together = True

    async def _ask(self, prompts: Sequence[Prompt], token: Token) -> Usage:
        items = b",".join(self._encoded[id(prompt.suffix)] for prompt in prompts)
        body = self._body(
            {
                "model": self.model or "default",
                "label_token_ids": list(LABEL_IDS),
                "apply_softmax": True,
                "item_first": False,
            },
            query=self._encoded[id(prompts[0].prefix)],
            items=b"[" + items + b"]",
        )
        async with self._answer("POST", self.where.path, body) as (status, headers, pieces):
            await _refuse(status, headers, pieces, "application/json")
            content = _object(b"".join([piece async for piece in pieces]))
            scores = content.get("scores")
            if not isinstance(scores, list) or len(scores) != len(prompts):
                raise Failure(f"expected scores of {len(prompts)} items, found {scores!r:.80}")
            token()
        # Of the usage only what was read: a score has no output tokens.
        usage = _usage(content) or Usage()
        return usage._replace(output_tokens=None)


async def _refuse(
    status: int, headers: http.client.HTTPMessage, pieces: AsyncIterator[bytes], wanted: str
) -> None:
    """Failure for another status than 200 or another type of content."""
    found = headers.get_content_type()
    if status == 200 and found == wanted:
        return
    content = b"".join([piece async for piece in pieces])[:200].decode(errors="replace")
    if status != 200:
        reason = http.client.responses.get(status, "")
        raise Failure(f"status {status} {reason}: {content}".rstrip(": "))
    raise Failure(f"expected {wanted}, found {found}")


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data lines of server-sent events (WHATWG HTML, 9.2)."""
    left = b""
    async for piece in pieces:
        *lines, left = (left + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        raise Failure(f"expected JSON, found {data[:60]!r}") from None
    if not isinstance(value, dict):
        raise Failure(f"expected a JSON object, found {data[:60]!r}")
    return value


def _usage(event: dict[str, Any]) -> Usage | None:
    usage = event.get("usage")
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    return Usage(
        input_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
        cached_tokens=details.get("cached_tokens") if isinstance(details, dict) else None,
    )


def _first_model(content: bytes) -> str | None:
    """The name of the first model in an answer to /v1/models, None where there is none."""
    try:
        return str(_object(content)["data"][0]["id"])
    except (Failure, KeyError, IndexError, TypeError):
        return None


def _encode(part: np.ndarray | str) -> bytes:
    """A part of a prompt as JSON: a list of ids or a string."""
    if isinstance(part, str):
        return json.dumps(part).encode()
    return b"[" + ",".join(map(str, part.tolist())).encode() + b"]"


def _reason(error: Exception) -> str:
    # asyncio joins the errors of a name with several addresses into one text.
    if isinstance(error, ConnectionRefusedError) or f"[Errno {errno.ECONNREFUSED}]" in str(error):
        return "connection refused"
    if isinstance(error, EOFError):
        return "the server hung up in the middle of an answer"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())
