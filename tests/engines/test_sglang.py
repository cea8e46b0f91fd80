"""A real SGLang serves what slmperf writes: without our plug-in where it can, with it otherwise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from checkpoints import DTYPE, LABELS, PROMPTS, TOKENS, obstacle
from environments import DEVICE
from processes import free_port, post, serving
from served import (  # noqa: F401 - the tests and fixtures that both engines share
    OWN,
    SCORE_LIMIT,
    engine,
    our_scores,
    pruned,
    pytest_generate_tests,
    stock,
    test_a_head_of_labels_alone,
    test_odd_sizes_through_the_engines_kernels,
    test_refused_with_the_reason,
    test_with_the_plugin,
    test_without_the_plugin,
)

ENGINE, LOADED = "sglang", "type=PrunedForCausalLM"
PRUNED = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mixed": ("mixed", {}),
    "stories": ("stories", {}),
    "two ranks": ("llama", {"tp_size": 2}),
    "two ranks, exported": ("exported", {"tp_size": 2}),
    "two ranks, mixed": ("mixed", {"tp_size": 2}),
}
PRUNED |= {name: (name, {"quantization": "slmperf"}) for name in OWN}
PRUNED["own, two ranks"] = ("own-asymmetric", {"quantization": "slmperf", "tp_size": 2})
# On a GPU with its graphs of decoding; qwen3 has query heads unevenly spread.
BACKENDS = ["slmperf"] if DEVICE == "cpu" else ["slmperf", "fa3", "flashinfer", "triton"]
PRUNED |= {
    f"{backend}, {which}": (which, {"attention_backend": backend})
    for backend in BACKENDS
    for which in ("llama", "qwen3")
}
LABELLED = ("llama", {"json_model_override_args": json.dumps({"label_token_ids": LABELS})})
REFUSED = {
    "window": ("mistral-window", {}, "sliding windows, which slmperf's plug-in has for vLLM alone"),
    "ranks": (
        "qwen3",
        {"tp_size": 2},
        "slmperf.serve.sglang: SGLang: layer 2: 4 query heads over 3 key/value heads do not divide "
        "by 2 ranks; wanted 1 rank",
    ),
    "version": ("other-version", {}, "format_version is 2"),
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


def test_the_attention_backend_has_windows_and_refuses_the_rest(in_environment, site):
    """As a decoder asks for them that is not ours, with one sequence of 20 tokens in a cache."""
    in_environment(
        "sglang",
        """
from types import SimpleNamespace

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from slmperf.serve.sglang_attention import PagedBackend

LENGTH, C = 20, 16
torch.manual_seed(0)
keys, values = torch.randn(2, 32, 2, C)
pool = SimpleNamespace(
    set_kv_buffer=None, get_key_buffer=lambda index: keys, get_value_buffer=lambda index: values
)
slots = torch.randperm(32)
requests = SimpleNamespace(req_to_token=slots[None])
backend = PagedBackend(
    SimpleNamespace(req_to_token_pool=requests, token_to_kv_pool=pool, device="cpu")
)
backend.starts = torch.tensor([0, 1])
batch = SimpleNamespace(
    out_cache_loc=None, req_pool_indices=torch.tensor([0]), seq_lens=torch.tensor([LENGTH])
)
query = torch.randn(1, 4 * C)

def output(sinks=None, **own):
    layer = RadixAttention(4, C, 0.25, num_kv_heads=2, layer_id=0, **own)
    return backend.forward_decode(query, None, None, layer, batch, sinks=sinks)

def wanted(first):
    seen = slots[first:LENGTH]
    key, value = (x[seen].movedim(0, 1).repeat_interleave(2, 0) for x in (keys, values))
    inputs = query.view(4, 1, C), key, value
    return torch.nn.functional.scaled_dot_product_attention(*inputs, scale=0.25).view(1, -1)

torch.testing.assert_close(output(), wanted(0))
# As SGLang counts: keys before the query's own.
torch.testing.assert_close(output(sliding_window_size=4), wanted(LENGTH - 5))
for other in (
    {"logit_cap": 1.0},
    {"sinks": torch.ones(4)},
    {"is_cross_attention": True},
    {"attn_type": AttentionType.ENCODER_ONLY},
    {"v_head_dim": 8},
):
    try:
        output(**other)
    except NotImplementedError:
        continue
    raise AssertionError(other)
""",
        site,
    )


def test_two_ranks_say_what_one_says(request):
    if (reason := obstacle(*PRUNED["two ranks"])) is not None:
        pytest.skip(reason)
    outcomes = request.getfixturevalue("pruned")
    one, two = outcomes["llama"].found, outcomes["two ranks"].found
    assert [prompt["tokens"] for prompt in one] == [prompt["tokens"] for prompt in two]


def test_scores_over_http(checkpoint, site, tmp_path):
    """/v1/score of a per-layer model, cold and with the query cached, is our engine's score; so is
    what comes through SGLang's router, which passes /generate on."""
    model = checkpoint("llama", "sglang")
    command = ["-m", "sglang.launch_server", "--model-path", model.folder, "--device", DEVICE]
    command += ["--dtype", DTYPE, "--skip-tokenizer-init", "--skip-server-warmup"]
    command += ["--context-length", 128, "--max-total-tokens", 2048, "--mem-fraction-static", 0.3]
    if DEVICE == "cpu":
        command += ["--attention-backend", "torch_native", "--sampling-backend", "pytorch"]
        command += ["--disable-overlap-schedule"]
    query, items = PROMPTS[2], [PROMPTS[0], PROMPTS[1], [9]]
    (scores,) = our_scores(model.folder, [(query, items)])
    asked = {"query": query, "items": items, "label_token_ids": LABELS, "apply_softmax": True}
    greedy = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    with serving("sglang", command, tmp_path / "server", site, 180) as address:
        for _ in ("cold", "hot"):
            answer = post(f"{address}/v1/score", asked | {"model": "default"})
            assert [yes for _, yes in answer["scores"]] == pytest.approx(scores, abs=SCORE_LIMIT)
        answers = post(f"{address}/generate", {"input_ids": PROMPTS, "sampling_params": greedy})
        with router(address, tmp_path / "router") as before:
            body = {"return_logprob": True, "logprob_start_len": -1, "token_ids_logprob": LABELS}
            body["sampling_params"] = {"temperature": 0, "max_new_tokens": 0}
            for item, wanted in zip(items, scores, strict=True):
                found = post(f"{before}/generate", body | {"input_ids": query + item})
                (no, *_), (yes, *_) = found["meta_info"]["output_token_ids_logprobs"][-1]
                assert 1 / (1 + math.exp(no - yes)) == pytest.approx(wanted, abs=SCORE_LIMIT)
    if DEVICE == "cpu":
        tokens = [one.tokens for one in model.reference]
        assert [answer["output_ids"] for answer in answers] == tokens


def router(worker: str, run: Path):
    """SGLang's router before a server, as `slmperf deploy` has it started."""
    command = ["-m", "sglang_router.launch_router", "--worker-urls", worker]
    command += ["--policy", "cache_aware"]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", free_port()]
    return serving("sglang", command, run, None, 60, ready="/readiness")
