"""The checkpoints that the engines are given, and what Transformers computes with them.

Small models with random weights, pruned and quantised as slmperf does it, written as it writes
them. Whatever is read again here is read by Transformers itself (quantised: by slmperf, whose own
arithmetic the engines' is held against).
"""

from __future__ import annotations

import json
import os
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import transformers
from environments import DEVICE
from stories260k import load_stories260k
from transformers import AutoModelForCausalLM, PreTrainedModel

import slmperf.models.pruned  # noqa: F401 - Transformers knows the class then
from slmperf.models import export_for_engine, load, save, shrink
from slmperf.models.quantized import LinearScheme
from slmperf.ops import linear
from slmperf.ops.activation_spec import ActivationSpec
from slmperf.ops.weight_spec import Int4
from slmperf.quant import quantize_model
from slmperf.quant.schemes import Scheme

DATA = Path(os.environ.get("SLMPERF_DATA", Path(__file__).parents[3] / "shared/data"))
DTYPE = "float32" if DEVICE == "cpu" else "bfloat16"  # what engines compute in
TOKENS = 32  # that are generated
TOP = 5  # logprobs of the first of them
LABELS = [7, 11]  # token ids of "no" and "yes"
# Such that a GPU's kernels take them, too: heads of 64, multiples of 128.
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.06,
}
LONG = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": ("Llama", {"rope_parameters": LONG}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 12}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
}
PROMPTS = [
    torch.randint(3, 512, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    for count in (5, 17, 40)
]


class Continued(NamedTuple):
    """What a model makes of one prompt of P tokens."""

    prompt: list[int]
    tokens: list[int]  # greedy, TOKENS of them
    gaps: list[float]  # by how much each was more probable than the second, in logprob
    top: list[list]  # TOP times [token, logprob], of the first token, the most probable first
    prompt_logprobs: list[float]  # P - 1, of the prompt's own tokens behind its first


def family(name: str) -> PreTrainedModel:
    """A dense model with biases and norms that are not 0 and 1."""
    torch.manual_seed(0)
    prefix, own = FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**(SIZES | own))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.5)
            elif "norm" in key:
                parameter.uniform_(0.5, 1.5)
    return model


def uniform(name: str = "llama") -> PreTrainedModel:
    """All layers alike: half of the key/value heads, half of the neurons, others in each layer."""
    kept = [[0, 2], [1, 3], [2, 3]]
    return shrink(family(name), mlp=[range(at, 512, 2) for at in (0, 1, 0)], kv_groups=kept)


def per_layer(name: str = "llama") -> PreTrainedModel:
    """Per layer: 4 key/value heads with 2 query heads each; 2 with 2; 2 with 2 and 1, of other
    families than Llama 3 with 2, 1 and 1, which no two ranks can share."""
    uneven = [0, 1, 2] if name == "llama" else [0, 1, 2, 6]
    queries = [range(8), [0, 1, 4, 5], uneven]
    return shrink(family(name), mlp=[range(512), range(256), range(64, 448)], query_heads=queries)


def odd() -> PreTrainedModel:
    """3 query heads over 2 key/value heads, and neurons in no multiple of 128."""
    return shrink(family("llama"), mlp=[range(320)] * 3, query_heads=[[0, 1, 2]] * 3)


def quantised(model: PreTrainedModel, scheme: str, **options: object) -> PreTrainedModel:
    """Rounded to the nearest."""
    quantize_model(model, scheme, method="rtn", smooth=False, **options)
    return model


def mixed(model: PreTrainedModel) -> PreTrainedModel:
    """Another scheme in each layer, and one linear layer left as it was."""
    others = {"model.layers.0.*": "w8a8", "model.layers.2.*": "fp8", "*.2.self_attn.o_proj": None}
    return quantised(model, "w4a16", group_size=32, overrides=others)


def fp8_cache(model: PreTrainedModel) -> PreTrainedModel:
    """Keys and values in fp8, too, with calibrated scales."""
    return quantised(model, "fp8", calibration=calibration(), kv_cache=True)


def asymmetric(model: PreTrainedModel) -> PreTrainedModel:
    """Four bits, with zero points."""
    linear = LinearScheme(Int4(group_size=32, symmetric=False))
    return quantised(model, Scheme("w4a16-asymmetric", linear))


def static(model: PreTrainedModel) -> PreTrainedModel:
    """One scale for all inputs of a layer, and one for its weight."""
    return quantised(model, "fp8-static", calibration=calibration())


def blocks() -> PreTrainedModel:
    """Scales of blocks of 128 x 128, of which layers of different sizes are whole multiples."""
    queries = [range(8), [0, 1, 4, 5], range(4)]
    neurons = [range(512), range(256), range(384)]
    return quantised(shrink(family("llama"), mlp=neurons, query_heads=queries), "fp8-block")


def calibration() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 512, (4, 64), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids}]


def stories() -> PreTrainedModel:
    """The real model of 260 thousand parameters, cut to other sizes in each layer."""
    model = load_stories260k(DATA)
    queries = [range(8), [0, 1, 2, 3], [1, 4, 5, 6], [0, 2, 4, 6], [0, 1, 6, 7]]
    return shrink(model, mlp=[range(100 + 8 * layer) for layer in range(5)], query_heads=queries)


MODELS = {
    "uniform": uniform,
    "uniform-qwen3": partial(uniform, "qwen3"),
    "uniform-w8a8": lambda: quantised(uniform(), "w8a8"),
    "uniform-w4a16": lambda: quantised(uniform(), "w4a16", group_size=32),
    "uniform-fp8": lambda: quantised(uniform(), "fp8"),
    "uniform-mixed": lambda: mixed(uniform()),
    "decilm": partial(per_layer, "llama-tied"),
    "decilm-w8a8": lambda: quantised(per_layer("llama-tied"), "w8a8"),
    "exported": per_layer,
    "labels": per_layer,
    "llama": per_layer,
    "mistral": partial(per_layer, "mistral"),
    "mistral-window": partial(per_layer, "mistral-window"),
    "qwen2": partial(per_layer, "qwen2"),
    "qwen3": partial(per_layer, "qwen3"),
    "mixed": lambda: mixed(per_layer()),
    "own-mixed": lambda: mixed(per_layer()),
    "own-asymmetric": lambda: asymmetric(per_layer()),
    "own-static": lambda: static(per_layer()),
    "own-blocks": blocks,
    "odd-w8a8": lambda: quantised(odd(), "w8a8"),
    "odd-w4a16": lambda: quantised(odd(), "w4a16", group_size=32),
    "odd-fp8": lambda: quantised(odd(), "fp8"),
    "other-version": per_layer,
    "stories": stories,
    "fp8-cache": lambda: fp8_cache(per_layer()),
}
# Written by export_for_engine, and how.
EXPORTED = {
    "decilm": {"plugin": False},
    "decilm-w8a8": {"plugin": False},
    "exported": {"ranks": 2},
    "labels": {"labels": LABELS},
}
# Inputs or keys rounded to 8 bits: a sum in another order rounds some of them the other way, which
# moves logprobs by some hundredths. Where this was written it did not happen (1e-6).
ROUNDED = {
    name
    for name in MODELS
    if name.endswith(("w8a8", "fp8", "mixed", "own-static", "own-blocks", "fp8-cache"))
}


def obstacle(name: str, options: dict) -> str | None:
    """Why an engine cannot be started here on that checkpoint with these options."""
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    ranks = options.get("tp_size", options.get("tensor_parallel_size", 1))
    if DEVICE == "cuda" and ranks > gpus:
        return f"{ranks} ranks on {gpus} GPUs"
    if DEVICE == "cuda" and name == "stories":
        return "its heads of 8 fit no kernel of a GPU"
    if name == "stories" and not DATA.is_dir():
        return "no ../shared/data: real weights are not on this machine"
    return None


def write(name: str, folder: Path, engine: str) -> None:
    """The checkpoint of that name; of `EXPORTED` as that engine gets it."""
    if name in EXPORTED:
        options = {"device": DEVICE} | EXPORTED[name]
        export_for_engine(MODELS[name](), None, folder, engine=engine, **options)
    else:
        save(MODELS[name](), None, folder)
    if name == "other-version":
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))


class Checkpoint:
    """A folder that an engine reads, and what the model in it computes."""

    def __init__(self, name: str, folder: Path, engine: str) -> None:
        self.name, self.folder = name, folder
        write(name, folder, engine)

    @cached_property
    def reference(self) -> list[Continued]:
        """What the model makes of each of `PROMPTS`.

        The engines' kernels round int8 inputs to max |x| / 127; ours, as compressed-tensors has it,
        to / 127.5.
        """
        ours = self.name.startswith("own-")  # run by slmperf's product inside the engine
        lowest = ActivationSpec.lowest if ours else property(lambda spec: -spec.highest)
        # In plain torch: the kernels round as compressed-tensors does, whatever the spec says.
        product = linear if ours else partial(linear, impl="reference")
        with (
            patch.object(ActivationSpec, "lowest", lowest),
            patch("slmperf.models.quantized.linear", product),
        ):
            model = self._model()
            return [continued(model, prompt) for prompt in PROMPTS]

    def _model(self) -> PreTrainedModel:
        if self.name.startswith("decilm"):  # which neither has a class for
            return MODELS[self.name]()
        if "quantization_config" in (self.folder / "config.json").read_text():
            return load(self.folder)
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def assert_same(self, found: list[dict]) -> None:
        """What an engine made of the prompts is the reference.

        Tokens are compared up to the first that was more probable than the second by less than
        twice the tolerance. In float32 there is none such.
        """
        exact = DEVICE == "cpu" and self.name not in ROUNDED
        tolerance = 1e-4 if exact else 0.1
        for engine, ours in zip(found, self.reference, strict=True):
            near = [place for place, gap in enumerate(ours.gaps) if gap <= 2 * tolerance]
            assert not (exact and near), "a near tie: other weights are wanted"
            certain = near[0] if near else TOKENS
            assert engine["tokens"][:certain] == ours.tokens[:certain]
            assert engine["prompt_logprobs"] == pytest.approx(ours.prompt_logprobs, abs=tolerance)
            top = dict(engine["top"])
            both = {token: value for token, value in ours.top if token in top}
            assert len(both) == TOP or not exact
            assert {token: top[token] for token in both} == pytest.approx(both, abs=tolerance)


@torch.no_grad()
def continued(model: PreTrainedModel, prompt: list[int]) -> Continued:
    """By generating, and by a pass over the prompt."""
    ids = torch.tensor([prompt])
    made = model.generate(
        ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=[], pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    steps = torch.stack(made.logits).squeeze(1).float().log_softmax(-1)
    best = steps.topk(TOP).values
    values, tokens = steps[0].topk(TOP)
    own = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    return Continued(
        prompt=prompt,
        tokens=made.sequences[0, len(prompt) :].tolist(),
        gaps=(best[:, 0] - best[:, 1]).tolist(),
        top=[[token, value] for token, value in zip(tokens.tolist(), values.tolist(), strict=True)],
        prompt_logprobs=own.gather(1, ids[0, 1:, None])[:, 0].tolist(),
    )
