"""What the commands that prune, quantise and measure are given."""

import json
from pathlib import Path

import numpy as np
from small_models import llama

from slmperf import models


def write_ids(path, count=40, vocabulary=64, seed=0, split=None):
    """JSONL of random token ids of different lengths; the last ten lines are of split "eval"."""
    generator = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        line = {"input_ids": generator.integers(0, vocabulary, 8 + number % 20).tolist()}
        if split:
            line["split"] = "eval" if number >= count - 10 else split
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
    return path


def checkpoint_and_ids(folder: Path) -> Path:
    """The folder with a small checkpoint without a tokenizer, model/, and token ids, ids.jsonl."""
    models.save(llama(), None, folder / "model")
    write_ids(folder / "ids.jsonl", split="train")
    return folder
