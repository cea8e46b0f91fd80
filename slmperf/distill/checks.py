"""What would else show in the middle of a training, or not at all: found before its first step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.distill.config import DistillationConfig
from slmperf.distill.evaluation import check_evaluation
from slmperf.distill.heads import student_head
from slmperf.distill.packing import PackedBatches
from slmperf.distill.step import autocast
from slmperf.distill.teachers import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slmperf.distill.on_policy import OnPolicySampler

_NEAR = 0.05  # of a token's hidden state, more than rounding changes in bf16


def check_start(
    model: PreTrainedModel,
    teacher: Teacher | None,
    on_policy: OnPolicySampler | None,
    batches: PackedBatches,
    processing_class: Any,
) -> None:
    """Everything about models, teacher and sampler that would else show in the middle."""
    text = model.config.get_text_config(decoder=True)
    context, known = batches.config.context, getattr(text, "max_position_embeddings", None)
    if known is not None and known < context:
        raise InputError(
            f"train: the model knows {known} positions, wanted at least context = {context}"
        )
    least, most = int(batches.ids.min()), int(batches.ids.max())
    if least < 0 or most >= text.vocab_size:
        raise InputError(
            f"train: the examples have the token {least if least < 0 else most}, wanted ids from 0 "
            f"to below the model's vocabulary of {text.vocab_size}"
        )
    if teacher is not None:
        teacher.check(model, batches, processing_class)
    if on_policy is not None:
        on_policy.check(batches, model)
        if on_policy.fraction > 0 and (teacher is None or batches.config.kd_weight == 0):
            found = "there is no teacher" if teacher is None else "kd_weight is 0"
            raise InputError(
                f"train: on_policy.fraction is {on_policy.fraction} and {found}, wanted a teacher "
                "with a weight: the student's own text has no other target"
            )
        if teacher is not None and not teacher.any_text and on_policy.fraction > 0:
            raise InputError(
                f"train: on_policy.fraction is {on_policy.fraction} and the teacher does not read "
                "all text of the student (a cache, or a model of a smaller vocabulary), wanted 0, "
                "or one that does: a model or a server"
            )


def evaluation_sets(given: Any, config: DistillationConfig) -> dict[str, PackedBatches]:
    """Data sets for evaluation by name, "" for a single one."""
    if given is None:
        return {}
    found = {}
    for name, one in (given if isinstance(given, Mapping) else {"": given}).items():
        if not isinstance(one, PackedBatches):
            one = PackedBatches(one, config, once=True)
        check_evaluation(one, config.label_tokens)
        found[name] = one
    return found


def check_best(
    args: DistillationConfig, evaluated: dict[str, PackedBatches], teacher: Teacher | None
) -> None:
    """InputError where evaluation will not find what the best checkpoint is chosen by."""
    if not args.load_best_model_at_end:
        return
    known = []
    for name, batches in evaluated.items():
        measured = ["loss"]
        measured += ["kd"] if teacher is not None and teacher.of(batches) is not None else []
        measured += ["auc"] if args.label_tokens is not None else []
        known += [f"{name}_{one}" if name else one for one in measured]
    wanted = str(args.metric_for_best_model).removeprefix("eval_")
    if wanted not in known:
        raise InputError(
            f"DistillationConfig: metric_for_best_model is {args.metric_for_best_model!r}, wanted "
            f"one that eval_dataset gives: {', '.join(f'eval_{one}' for one in known) or 'none'}"
        )


@torch.no_grad()
def check_packing(model: torch.nn.Module, batches: PackedBatches, own_text: bool = False) -> None:
    """InputError for a model that a packed example is not the same to as it is alone.

    Transformers takes a 4-d mask as it is, so that a sliding window is forgotten, and a recurrent
    layer carries its state from one example to the next. Two of the shortest examples and the
    longest one go through the model both ways; where the student writes text (own_text), which may
    fill the context, the longest one is repeated up to that.
    """
    if not batches.shares_rows and not own_text:
        return
    order = batches.used[batches.lengths[batches.used].argsort(kind="stable")]
    chosen = [batches.tokens(index) for index in dict.fromkeys([*order[:2], order[-1]])]
    if own_text:
        chosen[-1] = np.resize(chosen[-1], batches.config.context)
    lengths = torch.tensor([len(ids) for ids in chosen])
    segment = torch.arange(len(chosen)).repeat_interleave(lengths)
    seen = (segment[:, None] == segment).tril_()
    packed = {
        "input_ids": torch.from_numpy(np.concatenate(chosen))[None],
        "position_ids": torch.cat([torch.arange(int(length)) for length in lengths])[None],
        "attention_mask": seen[None, None],
    }
    training = model.training
    model.eval()
    try:
        found = _states(model, packed, batches.config)
        alone = [{"input_ids": torch.from_numpy(ids)[None]} for ids in chosen]
        wanted = torch.cat([_states(model, one, batches.config) for one in alone])
    finally:
        model.train(training)
    wrong = (found - wanted).norm(dim=1) > _NEAR * wanted.norm(dim=1)
    # A mixture of experts may send a token elsewhere for the last bit of its scores.
    if float(wrong.float().mean()) > 0.02:
        raise InputError(
            f"train: packing is True and {type(model).__name__} gives {int(wrong.sum())} of "
            f"{len(wrong)} tokens other hidden states than without other examples in their row, "
            "wanted packing=False"
        )


def _states(
    model: torch.nn.Module, inputs: dict[str, Tensor], config: DistillationConfig
) -> Tensor:
    """(L, D) fp32, what the output layer is given."""
    device = next(model.parameters()).device
    with autocast(config, device):
        given = {name: value.to(device) for name, value in inputs.items()}
        return student_head(model, given).hidden.float()
