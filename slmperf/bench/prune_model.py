"""Pruning a whole model with random weights, beside the forwards that no way of doing it avoids.

The calibration set runs through every block twice: once to gather the Gram matrices of its inputs,
once to make the inputs of the next. `times_forwards` is the whole pruning by the time of two such
passes of the unpruned model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from slmperf.models.shapes import Shape
from slmperf.prune.layer.elimination import osscar
from slmperf.prune.model import prune_model
from slmperf.testing.recurrence import layer_problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARMUP_TOKENS = 8192  # through a model of one layer: kernels compile, libraries load


class Pruning(NamedTuple):
    """What is pruned to what, and on how much text."""

    shape: Shape
    intermediate_size: int
    attention_heads: int
    tokens: int
    context: int  # tokens of a sequence
    rows: int  # sequences of a batch

    def __str__(self) -> str:
        return (
            f"prune {self.shape} to F {self.intermediate_size}, {self.attention_heads} heads, "
            f"{self.tokens} tokens"
        )


def measure(what: Pruning, mode: str, device: str) -> Iterator[dict[str, Any]]:
    """Rows of the pruning and of its two forwards. One run each: it takes long."""
    small = replace(what.shape, layers=1, name="")
    few = batches(what._replace(tokens=min(what.tokens, WARMUP_TOKENS)), device)
    _prune(_model(small, what.context, device), few, what, mode)

    model, text = _model(what.shape, what.context, device), batches(what, device)
    forwards = 2 * _forward_seconds(model, text, device)
    yield _row(f"{what}, {mode}, two forwards", forwards)
    start = _now(device)
    report = _prune(model, text, what, mode)
    seconds = _now(device) - start
    layers = report.layers
    yield _row(f"{what}, {mode}", seconds) | {
        "seconds": seconds,
        "forwards_seconds": forwards,
        "times_forwards": seconds / forwards,
        "calibration_seconds": report.calibration_seconds,
        "gram_seconds": sum(layer.gram_seconds for layer in layers),
        "solve_seconds": sum(layer.solve_seconds for layer in layers),
        "advance_seconds": report.advance_seconds,
        "device_peak_mib": report.device_peak_mib,
        "peak_mib": report.peak_mib,
        "parameters": report.parameters_after,
    }


def same_on_both(inputs: int, outputs: int, keep: int, device: str) -> dict[str, Any]:
    """One layer solved on the CPU and on `device`: a row with how far the answers are apart."""
    problem = layer_problem("correlated", 0, inputs, outputs, 2 * inputs)
    gram, weight = (given.float() for given in problem)
    there, here = gram.to(device), weight.to(device)
    osscar(there, here, keep=keep)
    start = _now(device)
    found = osscar(there, here, keep=keep)
    seconds = _now(device) - start
    start = time.perf_counter()
    wanted = osscar(gram, weight, keep=keep)
    return _row(f"prune osscar {inputs}x{outputs} to {keep}", seconds) | {
        "cpu_seconds": time.perf_counter() - start,
        "kept_alike": float(torch.isin(found.kept, wanted.kept).double().mean()),
        "error_apart": abs(found.error / wanted.error - 1),
    }


def batches(what: Pruning, device: str) -> list[dict[str, Tensor]]:
    """Random text, whole sequences only."""
    make = torch.Generator().manual_seed(0)
    count = max(1, what.tokens // what.context)
    ids = torch.randint(0, what.shape.vocabulary, (count, what.context), generator=make)
    return [{"input_ids": part.to(device)} for part in ids.split(what.rows)]


def _model(shape: Shape, context: int, device: str) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=context,
        tie_word_embeddings=shape.tied,
    )
    with ExitStack() as scope:
        scope.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
        scope.enter_context(torch.device(device))
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def _prune(model: PreTrainedModel, text: list[dict[str, Tensor]], what: Pruning, mode: str) -> Any:
    return prune_model(
        model,
        text,
        intermediate_size=what.intermediate_size,
        attention_heads=what.attention_heads,
        mode=mode,
    )


@torch.no_grad()
def _forward_seconds(model: PreTrainedModel, text: list[dict[str, Tensor]], device: str) -> float:
    """One pass of the text through all blocks."""
    model.base_model(**text[0], use_cache=False)
    start = _now(device)
    for batch in text:
        model.base_model(**batch, use_cache=False)
    return _now(device) - start


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _row(name: str, seconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "time_us": seconds * 1e6,
        "low_us": seconds * 1e6,
        "high_us": seconds * 1e6,
        "samples": 1,
    }
