"""AdamW whose moments, and fp32 weights where a model's own are narrower, stay in host memory.

The device keeps weights and gradients alone. A step takes the gradients to the host, updates there
with torch's own fused AdamW, and brings the weights back. Parameters are handled one after the
other, and copies to and from a GPU run beside the update of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from slmperf.check import InputError

# Gradients on their way to the host at a time, ahead of the one that is being used.
_AHEAD = 4


class OffloadedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW(fused=True) on a CPU, for parameters of any device, fp32, bf16 or fp16.

    params, lr, betas, eps, weight_decay  as of torch.optim.AdamW; groups may set each of their own

    state_dict() has for every parameter, in the host's memory:
        step        () fp32
        exp_avg     fp32
        exp_avg_sq  fp32
        master      fp32, the weights; only for a parameter that is not fp32 on a CPU

    On fp32 models on a CPU every bit is that of torch.optim.AdamW(fused=True); of narrower weights
    the copy in fp32 is what is trained, and the model has it rounded. A master that a state dict
    lacks is made of the parameter at the next step. InputError for a closure, sparse gradients,
    and other dtypes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not float(value) >= 0:
                raise InputError(f"OffloadedAdamW: {name} is {value}, expected at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"OffloadedAdamW: betas is {betas}, expected 0 to below 1")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of torch.optim.Optimizer; refuses dtypes that have no fp32 copy."""
        super().add_param_group(param_group)
        for one in self.param_groups[-1]["params"]:
            if one.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                self.param_groups.pop()
                raise InputError(
                    f"OffloadedAdamW: a parameter is {one.dtype}, expected float32, bfloat16 or "
                    "float16"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update all parameters that have a gradient. Done, copies included, when it returns."""
        if closure is not None:
            raise InputError("OffloadedAdamW: step got a closure, expected none")
        work = [
            (group, one)
            for group in self.param_groups
            for one in group["params"]
            if one.grad is not None
        ]
        for _, one in work:
            if one.grad.is_sparse:
                raise InputError("OffloadedAdamW: a gradient is sparse, expected dense ones")
        devices = {one.device for _, one in work if one.device.type == "cuda"}
        streams = {device: torch.cuda.Stream(device) for device in devices}
        for device, stream in streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        coming: list[tuple[Tensor, torch.cuda.Event | None]] = []
        for index, (group, one) in enumerate(work):
            while len(coming) < len(work) and len(coming) <= index + _AHEAD:
                coming.append(_to_host(work[len(coming)][1], streams))
            gradient, arrived = coming[index]
            if arrived is not None:
                arrived.synchronize()
            weights = self._updated(group, one, gradient.float())
            coming[index] = (weights, None)  # the gradient's memory is free again
            if weights is not one:
                _to_device(weights, one, streams)
        for device, stream in streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)
            stream.synchronize()

    def _updated(self, group: dict[str, Any], one: Tensor, gradient: Tensor) -> Tensor:
        """The parameter's fp32 weights on the host after the step; itself where it is those."""
        state = self.state[one]
        plain = one.dtype == torch.float32 and one.device.type == "cpu"
        if "step" not in state:
            state["step"] = torch.zeros(())
        if not plain and "master" not in state:
            state["master"] = _host_memory(one, "master").copy_(one)
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = _host_memory(one, name).zero_()
        weights = one if plain else state["master"]
        beta1, beta2 = group["betas"]
        adamw(
            [weights],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            capturable=False,
            differentiable=False,
            fused=True,
            has_complex=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        return weights

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a state dict back; its tensors are copied into the host's memory, in fp32.

        torch's own would move moments to the device of their parameter, in its dtype.
        """
        stored = state_dict["state"]
        super().load_state_dict({**state_dict, "state": {}})
        order = [one for group in self.param_groups for one in group["params"]]
        for index, values in stored.items():
            one = order[int(index)]
            for name in ("exp_avg", "exp_avg_sq", "master"):
                if name in values and values[name].shape != one.shape:
                    raise InputError(
                        f"OffloadedAdamW: {name} of parameter {index} is "
                        f"{tuple(values[name].shape)}, expected {tuple(one.shape)}"
                    )
            self.state[one] = {
                name: value.detach().float().cpu().clone()
                if name == "step"
                else _host_memory(one, name).copy_(value)
                for name, value in values.items()
            }


def _host_memory(one: Tensor, name: str) -> Tensor:
    """fp32 memory of the host for a parameter's master or moment.

    Pinned memory is scarce (it cannot be paged out), and copies alone gain by it: it is for the
    master of an fp32 parameter on a GPU, which _to_device copies as it is. Of a narrower parameter
    that copies a rounded master; moments never leave the host.
    """
    if one.device.type != "cuda":
        return torch.empty_like(one, dtype=torch.float32, device="cpu")
    pinned = name == "master" and one.dtype == torch.float32
    return torch.empty(one.shape, dtype=torch.float32, pin_memory=pinned)


def _to_host(
    one: Tensor, streams: dict[torch.device, Any]
) -> tuple[Tensor, torch.cuda.Event | None]:
    """The gradient on the host in its own dtype, and what says that it has arrived."""
    gradient = one.grad
    assert gradient is not None
    if one.device.type != "cuda":
        return gradient, None
    stream = streams[one.device]
    with torch.cuda.stream(stream):
        host = torch.empty(gradient.shape, dtype=gradient.dtype, pin_memory=True)
        host.copy_(gradient, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
    return host, event


def _to_device(weights: Tensor, one: Tensor, streams: dict[torch.device, Any]) -> None:
    """The fp32 weights into the parameter, rounded to its dtype."""
    if one.device.type != "cuda":
        one.copy_(weights)
        return
    with torch.cuda.stream(streams[one.device]):
        narrow = weights
        if one.dtype != torch.float32:
            narrow = torch.empty(one.shape, dtype=one.dtype, pin_memory=True).copy_(weights)
        one.copy_(narrow, non_blocking=True)
