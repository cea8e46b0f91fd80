"""Serving: pruned and quantised checkpoints inside SGLang and vLLM, and deployments of them.

`slmperf.serve.sglang` and `slmperf.serve.vllm` are the engines' plug-ins, found by their entry
points; they and the files named after them alone import the engines.
"""

__all__: list[str] = []
