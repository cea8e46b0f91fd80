"""Whole models with random weights, and random text for them: what benches of whole models run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slmperf.calibrate.usage import now
from slmperf.models.shapes import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def random_model(
    shape: Shape, context: int, device: str, *, dtype: torch.dtype | None = None, seed: int = 0
) -> PreTrainedModel:
    """A Llama of this shape in evaluation mode, the same on every call.

    dtype: None: bf16 on CUDA, else fp32.
    """
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
        torch.set_default_dtype(dtype or (torch.bfloat16 if device == "cuda" else torch.float32))
        scope.enter_context(torch.random.fork_rng([device] if device == "cuda" else []))
        scope.enter_context(torch.device(device))
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def random_text(
    vocabulary: int, tokens: int, context: int, rows: int, device: str
) -> list[dict[str, Tensor]]:
    """Batches of `rows` sequences of `context` tokens, about `tokens` in all, at least one."""
    make = torch.Generator().manual_seed(0)
    count = max(1, tokens // context)
    ids = torch.randint(0, vocabulary, (count, context), generator=make)
    return [{"input_ids": part.to(device)} for part in ids.split(rows)]


@torch.no_grad()
def forward_seconds(model: PreTrainedModel, text: list[dict[str, Tensor]], device: str) -> float:
    """One pass of the text through all blocks."""
    where = torch.device(device)
    model.base_model(**text[0], use_cache=False)
    start = now(where)
    for batch in text:
        model.base_model(**batch, use_cache=False)
    return now(where) - start


def single(name: str, seconds: float) -> dict[str, Any]:
    """The row of something that was timed once."""
    time = seconds * 1e6
    return {"name": name, "time_us": time, "low_us": time, "high_us": time, "samples": 1}
