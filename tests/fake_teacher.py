"""An OpenAI-compatible server of a small model, in a thread of this process, for tests.

    with FakeTeacher(model, style="vllm") as server:
        ... server.url, server.requests, server.connections

It answers by token ids as an engine of that style does ("vllm", "sglang", or "echo" for others);
"text" tells neither ids nor log-probabilities. What it samples is a function of model, prompt and
seed. `fault` says what goes wrong, from request `healthy` on: "500" (once), "down" (500 for good),
"429", "400", "hang up" (once), "silent", "json" (none), "list" (JSON, but no object), "short" (one
position less), "few" (one likely token less), "other" and "more" (it read another token, or one
more), "hot" (probabilities above 1), "nan", "none" (no log-probabilities), "choices" (none). The
standard library and torch only, nothing of slmperf: it is the yardstick.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class FakeTeacher:
    def __init__(
        self, model, style="vllm", *, name="teacher", fault=None, healthy=0, delay_s=0.0, key=None
    ):
        self.model, self.style, self.name, self.key = model.eval(), style, name, key
        self.fault, self.healthy, self.delay_s = fault, healthy, delay_s
        self.tokenizer = None  # for style "text"
        self.context = None  # max_model_len
        self.requests, self.connections, self.lock = [], 0, threading.Lock()
        self.under_way = self.most_under_way = 0
        self.closing = threading.Event()

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are two writes

            def setup(self):
                super().setup()
                with outer.lock:
                    outer.connections += 1

            def log_message(self, *_):
                pass

            def do_GET(self):
                owner = outer.style if outer.style in ("vllm", "sglang") else "someone"
                card = {"id": outer.name, "owned_by": owner, "max_model_len": outer.context}
                self.answer(200, {"data": [card]} if self.path == "/v1/models" else {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.handle(self, self.path, body)

            def answer(self, status, content):
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # shutdown() waits for the next poll.
        serve = {"poll_interval": 0.01}
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs=serve, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def handle(self, handler, path, body):
        with self.lock:
            self.requests.append(body)
            fault = self.fault if len(self.requests) > self.healthy else None
            if fault in ("500", "hang up", "429"):
                self.fault = None
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            time.sleep(self.delay_s)
            if self.key is not None and handler.headers["Authorization"] != f"Bearer {self.key}":
                return handler.answer(401, {"error": "who are you?"})
            if fault in ("500", "down"):
                return handler.answer(500, {"error": {"message": "out\nof memory"}})
            if fault in ("429", "400"):
                return handler.answer(int(fault), {"error": {"message": "max_logprobs is 20"}})
            if fault == "silent":
                return self.closing.wait()
            if fault == "hang up":
                handler.close_connection = True
                return handler.connection.close()
            if fault in ("json", "list"):
                return handler.answer(200, {"json": b'{"choices": [', "list": b"[1]"}[fault])
            with self.lock, torch.no_grad():
                answer = (
                    self.generate(body, fault) if path == "/generate" else self.write(body, fault)
                )
            return handler.answer(200, answer)
        finally:
            with self.lock:
                self.under_way -= 1

    # Log-probabilities.

    def listing(self, ids, top_k, fault):
        """Tokens read, and after the first of them the likely (token, log-probability) of each."""
        if fault == "other":
            ids = [*ids[:-1], ids[-1] ^ 1]
        if fault == "more":
            ids = [*ids, 1]
        logits = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        rows = []
        for place, token in enumerate(ids[1:]):
            values, indices = logits[place].topk(top_k - (fault == "few"))
            row = list(zip(indices.tolist(), values.tolist(), strict=True))
            if token not in indices and fault != "few":
                row.insert(0, (token, logits[place, token].item()))  # as engines do
            if fault in ("hot", "nan"):
                row[0] = (row[0][0], 0.5 if fault == "hot" else float("nan"))
            rows.append(row)
        return ids, rows[:-1] if fault == "short" else rows

    def generate(self, body, fault):
        assert self.style == "sglang" and body["sampling_params"]["max_new_tokens"] == 1
        assert body["return_logprob"] and body["logprob_start_len"] == 0
        ids, rows = self.listing(body["input_ids"], body["top_logprobs_num"], fault)
        if fault == "none":
            return {"text": "x", "meta_info": {}}
        told = {
            "input_token_logprobs": [[None, ids[0], None], *([-1.0, one, None] for one in ids[1:])],
            "input_top_logprobs": [
                None,
                *([[value, token, None] for token, value in row] for row in rows),
            ],
        }
        return {"text": "x", "output_ids": [1], "meta_info": told}

    # Text.

    def sample(self, ids, body):
        torch_generator = torch.Generator().manual_seed(body.get("seed") or 0)
        stop, written = set(body.get("stop_token_ids", ())), []
        if self.style == "text":
            stop = {self.tokenizer.eos_token_id}
        while len(written) < body["max_tokens"] and not stop & set(written):
            logits = self.model(torch.tensor([ids + written])).logits[0, -1].float()
            if body["temperature"] == 0:
                written.append(int(logits.argmax()))
                continue
            chances = (logits / body["temperature"]).softmax(-1)
            order = chances.argsort(descending=True)
            before = chances[order].cumsum(0) - chances[order]
            chances[order[before >= body["top_p"]]] = 0
            written.append(int(torch.multinomial(chances, 1, generator=torch_generator)))
        return written, written[-1:] != [] and written[-1] in stop

    def write(self, body, fault):
        assert body["model"] == self.name, body["model"]
        if fault == "choices":
            return {"choices": []}
        ids = body["prompt"]
        if self.style == "text":
            assert isinstance(ids, str)
            assert set(body) <= {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}
            ids = self.tokenizer.encode(ids, add_special_tokens=False)
        body.setdefault("top_p", 1.0)
        written, stopped = self.sample(ids, body)
        choice = {"index": 0, "finish_reason": "stop" if stopped else "length", "text": ""}
        if self.style == "text":
            choice["text"] = self.tokenizer.decode(written[: len(written) - stopped])
            return {"choices": [choice]}
        if fault == "none":
            return {"choices": [choice]}
        if self.style == "vllm":
            choice |= {"token_ids": written, "stop_reason": written[-1] if stopped else None}
            if body.get("prompt_logprobs"):
                ids, rows = self.listing(ids, body["prompt_logprobs"], fault)
                choice["prompt_logprobs"] = [
                    None,
                    *(
                        {str(token): {"logprob": value, "rank": 1} for token, value in row}
                        for row in rows
                    ),
                ]
            if body.get("return_token_ids"):
                choice["prompt_token_ids"] = ids
        elif self.style == "sglang":  # one that leaves out what it stopped at
            choice |= {"matched_stop": written[-1] if stopped else None}
            choice["token_ids"] = written[: len(written) - stopped]
        else:
            rows = []
            if body.get("echo"):
                ids, rows = self.listing(ids, body["logprobs"], fault)
                last = [] if fault == "short" else [[(written[0], -0.1)]]
                ids, rows = ids + written, [None, *rows, *last]
            tokens = ids if body.get("echo") else written
            assert body["return_tokens_as_token_ids"]
            choice["logprobs"] = {
                "tokens": [f"token_id:{token}" for token in tokens],
                "top_logprobs": [
                    None if row is None else {f"token_id:{token}": value for token, value in row}
                    for row in rows
                ],
            }
        return {"choices": [choice]}
