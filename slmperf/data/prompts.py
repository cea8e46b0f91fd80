"""The prompt builder: from interactions or JSONL prompts to token ids.

slmperf.data.template says what a prompt looks like, slmperf.data.sequences what the results hold.
Each distinct text is tokenised once; rows are then put together from the cached ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from slmperf.check import InputError
from slmperf.data.facts import COLUMNS, FACT_WORDS, facts
from slmperf.data.interactions import Interactions, Split, Task
from slmperf.data.jsonl import Prompt
from slmperf.data.sequences import RankingPrompt, Rows, TrainingSequence, windows
from slmperf.data.template import ARROW, BEGIN, LINE, NO, YES, clean, member_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def training_texts(
    interactions: Interactions, split: Split, tasks: Sequence[Task]
) -> dict[str, int]:
    """What a tokenizer is trained on: each text of the training rows, with how often it occurs."""
    texts: Counter[str] = Counter()
    counts = np.bincount(interactions.item[split.history], minlength=len(interactions.item_texts))
    for text, count in zip(interactions.item_texts, counts.tolist(), strict=True):
        if count:
            texts[clean(text)] += count
    members = np.unique(interactions.member[split.history])
    for member in members.tolist():
        texts[member_line(interactions.member_names[member])] += 1
    for task in tasks:
        texts[clean(task.instruction)] += len(members)
    return dict(texts)


def prompt_texts(prompts: Sequence[Prompt], history: float = 0.8) -> dict[str, int]:
    """The same for prompts read from JSONL: the texts of those that `from_prompts` trains on."""
    texts: Counter[str] = Counter()
    for numbers in by_owner(prompts).values():
        for number in numbers[: trained(numbers, history)]:
            prompt = prompts[number]
            texts.update((clean(prompt.task), member_line(prompt.member), clean(prompt.candidate)))
            for text, action in prompt.history:
                texts.update((clean(text), " " + clean(action)))
    return dict(texts)


def by_owner(prompts: Sequence[Prompt]) -> dict[tuple[str, int], list[int]]:
    """(task, member) -> places of its prompts in order of time, ties in the order of lines."""
    names: dict[str, int] = {}
    groups: dict[tuple[str, int], list[int]] = {}
    for number, prompt in enumerate(prompts):
        member = names.setdefault(prompt.member, len(names))
        groups.setdefault((prompt.task, member), []).append(number)
    for numbers in groups.values():
        numbers.sort(key=lambda number: prompts[number].time)  # stable
    return groups


def trained(numbers: Sequence[int], history: float) -> int:
    """How many of one owner's prompts, the first in time, are trained on; the rest are scored."""
    return int(history * len(numbers) + 1e-9)


class PromptBuilder:
    """Turns data into token ids; used alike for the teacher, the students and the scoring.

    tasks: what this builder is used for (for callers to loop over). context: the most tokens of a
    training sequence, and of a prefix with any one candidate. facts: state what was known at each
    row's time (slmperf.data.facts). overlap: share of the context that a member's later windows
    may fill with rows already labelled, so that their first rows see some history; a share of s
    costs up to s / (1 - s) more tokens. An item's text is cut at a quarter of the context.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        tasks: Sequence[Task],
        context: int,
        *,
        facts: bool = True,
        overlap: float = 0.25,
    ) -> None:
        if not 0.0 <= overlap < 1.0:
            raise InputError(f"prompts: overlap is {overlap:g}, expected a share from 0 up to 1")
        self.tasks = tuple(tasks)
        self.context = context
        self.facts = facts
        self.overlap = overlap
        self._backend = tokenizer.backend_tokenizer
        self._begin, self._line = self._word(BEGIN), self._word(LINE)
        self._arrow = self._word(ARROW)
        self.answer_ids = (self._word(NO), self._word(YES))
        self._facts = np.array([self._word(word) for word in FACT_WORDS], np.int32)
        self._items: tuple[tuple[str, ...], list[np.ndarray]] = ((), [])

    def _word(self, word: str) -> int:
        token = self._backend.token_to_id(word)
        if token is None:
            raise InputError(
                f"tokenizer: no token {word!r}, expected a tokenizer made by train_tokenizer"
            )
        return token

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def _encode_items(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._encode([clean(text) for text in texts])
        return [ids[: self.context // 4] for ids in encoded]

    def _preamble(self, instruction: np.ndarray, member: np.ndarray) -> np.ndarray:
        line = [self._line]
        return np.concatenate([[self._begin], instruction, line, member, line]).astype(np.int32)

    def _check_fits(self, preamble: int, row: int) -> None:
        if preamble + row > self.context:
            raise InputError(
                f"prompts: context is {self.context}, expected at least {preamble + row} tokens "
                f"for the preamble ({preamble}) and one row ({row})"
            )

    def _rows(
        self, interactions: Interactions, split: Split, task: Task, chosen: np.ndarray
    ) -> Rows:
        if self._items[0] is not interactions.item_texts:  # the tasks of one data set share this
            self._items = (interactions.item_texts, self._encode_items(interactions.item_texts))
        items = self._items[1]
        text_starts = np.concatenate([[0], np.cumsum([len(ids) for ids in items])])
        texts = np.concatenate(items)
        item = interactions.item[chosen]
        text_lengths = np.diff(text_starts)[item]
        extra = (len(COLUMNS) if self.facts else 0) + 2  # and the arrow and the answer
        starts = np.concatenate([[0], np.cumsum(text_lengths + extra)])
        tokens = np.empty(starts[-1], np.int32)
        text_ends = np.cumsum(text_lengths)
        within = np.arange(text_lengths.sum()) - np.repeat(text_ends - text_lengths, text_lengths)
        source = np.repeat(text_starts[:-1][item], text_lengths) + within
        tokens[np.repeat(starts[:-1], text_lengths) + within] = texts[source]
        if self.facts:
            words = self._facts[facts(interactions, split, task)[chosen]]
            for column in range(words.shape[1]):
                tokens[starts[1:] - extra + column] = words[:, column]
        tokens[starts[1:] - 2] = self._arrow
        tokens[starts[1:] - 1] = np.array(self.answer_ids)[task.labels(interactions)[chosen]]
        return Rows(tokens, starts, chosen.astype(np.int32))

    def _by_member(
        self, interactions: Interactions, split: Split, task: Task, chosen: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray, Rows]]:
        """(member, preamble, the member's rows) for the chosen rows, which are sorted by member."""
        if not len(chosen):
            return
        rows = self._rows(interactions, split, task, chosen)
        member = interactions.member[chosen]
        found, begins = np.unique(member, return_index=True)
        names = self._encode([member_line(interactions.member_names[m]) for m in found])
        [instruction] = self._encode([clean(task.instruction)])
        ends = np.append(begins[1:], len(member))
        for m, name, begin, end in zip(found.tolist(), names, begins, ends, strict=True):
            yield m, self._preamble(instruction, name), rows.part(int(begin), int(end))

    def sequences(
        self,
        interactions: Interactions,
        split: Split,
        task: Task,
        members: Sequence[int] | np.ndarray | None = None,
    ) -> list[TrainingSequence]:
        """Training sequences of the history rows: every one is labelled in exactly one sequence.

        members: only these (indices), or all. Ordered by member, then by time.
        """
        chosen = _chosen(interactions, split.history, members)
        return [
            sequence
            for member, preamble, rows in self._by_member(interactions, split, task, chosen)
            for sequence in self._windows((task.name, member), preamble, rows, first_labelled=0)
        ]

    def _windows(
        self, owner: tuple[str, int], preamble: np.ndarray, rows: Rows, *, first_labelled: int
    ) -> Iterator[TrainingSequence]:
        starts = rows.starts
        lengths = np.diff(starts)
        self._check_fits(len(preamble), int(lengths[first_labelled:].max()))
        capacity = self.context - len(preamble)
        # A short run of labelled rows leaves room for more of the history that comes before it.
        spare = capacity - int(lengths[first_labelled:].sum()) if first_labelled else 0
        overlap = max(int(self.overlap * capacity), spare)
        for start, labelled, end in windows(lengths, first_labelled, capacity, overlap):
            row = np.repeat(np.arange(end - start, dtype=np.int32), lengths[start:end])
            answer = np.zeros(len(preamble) + len(row), bool)
            answer[len(preamble) + starts[labelled + 1 : end + 1] - starts[start] - 1] = True
            yield TrainingSequence(
                input_ids=np.concatenate([preamble, rows.tokens[starts[start] : starts[end]]]),
                row=np.concatenate([np.full(len(preamble), -1, np.int32), row]),
                answer=answer,
                task=owner[0],
                member=owner[1],
                rows=rows.numbers[start:end],
            )

    def prompts(
        self,
        interactions: Interactions,
        split: Split,
        task: Task,
        members: Sequence[int] | np.ndarray | None = None,
    ) -> list[RankingPrompt]:
        """One ranking prompt for every member with candidates, ordered by member.

        The prefix shows the history rows that are strictly earlier than the member's first
        candidate, without the oldest ones where context is too short; it may show none.
        """
        scored = np.zeros(len(interactions.member_names), bool)
        scored[interactions.member[split.candidate]] = True
        wanted = (split.history | split.candidate) & scored[interactions.member]
        chosen = _chosen(interactions, wanted, members)
        labels = task.labels(interactions)
        result = []
        for member, preamble, rows in self._by_member(interactions, split, task, chosen):
            # In order of time a member's history comes first, then the candidates.
            first = int(np.argmax(split.candidate[rows.numbers]))
            time = interactions.time[rows.numbers]
            known = int(np.searchsorted(time[:first], time[first], side="left"))
            candidates = rows.part(first, len(time))
            result.append(
                self._ranking_prompt(
                    (task.name, member),
                    preamble,
                    rows.part(0, known),
                    candidates,
                    labels[candidates.numbers],
                )
            )
        return result

    def _ranking_prompt(
        self,
        owner: tuple[str, int],
        preamble: np.ndarray,
        history: Rows,
        candidates: Rows,
        labels: np.ndarray,
    ) -> RankingPrompt:
        questions = candidates.questions()
        longest = max(map(len, questions))
        self._check_fits(len(preamble), longest)
        room = self.context - len(preamble) - longest
        return RankingPrompt(
            task=owner[0],
            member=owner[1],
            prefix=np.concatenate([preamble, history.latest(room)]),
            candidates=questions,
            labels=labels,
            rows=candidates.numbers,
        )

    def from_prompts(
        self, prompts: Sequence[Prompt], history: float = 0.8
    ) -> tuple[list[TrainingSequence], list[RankingPrompt]]:
        """Prompts read from JSONL, as training sequences and ranking prompts without facts.

        Per task and member, in order of time (then of lines), the first int(history * n) prompts
        train and the rest are scored. Prompts with the same history share it: one sequence, in
        order, in training; one prefix, each candidate by itself, in scoring. The history's own
        entries carry no label. member is the place of its name in order of first appearance; rows
        are places in `prompts`.
        """
        texts = {text: i for i, text in enumerate(_texts(prompts))}
        items = self._encode_items(list(texts))
        sequences: list[TrainingSequence] = []
        ranking: list[RankingPrompt] = []
        for owner, numbers in by_owner(prompts).items():
            known = trained(numbers, history)
            first = prompts[numbers[0]]
            preamble = self._preamble(*self._encode([clean(first.task), member_line(first.member)]))
            for part, training in ((numbers[:known], True), (numbers[known:], False)):
                for same in _same_history(prompts, part):
                    shown = self._actions(prompts[same[0]], texts, items)
                    asked = [
                        (items[texts[prompts[n].candidate]], [self.answer_ids[prompts[n].label]])
                        for n in same
                    ]
                    if training:
                        rows = self._join([*shown, *asked], [-1] * len(shown) + same)
                        sequences += self._windows(owner, preamble, rows, first_labelled=len(shown))
                    else:
                        labels = np.array([prompts[n].label for n in same], np.int8)
                        before = self._join(shown, [-1] * len(shown))
                        after = self._join(asked, same)
                        ranking.append(self._ranking_prompt(owner, preamble, before, after, labels))
        return sequences, ranking

    def _actions(
        self, prompt: Prompt, texts: dict[str, int], items: list[np.ndarray]
    ) -> list[tuple[np.ndarray, list[int]]]:
        """The history's entries as (ids of the text, ids of the action)."""
        words = {"no": [self.answer_ids[0]], "yes": [self.answer_ids[1]]}
        entries = []
        for text, action in prompt.history:
            ids = words.get(action.strip().lower())
            if ids is None:
                [free] = self._encode([" " + clean(action)])
                ids = [*free[: self.context // 8].tolist(), self._line]
            entries.append((items[texts[text]], ids))
        return entries

    def _join(self, entries: list[tuple[np.ndarray, list[int]]], numbers: list[int]) -> Rows:
        rows = [np.array([*text, self._arrow, *end], np.int32) for text, end in entries]
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        return Rows(np.concatenate(rows), starts, np.array(numbers, np.int32))


def _texts(prompts: Iterable[Prompt]) -> dict[str, None]:
    """Every distinct item text, in order of first appearance."""
    return dict.fromkeys(
        text
        for prompt in prompts
        for text in (prompt.candidate, *(text for text, _ in prompt.history))
    )


def _same_history(prompts: Sequence[Prompt], numbers: Sequence[int]) -> list[list[int]]:
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for number in numbers:
        groups.setdefault(prompts[number].history, []).append(number)
    return list(groups.values())


def _chosen(
    interactions: Interactions, rows: np.ndarray, members: Sequence[int] | np.ndarray | None
) -> np.ndarray:
    """Numbers of the rows (of these members), by member and then by time."""
    if members is not None:
        wanted = np.zeros(len(interactions.member_names), bool)
        wanted[np.asarray(members, np.int64)] = True
        rows = rows & wanted[interactions.member]
    index = np.flatnonzero(rows)
    return index[np.argsort(interactions.member[index], kind="stable")]
