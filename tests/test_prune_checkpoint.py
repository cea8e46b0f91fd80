"""Pruning from folder to folder and from files: streams, spills, whose Gram matrices they are."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from small_pruning import (
    logits,
    model_of,
    random_batches,
    state_of,
    unchanged,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
)

from slmperf.calibrate import calibrate
from slmperf.check import InputError
from slmperf.models import load, parameters, save
from slmperf.prune import prune_model
from slmperf.prune.checkpoint import prune_checkpoint
from slmperf.prune.curves import error_curves, prune_sizes
from slmperf.prune.results import PruneReport


def test_spilled_streams_and_other_batches_give_the_same(tmp_path: Path) -> None:
    dense = model_of()
    data = random_batches()
    one_by_one = [
        {name: value[row : row + 1] for name, value in batch.items()}
        for batch in data
        for row in range(4)
    ]
    sizes = {"intermediate_size": 40, "key_value_heads": 2}
    for mode in ("sequential", "one_pass", "dense_target"):
        plain = prune_model(copy.deepcopy(dense), data, **sizes, mode=mode)
        for batch, spill in ((data, tmp_path), (one_by_one, None)):
            other = prune_model(copy.deepcopy(dense), batch, **sizes, mode=mode, spill=spill)
            assert [a.kept for a in other.layers] == [a.kept for a in plain.layers]
            torch.testing.assert_close(
                logits(other.model, data[0]), logits(plain.model, data[0]), rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("mode", ["sequential", "one_pass", "dense_target"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_checkpoint_is_pruned_block_by_block_to_the_same(
    family: str, mode: str, tmp_path: Path
) -> None:
    dense = model_of(family)
    save(dense, None, tmp_path / "dense")
    data = random_batches()
    sizes = {"intermediate_size": 40, "key_value_heads": 2, "mode": mode}
    whole = prune_model(load(tmp_path / "dense"), data, **sizes)
    seen: list[int] = []
    report = prune_checkpoint(
        tmp_path / "dense", tmp_path / "small", data, **sizes,
        progress=lambda done, of: seen.append(done),
    )  # fmt: skip
    assert seen == [1, 2, 3] and report.model is None
    assert report.parameters_before == whole.parameters_before
    assert report.parameters_after == whole.parameters_after == parameters(whole.model)
    assert [a.kept for a in report.layers] == [a.kept for a in whole.layers]
    small = load(tmp_path / "small")
    torch.testing.assert_close(
        logits(small, data[0]), logits(whole.model, data[0]), rtol=1e-4, atol=1e-4
    )
    if mode == "one_pass":  # and from Gram matrices made before
        prune_checkpoint(tmp_path / "dense", tmp_path / "again", calibrate(dense, data), **sizes)
        again = load(tmp_path / "again")
        torch.testing.assert_close(
            logits(again, data[0]), logits(small, data[0]), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("mode", ["sequential", "one_pass", "dense_target"])
def test_experts_of_odd_sizes_run_while_they_are_pruned(mode: str, tmp_path: Path) -> None:
    # torch._grouped_mm, Mixtral's way by default, takes no rows of 9 fp32 or of 20 bf16 numbers.
    model = model_of("mixtral")
    data = random_batches()
    assert model.config._experts_implementation == "grouped_mm"
    report = prune_model(model, data, intermediate_size=9, mode=mode)
    assert report.model.config._experts_implementation == "eager"
    assert "rows of whole multiples of 16 bytes" in report.model.pruning_note
    assert torch.isfinite(logits(report.model, data[0])).all()
    odd = model_of("mixtral", intermediate_size=20)
    save(odd.bfloat16(), None, tmp_path / "odd")
    sizes = {"key_value_heads": 2, "mode": mode}
    prune_checkpoint(tmp_path / "odd", tmp_path / "small", data, **sizes)
    whole = prune_model(load(tmp_path / "odd", dtype=torch.bfloat16), data, **sizes).model
    small = load(tmp_path / "small", dtype=torch.bfloat16)
    torch.testing.assert_close(logits(small, data[0]), logits(whole, data[0]), rtol=0, atol=0)


def words(*tokens: str) -> PreTrainedTokenizerFast:
    ids = {token: index for index, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(ids, tokens[0])))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_gram_matrices_of_another_model_or_tokenizer_are_refused(
    family: str, tmp_path: Path
) -> None:
    dense, other, data = model_of(family), model_of(family), random_batches()
    with torch.no_grad():
        other.model.layers[2].self_attn.o_proj.weight[0, 0] += 1
    own, others = words("a", "b"), words("b", "a")
    save(dense, own, tmp_path / "dense")
    sizes = {"intermediate_size": 40, "mode": "one_pass"}
    made = calibrate(dense, data, tokenizer=own)

    def refused(message: str, calibration: object, **more: object) -> None:
        for prune in (
            lambda: prune_model(dense, calibration, **sizes, **more),
            lambda: prune_checkpoint(
                tmp_path / "dense", tmp_path / "small", calibration, **sizes, **more
            ),
        ):
            with pytest.raises(InputError, match=message):
                prune()
        assert [path.name for path in tmp_path.iterdir()] == ["dense"]

    before = state_of(dense)
    refused("wanted Gram matrices of this model", calibrate(other, data))
    if family == "llama":
        with pytest.raises(InputError, match="found another tokenizer's"):
            prune_model(dense, made, **sizes, tokenizer=others)
        with pytest.raises(InputError, match=r"wanted the model's tokenizer \(2 tokens\)"):
            prune_checkpoint(
                tmp_path / "dense", tmp_path / "small", data, **sizes, tokenizer=others
            )
        wrong = calibrate(dense, data, tokenizer=others)
        refused("found another tokenizer's", wrong, tokenizer=own)
        with pytest.raises(InputError, match="found another tokenizer's"):  # the folder has one
            prune_checkpoint(tmp_path / "dense", tmp_path / "small", wrong, **sizes)
    assert unchanged(dense, before)
    reports = [
        prune_checkpoint(
            tmp_path / "dense", tmp_path / f"small-{mode}", text, tokenizer=own,
            intermediate_size=40, mode=mode,
        )
        for mode, text in (("one_pass", made), ("sequential", data))
    ]  # fmt: skip
    for report in reports:
        assert report.calibration["model"] == made.manifest["model"] != ""
        assert report.calibration["tokenizer"] == made.manifest["tokenizer"] != ""


def test_what_finish_writes_appears_with_the_checkpoint(tmp_path: Path) -> None:
    save(model_of(), None, tmp_path / "dense")

    def note(folder: Path, report: PruneReport) -> None:
        assert (folder / "config.json").is_file() and not (tmp_path / "small").exists()
        (folder / "pruning.json").write_text(report.to_json())

    def fail(folder: Path, report: PruneReport) -> None:
        note(folder, report)
        raise InputError("no plot")

    for finish in (fail, note):
        assert [path.name for path in tmp_path.iterdir()] == ["dense"]
        with pytest.raises(InputError, match="no plot") if finish is fail else nullcontext():
            report = prune_checkpoint(
                tmp_path / "dense", tmp_path / "small", random_batches(),
                intermediate_size=40, finish=finish,
            )  # fmt: skip
    assert PruneReport.from_json((tmp_path / "small" / "pruning.json").read_text()) == report
    assert report.parameters_after == parameters(load(tmp_path / "small"))


@pytest.mark.parametrize("mode", ["sequential", "one_pass", "dense_target"])
def test_a_model_that_is_not_in_memory_is_refused(mode: str) -> None:
    model = model_of()
    model.model.layers[1].to("meta")
    for prune in (
        lambda: prune_model(model, random_batches(), intermediate_size=40, mode=mode),
        lambda: error_curves(model, random_batches()),
        lambda: next(prune_sizes(model, random_batches(), [40])),
    ):
        with pytest.raises(InputError, match=r"model\.layers\.1\..* on the meta device"):
            prune()


def test_the_pass_of_one_pass_is_progress_too() -> None:
    seen: list[tuple[int, int]] = []

    def progress(done: int, of: int) -> None:
        seen.append((done, of))

    data = random_batches()  # 2 batches, 3 blocks
    prune_model(model_of(), data, intermediate_size=40, mode="one_pass", progress=progress)
    assert seen == [(done, 5) for done in range(1, 6)]
    seen.clear()
    error_curves(model_of(), data, prune=("mlp", "attention"), progress=progress)
    assert seen == [(done, 8) for done in range(1, 9)]
    seen.clear()
    prune_model(model_of(), iter(data), intermediate_size=40, mode="one_pass", progress=progress)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_checkpoint_that_cannot_be_pruned_is_not_written(tmp_path: Path) -> None:
    model = model_of()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.fill_(1e38)
    save(model, None, tmp_path / "dense")
    for settings, message in (
        ({"intermediate_size": 40}, r"model\.layers\.2\.mlp\.down_proj"),
        ({"intermediate_size": 65}, "neurons in layer 0, found 65"),
        ({"intermediate_size": 40, "method": "no"}, "method: wanted"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            prune_checkpoint(tmp_path / "dense", tmp_path / "small", random_batches(), **settings)
        assert "pruned already" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["dense"]
