"""Language models behind an OpenAI-compatible HTTP server: what they write, and what they expect.

    POST /v1/completions    text after a prompt, or the k likeliest tokens at a prompt's positions
    GET  /v1/models         which models there are, and whose server it is (owned_by)
    POST /generate          SGLang's own: its /v1/completions names likely tokens by text alone

Prompts and answers are token ids, so that nothing is tokenised twice:

    vLLM      prompt_logprobs, return_token_ids
    SGLang    return_token_ids; log-probabilities from /generate
    others    echo and logprobs, tokens as "token_id:123" (return_tokens_as_token_ids)

A server of another tokenizer, or one that knows text alone, writes through CompletionServer's
`tokenizer`; its log-probabilities are of other tokens, and of no use here.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.distill.http import JsonServer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENGINES = ("vllm", "sglang")  # as owned_by names them
# An engine's defaults come from the model's generation_config.json: what is not asked for is off.
_PLAIN_SAMPLING = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}

Rows = list[dict[int, float]]  # {token: log-probability} at each place but the first


class TopTokens(NamedTuple):
    """The k likeliest tokens at the positions of a sequence of L tokens, likeliest first.

    indices    (L - 1, k) int64; row t predicts token t + 1
    log_probs  (L - 1, k) fp32
    """

    indices: Tensor
    log_probs: Tensor


class CompletionServer:
    """One model of an OpenAI-compatible server.

    url        http(s)://HOST[:PORT], with or without a path and /v1
    model      its id there; None: the first that the server names
    tokenizer  of the prompts' and answers' ids. With it they travel as text, so that the server's
               model may have another one; None: as ids
    others     see slmperf.distill.http.JsonServer

    Threads may share it. Whatever a server does wrong is an InputError with its URL.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        parallel: int = 8,
        timeout_s: float = 120.0,
        retries: int = 2,
    ) -> None:
        self._http = JsonServer(
            url.rstrip("/").removesuffix("/completions").removesuffix("/v1"),
            api_key=api_key,
            parallel=parallel,
            timeout_s=timeout_s,
            retries=retries,
        )
        self.url, self.model, self.tokenizer = self._http.url, model, tokenizer
        self._owner: str | None = None  # of the model, once the server was asked
        self.context: int | None = None  # tokens of prompt and answer together, where it is told

    def check(self) -> str:
        """The model's id, once the server has confirmed that it serves it."""
        models = self._http.ask("/v1/models").get("data")
        try:
            cards = {str(one["id"]): dict(one) for one in models or ()}
        except (TypeError, KeyError, ValueError):
            self._http.refuse(f"/v1/models names {models!r:.80}", "a list of models with ids")
        model = self.model or next(iter(cards), None)
        if model is None or model not in cards:
            found = ", ".join(cards) or "no model"
            self._http.refuse(f"serves {found}", "one" if model is None else f"model {model!r}")
        self.model, self._owner = model, str(cards[model].get("owned_by"))
        context = cards[model].get("max_model_len")
        self.context = context if type(context) is int else None
        return model

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        seeds: Sequence[int],
        stop: frozenset[int] = frozenset(),
    ) -> list[list[int]]:
        """What the model writes after each prompt, without the prompt, in the prompts' order.

        new_tokens   one for each prompt: at most so many
        temperature  0: the likeliest token at each step
        seeds        one for each prompt, 0 <= seed < 2^31; SGLang heeds them only where it was
                     started with --enable-deterministic-inference
        stop         a text ends behind the first of these tokens; at the model's own end tokens it
                     ends as well

        Through text, a server tells that a text has ended but not with which token: the tokenizer's
        end of sequence, where it is in `stop`, or else the least of `stop` is put there.
        """
        self._settle()
        body: dict[str, Any] = {"model": self.model, "temperature": temperature, "top_p": top_p}
        if self._owner in _ENGINES:
            body.update(_PLAIN_SAMPLING)
        if self.tokenizer is None:
            body.update(return_token_ids=True, stop_token_ids=sorted(stop))
            if self._owner not in _ENGINES:
                body.update(logprobs=1, return_tokens_as_token_ids=True)

        def one(asked: tuple[Sequence[int], int, int], abandoned: threading.Event) -> list[int]:
            prompt, most, seed = asked
            own = {"prompt": self._outgoing(prompt), "max_tokens": int(most), "seed": int(seed)}
            choice = self._choice(self._http.ask("/v1/completions", body | own, abandoned))
            written = self._incoming(choice, stop)[: int(most)]
            ends = [at for at, token in enumerate(written) if token in stop]
            return written[: ends[0] + 1] if ends else written

        return self._http.each(one, list(zip(prompts, new_tokens, seeds, strict=True)))

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]], top_k: int) -> list[TopTokens]:
        """The k likeliest tokens and their log-probabilities at all positions of each sequence.

        InputError for a server that cannot tell, tells of fewer, or saw other tokens.
        """
        if self.tokenizer is not None:
            raise InputError(
                f"server {self.url}: log-probabilities through a tokenizer, expected "
                "tokenizer=None: they are of tokens, which must be the same"
            )
        self._settle()
        ask = self._from_sglang if self._owner == "sglang" else self._from_openai

        def one(sequence: Sequence[int], abandoned: threading.Event) -> TopTokens:
            ids = [int(token) for token in sequence]
            if len(ids) < 2:
                return TopTokens(torch.empty(0, top_k).long(), torch.empty(0, top_k))
            tokens, rows = ask(ids, top_k, abandoned)
            for at, (found, sent) in enumerate(zip_longest(tokens, ids)):
                if found != sent:
                    self._http.refuse(
                        f"read {'no token' if found is None else found} at place {at} of a prompt",
                        f"{'its end' if sent is None else sent}, as was sent",
                    )
            return self._top(rows, len(ids) - 1, top_k)

        return self._http.each(one, sequences)

    # The dialects of log-probabilities: which tokens the server read, and the likely ones.

    def _from_openai(
        self, ids: list[int], top_k: int, abandoned: threading.Event
    ) -> tuple[list[int], Rows]:
        # One token is always written; temperature 1 leaves the likely ones as they are.
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 1.0}
        if self._owner == "vllm":
            body |= {"prompt_logprobs": top_k, "return_token_ids": True}
        else:
            body |= {"echo": True, "logprobs": top_k, "return_tokens_as_token_ids": True}
        choice = self._choice(self._http.ask("/v1/completions", body, abandoned))
        try:
            if self._owner == "vllm":
                top = choice["prompt_logprobs"][1:]
                rows = [
                    {int(token): float(told["logprob"]) for token, told in row.items()}
                    for row in top
                ]
                return list(choice["prompt_token_ids"]), rows
            told = choice["logprobs"]
            # The last one was written, not read.
            tokens = [_id_of(name) for name in told["tokens"]]
            tokens = tokens[: max(len(tokens) - 1, len(ids))]
            top = told["top_logprobs"][1 : len(tokens)]
            return tokens, [{_id_of(name): float(row[name]) for name in row} for row in top]
        except (KeyError, TypeError, ValueError, AttributeError):
            self._http.refuse(
                f"tells no log-probabilities of a prompt's tokens by their ids: {choice!r:.120}",
                "prompt_logprobs and prompt_token_ids (vLLM >= 0.10.2), or echo and logprobs "
                "with tokens as 'token_id:123'",
            )

    def _from_sglang(
        self, ids: list[int], top_k: int, abandoned: threading.Event
    ) -> tuple[list[int], Rows]:
        body = {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": top_k,
        }
        answer = self._http.ask("/generate", body, abandoned)
        try:
            told = answer["meta_info"]
            tokens = [int(token) for _, token, *_ in told["input_token_logprobs"]]
            top = told["input_top_logprobs"][1:]
            return tokens, [{int(one[1]): float(one[0]) for one in row} for row in top]
        except (KeyError, TypeError, ValueError):
            self._http.refuse(
                f"/generate tells no log-probabilities of a prompt: {answer!r:.120}",
                "meta_info with input_token_logprobs and input_top_logprobs",
            )

    def _top(self, rows: Rows, count: int, top_k: int) -> TopTokens:
        """The k likeliest of each row: servers add the prompt's own token where it is not one."""
        if len(rows) != count:
            self._http.refuse(f"tells of {len(rows)} places of a prompt", f"{count}")
        indices = np.empty((count, top_k), np.int64)
        log_probs = np.empty((count, top_k), np.float32)
        for at, row in enumerate(rows):
            best = sorted(row.items(), key=_less_likely)[:top_k]
            if len(best) < top_k:
                self._http.refuse(f"tells {len(best)} tokens at a place", f"top_k = {top_k}")
            indices[at] = [token for token, _ in best]
            log_probs[at] = [value for _, value in best]
        mass = np.exp(log_probs.astype(np.float64)).sum(axis=1)
        fine = mass < 1.01  # False for NaN
        if not fine.all():
            worst = mass[int(fine.argmin())]
            self._http.refuse(f"tells probabilities that sum to {worst:.4g}", "at most 1")
        return TopTokens(torch.from_numpy(indices), torch.from_numpy(log_probs))

    # What travels, and what comes back.

    def _settle(self) -> None:
        if self._owner is None:
            self.check()

    def _choice(self, answer: dict[str, Any]) -> dict[str, Any]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            self._http.refuse(f"answers {answer!r:.120}", "one choice")
        return choices[0]

    def _outgoing(self, prompt: Sequence[int]) -> list[int] | str:
        ids = [int(token) for token in prompt]
        if not ids:
            raise InputError(f"server {self.url}: a prompt is empty, expected at least one token")
        if self.tokenizer is None:
            return ids
        if ids[0] == self.tokenizer.bos_token_id:
            ids = ids[1:]  # the server's tokenizer puts its own there
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _incoming(self, choice: dict[str, Any], stop: frozenset[int]) -> list[int]:
        """The ids of what was written, with the one it ended with."""
        stopped = choice.get("finish_reason") == "stop"
        if self.tokenizer is not None:
            text = choice.get("text")
            if not isinstance(text, str):
                self._http.refuse(f"answers {choice!r:.120}", "a text")
            written = list(self.tokenizer.encode(text, add_special_tokens=False))
            end = self.tokenizer.eos_token_id
            return written + ([end] if end in stop else sorted(stop)[:1]) * stopped
        ids: Any = choice.get("token_ids")
        if ids is None:
            try:
                ids = [_id_of(name) for name in choice["logprobs"]["tokens"]]
            except (KeyError, TypeError, ValueError, AttributeError):
                self._http.refuse(
                    f"answers without token ids: {choice!r:.120}",
                    "token_ids, or tokens as 'token_id:123', or a tokenizer= here to make them",
                )
        if not isinstance(ids, list) or not all(type(one) is int and one >= 0 for one in ids):
            self._http.refuse(f"answers with token_ids {ids!r:.80}", "a list of numbers >= 0")
        end = choice.get("stop_reason", choice.get("matched_stop"))
        # Some leave out the token that they stopped at.
        return [*ids, end] if stopped and type(end) is int and ids[-1:] != [end] else ids


def _id_of(name: str) -> int:
    """123 of "token_id:123"; ValueError for another text."""
    kind, _, number = name.partition(":")
    if kind != "token_id":
        raise ValueError(name)
    return int(number)


def _less_likely(entry: tuple[int, float]) -> float:
    return -entry[1]
