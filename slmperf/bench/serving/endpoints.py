"""Which endpoint a text names: a server, a function of one's own, or this process's engine."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from slmperf.bench.serving.http import Completions, Score, address
from slmperf.bench.serving.load import Endpoint, Failure, Token, Usage
from slmperf.bench.serving.workloads import Prompt
from slmperf.check import InputError


class Function:
    """A function as an endpoint: `function(prompt, token)` calls token() as tokens come.

    It may be `async`; if it is not, each call has a thread, so that none waits for another. It
    may return a Usage, or nothing. A call that takes longer than `timeout_s` is a failed request;
    a thread cannot be ended, so that one goes on unheard.
    """

    together = False

    def __init__(
        self, function: Callable[[Prompt, Token], Any], *, timeout_s: float | None = None
    ) -> None:
        self.function = function
        self.timeout_s = timeout_s
        called = function if inspect.isroutine(function) else type(function).__call__
        self._is_async = inspect.iscoroutinefunction(called)

    async def start(self, prompts: Sequence[Prompt]) -> None:
        """Nothing to prepare."""

    async def send(self, prompts: Sequence[Prompt], token: Token) -> Usage:
        """Call the function; what it raises is a failed request."""
        (prompt,) = prompts
        try:
            async with asyncio.timeout(self.timeout_s) as limit:
                if self._is_async:
                    usage = await self.function(prompt, token)
                else:
                    usage = await asyncio.wrap_future(self._begin(prompt, token))
        except TimeoutError:
            if not limit.expired():  # the function's own
                raise
            raise Failure(f"no answer within {self.timeout_s:g} s") from None
        return usage if isinstance(usage, Usage) else Usage()

    def _begin(self, prompt: Prompt, token: Token) -> Future[Any]:
        """Call the function in a thread that does not keep the process from ending."""
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()

        def call() -> None:
            try:
                answer.set_result(self.function(prompt, token))
            except BaseException as error:  # whatever it is, who waits for the answer raises it
                answer.set_exception(error)

        threading.Thread(target=call, daemon=True).start()
        return answer

    async def stop(self) -> None:
        """Nothing to close."""


def open_endpoint(
    what: str, *, model: str | None = None, api_key: str | None = None, timeout_s: float = 600.0
) -> Endpoint:
    """An endpoint from its name.

    what    http(s)://HOST:PORT[/v1/completions | /v1/score], or MODULE:FUNCTION (see Function),
            found from the current folder too
    model   the name that a server knows its model by; None asks it

    Raises InputError for anything else. Whether a server answers shows when the load starts.
    """
    if not 0 < timeout_s < math.inf:
        raise InputError(f"timeout_s is {timeout_s}, expected a number of seconds above 0")
    if "://" in what:
        where = address(what)
        kind = Score if where.path.endswith("score") else Completions
        return kind(where, model=model, api_key=api_key, timeout_s=timeout_s)
    module, colon, name = what.partition(":")
    if not (colon and name.isidentifier() and all(map(str.isidentifier, module.split(".")))):
        raise InputError(f"endpoint is {what!r}, expected http://HOST:PORT or MODULE:FUNCTION")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"endpoint {what}: {error}") from None
    if not callable(function):
        raise InputError(f"endpoint {what}: expected a function, found {type(function).__name__}")
    return Function(function, timeout_s=timeout_s)
