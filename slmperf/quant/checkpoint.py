"""checkpoint: quantise a model that does not fit into memory, from folder to folder."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slmperf.calibrate import check_tokenizer, fingerprint
from slmperf.calibrate.usage import begin
from slmperf.calibrate.workers import check_single
from slmperf.data.text import tokenizer_beside
from slmperf.models.streaming import StreamedModel
from slmperf.models.structure import check_finite, layer_name
from slmperf.quant.driver import Batches, Checked, Quantizing
from slmperf.quant.model import Progress
from slmperf.quant.plan import Overrides
from slmperf.quant.results import QuantReport
from slmperf.quant.schemes import Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def quantize_checkpoint(
    folder: str | PathLike[str],
    out: str | PathLike[str],
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
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    finish: Callable[[Path, QuantReport], object] | None = None,
) -> QuantReport:
    """`quantize_model` from a checkpoint's folder to the folder `out`, a block in memory at a time.

    Beside the block there are the embeddings, the head and the hidden states of the text, in the
    folder `spill` if one is given. The other arguments are those of `quantize_model`.

    dtype: to compute and write in; None: as stored. device: where blocks are computed.
    finish: called as finish(folder, report) with the whole checkpoint's folder before it takes the
        place of `out`, to write into it what belongs beside it.

    One process only. A tokenizer of other ids than the folder's own is refused, and weights that
    are not finite where their block is read.
    `out` appears when everything is written; on an error it is as it was.
    """
    check_single("quantize_checkpoint")
    device = torch.device(device)
    start = begin(device)
    streamed = StreamedModel(folder, out, dtype=dtype, device=device)
    model = streamed.model
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
    check_finite("quantize_checkpoint", model, streamed=True)
    own = tokenizer_beside(Path(folder)) if tokenizer is not None else None
    if own is not None and tokenizer is not None:
        check_tokenizer(own, tokenizer)
    under_way = Quantizing(
        model,
        streamed.blocks,
        checked,
        calibration=calibration,
        held_out=held_out,
        source=source,
        tokenizer=tokenizer,
        spill=spill,
        resume=resume,
        model_hash=fingerprint(model, streamed.first_rows()),
        device=device,
        start=start,
    )
    with streamed:
        for index in range(len(streamed.blocks)):
            with streamed.block(index) as block:
                check_finite("quantize_checkpoint", block, layer_name(index, ""))
                under_way.quantize(index, block)
            if progress is not None:
                progress(index + 1, len(streamed.blocks))
        report = under_way.finish()
        made_in = streamed.finish()
        if finish is not None:
            finish(made_in, report)
    return report
