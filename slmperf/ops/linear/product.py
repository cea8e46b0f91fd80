"""What the products of `linear` share: the reference, and how an op is registered.

Three ops, one a scheme, because their kernels share nothing: linear_int4, linear_int8, linear_fp8.
All give

    y = x W' + bias + residual, added up and put together in fp32, rounded once to out_dtype

    x         (M, K) floating, any row stride, or codes of rounded inputs
    bias      (N,), experts' (E, N); residual (M, N); floating, None: nothing is added
    starts    (E + 1,) int32, not descending, from 0 to M: rows starts[e] to starts[e + 1] go with
              expert e of a stacked weight; None: one weight. It stays on the device
    out_dtype fp32, bf16 or fp16

Each op has the overloads `cpu` (csrc/cpu/linear_*.cpp), `triton`, `torch` (torch's own products),
`reference`, linear_int4 also `cuda` (csrc/cuda), and `auto`, which looks the number of rows up in
the table (table.py) when it runs: a graph holds for any number of rows. It takes the first of the
table's rows whose implementation can run here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.ops.linear import table
from slmperf.ops.linear.weights import has_blocks
from slmperf.ops.routing import Routes

_NOT_OF_THE_WEIGHT = ("x", "x_scale", "bias", "residual", "starts")


def product_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    starts: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The product with a dequantised weight (N, K), or (E, N, K), in plain torch and in the wider
    dtype of x and the output, to which torch rounds it before the residual is added."""
    wide = torch.promote_types(x.dtype, out_dtype)
    x, weight = x.to(wide), weight.to(x.dtype).to(wide)
    if x.device.type == "cpu":  # oneDNN reads beyond odd rows of bf16 that do not lie side by side
        x = x.contiguous()
    bias = None if bias is None else bias.to(wide)
    if starts is None:
        y = torch.nn.functional.linear(x, weight, bias)
    else:
        y = x.new_zeros(len(x), weight.shape[1])
        edges = starts.tolist()
        if edges != sorted(edges) or (edges[0], edges[-1]) != (0, len(x)):
            raise InputError(f"linear: starts are {edges}, wanted 0 to {len(x)}, not descending")
        for expert, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
            of_expert = None if bias is None else bias[expert]
            y[begin:end] = torch.nn.functional.linear(x[begin:end], weight[expert], of_expert)
    if residual is not None:
        y = y + residual.to(wide)
    return y.to(out_dtype)


def register(
    op: str,
    schema: str,
    routes: Routes,
    *,
    implementations: dict[str, Callable[..., Tensor]],
    weight_of: Callable[[dict[str, Any], int, torch.dtype], Tensor],
    fits: Callable[[str, dict[str, Any]], bool] = lambda impl, given: True,
) -> Callable[..., str]:
    """Define the overloads of an op, with fakes and gradients for x, bias and residual.

    implementations  overload -> function of the op's arguments; `cpu` is registered by the library
    weight_of        the op's arguments by name but for x and what is added, K, a dtype -> the
                     dequantised weight (N, K) in it
    fits             an implementation that the table names, the arguments by name -> whether it
                     takes them, beyond what the routes say of x

    Returns what `auto` chooses by: the op's arguments -> the overload. Callers that are not being
    traced may ask it themselves and save the second call.
    """
    names = [part.split()[-1] for part in schema[1 : schema.index(")")].split(", ")]

    def columns(given: dict[str, Any]) -> int:
        return given["outputs"] if "outputs" in given else given["codes"].shape[-2]

    def fake(*arguments: Any) -> Tensor:
        given = dict(zip(names, arguments, strict=True))
        shape = given["x"].shape[0], columns(given)
        return given["x"].new_empty(shape, dtype=given["out_dtype"])

    def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
        # Of x and what is added only their kind: the gradient needs the weight alone.
        given = dict(zip(names, inputs, strict=True))
        ctx.inputs, ctx.with_experts = given["x"].shape[1], given["starts"] is not None
        ctx.dtypes = {name: given[name].dtype for name in ("x", "bias", "residual")
                      if given[name] is not None}  # fmt: skip
        ctx.plain = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
        ctx.parts = [name for name, value in given.items()
                     if isinstance(value, Tensor) and name not in _NOT_OF_THE_WEIGHT]  # fmt: skip
        ctx.save_for_backward(*(given[name] for name in ctx.parts))

    def gradient(ctx: Any, grad: Tensor) -> tuple:
        if ctx.with_experts:
            raise NotImplementedError(f"{op}: no gradient where rows go with experts")
        wanted: dict[str, Tensor | None] = {}
        needs, dtypes = dict(zip(names, ctx.needs_input_grad, strict=True)), ctx.dtypes
        if needs["x"]:  # rounded inputs count as what they were rounded from
            parts = ctx.plain | dict(zip(ctx.parts, ctx.saved_tensors, strict=True))
            wanted["x"] = grad.to(dtypes["x"]) @ weight_of(parts, ctx.inputs, dtypes["x"])
        if needs["bias"]:
            wanted["bias"] = grad.sum(dim=0, dtype=torch.float32).to(dtypes["bias"])
        if needs["residual"]:
            wanted["residual"] = grad.to(dtypes["residual"])
        return tuple(wanted.get(name) for name in names)

    def chosen(*arguments: Any) -> str:
        given = dict(zip(names, arguments, strict=True))
        x, starts = given["x"], given["starts"]
        call = table.Call(
            op, x.shape[0], columns(given), x.shape[1], x.dtype,
            rounded=bool(given.get("activations")),
            blocks="codes" in given and has_blocks(given["scale"], columns(given)),
            experts=0 if starts is None else len(starts) - 1,
        )  # fmt: skip
        rows = table.matching(call, x.device)
        ready = (row.impl for row in rows if routes.takes(row.impl, x) and fits(row.impl, given))
        found = next(ready, None)
        if found is None:
            named = ", ".join(row.impl for row in rows) or "none"
            raise NotImplementedError(
                f"{op}: impl='auto' on {x.device.type} tensors of {x.dtype}: of those that the "
                f"table names ({named}) none can run here"
            )
        return found

    def by_table(*arguments: Any) -> Tensor:
        return getattr(getattr(torch.ops.slmperf, op), chosen(*arguments))(*arguments)

    for name in (*routes.implementations, "auto"):
        overload = f"slmperf::{op}.{name}"
        torch.library.define(overload, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(overload, fake)
        torch.library.register_autograd(overload, gradient, setup_context=save)
        function = by_table if name == "auto" else implementations.get(name)
        if function is not None:
            torch.library.impl(overload, ("cpu", "cuda"))(function)
    return chosen
