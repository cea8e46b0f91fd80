"""Small models and data for tests of training, and processes that may be killed in the middle."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from slmperf.distill import DistillationConfig

VOCABULARY, CONTEXT = 96, 48
NO, YES = 2, 3


@dataclass(frozen=True)
class Ranked:
    """The fields of slmperf.data.TrainingSequence that a training reads."""

    input_ids: np.ndarray
    row: np.ndarray
    answer: np.ndarray


def make_model(kind: str = "llama", seed: int = 0, spread: float = 0.2, **changes: Any):
    """Two layers of width 16; a mixture's routers would add a loss if anything let them."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "initializer_range": spread,
        "eos_token_id": 7,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**(shape | changes)))
    routers = {"output_router_logits": True, "router_aux_loss_coef": 10.0}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    config = MixtralConfig(**(shape | routers | experts | changes))
    return MixtralForCausalLM._from_config(config, experts_implementation="grouped_mm")


def make_ranked(count: int, seed: int = 0) -> list[Ranked]:
    """History rows of two to five tokens and an answer, the first of them only shown; the answer
    is Yes when a row's first token is even.
    """
    random, found = np.random.default_rng(seed), []
    for member in range(count):
        ids, rows, answers = [1, 4 + member % 8], [-1, -1], [False, False]
        for row in range(random.integers(2, 6)):
            words = random.integers(12, VOCABULARY, random.integers(2, 6)).tolist()
            ids += [*words, YES if words[0] % 2 == 0 else NO]
            rows += [row] * (len(words) + 1)
            answers += [False] * len(words) + [row > 0]
        found.append(Ranked(np.array(ids, np.int32), np.array(rows, np.int32), np.array(answers)))
    return found


def make_labelled(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts with labels as Transformers wants them: about the second half is the answer."""
    random, found = np.random.default_rng(seed), []
    for _ in range(count):
        ids = random.integers(12, VOCABULARY, random.integers(6, 20))
        shown = len(ids) // 2 + int(random.integers(-1, 2))
        found.append({"input_ids": ids.tolist(), "labels": [-100] * shown + ids[shown:].tolist()})
    return found


def settings(folder: Path, **changes: Any) -> DistillationConfig:
    base = {
        "output_dir": str(folder),
        "max_steps": 4,
        "context": CONTEXT,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "seed": 0,
        "save_strategy": "no",
    }
    return DistillationConfig(**(base | changes))


def logs_of(trainer: Any, *names: str) -> list[tuple[int, dict[str, float]]]:
    """Of the log history, step by step, entries that start with one of `names`; times left out."""
    measured = ("second", "runtime", "mfu")
    found = []
    for entry in trainer.state.log_history:
        kept = {
            key: value
            for key, value in entry.items()
            if key.startswith(names) and not any(word in key for word in measured)
        }
        if kept:
            found.append((entry["step"], kept))
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    """As in the processes below: sums are added in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def young_garbage() -> Iterator[None]:
    """accelerate collects garbage whenever a training begins: half a second over all that the
    tests have imported, which is left out here.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# --- processes --------------------------------------------------------------------------------
# They are forked from a server that has imported what takes long and computed nothing.

_PRELOADED = ["torch", "transformers", "slmperf.distill", "slmperf.distill.trainer", "peft"]


def start(job: Callable[..., None], *arguments: Any, rank: tuple[int, int, int] | None = None):
    """A process that does `job`; rank: (rank, ranks, port)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_run, args=(job, arguments, rank))
    process.start()
    return process


def start_ranks(job: Callable[..., None], *arguments: Any, ranks: int = 2) -> list[Any]:
    """`ranks` processes of one gloo group."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return [start(job, *arguments, rank=(rank, ranks, port)) for rank in range(ranks)]


def ended(processes: list[Any], seconds: float = 100.0) -> list[int]:
    """Exit codes; a negative one is the signal that ended it. None of them outlives this."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def _run(job: Callable[..., None], arguments: tuple, rank: tuple[int, int, int] | None) -> None:
    torch.set_num_threads(1)
    if rank is not None:
        names = ("RANK", "WORLD_SIZE", "MASTER_PORT")
        os.environ |= {name: str(value) for name, value in zip(names, rank, strict=True)}
        os.environ |= {"LOCAL_RANK": str(rank[0]), "MASTER_ADDR": "127.0.0.1"}
    with young_garbage():
        job(*arguments)
    if rank is not None:
        torch.distributed.destroy_process_group()
