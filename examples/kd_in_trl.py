"""kd_loss inside TRL's trainers of distillation: GKDTrainer here.

    pip install trl
    python examples/kd_in_trl.py

Build the trainer as always; `use_kd_loss(trainer)` has its loss taken from hidden states, with the
trainer's own beta. GOLDTrainer (one vocabulary) and DistillationTrainer go the same way. Both runs
print the same losses. The models are tiny and the text is random numbers.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

from slmperf.distill import use_kd_loss

VOCABULARY, LENGTH = 128, 24


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


def tokenizer() -> PreTrainedTokenizerFast:
    words = WordLevel({str(number): number for number in range(VOCABULARY)}, unk_token="0")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="0", eos_token="1", bos_token="2"
    )


def batch_of(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def losses(fused: bool) -> list[float]:
    torch.manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (32, LENGTH))
    labels = ids.clone()
    labels[:, :16] = -100  # the question
    with tempfile.TemporaryDirectory() as folder:
        settings = GKDConfig(
            folder,
            beta=0.5,
            lmbda=0.0,  # answers as given; 1.0 has the student write them
            max_steps=6,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = GKDTrainer(
            model=language_model(hidden=32, seed=0),
            teacher_model=language_model(hidden=64, seed=1),
            args=settings,
            train_dataset=Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}),
            data_collator=batch_of,
            processing_class=tokenizer(),
        )
        if fused:
            use_kd_loss(trainer)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    for name, fused in (("TRL", False), ("kd_loss", True)):
        print(f"{name:8}", *(f"{loss:.4f}" for loss in losses(fused)))
