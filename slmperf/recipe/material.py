"""material: the data of a run as token ids. What every stage learns from and is scored on.

It is made anew at every start of a run, in memory: everything here is a function of the data and of
the recipe's `data` section. So bad data is found before anything is written, and a resumed run
continues on the very same tokens (`Material.sha256` says so).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from slmperf import data as source_data
from slmperf.calibrate.texts import Vocabulary, read_sequences
from slmperf.check import InputError
from slmperf.data import (
    Interactions,
    Prompt,
    PromptBuilder,
    RankingPrompt,
    Split,
    Task,
    TrainingSequence,
)
from slmperf.evaluate import Run, floor_runs
from slmperf.models.files import sha256_of
from slmperf.recipe.manifest import digest
from slmperf.recipe.results import DataFacts
from slmperf.recipe.schema import Data, Subset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Seed of the draws that all stages share: members that are scored, members that are learned from.
# One draw for both: where all members have candidates, those of a small subset are scored ones.
DRAW = 0


class Labelled(NamedTuple):
    """The rows of one task, for predictors that see no text."""

    interactions: Interactions
    split: Split
    task: Task
    numbers: np.ndarray  # int (N,): the rows' numbers in the data, as in RankingPrompt.rows


class Text(NamedTuple):
    """A file to calibrate on that is not the run's data."""

    sequences: list[np.ndarray]  # token ids (T,)
    sha256: str  # of the file


@dataclass(frozen=True, eq=False)
class Material:
    """Tokenizer, training sequences and prompts of a run."""

    tokenizer: PreTrainedTokenizerFast
    builder: PromptBuilder
    training: list[TrainingSequence]  # of all members, task after task
    prompts: list[RankingPrompt]  # of the scored members, task after task
    labelled: list[Labelled]  # one per task
    facts: DataFacts
    sha256: str  # of everything that a stage can see, but for the texts
    texts: dict[str, Text] = field(default_factory=dict)  # by the recipe's word for the file

    def with_texts(self, names: Iterable[str], base: Path) -> Material:
        """The same with the texts of these files, seen from the folder `base`."""
        context = self.builder.context
        vocabulary = Vocabulary(self.tokenizer, len(self.tokenizer), context)
        texts = {
            name: Text(read_sequences(base / name, vocabulary), sha256_of(base / name))
            for name in dict.fromkeys(names)
        }
        return replace(self, texts=texts)

    def sequences(self, subset: Subset) -> list[TrainingSequence]:
        """Training sequences of a subset, task after task."""
        drawn = np.random.default_rng(DRAW).permutation(self.facts.members)
        chosen = np.zeros(self.facts.members, bool)
        chosen[drawn[: max(1, round(subset.members * self.facts.members))]] = True
        tasks = self.facts.tasks if subset.tasks is None else subset.tasks
        return [one for one in self.training if one.task in tasks and chosen[one.member]]

    def floors(self) -> dict[str, Run]:
        """The trivial predictors on the scored rows: name -> run."""
        scored = np.concatenate([prompt.rows for prompt in self.prompts])
        runs: dict[str, dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        for interactions, split, task, numbers in self.labelled:
            kept = np.isin(numbers[split.candidate], scored)
            for name, run in floor_runs(interactions, split, [task]).items():
                scores, labels, members = run[task.name]
                runs.setdefault(name, {})[task.name] = scores[kept], labels[kept], members[kept]
        return dict(runs)

    def check_subset(self, subset: Subset, where: str) -> None:
        """InputError for a subset that leaves nothing to learn; `where` is its key path."""
        for task in subset.tasks or []:
            if task not in self.facts.tasks:
                known = ", ".join(self.facts.tasks)
                raise InputError(f"{where}.tasks: no task is named {task!r}, expected {known}")
        if not self.sequences(subset):
            raise InputError(
                f"{where}: leaves no training rows, expected a larger share of members"
            )


def read(settings: Data, source: Path | None) -> Interactions | list[Prompt]:
    """The rows or, from a .jsonl file, the prompts of `source`; without it the embedded world."""
    if source is None:
        return source_data.world(**settings.world.model_dump())
    if source.suffix == ".jsonl":
        return source_data.read_prompts(source)
    return source_data.read_interactions(source)


def prepare(settings: Data, rows: Interactions | list[Prompt], source: str) -> Material:
    """Split, tokenizer, prompts. InputError for data that leave nothing to learn or to score."""
    if isinstance(rows, Interactions):
        return _of_interactions(settings, rows)
    return _of_prompts(settings, rows, source)


def _of_interactions(settings: Data, rows: Interactions) -> Material:
    split = source_data.split(rows, settings.history, settings.minimum_rows, settings.validation)
    every = source_data.tasks_for(rows)
    names = _task_names(settings, [task.name for task in every])
    tasks = [task for task in every if task.name in names]
    texts = source_data.training_texts(rows, split, tasks)
    tokenizer = source_data.train_tokenizer(texts, settings.vocabulary)
    builder = PromptBuilder(tokenizer, tasks, settings.context, facts=settings.facts)
    members = _drawn(settings, np.unique(rows.member[split.candidate]))
    numbers = np.arange(len(rows))
    return _material(
        settings,
        builder,
        tokenizer,
        [one for task in tasks for one in builder.sequences(rows, split, task)],
        [one for task in tasks for one in builder.prompts(rows, split, task, members)],
        [Labelled(rows, split, task, numbers) for task in tasks],
        rows,
    )


def _of_prompts(settings: Data, prompts: list[Prompt], source: str) -> Material:
    if settings.validation:
        raise InputError(f"data.validation: expected 0 for prompts, found {settings.validation:g}")
    names = _task_names(settings, list(dict.fromkeys(prompt.task for prompt in prompts)))
    prompts = [prompt for prompt in prompts if prompt.task in names]
    texts = source_data.prompt_texts(prompts, settings.history)
    if not texts:
        raise InputError(
            f"{source}: no prompt is early enough to train on, "
            "expected several of a member and task"
        )
    tokenizer = source_data.train_tokenizer(texts, settings.vocabulary)
    tasks = [Task(name, name, 1.0) for name in names]
    builder = PromptBuilder(tokenizer, tasks, settings.context, facts=False)
    training, ranking = builder.from_prompts(prompts, settings.history)
    members = _drawn(settings, np.unique([one.member for one in ranking]))
    scored_rows = np.concatenate([one.rows for one in ranking])
    rows = _as_interactions(prompts, source)
    labelled = []
    for task in tasks:
        numbers = np.flatnonzero([prompt.task == task.name for prompt in prompts])
        candidate = np.isin(numbers, scored_rows)
        part = _as_interactions([prompts[number] for number in numbers], source, rows)
        labelled.append(Labelled(part, Split(~candidate, candidate), task, numbers))
    order = {name: place for place, name in enumerate(names)}
    return _material(
        settings,
        builder,
        tokenizer,
        sorted(training, key=lambda one: order[one.task]),
        sorted((one for one in ranking if one.member in members), key=lambda one: order[one.task]),
        labelled,
        rows,
    )


def _as_interactions(
    prompts: list[Prompt], source: str, names: Interactions | None = None
) -> Interactions:
    """Prompts as rows in the order of their lines: candidate as item, label as rating."""
    known_members = names.member_names if names else dict.fromkeys(one.member for one in prompts)
    known_items = names.item_texts if names else dict.fromkeys(one.candidate for one in prompts)
    member = {name: place for place, name in enumerate(known_members)}
    item = {text: place for place, text in enumerate(known_items)}
    return Interactions.from_rows(
        (
            np.array([member[one.member] for one in prompts]),
            np.array([item[one.candidate] for one in prompts]),
            np.array([one.label for one in prompts]),
            np.arange(len(prompts)),
        ),
        scale=1,
        member_names=tuple(member),
        item_texts=tuple(item),
        source=source,
    )


def _material(
    settings: Data,
    builder: PromptBuilder,
    tokenizer: PreTrainedTokenizerFast,
    training: list[TrainingSequence],
    prompts: list[RankingPrompt],
    labelled: list[Labelled],
    rows: Interactions,
) -> Material:
    counts = [_check_labels(one.task.name, prompts) for one in labelled]
    if not training:
        raise InputError(f"{rows.source}: no history to train on, expected earlier rows of members")
    scored = {prompt.member for prompt in prompts}
    return Material(
        tokenizer=tokenizer,
        builder=builder,
        training=training,
        prompts=prompts,
        labelled=labelled,
        facts=DataFacts(
            source=rows.source,
            synthetic=rows.synthetic,
            members=len(rows.member_names),
            items=len(rows.item_texts),
            interactions=len(rows),
            scored_members=len(scored),
            candidates=max(counts),
            tasks=[one.task.name for one in labelled],
        ),
        sha256=_sha256(settings, training, prompts, tokenizer),
    )


def _task_names(settings: Data, known: list[str]) -> list[str]:
    for name in settings.tasks or []:
        if name not in known:
            raise InputError(f"data.tasks: no task is named {name!r}, expected {', '.join(known)}")
    return [name for name in known if settings.tasks is None or name in settings.tasks]


def _drawn(settings: Data, members: np.ndarray) -> np.ndarray:
    """At most settings.scored_members of the members with candidates."""
    if settings.scored_members is None or settings.scored_members >= len(members):
        return members
    drawn = np.random.default_rng(DRAW).permutation(members)
    return np.sort(drawn[: settings.scored_members])


def _check_labels(task: str, prompts: Sequence[RankingPrompt]) -> int:
    """Number of candidates of a task; InputError where no AUC exists because a label is missing."""
    labels = [label for one in prompts if one.task == task for label in one.labels.tolist()]
    if len(set(labels)) < 2:
        found = f"{len(labels)} with the label {labels[0]}" if labels else "none"
        raise InputError(
            f"data: task {task}: expected candidates with label 0 and 1, found {found}"
        )
    return len(labels)


def _sha256(
    settings: Data,
    training: Iterable[TrainingSequence],
    prompts: Iterable[RankingPrompt],
    tokenizer: PreTrainedTokenizerFast,
) -> str:
    whole = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    whole.update(digest([settings.context]).encode())
    for one in training:
        whole.update(f"{one.task}\n{one.member}\n".encode())
        whole.update(one.input_ids.tobytes() + one.row.tobytes() + one.answer.tobytes())
    for prompt in prompts:
        whole.update(f"{prompt.task}\n{prompt.member}\n".encode())
        whole.update(prompt.prefix.tobytes() + prompt.labels.tobytes() + prompt.rows.tobytes())
        whole.update(b"".join(ids.tobytes() + b"\n" for ids in prompt.candidates))
    return whole.hexdigest()
