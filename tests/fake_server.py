"""Fakes of known delays for the load generator: a function for a clock, and an HTTP server.

Both take a prompt's prefix for known by its first 16 tokens (ids or words). The first prompt of a
prefix is cold, every later one is hot; each has its first token a fixed time after it arrived,
whatever else is under way, and the following ones at a fixed distance.

    python tests/fake_server.py '{"cold_ms": 100, "hot_ms": 10}'

serves until its standard input ends and prints its port first. The standard library only, nothing
of slmperf: it is the yardstick. `fault` says what it does from request `healthy` on (the probe of a
load counts): "500", "json" (no JSON), "http" (no HTTP), "hang up" (in the middle), "empty" (no
tokens), "plain" (no stream), "error" (an error in the stream), "stall", "drop" (once, no answer).
"""

import asyncio
import json
import sys
import time

COLD_MS, HOT_MS, TOKEN_MS = 100, 10, 5


class FakeEngine:
    """An in-process endpoint's function with exact delays on the clock it is given."""

    def __init__(self, clock, cold_ms=COLD_MS, hot_ms=HOT_MS, token_ms=TOKEN_MS):
        self.clock = clock
        self.delays_ns = [round(ms * 1e6) for ms in (cold_ms, hot_ms, token_ms)]
        self.seen = set()

    async def __call__(self, prompt, token):
        cold_ns, hot_ns, token_ns = self.delays_ns
        known = tuple(prompt.prefix[:16])
        when = self.clock.now_ns() + (hot_ns if known in self.seen else cold_ns)
        self.seen.add(known)
        for place in range(prompt.output_tokens):
            await self.clock.sleep_until(when + place * token_ns)
            token()


class Waiting:
    """asyncio's timers may be late by a millisecond, so the end is slept in naps: one for all."""

    def __init__(self):
        self.near = []

    async def until(self, when):
        await asyncio.sleep(max(0, when - time.perf_counter() - 0.002))
        self.near.append(when)
        while (left := when - time.perf_counter()) > 0:
            if when == min(self.near):
                time.sleep(min(left, 1e-4))
            await asyncio.sleep(0)
        self.near.remove(when)


class Server:
    def __init__(
        self, cold_ms=COLD_MS, hot_ms=HOT_MS, token_ms=TOKEN_MS, fault=None, healthy=0, model="fake"
    ):
        self.cold_ms, self.hot_ms, self.token_ms = cold_ms, hot_ms, token_ms
        self.fault, self.healthy, self.model = fault, healthy, model
        self.seen = set()
        self.requests = 0
        self.waiting = Waiting()

    async def serve(self):
        server = await asyncio.start_server(self.connection, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)

    async def connection(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                arrived = time.perf_counter()
                length = [line[15:] for line in head.split("\r\n") if line.startswith("Content-Le")]
                body = await reader.readexactly(int(length[0]) if length else 0)
                method, path, _ = head.split(" ", 2)
                await self.answer(writer, method, path, body, arrived)
        except (EOFError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, writer, method, path, body, arrived):
        if (method, path) == ("GET", "/v1/models"):
            return self.whole(writer, {"data": [{"id": self.model}]})
        kinds = {"/v1/completions": self.completions, "/v1/score": self.score}
        if method != "POST" or path not in kinds:
            return self.whole(writer, {"error": "no such path"}, "404 Not Found")
        self.requests += 1
        fault = self.fault if self.requests > self.healthy else None
        if fault == "500":
            return self.whole(writer, {"error": "out of memory"}, "500 Internal Server Error")
        if fault == "drop" and self.requests == self.healthy + 1:
            return writer.close()
        if fault == "http":
            writer.write(b"220 ready for mail\r\n\r\n")
            return None
        request = json.loads(body)
        wrong = self.wrong(request, path)
        if wrong:
            return self.whole(writer, {"error": wrong}, "400 Bad Request")
        return await kinds[path](writer, request, arrived, fault)

    def wrong(self, request, path):
        """What a strict server would find wrong with a request."""
        if request.get("model") != self.model:
            return f"no model {request.get('model')!r}"
        if path == "/v1/score":
            parts = [request["query"], *request["items"]]
            fits = isinstance(request["label_token_ids"], list) and len(request["items"])
        else:
            parts = [request["prompt"]]
            fits = request["stream"] is True and request["max_tokens"] >= 1
        are_ids = all(isinstance(part, list) and set(map(type, part)) == {int} for part in parts)
        are_text = all(isinstance(part, str) for part in parts)
        return None if fits and (are_ids or are_text) else "wrong fields"

    def arrival(self, part):
        """(cold, tokens) of a prompt or query."""
        tokens = part.split() if isinstance(part, str) else part
        known = tuple(tokens[:16])
        cold = known not in self.seen
        self.seen.add(known)
        return cold, len(tokens)

    def first_token(self, cold, arrived):
        return arrived + (self.cold_ms if cold else self.hot_ms) * 1e-3

    async def completions(self, writer, request, arrived, fault):
        cold, count = self.arrival(request["prompt"])
        if fault == "plain":
            return self.whole(writer, {"choices": [{"text": "a"}]})
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        tokens = 0 if fault in ("empty", "error") else request["max_tokens"]
        when = self.first_token(cold, arrived)
        for place in range(tokens):
            await self.waiting.until(when + place * self.token_ms * 1e-3)
            self.event(writer, json.dumps({"choices": [{"index": 0, "text": " a"}], "usage": None}))
            if fault == "hang up":
                return writer.close()
            if fault == "stall":
                await asyncio.sleep(60)
            if fault == "json":
                self.event(writer, '{"choices": [')
        if fault == "error":
            self.event(writer, json.dumps({"error": {"message": "preempted"}}))
        usage = {
            "prompt_tokens": count,
            "completion_tokens": tokens,
            "prompt_tokens_details": {"cached_tokens": 0 if cold else 16},
        }
        if request.get("stream_options", {}).get("include_usage"):
            self.event(writer, json.dumps({"choices": [], "usage": usage}))
        self.event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")

    async def score(self, writer, request, arrived, fault):
        cold, count = self.arrival(request["query"])
        await self.waiting.until(self.first_token(cold, arrived))
        if fault == "json":
            return self.whole(writer, "scores")
        if fault == "empty":
            return self.whole(writer, {"scores": []})
        lengths = [len(self.split(item)) for item in request["items"]]
        usage = {"prompt_tokens": sum(lengths) + count * len(lengths), "completion_tokens": 0}
        scores = [[0.5] * len(request["label_token_ids"]) for _ in lengths]
        self.whole(writer, {"scores": scores, "object": "scoring", "usage": usage})

    @staticmethod
    def split(part):
        return part.split() if isinstance(part, str) else part

    @staticmethod
    def whole(writer, content, status="200 OK"):
        body = json.dumps(content).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    @staticmethod
    def event(writer, data):
        body = f"data: {data}\n\n".encode()
        # In two chunks, as they may be cut anywhere.
        for part in (body[:7], body[7:]):
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")


if __name__ == "__main__":
    asyncio.run(Server(**json.loads(sys.argv[1])).serve())
