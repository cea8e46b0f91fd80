"""Operators: a file per op, or a folder where it is long, and one public function in it.

    divergence      per-token divergence between two logits tensors, (T, V) x 2 -> (T,)
    kd_loss         distillation loss from hidden states and heads, no logits held: (T, D), (V, D)
    gram            the lower half of X'X, added up in fp64: (n, d) -> (d, d)
    eliminate       the pivots of structured pruning's factorisation: (d, d) x 2 -> (steps,)
    linear          x W' + bias with a plain, fp8, int8 or int4 weight: (..., K), (N, K) -> (..., N)
    rms_norm        (residual +) RMS norm, its output rounded or not: (..., D), (D,) -> (..., D)
    silu_mul        silu(gate) * up, rounded or not: (..., F) x 2 -> (..., F)
    rope_write      rotary embedding, and keys and values into cache pages
    quantize_input  inputs of low-precision products, rounded once for several: (..., K)
    paged_attention causal attention over pages of keys and values: (T, H, C) -> (T, H, C)

HeadMap says which key/value head each query head reads, where they do not read as many each.

Every function takes `impl="auto" | "triton" | "cuda" | "cpu" | "torch" | "reference"`, those that
it has; `implementations()` says which of them can run on this machine.

Adding an op, say `gain`
------------------------
1.  `slmperf/ops/gain.py`, read from top to bottom: docstring with the formula and its source;
    schema; `gain_reference` in plain torch (oracle, baseline and specification at once,
    differentiable, any dtype up to float64); `ROUTES = routes("gain", auto={...}, ...)`, what
    each implementation takes; the fake; the autograd formula; one registered overload per
    implementation (`slmperf::gain.cpu`, `slmperf::gain.triton`), all with the one schema; last
    the public function, which checks and chooses. `divergence.py` is the pattern.
2.  One file per implementation, of the same base name: `csrc/cpu/gain.cpp` (registers itself on
    its last lines; row maths in `gain_rows.h`, compiled once per instruction set, intrinsics only
    in `vec.h`) and `triton_kernels/gain.py` (docstring, config table, device helpers, kernels,
    launcher).
3.  One family of cases in `slmperf/testing/cases.py`: inputs that can fail, bytes moved. That
    alone puts the op into the battery (tests/test_ops.py), the offline compilation
    (bench/kernels_check.py) and the benches (slmperf bench ops, make gpu-check).
4.  Its name here, its numeric targets in bench/targets.toml (a GPU's names the bench row that
    decides it), and `make kernels-check UPDATE=1`, which records what its kernels compile to.
"""

from slmperf.ops.divergence import (
    JSD,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    divergence,
    divergence_reference,
)
from slmperf.ops.eliminate import eliminate as eliminate
from slmperf.ops.gram import gram as gram
from slmperf.ops.head_map import HeadMap
from slmperf.ops.kd_loss import (
    KDLoss,
    StudentHead,
    TeacherHead,
    TeacherLogits,
    TeacherTopK,
    kd_loss,
    kd_loss_reference,
)
from slmperf.ops.linear import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    QuantizedInput,
    linear,
    quantize_input,
    stack_experts,
)
from slmperf.ops.paged_attention import paged_attention
from slmperf.ops.rms_norm import RMSNorm, rms_norm
from slmperf.ops.rope_write import rope_write
from slmperf.ops.routing import implementations
from slmperf.ops.silu_mul import silu_mul

__all__ = [
    "JSD",
    "ForwardKL",
    "Fp8Weight",
    "HeadMap",
    "Int4Weight",
    "Int8Weight",
    "KDLoss",
    "QuantizedInput",
    "RMSNorm",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "StudentHead",
    "TeacherHead",
    "TeacherLogits",
    "TeacherTopK",
    "TotalVariation",
    "divergence",
    "divergence_reference",
    "implementations",
    "kd_loss",
    "kd_loss_reference",
    "linear",
    "paged_attention",
    "quantize_input",
    "rms_norm",
    "rope_write",
    "silu_mul",
    "stack_experts",
]
