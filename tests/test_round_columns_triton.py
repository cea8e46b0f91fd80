"""round_columns's Triton kernel: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from slmperf.testing.interpreter import cure
from slmperf.testing.rounding_cases import RoundColumnsCase

GPU = torch.cuda.is_available()
if not GPU:
    cure()
DEVICE = "cuda" if GPU else "cpu"

CASES = [
    # one column, less than a group of columns, one exactly, several and a rest; a tile and a rest
    RoundColumnsCase(1, 3, groups=1),
    RoundColumnsCase(7, 64, groups=3, zero_points=True),
    RoundColumnsCase(16, 65, keep=True),
    RoundColumnsCase(37, 70, groups=5, zero_points=True, keep=True),
    RoundColumnsCase(37, 20, grid="float"),
    RoundColumnsCase(20, 33, grid="float", keep=True),
    RoundColumnsCase(37, 20, grid="none"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_value_is_the_nearest(case: RoundColumnsCase) -> None:
    tensors = case.tensors(DEVICE)
    found = case.run(tensors, "triton")
    case.check(tensors, found)
    assert torch.equal(found, case.run(tensors, "triton"))  # bit for bit


def test_an_output_does_not_see_its_neighbours() -> None:
    case = RoundColumnsCase(37, 70, groups=5, zero_points=True, keep=True)
    tensors = case.tensors(DEVICE)
    by_output = ("current", "gradient", "scale", "zero_point", "keep")
    some = {
        name: x[:, 11:24].contiguous() if name in by_output else x for name, x in tensors.items()
    }
    assert torch.equal(case.run(tensors, "triton")[:, 11:24], case.run(some, "triton"))


def test_no_columns_and_no_outputs() -> None:
    for columns, outputs in ((0, 5), (5, 0)):
        case = RoundColumnsCase(columns, outputs)
        assert case.run(case.tensors(DEVICE), "triton").shape == (columns, outputs)


@pytest.mark.parametrize("grid", ["int", "float", "none"])
def test_the_judge_can_fail(grid: str) -> None:
    """What a wrong kernel would do: a neighbouring value, a sum that leaves out one column."""
    case = RoundColumnsCase(20, 24, grid=grid, keep=True)
    tensors = case.tensors()
    right = case.run(tensors, "reference")
    case.check(tensors, right)
    spoilt = right.clone()
    spoilt[11, 3] += tensors["scale"][tensors["group"][11], 3]
    with pytest.raises(AssertionError, match="too far|off the grid|are not"):
        case.check(tensors, spoilt)
    coefficients = tensors["coefficients"].clone()
    coefficients[12:, 4] = 0.0
    with pytest.raises(AssertionError, match="too far"):
        case.check(tensors, case.run(tensors | {"coefficients": coefficients}, "reference"))


@pytest.mark.gpu
@pytest.mark.parametrize("grid", ["int", "float", "none"])
@pytest.mark.parametrize("columns,outputs", [(64, 4096), (256, 6144), (200, 1001)])
def test_on_a_device(columns: int, outputs: int, grid: str) -> None:
    case = RoundColumnsCase(columns, outputs, groups=3, grid=grid, keep=outputs == 1001)
    tensors = case.tensors("cuda")
    case.check(tensors, case.run(tensors, "triton"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(tensors, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
