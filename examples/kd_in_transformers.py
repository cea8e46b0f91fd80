"""kd_loss inside a transformers.Trainer that was written with logits.

    python examples/kd_in_transformers.py

`LogitTrainer` is the usual way: both models' logits of all tokens, then the formula. One line,
`use_kd_loss(...)`, has the same loss taken from hidden states, for the tokens with a label alone.
Both runs print the same losses. The models are tiny and the text is random numbers; with your own,
change `language_model` and `sequences`.
"""

import tempfile

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from slmperf.distill import DistillationLoss, use_kd_loss
from slmperf.ops import ForwardKL

VOCABULARY, LENGTH = 128, 24
SHARE, TEMPERATURE = 0.1, 2.0  # of the cross entropy; of the divergence


def language_model(hidden: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def sequences(count: int) -> list[dict[str, torch.Tensor]]:
    """A question of 16 tokens, which has no labels, and an answer of 8."""
    torch.manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (count, LENGTH))
    labels = ids.clone()
    labels[:, :16] = -100
    return [{"input_ids": one, "labels": two} for one, two in zip(ids, labels, strict=True)]


class LogitTrainer(Trainer):
    """The loss by the book, from logits of every token."""

    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        counted = labels != -100
        student = model(input_ids=inputs["input_ids"]).logits[:, :-1][counted]
        with torch.no_grad():
            teacher = self.teacher(input_ids=inputs["input_ids"]).logits[:, :-1][counted]
        log_q = F.log_softmax(student / TEMPERATURE, dim=-1)
        log_p = F.log_softmax(teacher / TEMPERATURE, dim=-1)
        divergence = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        ce = F.cross_entropy(student, labels[counted], reduction="sum")
        count = counted.sum() if num_items_in_batch is None else num_items_in_batch
        return ((1 - SHARE) * divergence + SHARE * ce) / count


def losses(fused: bool) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=6,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        teacher = language_model(hidden=64, seed=1)
        trainer = LogitTrainer(
            language_model(hidden=32, seed=0),
            settings,
            train_dataset=sequences(32),
            teacher=teacher,
        )
        if fused:
            loss = DistillationLoss(ForwardKL(), cross_entropy=SHARE, temperature=TEMPERATURE)
            use_kd_loss(trainer, loss, teacher=teacher)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    for name, fused in (("logits", False), ("kd_loss", True)):
        print(f"{name:8}", *(f"{loss:.4f}" for loss in losses(fused)))
