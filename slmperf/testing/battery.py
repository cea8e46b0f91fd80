"""The checks that every op passes, each for one case and one implementation.

`run_case` is what every case of the sample and of the full cross goes through; `CHECKS` are the
rest, run on a few cases of each op. Each raises AssertionError with the numbers in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slmperf.testing.budget import check_error, limit
from slmperf.testing.case import Case

Tensors = dict[str, Tensor]
Run = Callable[[Tensors], Tensor]


def with_gradients(case: Case, tensors: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """The same memory (or copies in another dtype, see `cast`) as leaves of the graph."""
    return {
        name: tensor.detach().requires_grad_(name in case.differentiable)
        for name, tensor in cast(case, tensors, dtype).items()
    }


def cast(case: Case, tensors: Tensors, dtype: torch.dtype | None) -> Tensors:
    """In another dtype; token ids and what is fixed stay what they are."""
    return {
        name: tensor.to(dtype or tensor.dtype)
        if tensor.is_floating_point() and name not in case.fixed
        else tensor
        for name, tensor in tensors.items()
    }


def forward_backward(case: Case, tensors: Tensors, run: Run, upstream: Tensor) -> list[Tensor]:
    """The value, then the gradients of the differentiable tensors."""
    leaves = with_gradients(case, tensors)
    value = run(leaves)
    wanted = [leaves[name] for name in case.differentiable]
    if not wanted:
        return [value]
    return [value.detach(), *torch.autograd.grad(value, wanted, upstream.to(value.dtype))]


def results(case: Case, impl: str, tensors: Tensors, upstream: Tensor) -> list[Tensor]:
    """Value and gradients of one implementation."""
    return forward_backward(case, tensors, lambda given: case.run(given, impl), upstream)


class Truth:
    """Gold and twin of a case on a device, and the judgement of what an implementation found.

    Where the value is one number, the errors of its terms may cancel in the twin by luck; what
    counts as the twin's error is then the sum of theirs.
    """

    def __init__(self, case: Case, device: str, upstream: Tensor | None = None) -> None:
        self.case, self.tensors = case, case.tensors(device)
        wide = cast(case, self.tensors, torch.float64)
        if upstream is None:  # of both signs, with zeros among them
            like = case.reference(wide)
            upstream = torch.randn(like.shape, generator=case.generator())
            if like.dim():
                upstream = upstream.masked_fill(upstream.abs() < 0.2, 0.0)
            upstream = upstream.to(device)
        self.upstream = upstream
        self.gold = forward_backward(case, wide, case.reference, upstream)
        self.twin = forward_backward(case, self.tensors, case.reference, upstream)
        self.luck = 0.0
        with torch.no_grad():
            terms = case.terms(self.tensors)
            if terms is not None:
                self.luck = (terms - case.terms(wide)).abs().sum().item()

    def judge(self, what: str, found: list[Tensor]) -> None:
        """Every result against the budget."""
        names = ["value", *(f"gradient of {name}" for name in self.case.differentiable)]
        for name, kernel, twin, gold in zip(names, found, self.twin, self.gold, strict=True):
            label = f"{self.case.op} {self.case} {what}: {name}"
            luck = self.luck if name == "value" else 0.0
            check_error(
                label, kernel, twin, gold, self.case.reduction, luck, self.case.cancellation
            )


def run_case(case: Case, impl: str, device: str = "cpu") -> None:
    """Forward and backward against the budget."""
    truth = Truth(case, device)
    truth.judge(impl, results(case, impl, truth.tensors, truth.upstream))


def _same_bits(what: str, found: list[Tensor], wanted: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        equal = torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30))
        assert equal, f"{what}: result {index} differs, by at most {(a - b).abs().max().item():.3g}"


def check_operator(case: Case, impl: str, device: str) -> None:
    """torch.library.opcheck: schema, fake, autograd registration, dynamic shapes."""
    operator, arguments = case.operator(with_gradients(case, case.tensors(device)), impl)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor",
              "test_aot_dispatch_dynamic"]  # fmt: skip
    eights = [x for x in arguments if isinstance(x, Tensor) and x.dtype == torch.float8_e4m3fn]
    # Torch looks for changed inputs with operators that fp8 tensors lack.
    torch.library.opcheck(operator, arguments, test_utils=checks[1:] if eights else checks)


def check_compile(case: Case, impl: str, device: str) -> None:
    """One graph without a break, forward and backward, with the bits of the eager call."""
    torch.compiler.reset()  # the cases of a family are one function, recompiled a few times at most
    truth = Truth(case, device)
    compiled = torch.compile(
        lambda given: case.run(given, impl), fullgraph=True, backend="aot_eager"
    )
    found = forward_backward(case, truth.tensors, compiled, truth.upstream)
    wanted = results(case, impl, truth.tensors, truth.upstream)
    _same_bits(f"{case.op} {case} {impl} compiled", found, wanted)


def _rows(case: Case, tensors: Tensors, count: int) -> Tensors:
    """The first rows of the tensors that have rows, and the others whole."""
    return {
        name: tensor.narrow(case.row_axis[name], 0, count) if name in case.row_axis else tensor
        for name, tensor in tensors.items()
    }


def check_empty(case: Case, impl: str, device: str) -> None:
    """No rows: empty results, or 0 where one is of all rows; no launch."""
    leaves = with_gradients(case, _rows(case, case.tensors(device), 0))
    value = case.run(leaves, impl)
    if value.dim():
        assert value.numel() == 0, f"{case.op} {impl}: {tuple(value.shape)} from no rows"
    assert value.sum() == 0, f"{case.op} {impl}: {value.item()} from no rows"
    if case.differentiable:
        value.sum().backward()
    for name in case.differentiable:
        gradient = leaves[name].grad
        assert gradient is not None and gradient.shape == leaves[name].shape
        assert not gradient.any(), f"{case.op} {impl}: gradient of {name} from no rows"


def check_one_row(case: Case, impl: str, device: str) -> None:
    """One row gives what it gives among others (kernels may cut it up otherwise).

    For cases with a value per row; gradients of what all rows share are left as they are.
    """
    truth = Truth(case, device)
    if not truth.upstream.dim():
        return
    spliced = results(case, impl, truth.tensors, truth.upstream)
    alone = results(case, impl, _rows(case, truth.tensors, 1), truth.upstream[:1])
    of_rows = [True, *(name in case.row_axis for name in case.differentiable)]
    for all_rows, one, has_rows in zip(spliced, alone, of_rows, strict=True):
        if has_rows:
            all_rows[:1] = one
    truth.judge(f"{impl} one row", spliced)


def _views(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in memory laid out otherwise; what lies around them is NaN (integers: -7)."""
    views = {"transposed": tensor.mT.contiguous().mT} if tensor.dim() > 1 else {}
    around = torch.nan if tensor.is_floating_point() else -7
    for lead in (1, 3) if tensor.dim() else ():  # elements: every 16-byte load is then misaligned
        buffer = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + lead + 5), around)
        view = buffer[..., lead : lead + tensor.shape[-1]]
        view.copy_(tensor)
        views[f"{lead} elements into a buffer of NaN"] = view
    return views


def check_views(case: Case, impl: str, device: str) -> None:
    """Transposed and misaligned views are taken as they are; what lies beside them is not read."""
    truth = Truth(case, device)
    views = {
        name: {} if name in case.fixed else _views(tensor) for name, tensor in truth.tensors.items()
    }
    for layout in next(iter(views.values())):
        laid_out = {name: views[name].get(layout, truth.tensors[name]) for name in views}
        truth.judge(f"{impl} {layout}", results(case, impl, laid_out, truth.upstream))


def check_expanded_gradient(case: Case, impl: str, device: str) -> None:
    """`.sum().backward()` hands down one number with stride 0."""
    one = torch.ones((), device=device).expand(case.run(case.tensors(device), impl).shape)
    truth = Truth(case, device, one)
    truth.judge(f"{impl} summed", results(case, impl, truth.tensors, one))


def check_repeatable(case: Case, impl: str, device: str) -> None:
    """The same bits from run to run, and from a CPU kernel with any number of threads.

    Where there are matrix products, another number of threads may change results by rounding: the
    libraries' products cut their sums as threads come (oneDNN, MKL), and no switch of theirs that
    prevents it is as fast. The same number gives the same bits all the same.
    """
    truth = Truth(case, device)
    threads = torch.get_num_threads()
    wanted = results(case, impl, truth.tensors, truth.upstream)
    try:
        for count in (1, 2, 3) if impl == "cpu" else (threads,):
            torch.set_num_threads(count)
            found = results(case, impl, truth.tensors, truth.upstream)
            what = f"{case.op} {case} {impl} again, {count} threads"
            if case.flops and count != threads:
                _equal_but_for_rounding(what, found, wanted, case.reduction)
                wanted = results(case, impl, truth.tensors, truth.upstream)
            _same_bits(what, found, wanted)
    finally:
        torch.set_num_threads(threads)


def _equal_but_for_rounding(what: str, found: list[Tensor], wanted: list[Tensor], n: int) -> None:
    """Two results of fp32 sums over n terms in another order, each rounded to its dtype."""
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        top = b.double().nan_to_num(posinf=0.0, neginf=0.0).abs().max().item() if b.numel() else 0.0
        error = (a.double() - b.double()).nan_to_num().abs().max().item() if b.numel() else 0.0
        allowed = limit(0.0, top, b.dtype, n)
        assert error <= allowed, f"{what}: result {index} is off by {error:.3g} over {allowed:.3g}"


CHECKS: dict[str, Callable[[Case, str, str], None]] = {
    "operator": check_operator,
    "compile": check_compile,
    "empty": check_empty,
    "one row": check_one_row,
    "views": check_views,
    "expanded gradient": check_expanded_gradient,
    "repeatable": check_repeatable,
}
