"""Which endpoint a text names: a server, a function of one's own, or this process's engine."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from slmperf.bench.http_endpoints import Completions, Score, address
from slmperf.bench.load import Endpoint, Token, Usage
from slmperf.bench.workloads import Prompt
from slmperf.check import InputError


class Function:
    """A function as an endpoint: `function(prompt, token)` calls token() as tokens come.

    It may be `async`; if it is not, each call has a thread, so that none waits for another. It
    may return a Usage, or nothing.
    """

    together = False

    def __init__(self, function: Callable[[Prompt, Token], Any]) -> None:
        self.function = function
        called = function if inspect.isroutine(function) else type(function).__call__
        self._is_async = inspect.iscoroutinefunction(called)
        self._threads: ThreadPoolExecutor | None = None

    async def start(self, prompts: Sequence[Prompt]) -> None:
        """Threads begin when they are needed."""
        if not self._is_async:
            self._threads = ThreadPoolExecutor(max_workers=max(1, len(prompts)))

    async def send(self, prompts: Sequence[Prompt], token: Token) -> Usage:
        """Call the function; what it raises is a failed request."""
        (prompt,) = prompts
        if self._is_async:
            usage = await self.function(prompt, token)
        else:
            call = functools.partial(self.function, prompt, token)
            usage = await asyncio.get_running_loop().run_in_executor(self._threads, call)
        return usage if isinstance(usage, Usage) else Usage()

    async def stop(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def open_endpoint(
    what: str, *, model: str | None = None, api_key: str | None = None, timeout_s: float = 600.0
) -> Endpoint:
    """An endpoint from its name.

    what    http(s)://HOST:PORT[/v1/completions | /v1/score], or MODULE:FUNCTION (see Function),
            found from the current folder too
    model   the name that a server knows its model by; None asks it

    Raises InputError for anything else. Whether a server answers shows when the load starts.
    """
    if timeout_s <= 0:
        raise InputError(f"timeout_s is {timeout_s}, expected more than 0")
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
    return Function(function)
