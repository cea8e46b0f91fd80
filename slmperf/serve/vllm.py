"""The plug-in for vLLM (0.33.0): models that pruning left with layers of different sizes.

Where slmperf is installed beside vLLM, the entry point `vllm.general_plugins` registers

    PrunedForCausalLM     Llama, Mistral, Qwen2 and Qwen3 with per-layer heads, key/value heads and
                          neurons, quantised or not, on vLLM's own layers
    CUSTOM                an attention backend, `slmperf.ops.paged_attention`: query heads spread
                          unevenly over key/value heads as they are (--attention-backend CUSTOM)
    "slmperf"             a quantisation method, `slmperf.models.QuantizedLinear`: schemes and sizes
                          that vLLM has no kernel for (--quantization slmperf)

Every layer has a cache of its own width. vLLM's own backends want as many query heads for every
key/value head; for them smaller groups are filled up with copies, whose outputs are dropped.

A configuration with `label_token_ids` (or --hf-overrides '{"label_token_ids": [..]}') gives logits
of these tokens alone: the head has as many rows, and probabilities are those among the labels.
Other tokens cannot be sampled then. A stock checkpoint is served by this class with
--hf-overrides '{"architectures": ["PrunedForCausalLM"]}'.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slmperf.check import InputError
from slmperf.models.engines import flat
from slmperf.models.engines.decoder import Decoder, decoder_of
from slmperf.models.engines.labels import LabelHead
from slmperf.models.engines.support import check_served
from slmperf.models.engines.weights import STACKED, placed, sources
from slmperf.models.structure import FUSED

try:
    from vllm.compilation.decorators import support_torch_compile
    from vllm.config import VllmConfig
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )
    from vllm.model_executor.models.interfaces import SupportsQuant
    from vllm.model_executor.models.llama import LlamaMLP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from slmperf.serve import vllm_attention, vllm_linear
except ModuleNotFoundError as error:
    raise ImportError(
        f"slmperf.serve.vllm: wanted vLLM 0.33.0 beside slmperf, found no module {error.name}"
    ) from error


def register() -> None:
    """The plug-in's entry point; vLLM calls it in each of its processes."""
    flat.register()
    ModelRegistry.register_model(
        PrunedForCausalLM.__name__, f"{__name__}:{PrunedForCausalLM.__name__}"
    )
    vllm_attention.register()
    vllm_linear.register()


class PrunedForCausalLM(nn.Module, SupportsQuant):
    """A decoder whose layers differ, and its head.

    Raises InputError for what vLLM cannot serve, before any weight is read.
    """

    packed_modules_mapping: ClassVar = {whole: list(parts) for whole, parts in FUSED.items()}
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            f".{name}": (f".{whole}", part) for name, (whole, part) in STACKED.items()
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config, ranks = vllm_config.model_config, get_tensor_model_parallel_world_size()
        self.config = config = model_config.hf_config
        check_served(
            model_config.model,
            config.to_dict() | {"architectures": [type(self).__name__]},
            engine="vllm",
            ranks=ranks,
            plugin=True,
            device="cpu" if current_platform.is_cpu() else "cuda",
            dtype=str(model_config.dtype).removeprefix("torch."),
            quantization=model_config.quantization,
        )
        self.sizes = decoder_of(config, ranks)
        self.model = _Decoder(
            vllm_config=vllm_config, sizes=self.sizes, prefix=maybe_prefix(prefix, "model")
        )
        self.lm_head: nn.Module
        if getattr(config, "label_token_ids", None) is not None:
            self.lm_head = LabelHead(config)
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
            self.logits_processor = LogitsProcessor(config.vocab_size)
        # Of the checkpoint, what has not come yet; whether it all came, vLLM does not look.
        self.unfilled = sources(name for name, _ in self.named_parameters())

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """input_ids, positions (T,) -> (T, D). One pipeline stage: no intermediate_tensors."""
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(N, D) -> (N, V); None on ranks that do not sample."""
        if isinstance(self.lm_head, LabelHead):
            return self.lm_head(hidden_states)
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """A checkpoint's tensors, or later some of them again -> the names of filled parameters.

        InputError where one is missing.
        """
        ordered = placed(
            weights,
            self.sizes.layers,
            self.sizes.layouts,
            hidden_size=self.config.hidden_size,
            head_size=self.sizes.head_size,
        )
        if isinstance(self.lm_head, LabelHead):
            ordered = self.lm_head.of_checkpoint(ordered)
        filled = AutoWeightsLoader(self).load_weights(
            self._noted(ordered), mapper=self.hf_to_vllm_mapper
        )
        if self.unfilled:
            raise InputError(f"checkpoint: no tensor {min(self.unfilled)}")
        return filled

    def _noted(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.unfilled.discard(name)
            yield name, tensor


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class _Decoder(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, *, vllm_config: VllmConfig, sizes: Decoder, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.layers = nn.ModuleList(
            _Layer(vllm_config, sizes, index, f"{prefix}.layers.{index}")
            for index in range(len(sizes.layers))
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None
    ) -> Tensor:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return self.norm(hidden, residual)[0]


class _Layer(nn.Module):
    def __init__(self, vllm_config: VllmConfig, sizes: Decoder, index: int, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.self_attn = _Attention(vllm_config, sizes, index, f"{prefix}.self_attn")
        self.mlp = LlamaMLP(
            config.hidden_size,
            sizes.layers[index].intermediate_size,
            config.hidden_act,
            quant_config=vllm_config.quant_config,
            bias=sizes.mlp_bias,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: Tensor, hidden: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden, residual = self.post_attention_layernorm(
            self.self_attn(positions, hidden), residual
        )
        return self.mlp(hidden), residual


class _Attention(nn.Module):
    """Attention of one layer on one rank: H query heads over G key/value heads."""

    def __init__(self, vllm_config: VllmConfig, sizes: Decoder, index: int, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        rank, layout = get_tensor_model_parallel_rank(), sizes.layouts[index]
        heads, taken, kept, real = layout.of_rank(rank, layout.ranks[rank].kv_heads)
        self.heads = heads
        self.head_size = size = sizes.head_size
        queries = layout.layout.query_heads
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            size,
            len(queries),
            len(layout.layout.kv_heads),
            bias=sizes.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            len(queries) * size,
            config.hidden_size,
            bias=sizes.output_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.normed = sizes.normed
        if self.normed:
            self.q_norm = RMSNorm(size, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(size, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            size,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        own_backend = vllm_config.attention_config.backend is AttentionBackendEnum.CUSTOM
        self.attn = Attention(
            heads.kv_heads * layout.group,
            size,
            size**-0.5,
            num_kv_heads=heads.kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=sizes.windows[index],
            prefix=f"{prefix}.attn",
            **(
                {"attn_backend": vllm_attention.PagedBackend, "head_map": heads}
                if own_backend
                else {}
            ),
        )
        if own_backend:
            self.attn.num_heads = heads.query_heads  # it takes no uneven number itself
        self.even = own_backend or taken == list(range(heads.query_heads))
        self.filled_up = not all(real)
        self.register_buffer("taken", torch.tensor(taken), persistent=False)
        self.register_buffer("kept", torch.tensor(kept), persistent=False)
        self.register_buffer("real", torch.tensor(real)[:, None], persistent=False)

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """hidden (T, D) -> (T, D)."""
        heads, size = self.heads, self.head_size
        of_keys = heads.kv_heads * size
        query, key, value = self.qkv_proj(hidden)[0].split(
            [heads.query_heads * size, of_keys, of_keys], dim=-1
        )
        if self.normed:
            query = self.q_norm(query.unflatten(-1, (-1, size))).flatten(-2)
            key = self.k_norm(key.unflatten(-1, (-1, size))).flatten(-2)
        query, key = self.rotary_emb(positions, query, key)
        if not self.even:
            query = query.unflatten(-1, (-1, size)).index_select(1, self.taken).flatten(-2)
        output = self.attn(query, key, value).unflatten(-1, (-1, size))
        if not self.even:
            output = output.index_select(1, self.kept)
        if self.filled_up:  # queries of zeros see the mean of all values
            output = output * self.real
        return self.o_proj(output.flatten(-2))[0]
