"""What both engines are asked, by constants of the test file that imports these tests and fixtures
(an engine a file, so that both run at once).

    ENGINE    its name
    LOADED    what it says when it runs the plug-in's class
    PRUNED    name of a job -> checkpoint, options of the engine
    REFUSED   name of a job -> checkpoint, options, what the engine says when it stops
    LABELLED  checkpoint and options of the job whose head has the labels alone
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from checkpoints import LABELS, PROMPTS, obstacle
from environments import DEVICE
from processes import SHOWN, Job

from slmperf.engine import Engine
from slmperf.models import load

# Served by stock engines.
STOCK = [
    "uniform",
    "uniform-qwen3",
    "uniform-w8a8",
    "uniform-w4a16",
    "uniform-fp8",
    "uniform-mixed",
    "decilm",
    "decilm-w8a8",
]
# Run by slmperf's quantisation method, and at sizes that a GPU's kernels may not take.
OWN = ["own-mixed", "own-asymmetric", "own-static", "own-blocks"]
ODD = ["odd-w8a8", "odd-w4a16", "odd-fp8"]
SCORE_LIMIT = 1e-5 if DEVICE == "cpu" else 1e-2


@pytest.fixture(scope="module")
def engine(request):
    return request.module.ENGINE


@pytest.fixture(scope="module")
def stock(engine, run_jobs, checkpoint):
    jobs = []
    for name in STOCK:
        trust = {"trust_remote_code": True} if name.startswith("decilm") else {}
        jobs.append(Job(name, checkpoint(name, engine).folder, trust))
    return run_jobs(engine, jobs)


@pytest.fixture(scope="module")
def pruned(request, engine, run_jobs, checkpoint, site):
    module = request.module
    jobs = [
        Job(name, checkpoint(which, engine).folder, options)
        for name, (which, options, *_) in (module.PRUNED | module.REFUSED).items()
        if obstacle(which, options) is None
    ]
    jobs += [Job(name, checkpoint(name, engine).folder) for name in ODD]
    which, options = module.LABELLED
    jobs.append(Job("labels", checkpoint(which, engine).folder, options, new_tokens=1))
    return run_jobs(engine, jobs, site)


def pytest_generate_tests(metafunc):
    """A case for each job of the file that imports the test."""
    module = metafunc.module
    lists = {"stock_job": STOCK, "odd_job": ODD}
    lists |= {"pruned_job": module.PRUNED, "refused_job": module.REFUSED}
    for argument, names in lists.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, list(names))


def test_without_the_plugin(stock, checkpoint, engine, stock_job):
    outcome = stock[stock_job]
    assert outcome.found is not None, outcome.log[-SHOWN:]
    checkpoint(stock_job, engine).assert_same(outcome.found)


def test_with_the_plugin(request, pruned, checkpoint, engine, pruned_job):
    which, options = request.module.PRUNED[pruned_job]
    if (reason := obstacle(which, options)) is not None:
        pytest.skip(reason)
    outcome = pruned[pruned_job]
    assert outcome.found is not None, outcome.log[-SHOWN:]
    assert request.module.LOADED in outcome.log
    checkpoint(which, engine).assert_same(outcome.found)


def test_odd_sizes_through_the_engines_kernels(
    pruned, checkpoint, engine, odd_job, record_property
):
    """The results are right; a GPU's kernels may take no such size, which has to be said then."""
    outcome = pruned[odd_job]
    record_property("served", outcome.found is not None)
    if DEVICE == "cuda" and outcome.found is None:
        assert "InputError" in outcome.log, outcome.log[-SHOWN:]
        return
    assert outcome.found is not None, outcome.log[-SHOWN:]
    checkpoint(odd_job, engine).assert_same(outcome.found)


def test_a_head_of_labels_alone(request, pruned, checkpoint, engine):
    """Its two logprobs are those of the labels among themselves, as our engine scores them."""
    outcome = pruned["labels"]
    assert outcome.found is not None, outcome.log[-SHOWN:]
    folder = checkpoint(request.module.LABELLED[0], engine).folder
    scores = our_scores(folder, [(prompt[:-2], [prompt[-2:]]) for prompt in PROMPTS])
    for found, (score,) in zip(outcome.found, scores, strict=True):
        logprobs = dict(found["top"])
        assert math.exp(logprobs[LABELS[1]]) == pytest.approx(score, abs=SCORE_LIMIT)
        assert math.exp(logprobs[LABELS[0]]) == pytest.approx(1 - score, abs=SCORE_LIMIT)


def test_refused_with_the_reason(request, pruned, refused_job):
    which, options, said = request.module.REFUSED[refused_job]
    if (reason := obstacle(which, options)) is not None:
        pytest.skip(reason)
    assert pruned[refused_job].found is None
    assert said in pruned[refused_job].log


def our_scores(folder: Path, prompts: list[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
    """P(yes) of each item behind its query, by slmperf's own engine."""
    own = Engine(load(folder), (LABELS[0], LABELS[1]))
    return [own.score(own.open(query), items).tolist() for query, items in prompts]
