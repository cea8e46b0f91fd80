"""slmperf.distill: the loss against a computation by hand, packing, accumulation, ranks, and
resuming after kill -9.

Over 400 lines: the same small models and sequences serve all of these tests.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
)

from slmperf.check import InputError
from slmperf.distill import (
    DistillationConfig,
    DistillationTrainer,
    PackedBatches,
    train,
)
from slmperf.distill.step import batch_loss
from slmperf.distill.teachers import as_teacher
from slmperf.ops import (
    JSD,
    ForwardKL,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    divergence_reference,
)

VOCABULARY, CONTEXT = 96, 64
NO, YES = 2, 3


@dataclass(frozen=True)
class Sequence:
    """The fields of slmperf.data.TrainingSequence that a training reads."""

    input_ids: np.ndarray
    row: np.ndarray
    answer: np.ndarray
    member: int
    task: str = "like"


def make_model(
    kind: str = "llama", seed: int = 0, hidden: int = 32, layers: int = 2, spread: float = 0.02
):
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=spread,
    )
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    config = MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM._from_config(config, experts_implementation="grouped_mm")


def make_sequences(members: int, seed: int = 0) -> list[Sequence]:
    """Rows of two to five tokens and an answer; a row's answer is Yes when its first token is
    even.
    """
    random = np.random.default_rng(seed)
    sequences = []
    for member in range(members):
        ids, rows, answers = [1, 4 + member % 8], [-1, -1], [False, False]
        for row in range(random.integers(2, 9)):
            words = random.integers(12, VOCABULARY, random.integers(2, 6)).tolist()
            ids += [*words, YES if words[0] % 2 == 0 else NO]
            rows += [row] * (len(words) + 1)
            answers += [False] * len(words) + [True]
        sequences.append(
            Sequence(np.array(ids, np.int32), np.array(rows, np.int32), np.array(answers), member)
        )
    return sequences


def settings(**changes) -> DistillationConfig:
    base = dict(
        output_dir="unused",
        max_steps=4,
        context=CONTEXT,
        per_device_train_batch_size=4,
        normalization="examples",
        learning_rate=1e-3,
        weight_decay=0.1,
        adam_beta2=0.98,
        logging_steps=20,
        seed=0,
    )
    return DistillationConfig(**{**base, **changes})


def loss_by_hand(model, teacher, sequences, config) -> float:
    """The formula of slmperf.distill.loss, sequence by sequence, row by row, token by token, in
    fp64.
    """
    total, examples = 0.0, 0
    for sequence in sequences:
        ids = torch.from_numpy(sequence.input_ids).long()[None]
        with torch.no_grad():
            student_log = model(input_ids=ids).logits[0].double().log_softmax(-1)
            teacher_log = (
                None
                if teacher is None
                else teacher(input_ids=ids).logits[0].double().log_softmax(-1)
            )
        for row in range(sequence.row.max() + 1):
            tokens = np.flatnonzero(sequence.row == row)
            answers = [token for token in tokens if sequence.answer[token]]
            examples += 1
            for token in tokens:
                weight = 0.05 / len(tokens) + (0.95 / len(answers) if token in answers else 0.0)
                log_q = student_log[token - 1]
                ce = -log_q[sequence.input_ids[token]].item()
                if teacher is None:
                    total += weight * ce
                else:
                    log_p = teacher_log[token - 1]
                    kl = (log_p.exp() * (log_p - log_q)).sum().item()
                    total += weight * (config.kd_weight * kl + config.ce_weight * ce)
    return total / examples


@pytest.mark.parametrize("with_teacher", [False, True], ids=["sft", "kd"])
def test_loss_is_the_formula(with_teacher):
    model = make_model(spread=0.2)
    teacher = make_model("mixtral", seed=1, spread=0.2) if with_teacher else None
    sequences, config = make_sequences(12), settings(max_steps=1)
    batches = PackedBatches(sequences, config)
    # One batch that holds the first epoch exactly.
    config = settings(max_steps=1, per_device_train_batch_size=batches.rows_per_epoch)
    batch = PackedBatches(sequences, config)[0]
    with torch.no_grad():
        found = batch_loss(model, as_teacher(teacher), batch, config).loss
    gold = loss_by_hand(model, teacher, sequences, config)
    rows = sum(sequence.row.max() + 1 for sequence in sequences)
    assert batch["totals"].tolist() == [rows, rows]
    assert gold > 0.5  # not trivial
    assert float(found) == pytest.approx(gold, rel=2e-5)


def test_weights_of_the_loss_need_not_sum_to_one():
    model, teacher = make_model(spread=0.2), make_model(seed=1, spread=0.2)
    batch = PackedBatches(make_sequences(12), settings())[0]

    def value(kd_weight, ce_weight):
        config = settings(kd_weight=kd_weight, ce_weight=ce_weight)
        return batch_loss(model, as_teacher(teacher), batch, config).loss.item()

    kd, ce = value(1.0, 0.0), value(0.0, 1.0)
    assert kd > 0.01 and ce > 0.01
    assert value(3.0, 0.5) == pytest.approx(3.0 * kd + 0.5 * ce, rel=1e-5)


KINDS = [
    ForwardKL(),
    ReverseKL(),
    JSD(0.3),
    SkewForwardKL(0.1),
    SkewReverseKL(0.1),
    TotalVariation(),
]
NAMES = {
    ForwardKL: "forward_kl",
    ReverseKL: "reverse_kl",
    JSD: "jsd",
    SkewForwardKL: "skew_forward_kl",
    SkewReverseKL: "skew_reverse_kl",
    TotalVariation: "total_variation",
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
def test_loss_on_hidden_states_is_the_loss_on_logits(kind):
    """Value and every gradient, against the logits of all tokens and the formulas in torch."""
    model, teacher = make_model(spread=0.2), make_model(seed=1, spread=0.2)
    name = NAMES[type(kind)]
    config = settings(divergence=name, beta=0.3, temperature=2.0, sequence_sample=0.5)
    assert config.kind == kind
    batch = PackedBatches(make_sequences(20), config)[0]
    batch_loss(model, as_teacher(teacher), batch, config).loss.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()

    def logits(one):
        names = ("input_ids", "position_ids", "attention_mask")
        every = one(**{name: batch[name] for name in names if name in batch}).logits
        return every.flatten(0, 1)[batch["positions"]]

    z = logits(model)
    kd = divergence_reference(z, logits(teacher), kind=kind, temperature=2.0)
    ce = torch.nn.functional.cross_entropy(z, batch["targets"], reduction="none")
    weights = 0.95 * batch["answer_share"] + 0.05 * batch["sequence_share"]
    ((0.9 * kd + 0.1 * ce) @ weights / batch["totals"][0]).backward()
    assert_same(found, {name: value.grad for name, value in model.named_parameters()})


def test_no_gradient_where_student_equals_teacher():
    model = make_model(spread=0.2)
    teacher = copy.deepcopy(model)
    config = settings(ce_weight=0.0)
    batch = PackedBatches(make_sequences(20), config)[0]
    batch_loss(model, as_teacher(teacher), batch, config).loss.backward()
    largest = max(float(value.grad.abs().max()) for value in model.parameters())
    model.zero_grad()
    other = make_model(seed=5, spread=0.2)
    batch_loss(model, as_teacher(other), batch, config).loss.backward()
    other = max(float(value.grad.abs().max()) for value in model.parameters())
    assert largest < 1e-5 * other
    assert all(value.grad is None for value in teacher.parameters())


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_packed_logits_equal_those_alone(kind):
    model = make_model(kind, spread=0.2).eval()
    sequences = make_sequences(40)
    batches = PackedBatches(sequences, settings(per_device_train_batch_size=8))
    batch = batches[0]
    assert "attention_mask" in batch
    with torch.no_grad():
        packed = model(
            **{key: batch[key] for key in ("input_ids", "position_ids", "attention_mask")}
        ).logits
    compared = 0
    for line, row in enumerate(batches._rows[: batches.rows_per_batch]):
        at = 0
        for index in row:
            ids = torch.from_numpy(sequences[index].input_ids).long()
            with torch.no_grad():
                alone = model(input_ids=ids[None]).logits[0]
            torch.testing.assert_close(
                packed[line, at : at + len(ids)], alone, rtol=1e-4, atol=1e-4
            )
            at += len(ids)
            compared += 1
    assert compared > batches.rows_per_batch  # some rows do hold several sequences


def test_batches_repeat_and_cover_every_sequence():
    sequences = make_sequences(50)
    config = settings(sequence_sample=0.3, num_train_epochs=3, max_steps=-1)
    first, again = PackedBatches(sequences, config), PackedBatches(sequences, config)
    late = len(first) - 1
    for name, value in first[late].items():  # asked for out of order, as a resumed run does
        assert torch.equal(value, again[late][name]), name
    for epoch in (0, 1):
        again._load_epoch(epoch)
        assert sorted(index for row in again._rows for index in row) == list(range(50))
        assert len(again._rows) == first.rows_per_epoch
    total = sum(int(first[number]["tokens"]) for number in range(len(first)))
    assert total == pytest.approx(3 * len(first.ids), rel=0.1)


def test_rows_that_are_only_shown_have_no_weight():
    """A later window opens with rows that an earlier one labels: context, no examples."""
    [whole] = make_sequences(1)
    answer = whole.answer & (whole.row > 0)
    config = settings(per_device_train_batch_size=1)
    batch = PackedBatches([replace(whole, answer=answer)], config)[0]
    assert batch["totals"].tolist() == [whole.row.max()] * 2
    for share in ("answer_share", "sequence_share"):
        assert float(batch[share].sum()) == pytest.approx(whole.row.max())
    assert not {int(at) + 1 for at in batch["positions"]} & set(np.flatnonzero(whole.row <= 0))


def test_sampled_sequence_tokens_keep_the_expected_weight():
    sequences = make_sequences(200)
    wanted = PackedBatches(sequences, settings())
    rows = wanted.rows_per_epoch
    everything = settings(sequence_sample=0.25, per_device_train_batch_size=rows, max_steps=30)
    batches = PackedBatches(sequences, everything)
    sums, answers = [], sum(int(sequence.answer.sum()) for sequence in sequences)
    for epoch in range(30):
        batch = batches[epoch]
        kept = (batch["targets"] == YES) | (batch["targets"] == NO)
        assert int(kept.sum()) == answers  # an answer is never dropped
        assert len(batch["targets"]) < 0.55 * len(batches.ids)
        shares = 0.95 * batch["answer_share"] + 0.05 * batch["sequence_share"]
        sums.append(float(shares.sum()))
    assert np.mean(sums) == pytest.approx(answers, rel=2e-3)  # each example weighs 0.95 + 0.05


class _Gradients(TrainerCallback):
    """The gradient of the first step, as the optimizer gets it."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step == 0:
            self.found = {name: value.grad.clone() for name, value in model.named_parameters()}


def first_gradient(folder: Path, **changes) -> dict[str, torch.Tensor]:
    trainer = DistillationTrainer(
        make_model(spread=0.2),
        settings(output_dir=str(folder), max_steps=1, rows_per_step=8, **changes),
        make_sequences(60),
        teacher=make_model(seed=1),
    )
    gradients = _Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return gradients.found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=1e-6 + 1e-5 * float(value.abs().max())
        )


def test_a_step_is_the_same_in_one_batch_and_in_four(tmp_path):
    one = first_gradient(tmp_path / "one")
    four = first_gradient(tmp_path / "four", gradient_accumulation_steps=4)
    assert_same(four, one)


def test_a_step_is_the_same_on_two_ranks(tmp_path):
    one = first_gradient(tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        env = child_environment() | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        ranks.append(subprocess.Popen([sys.executable, __file__, "rank", str(tmp_path)], env=env))
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    assert_same(torch.load(tmp_path / "gradient.pt", weights_only=True), one)


def test_training_learns_and_reports(tmp_path, capsys):
    model = make_model(spread=0.05)

    def config(name):
        return settings(output_dir=str(tmp_path / name), max_steps=60, learning_rate=1e-2)

    result = train(model, make_sequences(200), config=config("sft"), precision="auto")
    assert result.steps == 60 and len(result.losses) == 60 and result.resumed_from == 0
    assert result.losses[-10:].mean() < 0.8 * result.losses[:3].mean()
    assert json.loads((tmp_path / "sft/settings.json").read_text())["precision"] == result.precision
    log = (tmp_path / "sft/train.log").read_text()
    assert "step 60/60" in log and "tokens/s" in log
    assert model.config.use_cache is True  # what is saved as config.json is not touched
    student = make_model(seed=3, spread=0.05)
    kd = train(
        student,
        make_sequences(200),
        teacher=model,
        config=config("kd"),
        precision="auto",
    )
    assert kd.losses[-10:].mean() < 0.5 * kd.losses[:3].mean()
    with capsys.disabled():
        print(
            f"\n  SFT {result.tokens_per_second:,.0f} tokens/s, "
            f"KD {kd.tokens_per_second:,.0f} ({result.precision})"
        )


def test_mixture_of_experts_trains(tmp_path):
    model = make_model("mixtral", spread=0.05)
    before = copy.deepcopy(model.state_dict())
    result = train(
        model,
        make_sequences(100),
        config=settings(output_dir=str(tmp_path), max_steps=20, learning_rate=1e-2),
    )
    assert result.losses[-5:].mean() < result.losses[:3].mean()
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def resumable(folder: Path, pause: float = 0.0):
    """A training whose every part a checkpoint must bring back; `pause` slows the steps so that a
    kill lands inside.
    """
    model = make_model(spread=0.05)
    model.config.attention_dropout = 0.1  # uses the torch generator
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    config = settings(
        output_dir=str(folder),
        max_steps=24,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        sequence_sample=0.5,
        save_steps=3,
        warmup_steps=0.2,
    )
    if pause:
        forward = model.forward

        def slow(*args, **kwargs):
            time.sleep(pause)
            return forward(*args, **kwargs)

        model.forward = slow
    sequences = make_sequences(30)
    result = train(model, sequences, teacher=make_model(seed=1), config=config)
    return model, result


def child_environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def test_killed_training_ends_as_an_undisturbed_one(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # like the killed process; sums are added in the same order
    try:
        wanted, undisturbed = resumable(tmp_path / "undisturbed")
        folder = tmp_path / "killed"
        child = subprocess.Popen(
            [sys.executable, __file__, "resumable", str(folder)], env=child_environment()
        )
        limit = time.monotonic() + 90
        while (
            not list(folder.glob("checkpoint-6"))
            and child.poll() is None
            and time.monotonic() < limit
        ):
            time.sleep(0.02)
        time.sleep(0.13)  # past the checkpoint of step 6, at any point of a later step
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        model, result = resumable(folder)
    finally:
        torch.set_num_threads(threads)
    assert 6 <= result.resumed_from < 24
    assert np.array_equal(result.losses, undisturbed.losses)
    assert result.tokens == undisturbed.tokens
    for name, value in wanted.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name
    names = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert names == {".safetensors", ".json", ".log"}
    assert len(list(folder.glob("checkpoint-*"))) == 2 and not list(folder.glob(".checkpoint-*"))

    # Called once more, it loads the end; with other settings or data it refuses.
    again, ended = resumable(folder)
    assert ended.resumed_from == 24 and np.array_equal(ended.losses, result.losses)
    assert all(
        torch.equal(again.get_parameter(name), value) for name, value in wanted.named_parameters()
    )
    with pytest.raises(InputError, match=r"holds another training, its config\.") as raised:
        other = settings(output_dir=str(folder), max_steps=5)
        train(make_model(), make_sequences(30), config=other)
    assert "\n" not in str(raised.value)


def test_half_written_checkpoint_is_not_taken(tmp_path):
    folder = tmp_path / "run"
    _, first = resumable(folder)
    newest = folder / "checkpoint-24"
    (folder / "ended.json").unlink()
    newest.rename(folder / f".{newest.name}.new-4194303")  # what a kill inside a write leaves
    (folder / f".{newest.name}.new-4194303" / "model.safetensors").write_bytes(b"torn")
    _, second = resumable(folder)
    assert second.resumed_from == 21 and np.array_equal(first.losses, second.losses)


def test_bad_input_is_one_line(tmp_path):
    short = make_model().config
    short.max_position_embeddings = 8
    other = make_model(seed=1)
    other.resize_token_embeddings(VOCABULARY + 1)
    good = make_sequences(3)
    broken = [replace(good[0], row=good[0].row[:-1])]
    config = settings(output_dir=str(tmp_path / "run"))
    cases = [
        (lambda: settings(learning_rate=0.0), "learning_rate is 0.0, wanted more than 0"),
        (lambda: settings(sequence_sample=0.0), "sequence_sample is 0.0"),
        (lambda: settings(divergence="kl"), "divergence is 'kl', wanted forward_kl or"),
        (lambda: settings(fp16=True), "fp16 is True"),
        (lambda: settings(kd_weight=0.0, ce_weight=0.0), "kd_weight is 0.0, wanted more than 0"),
        (lambda: train(make_model(), good, config=config, precision="fp16"), "precision is 'fp16'"),
        (lambda: train(make_model(), [], config=config), "there are no examples"),
        (lambda: train(make_model(), broken, config=config), "wanted equal numbers"),
        (
            lambda: train(make_model(), good, config=settings(context=8)),
            "wanted at most context = 8",
        ),
        (lambda: train(LlamaForCausalLM(short), good, config=config), "knows 8 positions"),
        (
            lambda: train(make_model(), good, teacher=other, config=config),
            "97",
        ),
    ]
    for call, message in cases:
        with pytest.raises(InputError) as raised:
            call()
        assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())  # nothing is left behind


if __name__ == "__main__":
    torch.set_num_threads(1)
    job, target = sys.argv[1], Path(sys.argv[2])
    if job == "resumable":
        resumable(target, pause=0.05)
    elif job == "rank":
        rank = int(os.environ["RANK"])
        found = first_gradient(target / "ranks")
        if rank == 0:
            torch.save(
                {name.removeprefix("module."): value for name, value in found.items()},
                target / "gradient.pt",
            )
        torch.distributed.destroy_process_group()
