"""`slmperf audit`: scripts up to a step of their trainer, one line for those without training."""

import json
import math
import subprocess
import sys

import pytest

from slmperf.bench.roof import FORMATS, Roof
from slmperf.check import InputError

ROOF = Roof(
    device="test", kind="cpu", driver="-", torch="-", threads=1, copy_gbs=10.0,
    matrix_tflops=dict.fromkeys(FORMATS, 0.1), launch_us=1.0, date="-",
)  # fmt: skip
MODELS = """
import sys
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def model(seed, hidden):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2))


ids = torch.randint(0, 64, (16, 12))
labels = ids.clone()
labels[:, :6] = -100
data = [dict(input_ids=i, attention_mask=torch.ones_like(i), labels=y) for i, y in zip(ids, labels)]
args = TrainingArguments(
    output_dir=sys.argv[1], per_device_train_batch_size=4, max_steps=3, save_steps=1,
    report_to="none", use_cpu=True, disable_tqdm=True)
"""
GKD = """
class Distils(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]
        outputs = model(**inputs)
        with torch.no_grad():
            given = self.teacher_model(**inputs).logits[:, :-1] / self.args.temperature
        log_p = given.log_softmax(-1)
        log_q = (outputs.logits[:, :-1] / self.args.temperature).log_softmax(-1)
        keep = labels != -100
        loss = F.kl_div(log_q, log_p, reduction="none", log_target=True)[keep].sum() / keep.sum()
        loss = loss + HIDDEN * F.cross_entropy(outputs.logits[:, :-1][keep], labels[keep])
        return (loss, outputs) if return_outputs else loss


HIDDEN = float(sys.argv[2])
args.beta, args.temperature, args.lmbda = 0.0, 2.0, 0.5
trainer = Distils(model(0, 32), args, train_dataset=data)
trainer.teacher_model = model(1, 64).eval()
before = [p.detach().clone() for p in trainer.model.parameters()]
try:
    trainer.train()
finally:
    same = all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
    print("weights are unchanged" if same else "weights are changed")
print("trained to the end")
"""
PLAIN = """
trainer = Trainer(model(0, 32), args, train_dataset=data)
trainer.train()
"""
OURS = """
from dataclasses import dataclass
import numpy as np
from slmperf.distill import DistillationConfig, train


@dataclass(frozen=True)
class Sequence:
    input_ids: np.ndarray
    row: np.ndarray
    answer: np.ndarray
    member: int = 0
    task: str = "like"


row = np.repeat(np.arange(5), 4)
random = np.random.default_rng(0)
sequences = [Sequence(random.integers(0, 64, 20), row, np.arange(20) % 4 == 3) for _ in range(12)]
train(
    model(0, 32), sequences, teacher=model(1, 64),
    config=DistillationConfig(
        sys.argv[1], max_steps=4, context=32, per_device_train_batch_size=4, save_strategy="no",
        normalization="examples", sequence_sample=0.25))
"""


@pytest.fixture
def command(tmp_path):
    """Writes a script and audits it in this process, which has transformers loaded."""

    def run(code, *arguments, **more):
        from slmperf.bench.auditing.script import audit_trainer

        script = tmp_path / "script.py"
        script.write_text(code)
        return audit_trainer(script, [str(tmp_path / "out"), *arguments], roof=ROOF, **more)

    return run


def weights(report):
    return {term.name: term.found for term in report.terms if term.share > 1e-6}


def test_the_command(tmp_path):
    script, out = tmp_path / "script.py", tmp_path / "audit.json"
    script.write_text(MODELS + GKD)
    done = subprocess.run(
        [sys.executable, "-m", "slmperf.cli", "audit", "--trainer", str(script), "--out", str(out),
         "--", str(tmp_path / "run"), "0.1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "weights are unchanged" in done.stdout and "trained to the end" not in done.stdout
    assert "found: cross entropy on labels with weight 0.1," in done.stdout
    assert "forward KL at temperature 2" in done.stdout
    assert not list(tmp_path.glob("run/**/*.safetensors"))
    table = [line for line in done.stdout.splitlines() if line[:1] in "┏┃┡│├└"]
    assert len({len(line) for line in table}) == 1 and len(table[0]) <= 120
    result = json.loads(out.read_text())
    assert result["kind"] == "audit" and result["audit"]["waste"]["rows"] == 48
    assert [row["name"] for row in result["rows"]][:2] == ["forward", "backward"]
    assert all(row["time_us"] > 0 for row in result["rows"])


def test_trainers_that_are_clean(command, tmp_path):
    report = command(MODELS + GKD, "0", step=3)  # after two real steps
    assert report.judged and report.residue < 1e-9
    assert all("for nothing" in line for line in report.findings), report.findings
    report = command(MODELS + PLAIN)  # the loss is computed inside the model
    assert weights(report) == pytest.approx({"cross entropy on labels": 1}, rel=1e-5)
    assert report.errors["head in float64 too"].norm < 1e-4
    assert all("for nothing" in line for line in report.findings), report.findings
    assert not list(tmp_path.glob("out/**/*.safetensors"))


def test_a_mean_that_the_trainer_does_not_divide(command):
    """Two batches a step: Trainer takes the loss for divided by the tokens of both."""
    twice = MODELS.replace("max_steps=3", "gradient_accumulation_steps=2, max_steps=3")
    found = command(twice + GKD, "0").findings[0]
    assert (
        "2 times the formula's (divided by the 24 rows that have a gradient and not by 4" in found
    )
    assert all("for nothing" in line for line in command(twice + PLAIN).findings)


def test_our_own_trainer(command):
    report = command(MODELS + OURS)
    assert weights(report) == pytest.approx(
        {"forward KL": 0.9, "cross entropy on labels": 0.1}, rel=1e-6
    )
    assert report.reference == "the loss function in float64"
    assert report.errors["same hidden states"].norm < 1e-5
    assert report.loss == pytest.approx(report.formula_loss, rel=1e-5)
    # One row a sequence goes through the model's own head, the rest only where it counts.
    assert report.waste.rows - report.waste.used <= 4
    assert report.waste.padding is not None and math.isfinite(report.cost.roof_us)


@pytest.mark.parametrize(
    "code,said",
    [
        ("print('nothing to train')", "ended after 0 losses of a transformers.Trainer"),
        ("raise ValueError('no such\\nfile')", "failed with ValueError: no such file"),
        ("import sys; sys.exit(3)", "ended with exit code 3"),
    ],
    ids=["trains nothing", "raises", "exits"],
)
def test_scripts_without_training(command, code, said, capsys):
    with pytest.raises(InputError, match=said):
        command(code)


def test_a_result_that_cannot_be_written_is_found_first(slmperf, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code, _, error = slmperf("audit", "--trainer", script, "--out", tmp_path)
    assert code == 2 and error.count("\n") == 1 and not (tmp_path / "ran").exists()


def test_a_missing_script_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "slmperf.cli", "audit", "--trainer", str(tmp_path / "none.py")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "none.py is not there" in done.stderr
