"""slmperf eval: a model beside its base, in perplexity, AUC, lm-eval's tasks and layer by layer."""

import json
import shutil
import sys
import weakref

import numpy as np
import pytest
import torch
from small_commands import write_ids
from small_models import llama

from slmperf import models
from slmperf.bench.evaluation import job, layers
from slmperf.calibrate.texts import Vocabulary, read_calibration
from slmperf.data import prompt_texts, read_prompts, train_tokenizer
from slmperf.data.text import train_text_tokenizer
from slmperf.engine.quality import read_measure
from slmperf.quant import QuantReport, quantize_model

VOCABULARY = Vocabulary(None, 64, 64)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, and what it becomes in 4 bits, with the report that `slmperf quantize` writes."""
    folder = tmp_path_factory.mktemp("made")
    ids = write_ids(folder / "ids.jsonl", split="train")
    model = llama()
    models.save(model, None, folder / "base")
    batches = read_calibration(ids, "x", VOCABULARY, samples=99, packed=True).batches
    report = quantize_model(model, "w4a16", batches, group_size=16)
    models.save(model, None, folder / "model")
    (folder / "model" / "quantization.json").write_text(report.to_json())
    return folder


@pytest.fixture
def folder(tmp_path, made):
    """A copy of both; the report names the base as the command does."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model" / "quantization.json"
    told = json.loads(path.read_text())
    told["settings"]["base"] = str(tmp_path / "base")
    path.write_text(json.dumps(told))
    return tmp_path


def evaluate(slmperf, folder, *options):
    return slmperf("eval", folder / "model", *options)


def test_perplexity_beside_the_base(slmperf, folder):
    ids = folder / "ids.jsonl"
    code, said, wrong = evaluate(slmperf, folder, "--text", ids, "--json", folder / "found.json")
    assert code == 0, wrong
    found = json.loads((folder / "found.json").read_text())
    measured = read_measure(ids, VOCABULARY)
    before, after = measured.of(llama()), measured.of(models.load(folder / "model"))
    row = found["figures"]["perplexity"]
    assert (row["before"], row["after"]) == (pytest.approx(before), pytest.approx(after))
    assert row["change_pct"] == pytest.approx(100 * (after / before - 1)) and not row["rises"]
    sizes = found["sizes"]
    assert sizes["parameters"]["before"] == sizes["parameters"]["after"]
    assert sizes["weights, MiB"]["after"] < sizes["weights, MiB"]["before"]
    assert f"{before:.4g}" in said and f"{after:.4g}" in said and "change %" in said
    assert found["layers"] == [] and found["base"] == str(folder / "base")


@pytest.mark.parametrize("more", [(), ("--layers", "--calibration", "ids.jsonl")])
def test_the_base_is_gone_when_the_model_comes(slmperf, folder, monkeypatch, more):
    """Unless the errors of layers want both."""
    monkeypatch.chdir(folder)
    seen, load = [], job.load_model

    def loaded(*arguments):
        alive = [one() is not None for one in seen]
        model = load(*arguments)
        seen.append(weakref.ref(model))
        alive_before.append(alive)
        return model

    alive_before = []
    monkeypatch.setattr(job, "load_model", loaded)
    code, _, wrong = evaluate(slmperf, folder, "--text", "ids.jsonl", *more)
    assert code == 0, wrong
    assert alive_before == [[], [bool(more)]]


def test_a_pruned_model_names_its_base_too(slmperf, folder):
    options = ("--calibration", folder / "ids.jsonl", "--intermediate", 24)
    assert slmperf("prune", folder / "base", folder / "pruned", *options)[0] == 0
    code, said, wrong = slmperf("eval", folder / "pruned", "--text", folder / "ids.jsonl")
    assert code == 0, wrong
    assert "beside" in said and "perplexity" in said
    code, _, wrong = slmperf(
        "eval", folder / "pruned", "--layers", "--calibration", folder / "ids.jsonl"
    )
    assert code == 2 and "wanted a quantised model, found full weights" in wrong


def test_auc_of_every_task(slmperf, tmp_path):
    generator = np.random.default_rng(0)
    lines = [
        {
            "task": f"Will the member {number % 2}?", "member": f"m{number % 6}",
            "history": [{"text": f"Film {n}", "action": "yes"} for n in range(number % 3 + 1)],
            "candidate": f"Film {generator.integers(20)}", "label": int(generator.integers(2)),
            "time": number,
        }
        for number in range(120)
    ]  # fmt: skip
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    tokenizer = train_tokenizer(prompt_texts(read_prompts(path)), 400)
    model = llama(vocab_size=len(tokenizer))
    models.save(model, tokenizer, tmp_path / "base")
    quantize_model(model, "fp8")
    models.save(model, None, tmp_path / "model")  # the base has the tokenizer
    options = ("--base", tmp_path / "base", "--prompts", path, "--json", tmp_path / "found.json")
    code, said, wrong = evaluate(slmperf, tmp_path, *options)
    assert code == 0, wrong
    figures = json.loads((tmp_path / "found.json").read_text())["figures"]
    tasks = [f"AUC, Will the member {number}?" for number in (0, 1)]
    assert list(figures) == ["AUC", *tasks] and all(one["rises"] for one in figures.values())
    for place in ("before", "after"):
        mean = np.mean([figures[task][place] for task in tasks])
        assert figures["AUC"][place] == pytest.approx(mean)
    assert tasks[0] in said
    code, _, wrong = evaluate(slmperf, tmp_path, "--base", tmp_path / "base", "--text", path)
    assert code == 2 and "--text" in wrong and "wanted text, found the other kind" in wrong


# ---- layers


def inputs_of(model, name, batches):
    """What flows into a layer at the tokens that count, (n, d) fp64."""
    rows = []

    def note(_, arguments):
        rows.append(arguments[0])

    handle = model.get_submodule(name).register_forward_pre_hook(note)
    for batch in batches:
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    masks = [batch["attention_mask"] > 0 for batch in batches]
    return torch.cat([x[mask] for x, mask in zip(rows, masks, strict=True)]).double()


def test_layer_errors_are_those_of_the_outputs(slmperf, folder):
    ids = folder / "ids.jsonl"
    options = ("--layers", "--calibration", ids, "--held-out", ids, "--json", folder / "f.json")
    code, said, wrong = evaluate(slmperf, folder, *options)
    assert code == 0, wrong
    found = json.loads((folder / "f.json").read_text())
    assert len(found["layers"]) == 14 and "int4, groups of 16" in said and "mean" in said
    base, model = llama(), models.load(folder / "model")
    texts = {
        "error": read_calibration(ids, "x", VOCABULARY, samples=512, packed=True),
        "held_out_error": read_calibration(
            ids, "x", VOCABULARY, samples=512, packed=True, held_out=True
        ),
    }
    for row in found["layers"]:
        before = base.get_submodule(row["name"]).weight.detach().double()
        lost = before - model.get_submodule(row["name"]).dequantized().double()
        for key, text in texts.items():
            x = inputs_of(base, row["name"], text.batches)
            wanted = (x @ lost.T).square().sum() / (x @ before.T).square().sum()
            assert row[key] == pytest.approx(float(wanted), rel=1e-3), (row["name"], key)
    mean = np.mean([row["error"] for row in found["layers"]])
    assert found["error_mean"] == pytest.approx(mean)


def test_smoothing_is_no_error(folder, monkeypatch):
    """Channels that were divided count as they were: the first layers, whose inputs are the base's,
    have the errors of the report. What rows (of v) were divided by is fitted: few inputs, of which
    three are large, take a part of the error along."""
    base, model = llama(), llama()
    with torch.no_grad():  # channels that want smoothing
        for one in (base, model):
            for block in one.model.layers:
                block.input_layernorm.weight[:3] *= 30
                block.post_attention_layernorm.weight[5] *= 30
                block.mlp.up_proj.weight[7] *= 30
    text = read_calibration(folder / "ids.jsonl", "x", VOCABULARY, samples=99, packed=True)
    report = quantize_model(model, "w8a8", text.batches)
    assert any(row.alpha is not None for row in report.layers)
    found = layers.layer_errors(base, model, [text.batches], progress=lambda done, of: None)
    told = {row.name: row.relative_error for row in report.layers}
    for row, tolerance in zip(found[:3], (0.02, 0.02, 0.3), strict=True):
        assert row.error == pytest.approx(told[row.name], rel=tolerance), row.name
    assert all(row.error < 1e-3 and row.held_out_error is None for row in found)
    monkeypatch.setattr(layers, "is_smoothed", lambda config: False)
    unseen = layers.layer_errors(base, model, [text.batches], progress=lambda done, of: None)
    assert max(row.error for row in unseen) > 0.1


# ---- lm-eval

STUB = {
    "lm_eval/__init__.py": (
        "calls = []\n"
        "def simple_evaluate(model, **told):\n"
        "    calls.append((model, told))\n"
        "    metrics = {'alias': 'x', 'acc,none': 0.25 * len(calls), 'acc_stderr,none': 0.01,\n"
        "               'word_perplexity,none': 9.0, 'word_perplexity_stderr,none': 'N/A'}\n"
        "    return {'results': {task: metrics for task in told['tasks']}}\n"
    ),
    "lm_eval/models/__init__.py": "",
    "lm_eval/models/huggingface.py": (
        "class HFLM:\n    def __init__(self, **told):\n        self.told = told\n"
    ),
    "lm_eval/tasks.py": (
        "class TaskManager:\n    def __init__(self, include_path=None):\n"
        "        self.all_tasks = ['arc_easy', 'piqa']\n"
    ),
}


def with_tokenizer(folder):
    """Both checkpoints anew, with one."""
    tokenizer = train_text_tokenizer(["a red fox and a blue bird by the river"] * 9, 300)
    model = llama(vocab_size=len(tokenizer))
    models.save(model, tokenizer, folder / "base")
    report = (folder / "model" / "quantization.json").read_text()
    quantize_model(model, "fp8")
    models.save(model, tokenizer, folder / "model")
    (folder / "model" / "quantization.json").write_text(report)


def test_tasks_of_the_harness(slmperf, folder, tmp_path, monkeypatch):
    with_tokenizer(folder)
    for name, text in STUB.items():
        (tmp_path / "stub" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stub" / name).write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / "stub")
    options = ("--tasks", "arc_easy, piqa", "--json", folder / "found.json")
    try:
        code, said, wrong = evaluate(slmperf, folder, *options)
        assert code == 0, wrong
        calls = sys.modules["lm_eval"].calls
        assert evaluate(slmperf, folder, "--tasks", "winogrande")[0] == 2
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
            del sys.modules[name]
    figures = json.loads((folder / "found.json").read_text())["figures"]
    metrics = ("acc", "word_perplexity")
    assert list(figures) == [f"{task} {one}" for task in ("arc_easy", "piqa") for one in metrics]
    row = figures["piqa acc"]
    assert (row["before"], row["after"], row["standard_errors"]) == (0.25, 0.5, [0.01, 0.01])
    assert row["rises"] and not figures["piqa word_perplexity"]["rises"] and "± 0.0100" in said
    first, second = (call[0].told["pretrained"] for call in calls)
    assert not hasattr(first.config, "quantization_config")
    assert hasattr(second.config, "quantization_config") and calls[0][1]["tasks"] == [
        "arc_easy",
        "piqa",
    ]


def test_without_the_harness_one_line_says_so(slmperf, folder, monkeypatch):
    with_tokenizer(folder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, wrong = evaluate(slmperf, folder, "--tasks", "arc_easy")
    assert code == 2 and "wanted lm-eval, found none; install it: slmperf[eval]" in wrong
    assert wrong.count("\n") == 1


@pytest.mark.slow
def test_a_task_of_ones_own_by_the_real_harness(slmperf, folder):
    pytest.importorskip("lm_eval")
    with_tokenizer(folder)
    tasks = folder / "tasks"
    tasks.mkdir()
    lines = [{"question": f"A red fox {n}?", "answer": n % 2} for n in range(6)]
    (tasks / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tasks / "foxes.yaml").write_text(
        "task: foxes\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tasks / 'rows.jsonl'}}}}}\n"
        "doc_to_text: question\ndoc_to_target: answer\ndoc_to_choice: ['no', 'yes']\n"
        "metric_list: [{metric: acc}]\n"
    )
    options = ("--tasks", "foxes", "--task-folder", tasks, "--json", folder / "found.json")
    code, _, wrong = evaluate(slmperf, folder, *options)
    assert code == 0, wrong
    row = json.loads((folder / "found.json").read_text())["figures"]["foxes acc"]
    assert 0 <= row["before"] <= 1 and 0 <= row["after"] <= 1


# ---- what is refused


@pytest.mark.parametrize(
    "options,words",
    [
        ((), "wanted something to measure"),
        (("--layers",), "--layers: wanted --calibration"),
        (("--text", "ids.jsonl", "--held-out", "ids.jsonl"), "--held-out: wanted --layers"),
        (("--text", "ids.jsonl", "--calibration", "ids.jsonl"), "--calibration: wanted --layers"),
        (("--text", "ids.jsonl", "--task-folder", "base"), "--task-folder: wanted --tasks"),
        (("--text", "absent.jsonl"), "absent.jsonl"),
        (("--text", "ids.jsonl", "--context", 99), "2 to 64"),
        (("--prompts", "ids.jsonl"), "wanted ranking prompts, found the other kind"),
        (("--text", "ids.jsonl", "--base", "absent"), "absent: wanted a checkpoint folder"),
        (("--text", "ids.jsonl", "--base", "other"), "wanted 64 tokens as in model"),
        (("--layers", "--calibration", "ids.jsonl", "--samples", 0), "--samples: wanted"),
        (("--layers", "--calibration", "ids.jsonl", "--base", "small"), "intermediate_size 24"),
        (("--layers", "--calibration", "ids.jsonl", "--base", "model"), "found a quantised model"),
        (("--text", "ids.jsonl", "--json", "ids.jsonl/x"), "wanted a folder to write to"),
        (("--tasks", "arc_easy"), "--tasks: wanted"),
    ],
)
def test_bad_options_are_one_line(slmperf, folder, monkeypatch, options, words):
    models.save(llama(vocab_size=32), None, folder / "other")
    models.save(llama(intermediate_size=24), None, folder / "small")
    monkeypatch.chdir(folder)
    code, said, wrong = slmperf("eval", "model", *options)
    assert code == 2 and wrong.startswith("error: ") and wrong.count("\n") == 1
    assert words in wrong and not said


def test_a_base_that_is_not_told(slmperf, folder):
    text = ("--text", folder / "ids.jsonl")
    (folder / "base").rename(folder / "elsewhere")
    code, _, wrong = evaluate(slmperf, folder, *text)
    assert code == 2 and "--base: wanted the folder that" in wrong
    path = folder / "model" / "quantization.json"
    assert QuantReport.from_json(path.read_text()).settings["base"] == str(folder / "base")
    for content, words in (("{}", "wanted the report of a command"), (None, "wanted --base")):
        path.write_text(content) if content else path.unlink()
        code, _, wrong = evaluate(slmperf, folder, *text)
        assert code == 2 and words in wrong and wrong.count("\n") == 1
