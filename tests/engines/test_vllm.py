"""A real vLLM serves what slmperf writes: without our plug-in where it can, with it otherwise."""

from __future__ import annotations

import math

import pytest
from checkpoints import LABELS, PROMPTS, obstacle
from environments import DEVICE
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
    "decilm-w8a8",
]
# Name of a job -> checkpoint, options.
PRUNED = {
    "llama": ("llama", {}),
    "mistral-window": ("mistral-window", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mixed": ("mixed", {}),
    "fp8-cache": ("fp8-cache", {}),
    "stories": ("stories", {}),
    "two ranks": ("exported", {"tensor_parallel_size": 2}),
}
OWN = ["own-mixed", "own-asymmetric", "own-static", "own-blocks"]
PRUNED |= {name: (name, {"quantization": "slmperf"}) for name in OWN}
# On a GPU with its graphs of decoding; qwen3 has query heads unevenly spread. CUSTOM is ours.
BACKENDS = ["CUSTOM"]
if DEVICE == "cuda":
    BACKENDS += ["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"]
PRUNED |= {
    f"{backend}, {which}": (which, {"attention_config": {"backend": backend}})
    for backend in BACKENDS
    for which in ("llama", "qwen3")
}
ODD = ["odd-w8a8", "odd-w4a16", "odd-fp8"]
# Name of a job -> checkpoint, options, what the engine says when it stops.
REFUSED = {
    "ranks": (
        "qwen3",
        {"tensor_parallel_size": 2},
        "vLLM: layer 2: 4 query heads over 3 key/value heads do not divide by 2 ranks; wanted 1 "
        "rank",
    ),
    "version": ("other-version", {}, "format_version is 2"),
}


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
        trust = {"trust_remote_code": True} if name.startswith("decilm") else {}
        jobs.append(Job(name, checkpoint(name, "vllm").folder, trust))
    return run_jobs("vllm", jobs)


@pytest.mark.parametrize("name", STOCK)
def test_without_the_plugin(stock, checkpoint, name):
    outcome = stock[name]
    assert outcome.found is not None, outcome.log[-SHOWN:]
    checkpoint(name, "vllm").assert_same(outcome.found)


@pytest.fixture(scope="module")
def pruned(run_jobs, checkpoint, site):
    jobs = [
        Job(name, checkpoint(which, "vllm").folder, options)
        for name, (which, options, *_) in (PRUNED | REFUSED).items()
        if obstacle(which, options) is None
    ]
    jobs += [Job(name, checkpoint(name, "vllm").folder) for name in ODD]
    jobs.append(Job("labels", checkpoint("labels", "vllm").folder, new_tokens=1))
    return run_jobs("vllm", jobs, site)


@pytest.mark.parametrize("name", PRUNED)
def test_with_the_plugin(pruned, checkpoint, name):
    which, options = PRUNED[name]
    if (reason := obstacle(which, options)) is not None:
        pytest.skip(reason)
    outcome = pruned[name]
    assert outcome.found is not None, outcome.log[-SHOWN:]
    checkpoint(which, "vllm").assert_same(outcome.found)


@pytest.mark.parametrize("name", ODD)
def test_odd_sizes_through_the_engines_kernels(pruned, checkpoint, name, record_property):
    """The results are right; a GPU's kernels may take no such size, which has to be said then."""
    outcome = pruned[name]
    record_property("served", outcome.found is not None)
    if DEVICE == "cuda" and outcome.found is None:
        assert "InputError" in outcome.log, outcome.log[-SHOWN:]
        return
    assert outcome.found is not None, outcome.log[-SHOWN:]
    checkpoint(name, "vllm").assert_same(outcome.found)


def test_a_head_of_labels_alone(pruned, checkpoint):
    """Its two logprobs are those of the labels among themselves, as our engine scores them."""
    outcome = pruned["labels"]
    assert outcome.found is not None, outcome.log[-SHOWN:]
    engine = Engine(load(checkpoint("labels", "vllm").folder), (LABELS[0], LABELS[1]))
    limit = 1e-5 if DEVICE == "cpu" else 1e-2
    for prompt, found in zip(PROMPTS, outcome.found, strict=True):
        (score,) = engine.score(engine.open(prompt[:-2]), [prompt[-2:]])
        logprobs = dict(found["top"])
        assert math.exp(logprobs[LABELS[1]]) == pytest.approx(score, abs=limit)
        assert math.exp(logprobs[LABELS[0]]) == pytest.approx(1 - score, abs=limit)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(pruned, name):
    which, options, said = REFUSED[name]
    if (reason := obstacle(which, options)) is not None:
        pytest.skip(reason)
    assert pruned[name].found is None
    assert said in pruned[name].log
