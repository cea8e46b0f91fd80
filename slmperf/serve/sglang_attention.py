"""The attention backend "slmperf" of the plug-in for SGLang (--attention-backend slmperf)."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from torch import Tensor, nn

from slmperf.ops.paged_attention import paged_attention

BACKEND = "slmperf"


class PagedBackend(AttentionBackend):
    """`slmperf.ops.paged_attention` over SGLang's cache, a page for every token.

    For any decoder. NotImplementedError for what the op does not compute: caps of scores, sinks,
    attention to an encoder or without order, layers with caches of their own.
    """

    needs_cpu_seq_lens = False

    def __init__(self, runner: Any) -> None:
        super().__init__()
        if isinstance(runner.token_to_kv_pool, SWAKVPool):
            raise NotImplementedError(f"attention backend {BACKEND}: a cache of sliding windows")
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        requests = len(self.req_to_token_pool.req_to_token)
        # Of decode steps, whose graphs keep the address: one query for each request.
        self.one_each = torch.arange(requests + 1, device=runner.device)
        self.starts, self.longest = self.one_each, 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        mode = forward_batch.forward_mode
        if mode.is_decode_or_idle():
            self.starts, self.longest = self.one_each[: forward_batch.batch_size + 1], 1
        elif mode.is_extend() and not mode.is_target_verify():
            lengths = forward_batch.extend_seq_lens
            self.starts = nn.functional.pad(lengths.cumsum(0), (1, 0))
            self.longest = max(forward_batch.extend_seq_lens_cpu)
        else:
            raise NotImplementedError(f"attention backend {BACKEND}: {mode}, has extend and decode")

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """No state besides `one_each`."""

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q (T, H C), k and v (T, G, C) -> (T, H C)."""
        _check(layer, sinks)
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None:
            location = KVWriteLoc(forward_batch.out_cache_loc, None)
            pool.set_kv_buffer(layer, location, k, v, layer.k_scale, layer.v_scale)
        query = q.view(len(q), -1, layer.qk_head_dim)
        head_map, kv_heads = getattr(layer, "head_map", None), layer.tp_k_head_num
        if head_map is not None and head_map.query_heads == query.shape[1]:
            kv_heads = head_map.kv_heads
        else:  # of another model, or between zeros already
            head_map = None
        keys = pool.get_key_buffer(layer.layer_id)[:, None, :kv_heads]
        values = pool.get_value_buffer(layer.layer_id)[:, None, :kv_heads]
        narrow = keys.dtype != query.dtype  # fp8
        output = paged_attention(
            query,
            keys,
            values,
            page_table=self.req_to_token_pool.req_to_token,
            table_rows=forward_batch.req_pool_indices,
            query_starts=self.starts,
            lengths=forward_batch.seq_lens,
            head_map=head_map,
            scale=layer.scaling,
            key_scale=_of_heads(layer.k_scale, keys) if narrow else None,
            value_scale=_of_heads(layer.v_scale, values) if narrow else None,
            window=None if layer.sliding_window_size < 0 else layer.sliding_window_size + 1,
            longest_query=self.longest,
        ).output
        return output.view(q.shape)

    forward_decode = forward_extend


def _check(layer: Any, sinks: Tensor | None) -> None:
    for what, there in (
        ("a cap of scores", layer.logit_cap),
        ("sinks", sinks is not None),
        ("attention to an encoder", layer.is_cross_attention),
        ("attention without order", layer.attn_type != AttentionType.DECODER),
        ("values of another size", layer.v_head_dim != layer.qk_head_dim),
    ):
        if there:
            raise NotImplementedError(f"attention backend {BACKEND}: {what}")


def _of_heads(scale: Tensor | None, pages: Tensor) -> Tensor:
    """A layer's scale of keys or values, (G,) fp32."""
    shape, device = pages.shape[2:3], pages.device
    return torch.ones(shape, device=device) if scale is None else scale.float().expand(shape)
