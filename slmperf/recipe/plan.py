"""plan: which models a recipe makes, in which order, from which others, and how large they become.

A stage with several seeds makes one model per seed. A stage that reads another one takes the model
of its own seed where there is one, else the other's first: three students may share one teacher, or
have one each. Everything that can be refused without computing is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

from slmperf.check import InputError
from slmperf.prune.heads import plan_heads
from slmperf.recipe.schema import (
    BaseStage,
    PruneAttention,
    PruneGradualStage,
    PruneMlp,
    QuantiseStage,
    Shape,
)

RESERVED = ("tokenizer", "floors")  # other folders in the output folder
_GROUP = 128  # inputs that share a scale in w4a16, if nothing else is said, and in fp8-block


class Recipe(Protocol):
    """What any kind of recipe has to say for a plan."""

    @property
    def seeds(self) -> list[int]: ...
    @property
    def stages(self) -> Sequence[BaseStage]: ...
    @property
    def tables(self) -> Mapping[str, Mapping[str, str]]: ...  # kind -> role -> stage


@dataclass(frozen=True)
class Job:
    """One model to make: a stage under one seed."""

    stage: Any  # a model of the recipe's schema, a BaseStage
    seed: int
    folder: str  # name below the output folder
    shape: Shape  # of the result
    quantised: bool
    source: Job | None  # the job whose model this one starts from
    teacher: Job | None

    @property
    def parents(self) -> dict[str, Job]:
        """The jobs it reads, by the key that names them in the recipe."""
        pairs = {"from": self.source, "teacher": self.teacher}
        return {key: job for key, job in pairs.items() if job is not None}


def plan(recipe: Recipe, given: Mapping[str, Shape] | None = None) -> list[Job]:
    """Jobs in an order in which each comes after those it reads, else as in the recipe.

    given: name -> shape of the stages whose models are there before the run. InputError for a stage
    that does not exist, a circle, or a model that cannot be cut as asked.
    """
    position = {stage.name: index for index, stage in enumerate(recipe.stages)}
    order: list[BaseStage] = []
    for stage in recipe.stages:
        _visit(stage, recipe, position, order, [])
    made: dict[tuple[str, int], Job] = {}
    jobs = []
    for stage in order:
        where = f"stages[{position[stage.name]}] ({stage.name})"
        for seed in _seeds(stage, recipe):
            job = _job(stage, seed, recipe, made, where, given or {})
            made[stage.name, seed] = job
            jobs.append(job)
    _check_folders(jobs)
    _check_tables(recipe)
    return jobs


def _seeds(stage: BaseStage, recipe: Recipe) -> list[int]:
    return stage.seeds or recipe.seeds


def _visit(
    stage: BaseStage,
    recipe: Recipe,
    position: dict[str, int],
    order: list[BaseStage],
    above: list[str],
) -> None:
    if stage in order:
        return
    where = f"stages[{position[stage.name]}] ({stage.name})"
    if stage.name in above:
        raise InputError(f"{where}: reads itself: {' <- '.join([*above, stage.name])}")
    for key, name in _reads(stage).items():
        if name not in position:
            known = ", ".join(position)
            raise InputError(f"{where}.{key}: no stage is named {name!r}, expected one of {known}")
        _visit(recipe.stages[position[name]], recipe, position, order, [*above, stage.name])
    order.append(stage)


def _reads(stage: BaseStage) -> dict[str, str]:
    named = {"from": stage.source, "teacher": getattr(stage, "teacher", None)}
    return {key: name for key, name in named.items() if name is not None}


def _job(
    stage: BaseStage,
    seed: int,
    recipe: Recipe,
    made: dict[tuple[str, int], Job],
    where: str,
    given: Mapping[str, Shape],
) -> Job:
    def read(name: str | None) -> Job | None:
        if name is None:
            return None
        other = next(one for one in recipe.stages if one.name == name)
        seeds = _seeds(other, recipe)
        return made[name, seed if seed in seeds else seeds[0]]

    source = read(stage.source)
    if source is not None and source.quantised:
        raise InputError(
            f"{where}.from: {source.stage.name} is quantised, expected a stage with full weights"
        )
    seeds = _seeds(stage, recipe)
    if len(set(seeds)) < len(seeds):
        raise InputError(f"{where}.seeds: {seeds} names a seed twice")
    return Job(
        stage=stage,
        seed=seed,
        folder=stage.name if len(seeds) == 1 else f"{stage.name}-seed{seed}",
        shape=given[stage.name] if stage.name in given else _shape(stage, source, where),
        quantised=isinstance(stage, QuantiseStage),
        source=source,
        teacher=read(getattr(stage, "teacher", None)),
    )


def _shape(stage: BaseStage, source: Job | None, where: str) -> Shape:
    if source is None:
        shape = getattr(stage, "shape", None)
        assert shape is not None  # the schema: a stage without `from` has a shape
        return shape
    before, name = source.shape, source.stage.name
    cuts = isinstance(stage, (PruneMlp, PruneAttention, PruneGradualStage, QuantiseStage))
    if cuts and before.experts is not None:
        raise InputError(
            f"{where}.from: {name} is a mixture of experts, expected a dense model to {stage.stage}"
        )
    if isinstance(stage, PruneMlp | PruneGradualStage):
        sizes = stage.intermediate if isinstance(stage, PruneGradualStage) else [stage.intermediate]
        if sizes[0] >= before.intermediate:
            raise InputError(
                f"{where}.intermediate: expected less than the {before.intermediate} neurons "
                f"that {name} has, found {sizes[0]}"
            )
        return before.model_copy(update={"intermediate": sizes[-1]})
    if isinstance(stage, PruneAttention):
        return _fewer_heads(stage, before, name, where)
    if isinstance(stage, QuantiseStage):
        _check_groups(stage, before, name, where)
    return before


def _check_groups(stage: QuantiseStage, shape: Shape, name: str, where: str) -> None:
    """InputError where inputs of a layer, or blocks of a weight, are not whole groups; where single
    layers have schemes of their own, `check_training` looks.
    """
    if stage.overrides:
        return
    head = shape.head_size or shape.hidden // shape.heads
    sizes = {"hidden": shape.hidden, "query heads": shape.heads * head}
    sizes["intermediate"] = shape.intermediate
    key, group = "group_size", stage.group_size or _GROUP
    if stage.scheme == "fp8-block":
        key, group = "scheme", _GROUP
        sizes["key/value heads"] = shape.kv_heads * head
    elif stage.scheme != "w4a16" or group < 0:
        return
    for what, size in sizes.items():
        if size % group:
            raise InputError(
                f"{where}.{key}: groups of {group} do not divide the {size} of {what} in {name}"
            )


def _fewer_heads(stage: PruneAttention, before: Shape, name: str, where: str) -> Shape:
    for key, wanted, have in (
        ("kv_heads", stage.kv_heads, before.kv_heads),
        ("heads", stage.heads, before.heads),
    ):
        stays = key == "kv_heads" and stage.head_mode == "uniform"
        if wanted is not None and wanted >= have and not stays:
            what = "KV heads" if key == "kv_heads" else "query heads"
            raise InputError(
                f"{where}.{key}: expected less than the {have} {what} that {name} has, "
                f"found {wanted}"
            )
    size = before.head_size or before.hidden // before.heads
    config: Any = SimpleNamespace(
        num_hidden_layers=1,
        num_attention_heads=before.heads,
        num_key_value_heads=before.kv_heads,
        head_dim=size,
    )
    try:
        plan = plan_heads(
            config,
            attention_heads=stage.heads,
            key_value_heads=stage.kv_heads,
            heads=stage.head_mode,
        )
    except InputError as error:
        raise InputError(f"{where}.{error}") from None
    [heads], [kv_heads] = plan.attention_heads, plan.key_value_heads
    return before.model_copy(update={"heads": heads, "kv_heads": kv_heads, "head_size": size})


def _check_folders(jobs: list[Job]) -> None:
    taken: dict[str, str] = {}
    for job in jobs:
        if job.folder in RESERVED or job.folder in taken:
            other = taken.get(job.folder, "the run itself")
            raise InputError(
                f"stages: {job.stage.name} needs the folder {job.folder}, taken by {other}"
            )
        taken[job.folder] = job.stage.name


def _check_tables(recipe: Recipe) -> None:
    scored = {stage.name for stage in recipe.stages if stage.evaluate}
    for kind, rows in recipe.tables.items():
        for role, name in rows.items():
            if name not in scored:
                raise InputError(
                    f"tables.{kind}.{role}: {name} has `evaluate: false`, expected a scored stage"
                )
