"""A real vLLM serves what slmperf writes: without our plug-in where it can, with it otherwise."""

from __future__ import annotations

from environments import DEVICE
from served import (  # noqa: F401 - the tests and fixtures that both engines share
    OWN,
    engine,
    pruned,
    pytest_generate_tests,
    stock,
    test_a_head_of_labels_alone,
    test_odd_sizes_through_the_engines_kernels,
    test_refused_with_the_reason,
    test_with_the_plugin,
    test_without_the_plugin,
)

ENGINE, LOADED = "vllm", "Resolved architecture: PrunedForCausalLM"
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
LABELLED = ("labels", {})
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
