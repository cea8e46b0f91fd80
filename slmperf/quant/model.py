"""quantize_model: replace the linear layers of a decoder by quantised ones, in place."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING

import torch

from slmperf.calibrate import fingerprint
from slmperf.calibrate.usage import begin
from slmperf.models.structure import check_finite, linear_blocks
from slmperf.quant.driver import Batches, Checked, Quantizing
from slmperf.quant.plan import Overrides
from slmperf.quant.results import QuantReport
from slmperf.quant.schemes import Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[int, int], object]


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel,
    scheme: str | Scheme = "w4a16",
    calibration: Batches | None = None,
    *,
    overrides: Overrides | None = None,
    method: str | None = None,
    group_size: int | None = None,
    damping: float | None = None,
    smooth: bool | None = None,
    kv_cache: bool = False,
    held_out: Batches | None = None,
    source: str = "",
    tokenizer: PreTrainedTokenizerBase | None = None,
    spill: str | PathLike[str] | None = None,
    resume: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> QuantReport:
    """Quantise the linear layers of all decoder blocks; embeddings, norms and output head stay.

    model: any Llama-like one, also with layers of different sizes; changed in place, in evaluation
        mode afterwards. Its config gets the `quantization_config` with which `slmperf.models.save`
        writes a checkpoint that Transformers and the serving engines read as it is; of a model
        whose layers differ, `slmperf.models.load`.
    scheme: one of `SCHEMES` by name, or a `Scheme` of one's own.
    calibration: batches of the model's arguments (input_ids (B, T), attention_mask (B, T), ...),
        each optionally with `token_weights` (B, T) >= 0; padding does not count. Text of the domain
        that the model serves, at least 16 tokens for every input of the widest layer: with fewer
        the held-out error rises (with 4, to 1.03 times GPTQ's; measured on a flat spectrum). None:
        for method rtn, with a scheme whose inputs have no fixed scales; nothing is smoothed then.
    overrides: other schemes, or None to leave a layer as it is, by shell patterns of full names
        ("*.down_proj", "model.layers.0.*"); in the order given, the last that matches decides. q, k
        and v of a block, and gate and up, are run as one by engines and must agree.
    method: one of `METHODS` for all layers; None: what the scheme says.
    group_size: in the place of 128, for schemes with groups; -1: one scale per output channel.
    damping: see `quantize_weight`; not where all layers are rounded to nearest.
    smooth: None: as the scheme says (w8a8: yes), and not again where the model was smoothed before.
    kv_cache: fp8 keys and values, with calibrated scales.
    held_out: batches on which every layer's error is measured, too; each block runs over them once
        more for each of its units (q|k|v, o, gate|up, down).
    source, tokenizer: of the text, for the report: "in-domain: FILE" or "generic: FILE", and what
        made its ids.
    spill: a folder; hidden states and Gram matrices live in memory-mapped files there.
    resume: a folder that every finished decoder block is written to: a kill costs at most the work
        on one block. A run that is started again with the same folder and arguments, on the same
        kind of device and with the same versions of torch and slmperf, goes on behind the last of
        them, to the same bytes. The caller deletes it when the model is saved.
    progress: called as progress(blocks done, blocks) after each block.

    Weights of which 5% or more are exactly 0 keep their zeros. A layer whose method fails or whose
    inputs are not finite somewhere is rounded to nearest and not smoothed; fixed scales, of its
    inputs or of keys and values, are then those of the finite values, 1 where there are none. The
    layer's row in the report says so.

    In memory are the model, the Gram matrices of one block's four units and one more of held-out
    text; smoothing adds a copy of the block in fp32.

    Raises InputError, before anything changes, for what does not go together: a quantised model, a
    mixture of experts, weights that are not finite, patterns that match nothing or part what is run
    as one, different schemes of one name, groups that do not divide a layer's inputs, no text where
    it is wanted or text without tokens, a model that cannot be smoothed, a folder `resume` of other
    arguments; when it comes to it, for a block in that folder that was made of other weights.
    """
    start = begin(model.device)
    checked = Checked.of(
        model,
        scheme,
        calibrated=calibration is not None,
        overrides=overrides,
        method=method,
        group_size=group_size,
        damping=damping,
        smooth=smooth,
        kv_cache=kv_cache,
    )
    check_finite("quantize_model", model)
    model.eval()
    blocks = linear_blocks(model)
    under_way = Quantizing(
        model,
        blocks,
        checked,
        calibration=calibration,
        held_out=held_out,
        source=source,
        tokenizer=tokenizer,
        spill=spill,
        resume=resume,
        model_hash=fingerprint(model),
        device=next(model.parameters()).device,
        start=start,
    )
    for index, block in enumerate(blocks):
        under_way.quantize(index, block)
        if progress is not None:
            progress(index + 1, len(blocks))
    return under_way.finish()
