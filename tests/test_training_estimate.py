"""What a training is said to take, against what it takes: sizes, memory, flops; clock and log."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from slmperf.distill.config import DistillationConfig
from slmperf.distill.estimate import MIB, Flops, StepFlops, flops_of, plan_of, work_of
from slmperf.distill.packing import PackedBatches
from slmperf.distill.progress import Clock, peak_flops
from slmperf.distill.step import batch_loss
from slmperf.distill.teachers import ModelTeacher
from slmperf.testing.timing import peak_mib

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LARGER = SIZES | {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 4}


def config(folder, **changes):
    given = {"context": 256, "per_device_train_batch_size": 2, "num_train_epochs": 3}
    return DistillationConfig(output_dir=str(folder), use_cpu=True, **(given | changes))


def examples(count=10, tokens=128):
    rng = np.random.default_rng(0)
    answer = np.arange(tokens) >= tokens // 2
    return [{"input_ids": rng.integers(0, 1000, tokens), "answer": answer} for _ in range(count)]


def test_sizes_steps_and_the_table(tmp_path):
    settings = config(tmp_path, gradient_accumulation_steps=2)
    batches = PackedBatches(examples(), settings)
    model, teacher = llama(**SIZES), llama(**LARGER)
    model.model.embed_tokens.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = plan_of(model, ModelTeacher(teacher), batches, settings)
    embedded = model.model.embed_tokens.weight.numel()
    assert plan.parameters == model.num_parameters()
    assert plan.trainable == plan.parameters - embedded
    assert plan.teacher_parameters == teacher.num_parameters()
    assert (plan.sequences, plan.tokens, plan.rows) == (10, 1280, 5)
    assert (plan.rows_per_step, plan.context, plan.steps) == (4, 256, batches.steps)
    assert plan.epochs == pytest.approx(plan.steps * 4 / 5)
    memory = plan.memory
    assert memory.weights == pytest.approx(4 * plan.parameters, rel=1e-4)  # and small buffers
    assert (memory.gradients, memory.optimizer) == (4 * plan.trainable, 8 * plan.trainable)
    assert memory.host_optimizer == 0
    assert memory.batch == sum(value.nbytes for value in batches[0].values())
    assert f"{plan.trainable:,}" in str(plan) and f"{memory.peak / MIB:,.0f} MiB" in str(plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.is_gradient_checkpointing and not model.training


def test_a_configuration_is_enough_for_models_that_fit_nowhere(tmp_path):
    large = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=16,
        num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    settings = config(tmp_path, bf16=True, gradient_checkpointing=True, offload_optimizer=True)
    batches = PackedBatches(examples(), settings)
    small = LlamaConfig(**SIZES, dtype="bfloat16")
    plan = plan_of(small, large, batches, settings)
    assert plan.teacher_parameters == 15_791_824_896
    assert plan.memory.optimizer == 0
    assert plan.memory.host_optimizer == 12 * plan.trainable
    assert plan.memory.gradients == 2 * plan.trainable
    taught = 2 * 13.69e9 * 512  # the teacher's layers, most of it
    assert taught < plan.flops_per_step < 1.1 * taught


CASES = {  # whether there is a teacher, and settings
    "plain": (False, {}),
    "checkpointed": (True, {"gradient_checkpointing": True}),
    "bf16": (True, {"bf16": True}),
    "unpacked": (True, {"packing": False, "context": 128, "per_device_train_batch_size": 4}),
    "accumulated": (False, {"gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_torch_allocates(tmp_path, case):
    taught, changes = CASES[case]
    settings = config(tmp_path, **changes)
    batches = PackedBatches(examples(), settings)
    student = llama(**SIZES).train()
    teacher = ModelTeacher(llama(**LARGER)) if taught else None
    memory = plan_of(student, teacher, batches, settings).memory
    if settings.gradient_checkpointing:
        student.gradient_checkpointing_enable(settings.gradient_checkpointing_kwargs)
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def step():
        if settings.gradient_accumulation_steps == 1:
            student.zero_grad(set_to_none=True)
        batch_loss(student, teacher, batches[0], settings).loss.backward()

    step()  # also has the gradients of the batches before, which stand when this one begins
    there = memory.gradients if settings.gradient_accumulation_steps > 1 else 0
    found = peak_mib(step, "cpu") * MIB + there
    assert memory.working == pytest.approx(found, rel=0.05)
    known = {one.untyped_storage().data_ptr() for one in (*student.parameters(),)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = batch_loss(student, None, batches[0], settings).loss
    saved = sum(size for place, size in kept.items() if place not in known)
    del loss
    if not settings.gradient_checkpointing:  # there the layers' own hooks save their inputs
        assert memory.activations == pytest.approx(saved, rel=0.1)


def test_checkpointing_and_narrow_weights_need_less(tmp_path):
    def working(dtype=torch.float32, **changes):
        settings = config(tmp_path, **changes)
        batches = PackedBatches(examples(), settings)
        return plan_of(llama(**SIZES).to(dtype), None, batches, settings).memory

    plain, checkpointed = working(), working(gradient_checkpointing=True)
    assert checkpointed.activations < 0.15 * plain.activations
    assert checkpointed.peak < plain.peak
    assert working(torch.bfloat16).activations < 0.75 * plain.activations


MEASURE = """
import ctypes, gc, json, re, sys
from pathlib import Path
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
from slmperf.distill.config import DistillationConfig
from slmperf.distill.estimate import plan_of
from slmperf.distill.packing import PackedBatches
from slmperf.distill.step import batch_loss

ctypes.CDLL(None).mallopt(-3, 2**16)  # what is freed is gone at once
resident = lambda what: 1024 * int(
    re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
text = {"input_ids": np.arange(1024), "answer": np.arange(1024) % 4 == 0}
few = {"input_ids": np.arange(64), "answer": np.arange(64) > 32}
found = {}
for checkpointing in (False, True):
    config = DistillationConfig(
        output_dir=sys.argv[1], use_cpu=True, context=1024, per_device_train_batch_size=1,
        gradient_checkpointing=checkpointing, max_steps=1, sequence_weight=0.0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=16000, hidden_size=512, intermediate_size=1536, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4)).train()
    batches, small = PackedBatches([text], config), PackedBatches([few], config)
    plan = plan_of(model, None, batches, config).memory
    if checkpointing:
        model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
    batch = batches[0]
    batch_loss(model, None, small[0], config).loss.backward()
    model.zero_grad(set_to_none=True)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    batch_loss(model, None, batch, config).loss.backward()
    found[str(checkpointing)] = [plan.working - plan.batch, resident("VmHWM") - before]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_memory_is_what_a_process_holds(tmp_path):
    """A model of 27 million parameters on 1024 tokens, by the system's own account."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system tells no largest resident set")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for estimated, held in json.loads(done.stdout.splitlines()[-1]).values():
        assert estimated == pytest.approx(held, rel=0.06)


@pytest.mark.parametrize("trained", ["all", "head", "layers"])
def test_flops_are_those_of_torch_s_counter(tmp_path, trained):
    """At one sequence a row, where its count of attention, all pairs, is known."""
    model = llama(**SIZES, attn_implementation="eager").train()
    model.requires_grad_(trained == "all")
    if trained != "all":
        part = model.lm_head if trained == "head" else model.model.layers
        part.requires_grad_(True)
        model.model.embed_tokens.requires_grad_(True)  # gradients of inputs go all the way
    ids = torch.arange(96)[None]
    with FlopCounterMode(display=False) as forward:
        logits = model(ids, use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    flops = flops_of(model)
    for one, counter in ((flops.forward, forward), (flops.backward, backward)):
        counted = one.token * 96 + one.pair * 96**2 + one.position * 96
        assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_work_of_a_packed_batch(tmp_path):
    batches = PackedBatches(examples(4, 100), config(tmp_path, context=200))
    batch = batches[0]
    assert batch["lengths"].tolist() == [100] * 4
    assert work_of(batch).tolist() == [400, 4 * 5050, batch["positions"].numel()]
    flops = flops_of(llama(**SIZES), llama(**LARGER))
    forward, backward, teacher = flops.at(400, 4 * 5050, 7)
    assert backward == 2 * forward and teacher > 2 * forward
    assert flops.at(0, 0, 7)[0] == 7 * 2 * 1000 * 64


def test_the_clock_tells_speed_and_mfu(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(50.0, 1000)
    now[0] += 7  # between the making of a trainer and its first step
    flops = StepFlops(Flops(2, 0, 3), Flops(2, 0, 3), Flops(2, 0, 3))
    clock.begin(flops, peak=1e3)
    assert clock.logs() == {"tokens_per_second": 0.0}
    batch = {"lengths": torch.tensor([3, 5]), "positions": torch.arange(4)}
    clock.count([batch, batch])
    clock.tokens += 32  # of two ranks
    now[0] += 10
    clock.pause(since=now[0] - 6)
    assert clock.logs() == {"tokens_per_second": 8.0, "mfu": 3 * (16 * 2 + 8 * 3) / 4 / 1e3}
    assert clock.seconds == 67
    assert clock.left(0, 5) == "?" and clock.left(2, 5) == "0:00:25"


def test_the_peak_is_measured_once_and_quickly():
    device = torch.device("cpu")
    state = torch.get_rng_state()
    start = time.perf_counter()
    found = peak_flops(device, torch.float32)
    assert time.perf_counter() - start < 2.0  # 0.2 on a machine of its own
    assert found > 1e9
    assert peak_flops(device, torch.float32) == found
    assert torch.equal(torch.get_rng_state(), state)
