"""Prompts and datasets: readers, the split by time, facts, prompt building, the tokenizer.

The way through: read_interactions (or world) -> split -> train_tokenizer(training_texts(...)) ->
PromptBuilder.sequences for training, PromptBuilder.prompts for scoring. No torch here.
"""

from __future__ import annotations

from slmperf.data.interactions import Interactions, Split, Task, split, tasks_for
from slmperf.data.jsonl import Prompt, read_prompts
from slmperf.data.prompts import PromptBuilder, prompt_texts, training_texts
from slmperf.data.readers import read_interactions
from slmperf.data.sequences import RankingPrompt, TrainingSequence
from slmperf.data.tokenizer import train_tokenizer
from slmperf.data.world import world

__all__ = [
    "Interactions",
    "Prompt",
    "PromptBuilder",
    "RankingPrompt",
    "Split",
    "Task",
    "TrainingSequence",
    "prompt_texts",
    "read_interactions",
    "read_prompts",
    "split",
    "tasks_for",
    "train_tokenizer",
    "training_texts",
    "world",
]
