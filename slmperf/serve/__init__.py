"""Serving: pruned and quantised checkpoints inside SGLang and vLLM, and deployments of them.

`slmperf.serve.sglang` and `slmperf.serve.vllm` are the engines' plug-ins; they and the files named
after them alone import the engines. The engines find both by their entry points; with SGLang this
package may also be named in SGLANG_EXTERNAL_MODEL_PACKAGE, but for checkpoints whose layers differ:
their configuration is read before that is looked at.
"""

__all__: list[str] = []
