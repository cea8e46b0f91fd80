"""What is measured during a training: cross entropy and AUC of the answers, and some text.

The loss is the same measure for every objective: the mean over answer tokens of the cross entropy
at temperature 1, in nats. Batches are dealt to the ranks in turn; sums of every batch are put
together and added in the order of the batches, so that any number of ranks gives the same figures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from slmperf.check import InputError
from slmperf.distill.heads import same_vocabulary, student_head, unwrapped
from slmperf.distill.loss import DistillationLoss
from slmperf.distill.packing import inputs_of
from slmperf.distill.step import autocast
from slmperf.evaluate import auc
from slmperf.models.files import write_atomically
from slmperf.ops import StudentHead
from slmperf.ops.kd_loss.heads import scaled

if TYPE_CHECKING:
    from slmperf.distill.config import DistillationConfig
    from slmperf.distill.packing import Batch, PackedBatches
    from slmperf.distill.teachers import Teacher

_CROSS_ENTROPY, _DIVERGENCE, _TOKENS, _LABELS = range(4)  # columns of what a batch adds


def check_evaluation(batches: PackedBatches, label_tokens: tuple[int, int] | None) -> None:
    """InputError for batches without an answer, or without both label tokens among the answers."""
    answers = batches.answers.copy()
    answers[np.cumsum(batches.lengths) - batches.lengths] = False  # nothing predicts a first token
    found = batches.ids[answers]
    if not len(found):
        raise InputError("evaluation: no token is an answer, expected at least one")
    for token in label_tokens or ():
        if not (found == token).any():
            raise InputError(
                f"evaluation: no answer is the label token {token}, expected both of {label_tokens}"
            )


@torch.no_grad()
def validation(
    model: torch.nn.Module,
    batches: PackedBatches,
    *,
    config: DistillationConfig,
    teacher: Teacher | None = None,
    label_tokens: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Measure `model` on the answers of all batches; the same on every rank.

    loss    mean cross entropy of the answer tokens, nats; without the rows of the student's head
            that are beyond the teacher's vocabulary
    kd      with a teacher, the configuration's divergence from it, mean over the same tokens
    auc     with label_tokens (no, yes), over all answers that are one of them; the score is the
            difference of those two logits
    tokens  answer tokens

    Weights, modes and generators are left as they were. InputError where nothing is an answer, or
    all labels are alike.
    """
    device = next(model.parameters()).device
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = 1.0 if teacher is None else 0.5  # any that is neither 0 nor 1 measures both parts
    loss = DistillationLoss(
        config.kind, cross_entropy=share, temperature=config.temperature, reduction="sum"
    )
    sums = torch.zeros(len(batches), 4, dtype=torch.float64, device=device)
    scored: dict[int, tuple[Tensor, Tensor]] = {}
    modes = [(one, one.training) for one in model.modules()]
    model.eval()
    try:
        for number in range(rank, len(batches), ranks):
            batch = _answers(batches[number])
            answers = batch["targets"].numel()
            if not answers:
                continue
            batch = {name: value.to(device) for name, value in batch.items()}
            with autocast(config, device):
                given = None if teacher is None else teacher.rows(batch)
            with autocast(config, device):
                student = student_head(model, inputs_of(batch), positions=batch["positions"])
            if teacher is not None and given is not None:
                student, given = same_vocabulary(student, given, teacher.vocabulary)
            found = loss(student, given, labels=batch["targets"])
            row = sums[number]
            row[_CROSS_ENTROPY], row[_DIVERGENCE] = found.cross_entropy, found.divergence
            row[_TOKENS] = answers
            if label_tokens is not None:
                scored[number] = _scores(student, batch["targets"], label_tokens)
                row[_LABELS] = len(scored[number][0])
    finally:
        for one, mode in modes:
            one.training = mode
    if ranks > 1:
        dist.all_reduce(sums)  # exact: each row is zeros on all ranks but one
    cross_entropy, divergence, tokens, _ = sums.sum(dim=0).tolist()
    if not tokens:
        raise InputError("validation: no token is an answer, expected at least one")
    metrics = {"loss": cross_entropy / tokens, "tokens": tokens}
    if teacher is not None:
        metrics["kd"] = divergence / tokens
    if label_tokens is not None:
        metrics["auc"] = _auc(scored, sums[:, _LABELS].long(), ranks)
    return metrics


def _answers(batch: Batch) -> Batch:
    """The same batch with its answers alone among the positions of the loss."""
    answer = batch["answer"]
    owner = torch.repeat_interleave(torch.arange(len(batch["counts"])), batch["counts"])
    kept = {
        name: batch[name][answer]
        for name in ("positions", "targets", "answer", "answer_share", "sequence_share", "places")
    }
    counts = torch.bincount(owner[answer], minlength=len(batch["counts"]))
    return {**batch, **kept, "counts": counts}


def _scores(
    head: StudentHead, targets: Tensor, label_tokens: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Difference of the two logits where the target is one of the tokens, and which it is."""
    no, yes = label_tokens
    hidden = head.hidden[(targets == no) | (targets == yes)].float()
    columns = torch.tensor(label_tokens, device=targets.device)
    raw = hidden @ head.weight[columns].float().mT
    if head.bias is not None:
        raw = raw + head.bias[columns].float()
    logits = scaled(raw, head.scale, head.softcap).double()
    return logits[:, 1] - logits[:, 0], targets[(targets == no) | (targets == yes)] == yes


def _auc(scored: dict[int, tuple[Tensor, Tensor]], counts: Tensor, ranks: int) -> float:
    """Over the answers of all batches on all ranks; counts (batches,) int64, of each batch."""
    starts = (counts.cumsum(0) - counts).tolist()
    every = torch.zeros(2, int(counts.sum()), dtype=torch.float64, device=counts.device)
    for number, (scores, labels) in scored.items():
        place = slice(starts[number], starts[number] + len(scores))
        every[0, place], every[1, place] = scores, labels.double()
    if ranks > 1:
        dist.all_reduce(every)
    scores, labels = every.cpu().numpy()
    return auc(scores, labels)


# --- text ---------------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    model: Any,
    batches: PackedBatches,
    *,
    count: int,
    path: Path,
    step: int,
    tokenizer: Any = None,
    new_tokens: int = 64,
) -> None:
    """Continue the first prompts greedily, and keep the text in a file of JSON lines.

    count       prompts, of the first examples
    path        the file; lines of this step and later ones, of a run that was taken up again from
                before them, are replaced
    tokenizer   None: tokens alone are written
    new_tokens  at most; fewer where the model knows no more positions

    A line has step, example (its key), tokens (the continuation), and as texts prompt, continuation
    and reference, what the example has there.
    """
    from slmperf.distill.on_policy import PaddedGeneration, stop_tokens

    inner = unwrapped(model)
    known = getattr(inner.config, "max_position_embeddings", None) or np.inf
    starts = np.cumsum(batches.lengths) - batches.lengths
    prompts = {index: batches.prompt(index) for index in range(min(count, len(batches.lengths)))}
    prompts = {index: ids for index, ids in prompts.items() if 0 < len(ids) < known}
    generator = PaddedGeneration()
    generator.update(inner, step)
    stop = stop_tokens(inner)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        stop |= {tokenizer.eos_token_id}
    found = generator.generate(
        [ids.tolist() for ids in prompts.values()],
        new_tokens=[int(min(new_tokens, known - len(ids))) for ids in prompts.values()],
        temperature=0.0,
        top_p=1.0,
        seeds=[0] * len(prompts),
        stop=stop,
    )
    lines = []
    for (index, ids), tokens in zip(prompts.items(), found, strict=True):
        line: dict[str, Any] = {"step": step, "example": batches.key(index), "tokens": tokens}
        if tokenizer is not None:
            whole = batches.ids[starts[index] : starts[index] + batches.lengths[index]]
            texts = {"prompt": ids.tolist(), "continuation": tokens}
            texts["reference"] = whole[len(ids) :].tolist()
            line |= {name: tokenizer.decode(text) for name, text in texts.items()}
        lines.append(json.dumps(line, ensure_ascii=False))
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    kept = [line for line in before if json.loads(line)["step"] < step]
    write_atomically(path, "\n".join([*kept, *lines, ""]))
