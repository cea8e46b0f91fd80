"""round_columns: columns of a weight rounded one after the other, each making good what the ones
before it did wrong. The inner loop of GPTQ and of coordinate descent (QuantEase).

For every row of a weight on its own, columns j = 0, 1, ... of a block in order:

    target_j   = current_j + gradient_j / C_jj            step_j = new_j - current_j
    new_j      = the grid's value nearest target_j         gradient_k -= step_j C_kj    for k > j

With C = H, the Gram matrix, and gradient = (W - current) H this is exact minimisation over one
coordinate after the other (QuantEase, arXiv 2309.01885, equations 6 to 8); with C = R', where
H = R R' and R is upper triangular, current = W and gradient_j = sum over earlier blocks of
(W - new)_i R_ij it is GPTQ (arXiv 2210.17323). Everything is transposed, a column of the weight is
a row here, so that neighbouring outputs lie side by side: nothing is exchanged between them.

    current       (b, p) fp32: the block's columns; replaced by the new values, code times scale
    gradient      (b, p) fp32
    coefficients  (b, b) fp32: C, its diagonal > 0; what is above the diagonal is not read
    scale         (g, p) fp32 > 0, a row for each group of columns
    zero_point    (g, p) fp32 whole numbers: the codes that stand for 0; None: 0
    group         (b,) int64: the row of scale and zero_point that a column has
    keep          (b, p) bool: where False the new value is 0; None: True
    lowest, highest   the smallest and the largest code
    grid          "int": whole numbers; "float": fp8 e4m3; "none": no rounding, new = target
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slmperf.check import check_shapes
from slmperf.ops.routing import Implementation, require_interpreter, routes

SCHEMA = (
    "(Tensor(a!) current, Tensor gradient, Tensor coefficients, Tensor scale, Tensor? zero_point,"
    " Tensor group, Tensor? keep, float lowest, float highest, int grid) -> ()"
)
GRIDS = ("none", "int", "float")  # the operator takes the place in here


def round_columns_reference(
    current: Tensor,
    gradient: Tensor,
    coefficients: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group: Tensor,
    keep: Tensor | None,
    lowest: float,
    highest: float,
    grid: int,
) -> None:
    """The same in plain torch, in any floating dtype."""
    gradient = gradient.clone()
    by_column = scale[group]
    zeros = None if zero_point is None else zero_point[group]
    for j in range(len(current)):
        target = current[j] + gradient[j] / coefficients[j, j]
        new = target
        if GRIDS[grid] == "float":
            code = (target / by_column[j]).clamp(lowest, highest)
            new = code.to(torch.float8_e4m3fn).to(target.dtype) * by_column[j]
        elif GRIDS[grid] == "int":
            zero = 0.0 if zeros is None else zeros[j]
            code = ((target / by_column[j]).round() + zero).clamp(lowest, highest)
            new = (code - zero) * by_column[j]
        if keep is not None:
            new = torch.where(keep[j], new, 0.0)
        gradient[j + 1 :] -= coefficients[j + 1 :, j : j + 1] * (new - current[j])
        current[j] = new


ROUTES = routes(
    "round_columns",
    {"cpu": "cpu", "cuda": "triton"},
    cpu=Implementation(("cpu",), (torch.float32,), "native"),
    triton=Implementation(("cuda", "cpu"), (torch.float32,), "triton"),
    reference=Implementation((), (torch.float32, torch.float64)),
)


def _fake(*arguments: object) -> None:
    return None


for _name in ("cpu", "triton", "reference"):
    torch.library.define(
        f"slmperf::round_columns.{_name}", SCHEMA, tags=torch.Tag.pt2_compliant_tag
    )
    torch.library.register_fake(f"slmperf::round_columns.{_name}", _fake)
torch.library.impl("slmperf::round_columns.reference", ("cpu", "cuda"))(round_columns_reference)


@torch.library.impl("slmperf::round_columns.triton", ("cpu", "cuda"))
def _triton(*arguments: Any) -> None:
    require_interpreter("round_columns", arguments[0])
    from slmperf.triton_kernels.round_columns import round_columns as launch

    launch(*arguments)


def round_columns(
    current: Tensor,
    gradient: Tensor,
    coefficients: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    group: Tensor,
    keep: Tensor | None = None,
    lowest: float,
    highest: float,
    grid: str = "int",
    impl: str = "auto",
) -> None:
    """Round the columns of a block, in place; shapes and meanings are above.

    impl: "auto" takes "cpu" (C++) on the CPU and "triton" on a GPU; "reference" also takes fp64.
    ValueError for shapes that do not fit, a group that is not int64 and a `current` that is not
    contiguous; NotImplementedError for another dtype or an implementation that cannot run here. The
    caller sees to it that group names rows of scale: looking would make a GPU wait.
    """
    shapes = {
        "current": (current, "b p"),
        "gradient": (gradient, "b p"),
        "coefficients": (coefficients, "b b"),
        "scale": (scale, "g p"),
        "group": (group, "b"),
    }
    if zero_point is not None:
        shapes["zero_point"] = (zero_point, "g p")
    if keep is not None:
        shapes["keep"] = (keep, "b p")
    check_shapes("round_columns", **shapes)
    if grid not in GRIDS:
        raise ValueError(f"round_columns: grid is {grid!r}, expected one of {', '.join(GRIDS)}")
    if group.dtype != torch.int64:
        raise ValueError(f"round_columns: group is {group.dtype}, expected torch.int64")
    if not current.is_contiguous():  # it is written to; the others are copied
        raise ValueError("round_columns: current is not contiguous")
    read = [gradient, coefficients, scale, zero_point, group, keep]
    read = [one if one is None else one.contiguous() for one in read]
    op = getattr(torch.ops.slmperf.round_columns, ROUTES.choose(impl, current))
    op(current, *read, lowest, highest, GRIDS.index(grid))
