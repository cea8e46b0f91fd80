"""Plain torch in the place of the compiled kernels that SGLang calls for quantised layers.

Loaded as a plug-in (entry point sglang.srt.plugins). The parser of the checkpoint's configuration,
the choice of a scheme for every layer, the parameters and their loading, and what is done with them
after loading are SGLang's own: below stands what runs on a GPU only. Inputs are rounded as its
kernels round them (int8: max |x| / 127 of a token).
"""

import multiprocessing

import torch

BLOCK = 128


def install():
    """In the processes that compute; the first one, which takes requests, does not."""
    if multiprocessing.parent_process() is None:
        return
    from sglang.srt.layers.quantization.compressed_tensors import compressed_tensors
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_fp8 as fp8,
    )
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_w8a8_int8 as int8,
    )
    from sglang.srt.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_wNa16 as int4,
    )

    # Asked of the GPU, and about its kernels: those below take any capability and fp32.
    config = compressed_tensors.CompressedTensorsConfig
    config._check_scheme_supported = lambda self, capability, error=True: True
    config.get_supported_act_dtypes = lambda cls: [torch.float16, torch.bfloat16, torch.float32]

    int8.per_token_quant_int8 = per_token_quant_int8
    int8.int8_scaled_mm = int8_scaled_mm
    fp8.apply_fp8_linear = apply_fp8_linear
    fp8.dispatch_w8a8_block_fp8_linear = lambda: w8a8_block_fp8_linear
    int4.marlin_make_workspace = lambda device: None
    int4.gptq_marlin_repack = lambda words, **shape: words
    int4.marlin_permute_scales = lambda scales, **shape: scales
    int4.apply_gptq_marlin_linear = apply_gptq_marlin_linear


def per_token_quant_int8(x):
    """x (T, K) -> int8 (T, K), scales (T, 1)."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return (x.float() / scale).round().to(torch.int8), scale


def int8_scaled_mm(x, weight, x_scale, weight_scale, out_dtype, bias=None):
    """x (T, K), weight (K, N), weight_scale (N, 1) -> (T, N)."""
    return _product(x.float() * x_scale, weight.float() * weight_scale.view(1, -1), bias, out_dtype)


def apply_fp8_linear(input, weight, weight_scale, input_scale=None, bias=None, **options):
    """input (T, K), weight (K, N), weight_scale (N, 1) or of the tensor; input_scale None: of each
    token."""
    scale = _fp8_scale(input.float()) if input_scale is None else input_scale.float()
    columns = weight.float() * weight_scale.float().view(1, -1)
    return _product(_fp8_rounded(input.float(), scale), columns, bias, input.dtype)


def w8a8_block_fp8_linear(input, weight, block_size, weight_scale, input_scale=None, bias=None):
    """input (T, K), weight (N, K), weight_scale (N / 128, K / 128)."""
    assert list(block_size) == [BLOCK, BLOCK] and input_scale is None
    out, width = weight.shape
    scale = weight_scale.repeat_interleave(BLOCK, 0)[:out].repeat_interleave(BLOCK, 1)[:, :width]
    groups = input.float().unflatten(-1, (-1, BLOCK))
    rounded = _fp8_rounded(groups, _fp8_scale(groups)).flatten(-2)
    return _product(rounded, (weight.float() * scale).t(), bias, input.dtype)


def apply_gptq_marlin_linear(input, weight, weight_scale, weight_zp, wtype, bias=None, **shape):
    """input (T, K); weight (K / n, N) int32 words of n codes each, lowest bits first; weight_scale
    (groups, N); weight_zp is empty: codes are around the middle."""
    assert weight_zp.numel() == 0
    bits = wtype.size_bits
    codes = [(weight >> shift) & (2**bits - 1) for shift in range(0, 32, bits)]
    values = torch.stack(codes, 1).flatten(0, 1) - 2 ** (bits - 1)
    scale = weight_scale.repeat_interleave(len(values) // len(weight_scale), 0)
    return _product(input.float(), values * scale.float(), bias, input.dtype)


def _fp8_scale(x):
    return (x.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)


def _fp8_rounded(x, scale):
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def _product(x, weight, bias, dtype):
    result = x @ weight
    return (result if bias is None else result + bias.float()).to(dtype)
