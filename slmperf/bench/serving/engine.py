"""This process's engine as an endpoint: one worker, first come, first served.

A member's first prompt opens its prefix (the prefill) and scores its suffix; siblings score theirs
on the open prefix. The prefix is dropped after its member's last prompt.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slmperf import arch
from slmperf.bench.roof import Roof
from slmperf.bench.serving.load import Token, Usage
from slmperf.bench.serving.report import Report, measure
from slmperf.bench.serving.workloads import WORDS, Kind, Prompt, Workload
from slmperf.check import InputError
from slmperf.engine import Engine, OpenPrefix
from slmperf.models.shapes import Shape, shape_of
from slmperf.plan.work import Work, prefill_works

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ANSWER_IDS = (1, 2)  # the time does not depend on which two rows of the head are read
# The model without a checkpoint: small enough for 512 tokens in some tens of milliseconds on two
# cores, deep enough that it is no single matrix product.
RANDOM = dict(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
)

Encode = Callable[[str], list[int]]


class EngineEndpoint:
    """`slmperf.engine.Engine` behind a queue. One token out is the engine's score; more are
    generated greedily behind the open prefix, to the model's end of text.
    """

    together = False

    def __init__(self, model: PreTrainedModel, encode: Encode | None = None) -> None:
        """encode: text -> ids; None takes ids only."""
        self.engine = Engine(model, ANSWER_IDS)
        self.encode = encode
        self._worker: ThreadPoolExecutor | None = None
        self._opened: dict[int, OpenPrefix] = {}
        self._left: Counter[int] = Counter()  # prompts of each member still to come

    @property
    def vocabulary(self) -> int:
        """Ids that the model knows."""
        return self.engine.model.config.vocab_size

    @property
    def shape(self) -> Shape | None:
        """The model's sizes; None where a shape and a scheme do not say what a pass costs: layers
        that differ, experts, quantised weights.
        """
        if self.scheme is None:
            return None
        try:
            return shape_of(self.engine.model.config)
        except InputError:
            return None

    @property
    def scheme(self) -> str | None:
        """Of the weights: fp32 or bf16; None where they are quantised or in another dtype."""
        if getattr(self.engine.model.config, "quantization_config", None) is not None:
            return None
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(self.engine.dtype)

    def facts(self) -> dict[str, Any]:
        """What ran, as rows say it and slmperf plan fit reads it."""
        cuda = self.engine.device.type == "cuda"
        return {
            "shape": None if self.shape is None else asdict(self.shape),
            "tensor_parallel": 1,
            "scheme": self.scheme,
            "hardware": arch.cuda_name() if cuda else arch.cpu_name(),
        }

    def measure(self, work: Workload, kind: Kind, top: Roof) -> Report:
        """Run the load, and hold its cold prompts against the roof where the model has a shape."""
        found = measure(work, kind, self, vocabulary=self.vocabulary)
        tokens = found.groups["cold"].input_tokens
        if tokens is None or self.shape is None or self.scheme is None:
            return found
        cold = prefill_work(self.shape, self.scheme, round(tokens))
        return replace(found, ideal_us=ideal_us(cold, self.scheme, top))

    def check_kind(self, kind: Kind) -> None:
        """InputError for text where there is no tokenizer."""
        if kind == "text" and self.encode is None:
            raise InputError("prompts are text, but the model's folder has no tokenizer")

    async def start(self, prompts: Sequence[Prompt]) -> None:
        """InputError where prompts do not fit the model, or are text and it has no tokenizer."""
        limit = self.engine.model.config.max_position_embeddings
        longest = max((prompt.tokens + prompt.output_tokens - 1 for prompt in prompts), default=0)
        if longest > limit:
            raise InputError(
                f"workload: {longest} tokens in and out, expected at most {limit} "
                "(the model's trained length)"
            )
        self.check_kind("text" if any(isinstance(one.prefix, str) for one in prompts) else "ids")
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._left = Counter(prompt.member for prompt in prompts)

    async def send(self, prompts: Sequence[Prompt], token: Token) -> Usage:
        """Queue one prompt."""
        (prompt,) = prompts
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self._answer, prompt, token)

    async def stop(self) -> None:
        """End the worker, with what an interrupted load left in its queue, and forget prefixes."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
        self._opened.clear()

    def _answer(self, prompt: Prompt, token: Token) -> Usage:
        prefix, suffix = self._ids(prompt.prefix), self._ids(prompt.suffix)
        opened = self._opened.get(prompt.member)
        cached = 0 if opened is None else opened.length
        if opened is None:
            opened = self._opened[prompt.member] = self.engine.open(prefix)
        self._left[prompt.member] -= 1
        if self._left[prompt.member] <= 0:
            del self._opened[prompt.member]
        if prompt.output_tokens == 1:
            self.engine.score(opened, [suffix])
            token()
        else:
            self._generate(opened, np.concatenate([prefix, suffix]), prompt.output_tokens, token)
        return Usage(input_tokens=len(prefix) + len(suffix), cached_tokens=cached)

    def _ids(self, part: np.ndarray | str) -> np.ndarray:
        # Text is encoded at every prompt, prefix included, as a server does that gets text.
        if isinstance(part, np.ndarray):
            return part
        assert self.encode is not None  # start() has checked
        return np.array(self.encode(part), np.int64)

    @torch.inference_mode()
    def _generate(self, opened: OpenPrefix, ids: np.ndarray, most: int, token: Token) -> None:
        from transformers import DynamicCache
        from transformers.generation.streamers import BaseStreamer

        class Stamps(BaseStreamer):
            def __init__(self) -> None:
                self.seen_prompt = False

            def put(self, value: Any) -> None:
                if self.seen_prompt:  # the first value is the prompt
                    token()
                self.seen_prompt = True

            def end(self) -> None:
                pass

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(opened.keys, opened.values, strict=True)):
            cache.update(keys, values, layer)
        tokens = torch.from_numpy(ids).to(self.engine.device)[None]
        self.engine.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=0,
            streamer=Stamps(),
        )


def prefill_work(shape: Shape, scheme: str, context: int) -> Work:
    """What the prefill of a cold prompt of `context` tokens does."""
    (work,) = prefill_works(shape, 1, scheme, context=context, items=1, item_tokens=1, hot=False)
    return work


def ideal_us(work: Work, scheme: str, top: Roof) -> float:
    """Least microseconds of a forward pass in fp32 or bf16: its bytes beside its operations."""
    moved = work.weight_bytes + work.cache_bytes + work.elementwise_bytes
    return top.ideal_us(round(moved), round(work.gemm_flops + work.attention_flops), scheme)


def random_model(context: int, device: str) -> tuple[PreTrainedModel, Encode]:
    """A Llama with random weights (RANDOM) for prompts of `context` tokens, and a tokenizer that
    makes one token of each word that prompts are made of.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**RANDOM, max_position_embeddings=context)
    model = LlamaForCausalLM(config).to(device).eval()
    # Byte-level BPE, as most served models have, so that text costs what it costs there.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f" {word}" for word in WORDS] * 2, trainer)
    return model, lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def load_model(folder: Path, device: str) -> tuple[PreTrainedModel, Encode | None]:
    """A checkpoint and, where it has one, its tokenizer; bf16 on a GPU, fp32 on a CPU."""
    from transformers import AutoTokenizer

    from slmperf import models

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = models.load(folder, dtype=dtype).to(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return model, None
    return model, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def open_engine(model: str | None, work: Workload, device: str) -> EngineEndpoint:
    """The engine with the checkpoint in the folder `model`, or with random weights.

    On a CPU one core is left to the load generator: with a thread on every core, each release would
    hold up a thread that all others wait for.
    """
    if device == "cpu":
        torch.set_num_threads(max(1, min(torch.get_num_threads(), arch.cpu_count() - 1)))
    if model is None:
        return EngineEndpoint(*random_model(work.context + work.output_tokens, device))
    if not Path(model).is_dir():
        raise InputError(
            f"model is {model!r}, expected a checkpoint's folder (or an endpoint beside it)"
        )
    return EngineEndpoint(*load_model(Path(model), device))
