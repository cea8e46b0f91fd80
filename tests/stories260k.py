"""The real 260K-parameter Llama in the shared data, as a Transformers model, with its tokeniser and
stories.

The files are llama2.c's: seven int32, then fp32 tensors in a fixed order, rotary pairs interleaved.
stories3m.py reads the larger one.
"""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

BOS = 1
CONTEXT = 512


def load_stories260k(data: Path) -> LlamaForCausalLM:
    raw = (data / "models" / "stories260K.bin").read_bytes()
    sizes = Sizes(*struct.unpack("<7i", raw[:28]))
    values = torch.from_numpy(np.frombuffer(raw, dtype="<f4", offset=28).copy())
    position = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal position
        count = int(np.prod(shape))
        position += count
        return values[position - count : position].view(shape)

    hidden, mlp, layers = sizes.hidden, sizes.mlp, sizes.layers
    keys = sizes.kv_heads * (hidden // sizes.heads)
    tensors = {
        "embedding": take(sizes.vocabulary, hidden),
        "attention_norm": take(layers, hidden),
        "q": take(layers, hidden, hidden),
        "k": take(layers, keys, hidden),
        "v": take(layers, keys, hidden),
        "o": take(layers, hidden, hidden),
        "mlp_norm": take(layers, hidden),
        "gate": take(layers, mlp, hidden),
        "down": take(layers, hidden, mlp),
        "up": take(layers, mlp, hidden),
        "norm": take(hidden),
    }
    return llama(sizes, tensors)


class Sizes(NamedTuple):
    """A header of llama2.c, in its order."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int


def llama(sizes: Sizes, tensors: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """llama2.c's tensors, layers first, as a Transformers model with tied embeddings."""

    def halves(weight: torch.Tensor) -> torch.Tensor:  # rows 0 1 2 3 of a head -> 0 2 1 3
        rows = weight.view(-1, sizes.hidden // sizes.heads // 2, 2, sizes.hidden)
        return rows.transpose(1, 2).reshape(weight.shape)

    state = {
        "model.embed_tokens.weight": tensors["embedding"],
        "model.norm.weight": tensors["norm"],
    }
    for i in range(sizes.layers):
        block = f"model.layers.{i}."
        state |= {
            block + "input_layernorm.weight": tensors["attention_norm"][i],
            block + "post_attention_layernorm.weight": tensors["mlp_norm"][i],
            block + "self_attn.q_proj.weight": halves(tensors["q"][i]),
            block + "self_attn.k_proj.weight": halves(tensors["k"][i]),
            block + "self_attn.v_proj.weight": tensors["v"][i],
            block + "self_attn.o_proj.weight": tensors["o"][i],
            block + "mlp.gate_proj.weight": tensors["gate"][i],
            block + "mlp.up_proj.weight": tensors["up"][i],
            block + "mlp.down_proj.weight": tensors["down"][i],
        }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.mlp,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            max_position_embeddings=sizes.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
    )
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    return model.eval()


def story_tokens(
    data: Path, split: str, count: int, tokens: str = "tok512.bin"
) -> list[torch.Tensor]:
    """The first `count` stories of a split as token ids, BOS first, cut to the context."""
    found = []
    for line in (data / "text" / "tinystories_917.jsonl").read_text().splitlines():
        story = json.loads(line)
        if story["split"] == split and len(found) < count:
            found.append(story["text"])
    return encode_texts(data, found, tokens)


def encode_texts(data: Path, texts: list[str], tokens: str) -> list[torch.Tensor]:
    """Texts as token ids of a tokeniser in the folder `models`, BOS first, cut to the context."""
    raw = (data / "models" / tokens).read_bytes()
    scores, ids, position, index = {}, {}, 4, 0
    while position < len(raw):
        score, length = struct.unpack_from("<fi", raw, position)
        position += 8
        piece = raw[position : position + length]
        position += length
        scores[piece] = score
        ids.setdefault(piece, index)
        index += 1

    @cache
    def encode(word: bytes) -> tuple[int, ...]:
        pieces = [bytes([byte]) for byte in word]
        while len(pieces) > 1:
            pairs = [pieces[i] + pieces[i + 1] for i in range(len(pieces) - 1)]
            best = max(range(len(pairs)), key=lambda i: scores.get(pairs[i], -1e9))
            if pairs[best] not in scores:
                break
            pieces[best : best + 2] = [pairs[best]]
        # Ids 0..2 are special, 3..258 the raw bytes.
        return tuple(ids.get(piece, piece[0] + 3) for piece in pieces)

    found = []
    for text in texts:
        encoded = [BOS]
        for word in text.split(" "):  # no piece spans a space: words merge alone
            encoded += encode(b" " + word.encode())
        found.append(torch.tensor(encoded[:CONTEXT]))
    return found


def batches(stories: list[torch.Tensor], size: int = 10) -> list[dict[str, torch.Tensor]]:
    """Right-padded batches with attention masks."""
    result = []
    for start in range(0, len(stories), size):
        part = stories[start : start + size]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        lengths = torch.tensor([len(story) for story in part])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        result.append({"input_ids": ids, "attention_mask": mask})
    return result


@torch.no_grad()
def perplexity(model: torch.nn.Module, data: list[dict[str, torch.Tensor]]) -> float:
    """exp of the mean negative log-likelihood over all predicted tokens."""
    total, tokens = 0.0, 0
    for batch in data:
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:].flatten()
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        tokens += int((labels != -100).sum())
    return float(np.exp(total / tokens))
