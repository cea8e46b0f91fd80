"""slmperf.ops.round_columns: the C++ loop against the reference, the grids, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slmperf.check import InputError
from slmperf.ops.round_columns import GRIDS, round_columns


def block(
    columns: int, outputs: int, grid: str, *, zeros: bool = False, masked: bool = False
) -> dict[str, Any]:
    """Arguments of a block: correlated columns, three groups in any order."""
    make = torch.Generator().manual_seed(columns * 1000 + outputs)
    inputs = torch.randn(80, columns, generator=make) @ torch.randn(
        columns, columns, generator=make
    )
    zero_point = torch.randint(-8, 8, (3, outputs), generator=make).float()
    return {
        "current": torch.randn(columns, outputs, generator=make),
        "gradient": torch.randn(columns, outputs, generator=make) * 30,
        "coefficients": inputs.T @ inputs,
        "scale": torch.rand(3, outputs, generator=make) * 0.3 + 0.02,
        "zero_point": zero_point if zeros else None,
        "group": torch.randint(0, 3, (columns,), generator=make),
        "keep": torch.rand(columns, outputs, generator=make) > 0.3 if masked else None,
        "lowest": -448.0 if grid == "float" else -8.0,
        "highest": 448.0 if grid == "float" else 7.0,
        "grid": grid,
    }


def rounded(arguments: dict[str, Any], impl: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`current` afterwards; everything else stays as it was."""
    given = {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    if dtype is not None:
        given = {
            name: value.to(dtype)
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for name, value in given.items()
        }
    before = {name: value.clone() for name, value in given.items() if hasattr(value, "clone")}
    round_columns(**given, impl=impl)
    for name, value in before.items():
        assert name == "current" or torch.equal(given[name], value), name
    return given["current"]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("columns", "outputs"), [(1, 1), (5, 63), (64, 64), (64, 65), (33, 200)])
def test_the_loop_is_the_reference(columns: int, outputs: int, grid: str, masked: bool) -> None:
    for zeros in {False, grid == "int"}:
        arguments = block(columns, outputs, grid, zeros=zeros, masked=masked)
        found = rounded(arguments, "cpu")
        gold = rounded(arguments, "reference", torch.float64)
        apart = (found.double() - gold).abs() > 1e-3 * (1 + gold.abs())
        # A sum that rounds otherwise may tip a value that lies between two codes, and those after.
        assert float(apart.double().mean()) < (1e-9 if columns * outputs < 3000 else 2e-3)
        if masked:
            assert not found[~arguments["keep"]].any()


def test_e4m3_is_rounded_as_torch_rounds_it() -> None:
    ties = torch.arange(-4096, 4097) / 2048.0  # halves of the steps below 1, subnormals among them
    wide = torch.linspace(-500, 500, 4001)
    values = torch.cat([ties, ties * 256, ties / 256, wide])[None]
    arguments = {
        **block(1, values.shape[1], "float"),
        "current": values,
        "gradient": torch.zeros_like(values),
        "scale": torch.ones(3, values.shape[1]),
    }
    wanted = values.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(rounded(arguments, "cpu"), wanted)


def test_outputs_do_not_depend_on_their_neighbours() -> None:
    arguments = block(64, 200, "int", zeros=True)
    whole = rounded(arguments, "cpu")
    rows = slice(37, 150)
    part = {
        name: value[:, rows].contiguous()
        if name in ("current", "gradient", "scale", "zero_point")
        else value
        for name, value in arguments.items()
    }
    assert torch.equal(rounded(part, "cpu"), whole[:, rows])


def test_the_operators_are_registered() -> None:
    for impl in ("cpu", "reference"):
        op = getattr(torch.ops.slmperf.round_columns, impl)
        arguments = block(6, 20, "int", zeros=True, masked=True)
        torch.library.opcheck(op, (*list(arguments.values())[:-1], GRIDS.index("int")))


def test_what_does_not_fit_is_refused() -> None:
    good = block(6, 20, "int")
    with pytest.raises(InputError, match=r"gradient is \(5, 20\), expected \(b, p\) = \(6, 20\)"):
        round_columns(**good | {"gradient": good["gradient"][:5]})
    with pytest.raises(ValueError, match="grid is 'fp4'"):
        round_columns(**good | {"grid": "fp4"})
    with pytest.raises(NotImplementedError, match="float64"):
        round_columns(**good | {"current": good["current"].double()}, impl="cpu")
    with pytest.raises(RuntimeError, match="group names more groups than the 3"):
        round_columns(**good | {"group": good["group"] + 5})
    with pytest.raises(ValueError, match="group is torch.int32, expected torch.int64"):
        round_columns(**good | {"group": good["group"].int()})
    with pytest.raises(ValueError, match="current is not contiguous"):
        round_columns(**good | {"current": good["current"].T.contiguous().T})


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_views_are_taken_as_their_copies(impl: str) -> None:
    arguments = block(40, 70, "int", zeros=True, masked=True)
    wanted = rounded(arguments, impl)
    views = {
        name: value.T.contiguous().T
        if isinstance(value, torch.Tensor) and value.dim() == 2 and name != "current"
        else value
        for name, value in arguments.items()
    }
    assert not views["scale"].is_contiguous()
    round_columns(**views, impl=impl)
    assert torch.equal(views["current"], wanted)


def test_the_loop_in_a_compiled_graph() -> None:
    arguments = block(20, 64, "int", zeros=True)
    wanted = rounded(arguments, "cpu")

    def call(current: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        round_columns(**arguments | {"current": current, "gradient": gradient * 2})
        return current + 1

    made = torch.compile(call, fullgraph=True, backend="aot_eager")(
        arguments["current"].clone(), arguments["gradient"] / 2
    )
    assert torch.equal(made, wanted + 1)


def test_writes_stay_within_current() -> None:
    arguments = block(16, 65, "int")
    wanted = rounded(arguments, "cpu")
    buffer = torch.full((16 * 65 + 33,), 7.5)
    current = buffer[17 : 17 + 16 * 65].view(16, 65)  # not aligned to a vector
    current.copy_(arguments["current"])
    round_columns(**arguments | {"current": current})
    assert torch.equal(current, wanted)
    assert (buffer[:17] == 7.5).all() and (buffer[17 + 16 * 65 :] == 7.5).all()
