"""Quantisations that are killed and resumed, and checkpoints quantised from folder to folder."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_pruning import logits, model_of, random_batches
from small_smoothing import gemma
from small_training import ended, start_ranks
from test_prune_checkpoint import words
from torch import nn

from slmperf.check import InputError
from slmperf.models import load, save
from slmperf.models.quantized import LinearScheme
from slmperf.ops.weight_spec import Int4, WeightSpec
from slmperf.quant import QuantReport, Scheme, driver, quantize_checkpoint, quantize_model

# Every kind of tensor that an artefact may hold: packed codes with zero points, static scales of
# inputs, a cache's scales, biases, a layer that stays; smoothing changes norms and left layers.
MIXED: dict[str, Any] = {
    "scheme": "w8a8",
    "overrides": {
        "*.mlp.*": Scheme(
            "w4", LinearScheme(WeightSpec(bits=4, group_size=8, symmetric=False)), "gptq+quantease"
        ),
        "*.self_attn.o_proj": "fp8-static",
        "model.layers.1.mlp.down_proj": None,
    },
    "kv_cache": True,
}


class Killed(BaseException):
    """What no handler of ours catches."""


def killed_after(blocks: int) -> Any:
    def progress(done: int, of: int) -> None:
        if done == blocks:
            raise Killed

    return progress


def files_of(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir()}


def written(model: nn.Module, folder: Path) -> dict[str, bytes]:
    save(model, None, folder)
    return files_of(folder)


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_killed_run_resumes_to_the_same_bytes(
    blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, data = model_of("llama-bias"), random_batches()
    text = {"calibration": data, "held_out": random_batches(2)}
    whole = copy.deepcopy(dense)
    report = quantize_model(whole, **text, **MIXED)
    resume = tmp_path / "made"
    with pytest.raises(Killed):
        quantize_model(
            copy.deepcopy(dense), **text, **MIXED, resume=resume, progress=killed_after(blocks)
        )
    names = sorted(one.name for one in resume.iterdir())
    assert names == [*(f"block-{i:05d}.safetensors" for i in range(blocks)), "manifest.json"]
    # Half a file of a process that is no more.
    (resume / ".block-00002.safetensors.new-999999999").write_bytes(b"half")
    solved: list[str] = []
    own = driver.quantize_unit

    def counted(layers: Any, *rest: Any, **named: Any) -> Any:
        solved.extend(layers)
        return own(layers, *rest, **named)

    monkeypatch.setattr(driver, "quantize_unit", counted)
    again = copy.deepcopy(dense)
    resumed = quantize_model(again, **text, **MIXED, resume=resume)
    assert resumed.resumed_blocks == blocks
    assert {int(name.split(".")[2]) for name in solved} == set(range(blocks, 3))
    assert written(again, tmp_path / "again") == written(whole, tmp_path / "whole")
    assert torch.equal(logits(again, data[0]), logits(whole, data[0]))
    untimed = [[vars(row) | {"seconds": 0} for row in one.layers] for one in (resumed, report)]
    assert untimed[0] == untimed[1]
    assert sorted(one.name for one in resume.iterdir()) == [
        *(f"block-{i:05d}.safetensors" for i in range(3)), "manifest.json",
    ]  # fmt: skip


def test_artefacts_of_other_runs_are_refused(tmp_path: Path) -> None:
    data, resume = random_batches(), tmp_path / "made"
    own = Scheme("w4", LinearScheme(Int4(group_size=8)))
    settings = {"scheme": own, "method": "gptq", "calibration": data}

    def run(model: nn.Module | None = None, **changes: Any) -> QuantReport:
        model = model_of() if model is None else model
        return quantize_model(model, **(settings | changes), resume=resume)

    def refused(message: str, model: nn.Module | None = None, **changes: Any) -> None:
        with pytest.raises(InputError, match=message) as caught:
            run(model, **changes)
        assert "\n" not in str(caught.value)

    assert run().resumed_blocks == 0
    assert run().resumed_blocks == 3
    refused("resume: .*made: wanted artefacts of damping 0.5, found None", damping=0.5)
    refused(r"artefacts of overrides .*o_proj.*, found \{\}", overrides={"*.o_proj": None})
    refused("artefacts of calibration '", calibration=random_batches(3))
    refused("artefacts of held_out '.*', found None", held_out=data)
    refused("artefacts of dtype 'bfloat16', found 'float32'", model_of().bfloat16())
    other = model_of()
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    refused("artefacts of model '", other)
    for name, what in (
        (
            "model.layers.1.mlp.up_proj",
            r"resume: .*block-00001\..*made of model\.layers\.1 as it is",
        ),
        ("model.embed_tokens", "artefacts of outside_blocks"),
    ):
        other = model_of()
        with torch.no_grad():
            other.get_submodule(name).weight[-1, -1] += 1  # not in what tells models apart at once
        refused(what, other)
    manifest = json.loads((resume / "manifest.json").read_text())
    assert manifest["device"] == "cpu" and manifest["torch"] == torch.__version__
    for key in ("device", "torch", "slmperf"):
        (resume / "manifest.json").write_text(json.dumps(manifest | {key: "other"}))
        refused(f"artefacts of {key} '.*', found 'other'")
    (resume / "manifest.json").write_text(json.dumps(manifest))
    three_bits = Scheme("w4", LinearScheme(WeightSpec(bits=3, group_size=8)))
    refused("artefacts of schemes .*WeightSpec.*found .*Int4", scheme=three_bits)
    block = resume / "block-00001.safetensors"
    whole = block.read_bytes()
    for spoilt in (whole[:-9], b"", whole[:300]):
        block.write_bytes(spoilt)
        refused(r"block-00001\.safetensors: wanted a block as a quantisation keeps it")
    block.write_bytes(whole)
    with safe_open(block, framework="pt") as file:
        told, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    norm = "input_layernorm.weight"
    for spoilt, what in (
        ({name: one for name, one in tensors.items() if name != norm}, f"without tensor {norm}"),
        (tensors | {"self_attn.k_scale": torch.ones(1)}, "an unknown tensor self_attn.k_scale"),
    ):
        save_file(spoilt, block, told)
        refused(what)
    block.write_bytes(whole)
    (resume / "manifest.json").write_text("[")
    refused(r"manifest\.json: wanted a quantisation's manifest")
    (resume / "manifest.json").unlink()
    refused("resume: wanted a new folder or one of a quantisation")
    shutil.rmtree(resume)
    resume.write_text("a file")
    refused("resume: wanted a new folder or one of a quantisation")


# ---- from folder to folder


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_a_checkpoint_is_quantised_block_by_block_to_the_same(family: str, tmp_path: Path) -> None:
    dense = gemma() if family == "gemma" else model_of(family)
    save(dense, None, tmp_path / "dense")
    data = [{"input_ids": torch.arange(48).view(4, 12)}]
    model = load(tmp_path / "dense")
    report = quantize_model(model, calibration=data, held_out=data, **MIXED)
    seen: list[int] = []
    streamed = quantize_checkpoint(
        tmp_path / "dense",
        tmp_path / "out",
        calibration=data,
        held_out=data,
        **MIXED,
        progress=lambda done, of: seen.append(done),
        finish=lambda folder, one: (folder / "report.json").write_text(one.to_json()),
    )
    assert seen == list(range(1, len(model.model.layers) + 1))
    assert (streamed.bytes_before, streamed.bytes_after) == (
        report.bytes_before, report.bytes_after
    )  # fmt: skip
    assert streamed.calibration == report.calibration
    assert [row.relative_error for row in streamed.layers] == [
        row.relative_error for row in report.layers
    ]
    assert QuantReport.from_json((tmp_path / "out" / "report.json").read_text()) == streamed
    back = load(tmp_path / "out")
    assert back.config.quantization_config == model.config.quantization_config
    with torch.no_grad():
        assert torch.equal(back(**data[0]).logits, model(**data[0]).logits)
    shards = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = {
        name for file in set(shards["weight_map"].values())
        for name in load_file(tmp_path / "out" / file)
    }  # fmt: skip
    assert stored == set(shards["weight_map"])


def test_a_killed_stream_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    save(model_of("llama-bias"), None, tmp_path / "dense")
    settings = {"calibration": random_batches(), "group_size": 8, "method": "gptq"}
    quantize_checkpoint(tmp_path / "dense", tmp_path / "whole", **settings)
    resume = tmp_path / "made"
    out = tmp_path / "out"
    with pytest.raises(Killed):
        quantize_checkpoint(
            tmp_path / "dense", out, **settings, resume=resume, progress=killed_after(2)
        )
    assert not out.exists()
    report = quantize_checkpoint(tmp_path / "dense", out, **settings, resume=resume)
    assert report.resumed_blocks == 2
    assert files_of(out) == files_of(tmp_path / "whole")
    # A model in memory is the same one.
    report = quantize_model(load(tmp_path / "dense"), **settings, resume=resume)
    assert report.resumed_blocks == 3


def test_what_a_stream_refuses_is_not_written(tmp_path: Path) -> None:
    dense, data = model_of("qwen2"), random_batches()
    with torch.no_grad():
        dense.model.layers[2].mlp.up_proj.weight[0, 0] = float("inf")
    save(dense, words("a", "b"), tmp_path / "dense")
    out = tmp_path / "out"
    for changes, message in (
        ({}, r"model\.layers\.2\.mlp\.up_proj\.weight holds values that are not finite"),
        ({"tokenizer": words("b", "a")}, "calibration: wanted the model's tokenizer"),
        ({"group_size": 7}, "group_size 7 does not divide 32 inputs"),
        ({"overrides": {"*.k_proj": None}}, "which engines run as one"),
    ):
        settings = {"calibration": data, "group_size": 8, "method": "rtn"} | changes
        with pytest.raises(InputError, match=message):
            quantize_checkpoint(tmp_path / "dense", out, **settings)
        assert not out.exists() and not list(tmp_path.glob(".out*"))


# ---- several workers


def _worker(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    with pytest.raises(InputError, match="resume: wanted one process, found 2 workers"):
        quantize_model(model_of(), "fp8", resume=folder / "made")
    model = model_of()
    text = [random_batches()[rank]]  # each worker has its own part
    report = quantize_model(model, calibration=text, held_out=text, **MIXED)
    (folder / f"{rank}.json").write_text(report.to_json())
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(whole, folder / f"{rank}.safetensors")


@pytest.mark.slow
def test_workers_make_what_one_would_with_all_of_the_text(tmp_path: Path) -> None:
    assert ended(start_ranks(_worker, tmp_path)) == [0, 0]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name
    data = random_batches()
    model = model_of()
    report = quantize_model(model, calibration=data, held_out=data, **MIXED)
    theirs = QuantReport.from_json((tmp_path / "0.json").read_text())
    assert theirs.calibration == report.calibration and theirs.tokens == report.tokens
    for own, other in zip(report.layers, theirs.layers, strict=True):
        assert own.relative_error == pytest.approx(other.relative_error, rel=0.05), own.name
        assert own.held_out_error == pytest.approx(other.held_out_error, rel=0.05), own.name
