"""`slmperf deploy`: sizes against the planner and a simulated queue, refusals, what it writes."""

import math
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import small_models
import yaml
from deployments import (
    FP8,
    H100,
    LAYERS,
    PER_LAYER,
    SMALL,
    deployment,
    folder,
    options_of,
    quantised,
)

from slmperf import models
from slmperf.check import InputError
from slmperf.plan.search import plan
from slmperf.serve.deploy.checkpoint import read_checkpoint
from slmperf.serve.deploy.lines import serve_line
from slmperf.serve.deploy.sizing import Refused, Wanted, size

# ---- sizes


def test_a_checkpoint_alike_in_all_layers_is_what_the_planner_says(tmp_path):
    """The same times, bytes and members as `slmperf plan` has for that shape."""
    made = deployment(tmp_path, FP8, tp=4, items=4)
    (asked,) = [
        one
        for one in plan(
            target_ttft_ms=1e6, context=16384, tensor_parallel=4, items=4, bases=["2.1b"],
            schemes=["fp8"],
        )
        if one.shape.name == "2.1b"
    ]  # fmt: skip
    sized = made.sized
    assert (sized.cold, sized.hot) == (asked.ttft_cold_ms, asked.ttft_hot_ms)
    assert sized.cold.extrapolates == asked.ttft_cold_ms.extrapolates
    assert sized.cache.bytes_per_token == asked.kv_bytes_per_token
    # Norms, which are not counted, are some hundred kilobytes.
    assert sized.weight_bytes * 4 == pytest.approx(asked.weight_bytes, rel=1e-3)
    assert sized.cached_tokens // 16384 == asked.members
    assert not sized.plugin and sized.cache.wasted == 0


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_layers_that_differ_are_summed(tmp_path, engine):
    """Weights by the tensors of a model, cache by hand, times between those of the extremes."""
    model = models.shrink(
        small_models.llama(),
        mlp=[list(range(48)), list(range(32))],
        kv_groups=[[0, 1, 2, 3], [1, 3]],
    )
    models.save(model.bfloat16(), None, tmp_path / "pruned")
    read = read_checkpoint(tmp_path / "pruned")
    matrices = [value for value in model.state_dict().values() if value.dim() == 2]
    tied = model.config.tie_word_embeddings
    assert not tied and read.weight_bytes(1) == 2 * sum(value.numel() for value in matrices)
    size_of_head = 4
    each = 2 * 2 * size_of_head  # keys and values of two bytes
    assert read.facts.cache(1).of("vllm").bytes_per_token == each * (4 + 2)
    assert read.facts.cache(1).of("sglang").bytes_per_token == each * (4 + 4)
    assert read.facts.cache(1).of("sglang").wasted == pytest.approx(0.25)

    made = deployment(tmp_path / "large", PER_LAYER, engine=engine, tp=2)
    assert made.sized.plugin
    assert made.sized.cache.wasted == pytest.approx(0.25 if engine == "sglang" else 0)
    kinds = {key: PER_LAYER["per_layer_config"][key] for key in ("0", "1")}
    times = []
    for sizes in kinds.values():
        alike = PER_LAYER | sizes | {"per_layer_config": {}}
        times.append(deployment(tmp_path / "alike", alike, engine=engine, tp=2).sized.cold)
    assert made.sized.cold == pytest.approx(sum(times) / 2, rel=1e-6)


def test_schemes_of_weights_and_cache(tmp_path):
    bits = {"fp8": 8, "w8a8": 8, "w4a16": 4 + 16 / 128}
    matrices = LAYERS * (2 * 3072 * 16 * 128 + 3 * 3072 * 5120)
    for scheme, wide in bits.items():
        read = read_checkpoint(folder(tmp_path / scheme, quantised(scheme)))
        embedding = 2 * 128256 * 3072
        assert read.weight_bytes(1) == pytest.approx(matrices * wide / 8 + embedding)
        assert read.schemes == [scheme]
    mixed = quantised("w4a16", down="fp8", kv_cache=True)
    read = read_checkpoint(folder(tmp_path / "mixed", mixed))
    assert read.schemes == ["w4a16", "fp8"]
    assert read.facts.cache(1).of("vllm").bytes_per_token == LAYERS * 2 * 4 * 128
    # Eight ranks repeat the four heads: every token takes twice the room in all of them.
    assert read.facts.cache(8).of("vllm").bytes_per_token == 2 * LAYERS * 2 * 4 * 128


@pytest.mark.parametrize("hot_share", [0.0, 0.6])
def test_waiting_is_that_of_a_simulated_queue(tmp_path, hot_share):
    """Requests at random times, worked off one after the other on as many replicas."""
    asked = {"items": 8, "hot_share": hot_share, "requests_per_s": 11.0, "target_ttft_ms": 420}
    sized = deployment(tmp_path, FP8, tp=4, **asked).sized
    assert sized.replicas > 1 and sized.cold + sized.wait_ms <= 420
    generator = np.random.default_rng(0)
    count = 300_000
    gaps = generator.exponential(sized.replicas / 11.0, count)
    hot = generator.random(count) < hot_share
    service = np.where(hot, sized.hot, sized.cold) / 1e3
    # Lindley: a request waits for what is left of the work before it.
    work = np.cumsum(service[:-1] - gaps[1:])
    waits = work - np.minimum.accumulate(np.minimum(work, 0))
    assert waits.mean() * 1e3 == pytest.approx(sized.wait_ms, rel=0.05)
    fewer = sized.replicas - 1
    assert 11.0 / fewer > sized.most_requests_per_s  # one replica less would not do


def test_the_fewest_gpus_are_taken(tmp_path):
    """Four slow GPUs in one replica only where single ones are too slow."""
    assert deployment(tmp_path, FP8).sized.ranks == 1
    read = read_checkpoint(folder(tmp_path, FP8))
    sized, tried = size(read, H100, Wanted("sglang", 16384, target_ttft_ms=190))
    assert sized.ranks == 4
    refused = {one.ranks: one.reason for one in tried if isinstance(one, Refused)}
    assert refused[1] == "241 ms on an idle replica" and "12 query heads" in refused[8]
    # With much to do, larger replicas that wait less may take fewer GPUs than many small ones.
    busy = Wanted("sglang", 16384, requests_per_s=30, target_ttft_ms=245)
    sized, tried = size(read, H100, busy)
    assert sized.gpus == min(one.gpus for one in tried if not isinstance(one, Refused))
    assert sized.ranks > 1


# ---- refusals

BAD = {
    "engine": (["--engine", "trt"], "trt"),
    "tp": (["--tp", 3], "by 3 ranks (and 1 more); wanted 1, 2 or 4 tensor-parallel ranks"),
    "tp 0": (["--tp", 0], "ranks is 0, wanted at least 1"),
    "tp 16": (["--tp", 16], "--tp: wanted at most the 8 GPUs of a machine, found 16"),
    "method": (["--quantization", "awq"], "awq"),
    "too fast": (
        ["--target-ttft-ms", 90],
        "found no way to serve it: tp 1: 241 ms on an idle replica; tp 2: 194 ms",
    ),
    "context": (["--context", "200k"], "--context: wanted at most the model's 131072 tokens"),
    "words": (["--context", "long"], "--context is 'long', expected a number of tokens"),
    "no room": (["--context", "128k", "--items", 200_000], "leave a cache of"),
    "items": (["--items", 0], "--items: wanted a number >= 1, found 0"),
    "item tokens": (["--context", 64], "--item-tokens: wanted 1 to the context's 64, found 128"),
    "hot": (["--hot-share", 1.5], "--hot-share: wanted 0 to 1, found 1.5"),
    "nan": (["--hot-share", "nan"], "--hot-share: wanted 0 to 1, found nan"),
    "rate": (["--requests-per-s", 0], "--requests-per-s: wanted a number > 0, found 0.0"),
    "endless": (["--target-ttft-ms", "inf"], "--target-ttft-ms: wanted a number > 0, found inf"),
    "replicas": (["--replicas", 0], "--replicas: wanted a number >= 1, found 0"),
    "gpu": (["--gpu", "b200"], "no preset 'b200'"),
    "name": (["--name", "My_Model"], "--name: wanted lower-case letters"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_one_line(slmperf, tmp_path, case):
    path = folder(tmp_path / "model", FP8)
    options, complaint = BAD[case]
    out = tmp_path / "out"
    engine = () if "--engine" in options else ("--engine", "sglang")
    code, _, err = slmperf("deploy", path, *engine, *options, "--write", out)
    assert code == 2 and complaint in err and err.count("\n") == 1
    assert sorted(one.name for one in tmp_path.iterdir()) == ["model"]


def test_checkpoints_that_are_none(slmperf, tmp_path):
    def refused(fields: dict, complaint: str, *options: object) -> None:
        path = folder(tmp_path / "model", fields)
        code, _, err = slmperf("deploy", path, "--engine", "vllm", *options)
        assert code == 2 and complaint in err and err.count("\n") == 1, err

    code, _, err = slmperf("deploy", tmp_path / "none", "--engine", "vllm")
    assert code == 2 and "none" in err
    experts = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    refused(SMALL | experts | {"num_local_experts": 8}, "wanted a dense model, found a mixture")
    refused(PER_LAYER | {"format_version": 2}, "format_version is 2")
    refused(PER_LAYER | {"vocab_size": None}, "vocab_size is None, wanted a whole number")
    refused(PER_LAYER, "do not divide by 3 ranks", "--tp", 3)
    refused(SMALL, "is not quantised, wanted no --quantization", "--quantization", "slmperf")
    replace(H100, device_memory_gb=math.inf).save(tmp_path / "endless.json")
    refused(FP8, "wanted device_memory_gb", "--gpu", tmp_path / "endless.json")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("")
    refused(FP8, "wanted a new or empty folder", "--write", full)
    assert (full / "mine").exists()


# ---- quantised layers of sizes that the engine has no kernel for


def test_the_plugins_own_quantisation(slmperf, tmp_path):
    """It is what refusals advise, is asked for in the command lines, and counts as bf16 does."""
    odd = quantised("w8a8") | {"intermediate_size": 5128}
    path = folder(tmp_path / "odd", odd)
    code, _, err = slmperf("deploy", path, "--engine", "sglang", "--tp", 1)
    assert code == 2 and "--quantization slmperf with the plug-in" in err
    wide = deployment(tmp_path / "wide", SMALL | {"intermediate_size": 5128}, tp=1)
    for engine in ("sglang", "vllm"):
        made = deployment(path, odd, engine=engine, tp=1, quantization="slmperf")
        assert made.sized.plugin and made.sized.cold == pytest.approx(wide.sized.cold)
        assert made.sized.weight_bytes < wide.sized.weight_bytes
        assert options_of(serve_line(made, "/m", "h", 1))["--quantization"] == ["slmperf"]
    assert "--quantization" not in options_of(serve_line(wide, "/m", "h", 1))
    asked = ("--engine", "sglang", "--quantization", "slmperf", "--tp", 1)
    code, out, _ = slmperf("deploy", path, *asked, "--write", tmp_path / "out")
    assert code == 0 and "counted at the rate of bf16, than which it is no faster" in out
    assert "slmperf has to be installed" in out
    for file in ("serve.sh", "kubernetes.yaml"):
        text = (tmp_path / "out" / file).read_text()
        assert re.search(r"--quantization\W+slmperf", text), text


def test_a_replica_fits_on_a_machine(tmp_path):
    """One of more GPUs than a machine has would have no pod."""
    wide = SMALL | {"num_attention_heads": 16, "num_key_value_heads": 16}
    read = read_checkpoint(folder(tmp_path, wide))
    with pytest.raises(InputError, match="--tp: wanted at most the 8 GPUs"):
        size(read, H100, Wanted("sglang", 16384), 16)


# ---- the command


def test_the_command_prints_and_writes(slmperf, tmp_path):
    path = folder(tmp_path / "8B fp8", FP8)
    asked = ("--items", 4, "--requests-per-s", 20, "--target-ttft-ms", 400)
    code, out, _ = slmperf("deploy", path, "--engine", "sglang", *asked)
    assert code == 0
    for part in (
        "m-8b-fp8 in SGLang", "12 query heads over 4 key/value heads do not divide by 8 ranks",
        "at 20 requests/s", "tensor parallel 1, measured 4", "/v1/score ends there in 404",
        "listen on all addresses of their pods", "the stock engine serves this checkpoint",
        "sglang serve", "kind: PodDisruptionBudget",
    ):  # fmt: skip
        assert part in out, part
    written = tmp_path / "out"
    code, out, _ = slmperf("deploy", path, "--engine", "vllm", "--write", written)
    assert code == 0 and "vLLM was not measured" in out and "kind:" not in out
    assert sorted(one.name for one in written.iterdir()) == ["kubernetes.yaml", "serve.sh"]
    assert os.access(written / "serve.sh", os.X_OK)
    text = (written / "kubernetes.yaml").read_text()
    kinds = [one["kind"] for one in yaml.safe_load_all(text)]
    assert kinds == ["Deployment", "Service"] and "&id" not in text
    image = "vllm/vllm-openai:v0.33.0"
    assert f"image: {image}" in text

    other = tmp_path / "per-layer"
    code, out, _ = slmperf("deploy", folder(other, PER_LAYER), "--engine", "sglang",
                           "--replicas", 9, "--tp", 2, "--write", tmp_path / "plugin")  # fmt: skip
    assert code == 0 and "25% of it is zeros" in out and "starts 4 of the 9 replicas" in out
    files = {one.name: one.read_text() for one in (tmp_path / "plugin").iterdir()}
    assert files["Dockerfile"].startswith("FROM lmsysorg/sglang:v0.5.23\n")
    assert "image: slmperf-sglang:v0.5.23" in files["kubernetes.yaml"]
    assert "--dp-size 4" in files["serve.sh"]
