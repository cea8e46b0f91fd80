"""A real vLLM serves what slmperf writes: without our plug-in where it can, with it otherwise."""

from __future__ import annotations

import math

import pytest
from checkpoints import LABELS, PROMPTS, ROUNDED, ROUNDED_TOLERANCE, assert_same
from processes import SHOWN, Job

from slmperf.engine import Engine
from slmperf.models import load

STOCK = [
    "uniform",
    "uniform-qwen3",
    "uniform-w8a8",
    "uniform-w4a16",
    "uniform-fp8",
    "uniform-mixed",
    "decilm",
]
# Name of a job -> checkpoint, options.
PRUNED = {
    "llama": ("llama", {}),
    "mistral-window": ("mistral-window", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mixed": ("mixed", {}),
    "fp8-cache": ("fp8-cache", {}),
    "our product": ("mixed-own", {"quantization": "slmperf"}),
    "two ranks": ("exported", {"tensor_parallel_size": 2}),
}
# Name of a job -> checkpoint, options, what the engine says when it stops.
REFUSED = {"ranks": ("qwen3", {"tensor_parallel_size": 2}, "wanted 1 or 3")}


def test_the_plugin_is_what_vllm_loads(in_environment, site):
    """vLLM only warns of a plug-in that cannot be imported: it is imported here by its name."""
    said = in_environment(
        "vllm",
        """
import slmperf.serve.vllm as plugin
from vllm.plugins import load_general_plugins
from vllm.model_executor.models.registry import ModelRegistry

assert "PrunedForCausalLM" not in ModelRegistry.get_supported_archs()
load_general_plugins()
registered = ModelRegistry.models["PrunedForCausalLM"]
assert registered.load_model_cls() is plugin.PrunedForCausalLM
print("from", plugin.__file__)
""",
        site,
    )
    assert f"from {site}" in said


@pytest.fixture(scope="module")
def stock(run_jobs, checkpoint):
    jobs = []
    for name in STOCK:
        trust = {"trust_remote_code": True} if name == "decilm" else {}
        jobs.append(Job(name, checkpoint(name, "vllm").folder, trust))
    return run_jobs("vllm", jobs)


@pytest.mark.parametrize("name", STOCK)
def test_without_the_plugin(stock, checkpoint, name):
    outcome = stock[name]
    assert outcome.found is not None, outcome.log[-SHOWN:]
    tolerance = {"tolerance": ROUNDED_TOLERANCE} if name in ROUNDED else {}
    assert_same(outcome.found, checkpoint(name, "vllm").reference, **tolerance)


@pytest.fixture(scope="module")
def pruned(run_jobs, checkpoint, site):
    jobs = [
        Job(name, checkpoint(which, "vllm").folder, options)
        for name, (which, options) in PRUNED.items()
    ]
    jobs.append(Job("labels", checkpoint("labels", "vllm").folder, new_tokens=1))
    jobs += [
        Job(name, checkpoint(which, "vllm").folder, options)
        for name, (which, options, _) in REFUSED.items()
    ]
    return run_jobs("vllm", jobs, site)


@pytest.mark.parametrize("name", PRUNED)
def test_with_the_plugin(pruned, checkpoint, name):
    outcome, (which, _) = pruned[name], PRUNED[name]
    assert outcome.found is not None, outcome.log[-SHOWN:]
    tolerance = {"tolerance": ROUNDED_TOLERANCE} if which in ROUNDED else {}
    assert_same(outcome.found, checkpoint(which, "vllm").reference, **tolerance)


def test_a_head_of_labels_alone(pruned, checkpoint):
    """Its two logprobs are those of the labels among themselves, as our engine scores them."""
    outcome = pruned["labels"]
    assert outcome.found is not None, outcome.log[-SHOWN:]
    engine = Engine(load(checkpoint("labels", "vllm").folder), (LABELS[0], LABELS[1]))
    for prompt, found in zip(PROMPTS, outcome.found, strict=True):
        (score,) = engine.score(engine.open(prompt[:-2]), [prompt[-2:]])
        logprobs = dict(found["top"])
        assert math.exp(logprobs[LABELS[1]]) == pytest.approx(score, abs=1e-5)
        assert math.exp(logprobs[LABELS[0]]) == pytest.approx(1 - score, abs=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(pruned, name):
    outcome = pruned[name]
    assert outcome.found is None
    assert REFUSED[name][2] in outcome.log
