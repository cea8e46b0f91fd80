"""What a training asks of its teacher, whatever that is, and the three that there are.

    ModelTeacher    a model beside the student: exact, at any text
    CachedTeacher   what a model said before, from disk: exact (hidden states) or its k likeliest
                    tokens, at the texts it was cached at alone
    ServerTeacher   a model behind an OpenAI-compatible server: its k likeliest tokens, at any text

All give the same rows of a batch (slmperf.distill.packing), without a graph, so that the loss knows
no difference. What can be known to be wrong is refused by `check`, before anything is trained.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.distill.cache import TeacherCache
from slmperf.distill.heads import teacher_head, unwrapped
from slmperf.distill.packing import inputs_of
from slmperf.distill.server import CompletionServer, TopTokens
from slmperf.distill.vocabulary import check_cache, check_model, config_of
from slmperf.ops import TeacherHead, TeacherTopK
from slmperf.ops.divergence import code_of
from slmperf.ops.kd_loss.heads import TAILS
from slmperf.ops.kd_loss.heads import Teacher as TeacherRows

if TYPE_CHECKING:
    from slmperf.distill.packing import PackedBatches

_AT_ONCE = 4096  # examples whose tokens are compared with a cache's in one call
_PROBE = 16  # tokens that a server is asked about before training


class Teacher(Protocol):
    """What a training wants to know at every batch.

    any_text    whether it knows what comes after any text, or after some that were given before
    vocabulary  V of rows that do not say it themselves (TeacherTopK); None: the student's
    """

    @property
    def any_text(self) -> bool: ...

    @property
    def vocabulary(self) -> int | None: ...

    def check(
        self, student: torch.nn.Module, batches: PackedBatches, processing_class: Any
    ) -> None:
        """InputError for whatever would otherwise show in the middle of the training.

        processing_class: the tokenizer of the examples, or None where it is not known.
        """
        ...

    def to(self, device: torch.device | str) -> None:
        """Move there what is needed at every batch."""
        ...

    def of(self, batches: PackedBatches) -> Teacher | None:
        """The teacher of another data set, for evaluation; None where it does not know it."""
        ...

    def rows(self, batch: Mapping[str, Tensor]) -> TeacherRows:
        """What it expects at the batch's n positions, on the batch's device."""
        ...


class ModelTeacher:
    """A causal language model of Transformers, evaluated in its own dtype or the caller's autocast.

    It is put into eval() and otherwise left as it is.
    """

    vocabulary: ClassVar[None] = None

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.any_text = True

    def check(
        self, student: torch.nn.Module, batches: PackedBatches, processing_class: Any
    ) -> None:
        """InputError for other tokens than the student's, or fewer positions than a row has."""
        own = unwrapped(self.model)
        if own is unwrapped(student):
            raise InputError(
                "train: the teacher is the student itself, expected another model; a copy "
                "(copy.deepcopy) for one that learns from itself"
            )
        config, context = config_of(own), batches.config.context
        known = getattr(config, "max_position_embeddings", None) or context
        if known < context:
            raise InputError(
                f"train: the teacher knows {known} positions, expected at least context = {context}"
            )
        check_model(own, student, batches, processing_class)
        # Of a larger vocabulary the student may draw what this model cannot read.
        self.any_text = config_of(student).vocab_size <= config.vocab_size

    def to(self, device: torch.device | str) -> None:
        self.model.to(device).eval()

    def of(self, batches: PackedBatches) -> ModelTeacher:
        return self

    def rows(self, batch: Mapping[str, Tensor]) -> TeacherHead:
        return teacher_head(self.model, inputs_of(batch), positions=batch["positions"])


class CachedTeacher:
    """A teacher's cache, read at the examples of one data set by their keys.

    cache  of hidden states or of the k likeliest tokens
    tail   what stands for the other tokens, see TeacherTopK; hidden states have none
    """

    any_text: ClassVar[bool] = False

    def __init__(self, cache: TeacherCache, tail: str = "renormalise") -> None:
        _check_tail("CachedTeacher", tail)
        self.cache, self.tail, self.vocabulary = cache, tail, cache.vocabulary
        self._tokens = cache.vocabulary  # those that the student has too
        self._batches: PackedBatches | None = None
        self._others: weakref.WeakKeyDictionary[PackedBatches, CachedTeacher | None]
        self._others = weakref.WeakKeyDictionary()

    def check(
        self, student: torch.nn.Module, batches: PackedBatches, processing_class: Any
    ) -> None:
        """InputError for another vocabulary or tokenizer, an example that the cache has not or has
        of other tokens, a position of the first batch that it has not, and a tail that the
        divergence cannot take. From here on rows are those of `batches`.
        """
        check_cache(self.cache, student, batches, processing_class)
        self._tokens = min(self.vocabulary, config_of(student).vocab_size)
        if self.cache.kind == "top_k":
            _check_loss(batches, self.tail)
        self._bind(batches)

    def to(self, device: torch.device | str) -> None:
        if self.cache.kind == "hidden":
            self.cache.head(device)

    def of(self, batches: PackedBatches) -> CachedTeacher | None:
        if batches is self._batches:
            return self
        if batches not in self._others:
            other = CachedTeacher(self.cache, self.tail)
            other._tokens = self._tokens
            try:
                other._bind(batches)
            except InputError:
                self._others[batches] = None
            else:
                self._others[batches] = other
        return self._others[batches]

    def rows(self, batch: Mapping[str, Tensor]) -> TeacherHead | TeacherTopK:
        assert self._batches is not None, "check first: it says which data set rows are of"
        examples, found = batch["examples"].cpu().numpy(), _Texts(batch)
        if (examples < 0).any():
            raise InputError(
                "train: the student's own text with a cached teacher, expected the examples it "
                "was cached at; a model or a server reads any text"
            )
        rows = self.cache.rows(
            [self._batches.key(int(example)) for example in examples[found.examples]],
            counts=found.counts,
            positions=batch["places"],
            tokens=found.tokens,
        )
        if rows.indices is not None and self._tokens < self.vocabulary:
            largest = int(rows.indices.max()) if len(rows.indices) else 0
            if largest >= self._tokens:
                raise InputError(
                    f"train: the cache {self.cache.folder} expects the token {largest}, expected "
                    f"ids below the student's vocabulary of {self._tokens}; hidden states, or a "
                    "smaller k, leave such padding out"
                )
        return self.cache.teacher(rows, device=batch["positions"].device, tail=self.tail)

    def _bind(self, batches: PackedBatches) -> None:
        """Compare keys and tokens of all examples, and the positions of a first batch's; from here
        on rows are those of `batches`.
        """
        nothing = torch.empty(0, dtype=torch.int64)
        for first in range(0, len(batches.used), _AT_ONCE):
            chosen = batches.used[first : first + _AT_ONCE].tolist()
            self.cache.rows(
                [batches.key(example) for example in chosen],
                counts=[0] * len(chosen),
                positions=nothing,
                tokens=[batches.tokens(example) for example in chosen],
            )
        self._batches, batch = batches, batches[0]
        if batches.once:  # evaluation asks for its answers alone
            kept, counts = batch["answer"], batch["counts"]
            owner = torch.arange(len(counts)).repeat_interleave(counts)
            batch = batch | {name: batch[name][kept] for name in ("positions", "places")}
            batch["counts"] = owner[kept].bincount(minlength=len(counts))
        self.rows(batch)


class ServerTeacher:
    """The k likeliest tokens that a model behind a server expects; see CompletionServer.

    top_k         k; servers allow 20 unless they were told otherwise (vLLM's --max-logprobs)
    tail          what stands for the other tokens, see TeacherTopK
    remember_mib  answers that are kept, so that a later epoch need not ask again; the oldest go
    """

    any_text: ClassVar[bool] = True
    vocabulary: ClassVar[None] = None

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        top_k: int = 20,
        tail: str = "renormalise",
        api_key: str | None = None,
        parallel: int = 8,
        timeout_s: float = 120.0,
        retries: int = 2,
        remember_mib: float = 256.0,
    ) -> None:
        _check_tail("ServerTeacher", tail)
        if top_k < 1:
            raise InputError(f"ServerTeacher: top_k is {top_k}, expected at least 1")
        self.server = CompletionServer(
            url, model, api_key=api_key, parallel=parallel, timeout_s=timeout_s, retries=retries
        )
        self.top_k, self.tail = top_k, tail
        self._room = round(remember_mib * 2**20)  # bytes
        self._known: dict[bytes, TopTokens] = {}  # oldest first
        self._students: int | None = None  # the size of its vocabulary

    def check(
        self, student: torch.nn.Module, batches: PackedBatches, processing_class: Any
    ) -> None:
        """InputError for a server that cannot be reached, has not the model, tells no
        log-probabilities of a prompt, or k of them, or reads shorter texts; for tokens that the
        student has not, and a tail that the divergence cannot take.
        """
        self._students = config_of(student).vocab_size
        if self.top_k > self._students:
            raise InputError(
                f"ServerTeacher: top_k is {self.top_k}, expected at most the student's vocabulary "
                f"of {self._students}"
            )
        _check_loss(batches, self.tail)
        self.server.check()
        longest = int(batches.lengths[batches.used].max())
        if self.server.context is not None and longest >= self.server.context:
            raise InputError(
                f"server {self.server.url}: reads {self.server.context} tokens at most, one of "
                f"them its own, expected {longest} + 1 for the longest example"
            )
        self._ask([batches.tokens(int(batches.used[0]))[:_PROBE]])

    def to(self, device: torch.device | str) -> None:
        """Nothing: rows go to the batch's device."""

    def of(self, batches: PackedBatches) -> ServerTeacher:
        return self

    def rows(self, batch: Mapping[str, Tensor]) -> TeacherTopK:
        device, texts = batch["positions"].device, _Texts(batch)
        size = len(texts.places)
        indices = torch.empty(size, self.top_k, dtype=torch.int64)
        log_probs = torch.empty(size, self.top_k)
        begin = 0
        for count, found in zip(texts.counts, self._ask(texts.tokens), strict=True):
            part = slice(begin, begin := begin + count)
            at = torch.from_numpy(texts.places[part])
            indices[part], log_probs[part] = found.indices[at], found.log_probs[at]
        return TeacherTopK(indices.to(device), log_probs.to(device), self.tail)

    def _ask(self, texts: list[np.ndarray]) -> list[TopTokens]:
        """Of each text, remembered or from the server."""
        names = [text.tobytes() for text in texts]
        found = {name: self._known[name] for name in names if name in self._known}
        new = {name: text for name, text in zip(names, texts, strict=True) if name not in found}
        answers = self.server.prompt_logprobs([text.tolist() for text in new.values()], self.top_k)
        for name, answer in zip(new, answers, strict=True):
            largest = int(answer.indices.max()) if answer.indices.numel() else 0
            if self._students is not None and largest >= self._students:
                raise InputError(
                    f"server {self.server.url}: expects the token {largest}, expected ids below "
                    f"the student's vocabulary of {self._students}"
                )
            found[name] = answer
            self._known[name] = answer
            self._room -= _bytes(name, answer)
        while self._room < 0:
            oldest = next(iter(self._known))
            self._room += _bytes(oldest, self._known.pop(oldest))
        return [found[name] for name in names]


class _Texts:
    """The texts of a batch that have a position in the loss, on the host.

    examples  (S',) places in the batch's examples
    counts    S' numbers of positions
    places    (n,) of the positions within their texts
    tokens    S' arrays of ids, whole texts
    """

    def __init__(self, batch: Mapping[str, Tensor]) -> None:
        names = ("counts", "positions", "places", "lengths", "input_ids")
        counts, positions, self.places, lengths, ids = (batch[one].cpu().numpy() for one in names)
        (self.examples,) = counts.nonzero()
        counts = counts[self.examples]
        first = counts.cumsum() - counts
        starts = positions[first] - self.places[first]
        flat = ids.reshape(-1)
        self.counts: list[int] = counts.tolist()
        self.tokens = [
            flat[start : start + length]
            for start, length in zip(starts, lengths[self.examples], strict=True)
        ]


def as_teacher(given: Any) -> Teacher | None:
    """The teacher that a model, a cache or a server is; None stays None (training without one)."""
    if given is None:
        return None
    if isinstance(given, torch.nn.Module):
        return ModelTeacher(given)
    if isinstance(given, TeacherCache):
        return CachedTeacher(given)
    if isinstance(given, CompletionServer) or not hasattr(given, "rows"):
        raise InputError(
            f"train: teacher is a {type(given).__name__}, expected a model, a TeacherCache, a "
            "ServerTeacher, or None"
        )
    return given


def _bytes(name: bytes, answer: TopTokens) -> int:
    return len(name) + answer.indices.nbytes + answer.log_probs.nbytes


def _check_tail(name: str, tail: str) -> None:
    if tail not in TAILS:
        raise InputError(f"{name}: tail is {tail!r}, expected {' or '.join(TAILS)}")


def _check_loss(batches: PackedBatches, tail: str) -> None:
    """What kd_loss would say of the tail at the first step."""
    # As the kernels call it: jsd at its ends and a skew of 0 are other divergences.
    divergence, temperature = code_of(batches.config.kind)[0], batches.config.temperature
    told = f"train: the teacher's tail is {tail!r}, expected"
    if divergence == "reverse_kl" and tail != "bucket":
        raise InputError(
            f"{told} 'bucket' for reverse_kl, which is infinite where the teacher gives nothing"
        )
    if divergence != "forward_kl" and tail == "zero":
        raise InputError(f"{told} 'renormalise' or 'bucket' for {divergence}")
    if temperature != 1.0 and tail != "renormalise":
        raise InputError(
            f"{told} 'renormalise' at temperature {temperature}: the tail is known at 1 alone"
        )
