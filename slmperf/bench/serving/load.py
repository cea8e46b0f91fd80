"""The load generator: releases prompts when they are due and writes down when tokens came.

Open loop: a release never waits for an answer, as users do not. What the generator itself is late
by is written down too (`Sample.spacing_error_ms`). Time comes from a clock that is passed in:
`RealClock`, or `VirtualClock`, under which a whole load runs at once, exactly and always alike.
Imports no torch.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import itertools
import selectors
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from slmperf.bench.serving.workloads import Prompt, Release

T = TypeVar("T")

# asyncio's timers are late by up to a millisecond (epoll counts in them). So the last two before a
# release are slept in naps, between which other tasks run. Asking the time in a loop instead would
# cost this process its claim to be woken at once where others want the processor too.
NEAR_NS = 2_000_000
NAP_NS = 100_000
# Between the end of all preparation and the first release.
LEAD_NS = 20_000_000

Token = Callable[..., None]
"""Called as token() when a token came, or token(count) for several at once; from any thread."""


class Failure(Exception):
    """A failed request, explained: one line that is shown as it is."""


class Usage(NamedTuple):
    """What a server counted; None where it did not say. `input_tokens` includes cached ones."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None


class Endpoint(Protocol):
    """Where prompts go. `together`: one request for all prompts of a release (they share their
    prefix), instead of one each.
    """

    together: bool

    async def start(self, prompts: Sequence[Prompt]) -> None:
        """Before the load: prepare what costs time, and raise InputError where nobody answers."""
        ...

    async def send(self, prompts: Sequence[Prompt], token: Token) -> Usage:
        """Ask, call `token` as tokens come, and return at the end; any exception is a failure."""
        ...

    async def stop(self) -> None:
        """After the load."""
        ...


class Clock(Protocol):
    """Nanoseconds from some beginning, waiting, and the loop in which it waits."""

    def now_ns(self) -> int:
        """The time."""
        ...

    async def sleep_until(self, when_ns: int) -> None:
        """Return at that time, or as soon after as possible; other tasks run at least once."""
        ...

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run `main` to its end and return its result."""
        ...


class RealClock:
    """time.perf_counter_ns, and an ordinary asyncio loop."""

    def now_ns(self) -> int:
        """The time."""
        return time.perf_counter_ns()

    async def sleep_until(self, when_ns: int) -> None:
        """Return at that time or some tens of microseconds later."""
        coarse = when_ns - NEAR_NS - self.now_ns()
        await asyncio.sleep(max(0, coarse) * 1e-9)
        while (left_ns := when_ns - self.now_ns()) > 0:
            time.sleep(min(left_ns, NAP_NS) * 1e-9)
            await asyncio.sleep(0)

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """asyncio.run."""
        return asyncio.run(main)


class VirtualClock:
    """Time that stands still while anything can run and then jumps to the next sleeper's end.

    Everything may wait for everything that asyncio has, except for real time: asyncio.sleep and
    timeouts raise RuntimeError, threads and sockets are not waited for. Sleepers due at the same
    time wake in the order in which they went to sleep.
    """

    def __init__(self) -> None:
        self._now_ns = 0
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def now_ns(self) -> int:
        """The time; 0 at the beginning."""
        return self._now_ns

    async def sleep_until(self, when_ns: int) -> None:
        """Return at exactly that time."""
        woken = asyncio.get_running_loop().create_future()
        entry = (max(when_ns, self._now_ns), next(self._order), woken)
        heapq.heappush(self._sleepers, entry)
        await woken

    async def sleep(self, ns: int) -> None:
        """Return exactly `ns` nanoseconds later."""
        await self.sleep_until(self._now_ns + ns)

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run `main` in a loop that never waits."""

        def loop() -> asyncio.AbstractEventLoop:
            return asyncio.SelectorEventLoop(_Jump(self))

        with asyncio.Runner(loop_factory=loop) as runner:
            return runner.run(main)

    def jump(self) -> None:
        """Wake the next sleeper, at its time."""
        while self._sleepers:
            when_ns, _, woken = heapq.heappop(self._sleepers)
            if not woken.done():  # else cancelled
                self._now_ns = when_ns
                woken.set_result(None)
                return
        raise RuntimeError("virtual clock: every task waits, none for a time")


class _Jump(selectors.DefaultSelector):
    """asyncio asks its selector to wait exactly when no task can run: then virtual time jumps."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list:
        if timeout is None:
            self._clock.jump()
        elif timeout > 0:
            raise RuntimeError("virtual clock: a task waits for real time")
        return []


@dataclass(frozen=True)
class Sample:
    """One request: one prompt, or several prompts of one member where the endpoint takes them
    together. Times are the clock's, in nanoseconds.
    """

    member: int
    cold: bool  # it holds the member's first prompt
    prompts: int
    planned_ns: int
    released_ns: int
    first_ns: int  # of a failure: when it failed
    last_ns: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int | None
    error: str | None = None

    @property
    def spacing_error_ms(self) -> float:
        """How late the generator was."""
        return (self.released_ns - self.planned_ns) / 1e6

    @property
    def ttft_ms(self) -> float:
        """From the actual release to the first token."""
        return (self.first_ns - self.released_ns) / 1e6

    @property
    def tpot_ms(self) -> float | None:
        """Mean time of an output token after the first; None for a single one."""
        if self.output_tokens < 2:
            return None
        return (self.last_ns - self.first_ns) / 1e6 / (self.output_tokens - 1)


def run(plan: Sequence[Release], endpoint: Endpoint, clock: Clock) -> list[Sample]:
    """Release the plan on the endpoint and wait for all answers: samples in order of release.

    Raises InputError where the endpoint does not answer at the start. Later failures are samples
    with an `error`.
    """
    # A full collection walks every object of every imported library, for tens of milliseconds in
    # which no token is seen: what is there already need not be walked.
    gc.collect()
    gc.freeze()
    try:
        return clock.run(_drive(plan, endpoint, clock))
    finally:
        gc.unfreeze()


async def _drive(plan: Sequence[Release], endpoint: Endpoint, clock: Clock) -> list[Sample]:
    asked: list[asyncio.Task[Sample]] = []
    try:
        await endpoint.start([prompt for release in plan for prompt in release.prompts])
        begin_ns = clock.now_ns() + LEAD_NS
        for planned_ns, prompts in plan:
            due_ns = begin_ns + planned_ns
            await clock.sleep_until(due_ns)
            parts = [prompts] if endpoint.together else [(prompt,) for prompt in prompts]
            asked += [asyncio.create_task(_ask(part, due_ns, endpoint, clock)) for part in parts]
        return await asyncio.gather(*asked)
    finally:
        await endpoint.stop()


async def _ask(
    prompts: Sequence[Prompt], planned_ns: int, endpoint: Endpoint, clock: Clock
) -> Sample:
    stamps: list[int] = []
    counts: list[int] = []

    def token(count: int = 1) -> None:
        stamps.append(clock.now_ns())
        counts.append(count)

    released_ns = clock.now_ns()
    usage, failure = Usage(), None
    try:
        usage = await endpoint.send(prompts, token)
        if not stamps:
            failure = "the answer held no token"
    except Exception as error:  # whatever it is, it is this request's failure and not the load's
        text = str(error) if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
        failure = " ".join(text.split())[:300]
    if failure:
        stamps, counts = [clock.now_ns()], [0]
    first = prompts[0]
    nominal = sum(prompt.tokens for prompt in prompts)
    return Sample(
        member=first.member,
        cold=first.place == 0,
        prompts=len(prompts),
        planned_ns=planned_ns,
        released_ns=released_ns,
        first_ns=stamps[0],
        last_ns=stamps[-1],
        input_tokens=nominal if usage.input_tokens is None else usage.input_tokens,
        output_tokens=sum(counts) if usage.output_tokens is None else usage.output_tokens,
        cached_tokens=usage.cached_tokens,
        error=failure,
    )
