"""The attention backend CUSTOM of the plug-in for vLLM (--attention-backend CUSTOM)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from slmperf.check import InputError
from slmperf.ops.head_map import HeadMap
from slmperf.ops.paged_attention import paged_attention


def register() -> None:
    """Add the backend to vLLM's, in the place that it keeps for others'."""
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.{PagedBackend.__name__}")


class PagedMetadataBuilder(AttentionMetadataBuilder[CommonAttentionMetadata]):
    """vLLM's own metadata of a step, as they are."""

    # A graph holds the number of queries that sizes the launch: one for each decoded token.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CommonAttentionMetadata:
        return common_attn_metadata


class PagedBackend(AttentionBackend):
    """`slmperf.ops.paged_attention` over vLLM's pages, in any layout."""

    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return AttentionBackendEnum.CUSTOM.name

    @staticmethod
    def get_impl_cls() -> type[PagedImpl]:
        return PagedImpl

    @staticmethod
    def get_builder_cls() -> type[PagedMetadataBuilder]:
        return PagedMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


class PagedImpl(AttentionImpl[CommonAttentionMetadata]):
    """One layer's attention on one rank; `head_map` None: as many query heads everywhere."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        head_map: HeadMap | None = None,
    ) -> None:
        if alibi_slopes or logits_soft_cap or attn_type != AttentionType.DECODER:
            raise InputError(
                "attention backend CUSTOM: wanted a decoder without slopes or caps of scores"
            )
        self.num_heads = num_heads if head_map is None else head_map.query_heads
        self.head_size, self.scale, self.num_kv_heads = head_size, scale, num_kv_heads
        self.sliding_window, self.kv_cache_dtype = sliding_window, kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.head_map = head_map

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """key, value (T, G, C) into the slots (T,) of the cache (N, G, P, 2 C)."""
        slots = slot_mapping.clamp(min=0)  # padding: into the first page, which vLLM leaves empty
        for new, pages, scale in zip(
            (key, value), self._pages(kv_cache), (layer._k_scale, layer._v_scale), strict=True
        ):
            new = new[: len(slots)]
            if pages.dtype != new.dtype:
                new = (new.float() / scale).clamp(-448, 448).to(pages.dtype).view(torch.uint8)
                pages = pages.view(torch.uint8)
            pages[slots // pages.shape[1], slots % pages.shape[1]] = new

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CommonAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query (T, H, C) -> (T, H, C), written into `output`."""
        if attn_metadata is None:  # memory is being measured
            return output.fill_(0)
        keys, values = self._pages(kv_cache)
        scaled = keys.dtype != query.dtype
        found = paged_attention(
            query,
            keys,
            values,
            page_table=attn_metadata.block_table_tensor,
            query_starts=attn_metadata.query_start_loc,
            lengths=attn_metadata.seq_lens,
            head_map=self.head_map,
            scale=self.scale,
            key_scale=layer._k_scale.expand(self.num_kv_heads) if scaled else None,
            value_scale=layer._v_scale.expand(self.num_kv_heads) if scaled else None,
            window=self.sliding_window,
            longest_query=attn_metadata.max_query_len,
        )
        return output.copy_(found.output)

    def _pages(self, kv_cache: Tensor) -> tuple[Tensor, ...]:
        """The cache (N, G, P, 2 C) as pages of keys and of values, each (N, P, G, C)."""
        pages = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        if self.kv_cache_dtype.startswith("fp8"):
            return tuple(half.view(torch.float8_e4m3fn) for half in pages)
        return pages
