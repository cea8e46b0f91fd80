"""paper: the few published figures that stand beside ours in the report. Figures only, labelled as
the paper's.

Source: Behdin et al., "Scaling Down, Serving Fast: Compressing and Deploying Efficient LLMs for
Recommendation Systems", EMNLP 2025 industry track, arXiv 2502.14305. Their data, models and
machines are
others than ours: what can be compared is the order and the sign, not the size.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "Behdin et al., EMNLP 2025, arXiv 2502.14305"


class Figure(NamedTuple):
    """AUC delta in percent of one of the paper's models against the baseline of its table."""

    model: str
    delta_pct: float


# kind and role of slmperf.recipe.results.COMPARISONS -> the paper's rows.
AUC_DELTAS: dict[str, dict[str, tuple[Figure, ...]]] = {
    "distillation": {
        "baseline": (Figure("foundation model, 100B+", 0.0),),
        "kd": (Figure("8B, KD", -0.06), Figure("3B, KD", -0.15)),
        "sft": (Figure("8B, SFT", -0.62), Figure("3B, SFT", -1.21)),
    },
    "after_pruning": {
        "baseline": (Figure("8B, distilled", 0.0),),
        "sft": (Figure("6.4B, SFT", -0.47),),
        "kd": (Figure("6.4B, KD", -0.06),),
    },
    "one_shot": {
        "baseline": (Figure("8B", 0.0),),
        "cut_1": (Figure("6.8B", 0.0),),
        "cut_2": (Figure("6.4B", -1.33),),
        "cut_3": (Figure("6.0B", -1.72),),
    },
    "gradual": {
        "baseline": (Figure("3B", 0.0),),
        "one_step": (Figure("2.4B, one step", -0.12),),
        "gradual": (Figure("2.4B, two steps", 0.03),),
    },
    "attention": {
        "baseline": (Figure("2.4B", 0.0),),
        "one_shot": (Figure("2.1B, one-shot", -1.07),),
        "kd": (Figure("2.1B, after KD", 0.02),),
    },
}

TITLES = {
    "distillation": "Fine-tuning against distillation (the paper's Figure 2)",
    "after_pruning": "Fine-tuning against distillation after MLP pruning (the paper's Table 1)",
    "one_shot": "One-shot MLP pruning at three sizes, no training (the paper's Table 2)",
    "gradual": "MLP pruning in one step against two",
    "attention": "Attention pruning, before and after distillation",
    "calibration": "One-shot MLP pruning calibrated in the domain and on generic text (the paper: "
    "350 to 700 examples of the domain beat 1024 to 4096 of C4)",
}


class Latency(NamedTuple):
    """Time to the first token of one of the paper's models."""

    model: str
    p50_ms: float
    p99_ms: float


LATENCY_SETTING = (
    "4 H100, tensor parallel, SGLang 0.4.1, FP8, prompts of 16k tokens, 1 output token, "
    "1 member per second"
)
LATENCIES = (
    Latency("foundation model, 100B+", 1032, 1039),
    Latency("8B", 271, 282),
    Latency("6.4B", 256, 269),
    Latency("3B", 195, 209),
    Latency("2.4B", 189, 197),
    Latency("2.1B", 171, 184),
)
HEAD_PRUNING = (
    "Halving the heads takes about 40% off the paper's attention latency and speeds its prefill up "
    "by more than 28%."
)


class Quantisation(NamedTuple):
    """One of the paper's quantised models: shares of right answers on ARC-c, ARC-e and PIQA, or
    median times on a GPU.
    """

    scheme: str
    answers: tuple[float, float, float] | None = None
    gpu: str = ""
    ttft_ms: float | None = None
    token_ms: float | None = None


QUANTISATION_SETTING = (
    "answers of Llama-3.1-8B-Instruct, zero-shot, calibrated on 1024 samples of C4; times of a "
    "Llama-3 of 8B on one GPU, vLLM 0.6.1, prompts of 3.8k tokens, 1 request per second"
)
QUANTISATIONS = (
    Quantisation("fp16", (0.5299, 0.8136, 0.7982)),
    Quantisation("fp8", (0.5179, 0.8056, 0.7922)),
    Quantisation("w8a8, SmoothQuant", (0.5171, 0.8123, 0.7954)),
    Quantisation("w4a16, GPTQ", (0.436, 0.7306, 0.7437)),
    Quantisation("w4a16, QuantEase", (0.5077, 0.8068, 0.7954)),
    Quantisation("fp16", None, "H100", 136, 10.3),
    Quantisation("fp8", None, "H100", 122, 9.4),
    Quantisation("fp16", None, "A100", 332, 18.3),
    Quantisation("w8a8", None, "A100", 227, 12.9),
    Quantisation("w4a16", None, "A100", 389, 11.2),
)
