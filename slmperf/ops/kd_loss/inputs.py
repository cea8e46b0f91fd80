"""What a caller gives to kd_loss: checked, gathered where it is sharded, cut where it is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops.kd_loss.heads import StudentHead, Teacher, TeacherHead, TeacherLogits, TeacherTopK

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("mean", "sum", "none")
LOGITS = ("auto", "fp32", "bf16", "difference")


def check_settings(
    student: object,
    teacher: object,
    cross_entropy: float,
    temperature: float,
    reduction: str,
    normalizer: Tensor | float | None,
    logits: str,
) -> None:
    """InputError for a value that no tensor is needed to judge."""

    def refuse(name: str, found: object, wanted: str) -> None:
        raise InputError(f"kd_loss: {name} is {found}, expected {wanted}")

    if not isinstance(student, StudentHead):
        raise InputError(f"kd_loss: student is {type(student).__name__}, expected a StudentHead")
    if teacher is not None and not isinstance(teacher, Teacher):
        refuse("teacher", type(teacher).__name__, "TeacherHead, TeacherLogits or TeacherTopK")
    if not 0.0 <= cross_entropy <= 1.0:
        refuse("cross_entropy", cross_entropy, "0 to 1")
    if teacher is None and cross_entropy < 1.0:
        refuse("teacher", None, f"one, since cross_entropy is {cross_entropy}, below 1")
    if not 0.0 < temperature < math.inf:
        refuse("temperature", temperature, "a finite number > 0")
    if reduction not in REDUCTIONS:
        refuse("reduction", repr(reduction), " or ".join(REDUCTIONS))
    if normalizer is not None and reduction != "mean":
        refuse("normalizer", "given", f"None with reduction={reduction!r}")
    if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
        refuse("normalizer", tuple(normalizer.shape), "one number")
    if logits not in LOGITS:
        refuse("logits", repr(logits), " or ".join(LOGITS))
    if student.vocabulary == 0:
        refuse("student.weight", tuple(student.weight.shape), "at least one row")


def check_teacher(
    student: StudentHead, teacher: Teacher | None, code: str, temperature: float
) -> None:
    """InputError for a teacher of other tokens or another vocabulary, or that D cannot take."""
    tokens = student.hidden.shape[0]
    if isinstance(teacher, TeacherTopK):
        found = teacher.indices
        if code == "reverse_kl" and teacher.tail != "bucket":
            raise InputError(
                f"kd_loss: divergence is ReverseKL() with tail={teacher.tail!r}, expected "
                "tail='bucket': it is infinite where the teacher gives nothing"
            )
        if code != "forward_kl" and teacher.tail == "zero":
            raise InputError(
                "kd_loss: tail is 'zero', expected divergence=ForwardKL(), or another tail: what "
                "is left is no distribution"
            )
        if temperature != 1.0 and teacher.tail != "renormalise":
            raise InputError(
                f"kd_loss: temperature is {temperature} with tail={teacher.tail!r}, expected 1 "
                "(the tail at another temperature is not known) or tail='renormalise'"
            )
    else:
        assert teacher is not None
        found = teacher.hidden if isinstance(teacher, TeacherHead) else teacher.logits
        if teacher.vocabulary != student.vocabulary:
            least = min(teacher.vocabulary, student.vocabulary)
            raise InputError(
                f"kd_loss: teacher has a vocabulary of {teacher.vocabulary}, expected the "
                f"student's {student.vocabulary}; where the first {least} tokens are the same, "
                f"give both heads as weight[:{least}]"
            )
    if found.shape[0] != tokens:
        raise InputError(f"kd_loss: teacher has {found.shape[0]} rows, expected T = {tokens}")
    if found.device != student.hidden.device:
        raise InputError(f"kd_loss: teacher is on {found.device}, expected {student.hidden.device}")


def check_rows(
    student: StudentHead,
    labels: Tensor | None,
    token_weight: Tensor | None,
    rows: Tensor | None,
    capacity: int | None,
) -> None:
    """InputError for what does not have an entry per token, or says twice which rows count."""
    wanted = (student.hidden.shape[0],)
    for name, tensor in (("labels", labels), ("token_weight", token_weight)):
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise InputError(
                f"kd_loss: {name} is {tuple(tensor.shape)}, expected (T,) = ({wanted[0]},)"
            )
    if labels is not None and labels.dtype != torch.int64:
        raise InputError(f"kd_loss: labels is {labels.dtype}, expected torch.int64")
    if token_weight is not None and not token_weight.is_floating_point():
        raise InputError(f"kd_loss: token_weight is {token_weight.dtype}, expected torch.float32")
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        raise InputError(
            f"kd_loss: rows is {tuple(rows.shape)} {rows.dtype}, expected (n,) torch.int64"
        )
    if capacity is not None and (rows is not None or capacity < 1):
        raise InputError(f"kd_loss: capacity is {capacity}, expected at least 1 and no rows")


def check_chunks(chunk_bytes: int | None, group: ProcessGroup | None) -> None:
    """InputError for a budget that is none, or that ranks could take differently."""
    if chunk_bytes is not None and chunk_bytes < 1:
        raise InputError(f"kd_loss: chunk_bytes is {chunk_bytes}, expected at least 1")
    if chunk_bytes is not None and group is not None:
        raise InputError(
            f"kd_loss: chunk_bytes is {chunk_bytes}, expected None with a group, whose ranks have "
            "to cut the rows alike"
        )


def logits_mode(logits: str, impl: str, student: StudentHead, teacher: Teacher | None) -> str:
    """fp32, bf16 or difference; NotImplementedError where this implementation has it not."""
    dtype, device = student.hidden.dtype, student.hidden.device.type
    both = isinstance(teacher, TeacherHead) and dtype == teacher.hidden.dtype == torch.bfloat16
    if logits == "auto":
        return "difference" if both and device == "cuda" and impl == "triton" else "fp32"
    if logits == "bf16" and dtype != torch.bfloat16:
        raise InputError(f"kd_loss: logits is 'bf16' with {dtype} inputs, expected bfloat16 ones")
    if logits == "difference" and not both:
        raise InputError(
            "kd_loss: logits is 'difference', expected bfloat16 hidden states and a TeacherHead"
        )
    if logits == "difference" and impl != "triton":
        raise NotImplementedError(
            f"kd_loss: logits='difference' with impl={impl!r} is not supported; there is: triton"
        )
    return logits


def number(value: Tensor | float | None, like: Tensor) -> Tensor | None:
    """As a () fp32 tensor on the device."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.detach().reshape(()).to(like.device, torch.float32, non_blocking=True)
    return torch.full((), value, dtype=torch.float32, device=like.device)


def listed(token_weight: Tensor | None, rows: Tensor | None, like: Tensor) -> Tensor | None:
    """The weights, 0 where `rows` does not list a token."""
    if rows is None:
        return token_weight
    listed = torch.zeros(like.shape[0], device=like.device)
    listed = listed.index_fill(0, rows.to(like.device), 1.0)
    return listed if token_weight is None else listed * token_weight


def whole(head: Any) -> Any:
    """A head whose tensors are plain, and cast where autocast would cast them."""
    if not isinstance(head, StudentHead | TeacherHead):
        return head

    def plain(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if hasattr(tensor, "full_tensor"):  # DTensor: gathered here, its gradient scattered again
            # Ranks that hold other tokens hold other gradients: FSDP takes their mean. Of ranks
            # that hold the same it is what each of them has.
            from torch.distributed.tensor import Partial

            tensor = tensor.full_tensor(grad_placements=[Partial("avg")] * tensor.device_mesh.ndim)
        kind = tensor.device.type
        if torch.is_autocast_enabled(kind):
            tensor = tensor.to(torch.get_autocast_dtype(kind))
        return tensor

    return replace(
        head, hidden=plain(head.hidden), weight=plain(head.weight), bias=plain(head.bias)
    )


def gathered(student: StudentHead, teacher: Teacher | None) -> AbstractContextManager[object]:
    """The context in which the teacher's parameters under ZeRO-3 are whole; nothing for others.

    InputError for a student's that ZeRO-3 has released: its gradient finds it so, after the loss.
    """
    for tensor in (student.weight, student.bias):
        if _released(tensor) and tensor.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "kd_loss: student's head is released by ZeRO-3, expected it whole: hold "
                "deepspeed.zero.GatheredParameters around loss and backward"
            )
    heads = [head for head in (student, teacher) if isinstance(head, StudentHead | TeacherHead)]
    found = [one for head in heads for one in (head.weight, head.bias) if _released(one)]
    if not found:
        return nullcontext()
    import deepspeed  # type: ignore[import-not-found]

    return deepspeed.zero.GatheredParameters(found)


def _released(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Whether ZeRO-3 holds the parameter, and only a part of it is here."""
    shape = getattr(tensor, "ds_shape", None)
    return shape is not None and tensor is not None and tuple(tensor.shape) != tuple(shape)


def narrow(
    student: StudentHead,
    teacher: Teacher | None,
    labels: Tensor | None,
    counting: Tensor | None,
    vocabulary: Sequence[int] | Tensor,
    ignore_index: int,
    group: ProcessGroup | None,
) -> tuple[StudentHead, Any, Tensor | None]:
    """Heads and labels cut to the columns of `vocabulary`.

    counting  (T,) bool, whose labels matter; None where no label does
    """
    if group is not None:
        raise InputError("kd_loss: vocabulary is given, expected no group beside it")
    if isinstance(teacher, TeacherTopK):
        raise InputError(
            "kd_loss: vocabulary is given, expected TeacherHead or TeacherLogits: a top-k teacher "
            "has tokens of its own"
        )
    ids = torch.as_tensor(vocabulary, dtype=torch.int64)
    if ids.dim() != 1 or not len(ids):
        raise InputError(f"kd_loss: vocabulary is {tuple(ids.shape)}, expected (K,), K >= 1")
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        listed = ids.tolist()
        if min(listed) < 0 or max(listed) >= student.vocabulary or len(set(listed)) < len(listed):
            raise InputError(
                f"kd_loss: vocabulary is {listed[:8]}, expected different ids from 0 to "
                f"{student.vocabulary - 1}"
            )
    ids = ids.to(student.hidden.device, non_blocking=True)

    def cut(head: Any) -> Any:
        if isinstance(head, TeacherLogits):
            return TeacherLogits(head.logits.index_select(1, ids))
        if head is None:
            return None
        bias = None if head.bias is None else head.bias.index_select(0, ids)
        return replace(head, weight=head.weight.index_select(0, ids), bias=bias)

    if labels is not None:
        same = labels[:, None] == ids
        found = same.any(dim=1)
        if (
            counting is not None
            and labels.device.type == "cpu"
            and not torch.compiler.is_compiling()
        ):
            lost = labels[counting & ~found & (labels != ignore_index)]
            if len(lost):
                raise InputError(
                    f"kd_loss: labels holds {int(lost[0])}, expected one of vocabulary "
                    f"{ids.tolist()[:8]}"
                )
        missing = torch.full_like(labels, len(ids))  # out of range, as the operator will find
        place = torch.where(found, same.to(torch.int8).argmax(dim=1), missing)
        labels = torch.where(labels == ignore_index, labels, place)
    return cut(student), cut(teacher), labels


def counting(
    student: StudentHead, token_weight: Tensor | None, rows: Tensor | None, cross_entropy: float
) -> Tensor | None:
    """Which tokens' labels matter (T,), None where none does."""
    if cross_entropy == 0.0:
        return None
    weight = listed(token_weight, rows, student.hidden)
    if weight is None:
        return torch.ones(student.hidden.shape[0], dtype=torch.bool, device=student.hidden.device)
    return weight != 0.0
