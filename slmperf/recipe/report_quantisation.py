"""report_quantisation: the tables of quantised stages, ours and the paper's."""

from __future__ import annotations

from slmperf.recipe import paper
from slmperf.recipe.report_cells import DASH, Table, decimals, metric
from slmperf.recipe.results import Results, StageResult


def quantisation_table(results: Results) -> Table:
    """Each quantised stage below the one that it was made from: quality, bytes and latency."""
    rows, source = [], ""
    for stage in (one for one in results.stages if one.quantization):
        before = results.stage(stage.parent or "")
        if before is not None and before.name != source:
            rows.append(_quantised_row(before, None))
            source = before.name
        rows.append(_quantised_row(stage, before))
    return Table(
        title="Quantisation",
        columns=[
            "stage",
            "scheme",
            "bits per weight",
            "MiB",
            "layer error %",
            "rounded to nearest %",
            "held out %",
            "AUC",
            "perplexity",
            "prefill ms",
            "against full weights",
        ],
        rows=rows,
        notes=[
            "Errors of the layers' outputs on the calibration text, and held out on prompts that "
            "are scored, means over layers. Times are those of PyTorch, which puts weights "
            "together before it multiplies: what is gained is memory, and speed on an engine with "
            "kernels for the scheme."
        ],
    )


def paper_quantisation_table(results: Results) -> Table:
    """The paper's figures beside them; empty where nothing was quantised."""
    if not any(stage.quantization for stage in results.stages):
        return Table("", [], [])
    return Table(
        title="Quantisation, the paper's",
        columns=["scheme", "ARC-c", "ARC-e", "PIQA", "GPU", "TTFT ms", "time per token ms"],
        rows=[
            [
                one.scheme,
                *(decimals(share, 4) for share in one.answers or (None,) * 3),
                one.gpu or DASH,
                decimals(one.ttft_ms, 0),
                decimals(one.token_ms, 1),
            ]
            for one in paper.QUANTISATIONS
        ],
        notes=[f"{paper.SOURCE}: {paper.QUANTISATION_SETTING}. Not our measurements."],
        paper=set(range(7)),
    )


def _quantised_row(stage: StageResult, before: StageResult | None) -> list[str]:
    told = stage.quantization
    latency = stage.latency.prefill_ms if stage.latency else None
    full = before.latency.prefill_ms if before and before.latency else None
    errors = [told.get(key) for key in ("error_mean", "error_mean_rtn", "held_out_error_mean")]
    return [
        stage.title,
        told.get("scheme", DASH),
        decimals(told.get("bits_mean"), 2),
        decimals(stage.size_mib, 2),
        *(DASH if error is None else f"{100 * error:.3g}" for error in errors),
        metric(stage, "auc_mean", 4),
        metric(stage, "perplexity", 3),
        decimals(latency, 2),
        f"{full / latency:.2f}x" if full and latency else DASH,
    ]
