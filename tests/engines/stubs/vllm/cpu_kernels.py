"""Plain torch in the place of the compiled operators that vLLM's CPU platform calls.

Loaded as a plug-in (entry point vllm.general_plugins), in each of its processes. Only operators of
`torch.ops._C` stand here, by their names and signatures; all that is around them is vLLM's own. And
torch's product of fp8 matrices, which is there on CPUs but takes 75 ms for 17 rows.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

# Prepared int8 weights by handle: (K, N), scales multiplied in.
_INT8_WEIGHTS = {}


def install():
    """Puts every function below where vLLM looks for it; AMX has kernels of its own, not here."""
    torch.cpu._is_amx_tile_supported = lambda: False
    torch._scaled_mm = scaled_mm
    for function in (
        init_cpu_memory_env,
        get_scheduler_metadata,
        compute_slot_mapping_kernel_impl,
        cpu_attn_reshape_and_cache,
        cpu_attention_with_kv_cache,
        greedy_argmax,
        dynamic_scaled_int8_quant,
        create_onednn_scaled_mm_handler,
        onednn_scaled_mm,
        release_dnnl_matmul_handler,
        cpu_gemm_wna16,
        static_scaled_fp8_quant,
    ):
        setattr(torch.ops._C, function.__name__, function)


def init_cpu_memory_env(nodes):
    """Which memory is near; one machine has one."""


def get_scheduler_metadata(*arguments):
    """How the real attention divides its work."""
    return torch.empty(0)


def compute_slot_mapping_kernel_impl(query_starts, positions, blocks, slots, block_size):
    """slots[t] = where in the cache token t lies; -1 for padding."""
    count = int(query_starts[-1])
    rows = torch.repeat_interleave(query_starts.diff().long())
    at = positions[:count].long()
    block = blocks[rows, at // block_size].long()
    slots[:count] = (block * block_size + at % block_size).to(slots.dtype)
    slots[count:] = -1


def cpu_attn_reshape_and_cache(
    key, value, key_cache, value_cache, slots, isa, key_scale, value_scale, dtype
):
    """Writes key and value (T, G, C) into the caches (blocks, G, block, C)."""
    slots = slots[: len(key)].long()
    real = slots >= 0
    block, within = slots[real] // key_cache.shape[2], slots[real] % key_cache.shape[2]
    for new, cache, scale in ((key, key_cache, key_scale), (value, value_cache, value_scale)):
        new = new[: len(slots)][real]
        if dtype != "auto":
            new, cache = _fp8(new.float() / scale), cache.view(torch.float8_e4m3fn)
        cache[block, :, within] = new.to(cache.dtype)


def cpu_attention_with_kv_cache(
    query,
    key_cache,
    value_cache,
    output,
    query_starts,
    lengths,
    scale,
    causal,
    alibi_slopes,
    window,
    blocks,
    softcap,
    metadata,
    sinks,
    dynamic_causal,
    key_scale,
    value_scale,
    dtype,
):
    """output (T, H, C) of query (T, H, C); window: how many keys each query sees, -1: all."""
    assert causal and alibi_slopes is None and sinks is None and not softcap
    for row, length in enumerate(lengths.tolist()):
        start, end = query_starts[row : row + 2].tolist()
        if start == end:
            continue
        used = blocks[row, : -(-length // key_cache.shape[2])].long()
        keys, values = (
            _cached(cache[used], length, one, dtype).to(query.dtype)
            for cache, one in ((key_cache, key_scale), (value_cache, value_scale))
        )
        behind = torch.arange(length - end + start, length)[:, None] - torch.arange(length)
        seen = (behind >= 0) & (behind < window if window >= 0 else True)
        of_heads = query[start:end].transpose(0, 1)[None]
        result = scaled_dot_product_attention(
            of_heads, keys[None], values[None], attn_mask=seen, scale=scale, enable_gqa=True
        )
        output[start:end] = result[0].transpose(0, 1).reshape(output[start:end].shape)


def _cached(blocks, length, scale, dtype):
    """(blocks, G, block, C) -> (G, length, C)."""
    together = blocks.transpose(0, 1).flatten(1, 2)[:, :length]
    return together if dtype == "auto" else together.view(torch.float8_e4m3fn).float() * scale


def greedy_argmax(logits):
    """The most probable token of each row."""
    return logits.argmax(-1)


def dynamic_scaled_int8_quant(output, x, scales, zero_points):
    """Of each token: scale = max |x| / 127."""
    assert zero_points is None
    scales.copy_(x.float().abs().amax(-1, keepdim=True) / 127)
    output.copy_((x.float() / scales).round().clamp(-128, 127))


def create_onednn_scaled_mm_handler(weight, scales, dtype, dynamic, zero_point, cached):
    """weight (K, N) int8, scales (N, 1) -> a number that stands for them."""
    assert dynamic and not zero_point
    handle = max(_INT8_WEIGHTS, default=0) + 1
    _INT8_WEIGHTS[handle] = weight.float() * scales.float().view(1, -1)
    return handle


def onednn_scaled_mm(output, x, x_scales, zero_points, adjusted, bias, handle):
    """x (T, K) int8 -> output (T, N)."""
    result = (x.float() * x_scales) @ _INT8_WEIGHTS[int(handle)]
    output.copy_(result if bias is None else result + bias.float())


def release_dnnl_matmul_handler(handle):
    """Forgets the weight."""
    _INT8_WEIGHTS.pop(int(handle), None)


def cpu_gemm_wna16(x, weight, output, scales, zero_points, bias, pack_factor, isa):
    """x (T, K); weight (N / 16, K * 16 / n) int32: blocks of 16 columns, n codes a word, lowest
    bits first; scales (groups, N); codes around the middle."""
    assert zero_points is None
    bits = 32 // pack_factor
    words = weight.view(len(weight), x.shape[-1], 16 // pack_factor, 1)
    codes = (words >> torch.arange(0, 32, bits)) & (2**bits - 1)  # (N / 16, K, words, n)
    values = codes.flatten(2).transpose(0, 1).flatten(1) - 2 ** (bits - 1)
    scale = scales.repeat_interleave(len(values) // len(scales), 0)
    result = x.float() @ (values * scale.float())
    output.copy_(result if bias is None else result + bias.float())


def scaled_mm(x, weight, *, scale_a, scale_b, out_dtype, bias=None):
    """x (T, K) and weight (K, N) fp8 -> (T, N)."""
    result = (x.float() * scale_a) @ (weight.float() * scale_b)
    return (result if bias is None else result + bias.float()).to(out_dtype)


def static_scaled_fp8_quant(output, x, scale, group_shape=None):
    """One scale for all."""
    output.copy_(_fp8(x.float() / scale.float()))


def _fp8(x):
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)
