"""lines: the command lines of engines and router, for one machine and for a pod.

Options by the parsers of SGLang 0.5.23, vLLM 0.33.0 and sglang_router 0.3.2, which tests/engines
has read them.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from slmperf.models.engines.facts import DECILM, Engine
from slmperf.plan.search import USABLE
from slmperf.serve.deploy.checkpoint import Checkpoint
from slmperf.serve.deploy.sizing import GPUS, Sized, Wanted

LOOPBACK = "127.0.0.1"
PORTS: dict[Engine, int] = {"sglang": 30000, "vllm": 8000}
ROUTER_PORT, METRICS_PORT = 30080, 29000
# Tokens of one forward pass of a prefill: what the planner's constants were fitted with, and more
# than either engine takes on an A100 by itself.
_CHUNK = 8192
# vLLM counts its workspace into its share of the memory, SGLang does not (`USABLE`).
_VLLM_SHARE = 0.92
# Of a prompt's text, what has to be known of a worker for the prompt to go there, in shares of its
# prefix: less than all, for a member's history grows.
_KNOWN_SHARE = 0.8
_LETTERS = 8  # of a token, at most: more than English text has, and than a token's number
_MOST_LETTERS = 2**28  # that the router remembers: bytes of its memory, for each worker


@dataclass(frozen=True)
class Deployment:
    """All that the command lines and manifests are made of.

    name   of the model at the port, and of everything in the cluster
    image  of the engine's container
    claim  the cluster's PersistentVolumeClaim that holds the checkpoint's folder
    """

    name: str
    checkpoint: Checkpoint
    wanted: Wanted
    sized: Sized
    image: str
    claim: str

    @property
    def engine(self) -> Engine:
        return self.wanted.engine

    @property
    def local_replicas(self) -> int:
        """Replicas on one machine, the one that the script is for."""
        return min(self.sized.replicas, GPUS // self.sized.ranks)


def serve_line(
    deployment: Deployment, model: str, host: str, port: int, replicas: int = 1
) -> list[str]:
    """What starts the engine; `replicas` of it as SGLang's data-parallel ranks behind one port."""
    checkpoint, wanted = deployment.checkpoint, deployment.wanted
    shared = ["--served-model-name", deployment.name]
    if checkpoint.full:
        shared += ["--dtype", "bfloat16"]
    if wanted.quantization is not None:
        shared += ["--quantization", wanted.quantization]
    if checkpoint.facts.fp8_cache:
        shared += ["--kv-cache-dtype", "fp8_e4m3"]
    if checkpoint.facts.written == DECILM:
        shared += ["--trust-remote-code"]  # its configuration's class is a file of the folder
    length, ranks = str(wanted.length(checkpoint)), str(deployment.sized.ranks)
    at = ["--host", host, "--port", str(port)]
    if deployment.engine == "vllm":
        line = ["vllm", "serve", model, *shared, "--tensor-parallel-size", ranks]
        line += ["--max-model-len", length, "--gpu-memory-utilization", str(_VLLM_SHARE)]
        line += ["--max-num-batched-tokens", str(_CHUNK), "--enable-prefix-caching"]
        # Of `allowed_token_ids` alone: the scores of answers, which only this makes pass a router.
        return [*line, "--logprobs-mode", "processed_logprobs", *at]
    line = ["sglang", "serve", "--model-path", model, *shared, "--tp-size", ranks]
    if replicas > 1:
        line += ["--dp-size", str(replicas)]
    line += ["--context-length", length, "--mem-fraction-static", str(USABLE)]
    # lpm holds back prompts whose prefix is being computed: cold siblings pay for it once.
    line += ["--chunked-prefill-size", str(_CHUNK), "--schedule-policy", "lpm"]
    return [*line, "--enable-metrics", "--enable-cache-report", *at]


def router_line(deployment: Deployment, host: str, port: int, workers: Sequence[str]) -> list[str]:
    """What starts the router; `workers` are its options that say where they are.

    A prompt goes to the worker that has seen most of its text before. Two of the router's defaults
    do not fit rankings: a common part of 0.3 is enough for it, so that a long instruction before
    all prompts sends everybody to one worker; and it leaves a warm worker when that has 64 prompts
    more to do than another, however short they are.
    """
    wanted, sized = deployment.wanted, deployment.sized
    prefix = (wanted.context - wanted.item_tokens) / wanted.context
    # As many hot prompts as take the time in which another worker computes the prefix.
    gap = round((sized.cold - sized.hot) / (sized.hot / wanted.items))
    line = ["python3", "-m", "sglang_router.launch_router", "--policy", "cache_aware"]
    line += ["--cache-threshold", f"{_KNOWN_SHARE * prefix:.2f}"]
    line += ["--balance-abs-threshold", str(max(1, gap))]
    line += ["--max-tree-size", str(remembered(deployment))]
    line += ["--prometheus-host", host, "--prometheus-port", str(METRICS_PORT)]
    return [*line, *workers, "--host", host, "--port", str(port)]


def remembered(deployment: Deployment) -> int:
    """Letters of text that the router remembers of one worker: as many as its cache holds."""
    return min(deployment.sized.cached_tokens * _LETTERS, _MOST_LETTERS)


def script(deployment: Deployment) -> str:
    """A shell script that serves the checkpoint on one machine, reached from it alone.

    Several replicas are data-parallel ranks of one SGLang, or a vLLM each, behind the router.
    """
    replicas, port = deployment.local_replicas, PORTS[deployment.engine]
    model = str(deployment.checkpoint.folder.resolve())
    told = "\n".join(f"# {line}" for line in _about(deployment))
    head = f"#!/bin/sh\n{told}\nset -eu\nexport HF_HUB_OFFLINE=1\n\n"
    if replicas == 1:
        return f"{head}exec {_text(serve_line(deployment, model, LOOPBACK, port))}\n"
    if deployment.engine == "sglang":
        starts = [_text(serve_line(deployment, model, LOOPBACK, port, replicas))]
        workers = ["--worker-urls", f"http://{LOOPBACK}:{port}", "--dp-aware"]
    else:
        ports = [port + replica for replica in range(replicas)]
        workers = ["--worker-urls", *(f"http://{LOOPBACK}:{one}" for one in ports)]
        ranks = deployment.sized.ranks
        starts = []
        for replica, one in enumerate(ports):
            gpus = ",".join(str(replica * ranks + rank) for rank in range(ranks))
            line = _text(serve_line(deployment, model, LOOPBACK, one))
            starts.append(f"CUDA_VISIBLE_DEVICES={gpus} {line}")
    router = _text(router_line(deployment, LOOPBACK, ROUTER_PORT, workers))
    started = "".join(f'{one} &\nstarted="$started $!"\n' for one in [*starts, router])
    # The shell waits above them all, and takes them with it when it is told to end or the router
    # does; a program in the foreground would keep it from hearing. The traps come last: what is
    # being started would otherwise miss a signal.
    traps = "trap 'kill $started || true; wait' EXIT\ntrap 'exit 1' INT TERM\n"
    return f"{head}started=\n{started}{traps}wait $!\n"


def dockerfile(base: str, version: str) -> str:
    """The engine's image with slmperf in it, whose entry points the engine finds by itself."""
    return (
        f"FROM {base}\n"
        f"# The wheel of slmperf {version}: `make wheel` writes it to dist/.\n"
        "COPY slmperf-*.whl /tmp/\n"
        "RUN python3 -m pip install --no-deps /tmp/slmperf-*.whl && rm /tmp/slmperf-*.whl\n"
    )


def _about(deployment: Deployment) -> list[str]:
    sized, local = deployment.sized, deployment.local_replicas
    gpus = local * sized.ranks
    told = f"{deployment.name}: {local} of {sized.replicas} replicas on {gpus} GPUs of this machine"
    return [told, f"which alone reaches them ({LOOPBACK})."]


def _text(line: Sequence[str]) -> str:
    """A command line for a shell, an option with its value per line."""
    text = ""
    for word in line:
        text += (" \\\n    " if word.startswith("--") else " ") + shlex.quote(word)
    return text.strip()
