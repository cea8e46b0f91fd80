"""AdamW in host memory: torch's own bit for bit, fp32 masters, states, schedules."""

import copy

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from slmperf.check import InputError
from slmperf.distill import offload
from slmperf.distill.offload import OffloadedAdamW

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}


def network(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(17, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5)]
    return torch.nn.Sequential(*layers).to(device, dtype)


def groups(model):
    """Two groups of different settings, as Trainer makes them."""
    weights = [one for one in model.parameters() if one.dim() == 2]
    biases = [one for one in model.parameters() if one.dim() == 1]
    return [{"params": weights}, {"params": biases, "weight_decay": 0.0, "lr": 3e-2}]


def backward(model, step):
    """Gradients of one batch, the same for every model; the second layer's bias has none at 1."""
    inputs = torch.randn(8, 17, generator=torch.Generator().manual_seed(step))
    one = next(model.parameters())
    model.zero_grad()
    model(inputs.to(one.device, one.dtype)).float().square().mean().backward()
    if step == 1:
        model[2].bias.grad = None


def train(model, optimizer, steps, schedule=None):
    for step in steps:
        backward(model, step)
        optimizer.step()
        if schedule is not None:
            schedule.step()


def schedule_of(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def test_every_bit_is_that_of_torch():
    mine, theirs = network(), network()
    offloaded = OffloadedAdamW(groups(mine), **SETTINGS)
    plain = torch.optim.AdamW(groups(theirs), fused=True, **SETTINGS)
    train(mine, offloaded, range(5), schedule_of(offloaded))
    train(theirs, plain, range(5), schedule_of(plain))
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
        assert offloaded.state[one].keys() == plain.state[other].keys()
        for name, value in plain.state[other].items():
            assert torch.equal(offloaded.state[one][name], value), name
    assert float(offloaded.state[mine[2].bias]["step"]) == 4  # without a gradient: no step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_trained_in_fp32(dtype):
    mine, masters = network(dtype), network(dtype).float()
    offloaded = OffloadedAdamW(groups(mine), **SETTINGS)
    plain = torch.optim.AdamW(groups(masters), fused=True, **SETTINGS)
    for step in range(6):
        backward(mine, step)
        for one, master in zip(mine.parameters(), masters.parameters(), strict=True):
            master.grad = None if one.grad is None else one.grad.float()
        offloaded.step()
        plain.step()
    for one, master in zip(mine.parameters(), masters.parameters(), strict=True):
        assert torch.equal(offloaded.state[one]["master"], master)
        assert torch.equal(one, master.to(dtype)) and one.dtype == dtype


def test_updates_below_the_rounding_of_bf16_add_up():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = OffloadedAdamW([weight], lr=1e-4, weight_decay=0.0)  # bf16 has 1 and 1 - 1/256
    for _ in range(60):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.equal(weight, torch.full_like(weight, 1 - 60e-4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_state_goes_on_bit_for_bit(dtype, tmp_path):
    straight = network(dtype)
    optimizer = OffloadedAdamW(groups(straight), **SETTINGS)
    train(straight, optimizer, range(3))
    stored = optimizer.state_dict()
    tensors = {
        f"{index}/{name}": value
        for index, values in stored["state"].items()
        for name, value in values.items()
    }
    save_file(tensors, tmp_path / "optimizer.safetensors")
    resumed = copy.deepcopy(straight)
    train(straight, optimizer, range(3, 6))

    state: dict = {}
    for key, value in load_file(tmp_path / "optimizer.safetensors").items():
        index, name = key.split("/")
        state.setdefault(int(index), {})[name] = value
    again = OffloadedAdamW(groups(resumed), **SETTINGS)
    again.load_state_dict({**again.state_dict(), "state": state})
    assert ("master" in again.state[resumed[0].weight]) == (dtype != torch.float32)
    train(resumed, again, range(3, 6))
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_state_of_torch_s_adamw_is_taken():
    mine, theirs = network(), network()
    plain = torch.optim.AdamW(groups(theirs), fused=True, **SETTINGS)
    train(theirs, plain, range(3))
    mine.load_state_dict(theirs.state_dict())
    offloaded = OffloadedAdamW(groups(mine), **SETTINGS)
    offloaded.load_state_dict(plain.state_dict())
    train(theirs, plain, range(3, 5))
    train(mine, offloaded, range(3, 5))
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_is_copied_is_pinned(dtype, monkeypatch):
    """Moments are not, nor the master that a narrower copy is made of; on a fake GPU parameter."""

    class OnGpu:
        device, shape = torch.device("cuda"), (2, 3)

        def __init__(self):
            self.dtype = dtype

    pinned, empty = [], torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda shape, *, dtype, pin_memory: pinned.append(pin_memory) or empty(shape, dtype=dtype),
    )
    for name in ("exp_avg", "exp_avg_sq", "master"):
        found = offload._host_memory(OnGpu(), name)
        assert found.shape == (2, 3) and found.dtype == torch.float32
    assert pinned == [False, False, dtype == torch.float32]


def test_accelerate_wraps_it():
    mine, theirs = network(), network()
    accelerator = Accelerator(cpu=True)
    offloaded = accelerator.prepare_optimizer(OffloadedAdamW(groups(mine), **SETTINGS))
    schedule = accelerator.prepare_scheduler(schedule_of(offloaded))
    plain = torch.optim.AdamW(groups(theirs), fused=True, **SETTINGS)
    train(mine, offloaded, range(3), schedule)
    train(theirs, plain, range(3), schedule_of(plain))
    for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_it_refuses():
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = OffloadedAdamW([weight])
    with pytest.raises(InputError, match="closure"):
        optimizer.step(lambda: 0.0)
    weight.grad = torch.ones(4).to_sparse()
    with pytest.raises(InputError, match="sparse"):
        optimizer.step()
    with pytest.raises(InputError, match="float64, expected float32"):
        OffloadedAdamW([torch.nn.Parameter(torch.ones(4, dtype=torch.float64))])
    for setting in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": float("nan")}):
        with pytest.raises(InputError, match=next(iter(setting))):
            OffloadedAdamW([weight], **setting)
    state = {"step": torch.ones(()), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(4)}
    with pytest.raises(InputError, match=r"exp_avg of parameter 0 is \(3,\), expected \(4,\)"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_device_keeps_weights_and_gradients_alone(dtype):
    model = network(dtype, "cuda")
    masters = copy.deepcopy(model).cpu().float()
    offloaded = OffloadedAdamW(groups(model), **SETTINGS)
    plain = torch.optim.AdamW(groups(masters), fused=True, **SETTINGS)
    for step in range(5):
        backward(model, step)
        for one, master in zip(model.parameters(), masters.parameters(), strict=True):
            master.grad = None if one.grad is None else one.grad.float().cpu()
        before = torch.cuda.memory_allocated()
        offloaded.step()
        assert torch.cuda.memory_allocated() == before
        plain.step()
    for one, master in zip(model.parameters(), masters.parameters(), strict=True):
        assert torch.equal(one.cpu(), master.to(dtype))
        state = offloaded.state[one]
        # Pinned is what is copied: of bf16 weights, a rounded master.
        assert state["master"].is_pinned() == (dtype == torch.float32)
        assert not state["exp_avg"].is_pinned() and not state["exp_avg_sq"].is_pinned()
