"""A real SGLang serves what slmperf writes: without our plug-in where it can, with it otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from checkpoints import DTYPE, LABELS, PROMPTS, ROUNDED, ROUNDED_TOLERANCE, TOKENS, TOP, assert_same
from environments import DEVICE
from processes import SHOWN, Job, post, serving

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
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mixed": ("mixed", {}),
    "our attention": ("llama", {"attention_backend": "slmperf"}),
    "our attention, uneven": ("qwen3", {"attention_backend": "slmperf"}),
    "our product": ("mixed-own", {"quantization": "slmperf"}),
    "two ranks": ("llama", {"tp_size": 2}),
    "two ranks, exported": ("exported", {"tp_size": 2}),
    "two ranks, mixed": ("mixed", {"tp_size": 2}),
}
ONLY_LABELS = {"json_model_override_args": json.dumps({"label_token_ids": LABELS})}
# Name of a job -> checkpoint, options, what the engine says when it stops.
REFUSED = {
    "window": ("mistral-window", {}, "sliding windows of 12 tokens"),
    "ranks": ("qwen3", {"tp_size": 2}, "wanted 1 or 3"),
}


def test_the_plugin_is_what_sglang_loads(in_environment, site):
    """SGLang only warns of a plug-in that cannot be imported: it is imported here by its name."""
    said = in_environment(
        "sglang",
        """
import slmperf.serve.sglang as plugin
from sglang.srt.plugins import load_plugins
from sglang.srt.models.registry import ModelRegistry, import_model_classes
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

assert "PrunedForCausalLM" not in ModelRegistry.models
load_plugins()
assert ModelRegistry.models["PrunedForCausalLM"] is plugin.PrunedForCausalLM
assert "slmperf" in ATTENTION_BACKENDS
external = import_model_classes("slmperf.serve")  # as SGLANG_EXTERNAL_MODEL_PACKAGE has it done
assert external == {"PrunedForCausalLM": plugin.PrunedForCausalLM}, external
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
        jobs.append(Job(name, checkpoint(name, "sglang").folder, trust))
    return run_jobs("sglang", jobs)


@pytest.mark.parametrize("name", STOCK)
def test_without_the_plugin(stock, checkpoint, name):
    outcome = stock[name]
    assert outcome.found is not None, outcome.log[-SHOWN:]
    tolerance = {"tolerance": ROUNDED_TOLERANCE} if name in ROUNDED else {}
    assert_same(outcome.found, checkpoint(name, "sglang").reference, **tolerance)


@pytest.fixture(scope="module")
def pruned(run_jobs, checkpoint, site):
    jobs = [
        Job(name, checkpoint(which, "sglang").folder, options)
        for name, (which, options) in PRUNED.items()
    ]
    jobs.append(Job("labels", checkpoint("llama", "sglang").folder, ONLY_LABELS, new_tokens=1))
    jobs += [
        Job(name, checkpoint(which, "sglang").folder, options)
        for name, (which, options, _) in REFUSED.items()
    ]
    return run_jobs("sglang", jobs, site)


@pytest.mark.parametrize("name", PRUNED)
def test_with_the_plugin(pruned, checkpoint, name):
    outcome, (which, _) = pruned[name], PRUNED[name]
    assert outcome.found is not None, outcome.log[-SHOWN:]
    assert "type=PrunedForCausalLM" in outcome.log
    tolerance = {"tolerance": ROUNDED_TOLERANCE} if which in ROUNDED else {}
    assert_same(outcome.found, checkpoint(which, "sglang").reference, **tolerance)


def test_two_ranks_say_what_one_says(pruned):
    one, two = pruned["llama"].found, pruned["two ranks"].found
    assert [prompt["tokens"] for prompt in one] == [prompt["tokens"] for prompt in two]


def test_a_head_of_labels_alone(pruned, checkpoint):
    """Its two logprobs are those of the labels among themselves, as our engine scores them."""
    outcome = pruned["labels"]
    assert outcome.found is not None, outcome.log[-SHOWN:]
    scores = our_scores(checkpoint("llama", "sglang").folder, [(p[:-2], [p[-2:]]) for p in PROMPTS])
    for found, (score,) in zip(outcome.found, scores, strict=True):
        logprobs = dict(found["top"])
        assert math.exp(logprobs[LABELS[1]]) == pytest.approx(score, abs=1e-5)
        assert math.exp(logprobs[LABELS[0]]) == pytest.approx(1 - score, abs=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(pruned, name):
    outcome = pruned[name]
    assert outcome.found is None
    assert f"InputError: {REFUSED[name][2]}" in outcome.log or REFUSED[name][2] in outcome.log


def our_scores(folder: Path, prompts: list[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
    """P(yes) of each item behind its query, by slmperf's own engine."""
    engine = Engine(load(folder), (LABELS[0], LABELS[1]))
    return [engine.score(engine.open(query), items).tolist() for query, items in prompts]


def test_scores_over_http(checkpoint, site, tmp_path):
    """/v1/score of a per-layer model, cold and with the query cached, is our engine's score."""
    folder, reference = checkpoint("llama", "sglang")
    command = ["-m", "sglang.launch_server", "--model-path", folder, "--device", DEVICE]
    command += ["--dtype", DTYPE, "--skip-tokenizer-init", "--skip-server-warmup"]
    command += ["--context-length", 128, "--max-total-tokens", 2048, "--mem-fraction-static", 0.3]
    if DEVICE == "cpu":
        command += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        command += ["--disable-overlap-schedule"]
    query, items = PROMPTS[2], [PROMPTS[0], PROMPTS[1], [9]]
    (scores,) = our_scores(folder, [(query, items)])
    asked = {"query": query, "items": items, "label_token_ids": LABELS, "apply_softmax": True}
    with serving("sglang", command, tmp_path / "server", site, 180) as address:
        for _ in ("cold", "hot"):
            answer = post(f"{address}/v1/score", asked | {"model": "default"})
            limit = 1e-5 if DEVICE == "cpu" else 1e-2
            assert [yes for _, yes in answer["scores"]] == pytest.approx(scores, abs=limit)
        greedy = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
        body = {"input_ids": PROMPTS, "sampling_params": greedy, "return_logprob": True}
        answers = post(f"{address}/generate", body | {"top_logprobs_num": TOP})
    if DEVICE == "cpu":
        wanted = [one.tokens for one in reference]
        assert [answer["output_ids"] for answer in answers] == wanted
