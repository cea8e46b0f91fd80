"""Checkpoints that are whole or absent, and one line for every broken one."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import IDS, llama
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import slmperf.models
from slmperf.check import InputError
from slmperf.models import files, load, parameters, save, weight_bytes


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


# ---- files


def test_write_atomically_replaces_or_leaves_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    files.write_atomically(path, "one")
    files.write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    files.write_atomically(path, lambda aside: aside.write_text("three"))
    assert path.read_text() == "three"

    def half(aside: Path) -> None:
        aside.write_text("fo")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        files.write_atomically(path, half)
    assert path.read_text() == "three"
    assert [item.name for item in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("swap", [True, False])
def test_write_folder_replaces_whole_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool
) -> None:
    if not swap:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    path = tmp_path / "stage"
    for content in ("one", "two"):
        with files.write_folder(path) as aside:
            assert aside != path
            (aside / content).write_text(content)
            (aside / "sub").mkdir()
            (aside / "sub" / "file").write_text(content)
    assert sorted(item.name for item in path.iterdir()) == ["sub", "two"]
    with pytest.raises(RuntimeError, match="stop"), files.write_folder(path) as aside:
        (aside / "three").write_text("half")
        raise RuntimeError("stop")
    assert sorted(item.name for item in path.iterdir()) == ["sub", "two"]
    assert [item.name for item in tmp_path.iterdir()] == ["stage"]


def test_replace_folder_leaves_one_folder(tmp_path: Path) -> None:
    for name in ("new", "path"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    files.replace_folder(tmp_path / "new", tmp_path / "path")
    assert [str(item.relative_to(tmp_path)) for item in tmp_path.rglob("*")] == ["path", "path/new"]


def test_a_killed_writer_leaves_the_old_folder_and_its_rubbish_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "stage[1]"  # a name with characters that mean something to glob
    with files.write_folder(path) as aside:
        (aside / "old").write_text("old")
    script = (
        "import os, signal, sys\n"
        "from slmperf.models.files import write_folder\n"
        "with write_folder(sys.argv[1]) as aside:\n"
        "    (aside / 'half').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(slmperf.models.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert done.returncode == -signal.SIGKILL
    assert [item.name for item in path.iterdir()] == ["old"]
    assert len(list(tmp_path.iterdir())) == 2
    with files.write_folder(path) as aside:
        (aside / "new").write_text("new")
    assert [item.name for item in path.iterdir()] == ["new"]
    assert len(list(tmp_path.iterdir())) == 1


def test_sha256_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    first = files.sha256_of(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"")
    second = files.sha256_of(tmp_path)
    (tmp_path / "sub" / "b").rename(tmp_path / "sub" / "c")
    assert len({first, second, files.sha256_of(tmp_path)}) == 3


def test_file_helpers_import_no_torch() -> None:
    script = "import sys, slmperf.models.files; assert 'torch' not in sys.modules"
    root = Path(slmperf.models.__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(root)}, check=True
    )


# ---- save and load


@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_comes_back_in_both_libraries(tmp_path: Path, tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    save(llama(hidden_size=16), None, tmp_path / "model")
    save(model, None, tmp_path / "model")
    assert sorted(item.name for item in (tmp_path / "model").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    back = load(tmp_path / "model")
    assert not back.training
    assert torch.equal(logits(back), logits(model))
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits(model)
    )
    assert parameters(back) == parameters(model)
    once = sum(tensor.numel() for tensor in model.parameters())
    assert parameters(model) == once and weight_bytes(model) == 4 * once
    assert next(load(tmp_path / "model", dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_tokenizer_is_saved_beside_the_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    save(llama(), PreTrainedTokenizerFast(tokenizer_object=words), tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("a").input_ids == [0]


def test_mixture_of_experts_runs_grouped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    model = MixtralForCausalLM(config).eval()
    save(model, None, tmp_path / "teacher")
    back = load(tmp_path / "teacher")
    assert back.config._experts_implementation == "grouped_mm"
    torch.testing.assert_close(logits(back), logits(model))
    one_by_one = AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher", experts_implementation="eager"
    )
    torch.testing.assert_close(logits(back), logits(one_by_one), rtol=1e-4, atol=1e-4)


def test_loading_draws_no_bar_and_leaves_the_setting(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    save(llama(), None, tmp_path / "model")
    load(tmp_path / "model")
    assert "%|" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled() == drawn


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_name_file_wanted_and_found(tmp_path: Path, share: float) -> None:
    save(llama(), None, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(share * len(whole))])
    wanted = len(whole) if share > 0.3 else r"at least \d+"
    refused(
        tmp_path / "model",
        rf"model.safetensors: truncated: wanted {wanted} bytes, found {int(share * len(whole))}$",
    )
    weights.write_bytes(whole + b"x")
    refused(tmp_path / "model", f"too long: wanted {len(whole)} bytes, found {len(whole) + 1}")


def test_missing_and_contradictory_files(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere/config.json: wanted a file, found none")
    folder = tmp_path / "model"
    save(llama(), None, folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, good = weights.read_bytes(), json.loads(config.read_text())

    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    refused(folder, "wanted model.safetensors or model.safetensors.index.json, found neither")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}})
    )
    refused(folder, "model-00001-of-00002.safetensors: wanted a safetensors file, found none")
    weights.write_bytes(whole)

    config.write_text("{")
    refused(folder, "config.json: not JSON")
    config.write_text("{}")
    refused(folder, "config.json: wanted key model_type, found none")
    config.write_text(json.dumps(good | {"model_type": "no-such-model"}))
    refused(folder, "config.json: .*no-such-model")
    config.write_text(json.dumps(good | {"num_attention_heads": 5}))
    refused(folder, "config.json: .*32")
    config.write_text(json.dumps(good | {"intermediate_size": 40}))
    refused(folder, "model")
    config.write_text(json.dumps(good | {"num_hidden_layers": 3}))
    refused(folder, "the checkpoint lacks tensor model.layers.2.* and 8 more")
    config.write_text(json.dumps(good | {"num_hidden_layers": 1}))
    refused(folder, "the checkpoint has an unknown tensor model.layers.1.* and 8 more")
    config.write_text(json.dumps(good))
    load(folder)


def test_sharded_checkpoints_load(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(logits(load(tmp_path / "model")), logits(model))
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    refused(tmp_path / "model", rf"{shards[1].name}: truncated")


def test_public_names() -> None:
    assert all(hasattr(slmperf.models, name) for name in slmperf.models.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        slmperf.models.nothing  # noqa: B018
