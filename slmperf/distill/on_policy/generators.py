"""Where the student's own text comes from.

Every text has a seed of its own, from which one number in [0, 1) is drawn for each of its tokens:
the token is where that number falls in the distribution. So a text depends on weights, prompt and
seed alone, and not on the prompts beside it or on how many are continued at once (as far as
rounding does not differ: products of other sizes round differently).

slmperf.engine is no provider yet: it scores and does not generate. Over 400 lines, because the
providers repeat the protocol's signature and are to be read side by side.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
)
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)

from slmperf.check import InputError
from slmperf.distill.heads import unwrapped
from slmperf.distill.server import CompletionServer

_PAGE = 256  # tokens of a page of continuous batching: the default of Transformers
# Whether its configuration says if it may switch to flash attention.
_SWITCHES = hasattr(ContinuousBatchingConfig, "auto_switch_to_flash")
_FLASH_DTYPES = (torch.bfloat16, torch.float16)  # what flash attention computes with


class Generator(Protocol):
    """Continues prompts with a model's weights as they were at some step of the training."""

    step: int  # of the weights in use
    updates: bool  # False: they stay those of step 0, whatever `update` is told

    def check(self, model: torch.nn.Module) -> None:
        """InputError for what can be refused before training starts."""
        ...

    def update(self, model: torch.nn.Module, step: int) -> None:
        """Take over the weights of `model`, which is at `step`."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: Sequence[int],
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
        stop: frozenset[int],
    ) -> list[list[int]]:
        """What follows each prompt, without the prompt.

        new_tokens   at most so many for each prompt
        temperature  divides the logits; 0: the likeliest token
        top_p        of the likeliest tokens, those that first reach this probability together
        seeds        >= 0, one for each prompt
        stop         a text ends behind the first of these tokens
        """
        ...


def default_generator(model: torch.nn.Module) -> Generator:
    """Continuous batching on CUDA with flash attention and bf16 or fp16 weights, padded batches
    elsewhere.

    Without flash attention, continuous batching masks every request's tokens against those of all
    others: on a CPU it wrote 0.4 (5 layers of width 64) to 0.8 times (8 of 512) as many tokens a
    second as padded batches.
    """
    inner = _base(model)
    paged = inner.device.type == "cuda" and _flash(inner) and inner.dtype in _FLASH_DTYPES
    return ContinuousBatching() if paged else PaddedGeneration()


def stop_tokens(model: torch.nn.Module) -> frozenset[int]:
    """The tokens that end a text of a model, by its generation_config; it may name none."""
    settings: Any = unwrapped(model).generation_config
    ends = settings.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
    return frozenset(int(token) for token in ends)


def text_seed(seed: int, *place: int) -> int:
    """31 bits, what every server takes, for the text at some place of a run; all >= 0."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0]) >> 1


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """The tokens (B,) at which `uniform` (B,), in [0, 1), fall in the distributions of `logits`
    (B, V).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    shares, order = torch.softmax(logits.float() / temperature, dim=-1), None
    if top_p < 1:
        shares, order = shares.sort(dim=-1, descending=True, stable=True)
    # In fp64: sums in fp32 over a large vocabulary would lose the unlikely tokens.
    below = shares.double().cumsum(dim=-1)
    if order is None:
        whole = below[:, -1:]
    else:  # a token stays while those before it have not reached top_p
        whole = torch.where(below - shares < top_p, below, 0.0).amax(dim=-1, keepdim=True)
    places = torch.searchsorted(below, uniform[:, None] * whole, right=True)
    places = places.clamp_(max=logits.shape[1] - 1)
    return (places if order is None else order.gather(1, places)).squeeze(1)


class PaddedGeneration:
    """The model itself, on batches of left-padded prompts of like lengths.

    A text that has ended leaves its batch, so that a batch gets cheaper to its end. `rows` is how
    many texts are continued at once: their KV cache has to fit beside the training's tensors.
    """

    updates = True

    def __init__(self, rows: int = 64) -> None:
        if rows < 1:
            raise InputError(f"PaddedGeneration: rows is {rows}, expected at least 1")
        self.rows, self.step = rows, 0
        self.model: torch.nn.Module | None = None

    def check(self, model: torch.nn.Module) -> None:
        _base(model)

    def update(self, model: torch.nn.Module, step: int) -> None:
        self.model, self.step = model, step

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: Sequence[int],
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
        stop: frozenset[int],
    ) -> list[list[int]]:
        texts: list[list[int]] = [[]] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda one: len(prompts[one]))
        with _generating(_updated(self)) as model:
            for first in range(0, len(order), self.rows):
                part = order[first : first + self.rows]
                limits = [new_tokens[one] for one in part]
                uniforms = _uniforms([seeds[one] for one in part], limits)
                found = _continue(
                    model,
                    [prompts[one] for one in part],
                    limits,
                    uniforms,
                    temperature,
                    top_p,
                    stop,
                )
                for one, text in zip(part, found, strict=True):
                    texts[one] = text
        return texts


class ContinuousBatching:
    """The model itself, through Transformers' continuous batching (paged attention).

    Its cache is made for each call and for that call's prompts: none outlives the weights it was
    computed with. Left to itself, Transformers takes 60 % of the free memory for it and clears all
    of it, which is most of the time of a small call on a CPU.
    """

    updates = True

    def __init__(self) -> None:
        self.step = 0
        self.model: torch.nn.Module | None = None

    def check(self, model: torch.nn.Module) -> None:
        inner = _base(model)
        attention = inner.config._attn_implementation or ""
        if not ("sdpa" in attention or "eager" in attention or "flash" in attention):
            raise InputError(
                f"ContinuousBatching: the model's attention is {attention!r}, expected sdpa, eager "
                "or flash attention; PaddedGeneration takes any"
            )
        # It runs in a thread of Transformers, which the training's autocast does not reach.
        if _flash(inner) and inner.dtype not in _FLASH_DTYPES:
            raise InputError(
                f"ContinuousBatching: the model has {attention} and weights of {inner.dtype}, "
                "expected bf16 or fp16 ones; PaddedGeneration takes any"
            )

    def update(self, model: torch.nn.Module, step: int) -> None:
        self.model, self.step = model, step

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: Sequence[int],
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
        stop: frozenset[int],
    ) -> list[list[int]]:
        if not prompts:
            return []
        names = [f"text {place}" for place in range(len(prompts))]
        uniforms = dict(zip(names, _uniforms(seeds, new_tokens), strict=True))
        lengths = [len(prompt) + new for prompt, new in zip(prompts, new_tokens, strict=True)]
        ends = sorted(stop) or [-1]
        with _generating(_updated(self)) as model, _paged_attention(model), _young_garbage():
            manager = model.init_continuous_batching(
                GenerationConfig(
                    do_sample=False, max_new_tokens=max(new_tokens), eos_token_id=ends
                ),
                _paging(lengths),
            )
            manager.logit_processor = ContinuousBatchingLogitsProcessorList(
                LogitsProcessorList([_PagedDraw(uniforms, temperature, top_p)])
            )
            manager.logit_processor.tensors_required = 1
            # All are in the queue before the first pass, so that passes never depend on timing.
            for name, prompt, new in zip(names, prompts, new_tokens, strict=True):
                manager.add_request(
                    [int(token) for token in prompt], name, max_new_tokens=new, eos_token_id=ends
                )
            found: dict[str, list[int]] = {}
            try:
                manager.start()
                while len(found) < len(names):
                    result = manager.get_result(timeout=1.0)
                    if result is not None and result.is_finished():
                        found[result.request_id] = list(result.generated_tokens)
                    failed = result is not None and result.error is not None
                    if failed or (result is None and not manager.is_running()):
                        reason = result.error if result is not None else "its thread has ended"
                        raise InputError(
                            f"ContinuousBatching: {reason}, expected {len(names)} texts; "
                            "PaddedGeneration may take this model"
                        )
            finally:
                manager.stop(hard_stop=len(found) < len(names))
                manager.destroy()
        return [found[name] for name in names]


class ServerGenerator:
    """A model behind an OpenAI-compatible server.

    The server's weights are those of step 0, the ones that training starts from, unless `publish`
    is given: publish(model, step) puts the model's weights there (a file that the server loads
    again, say) and returns once they are in use. Each rank calls it. Without it, an OnPolicySampler
    has to be told by max_staleness how old they may get.
    """

    def __init__(
        self,
        server: CompletionServer,
        publish: Callable[[torch.nn.Module, int], None] | None = None,
    ) -> None:
        self.server, self.publish = server, publish
        self.step, self.updates = 0, publish is not None

    def check(self, model: torch.nn.Module) -> None:
        self.server.check()

    def update(self, model: torch.nn.Module, step: int) -> None:
        if self.publish is not None and step != self.step:
            self.publish(model, step)
            self.step = step

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: Sequence[int],
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
        stop: frozenset[int],
    ) -> list[list[int]]:
        return self.server.complete(
            [[int(token) for token in prompt] for prompt in prompts],
            new_tokens=list(new_tokens),
            temperature=temperature,
            top_p=top_p,
            seeds=list(seeds),
            stop=stop,
        )


def _updated(generator: PaddedGeneration | ContinuousBatching) -> torch.nn.Module:
    """The model that it was given."""
    if generator.model is None:
        raise InputError(
            f"{type(generator).__name__}: it has no model, expected update(model, step) before "
            "generate"
        )
    return generator.model


def _flash(inner: PreTrainedModel) -> bool:
    return "flash" in (inner.config._attn_implementation or "")


def _base(model: torch.nn.Module) -> PreTrainedModel:
    """The Transformers model inside wrappers; adapters of PEFT stay in its layers."""
    inner = unwrapped(model)
    if hasattr(inner, "get_base_model"):
        kind = inner.active_peft_config
        if kind.is_prompt_learning:
            raise InputError(
                f"OnPolicySampler: the student learns prompts ({kind.peft_type.value}), expected "
                "adapters inside its layers, such as LoRA's"
            )
        inner = inner.get_base_model()
    assert isinstance(inner, PreTrainedModel)
    return inner


@contextmanager
def _generating(model: torch.nn.Module) -> Iterator[Any]:
    """The model within wrappers, in evaluation mode (nothing is dropped, nothing recomputed);
    afterwards it and the random state, which continuous batching seeds, are as before.
    """
    inner = _base(model)
    modes = [(module, module.training) for module in inner.modules()]
    devices = [inner.device] if inner.device.type == "cuda" else []
    routers = getattr(inner.config, "output_router_logits", False)
    with torch.no_grad(), torch.random.fork_rng(devices):
        try:
            if routers:  # a mixture would make a loss of them at every token
                inner.config.output_router_logits = False
            yield inner.eval()
        finally:
            if routers:
                inner.config.output_router_logits = True
            for module, training in modes:
                module.training = training


@contextmanager
def _paged_attention(model: Any) -> Iterator[None]:
    """The model samples with the attention that it trains with: left to itself, Transformers takes
    flash attention wherever that is installed. Where its configuration has no say in that (before
    auto_switch_to_flash, see _paging), the model has to ask for the paged kind of its own.
    """
    kind = model.config._attn_implementation
    if _SWITCHES or kind.startswith("paged|"):
        yield
        return
    try:
        model.set_attn_implementation(f"paged|{kind}")
        yield
    finally:
        model.set_attn_implementation(kind)


@contextmanager
def _young_garbage() -> Iterator[None]:
    """Lets gc.collect look at new objects alone: continuous batching calls it twice when it stops,
    which costs a quarter of a second each among the objects of a training.
    """
    frozen = gc.get_freeze_count() > 0  # by someone else, who keeps it so
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def _uniforms(seeds: Sequence[int], counts: Sequence[int]) -> list[np.ndarray]:
    """For each seed so many numbers in [0, 1), fp64."""
    return [
        np.random.default_rng(seed).random(count) for seed, count in zip(seeds, counts, strict=True)
    ]


def _continue(
    model: Any,
    prompts: list[Sequence[int]],
    limits: list[int],
    uniforms: list[np.ndarray],
    temperature: float,
    top_p: float,
    stop: frozenset[int],
) -> list[list[int]]:
    """One batch of PaddedGeneration: at most `limits` tokens behind each prompt."""
    rows, width, longest = len(prompts), max(map(len, prompts)), max(limits)
    ids, mask = np.zeros((rows, width), np.int64), np.zeros((rows, width), np.int64)
    drawn = np.zeros((rows, longest))
    for row, (prompt, uniform) in enumerate(zip(prompts, uniforms, strict=True)):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
        drawn[row, : len(uniform)] = uniform

    def moved(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(model.device)

    tokens, seen, uniform, limit = moved(ids), moved(mask), moved(drawn), moved(np.array(limits))
    ends = torch.tensor(sorted(stop), dtype=torch.int64, device=model.device)
    places = (seen.cumsum(dim=1) - 1).clamp_(min=0)
    texts = torch.full((rows, longest), -1, device=model.device)
    inside = torch.arange(rows, device=model.device)  # the texts of the batch's rows
    ended = torch.zeros(rows, dtype=torch.bool, device=model.device)  # of those rows
    cache = DynamicCache(config=model.config)
    for at in range(longest):
        logits = model(
            input_ids=tokens,
            attention_mask=seen,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        new = draw(logits, uniform[inside, at], temperature, top_p)
        texts[inside, at] = torch.where(ended, -1, new)
        # The place of a text that has ended stands still: it never leaves the model's context.
        places = torch.where(ended, places[:, -1], places[:, -1] + 1)[:, None]
        ended = ended | torch.isin(new, ends) | (limit[inside] <= at + 1)
        left = rows - int(ended.sum())
        if not left:
            break
        tokens, seen = new[:, None], torch.cat([seen, seen.new_ones(rows, 1)], dim=1)
        if left <= 0.75 * rows:  # dropping a row copies the cache of the others
            (going,) = (~ended).nonzero(as_tuple=True)
            cache.batch_select_indices(going)
            inside, ended, tokens = inside[going], ended[going], tokens[going]
            seen, places, rows = seen[going], places[going], left
    return [[token for token in text if token >= 0] for text in texts.tolist()]


def _paging(lengths: list[int]) -> ContinuousBatchingConfig:
    """Paging for texts of at most so many tokens, prompts included."""
    together = min(len(lengths), 256)
    pages = sum(sorted(-(-length // _PAGE) + 1 for length in lengths)[-together:])
    settings: dict[str, Any] = {"auto_switch_to_flash": False} if _SWITCHES else {}
    return ContinuousBatchingConfig(
        num_blocks=pages,
        max_batch_tokens=max(together, 1024),
        max_requests_per_batch=together,
        use_cuda_graph=False,  # graphs would be captured anew at every call
        **settings,
    )


class _PagedDraw(ContinuousBatchingLogitsProcessor):
    """`draw` for continuous batching: leaves one finite logit, which greedy decoding then takes."""

    supported_kwargs: dict[str, type] = {}
    ignored_kwargs: tuple[str, ...] = ()

    def __init__(self, uniforms: dict[str, np.ndarray], temperature: float, top_p: float) -> None:
        self.left = {name: iter(uniform.tolist()) for name, uniform in uniforms.items()}
        self.temperature, self.top_p = temperature, top_p

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        drawn = [next(self.left[one.state.request_id], 0.0) for one in requests_with_new_token]
        # Batches carry int32: 31 bits of each number.
        return (torch.tensor(drawn, dtype=torch.float64) * 2**31).to(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        uniform = tensor_arg[: len(scores)].double() / 2**31
        tokens = draw(scores, uniform, self.temperature, self.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
