"""dry_run: what a recipe would take, stage by stage, before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from slmperf.distill import PackedBatches
from slmperf.distill.estimate import MIB, TrainingPlan, plan_of
from slmperf.recipe import stages as recipe_stages
from slmperf.recipe.distillation.report import first_line
from slmperf.recipe.distillation.runner import Prepared, open_recipe
from slmperf.recipe.distillation.schema import Recipe
from slmperf.recipe.distillation.stages import training_config
from slmperf.recipe.plan import Job
from slmperf.recipe.schema import Shape


class _Line(NamedTuple):
    job: Job
    seeds: int
    plan: TrainingPlan | None  # None: nothing is trained


def preview(recipe: Recipe | str | Path, data: str | Path | None = None) -> str:
    """Shapes, parameters, tokens, steps and memory of every stage, and the sum of the steps.

    All that `run` would refuse before it writes is refused here too, the output folder aside.
    """
    given = open_recipe(recipe, data)
    jobs: dict[str, list[Job]] = {}
    for job in given.jobs:
        jobs.setdefault(job.stage.name, []).append(job)
    lines = [_Line(same[0], len(same), _plan(same[0], given)) for same in jobs.values()]
    rows = [["stage", "kind", "shape", "parameters", "steps", "rows", "data", "own text", "memory"]]
    rows[0] += ["seeds"]
    rows += [_cells(line) for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([first_line(given.material.facts), "", *table, "", *_sums(lines)])


def _plan(job: Job, given: Prepared) -> TrainingPlan | None:
    training = getattr(job.stage, "training", None)
    if training is None:
        return None
    material = given.material
    config = training_config(training, material.context, job.seed, Path("unused"))
    batches = PackedBatches(material.share(job.stage.share), config)
    vocabulary = len(material.tokenizer)
    student, teacher = (
        None if one is None else recipe_stages.model_config(one.shape, vocabulary, material.context)
        for one in (job, job.teacher)
    )
    assert student is not None
    own = getattr(job.stage, "on_policy", None)
    new_tokens = own.new_tokens if own is not None and own.fraction > 0 else None
    return plan_of(student, teacher, batches, config, new_tokens=new_tokens)


def _cells(line: _Line) -> list[str]:
    stage, plan = line.job.stage, line.plan
    start = f"from {stage.source}" if stage.source else ""
    kind = f"{stage.stage} {start}".strip()
    if line.job.teacher is not None:
        kind += f", teacher {line.job.teacher.stage.name}"
    cells = [stage.name, kind, _shape(line.job.shape)]
    if plan is None:
        return [*cells, "", "", "", "", "", "", str(line.seeds)]
    own = getattr(stage, "on_policy", None)
    return [
        *cells,
        f"{plan.parameters:,}",
        f"{plan.steps:,}",
        f"{plan.rows_per_step} x {plan.context}",
        f"{plan.tokens:,} tokens, {plan.epochs:.2f} epochs",
        f"{own.fraction:.0%} of {own.new_tokens} tokens" if own else "",
        f"{plan.memory.peak / MIB:,.1f} MiB",
        str(line.seeds),
    ]


def _shape(shape: Shape) -> str:
    experts = f" x {shape.experts} experts" if shape.experts else ""
    return (
        f"{shape.layers} layers, {shape.hidden} wide, {shape.heads}/{shape.kv_heads} heads, "
        f"MLP {shape.intermediate}{experts}"
    )


def _sums(lines: list[_Line]) -> list[str]:
    trained = [(line.seeds, line.plan) for line in lines if line.plan is not None]
    steps = sum(seeds * plan.steps for seeds, plan in trained)
    flops = sum(seeds * plan.steps * plan.flops_per_step for seeds, plan in trained)
    peak = max((plan.memory.peak for _, plan in trained), default=0)
    return [
        f"{sum(line.seeds for line in lines):,} models, {steps:,} steps, {flops:.3g} flops without "
        f"what writes the student's own text; {peak / MIB:,.1f} MiB at most at a time (estimates: "
        "weights, gradients, optimizer, activations, loss). Nothing was written."
    ]
