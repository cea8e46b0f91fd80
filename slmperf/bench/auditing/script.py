"""slmperf audit --trainer SCRIPT: run a training script up to one step of its trainer, audit that.

transformers.Trainer.train is wrapped, so that the first call of compute_loss in training, of
whatever subclass, is audited in place of the step. Then the script ends: nothing is trained further
and nothing is saved.
"""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slmperf.bench.auditing.capture import Batch, head_of
from slmperf.bench.auditing.report import AuditReport, Formula
from slmperf.bench.auditing.rows import IGNORED
from slmperf.bench.auditing.step import Declared, audit_step
from slmperf.bench.roof import Roof
from slmperf.check import InputError
from slmperf.ops import JSD, ForwardKL, ReverseKL

_REPLACED = ("compute_loss", "_save_checkpoint")


class _Finished(BaseException):
    """Ends the script from within its trainer; no handler of Exception stops it."""


def audit_trainer(
    script: str | Path,
    arguments: Sequence[str] = (),
    *,
    formula: Formula | str | None = None,
    step: int = 1,
    roof: Roof | None = None,
) -> AuditReport:
    """Run `script` as __main__ with `arguments` and audit the loss of its trainer's `step`.

    formula   what the loss is meant to be, or the text that Formula.parse reads; otherwise what
              the trainer's settings say: those of slmperf's DistillationTrainer, of trainers with
              `args.beta`, `temperature` and `lmbda` as TRL's GKDTrainer has them, and the cross
              entropy of a plain Trainer

    Steps before `step` are trained as they are. Checkpoints are not written. Raises InputError
    where the script is not there, fails (its traceback goes to stderr), or trains nothing with a
    transformers.Trainer.
    """
    path = Path(script)
    if not path.is_file():
        raise InputError(f"audit: {path} is not there, expected a training script")
    if step < 1:
        raise InputError(f"audit: step is {step}, expected 1 or more")
    meant = Formula.parse(formula) if isinstance(formula, str) else formula
    reports: list[AuditReport] = []
    failed: list[InputError] = []
    calls = 0

    def first(trainer: Any, compute_loss: Callable[..., Any], given: dict[str, Any]) -> None:
        """Audit and end if it is the step's turn."""
        nonlocal calls
        calls += 1
        if calls <= (step - 1) * trainer.args.gradient_accumulation_steps:
            return
        try:
            reports.append(_audit_loss(trainer, compute_loss, given, meant, roof))
        except InputError as error:
            failed.append(error)
        raise _Finished

    before = sys.argv, list(sys.path)
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with _hooked(first):
            _run(path)
    finally:
        sys.argv, sys.path[:] = before
    if failed:
        raise failed[0]
    if not reports:
        raise InputError(
            f"audit: {path} ended after {calls} losses of a transformers.Trainer in training, "
            f"expected step {step}: audited are Trainer and its subclasses (TRL's too); for a loop "
            "of your own call slmperf.bench.audit(model, batch, loss_fn)"
        )
    return reports[0]


def _run(path: Path) -> None:
    try:
        runpy.run_path(str(path), run_name="__main__")
    except _Finished:
        pass
    except SystemExit as end:
        if end.code not in (None, 0):
            raise InputError(f"audit: {path} ended with exit code {end.code!r}") from None
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        raise InputError(f"audit: {path} failed with {type(error).__name__}: {text}") from None


@contextmanager
def _hooked(first: Callable[[Any, Callable[..., Any], dict[str, Any]], None]) -> Iterator[None]:
    """Every Trainer that begins to train asks `first` before it computes a loss, and saves none."""
    from transformers import Trainer

    train = Trainer.train

    def hooked_train(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain = self.compute_loss

        def compute_loss(model: nn.Module, inputs: Any, *rest: Any, **named: Any) -> Any:
            if model.training and torch.is_grad_enabled():
                first(self, plain, {"model": model, "inputs": inputs, "rest": rest, **named})
            return plain(model, inputs, *rest, **named)

        own = {name: vars(self)[name] for name in _REPLACED if name in vars(self)}
        self.compute_loss = compute_loss
        self._save_checkpoint = lambda *_, **__: None
        try:
            return train(self, *args, **kwargs)
        finally:
            for name in _REPLACED:
                del vars(self)[name]
            vars(self).update(own)

    Trainer.train = hooked_train
    try:
        yield
    finally:
        Trainer.train = train


def _audit_loss(
    trainer: Any,
    compute_loss: Callable[..., Any],
    arguments: dict[str, Any],
    formula: Formula | None,
    roof: Roof | None,
) -> AuditReport:
    named = dict(arguments)
    model, inputs, rest = named.pop("model"), named.pop("inputs"), named.pop("rest")

    def step(batch: Batch) -> Any:
        return compute_loss(model, batch, *rest, **named)

    declared = _declared(trainer, inputs, named.get("num_items_in_batch"), formula)
    return audit_step(step, model, inputs, declared, optimizer=trainer.optimizer, roof=roof)


def _declared(
    trainer: Any, inputs: Mapping[str, Any], items: Tensor | None, formula: Formula | None
) -> Declared:
    """What a trainer's own settings say of its loss."""
    from slmperf.distill import DistillationTrainer
    from slmperf.distill.step import token_weights

    if isinstance(trainer, DistillationTrainer):
        own = Formula.of(trainer.args, trainer.teacher is not None)
        positions, counted = inputs["input_ids"].numel(), inputs["positions"]
        targets = inputs["input_ids"].flatten().index_select(0, counted + 1)
        labels = targets.new_full((positions,), IGNORED)
        weights = token_weights(dict(inputs), trainer.args, items)
        return Declared(
            formula or own,
            labels=labels.index_copy(0, counted, targets),
            weights=weights.new_zeros(positions).index_copy(0, counted, weights),
            teacher=getattr(trainer.teacher, "model", None),
            padding=(positions - int(inputs["tokens"]), positions),
        )
    teacher = next(
        (
            value
            for value in vars(trainer).values()
            if isinstance(value, nn.Module)
            and value is not trainer.model
            and value is not trainer.model_wrapped
            and head_of(value) is not None
        ),
        None,
    )
    count = None if items is None else float(items)
    return Declared(formula or _formula_of(trainer, inputs, count, teacher), teacher=teacher)


def _formula_of(
    trainer: Any, inputs: Mapping[str, Any], items: float | None, teacher: nn.Module | None
) -> Formula | None:
    from transformers import Trainer

    args = trainer.args
    # Trainer divides the loss by the steps of an accumulation, unless it takes it for scaled.
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is None:
        scaled = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    reduction: Any = items if items is not None and scaled else "mean"
    settings = all(hasattr(args, name) for name in ("beta", "temperature", "lmbda"))
    if teacher is not None and settings:
        # The ends of beta are special cases, as TRL has them.
        beta: float = args.beta
        kind = ForwardKL() if beta == 0 else ReverseKL() if beta == 1 else JSD(beta)
        return Formula(kind, temperature=args.temperature, reduction=reduction)
    plain = type(trainer).compute_loss is Trainer.compute_loss and trainer.compute_loss_func is None
    labels = inputs.get("labels")
    if plain and isinstance(labels, Tensor) and bool((labels != IGNORED).any()):
        smoothing = args.label_smoothing_factor
        return Formula(ce_weight=1.0, label_smoothing=smoothing, reduction=reduction)
    return None
