"""Which steps of a training learn from the student's own text, and the batches made of it.

Whether all batches of a step are own text is drawn from (seed, step), and each text from (seed,
step, example): neither ranks nor accumulation nor a resumed run change that. The prompts are those
of the examples that the batch would have held, each up to its first answer; the generated tokens
are the answer, the stop token among them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slmperf.check import InputError
from slmperf.distill.heads import unwrapped
from slmperf.distill.on_policy.generators import (
    Generator,
    default_generator,
    stop_tokens,
    text_seed,
)
from slmperf.distill.packing import Batch, PackedBatches


class _Text(NamedTuple):
    """The generated tokens of one batch, one list for each of its examples."""

    step: int  # of the weights that wrote it
    completions: list[list[int]]


class OnPolicySampler:
    """Puts the student's own text in the place of a share of a training's batches.

    fraction       0 to 1, the expected share of batches; those of one step go together
    new_tokens     generated after a prompt, at most; fewer where the context is full before
    temperature    divides the logits; 0: the likeliest token (nothing is drawn)
    top_p          of the likeliest tokens, those that first reach this probability together
    generator      what writes; None: the model itself, see default_generator
    refresh_steps  steps between two refreshes of the generator's weights. The text of all those
                   steps is then written at once: larger batches, somewhat older text
    max_staleness  how many steps older than the model the weights may be that wrote a text; a text
                   beyond is an InputError, before training starts where that can be told. None:
                   refresh_steps - 1. A generator that keeps the weights of step 0 (a server without
                   `publish`) needs a number: that of the training's steps allows such text to its
                   end
    stop           token ids that end a text; None: those of stop_tokens

    On several ranks each generates its own batches, and `logs` is of that rank.
    """

    def __init__(
        self,
        fraction: float,
        new_tokens: int = 300,
        temperature: float = 0.9,
        top_p: float = 1.0,
        *,
        generator: Generator | None = None,
        refresh_steps: int = 1,
        max_staleness: int | None = None,
        seed: int = 0,
        stop: Sequence[int] | None = None,
    ) -> None:
        def check(name: str, value: Any, fits: bool, wanted: str) -> None:
            if not fits:
                raise InputError(f"OnPolicySampler: {name} is {value!r}, expected {wanted}")

        check("fraction", fraction, 0 <= fraction <= 1, "0 to 1")
        check("temperature", temperature, 0 <= temperature < float("inf"), "at least 0")
        check("top_p", top_p, 0 < top_p <= 1, "more than 0 and at most 1")
        for name, value, least in (
            ("new_tokens", new_tokens, 1),
            ("refresh_steps", refresh_steps, 1),
            ("max_staleness", max_staleness, 0),
            ("seed", seed, 0),
        ):
            whole = value is None or (type(value) is int and value >= least)
            check(name, value, whole, f"a whole number of at least {least}")
        if max_staleness is not None and refresh_steps - 1 > max_staleness:
            raise InputError(
                f"OnPolicySampler: refresh_steps is {refresh_steps}, which makes text "
                f"{refresh_steps - 1} steps old, expected at most max_staleness = {max_staleness}"
            )
        if stop is not None:
            fits = all(type(token) is int and token >= 0 for token in stop)
            check("stop", stop, fits, "token ids")
        self.fraction, self.new_tokens = fraction, new_tokens
        self.temperature, self.top_p = temperature, top_p
        self.generator = generator
        self.refresh_steps, self.max_staleness = refresh_steps, max_staleness
        self._oldest = refresh_steps - 1 if max_staleness is None else max_staleness
        self.seed, self.stop = seed, None if stop is None else frozenset(stop)
        self._default: Generator | None = None  # what writes where no generator is given
        self._ahead: dict[int, _Text] = {}  # by batch number: written and not yet used
        self._forget()

    def settings(self) -> dict[str, Any]:
        """What a resumed run must find unchanged, as JSON values."""
        return {
            "fraction": self.fraction,
            "new_tokens": self.new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "refresh_steps": self.refresh_steps,
            "seed": self.seed,
            "stop": None if self.stop is None else sorted(self.stop),
            "generator": None if self.generator is None else type(self.generator).__name__,
        }

    def check(self, batches: PackedBatches, model: torch.nn.Module) -> None:
        """Begin a training of `model`: InputError for what would stop it later."""
        self._ahead, self._default = {}, None
        self._forget()
        if self.fraction == 0:
            return
        # The model may be moved to another device before it writes: nothing is settled here.
        generator = self.generator or default_generator(model)
        last = batches.steps - 1
        if not generator.updates and (self.max_staleness is None or last > self._oldest):
            allowed = "a max_staleness that says so"
            if self.max_staleness is not None:
                allowed = f"at most max_staleness = {self.max_staleness}"
            raise InputError(
                f"OnPolicySampler: {type(generator).__name__} keeps the weights of step 0, which "
                f"are {last} steps old at the last step, expected {allowed}"
            )
        vocabulary = _vocabulary(model)
        beyond = sorted(token for token in self._stop(model) if token >= vocabulary)
        if beyond:
            raise InputError(
                f"OnPolicySampler: stop holds token {beyond[0]}, expected ids below {vocabulary}, "
                "the model's vocabulary"
            )
        context = batches.config.context
        for index in range(len(batches.lengths)):
            length = len(batches.prompt(index))
            if not 1 <= length < context:
                raise InputError(
                    f"OnPolicySampler: the prompt of example {index} has {length} tokens, expected "
                    f"1 to {context - 1}, so that one more fits into context = {context}"
                )
        generator.check(model)

    def chosen(self, step: int) -> bool:
        """Whether the batches of a step are the student's own text."""
        return bool(np.random.default_rng([self.seed, step]).random() < self.fraction)

    def replace(
        self, batch: Batch, batches: PackedBatches, model: torch.nn.Module, step: int
    ) -> Batch:
        """The batch of `batches` itself, or one of the same number with the student's text.

        Examples after which nothing was generated (only a server may answer so) are left out; a
        batch of nothing else stays as it is.
        """
        number = int(batch["number"])
        self._batches += 1
        # In a step that is not chosen too: the weights that write are those of the refresh.
        missing = self._missing(number, batches, step)
        if missing:
            self._write(missing, batches, model, step)
        if number not in self._ahead:
            return batch
        text = self._ahead.pop(number)
        stale = step - text.step
        if stale > self._oldest:
            raise InputError(
                f"OnPolicySampler: the text for step {step} was written with weights {stale} steps "
                f"old, expected at most max_staleness = {self._oldest}"
            )
        made = []
        for index, completion in zip(batch["examples"].tolist(), text.completions, strict=True):
            if completion:
                prompt = batches.prompt(index)
                ids = np.concatenate([prompt, np.array(completion, np.int64)])
                made.append({"input_ids": ids, "answer": np.arange(len(ids)) >= len(prompt)})
        if not made:
            return batch
        self._replaced += 1
        self._ages.append(stale)
        return batches.collate(made, number)

    def logs(self) -> dict[str, float]:
        """Of what happened since the last call: empty where nothing did."""
        if not self._batches:
            return {}
        found = {"on_policy_share": self._replaced / self._batches}
        if self._texts:
            found["on_policy_tokens"] = float(self._tokens)
            found["on_policy_tokens_per_second"] = self._tokens / max(self._seconds, 1e-9)
            found["on_policy_length"] = self._tokens / self._texts
            found["on_policy_stopped"] = self._stopped / self._texts
            found["on_policy_empty"] = self._empty / self._texts
        if self._ages:
            found["on_policy_staleness_mean"] = sum(self._ages) / len(self._ages)
            found["on_policy_staleness_max"] = float(max(self._ages))
        self._forget()
        return found

    def state(self) -> dict[str, Tensor]:
        """Text written and not yet used, int64: nothing unless refresh_steps is more than 1.

        numbers, steps, counts of each batch; lengths of each completion; tokens, one after the
        other. The states of several ranks are joined with torch.cat, name by name.
        """
        texts = list(self._ahead.values())
        completions = [one for text in texts for one in text.completions]
        values = {
            "numbers": list(self._ahead),
            "steps": [text.step for text in texts],
            "counts": [len(text.completions) for text in texts],
            "lengths": [len(one) for one in completions],
            "tokens": [token for one in completions for token in one],
        }
        return {name: torch.tensor(value, dtype=torch.int64) for name, value in values.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` gave, of this rank or of all."""
        values = {name: value.tolist() for name, value in state.items()}
        tokens, lengths = iter(values["tokens"]), iter(values["lengths"])
        self._ahead = {}
        for number, step, count in zip(
            values["numbers"], values["steps"], values["counts"], strict=True
        ):
            completions = [[next(tokens) for _ in range(next(lengths))] for _ in range(count)]
            self._ahead[number] = _Text(step, completions)

    def _forget(self) -> None:
        """Begin to count anew."""
        self._batches = self._replaced = 0
        self._texts = self._tokens = self._stopped = self._empty = 0
        self._seconds = 0.0
        self._ages: list[int] = []

    def _generator(self, model: torch.nn.Module) -> Generator:
        if self.generator is not None:
            return self.generator
        if self._default is None:
            self._default = default_generator(model)
        return self._default

    def _stop(self, model: torch.nn.Module) -> frozenset[int]:
        return stop_tokens(model) if self.stop is None else self.stop

    def _missing(self, number: int, batches: PackedBatches, step: int) -> list[int]:
        """This rank's batches of chosen steps, from `number` to the next refresh, that have no text
        yet.
        """
        per_step = len(batches) // batches.steps  # of all ranks
        ranks = per_step // batches.config.gradient_accumulation_steps
        refresh = min((step // self.refresh_steps + 1) * self.refresh_steps, batches.steps)
        numbers = range(number, refresh * per_step, ranks)
        return [one for one in numbers if one not in self._ahead and self.chosen(one // per_step)]

    def _write(
        self, numbers: list[int], batches: PackedBatches, model: torch.nn.Module, step: int
    ) -> None:
        """Generate for these batches, with the weights of this step."""
        generator, stop = self._generator(model), self._stop(model)
        prompts, room, seeds, counts = [], [], [], []
        per_step = len(batches) // batches.steps
        for one in numbers:
            examples = batches.examples_of(one).tolist()
            counts.append(len(examples))
            for index in examples:
                prompt = batches.prompt(index)
                prompts.append(prompt.tolist())
                room.append(min(self.new_tokens, batches.config.context - len(prompt)))
                seeds.append(text_seed(self.seed, one // per_step, index))
        begin = time.perf_counter()
        generator.update(model, step)
        found = generator.generate(
            prompts,
            new_tokens=room,
            temperature=self.temperature,
            top_p=self.top_p,
            seeds=seeds,
            stop=stop,
        )
        self._seconds += time.perf_counter() - begin
        vocabulary = _vocabulary(model)
        texts = [
            self._checked(text, most, stop, vocabulary)
            for text, most in zip(found, room, strict=True)
        ]
        first = 0
        for one, count in zip(numbers, counts, strict=True):
            self._ahead[one] = _Text(generator.step, texts[first : first + count])
            first += count

    def _checked(
        self, text: list[int], most: int, stop: frozenset[int], vocabulary: int
    ) -> list[int]:
        """A completion up to its stop token, counted; InputError for unknown tokens."""
        text = text[:most]
        ends = [at for at, token in enumerate(text) if token in stop]
        if ends:
            text = text[: ends[0] + 1]
        if text and not 0 <= min(text) <= max(text) < vocabulary:
            wrong = max(text) if max(text) >= vocabulary else min(text)
            raise InputError(
                f"OnPolicySampler: the generator wrote token {wrong}, expected "
                f"ids from 0 to {vocabulary - 1}: is it a model of another tokenizer?"
            )
        self._texts += 1
        self._tokens += len(text)
        self._stopped += bool(ends)
        self._empty += not text
        return text


def _vocabulary(model: torch.nn.Module) -> int:
    """Rows of the model's embedding."""
    inner: Any = unwrapped(model)
    return int(inner.get_input_embeddings().weight.shape[0])
