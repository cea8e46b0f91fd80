"""Serving: pruned and quantised checkpoints inside SGLang and vLLM.

`slmperf.serve.sglang` and `slmperf.serve.vllm` are the engines' plug-ins and the only modules that
import them. The engines find both by their entry points; with SGLang this package may also be named
in SGLANG_EXTERNAL_MODEL_PACKAGE.
"""
