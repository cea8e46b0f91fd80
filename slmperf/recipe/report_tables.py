"""report_tables: Results -> the tables of a report, as text cells.

Every table is built once; the templates and the console print the same list. A stage that the
recipe did not run has no row, a figure that was not taken is a dash.
"""

from __future__ import annotations

import math
from typing import Any

from slmperf.recipe import paper
from slmperf.recipe.report_cells import DASH, Table, decimals, metric, thousands
from slmperf.recipe.report_quantisation import paper_quantisation_table, quantisation_table
from slmperf.recipe.results import (
    COMPARISONS,
    Comparison,
    ComparisonRow,
    Interval,
    Results,
    StageResult,
)

MAIN = "Every stage"
LATENCY = "Latency by size"
LAYER = "Where one layer's time goes"


def tables(results: Results) -> list[Table]:
    """All tables of the report, in order; those with nothing to say are left out."""
    built = [main_table(results)]
    built += [_comparison_table(one) for one in results.comparisons if one.rows]
    built += [quantisation_table(results), paper_quantisation_table(results)]
    built += [_latency_table(results), _paper_latency_table(results), _layer_table(results)]
    built += [_parity_table(results), _seed_table(results), _facts_table(results)]
    built += [_settings_table(results)]
    return [table for table in built if table.rows]


def main_table(results: Results) -> Table:
    """Every stage and every floor. Columns that no stage has a figure for are left out."""
    stages = results.stages
    latency = next((stage.latency for stage in stages if stage.latency), None)
    context = latency.context if latency else 0
    count = latency.candidates if latency else 0
    several = len(results.data.tasks) > 1
    columns: list[tuple[str, list[str]]] = [
        ("stage", [stage.title for stage in stages]),
        ("parameters", [thousands(stage.parameters) for stage in stages]),
        ("MiB", [decimals(stage.size_mib, 2) for stage in stages]),
    ]
    if several:
        columns += [
            (f"AUC\n{task}", [decimals(stage.auc(task), 4) for stage in stages])
            for task in results.data.tasks
        ]
    columns += [
        ("AUC\nmean" if several else "AUC", [metric(stage, "auc_mean", 4) for stage in stages]),
        (
            "delta %\nto teacher",
            [_delta(stage.delta_pct, stage.delta_interval) for stage in stages],
        ),
        ("AUC within\nmembers", [metric(stage, "auc_within", 4) for stage in stages]),
        ("log-loss", [metric(stage, "log_loss", 4) for stage in stages]),
        ("calibration\nerror", [metric(stage, "calibration_error", 4) for stage in stages]),
        ("perplexity", [metric(stage, "perplexity", 3) for stage in stages]),
        (f"prefill ms\n{context} tokens", [_time(stage, "prefill_ms") for stage in stages]),
        (f"rank {count} ms\nwhole", [_time(stage, "rank_uncached_ms") for stage in stages]),
        (f"rank {count} ms\ncached", [_time(stage, "rank_cached_ms") for stage in stages]),
    ]
    columns = [column for column in columns if any(cell != DASH for cell in column[1])]
    return Table(
        title=MAIN,
        columns=[name for name, _ in columns],
        rows=[list(row) for row in zip(*(cells for _, cells in columns), strict=True)],
        notes=_main_notes(results),
        apart={place for place, stage in enumerate(stages) if stage.kind == "floor"},
    )


def _main_notes(results: Results) -> list[str]:
    level = next((one.delta_interval.level for one in results.stages if one.delta_interval), None)
    seeds = max((len(stage.seeds) for stage in results.stages), default=0)
    text = "Delta: 100 (AUC / AUC of the teacher - 1)"
    if level is not None:
        text += (
            f", with its {100 * level:g}% interval (bootstrap over members, same rows, same draws)"
        )
    text += ". Prefix cached: the candidates run on the open key/value cache of their prefix."
    if any(stage.kind == "floor" for stage in results.stages):
        text += " Floors use history rows only."
    if seeds > 1:
        text += f" Means of {seeds} seeds where a stage has them; each stands below."
    return [text, *results.notes]


def _comparison_table(comparison: Comparison) -> Table:
    theirs = paper.AUC_DELTAS.get(comparison.kind, {})
    rows = []
    for row in comparison.rows:
        figures = theirs.get(row.role, ())
        rows.append(
            [
                row.title,
                thousands(row.parameters),
                _seeds(row),
                _baseline_or_delta(row, COMPARISONS[comparison.kind][0]),
                "; ".join(figure.model for figure in figures) or DASH,
                "; ".join(
                    f"{figure.delta_pct:+.2f}" if figure.delta_pct else "0" for figure in figures
                )
                or DASH,
            ]
        )
    return Table(
        title=paper.TITLES[comparison.kind],
        columns=[
            "ours",
            "parameters",
            "AUC",
            "delta % to the first",
            "the paper's",
            "the paper's delta %",
        ],
        rows=rows,
        notes=[f"The paper's figures: {paper.SOURCE}; other data, models and machines than ours."],
        paper={4, 5},
    )


def _latency_table(results: Results) -> Table:
    timed = [stage for stage in results.stages if stage.latency is not None]
    first = timed[0].latency if timed else None
    rows = []
    for stage in timed:
        latency = stage.latency
        assert latency is not None and first is not None  # filtered above
        rows.append(
            [
                stage.title,
                thousands(stage.parameters),
                _shape(stage),
                f"{latency.prefill_ms:.2f}",
                f"{latency.prefill_p90_ms:.2f}",
                f"{first.prefill_ms / latency.prefill_ms:.2f}x",
                decimals(latency.rank_uncached_ms, 2),
                decimals(latency.rank_cached_ms, 2),
                _ratio(latency.rank_uncached_ms, latency.rank_cached_ms),
            ]
        )
    context = f"{first.context} tokens, batch 1" if first else ""
    return Table(
        title=LATENCY,
        columns=[
            "stage",
            "parameters",
            "shape",
            "prefill ms",
            "90th percentile",
            f"against {timed[0].title}" if timed else "",
            f"rank {first.candidates} ms, whole" if first else "",
            f"rank {first.candidates} ms, cached" if first else "",
            "cached against whole",
        ],
        rows=rows,
        notes=[f"Medians on the machine named below; {context}. {paper.HEAD_PRUNING}"],
    )


def _paper_latency_table(results: Results) -> Table:
    if not any(stage.latency for stage in results.stages):
        return Table("", [], [])
    first = paper.LATENCIES[0].p50_ms
    return Table(
        title="Latency by size, the paper's",
        columns=[
            "model",
            "time to first token, median ms",
            "99th percentile ms",
            "against the first",
        ],
        rows=[
            [one.model, f"{one.p50_ms:g}", f"{one.p99_ms:g}", f"{first / one.p50_ms:.2f}x"]
            for one in paper.LATENCIES
        ],
        notes=[f"{paper.SOURCE}: {paper.LATENCY_SETTING}. Not our measurements."],
        paper={0, 1, 2, 3},
    )


def _layer_table(results: Results) -> Table:
    split = [stage for stage in results.stages if stage.latency and stage.latency.layer_ms]
    parts = list(
        dict.fromkeys(part for one in split if one.latency for part in one.latency.layer_ms)
    )
    rows = []
    for stage in split:
        assert stage.latency is not None  # filtered above
        spent = stage.latency.layer_ms
        total = sum(spent.values())
        cells = [
            f"{spent[part]:.3f} ({100 * spent[part] / total:.0f}%)" if part in spent else DASH
            for part in parts
        ]
        rows.append([stage.title, *cells, f"{total:.3f}"])
    return Table(
        title=LAYER,
        columns=["stage", *parts, "one layer, ms"],
        rows=rows,
        notes=["Milliseconds of one decoder layer in the same prefill, mean over the layers."],
    )


def _parity_table(results: Results) -> Table:
    def title(name: str) -> str:
        stage = results.stage(name)
        return stage.title if stage else name

    return Table(
        title="Parity between neighbouring stages",
        columns=[
            "from",
            "to",
            "top-10 overlap",
            "Spearman",
            "largest shift of P(yes)",
            "log-loss",
            "calibration error",
        ],
        rows=[
            [
                title(one.stage_a),
                title(one.stage_b),
                decimals(one.top10_overlap, 3),
                decimals(one.spearman, 3),
                decimals(one.largest_shift, 3),
                f"{one.log_loss_a:.4f} → {one.log_loss_b:.4f}",
                f"{one.calibration_error_a:.4f} → {one.calibration_error_b:.4f}",
            ]
            for one in results.parities
        ],
        notes=[
            "Mean over tasks; the shift is the largest of all. The top list of a member with k "
            "candidates has min(10, k // 2) entries; members with one candidate have none."
        ],
    )


def _seed_table(results: Results) -> Table:
    rows = [
        [
            stage.title,
            str(seed.seed),
            *(decimals(seed.auc.get(task), 4) for task in results.data.tasks),
            decimals(seed.auc_mean, 4),
            decimals(seed.log_loss, 4),
            decimals(seed.calibration_error, 4),
            decimals(seed.perplexity, 3),
        ]
        for stage in results.stages
        if len(stage.seeds) > 1
        for seed in stage.seeds
    ]
    tasks = [f"AUC, {task}" for task in results.data.tasks]
    columns = ["stage", "seed", *tasks, "AUC", "log-loss", "calibration error", "perplexity"]
    return Table("Every seed", columns, rows)


def _facts_table(results: Results) -> Table:
    rows = [["date", results.date]]
    rows += [[name, value] for name, value in results.machine.items()]
    rows += [[f"version of {name}", value] for name, value in results.versions.items()]
    if results.command:
        rows.append(["command", results.command])
    if results.seconds is not None:
        rows.append(["whole run", f"{results.seconds / 60:.1f} minutes"])
    trained = [stage for stage in results.stages if stage.train_seconds is not None]
    for stage in trained:
        pace = stage.train_tokens_per_second
        speed = f", {pace:,.0f} tokens/s" if pace is not None else ""
        rows.append([f"training of {stage.title}", f"{stage.train_seconds:.0f} s{speed}"])
    return Table("Machine, date and versions", ["", ""], rows)


def _settings_table(results: Results) -> Table:
    rows = [[name, value] for name, value in _flat(results.settings)]
    return Table("Settings of the recipe", ["key", "value"], rows)


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested settings -> ("teacher.hidden", "64"); lists of plain values stay on one line."""
    if isinstance(value, dict):
        return [
            pair
            for key, item in value.items()
            for pair in _flat(item, f"{name}.{key}" if name else str(key))
        ]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [
            pair
            for place, item in enumerate(value)
            for pair in _flat(item, f"{name}.{_item_name(item, place)}")
        ]
    if isinstance(value, list):
        return [(name, ", ".join(str(item) for item in value) or DASH)]
    return [(name, DASH if value is None else str(value))]


def _item_name(item: Any, place: int) -> str:
    return str(item["name"]) if isinstance(item, dict) and "name" in item else str(place)


def _seeds(row: ComparisonRow) -> str:
    if row.auc_mean is None:
        return DASH
    text = f"{row.auc_mean:.4f}"
    if len(row.auc_by_seed) > 1:
        text += f" ({min(row.auc_by_seed):.4f} to {max(row.auc_by_seed):.4f})"
    return text


def _baseline_or_delta(row: ComparisonRow, baseline: str) -> str:
    return "0" if row.role == baseline else _delta(row.delta_pct, row.delta_interval)


def _delta(value: float | None, interval: Interval | None) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    if interval is None:
        return "0" if value == 0 else f"{value:+.2f}"
    return f"{value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def _ratio(over: float | None, under: float | None) -> str:
    return DASH if over is None or not under else f"{over / under:.1f}x"


def _time(stage: StageResult, name: str) -> str:
    return DASH if stage.latency is None else decimals(getattr(stage.latency, name), 2)


def _shape(stage: StageResult) -> str:
    return ", ".join(f"{name} {value}" for name, value in stage.shape.items()) or DASH
