"""bench serve: the load generator against fakes of known delays, exact under a virtual clock.

Over 400 lines: one fake and its clock serve all of these tests.
"""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from fake_server import FakeEngine

from slmperf.bench.serving import load
from slmperf.bench.serving import report as serving
from slmperf.bench.serving.endpoints import Function
from slmperf.bench.serving.workloads import (
    WORDS,
    WORKLOADS,
    Workload,
    arrivals_ns,
    releases,
    workload,
)
from slmperf.check import InputError

PAPER = ("table7", "table9", "table10", "table11")


def small(**changes):
    sizes = dict(rate=10.0, k=4, context=64, suffix=8, members=10, warmup=1)
    return Workload("test", **{**sizes, **changes})


def virtual(work, clock=None, **delays):
    clock = clock or load.VirtualClock()
    endpoint = Function(FakeEngine(clock, **delays))
    return load.run(releases(work, "ids", 1000), endpoint, clock)


# The load.


def test_named_workloads():
    shapes = {name: (one.rate, one.k, one.context) for name, one in WORKLOADS.items()}
    assert shapes["table9"] == (1.0, 1, 16384)
    assert shapes["table10"] == (1.0, 1, 32768)
    assert shapes["table11"] == (1.0, 4, 32768)
    assert shapes["table7"] == (1.0, 1, 3800) and WORKLOADS["table7"].output_tokens == 2048
    for name in PAPER:
        assert WORKLOADS[name].members >= 240 and WORKLOADS[name].spacing == "constant"
        assert f"Table {name.removeprefix('table')}" in WORKLOADS[name].note
        assert name == "table7" or WORKLOADS[name].output_tokens == 1
    changed = workload("table11", context=512, members=20, rate=None)
    assert (changed.context, changed.members, changed.rate, changed.k) == (512, 20, 1.0, 4)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"context": 0}, "context is 0"),
        ({"k": 0}, "k is 0"),
        ({"k": True}, "k is True"),
        ({"rate": 0.0}, "rate is 0.0"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"suffix": 64}, "suffix is 64, expected 1 to 63"),
        ({"suffix": 0}, "suffix is 0"),
        ({"output_tokens": 0}, "output_tokens is 0"),
        ({"members": 0}, "members is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"hot_after_s": -0.5}, "hot_after_s is -0.5"),
        ({"spacing": "bursty"}, "spacing is 'bursty'"),
    ],
)
def test_sizes_that_make_no_load(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)


def test_constant_arrivals_do_not_drift():
    times = arrivals_ns(small(rate=3.0, members=3000, warmup=0))
    assert times[0] == 0 and times[-1] == round(2999e9 / 3)
    assert set(np.diff(times)) <= {333333333, 333333334}


def test_poisson_arrivals():
    times = arrivals_ns(small(spacing="poisson", members=4000))
    gaps = np.diff(times) / 1e9
    # Exponential: mean and deviation both 1 / rate, each within four standard errors.
    assert abs(gaps.mean() - 0.1) < 4 * 0.1 / 4000**0.5
    assert abs(gaps.std() - 0.1) < 4 * 0.1 * (2 / 4000) ** 0.5
    assert times == arrivals_ns(small(spacing="poisson", members=4000))
    assert times != arrivals_ns(small(spacing="poisson", members=4000, seed=1))


@pytest.mark.parametrize("kind", ["ids", "text"])
def test_prompts_share_their_members_prefix_and_nothing_else(kind):
    work = small(members=6, warmup=2)
    plan = releases(work, kind, 1000)
    assert [release.prompts[0].member for release in plan] == list(range(8))
    starts, suffixes = set(), set()
    for release in plan:
        assert len(release.prompts) == 4 and release.prompts[0].place == 0
        for prompt in release.prompts:
            assert prompt.prefix is release.prompts[0].prefix
            parts = [prompt.prefix, prompt.suffix]
            if kind == "text":
                assert all(part.startswith(" ") for part in parts)
                parts = [part.split() for part in parts]
                assert set(parts[0]) <= set(WORDS)
            else:
                assert parts[0].min() >= 62 and parts[0].max() < 1000
            assert [len(part) for part in parts] == [56, 8] and prompt.tokens == 64
            starts.add(tuple(parts[0][:8]))
            suffixes.add(tuple(parts[1]))
    assert len(starts) == 8 and len(suffixes) == 32
    again = releases(replace(work, seed=1), kind, 1000)
    assert list(again[0].prompts[0].prefix[:8]) != list(plan[0].prompts[0].prefix[:8])


def test_siblings_may_come_later():
    plan = releases(small(hot_after_s=0.25, members=3, warmup=0), "ids", 1000)
    seen = [(one.planned_ns // 10**6, one.prompts[0].member, len(one.prompts)) for one in plan]
    assert seen == [(0, 0, 1), (100, 1, 1), (200, 2, 1), (250, 0, 3), (350, 1, 3), (450, 2, 3)]


# The generator, exactly.


@pytest.mark.parametrize("changes", [{}, {"rate": 1.0, "members": 240}, {"spacing": "poisson"}])
def test_exact_under_the_virtual_clock(changes):
    """Cold 100 ms, hot 10 ms, and no nanosecond more; no release late."""
    work = small(**changes)
    samples = virtual(work)
    assert len(samples) == 4 * (work.members + work.warmup)
    begin = samples[0].planned_ns
    assert [one.planned_ns - begin for one in samples[::4]] == arrivals_ns(work)
    for number, one in enumerate(samples):
        assert one.member == number // 4 and one.cold == (number % 4 == 0)
        assert one.released_ns == one.planned_ns
        assert one.first_ns - one.released_ns == (100_000_000 if one.cold else 10_000_000)
        assert one.last_ns == one.first_ns and one.error is None
    assert samples == virtual(work)


def test_open_loop():
    """Answers that take longer than the load lasts hold up nothing."""
    samples = virtual(small(rate=1000.0, members=50), cold_ms=60_000)
    assert {one.ttft_ms for one in samples if one.cold} == {60_000.0}
    assert max(one.released_ns for one in samples) < min(one.last_ns for one in samples if one.cold)
    assert not any(one.spacing_error_ms for one in samples)


def test_output_tokens():
    samples = virtual(small(output_tokens=9), token_ms=7)
    assert {one.tpot_ms for one in samples} == {7.0}
    assert {one.output_tokens for one in samples} == {9}
    assert virtual(small())[0].tpot_ms is None


def test_late_releases_are_seen():
    """A clock that oversleeps shows as spacing error, not as time to first token."""

    class Late(load.VirtualClock):
        async def sleep_until(self, when_ns):
            await super().sleep_until(when_ns + 7_000_000)

    clock = Late()
    samples = virtual(small(), clock)
    assert {one.spacing_error_ms for one in samples} == {7.0}
    assert {one.ttft_ms for one in samples} == {107.0, 17.0}  # the fake sleeps by the same clock
    report = serving.summary(small(), "ids", samples)
    assert any("the generator was late" in line for line in report.lines)
    assert not any(
        "late" in line for line in serving.summary(small(), "ids", virtual(small())).lines
    )


def test_real_clock_is_on_time():
    """The best of many: a busy machine delays some, a wrong clock all."""
    clock, late_ms = load.RealClock(), []

    async def sleeps():
        for place in range(60):
            when = clock.now_ns() + 100_000 * (place + 1)
            await clock.sleep_until(when)
            late_ms.append((clock.now_ns() - when) / 1e6)

    clock.run(sleeps())
    assert min(late_ms) >= 0 and np.percentile(late_ms, 25) < 0.5


def test_virtual_clock_refuses_what_would_never_end():
    clock = load.VirtualClock()

    async def forever():
        import asyncio

        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="none for a time"):
        clock.run(forever())


def test_failures_are_samples():
    clock = load.VirtualClock()
    engine = FakeEngine(clock)

    async def sometimes(prompt, token):
        if prompt.place == 2:
            raise ValueError("no\nmemory")
        if prompt.place == 3:
            return
        await engine(prompt, token)

    work = small()
    samples = load.run(releases(work, "ids", 1000), Function(sometimes), clock)
    report = serving.summary(work, "ids", samples)
    assert report.first_error == "ValueError: no memory"
    groups = report.groups
    assert (groups["cold"].failed, groups["hot"].failed, groups["all"].failed) == (0, 20, 20)
    assert groups["hot"].ttft_ms == [10.0] * 10
    assert samples[3].error == "the answer held no token"
    # No member had all of its answers.
    assert report.answered is None and groups["member"].failed == 10
    with pytest.raises(InputError, match="all 40 requests failed, the first with: ZeroDivision"):
        serving.measure(work, "ids", Function(lambda prompt, token: 1 / 0))


def test_tokens_of_members_that_failed_in_part_are_in_no_rate():
    """Every second member loses one prompt of four: the rate is that of the others, whole."""
    clock = load.VirtualClock()
    engine = FakeEngine(clock)

    async def sometimes(prompt, token):
        if prompt.member % 2 and prompt.place == 3:
            raise ValueError("lost")
        await engine(prompt, token)

    work = small(members=11, warmup=0)
    report = serving.summary(
        work, "ids", load.run(releases(work, "ids", 1000), Function(sometimes), clock)
    )
    assert report.answered == pytest.approx(5.0)
    groups = report.groups
    assert groups["all"].input_tokens_per_s == pytest.approx(4 * 64 * 5)
    assert groups["cold"].input_tokens_per_s == pytest.approx(64 * 5)
    assert groups["member"].input_tokens_per_s == pytest.approx(4 * 64 * 5)
    assert groups["hot"].input_tokens == 64


def test_share_of_the_roof():
    """Of cold prompts alone, and only where the roof is known."""
    report = serving.summary(small(), "ids", virtual(small()))
    assert report.roof_share is None and not any("roof" in line for line in report.lines)
    beside = replace(report, ideal_us=25_000.0)
    assert beside.roof_share == 0.25
    assert any("25% of the roof, which would take 25 ms" in line for line in beside.lines)
    shares = {row["group"]: row["roof_share"] for row in serving.rows([beside])}
    assert shares == {"cold": 0.25, "hot": None, "all": None, "member": None}


HANGING = """
import threading
from slmperf.bench.serving import load
from slmperf.bench.serving.endpoints import open_endpoint
from slmperf.bench.serving.workloads import Workload, releases

def plain(prompt, token):
    threading.Event().wait()

async def waiting(prompt, token):
    import asyncio
    await asyncio.get_running_loop().create_future()

def own(prompt, token):
    raise TimeoutError("the database")

plan = releases(Workload("test", rate=50.0, context=64, suffix=8, members=2, warmup=0), "ids", 99)
for name in ("plain", "waiting", "own"):
    endpoint = open_endpoint(f"__main__:{name}", timeout_s=0.2)
    print([one.error for one in load.run(plan, endpoint, load.RealClock())])
"""


def test_a_function_that_never_answers():
    """It is lost after its time, and does not keep the process from ending."""
    done = subprocess.run(
        [sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *["['no answer within 0.2 s', 'no answer within 0.2 s']"] * 2,
        "['TimeoutError: the database', 'TimeoutError: the database']",
    ]


def test_threads_for_a_plain_function():
    """Blocking calls do not wait for each other."""
    import threading

    together = threading.Barrier(4, timeout=5)

    def blocking(prompt, token):
        together.wait()
        token()
        token(3)
        return load.Usage(cached_tokens=5)

    samples = load.run(
        releases(small(members=2, warmup=0), "ids", 100), Function(blocking), load.RealClock()
    )
    assert [one.error for one in samples] == [None] * 8
    assert {(one.output_tokens, one.cached_tokens) for one in samples} == {(4, 5)}


# What is reported.


def test_percentiles():
    """Linear between the two nearest samples, as the module says."""
    values = [40.0, 10.0, 30.0, 20.0]
    assert serving.percentile(values, 50) == 25.0
    assert serving.percentile(values, 90) == pytest.approx(37.0)
    assert serving.percentile(values, 0) == 10.0 and serving.percentile(values, 100) == 40.0
    assert serving.percentile([7.0], 99) == 7.0 and serving.percentile([], 50) is None


def test_report():
    work = small(warmup=3)
    report = serving.summary(work, "ids", virtual(work))
    assert {name: len(one.ttft_ms) for name, one in report.groups.items()} == {
        "cold": 10,
        "hot": 30,
        "all": 40,
        "member": 10,
    }
    assert (report.offered, report.released, report.answered) == (10.0, 10.0, 10.0)
    groups = report.groups
    assert groups["all"].input_tokens_per_s == 4 * 64 * 10
    assert groups["cold"].input_tokens_per_s == 64 * 10
    assert set(groups["member"].ttft_ms) == {100.0} and groups["all"].cached_tokens is None
    found = {row["group"]: row for row in serving.rows([report], shape="3b", hardware="none")}
    assert len({row["name"] for row in found.values()}) == 4
    assert found["all"]["time_us"] == 10_000.0 and found["all"]["samples"] == 40
    assert found["all"]["ttft_p99_ms"] == 100.0
    assert found["all"]["high_us"] == pytest.approx(32_500.0)  # 3 of 4 prompts are hot
    assert found["cold"]["shape"] == "3b" and found["cold"]["item_tokens"] == 8
    json.dumps(list(found.values()), allow_nan=False)


def test_warmup_is_left_out():
    """Members before the measured ones may take any time."""
    clock = load.VirtualClock()

    async def slow_start(prompt, token):
        await clock.sleep(10**9 if prompt.member < 3 else 10**6)
        token()

    work = small(warmup=3, k=1)
    samples = load.run(releases(work, "ids", 1000), Function(slow_start), clock)
    report = serving.summary(work, "ids", samples)
    assert report.groups["all"].ttft_ms == [1.0] * 10
    assert "hot" not in report.groups and "member" not in report.groups


def test_members_end_with_their_last_prompt():
    clock = load.VirtualClock()

    async def one_after_the_other(prompt, token):
        await clock.sleep((prompt.place + 1) * 10**7)
        token()

    for apart in (0.0, 0.05):
        work = small(hot_after_s=apart, warmup=0)
        samples = load.run(releases(work, "ids", 1000), Function(one_after_the_other), clock)
        report = serving.summary(work, "ids", samples)
        assert set(report.groups["member"].ttft_ms) == {40.0}
        assert sorted(report.groups["all"].ttft_ms)[::10] == [10.0, 20.0, 30.0, 40.0]


@pytest.mark.parametrize(
    "changes,together,expected",
    [
        ({"k": 1}, False, {"cold": (1, False)}),
        ({}, False, {"member": (4, False)}),
        ({}, True, {"cold": (4, False)}),
        ({"hot_after_s": 0.2}, False, {"cold": (1, False), "member": (3, True)}),
        ({"hot_after_s": 0.2}, True, {"cold": (1, False), "hot": (3, True)}),
    ],
)
def test_rows_say_what_they_compare_with(changes, together, expected):
    """A prediction is per prefix, cached or not; siblings that wait for one are neither."""
    work = small(**changes)
    report = serving.summary(work, "ids", virtual(work), together=together)
    found = {row["group"]: (row["items"], row["hot"]) for row in serving.rows([report])}
    assert {name: both for name, both in found.items() if both != (None, None)} == expected


def test_overload_is_said():
    """A server of one worker that cannot keep up."""
    import asyncio

    clock = load.VirtualClock()
    free = asyncio.Lock()

    async def one_worker(prompt, token):
        async with free:
            await clock.sleep(50_000_000)
        token()

    work = small(k=4, warmup=0)
    samples = load.run(releases(work, "ids", 1000), Function(one_worker), clock)
    report = serving.summary(work, "ids", samples)
    assert report.answered == pytest.approx(5.0) and report.offered == 10.0
    assert any("overloaded" in line for line in report.lines)


def test_cold_prompts_that_a_server_knew():
    samples = [replace(one, cached_tokens=56) for one in virtual(small())]
    report = serving.summary(small(), "ids", samples)
    assert any("has seen this seed" in line for line in report.lines)


def test_table_and_plot(tmp_path):
    from rich.console import Console

    work = small(output_tokens=3)
    samples = virtual(work)
    reports = [serving.summary(work, kind, samples) for kind in ("ids", "text")]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(serving.table(reports))
    text = console.export_text()
    for wanted in ("TTFT P99, ms", "TPOT P50, ms", "input tokens/s", "cold", "text", "100.0"):
        assert wanted in text
    serving.plot(reports, tmp_path / "times.png")
    assert (tmp_path / "times.png").stat().st_size > 10_000


def test_the_load_alone_needs_no_torch():
    code = (
        "import sys, slmperf.bench.serving.endpoints, slmperf.bench.serving.report\n"
        "heavy = 'torch', 'typer', 'rich', 'pydantic', 'matplotlib'\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
