"""slmperf quantize: every scheme, overrides, a killed run, streaming, and what it refuses."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from small_commands import checkpoint_and_ids, write_ids
from small_models import llama, mixtral

from slmperf import models
from slmperf.calibrate.texts import Vocabulary, pack, read_calibration
from slmperf.check import InputError
from slmperf.engine.quality import read_measure
from slmperf.models.quantized import QuantizedLinear
from slmperf.quant import QuantReport
from slmperf.quant.command import commands, job
from slmperf.quant.command.report import plot_layers

W4 = ("--scheme", "w4a16", "--group-size", 16)


@pytest.fixture
def folder(tmp_path):
    return checkpoint_and_ids(tmp_path)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Half of a small run's time goes into the figure: one test draws it."""
    monkeypatch.setattr(job, "plot_layers", lambda layers, path: path.write_text("a figure"))


def quantize(slmperf, folder, *options, out="out", calibration="ids.jsonl"):
    files = ["--calibration", folder / calibration] if calibration else []
    return slmperf("quantize", folder / "model", folder / out, *files, *options)


def report_of(folder, out="out"):
    return QuantReport.from_json((folder / out / "quantization.json").read_text())


# ---- what is written


def test_a_model_is_quantised_measured_and_written(slmperf, folder, monkeypatch):
    monkeypatch.setattr(job, "plot_layers", plot_layers)
    ids = folder / "ids.jsonl"
    code, said, wrong = quantize(slmperf, folder, *W4, "--eval", ids, "--held-out", ids)
    assert code == 0, wrong
    found, report = models.load(folder / "out"), report_of(folder)
    assert sum(isinstance(one, QuantizedLinear) for one in found.modules()) == 14
    before, after = report.settings["perplexity"].values()
    measured = read_measure(ids, Vocabulary(None, 64, 64), split="eval")
    assert after == pytest.approx(measured.of(found)) and after != before
    assert before == pytest.approx(measured.of(llama()))
    assert f"perplexity: {before:.4f} before, {after:.4f} after" in said
    assert report.settings["base"] == str(folder / "model")
    assert report.calibration["source"] == "in-domain: ids.jsonl"
    assert report.held_out["tokens"] < report.tokens
    assert all(layer.held_out_error > 0 for layer in report.layers)
    for words in ("layers.1.mlp.down_proj", "held out %", "MiB of memory", "rounded to nearest"):
        assert words in said, words
    drawn = (folder / "out" / "quantization.svg").read_text()
    assert all(words in drawn for words in ("down_proj", "bits per weight", "dashed: rtn"))
    assert not (folder / "out.parts").exists()


@pytest.mark.parametrize("scheme", ["fp8", "fp8-static", "w8a8"])
def test_schemes_of_8_bits(slmperf, folder, scheme):
    code, said, wrong = quantize(slmperf, folder, "--scheme", scheme)
    assert code == 0, wrong
    rows = report_of(folder).layers
    assert len(rows) == 14 and {row.scheme for row in rows} == {scheme}
    assert ("alpha" in said) == (scheme == "w8a8") and "held out" not in said
    assert models.load(folder / "out").config.quantization_config


def test_weights_alone_need_no_text(slmperf, folder):
    for out, options in (("fp8", ("--scheme", "fp8")), ("rtn", (*W4, "--method", "rtn"))):
        code, said, wrong = quantize(slmperf, folder, *options, out=out, calibration=None)
        assert code == 0, wrong
        assert "no text" in said and "error %" not in said
        assert {row.relative_error for row in report_of(folder, out).layers} == {None}


def test_layers_may_have_schemes_of_their_own(slmperf, folder):
    code, _, wrong = quantize(
        slmperf, folder, *W4, "--override", "*.down_proj=fp8", "--override",
        "model.layers.1.mlp.down_proj=none",
    )  # fmt: skip
    assert code == 0, wrong
    schemes = {row.name: row.scheme for row in report_of(folder).layers}
    assert schemes["model.layers.0.mlp.down_proj"] == "fp8" and len(schemes) == 13
    last = models.load(folder / "out").model.layers[1].mlp.down_proj
    assert isinstance(last, torch.nn.Linear)


def test_generic_text_and_the_cache(slmperf, folder, caplog):
    options = ("--scheme", "fp8", "--kv-cache", "--generic", folder / "ids.jsonl", "--samples", 3)
    code, said, wrong = quantize(slmperf, folder, *options, calibration=None)
    assert code == 0, wrong
    assert "the domain that the model serves" in caplog.text and "generic: ids.jsonl" in said
    assert models.load(folder / "out").config.quantization_config["kv_cache_scheme"]


def test_streamed_is_the_same_checkpoint(slmperf, folder):
    for out, more in (("whole", ()), ("streamed", ("--stream",))):
        code, said, wrong = quantize(slmperf, folder, *W4, *more, out=out)
        assert code == 0, wrong
    whole, streamed = (models.load(folder / out).state_dict() for out in ("whole", "streamed"))
    assert whole.keys() == streamed.keys()
    assert all(torch.equal(whole[name], streamed[name]) for name in whole)
    rows = [
        [row.relative_error for row in report_of(folder, one).layers]
        for one in ("whole", "streamed")
    ]
    assert rows[0] == rows[1] and (folder / "streamed" / "quantization.svg").is_file()


@pytest.mark.parametrize("more", [(), ("--stream",)])
def test_a_killed_run_goes_on_to_the_same_bytes(slmperf, folder, monkeypatch, more):
    import slmperf.quant.driver as driver

    assert quantize(slmperf, folder, *W4, *more, out="straight")[0] == 0
    done, solve = [], driver.Quantizing._quantize

    def dies(self, index, block):
        if index:
            raise KeyboardInterrupt
        done.append(index)
        return solve(self, index, block)

    with monkeypatch.context() as patch:
        patch.setattr(driver.Quantizing, "_quantize", dies)
        assert quantize(slmperf, folder, *W4, *more)[0] == 130
    assert done == [0] and (folder / "out.parts").is_dir() and not (folder / "out").exists()
    with monkeypatch.context() as patch:  # of another quantisation, which is seen at once
        patch.setattr(models, "load", lambda *_, **__: pytest.fail("the weights are read"))
        code, said, wrong = quantize(slmperf, folder, "--scheme", "w8a8", *more)
    parts = folder / "out.parts"
    assert code == 2 and f"error: {parts}: wanted blocks of scheme 'w8a8', found 'w4a16'" in wrong
    assert f"delete {parts} to begin anew" in wrong and wrong.count("\n") == 1 and not said
    code, said, wrong = quantize(slmperf, folder, *W4, *more)
    assert code == 0, wrong
    assert "going on with the blocks in" in said and "1 blocks of an earlier run" in said
    for path in (folder / "straight").iterdir():
        if not path.name.startswith("quantization."):  # which tell the time
            assert path.read_bytes() == (folder / "out" / path.name).read_bytes(), path.name
    assert not (folder / "out.parts").exists()


def test_every_part_tells_how_far_it_is(slmperf, folder, monkeypatch):
    told = {}

    @contextlib.contextmanager
    def bars():
        yield lambda title: lambda done, total: told.setdefault(title, []).append(done / total)

    monkeypatch.setattr(commands, "bars", bars)
    assert quantize(slmperf, folder, *W4, "--eval", folder / "ids.jsonl")[0] == 0
    assert quantize(slmperf, folder, *W4, "--stream", out="streamed")[0] == 0
    assert list(told) == ["measure", "quantise", "measure again"]
    assert told["quantise"] == [0.5, 1, 0.5, 1]


# ---- text


def test_text_is_packed_without_padding(tmp_path):
    """Every token but those beyond the last piece is there once; which, is drawn once."""
    path = write_ids(tmp_path / "ids.jsonl", split="train")
    options = (path, "in-domain", Vocabulary(None, 64, 12))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    tokens = sum(len(one["input_ids"]) for one in lines if one["split"] == "train")
    every = read_calibration(*options, samples=1000, packed=True).batches
    lengths = [int(row.sum()) for batch in every for row in batch["attention_mask"]]
    assert sum(lengths) == tokens and sorted(lengths)[1] == 12  # all but one are whole
    few = [read_calibration(*options, samples=3, packed=True) for _ in range(2)]
    for one in few:
        [batch] = one.batches
        assert batch["input_ids"].shape == (3, 12) and batch["attention_mask"].all()
    assert torch.equal(few[0].batches[0]["input_ids"], few[1].batches[0]["input_ids"])
    assert 0 < len(few[0].sequences) < 30
    held_out = read_calibration(*options, samples=1000, packed=True, held_out=True)
    assert len(held_out.sequences) == 10 and not held_out.sequences & few[0].sequences
    assert pack([], 3, 12) == ([], [])


def test_lines_longer_than_the_context_are_packed_whole(tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"input_ids": list(range(1, 31))}) + "\n")
    [batch] = read_calibration(
        tmp_path / "long.jsonl", "x", Vocabulary(None, 64, 8), samples=9, packed=True
    ).batches
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    assert sorted(int(one) for ids, mask in rows for one in ids[mask > 0]) == list(range(1, 31))


# ---- what is refused: one line, exit code 2, nothing written


@pytest.mark.parametrize(
    "options,words",
    [
        (("--scheme", "int4"), "wanted one of fp8, fp8-static, fp8-block, w8a8, w4a16"),
        (("--scheme", "w4a16"), "q_proj: group_size 128 does not divide 32 inputs"),
        (("--scheme", "fp8", "--group-size", 16), "group_size: wanted none with scheme fp8"),
        ((*W4, "--method", "awq"), "method: wanted one of rtn, gptq"),
        ((*W4, "--damping", -1), "damping: wanted a number >= 0"),
        ((*W4, "--override", "*.o_proj"), "--override: wanted PATTERN=SCHEME"),
        ((*W4, "--override", "*.k_proj=none"), "q_proj and k_proj, which engines run as one"),
        ((*W4, "--override", "*.up=none"), "'*.up', which matches none"),
        ((*W4, "--override", "*=none"), "at least one layer"),
        ((*W4, "--no-smooth"), "--no-smooth: wanted a scheme that smooths, found w4a16"),
        ((*W4, "--generic", "ids.jsonl"), "one of --calibration and --generic"),
        ((*W4, "--stream", "--eval", "ids.jsonl"), "--stream: wanted without --eval"),
        ((*W4, "--samples", 0), "--samples: wanted a number >= 1"),
        ((*W4, "--context", 65), "2 to 64"),
        ((*W4, "--split", "none"), "found none"),
        ((*W4, "--eval-split", "test"), "--eval-split: wanted --eval"),
        ((*W4, "--held-out", "absent.jsonl"), "absent.jsonl"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(slmperf, folder, monkeypatch, options, words):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the weights are read"))
    code, said, wrong = quantize(slmperf, folder, *options)
    assert code == 2 and wrong.startswith("error: ") and wrong.count("\n") == 1
    assert words in wrong and not said
    assert {path.name for path in folder.iterdir()} == {"model", "ids.jsonl"}


@pytest.mark.parametrize(
    "options,words",
    [
        (W4, "text for scheme w4a16-g16 by method gptq+quantease, found neither"),
        (("--scheme", "fp8-static"), "text for scheme fp8-static"),
        (("--scheme", "fp8", "--kv-cache"), "text for --kv-cache"),
        (("--scheme", "fp8", "--split", "train"), "--split: wanted --calibration or --generic"),
        (("--scheme", "fp8", "--held-out", "x"), "--held-out: wanted --calibration or --generic"),
    ],
)
def test_text_that_is_missing(slmperf, folder, options, words):
    code, _, wrong = quantize(slmperf, folder, *options, calibration=None)
    assert code == 2 and words in wrong and wrong.count("\n") == 1


def test_models_that_cannot_be_quantised(slmperf, folder):
    assert quantize(slmperf, folder, "--scheme", "fp8", calibration=None)[0] == 0
    shutil.rmtree(folder / "model")
    shutil.move(folder / "out", folder / "model")
    code, _, wrong = quantize(slmperf, folder, "--scheme", "fp8")
    assert code == 2 and "wanted full weights to quantise, found a quantised model" in wrong
    models.save(mixtral(), None, folder / "model")
    code, _, wrong = quantize(slmperf, folder, "--scheme", "fp8")
    assert code == 2 and "mixture of experts" in wrong and wrong.count("\n") == 1
    config = folder / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "vit"}))
    code, _, wrong = quantize(slmperf, folder, "--scheme", "fp8")
    assert code == 2 and "wanted a causal language model, found one of type vit" in wrong
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    models.save(model, None, folder / "model")
    for more in ((), ("--stream",)):
        code, _, wrong = quantize(slmperf, folder, "--scheme", "fp8", *more)
        assert code == 2 and "model.layers.1.mlp.up_proj" in wrong and wrong.count("\n") == 1
    assert not (folder / "out").exists()


def test_a_full_disk_is_one_line_and_keeps_the_blocks(slmperf, folder, monkeypatch):
    def fail(*_):
        raise OSError(28, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(job, "_write_report", fail)
        code, _, wrong = quantize(slmperf, folder, *W4)
    assert code == 2 and "out: wanted to write the result, found:" in wrong
    assert "no space left" in wrong and not (folder / "out").exists()
    code, said, _ = quantize(slmperf, folder, *W4)
    assert code == 0 and "2 blocks of an earlier run" in said


@pytest.mark.parametrize("more", [(), ("--stream",)])
def test_errors_of_other_files_are_theirs(slmperf, folder, monkeypatch, more):
    from slmperf.quant import driver

    def fail(self, index, block):
        raise OSError(5, "input/output error", folder / "spilled" / "states")

    monkeypatch.setattr(driver.Quantizing, "_quantize", fail)
    code, _, wrong = quantize(slmperf, folder, *W4, *more)
    assert code == 2 and wrong == f"error: {folder / 'spilled' / 'states'}: input/output error\n"


def test_parts_beside_a_finished_model_are_named(slmperf, folder, monkeypatch):
    """A run was killed when OUT was whole and its parts not yet deleted."""

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "shutil", SimpleNamespace(rmtree=killed))
        assert quantize(slmperf, folder, *W4)[0] == 130
    assert models.load(folder / "out") and (folder / "out.parts").is_dir()
    code, _, wrong = quantize(slmperf, folder, *W4)
    assert code == 2 and "found a finished quantisation" in wrong and wrong.count("\n") == 1
    assert f"needs {folder / 'out.parts'} no more: delete that" in wrong


def test_figures_that_are_not_finite_lose_no_model(slmperf, folder, monkeypatch):
    """Of a broken model perplexity is infinite; where a measure fails after the work, there is no
    figure. What was quantised is written."""
    from slmperf import evaluate

    broken = llama()
    with torch.no_grad():
        broken.lm_head.weight *= 1e5
    models.save(broken, None, folder / "model")
    options = (*W4, "--method", "rtn", "--eval", folder / "ids.jsonl")
    code, said, wrong = quantize(slmperf, folder, *options)
    assert code == 0, wrong
    assert "perplexity: inf before, inf after" in said
    assert report_of(folder).settings["perplexity"] == {"before": None, "after": None}
    code, said, wrong = slmperf(
        "eval", folder / "out", "--text", folder / "ids.jsonl", "--json", folder / "found.json"
    )
    assert code == 0 and "%" in said and "nan" not in said, wrong
    figures = json.loads((folder / "found.json").read_text())["figures"]["perplexity"]
    assert figures["before"] is figures["after"] is figures["change_pct"] is None
    calls = []

    def once(model, found):
        calls.append(model)
        if len(calls) > 1:
            raise InputError("auc: 3 scores are not finite")
        return 5.0

    monkeypatch.setattr(evaluate, "perplexity", once)
    code, said, wrong = quantize(slmperf, folder, *options, out="other")
    assert code == 0 and "perplexity: 5.0000 before, nan after" in said, wrong
    assert report_of(folder, "other").settings["perplexity"] == {"before": 5.0, "after": None}
    assert models.load(folder / "other").config.quantization_config
