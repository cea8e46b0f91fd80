"""bench serve against servers of known delays, in real time; this process's engine; the command.

Over 400 lines: one fake server serves all of these tests.
"""

import contextlib
import http.client
import json
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slmperf.bench.serving import load
from slmperf.bench.serving import report as serving
from slmperf.bench.serving.endpoints import open_endpoint
from slmperf.bench.serving.http import address
from slmperf.bench.serving.workloads import Workload, releases, workload
from slmperf.check import InputError


@contextlib.contextmanager
def fake(**settings):
    """A fake HTTP server in a process of its own: it must not share an interpreter with what it
    times.
    """
    command = [sys.executable, str(Path(__file__).with_name("fake_server.py"))]
    process = subprocess.Popen(
        [*command, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.stdin.close()
        assert process.wait(10) == 0
        process.stdout.close()


def small(**changes):
    sizes = dict(rate=10.0, k=4, context=64, suffix=8, members=10, warmup=1)
    return Workload("test", **{**sizes, **changes})


def test_addresses():
    assert address("http://host:30000").path == "/v1/completions"
    assert address("http://host/v1/").port == 80
    assert address("https://host/v1/score")[1:] == ("host", 443, "/v1/score", True)
    assert address("http://[::1]:8000/v1/completions").host == "::1"
    wrong_ones = ("host:30000", "ftp://host", "http://", "http://host:99999", "http://host/v2")
    for wrong in (*wrong_ones, "http://foo..bar:80", f"http://{'a' * 64}:80"):
        with pytest.raises(InputError, match="endpoint is .* expected http"):
            address(wrong)


@pytest.mark.parametrize("kind", ["ids", "text"])
def test_completions(kind):
    work = small(members=5, output_tokens=3)
    with fake(cold_ms=20, hot_ms=2, token_ms=1) as url:
        report = serving.measure(work, kind, open_endpoint(url), vocabulary=1000)
    assert report.first_error is None and report.answered == pytest.approx(10, rel=0.3)
    cold, hot = report.groups["cold"], report.groups["hot"]
    assert len(cold.ttft_ms) == 5 and len(hot.ttft_ms) == 15 and len(hot.tpot_ms) == 15
    # What the server saw: whole prompts, its first tokens known or not.
    assert (cold.cached_tokens, hot.cached_tokens) == (0, 16)
    assert report.groups["all"].input_tokens_per_s == pytest.approx(256 * report.answered)
    assert min(cold.ttft_ms) >= 20 and min(hot.ttft_ms) >= 2


@pytest.mark.parametrize("path", ["", "/v1/score"])
def test_texts_as_short_as_the_probe(path):
    """The end of a text of a few letters is that text: the probe must not lose it its prompt."""
    work = small(members=3, k=2, context=3, suffix=1, warmup=0)
    with fake(cold_ms=1, hot_ms=1) as url:
        report = serving.measure(work, "text", open_endpoint(url + path), vocabulary=1000)
    assert report.first_error is None and report.groups["cold"].failed == 0


@pytest.mark.parametrize("kind", ["ids", "text"])
def test_score(kind):
    work = small(members=5)
    with fake(cold_ms=20, hot_ms=2) as url:
        report = serving.measure(work, kind, open_endpoint(f"{url}/v1/score"), vocabulary=1000)
        assert report.together and set(report.groups) == {"cold", "all"}
        assert len(report.groups["all"].ttft_ms) == 5 and min(report.groups["all"].ttft_ms) >= 20
        assert report.groups["all"].input_tokens_per_s == pytest.approx(256 * report.answered)
        apart = replace(work, hot_after_s=0.05, seed=1)
        report = serving.measure(apart, kind, open_endpoint(f"{url}/v1/score"), vocabulary=1000)
    assert len(report.groups["hot"].ttft_ms) == 5
    assert 2 <= np.median(report.groups["hot"].ttft_ms) < 20


def real_time(work, url):
    """Problems of one run in real time against cold 100 ms, hot 10 ms: what the promise allows is
    2 ms on the medians and 5 ms on the P90 of the spacing error.
    """
    report = serving.measure(work, "ids", open_endpoint(url), vocabulary=1000)
    assert report.first_error is None
    groups, late = report.groups, serving.percentile(report.spacing_error_ms, 90)
    off = {
        "cold": abs(serving.percentile(groups["cold"].ttft_ms, 50) - 100),
        "hot": abs(serving.percentile(groups["hot"].ttft_ms, 50) - 10),
    }
    # The best of many needs no calm machine.
    assert 100 <= min(groups["cold"].ttft_ms) and 10 <= min(groups["hot"].ttft_ms)
    assert serving.percentile(report.spacing_error_ms, 10) < 2
    found = [f"{name}: median off by {by:.2f} ms" for name, by in off.items() if by > 2]
    return found + [f"spacing error P90 {late:.2f} ms"] * (late > 5)


def bare(url):
    """Milliseconds beyond the 10 of a hot prompt, P90, that a bare client sees: the machine's."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    body = {"model": "fake", "prompt": [1] * 64, "max_tokens": 1, "stream": True}
    times = []
    for _ in range(31):
        time.sleep(0.05)
        start = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body))
        connection.getresponse().read()
        times.append(1000 * (time.perf_counter() - start) - 10)
    connection.close()
    return serving.percentile(times[1:], 90)  # the first was cold


def hold_in_real_time(work, **delays):
    """A neighbour may disturb a run, or two; what is wrong is wrong three times. On a machine where
    a bare client is late as well, nothing can be said.
    """
    tries, noise_ms = [], []
    with fake(**delays) as url:
        for seed in range(3):
            tries.append(real_time(replace(work, seed=seed), url))
            if not tries[-1]:
                return
            noise_ms.append(bare(url))
    if min(noise_ms) > 1.5:
        pytest.skip(f"a bare client is late by {min(noise_ms):.1f} ms or more here: {tries}")
    pytest.fail(f"{tries}, and a bare client is late by {noise_ms} ms")


def test_real_time():
    # 7 a second: no release falls on the answer of the one before.
    hold_in_real_time(small(rate=7.0, members=17, warmup=2), cold_ms=100, hot_ms=10)


def test_real_time_can_fail():
    """Against a server that is 4 ms slower than it should be, on either kind."""
    work = small(rate=7.0, members=5, warmup=1)
    for delays in ({"cold_ms": 104, "hot_ms": 10}, {"cold_ms": 100, "hot_ms": 14}):
        with fake(**delays) as url:
            assert real_time(work, url)


@pytest.mark.slow
def test_real_time_at_the_papers_rate():
    work = workload("table11", context=2048, members=20, warmup=2)
    hold_in_real_time(work, cold_ms=100, hot_ms=10)


@pytest.mark.parametrize("path", ["", "/v1/score"])
def test_nobody_answers(path):
    with socket.socket() as taken:  # bound but not listening: nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}{path}"
        with pytest.raises(InputError, match=f"endpoint {url}.*: connection refused") as caught:
            serving.measure(small(), "ids", open_endpoint(url))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fault,path,message",
    [
        ("500", "", "status 500 Internal Server Error: .*out of memory"),
        ("500", "/v1/score", "status 500 Internal Server Error: .*out of memory"),
        ("json", "", "expected JSON, found"),
        ("json", "/v1/score", "expected a JSON object, found"),
        ("http", "", "no HTTP answer, found b'220 ready"),
        ("hang up", "", "hung up in the middle"),
        ("empty", "", "the answer held no token"),
        ("empty", "/v1/score", "expected scores of 1 items, found"),
        ("plain", "", "expected text/event-stream, found application/json"),
        ("error", "", "error in the stream: .*preempted"),
    ],
)
def test_wrong_answers_at_the_start(fault, path, message):
    with fake(fault=fault) as url, pytest.raises(InputError, match=message) as caught:
        serving.measure(small(), "ids", open_endpoint(url + path))
    assert "\n" not in str(caught.value) and url in str(caught.value)


def test_unknown_model():
    with fake() as url, pytest.raises(InputError, match="status 400 .*no model 'other'"):
        serving.measure(small(), "ids", open_endpoint(url, model="other"))


@pytest.mark.parametrize("fault", ["500", "json", "http", "hang up", "stall"])
def test_failures_under_load(fault):
    """What was answered counts, what failed is counted, and the load goes on to its end."""
    work = small(k=2, rate=50.0, members=10, warmup=0)
    with fake(cold_ms=1, hot_ms=1, fault=fault, healthy=9) as url:
        report = serving.measure(work, "ids", open_endpoint(url, timeout_s=0.5))
    every = report.groups["all"]
    # The probe was the first of nine healthy requests.
    assert (len(every.ttft_ms), every.failed) == (8, 12)
    expected = {"hang up": "hung up", "stall": "no answer within 0.5 s", "http": "no HTTP answer"}
    assert expected.get(fault, fault if fault != "json" else "expected JSON") in report.first_error
    assert report.first_error in report.lines[1]


def test_a_dropped_connection_is_no_failure():
    """A server may hang up on an idle connection just as a request leaves on it."""
    work = small(k=1, rate=50.0, members=6, warmup=0)
    with fake(cold_ms=1, hot_ms=1, fault="drop", healthy=3) as url:
        report = serving.measure(work, "ids", open_endpoint(url))
    assert report.first_error is None and len(report.groups["all"].ttft_ms) == 6


def test_endpoint_names(tmp_path, monkeypatch):
    (tmp_path / "own_endpoint.py").write_text("def ask(prompt, token):\n    token()\nnumber = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    samples = load.run(
        releases(small(members=1), "ids", 100), open_endpoint("own_endpoint:ask"), load.RealClock()
    )
    assert [one.error for one in samples] == [None] * 8
    for wrong in ("own_endpoint:none", "own_endpoint:number", "no_such:f", "words", "a:b:c", ""):
        with pytest.raises(InputError, match="endpoint"):
            open_endpoint(wrong)
    for wrong in (0.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"timeout_s is {wrong}"):
            open_endpoint("http://host", timeout_s=wrong)


# This process's engine, and the command.


@pytest.mark.parametrize("output_tokens", [1, 4])
def test_engine(output_tokens):
    from slmperf.bench.serving.engine import EngineEndpoint, open_engine

    work = small(rate=50.0, members=4, output_tokens=output_tokens)
    endpoint = open_engine(None, work, "cpu")
    assert isinstance(endpoint, EngineEndpoint)
    # An end of text at random would make the number of tokens one too.
    endpoint.engine.model.generation_config.eos_token_id = None
    opened = []
    was = endpoint.engine.open

    def counted(ids):
        assert not endpoint._opened  # the one before was dropped with its member's last prompt
        opened.append(len(ids))
        return was(ids)

    endpoint.engine.open = counted
    for kind in ("ids", "text"):
        opened.clear()
        report = serving.measure(work, kind, endpoint, vocabulary=endpoint.vocabulary)
        assert report.first_error is None
        assert opened == [56] * 5  # once a member
        cold, hot = report.groups["cold"], report.groups["hot"]
        assert (cold.cached_tokens, hot.cached_tokens) == (0, 56)
        assert len(hot.ttft_ms) == 12 and len(hot.tpot_ms) == (12 if output_tokens > 1 else 0)
    with pytest.raises(InputError, match=f"at most {64 + output_tokens} .the model's trained leng"):
        serving.measure(replace(work, context=128), "ids", endpoint)


def test_checkpoint(tmp_path):
    """Its own vocabulary and tokenizer; without one, ids only."""
    from slmperf import models
    from slmperf.bench.serving.engine import open_engine

    work = small(rate=50.0, members=2)
    first = open_engine(None, work, "cpu")
    models.save(first.engine.model, None, tmp_path / "plain")
    endpoint = open_engine(str(tmp_path / "plain"), work, "cpu")
    assert endpoint.vocabulary == 1024
    report = serving.measure(work, "ids", endpoint, vocabulary=1024)
    assert report.first_error is None
    with pytest.raises(InputError, match="the model's folder has no tokenizer"):
        serving.measure(work, "text", endpoint)


def test_generation_behind_the_open_prefix():
    """The tokens are those of the whole prompt from nothing."""
    import torch

    from slmperf.bench.serving.engine import open_engine

    work = small(output_tokens=5)
    endpoint = open_engine(None, work, "cpu")
    model = endpoint.engine.model
    model.generation_config.eos_token_id = None
    prompt = releases(work, "ids", 1024)[0].prompts[0]
    ids = np.concatenate([prompt.prefix, prompt.suffix])
    kept = {}
    was = model.generate
    model.generate = lambda *args, **named: kept.update(ids=was(*args, **named))
    tokens = []
    endpoint._generate(endpoint.engine.open(prompt.prefix), ids, 5, lambda: tokens.append(1))
    model.generate = was
    alone = was(torch.from_numpy(ids)[None], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert len(tokens) == 5 and torch.equal(kept["ids"], alone)


LOAD = ("--members", 3, "--warmup", 1, "--rate", 20, "--context", 64, "--suffix", 8)


@pytest.fixture
def some_roof(monkeypatch):
    """A roof that takes no time to measure."""
    from slmperf.bench import roof as roofs

    rates = dict.fromkeys(roofs.FORMATS, 1.0)
    top = roofs.Roof("here", "cpu", "1", "2", 1, 100.0, rates, 1.0, "2026-01-01T00:00Z")
    monkeypatch.setattr(roofs, "roof", lambda device: top)
    return top


def test_what_the_engine_ran_is_what_the_file_says(tmp_path, slmperf, some_roof):
    """Its own sizes and dtype for plan fit, and its share of the roof: nobody can misname it."""
    from slmperf.bench.results import read_results
    from slmperf.bench.serving.engine import RANDOM
    from slmperf.plan.fit import read_cells
    from slmperf.plan.work import prefill_works

    out = tmp_path / "r.json"
    command = ("bench", "serve", "--device", "cpu", *LOAD, "--prompts", "ids", "--k", 1)
    code, text, error = slmperf(*command, "--out", out)
    assert code == 0, error
    (cell,) = read_cells(out)
    assert (cell.scheme, cell.tensor_parallel, cell.context) == ("fp32", 1, 64)
    assert cell.shape.layers == RANDOM["num_hidden_layers"]
    assert cell.shape.intermediate == RANDOM["intermediate_size"]
    content = read_results(out)
    assert content["roof"]["copy_gbs"] == 100.0
    cold = next(row for row in content["rows"] if row["group"] == "cold")
    (work,) = prefill_works(cell.shape, 1, "fp32", context=64, items=1, item_tokens=1, hot=False)
    moved = work.weight_bytes + work.elementwise_bytes
    ideal = some_roof.ideal_us(moved, work.gemm_flops + work.attention_flops, "fp32")
    assert cold["roof_share"] == pytest.approx(ideal / cold["time_us"], rel=1e-3)
    assert f"cold P50 at {100 * cold['roof_share']:.0f}% of the roof" in text
    for option in ("--shape", "--tp", "--scheme", "--hardware"):
        code, _, error = slmperf(*command, option, 3)
        assert code == 2 and f"{option} says what a server runs" in error


@pytest.mark.parametrize("changed", ["experts", "weights"])
def test_an_engine_that_no_shape_describes(changed, some_roof):
    """It is measured all the same, beside no roof, and plan fit does not take it."""
    from slmperf.bench.serving.engine import open_engine

    work = small(rate=50.0, members=2)
    endpoint = open_engine(None, work, "cpu")
    config = endpoint.engine.model.config
    if changed == "experts":
        config.num_local_experts = 8
        assert endpoint.facts()["shape"] is None
    else:
        config.quantization_config = {"quant_method": "compressed-tensors"}
        assert endpoint.facts()["scheme"] is None and endpoint.facts()["shape"] is None
    report = endpoint.measure(work, "ids", some_roof)
    assert report.first_error is None and report.ideal_us is None


def test_command(tmp_path, slmperf):
    from slmperf.bench.results import read_results

    def command(*arguments):
        return slmperf("bench", "serve", *arguments)

    out, plot = tmp_path / "r.json", tmp_path / "p.png"
    with fake(cold_ms=5, hot_ms=1) as url:
        code, text, _ = command(
            *("--workload", "table11", "--endpoint", url, *LOAD, "--prompts", "both"),
            *("--shape", "2.1b", "--tp", 4, "--scheme", "fp8", "--seed", 7),
            *("--out", out, "--plot", plot),
        )
    assert code == 0 and "TTFT P50, ms" in text and "spacing error" in text
    content = read_results(out)
    assert content["kind"] == "serve" and len(content["rows"]) == 8 and plot.is_file()
    for row in content["rows"]:
        assert (row["shape"], row["tensor_parallel"], row["scheme"]) == ("2.1b", 4, "fp8")
        assert (row["context"], row["k"], row["seed"]) == (64, 4, 7)
        assert row["low_us"] <= row["time_us"] <= row["high_us"] <= row["ttft_p99_ms"] * 1000
    for wrong, message in (
        (("--context", 0), "context is '0'"),
        (("--k", 0), "k is 0"),
        (("--rate", 0), "rate is 0.0"),
        (("--suffix", 512), "suffix is 512"),
        (("--workload", "table8"), "workload is 'table8', expected one of small, table7"),
        (("--prompts", "words"), "prompts are 'words'"),
        (("--suffix", 0), "suffix is '0', expected a number of tokens"),
        (("--suffix", "1k"), "suffix is 1024, expected 1 to 511"),
        (("--endpoint", "http://x", "--shape", "5b"), "5b is no known shape"),
        (("--endpoint", "http://x", "--tp", 0), "tp is 0"),
        (("--endpoint", "http://x", "--vocabulary", 3), "vocabulary is 3"),
        (("--endpoint", "http://x", "--timeout-s", "nan"), "timeout_s is nan"),
        (("--endpoint", "nonsense"), "endpoint is 'nonsense'"),
        (("--endpoint", "http://127.0.0.1:1"), "connection refused"),
        (("--model", "no/folder"), "model is 'no/folder'"),
        (("--endpoint", "http://localhost:1/v1/score"), "score: connection refused"),
        (("--device", "tpu"), "device is 'tpu'"),
        (("--plot", "times.xyz"), "plot is times.xyz, expected"),
        (("--out", "/proc/none/r.json"), "out is /proc/none/r.json: cannot write there"),
    ):
        code, text, error = command(*wrong)
        assert "about" not in text or "refused" in message, (wrong, text)  # nothing is announced
        assert code == 2 and message in error and error.count("\n") == 1, (wrong, error)
