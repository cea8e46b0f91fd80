"""checkpoint: prune a model that does not fit into memory, from folder to folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slmperf.calibrate import BlockStream, Calibration, check_tokenizer, fingerprint
from slmperf.calibrate.usage import begin
from slmperf.calibrate.workers import check_single
from slmperf.data.text import tokenizer_beside
from slmperf.models.streaming import StreamedModel
from slmperf.models.structure import check_finite, decoder_blocks, layer_name
from slmperf.prune.block import BlockSizes
from slmperf.prune.layer.solve import Solver
from slmperf.prune.model import Mode, Progress, Pruning, check_mode
from slmperf.prune.results import PruneReport
from slmperf.prune.sources import Batches, OnePass, Source, UnprunedStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def prune_checkpoint(
    folder: str | PathLike[str],
    out: str | PathLike[str],
    calibration: Batches | Calibration,
    *,
    intermediate_size: int | Sequence[int] | None = None,
    attention_heads: int | Sequence[int] | None = None,
    key_value_heads: int | Sequence[int] | None = None,
    heads: str = "kv_group",
    mode: Mode = "sequential",
    method: str = "osscar",
    damping: float = 0.01,
    swaps: int = 0,
    source: str = "",
    tokenizer: PreTrainedTokenizerBase | None = None,
    spill: str | PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    finish: Callable[[Path, PruneReport], object] | None = None,
) -> PruneReport:
    """`prune_model` from the checkpoint in `folder` to one in `out`, a block in memory at a time.

    Beside the block (and its copy, in mode dense_target) there are the embeddings, the head and the
    hidden states of all batches, in the folder `spill` if one is given. In mode one_pass a block's
    Gram matrices are made when its turn comes, unless `calibration` holds them. The other arguments
    are those of `prune_model`; the report has no model.

    dtype: to compute and write in; None: as stored. device: where blocks are computed.
    finish: called as finish(folder, report) with the whole checkpoint's folder before it takes the
        place of `out`, to write into it what belongs beside it.

    One process only. A tokenizer of other ids than the folder's own is refused.
    `out` appears when everything is written; on an error it is as it was.
    """
    check_single("prune_checkpoint")
    start = begin(torch.device(device))
    wanted: dict[str, Any] = {
        "intermediate_size": intermediate_size,
        "attention_heads": attention_heads,
        "key_value_heads": key_value_heads,
        "heads": heads,
    }
    solver = Solver(method, damping, swaps)
    check_mode(mode, calibration)
    streamed = StreamedModel(folder, out, dtype=dtype, device=device)
    model, blocks = streamed.model, decoder_blocks(streamed.model)
    sizes = BlockSizes.of(model.config, **wanted)
    check_finite("prune_checkpoint", model, streamed=True)
    model_hash = fingerprint(model, streamed.first_rows())
    tokenized = tokenizer is not None or isinstance(calibration, Calibration)
    own = tokenizer_beside(Path(folder)) if tokenized else None
    if own is not None and tokenizer is not None:
        check_tokenizer(own, tokenizer)
    text: dict[str, Any] = {"source": source, "tokenizer": tokenizer, "spill": spill}
    made: Source
    if isinstance(calibration, Calibration):
        made = OnePass.of(
            model,
            calibration,
            sizes.all_layers(blocks),
            method,
            model_hash=model_hash,
            tokenizer=tokenizer or own,
        )
    else:
        dense = mode == "dense_target"
        stream = BlockStream(model, blocks, calibration, dense_target=dense, **text)
        stream.manifest["model"] = model_hash  # the stream sees no block before its turn
        made = UnprunedStream(stream, sizes) if mode == "one_pass" else stream

    under_way = Pruning(model, made, sizes, solver, start, torch.device(device))
    with streamed:
        for index in range(len(blocks)):
            with streamed.block(index) as block:
                check_finite("prune_checkpoint", block, layer_name(index, ""))
                under_way.prune(index, block)
            if progress is not None:
                progress(index + 1, len(blocks))
        made_in = streamed.finish()
        settings = {**wanted, "mode": mode, "method": method, "damping": damping, "swaps": swaps}
        report = replace(under_way.report(streamed.model, settings), model=None)
        if finish is not None:
            finish(made_in, report)
    return report
