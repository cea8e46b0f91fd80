"""sizing: tensor-parallel size, replicas, cache and times to the first token, by slmperf.plan.

A request is a member: `items` prompts on one prefix. A replica works off one request after the
other, and requests come at random times, so that they wait (Pollaczek and Khinchine, M/G/1)

    lambda E[S^2] / (2 (1 - lambda E[S]))      lambda = requests per second and replica

where S is the time of a request that finds its prefix cached (the hot share of them) or not. How
often a prefix is still there when it is asked for again is not predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from slmperf.check import InputError
from slmperf.models.engines.facts import Cache, Engine
from slmperf.models.engines.support import check_served, reasons
from slmperf.plan.latency import LatencyModel, Prediction
from slmperf.plan.search import USABLE
from slmperf.serve.deploy.checkpoint import Checkpoint

GPUS = 8  # of one machine, at most: a replica is on one
TENSOR_PARALLEL = (1, 2, 4, 8)  # tried where no size is asked for
BUSY = 0.8  # of its time a replica works at most: beyond that, waiting grows without bound
# Tokens beyond a prompt's that an engine is started with: for an answer of one token, and for the
# six that SGLang keeps (srt/managers/tp_worker.py).
ROOM = 8


@dataclass(frozen=True)
class Wanted:
    """What is to be served, and how fast.

    context         tokens of a prompt, its own item_tokens included
    items           prompts of a request, all on one prefix
    hot_share       of the requests that find their prefix in the cache
    requests_per_s  None: not said, one replica
    target_ttft_ms  until all prompts of a request are answered, waiting included; None: any
    replicas        at least so many
    quantization    "slmperf": quantised layers are the plug-in's; None: the engine's
    """

    engine: Engine
    context: int
    items: int = 1
    item_tokens: int = 128
    hot_share: float = 0.0
    requests_per_s: float | None = None
    target_ttft_ms: float | None = None
    replicas: int = 1
    quantization: str | None = None

    def __post_init__(self) -> None:
        """Raises InputError for what cannot be asked."""
        if self.items < 1:
            raise InputError(f"--items: wanted a number >= 1, found {self.items}")
        if not 1 <= self.item_tokens <= self.context:
            raise InputError(
                f"--item-tokens: wanted 1 to the context's {self.context}, found {self.item_tokens}"
            )
        if not 0 <= self.hot_share <= 1:
            raise InputError(f"--hot-share: wanted 0 to 1, found {self.hot_share}")
        for option, found in (
            ("--requests-per-s", self.requests_per_s),
            ("--target-ttft-ms", self.target_ttft_ms),
        ):
            if found is not None and not 0 < found < math.inf:
                raise InputError(f"{option}: wanted a number > 0, found {found}")
        if self.replicas < 1:
            raise InputError(f"--replicas: wanted a number >= 1, found {self.replicas}")

    @property
    def tokens(self) -> int:
        """Tokens that one request has in the cache while it is answered."""
        return self.context + (self.items - 1) * self.item_tokens

    def length(self, checkpoint: Checkpoint) -> int:
        """The context that an engine is started with."""
        return min(self.context + ROOM, checkpoint.positions)


class Refused(NamedTuple):
    """A tensor-parallel size that cannot serve, and why not."""

    ranks: int
    reason: str


class Sized(NamedTuple):
    """Replicas of one tensor-parallel size that serve what is wanted.

    plugin               whether slmperf has to be installed beside the engine
    weight_bytes         of one GPU
    cache                keys and values of one token, on all GPUs of a replica
    cached_tokens        that a replica's cache holds
    cold, hot            milliseconds to the last first token of a request on an idle replica
    most_requests_per_s  that one replica answers in time
    wait_ms              mean of what a request waits for others; None: no rate was given
    busy                 share of its time that a replica works
    """

    ranks: int
    plugin: bool
    weight_bytes: int
    cache: Cache
    cached_tokens: int
    cold: Prediction
    hot: Prediction
    most_requests_per_s: float = 0.0
    replicas: int = 1
    wait_ms: float | None = None
    busy: float | None = None

    @property
    def gpus(self) -> int:
        """Of all replicas."""
        return self.ranks * self.replicas


def size(
    checkpoint: Checkpoint, gpu: LatencyModel, wanted: Wanted, ranks: int | None = None
) -> tuple[Sized, list[Sized | Refused]]:
    """The cheapest way to serve a checkpoint, and all that were tried.

    ranks   the tensor-parallel size; None: that with the fewest GPUs in all, the smaller of two

    Raises InputError with the reasons where there is none.
    """
    if wanted.context > checkpoint.positions:
        raise InputError(
            f"--context: wanted at most the model's {checkpoint.positions} tokens, found "
            f"{wanted.context}"
        )
    if not math.isfinite(gpu.device_memory_gb):
        raise InputError(f"{gpu.name}: wanted device_memory_gb, the memory of a GPU, found none")
    if wanted.quantization is not None and not checkpoint.facts.quantized:
        raise InputError(
            f"--quantization: {checkpoint.folder} is not quantised, wanted no --quantization"
        )
    if ranks is not None and ranks > GPUS:
        raise InputError(f"--tp: wanted at most the {GPUS} GPUs of a machine, found {ranks}")
    if ranks is not None:  # in the words of the rules, with the nearest that would be served
        check_served(
            str(checkpoint.folder),
            checkpoint.facts,
            engine=wanted.engine,
            ranks=ranks,
            plugin=True,
            quantization=wanted.quantization,
        )
    tried = [
        _sized(checkpoint, gpu, wanted, one)
        for one in (TENSOR_PARALLEL if ranks is None else (ranks,))
    ]
    possible = [one for one in tried if isinstance(one, Sized)]
    if not possible:
        told = "; ".join(f"tp {one.ranks}: {one.reason}" for one in refused_of(tried))
        raise InputError(f"{checkpoint.folder}: found no way to serve it: {told}")
    return min(possible, key=lambda one: (one.gpus, one.ranks)), tried


def refused_of(tried: Sequence[Sized | Refused]) -> list[Refused]:
    """Those of them that cannot serve."""
    return [one for one in tried if isinstance(one, Refused)]


def _sized(
    checkpoint: Checkpoint, gpu: LatencyModel, wanted: Wanted, ranks: int
) -> Sized | Refused:
    engine = wanted.engine
    here = partial(reasons, checkpoint.facts, engine=engine, ranks=ranks)
    plugin = wanted.quantization is not None or bool(here())
    refused = here(plugin=True, quantization=wanted.quantization) if plugin else []
    if refused:
        return Refused(ranks, refused[0])
    weights = checkpoint.weight_bytes(ranks)
    cache = checkpoint.facts.cache(ranks).of(engine)
    left = gpu.device_memory_gb * 1e9 * USABLE - weights
    cached = max(0, int(left * ranks // cache.bytes_per_token))
    if cached < wanted.tokens:
        return Refused(
            ranks,
            f"{weights / 1e9:.1f} GB of weights per GPU leave a cache of {cached:,} tokens, a "
            f"request has {wanted.tokens:,}",
        )
    asked: dict[str, Any] = {
        "context": wanted.context,
        "tensor_parallel": ranks,
        "items": wanted.items,
        "item_tokens": wanted.item_tokens,
        # The plug-in's method multiplies dequantised weights.
        "scheme": checkpoint.schemes[0] if wanted.quantization is None else "bf16",
    }
    found = Sized(
        ranks=ranks,
        plugin=plugin,
        weight_bytes=weights,
        cache=cache,
        cached_tokens=cached,
        cold=gpu.prefill_ms(checkpoint.shapes, **asked),
        hot=gpu.prefill_ms(checkpoint.shapes, **asked, hot=True),
    )
    slowest = found.hot if wanted.hot_share == 1 else found.cold
    if wanted.target_ttft_ms is not None and slowest >= wanted.target_ttft_ms:
        return Refused(ranks, f"{slowest:.0f} ms on an idle replica")
    return _replicated(found, wanted)


def _replicated(found: Sized, wanted: Wanted) -> Sized:
    """With the replicas that the rate of requests wants."""
    cold, hot, share = found.cold / 1e3, found.hot / 1e3, wanted.hot_share
    mean = (1 - share) * cold + share * hot
    square = (1 - share) * cold**2 + share * hot**2
    most = BUSY / mean  # requests per second and replica
    if wanted.target_ttft_ms is not None:
        slack = wanted.target_ttft_ms / 1e3 - (hot if share == 1 else cold)
        most = min(most, 2 * slack / (square + 2 * slack * mean))
    found = found._replace(most_requests_per_s=most, replicas=wanted.replicas)
    if wanted.requests_per_s is None:
        return found
    replicas = max(wanted.replicas, math.ceil(wanted.requests_per_s / most))
    rate = wanted.requests_per_s / replicas
    wait = rate * square / (2 * (1 - rate * mean))
    return found._replace(replicas=replicas, wait_ms=wait * 1e3, busy=rate * mean)
