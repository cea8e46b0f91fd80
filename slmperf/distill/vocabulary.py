"""Whether a token is the same to teacher and student, before anything is trained.

One tokenizer may stand before vocabularies of different sizes: Qwen2.5's models have 151936 or
152064 rows, all of them more than its tokenizer has tokens. Where the tokenizers are known to be
the same, the rows beyond the smaller size are padding that no text uses, and
slmperf.distill.heads.same_vocabulary leaves them out of the loss.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from slmperf.check import InputError
from slmperf.distill.cache import TeacherCache, hash_of_tokenizer
from slmperf.distill.heads import unwrapped

if TYPE_CHECKING:
    from slmperf.distill.packing import PackedBatches


def config_of(model: torch.nn.Module) -> Any:
    """The configuration of the language model, also of one that reads pictures too."""
    return unwrapped(model).config.get_text_config(decoder=True)


def check_model(
    model: torch.nn.Module, student: torch.nn.Module, batches: PackedBatches, processing_class: Any
) -> None:
    """InputError where the tokenizer beside the teacher's weights has other tokens, or sizes differ
    and it is not known to have the same. Nothing is asked over the network.

    Ids decide, not all that makes a tokenizer: a padding token that was added, or another template,
    leaves what the teacher says of a token as it is.
    """
    config, largest = unwrapped(model).config, None
    name = str(getattr(config, "_name_or_path", "") or "")
    wanted, where = _vocabulary(processing_class), name or "the teacher, which was not loaded,"
    found = _beside(name, getattr(config, "_commit_hash", None)) if wanted and name else {}
    if wanted and found:
        theirs = {number: token for token, number in found.items()}
        for token, number in sorted(wanted.items(), key=lambda entry: entry[1]):
            if theirs.get(number, token) != token:
                raise InputError(
                    f"train: the teacher in {name} has another tokenizer: its token {number} is "
                    f"{theirs[number]!r}, expected processing_class's {token!r}"
                )
        largest = max(*wanted.values(), *found.values())
    size = config_of(model).vocab_size
    missing = f"a tokenizer beside {where} that is the same"
    _check_sizes("the teacher", size, student, batches, largest, missing)
    if wanted and largest is None:
        warnings.warn(f"train: found no tokenizer beside {where}: not compared", stacklevel=2)


def check_cache(
    cache: TeacherCache, student: torch.nn.Module, batches: PackedBatches, processing_class: Any
) -> None:
    """The same of a cache, which keeps the hash of the tokenizer it was written with."""
    where, largest = f"the cache {cache.folder}", None
    wanted, found = _vocabulary(processing_class), cache.manifest.get("tokenizer")
    if wanted and found is not None:
        own = hash_of_tokenizer(_tokenizer(processing_class))
        if found != own:
            raise InputError(
                f"train: {where} was written with the tokenizer {found:.12}..., expected "
                f"processing_class's {own:.12}..."
            )
        largest = max(wanted.values())
    missing = "a cache that was written with its tokenizer_hash"
    _check_sizes(where, cache.vocabulary, student, batches, largest, missing)
    if wanted and largest is None:
        warnings.warn(f"train: {where} has no hash of a tokenizer: not compared", stacklevel=2)


def _check_sizes(
    where: str,
    found: int,
    student: torch.nn.Module,
    batches: PackedBatches,
    largest: int | None,
    missing: str,
) -> None:
    """InputError for a size that is not the student's, unless all tokens are below both.

    largest  id of tokenizers that are known to agree, None where that is not known
    missing  what else would make it known
    """
    wanted = config_of(student).vocab_size
    if found == wanted:
        return
    told, least = f"train: {where} has a vocabulary of {found}", min(found, wanted)
    if largest is None:
        raise InputError(
            f"{told}, expected the student's {wanted}, or to know that both have one tokenizer: "
            f"processing_class, and {missing}"
        )
    largest = max(largest, int(batches.ids.max()))
    if largest >= least:
        raise InputError(
            f"{told} and the student of {wanted}, expected every token below both, found {largest}"
        )


def _tokenizer(processing_class: Any) -> Any:
    """The tokenizer itself, also inside a processor of text and pictures."""
    return getattr(processing_class, "tokenizer", processing_class)


def _vocabulary(processing_class: Any) -> dict[str, int]:
    """Token -> id; empty where nothing was given that has tokens."""
    vocabulary = getattr(_tokenizer(processing_class), "get_vocab", None)
    return {} if vocabulary is None else vocabulary()


def _beside(name: str, revision: str | None) -> dict[str, int]:
    """Token -> id of the tokenizer in a folder, or in the hub's cache on this machine; empty where
    there is none that can be read as it is.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", local_files_only=True, trust_remote_code=False
        )
        vocabulary = found.get_vocab()
        special = {*found.all_special_tokens, *found.get_added_vocab()}
    except Exception:  # none, or one whose package is not here, or whose code would have to run
        return {}
    # Where the files are missing Transformers makes a blank one for some models, with its special
    # tokens, and at most a mark of a word's beginning.
    return vocabulary if len(vocabulary.keys() - special) > 1 else {}
