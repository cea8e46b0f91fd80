"""The plug-in for SGLang (0.5.23): models that pruning left with layers of different sizes.

Where slmperf is installed beside SGLang, the entry point `sglang.srt.plugins` registers

    PrunedForCausalLM     Llama, Mistral, Qwen2 and Qwen3 with per-layer heads, key/value heads and
                          neurons, quantised or not, on SGLang's own layers
    "slmperf"             an attention backend, `slmperf.ops.paged_attention`: query heads spread
                          unevenly over key/value heads as they are (--attention-backend slmperf);
                          and a quantisation method, `slmperf.models.QuantizedLinear`: schemes and
                          sizes that SGLang has no kernel for (--quantization slmperf)

SGLANG_EXTERNAL_MODEL_PACKAGE=slmperf.serve, without the entry point, registers the class alone, for
stock checkpoints that ask for it: a configuration of per-layer sizes is read before that.

SGLang's cache has one number of key/value heads for all layers: layers with fewer are filled up
with zeros in it. Its own backends want as many query heads for every key/value head; for them
smaller groups are filled up with copies, whose outputs are dropped.

A configuration with `label_token_ids` (or --json-model-override-args '{"label_token_ids": [..]}')
gives logits of these tokens alone: the head has as many rows, and /v1/score with apply_softmax the
same scores. Other tokens cannot be sampled then.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slmperf.check import InputError
from slmperf.models.engines import flat
from slmperf.models.engines.decoder import Decoder, decoder_of
from slmperf.models.engines.labels import LabelHead
from slmperf.models.engines.support import check_served
from slmperf.models.engines.weights import STACKED, placed, sources

try:
    from sglang.srt.arg_groups.choices import (
        add_attention_backend_choices,
        add_quantization_method_choices,
    )
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.layers.rotary_embedding import get_rope
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from sglang.srt.model_executor.forward_context import get_attn_backend
    from sglang.srt.model_loader.weight_utils import (
        default_weight_loader,
        maybe_remap_kv_scale_name,
    )
    from sglang.srt.models.llama import LlamaMLP
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.runtime_context import get_parallel, get_server_args
    from sglang.srt.utils import add_prefix

    from slmperf.serve import sglang_linear
    from slmperf.serve.sglang_attention import BACKEND, PagedBackend
except ModuleNotFoundError as error:
    raise ImportError(
        f"slmperf.serve.sglang: wanted SGLang 0.5.23 beside slmperf, found no module {error.name}"
    ) from error

# At import: the configuration is read before any model, and SGLANG_EXTERNAL_MODEL_PACKAGE imports.
flat.register()


def register() -> None:
    """The plug-in's entry point; SGLang calls it once in each of its processes."""
    ModelRegistry.models[PrunedForCausalLM.__name__] = PrunedForCausalLM
    register_attention_backend(BACKEND)(PagedBackend)
    add_attention_backend_choices([BACKEND])
    sglang_linear.register()
    add_quantization_method_choices([sglang_linear.NAME])


class PrunedForCausalLM(nn.Module):
    """A decoder whose layers differ, and its head.

    Raises InputError for what SGLang cannot serve, before any weight is read.
    """

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        parallel = get_parallel()
        self.config = config
        _check(config, parallel)
        self.decoder = decoder_of(config, parallel.tp_size)
        self.model = _Model(config, self.decoder, quant_config, add_prefix("model", prefix))
        self.lm_head: nn.Module
        if getattr(config, "label_token_ids", None) is not None:
            self.lm_head = LabelHead(config)
        elif config.tie_word_embeddings:
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=quant_config,
                prefix=add_prefix("lm_head", prefix),
            )
        labelled = isinstance(self.lm_head, LabelHead)
        self.logits_processor = (_LabelLogits if labelled else LogitsProcessor)(config)
        # Of the checkpoint, what has not come yet; whether it all came, SGLang does not look.
        self.unfilled = sources(name for name, _ in self.named_parameters())

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: Any,
        input_embeds: Tensor | None = None,
        **unused: Any,
    ) -> Any:
        """input_ids, positions (T,) -> SGLang's LogitsProcessorOutput."""
        hidden = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """A checkpoint's tensors, or later some of them again; InputError where one is missing."""
        params = dict(self.named_parameters())
        if isinstance(self.lm_head, LabelHead):
            weights = self.lm_head.of_checkpoint(weights)
        ordered = placed(
            weights,
            self.decoder.layers,
            self.decoder.layouts,
            hidden_size=self.config.hidden_size,
            head_size=self.decoder.head_size,
        )
        for name, tensor in ordered:
            self.unfilled.discard(name)
            if name.endswith(("k_scale", "v_scale")):  # which SGLang has in its attention
                name = maybe_remap_kv_scale_name(name, params) or ""
            block, projection, kind = ["", *name.rsplit(".", 2)][-3:]
            stacked, part = STACKED.get(projection, (projection, None))
            if part is not None:
                name = f"{block}.{stacked}.{kind}"
            if name in params:  # else a head that is tied, or another's scale
                param, shard = params[name], () if part is None else (part,)
                getattr(param, "weight_loader", default_weight_loader)(param, tensor, *shard)
        if self.unfilled:
            raise InputError(f"checkpoint: no tensor {min(self.unfilled)}")


EntryClass = PrunedForCausalLM


class _Model(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, config: Any, decoder: Decoder, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("embed_tokens", prefix),
        )
        self.layers = nn.ModuleList(
            _Layer(config, decoder, index, quant_config, add_prefix(f"layers.{index}", prefix))
            for index in range(len(decoder.layers))
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: Any, embeds: Tensor | None
    ) -> Tensor:
        hidden = self.embed_tokens(input_ids) if embeds is None else embeds
        residual = None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual, forward_batch)
        return self.norm(hidden, residual)[0]


class _Layer(nn.Module):
    def __init__(
        self, config: Any, decoder: Decoder, index: int, quant_config: Any, prefix: str
    ) -> None:
        super().__init__()
        self.self_attn = _Attention(
            config, decoder, index, quant_config, add_prefix("self_attn", prefix)
        )
        self.mlp = LlamaMLP(
            config.hidden_size,
            decoder.layers[index].intermediate_size,
            config.hidden_act,
            quant_config=quant_config,
            prefix=add_prefix("mlp", prefix),
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: Tensor, hidden: Tensor, residual: Tensor | None, forward_batch: Any
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions, hidden, forward_batch)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class _Attention(nn.Module):
    """Attention of one layer on one rank: H query heads over G key/value heads, in a cache that is
    `width` key/value heads wide."""

    def __init__(
        self, config: Any, decoder: Decoder, index: int, quant_config: Any, prefix: str
    ) -> None:
        super().__init__()
        layout, rank = decoder.layouts[index], get_parallel().tp_rank
        self.head_size = size = decoder.head_size
        self.width = width = max(each.ranks[rank].kv_heads for each in decoder.layouts)
        heads, taken, kept, real = layout.of_rank(rank, width)
        self.heads = heads
        queries, kv_heads = layout.layout.query_heads, layout.layout.kv_heads
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            size,
            len(queries),
            len(kv_heads),
            bias=decoder.qkv_bias,
            quant_config=quant_config,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.o_proj = RowParallelLinear(
            len(queries) * size,
            config.hidden_size,
            bias=decoder.output_bias,
            quant_config=quant_config,
            prefix=add_prefix("o_proj", prefix),
        )
        self.normed = decoder.normed
        if self.normed:
            self.q_norm = RMSNorm(size, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            size,
            rotary_dim=size,
            max_position=config.max_position_embeddings,
            base=config.rope_parameters["rope_theta"],
            rope_scaling=config.rope_parameters,
        )
        self.attn = RadixAttention(
            width * layout.group,
            size,
            size**-0.5,
            num_kv_heads=width,
            layer_id=index,
            quant_config=quant_config,
            prefix=add_prefix("attn", prefix),
        )
        self.attn.head_map = heads  # for our own backend
        # For SGLang's backends, which have even groups and a cache of one width.
        self.even = taken == list(range(heads.query_heads))
        self.filled_up = not all(real)
        self.register_buffer("taken", torch.tensor(taken), persistent=False)
        self.register_buffer("kept", torch.tensor(kept), persistent=False)
        self.register_buffer("real", torch.tensor(real)[:, None], persistent=False)

    def forward(self, positions: Tensor, hidden: Tensor, forward_batch: Any) -> Tensor:
        """hidden (T, D) -> (T, D)."""
        heads, size = self.heads, self.head_size
        of_keys = heads.kv_heads * size
        query, key, value = self.qkv_proj(hidden)[0].split(
            [heads.query_heads * size, of_keys, of_keys], dim=-1
        )
        if self.normed:
            query = self.q_norm(query.reshape(-1, size)).view(query.shape)
            key = self.k_norm(key.reshape(-1, size)).view(key.shape)
        query, key = self.rotary_emb(positions, query, key)
        if self.width > heads.kv_heads:
            filled = (0, self.width * size - of_keys)
            key, value = nn.functional.pad(key, filled), nn.functional.pad(value, filled)
        if self.even or isinstance(get_attn_backend(), PagedBackend):
            output = self.attn(query, key, value, forward_batch).unflatten(-1, (-1, size))
        else:
            query = query.unflatten(-1, (-1, size)).index_select(1, self.taken).flatten(-2)
            output = self.attn(query, key, value, forward_batch)
            output = output.unflatten(-1, (-1, size)).index_select(1, self.kept)
        if self.filled_up:  # queries of zeros see the mean of all values
            output = output * self.real
        return self.o_proj(output.flatten(-2))[0]


class _LabelLogits(LogitsProcessor):
    """Logits by a LabelHead, which every rank has whole."""

    def _get_logits(
        self,
        hidden_states: Tensor,
        lm_head: LabelHead,
        logits_metadata: Any,
        embedding_bias: Tensor | None = None,
        use_logits_buffer: bool = True,
    ) -> Tensor:
        logits = lm_head(hidden_states)
        return self._copy_logits_to_buffer(logits, logits_metadata, use_buffer=use_logits_buffer)


def _check(config: Any, parallel: Any) -> None:
    who, arguments = "slmperf.serve.sglang", get_server_args()
    for name in ("pp_size", "attn_dp_size", "attn_cp_size"):
        if getattr(parallel, name) != 1:
            raise InputError(f"{who}: {name} is {getattr(parallel, name)}, wanted 1")
    check_served(
        who,
        config.to_dict(),
        engine="sglang",
        ranks=parallel.tp_size,
        plugin=True,
        device="cpu" if arguments.device == "cpu" else "cuda",
        quantization=arguments.quantization,
    )
