"""measure: how long a prefill and a ranking take, and where the time of one layer goes.

Token ids are random (seeded): the time of a dense model does not depend on them, and the routing of
a mixture of experts sees a mixed load. Every figure is a median over repeats after a warm-up, wall
time, with the device synchronised on both sides.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from slmperf.check import InputError
from slmperf.engine.engine import Engine
from slmperf.engine.layout import decoder

# The parts of one decoder layer, as printed.
PARTS = ("qkv projections", "rope and attention", "output projection", "norms", "mlp", "rest")


class Prefill(NamedTuple):
    """Milliseconds from token ids to the KV cache and P(yes) at the last token."""

    context: int
    median_ms: float
    p90_ms: float


class Rank(NamedTuple):
    """Milliseconds to rank k candidates; `cached` starts from an open prefix, `uncached` from
    nothing.
    """

    prefix: int
    candidates: int
    candidate_tokens: int
    uncached_ms: float  # k whole prompts, the prefix computed k times
    cached_ms: float


def prefill_latency(
    engine: Engine, context: int, *, repeats: int = 9, warmup: int = 2, seed: int = 0
) -> Prefill:
    """Time of a prefill of `context` tokens, batch 1: the first answer's latency (TTFT)."""
    _check_context("prefill_latency", engine.model, context)
    (ids,) = _random_ids(engine.model, [context], seed)

    @torch.inference_mode()
    def prefill() -> None:
        tokens = torch.from_numpy(ids).to(engine.device)[None]
        output = decoder(engine.model)(tokens, use_cache=True)
        engine.head(output.last_hidden_state[:, -1])

    times = _times_ms(prefill, engine.device, repeats, warmup)
    return Prefill(context, float(np.median(times)), float(np.quantile(times, 0.9)))


def rank_latency(
    engine: Engine,
    context: int,
    *,
    candidates: int,
    candidate_tokens: int = 12,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
) -> Rank:
    """Time to rank k candidates of `candidate_tokens` behind a prefix that fills up `context`
    tokens.
    """
    _check_context("rank_latency", engine.model, context)
    if not 0 < candidate_tokens < context or candidates < 1:
        raise InputError(
            f"rank_latency: {candidates} candidates of {candidate_tokens} tokens, "
            f"expected at least 1 of 1 to {context - 1} tokens"
        )
    length = context - candidate_tokens
    prefix, *ask = _random_ids(engine.model, [length] + [candidate_tokens] * candidates, seed)
    opened = engine.open(prefix)
    uncached = _times_ms(lambda: engine.score_uncached(prefix, ask), engine.device, repeats, warmup)
    cached = _times_ms(lambda: engine.score(opened, ask), engine.device, repeats, warmup)
    return Rank(
        prefix=length,
        candidates=candidates,
        candidate_tokens=candidate_tokens,
        uncached_ms=float(np.median(uncached)),
        cached_ms=float(np.median(cached)),
    )


def layer_split(
    model: nn.Module, context: int, *, repeats: int = 5, warmup: int = 1, seed: int = 0
) -> dict[str, float]:
    """Milliseconds of each part of one decoder layer in a prefill of `context` tokens, batch 1.

    Keys are PARTS; "rest" is what the layer takes beyond them (residual additions, Python, the
    hooks themselves). Mean over the layers, median over repeats. The model is a Llama or Mixtral in
    layout: self_attn with q_proj, k_proj, v_proj, o_proj; two norms; mlp.
    """
    _check_context("layer_split", model, context)
    device = next(model.parameters()).device
    layers = list(decoder(model).layers)
    watched: list[tuple[str, nn.Module]] = []
    for layer in layers:
        attention = layer.self_attn
        watched += [("layer", layer), ("attention", attention), ("mlp", layer.mlp)]
        watched += [("norms", layer.input_layernorm), ("norms", layer.post_attention_layernorm)]
        watched += [("output projection", attention.o_proj)]
        watched += [
            ("qkv projections", one)
            for one in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
    spent: dict[str, float] = {}
    begun: dict[nn.Module, float] = {}

    def before(module: nn.Module, *_: object) -> None:
        _synchronise(device)
        begun[module] = time.perf_counter()

    def after(name: str) -> Callable[..., None]:
        def stop(module: nn.Module, *_: object) -> None:
            _synchronise(device)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - begun[module]

        return stop

    (ids,) = _random_ids(model, [context], seed)
    tokens = torch.from_numpy(ids).to(device)[None]
    was_training = model.training
    model.eval()
    handles = []
    samples = []
    try:
        for name, module in watched:
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after(name)))
        with torch.inference_mode():
            for turn in range(warmup + repeats):
                spent.clear()
                decoder(model)(tokens, use_cache=False)
                if turn >= warmup:
                    samples.append(_parts(spent, len(layers)))
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return {part: float(np.median([one[part] for one in samples])) for part in PARTS}


def _parts(spent: dict[str, float], layers: int) -> dict[str, float]:
    """Seconds by watched name, all layers -> milliseconds by part, one layer."""
    ms = {name: 1000 * seconds / layers for name, seconds in spent.items()}
    inside = ms["attention"] - ms["qkv projections"] - ms["output projection"]
    return {
        "qkv projections": ms["qkv projections"],
        "rope and attention": inside,
        "output projection": ms["output projection"],
        "norms": ms["norms"],
        "mlp": ms["mlp"],
        "rest": max(0.0, ms["layer"] - ms["attention"] - ms["norms"] - ms["mlp"]),
    }


def _random_ids(model: nn.Module, lengths: list[int], seed: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, model.config.vocab_size, length) for length in lengths]


def _check_context(name: str, model: nn.Module, context: int) -> None:
    limit = model.config.max_position_embeddings
    if not 1 < context <= limit:
        raise InputError(
            f"{name}: context is {context}, expected 2 to {limit} tokens (the trained length)"
        )


def _times_ms(run: Callable[[], object], device: torch.device, repeats: int, warmup: int) -> list:
    """Wall milliseconds of each of `repeats` runs after `warmup` unmeasured ones."""
    times = []
    for turn in range(warmup + repeats):
        _synchronise(device)
        start = time.perf_counter()
        run()
        _synchronise(device)
        if turn >= warmup:
            times.append(1000 * (time.perf_counter() - start))
    return times


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
