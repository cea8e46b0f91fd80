"""report: what `slmperf deploy` prints beside command lines and manifests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slmperf.command.terminal import new_table
from slmperf.models.engines.support import NAMES
from slmperf.plan.search import USABLE
from slmperf.serve.deploy.lines import PORTS, Deployment
from slmperf.serve.deploy.sizing import BUSY, GPUS, ROOM, Refused, Sized, refused_of

if TYPE_CHECKING:
    from rich.table import Table

    from slmperf.plan.latency import LatencyModel, Prediction

# What the router (0.3.2) did in front of both engines.
_ROUTER = {
    "sglang": "router: keeps the prompts of a member on one replica, by text or input_ids of "
    "/generate; /v1/score ends there in 404: ask /generate with return_logprob, token_ids_logprob "
    "and max_new_tokens 0 for the same log-probabilities of the answers, or the workers "
    "themselves ({workers})",
    "vllm": "router: keeps the prompts of a member on one replica, by the text of "
    "/v1/completions; /generative_scoring ends there in 404: ask /v1/completions with max_tokens "
    "1, temperature 0, logprobs, and the answers as allowed_token_ids for the same shares, or the "
    "workers themselves ({workers})",
}

_BACKEND = {"sglang": "slmperf", "vllm": "CUSTOM"}  # the plug-ins' attention


def table(deployment: Deployment, tried: list[Sized | Refused]) -> Table:
    """A row for each tensor-parallel size, the one that is taken marked."""
    wanted = deployment.wanted
    title = (
        f"{deployment.name} in {NAMES[wanted.engine]}: TTFT of {wanted.items} x "
        f"{wanted.context:,} tokens, {wanted.context - wanted.item_tokens:,} of them a common "
        "prefix; > taken, * extrapolates"
    )
    columns = (
        "", "tp", "weights GB/GPU", "KV kB/token", "cached tokens", "members", "cold ms", "hot ms",
        "requests/s", "replicas", "GPUs", "plug-in",
    )  # fmt: skip
    made = new_table(title, columns)
    for one in tried:
        if isinstance(one, Refused):  # said below the table
            made.add_row("", str(one.ranks), *["-"] * 10)
            continue
        made.add_row(
            ">" if one == deployment.sized else "",
            str(one.ranks),
            f"{one.weight_bytes / 1e9:.2f}",
            f"{one.cache.bytes_per_token / 1e3:.1f}",
            f"{one.cached_tokens:,}",
            f"{one.cached_tokens // wanted.context:,}",
            _ms(one.cold),
            _ms(one.hot),
            f"{one.most_requests_per_s:.3g}",
            str(one.replicas),
            str(one.gpus),
            "needed" if one.plugin else "no",
        )
    return made


def notes(deployment: Deployment, tried: Sequence[Sized | Refused], gpu: LatencyModel) -> list[str]:
    """What the figures rest on, and what whoever starts this has to know, a line each."""
    return [
        *(f"tp {one.ranks}: not served: {one.reason}" for one in refused_of(tried)),
        *_sizing_notes(deployment, gpu),
        *_engine_notes(deployment),
    ]


def summary(deployment: Deployment) -> list[str]:
    """What is served and how fast, for the head of a file."""
    wanted, sized = deployment.wanted, deployment.sized
    return [
        f"{deployment.name}: {sized.replicas} x tp {sized.ranks} ({sized.gpus} GPUs), "
        f"{NAMES[wanted.engine]}",
        f"prompts of {wanted.context:,} tokens, {wanted.items} on a prefix, the last "
        f"{wanted.item_tokens:,} of each its own",
        f"to the last first token of a request on an idle replica: cold {sized.cold:.0f} ms, "
        f"hot {sized.hot:.1f} ms (predicted)",
        f"cache: {sized.cached_tokens:,} tokens a replica, {sized.cache.bytes_per_token:,} bytes "
        "each",
    ]


def _sizing_notes(deployment: Deployment, gpu: LatencyModel) -> list[str]:
    wanted, sized, checkpoint = deployment.wanted, deployment.sized, deployment.checkpoint
    found = []
    if sized.wait_ms is not None:
        wait = sized.wait_ms
        found.append(
            f"at {wanted.requests_per_s:g} requests/s, {wanted.hot_share:.0%} of them hot: a "
            f"replica is busy {sized.busy:.0%} of the time and a request waits {wait:.0f} ms on "
            f"average, so that TTFT is {sized.cold + wait:.0f} ms cold, {sized.hot + wait:.0f} hot"
        )
    members = sized.cached_tokens // wanted.context * sized.replicas
    cold_rate = (wanted.requests_per_s or 0) * (1 - wanted.hot_share)
    if cold_rate:
        found.append(
            f"cache: prefixes of {members:,} members in all; {cold_rate:g} new ones a second push "
            f"one out after about {members / cold_rate:.0f} s"
        )
    if sized.cache.wasted:
        found.append(
            f"cache: {sized.cache.wasted:.0%} of it is zeros, for SGLang's pool has the widest "
            "layer's key/value heads in all layers; vLLM's has not, and pruning query heads alone "
            "leaves none"
        )
    if wanted.quantization is not None:
        found.append(
            f"times: --quantization {wanted.quantization} multiplies weights that it dequantises "
            "for every pass: counted at the rate of bf16, than which it is no faster"
        )
    elif len(checkpoint.schemes) > 1:
        others = ", ".join(checkpoint.schemes[1:])
        found.append(f"times: all matrices counted as {checkpoint.schemes[0]}, {others} too")
    if not all(layer.heads.uniform for layer in checkpoint.facts.layers):
        found.append(
            "times: unequal groups of query heads counted as groups of the largest size, as which "
            "the engine's own attention runs them; its matrix products are less. With "
            f"--attention-backend {_BACKEND[deployment.engine]} ours runs them as they are"
        )
    outside = dict.fromkeys(sized.cold.extrapolates + sized.hot.extrapolates)
    measured = gpu.fitted.cells and gpu.fitted.residual_pct is not None
    fitted = f"fitted within {gpu.fitted.residual_pct:g}%" if measured else gpu.source
    found.append(f"times: {gpu.name}, {fitted}; extrapolates: {'; '.join(outside) or 'nothing'}")
    found.append(
        f"sized for replicas that are busy {BUSY:.0%} of the time at most, requests that come at "
        f"random (M/G/1), and weights and cache in {USABLE:.0%} of the memory"
    )
    if deployment.engine == "vllm":
        found.append("times: the constants are SGLang's, vLLM was not measured")
    length = wanted.length(checkpoint)
    if length < wanted.context + ROOM:
        found.append(
            f"context: the model has {length:,} positions; prompts of more than {length - ROOM:,} "
            "tokens may be refused"
        )
    return found


def _engine_notes(deployment: Deployment) -> list[str]:
    sized, engine = deployment.sized, deployment.engine
    found = []
    if sized.plugin:
        found.append(
            "plug-in: slmperf has to be installed where the engine is (pip install --no-deps of "
            "its wheel; the image by the Dockerfile that --write leaves)"
        )
    else:
        found.append("plug-in: not needed, the stock engine serves this checkpoint")
    if sized.replicas > 1:
        found.append(_ROUTER[engine].format(workers=f"{deployment.name}-workers:{PORTS[engine]}"))
    found.append(
        "address: the script's servers listen on 127.0.0.1; in the cluster they have to listen on "
        "all addresses of their pods, for probes and clients come from outside. Nobody is asked "
        "for a key: let nothing but your own services reach them"
    )
    found.append(
        f"checkpoint: the claim {deployment.claim!r} has to hold the folder "
        f"{deployment.checkpoint.folder.resolve().name!r}, readable by pods on several machines"
    )
    if deployment.local_replicas < sized.replicas:
        found.append(
            f"script: starts {deployment.local_replicas} of the {sized.replicas} replicas, which "
            f"is what a machine with {GPUS} GPUs has room for; the manifest has all"
        )
    return found


def _ms(time: Prediction) -> str:
    return f"{time:.1f}" + "*" * bool(time.extrapolates)
