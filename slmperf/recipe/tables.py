"""tables: manifests, scores and timings -> Results, with intervals and the paper's comparisons."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence

from slmperf import arch
from slmperf.evaluate import Run, auc_interval, delta, difference, parity_tasks
from slmperf.evaluate.bootstrap import Estimate
from slmperf.recipe.manifest import Manifest, versions
from slmperf.recipe.material import Material
from slmperf.recipe.plan import Job
from slmperf.recipe.results import (
    COMPARISONS,
    Comparison,
    ComparisonRow,
    Interval,
    ParityResult,
    Results,
    SeedMetrics,
    StageLatency,
    StageResult,
)
from slmperf.recipe.schema import Recipe
from slmperf.recipe.scoring import metrics

KINDS = {"distil": "kd"}  # other stages are called the same in the results


def tabulate(
    recipe: Recipe,
    jobs: Sequence[Job],
    manifests: Mapping[str, Manifest],
    scores: Mapping[str, Run],
    floors: Mapping[str, Run],
    latencies: Mapping[str, StageLatency],
    material: Material,
) -> Results:
    """The whole of a run. manifests and scores: by folder of the job; latencies: by stage."""
    by_seed: dict[str, dict[int, Run]] = {}  # stage -> seed -> run
    for job in jobs:
        if job.folder in scores:
            by_seed.setdefault(job.stage.name, {})[job.seed] = scores[job.folder]
    runs = {name: list(found.values()) for name, found in by_seed.items()}
    results = Results(
        recipe=recipe.name,
        data=material.facts,
        date=datetime.date.today().isoformat(),
        machine=machine_facts(),
        versions=versions(),
        settings=recipe.model_dump(mode="json", by_alias=True),
    )
    reference = _reference(recipe)
    base = runs.get(reference or "")
    for name, run in floors.items():
        row = StageResult(name=name, title=name, kind="floor", seeds=[metrics(run, seed=0)])
        _add_intervals(row, [run], base, is_base=False)
        results.stages.append(row)
    for stage in recipe.stages:
        if stage.name in runs:
            mine = [job for job in jobs if job.stage.name == stage.name]
            row = _row(mine, [manifests[job.folder] for job in mine])
            row.latency = latencies.get(stage.name)
            _add_intervals(row, runs[stage.name], base, is_base=stage.name == reference)
            results.stages.append(row)
    results.comparisons = [
        _comparison(kind, recipe.tables[kind], results, by_seed)
        for kind in COMPARISONS
        if kind in recipe.tables
    ]
    results.parities = _parities(jobs, scores)
    if base is not None and reference is not None and floors:
        results.notes.append(_against_floor(reference, base, floors))
    if {"kd", "sft"} <= recipe.tables.get("distillation", {}).keys():
        kd, sft = (recipe.tables["distillation"][role] for role in ("kd", "sft"))
        results.notes.append(_gap(f"{kd} minus {sft}", *_same_seeds(by_seed[kd], by_seed[sft])))
    return results


def _reference(recipe: Recipe) -> str | None:
    """The stage that the main table's deltas are taken against."""
    if "distillation" in recipe.tables:
        return recipe.tables["distillation"][COMPARISONS["distillation"][0]]
    return next((stage.name for stage in recipe.stages if stage.stage == "teacher"), None)


def _row(jobs: list[Job], manifests: list[Manifest]) -> StageResult:
    first, job = manifests[0], jobs[0]
    parent = job.source or job.teacher
    shape = {key: value for key, value in job.shape.model_dump().items() if value is not None}
    if job.shape.experts is None:
        del shape["experts_per_token"]
    row = StageResult(
        name=job.stage.name,
        title=job.stage.printed,
        kind=KINDS.get(job.stage.stage, job.stage.stage),
        parent=parent.stage.name if parent else None,
        parameters=first.parameters,
        size_mib=first.weight_bytes / 2**20,
        seeds=[SeedMetrics(**one.metrics) for one in manifests if one.metrics is not None],
        shape=shape,
    )
    if first.quantization is not None:
        errors = ("error_mean", "error_mean_rtn", "held_out_error_mean")
        told = ("scheme", "bits_mean", *errors, "tokens")
        row.quantization = {key: first.quantization[key] for key in told}
    if first.training is not None:
        row.train_seconds = sum(one.training["seconds"] for one in manifests if one.training)
        row.train_tokens_per_second = first.training["tokens_per_second"]
    return row


def _add_intervals(
    row: StageResult, runs: list[Run], base: list[Run] | None, *, is_base: bool
) -> None:
    row.auc_interval = _interval(auc_interval(runs))
    if is_base:
        row.delta_pct = 0.0
    elif base is not None:
        found = delta(runs, base)
        row.delta_pct, row.delta_interval = found.value, _interval(found)


def _interval(estimate: Estimate) -> Interval:
    return Interval(estimate.low, estimate.high, estimate.level)


def _comparison(
    kind: str,
    stages: Mapping[str, str],
    results: Results,
    by_seed: Mapping[str, Mapping[int, Run]],
) -> Comparison:
    baseline = stages[COMPARISONS[kind][0]]
    table = Comparison(kind)
    for role in COMPARISONS[kind]:
        if role not in stages:
            continue
        name = stages[role]
        stage = results.stage(name)
        assert stage is not None  # plan: only scored stages stand in tables
        row = ComparisonRow(
            stage=name,
            role=role,
            title=stage.title,
            parameters=stage.parameters,
            delta_pct=0.0,
            auc_mean=stage.mean("auc_mean"),
            auc_by_seed=[seed.auc_mean for seed in stage.seeds],
        )
        if name != baseline:
            found = delta(*_same_seeds(by_seed[name], by_seed[baseline]))
            row.delta_pct, row.delta_interval = found.value, _interval(found)
        table.rows.append(row)
    return table


def _parities(jobs: Sequence[Job], scores: Mapping[str, Run]) -> list[ParityResult]:
    """Each stage against the one whose scores it should keep: its teacher, else its source."""
    found: dict[str, ParityResult] = {}
    for job in jobs:  # of several seeds the first speaks for the stage
        other, name = job.teacher or job.source, job.stage.name
        if other and name not in found and job.folder in scores and other.folder in scores:
            parity = parity_tasks(scores[other.folder], scores[job.folder])
            found[name] = ParityResult(other.stage.name, name, **parity._asdict())
    return list(found.values())


def _against_floor(name: str, runs: list[Run], floors: Mapping[str, Run]) -> str:
    best = max(floors, key=lambda one: metrics(floors[one], seed=0).auc_mean)
    return _gap(f"{name} minus the best floor ({best})", runs, [floors[best]])


def _same_seeds(runs: Mapping[int, Run], base: Mapping[int, Run]) -> tuple[list[Run], list[Run]]:
    """Runs to compare: of the seeds that both have, or all where a seed of `runs` is not in `base`.

    A model pruned from the student of seed 0 is held against that student, not the mean of three.
    """
    if set(runs) <= set(base):
        return list(runs.values()), [base[seed] for seed in runs]
    return list(runs.values()), list(base.values())


def _gap(what: str, runs: list[Run], base: list[Run]) -> str:
    gap = difference(runs, base)
    seeds = f", mean of {len(runs)} seeds" if len(runs) > 1 else ""
    return f"{what}: {gap.value:+.4f} AUC [{gap.low:+.4f}, {gap.high:+.4f}]{seeds}."


def machine_facts() -> dict[str, str]:
    """What the figures of a run were taken on."""
    return {
        "processor": arch.cpu_name(),
        "cores": str(arch.cpu_count()),
        "threads": str(arch.threads()),
        "memory": f"{arch.memory_mib() / 1024:.0f} GiB",
        "device": arch.cuda_name() or "none",
        "system": platform.system(),
    }
